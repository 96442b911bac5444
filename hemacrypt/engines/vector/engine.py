"""Evaluating a plan with the kernels.

Sums stay in the extended modulus QP from the copies of the input to the end of an affine map ("double hoisting",
Bossuat, Mouchet, Troncoso-Pastoriza, Hubaux, "Efficient bootstrapping for approximate homomorphic encryption with
non-sparse keys", 2021, §5): a rotation divides one polynomial by the special prime instead of two, a rotated copy none,
and a single division by P * q ends the map.

All threads of a team walk through the same steps; kernels give each its share, and barriers stand where a share reads
what another wrote.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hemacrypt import sealformat
from hemacrypt.engines.base import Engine
from hemacrypt.engines.vector import kernels, turns
from hemacrypt.engines.vector.cache import DiagonalCache
from hemacrypt.engines.vector.evaluator import expand, switching_key
from hemacrypt.engines.vector.ntt import Words
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.engines.vector.team import BrokenTeamError, Team
from hemacrypt.errors import PlanError
from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.plan import JOIN_FACTOR, LinearStep, Parameters, Plan, SquareStep, Step, Turn

# The SEAL whose headers replies carry: the one inside TenSEAL 0.3.16 and later.
_SEAL_MINOR = 3

Numbers = npt.NDArray[np.int64]


class _Switches:
    """Keys of one level; those that are used together are laid out together, once.

    Parameters
    ----------
    keys:
        For each Galois element its key in Montgomery form, moved against the rotation; shape (k, 2, k + 1, N). That of
        element 1 is the relinearisation key.
    orders:
        For each Galois element its automorphism, shape (N,).
    """

    def __init__(self, keys: dict[int, Words], orders: dict[int, npt.NDArray[np.int32]]) -> None:
        self._keys, self._orders = keys, orders
        self._laid: dict[tuple[int, ...], tuple[Words, npt.NDArray[np.int32]]] = {}
        self._lock = threading.Lock()

    def together(self, elements: tuple[int, ...]) -> tuple[Words, npt.NDArray[np.int32]]:
        """Return keys and automorphisms of some elements, as kernels take them."""
        with self._lock:
            if elements not in self._laid:
                degree = len(next(iter(self._orders.values())))
                orders = np.array([self._orders[element] for element in elements], np.int32).reshape(-1, degree)
                shape = next(iter(self._keys.values())).shape
                keys = np.array([self._keys[element] for element in elements], np.uint32).reshape(-1, *shape)
                self._laid[elements] = (kernels.arranged(keys, orders), orders)
            return self._laid[elements]


@dataclass(frozen=True, eq=False)
class VectorKeys:
    """A client's keys in the engine's form, by level."""

    levels: dict[int, _Switches]


@dataclass(frozen=True, eq=False)
class _Rotations:
    """How the copies of a layer's input are made.

    Attributes
    ----------
    ready:
        Copies that are there before the sums begin: inputs, then those that others are rotated from; shape (ready,).
    opened:
        Places among them of those that are decomposed, in order.
    origins:
        For each of these the decomposition and the Galois element that it is made with; (0, 1) for inputs.
    elements:
        Galois elements that make all other copies.
    starts, openings, parents, targets:
        What each of them makes, as `kernels.rotate_and_sum` takes it.
    """

    ready: Numbers
    opened: tuple[int, ...]
    origins: tuple[tuple[int, int], ...]
    elements: tuple[int, ...]
    starts: Numbers
    openings: Numbers
    parents: Numbers
    targets: Numbers

    @classmethod
    def of(cls, step: LinearStep, parameters: Parameters) -> _Rotations:
        """Sort the rotations of a step by the keys that they share."""
        opened = sorted({copy.parent for copy in step.copies[step.inputs :]})
        ready = [*range(step.inputs), *(copy for copy in opened if copy >= step.inputs)]
        place, number = {copy: at for at, copy in enumerate(ready)}, {copy: at for at, copy in enumerate(opened)}
        origins = [(0, 1)] * len(opened)
        shared: dict[int, list[tuple[int, int, int]]] = {}
        for index, copy in enumerate(step.copies[step.inputs :], start=step.inputs):
            origin, element = number[copy.parent], parameters.galois_element(copy.step)
            if index in number:
                origins[number[index]] = (origin, element)
            else:
                shared.setdefault(element, []).append((origin, place[copy.parent], index))
        rotations = [rotation for each in shared.values() for rotation in each]
        columns = np.array(rotations, dtype=np.int64).reshape(-1, 3).T.copy()
        return cls(
            ready=np.array(ready, dtype=np.int64),
            opened=tuple(place[copy] for copy in opened),
            origins=tuple(origins),
            elements=tuple(shared),
            starts=np.cumsum([0, *(len(each) for each in shared.values())], dtype=np.int64),
            openings=columns[0],
            parents=columns[1],
            targets=columns[2],
        )


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A layer, encoded.

    Attributes
    ----------
    diagonals:
        Montgomery form over QP, interleaved in order of use, shape (k + 1, N / 64, diagonals, 64).
    biases:
        Shape (outputs, k - 1, N).
    starts, which:
        Terms of the inner sums of all outputs, as `kernels.rotate_and_sum` takes them.
    rotations:
        How the copies are made.
    giant:
        Galois element between two inner sums.
    turns:
        Galois elements of each group of turns.
    """

    diagonals: Words
    biases: Words
    starts: Numbers
    which: Numbers
    rotations: _Rotations
    giant: int
    turns: tuple[tuple[int, ...], ...]


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
        self._threads = threads
        self._encoded = {
            number: self._encode_layer(step) for number, step in enumerate(plan.steps) if isinstance(step, LinearStep)
        }
        root = np.full(plan.parameters.slots, 1j * JOIN_FACTOR)
        self._roots = {
            step.level: self._encode(-root if step.kind == "parted" else root, 1.0, step.level)
            for step in plan.steps
            if isinstance(step, SquareStep) and step.kind != "plain"
        }
        self._lock = threading.Lock()
        self._idle: list[_Run] = []

    def load_keys(self, keys: EvaluationKeys) -> VectorKeys:
        """Check a client's evaluation keys, expand their seeds, bring them into the engine's form."""
        levels: dict[int, _Switches] = {}
        for group, serialised in keys.grouped(self.plan.public):
            parameters = self.plan.parameters.truncated(group.level)
            ring = self._rings.get(group.level) or Ring(parameters)
            found: dict[int, list[sealformat.Residues]] = {}
            if group.relinearise:
                found[1] = sealformat.read_relinearisation_key(serialised.relinearisation, parameters)
            if group.elements:
                found |= sealformat.read_galois_keys(serialised.galois, parameters, group.elements)
            levels[group.level] = _switches(ring, found)
        return VectorKeys(levels)

    def evaluate(self, ciphertexts: Sequence[bytes], keys: VectorKeys) -> list[bytes]:
        """Evaluate the network on one request; see `Engine.evaluate`."""
        self.check_count(ciphertexts)
        parameters, public = self.plan.parameters, self.plan.public
        values = np.stack(
            [
                expand(
                    self._rings[parameters.top_level],
                    sealformat.read_ciphertext(content, parameters, parameters.top_level, public.input_scale),
                )
                for content in ciphertexts
            ]
        )
        with self._running() as run:
            results = run.evaluate(values, keys)
            return [
                sealformat.ciphertext_stream(result, parameters, public.output_scale, _SEAL_MINOR) for result in results
            ]

    def warm_up(self) -> None:
        """Evaluate nothing with keys that are zero: compiles every kernel, or loads it, and touches the memory."""
        parameters, public = self.plan.parameters, self.plan.public
        levels: dict[int, _Switches] = {}
        for group in public.keys:
            ring = self._rings.get(group.level) or Ring(parameters.truncated(group.level))
            primes = (*parameters.data_primes[: group.level + 1], parameters.special_prime)
            blank = np.zeros((1, len(primes), parameters.degree), dtype=np.uint64)
            component = sealformat.Residues(blank, bytes(64))
            key, order = switching_key(ring, [component] * (group.level + 1)), ring.automorphism(1)
            elements = (*([1] if group.relinearise else []), *group.elements)
            levels[group.level] = _Switches(dict.fromkeys(elements, key), dict.fromkeys(elements, order))
        shape = (public.input_layout.ciphertexts, 2, parameters.top_level + 1, parameters.degree)
        with self._running() as run:
            run.evaluate(np.zeros(shape, dtype=np.uint32), VectorKeys(levels))

    @contextmanager
    def _running(self) -> Iterator[_Run]:
        """Lend out working memory and a team of threads; requests at the same time have their own."""
        with self._lock:
            run = self._idle.pop() if self._idle else None
        if run is None:
            run = _Run(self._rings, self.plan, self._encoded, self._roots, self._threads)
        try:
            yield run
        finally:
            with self._lock:
                self._idle.append(run)

    def _encode(self, slots: npt.NDArray[np.complex128], scale: float, level: int, *, extended: bool = False) -> Words:
        ring = self._rings[level]
        encoded = ring.encode(slots, scale, level + 1, extended=extended)
        return ring.montgomery_form(encoded, ring.rows(level + 1, extended=extended))

    def _encode_layer(self, step: LinearStep) -> _Encoded:
        ring, parameters = self._rings[step.level], self.plan.parameters
        terms = [term for giants in step.giants for giant in giants for term in giant]
        counts = [len(giant) for giants in step.giants for giant in giants]
        diagonals = self._diagonals(step, [term.diagonal for term in terms])
        if not diagonals.any():
            raise PlanError(f"{step.name}: all weights are so small that they round to zero; scale the layer up")
        return _Encoded(
            diagonals=diagonals,
            biases=np.stack([ring.encode(bias, step.output_scale, step.level) for bias in step.bias]),
            starts=np.cumsum([0, *counts], dtype=np.int64),
            which=np.array([term.copy for term in terms], dtype=np.int64),
            rotations=_Rotations.of(step, parameters),
            giant=parameters.galois_element(step.giant_step),
            turns=tuple(tuple(parameters.galois_element(*turn) for turn in group) for group in step.turns),
        )

    def _diagonals(self, step: LinearStep, order: list[int]) -> Words:
        """Encode diagonals over QP, in the order in which the sums take them; shape (k + 1, N / 64, diagonals, 64)."""
        rows, tiles = step.level + 2, self.plan.parameters.degree // kernels.TILE

        def make(out: Words) -> None:
            for place, number in enumerate(order):
                encoded = self._encode(step.diagonals[number], step.weight_scale, step.level, extended=True)
                out[:, :, place] = encoded.reshape(rows, tiles, kernels.TILE)

        shape = (rows, tiles, len(order), kernels.TILE)
        if self._cache is None:
            out = np.empty(shape, dtype=np.uint32)
            make(out)
            return out
        parameters = self._rings[step.level].parameters
        parts: list[bytes | memoryview] = [
            parameters.parms_id(),
            step.weight_scale.hex().encode(),
            np.array(order, dtype="<i8").tobytes(),
            np.ascontiguousarray(step.diagonals).view(np.uint8).data,
        ]
        return self._cache.get(parts, shape, make)


