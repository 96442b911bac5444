"""Planning exact batches: plaintext moduli, levels and where to relinearise, by predicted time.

Few large plaintext moduli need a long chain, many small ones are many evaluations. All numbers of moduli, all input
levels, two places for the relinearisation and some switching policies are tried with the noise simulation; the cheapest
that fits is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork
from hemacrypt.model.quantise import QuantisedNetwork
from hemacrypt.plan.bfv_batch_plan import (
    BfvBatchLinear,
    BfvBatchPlan,
    BfvBatchSquare,
    BfvBatchStep,
    PublicBfvBatchPlan,
)
from hemacrypt.plan.bfv_plan import BfvSquare, centred
from hemacrypt.plan.plan import KeyGroup, Parameters
from hemacrypt.planner import costs
from hemacrypt.planner.bfv_noise import BfvNoiseModel
from hemacrypt.planner.latency import bfv
from hemacrypt.planner.throughput.ckks import BYTE_MS
from hemacrypt.seal.sizes import full_ciphertext_bytes, seeded_ciphertext_bytes

# A modulus switch has to leave noise of so many bits.
_POLICIES: Final = (0.0, 3.0, 6.0, 9.0)


@dataclass(frozen=True, eq=False)
class _Candidate:
    moduli: tuple[int, ...]
    steps: tuple[BfvBatchStep, ...]
    budgets: tuple[float, ...]
    milliseconds: float
    price: float


def plan_bfv_batch_bundle(bundle: Bundle, **options: Any) -> BfvBatchPlan:
    """Plan exact batches for a bundle's network; options as in `plan_bfv_batch`."""
    manifest = bundle.manifest
    return plan_bfv_batch(bundle.network, manifest.name, manifest.labels, manifest.preprocessing.digest, **options)


def plan_bfv_batch(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    *,
    plain_moduli: Sequence[int] | None = None,
    magnitudes: bfv.Magnitudes = "worst",
    parameters: Parameters | None = None,
) -> BfvBatchPlan:
    """Plan the exact evaluation of a network on N images at once (throughput layout).

    Parameters
    ----------
    network, name, labels, preprocessing_digest, plain_moduli, magnitudes:
        As in `hemacrypt.planner.latency.bfv.plan_bfv`.
    parameters:
        Degree and chain; by default the smallest degree with the chain of a CKKS plan, then longer chains and larger
        degrees.

    Raises
    ------
    PlanError
        If no parameters serve the network.
    """
    quantised, largest = bfv.quantised_with_room(network, magnitudes, plain_moduli)
    prepared = _prepared(quantised)
    found, chosen = _search(network, prepared, largest, plain_moduli, parameters)
    steps = _with_biases(found, quantised)
    order = np.arange(network.inputs).reshape(network.input_shape).transpose(1, 2, 0).reshape(-1)
    levels = sorted({step.level for step in steps if step.relinearise}, reverse=True)
    public = PublicBfvBatchPlan(
        model=name,
        labels=tuple(labels) if labels is not None else tuple(f"logit {i}" for i in range(network.outputs)),
        parameters=chosen,
        plain_moduli=found.moduli,
        # Row by row, all channels of a pixel together: a convolution then has few sums open at a time.
        input_order=tuple(order.tolist()),
        input_level=steps[0].level,
        output_level=steps[-1].next_level,
        input_scale=quantised.input_scale,
        output_scale=quantised.output_scale,
        keys=tuple(KeyGroup(level, True, ()) for level in levels),
        largest_logit=largest,
        proven=magnitudes == "worst",
        quantisation_error=float(f"{quantised.deviation:.3e}"),
        preprocessing_digest=preprocessing_digest,
    )
    return BfvBatchPlan(
        public=public,
        steps=steps,
        noise_budgets=found.budgets,
        step_magnitudes=quantised.largest,
        step_measured=quantised.measured,
        reasons=_reasons(public, steps, found),
        weight_scales=quantised.weight_scales,
        estimated_ms=found.milliseconds,
    )


def _prepared(quantised: QuantisedNetwork) -> tuple[BfvBatchStep, ...]:
    """Write the layers down; levels, relinearisation and biases come later."""
    steps: list[BfvBatchStep] = []
    for number, layer in enumerate(quantised.layers):
        if number:
            steps.append(BfvBatchSquare(0, 0, layer.inputs, True))
        rows, columns, weights = layer.entries()
        steps.append(
            BfvBatchLinear(
                name=layer.describe(),
                level=0,
                next_level=0,
                inputs=layer.inputs,
                outputs=layer.outputs,
                rows=rows.astype(np.int64),
                columns=columns.astype(np.int64),
                weights=weights.astype(np.int64),
                bias=np.zeros((0, layer.outputs), dtype=np.int64),
                relinearise=False,
            )
        )
    return tuple(steps)


def _with_biases(found: _Candidate, quantised: QuantisedNetwork) -> tuple[BfvBatchStep, ...]:
    """Add the biases, reduced modulo each plaintext modulus."""
    steps, biases = list(found.steps), iter(quantised.biases)
    for number, step in enumerate(steps):
        if isinstance(step, BfvBatchLinear):
            bias = next(biases)
            steps[number] = replace(step, bias=np.stack([centred(bias, modulus) for modulus in found.moduli]))
    return tuple(steps)


