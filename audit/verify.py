"""``hemacrypt verify``: encrypted against clear on real images, under each scheme, in this process.

Everything is real but the wire: a secret key, seeded ciphertexts, evaluation keys that went through bytes, an engine.
Under CKKS the clear network is the one of the bundle, and a logit may be off by the plan's bound. Under BFV it is the
network with integer weights: its integers must come out exactly. How far its logits lie from those of the bundle's
network is told beside what the plan predicts that quantisation costs, and is no matter of encryption.

Whoever holds a bundle is the laboratory, so this tells nobody anything new; it is how either party, or a reviewer,
convinces themselves that encryption changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from audit.cases import Case
from client_sdk._crypto import BfvKeyHolder, KeyHolder
from client_sdk._exceptions import ClientError
from client_sdk._results import Scheme
from hemacrypt import DISCLAIMER
from hemacrypt.engines import encrypted_bfv_engine, encrypted_engine
from hemacrypt.engines.base import BaseEngine
from hemacrypt.errors import FormatError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import Array
from hemacrypt.plan.bfv_plan import BfvPlan, PublicBfvPlan
from hemacrypt.plan.plan import Plan
from hemacrypt.planner import plan_bundle_layouts
from hemacrypt.planner.latency.bfv import plan_bfv, quantised_for
from hemacrypt.seal.evaluation_keys import EvaluationKeys

Keep = Callable[[Scheme, Sequence["Outcome | None"]], None]

_STAGES = ("encrypt", "compute", "decrypt")
SCHEMES: tuple[Scheme, ...] = ("ckks", "bfv")


@dataclass(frozen=True)
class Outcome:
    """What came of one image.

    Attributes
    ----------
    case:
        The image.
    encrypted, clear:
        Logits that were decrypted, and of the network that is evaluated, in the clear; shape (logits,).
    trained:
        Logits of the bundle's network, in the clear; the same as ``clear`` under CKKS.
    equal:
        Whether the integers are equal; None under CKKS, which has none.
    bound:
        Bound on the difference of a logit between encrypted and clear, of this image; 0 under BFV.
    ms:
        Milliseconds of each stage.
    upload, reply:
        Bytes of the ciphertexts there and back.
    """

    case: Case
    encrypted: Array
    clear: Array
    trained: Array
    equal: bool | None
    bound: float
    ms: dict[str, float]
    upload: int
    reply: int

    @property
    def agrees(self) -> bool:
        """Whether encrypted and clear give the same label."""
        return _index(self.encrypted) == _index(self.clear)

    @property
    def error(self) -> float:
        """Largest difference of a logit between encrypted and clear."""
        return float(np.abs(self.encrypted - self.clear).max())

    @property
    def quantisation_error(self) -> float:
        """Largest difference of a logit between encrypted and the bundle's network."""
        return float(np.abs(self.encrypted - self.trained).max())


