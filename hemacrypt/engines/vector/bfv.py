"""Evaluating an exact plan with the kernels: the same network for one plaintext modulus after the other.

Ciphertexts stay in NTT form from the first transform to the last. An affine map is CKKS' but for what is encoded: the
polynomials whose slots modulo t are the weights (SEAL's BatchEncoder makes them), with coefficients around zero; and
the bias, which is added times q / t. Only squares differ: `hemacrypt.engines.vector.scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import tenseal.sealapi as seal

from hemacrypt.engines.base import ExactEngine
from hemacrypt.engines.vector.kernels import key_switch as turns
from hemacrypt.engines.vector.kernels.barrier import Team, meet
from hemacrypt.engines.vector.kernels.bfv_multiply import (
    scaled_square,
    square_exact,
    to_coefficients_all,
    to_values_all,
)
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
)
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.engines.vector.scaling import Scaling
from hemacrypt.errors import PlanError
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, BfvSquare, Integers
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys


class BfvVectorEngine(ExactEngine[VectorKeys]):
    """Evaluates exact plans with RNS kernels in 32-bit lanes; the GIL is free while a kernel runs.

    Parameters
    ----------
    plan:
        The plan, weights included.
    threads:
        How many threads share one request.
    """

    name: ClassVar[str] = "vector"

    def __init__(self, plan: BfvPlan, threads: int = 1) -> None:
        super().__init__(plan)
        parameters = plan.parameters
        levels = {parameters.top_level, plan.public.output_level, *(step.level for step in plan.steps)}
        self._rings = {level: Ring(parameters.truncated(level)) for level in levels}
        self._moduli = [_Modulus(plan, number, self._rings) for number in range(len(plan.public.plain_moduli))]
        self._lender = Lender(lambda: _Run(plan, self._rings, self._moduli, threads))

    def load_keys(self, keys: EvaluationKeys) -> VectorKeys:
        """Check a client's evaluation keys, expand their seeds, bring them into the engine's form."""
        return load_keys(keys, self.plan.public, self._rings)

    def evaluate(self, ciphertexts: Sequence[bytes], keys: VectorKeys) -> list[bytes]:
        """Evaluate the network on one request; see `Engine.evaluate`."""
        self.check_count(ciphertexts)
        parameters, public = self.plan.parameters, self.plan.public
        each, top = public.input_layout.ciphertexts, parameters.top_level
        inputs = [
            sealformat.read_ciphertext(content, parameters, top, 1.0, public.plain_moduli[number // each])
            for number, content in enumerate(ciphertexts)
        ]
        replies: list[bytes] = []
        with self._lender.lend() as run:
            for number, modulus in enumerate(public.plain_moduli):
                results = run.evaluate(number, inputs[number * each : (number + 1) * each], keys)
                replies += [
                    sealformat.ciphertext_stream(result, parameters, 1.0, SEAL_MINOR, modulus) for result in results
                ]
        return replies

    def warm_up(self) -> None:
        """Evaluate nothing with keys that are zero: compiles every kernel, or loads it, and touches the memory."""
        parameters, public = self.plan.parameters, self.plan.public
        nothing = np.zeros((1, parameters.top_level + 1, parameters.degree), dtype=np.uint64)
        inputs = [sealformat.Residues(nothing, bytes(64))] * public.input_layout.ciphertexts
        with self._lender.lend() as run:
            run.evaluate(0, inputs, blank_keys(public, self._rings))


class _Modulus:
    """The network modulo one of the plaintext moduli, encoded.

    Attributes
    ----------
    layers:
        The affine maps, by the number of their step.
    scalings:
        What squares need, by level.
    """

    def __init__(self, plan: BfvPlan, number: int, rings: dict[int, Ring]) -> None:
        self._rings, self._parameters = rings, plan.parameters
        self._modulus = plan.public.plain_moduli[number]
        self._encoder = seal.BatchEncoder(sealio.make_context(plan.parameters, self._modulus))
        self.layers = {
            place: self._layer(step, step.bias[number])
            for place, step in enumerate(plan.steps)
            if isinstance(step, BfvLinear)
        }
        self.scalings = {
            step.level: Scaling.of(rings[step.level], self._modulus)
            for step in plan.steps
            if isinstance(step, BfvSquare)
        }

    def _layer(self, step: BfvLinear, biases: Integers) -> Layer:
        ring = self._rings[step.level]
        rows = ring.rows(step.level + 1, extended=True)
        diagonals = np.empty(diagonals_shape(step, self._parameters.degree), dtype=np.uint32)

        def encode(number: int) -> Words:
            polynomial = self._polynomial(step.diagonals[number])
            # Around zero: noise grows with the coefficients' size.
            lifted = np.where(polynomial > self._modulus // 2, polynomial - self._modulus, polynomial)
            return ring.montgomery_form(ring.transformed(lifted, rows), rows)

        encode_diagonals(step, encode, diagonals)
        if blank_outputs(step, diagonals):
            raise PlanError(
                f"{step.name}: all weights of a ciphertext are zero modulo {self._modulus}; remove outputs that depend "
                "on nothing, or choose another plaintext modulus"
            )
        added = np.stack([self._bias(bias, step) for bias in biases])
        return Layer.of(step, self._parameters, diagonals, added)

    def _polynomial(self, rows: Integers) -> Integers:
        """Return the polynomial modulo t with these slots, shape (2, slots) -> (N,)."""
        return sealio.coefficients(sealio.encode_rows(self._encoder, rows, self._modulus))

    def _bias(self, rows: Integers, step: BfvLinear) -> Words:
        """Encode a bias times q / t, rounded, over the primes that are left after a step; shape (primes, N)."""
        left = step.next_level + 1
        q = math.prod(self._parameters.data_primes[:left])
        scaled = (self._polynomial(rows).astype(object) * q + self._modulus // 2) // self._modulus
        ring = self._rings[step.level]
        return ring.transformed(scaled, ring.rows(left))


class _Run:
    """One request at a time: working memory and the threads that share it."""

    def __init__(self, plan: BfvPlan, rings: dict[int, Ring], moduli: list[_Modulus], threads: int) -> None:
        self._plan, self._rings, self._moduli = plan, rings, moduli
        self._team, self._memory = Team(threads), Memory()
        self._degree = plan.parameters.degree
        for step in plan.steps:
            self._memory.reserve_step(step, self._degree)
            if isinstance(step, BfvLinear):
                self._memory.reserve_affine(step, self._degree)
                continue
            for modulus in moduli:
                reserve_square(self._memory, step.level, modulus.scalings[step.level], self._degree)

    def evaluate(self, number: int, inputs: Sequence[sealformat.Residues], keys: VectorKeys) -> list[Words]:
        """Evaluate all steps modulo one plaintext modulus on checked ciphertexts.

        Parameters
        ----------
        number:
            Which modulus.
        inputs:
            Its ciphertexts.
        keys:
            The client's keys.

        Returns
        -------
        list
            Coefficients, shape (2, primes, N) each.
        """
        results: list[Words] = []
        modulus, top = self._moduli[number], self._plan.parameters.top_level
        values = self._memory.array("values odd", len(inputs), 2, top + 1, self._degree)
        intake = Intake(inputs, self._rings[top].primes[:-1], values)

        def walk(part: int) -> None:
            intake.take(part, self._team)
            self._transform(to_values_all, values, top, part)
            value = values
            for place, step in enumerate(self._plan.steps):
                side = "values odd" if place % 2 else "values even"
                out = self._memory.array(side, step.outputs, 2, step.next_level + 1, self._degree)
                worker = ExactPart(self._rings[step.level], self._memory, self._team, part, keys.levels[step.level])
                if isinstance(step, BfvLinear):
                    worker.linear(modulus.layers[place], value, out)
                else:
                    worker.square(modulus.scalings[step.level], value, out)
                self._team.barrier()
                value = out
            self._transform(to_coefficients_all, value, self._plan.public.output_level, part)
            if part == 0:
                results.extend(value)

        self._team.run(walk)
        return results

    def _transform(self, kernel: Callable[..., None], values: Words, level: int, part: int) -> None:
        """Transform ciphertexts, shape (ciphertexts, 2, primes, N), in place."""
        polynomials = values.reshape(-1, level + 1, self._degree)
        kernel(polynomials, self._rings[level].tables, part, self._team.threads)
        self._team.barrier()


def reserve_square(memory: Memory, level: int, scaling: Scaling, degree: int) -> None:
    """Make room for what `ExactPart.square` works with."""
    others = len(scaling.tables[0])
    memory.reserve("lowered", 2, level + 1, degree)
    memory.reserve("product", 3, level + 1, degree)
    memory.reserve("other", 2, others, degree)
    memory.reserve("other product", 3, others, degree)


class ExactPart(Part):
    """What one thread of a team does in one step of BFV."""

    def square(self, scaling: Scaling, values: Words, out: Words) -> None:
        """Square, relinearise and switch down; values (inputs, 2, k, N), out (inputs, 2, primes that are left, N)."""
        constants, room = self._scaling(scaling)
        key, product = self.switches.together((1,)), self.memory.array("product", 3, self.primes, self.degree)
        for value, result in zip(values, out, strict=True):
            self.all(square_exact(value, constants, *key, room, product, result, *self.common))

    def square_only(self, scaling: Scaling, value: Words, out: Words) -> None:
        """Square one ciphertext, shape (2, k, N), and leave three polynomials, shape (3, k, N)."""
        constants, room = self._scaling(scaling)
        _, _, tables, words, part, parts = self.common
        self.all(scaled_square(value, constants, room, out, tables, words, part, parts))
        to_values_all(out, tables, part, parts)
        self.all(meet(words, parts))

    def relinearise(self, value: Words, out: Words) -> None:
        """Bring three polynomials, shape (3, k, N), back to two and switch down, shape (2, primes that are left, N)."""
        self.all(turns.relinearise(value, *self.switches.together((1,)), out, *self.common))

    def _scaling(self, scaling: Scaling) -> tuple[tuple[Any, ...], tuple[Words, ...]]:
        """Return what squares take of a scaling, and their working memory."""
        others = len(scaling.tables[0])
        room = (
            self.memory.array("lowered", 2, self.primes, self.degree),
            self.memory.array("other", 2, others, self.degree),
            self.memory.array("other product", 3, others, self.degree),
        )
        return (scaling.tables, scaling.extend, scaling.scale, scaling.shrink), room