def _search(
    network: CollapsedNetwork,
    prepared: tuple[BfvBatchStep, ...],
    largest: int,
    plain_moduli: Sequence[int] | None,
    parameters: Parameters | None,
) -> tuple[_Candidate, Parameters]:
    # Every value has a ciphertext of its own, so that no degree is too small for a layer.
    for chains in bfv.chains_for(network.squares, 1, None, parameters):
        for chosen in chains:
            found = list(_candidates(prepared, chosen, largest, plain_moduli))
            if found:
                return min(found, key=lambda candidate: candidate.price), chosen
    raise PlanError(
        f"logits of {largest.bit_length() + 1} bits after {network.squares} squares use up the noise budget of every "
        "degree; use fewer squares, plan with measured magnitudes, or ask for other plaintext moduli"
    )


def _candidates(
    prepared: tuple[BfvBatchStep, ...], parameters: Parameters, largest: int, plain_moduli: Sequence[int] | None
) -> Iterator[_Candidate]:
    wanted = [tuple(plain_moduli)] if plain_moduli else bfv.moduli_from_few_to_many(largest, parameters)
    gains = [_gain(step) for step in prepared]
    for moduli in wanted:
        model = BfvNoiseModel(parameters, max(moduli))
        for level in range(parameters.top_level + 1):
            ways = [(late, policy) for late in (False, True) for policy in _POLICIES]
            fitting = [found for way in ways if (found := _levelled(prepared, gains, model, level, *way)) is not None]
            for steps, budgets in fitting:
                milliseconds = len(moduli) * _milliseconds(steps, parameters)
                price = milliseconds + len(moduli) * _bytes(steps, parameters) * BYTE_MS
                yield _Candidate(moduli, steps, budgets, milliseconds, price)
            if fitting:
                break  # a longer chain would only be slower


def _gain(step: BfvBatchStep) -> float:
    """Return what a map multiplies the variance of independent noises by, that of the worst output."""
    if isinstance(step, BfvBatchSquare):
        return 1.0
    return float(np.bincount(step.rows, step.weights.astype(np.float64) ** 2, step.outputs).max())


def _levelled(
    prepared: Sequence[BfvBatchStep],
    gains: Sequence[float],
    model: BfvNoiseModel,
    level: int,
    late: bool,
    policy: float,
) -> tuple[tuple[BfvBatchStep, ...], tuple[float, ...]] | None:
    """Give steps their levels, and return the budget after each; None if the budget does not suffice."""
    noise, steps, budgets = model.fresh, [], []
    for number, (step, gain) in enumerate(zip(prepared, gains, strict=True)):
        last, affine = number == len(prepared) - 1, isinstance(step, BfvBatchLinear)
        if affine:
            relinearise = late and number > 0
            noise = noise.times(gain) + (model.key_switch(level) if relinearise else 0.0)
        else:
            relinearise = not late
            noise = model.square(BfvSquare(level, level, 1), [noise])[0]
        target: int | None = level
        if last:
            target = bfv.reply_level(model, [noise], level)
        elif affine or relinearise:
            target = bfv.next_level(model, [noise], level, policy)
        if target is None:
            return None
        noise = model.switched(noise, level, target) + (1 / 4 if affine else 0.0)
        steps.append(replace(step, level=level, next_level=target, relinearise=relinearise))
        budgets.append(model.budget(noise, target))
        level = target
    return tuple(steps), tuple(budgets)


def _milliseconds(steps: Sequence[BfvBatchStep], parameters: Parameters) -> float:
    """Estimate one evaluation on one core, of one plaintext modulus."""
    total = costs.Counts()
    for step in steps:
        primes = step.level + 1
        if isinstance(step, BfvBatchLinear):
            total += costs.Counts(products=len(step.weights) * (3 if step.relinearise else 2) * primes)
        else:
            total += costs.exact_tensor(step.level) * step.inputs
        if step.relinearise:
            switch = costs.decompose(step.level) + costs.rotate(step.level) + costs.fold(step.level) * 2
            total += switch * step.outputs
        total += costs.Counts(transforms=2 * primes * (step.level - step.next_level)) * step.outputs
    return costs.VECTOR.milliseconds(total, parameters.degree)


def _bytes(steps: Sequence[BfvBatchStep], parameters: Parameters) -> int:
    sent = steps[0].inputs * seeded_ciphertext_bytes(parameters, steps[0].level)
    return sent + steps[-1].outputs * full_ciphertext_bytes(parameters, steps[-1].next_level)


def _reasons(public: PublicBfvBatchPlan, steps: Sequence[BfvBatchStep], found: _Candidate) -> tuple[str, ...]:
    late = any(step.relinearise for step in steps if isinstance(step, BfvBatchLinear))
    bits = " + ".join(f"{math.log2(modulus):.1f}" for modulus in public.plain_moduli)
    return (
        f"one value in each of {public.inputs} ciphertexts of each plaintext modulus and one image in each of "
        f"{public.images} slots; a batch costs the same however many of them are used",
        f"logits need {public.largest_logit.bit_length() + 1} bits; {len(public.plain_moduli)} plaintext moduli hold "
        f"{math.log2(math.prod(public.plain_moduli)):.1f} ({bits}); other numbers of them were slower or did not fit",
        f"ciphertexts carry {public.input_level + 1} of {len(public.parameters.data_primes)} primes",
        "relinearisation waits for the next affine map" if late else "squares are relinearised at once",
    )
