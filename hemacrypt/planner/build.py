"""Putting a plan together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from hemacrypt.bundle import Bundle
from hemacrypt.errors import PlanError
from hemacrypt.network import Array, CollapsedNetwork
from hemacrypt.plan import (
    JOIN_FACTOR,
    KeyGroup,
    Layout,
    LinearStep,
    Parameters,
    Plan,
    PublicPlan,
    SquareStep,
    Step,
    Turn,
    united,
)
from hemacrypt.planner import chain, costs, noise, scales
from hemacrypt.planner.diagonals import Grid, MatrixForm, forms, image_grid, power_of_two_from
from hemacrypt.planner.rotations import Split, arrange, splits, turn_groups
from hemacrypt.security import LARGEST_MODULUS_BITS

# What evaluation keys may take on the wire unless the operator says otherwise.
KEY_BUDGET: Final = 34_000_000
# How much slower, in milliseconds, an evaluation may get for every megabyte of keys that it saves; tried in turn.
_WORTH_A_MEGABYTE: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 1e3)
# A pair plan is worth its keys when it is at least this much faster for each image, and one image alone does not become
# slower by as much because the pair needs keys as well.
_PAIR_GAIN: Final = 0.95

# Ways to lay out the first layers that are followed further.
_PATHS_KEPT: Final = 8

# Complex slots, their real parts only, or the two rows of an exact plan, which take the place of the two parts.
Slots = Literal["complex", "real", "rows"]
Kind = Literal["plain", "joined", "parted"]


@dataclass(frozen=True)
class _Choice:
    """One layer's form, how its diagonals are split, and the turns that follow."""

    form: MatrixForm
    split: Split
    turns: tuple[tuple[Turn, ...], ...]


@dataclass(frozen=True)
class _Path:
    """Choices for the first layers of a network, and where that leaves the values."""

    choices: tuple[_Choice, ...]
    layout: Layout
    grid: Grid | None
    spent: float


@dataclass(frozen=True)
class _Chosen:
    """Everything about a plan but its numbers."""

    parameters: Parameters
    source: Layout
    choices: tuple[_Choice, ...]
    kinds: tuple[Kind, ...]
    keys: tuple[KeyGroup, ...]


def plan_bundle(bundle: Bundle, key_budget: int | None = None) -> tuple[Plan, ...]:
    """Plan the evaluation of a bundle's network; see `plan_model`."""
    manifest = bundle.manifest
    digest = manifest.preprocessing.digest
    return plan_model(bundle.network, manifest.name, manifest.labels, digest, key_budget=key_budget)


def plan_model(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    *,
    key_budget: int | None = None,
) -> tuple[Plan, ...]:
    """Plan the evaluation of one image and, where that is faster, of two at once; one set of keys serves both.

    Parameters
    ----------
    network, name, labels, preprocessing_digest, key_budget:
        As in `plan_network`.

    Returns
    -------
    tuple
        The plan for one image first.

    Raises
    ------
    PlanError
        If no secure parameters serve the network, or no plan keeps within a key budget that was set.
    """
    chooser = _Chooser(network, "complex", 1)
    single = _planned(network, _affordable(chooser, key_budget), name, labels, preprocessing_digest)
    budget = KEY_BUDGET if key_budget is None else key_budget
    try:
        both = _both(chooser, _Chooser(network, "complex", 2), budget)
        if both is None:
            return (single,)
        plans = [_planned(network, chosen, name, labels, preprocessing_digest) for chosen in both]
    except PlanError:
        return (single,)
    fastest, alone, together = (costs.plan_ms(single.parameters, plan.steps) for plan in (single, *plans))
    if together / 2 > _PAIR_GAIN * fastest or fastest < _PAIR_GAIN * alone:
        return (single,)
    keys = united(chosen.keys for chosen in both)
    return tuple(replace(plan, public=replace(plan.public, keys=keys)) for plan in plans)


def _both(singles: _Chooser, pairs: _Chooser, budget: int) -> tuple[_Chosen, _Chosen] | None:
    """Return the fastest combination for one image that leaves a pair room within the budget, and the fastest pair."""
    for worth in _WORTH_A_MEGABYTE:
        single = singles.choose(worth)
        for other in _WORTH_A_MEGABYTE:
            pair = pairs.choose(other)
            if costs.key_bytes(single.parameters, united([single.keys, pair.keys])) <= budget:
                return single, pair
    return None


