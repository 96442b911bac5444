"""The reference: Microsoft SEAL through ``tenseal.sealapi``, with every diagonal encoded ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from hemacrypt.engines.base import Engine
from hemacrypt.model.network import ComplexArray
from hemacrypt.plan.bfv_plan import BfvLinear
from hemacrypt.plan.plan import JOIN_FACTOR, KeyGroup, LinearStep, Parameters, Plan, SquareStep, Turn
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import AnyPublicPlan, EvaluationKeys, LevelKeys
from hemacrypt.seal.io import Context, SealObject


class SealKeys:
    """A client's keys, loaded, by level; those of a level serve all lower ones.

    Parameters
    ----------
    parameters:
        The whole chain.
    contexts:
        Contexts by level; levels without one get theirs when a key is used there.
    """

    def __init__(self, parameters: Parameters, contexts: dict[int, Context]) -> None:
        self._parameters, self._contexts = parameters, dict(contexts)
        self._minor = sealio.seal_minor_version()
        # By level and Galois element, that of relinearisation being 1.
        self._keys: dict[tuple[int, int], SealObject] = {}
        self._components: dict[tuple[int, int], list[npt.NDArray[np.uint64]]] = {}

    def add(self, group: KeyGroup, serialised: LevelKeys) -> None:
        """Check and load the keys of a group.

        Raises
        ------
        FormatError
            If they are anything else.
        """
        parameters, context = self._parameters.truncated(group.level), self._context(group.level)
        if group.relinearise:
            checked = sealformat.check_relinearisation_key(serialised.relinearisation, parameters, self._minor)
            self._keys[group.level, 1] = sealio.load(seal.RelinKeys(), context, checked)
        if group.elements:
            checked = sealformat.check_galois_keys(serialised.galois, parameters, group.elements, self._minor)
            loaded = sealio.load(seal.GaloisKeys(), context, checked)
            self._keys.update(dict.fromkeys(((group.level, element) for element in group.elements), loaded))

    def at(self, level: int, element: int) -> SealObject:
        """Return the key for a Galois element, 1 standing for relinearisation, as an evaluator of a level takes it."""
        if (level, element) not in self._keys:
            self._keys[level, element] = self._cut(level, element)
        return self._keys[level, element]

    def _cut(self, level: int, element: int) -> SealObject:
        """Make the key of a level from that of a higher one.

        Every component is an encryption by itself, modulo every prime by itself: what is left of it is a key.
        """
        source = min(other for other, known in self._keys if known == element and other > level)
        parameters, rows = self._parameters.truncated(level), [*range(level + 1), -1]
        kept = [component[:, rows] for component in self._read(source, element)[: level + 1]]
        stream = sealformat.key_set_stream(kept, (element - 1) // 2, parameters, self._minor)
        return sealio.load(seal.RelinKeys() if element == 1 else seal.GaloisKeys(), self._context(level), stream)

    def _read(self, level: int, element: int) -> list[npt.NDArray[np.uint64]]:
        """Return the components of a key, each of shape (2, primes, degree)."""
        if (level, element) not in self._components:
            parameters, loaded = self._parameters.truncated(level), self._keys[level, element]
            # As SEAL saves them seeds are expanded.
            if element == 1:
                found = {1: sealformat.read_relinearisation_key(sealio.dump(loaded), parameters)}
            else:
                elements = [known for (at, known), key in self._keys.items() if key is loaded and at == level]
                found = sealformat.read_galois_keys(sealio.dump(loaded), parameters, elements)
            for known, components in found.items():
                self._components[level, known] = [each.polynomials for each in components]
        return self._components[level, element]

    def _context(self, level: int) -> Context:
        if level not in self._contexts:
            self._contexts[level] = sealio.make_context(self._parameters.truncated(level))
        return self._contexts[level]


def load_keys(keys: EvaluationKeys, public: AnyPublicPlan, contexts: dict[int, Context]) -> SealKeys:
    """Check a client's evaluation keys and load them for contexts by level; see `Engine.load_keys`."""
    loaded = SealKeys(public.parameters, contexts)
    for group, serialised in keys.grouped(public):
        loaded.add(group, serialised)
    return loaded


