"""Where a layer's values lie, and which generalised diagonals its matrix then has.

A matrix M over the slots acts as ``y[s] = sum_d M[s, s + d] x[s + d]``: one product with a vector (the diagonal d)
and one rotation by d for every d that is not all zero (Halevi and Shoup, "Algorithms in HElib", 2014, §4). Two forms:

*grid* — a convolution writes its maps interleaved into the grid of its input ("multiplexed", Lee et al.,
"Low-Complexity Deep Convolutional Neural Networks on Fully Homomorphic Encryption Using Multiplexed Parallel
Convolutions", 2022), so the same few offsets serve every pixel.

*wide* — R rows over an input of period T: with slot s computing row s mod R, R diagonals cover the matrix and log2(T/R)
rotate-and-sums finish it (Juvekar et al., "GAZELLE", 2018, §4.2 "hybrid"). Afterwards *every* slot holds an output, so
no partial sum is left that would tell a client more than the logits. A grid that fills a part of the slots only takes
the same turn.

*Complex slots.* When one image lies in real and imaginary parts, a real map is the real part of a complex one:
``M1 x1 + M2 x2 = Re((M1 - i M2)(x1 + i x2))``. The diagonals hold half of it, and the result plus its conjugate is what
was wanted: half the diagonals, one conjugation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hemacrypt.model.network import ComplexArray, Convolution, Entries, Linear, Shape
from hemacrypt.plan.plan import Layout

Offsets = npt.NDArray[np.int64]
# A channel is parted into at most the square of this many maps; so many ways of it are tried.
_MOST_PHASES = 16
_GRIDS_TRIED = 2


def power_of_two_from(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Grid:
    """Feature maps on a common grid of ``height`` x ``width`` slots; neighbours of one map are ``gap`` slots apart.

    A block of height * width slots holds gap^2 channels, one per position inside a gap x gap cell. Blocks fill one
    ciphertext after another. The whole may lie ``shift`` slots to the right, around the end of each period.

    Maps that are larger than the grid are parted into ``phases``^2 maps, one for each remainder of a pixel's row and
    column; a convolution whose stride is a multiple reads each of them at stride one.
    """

    height: int
    width: int
    gap: int = 1
    shift: int = 0
    phases: int = 1

    def extent(self, shape: Shape) -> int:
        """Return how many slots feature maps of this shape reach over."""
        maps = shape[0] * self.phases**2
        return -(-maps // (self.gap * self.gap)) * self.height * self.width

    def layout(self, shape: Shape, period: int, slots: int) -> Layout:
        """Return where a feature map's values lie, channel first; several ciphertexts if one period is not enough."""
        channel, row, column = np.ogrid[: shape[0], : shape[1], : shape[2]]
        (y, upper), (x, lower) = divmod(row, self.phases), divmod(column, self.phases)
        block, inside = divmod((channel * self.phases + upper) * self.phases + lower, self.gap * self.gap)
        row, column = y * self.gap + inside // self.gap, x * self.gap + inside % self.gap
        flat = (block * self.height * self.width + row * self.width + column).reshape(-1)
        ciphertext, slot = divmod(flat, period)
        return Layout(ciphertext * period + (slot + self.shift) % period, period, slots, int(ciphertext.max()) + 1)

    def ciphertexts(self, shape: Shape, slots: int) -> int:
        """Return how many ciphertexts feature maps of this shape lie in."""
        return -(-self.extent(shape) // slots)

    def holds(self, shape: Shape, slots: int) -> bool:
        """Tell whether feature maps of this shape fit the grid, and blocks the slots of a ciphertext."""
        height, width = (-(-side // self.phases) for side in shape[1:])
        fits = height * self.gap <= self.height and width * self.gap <= self.width
        block = self.height * self.width
        return fits and block <= slots and (slots % block == 0 or self.extent(shape) <= slots)

    def strided(self, stride: int) -> Grid | None:
        """Return the grid that a convolution writes its maps into, None when stride and phases do not go together."""
        if self.phases % stride == 0:
            return Grid(self.height, self.width, self.gap, 0, self.phases // stride)
        if stride % self.phases == 0:
            return Grid(self.height, self.width, self.gap * stride // self.phases)
        return None


def image_grid(shape: Shape, slots: int, phases: int = 1) -> Grid | None:
    """Choose the grid of an image: sides rounded up to powers of two where that fits, which makes offsets regular."""
    height, width = (-(-side // phases) for side in shape[1:])
    rounded = Grid(power_of_two_from(height), power_of_two_from(width), phases=phases)
    exact = Grid(height, width, phases=phases)
    return next((grid for grid in (rounded, exact) if grid.holds(shape, slots)), None)


def image_grids(shape: Shape, slots: int, stride: int | None) -> list[Grid]:
    """List the grids that an image can have which a convolution of some stride reads, None if it is no convolution.

    One where a ciphertext holds a channel; else channels are parted, and those that need the fewest ciphertexts remain.
    """
    whole = image_grid(shape, slots)
    if whole is not None or stride is None:
        return [] if whole is None else [whole]
    parted = (image_grid(shape, slots, phases) for phases in range(2, _MOST_PHASES + 1))
    grids = [grid for grid in parted if grid is not None and grid.strided(stride) is not None]
    return sorted(grids, key=lambda grid: grid.ciphertexts(shape, slots))[:_GRIDS_TRIED]


@dataclass(frozen=True, eq=False)
class MatrixForm:
    """A layer's matrix over the slots.

    Attributes
    ----------
    layer:
        The affine map.
    entries:
        What is not zero in its matrix.
    source, target:
        Layouts of its input and output.
    grid:
        Grid of the output, None when it has none.
    """

    layer: Linear
    entries: Entries
    source: Layout
    target: Layout
    grid: Grid | None

    @property
    def sums(self) -> tuple[int, ...]:
        """Rotations of the rotate-and-sum, each twice the one before."""
        found: list[int] = []
        step = self.target.period
        while step < self.source.period:
            found.append(step)
            step *= 2
        return tuple(found)

    @property
    def wrap(self) -> int:
        """Offsets count modulo this."""
        return min(self.source.period, self.target.period) if self.sums else self.source.period

    @cached_property
    def places(self) -> tuple[Offsets, Offsets]:
        """Diagonal (output ciphertext, input ciphertext, offset as one number) and slot of each entry of the matrix."""
        rows, columns, _ = self.entries
        source, target = self.source, self.target
        read, written = source.slot[columns], target.slot[rows]
        offset = (read - written) % self.wrap
        # Fewer rows than input slots: row r is computed wherever s = r modulo the row count, each place a part of it.
        slot = (read - offset) % source.period if self.sums else written
        pair = target.ciphertext[rows] * source.ciphertexts + source.ciphertext[columns]
        return pair * self.wrap + offset, slot

    @cached_property
    def numbers(self) -> Offsets:
        """The diagonals that are not all zero, ascending, numbered as in `places`."""
        return np.unique(self.places[0])

    @cached_property
    def offsets(self) -> Offsets:
        """The offset of each diagonal, shape (diagonals,)."""
        return self.numbers % self.wrap

    @property
    def pairs(self) -> tuple[Offsets, Offsets]:
        """Output and input ciphertext of each diagonal."""
        outputs, inputs = divmod(self.numbers // self.wrap, self.source.ciphertexts)
        return outputs, inputs

    def shifted(self, shift: int) -> MatrixForm:
        """Move the output ``shift`` slots to the right, so that every offset falls by as much."""
        target, period = self.target, self.target.period
        moved = replace(target, positions=target.ciphertext * period + (target.slot + shift) % period)
        grid = self.grid and replace(self.grid, shift=self.grid.shift + shift)
        return MatrixForm(self.layer, self.entries, self.source, moved, grid)

    def diagonals(self) -> ComplexArray:
        """Return the diagonals, shape (diagonals, slots)."""
        _, columns, values = self.entries
        period = max(self.source.period, self.target.period)
        number, slot = self.places
        diagonals = np.zeros((len(self.numbers), period), dtype=np.complex128)
        weights = values.astype(np.complex128)
        if self.source.mixes:
            weights *= np.where(self.source.flags[columns], -0.5j / self.source.factor, 0.5)
        np.add.at(diagonals, (np.searchsorted(self.numbers, number), slot), weights)
        return np.tile(diagonals, (1, self.target.slots // period))

    def bias(self) -> ComplexArray:
        """Return the constant part in the output's slots, shape (ciphertexts, slots)."""
        constant = self.layer.offset()
        return self.target.pack(np.stack([constant] * self.target.images))


def forms(layer: Linear, entries: Entries, source: Layout, grid: Grid | None) -> Iterator[MatrixForm]:
    """Yield the forms that a layer, given with the entries of its matrix, can take on an input layout."""
    slots, factor, images = source.slots, source.factor if source.images == 2 else 1.0, source.images
    if grid is not None and isinstance(layer, Convolution):
        spread = grid.strided(layer.stride)
        if spread is not None and spread.holds(layer.output_shape, slots):
            # A period below the slots has fewer diagonals and a rotate-and-sum for each time that it is halved.
            needed = power_of_two_from(spread.extent(layer.output_shape))
            for period in {min(needed, slots), slots}:
                target = spread.layout(layer.output_shape, period, slots)
                yield MatrixForm(layer, entries, source, replace(target, factor=factor, images=images), spread)
    rows = min(power_of_two_from(layer.outputs), slots)
    # Rotate-and-sum doubles its step, so it needs periods that are powers of two; all of ours are.
    ciphertexts = -(-layer.outputs // rows)
    target = Layout(np.arange(layer.outputs), rows, slots, ciphertexts, factor=factor, images=images)
    yield MatrixForm(layer, entries, source, target, None)
