"""Putting a plan together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.calibration import default_precision
from hemacrypt.model.network import CollapsedNetwork
from hemacrypt.plan.plan import Layout, LinearStep, Parameters, Plan, PublicPlan, Step, united
from hemacrypt.plan.security import LARGEST_MODULUS_BITS
from hemacrypt.planner import chain, costs, limits, noise
from hemacrypt.planner.latency import scales
from hemacrypt.planner.latency.choices import (
    KEY_BUDGET,
    WORTH_A_MEGABYTE,
    Chooser,
    Chosen,
    Slots,
    affordable,
    slot_peaks,
)
from hemacrypt.planner.latency.guard import guarded
from hemacrypt.planner.latency.normalise import Normalised, normalised
from hemacrypt.planner.latency.prediction import Predictor
from hemacrypt.seal import sizes

# A pair plan is worth its keys when it is at least this much faster for each image, and one image alone does not become
# slower by as much because the pair needs keys as well.
_PAIR_GAIN: Final = 0.95


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

    Without a ``precision`` the margins that were measured on training data decide; see `hemacrypt.model.calibration`.
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
        both = _both(chooser, Chooser(wanted.network, "complex", 2, single.parameters), budget)
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


def _both(singles: Chooser, pairs: Chooser, budget: int) -> tuple[Chosen, Chosen] | None:
    """Return the fastest combination for one image that leaves a pair room within the budget, and the fastest pair."""
    for worth in WORTH_A_MEGABYTE:
        single = singles.choose(worth)
        for other in WORTH_A_MEGABYTE:
            pair = pairs.choose(other)
            if sizes.key_bytes(single.parameters, united([single.keys, pair.keys])) <= budget:
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
        Bytes that evaluation keys may take on the wire; None: see `choices.affordable`.
    precision:
        k asks for logits to within 2^-k, with the smallest parameters that give them.
    engine:
        Whose errors are predicted: `vector` takes the digits of a key switch around zero, `seal` does not.
    margins:
        Without a ``precision``, quantiles of the margins on training data that decide (see
        `hemacrypt.model.calibration`); the plan is then as exact as it can be where that is not exact enough.
        Without either, primes are as long as can be.

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


def _smallest(wanted: _Wanted, slots: Slots, images: int) -> tuple[Plan, Chooser]:
    """Return the plan with the smallest parameters that is exact enough, or the most exact one; see `plan_network`."""
    network = wanted.network
    widest = max(network.inputs, *(layer.outputs for layer in network.linears))
    refused: list[str] = []
    found: tuple[Plan, Chooser] | None = None
    for parameters in chain.candidates(network.squares, widest, refused):
        if wanted.tolerance == math.inf and parameters.prime_bits < chain.PRIME_BITS:
            refused.append(
                f"degree {parameters.degree} was rejected: it has room for primes of {parameters.prime_bits} bits, "
                "and nothing says that so little precision is enough"
            )
            continue
        try:
            chooser = Chooser(network, slots, images, parameters)
            plan = _planned(affordable(chooser, wanted.key_budget), wanted)
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


def _planned(chosen: Chosen, wanted: _Wanted) -> Plan:
    """Find scales for a combination and put its plan together."""
    network, parameters, target = wanted.network, chosen.parameters, chosen.choices[-1].form.target
    peaks = slot_peaks(network, chosen)
    levels = range(parameters.top_level, 0, -2)
    forms_used = [choice.form for choice in chosen.choices]
    encoded = [(f.layer.describe(), level, len(f.numbers)) for f, level in zip(forms_used, levels, strict=True)]
    limits.check_encoded(parameters.degree, encoded)
    found = Predictor(network, chosen, peaks, len(wanted.labels), wanted.centred).best()
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
        logit_error_bound=noise.rounded_up(deviations * found.limit),
        logit_error_floor=noise.rounded_up(deviations * (found.floor if wanted.guard_limit else found.limit)),
        guard_limit=wanted.guard_limit,
        logit_limit=parameters.data_primes[0] / 2 / last / math.hypot(1, other),
        copy_error_bound=noise.rounded_up(deviations * max(found.limit, found.of_copy)),
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
