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
from itertools import pairwise
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hemacrypt import sealformat
from hemacrypt.engines.base import Engine
from hemacrypt.engines.vector import kernels, turns
from hemacrypt.engines.vector.blake2xb import Expansion
from hemacrypt.engines.vector.cache import DiagonalCache
from hemacrypt.engines.vector.evaluator import switching_key
from hemacrypt.engines.vector.ntt import Words
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.engines.vector.team import BrokenTeamError, Team
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
    ring:
        The level's ring.
    """

    def __init__(self, keys: dict[int, Words], orders: dict[int, npt.NDArray[np.int32]], ring: Ring) -> None:
        self._keys, self._orders, self._ring = keys, orders, ring
        self._laid: dict[tuple[int, ...], tuple[Words, npt.NDArray[np.int32]]] = {}
        self._groups: dict[tuple[tuple[int, ...], ...], tuple[Words, Numbers, npt.NDArray[np.int32], Numbers]] = {}
        self._lock = threading.Lock()

    def together(self, elements: tuple[int, ...]) -> tuple[Words, npt.NDArray[np.int32]]:
        """Return keys and automorphisms of some elements, as kernels take them."""
        with self._lock:
            if elements not in self._laid:
                primes, degree = len(self._ring.primes) - 1, self._ring.parameters.degree
                orders = np.array([self._orders[element] for element in elements], np.int32).reshape(-1, degree)
                keys = np.array([self._keys[element] for element in elements], np.uint32)
                keys = keys.reshape(-1, primes, 2, primes + 1, degree)
                self._laid[elements] = (kernels.arranged(keys, orders), orders)
            return self._laid[elements]

    def groups(self, groups: tuple[tuple[int, ...], ...]) -> tuple[Words, Numbers, npt.NDArray[np.int32], Numbers]:
        """Return keys (flat) and automorphisms of several groups, and where each group's begin."""
        if groups not in self._groups:
            laid = [self.together(group) for group in groups]
            keys, orders = [keys.reshape(-1) for keys, _ in laid], [orders for _, orders in laid]
            self._groups[groups] = (
                np.concatenate([np.empty(0, np.uint32), *keys]),
                np.cumsum([0, *(len(each) for each in keys)], dtype=np.int64),
                np.concatenate([self.together(())[1], *orders]),
                np.cumsum([0, *(len(each) for each in orders)], dtype=np.int64),
            )
        return self._groups[groups]


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
        For each of these the decomposition that it comes from; 0 for inputs.
    made:
        For those that are no inputs the Galois element that makes it.
    elements:
        Galois elements that make all other copies.
    starts, openings, parents, targets:
        What each of them makes, as `kernels.rotate_and_sum` takes it.
    """

    ready: Numbers
    opened: Numbers
    origins: Numbers
    made: tuple[int, ...]
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
        origins, made = [0] * len(opened), []
        shared: dict[int, list[tuple[int, int, int]]] = {}
        for index, copy in enumerate(step.copies[step.inputs :], start=step.inputs):
            origin, element = number[copy.parent], parameters.galois_element(copy.step)
            if index in number:
                origins[number[index]] = origin
                made.append(element)
            else:
                shared.setdefault(element, []).append((origin, place[copy.parent], index))
        rotations = [rotation for each in shared.values() for rotation in each]
        columns = np.array(rotations, dtype=np.int64).reshape(-1, 3).T.copy()
        return cls(
            ready=np.array(ready, dtype=np.int64),
            opened=np.array([place[copy] for copy in opened], dtype=np.int64),
            origins=np.array(origins, dtype=np.int64),
            made=tuple(made),
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
    outputs:
        The inner sums of output o have the numbers outputs[o] … outputs[o + 1] - 1; shape (outputs + 1,).
    rotations:
        How the copies are made.
    giants:
        Galois element between two inner sums; none when there is one only.
    turns:
        Galois elements of each group of turns.
    """

    diagonals: Words
    biases: Words
    starts: Numbers
    which: Numbers
    outputs: Numbers
    rotations: _Rotations
    giants: tuple[int, ...]
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
        inputs = [
            sealformat.read_ciphertext(content, parameters, parameters.top_level, public.input_scale)
            for content in ciphertexts
        ]
        with self._running() as run:
            results = run.evaluate(inputs, keys)
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
            levels[group.level] = _Switches(dict.fromkeys(elements, key), dict.fromkeys(elements, order), ring)
        nothing = np.zeros((1, parameters.top_level + 1, parameters.degree), dtype=np.uint64)
        inputs = [sealformat.Residues(nothing, bytes(64))] * public.input_layout.ciphertexts
        with self._running() as run:
            run.evaluate(inputs, VectorKeys(levels))

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
        firsts = np.cumsum([0, *(sum(map(len, giants)) for giants in step.giants)]).tolist()
        for first, last in pairwise(firsts):
            if not diagonals[:, :, first:last].any():
                # Every client refuses a ciphertext that depends on no input, as SEAL does: round to one, not to zero.
                one = np.full(parameters.slots, 1 / step.weight_scale, np.complex128)
                diagonals = diagonals.copy()
                encoded = self._encode(one, step.weight_scale, step.level, extended=True)
                diagonals[:, :, first] = encoded.reshape(diagonals.shape[0], diagonals.shape[1], kernels.TILE)
        return _Encoded(
            diagonals=diagonals,
            biases=np.stack([ring.encode(bias, step.output_scale, step.level) for bias in step.bias]),
            starts=np.cumsum([0, *counts], dtype=np.int64),
            which=np.array([term.copy for term in terms], dtype=np.int64),
            outputs=np.cumsum([0, *(len(giants) for giants in step.giants)], dtype=np.int64),
            rotations=_Rotations.of(step, parameters),
            giants=(parameters.galois_element(step.giant_step),) if step.giant_step else (),
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
    return _Switches(keys, orders, ring)


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
        # A map that rotates nothing may have a level without keys.
        self._none = {step.level: _Switches({}, {}, rings[step.level]) for step in plan.steps}
        self._memory = _Memory()
        self._degree = plan.parameters.degree
        for step in plan.steps:
            self._reserve(step)

    def _reserve(self, step: Step) -> None:
        memory, primes, degree = self._memory, step.level + 1, self._degree
        memory.reserve("digits", primes, primes + 1, degree + kernels.PADDING)
        memory.reserve("coefficients", primes, degree)
        memory.reserve("over", primes + 1, degree)
        for name in ("even", "odd", "nothing"):
            memory.reserve(name, 2, primes + 1, degree)
        for side in ("even", "odd"):
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

    def evaluate(self, inputs: Sequence[sealformat.Residues], keys: VectorKeys) -> list[Words]:
        """Evaluate all steps on checked ciphertexts; results of shape (2, primes, N)."""
        results: list[Words] = []
        level = self._plan.parameters.top_level
        values = self._memory.array("values odd", len(inputs), 2, level + 1, self._degree)
        expansions = [
            Expansion(content.seed, self._rings[level].primes[:-1], value[1])
            for content, value in zip(inputs, values, strict=True)
            if content.seed is not None
        ]

        def walk(part: int) -> None:
            for content, value in zip(inputs, values, strict=True):
                for row in range(part, level + 1, self._team.threads):
                    value[: len(content.polynomials), row] = content.polynomials[:, row]
            for expansion in expansions:
                expansion.fill(part, self._team.threads)
            self._team.barrier()
            if part == 0:
                for expansion in expansions:
                    expansion.finish()
            self._team.barrier()
            value = values
            for number, step in enumerate(self._plan.steps):
                side = "values odd" if number % 2 else "values even"
                out = self._memory.array(side, step.outputs, 2, step.level, self._degree)
                switches = keys.levels.get(step.level) or self._none[step.level]
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

    def __init__(self, ring: Ring, memory: _Memory, team: Team, part: int, switches: _Switches) -> None:
        self._ring, self._memory, self._switches = ring, memory, switches
        self._primes, self._degree = len(ring.primes) - 1, ring.parameters.degree
        self._work = (
            memory.array("over", self._primes + 1, self._degree),
            memory.array("coefficients", self._primes, self._degree),
            memory.array("digits", self._primes, self._primes + 1, self._degree + kernels.PADDING),
        )
        sides = tuple(self._over_qp(name, 1)[0] for name in ("even", "odd", "nothing"))
        self._common = (sides, self._work, ring.tables, team.words, part, team.threads)

    def linear(self, step: LinearStep, encoded: _Encoded, values: Words, out: Words) -> None:
        """Carry out an affine map; values (inputs, 2, k, N), out (outputs, 2, k - 1, N)."""
        rotations, switches = encoded.rotations, self._switches
        made = tuple((element,) for element in rotations.made)
        openings = (rotations.opened, rotations.origins, *switches.groups(made)[::2])
        places = (rotations.starts, rotations.openings, rotations.parents, rotations.targets, rotations.ready)
        self._all(
            turns.affine(
                values,
                self._over_qp("copies", len(rotations.ready)),
                self._memory.array("openings", len(rotations.opened), *self._work[2].shape),
                openings,
                (*switches.together(rotations.elements), *places),
                (encoded.diagonals, encoded.starts, encoded.which),
                self._over_qp("sums", int(encoded.outputs[-1])),
                (encoded.outputs, *switches.together(encoded.giants), *switches.groups(encoded.turns)),
                encoded.biases,
                out,
                *self._common,
            )
        )

    def square(self, step: SquareStep, root: Words | None, values: Words, out: Words) -> None:
        """Square, join and relinearise; values (inputs, 2, k, N), out (outputs, 2, k - 1, N)."""
        key, product = self._switches.together((1,)), self._memory.array("product", 3, self._primes, self._degree)
        for number in range(step.outputs):
            if step.kind == "parted":
                parts = self._parted(values[number])
            else:
                first = 2 * number if step.kind == "joined" else number
                parts = values[first : first + 2 if step.kind == "joined" else first + 1]
            if len(parts) == 1:
                self._all(turns.square_plain(parts[0], *key, product, out[number], *self._common))
            else:
                self._all(turns.square_two(parts[0], parts[1], root, *key, product, out[number], *self._common))

    def _parted(self, value: Words) -> Words:
        """Return twice the real part and twice i times the imaginary part of a ciphertext (2, k, N)."""
        conjugated, parts = self._memory.array("conjugated", *value.shape), self._memory.array("parts", 2, *value.shape)
        key = self._switches.together((self._ring.parameters.galois_element(*Turn(0, True)),))
        self._all(turns.part_complex(value, *key, conjugated, parts, *self._common))
        return parts

    def _over_qp(self, name: str, count: int) -> Words:
        """Return working memory for ciphertexts over QP."""
        return self._memory.array(name, count, 2, self._primes + 1, self._degree)

    @staticmethod
    def _all(came: bool) -> None:
        if not came:
            raise BrokenTeamError("another part failed")