def plan_network(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    *,
    slots: Slots = "complex",
    images: int = 1,
    key_budget: int | None = None,
) -> Plan:
    """Plan the evaluation of a network on one image, or two images at once (latency layout).

    Parameters
    ----------
    network:
        Any chain of affine maps and squares.
    name:
        What clients call the model.
    labels:
        What each logit stands for; numbered when not given.
    preprocessing_digest:
        Names the preprocessing that clients must follow.
    slots:
        ``complex`` lets the planner use imaginary parts wherever that is cheaper; ``real`` leaves them empty.
    images:
        1, or 2: then real and imaginary parts carry one image each.
    key_budget:
        Bytes that evaluation keys may take on the wire; None asks for at most `KEY_BUDGET`, or what the network needs.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If no secure parameters serve the network, or no plan keeps within a key budget that was set.
    """
    chosen = _affordable(_Chooser(network, slots, images), key_budget)
    return _planned(network, chosen, name, labels, preprocessing_digest)


def _affordable(chooser: _Chooser, key_budget: int | None, usual: int = KEY_BUDGET) -> _Chosen:
    """Return the fastest combination whose keys keep within a budget; see `plan_network`."""
    budget = usual if key_budget is None else key_budget
    for worth in _WORTH_A_MEGABYTE:
        chosen = chooser.choose(worth)
        needed = costs.key_bytes(chosen.parameters, chosen.keys)
        if needed <= budget:
            break
    if needed > budget and key_budget is not None:
        raise PlanError(
            f"the evaluation keys would take {needed / 1e6:.1f} MB, the budget is {budget / 1e6:.1f} MB; "
            "raise the budget or use a smaller network"
        )
    return chosen


def _planned(
    network: CollapsedNetwork,
    chosen: _Chosen,
    name: str,
    labels: Sequence[str] | None,
    preprocessing_digest: str,
) -> Plan:
    parameters, target = chosen.parameters, chosen.choices[-1].form.target
    with np.errstate(over="ignore", invalid="ignore"):
        peaks = _peaks(network, chosen)
    if not all(np.isfinite(peak).all() for peak in peaks):
        raise PlanError("values up to infinity between the layers; train with smaller activations")
    prepared = [_prepare(choice, parameters.top_level - 2 * number) for number, choice in enumerate(chosen.choices)]
    steps, errors, deviation, of_copy = _with_best_scales(prepared, chosen, peaks)
    last, other = steps[-1].output_scale, target.factor if target.images == 2 else 0.0
    public = PublicPlan(
        model=name,
        labels=tuple(labels) if labels is not None else tuple(f"logit {i}" for i in range(network.outputs)),
        parameters=parameters,
        input_layout=chosen.source,
        output_layout=target,
        input_scale=steps[0].input_scale,
        output_scale=last,
        keys=chosen.keys,
        logit_error_bound=_rounded_up(noise.deviations_of_bound(target) * deviation),
        logit_limit=parameters.data_primes[0] / 2 / last / math.hypot(1, other),
        copy_error_bound=_rounded_up(noise.deviations_of_bound(target) * max(deviation, of_copy)),
        preprocessing_digest=preprocessing_digest,
    )
    return Plan(
        public=public,
        steps=tuple(steps),
        step_errors=tuple(errors),
        step_peaks=tuple(float(peak.max()) for peak in peaks[1:]),
        calibrated=network.magnitudes is not None,
        reasons=_reasons(network, parameters, steps, chosen.source),
    )


def _kind(slots: Slots, layout: Layout) -> Kind:
    """Choose how the values of a layout are squared."""
    if slots == "rows":
        return "plain"
    if layout.images == 2:
        return "parted"
    return "joined" if slots == "complex" and layout.ciphertexts > 1 else "plain"


def _squared(kind: str, layout: Layout) -> Layout:
    """Return where values lie after they were squared."""
    if kind == "plain":
        return layout
    if kind == "parted":
        return replace(layout, factor=JOIN_FACTOR * layout.factor**2)
    return layout.joined(JOIN_FACTOR)


def _rounded_up(value: float) -> float:
    """Round up to three digits, so that machines whose exponentials differ in the last bit make the same plan."""
    digits = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / digits) * digits:.3e}")


