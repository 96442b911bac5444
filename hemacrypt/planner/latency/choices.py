"""Choosing how a network is laid out: forms of its layers, how their diagonals are split, the turns that follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from hemacrypt.errors import PlanError
from hemacrypt.model.network import Array, CollapsedNetwork, ComplexArray, Convolution, Shape
from hemacrypt.plan.plan import JOIN_FACTOR, KeyGroup, Layout, LinearStep, Parameters, SquareStep, Term, Turn
from hemacrypt.planner import costs
from hemacrypt.planner.latency.diagonals import Grid, MatrixForm, forms, image_grids, power_of_two_from
from hemacrypt.planner.latency.rotations import Split, arrange, splits, turn_groups
from hemacrypt.seal import sizes

# What evaluation keys may take on the wire unless the operator says otherwise; it bends, see `affordable`.
KEY_BUDGET: Final = 34_000_000
# How much slower, in milliseconds, an evaluation may get for every megabyte of keys that it saves; tried in turn.
WORTH_A_MEGABYTE: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 1e3)
# Ways to lay out the first layers that are followed further.
_PATHS_KEPT: Final = 8
# Complex slots, their real parts only, or the two rows of an exact plan, which take the place of the two parts.
Slots = Literal["complex", "real", "rows"]
Kind = Literal["plain", "joined", "parted"]
Giants = tuple[tuple[tuple[Term, ...], ...], ...]


@dataclass(frozen=True)
class Choice:
    """One layer's form, how its diagonals are split, and the turns that follow."""

    form: MatrixForm
    split: Split
    turns: tuple[tuple[Turn, ...], ...]


@dataclass(frozen=True)
class Partial:
    """Choices for the first layers of a network, and where that leaves the values.

    ``milliseconds`` is what the evaluation takes, ``spent`` the same with the price of the keys.
    """

    choices: tuple[Choice, ...]
    layout: Layout
    grid: Grid | None
    milliseconds: float
    spent: float


@dataclass(frozen=True)
class Chosen:
    """Everything about a plan but its numbers."""

    parameters: Parameters
    source: Layout
    choices: tuple[Choice, ...]
    kinds: tuple[Kind, ...]
    keys: tuple[KeyGroup, ...]
    milliseconds: float


