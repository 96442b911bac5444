"""The reference for exact plans: Microsoft SEAL, every cryptographic operation included.

SEAL's BFV rotates and switches keys among coefficients, transforming there and back each time; its CKKS does the same
arithmetic in NTT form. So affine maps, relinearisation and modulus switches ("rescaling") run in CKKS contexts of the
same primes, squares and biases in BFV contexts, and between them a ciphertext changes its name, nothing else
(`hemacrypt.sealformat.relabelled`). One set of keys therefore serves all plaintext moduli.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tenseal.sealapi as seal

from hemacrypt import sealformat, sealio
from hemacrypt.bfv_plan import BfvLinear, BfvPlan, BfvSquare, Integers
from hemacrypt.engines.base import ExactEngine
from hemacrypt.engines.seal import SealKeys, Turner, load_keys
from hemacrypt.errors import PlanError
from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.sealio import Context, SealObject


@dataclass(frozen=True)
class _Encoded:
    """A layer under one plaintext modulus: diagonals in NTT form under CKKS' names, and biases, which are BFV's."""

    diagonals: list[SealObject]
    biases: list[SealObject]


class BfvSealEngine(ExactEngine[SealKeys]):
    """Evaluates exact plans with SEAL on one core.

    Parameters
    ----------
    plan:
        The plan, weights included.
    """

    name: ClassVar[str] = "seal"

    def __init__(self, plan: BfvPlan) -> None:
        super().__init__(plan)
        parameters = plan.parameters
        levels = {parameters.top_level, *(step.level for step in plan.steps)}
        self._contexts = {level: sealio.make_context(parameters.truncated(level)) for level in levels}
        self._moduli = [_Modulus(plan, number, self._contexts) for number in range(len(plan.public.plain_moduli))]

    def load_keys(self, keys: EvaluationKeys) -> SealKeys:
        """Check and load a client's evaluation keys; see `Engine.load_keys`."""
        return load_keys(keys, self.plan.public, self._contexts)

    def evaluate(self, ciphertexts: Sequence[bytes], keys: SealKeys) -> list[bytes]:
        """Evaluate the network on one request; see `Engine.evaluate`."""
        self.check_count(ciphertexts)
        each = self.plan.public.input_layout.ciphertexts
        values = [
            modulus.load(ciphertexts[number * each : (number + 1) * each])
            for number, modulus in enumerate(self._moduli)
        ]
        return [
            sealio.dump(result)
            for modulus, inputs in zip(self._moduli, values, strict=True)
            for result in modulus.evaluate(inputs, keys)
        ]


