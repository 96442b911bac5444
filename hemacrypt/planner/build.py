"""Putting a plan together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hemacrypt.bundle import Bundle
from hemacrypt.errors import PlanError
from hemacrypt.network import Array, CollapsedNetwork
from hemacrypt.plan import Layout, LinearStep, Parameters, Plan, PublicPlan, SquareStep, Step
from hemacrypt.planner import chain, costs, noise, scales
from hemacrypt.planner.diagonals import Grid, MatrixForm, forms, image_grid, power_of_two_from
from hemacrypt.planner.rotations import Split, arrange, baby_tree, best_split
from hemacrypt.security import LARGEST_MODULUS_BITS


@dataclass(frozen=True)
class _Choice:
    """One layer's form and how its diagonals are split."""

    form: MatrixForm
    split: Split


def plan_bundle(bundle: Bundle) -> Plan:
    """Plan the evaluation of a bundle's network; see `plan_network`."""
    manifest = bundle.manifest
    return plan_network(bundle.network, manifest.name, manifest.labels, manifest.preprocessing.digest)


def plan_network(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
) -> Plan:
    """Plan the evaluation of a network on one image in one ciphertext (latency layout).

    Parameters
    ----------
    network:
        Any chain of affine maps and squares whose layers fit one ciphertext.
    name:
        What clients call the model.
    labels:
        What each logit stands for; numbered when not given.
    preprocessing_digest:
        Names the preprocessing that clients must follow.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If no secure parameters serve the network.
    """
    for number, layer in enumerate(network.linears):
        if not layer.entries()[2].size:
            raise PlanError(f"layer {number} ({layer.describe()}) has only zero weights; train or remove it")
    degree = chain.smallest_degree(network.squares, _widest(network))
    parameters = chain.choose_parameters(degree, network.squares)
    source, choices = _choose_forms(network, parameters)
    prepared = [_prepare(choice, parameters.top_level - 2 * number) for number, choice in enumerate(choices)]
    with np.errstate(over="ignore", invalid="ignore"):
        peaks = _peaks(network, source, choices)
    if not all(np.isfinite(peak).all() for peak in peaks):
        raise PlanError("values up to infinity between the layers; train with smaller activations")
    steps, errors, deviation = _with_best_scales(prepared, parameters, peaks, choices[-1].form.target)
    target = choices[-1].form.target
    last = steps[-1].output_scale
    public = PublicPlan(
        model=name,
        labels=tuple(labels) if labels is not None else tuple(f"logit {i}" for i in range(network.outputs)),
        parameters=parameters,
        input_layout=source,
        output_layout=target,
        input_scale=steps[0].input_scale,
        output_scale=last,
        rotation_steps=tuple(sorted({rotation for step in steps for rotation in step.rotation_steps})),
        needs_relinearisation=network.squares > 0,
        logit_error_bound=_rounded_up(noise.deviations_of_bound(target) * deviation),
        logit_limit=parameters.data_primes[0] / 2 / last,
        preprocessing_digest=preprocessing_digest,
    )
    return Plan(
        public=public,
        steps=tuple(steps),
        step_errors=tuple(errors),
        step_peaks=tuple(float(peak.max()) for peak in peaks[1:]),
        calibrated=network.magnitudes is not None,
        reasons=_reasons(network, parameters),
    )


def _rounded_up(value: float) -> float:
    """Round up to three digits, so that machines whose exponentials differ in the last bit make the same plan."""
    digits = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / digits) * digits:.3e}")


def _widest(network: CollapsedNetwork) -> int:
    return max(power_of_two_from(network.inputs), *(power_of_two_from(layer.outputs) for layer in network.linears))


def _choose_forms(network: CollapsedNetwork, parameters: Parameters) -> tuple[Layout, list[_Choice]]:
    """Try every combination of forms and keep the cheapest; there are at most two forms a layer."""
    slots = parameters.slots
    grid: Grid | None = image_grid(network.input_shape, slots)
    source = Layout(np.arange(network.inputs), power_of_two_from(network.inputs), slots)
    if grid is not None:
        source = Layout(grid.positions(network.input_shape, slots), slots, slots)
    best: tuple[float, list[_Choice]] | None = None

    def extend(position: Layout, on: Grid | None, chosen: list[_Choice], spent: float) -> None:
        nonlocal best
        if best is not None and spent >= best[0]:
            return
        number = len(chosen)
        if number == len(network.linears):
            best = (spent, chosen)
            return
        for form in forms(network.linears[number], position, on):
            split = best_split(form)
            moved = form.shifted(split.shift)
            cost = costs.linear_ms(
                parameters.degree,
                parameters.top_level - 2 * number,
                split.rotations + len(form.sums),
                len(form.offsets),
            )
            extend(moved.target, moved.grid, [*chosen, _Choice(moved, split)], spent + cost)

    extend(source, grid, [], 0.0)
    if best is None:
        raise PlanError(f"no layout puts the layers of this network into {slots} slots; make its widest layer smaller")
    return source, best[1]


