"""Choosing the scales, so that every rescale lands exactly where the next layer expects it.

Free are the scale of the fresh ciphertext and the scale after each affine map. The scale of a layer's encoded diagonals
follows: ``weight_scale = output_scale * q / input_scale`` makes the rescale by q land on ``output_scale``; a square's
output scale is ``input_scale^2 / q``. The last output scale is set by what the last modulus must hold. A larger scale
makes the errors of its ciphertext smaller, and the diagonals of the next map coarser: the best trade is searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from hemacrypt.errors import PlanError
from hemacrypt.plan.plan import Parameters

# The last modulus holds logits 2^4 times as large as the largest that calibration saw.
HEADROOM_BITS = 4
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**12, 2.0**60
# Values smaller than this are as good as zero; keeps logarithms finite.
_SMALLEST_PEAK = 2.0**-20


def output_scale(parameters: Parameters, logit_peak: float) -> float:
    """Return the largest power of two at which logits still fit the last prime, headroom and sign included.

    Raises
    ------
    PlanError
        If the logits are so large that nothing is left for precision.
    """
    room = math.log2(parameters.data_primes[0]) - 1 - HEADROOM_BITS - math.log2(max(logit_peak, _SMALLEST_PEAK))
    if room < math.log2(_SMALLEST_SCALE):
        raise PlanError(
            f"logits up to {logit_peak:.3g} leave {room:.0f} bits of precision in the last prime; scale the last layer "
            f"down or train with smaller logits (expected at most about {2.0 ** (30 - 17 - HEADROOM_BITS):.0f})"
        )
    return 2.0 ** min(math.floor(room), 28)


def chain_scales(
    parameters: Parameters, choices: Sequence[float], gain: float = 1.0
) -> Iterator[tuple[float, float, float]]:
    """Yield (input, weight, output) scale of each step for a choice of scales.

    Parameters
    ----------
    parameters:
        The modulus chain.
    choices:
        Scale of the fresh ciphertext, then the scale after each affine map; the weight scale of a square is its gain.
    gain:
        What squares are too large by; see `SquareStep.gain`.
    """
    scale, level = choices[0], parameters.top_level
    for index, target in enumerate(choices[1:]):
        if index:
            squared = gain * scale * scale / parameters.data_primes[level]
            yield scale, gain, squared
            scale, level = squared, level - 1
        yield scale, target * parameters.data_primes[level] / scale, target
        scale, level = target, level - 1


def fits(parameters: Parameters, choices: Sequence[float], peaks: Sequence[float], gain: float = 1.0) -> bool:
    """Tell whether every intermediate value fits its modulus with headroom, and no scale is absurd.

    Parameters
    ----------
    parameters, choices, gain:
        As in `chain_scales`.
    peaks:
        Largest absolute value of the input and after each step, shape (steps + 1,).
    """
    for index, (source, weight, target) in enumerate(chain_scales(parameters, choices, gain)):
        level = parameters.top_level - index
        inner = source * weight * (source if index % 2 else 1.0)
        # A product has the values of its output, but at the scale and modulus from before the rescale.
        largest = max(peaks[index + 1], _SMALLEST_PEAK) * inner * 2.0 ** (HEADROOM_BITS + 1)
        if math.log2(largest) >= parameters.bits_at(level) + 1e-9:
            return False
        scales = (source, target) if index % 2 else (source, weight, target)
        if not all(_SMALLEST_SCALE <= scale <= _LARGEST_SCALE for scale in scales):
            return False
    return True


def search(
    parameters: Parameters,
    last: float,
    affine: int,
    peaks: Sequence[float],
    error: Callable[[Sequence[float]], float],
    gain: float = 1.0,
) -> list[float]:
    """Find the scales with the smallest predicted error, by coordinate descent over powers of two.

    Parameters
    ----------
    parameters:
        The modulus chain.
    last:
        Output scale of the network.
    affine:
        Number of affine maps.
    peaks:
        As in `fits`.
    error:
        Predicted error of a choice.
    gain:
        As in `chain_scales`.

    Raises
    ------
    PlanError
        If no choice fits the modulus chain.
    """
    starts = ([2.0**bits] * affine + [last] for bits in (30, 29, 28, 27, 26, 25, 24, 22, 20))
    best = next((start for start in starts if fits(parameters, start, peaks, gain)), None)
    if best is None:
        raise PlanError(
            f"values up to {max(peaks):.3g} between the layers leave no room for a scale in "
            f"{len(parameters.data_primes)} primes of 30 bits; train with smaller activations"
        )
    lowest = error(best)
    step = 4.0
    while step >= 2.0:
        improved = False
        for index in range(affine):
            for factor in (step, 1 / step):
                trial = [*best[:index], best[index] * factor, *best[index + 1 :]]
                if fits(parameters, trial, peaks, gain) and (found := error(trial)) < lowest * 0.999:
                    best, lowest, improved = trial, found, True
        if not improved:
            step = math.sqrt(step) if step > 2.0 else 1.0
    return best
