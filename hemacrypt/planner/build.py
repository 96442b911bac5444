"""Putting a plan together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from hemacrypt.bundle import Bundle
from hemacrypt.errors import PlanError
from hemacrypt.margins import default_precision
from hemacrypt.network import Array, CollapsedNetwork, ComplexArray, Convolution, Shape
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
    Term,
    Turn,
    united,
)
from hemacrypt.planner import chain, costs, limits, noise, scales
from hemacrypt.planner.diagonals import Grid, MatrixForm, forms, image_grids, power_of_two_from
from hemacrypt.planner.guard import guarded
from hemacrypt.planner.normalise import Normalised, normalised
from hemacrypt.planner.rotations import Split, arrange, splits, turn_groups
from hemacrypt.security import LARGEST_MODULUS_BITS

# What evaluation keys may take on the wire unless the operator says otherwise.
KEY_BUDGET: Final = 34_000_000
# How much slower, in milliseconds, an evaluation may get for every megabyte of keys that it saves; tried in turn.
_WORTH_A_MEGABYTE: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 1e3)
# A pair plan is worth its keys when it is at least this much faster for each image, and one image alone does not become
# slower by as much because the pair needs keys as well.
_PAIR_GAIN: Final = 0.95

# Where the noise lies in few slots, values there may be so many times their peaks for an error that is sought.
_AIMED: Final = 2.5

# Ways to lay out the first layers that are followed further.
_PATHS_KEPT: Final = 8

# Complex slots, their real parts only, or the two rows of an exact plan, which take the place of the two parts.
Slots = Literal["complex", "real", "rows"]
Kind = Literal["plain", "joined", "parted"]
Giants = tuple[tuple[tuple[Term, ...], ...], ...]


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


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a plan; see `plan_network`.

    Attributes
    ----------
    network:
        What is planned: with values of about one, and a guard.
    normal:
        The same without the guard, and what became of the logits.
    tolerance, asked:
        Largest bound on the error of a logit, and whether whoever plans insists on it.
    """

    network: CollapsedNetwork
    normal: Normalised
    name: str
    labels: tuple[str, ...]
    preprocessing_digest: str
    key_budget: int | None
    tolerance: float
    asked: bool
    centred: bool
    guard_limit: float


def plan_bundle(
    bundle: Bundle, key_budget: int | None = None, precision: int | None = None, engine: str = "vector"
) -> tuple[Plan, ...]:
    """Plan the evaluation of a bundle's network; see `plan_model`.

    Without a ``precision`` the margins that were measured on training data decide; see `hemacrypt.margins`.
    """
    manifest = bundle.manifest
    return plan_model(
        bundle.network,
        manifest.name,
        manifest.labels,
        manifest.preprocessing.digest,
        key_budget=key_budget,
        precision=precision,
        engine=engine,
        margins=manifest.metrics.get("margins"),
    )