class Chooser:
    """Tries combinations of layouts, forms and splits of a network.

    Parameters
    ----------
    network, slots, images:
        As in `plan_network`.
    parameters:
        Degree and modulus chain.
    """

    def __init__(self, network: CollapsedNetwork, slots: Slots, images: int, parameters: Parameters) -> None:
        self.parameters = parameters
        self._network, self._slots, self._images = network, slots, images
        self._entries = [layer.entries() for layer in network.linears]
        for number, layer in enumerate(network.linears):
            if not self._entries[number][2].size:
                raise PlanError(
                    f"layer {number} ({layer.describe()}) reads nothing but its padding; give it less, or remove it"
                )
        self._known: dict[object, list[tuple[MatrixForm, list[tuple[float, Split]]]]] = {}
        self._chosen_at: dict[float, Chosen] = {}

    def choose(self, worth: float) -> Chosen:
        """Return the cheapest combination when a megabyte of keys is worth so many milliseconds.

        Raises
        ------
        PlanError
            If none holds the layers.
        """
        if worth not in self._chosen_at:
            self._chosen_at[worth] = self._cheapest(worth)
        return self._chosen_at[worth]

    def _cheapest(self, worth: float) -> Chosen:
        best: tuple[float, Chosen] | None = None
        for source, grid in _sources(self._network, self.parameters.slots, self._slots, self._images):
            paths = [Partial((), source, grid, 0.0, 0.0)]
            for number in range(len(self._network.linears)):
                paths = [extended for path in paths for extended in self._extended(path, number, worth)]
                if number < self._network.squares:
                    paths = [self._after_square(path, number) for path in paths]
                paths = sorted(paths, key=lambda path: path.spent)[:_PATHS_KEPT]
            if paths and (best is None or paths[0].spent < best[0]):
                best = (paths[0].spent, self._chosen(source, paths[0]))
        if best is None:
            raise PlanError(
                f"no layout puts the layers of this network into ciphertexts of {self.parameters.slots} slots; "
                "make its widest layer smaller"
            )
        return best[1]

    def _level(self, number: int) -> int:
        return self.parameters.top_level - 2 * number

    def _forms(self, path: Partial, number: int) -> list[tuple[MatrixForm, list[tuple[float, Split]]]]:
        layout, level = path.layout, self._level(number)
        known = (number, layout.positions.tobytes(), layout.flags.tobytes(), layout.period, layout.factor, path.grid)
        if known not in self._known:
            found = forms(self._network.linears[number], self._entries[number], layout, path.grid)
            self._known[known] = [
                (form, splits(form, self.parameters.degree, level, quiet=level == 1)) for form in found
            ]
        return self._known[known]

    def _extended(self, path: Partial, number: int, worth: float) -> Iterator[Partial]:
        """Yield the path with one layer more, in each of the layer's forms."""
        level, degree = self._level(number), self.parameters.degree
        megabyte = sizes.one_key_bytes(degree, level) / 1e6
        for form, ways in self._forms(path, number):
            best: tuple[float, float, Choice] | None = None
            for doublings in (1, 2):
                turns = turn_groups(form.sums, form.source.mixes, doublings)
                keys = {turn for group in turns for turn in group}
                turning = costs.finish(level)
                for group in turns:
                    turning += costs.turn(level, len(group))
                turning = turning * form.target.ciphertexts + costs.key(level) * len(keys)
                spent = costs.VECTOR.milliseconds(turning, degree)
                for cost, split in ways:
                    needed = len(keys | {Turn(step) for step in split.keys})
                    priced = spent + cost + worth * needed * megabyte
                    if best is None or priced < best[0]:
                        best = (priced, spent + cost, Choice(form, split, turns))
            if best is not None:
                priced, taken, choice = best
                moved = form.shifted(choice.split.shift)
                choices = (*path.choices, replace(choice, form=moved))
                yield Partial(choices, moved.target, moved.grid, path.milliseconds + taken, path.spent + priced)

    def _after_square(self, path: Partial, number: int) -> Partial:
        kind = kind_of_square(self._slots, path.layout)
        level = self._level(number) - 1
        step = SquareStep(level, path.layout.ciphertexts, kind, 1.0, 1.0)
        cost = costs.VECTOR.milliseconds(costs.count(step), self.parameters.degree)
        return replace(
            path,
            layout=squared_layout(kind, path.layout),
            milliseconds=path.milliseconds + cost,
            spent=path.spent + cost,
        )

    def _chosen(self, source: Layout, path: Partial) -> Chosen:
        choices = path.choices
        kinds = tuple(kind_of_square(self._slots, choice.form.target) for choice in choices[:-1])
        turns: list[tuple[int, bool, set[Turn]]] = []
        for number, choice in enumerate(choices):
            needed = {Turn(step) for step in choice.split.keys} | {turn for group in choice.turns for turn in group}
            turns.append((self._level(number), False, needed))
            if number < len(kinds):
                conjugations = {Turn(0, True)} if kinds[number] == "parted" else set()
                turns.append((self._level(number) - 1, True, conjugations))
        groups = [
            KeyGroup(level, squared, tuple(sorted(self.parameters.galois_element(*turn) for turn in needed)))
            for level, squared, needed in turns
            if squared or needed
        ]
        return Chosen(self.parameters, source, choices, kinds, tuple(groups), path.milliseconds)


def affordable(chooser: Chooser, key_budget: int | None, usual: int = KEY_BUDGET) -> Chosen:
    """Return the fastest combination whose keys keep within a budget; see `plan_network`.

    Without a budget ``usual`` is one that bends: keys may be larger by a factor if the evaluation is faster by as much.
    """
    budget = usual if key_budget is None else key_budget
    tried: list[Chosen] = []
    # From the fastest on: behind the first whose keys fit, only slower ones follow.
    for worth in WORTH_A_MEGABYTE:
        tried.append(chooser.choose(worth))
        if _key_bytes(tried[-1]) <= budget:
            break
    if key_budget is None:
        return min(tried, key=lambda chosen: chosen.milliseconds * max(_key_bytes(chosen) / usual, 1))
    needed = _key_bytes(tried[-1])
    if needed > budget:
        raise PlanError(
            f"the evaluation keys would take {needed / 1e6:.1f} MB, the budget is {budget / 1e6:.1f} MB; "
            "raise the budget or use a smaller network"
        )
    return tried[-1]


