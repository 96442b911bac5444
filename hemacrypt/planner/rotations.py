"""Splitting a set of diagonals into baby steps and giant steps with few rotations and few Galois keys.

Without hoisting — SEAL has none — a rotation costs the same whether it starts from the input or from another rotated
copy. So baby steps are reached through powers of two, giant steps by Horner's rule, and every network whatsoever needs
at most log2(slots) Galois keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemacrypt.plan import Baby, Term
from hemacrypt.planner.diagonals import MatrixForm, Offsets

_SHIFTS_TRIED = 8


@dataclass(frozen=True)
class Split:
    """Diagonal d = giant * stride + baby, after the output was moved by ``shift`` slots to the right.

    Attributes
    ----------
    shift:
        How far the output layout moves, so that no rotation goes backwards.
    wrap, stride:
        The giant step of offset d is ``d mod wrap // stride``; both powers of two.
    babies:
        Offsets of the rotated copies in ascending order, intermediate ones included, 0 first.
    giants:
        Number of inner sums.
    """

    shift: int
    wrap: int
    stride: int
    babies: tuple[int, ...]
    giants: int

    @property
    def rotations(self) -> int:
        """Rotations of baby and giant steps together."""
        return len(self.babies) - 1 + self.giants - 1


def best_split(form: MatrixForm) -> Split:
    """Search strides, wrap-arounds and shifts for the split with the fewest rotations.

    A giant step may count modulo ``wrap``: the offsets of a convolution are small in y and x but repeat for every block
    of channels, so rows become giant steps (modulo a block) while columns and blocks become baby steps.
    """
    period = form.source.period
    shifts = [0]
    if not form.sums and form.target.period == period:
        # The output may lie anywhere: start counting offsets behind one of the largest gaps between them.
        gaps = np.diff(form.offsets, prepend=form.offsets[-1] - period)
        shifts = form.offsets[np.argsort(-gaps, kind="stable")[:_SHIFTS_TRIED]].tolist()
    powers = [1 << k for k in range(period.bit_length())]
    best: Split | None = None
    best_count = (1 << 62, 1 << 62)
    for shift in shifts:
        offsets = (form.offsets - shift) % period
        for wrap in powers[1:] or powers:
            for stride in powers:
                if stride > wrap:
                    break
                giant = offsets % wrap // stride
                baby = np.unique(offsets - giant * stride)
                giants = int(giant.max()) + 1
                rough = int(np.count_nonzero(baby)) + giants - 1
                if rough > best_count[0]:
                    continue
                split = Split(shift, wrap, stride, with_intermediates(baby), giants)
                count = (split.rotations, sum(step.bit_count() for step in split.babies))
                if count < best_count:
                    best, best_count = split, count
    assert best is not None  # noqa: S101 - at least shift 0, stride 1 is always tried
    return best


def with_intermediates(babies: Offsets) -> tuple[int, ...]:
    """Add the offsets that must be passed on the way when every rotation is by a power of two."""
    needed = {0}
    for offset in sorted(babies.tolist()):
        while offset not in needed:
            needed.add(offset)
            offset = _parent(offset, needed | set(babies.tolist()))
    return tuple(sorted(needed))


def _parent(offset: int, available: set[int]) -> int:
    """Return the offset minus one of its powers of two, an available one if there is one, else without the highest."""
    powers = [1 << k for k in range(offset.bit_length()) if offset >> k & 1]
    for power in reversed(powers):
        if offset - power in available:
            return offset - power
    return offset - powers[-1]


def baby_tree(split: Split) -> tuple[Baby, ...]:
    """Arrange the baby steps as a tree whose edges are rotations by powers of two; parents come first."""
    index = {offset: number for number, offset in enumerate(split.babies)}
    tree = [Baby(0, 0)]
    for offset in split.babies[1:]:
        parent = _parent(offset, set(index))
        tree.append(Baby(index[parent], offset - parent))
    return tuple(tree)


def arrange(form: MatrixForm, split: Split) -> tuple[tuple[tuple[Term, ...], ...], list[int]]:
    """Sort the diagonals of a (shifted) form under their giant steps.

    Returns
    -------
    terms of each giant step, and for each diagonal how far Horner's rule rotates it, so that it can be pre-rotated back
    """
    index = {offset: number for number, offset in enumerate(split.babies)}
    terms: list[list[Term]] = [[] for _ in range(split.giants)]
    giants = form.offsets % split.wrap // split.stride
    for number, (offset, giant) in enumerate(zip(form.offsets.tolist(), giants.tolist(), strict=True)):
        terms[giant].append(Term(index[offset - giant * split.stride], number))
    return tuple(tuple(row) for row in terms), (giants * split.stride).tolist()
