"""Splitting a set of diagonals into baby steps and giant steps: the cheapest ways for the keys they need.

Offsets are written as giant + parent + child. Copies of the input are rotated by parent + child: the children of one
parent share its decomposition, and so one set of keys serves the children of all parents. Parents and giants lie at
equal distances where possible, each reached from the one before, so that a single key serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from hemacrypt.plan.plan import Copy, Term, Turn
from hemacrypt.planner import costs
from hemacrypt.planner.latency.diagonals import MatrixForm, Offsets

_SHIFTS_TRIED = 3
_QUIET_DIAGONALS = 16


@dataclass(frozen=True)
class Split:
    """Diagonal d = giant * stride + copy, after the output was moved by ``shift`` slots to the right.

    Attributes
    ----------
    shift:
        How far the output layout moves, so that no rotation goes backwards.
    wrap, stride:
        The giant step of offset d is ``d mod wrap // stride``; both powers of two.
    giants:
        Number of inner sums of an output.
    offsets:
        Offsets of the rotated copies, the input itself (0) first, parents before children.
    parents:
        For each offset the number of the copy that it is rotated from; 0 for the input itself.
    """

    shift: int
    wrap: int
    stride: int
    giants: int
    offsets: tuple[int, ...]
    parents: tuple[int, ...]

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The rotation that makes each copy from its parent; the first one is none."""
        return tuple(offset - self.offsets[parent] for offset, parent in zip(self.offsets, self.parents, strict=True))

    @cached_property
    def keys(self) -> set[int]:
        """Rotations that need a key."""
        return {*self.steps[1:], *([self.stride] if self.giants > 1 else [])}

    @cached_property
    def opened(self) -> int:
        """How many copies have children and so are decomposed."""
        return len(set(self.parents[1:]))

    def count(self, inputs: int, outputs: int, diagonals: int, level: int) -> costs.Counts:
        """Count the primitives of the copies, products and giant steps of a map between so many ciphertexts."""
        copies = costs.decompose(level) * self.opened + costs.rotate(level) * (len(self.offsets) - 1)
        copies += costs.fold(level) * max(self.opened - 1, 0)
        giants = costs.turn(level, 1) * (self.giants - 1)
        keys, products = costs.key(level) * len(self.keys), costs.product(level) * diagonals
        return copies * inputs + keys + products + giants * outputs


def splits(form: MatrixForm, degree: int, level: int, *, quiet: bool = False) -> list[tuple[float, Split]]:
    """Return the ways to split that no other beats in both milliseconds and keys, fastest first.

    Parameters
    ----------
    form, degree, level:
        What is split, and where.
    quiet:
        The input has the smallest scale of all, where a rotation's noise weighs most: with few diagonals rotate no
        input, only sums, whose scale is high.
    """
    ciphertexts = form.source.ciphertexts, form.target.ciphertexts
    offsets = np.unique(form.offsets).tobytes()
    return list(_splits(form.wrap, offsets, *ciphertexts, len(form.numbers), degree, level, quiet))


@lru_cache(maxsize=256)
def _splits(
    wrap: int, offsets: bytes, inputs: int, outputs: int, diagonals: int, degree: int, level: int, quiet: bool
) -> tuple[tuple[float, Split], ...]:
    """Find the ways to split; plans of one network for one image, for two and for integers meet the same maps."""
    plain = np.frombuffer(offsets, dtype=np.int64)
    candidates = list(_candidates(wrap, plain))
    if quiet and len(plain) <= _QUIET_DIAGONALS:
        # Offsets far apart would take too many giant steps; they rotate the input after all.
        candidates = [split for split in candidates if len(split.offsets) == 1] or candidates
    found: dict[int, tuple[float, Split]] = {}
    for split in candidates:
        counted = split.count(inputs, outputs, diagonals, level)
        cost, keys = costs.VECTOR.milliseconds(counted, degree), len(split.keys)
        if keys not in found or cost < found[keys][0]:
            found[keys] = (cost, split)
    best: list[tuple[float, Split]] = []
    for keys in sorted(found):
        if not best or found[keys][0] < best[-1][0]:
            best.append(found[keys])
    return tuple(best[::-1])


