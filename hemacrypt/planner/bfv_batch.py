"""Planning exact batches: plaintext moduli and levels for one value in each ciphertext.

Noise is simpler than where diagonals are encoded (`hemacrypt.planner.bfv_noise`): a map multiplies it by its integer
weights. Fresh ciphertexts are independent, so variances add up in the first map; later values share what they come
from, so there standard deviations do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from hemacrypt.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan, BfvBatchSquare, BfvBatchStep, PublicBfvBatchPlan
from hemacrypt.bfv_plan import BfvSquare, centred
from hemacrypt.bundle import Bundle
from hemacrypt.errors import PlanError
from hemacrypt.network import CollapsedNetwork
from hemacrypt.plan import KeyGroup, Parameters
from hemacrypt.planner.batch import _BYTES_PER_RESIDUE, _PRODUCT_MS, _READ_MS, _TRANSFORM_MS, BYTE_MS, _parameters
from hemacrypt.planner.bfv import Magnitudes, _moduli_from_few_to_many, _quantised
from hemacrypt.planner.bfv_noise import BfvNoiseModel
from hemacrypt.quantise import QuantisedNetwork

# A switch is made when the noise that it divides is so many bits above what it adds.
_MARGINS: Final = (0.0, 2.0, 4.0, 8.0, 100.0)


@dataclass(frozen=True)
class _Levels:
    """Levels of the input of every step and of the reply, with the budgets that are left after each step."""

    levels: tuple[int, ...]
    budgets: tuple[float, ...]


def plan_bfv_batch_bundle(
    bundle: Bundle, *, magnitudes: Magnitudes = "worst", parameters: Parameters | None = None
) -> BfvBatchPlan:
    """Plan exact batches for a bundle's network; see `plan_bfv_batch`."""
    manifest = bundle.manifest
    return plan_bfv_batch(
        bundle.network,
        manifest.name,
        manifest.labels,
        manifest.preprocessing.digest,
        magnitudes=magnitudes,
        parameters=parameters,
    )


def plan_bfv_batch(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    *,
    plain_moduli: Sequence[int] | None = None,
    magnitudes: Magnitudes = "worst",
    parameters: Parameters | None = None,
) -> BfvBatchPlan:
    """Plan the exact evaluation of a network on as many images as both rows have slots.

    Parameters
    ----------
    network, name, labels, preprocessing_digest, plain_moduli, magnitudes:
        As in `hemacrypt.planner.bfv.plan_bfv`.
    parameters:
        Degree and chain, so that one secret key serves all plans of a model; by default as for a batch of CKKS.

    Returns
    -------
    BfvBatchPlan

    Raises
    ------
    PlanError
        If no plaintext moduli leave a noise budget, or an output of a layer depends on no input.
    """
    quantised, largest = _quantised(network, magnitudes, plain_moduli)
    chosen = parameters or _parameters(network)
    moduli, found = _cheapest(quantised, largest, chosen, plain_moduli)
    steps = _steps(quantised, moduli, found.levels)
    order = np.arange(network.inputs).reshape(network.input_shape).transpose(1, 2, 0).reshape(-1)
    levels = sorted({step.level for step in steps if isinstance(step, BfvBatchSquare)}, reverse=True)
    public = PublicBfvBatchPlan(
        model=name,
        labels=tuple(labels) if labels is not None else tuple(f"logit {i}" for i in range(network.outputs)),
        parameters=chosen,
        plain_moduli=moduli,
        # Row by row, all channels of a pixel together: a convolution then has few sums open at a time.
        input_order=tuple(order.tolist()),
        input_level=found.levels[0],
        output_level=found.levels[-1],
        input_scale=quantised.input_scale,
        output_scale=quantised.output_scale,
        keys=tuple(KeyGroup(level, True, ()) for level in levels),
        largest_logit=largest,
        proven=magnitudes == "worst",
        quantisation_error=float(f"{quantised.deviation:.3e}"),
        preprocessing_digest=preprocessing_digest,
    )
    return BfvBatchPlan(public, steps, found.budgets, quantised.weight_scales, quantised.largest)


