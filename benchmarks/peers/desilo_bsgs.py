"""DESILO FHE: our packing on its hoisted rotations; it fixes degree and primes itself (N = 16384 at these levels)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import desilofhe
import numpy as np
import numpy.typing as npt

from benchmarks.peers.packing import Packing, Stage, make_packing
from benchmarks.peers.worker import Array, CaseFile, Options, Skipped, serve


class Desilo:
    """An engine, keys and encoded diagonals for one network."""

    def __init__(self, case: CaseFile, threads: int) -> None:
        level = 2 * len(case.layers) - 1
        mode: dict[str, Any] = {"mode": "parallel", "thread_count": threads} if threads > 1 else {"mode": "cpu"}
        self._engine = desilofhe.Engine(max_level=level, **mode)
        self._packing: Packing = make_packing(case, self._engine.slot_count)
        self._secret = self._engine.create_secret_key()
        self._public = self._engine.create_public_key(self._secret)
        self._relinearisation = self._engine.create_relinearization_key(self._secret)
        self._rotations = {
            step: self._engine.create_fixed_rotation_key(self._secret, step) for step in self._packing.rotations
        }
        self._encoded = [self._encode(stage, level - 2 * number) for number, stage in enumerate(self._packing.stages)]

    def _encode(self, stage: Stage, level: int) -> tuple[dict[int, dict[int, Any]], Any]:
        giants = {
            giant: {baby: self._engine.encode(diagonal, level) for baby, diagonal in row.items()}
            for giant, row in stage.giants.items()
        }
        return giants, self._engine.encode(stage.bias, level - 1)

    def encrypt(self, images: Array) -> Any:
        """Encrypt one image."""
        return self._engine.encrypt(self._packing.pack(images[0]), self._public)

    def compute(self, request: Any) -> Any:
        """Evaluate the network; DESILO rescales in each product."""
        engine, value = self._engine, request
        for number, (stage, (giants, bias)) in enumerate(zip(self._packing.stages, self._encoded, strict=True)):
            if number:
                value = engine.square(value, self._relinearisation)
            babies = {0: value, **self._rotated(value, stage.babies)}
            total: Any = None
            for giant, row in giants.items():
                inner: Any = None
                for baby, diagonal in row.items():
                    product = engine.multiply(babies[baby], diagonal)
                    inner = product if inner is None else engine.add(inner, product)
                if giant:
                    inner = engine.rotate(inner, self._rotations[giant])
                total = inner if total is None else engine.add(total, inner)
            for group in stage.sums:
                for rotated in self._rotated(total, group).values():
                    total = engine.add(total, rotated)
            value = engine.add(total, bias)
        return value

    def _rotated(self, value: Any, steps: list[int]) -> dict[int, Any]:
        if not steps:
            return {}
        rotated = self._engine.rotate_many(value, [self._rotations[step] for step in steps])
        return dict(zip(steps, rotated, strict=True))

    def decrypt(self, reply: Any) -> npt.ArrayLike:
        """Return the logits."""
        return np.asarray(np.real(self._engine.decrypt(reply, self._secret)[: self._packing.outputs]))

    def facts(self, request: Any, reply: Any) -> dict[str, Any]:
        """Return sizes as DESILO serialises, and its version."""
        engine = self._engine
        keys = sum(len(engine.serialize_fixed_rotation_key(key)) for key in self._rotations.values())
        sizes = {
            "upload": len(engine.serialize_ciphertext(request)),
            "reply": len(engine.serialize_ciphertext(reply)),
            "keys": keys + len(engine.serialize_relinearization_key(self._relinearisation)),
        }
        return {"bytes": sizes, "version": version("desilofhe")}


def prepare(case: CaseFile, options: Options) -> Desilo:
    """Make DESILO ready for a case."""
    if options.batch > 1:
        raise Skipped("this packing holds one image")
    return Desilo(case, options.threads)


if __name__ == "__main__":
    serve(prepare)