def _sources(network: CollapsedNetwork, slots: int, kind: Slots, images: int) -> list[tuple[Layout, Grid | None]]:
    """List the layouts that an image can have."""
    grid = image_grid(network.input_shape, slots)
    period = min(power_of_two_from(network.inputs), slots)
    flat = np.arange(network.inputs)
    plain = Layout(flat, period, slots, -(-network.inputs // period))
    if grid is not None:
        extent = grid.extent(network.input_shape)
        plain = grid.layout(network.input_shape, min(power_of_two_from(extent), slots), slots)
    plain = replace(plain, images=images)
    # A single slot has no upper half.
    half = max(plain.period // 2, 1)
    if kind == "real" or images == 2 or (plain.ciphertexts == 1 and plain.positions.max() < half):
        return [(plain, grid)]
    folded = plain.folded()
    return [(folded, grid), (plain, grid)] if folded.mixes else [(plain, grid)]


class _Chooser:
    """Tries combinations of layouts, forms and splits of a network.

    Parameters
    ----------
    network, slots, images:
        As in `plan_network`.
    parameters:
        Degree and modulus chain; the smallest that serve by default.
    """

    def __init__(
        self, network: CollapsedNetwork, slots: Slots, images: int, parameters: Parameters | None = None
    ) -> None:
        if parameters is None:
            widest = max(network.inputs, *(layer.outputs for layer in network.linears))
            parameters = chain.choose_parameters(chain.smallest_degree(network.squares, widest), network.squares)
        self.parameters = parameters
        self._network, self._slots, self._images = network, slots, images
        self._entries = [layer.entries() for layer in network.linears]
        for number, layer in enumerate(network.linears):
            if not self._entries[number][2].size:
                raise PlanError(f"layer {number} ({layer.describe()}) has only zero weights; train or remove it")
        self._known: dict[object, list[tuple[MatrixForm, list[tuple[float, Split]]]]] = {}
        self._chosen_at: dict[float, _Chosen] = {}

    def choose(self, worth: float) -> _Chosen:
        """Return the cheapest combination when a megabyte of keys is worth so many milliseconds.

        Raises
        ------
        PlanError
            If none holds the layers.
        """
        if worth not in self._chosen_at:
            self._chosen_at[worth] = self._cheapest(worth)
        return self._chosen_at[worth]

    def _cheapest(self, worth: float) -> _Chosen:
        best: tuple[float, _Chosen] | None = None
        for source, grid in _sources(self._network, self.parameters.slots, self._slots, self._images):
            paths = [_Path((), source, grid, 0.0)]
            for number in range(len(self._network.linears)):
                paths = [extended for path in paths for extended in self._extended(path, number, worth)]
                if number < self._network.squares:
                    paths = [self._after_square(path, number) for path in paths]
                paths = sorted(paths, key=lambda path: path.spent)[:_PATHS_KEPT]
            if paths and (best is None or paths[0].spent < best[0]):
                best = (paths[0].spent, self._chosen(source, paths[0].choices))
        if best is None:
            raise PlanError(
                f"no layout puts the layers of this network into ciphertexts of {self.parameters.slots} slots; "
                "make its widest layer smaller"
            )
        return best[1]

    def _level(self, number: int) -> int:
        return self.parameters.top_level - 2 * number

    def _forms(self, path: _Path, number: int) -> list[tuple[MatrixForm, list[tuple[float, Split]]]]:
        layout, level = path.layout, self._level(number)
        known = (number, layout.positions.tobytes(), layout.flags.tobytes(), layout.period, layout.factor, path.grid)
        if known not in self._known:
            found = forms(self._network.linears[number], self._entries[number], layout, path.grid)
            self._known[known] = [
                (form, splits(form, self.parameters.degree, level, quiet=level == 1)) for form in found
            ]
        return self._known[known]

    def _extended(self, path: _Path, number: int, worth: float) -> Iterator[_Path]:
        """Yield the path with one layer more, in each of the layer's forms."""
        level, degree = self._level(number), self.parameters.degree
        megabyte = costs.one_key_bytes(degree, level) / 1e6
        for form, ways in self._forms(path, number):
            best: tuple[float, _Choice] | None = None
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
                        best = (priced, _Choice(form, split, turns))
            if best is not None:
                priced, choice = best
                moved = form.shifted(choice.split.shift)
                choices = (*path.choices, replace(choice, form=moved))
                yield _Path(choices, moved.target, moved.grid, path.spent + priced)

    def _after_square(self, path: _Path, number: int) -> _Path:
        kind = _kind(self._slots, path.layout)
        level = self._level(number) - 1
        step = SquareStep(level, path.layout.ciphertexts, kind, 1.0, 1.0)
        cost = costs.VECTOR.milliseconds(costs.count(step), self.parameters.degree)
        return replace(path, layout=_squared(kind, path.layout), spent=path.spent + cost)

    def _chosen(self, source: Layout, choices: tuple[_Choice, ...]) -> _Chosen:
        kinds = tuple(_kind(self._slots, choice.form.target) for choice in choices[:-1])
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
        return _Chosen(self.parameters, source, choices, kinds, tuple(groups))


def _prepare(choice: _Choice, level: int) -> LinearStep:
    copies, terms, moves = arrange(choice.form, choice.split)
    if not all(any(giants) for giants in terms):
        raise PlanError(
            f"{choice.form.layer.describe()}: a whole ciphertext of its {choice.form.layer.outputs} outputs would "
            "depend on no input; remove outputs that have only zero weights"
        )
    diagonals = choice.form.diagonals()
    for number, move in enumerate(moves):
        diagonals[number] = np.roll(diagonals[number], move)
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


def _peaks(network: CollapsedNetwork, chosen: _Chosen) -> list[Array]:
    """Return the largest absolute value of every slot: of the input, then after each step, shape (…, slots) each."""

    def packed(layout: Layout, values: Array) -> Array:
        return np.abs(layout.pack(np.stack([values] * layout.images)))

    peaks = [packed(chosen.source, np.full(network.inputs, max(abs(bound) for bound in network.input_range)))]
    for number, (choice, peak) in enumerate(zip(chosen.choices, network.peaks, strict=True)):
        peaks.append(packed(choice.form.target, peak))
        if number < len(chosen.kinds):
            peaks.append(packed(_squared(chosen.kinds[number], choice.form.target), peak**2))
    return peaks


def _with_best_scales(
    prepared: Sequence[LinearStep], chosen: _Chosen, peaks: Sequence[Array]
) -> tuple[list[Step], list[float], float, float]:
    parameters, target = chosen.parameters, chosen.choices[-1].form.target
    model = noise.NoiseModel(parameters)
    largest = [float(peak.max()) for peak in peaks]
    gain = SquareStep.gain(chosen.kinds[0]) if chosen.kinds else 1.0
    transfers = [noise.Transfer.of(model, step, peaks[2 * number]) for number, step in enumerate(prepared)]

    def evaluate(choice: Sequence[float], exact: bool) -> tuple[list[Step], list[float], float, float]:
        steps: list[Step] = []
        errors: list[float] = []
        variance = np.full(peaks[0].shape, (model.fresh + model.encoding) / choice[0] ** 2)
        before, after = variance, 0.0
        for index, (into, weight, out) in enumerate(scales.chain_scales(parameters, choice, gain)):
            if index % 2:
                level = parameters.top_level - index
                square = SquareStep(level, len(variance), chosen.kinds[index // 2], into, out)
                variance = noise.square_error(model, square, variance, peaks[index])
                steps.append(square)
            else:
                linear = replace(prepared[index // 2], input_scale=into, weight_scale=weight, output_scale=out)
                if exact:
                    before = noise.linear_error(model, linear, variance, peaks[index])
                else:
                    before = transfers[index // 2].variance(linear, float(variance.mean()))
                after = noise.rescale_error(model, linear)
                variance = before + after
                steps.append(linear)
            errors.append(float(np.sqrt(variance.max())))
        deviation = float(noise.logit_deviation(before, after, target).max())
        return steps, errors, deviation, noise.copy_deviation(before, target)

    # The bias of the last layer is encoded at the output scale and must fit the last prime with a bit to spare.
    bias = float(np.abs(prepared[-1].bias).max())
    last = scales.output_scale(parameters, max(largest[-1], bias / 2 ** (scales.HEADROOM_BITS - 1)))
    found = scales.search(
        parameters, last, len(prepared), largest, lambda choice: evaluate(choice, exact=False)[2], gain
    )
    return evaluate(found, exact=True)


def _reasons(
    network: CollapsedNetwork, parameters: Parameters, steps: Sequence[Step], source: Layout
) -> tuple[str, ...]:
    needed = chain.data_primes_needed(network.squares)
    total = (needed + 1) * chain.PRIME_BITS
    smaller = [d for d in LARGEST_MODULUS_BITS if chain.SMALLEST_DEGREE <= d < parameters.degree]
    reasons = [
        f"{len(network.linears)} affine maps and {network.squares} squares rescale once each and one prime holds the "
        f"logits: {needed} data primes, and one special prime for key switching",
        f"{parameters.modulus_bits} modulus bits "
        f"(at most {LARGEST_MODULUS_BITS[parameters.degree]} at this degree for 128-bit security)",
    ]
    for degree in smaller:
        reasons.append(f"degree {degree} was rejected: {total} bits exceed its {LARGEST_MODULUS_BITS[degree]}")
    if source.images == 2:
        reasons.append("real and imaginary parts carry one image each: they share every affine map")
    elif source.mixes:
        reasons.append("half of the image lies in the imaginary parts: half the diagonals, one conjugation")
    for step in steps:
        if isinstance(step, LinearStep):
            opened = len({copy.parent for copy in step.copies[step.inputs :]})
            reasons.append(
                f"{step.name}: {len(step.diagonals)} diagonals, {len(step.copies) - step.inputs} rotated copies that "
                f"share {opened} decompositions, {max(map(len, step.giants))} giant steps, "
                f"{sum(map(len, step.turns))} turns added in {len(step.turns)} groups"
            )
    return tuple(reasons)
