"""What CKKS and BFV share: keys as kernels take them, affine maps, working memory, and one thread's part in a step.

Sums stay in the extended modulus QP from the copies of the input to the end of an affine map ("double hoisting",
Bossuat, Mouchet, Troncoso-Pastoriza, Hubaux, "Efficient bootstrapping for approximate homomorphic encryption with
non-sparse keys", 2021, §5): a rotation divides one polynomial by the special prime instead of two, a rotated copy none,
and a single division by P * q ends the map.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.kernels import key_switch as turns
from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels.barrier import BrokenTeamError, Team
from hemacrypt.engines.vector.kernels.blake2xb import Expansion
from hemacrypt.engines.vector.kernels.ntt import Words
from hemacrypt.engines.vector.primitives import switching_key
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.plan.bfv_plan import BfvLinear, BfvSquare, PublicBfvPlan
from hemacrypt.plan.plan import LinearStep, Parameters, PublicPlan, SquareStep, Term
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.evaluation_keys import EvaluationKeys

# The SEAL whose headers replies carry: the one inside TenSEAL 0.3.16 and later.
SEAL_MINOR = 3

Numbers = npt.NDArray[np.int64]


# Keys and automorphisms by Galois element.
LevelSwitches = tuple[dict[int, Words], dict[int, npt.NDArray[np.int32]]]


class Switches:
    """Keys of one level; those that are used together are laid out together, once.

    Parameters
    ----------
    keys:
        For each Galois element its key in Montgomery form, moved against the rotation; shape (k, 2, k + 1, N). That of
        element 1 is the relinearisation key.
    orders:
        For each Galois element its automorphism, shape (N,).
    primes, degree:
        Number of data primes k of the level, and N.
    above:
        Keys of the next higher level, which serve here as well, cut to the primes that are left.
    """

    def __init__(
        self,
        keys: dict[int, Words],
        orders: dict[int, npt.NDArray[np.int32]],
        primes: int,
        degree: int,
        above: Switches | None = None,
    ) -> None:
        self._keys, self._orders, self._primes, self._degree, self._above = keys, orders, primes, degree, above
        self._laid: dict[tuple[int, ...], tuple[Words, npt.NDArray[np.int32]]] = {}
        self._groups: dict[tuple[tuple[int, ...], ...], tuple[Words, Numbers, npt.NDArray[np.int32], Numbers]] = {}
        self._lock = threading.Lock()

    def together(self, elements: tuple[int, ...]) -> tuple[Words, npt.NDArray[np.int32]]:
        """Return keys and automorphisms of some elements, as kernels take them."""
        with self._lock:
            if elements not in self._laid:
                found = [self._found(element) for element in elements]
                orders = np.array([order for _, order in found], np.int32).reshape(-1, self._degree)
                keys = np.array([key for key, _ in found], np.uint32)
                keys = keys.reshape(-1, self._primes, 2, self._primes + 1, self._degree)
                self._laid[elements] = (kernels.arranged(keys, orders), orders)
            return self._laid[elements]

    def _found(self, element: int) -> tuple[Words, npt.NDArray[np.int32]]:
        """Return a key and its automorphism, from the lowest level that has it."""
        if element in self._keys:
            return self._keys[element], self._orders[element]
        if self._above is None:
            raise KeyError(f"no key for element {element}")
        key, order = self._above._found(element)
        # Every digit of a key is an encryption by itself, modulo every prime by itself: what is left is a key.
        return key[: self._primes, :, [*range(self._primes), -1]], order

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

    levels: dict[int, Switches]


def load_keys(keys: EvaluationKeys, public: PublicPlan | PublicBfvPlan, rings: dict[int, Ring]) -> VectorKeys:
    """Check a client's evaluation keys, expand their seeds, bring them into the kernels' form.

    Parameters
    ----------
    keys, public:
        The keys, and the plan that they are for.
    rings:
        Rings by level; a key group of another level brings its own.

    Raises
    ------
    FormatError
        If they do not fit the plan.
    """
    levels: dict[int, LevelSwitches] = {}
    for group, serialised in keys.grouped(public):
        parameters = public.parameters.truncated(group.level)
        ring = rings.get(group.level) or Ring(parameters)
        found: dict[int, list[sealformat.Residues]] = {}
        if group.relinearise:
            found[1] = sealformat.read_relinearisation_key(serialised.relinearisation, parameters)
        if group.elements:
            found |= sealformat.read_galois_keys(serialised.galois, parameters, group.elements)
        levels[group.level] = expanded(ring, found)
    return VectorKeys(by_level(levels, public.parameters))


def blank_keys(public: PublicPlan | PublicBfvPlan, rings: dict[int, Ring]) -> VectorKeys:
    """Return keys that are zero, to warm up with."""
    parameters = public.parameters
    levels: dict[int, LevelSwitches] = {}
    for group in public.keys:
        ring = rings.get(group.level) or Ring(parameters.truncated(group.level))
        primes = (*parameters.data_primes[: group.level + 1], parameters.special_prime)
        blank = np.zeros((1, len(primes), parameters.degree), dtype=np.uint64)
        component = sealformat.Residues(blank, bytes(64))
        key, order = switching_key(ring, [component] * (group.level + 1)), ring.automorphism(1)
        elements = (*([1] if group.relinearise else []), *group.elements)
        levels[group.level] = dict.fromkeys(elements, key), dict.fromkeys(elements, order)
    return VectorKeys(by_level(levels, parameters))


def by_level(levels: dict[int, LevelSwitches], parameters: Parameters) -> dict[int, Switches]:
    """Let the keys of every level serve all lower ones."""
    found: dict[int, Switches] = {}
    above: Switches | None = None
    for level in range(parameters.top_level, -1, -1):
        above = found[level] = Switches(*levels.get(level, ({}, {})), level + 1, parameters.degree, above)
    return found


def expanded(ring: Ring, found: dict[int, list[sealformat.Residues]]) -> LevelSwitches:
    """Expand keys, given by their Galois elements."""
    orders = {element: ring.automorphism(element) for element in found}
    keys: dict[int, Words] = {}
    for element, order in orders.items():
        key = switching_key(ring, found.pop(element))
        keys[element] = np.empty_like(key)
        keys[element][..., order] = key
    return keys, orders


@dataclass(frozen=True, eq=False)
class Rotations:
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
    def of(cls, step: LinearStep | BfvLinear, parameters: Parameters) -> Rotations:
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
class Layer:
    """An affine map, encoded.

    Attributes
    ----------
    diagonals:
        Montgomery form over QP, interleaved in order of use, shape (k + 1, N / 64, diagonals, 64).
    biases:
        In NTT form over the primes that are left after the map, shape (outputs, primes, N).
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
    rotations: Rotations
    giants: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, step: LinearStep | BfvLinear, parameters: Parameters, diagonals: Words, biases: Words) -> Layer:
        """Put a layer together from its plan and what was encoded; attributes as of the class."""
        counts = [len(giant) for giants in step.giants for giant in giants]
        return cls(
            diagonals=diagonals,
            biases=biases,
            starts=np.cumsum([0, *counts], dtype=np.int64),
            which=np.array([term.copy for term in terms(step)], dtype=np.int64),
            outputs=np.cumsum([0, *(len(giants) for giants in step.giants)], dtype=np.int64),
            rotations=Rotations.of(step, parameters),
            giants=(parameters.galois_element(step.giant_step),) if step.giant_step else (),
            turns=tuple(tuple(parameters.galois_element(*turn) for turn in group) for group in step.turns),
        )