class Turner:
    """Rotates ciphertexts in NTT form and sums products with diagonals: affine maps but for the rescale and the bias.

    Parameters
    ----------
    parameters:
        The modulus chain.
    evaluators:
        SEAL's, by level.
    """

    def __init__(self, parameters: Parameters, evaluators: dict[int, SealObject]) -> None:
        self._parameters, self._evaluators = parameters, evaluators

    def turned(self, level: int, value: SealObject, turn: Turn, keys: SealKeys) -> SealObject:
        """Return a ciphertext turned."""
        turned, element = seal.Ciphertext(), self._parameters.galois_element(*turn)
        self._evaluators[level].apply_galois(value, element, keys.at(level, element), turned)
        return turned

    def copies(self, step: LinearStep | BfvLinear, values: list[SealObject], keys: SealKeys) -> list[SealObject]:
        """Return the rotated copies of a layer's input."""
        copies = list(values)
        for copy in step.copies[step.inputs :]:
            copies.append(self.turned(step.level, copies[copy.parent], Turn(copy.step), keys))
        return copies

    def total(
        self,
        step: LinearStep | BfvLinear,
        output: int,
        copies: list[SealObject],
        diagonals: list[SealObject],
        keys: SealKeys,
    ) -> SealObject:
        """Return the sum of an output's products, turned as the plan says."""
        evaluator, product, giants = self._evaluators[step.level], seal.Ciphertext(), step.giants[output]
        total: SealObject = None
        for number, terms in reversed(list(enumerate(giants))):
            if total is not None and number < len(giants) - 1:
                total = self.turned(step.level, total, Turn(step.giant_step), keys)
            for term in terms:
                if diagonals[term.diagonal].is_zero():
                    continue  # weights that round to zero; SEAL refuses the product as transparent
                target = seal.Ciphertext() if total is None else product
                evaluator.multiply_plain(copies[term.copy], diagonals[term.diagonal], target)
                if total is None:
                    total = target
                else:
                    evaluator.add_inplace(total, product)
        for group in step.turns:
            turned = [self.turned(step.level, total, turn, keys) for turn in group]
            for summand in turned:
                evaluator.add_inplace(total, summand)
        return total


@dataclass(frozen=True)
class _Encoded:
    """A layer's diagonals and biases as plaintexts in NTT form."""

    diagonals: list[SealObject]
    biases: list[SealObject]


