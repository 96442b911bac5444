"""The dry run of an exact plan: the same rotations, diagonals and sums, on the integers modulo each plaintext modulus.

It walks what the encrypted engines walk, so a wrong layout, a bias in the wrong row or a modulus that is too small show
here first. `hemacrypt.model.quantise` has the integers that must come out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import PlanError
from hemacrypt.plan.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, combine, pack_rows, read_rows
from hemacrypt.plan.plan import Turn

# int64 while a product of two residues fits, Python integers beyond.
Residues = npt.NDArray[Any]
_NARROW = 1 << 31


class ClearBfvEngine:
    """Evaluates an exact plan on residues in the clear.

    Parameters
    ----------
    plan:
        The plan, weights included.
    """

    name: ClassVar[str] = "clear"

    def __init__(self, plan: BfvPlan) -> None:
        self.plan = plan

    def predict_integers(self, images: npt.ArrayLike) -> npt.NDArray[np.object_]:
        """Return the integer logits of the images of one request, shape (images, logits): Python integers.

        Parameters
        ----------
        images:
            Preprocessed images, as many as the plan takes at once.

        Raises
        ------
        PlanError
            If copies of a logit differ, which a right plan excludes.
        """
        public = self.plan.public
        rows = pack_rows(public.input_layout, np.rint(np.asarray(images, dtype=np.float64) * public.input_scale))
        residues = []
        for number, modulus in enumerate(public.plain_moduli):
            copies = read_rows(public.output_layout, self.run(rows, number))
            if (copies != copies[:, :1]).any():
                raise PlanError(f"copies of a logit differ modulo {modulus}; the plan is at fault, make it again")
            residues.append(copies[:, 0])
        return combine(residues, public.plain_moduli)

    def predict(self, images: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the logits in the network's units, float64, shape (images, logits)."""
        return self.predict_integers(images).astype(np.float64) / self.plan.public.output_scale

    def run(self, rows: npt.NDArray[np.int64], number: int) -> Residues:
        """Evaluate rows modulo one plaintext modulus.

        Parameters
        ----------
        rows:
            Integers of both rows of every input ciphertext, shape (ciphertexts, 2, slots).
        number:
            Which of the plan's plaintext moduli.

        Returns
        -------
        residues from 0 to t - 1, shape (outputs, 2, slots)
        """
        modulus = self.plan.public.plain_moduli[number]
        values: Residues = _reduced(rows, modulus)
        for step in self.plan.steps:
            if isinstance(step, BfvLinear):
                values = linear(step, values, modulus, number)
                continue
            values = values * values % modulus
        return values


def batch_integers(plan: BfvBatchPlan, images: npt.ArrayLike) -> npt.NDArray[np.object_]:
    """Return the integer logits of a batch as its plan computes them, shape (images, logits): Python integers.

    Residues of every plaintext modulus walk the plan's matrices; slots without an image hold copies.

    Parameters
    ----------
    plan:
        The plan, weights included.
    images:
        Preprocessed images, shape (images, …), at most as many as a batch takes.
    """
    public, given = plan.public, np.asarray(images, dtype=np.float64)
    packed = public.pack(given).reshape(public.inputs, -1)
    values = np.empty((public.inputs, len(given)), dtype=object)
    values[list(public.input_order)] = packed[:, : len(given)].astype(object)
    residues = []
    for number, modulus in enumerate(public.plain_moduli):
        current: Residues = values % modulus
        for step in plan.steps:
            if isinstance(step, BfvBatchLinear):
                total = np.repeat(step.bias[number].astype(object)[:, None], len(given), axis=1)
                np.add.at(total, step.rows, step.weights.astype(object)[:, None] * current[step.columns])
                current = total % modulus
            else:
                current = current * current % modulus
        residues.append(current.T)
    return combine(residues, public.plain_moduli)


def linear(step: BfvLinear, values: Residues, modulus: int, number: int) -> Residues:
    """Carry out an affine map modulo the plaintext modulus of a number, shape (…, 2, slots)."""
    diagonals, bias = _reduced(step.diagonals, modulus), _reduced(step.bias[number], modulus)
    copies = list(values)
    for copy in step.copies[step.inputs :]:
        copies.append(turned(copies[copy.parent], Turn(copy.step)))
    outputs: list[Residues] = []
    for giants in step.giants:
        total: Residues = np.zeros_like(values[0])
        for index, terms in reversed(list(enumerate(giants))):
            if index < len(giants) - 1:
                total = turned(total, Turn(step.giant_step))
            for term in terms:
                total = (total + diagonals[term.diagonal] * copies[term.copy]) % modulus
        for group in step.turns:
            total = (total + sum(turned(total, turn) for turn in group)) % modulus
        outputs.append(total)
    return (np.stack(outputs) + bias) % modulus


def turned(rows: Residues, turn: Turn) -> Residues:
    """Rotate both rows to the left and, where the turn conjugates, exchange them; shape (2, slots)."""
    rotated = np.roll(rows, -turn.step, axis=-1)
    return rotated[::-1] if turn.conjugate else rotated


def _reduced(values: npt.NDArray[np.int64], modulus: int) -> Residues:
    return values % modulus if modulus < _NARROW else values.astype(object) % modulus