class _Modulus:
    """The network modulo one of the plaintext moduli.

    A ciphertext in NTT form bears the name of CKKS, one of coefficients that of BFV.
    """

    def __init__(self, plan: BfvPlan, number: int, contexts: dict[int, Context]) -> None:
        self._plan, self._parameters = plan, plan.parameters
        self._modulus = plan.public.plain_moduli[number]
        self._minor = sealio.seal_minor_version()
        self._context, self._ntt_context = sealio.make_context(plan.parameters, self._modulus), contexts
        self._evaluator = seal.Evaluator(self._context)
        self._ntt_evaluators = {level: seal.Evaluator(context) for level, context in contexts.items()}
        self._turner = Turner(plan.parameters, self._ntt_evaluators)
        self._encoder = seal.BatchEncoder(self._context)
        self._encoded = {
            place: self._encode_layer(step, step.bias[number])
            for place, step in enumerate(plan.steps)
            if isinstance(step, BfvLinear)
        }

    def load(self, ciphertexts: Sequence[bytes]) -> list[SealObject]:
        """Check ciphertexts from the wire and load them."""
        top = self._parameters.top_level
        checked = [
            sealformat.check_ciphertext(ciphertext, self._parameters, top, 1.0, self._minor, self._modulus)
            for ciphertext in ciphertexts
        ]
        return [sealio.load(seal.Ciphertext(), self._context, stream) for stream in checked]

    def evaluate(self, values: list[SealObject], keys: SealKeys) -> list[SealObject]:
        """Evaluate all steps."""
        for number, step in enumerate(self._plan.steps):
            if isinstance(step, BfvLinear):
                values = self._linear(step, self._encoded[number], values, keys)
            else:
                values = [self._square(step, value, keys) for value in values]
        return [self._from_ntt(value, self._plan.public.output_level) for value in values]

    def _encode_layer(self, step: BfvLinear, biases: Integers) -> _Encoded:
        diagonals = [self._diagonal(rows, step.level) for rows in step.diagonals]
        for giants in step.giants:
            # SEAL refuses a ciphertext that encrypts nothing, and so would a client.
            if all(diagonals[term.diagonal].is_zero() for terms in giants for term in terms):
                raise PlanError(
                    f"{step.name}: all weights of a ciphertext are zero modulo {self._modulus}; remove outputs that "
                    "depend on nothing, or choose another plaintext modulus"
                )
        return _Encoded(diagonals, [self._encode(rows) for rows in biases])

    def _encode(self, rows: Integers) -> SealObject:
        return sealio.encode_rows(self._encoder, rows, self._modulus)

    def _diagonal(self, rows: Integers, level: int) -> SealObject:
        plain = self._encode(rows)
        if not plain.is_zero():
            words = sealio.parms_id_words(self._parameters.parms_id(level, self._modulus))
            self._evaluator.transform_to_ntt_inplace(plain, words)
            plain = self._renamed(plain, level, 0)
        return plain

    def _renamed(self, thing: SealObject, level: int, plain_modulus: int) -> SealObject:
        """Copy a ciphertext or plaintext in NTT form into the contexts of the other scheme."""
        # A square has three polynomials.
        largest = 2 * sealformat.ciphertext_bytes(self._parameters, level, seeded=False)
        name = self._parameters.parms_id(level, plain_modulus)
        stream = sealformat.relabelled(sealio.dump(thing), largest, name, self._minor)
        context = self._context if plain_modulus else self._ntt_context[self._parameters.top_level]
        return sealio.load(type(thing)(), context, stream)

    def _to_ntt(self, value: SealObject, level: int) -> SealObject:
        """Bring a ciphertext into NTT form, where it is one of CKKS."""
        if value.is_ntt_form():
            return value
        self._evaluator.transform_to_ntt_inplace(value)
        return self._renamed(value, level, 0)

    def _from_ntt(self, value: SealObject, level: int) -> SealObject:
        """Bring a ciphertext into coefficient form, where it is one of BFV."""
        if not value.is_ntt_form():
            return value
        value.scale = 1.0
        renamed = self._renamed(value, level, self._modulus)
        self._evaluator.transform_from_ntt_inplace(renamed)
        return renamed

    def _switch_down(self, value: SealObject, step: BfvLinear | BfvSquare) -> None:
        for _ in range(step.level - step.next_level):
            value.scale = 1.0
            self._ntt_evaluators[step.level].rescale_to_next_inplace(value)

    def _linear(self, step: BfvLinear, encoded: _Encoded, values: list[SealObject], keys: SealKeys) -> list[SealObject]:
        copies = self._turner.copies(step, [self._to_ntt(value, step.level) for value in values], keys)
        outputs: list[SealObject] = []
        for output, bias in enumerate(encoded.biases):
            total = self._turner.total(step, output, copies, encoded.diagonals, keys)
            self._switch_down(total, step)
            total = self._from_ntt(total, step.next_level)
            self._evaluator.add_plain_inplace(total, bias)
            outputs.append(total)
        return outputs

    def _square(self, step: BfvSquare, value: SealObject, keys: SealKeys) -> SealObject:
        value = self._from_ntt(value, step.level)
        self._evaluator.square_inplace(value)
        value = self._to_ntt(value, step.level)
        self._ntt_evaluators[step.level].relinearize_inplace(value, keys.at(step.level, 1))
        self._switch_down(value, step)
        return value
