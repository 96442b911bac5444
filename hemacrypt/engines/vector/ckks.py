"""Evaluating a CKKS plan with the kernels.

All threads of a team walk through the same steps; kernels give each its share, and barriers stand where a share reads
what another wrote. `hemacrypt.engines.vector.layers` has what BFV shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.base import Engine
from hemacrypt.engines.vector.cache import DiagonalCache
from hemacrypt.engines.vector.kernels import key_switch as turns
from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels.barrier import Team
from hemacrypt.engines.vector.kernels.ntt import Words
from hemacrypt.engines.vector.layers import (
    SEAL_MINOR,
    Intake,
    Layer,
    Lender,
    Memory,
    Part,
    VectorKeys,
    blank_keys,
    blank_outputs,
    diagonals_shape,
    encode_diagonals,
    load_keys,
    terms,
)
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.plan.plan import JOIN_FACTOR, LinearStep, Plan, SquareStep, Turn
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.evaluation_keys import EvaluationKeys

__all__ = ["VectorEngine", "VectorKeys"]


class VectorEngine(Engine[VectorKeys]):
    """Evaluates with RNS kernels in 32-bit lanes; the GIL is free while a kernel runs.

    Parameters
    ----------
    plan:
        The plan, weights included.
    threads:
        How many threads share one request.
    cache:
        Where encoded diagonals are kept between runs; nowhere when None.
    """

    name: ClassVar[str] = "vector"

    def __init__(self, plan: Plan, threads: int = 1, cache: DiagonalCache | None = None) -> None:
        super().__init__(plan)
        self._cache = cache
        # At each level the chain ends with the primes that are left there: keys are made for no others.
        self._rings = {step.level: Ring(plan.parameters.truncated(step.level)) for step in plan.steps}
        self._encoded = {
            number: self._encode_layer(step) for number, step in enumerate(plan.steps) if isinstance(step, LinearStep)
        }
        root = np.full(plan.parameters.slots, 1j * JOIN_FACTOR)
        self._roots = {
            step.level: self._encode(-root if step.kind == "parted" else root, 1.0, step.level)
            for step in plan.steps
            if isinstance(step, SquareStep) and step.kind != "plain"
        }
        self._lender = Lender(lambda: _Run(self._rings, self.plan, self._encoded, self._roots, threads))

    def load_keys(self, keys: EvaluationKeys) -> VectorKeys:
        """Check a client's evaluation keys, expand their seeds, bring them into the engine's form."""
        return load_keys(keys, self.plan.public, self._rings)

    def evaluate(self, ciphertexts: Sequence[bytes], keys: VectorKeys) -> list[bytes]:
        """Evaluate the network on one request; see `Engine.evaluate`."""
        self.check_count(ciphertexts)
        parameters, public = self.plan.parameters, self.plan.public
        inputs = [
            sealformat.read_ciphertext(content, parameters, parameters.top_level, public.input_scale)
            for content in ciphertexts
        ]
        with self._lender.lend() as run:
            results = run.evaluate(inputs, keys)
            return [
                sealformat.ciphertext_stream(result, parameters, public.output_scale, SEAL_MINOR) for result in results
            ]

    def warm_up(self) -> None:
        """Evaluate nothing with keys that are zero: compiles every kernel, or loads it, and touches the memory."""
        parameters, public = self.plan.parameters, self.plan.public
        nothing = np.zeros((1, parameters.top_level + 1, parameters.degree), dtype=np.uint64)
        inputs = [sealformat.Residues(nothing, bytes(64))] * public.input_layout.ciphertexts
        with self._lender.lend() as run:
            run.evaluate(inputs, blank_keys(public, self._rings))

    def _encode(self, slots: npt.NDArray[np.complex128], scale: float, level: int, *, extended: bool = False) -> Words:
        ring = self._rings[level]
        encoded = ring.encode(slots, scale, level + 1, extended=extended)
        return ring.montgomery_form(encoded, ring.rows(level + 1, extended=extended))

    def _encode_layer(self, step: LinearStep) -> Layer:
        ring, diagonals = self._rings[step.level], self._diagonals(step)
        for first in blank_outputs(step, diagonals):
            # Every client refuses a ciphertext that depends on no input, as SEAL does: round to one, not to zero.
            one = np.full(self.plan.parameters.slots, 1 / step.weight_scale, np.complex128)
            diagonals = diagonals.copy()
            encoded = self._encode(one, step.weight_scale, step.level, extended=True)
            diagonals[:, :, first] = encoded.reshape(diagonals.shape[0], diagonals.shape[1], kernels.TILE)
        biases = np.stack([ring.encode(bias, step.output_scale, step.level) for bias in step.bias])
        return Layer.of(step, self.plan.parameters, diagonals, biases)

    def _diagonals(self, step: LinearStep) -> Words:
        """Encode diagonals over QP, or find them in the cache; see `layers.encode_diagonals`."""

        def encode(number: int) -> Words:
            return self._encode(step.diagonals[number], step.weight_scale, step.level, extended=True)

        shape = diagonals_shape(step, self.plan.parameters.degree)
        if self._cache is None:
            out = np.empty(shape, dtype=np.uint32)
            encode_diagonals(step, encode, out)
            return out
        parameters = self._rings[step.level].parameters
        parts: list[bytes | memoryview] = [
            parameters.parms_id(),
            step.weight_scale.hex().encode(),
            np.array([term.diagonal for term in terms(step)], dtype="<i8").tobytes(),
            np.ascontiguousarray(step.diagonals).view(np.uint8).data,
        ]
        return self._cache.get(parts, shape, partial(encode_diagonals, step, encode))


class _Run:
    """One request at a time: working memory and the threads that share it."""

    def __init__(
        self, rings: dict[int, Ring], plan: Plan, encoded: dict[int, Layer], roots: dict[int, Words], threads: int
    ) -> None:
        self._rings, self._plan, self._encoded, self._roots = rings, plan, encoded, roots
        self._team = Team(threads)
        self._memory = Memory()
        self._degree = plan.parameters.degree
        for step in plan.steps:
            memory, primes, degree = self._memory, step.level + 1, self._degree
            memory.reserve_step(step, degree)
            if isinstance(step, LinearStep):
                memory.reserve_affine(step, degree)
            else:
                memory.reserve("product", 3, primes, degree)
                memory.reserve("parts", 2, 2, primes, degree)
                memory.reserve("conjugated", 2, primes, degree)

    def evaluate(self, inputs: Sequence[sealformat.Residues], keys: VectorKeys) -> list[Words]:
        """Evaluate all steps on checked ciphertexts; results of shape (2, primes, N)."""
        results: list[Words] = []
        level = self._plan.parameters.top_level
        values = self._memory.array("values odd", len(inputs), 2, level + 1, self._degree)
        intake = Intake(inputs, self._rings[level].primes[:-1], values)

        def walk(part: int) -> None:
            intake.take(part, self._team)
            value = values
            for number, step in enumerate(self._plan.steps):
                side = "values odd" if number % 2 else "values even"
                out = self._memory.array(side, step.outputs, 2, step.level, self._degree)
                worker = _Part(self._rings[step.level], self._memory, self._team, part, keys.levels[step.level])
                if isinstance(step, LinearStep):
                    worker.linear(self._encoded[number], value, out)
                else:
                    worker.square(step, self._roots.get(step.level), value, out)
                self._team.barrier()
                value = out
            if part == 0:
                results.extend(value)

        self._team.run(walk)
        return results


class _Part(Part):
    """What one thread of a team does in one step of CKKS."""

    def square(self, step: SquareStep, root: Words | None, values: Words, out: Words) -> None:
        """Square, join and relinearise; values (inputs, 2, k, N), out (outputs, 2, k - 1, N)."""
        key, product = self.switches.together((1,)), self.memory.array("product", 3, self.primes, self.degree)
        for number in range(step.outputs):
            if step.kind == "parted":
                parts = self._parted(values[number])
            else:
                first = 2 * number if step.kind == "joined" else number
                parts = values[first : first + 2 if step.kind == "joined" else first + 1]
            if len(parts) == 1:
                self.all(turns.square_plain(parts[0], *key, product, out[number], *self.common))
            else:
                self.all(turns.square_two(parts[0], parts[1], root, *key, product, out[number], *self.common))

    def _parted(self, value: Words) -> Words:
        """Return twice the real part and twice i times the imaginary part of a ciphertext (2, k, N)."""
        conjugated, parts = self.memory.array("conjugated", *value.shape), self.memory.array("parts", 2, *value.shape)
        key = self.switches.together((self.ring.parameters.galois_element(*Turn(0, True)),))
        self.all(turns.part_complex(value, *key, conjugated, parts, *self.common))
        return parts
