"""Evaluating a batch plan: thousands of images at once, one value in each ciphertext.

Ciphertexts come one after the other in the plan's order and are used once; see `hemacrypt.plan.schedule`. Affine maps
are integer matrix products over residues, squares and key switches are SEAL's to the bit, and no step depends on how
the work is shared among threads, so neither do the replies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from time import perf_counter
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels import products
from hemacrypt.engines.vector.kernels.ntt import Words
from hemacrypt.engines.vector.primitives import Evaluator, expand, switching_key
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.plan.batch_plan import BatchLinear, BatchPlan
from hemacrypt.plan.bfv_batch_plan import BfvBatchPlan
from hemacrypt.plan.schedule import LayerSchedule, make_schedule, memory_bytes
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.evaluation_keys import EvaluationKeys

# The SEAL whose headers replies carry: the one inside TenSEAL 0.3.16 and later.
_SEAL_MINOR = 3

# A client's relinearisation keys in the engine's form, by level.
BatchKeys = dict[int, Words]

Keys = TypeVar("Keys")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Arithmetic(ABC, Generic[Keys]):
    """What an evaluation asks of a scheme.

    Attributes
    ----------
    plan, threads:
        As in `BatchEngine`.
    ring:
        The modulus chain's.
    layers:
        The schedule.
    biases:
        For each affine map, its bias modulo each prime, shape (outputs, k).
    """

    plan: BatchPlan | BfvBatchPlan
    threads: int
    ring: Ring
    layers: tuple[LayerSchedule, ...]
    biases: list[Words]

    @abstractmethod
    def read(self, data: bytes) -> Words:
        """Check a ciphertext from the wire and expand it, shape (2, k, N), in NTT form."""

    @abstractmethod
    def lowered(self, value: Words, relinearise: bool, rescales: int, keys: Keys) -> Words:
        """Bring a value back to two polynomials, if it has three, and divide out primes."""

    @abstractmethod
    def square(self, number: int, value: Words, out: Words, keys: Keys) -> None:
        """Carry out square number ``number`` of the plan."""

    @abstractmethod
    def write(self, value: Words) -> bytes:
        """Serialise a logit."""


class BatchEngine(Arithmetic[BatchKeys]):
    """Evaluates one batch plan; may be shared by threads, for every evaluation has arrays of its own.

    Parameters
    ----------
    plan:
        The plan, weights included.
    threads:
        How many threads share the work of one evaluation.

    Attributes
    ----------
    memory_bytes:
        Most bytes of working arrays that one evaluation takes.

    Raises
    ------
    PlanError
        If there is to be no thread.
    """

    name: ClassVar[str] = "vector"
    plan: BatchPlan

    def __init__(self, plan: BatchPlan, threads: int = 1) -> None:
        if threads < 1:
            raise PlanError(f"{threads} threads; expected at least 1")
        self.plan = plan
        self.threads = threads
        self.ring = Ring(plan.parameters)
        self.evaluator = Evaluator(self.ring)
        # Keys are made for the primes that are left where they are used, so key switches happen in smaller rings.
        self.switching = {
            level: Evaluator(Ring(plan.parameters.truncated(level))) for level in plan.relinearisation_levels
        }
        self.layers = make_schedule(plan)
        self.biases = [self._constants(linear) for linear in plan.linears]
        self.memory_bytes = memory_bytes(plan, self.layers, threads)

    def load_keys(self, keys: EvaluationKeys) -> BatchKeys:
        """Check a client's relinearisation keys, expand their seeds, bring them into the engine's form.

        Parameters
        ----------
        keys:
            The key set of the model; what other plans need of it is left alone.

        Raises
        ------
        FormatError
            If it does not fit the plan.
        """
        found: BatchKeys = {}
        needed, parameters = sorted(self.switching, reverse=True), self.plan.parameters
        groups = [(group.level, each) for group, each in keys.grouped(self.plan.public) if group.relinearise]
        for level, serialised in groups:
            # A key serves its own level and all lower ones, down to the next that has a key of its own.
            lower = max((other for other, _ in groups if other < level), default=-1)
            served = [each for each in needed if lower < each <= level]
            if served:
                ring = Ring(parameters.truncated(level))
                components = sealformat.read_relinearisation_key(serialised.relinearisation, ring.parameters)
                key = switching_key(ring, components)
                for each in served:
                    rows = [*range(each + 1), -1]
                    found[each] = np.ascontiguousarray(key[: each + 1, :, rows])
        return found

    def warm_up(self) -> None:
        """Compile every kernel of an evaluation, or load what was compiled before, on a few zeros."""
        degree, tables = self.plan.parameters.degree, self.ring.tables
        value, whole = np.zeros((1, 2, 1, degree), np.uint32), np.zeros(1, np.int64)
        few, kept = np.zeros(1, np.int32), np.ones(1, np.uint32)
        group = np.array([[0, 1, 0, 0, 1]], np.int64)
        products.multiply(value, value.copy(), 0, 0, 0, products.BLOCK, group, few, few, whole, kept, tables)
        products.close(value[0], self.biases[0][0], np.empty_like(value[0]), tables)
        kernels.square(value[0], np.empty((3, 1, degree), np.uint32), tables, 0, 1)
        for level, evaluator in self.switching.items():
            key = np.zeros((level + 1, 2, level + 2, degree), np.uint32)
            evaluator.relinearise(np.zeros((3, level + 1, degree), np.uint32), key)
        if self.plan.parameters.top_level:
            self.evaluator.rescale(np.zeros((2, 2, degree), np.uint32))

    def evaluate(
        self, ciphertexts: Iterable[bytes], keys: BatchKeys, seconds: dict[str, float] | None = None
    ) -> list[bytes]:
        """Evaluate the network on a batch.

        Parameters
        ----------
        ciphertexts:
            Straight from the wire, in the plan's order of inputs; each is checked before anything is done with it,
            and forgotten before the next few are asked for.
        keys:
            What `load_keys` returned.
        seconds:
            When given, filled with how long it took to ``read`` ciphertexts, to form ``products``, and to ``close``
            sums: square, relinearise, rescale, write. Waiting for ciphertexts counts as reading.

        Returns
        -------
        list of bytes
            One serialised ciphertext for each logit.

        Raises
        ------
        FormatError
            If a ciphertext is not what the plan demands, or there are more or fewer than it demands.
        """
        spent = {} if seconds is None else seconds
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batch") as pool:
            arriving = iter(ciphertexts)
            replies = Evaluation(self, keys, pool, spent).run(arriving)
            check_exhausted(arriving, self.plan.public.inputs)
            return replies

    def _constants(self, linear: BatchLinear) -> Words:
        """Return the biases at the scale of the product modulo each prime, shape (outputs, k)."""
        primes = self.plan.parameters.data_primes[: linear.level + 1]
        whole = [round(bias * linear.product_scale) for bias in linear.bias.tolist()]
        return np.array([[number % prime for prime in primes] for number in whole], dtype=np.uint32)

    def read(self, data: bytes) -> Words:
        """Check a ciphertext from the wire and expand it; see `Arithmetic.read`."""
        public = self.plan.public
        residues = sealformat.read_ciphertext(data, public.parameters, public.input_level, public.input_scale)
        return expand(self.ring, residues)

    def lowered(self, value: Words, relinearise: bool, rescales: int, keys: BatchKeys) -> Words:
        """Relinearise and rescale; see `Arithmetic.lowered`."""
        if relinearise:
            level = value.shape[1] - 1
            value = self.switching[level].relinearise(value, keys[level])
        for _ in range(rescales):
            value = self.evaluator.rescale(value)
        return value

    def square(self, number: int, value: Words, out: Words, keys: BatchKeys) -> None:
        """Square, relinearise unless that waits, rescale; see `Arithmetic.square`."""
        step = self.plan.squares[number]
        if step.relinearise:
            out[:] = self.lowered(self.evaluator.square(value), True, step.rescales, keys)
        else:
            kernels.square(value, out, self.ring.tables, 0, 1)

    def write(self, value: Words) -> bytes:
        """Serialise a logit."""
        public = self.plan.public
        return sealformat.ciphertext_stream(value, public.parameters, public.output_scale, _SEAL_MINOR)


def check_exhausted(ciphertexts: Iterator[bytes], expected: int) -> None:
    """Make sure that no more ciphertexts come than a plan demands.

    Raises
    ------
    FormatError
        If one does.
    """
    if next(ciphertexts, None) is not None:
        raise FormatError("ciphertexts", f"more came than {expected}, one for each value; send no others")


class Evaluation(Generic[Keys]):
    """The arrays of one evaluation, and the way of the chunks through the layers."""

    def __init__(self, engine: Arithmetic[Keys], keys: Keys, pool: ThreadPoolExecutor, spent: dict[str, float]) -> None:
        self._engine, self._plan, self._keys, self._pool, self._spent = engine, engine.plan, keys, pool, spent
        degree = self._plan.parameters.degree
        shapes = [(linear.polynomials, linear.level + 1, degree) for linear in self._plan.linears]
        together = list(zip(engine.layers, shapes, strict=True))
        self._sums = [np.empty((layer.open, *shape), dtype=np.uint32) for layer, shape in together]
        self._arrived = [np.empty((layer.largest, *shape), dtype=np.uint32) for layer, shape in together]
        self._waiting = [iter(layer.chunks) for layer in engine.layers]
        self._replies: dict[int, bytes] = {}

    def run(self, ciphertexts: Iterator[bytes]) -> list[bytes]:
        """Take as many ciphertexts as the plan has inputs and return the replies."""
        public, done = self._plan.public, 0
        for chunk in self._engine.layers[0].chunks:
            count = len(chunk.inputs)
            with self._clock("read"):
                for start in range(0, count, self._engine.threads):
                    wanted = min(self._engine.threads, count - start)
                    few = list(islice(ciphertexts, wanted))
                    if len(few) < wanted:
                        raise FormatError(
                            "ciphertexts",
                            f"{done + start + len(few)} came; expected {public.inputs}, one for each value",
                        )
                    self._each(self._read, [(start + place, data) for place, data in enumerate(few)])
            done += count
            self._forward(0)
        return [self._replies[number] for number in range(public.outputs)]

    def _read(self, item: tuple[int, bytes]) -> None:
        place, data = item
        self._arrived[0][place] = self._engine.read(data)

    def _forward(self, number: int) -> None:
        """Use the chunk that has arrived at a layer, and send on what is complete now."""
        chunk = next(self._waiting[number])
        inputs, sums = self._arrived[number][: len(chunk.inputs)], self._sums[number]
        _, polynomials, primes, degree = sums.shape
        places, kept = chunk.sums * sums[0].size, (~chunk.opens).astype(np.uint32)

        def multiply(part: tuple[int, int, int]) -> None:
            polynomial, row, first = part
            products.multiply(
                inputs,
                sums,
                polynomial,
                row,
                first,
                first + degree // 2,
                chunk.groups,
                chunk.columns,
                chunk.weights,
                places,
                kept,
                self._engine.ring.tables,
            )

        with self._clock("products"):
            parts = [(c, i, n) for i in range(primes) for c in range(polynomials) for n in (0, degree // 2)]
            self._each(multiply, parts)
        outputs, closed = chunk.closing
        if number + 1 == len(self._sums):
            with self._clock("close"):
                values = zip(outputs.tolist(), closed.tolist(), strict=True)
                self._each(lambda pair: self._reply(number, *pair), list(values))
            return
        room = self._engine.layers[number + 1].largest
        for start in range(0, len(outputs), room):
            pairs = zip(outputs[start : start + room].tolist(), closed[start : start + room].tolist(), strict=True)
            with self._clock("close"):
                self._each(lambda item: self._square(number, item[0], *item[1]), list(enumerate(pairs)))
            self._forward(number + 1)

    def _complete(self, number: int, output: int, place: int) -> Words:
        """Turn a sum into a value of its layer, shape (2, k, N)."""
        engine, linear, total = self._engine, self._plan.linears[number], self._sums[number][place]
        value = np.empty_like(total)
        products.close(total, engine.biases[number][output], value, engine.ring.tables)
        return engine.lowered(value, linear.relinearise, linear.rescales, self._keys)

    def _square(self, number: int, arrival: int, output: int, place: int) -> None:
        """Square a complete value and let it arrive at the next layer."""
        value = self._complete(number, output, place)
        self._engine.square(number, value, self._arrived[number + 1][arrival], self._keys)

    def _reply(self, number: int, output: int, place: int) -> None:
        self._replies[output] = self._engine.write(self._complete(number, output, place))

    def _each(self, function: Callable[[Item], Any], items: list[Item]) -> None:
        """Call a function for all items, on all threads."""
        if self._engine.threads == 1:
            for item in items:
                function(item)
        else:
            # The first fault is raised here; calls that have begun end before the pool does.
            for _ in self._pool.map(function, items):
                pass

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self._spent[part] = self._spent.get(part, 0.0) + perf_counter() - started
