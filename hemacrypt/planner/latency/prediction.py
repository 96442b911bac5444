"""Predicting the errors of a chosen combination, and finding the scales that make them smallest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hemacrypt.model.network import Array, CollapsedNetwork, ComplexArray
from hemacrypt.plan.plan import JOIN_FACTOR, LinearStep, SquareStep, Step
from hemacrypt.planner import noise
from hemacrypt.planner.latency import scales
from hemacrypt.planner.latency.choices import Chosen, prepared_step

# Where the noise lies in few slots, values there may be so many times their peaks for an error that is sought.
_AIMED: Final = 2.5


@dataclass(frozen=True)
class Predicted:
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


class Predictor:
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
        self, network: CollapsedNetwork, chosen: Chosen, peaks: Sequence[ComplexArray], logits: int, centred: bool
    ) -> None:
        self._network, self._chosen, self._peaks, self._logits = network, chosen, peaks, logits
        self._parameters, self._target = chosen.parameters, chosen.choices[-1].form.target
        self._model = noise.NoiseModel(self._parameters, centred)
        top = self._parameters.top_level
        self._prepared = [prepared_step(choice, top - 2 * number) for number, choice in enumerate(chosen.choices)]
        self._gain = SquareStep.gain(chosen.kinds[0]) if chosen.kinds else 1.0
        self._transfers = [
            noise.Transfer.of(self._model, step, peaks[2 * number]) for number, step in enumerate(self._prepared)
        ]

    def best(self) -> Predicted:
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

    def _exact(self, choice: Sequence[float]) -> Predicted:
        """Predict all errors slot by slot, of either image where there are two."""
        steps = tuple(self._steps(choice))
        parts: tuple[noise.Part, ...] = ("real", "imaginary") if self._target.images == 2 else ("real",)
        found = [self._of_part(steps, self._fresh(choice), part) for part in parts]
        return Predicted(
            steps,
            tuple(max(errors) for errors in zip(*(each.errors for each in found), strict=True)),
            *(max(values) for values in zip(*((each.floor, each.limit, each.of_copy) for each in found), strict=True)),
        )

    def _of_part(self, steps: tuple[Step, ...], variance: Array, part: noise.Part) -> Predicted:
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
        return Predicted(steps, tuple(errors), lowest, highest, copies)

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
