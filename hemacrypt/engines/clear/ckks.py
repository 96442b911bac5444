"""The dry run: the same plan on numbers in the clear, with the magnitude and the bits of every layer.

It walks the very rotations, diagonals and sums that the encrypted engines walk, so a wrong layout shows here first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.base import Engine
from hemacrypt.errors import FormatError
from hemacrypt.model.network import Array, ComplexArray
from hemacrypt.plan.plan import JOIN_FACTOR, LinearStep, SquareStep
from hemacrypt.seal.evaluation_keys import EvaluationKeys


@dataclass(frozen=True)
class Magnitude:
    """How large the values of one step became.

    Attributes
    ----------
    step:
        Name of the step.
    largest:
        Largest absolute value in any slot, in the units of the plan.
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
    """Evaluates in float64; a "ciphertext" is the little-endian complex128 content of all slots."""

    name: ClassVar[str] = "clear"

    def load_keys(self, keys: EvaluationKeys) -> None:
        """Need no keys."""
        return

    def evaluate(self, ciphertexts: Sequence[bytes], keys: None = None) -> list[bytes]:
        """Evaluate slots given as bytes; see `run`."""
        self.check_count(ciphertexts)
        slots = self.plan.parameters.slots
        for content in ciphertexts:
            if len(content) != 16 * slots:
                raise FormatError("slots", f"{len(content)} bytes; expected {16 * slots}: {slots} complex128 values")
        given = np.stack([np.frombuffer(content, dtype="<c16") for content in ciphertexts])
        return [row.astype("<c16").tobytes() for row in self.run(given)[0]]

    def predict(self, values: npt.ArrayLike) -> Array:
        """Return the logits of all images of a request, shape (images, …) -> (images, logits)."""
        public = self.plan.public
        return public.output_layout.unpack(self.run(public.input_layout.pack(values))[0])[:, : len(public.labels)]

    def run(self, slots: ComplexArray) -> tuple[ComplexArray, list[Magnitude]]:
        """Evaluate slots and report magnitudes.

        Parameters
        ----------
        slots:
            Content of the input ciphertexts, shape (ciphertexts, slots).

        Returns
        -------
        slots of the outputs, and one magnitude per step
        """
        magnitudes: list[Magnitude] = []
        for step in self.plan.steps:
            slots = linear(step, slots) if isinstance(step, LinearStep) else square(step, slots)
            largest = float(np.abs(slots).max())
            bits = math.log2(max(largest, 2.0**-60) * step.output_scale) + 1
            magnitudes.append(Magnitude(step.name, largest, bits, self.plan.parameters.bits_at(step.level - 1)))
        return slots, magnitudes


def linear(step: LinearStep, slots: ComplexArray) -> ComplexArray:
    """Carry out an affine map as it is planned, shape (inputs, slots) -> (outputs, slots)."""
    copies = list(slots)
    for copy in step.copies[step.inputs :]:
        copies.append(np.roll(copies[copy.parent], -copy.step))
    outputs: list[ComplexArray] = []
    for giants in step.giants:
        total = np.zeros_like(slots[0])
        for number, terms in reversed(list(enumerate(giants))):
            if number < len(giants) - 1:
                total = np.roll(total, -step.giant_step)
            for term in terms:
                total = total + step.diagonals[term.diagonal] * copies[term.copy]
        for group in step.turns:
            total = total + sum(turn(total) for turn in group)
        outputs.append(total)
    return np.stack(outputs) + step.bias


def square(step: SquareStep, slots: ComplexArray) -> ComplexArray:
    """Square as it is planned, shape (inputs, slots) -> (outputs, slots); the factor of parting is divided out."""
    if step.kind == "plain":
        return slots * slots
    parted = step.kind == "parted"
    real, other = (slots.real, slots.imag) if parted else (slots.real[::2], slots.real[1::2])
    joined = (real * real).astype(np.complex128)
    joined[: len(other)] += 1j * JOIN_FACTOR * other * other
    return joined
