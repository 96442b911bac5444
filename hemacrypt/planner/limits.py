"""What no plan is made for, with what to change; found out before anything large is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from hemacrypt.errors import PlanError
from hemacrypt.model.network import Array, CollapsedNetwork, Dense, Linear
from hemacrypt.plan.plan import LinearStep, Parameters, SquareStep, Step
from hemacrypt.planner import chain
from hemacrypt.seal import sizes

# Larger weights come from a training that diverged, or from data that nobody brought to moderate units.
LARGEST_WEIGHT: Final = 2.0**32
# The next square, the scales and the error bounds of larger values would come near the end of float64.
LARGEST_VALUE: Final = 2.0**400
# Parameters of a network, and entries of the matrix that a layer is: planned in some ten seconds and a few gigabytes.
MOST_PARAMETERS: Final = 1 << 23
MOST_ENTRIES: Final = 1 << 24
# Two plans of a model have to leave a worker of the service, by default 4 GB, room for keys and requests.
MOST_ENCODED_BYTES: Final = 1_500_000_000
# What a client can be asked to make and to send as relinearisation keys, before any other keys.
MOST_RELINEARISATION_BYTES: Final = 256_000_000


def check_network(network: CollapsedNetwork) -> None:
    """Refuse a network that is too deep or too large, or whose numbers are beyond measure.

    Raises
    ------
    PlanError
        If it is. Layers are only built up to matrices once it is known that they are of moderate size.
    """
    _check_depth(network)
    _check_size(network)
    for number, layer in enumerate(network.linears):
        _check_weights(number, layer)
    peaks = [float(peak.max()) for peak in network.peaks]
    if not max(peaks) <= LARGEST_VALUE:
        number = next(n for n, peak in enumerate(peaks) if not peak <= LARGEST_VALUE)
        raise PlanError(
            f"layer {number} ({network.linears[number].describe()}) writes values up to {peaks[number]:.3g}; expected "
            f"at most {LARGEST_VALUE:.1g}: scale the layers before it down, or measure magnitudes on training data"
        )


def check_encoded(degree: int, layers: Sequence[tuple[str, int, int]]) -> None:
    """Refuse a choice of diagonals that would take too much memory once they are encoded.

    Parameters
    ----------
    degree:
        Polynomial degree.
    layers:
        Name, level and number of diagonals of each affine map.

    Raises
    ------
    PlanError
        If it would.
    """
    sizes = [4 * degree * (level + 2) * diagonals for _, level, diagonals in layers]
    if sum(sizes) > MOST_ENCODED_BYTES:
        name, _, diagonals = layers[sizes.index(max(sizes))]
        raise PlanError(
            f"encoded weights of {sum(sizes) / 1e9:.1f} GB, most of them {diagonals:,} diagonals of {name}; at most "
            f"{MOST_ENCODED_BYTES / 1e9:.1f} GB are planned: use a larger stride, fewer channels or a smaller image"
        )


def check_room(parameters: Parameters, steps: Sequence[Step], peaks: Sequence[float], errors: Sequence[float]) -> None:
    """Refuse a plan whose errors could carry values beyond the modulus, where every bound would be void.

    Parameters
    ----------
    parameters, steps:
        Those of the plan.
    peaks, errors:
        Largest value and largest standard deviation of the error after each step.

    Raises
    ------
    PlanError
        If they could. Values that lie far apart in one layer and are brought together again by the next are the cause.
    """
    shares = [6 * error / max(peak, np.finfo(float).tiny) for peak, error in zip(peaks, errors, strict=True)]
    growth = [share / before for before, share in zip([shares[0], *shares], shares, strict=False)]
    for step, peak, error in zip(steps, peaks, errors, strict=True):
        first = step.weight_scale if isinstance(step, LinearStep) else SquareStep.gain(step.kind) * step.input_scale
        if (peak + 6 * error) * step.input_scale * first >= 2 ** (parameters.bits_at(step.level) - 1):
            culprit = growth.index(max(growth))
            raise PlanError(
                f"{steps[culprit].name} (step {culprit + 1}) leaves errors {shares[culprit]:.2g} times as large as its "
                "values: it magnifies values of the layer before it that are far smaller than others; train with "
                "activations of about one size, for example with batch normalisation"
            )


def _check_depth(network: CollapsedNetwork) -> None:
    widest = max(network.inputs, *(layer.outputs for layer in network.linears))
    degree = chain.smallest_degree(network.squares, widest)

    def needed(squares: int) -> float:
        top = chain.data_primes_needed(network.squares) - 1
        return sum(sizes.one_key_bytes(degree, top - 1 - 2 * number) for number in range(squares))

    if needed(network.squares) > MOST_RELINEARISATION_BYTES:
        raise PlanError(
            f"{network.squares} squares need relinearisation keys of {needed(network.squares) / 1e6:.0f} MB at degree "
            f"{degree}, at most {MOST_RELINEARISATION_BYTES / 1e6:.0f} MB are planned; use fewer squares"
        )


def _check_size(network: CollapsedNetwork) -> None:
    parameters = sum(_weights(layer).size + layer.bias.size for layer in network.linears)
    if parameters > MOST_PARAMETERS:
        largest = max(network.linears, key=lambda layer: _weights(layer).size)
        raise PlanError(
            f"the network has {parameters:,} parameters, at most {MOST_PARAMETERS:,} are planned: encoded, they would "
            f"take gigabytes; make {largest.describe()} smaller, or convolve or pool before it"
        )
    for number, layer in enumerate(network.linears):
        entries = _weights(layer).size * (1 if isinstance(layer, Dense) else layer.outputs // layer.kernel.shape[0])
        if entries > MOST_ENTRIES:
            raise PlanError(
                f"layer {number} ({layer.describe()}) takes {entries:,} products in the clear, at most "
                f"{MOST_ENTRIES:,} are planned; use a larger stride, fewer channels or a smaller image"
            )


def _check_weights(number: int, layer: Linear) -> None:
    largest = max(float(np.abs(_weights(layer)).max()), float(np.abs(layer.bias).max()))
    if largest > LARGEST_WEIGHT:
        raise PlanError(
            f"layer {number} ({layer.describe()}) has weights or biases up to {largest:.3g}; expected at most "
            f"{LARGEST_WEIGHT:.2g}: divide them by a factor (and multiply the next layer's weights by its square), or "
            "train with normalised data"
        )
    if not _weights(layer).any():
        raise PlanError(f"layer {number} ({layer.describe()}) has only zero weights; train or remove it")


def _weights(layer: Linear) -> Array:
    return layer.weight if isinstance(layer, Dense) else layer.kernel
