"""Bringing every layer's values to about one before scales are chosen.

Squares commute with factors: ``(s y)^2 = s^2 y^2``. So every output of an affine map may be multiplied by a factor, if
the next map divides what it reads by the factor's square; the logits stay what they are. Networks that differ in such
factors only are one network, whatever the magnitudes of their weights, and should get one plan. Factors are powers of
two, so nothing is rounded.

How large should a value be? One that contributes little to the next map gains nothing from being as large as the
largest: its own error counts little, but it multiplies the rounding of the next map's weights. Let output c have the
bound p, and let a = max |W| p^2 be the most that its square adds to an output of the next map. With a rounding error e
of every value and r of every weight, the values u <= 1 with the smallest error minimise the sum over c of
``(2 a e / u)^2 + (r u^2)^2``: u grows as the cube root of a. Where e and r are such that the largest share has u = 1
(the search for scales sees to that), ``u = (a / max a)^(1/3)``. Channels of about one size are left in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear
from hemacrypt.plan.plan import LinearStep, Plan

# A share smaller than this is lost in rounding wherever it stands.
_SMALLEST_SIZE = 2.0**-10
# Values smaller than this beside the largest of their layer are as good as none.
_SMALLEST_PEAK = 2.0**-40
# Channels that would gain less than this factor stay as they are beside each other.
_WORTH_IT = 4.0


@dataclass(frozen=True)
class Normalised:
    """A network whose values are all about one, and what became of its logits.

    Attributes
    ----------
    network:
        The same function, but for a factor.
    factors:
        For each affine map the powers of two that its outputs were multiplied by, shape (outputs,) each; one and the
        same for all logits.
    """

    network: CollapsedNetwork
    factors: tuple[Array, ...]

    @property
    def factor(self) -> float:
        """The logits are those of the original network times this power of two."""
        return float(self.factors[-1][0])

    def restored(self, plan: Plan) -> Plan:
        """Turn a plan for the normalised network into one for the original: the same numbers, read at another scale."""
        factor, public, last = self.factor, plan.public, plan.steps[-1]
        assert isinstance(last, LinearStep)  # noqa: S101 - every network ends with an affine map
        step = replace(
            last,
            diagonals=last.diagonals / factor,
            bias=last.bias / factor,
            weight_scale=last.weight_scale * factor,
            output_scale=last.output_scale * factor,
        )
        return replace(
            plan,
            public=replace(
                public,
                output_scale=public.output_scale * factor,
                logit_error_bound=public.logit_error_bound / factor,
                logit_limit=public.logit_limit / factor,
                copy_error_bound=public.copy_error_bound / factor,
                guard_limit=public.guard_limit / factor,
                logit_error_floor=public.logit_error_floor / factor,
            ),
            steps=(*plan.steps[:-1], step),
            step_errors=(*plan.step_errors[:-1], plan.step_errors[-1] / factor),
            step_peaks=(*plan.step_peaks[:-1], plan.step_peaks[-1] / factor),
            reasons=(*plan.reasons, *self._reasons()),
        )

    def _reasons(self) -> Iterator[str]:
        for number, (layer, factors) in enumerate(zip(self.network.linears, self.factors[:-1], strict=False)):
            units = sorted({-int(np.log2(factor)) for factor in factors})
            if units != [0]:
                span = f"2^{units[0]}" + (f" to 2^{units[-1]}, by channel" if len(units) > 1 else "")
                yield f"layer {number} ({layer.describe()}): its values are counted in units of {span}, to be about one"


def normalised(network: CollapsedNetwork) -> Normalised:
    """Return a network whose values between the layers are at most about one, and logits too if they were larger.

    Parameters
    ----------
    network:
        Any network whose peaks are finite.

    Returns
    -------
    Normalised
    """
    linears, columns = list(network.linears), np.ones(network.inputs)
    factors: list[Array] = []
    for number, layer in enumerate(linears):
        rows = _logit_factor(network) if number == network.squares else _factors(network, number)
        linears[number] = _scaled(layer, rows, 1 / columns)
        factors.append(rows)
        columns = rows**2
    measured = network.magnitudes
    peaks = None if measured is None else tuple(p * f for p, f in zip(measured, factors, strict=True))
    return Normalised(CollapsedNetwork(network.input_shape, tuple(linears), network.input_range, peaks), tuple(factors))


def _power_of_two(values: Array) -> Array:
    """Return the largest powers of two that are at most some positive values."""
    powers: Array = np.ldexp(0.5, np.frexp(values)[1])
    return powers


def _logit_factor(network: CollapsedNetwork) -> Array:
    """Return one factor for all logits, so that none is far above one; clients read them as they are."""
    return np.full(network.outputs, _power_of_two(np.array(1 / max(1.0, float(network.peaks[-1].max())))))


def _factors(network: CollapsedNetwork, number: int) -> Array:
    """Return the factor of every output of an affine map that is squared, shape (outputs,)."""
    layer, following = network.linears[number], network.linears[number + 1]
    peak = float(network.peaks[number].max())
    if peak == 0:
        return np.ones(layer.outputs)
    # What no input can exceed needs no headroom; what was measured may be exceeded by an unusual image.
    worst = network.worst_case[number]
    bound = np.where(np.isfinite(worst), np.minimum(worst, peak), peak)
    share = _largest_weights(following) * (bound / peak) ** 2
    size = np.cbrt(share / share.max()) if share.max() > 0 else np.ones(layer.outputs)
    wanted = np.maximum(size, _SMALLEST_SIZE) / np.maximum(bound, peak * _SMALLEST_PEAK)
    wanted = np.where(wanted > _WORTH_IT / peak, wanted, 1 / peak)
    written = layer.outputs // layer.kernel.shape[0] if isinstance(layer, Convolution) else 1
    read = following.inputs // following.kernel.shape[1] if isinstance(following, Convolution) else 1
    # All values of a channel have one factor, whether it is a channel of the one layer or of the other.
    group = math.lcm(written, read)
    return np.repeat(_power_of_two(wanted.reshape(-1, group).min(axis=1)), group)


def _largest_weights(layer: Linear) -> Array:
    """Return the largest absolute weight that each input of a layer meets, shape (inputs,)."""
    if isinstance(layer, Dense):
        largest: Array = np.abs(layer.weight).max(axis=0)
        return largest
    by_channel = np.abs(layer.kernel).max(axis=(0, 2, 3))
    return np.repeat(by_channel, layer.inputs // len(by_channel))


def _scaled(layer: Linear, rows: Array, columns: Array) -> Linear:
    """Multiply rows and columns of a layer's matrix, and its bias by the rows."""
    # One bias stands for all pixels of a channel, or each has its own.
    bias = layer.bias * rows[:: layer.outputs // layer.bias.size].reshape(layer.bias.shape)
    if isinstance(layer, Dense):
        return Dense(layer.weight * rows[:, None] * columns, bias)
    out, into = layer.kernel.shape[:2]
    channels = rows[:: layer.outputs // out, None] * columns[:: layer.inputs // into]
    return Convolution(layer.kernel * channels[:, :, None, None], bias, layer.input_shape, layer.stride, layer.padding)
