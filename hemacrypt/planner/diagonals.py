"""Where a layer's values lie, and which generalised diagonals its matrix then has.

A matrix M over the slots acts as ``y[s] = sum_d M[s, s + d] x[s + d]``: one product with a vector (the diagonal d)
and one rotation by d for every d that is not all zero (Halevi and Shoup, "Algorithms in HElib", 2014, §4). Two forms:

*grid* — a convolution writes its maps interleaved into the grid of its input ("multiplexed", Lee et al.,
"Low-Complexity Deep Convolutional Neural Networks on Fully Homomorphic Encryption Using Multiplexed Parallel
Convolutions", 2022), so the same few offsets serve every pixel.

*wide* — R rows over an input of period T: with slot s computing row s mod R, R diagonals cover the matrix and log2(T/R)
rotate-and-sums finish it (Juvekar et al., "GAZELLE", 2018, §4.2 "hybrid"). Afterwards *every* slot holds an output, so
no partial sum is left that would tell a client more than the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hemacrypt.network import Array, Convolution, Linear, Shape
from hemacrypt.plan import Layout

Offsets = npt.NDArray[np.int64]


def power_of_two_from(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Grid:
    """Feature maps on a common grid of ``height`` x ``width`` slots; neighbours of one map are ``gap`` slots apart.

    A block of height * width slots holds gap^2 channels, one per position inside a gap x gap cell. The whole may lie
    ``shift`` slots to the right, around the end.
    """

    height: int
    width: int
    gap: int = 1
    shift: int = 0

    def positions(self, shape: Shape, slots: int) -> npt.NDArray[np.int64]:
        """Return the slots of a feature map's values in channel-first order, shape (values,)."""
        channel, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
        block, inside = divmod(channel, self.gap * self.gap)
        row, column = y * self.gap + inside // self.gap, x * self.gap + inside % self.gap
        start = block * self.height * self.width
        positions: npt.NDArray[np.int64] = (start + row * self.width + column + self.shift).reshape(-1) % slots
        return positions

    def holds(self, shape: Shape, slots: int) -> bool:
        """Tell whether feature maps of this shape fit the grid and the slots."""
        blocks = -(-shape[0] // (self.gap * self.gap))
        fits = shape[1] * self.gap <= self.height and shape[2] * self.gap <= self.width
        return fits and blocks * self.height * self.width <= slots


def image_grid(shape: Shape, slots: int) -> Grid | None:
    """Choose the grid of an image: sides rounded up to powers of two where that fits, which makes offsets regular."""
    rounded = Grid(power_of_two_from(shape[1]), power_of_two_from(shape[2]))
    exact = Grid(shape[1], shape[2])
    return next((grid for grid in (rounded, exact) if grid.holds(shape, slots)), None)


@dataclass(frozen=True, eq=False)
class MatrixForm:
    """A layer's matrix over the slots.

    Attributes
    ----------
    layer:
        The affine map.
    source, target:
        Layouts of its input and output.
    grid:
        Grid of the output, None when it has none.
    offsets:
        The diagonals that are not all zero, ascending.
    sums:
        Rotations of the rotate-and-sum.
    """

    layer: Linear
    source: Layout
    target: Layout
    grid: Grid | None
    offsets: Offsets
    sums: tuple[int, ...]

    def shifted(self, shift: int) -> MatrixForm:
        """Move the output ``shift`` slots to the right, so that every offset falls by as much."""
        period = self.target.period
        target = Layout((self.target.positions + shift) % period, period, self.target.slots)
        offsets = np.sort((self.offsets - shift) % self.source.period)
        grid = self.grid and replace(self.grid, shift=self.grid.shift + shift)
        return MatrixForm(self.layer, self.source, target, grid, offsets, self.sums)

    def diagonals(self) -> Array:
        """Return the diagonals, shape (offsets, slots)."""
        rows, columns, values = self.layer.entries()
        period = max(self.source.period, self.target.period)
        offset, slot = _locate(self.source, self.target, rows, columns)
        diagonals = np.zeros((len(self.offsets), period))
        np.add.at(diagonals, (np.searchsorted(self.offsets, offset), slot), values)
        return np.tile(diagonals, (1, self.target.slots // period))

    def bias(self) -> Array:
        """Return the constant part in the output's slots, shape (slots,)."""
        return self.target.pack(self.layer.offset())


def _locate(
    source: Layout, target: Layout, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]
) -> tuple[Offsets, Offsets]:
    """Return the diagonal and the slot (within the longer period) in which each entry of the matrix stands."""
    read, written = source.positions[columns], target.positions[rows]
    if target.period >= source.period:
        return (read - written) % source.period, written
    # Fewer rows than input slots: row r is computed wherever s = r modulo the row count, each place a part of it.
    offset = (read - written) % target.period
    return offset, (read - offset) % source.period


def _form(layer: Linear, source: Layout, target: Layout, grid: Grid | None) -> MatrixForm:
    rows, columns, _ = layer.entries()
    offset, _ = _locate(source, target, rows, columns)
    sums: list[int] = []
    step = target.period
    while step < source.period:
        sums.append(step)
        step *= 2
    return MatrixForm(layer, source, target, grid, np.unique(offset), tuple(sums))


def forms(layer: Linear, source: Layout, grid: Grid | None) -> list[MatrixForm]:
    """List the forms that a layer can take on a given input layout; empty when its outputs do not fit the slots."""
    found: list[MatrixForm] = []
    if grid is not None and isinstance(layer, Convolution):
        spread = replace(grid, gap=grid.gap * layer.stride)
        if spread.holds(layer.output_shape, source.slots):
            positions = spread.positions(layer.output_shape, source.slots)
            found.append(_form(layer, source, Layout(positions, source.slots, source.slots), spread))
    rows = power_of_two_from(layer.outputs)
    # Rotate-and-sum doubles its step, so it needs periods that are powers of two; all of ours are.
    if rows <= source.slots:
        found.append(_form(layer, source, Layout(np.arange(layer.outputs), rows, source.slots), None))
    return found