class _Approximate:
    """The CKKS side: plan, keys, engine."""

    scheme: Scheme = "ckks"

    def __init__(self, bundle: Bundle, plan: Plan, engine: str, threads: int) -> None:
        self.plan, self._network = plan, bundle.network
        self._holder = KeyHolder(plan.public)
        self._engine = encrypted_engine(engine, plan, threads)
        self._keys, self.key_bytes = _registered(self._engine, self._holder.evaluation_keys())

    def warm_up(self, values: npt.NDArray[np.float32]) -> None:
        """Let a first evaluation pay for loading or compiling kernels."""
        self._evaluate(self._holder.encrypt(np.repeat(values[None], self.plan.public.images, axis=0)))

    def run(self, cases: Sequence[Case], values: npt.NDArray[np.float32]) -> list[Outcome]:
        """Evaluate at most as many images as the plan takes at once; each has its share of time and bytes."""
        several = self.plan.public.images
        filled = np.concatenate([values, np.repeat(values[-1:], several - len(values), axis=0)])
        answer, ms, upload, reply = _timed(self._holder.encrypt, self._evaluate, self._holder.decrypt_bounded, filled)
        shares = {stage: whole / several for stage, whole in ms.items()}
        logits, bounds = answer
        return [
            Outcome(case, found, clear, clear, None, float(bound), shares, upload // several, reply // several)
            for case, found, clear, bound in zip(cases, logits, self._network(values), bounds, strict=False)
        ]

    def _evaluate(self, ciphertexts: list[bytes]) -> list[bytes]:
        return self._engine.evaluate(ciphertexts, self._keys)


class _Exact:
    """The BFV side: plan, keys, engine, and the network with integer weights that it must equal."""

    scheme: Scheme = "bfv"

    def __init__(self, bundle: Bundle, plan: BfvPlan, engine: str, threads: int) -> None:
        self.plan, self._network = plan, bundle.network
        self._quantised = quantised_for(bundle.network, plan)
        self._holder = BfvKeyHolder(plan.public, None)
        self._engine = encrypted_bfv_engine(engine, plan, threads)
        self._keys, self.key_bytes = _registered(self._engine, self._holder.evaluation_keys())

    def warm_up(self, values: npt.NDArray[np.float32]) -> None:
        """Let a first evaluation pay for loading or compiling kernels."""
        self._evaluate(self._holder.encrypt(values[None]))

    def run(self, cases: Sequence[Case], values: npt.NDArray[np.float32]) -> list[Outcome]:
        """Evaluate one image both ways: exact plans take no more at once."""
        (case,), decrypt = cases, self._holder.decrypt_integers
        found, ms, upload, reply = _timed(self._holder.encrypt, self._evaluate, decrypt, values)
        integers, expected = [[int(n) for n in row] for row in (found[0], self._quantised.integers(values)[0])]
        scale = self.plan.public.output_scale
        encrypted, clear = (np.array(row, dtype=np.float64) / scale for row in (integers, expected))
        trained = self._network(values)[0]
        return [Outcome(case, encrypted, clear, trained, integers == expected, 0.0, ms, upload, reply)]

    def _evaluate(self, ciphertexts: list[bytes]) -> list[bytes]:
        return self._engine.evaluate(ciphertexts, self._keys)


def verify(
    bundle: Bundle,
    cases: Sequence[Case],
    schemes: Sequence[Scheme],
    engine: str,
    threads: int,
    console: Console,
    keep: Keep | None = None,
    pairs: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate images encrypted and in the clear; print and return what came of it, one record for each scheme.

    Parameters
    ----------
    bundle:
        The model.
    cases:
        At least one image.
    schemes:
        Of `SCHEMES`.
    engine, threads:
        Name of the engine, and how many threads it may use for one image.
    console:
        Where to print.
    keep:
        Is given each scheme's outcomes, one for each image in order, None where the answer could not be read; see
        `write_logits`.
    pairs:
        Under CKKS evaluate two images at a time where there is a plan for that: nearly twice as many in the same time,
        with larger bounds.

    Raises
    ------
    ImageError
        If an image cannot be what the model reads.
    PlanError
        If a network cannot be planned under a scheme.
    """
    # All of them before the first: a bad file should show at once, and not after an hour.
    values = [bundle.manifest.preprocessing(case.image) for case in cases]
    records = []
    for scheme, side in zip(schemes, _sides(bundle, schemes, engine, threads, console, pairs), strict=True):
        side.warm_up(values[0])
        several = side.plan.public.images
        found: list[Outcome | None] = []
        unreadable = []
        starts = range(0, len(cases), several)
        for start in track(starts, f"{scheme}: encrypt → evaluate → decrypt → compare", console=console):
            some = cases[start : start + several]
            try:
                found += side.run(some, np.stack(values[start : start + several]))
            except FormatError as error:
                found += [None] * len(some)
                unreadable += [f"{case.source}: {error}" for case in some]
        outcomes = [outcome for outcome in found if outcome is not None]
        if not outcomes:
            raise FormatError("reply", f"no answer of {len(cases)} under {scheme} could be read; {unreadable[0]}")
        record = summarise(side, outcomes, unreadable, bundle) | {"engine": engine, "threads": threads}
        record["images_at_a_time"] = several
        show(record, outcomes, bundle.manifest.labels, console)
        records.append(record)
        if keep is not None:
            keep(scheme, found)
    return records


def _sides(
    bundle: Bundle, schemes: Sequence[Scheme], engine: str, threads: int, console: Console, pairs: bool
) -> Iterator[_Approximate | _Exact]:
    layouts = plan_bundle_layouts(bundle, exact="bfv" in schemes, engine=engine)
    for scheme in schemes:
        started = time.perf_counter()
        if scheme == "ckks":
            plan = layouts.plans[-1] if pairs else layouts.plans[0]
            if pairs and plan.public.images == 1:
                console.print("ckks: no plan takes two images at a time, so they go one by one", highlight=False)
            side: _Approximate | _Exact = _Approximate(bundle, plan, engine, threads)
        else:
            side = _Exact(bundle, layouts.exact[0] if layouts.exact else _exact_alone(bundle), engine, threads)
        took = time.perf_counter() - started
        console.print(f"{scheme}: keys made and weights encoded in {took:.1f} s", highlight=False)
        yield side


def _exact_alone(bundle: Bundle) -> BfvPlan:
    """Plan BFV with parameters and keys of its own, for networks that cannot share those of CKKS."""
    manifest = bundle.manifest
    return plan_bfv(bundle.network, manifest.name, manifest.labels, manifest.preprocessing.digest)


def _registered(engine: BaseEngine[Any, Any], keys: EvaluationKeys) -> tuple[Any, int]:
    """Load evaluation keys as a service does, from their bytes; return them and how many bytes they are."""
    blob = keys.to_bytes()
    return engine.load_keys(EvaluationKeys.from_bytes(blob)), len(blob)


def _timed(
    encrypt: Callable[[npt.ArrayLike], list[bytes]],
    evaluate: Callable[[list[bytes]], list[bytes]],
    decrypt: Callable[[list[bytes]], Any],
    values: npt.NDArray[np.float32],
) -> tuple[Any, dict[str, float], int, int]:
    """Run the three stages; return the answer, the milliseconds of each, and the bytes there and back."""
    times = [time.perf_counter()]
    ciphertexts = encrypt(values)
    times.append(time.perf_counter())
    replies = evaluate(ciphertexts)
    times.append(time.perf_counter())
    answer = decrypt(replies)
    times.append(time.perf_counter())
    ms = {stage: (end - start) * 1e3 for stage, start, end in zip(_STAGES, times, times[1:], strict=False)}
    return answer, ms, sum(map(len, ciphertexts)), sum(map(len, replies))


def summarise(
    side: _Approximate | _Exact, outcomes: Sequence[Outcome], unreadable: Sequence[str], bundle: Bundle
) -> dict[str, Any]:
    """Return the record of one scheme: counts, errors and their bounds, accuracies, times, bytes.

    Answers that the key holder refuses to read count as disagreements and, under BFV, as inexact.
    """
    public = side.plan.public
    labelled = [outcome for outcome in outcomes if outcome.case.label is not None]
    record: dict[str, Any] = {
        "scheme": side.scheme,
        "model": public.model,
        "bundle": bundle.digest,
        "plan_id": public.plan_id,
        "images": len(outcomes) + len(unreadable),
        "disagreements": sum(not outcome.agrees for outcome in outcomes) + len(unreadable),
        "unreadable": list(unreadable),
        "exact": all(outcome.equal for outcome in outcomes) and not unreadable
        if isinstance(public, PublicBfvPlan)
        else None,
        "max_logit_error": max(outcome.error for outcome in outcomes),
        # Each image has a bound of its own: see `PublicPlan.error_bounds`.
        "logit_error_bound": max(outcome.bound for outcome in outcomes),
        "beyond_bound": sum(not outcome.error <= outcome.bound for outcome in outcomes),
    }
    if isinstance(public, PublicBfvPlan):
        record |= {
            "inexact": sum(not outcome.equal for outcome in outcomes) + len(unreadable),
            "quantisation": {
                "max_logit_error": max(outcome.quantisation_error for outcome in outcomes),
                "predicted": public.quantisation_error,
                "disagreements": sum(_index(o.encrypted) != _index(o.trained) for o in outcomes),
            },
            "plain_moduli": list(public.plain_moduli),
        }
    record |= {
        "accuracy": _accuracies(labelled) if labelled else None,
        "ms": {
            stage: {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
            for stage in _STAGES
            for values in [[outcome.ms[stage] for outcome in outcomes]]
        },
        "bytes": {
            "upload_per_image": int(np.median([outcome.upload for outcome in outcomes])),
            "reply_per_image": int(np.median([outcome.reply for outcome in outcomes])),
            "evaluation_keys": side.key_bytes,
        },
        "note": DISCLAIMER,
    }
    return record


def _accuracies(outcomes: Sequence[Outcome]) -> dict[str, float | int]:
    truths = [outcome.case.label for outcome in outcomes]

    def accuracy(logits: Iterable[Array]) -> float:
        return float(np.mean([_index(row) == truth for row, truth in zip(logits, truths, strict=True)]))

    return {
        "images": len(outcomes),
        "encrypted": accuracy(outcome.encrypted for outcome in outcomes),
        "clear": accuracy(outcome.clear for outcome in outcomes),
        "as_trained": accuracy(outcome.trained for outcome in outcomes),
    }


def failures(record: dict[str, Any]) -> list[str]:
    """Say what is wrong in a record; nothing when encryption kept every promise."""
    found = []
    if record["unreadable"]:
        found.append(f"{len(record['unreadable'])} answers cannot be read, the first is {record['unreadable'][0]}")
    if record["disagreements"]:
        found.append(f"{record['disagreements']} of {record['images']} predictions disagree")
    if record["exact"] is False:
        found.append(f"the integers of {record['inexact']} of {record['images']} images are not those of the network")
    if record["beyond_bound"]:
        found.append(
            f"the logits of {record['beyond_bound']} of {record['images']} images are off by more than bounded"
        )
    return found


def combined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is written as JSON: the only record, or all by scheme and what they say together."""
    if len(records) == 1:
        return records[0]
    exact = [record["exact"] for record in records if record["exact"] is not None]
    return {
        "images": max(record["images"] for record in records),
        "disagreements": sum(record["disagreements"] for record in records),
        "exact": all(exact) if exact else None,
        "max_logit_error": max(record["max_logit_error"] for record in records),
        "logit_error_bound": max(record["logit_error_bound"] for record in records),
        "schemes": {record["scheme"]: record for record in records},
        "note": DISCLAIMER,
    }


def show(record: dict[str, Any], outcomes: Sequence[Outcome], labels: Sequence[str], console: Console) -> None:
    """Print a record for people, with the images that something is wrong with."""
    wrong = [outcome for outcome in outcomes if not outcome.agrees or outcome.equal is False]
    if wrong:
        table = Table("image", "encrypted", "clear", "logit error", title="What differs", title_justify="left")
        for outcome in wrong[:20]:
            names = [_label(_index(row), labels) for row in (outcome.encrypted, outcome.clear)]
            table.add_row(outcome.case.source, *names, f"{outcome.error:.1e}", style="bold red")
        console.print(table)
    milliseconds, sizes = record["ms"], record["bytes"]
    stages = Table("stage", "median ms", "p95 ms", title=f"{record['scheme']}: time of one image", title_justify="left")
    for stage in _STAGES:
        stages.add_row(stage, f"{milliseconds[stage]['median']:.1f}", f"{milliseconds[stage]['p95']:.1f}")
    console.print(stages)
    lines = [
        f"bytes: up {sizes['upload_per_image']:,} per image, down {sizes['reply_per_image']:,}, "
        f"evaluation keys {sizes['evaluation_keys']:,} once"
    ]
    if record["accuracy"]:
        told = record["accuracy"]
        lines.append(
            f"accuracy on {told['images']} labelled images: encrypted {told['encrypted']:.2%}, "
            f"clear {told['clear']:.2%}, as trained {told['as_trained']:.2%}"
        )
    if record["exact"] is None:
        lines.append(
            f"largest logit error {record['max_logit_error']:.2e}, the plan's bound {record['logit_error_bound']:.2e}"
        )
    else:
        equal, cost = record["images"] - record["inexact"], record["quantisation"]
        lines += [
            f"the integers of {equal} of {record['images']} images are exactly those of the quantised network",
            f"quantisation moved a logit by {cost['max_logit_error']:.2e} at most, predicted {cost['predicted']:.2e}; "
            f"it changed {cost['disagreements']} predictions of the network as it was trained",
        ]
    for line in lines:
        console.print(line, highlight=False)
    told = f"encrypted and clear disagree on {record['disagreements']} of {record['images']} images"
    console.print(f"[bold]{record['scheme']}: {told}[/]")


def write(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write what came of it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(combined(records), indent=2) + "\n", encoding="utf-8")


def check_target(path: Path) -> None:
    """See that a file can stand where it is to be written: before an hour of work, not after it.

    Raises
    ------
    ClientError
        If a directory stands there, or something that is none where a directory would have to be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror}; name a file in another folder") from error
    if path.is_dir():
        raise ClientError(f"{path} is a folder; name a file in it")


def write_logits(kept: Mapping[Scheme, Sequence[Outcome | None]], cases: Sequence[Case], path: Path) -> None:
    """Write what every image came to as an ``.npz`` archive of plain arrays, for figures that need more than counts.

    Row i of each array is image i: ``sources`` (text) and ``labels`` (int64, -1 where none is known); then of each
    scheme ``encrypted`` (the decrypted logits), ``clear`` (those of the network that was evaluated) and ``trained``
    (those of the bundle's network, which differs under BFV), float64, shape (images, logits), and ``bound`` on the
    error of ``encrypted``, shape (images,). NaN stands where an answer could not be read; ``unreadable`` counts these.
    With several schemes the names begin with that of the scheme, for example ``ckks_encrypted``.

    The key that decrypted them served nothing else, so digits below the bound give nothing away that matters.

    Parameters
    ----------
    kept:
        By scheme, an outcome or None for each case; what `verify` gives to ``keep``.
    path:
        File to write, replaced where it exists.

    Raises
    ------
    ClientError
        If the file cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "sources": np.array([case.source for case in cases]),
        "labels": np.array([-1 if case.label is None else case.label for case in cases], dtype=np.int64),
    }
    for scheme, outcomes in kept.items():
        prefix = f"{scheme}_" if len(kept) > 1 else ""
        arrays |= {prefix + name: array for name, array in _logit_arrays(outcomes).items()}
    try:
        # Through an open file, or NumPy would add a suffix to the name.
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's own keyword is allow_pickle alone
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror}; check the folder and its permissions") from error


def _logit_arrays(outcomes: Sequence[Outcome | None]) -> dict[str, npt.NDArray[Any]]:
    read = [row for row, outcome in enumerate(outcomes) if outcome is not None]
    told = [outcome for outcome in outcomes if outcome is not None]
    shape = (len(outcomes), len(told[0].encrypted))
    arrays: dict[str, npt.NDArray[Any]] = {name: np.full(shape, np.nan) for name in ("encrypted", "clear", "trained")}
    for name, array in arrays.items():
        array[read] = [getattr(outcome, name) for outcome in told]
    bound = np.full(len(outcomes), np.nan)
    bound[read] = [outcome.bound for outcome in told]
    return arrays | {"bound": bound, "unreadable": np.array(len(outcomes) - len(told))}


def _index(logits: Array) -> int:
    """Return the number of the label; with one logit, whether it is positive."""
    return int(logits[0] > 0) if len(logits) == 1 else int(np.argmax(logits))


def _label(index: int, labels: Sequence[str]) -> str:
    return labels[index] if len(labels) > 1 else f"{'' if index else 'not '}{labels[0]}"
