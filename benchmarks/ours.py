"""Our own engines as the harness measures them; the only benchmark that knows how they are planned and called.

Variants are ``ENGINE/SLOTS`` — ``vector/complex``, ``seal/real`` — and ``throughput``, the layout for thousands of
images, which `benchmarks.batch` measures.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.floor import floor
from benchmarks.networks import Case
from benchmarks.peers.worker import CaseFile, Options, Skipped, read_options, serve
from client_sdk._crypto import KeyHolder
from hemacrypt.engines import encrypted_engine
from hemacrypt.engines.base import Engine
from hemacrypt.errors import HemacryptError
from hemacrypt.model.network import Array, CollapsedNetwork
from hemacrypt.plan.plan import Plan
from hemacrypt.planner import KEY_BUDGET, plan_network


def plan_of(network: CollapsedNetwork, slots: str, batch: int) -> Plan:
    """Plan a network with real or complex slots for so many images in one ciphertext."""
    if batch > 2 or (batch == 2 and slots == "real"):
        raise Skipped("a ciphertext carries two images at most, the second one in the imaginary parts")
    return plan_network(network, slots="real" if slots == "real" else "complex", images=batch)


def engine_of(name: str, plan: Plan, threads: int) -> Engine[Any]:
    """Make an engine."""
    if threads > 1 and name == "seal":
        raise Skipped(f"the engine {name} has one thread only")
    return encrypted_engine(name, plan, threads)


def floor_of(plan: Plan, engine: str) -> dict[str, Any] | None:
    """Return what the plan's primitives cost alone, at the best speed of each on this machine."""
    if engine != "vector":
        return None
    return floor(plan)


def key_budget_mb() -> float | None:
    """Return the megabytes that the planner may spend on evaluation keys."""
    return KEY_BUDGET / 1e6


def throughput(case: Case, threads: int) -> dict[str, Any]:
    """Evaluate all images of a case as one batch; return a row's figures."""
    try:
        measure = import_module("benchmarks.batch").measure
    except ModuleNotFoundError:
        raise Skipped("there is no layout for batches") from None
    found = measure(case.network, case.images, threads)
    # Core milliseconds for each image; a row has wall-clock milliseconds of the whole batch.
    milliseconds = found["compute_ms_per_image"] * found["images"] / threads
    return {
        "ms": [milliseconds],
        "logit_error": found["max_logit_error"],
        "disagreements": found["disagreements"],
        "images": found["images"],
        "rss_mb": found["peak_mb"],
        "bytes": {
            "upload": found["upload_bytes_per_image"] * found["images"],
            "reply": found["reply_bytes_per_image"] * found["images"],
            "keys": None,
        },
    }


class Ours:
    """One engine on one plan, with a hospital's keys."""

    def __init__(self, case: Case, options: Options) -> None:
        self._name, _, slots = options.variant.partition("/")
        try:
            self._plan = plan_of(case.network, slots, options.batch)
            self._engine = engine_of(self._name, self._plan, options.threads)
        except HemacryptError as error:
            raise Skipped(str(error)) from error
        self._holder = KeyHolder(self._plan.public)
        keys = self._holder.evaluation_keys()
        self._key_bytes = len(keys.to_bytes())
        self._keys = self._engine.load_keys(keys)

    def encrypt(self, images: Array) -> list[bytes]:
        """Encrypt a batch."""
        return self._holder.encrypt(images)

    def compute(self, request: list[bytes]) -> list[bytes]:
        """Evaluate the network: bytes from the wire to bytes for the wire, checks included."""
        return self._engine.evaluate(request, self._keys)

    def decrypt(self, reply: list[bytes]) -> npt.ArrayLike:
        """Return the logits."""
        return np.asarray(self._holder.decrypt(reply))

    def facts(self, request: list[bytes], reply: list[bytes]) -> dict[str, Any]:
        """Return sizes, the version, the planned error and the floor."""
        return {
            "bytes": {"upload": sum(map(len, request)), "reply": sum(map(len, reply)), "keys": self._key_bytes},
            "version": version("hemacrypt"),
            "logit_error_bound": self._plan.public.logit_error_bound,
            "key_budget_mb": key_budget_mb(),
            "floor": floor_of(self._plan, self._name),
        }


def prepare(case: CaseFile, options: Options) -> Ours:
    """Make one of our engines ready for a case."""
    return Ours(Case.read(Path(options.case)), options)


def main() -> None:
    """Hold the harness's conversation, or measure a batch and print its row."""
    options = read_options()
    if options.variant != "throughput":
        serve(prepare)
        return
    try:
        print(json.dumps({"measured": throughput(Case.read(Path(options.case)), options.threads)}))
    except Skipped as reason:
        print(json.dumps({"skipped": str(reason)}))


if __name__ == "__main__":
    main()
