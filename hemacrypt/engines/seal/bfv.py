"""The reference for exact plans: Microsoft SEAL, every cryptographic operation included.

SEAL's BFV rotates and switches keys among coefficients, transforming there and back each time; its CKKS does the same
arithmetic in NTT form. So affine maps, relinearisation and modulus switches ("rescaling") run in CKKS contexts of the
same primes, squares and biases in BFV contexts, and between them a ciphertext changes its name, nothing else
(`hemacrypt.seal.format.relabelled`). One set of keys therefore serves all plaintext moduli.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tenseal.sealapi as seal

from hemacrypt.engines.base import ExactEngine
from hemacrypt.engines.seal.ckks import SealKeys, Turner, load_keys
from hemacrypt.errors import PlanError
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, BfvSquare, Integers
from hemacrypt.plan.plan import Parameters
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys
from hemacrypt.seal.io import Context, SealObject


class Bridge:
    """Between SEAL's two schemes, for one plaintext modulus.

    A ciphertext in NTT form bears the name of CKKS, one of coefficients that of BFV.

    Parameters
    ----------
    parameters:
        The whole modulus chain.
    modulus:
        The plaintext modulus.
    contexts:
        Contexts of CKKS by level, that of the whole chain among them.
    """

    def __init__(self, parameters: Parameters, modulus: int, contexts: dict[int, Context]) -> None:
        self.parameters, self.modulus = parameters, modulus
        self._minor = sealio.seal_minor_version()
        self.context, self._ntt_context = sealio.make_context(parameters, modulus), contexts[parameters.top_level]
        self.evaluator = seal.Evaluator(self.context)
        self.ntt_evaluators = {level: seal.Evaluator(context) for level, context in contexts.items()}
        self._encoder = seal.BatchEncoder(self.context)

    def load(self, ciphertext: bytes, level: int) -> SealObject:
        """Check a ciphertext from the wire and load it."""
        checked = sealformat.check_ciphertext(ciphertext, self.parameters, level, 1.0, self._minor, self.modulus)
        return sealio.load(seal.Ciphertext(), self.context, checked)

    def encode(self, rows: Integers) -> SealObject:
        """Return a plaintext with these slots, shape (2, slots)."""
        return sealio.encode_rows(self._encoder, rows, self.modulus)

    def renamed(self, thing: SealObject, level: int, plain_modulus: int) -> SealObject:
        """Copy a ciphertext or plaintext in NTT form into the contexts of the other scheme."""
        # A square has three polynomials.
        largest = 2 * sealformat.ciphertext_bytes(self.parameters, level, seeded=False)
        name = self.parameters.parms_id(level, plain_modulus)
        stream = sealformat.relabelled(sealio.dump(thing), largest, name, self._minor)
        context = self.context if plain_modulus else self._ntt_context
        return sealio.load(type(thing)(), context, stream)

    def to_ntt(self, value: SealObject, level: int) -> SealObject:
        """Bring a ciphertext into NTT form, where it is one of CKKS."""
        if value.is_ntt_form():
            return value
        self.evaluator.transform_to_ntt_inplace(value)
        return self.renamed(value, level, 0)

    def from_ntt(self, value: SealObject, level: int) -> SealObject:
        """Bring a ciphertext into coefficient form, where it is one of BFV."""
        if not value.is_ntt_form():
            return value
        value.scale = 1.0
        renamed = self.renamed(value, level, self.modulus)
        self.evaluator.transform_from_ntt_inplace(renamed)
        return renamed

    def switch_down(self, value: SealObject, level: int, next_level: int) -> None:
        """Divide out primes, in place; the ciphertext is in NTT form."""
        for _ in range(level - next_level):
            value.scale = 1.0
            self.ntt_evaluators[level].rescale_to_next_inplace(value)

    def square(self, value: SealObject, level: int) -> SealObject:
        """Square a ciphertext of a level; the result has three coefficient polynomials."""
        value = self.from_ntt(value, level)
        self.evaluator.square_inplace(value)
        return value

    def relinearise(self, value: SealObject, level: int, next_level: int, keys: SealKeys) -> SealObject:
        """Bring a ciphertext back to two polynomials and switch it down; the result is in NTT form."""
        value = self.to_ntt(value, level)
        self.ntt_evaluators[level].relinearize_inplace(value, keys.at(level, 1))
        self.switch_down(value, level, next_level)
        return value


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
    """The network modulo one of the plaintext moduli."""

    def __init__(self, plan: BfvPlan, number: int, contexts: dict[int, Context]) -> None:
        self._plan, self._parameters = plan, plan.parameters
        self._modulus = plan.public.plain_moduli[number]
        self._bridge = Bridge(plan.parameters, self._modulus, contexts)
        self._turner = Turner(plan.parameters, self._bridge.ntt_evaluators)
        self._encoded = {
            place: self._encode_layer(step, step.bias[number])
            for place, step in enumerate(plan.steps)
            if isinstance(step, BfvLinear)
        }

    def load(self, ciphertexts: Sequence[bytes]) -> list[SealObject]:
        """Check ciphertexts from the wire and load them."""
        return [self._bridge.load(ciphertext, self._parameters.top_level) for ciphertext in ciphertexts]

    def evaluate(self, values: list[SealObject], keys: SealKeys) -> list[SealObject]:
        """Evaluate all steps."""
        for number, step in enumerate(self._plan.steps):
            if isinstance(step, BfvLinear):
                values = self._linear(step, self._encoded[number], values, keys)
            else:
                values = [self._square(step, value, keys) for value in values]
        return [self._bridge.from_ntt(value, self._plan.public.output_level) for value in values]

    def _encode_layer(self, step: BfvLinear, biases: Integers) -> _Encoded:
        diagonals = [self._diagonal(rows, step.level) for rows in step.diagonals]
        for giants in step.giants:
            # SEAL refuses a ciphertext that encrypts nothing, and so would a client.
            if all(diagonals[term.diagonal].is_zero() for terms in giants for term in terms):
                raise PlanError(
                    f"{step.name}: all weights of a ciphertext are zero modulo {self._modulus}; remove outputs that "
                    "depend on nothing, or choose another plaintext modulus"
                )
        return _Encoded(diagonals, [self._bridge.encode(rows) for rows in biases])

    def _diagonal(self, rows: Integers, level: int) -> SealObject:
        plain = self._bridge.encode(rows)
        if not plain.is_zero():
            words = sealio.parms_id_words(self._parameters.parms_id(level, self._modulus))
            self._bridge.evaluator.transform_to_ntt_inplace(plain, words)
            plain = self._bridge.renamed(plain, level, 0)
        return plain

    def _linear(self, step: BfvLinear, encoded: _Encoded, values: list[SealObject], keys: SealKeys) -> list[SealObject]:
        copies = self._turner.copies(step, [self._bridge.to_ntt(value, step.level) for value in values], keys)
        outputs: list[SealObject] = []
        for output, bias in enumerate(encoded.biases):
            total = self._turner.total(step, output, copies, encoded.diagonals, keys)
            self._bridge.switch_down(total, step.level, step.next_level)
            total = self._bridge.from_ntt(total, step.next_level)
            self._bridge.evaluator.add_plain_inplace(total, bias)
            outputs.append(total)
        return outputs

    def _square(self, step: BfvSquare, value: SealObject, keys: SealKeys) -> SealObject:
        squared = self._bridge.square(value, step.level)
        return self._bridge.relinearise(squared, step.level, step.next_level, keys)
