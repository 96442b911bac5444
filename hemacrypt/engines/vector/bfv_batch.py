"""Evaluating exact batches with the kernels: the streams of `hemacrypt.engines.vector.batch`, the squares of BFV.

One plaintext modulus after the other, so that the arrays of a batch are there once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np

from hemacrypt.engines.vector.batch import Arithmetic, Evaluation, check_exhausted
from hemacrypt.engines.vector.bfv import ExactPart, reserve_square
from hemacrypt.engines.vector.kernels.barrier import Team
from hemacrypt.engines.vector.kernels.bfv_multiply import to_coefficients_all, to_values_all
from hemacrypt.engines.vector.kernels.ntt import Words
from hemacrypt.engines.vector.layers import SEAL_MINOR, Memory, Switches, by_level, expanded
from hemacrypt.engines.vector.primitives import Evaluator, expand
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.engines.vector.scaling import Scaling
from hemacrypt.errors import PlanError
from hemacrypt.plan.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan
from hemacrypt.plan.bfv_plan import BfvSquare
from hemacrypt.plan.schedule import LayerSchedule, make_schedule, memory_bytes
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.evaluation_keys import EvaluationKeys

# A client's relinearisation keys in the engine's form, by level.
ExactKeys = dict[int, Switches]


class BfvBatchEngine:
    """Evaluates one exact batch plan; may be shared by threads.

    Parameters
    ----------
    plan:
        The plan, weights included.
    threads:
        How many threads share the work of one evaluation.

    Attributes
    ----------
    memory_bytes:
        Most bytes of working arrays that one evaluation takes, but for those of squares.

    Raises
    ------
    PlanError
        If there is to be no thread.
    """

    name: ClassVar[str] = "vector"

    def __init__(self, plan: BfvBatchPlan, threads: int = 1) -> None:
        if threads < 1:
            raise PlanError(f"{threads} threads; expected at least 1")
        self.plan, self.threads = plan, threads
        levels = {*plan.relinearisation_levels, *(step.level for step in plan.squares)}
        self._rings = {level: Ring(plan.parameters.truncated(level)) for level in levels}
        layers, ring = make_schedule(plan), Ring(plan.parameters)
        self._moduli = [
            _Modulus(plan, number, threads, ring, self._rings, layers)
            for number in range(len(plan.public.plain_moduli))
        ]
        self.memory_bytes = memory_bytes(plan, layers, threads)

    def load_keys(self, keys: EvaluationKeys) -> ExactKeys:
        """Check a client's relinearisation keys, expand their seeds, bring them into the engine's form.

        Raises
        ------
        FormatError
            If the key set does not fit the plan.
        """
        parameters, found = self.plan.parameters, {}
        for group, serialised in keys.grouped(self.plan.public):
            if group.relinearise:
                ring = self._rings.get(group.level) or Ring(parameters.truncated(group.level))
                key = sealformat.read_relinearisation_key(serialised.relinearisation, ring.parameters)
                found[group.level] = expanded(ring, {1: key})
        return by_level(found, parameters)

    def evaluate(
        self, ciphertexts: Iterable[bytes], keys: ExactKeys, seconds: dict[str, float] | None = None
    ) -> list[bytes]:
        """Evaluate the network on a batch.

        Parameters
        ----------
        ciphertexts:
            Straight from the wire, all inputs in the plan's order for the first plaintext modulus, then for the next;
            each is checked before anything is done with it.
        keys:
            What `load_keys` returned.
        seconds:
            As in `hemacrypt.engines.vector.batch.BatchEngine.evaluate`.

        Returns
        -------
        list of bytes
            One serialised ciphertext for each logit, all of the first plaintext modulus, then of the next.

        Raises
        ------
        FormatError
            If a ciphertext is not what the plan demands, or there are more or fewer than it demands.
        """
        spent = {} if seconds is None else seconds
        arriving, replies = iter(ciphertexts), list[bytes]()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batch") as pool:
            for modulus in self._moduli:
                replies += Evaluation(modulus, keys, pool, spent).run(arriving)
        check_exhausted(arriving, len(self._moduli) * self.plan.public.inputs)
        return replies


class _Modulus(Arithmetic[ExactKeys]):
    """The network modulo one of the plaintext moduli."""

    plan: BfvBatchPlan

    def __init__(
        self,
        plan: BfvBatchPlan,
        number: int,
        threads: int,
        ring: Ring,
        rings: dict[int, Ring],
        layers: tuple[LayerSchedule, ...],
    ) -> None:
        self.plan, self.threads, self.ring, self.layers, self._rings = plan, threads, ring, layers, rings
        self._modulus = plan.public.plain_moduli[number]
        self._evaluator = Evaluator(ring)
        squares = {step.level for step in plan.squares}
        self._scalings = {level: Scaling.of(rings[level], self._modulus) for level in squares}
        self.biases = [self._constants(linear, number) for linear in plan.linears]
        # Every thread squares in memory of its own.
        self._local = threading.local()

    def read(self, data: bytes) -> Words:
        """Check, expand and transform a ciphertext; see `Arithmetic.read`."""
        public = self.plan.public
        residues = sealformat.read_ciphertext(data, public.parameters, public.input_level, 1.0, self._modulus)
        value = expand(self.ring, residues)
        to_values_all(value, self.ring.tables, 0, 1)
        return value

    def lowered(self, value: Words, relinearise: bool, rescales: int, keys: ExactKeys) -> Words:
        """Relinearise and switch down; see `Arithmetic.lowered`."""
        if relinearise:
            level = value.shape[1] - 1
            out = np.empty((2, level + 1 - rescales, value.shape[2]), dtype=np.uint32)
            self._worker(level, keys).relinearise(value, out)
            return out
        for _ in range(rescales):
            value = self._evaluator.rescale(value)
        return value

    def square(self, number: int, value: Words, out: Words, keys: ExactKeys) -> None:
        """Square, relinearise unless that waits, switch down; see `Arithmetic.square`."""
        step = self.plan.squares[number]
        worker, scaling = self._worker(step.level, keys), self._scalings[step.level]
        if step.relinearise:
            worker.square(scaling, value[None], out[None])
        else:
            worker.square_only(scaling, value, out)

    def write(self, value: Words) -> bytes:
        """Serialise a logit as coefficients; see `Arithmetic.write`."""
        to_coefficients_all(value, self.ring.tables, 0, 1)
        return sealformat.ciphertext_stream(value, self.plan.parameters, 1.0, SEAL_MINOR, self._modulus)

    def _worker(self, level: int, keys: ExactKeys) -> ExactPart:
        """Return what squares and relinearises at a level, with working memory of this thread."""
        if not hasattr(self._local, "room"):
            memory, degree = Memory(), self.plan.parameters.degree
            for number in self._rings:
                memory.reserve_step(BfvSquare(number, number, 1), degree)
            for number, scaling in self._scalings.items():
                reserve_square(memory, number, scaling, degree)
            self._local.room = memory, Team(1)
        memory, team = self._local.room
        ring = self._rings[level]
        return ExactPart(ring, memory, team, 0, keys[level])

    def _constants(self, linear: BfvBatchLinear, number: int) -> Words:
        """Return the biases times q / t, rounded, modulo each prime, shape (outputs, k)."""
        primes, modulus = self.plan.parameters.data_primes[: linear.level + 1], self._modulus
        q = math.prod(primes)
        scaled = [(bias * q + modulus // 2) // modulus for bias in linear.bias[number].tolist()]
        return np.array([[value % prime for prime in primes] for value in scaled], dtype=np.uint32)