def plan_model(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    *,
    key_budget: int | None = None,
    precision: int | None = None,
    engine: str = "vector",
    margins: Mapping[str, float] | None = None,
) -> tuple[Plan, ...]:
    """Plan the evaluation of one image and, where that is faster, of two at once; one set of keys serves both.

    Parameters
    ----------
    network, name, labels, preprocessing_digest, key_budget, precision, engine, margins:
        As in `plan_network`.

    Returns
    -------
    tuple
        The plan for one image first.

    Raises
    ------
    PlanError
        If no secure parameters serve the network, or no plan keeps within a key budget or a precision that was asked.
    """
    wanted = _wanted(network, name, labels, preprocessing_digest, key_budget, precision, engine, margins)
    single, chooser = _smallest(wanted, "complex", 1)
    budget = KEY_BUDGET if key_budget is None else key_budget
    try:
        both = _both(chooser, _Chooser(wanted.network, "complex", 2, single.parameters), budget)
        if both is None:
            return (single,)
        plans = [_planned(chosen, wanted) for chosen in both]
    except PlanError:
        return (single,)
    # Margins are no promise: beside a plan that is exact enough, a faster one may be a bit less so. Answers say which.
    if plans[1].public.logit_error_bound > wanted.tolerance * (1 if wanted.asked else 2):
        return (single,)
    fastest, alone, together = (costs.plan_ms(single.parameters, plan.steps) for plan in (single, *plans))
    if together / 2 > _PAIR_GAIN * fastest or fastest < _PAIR_GAIN * alone:
        return (single,)
    keys = united(chosen.keys for chosen in both)
    plans[0] = replace(plans[0], reasons=single.reasons)
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
    precision: int | None = None,
    engine: str = "vector",
    margins: Mapping[str, float] | None = None,
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
    precision:
        k asks for logits to within 2^-k, with the smallest parameters that give them.
    engine:
        Whose errors are predicted: `vector` takes the digits of a key switch around zero, `seal` does not.
    margins:
        Without a ``precision``, quantiles of the margins on training data that decide (see `hemacrypt.margins`); the
        plan is then as exact as it can be where that is not exact enough. Without either, primes are as long as can be.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If no secure parameters serve the network, or no plan keeps within a key budget or a precision that was asked.
    """
    wanted = _wanted(network, name, labels, preprocessing_digest, key_budget, precision, engine, margins)
    return _smallest(wanted, slots, images)[0]


def _wanted(
    network: CollapsedNetwork,
    name: str,
    labels: Sequence[str] | None,
    preprocessing_digest: str,
    key_budget: int | None,
    precision: int | None,
    engine: str,
    margins: Mapping[str, float] | None,
) -> _Wanted:
    """Bring a network into the form that is planned, and collect what is asked of its plan."""
    if precision is not None and not 0 <= precision <= 1000:
        raise PlanError(f"logits to within 2^-{precision}; expected a number of bits from 0 to about 12")
    bits = default_precision(margins) if precision is None and margins else precision
    limits.check_network(network)
    normal = normalised(network)
    guard, guard_limit = guarded(normal.network)
    named = tuple(labels) if labels is not None else tuple(f"logit {i}" for i in range(network.outputs))
    tolerance = math.inf if bits is None else 2.0**-bits
    return _Wanted(
        guard,
        normal,
        name,
        named,
        preprocessing_digest,
        key_budget,
        tolerance,
        precision is not None,
        engine != "seal",
        guard_limit,
    )


def _smallest(wanted: _Wanted, slots: Slots, images: int) -> tuple[Plan, _Chooser]:
    """Return the plan with the smallest parameters that is exact enough, or the most exact one; see `plan_network`."""
    network = wanted.network
    widest = max(network.inputs, *(layer.outputs for layer in network.linears))
    refused: list[str] = []
    found: tuple[Plan, _Chooser] | None = None
    for parameters in chain.candidates(network.squares, widest, refused):
        if wanted.tolerance == math.inf and parameters.prime_bits < chain.PRIME_BITS:
            refused.append(
                f"degree {parameters.degree} was rejected: it has room for primes of {parameters.prime_bits} bits, "
                "and nothing says that so little precision is enough"
            )
            continue
        try:
            chooser = _Chooser(network, slots, images, parameters)
            plan = _planned(_affordable(chooser, wanted.key_budget), wanted)
        except PlanError as error:
            if parameters.prime_bits == chain.PRIME_BITS:
                raise
            refused.append(f"degree {parameters.degree} was rejected: {error}")
            continue
        bound = plan.public.logit_error_bound
        shorter = _with_a_prime_less(network, parameters, wanted)
        told = f"a chain with one prime less was rejected: logits to within about {_as_power(shorter)} only"
        if shorter <= wanted.tolerance:
            told = f"a chain with one prime less was rejected: it might do ({_as_power(shorter)}), but all maps rescale"
        found = (replace(plan, reasons=(*plan.reasons, *refused, told)), chooser)
        if bound <= wanted.tolerance:
            return found
        refused.append(
            f"degree {parameters.degree} with {len(parameters.data_primes)} data primes of "
            f"{parameters.prime_bits:.1f} bits was rejected: logits to within {_as_power(bound)} only"
        )
    assert found is not None  # noqa: S101 - the last candidate has the longest primes, and raises what it cannot do
    if wanted.asked:
        raise PlanError(
            f"logits to within {_as_power(wanted.tolerance)} are out of reach of primes below 2^30: the best bound is "
            f"{_as_power(found[0].public.logit_error_bound)}; ask for less, or for exact integers (scheme bfv)"
        )
    return found


def _with_a_prime_less(network: CollapsedNetwork, parameters: Parameters, wanted: _Wanted) -> float:
    """Estimate the bound when the last map is not rescaled, which would save a prime.

    Then one prime holds the product of two scales. A larger scale of the input makes its own error smaller and the
    rounding of the weights larger; at best both are equal.
    """
    model = noise.NoiseModel(parameters, wanted.centred)
    rows, _, values = network.linears[-1].entries()
    largest = float(np.bincount(rows, values**2).max())
    peaks = network.peaks
    read = peaks[-2] ** 2 if network.squares else np.full(network.inputs, max(map(abs, network.input_range)))
    carried = (model.rescale if network.squares else model.fresh) * largest
    rounded = model.encoding * float((read**2).sum())
    room = parameters.data_primes[0] / 2 / 2**scales.HEADROOM_BITS / max(float(peaks[-1].max()), 2.0**-20)
    return 6 * math.sqrt(2 * math.sqrt(carried * rounded) / room) / wanted.normal.factor


def _as_power(number: float) -> str:
    return f"2^{math.log2(number):.1f}" if number > 0 else "0"


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
    # Keys that are large at any price need not be the smallest at any price: that can take a hundred times as long.
    return chooser.choose(_WORTH_A_MEGABYTE[-2]) if needed > budget else chosen


def _planned(chosen: _Chosen, wanted: _Wanted) -> Plan:
    """Find scales for a combination and put its plan together."""
    network, parameters, target = wanted.network, chosen.parameters, chosen.choices[-1].form.target
    peaks = _peaks(network, chosen)
    levels = range(parameters.top_level, 0, -2)
    forms_used = [choice.form for choice in chosen.choices]
    encoded = [(f.layer.describe(), level, len(f.numbers)) for f, level in zip(forms_used, levels, strict=True)]
    limits.check_encoded(parameters.degree, encoded)
    found = _Predictor(network, chosen, peaks, len(wanted.labels), wanted.centred).best()
    steps, deviations = found.steps, noise.deviations_of_bound(target)
    limits.check_room(parameters, steps, [float(np.abs(peak).max()) for peak in peaks[1:]], found.errors)
    last, other = steps[-1].output_scale, target.factor if target.images == 2 else 0.0
    public = PublicPlan(
        model=wanted.name,
        labels=wanted.labels,
        parameters=parameters,
        input_layout=chosen.source,
        output_layout=target,
        input_scale=steps[0].input_scale,
        output_scale=last,
        keys=chosen.keys,
        logit_error_bound=_rounded_up(deviations * found.limit),
        logit_error_floor=_rounded_up(deviations * (found.floor if wanted.guard_limit else found.limit)),
        guard_limit=wanted.guard_limit,
        logit_limit=parameters.data_primes[0] / 2 / last / math.hypot(1, other),
        copy_error_bound=_rounded_up(deviations * max(found.limit, found.of_copy)),
        preprocessing_digest=wanted.preprocessing_digest,
    )
    plan = Plan(
        public=public,
        steps=steps,
        step_errors=found.errors,
        step_peaks=tuple(float(np.abs(peak).max()) for peak in peaks[1:]),
        calibrated=network.magnitudes is not None,
        reasons=_reasons(network, parameters, steps, chosen.source),
    )
    return wanted.normal.restored(plan)


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
            parameters = list(chain.candidates(network.squares, widest, []))[-1]
        self.parameters = parameters
        self._network, self._slots, self._images = network, slots, images
        self._entries = [layer.entries() for layer in network.linears]
        for number, layer in enumerate(network.linears):
            if not self._entries[number][2].size:
                raise PlanError(
                    f"layer {number} ({layer.describe()}) reads nothing but its padding; give it less, or remove it"
                )
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


def _with_constants(terms: Giants, diagonals: ComplexArray) -> tuple[Giants, ComplexArray]:
    """Give outputs that depend on no input one product, with a diagonal of zeros; the bias does the rest."""
    constants = [number for number, giants in enumerate(terms) if not any(giants)]
    filled = list(terms)
    for place, number in enumerate(constants, start=len(diagonals)):
        filled[number] = ((Term(0, place),), *terms[number][1:])
    return tuple(filled), np.concatenate([diagonals, np.zeros((len(constants), diagonals.shape[1]))])


def _prepare(choice: _Choice, level: int) -> LinearStep:
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


def _peaks(network: CollapsedNetwork, chosen: _Chosen) -> list[ComplexArray]:
    """Return the largest values of every slot's parts: of the input, then after each step, shape (…, slots) each."""

    def packed(layout: Layout, values: Array) -> ComplexArray:
        return layout.pack(np.stack([np.abs(values)] * layout.images))

    peaks = [packed(chosen.source, np.full(network.inputs, max(abs(bound) for bound in network.input_range)))]
    for number, (choice, peak) in enumerate(zip(chosen.choices, network.peaks, strict=True)):
        peaks.append(packed(choice.form.target, peak))
        if number < len(chosen.kinds):
            peaks.append(packed(_squared(chosen.kinds[number], choice.form.target), peak**2))
    return peaks


