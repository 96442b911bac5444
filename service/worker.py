"""A worker process: plans the models, keeps clients' keys loaded, evaluates one image or one batch at a time.

It speaks with the service over one end of a socket pair, in pairs of frames: a JSON header and a body. Nothing is
pickled. Bytes that strangers sent are parsed here and not in the service, under limits on memory, so that the worst
they can do is to end this process.
"""

from __future__ import annotations

import fcntl
import json
import resource
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog

from hemacrypt.engines import batch_engine, encrypted_bfv_engine, encrypted_engine
from hemacrypt.engines.base import BaseEngine
from hemacrypt.errors import FormatError, HemacryptError, PlanError
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan
from hemacrypt.seal.evaluation_keys import EvaluationKeys, key_set_id
from service import logs
from service.catalogue import load_models, why_no_batches
from service.keystore import SpoolDroppedError, spooled

log = structlog.get_logger()

# Loading kernels takes less; compiling them takes longer, and whoever waits wants to know why.
_PATIENCE_SECONDS = 4.0
# Largest header; bodies are bounded by what the service accepts from the wire.
LARGEST_HEADER = 64 * 1024


class KeysDamagedError(Exception):
    """A stored key set no longer hashes to its name."""


def apart(body: bytes, sizes: Sequence[int]) -> tuple[bytes, ...]:
    """Take a frame apart into pieces of given sizes, which its header names."""
    ends = [0, *accumulate(sizes)]
    if ends[-1] != len(body) or min(sizes, default=0) < 0:
        raise ValueError(f"a frame of {len(body)} bytes, its header names {ends[-1]}")
    return tuple(body[start:end] for start, end in pairwise(ends))


@contextmanager
def _alone(directory: Path | None, engine: str, *, exact: bool) -> Iterator[bool]:
    """Let one worker of this user compile at a time; where everything was compiled before, they need not wait.

    Yields whether there may be something to compile.
    """
    if directory is None or engine != "vector":
        yield False
        return
    from hemacrypt.engines.vector.kernels.modular import sources

    done = directory / f"compiled-{sources()[:40]}{'-exact' * exact}"
    if done.exists():
        yield False
        return
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (directory / "compiling.lock").open("a")
    except OSError:
        yield False
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True
        with suppress(OSError):
            done.touch()


