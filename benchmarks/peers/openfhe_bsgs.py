"""OpenFHE: our packing with its hoisted rotations, at N = 8192 and HEStd_128_classic.

OpenFHE's Python package has no layers, so the affine maps are products with diagonals. Baby steps share one
decomposition (EvalFastRotationPrecompute); giant steps and rotate-and-sums stay in the extended modulus until their
sum is switched down once (EvalFastRotationExt, KeySwitchDown). Variants: ``manual`` (FIXEDMANUAL, fastest; it takes
every prime for the scale, so weights are scaled ahead to make up for that) and ``auto`` (FLEXIBLEAUTO keeps exact
scales itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import openfhe

from benchmarks.peers.packing import Packing, Stage, make_packing
from benchmarks.peers.worker import Array, CaseFile, Options, Skipped, serve

_DEGREE = 8192
_FIRST_BITS, _SCALE_BITS, _DIGITS = 30, 25, 3
Ciphertext = Any


@dataclass(frozen=True)
class _Encoded:
    giants: dict[int, dict[int, Any]]
    bias: Any


class OpenFhe:
    """A context, keys and encoded diagonals for one network."""

    def __init__(self, packing: Packing, variant: str) -> None:
        self._packing = packing
        self._manual = variant != "auto"
        depth = 2 * len(packing.stages) - 1
        parameters = openfhe.CCParamsCKKSRNS()
        parameters.SetRingDim(_DEGREE)
        parameters.SetSecurityLevel(openfhe.HEStd_128_classic)
        parameters.SetMultiplicativeDepth(depth)
        parameters.SetFirstModSize(_FIRST_BITS)
        parameters.SetScalingModSize(_SCALE_BITS)
        parameters.SetKeySwitchTechnique(openfhe.HYBRID)
        parameters.SetNumLargeDigits(_DIGITS)
        parameters.SetScalingTechnique(openfhe.FIXEDMANUAL if self._manual else openfhe.FLEXIBLEAUTO)
        parameters.SetBatchSize(packing.slots)
        self._context = openfhe.GenCryptoContext(parameters)
        for feature in (openfhe.PKE, openfhe.KEYSWITCH, openfhe.LEVELEDSHE):
            self._context.Enable(feature)
        self._keys = self._context.KeyGen()
        self._context.EvalMultKeyGen(self._keys.secretKey)
        self._context.EvalRotateKeyGen(self._keys.secretKey, packing.rotations)
        losses = self._losses(depth) if self._manual else [1.0] * depth
        self._encoded = [self._encode(number, stage, losses) for number, stage in enumerate(packing.stages)]

    def _losses(self, depth: int) -> list[float]:
        """Measure by what factor too large a value is after the rescale at each level: 2^25 by that level's prime."""
        ones = np.ones(self._packing.slots)
        value = self._context.Encrypt(self._keys.publicKey, self._plain(ones, 0))
        found = [1.0]
        for level in range(depth):
            value = self._context.Rescale(self._context.EvalMult(value, self._plain(ones, level)))
            plain = self._context.Decrypt(self._keys.secretKey, value)
            found.append(float(np.mean(plain.GetRealPackedValue())))
        return [after / before for before, after in pairwise(found)]

    def _encode(self, number: int, stage: Stage, losses: list[float]) -> _Encoded:
        level = 2 * number
        # The square that follows multiplies its own loss in; scaled like this, its result is right.
        wanted = losses[level + 1] ** -0.5 if level + 1 < len(losses) else 1.0
        weight = wanted / losses[level]
        giants = {
            giant: {baby: self._plain(weight * diagonal, level) for baby, diagonal in row.items()}
            for giant, row in stage.giants.items()
        }
        return _Encoded(giants, self._plain(wanted * stage.bias, level + self._manual))

    def _plain(self, values: Array, level: int) -> Any:
        return self._context.MakeCKKSPackedPlaintext(values.tolist(), 1, level)

    def encrypt(self, images: Array) -> Ciphertext:
        """Encrypt one image."""
        return self._context.Encrypt(self._keys.publicKey, self._plain(self._packing.pack(images[0]), 0))

    def compute(self, request: Ciphertext) -> Ciphertext:
        """Evaluate the network."""
        context, value = self._context, request
        for number, (stage, encoded) in enumerate(zip(self._packing.stages, self._encoded, strict=True)):
            if number:
                value = context.EvalSquare(value)
                if self._manual:
                    context.RescaleInPlace(value)
            value = self._linear(stage, encoded, value)
        return value

    def _linear(self, stage: Stage, encoded: _Encoded, value: Ciphertext) -> Ciphertext:
        context = self._context
        digits = context.EvalFastRotationPrecompute(value)
        babies = {baby: context.EvalFastRotation(value, baby, 2 * _DEGREE, digits) for baby in stage.babies}
        babies[0] = value
        total = extended = None
        for giant, row in encoded.giants.items():
            inner = None
            for baby, diagonal in row.items():
                product = context.EvalMult(babies[baby], diagonal)
                if inner is None:
                    inner = product
                else:
                    context.EvalAddInPlace(inner, product)
            if giant == 0:
                total = inner
            else:
                extended = self._add_rotated(extended, inner, giant, context.EvalFastRotationPrecompute(inner))
        if extended is not None:
            switched = context.KeySwitchDown(extended)
            total = switched if total is None else context.EvalAdd(total, switched)
        for group in stage.sums:
            digits, extended = context.EvalFastRotationPrecompute(total), None
            for rotation in group:
                extended = self._add_rotated(extended, total, rotation, digits)
            context.EvalAddInPlace(total, context.KeySwitchDown(extended))
        if self._manual:
            context.RescaleInPlace(total)
        return context.EvalAdd(total, encoded.bias)

    def _add_rotated(self, total: Ciphertext, value: Ciphertext, rotation: int, digits: Any) -> Ciphertext:
        """Add a rotation of a value to a sum in the extended modulus; there is no sum yet when it is None."""
        rotated = self._context.EvalFastRotationExt(value, rotation, digits, True)
        if total is None:
            return rotated
        self._context.EvalAddInPlace(total, rotated)
        return total

    def decrypt(self, reply: Ciphertext) -> npt.ArrayLike:
        """Return the logits."""
        plain = self._context.Decrypt(self._keys.secretKey, reply)
        plain.SetLength(self._packing.outputs)
        return np.asarray(plain.GetRealPackedValue()[: self._packing.outputs])

    def facts(self, request: Ciphertext, reply: Ciphertext) -> dict[str, Any]:
        """Return sizes as OpenFHE serialises, and its version."""
        binary = openfhe.BINARY
        rotation, multiplication = openfhe.SerializeEvalAutomorphismKeyString, openfhe.SerializeEvalMultKeyString
        sizes = {
            "upload": len(openfhe.Serialize(request, binary)),
            "reply": len(openfhe.Serialize(reply, binary)),
            "keys": len(rotation(binary, "")) + len(multiplication(binary, "")),
        }
        return {"bytes": sizes, "version": version("openfhe")}


def prepare(case: CaseFile, options: Options) -> OpenFhe:
    """Make OpenFHE ready for a case."""
    if options.batch > 1:
        raise Skipped("this packing holds one image")
    return OpenFhe(make_packing(case, _DEGREE // 2), options.variant)


if __name__ == "__main__":
    serve(prepare)
