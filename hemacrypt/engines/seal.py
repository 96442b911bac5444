"""The reference: Microsoft SEAL through ``tenseal.sealapi``, with every diagonal encoded ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tenseal.sealapi as seal

from hemacrypt import sealformat, sealio
from hemacrypt.engines.base import Engine
from hemacrypt.errors import PlanError
from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.network import Array
from hemacrypt.plan import LinearStep, Plan, SquareStep
from hemacrypt.sealio import SealObject


@dataclass(frozen=True)
class SealKeys:
    """A client's keys, loaded."""

    relinearisation: SealObject
    galois: SealObject


@dataclass(frozen=True)
class _Encoded:
    """A layer's diagonals and bias as plaintexts in NTT form."""

    diagonals: list[SealObject]
    bias: SealObject


class SealEngine(Engine[SealKeys]):
    """Evaluates with SEAL on one core. TenSEAL keeps the GIL throughout, so parallel work needs processes."""

    name: ClassVar[str] = "seal"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._context = sealio.make_context(plan.parameters)
        self._encoder = seal.CKKSEncoder(self._context)
        self._evaluator = seal.Evaluator(self._context)
        self._minor = sealio.seal_minor_version()
        self._encoded = {
            number: self._encode_layer(step) for number, step in enumerate(plan.steps) if isinstance(step, LinearStep)
        }

    def load_keys(self, keys: EvaluationKeys) -> SealKeys:
        """Check and load a client's evaluation keys; see `Engine.load_keys`."""
        checked = keys.checked(self.plan.public, self._minor)
        relinearisation, galois = seal.RelinKeys(), seal.GaloisKeys()
        if checked.relinearisation:
            sealio.load(relinearisation, self._context, checked.relinearisation)
        if checked.galois:
            sealio.load(galois, self._context, checked.galois)
        return SealKeys(relinearisation, galois)

    def evaluate(self, ciphertext: bytes, keys: SealKeys) -> bytes:
        """Evaluate the network on one ciphertext; see `Engine.evaluate`."""
        parameters, public = self.plan.parameters, self.plan.public
        checked = sealformat.check_ciphertext(
            ciphertext, parameters, parameters.top_level, public.input_scale, self._minor
        )
        value = sealio.load(seal.Ciphertext(), self._context, checked)
        for number, step in enumerate(self.plan.steps):
            if isinstance(step, LinearStep):
                value = self._linear(step, self._encoded[number], value, keys)
            else:
                self._square(step, value, keys)
        return sealio.dump(value)

    def _encode_layer(self, step: LinearStep) -> _Encoded:
        diagonals = [self._encode(diagonal, step.level, step.weight_scale) for diagonal in step.diagonals]
        if all(diagonal.is_zero() for diagonal in diagonals):
            raise PlanError(f"{step.name}: all weights are so small that they round to zero; scale the layer up")
        return _Encoded(diagonals, self._encode(step.bias, step.level - 1, step.output_scale))

    def _encode(self, values: Array, level: int, scale: float) -> SealObject:
        plain = seal.Plaintext()
        words = sealio.parms_id_words(self.plan.parameters.parms_id(level))
        self._encoder.encode(values.tolist(), words, scale, plain)
        return plain

    def _linear(self, step: LinearStep, encoded: _Encoded, value: SealObject, keys: SealKeys) -> SealObject:
        evaluator, product = self._evaluator, seal.Ciphertext()
        babies = [value]
        for baby in step.babies[1:]:
            rotated = seal.Ciphertext()
            evaluator.rotate_vector(babies[baby.parent], baby.step, keys.galois, rotated)
            babies.append(rotated)
        total: SealObject = None
        for number, terms in reversed(list(enumerate(step.giants))):
            if total is not None and number < len(step.giants) - 1:
                evaluator.rotate_vector_inplace(total, step.giant_step, keys.galois)
            for term in terms:
                if encoded.diagonals[term.diagonal].is_zero():
                    continue  # weights that round to zero; SEAL refuses the product as transparent
                target = seal.Ciphertext() if total is None else product
                evaluator.multiply_plain(babies[term.baby], encoded.diagonals[term.diagonal], target)
                if total is None:
                    total = target
                else:
                    evaluator.add_inplace(total, product)
        for rotation in step.sums:
            evaluator.rotate_vector(total, rotation, keys.galois, product)
            evaluator.add_inplace(total, product)
        evaluator.rescale_to_next_inplace(total)
        # The planned scale; what SEAL computed differs from it by a rounding of the last bit at most.
        total.scale = step.output_scale
        evaluator.add_plain_inplace(total, encoded.bias)
        return total

    def _square(self, step: SquareStep, value: SealObject, keys: SealKeys) -> None:
        self._evaluator.square_inplace(value)
        self._evaluator.relinearize_inplace(value, keys.relinearisation)
        self._evaluator.rescale_to_next_inplace(value)
        value.scale = step.output_scale