class SealEngine(Engine[SealKeys]):
    """Evaluates with SEAL on one core. TenSEAL keeps the GIL throughout, so parallel work needs processes.

    Each level has a context of its own, of the primes that are left there: its keys are made for no others.
    """

    name: ClassVar[str] = "seal"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        parameters = plan.parameters
        self._minor = sealio.seal_minor_version()
        self._contexts = {step.level: sealio.make_context(parameters.truncated(step.level)) for step in plan.steps}
        self._evaluators = {level: seal.Evaluator(context) for level, context in self._contexts.items()}
        self._turner = Turner(parameters, self._evaluators)
        self._encoder = seal.CKKSEncoder(self._contexts[parameters.top_level])
        self._encoded = {
            number: self._encode_layer(step) for number, step in enumerate(plan.steps) if isinstance(step, LinearStep)
        }
        # Joining multiplies by i times the square root of two: in all slots that is one small polynomial.
        root = np.full(parameters.slots, 1j * JOIN_FACTOR)
        self._roots = {
            step.level: self._encode(-root if step.kind == "parted" else root, step.level, 1.0)
            for step in plan.steps
            if isinstance(step, SquareStep) and step.kind != "plain"
        }

    def load_keys(self, keys: EvaluationKeys) -> SealKeys:
        """Check and load a client's evaluation keys; see `Engine.load_keys`."""
        return load_keys(keys, self.plan.public, self._contexts)

    def evaluate(self, ciphertexts: Sequence[bytes], keys: SealKeys) -> list[bytes]:
        """Evaluate the network on one request; see `Engine.evaluate`."""
        self.check_count(ciphertexts)
        parameters, public = self.plan.parameters, self.plan.public
        top = parameters.top_level
        checked = [
            sealformat.check_ciphertext(ciphertext, parameters, top, public.input_scale, self._minor)
            for ciphertext in ciphertexts
        ]
        values = [sealio.load(seal.Ciphertext(), self._contexts[top], stream) for stream in checked]
        for number, step in enumerate(self.plan.steps):
            if isinstance(step, LinearStep):
                values = self._linear(step, self._encoded[number], values, keys)
            else:
                values = self._square(step, values, keys)
        return [sealio.dump(value) for value in values]

    def _encode_layer(self, step: LinearStep) -> _Encoded:
        diagonals = [self._encode(diagonal, step.level, step.weight_scale) for diagonal in step.diagonals]
        for giants in step.giants:
            used = [term.diagonal for terms in giants for term in terms]
            if all(diagonals[number].is_zero() for number in used):
                # SEAL refuses a ciphertext that depends on no input, and so would a client: round to one, not to zero.
                one = np.full(self.plan.parameters.slots, 1 / step.weight_scale)
                diagonals[used[0]] = self._encode(one, step.level, step.weight_scale)
        return _Encoded(diagonals, [self._encode(bias, step.level - 1, step.output_scale) for bias in step.bias])

    def _encode(self, values: ComplexArray, level: int, scale: float) -> SealObject:
        plain = seal.Plaintext()
        words = sealio.parms_id_words(self.plan.parameters.parms_id(level))
        self._encoder.encode(values.tolist(), words, scale, plain)
        return plain

    def _linear(
        self, step: LinearStep, encoded: _Encoded, values: list[SealObject], keys: SealKeys
    ) -> list[SealObject]:
        copies, outputs = self._turner.copies(step, values, keys), []
        for output, bias in enumerate(encoded.biases):
            total = self._turner.total(step, output, copies, encoded.diagonals, keys)
            self._evaluators[step.level].rescale_to_next_inplace(total)
            # The planned scale; what SEAL computed differs from it by a rounding of the last bit at most.
            total.scale = step.output_scale
            self._evaluators[step.level].add_plain_inplace(total, bias)
            outputs.append(total)
        return outputs

    def _square(self, step: SquareStep, values: list[SealObject], keys: SealKeys) -> list[SealObject]:
        evaluator = self._evaluators[step.level]
        if step.kind == "plain":
            pairs: list[tuple[SealObject, SealObject]] = [(value, None) for value in values]
        elif step.kind == "joined":
            pairs = [(values[n], values[n + 1] if n + 1 < len(values) else None) for n in range(0, len(values), 2)]
        else:
            pairs = [self._parted(step.level, value, keys) for value in values]
        squares: list[SealObject] = []
        for real, other in pairs:
            evaluator.square_inplace(real)
            if other is not None:
                evaluator.square_inplace(other)
                evaluator.multiply_plain_inplace(other, self._roots[step.level])
                evaluator.add_inplace(real, other)
            evaluator.relinearize_inplace(real, keys.at(step.level, 1))
            evaluator.rescale_to_next_inplace(real)
            real.scale = step.output_scale
            squares.append(real)
        return squares

    def _parted(self, level: int, value: SealObject, keys: SealKeys) -> tuple[SealObject, SealObject]:
        """Return twice the real part, and twice i times the imaginary part."""
        conjugated = self._turner.turned(level, value, Turn(0, True), keys)
        real, other = seal.Ciphertext(), seal.Ciphertext()
        self._evaluators[level].add(value, conjugated, real)
        self._evaluators[level].sub(value, conjugated, other)
        return real, other