@dataclass(frozen=True)
class _Predicted:
    """Steps at some scales, and the standard deviations of the errors that they make.

    Attributes
    ----------
    steps:
        With their scales.
    errors:
        After each step, the largest of any slot.
    floor:
        Of a logit when all values that the last square squares are zero.
    limit:
        Of a logit when they have all the energy that is allowed, however an image lines the errors up.
    of_copy:
        Of a single copy of a logit, the last rescale's rounding left out.
    """

    steps: tuple[Step, ...]
    errors: tuple[float, ...]
    floor: float
    limit: float
    of_copy: float


class _Predictor:
    """Predicts the errors of a chosen combination for choices of scales.

    Parameters
    ----------
    network, chosen:
        The network (with its guard) and how it is laid out.
    peaks:
        Largest absolute value of every slot, of the input and after each step.
    logits:
        How many of the network's outputs are logits.
    centred:
        As in `noise.NoiseModel`.
    """

    def __init__(
        self, network: CollapsedNetwork, chosen: _Chosen, peaks: Sequence[ComplexArray], logits: int, centred: bool
    ) -> None:
        self._network, self._chosen, self._peaks, self._logits = network, chosen, peaks, logits
        self._parameters, self._target = chosen.parameters, chosen.choices[-1].form.target
        self._model = noise.NoiseModel(self._parameters, centred)
        top = self._parameters.top_level
        self._prepared = [_prepare(choice, top - 2 * number) for number, choice in enumerate(chosen.choices)]
        self._gain = SquareStep.gain(chosen.kinds[0]) if chosen.kinds else 1.0
        self._transfers = [
            noise.Transfer.of(self._model, step, peaks[2 * number]) for number, step in enumerate(self._prepared)
        ]

    def best(self) -> _Predicted:
        """Return the prediction for the scales that make the error smallest.

        Raises
        ------
        PlanError
            If no scales fit the modulus chain.
        """
        largest = [float(np.abs(peak).max()) for peak in self._peaks]
        # The bias of the last layer is encoded at the output scale and must fit the last prime with a bit to spare.
        bias = float(np.abs(self._prepared[-1].bias).max())
        last = scales.output_scale(self._parameters, max(largest[-1], bias / 2 ** (scales.HEADROOM_BITS - 1)))
        return self._exact(
            scales.search(self._parameters, last, len(self._prepared), largest, self._roughly, self._gain)
        )

    def _steps(self, choice: Sequence[float]) -> Iterator[Step]:
        inputs = self._chosen.source.ciphertexts
        for index, (into, weight, out) in enumerate(scales.chain_scales(self._parameters, choice, self._gain)):
            if index % 2:
                level = self._parameters.top_level - index
                square = SquareStep(level, inputs, self._chosen.kinds[index // 2], into, out)
                inputs = square.outputs
                yield square
            else:
                linear = replace(self._prepared[index // 2], input_scale=into, weight_scale=weight, output_scale=out)
                inputs = linear.outputs
                yield linear

    def _fresh(self, choice: Sequence[float]) -> Array:
        return np.full(self._peaks[0].shape, (self._model.fresh + self._model.encoding) / choice[0] ** 2)

    def _roughly(self, choice: Sequence[float]) -> float:
        """Predict the deviation of the worst logit with all values at their peaks, one variance for all slots."""
        variance = self._fresh(choice)
        before, after = variance, 0.0
        for index, step in enumerate(self._steps(choice)):
            if isinstance(step, SquareStep):
                variance = noise.square_error(self._model, step, variance, self._peaks[index])
            else:
                before = self._transfers[index // 2].variance(step, float(variance.mean()))
                after = noise.rescale_error(self._model, step)
                variance = before + after
        return float(noise.logit_deviation(before, after, self._target)[: self._logits].max())

    def _exact(self, choice: Sequence[float]) -> _Predicted:
        """Predict all errors slot by slot, of either image where there are two."""
        steps = tuple(self._steps(choice))
        parts: tuple[noise.Part, ...] = ("real", "imaginary") if self._target.images == 2 else ("real",)
        found = [self._of_part(steps, self._fresh(choice), part) for part in parts]
        return _Predicted(
            steps,
            tuple(max(errors) for errors in zip(*(each.errors for each in found), strict=True)),
            *(max(values) for values in zip(*((each.floor, each.limit, each.of_copy) for each in found), strict=True)),
        )

    def _of_part(self, steps: tuple[Step, ...], variance: Array, part: noise.Part) -> _Predicted:
        """Predict errors once with the last square's values at their peaks and once with zeros."""
        errors: list[float] = []
        amplified = 0.0
        before = still = floor = variance
        for index, step in enumerate(steps):
            peak = self._peaks[index]
            if isinstance(step, SquareStep):
                still = noise.square_error(self._model, step, variance, np.zeros_like(peak), part)
                variance = noise.square_error(self._model, step, variance, peak, part)
            else:
                if index == len(steps) - 3:
                    amplified = self._amplified(step, steps[index + 1], variance, part)
                # The rounding of weights acts on values whose size the guard knows.
                floor = noise.linear_error(self._model, step, still, peak if index == 0 else np.zeros_like(peak))
                before = noise.linear_error(self._model, step, variance, peak)
                variance = before + noise.rescale_error(self._model, step)
            errors.append(float(np.sqrt(variance.max())))
        last = steps[-1]
        assert isinstance(last, LinearStep)  # noqa: S101 - networks end so
        after = noise.rescale_error(self._model, last)
        unit = self._target.factor if part == "imaginary" else 1.0
        lowest = float(noise.logit_deviation(floor, after, self._target)[: self._logits].max()) / unit
        rounding = noise.linear_error(self._model, last, np.zeros(self._peaks[-2].shape), self._peaks[-2])
        rounded = float(noise.logit_deviation(rounding, 0.0, self._target)[: self._logits].max()) / unit
        highest = math.sqrt(lowest**2 + amplified + rounded**2)
        copies = max(noise.copy_deviation(before, self._target) / unit, highest)
        return _Predicted(steps, tuple(errors), lowest, highest, copies)

    def _amplified(self, step: LinearStep, square: Step, entering: Array, part: noise.Part) -> float:
        """Return the variance of a logit that the last square makes of the errors before it, in the image's units."""
        form, number = self._chosen.choices[-2].form, len(self._chosen.choices) - 2
        own = noise.linear_error(self._model, step, np.zeros_like(entering), self._peaks[2 * number])
        own = own + noise.rescale_error(self._model, step)
        if number and not self._model.centred:
            # Half of the noise lies in a few slots: an image can aim at them, with values far above their peaks.
            entering = _AIMED**2 * entering
        brought = 0.0
        switch = self._model.key_switch(square.level)
        if isinstance(square, SquareStep) and square.kind == "joined":
            # Both ciphertexts bring their errors, which are complex: see `noise.square_error`.
            brought = JOIN_FACTOR**2
        elif isinstance(square, SquareStep) and square.kind == "parted":
            added = switch / (2 * square.input_scale) ** 2
            ratio = JOIN_FACTOR * form.target.factor if part == "real" else 1 / (JOIN_FACTOR * form.target.factor)
            own = own + added * (1 + ratio**2)
        source, target = ((layout.factor if part == "imaginary" else 1.0) ** 2 for layout in (form.source, form.target))
        hidden = noise.Hidden(
            form.layer,
            noise.read_at(entering, form.source) / source,
            noise.read_at(own, form.target) / target,
            float((self._network.peaks[-2] ** 2).sum()),
        )
        return (1 + brought) * hidden.amplified(self._network.linears[-1], self._logits)


def _reasons(
    network: CollapsedNetwork, parameters: Parameters, steps: Sequence[Step], source: Layout
) -> tuple[str, ...]:
    needed = chain.data_primes_needed(network.squares)
    reasons = [
        f"{len(network.linears)} affine maps and {network.squares} squares rescale once each and one prime holds the "
        f"logits: {needed} data primes, and one special prime for key switching",
        f"{parameters.modulus_bits} modulus bits "
        f"(at most {LARGEST_MODULUS_BITS[parameters.degree]} at this degree for 128-bit security)",
    ]
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