class Worker:
    """What a worker process does.

    Parameters
    ----------
    bundles:
        Directories of the models.
    engine:
        Name of the engine.
    cached_keys:
        How many key sets stay loaded.
    threads:
        How many threads share one request.
    key_budget:
        Bytes that a client's keys may take on the wire.
    cache, cache_limit:
        Where encoded weights are kept between starts, and the bytes that they may take.
    memory_mb:
        Address space of this process in MiB; without enough of it no batches are evaluated.
    exact:
        Whether models are also evaluated under BFV.
    precision:
        As in `service.catalogue.load_models`.
    """

    def __init__(
        self,
        bundles: list[Path],
        engine: str,
        cached_keys: int,
        threads: int = 1,
        key_budget: int | None = None,
        cache: Path | None = None,
        cache_limit: int = 4 << 30,
        memory_mb: int = 4096,
        *,
        exact: bool = True,
        precision: int | None = None,
    ) -> None:
        models = load_models(bundles, key_budget, exact=exact, precision=precision, engine=engine)
        self._engines: dict[str, dict[str, BaseEngine[Any, Any]]] = {
            name: {
                plan.public.plan_id: encrypted_engine(engine, plan, threads, cache, cache_limit) for plan in model.plans
            }
            for name, model in models.items()
        }
        self._batches = {
            name: batch_engine(model.batch, threads)
            for name, model in models.items()
            if model.batch is not None and not why_no_batches(model, engine, threads, memory_mb)
        }
        self._exact = {
            name: {plan.public.plan_id: plan for plan in model.exact} for name, model in models.items() if model.exact
        }
        self._exact_engines: dict[str, BaseEngine[Any, Any]] = {}
        self._cached_keys, self._threads = cached_keys, threads
        self._cache, self._engine = cache, engine
        self._keys: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def warm_up(self) -> None:
        """Compile what the engines run, or load what was compiled before, so that no request waits for it."""

        def tell() -> None:
            log.info("compiling the engine for this machine, once; this takes about a minute")

        timer = threading.Timer(_PATIENCE_SECONDS, tell)
        timer.daemon = True
        timer.start()
        # One worker at a time: the first compiles if need be, the others find everything compiled.
        exact = [plan for plans in self._exact.values() for plan in plans.values()]
        with _alone(self._cache, self._engine, exact=bool(exact)) as compiling:
            for engines in self._engines.values():
                for engine in engines.values():
                    engine.warm_up()
            for batch in self._batches.values():
                batch.warm_up()
            if compiling:
                for plan in exact:
                    encrypted_bfv_engine(self._engine, _with_one_modulus(plan), self._threads).warm_up()
        timer.cancel()

    def handle(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Do one job and return the reply's header and body; a refusal is a reply too."""
        forget = header["forget"]
        for known in [key for key in self._keys if forget is None or key[1] in forget]:
            del self._keys[known]
        model, batch, path = header["model"], header["job"] == "batch", Path(header["keys"])
        try:
            load = self._load_batch_keys if batch else self._load_keys
            keys = load(model, header["key_set_id"], path)
        except FormatError as error:
            return {"ok": False, "refusal": "keys", "field": error.field, "message": str(error)}, b""
        except KeysDamagedError:
            return {"ok": False, "refusal": "damaged"}, b""
        except FileNotFoundError:
            return {"ok": False, "refusal": "missing"}, b""
        if header["job"] == "check_keys":
            return {"ok": True}, b""
        try:
            engine = None if batch else self._engine_for(model, header["plan_id"])
            started = time.perf_counter()
            if engine is None:
                reply = self._batches[model].evaluate(spooled(Path(header["spool"])), keys)
            else:
                reply = engine.evaluate(apart(body, header["sizes"]), keys)
        except SpoolDroppedError:
            return {"ok": False, "refusal": "given up"}, b""
        except FormatError as error:
            return {"ok": False, "refusal": "ciphertext", "field": error.field, "message": str(error)}, b""
        except PlanError as error:
            log.error("cannot prepare exact evaluation", model=model, why=str(error))
            return {"ok": False, "refusal": "engine", "error": type(error).__name__}, b""
        except (RuntimeError, ValueError) as error:
            # SEAL gave up in the middle, for which no sound ciphertext and keys are a reason known to us.
            return {"ok": False, "refusal": "engine", "error": type(error).__name__}, b""
        compute = int((time.perf_counter() - started) * 1e6)
        return {"ok": True, "compute_us": compute, "sizes": [len(content) for content in reply]}, b"".join(reply)

    def _engine_for(self, model: str, plan_id: str) -> BaseEngine[Any, Any]:
        """Return the engine of a plan; that of an exact one is made when it is first asked for."""
        if plan_id in self._engines[model]:
            return self._engines[model][plan_id]
        if plan_id not in self._exact_engines:
            started = time.perf_counter()
            plan = self._exact[model][plan_id]
            engine = encrypted_bfv_engine(self._engine, plan, self._threads)
            engine.warm_up()
            self._exact_engines[plan_id] = engine
            log.info("prepared exact evaluation", model=model, seconds=round(time.perf_counter() - started, 1))
        return self._exact_engines[plan_id]

    def _load_keys(self, model: str, wanted: str, path: Path) -> Any:
        known = (model, wanted)
        if known not in self._keys:
            blob = _read_keys(path, wanted)
            # All plans of a model need the same keys, in both schemes, so any engine loads them for all.
            engine = next(iter(self._engines[model].values()))
            keys = engine.load_keys(EvaluationKeys.from_bytes(blob))
            while len(self._keys) >= self._cached_keys:
                self._keys.popitem(last=False)
            self._keys[known] = keys
        self._keys.move_to_end(known)
        return self._keys[known]

    def _load_batch_keys(self, model: str, wanted: str, path: Path) -> Any:
        """Load the few keys of a batch; they are not kept, for a batch takes far longer than that."""
        return self._batches[model].load_keys(EvaluationKeys.from_bytes(_read_keys(path, wanted)))


def _with_one_modulus(plan: BfvPlan) -> BfvPlan:
    """Return a plan that runs the same kernels as another and takes little time to prepare."""
    public = replace(plan.public, plain_moduli=plan.public.plain_moduli[:1], largest_logit=1)
    steps = tuple(replace(step, bias=step.bias[:1]) if isinstance(step, BfvLinear) else step for step in plan.steps)
    return replace(plan, public=public, steps=steps)


def _read_keys(path: Path, wanted: str) -> bytes:
    """Read a stored key set and make sure that it is what its name says."""
    blob = path.read_bytes()
    if key_set_id(blob) != wanted:
        raise KeysDamagedError
    return blob


def main() -> None:
    """Serve jobs until the service closes its end. Started as ``python -m service.worker DESCRIPTOR SETTINGS``."""
    logs.configure()
    connection = Connection(int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    limit = settings["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # Ctrl-C in a terminal reaches the whole group; the service decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A core dump would write clients' keys and the model to disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        worker = _prepared(settings)
    except HemacryptError:
        # The service reads the same bundles and says what is wrong with them.
        sys.exit(1)
    worker.warm_up()
    connection.send_bytes(json.dumps({"ready": True}).encode())
    while True:
        try:
            header = json.loads(connection.recv_bytes(LARGEST_HEADER))
            body = connection.recv_bytes()
        except EOFError:
            return
        reply, content = worker.handle(header, body)
        connection.send_bytes(json.dumps(reply | {"number": header["number"]}).encode())
        connection.send_bytes(content)


def _prepared(settings: dict[str, Any]) -> Worker:
    """Read and plan the models."""
    return Worker(
        [Path(path) for path in settings["bundles"]],
        settings["engine"],
        settings["cached_keys"],
        settings["threads"],
        settings["key_budget"],
        settings["cache"] and Path(settings["cache"]),
        settings["cache_limit_mb"] << 20,
        settings["memory_mb"],
        exact=settings["exact"],
        precision=settings["precision"],
    )


if __name__ == "__main__":
    main()