def _prepare(choice: _Choice, level: int) -> LinearStep:
    terms, turns = arrange(choice.form, choice.split)
    diagonals = choice.form.diagonals()
    for number, turn in enumerate(turns):
        diagonals[number] = np.roll(diagonals[number], turn)
    return LinearStep(
        name=choice.form.layer.describe(),
        level=level,
        babies=baby_tree(choice.split),
        giants=terms,
        giant_step=choice.split.stride if choice.split.giants > 1 else 0,
        sums=choice.form.sums,
        diagonals=diagonals,
        bias=choice.form.bias(),
        input_scale=1.0,
        weight_scale=1.0,
        output_scale=1.0,
    )


def _peaks(network: CollapsedNetwork, source: Layout, choices: Sequence[_Choice]) -> list[Array]:
    """Return the largest absolute value of every slot: of the input, then after each step, shape (slots,) each."""
    peaks = [source.pack(np.full(network.inputs, max(abs(bound) for bound in network.input_range)))]
    for number, (choice, peak) in enumerate(zip(choices, network.peaks, strict=True)):
        if number:
            peaks.append(peaks[-1] ** 2)
        peaks.append(choice.form.target.pack(peak))
    return peaks


def _with_best_scales(
    prepared: Sequence[LinearStep], parameters: Parameters, peaks: Sequence[Array], target: Layout
) -> tuple[list[Step], list[float], float]:
    model = noise.NoiseModel(parameters)
    largest = [float(peak.max()) for peak in peaks]

    def evaluate(choice: Sequence[float]) -> tuple[list[Step], list[float], float]:
        steps: list[Step] = []
        errors: list[float] = []
        variance = np.full(parameters.slots, (model.fresh + model.encoding) / choice[0] ** 2)
        before, after = variance, 0.0
        for index, (into, weight, out) in enumerate(scales.chain_scales(parameters, choice)):
            level = parameters.top_level - index
            if index % 2:
                square = SquareStep(level, into, out)
                variance = noise.square_error(model, square, variance, peaks[index])
                steps.append(square)
            else:
                given = prepared[index // 2]
                linear = replace(given, input_scale=into, weight_scale=weight, output_scale=out)
                before = noise.linear_error(model, linear, variance, peaks[index])
                after = noise.rescale_error(model, linear)
                variance = before + after
                steps.append(linear)
            errors.append(float(np.sqrt(variance.max())))
        return steps, errors, float(noise.logit_deviation(before, after, target).max())

    # The bias of the last layer is encoded at the output scale and must fit the last prime with a bit to spare.
    bias = float(np.abs(prepared[-1].bias).max())
    last = scales.output_scale(parameters, max(largest[-1], bias / 2 ** (scales.HEADROOM_BITS - 1)))
    chosen = scales.search(parameters, last, len(prepared), largest, lambda choice: evaluate(choice)[2])
    return evaluate(chosen)


def _reasons(network: CollapsedNetwork, parameters: Parameters) -> tuple[str, ...]:
    needed = chain.data_primes_needed(network.squares)
    total = (needed + 1) * chain.PRIME_BITS
    widest = _widest(network)
    smaller = [d for d in LARGEST_MODULUS_BITS if chain.SMALLEST_DEGREE <= d < parameters.degree]
    reasons = [
        f"{len(network.linears)} affine maps and {network.squares} squares rescale once each and one prime holds the "
        f"logits: {needed} data primes, and one special prime for key switching",
        f"the widest layer needs {widest} of {parameters.slots} slots; {parameters.modulus_bits} modulus bits "
        f"(at most {LARGEST_MODULUS_BITS[parameters.degree]} at this degree for 128-bit security)",
    ]
    for degree in smaller:
        limit = LARGEST_MODULUS_BITS[degree]
        why = f"{total} bits exceed its {limit}" if total > limit else f"{widest} slots exceed its {degree // 2}"
        reasons.append(f"degree {degree} was rejected: {why}")
    return tuple(reasons)
