"""Slots, diagonals and rotations for libraries that rotate and multiply but have no layers; needs only NumPy.

A convolution keeps the grid of its input and interleaves its channels in it (multiplexed packing: Lee et al., 2022). A
matrix with few rows repeats them over all slots and ends with rotate-and-sums ("hybrid": GAZELLE, 2018). Both are
products with diagonals, split into baby steps (rotations of one ciphertext, which libraries can hoist) and giant steps.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.peers.worker import Array, CaseFile, Layer, Skipped

Places = npt.NDArray[np.int64]

# Rotate-and-sums go in fours: three hoisted rotations cost less than two that follow one another.
_RADIX = 4


@dataclass(frozen=True)
class Stage:
    """One affine map: sum over giants of rot_giant(sum over babies of diagonal * rot_baby(x)), then sums, then bias.

    Attributes
    ----------
    giants:
        Giant step -> baby step -> diagonal, shape (slots,), already rotated back by the giant step.
    sums:
        Groups of rotations: after each group x is x plus all its rotations of that group.
    bias:
        Shape (slots,).
    """

    giants: dict[int, dict[int, Array]]
    sums: list[list[int]]
    bias: Array

    @property
    def babies(self) -> list[int]:
        """Baby steps other than 0."""
        return sorted({baby for row in self.giants.values() for baby in row} - {0})

    @property
    def rotations(self) -> set[int]:
        """All rotations."""
        return {*self.babies, *(giant for giant in self.giants if giant), *(k for group in self.sums for k in group)}


@dataclass(frozen=True)
class Packing:
    """The way of a whole network.

    Attributes
    ----------
    stages:
        Affine maps; squares stand between them.
    source:
        Slot of each value of the image; the content repeats every ``period`` slots.
    period, slots:
        Of the input, and of a ciphertext.
    outputs:
        Number of logits; they lie in the first slots.
    """

    stages: list[Stage]
    source: Places
    period: int
    slots: int
    outputs: int

    @property
    def rotations(self) -> list[int]:
        """All rotations that need keys, ascending."""
        return sorted(set().union(*(stage.rotations for stage in self.stages)))

    def pack(self, image: Array) -> Array:
        """Return the slots of an image."""
        values = np.zeros(self.period)
        values[self.source] = image.ravel()
        return np.tile(values, self.slots // self.period)


def _power_of_two_from(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _grid_places(shape: tuple[int, ...], side: int, gap: int) -> Places:
    """Return the slots of feature maps whose neighbours lie ``gap`` apart on a grid of side x side, channel first."""
    channel, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    block, inside = np.divmod(channel, gap * gap)
    places: Places = block * side * side + (y * gap + inside // gap) * side + x * gap + inside % gap
    return places.ravel()


def _entries(layer: Layer) -> tuple[Places, Places, Array]:
    """Return rows, columns and values of the matrix of a convolution."""
    filters, channels, height, width = layer.weight.shape
    _, out_height, out_width = layer.output_shape
    _, in_height, in_width = layer.input_shape
    top, _, left, _ = layer.padding
    y, x = np.indices((out_height, out_width)).reshape(2, -1)
    rows: list[Places] = []
    columns: list[Places] = []
    values: list[Array] = []
    for i, j in np.ndindex(height, width):
        from_y, from_x = y * layer.stride + i - top, x * layer.stride + j - left
        inside = (from_y >= 0) & (from_y < in_height) & (from_x >= 0) & (from_x < in_width)
        pixel, origin = (y * out_width + x)[inside], (from_y * in_width + from_x)[inside]
        for o, c in np.ndindex(filters, channels):
            rows.append(o * out_height * out_width + pixel)
            columns.append(c * in_height * in_width + origin)
            values.append(np.full(len(pixel), layer.weight[o, c, i, j]))
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)


def _split(diagonals: dict[int, Array], period: int, baby_cost: float) -> dict[int, dict[int, Array]]:
    """Arrange diagonals so that babies (at ``baby_cost`` giants each) and giants together are cheapest."""
    offsets = np.array(sorted(diagonals))
    powers = [1 << k for k in range(period.bit_length())]
    best, best_cost = np.zeros_like(offsets), np.inf
    for start in offsets:
        moved = (offsets - start) % period
        for wrap in powers:
            for stride in powers[: wrap.bit_length()]:
                giants = moved % wrap // stride * stride
                cost = baby_cost * len(np.unique(moved - giants)) + len(np.unique(giants))
                if cost < best_cost:
                    best, best_cost = giants, cost
    arranged: dict[int, dict[int, Array]] = defaultdict(dict)
    for offset, giant in zip(offsets.tolist(), best.tolist(), strict=True):
        arranged[giant][(offset - giant) % period] = np.roll(diagonals[offset], giant)
    return dict(arranged)


def _groups(first: int, period: int) -> list[list[int]]:
    groups: list[list[int]] = []
    while first < period:
        radix = min(_RADIX, period // first)
        groups.append([first * k for k in range(1, radix)])
        first *= radix
    return groups


def make_packing(case: CaseFile, slots: int, baby_cost: float = 0.7) -> Packing:
    """Pack a network that begins with a convolution and ends with a matrix.

    Parameters
    ----------
    case:
        The network.
    slots:
        Of one ciphertext.
    baby_cost:
        What a hoisted rotation costs, an unhoisted one being 1.

    Raises
    ------
    Skipped
        If a layer does not fit one ciphertext.
    """
    shape = case.layers[0].input_shape
    side, gap = _power_of_two_from(max(shape[1:])), 1
    places = _grid_places(shape, side, gap)
    source = places
    written: list[Places] = []
    # The period of the grid is that of its widest stage.
    for layer in case.layers:
        if layer.convolves:
            gap *= layer.stride
            written.append(_grid_places(layer.output_shape, side, gap))
    period = _power_of_two_from(1 + max(int(each.max()) for each in (source, *written)))
    if period > slots:
        raise Skipped(f"a layer needs {period} slots; one ciphertext has {slots}")
    stages: list[Stage] = []
    grid = period
    for number, layer in enumerate(case.layers):
        diagonals: dict[int, Array] = defaultdict(lambda: np.zeros(grid))
        sums: list[list[int]] = []
        if layer.convolves:
            target = written[number]
            rows, columns, values = _entries(layer)
            offsets, slot = (places[columns] - target[rows]) % grid, target[rows]
            for offset in np.unique(offsets):
                here = offsets == offset
                np.add.at(diagonals[int(offset)], slot[here], values[here])
            bias = np.zeros(grid)
            bias[target] = np.repeat(layer.bias, len(target) // len(layer.bias))
            places, following = target, period
        else:
            following = _power_of_two_from(len(layer.weight))
            matrix = np.zeros((following, period))
            matrix[: len(layer.weight), places] = layer.weight
            every = np.arange(grid)
            for offset in range(min(following, period)):
                diagonals[offset] = matrix[every % following, (every + offset) % period]
            sums = _groups(following, period)
            bias = np.pad(layer.bias, (0, following - len(layer.bias)))[every % following]
            places = np.arange(len(layer.weight))
        copies = slots // grid
        arranged = {
            giant: {baby: np.tile(diagonal, copies) for baby, diagonal in row.items()}
            for giant, row in _split(dict(diagonals), period, baby_cost).items()
        }
        stages.append(Stage(arranged, sums, np.tile(bias, copies)))
        period = following
    return Packing(stages, source, grid, slots, len(case.layers[-1].weight))


def evaluate_in_clear(packing: Packing, image: Array) -> Array:
    """Carry the packing out on numbers, to check it."""
    value = packing.pack(image)
    for number, stage in enumerate(packing.stages):
        value = value * value if number else value
        total = np.zeros(packing.slots)
        for giant, row in stage.giants.items():
            total += np.roll(sum(diagonal * np.roll(value, -baby) for baby, diagonal in row.items()), -giant)
        for group in stage.sums:
            total = total + sum(np.roll(total, -k) for k in group)
        value = total + stage.bias
    return value[: packing.outputs]