def terms(step: LinearStep | BfvLinear) -> list[Term]:
    """Return all products of a layer in the order in which the sums take them."""
    return [term for giants in step.giants for giant in giants for term in giant]


def encode_diagonals(step: LinearStep | BfvLinear, encode: Callable[[int], Words], out: Words) -> None:
    """Encode diagonals over QP in the order of their use, interleaved.

    Parameters
    ----------
    step:
        The layer.
    encode:
        Returns a diagonal by its number, in Montgomery form, shape (k + 1, N).
    out:
        Written; shape `diagonals_shape`.
    """
    rows, tiles, _, _ = out.shape
    for place, term in enumerate(terms(step)):
        out[:, :, place] = encode(term.diagonal).reshape(rows, tiles, kernels.TILE)


def diagonals_shape(step: LinearStep | BfvLinear, degree: int) -> tuple[int, ...]:
    """Return the shape of a layer's encoded diagonals: (k + 1, N / 64, diagonals, 64)."""
    return step.level + 2, degree // kernels.TILE, len(terms(step)), kernels.TILE


def blank_outputs(step: LinearStep | BfvLinear, diagonals: Words) -> list[int]:
    """Return the first diagonal of every output that would be a sum of zeros: it encrypts nothing, which all refuse."""
    firsts = np.cumsum([0, *(sum(map(len, giants)) for giants in step.giants)]).tolist()
    return [first for first, last in pairwise(firsts) if not diagonals[:, :, first:last].any()]


