"""The dry run: the same plan on numbers in the clear, with the magnitude and the bits of every layer.

It walks the very rotations, diagonals and sums that the encrypted engines walk, so a wrong layout shows here first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.base import Engine
from hemacrypt.errors import FormatError
from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.network import Array
from hemacrypt.plan import LinearStep


@dataclass(frozen=True)
class Magnitude:
    """How large the values of one step became.

    Attributes
    ----------
    step:
        Name of the step.
    largest:
        Largest absolute value in any slot.
    bits:
        Bits of that value at its scale, sign included: what the modulus must have at least.
    modulus_bits:
        Bits that the modulus has after the step.
    """

    step: str
    largest: float
    bits: float
    modulus_bits: float


class ClearEngine(Engine[None]):
    """Evaluates in float64; ``ciphertext`` is the little-endian float64 content of all slots."""

    name: ClassVar[str] = "clear"

    def load_keys(self, keys: EvaluationKeys) -> None:
        """Need no keys."""
        return

    def evaluate(self, ciphertext: bytes, keys: None = None) -> bytes:
        """Evaluate slots given as bytes; see `run`."""
        slots = self.plan.parameters.slots
        if len(ciphertext) != 8 * slots:
            raise FormatError("slots", f"{len(ciphertext)} bytes; expected {8 * slots}: {slots} float64 values")
        return self.run(np.frombuffer(ciphertext, dtype="<f8"))[0].astype("<f8").tobytes()

    def predict(self, values: npt.ArrayLike) -> Array:
        """Return the logits of one image, shape (inputs,) -> (logits,)."""
        public = self.plan.public
        return public.output_layout.unpack(self.run(public.input_layout.pack(values))[0])

    def run(self, slots: Array) -> tuple[Array, list[Magnitude]]:
        """Evaluate slots and report magnitudes.

        Parameters
        ----------
        slots:
            Content of the input ciphertext, shape (slots,).

        Returns
        -------
        slots of the output, and one magnitude per step
        """
        magnitudes: list[Magnitude] = []
        for step in self.plan.steps:
            slots = linear(step, slots) if isinstance(step, LinearStep) else slots * slots
            largest = float(np.abs(slots).max())
            bits = math.log2(max(largest, 2.0**-60) * step.output_scale) + 1
            magnitudes.append(Magnitude(step.name, largest, bits, self.plan.parameters.bits_at(step.level - 1)))
        return slots, magnitudes


def linear(step: LinearStep, slots: Array) -> Array:
    """Carry out an affine map as it is planned, shape (slots,) -> (slots,)."""
    babies = [slots]
    for baby in step.babies[1:]:
        babies.append(np.roll(babies[baby.parent], -baby.step))
    total = np.zeros_like(slots)
    for number, terms in reversed(list(enumerate(step.giants))):
        if number < len(step.giants) - 1:
            total = np.roll(total, -step.giant_step)
        for term in terms:
            total = total + step.diagonals[term.diagonal] * babies[term.baby]
    for rotation in step.sums:
        total = total + np.roll(total, -rotation)
    return total + step.bias