def _key_bytes(chosen: Chosen) -> float:
    return sizes.key_bytes(chosen.parameters, chosen.keys)


def kind_of_square(slots: Slots, layout: Layout) -> Kind:
    """Choose how the values of a layout are squared."""
    if slots == "rows":
        return "plain"
    if layout.images == 2:
        return "parted"
    return "joined" if slots == "complex" and layout.ciphertexts > 1 else "plain"


def squared_layout(kind: str, layout: Layout) -> Layout:
    """Return where values lie after they were squared."""
    if kind == "plain":
        return layout
    if kind == "parted":
        return replace(layout, factor=JOIN_FACTOR * layout.factor**2)
    return layout.joined(JOIN_FACTOR)


def _sources(network: CollapsedNetwork, slots: int, kind: Slots, images: int) -> Iterator[tuple[Layout, Grid | None]]:
    """Yield the layouts that an image can have."""
    shape, first = network.input_shape, network.linears[0]
    grids = image_grids(shape, slots, first.stride if isinstance(first, Convolution) else None)
    tried: list[Grid | None] = [*grids] or [None]
    for grid in tried:
        plain = _plain(shape, grid, slots, images)
        # A single slot has no upper half.
        half = max(plain.period // 2, 1)
        if kind != "real" and images == 1 and (plain.ciphertexts > 1 or plain.positions.max() >= half):
            folded = plain.folded()
            if folded.mixes:
                yield folded, grid
        yield plain, grid


def _plain(shape: Shape, grid: Grid | None, slots: int, images: int) -> Layout:
    """Return the layout of images whose values all lie in real parts, or in real and imaginary parts alike."""
    if grid is not None:
        layout = grid.layout(shape, min(power_of_two_from(grid.extent(shape)), slots), slots)
        return replace(layout, images=images)
    values = math.prod(shape)
    period = min(power_of_two_from(values), slots)
    return Layout(np.arange(values), period, slots, -(-values // period), images=images)


def _with_constants(terms: Giants, diagonals: ComplexArray) -> tuple[Giants, ComplexArray]:
    """Give outputs that depend on no input one product, with a diagonal of zeros; the bias does the rest."""
    constants = [number for number, giants in enumerate(terms) if not any(giants)]
    filled = list(terms)
    for place, number in enumerate(constants, start=len(diagonals)):
        filled[number] = ((Term(0, place),), *terms[number][1:])
    return tuple(filled), np.concatenate([diagonals, np.zeros((len(constants), diagonals.shape[1]))])


def prepared_step(choice: Choice, level: int) -> LinearStep:
    """Return a layer's step at a level, whose scales are still to be found."""
    copies, terms, moves = arrange(choice.form, choice.split)
    diagonals = choice.form.diagonals()
    for number, move in enumerate(moves):
        diagonals[number] = np.roll(diagonals[number], move)
    terms, diagonals = _with_constants(terms, diagonals)
    return LinearStep(
        name=choice.form.layer.describe(),
        level=level,
        inputs=choice.form.source.ciphertexts,
        copies=copies,
        giants=terms,
        giant_step=choice.split.stride if choice.split.giants > 1 else 0,
        turns=choice.turns,
        diagonals=diagonals,
        bias=choice.form.bias(),
        input_scale=1.0,
        weight_scale=1.0,
        output_scale=1.0,
    )


def slot_peaks(network: CollapsedNetwork, chosen: Chosen) -> list[ComplexArray]:
    """Return the largest values of every slot's parts: of the input, then after each step, shape (…, slots) each."""

    def packed(layout: Layout, values: Array) -> ComplexArray:
        return layout.pack(np.stack([np.abs(values)] * layout.images))

    peaks = [packed(chosen.source, np.full(network.inputs, max(abs(bound) for bound in network.input_range)))]
    for number, (choice, peak) in enumerate(zip(chosen.choices, network.peaks, strict=True)):
        peaks.append(packed(choice.form.target, peak))
        if number < len(chosen.kinds):
            peaks.append(packed(squared_layout(chosen.kinds[number], choice.form.target), peak**2))
    return peaks