class Memory:
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

    def reserve_affine(self, step: LinearStep | BfvLinear, degree: int) -> None:
        """Make room for what `Part.linear` works with."""
        primes, opened = step.level + 1, {copy.parent for copy in step.copies[step.inputs :]}
        self.reserve("openings", len(opened), primes, primes + 1, degree + kernels.PADDING)
        self.reserve("copies", step.inputs + len(opened), 2, primes + 1, degree)
        self.reserve("sums", sum(map(len, step.giants)), 2, primes + 1, degree)

    def reserve_step(self, step: LinearStep | SquareStep | BfvLinear | BfvSquare, degree: int) -> None:
        """Make room for what every step needs."""
        primes = step.level + 1
        self.reserve("digits", primes, primes + 1, degree + kernels.PADDING)
        self.reserve("coefficients", primes, degree)
        self.reserve("over", primes + 1, degree)
        for name in ("even", "odd", "nothing"):
            self.reserve(name, 2, primes + 1, degree)
        for side in ("even", "odd"):
            self.reserve(f"values {side}", max(step.inputs, step.outputs), 2, primes, degree)


class Intake:
    """Checked ciphertexts on their way into working memory; threads share the copying and the seeds' expansion.

    Parameters
    ----------
    inputs:
        The ciphertexts.
    primes:
        The chain's data primes, uint32.
    values:
        Where they go, shape (inputs, 2, primes, N).
    """

    def __init__(self, inputs: Sequence[sealformat.Residues], primes: Words, values: Words) -> None:
        self._inputs, self._values = inputs, values
        self._expansions = [
            Expansion(content.seed, primes, value[1])
            for content, value in zip(inputs, values, strict=True)
            if content.seed is not None
        ]

    def take(self, part: int, team: Team) -> None:
        """Do one share, and meet the others."""
        for content, value in zip(self._inputs, self._values, strict=True):
            for row in range(part, value.shape[1], team.threads):
                value[: len(content.polynomials), row] = content.polynomials[:, row]
        for expansion in self._expansions:
            expansion.fill(part, team.threads)
        team.barrier()
        if part == 0:
            for expansion in self._expansions:
                expansion.finish()
        team.barrier()


class Part:
    """What one thread of a team does in one step."""

    def __init__(self, ring: Ring, memory: Memory, team: Team, part: int, switches: Switches) -> None:
        self.ring, self.memory, self.switches = ring, memory, switches
        self.primes, self.degree = len(ring.primes) - 1, ring.parameters.degree
        self.work = (
            memory.array("over", self.primes + 1, self.degree),
            memory.array("coefficients", self.primes, self.degree),
            memory.array("digits", self.primes, self.primes + 1, self.degree + kernels.PADDING),
        )
        sides = tuple(self.over_qp(name, 1)[0] for name in ("even", "odd", "nothing"))
        self.common = (sides, self.work, ring.tables, team.words, part, team.threads)

    def linear(self, encoded: Layer, values: Words, out: Words) -> None:
        """Carry out an affine map; values (inputs, 2, k, N), out (outputs, 2, primes that are left, N)."""
        rotations, switches = encoded.rotations, self.switches
        made = tuple((element,) for element in rotations.made)
        openings = (rotations.opened, rotations.origins, *switches.groups(made)[::2])
        places = (rotations.starts, rotations.openings, rotations.parents, rotations.targets, rotations.ready)
        self.all(
            turns.affine(
                values,
                self.over_qp("copies", len(rotations.ready)),
                self.memory.array("openings", len(rotations.opened), *self.work[2].shape),
                openings,
                (*switches.together(rotations.elements), *places),
                (encoded.diagonals, encoded.starts, encoded.which),
                self.over_qp("sums", int(encoded.outputs[-1])),
                (encoded.outputs, *switches.together(encoded.giants), *switches.groups(encoded.turns)),
                encoded.biases,
                out,
                *self.common,
            )
        )

    def over_qp(self, name: str, count: int) -> Words:
        """Return working memory for ciphertexts over QP."""
        return self.memory.array(name, count, 2, self.primes + 1, self.degree)

    @staticmethod
    def all(came: bool) -> None:
        """Go on if all parts came to a kernel's barriers."""
        if not came:
            raise BrokenTeamError("another part failed")


Run = TypeVar("Run")


class Lender(Generic[Run]):
    """Lends out working memory and a team of threads; requests at the same time have their own.

    Parameters
    ----------
    make:
        Makes another when all are lent out.
    """

    def __init__(self, make: Callable[[], Run]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._idle: list[Run] = []

    @contextmanager
    def lend(self) -> Iterator[Run]:
        """Lend one out."""
        with self._lock:
            run = self._idle.pop() if self._idle else None
        if run is None:
            run = self._make()
        try:
            yield run
        finally:
            with self._lock:
                self._idle.append(run)