def _candidates(period: int, plain: Offsets) -> Iterator[Split]:
    # The output may lie anywhere: start counting offsets behind one of the largest gaps between them.
    gaps = np.diff(plain, prepend=plain[-1] - period)
    shifts = [0] if len(plain) == period else plain[np.argsort(-gaps, kind="stable")[:_SHIFTS_TRIED]].tolist()
    powers = [1 << k for k in range(period.bit_length())]
    seen: set[tuple[int, ...]] = set()
    for shift in shifts:
        offsets = (plain - shift) % period
        for wrap in powers[1:] or powers:
            for stride in powers:
                if stride > wrap:
                    break
                giant = offsets % wrap // stride
                copies = np.unique(offsets - giant * stride)
                giants = int(giant.max()) + 1
                if giants > 64 and giants * 4 > len(offsets):
                    continue
                key = (shift, giants, stride if giants > 1 else 0, *copies.tolist())
                if key in seen:
                    continue
                seen.add(key)
                for tree in _trees(copies, powers):
                    yield Split(shift, wrap, stride, giants, *tree)


def _trees(copies: Offsets, powers: list[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield ways to reach all copies from offset 0: by one rotation each, or by parents at equal distances."""
    flat = (0, *copies[copies > 0].tolist())
    yield flat, (0,) * len(flat)
    for distance in powers[1:]:
        highest = int(copies[-1]) // distance
        if highest == 0:
            break
        parents = np.unique(copies // distance)
        if highest + 1 > 2 * len(parents) or highest > 64:
            continue
        offsets = [distance * number for number in range(highest + 1)]
        before = [0, *range(highest)]
        for offset in copies[copies % distance > 0].tolist():
            before.append(offset // distance)
            offsets.append(offset)
        yield tuple(offsets), tuple(before)


def turn_groups(sums: Sequence[int], conjugate: bool, doublings: int) -> tuple[tuple[Turn, ...], ...]:
    """Put rotate-and-sums and a conjugation into groups: each adds all products of up to ``doublings`` of them at once.

    A group of two adds three turns after one decomposition, where one after the other would take two.
    """
    single = [Turn(step) for step in sums] + [Turn(0, True)] * conjugate
    groups: list[tuple[Turn, ...]] = []
    for start in range(0, len(single), doublings):
        reached = [Turn(0)]
        for turn in single[start : start + doublings]:
            reached += [Turn(turn.step + other.step, turn.conjugate != other.conjugate) for other in reached]
        groups.append(tuple(reached[1:]))
    return tuple(groups)


def arrange(
    form: MatrixForm, split: Split
) -> tuple[tuple[Copy, ...], tuple[tuple[tuple[Term, ...], ...], ...], list[int]]:
    """Lay out copies and terms of a (shifted) form.

    Returns
    -------
    copies of all inputs, terms of each giant step of each output, and for each diagonal how far Horner's rule rotates
    it, so that it can be pre-rotated back
    """
    inputs, outputs = form.source.ciphertexts, form.target.ciphertexts
    copies = [Copy(number, 0) for number in range(inputs)]
    # Where each copy comes from: its input and its number in the split. Children of one parent stand side by side.
    origins = [(number, 0) for number in range(inputs)]
    children: dict[int, list[int]] = {}
    for number, parent in enumerate(split.parents[1:], start=1):
        children.setdefault(parent, []).append(number)
    for index, (source, number) in enumerate(origins):
        for child in children.get(number, []):
            copies.append(Copy(index, split.steps[child]))
            origins.append((source, child))
    place = {(source, split.offsets[number]): index for index, (source, number) in enumerate(origins)}
    terms: list[list[list[Term]]] = [[[] for _ in range(split.giants)] for _ in range(outputs)]
    giants = form.offsets % split.wrap // split.stride
    for number, (output, source, offset, giant) in enumerate(
        zip(*form.pairs, form.offsets.tolist(), giants.tolist(), strict=True)
    ):
        terms[output][giant].append(Term(place[int(source), offset - giant * split.stride], number))
    return (
        tuple(copies),
        tuple(tuple(tuple(row) for row in output) for output in terms),
        (giants * split.stride).tolist(),
    )