def _switches(ring: Ring, found: dict[int, list[sealformat.Residues]]) -> _Switches:
    """Expand keys, given by their Galois elements."""
    orders = {element: ring.automorphism(element) for element in found}
    keys: dict[int, Words] = {}
    for element, order in orders.items():
        key = switching_key(ring, found.pop(element))
        keys[element] = np.empty_like(key)
        keys[element][..., order] = key
    return _Switches(keys, orders)


class _Memory:
    """Arrays that every request writes anew, allocated once: fresh pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[str, Words] = {}

    def reserve(self, name: str, *shape: int) -> None:
        """Make sure that an array of this shape can be had."""
        count = int(np.prod(shape))
        if name not in self._kept or self._kept[name].size < count:
            self._kept[name] = np.zeros(count, dtype=np.uint32)

    def array(self, name: str, *shape: int) -> Words:
        """Return the array of a name in a shape that was reserved."""
        return self._kept[name][: int(np.prod(shape))].reshape(shape)


class _Run:
    """One request at a time: working memory and the threads that share it."""

    def __init__(
        self, rings: dict[int, Ring], plan: Plan, encoded: dict[int, _Encoded], roots: dict[int, Words], threads: int
    ) -> None:
        self._rings, self._plan, self._encoded, self._roots = rings, plan, encoded, roots
        self._team = Team(threads)
        self._memory = _Memory()
        self._degree = plan.parameters.degree
        for step in plan.steps:
            self._reserve(step)

    def _reserve(self, step: Step) -> None:
        memory, primes, degree = self._memory, step.level + 1, self._degree
        memory.reserve("digits", primes, primes + 1, degree + kernels.PADDING)
        memory.reserve("coefficients", primes, degree)
        memory.reserve("second", primes, degree)
        memory.reserve("scratch", primes + 1, degree)
        memory.reserve("nothing", 2, primes + 1, degree)
        for side in ("even", "odd"):
            memory.reserve(side, 2, primes + 1, degree)
            memory.reserve(f"values {side}", step.inputs, 2, primes, degree)
            memory.reserve(f"values {side}", step.outputs, 2, primes - 1, degree)
        if isinstance(step, LinearStep):
            opened = {copy.parent for copy in step.copies[step.inputs :]}
            memory.reserve("openings", len(opened), primes, primes + 1, degree + kernels.PADDING)
            memory.reserve("copies", step.inputs + len(opened), 2, primes + 1, degree)
            memory.reserve("sums", sum(map(len, step.giants)), 2, primes + 1, degree)
        else:
            memory.reserve("product", 3, primes, degree)
            memory.reserve("parts", 2, 2, primes, degree)
            memory.reserve("conjugated", 2, primes, degree)

    def evaluate(self, values: Words, keys: VectorKeys) -> list[Words]:
        """Evaluate all steps; values and results of shape (ciphertexts, 2, primes, N)."""
        results: list[Words] = []

        def walk(part: int) -> None:
            value = values
            for number, step in enumerate(self._plan.steps):
                side = "values odd" if number % 2 else "values even"
                out = self._memory.array(side, step.outputs, 2, step.level, self._degree)
                switches = keys.levels.get(step.level)
                worker = _Part(self._rings[step.level], self._memory, self._team, part, switches)
                if isinstance(step, LinearStep):
                    worker.linear(step, self._encoded[number], value, out)
                else:
                    worker.square(step, self._roots.get(step.level), value, out)
                self._team.barrier()
                value = out
            if part == 0:
                results.extend(value)

        self._team.run(walk)
        return results


class _Part:
    """What one thread of a team does in one step."""

    def __init__(self, ring: Ring, memory: _Memory, team: Team, part: int, switches: _Switches | None) -> None:
        self._ring, self._memory, self._team = ring, memory, team
        self._share = (ring.tables, part, team.threads)
        self._met = (ring.tables, team.words, part, team.threads)
        self._switches = switches
        self._primes, self._degree = len(ring.primes) - 1, ring.parameters.degree
        self._work = (
            memory.array("coefficients", self._primes, self._degree),
            memory.array("digits", self._primes, self._primes + 1, self._degree + kernels.PADDING),
        )
        self._second = memory.array("second", self._primes, self._degree)
        self._scratch = memory.array("scratch", self._primes + 1, self._degree)

    def linear(self, step: LinearStep, encoded: _Encoded, values: Words, out: Words) -> None:
        """Carry out an affine map; values (inputs, 2, k, N), out (outputs, 2, k - 1, N)."""
        rotations = encoded.rotations
        copies = self._over_qp("copies", len(rotations.ready))
        for number in range(step.inputs):
            for polynomial in range(2):
                kernels.lift_first(values[number, polynomial], copies[number, polynomial], *self._share)
        self._team.barrier()
        digits = self._open(step, rotations, values, copies)
        giants = [len(each) for each in step.giants]
        sums = self._over_qp("sums", sum(giants))
        places = (rotations.starts, rotations.openings, rotations.parents, rotations.targets, rotations.ready)
        products = (encoded.diagonals, encoded.starts, encoded.which)
        kernels.rotate_and_sum(digits, copies, *self._keys(rotations.elements), *places, *products, sums, *self._share)
        self._team.barrier()
        first = 0
        for output, count in enumerate(giants):
            self._output(encoded, sums[first : first + count], encoded.biases[output], out[output])
            first += count

    def _open(self, step: LinearStep, rotations: _Rotations, values: Words, copies: Words) -> Words:
        """Make and decompose the copies that others are rotated from."""
        all_digits = self._memory.array("openings", len(rotations.opened), *self._work[1].shape)
        for place, (origin, element), digits in zip(rotations.opened, rotations.origins, all_digits, strict=True):
            if place < step.inputs:
                self._all(turns.open_fresh(values[place, 1], self._work[0], digits, *self._met))
                continue
            parent, nothing = copies[rotations.opened[origin], 0], self._over_qp("nothing")
            keys = self._keys((element,))
            kernels.rotate_add(all_digits[origin], parent, *keys, nothing, copies[place], *self._share)
            self._team.barrier()
            self._all(turns.open_copy(copies[place, 1], self._scratch, self._second, self._work[0], digits, *self._met))
        return all_digits

    def _output(self, encoded: _Encoded, sums: Words, biases: Words, out: Words) -> None:
        total, free, other = sums[-1], self._over_qp("even"), self._over_qp("odd")
        for base in sums[-2::-1]:
            total = self._turned(total, (encoded.giant,), base, free, keep=False)
            free, other = other, free
        for group in encoded.turns:
            total = self._turned(total, group, total, free, keep=True)
            free, other = other, free
        self._all(turns.finish(total, biases, out, *self._met))

    def square(self, step: SquareStep, root: Words | None, values: Words, out: Words) -> None:
        """Square, join and relinearise; values (inputs, 2, k, N), out (outputs, 2, k - 1, N)."""
        product, nothing = self._memory.array("product", 3, self._primes, self._degree), self._over_qp("nothing")
        total, base = self._over_qp("even"), self._over_qp("odd")
        for number in range(step.outputs):
            if step.kind == "parted":
                self._join(*self._parted(values[number]), product, root)
            elif step.kind == "joined" and 2 * number + 1 < step.inputs:
                self._join(values[2 * number], values[2 * number + 1], product, root)
            else:
                kernels.square(values[2 * number if step.kind == "joined" else number], product, *self._share)
            self._team.barrier()
            for polynomial in range(2):
                kernels.lift_first(product[polynomial], base[polynomial], *self._share)
            self._switched(product[2], nothing[0], (1,), base, total)
            self._all(turns.finish(total, product[0, :0], out[number], *self._met))

    def _join(self, real: Words, other: Words, product: Words, root: Words | None) -> None:
        assert root is not None  # noqa: S101 - made for every level where something is joined
        kernels.square_join(real, other, product, root, *self._share)

    def _parted(self, value: Words) -> tuple[Words, Words]:
        """Return twice the real part and twice i times the imaginary part of a ciphertext (2, k, N)."""
        total, base, nothing = self._over_qp("even"), self._over_qp("odd"), self._over_qp("nothing")
        conjugated, parts = self._memory.array("conjugated", *value.shape), self._memory.array("parts", 2, *value.shape)
        kernels.lift_first(value[0], base[0], *self._share)
        conjugation = self._ring.parameters.galois_element(*Turn(0, True))
        self._switched(value[1], base[0], (conjugation,), nothing, total)
        kernels.fold_special(total, *self._share)
        self._team.barrier()
        kernels.divide_special(total, conjugated, *self._share)
        self._team.barrier()
        kernels.part(value, conjugated, parts[0], parts[1], *self._share)
        self._team.barrier()
        return parts[0], parts[1]

    def _turned(self, total: Words, elements: tuple[int, ...], base: Words, out: Words, *, keep: bool) -> Words:
        """Return base plus a ciphertext over QP turned in several ways; what it was is lost unless it is kept."""
        work = (self._scratch, self._second, *self._work, *self._met)
        self._all(turns.turn(total, *self._keys(elements), base, out, keep, *work))
        return out

    def _switched(self, second: Words, first: Words, elements: tuple[int, ...], base: Words, out: Words) -> None:
        """Write base plus ``first`` and the switched ``second``, turned; second (k, N), the others over QP."""
        self._team.barrier()
        self._all(turns.switch(second, first, *self._keys(elements), base, out, *self._work, *self._met))

    def _over_qp(self, name: str, count: int | None = None) -> Words:
        """Return working memory for one ciphertext over QP, or for several."""
        shape = (2, self._primes + 1, self._degree)
        return self._memory.array(name, *(shape if count is None else (count, *shape)))

    def _keys(self, elements: tuple[int, ...]) -> tuple[Words, npt.NDArray[np.int32]]:
        if self._switches is None:
            # A map that rotates nothing at a level without keys.
            none = np.empty((self._primes + 1, self._degree // kernels.SEGMENT, 0, 16, self._primes, 2, kernels.TILE))
            return none.astype(np.uint32), np.empty((0, self._degree), dtype=np.int32)
        return self._switches.together(elements)

    @staticmethod
    def _all(came: bool) -> None:
        if not came:
            raise BrokenTeamError("another part failed")
