"""Evaluating a plan with the kernels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hemacrypt import sealformat
from hemacrypt.engines.base import Engine
from hemacrypt.engines.vector import kernels
from hemacrypt.engines.vector.evaluator import Evaluator, RotationKey
from hemacrypt.engines.vector.ntt import Words
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.errors import PlanError
from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.plan import LinearStep, Plan

# The SEAL whose headers replies carry: the one inside TenSEAL 0.3.16 and later.
_SEAL_MINOR = 3

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class VectorKeys:
    """A client's keys in the engine's form."""

    relinearisation: Words
    rotations: dict[int, RotationKey]


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A layer, encoded.

    Attributes
    ----------
    diagonals:
        Montgomery form, shape (diagonals, k, N).
    bias:
        Shape (k - 1, N).
    terms:
        For each giant step the numbers of rotated copies and diagonals to multiply; those that round to zero left out.
    """

    diagonals: Words
    bias: Words
    terms: list[tuple[Numbers, Numbers]]


class VectorEngine(Engine[VectorKeys]):
    """Evaluates with RNS kernels in 32-bit lanes; the GIL is free while a kernel runs."""

    name: ClassVar[str] = "vector"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._ring = Ring(plan.parameters)
        self._evaluator = Evaluator(self._ring)
        self._encoded = {
            number: self._encode_layer(step) for number, step in enumerate(plan.steps) if isinstance(step, LinearStep)
        }

    def load_keys(self, keys: EvaluationKeys) -> VectorKeys:
        """Check a client's evaluation keys, expand their seeds, bring them into the engine's form."""
        public, parameters = self.plan.public, self.plan.parameters
        keys.check_absent(public)
        relinearisation = np.empty(0, dtype=np.uint32)
        rotations: dict[int, RotationKey] = {}
        if public.needs_relinearisation:
            components = sealformat.read_relinearisation_key(keys.relinearisation, parameters)
            relinearisation = self._evaluator.switching_key(components)
        if public.rotation_steps:
            found = sealformat.read_galois_keys(keys.galois, parameters, public.rotation_steps)
            for step, components in found.items():
                rotations[step] = self._evaluator.rotation_key(components, parameters.galois_element(step))
        return VectorKeys(relinearisation, rotations)

    def evaluate(self, ciphertext: bytes, keys: VectorKeys) -> bytes:
        """Evaluate the network on one ciphertext; see `Engine.evaluate`."""
        parameters, public, evaluator = self.plan.parameters, self.plan.public, self._evaluator
        residues = sealformat.read_ciphertext(ciphertext, parameters, parameters.top_level, public.input_scale)
        value = evaluator.expand(residues)
        for number, step in enumerate(self.plan.steps):
            if isinstance(step, LinearStep):
                value = self._linear(step, self._encoded[number], value, keys)
            else:
                squared = evaluator.square(value)
                value = evaluator.rescale(evaluator.relinearise(squared, keys.relinearisation))
        return sealformat.ciphertext_stream(value, parameters, public.output_scale, _SEAL_MINOR)

    def _encode_layer(self, step: LinearStep) -> _Encoded:
        primes, ring = step.level + 1, self._ring
        encoded = np.stack([ring.encode(diagonal, step.weight_scale, primes) for diagonal in step.diagonals])
        kept = [bool(diagonal.any()) for diagonal in encoded]
        if not any(kept):
            raise PlanError(f"{step.name}: all weights are so small that they round to zero; scale the layer up")
        terms: list[tuple[Numbers, Numbers]] = []
        for giant in step.giants:
            pairs = [(term.baby, term.diagonal) for term in giant if kept[term.diagonal]]
            numbers = np.array(pairs, dtype=np.int64).reshape(-1, 2)
            terms.append((numbers[:, 0].copy(), numbers[:, 1].copy()))
        diagonals = ring.montgomery_form(encoded, np.arange(primes))
        return _Encoded(diagonals, ring.encode(step.bias, step.output_scale, primes - 1), terms)

    def _linear(self, step: LinearStep, encoded: _Encoded, value: Words, keys: VectorKeys) -> Words:
        evaluator, primes = self._evaluator, self._ring.primes
        babies = self._babies(step, value, keys)
        total: Words | None = None
        for number in reversed(range(len(step.giants))):
            if total is not None:
                total = self._rotated(total, keys.rotations[step.giant_step])
            which, numbers = encoded.terms[number]
            if len(which):
                product = np.empty_like(value)
                kernels.multiply_sum(babies, which, encoded.diagonals, numbers, product, self._ring.tables)
                total = product if total is None else evaluator.add(total, product)
        assert total is not None  # noqa: S101 - some diagonal is not zero, or the layer was refused
        for rotation in step.sums:
            total = evaluator.add(total, self._rotated(total, keys.rotations[rotation]))
        result = evaluator.rescale(total)
        kernels.add_plain(result, encoded.bias, primes)
        return result

    def _babies(self, step: LinearStep, value: Words, keys: VectorKeys) -> Words:
        """Return all rotated copies of the input, shape (babies, 2, k, N); siblings share a decomposition."""
        copies = np.empty((len(step.babies), *value.shape), dtype=np.uint32)
        copies[0] = value
        children: dict[int, list[int]] = defaultdict(list)
        for number, baby in enumerate(step.babies[1:], start=1):
            children[baby.parent].append(number)
        for parent in sorted(children):
            digits = self._evaluator.decompose(copies[parent, 1])
            for number in children[parent]:
                key = keys.rotations[step.babies[number].step]
                copies[number] = self._evaluator.rotate_hoisted(copies[parent], digits, key)
        return copies

    def _rotated(self, value: Words, key: RotationKey) -> Words:
        return self._evaluator.rotate_hoisted(value, self._evaluator.decompose(value[1]), key)