def _cheapest(
    quantised: QuantisedNetwork, largest: int, parameters: Parameters, plain_moduli: Sequence[int] | None
) -> tuple[tuple[int, ...], _Levels]:
    gains = _gains(quantised)
    wanted = [tuple(plain_moduli)] if plain_moduli else list(_moduli_from_few_to_many(largest, parameters))
    found: list[tuple[float, tuple[int, ...], _Levels]] = []
    for moduli in wanted:
        model = BfvNoiseModel(parameters, max(moduli))
        for top in range(parameters.top_level + 1):
            for margin in _MARGINS:
                levels = _levels(model, gains, top, margin)
                if levels is not None:
                    found.append((len(moduli) * _milliseconds(quantised, parameters, levels.levels), moduli, levels))
    if not found:
        raise PlanError(
            f"no plaintext moduli that hold logits of {largest.bit_length()} bits leave a noise budget in "
            f"{len(parameters.data_primes)} primes at degree {parameters.degree}; use a larger degree or fewer squares"
        )
    _, moduli, levels = min(found, key=lambda each: each[0])
    return moduli, levels


def _gains(quantised: QuantisedNetwork) -> list[float]:
    """Return what each map multiplies the variance of the noise by, at most."""
    gains: list[float] = []
    for number, layer in enumerate(quantised.layers):
        rows, _, values = layer.entries()
        if number:
            gains.append(float(np.bincount(rows, np.abs(values), layer.outputs).max()) ** 2)
        else:
            gains.append(float(np.bincount(rows, values**2, layer.outputs).max()))
    return gains


def _levels(model: BfvNoiseModel, gains: Sequence[float], top: int, margin: float) -> _Levels | None:
    """Follow the noise from a level downwards; None where it overflows."""
    noise, level, levels, budgets = model.fresh, top, [top], list[float]()
    for number in range(2 * len(gains) - 1):
        if number % 2:
            (noise,) = model.square(BfvSquare(level, level, 1), [noise])
        else:
            # The bias is rounded.
            noise = noise.mixed(gains[number // 2]) + 1 / 4
        while level and noise.peak >= 4.0**margin * model.rounding * model.parameters.data_primes[level] ** 2:
            noise, level = model.switched(noise, level, level - 1), level - 1
        if number == 2 * len(gains) - 2:
            # As small a reply as can be decrypted.
            while level and model.budget(model.switched(noise, level, level - 1), level - 1) > 0:
                noise, level = model.switched(noise, level, level - 1), level - 1
        levels.append(level)
        budgets.append(model.budget(noise, level))
        if budgets[-1] <= 0:
            return None
    return _Levels(tuple(levels), tuple(budgets))


def _milliseconds(quantised: QuantisedNetwork, parameters: Parameters, levels: Sequence[int]) -> float:
    """Return the milliseconds of one plaintext modulus on one core, and of its upload, to compare plans by."""
    degree, inputs = parameters.degree, quantised.original.inputs
    total = inputs * (levels[0] + 1) * degree * (_READ_MS + _BYTES_PER_RESIDUE * BYTE_MS)
    for number, layer in enumerate(quantised.layers):
        primes = levels[2 * number] + 1
        total += len(layer.entries()[0]) * 2 * primes * degree * _PRODUCT_MS
        if number + 1 < len(quantised.layers):
            primes = levels[2 * number + 1] + 1
            # Transforms of squares in both bases and of a key switch.
            total += layer.outputs * (10 * primes + 12 + primes * (primes + 3)) * degree * _TRANSFORM_MS
    return total


def _steps(quantised: QuantisedNetwork, moduli: tuple[int, ...], levels: Sequence[int]) -> tuple[BfvBatchStep, ...]:
    steps: list[BfvBatchStep] = []
    for number, (layer, bias) in enumerate(zip(quantised.layers, quantised.biases, strict=True)):
        rows, columns, values = layer.entries()
        steps.append(
            BfvBatchLinear(
                name=layer.describe(),
                level=levels[2 * number],
                next_level=levels[2 * number + 1],
                inputs=layer.inputs,
                outputs=layer.outputs,
                rows=rows,
                columns=columns,
                weights=values.astype(np.int64),
                bias=np.stack([centred(bias, modulus) for modulus in moduli]),
            )
        )
        if number + 1 < len(quantised.layers):
            steps.append(BfvBatchSquare(levels[2 * number + 1], levels[2 * number + 2]))
    return tuple(steps)
