"""The plan of an exact batch: one value of the network in each ciphertext, one image in each of N slots.

CryptoNets' own layout and scheme. As in `hemacrypt.plan.batch_plan` nothing is rotated and a weight is a constant:
under BFV an integer that multiplies the noise by itself alone, not by the plaintext modulus. So only squares cost much
noise budget, and fewer, larger plaintext moduli serve. Both rows hold images: N of them, twice as many as under CKKS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import PlanError
from hemacrypt.plan.batch_plan import LARGEST_ROW, LARGEST_WEIGHT, Numbers
from hemacrypt.plan.bfv_plan import check_exact_numbers, check_plain_moduli
from hemacrypt.plan.plan import KeyGroup, Parameters, check_key_groups, digest


@dataclass(frozen=True, eq=False)
class BfvBatchLinear:
    """An affine map as an integer matrix; then relinearisation, if it waited so long; then modulus switches.

    Attributes
    ----------
    name:
        What the layer is, for people.
    level, next_level:
        Level of the input and of the output.
    inputs, outputs:
        Number of values read and written.
    rows, columns, weights:
        The entries of the matrix that are not zero, shape (entries,) each.
    bias:
        int64, shape (plaintext moduli, outputs), reduced to (-t/2, t/2]; added to all slots after the switches.
    relinearise:
        Whether the input has three polynomials, which the sums are brought back from.
    """

    name: str
    level: int
    next_level: int
    inputs: int
    outputs: int
    rows: Numbers
    columns: Numbers
    weights: Numbers
    bias: Numbers
    relinearise: bool

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.columns) == len(self.weights) or self.bias.shape[1:] != (self.outputs,):
            raise PlanError(f"{self.name}: entries or biases are missing; plan the network again")
        absolute = np.abs(self.weights)
        sums = np.bincount(self.rows, absolute.astype(np.float64), self.outputs)
        if absolute.max(initial=0) >= LARGEST_WEIGHT or sums.max() > LARGEST_ROW:
            raise PlanError(f"{self.name}: integer weights add up to {sums.max():.3g}; at most {LARGEST_ROW} fit")
        if not sums.all():
            raise PlanError(
                f"{self.name}: output {int(np.argmin(sums))} has only zero weights, which nothing would encrypt; "
                "remove it and count its bias into the next layer"
            )

    @property
    def polynomials(self) -> int:
        """Polynomials of each input."""
        return 3 if self.relinearise else 2

    @property
    def rescales(self) -> int:
        """How many primes are divided out at the end."""
        return self.level - self.next_level


@dataclass(frozen=True)
class BfvBatchSquare:
    """Square every value; relinearise unless the next affine map does; switch down.

    Attributes
    ----------
    level, next_level:
        Level of the input and of the output.
    inputs:
        Number of values.
    relinearise:
        Whether relinearisation follows at once; without it nothing is switched.
    """

    level: int
    next_level: int
    inputs: int
    relinearise: bool
    name: str = "square"

    @property
    def outputs(self) -> int:
        """Number of values."""
        return self.inputs


BfvBatchStep = BfvBatchLinear | BfvBatchSquare


@dataclass(frozen=True, eq=False)
class PublicBfvBatchPlan:
    """The half of an exact batch plan that a client receives.

    Attributes
    ----------
    model, labels, parameters, preprocessing_digest:
        As in `hemacrypt.plan.batch_plan.PublicBatchPlan`.
    plain_moduli, input_scale, output_scale, largest_logit, proven, quantisation_error:
        As in `hemacrypt.plan.bfv_plan.PublicBfvPlan`.
    input_order:
        Ciphertext k of each plaintext modulus holds input value ``input_order[k]``.
    input_level, output_level:
        Levels of the fresh ciphertexts and of the replies.
    keys:
        Relinearisation keys that the service needs, highest level first.
    """

    model: str
    labels: tuple[str, ...]
    parameters: Parameters
    plain_moduli: tuple[int, ...]
    input_order: tuple[int, ...]
    input_level: int
    output_level: int
    input_scale: float
    output_scale: float
    keys: tuple[KeyGroup, ...]
    largest_logit: int
    proven: bool
    quantisation_error: float
    preprocessing_digest: str = ""

    def __post_init__(self) -> None:
        check_plain_moduli(self.plain_moduli, self.parameters)
        check_key_groups(self.parameters, self.keys)
        if sorted(self.input_order) != list(range(len(self.input_order))) or not self.input_order:
            raise PlanError("the input order does not name every value once; ask the service for its plan again")
        if not 0 <= self.output_level <= self.input_level <= self.parameters.top_level:
            raise PlanError(
                f"levels {self.input_level} and {self.output_level} do not descend from {self.parameters.top_level}"
            )
        check_exact_numbers(self.plain_moduli, self.largest_logit, (self.input_scale, self.output_scale))

    @property
    def images(self) -> int:
        """Most images of one batch: the slots of both rows."""
        return self.parameters.degree

    @property
    def inputs(self) -> int:
        """Number of ciphertexts of each plaintext modulus that a batch is sent as."""
        return len(self.input_order)

    @property
    def outputs(self) -> int:
        """Number of ciphertexts of each plaintext modulus that come back, one for each logit."""
        return len(self.labels)

    @property
    def input_ciphertexts(self) -> int:
        """Ciphertexts of a request: those of the first plaintext modulus, then of the second, and so on."""
        return len(self.plain_moduli) * self.inputs

    @property
    def output_ciphertexts(self) -> int:
        """Ciphertexts of a reply, ordered alike."""
        return len(self.plain_moduli) * self.outputs

    def pack(self, images: npt.ArrayLike) -> Numbers:
        """Round images and lay them into slots, shape (images, …) -> (inputs, 2, slots).

        Slot s of both rows, one behind the other, holds image s modulo the number of images.

        Raises
        ------
        PlanError
            If there is no image, there are more than slots, or they have another size.
        """
        given = np.asarray(images, dtype=np.float64)
        if given.ndim < 2 or not 1 <= len(given) <= self.images or given[0].size != self.inputs:
            raise PlanError(
                f"got images of shape {given.shape}; expected 1 to {self.images} of {self.inputs} values: split batches"
            )
        integers = np.rint(given.reshape(len(given), -1) * self.input_scale).astype(np.int64)
        ordered = integers.T[list(self.input_order)][:, np.arange(self.images) % len(given)]
        return ordered.reshape(self.inputs, 2, -1)

    def unpack(self, rows: npt.NDArray[np.generic], images: int) -> npt.NDArray[np.generic]:
        """Read logits from slots, shape (outputs, 2, slots) -> (images, outputs).

        Raises
        ------
        PlanError
            If the slots are not those of all logits, or the images cannot have been in one batch.
        """
        expected = (self.outputs, 2, self.parameters.slots)
        if rows.shape != expected or not 1 <= images <= self.images:
            raise PlanError(f"got slots of shape {rows.shape} for {images} images; expected {expected}")
        return rows.reshape(self.outputs, -1)[:, :images].T.copy()

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 that client and service compare before they compute, hexadecimal."""
        content = {
            "scheme": "bfv",
            "layout": "batch",
            "model": self.model,
            "labels": self.labels,
            "parameters": self.parameters.content,
            "plain_moduli": self.plain_moduli,
            "order": self.input_order,
            "levels": [self.input_level, self.output_level],
            "scales": [self.input_scale.hex(), self.output_scale.hex()],
            "keys": self.keys,
            "preprocessing": self.preprocessing_digest,
            "bounds": [str(self.largest_logit), self.proven, self.quantisation_error.hex()],
        }
        return digest(content)


@dataclass(frozen=True, eq=False)
class BfvBatchPlan:
    """How a batch of images runs through one quantised network, weights included; stays with the model's owner.

    Attributes
    ----------
    public:
        The half that clients receive.
    steps:
        Linear, Square, Linear, …
    noise_budgets, step_magnitudes, step_measured, reasons, weight_scales:
        As in `hemacrypt.plan.bfv_plan.BfvPlan`.
    estimated_ms:
        Predicted milliseconds on one core for a whole batch, however many of its slots are used.
    """

    public: PublicBfvBatchPlan
    steps: tuple[BfvBatchStep, ...]
    noise_budgets: tuple[float, ...]
    step_magnitudes: tuple[int, ...]
    step_measured: tuple[int, ...] | None
    reasons: tuple[str, ...]
    weight_scales: tuple[float, ...]
    estimated_ms: float

    @property
    def parameters(self) -> Parameters:
        """Degree and modulus chain."""
        return self.public.parameters

    @property
    def relinearisation_levels(self) -> tuple[int, ...]:
        """Levels at which something is relinearised, highest first."""
        return tuple(sorted({step.level for step in self.steps if step.relinearise}, reverse=True))

    @property
    def linears(self) -> tuple[BfvBatchLinear, ...]:
        """The affine maps in order."""
        return tuple(step for step in self.steps if isinstance(step, BfvBatchLinear))

    @property
    def squares(self) -> tuple[BfvBatchSquare, ...]:
        """The squares in order; number i stands between the affine maps i and i + 1."""
        return tuple(step for step in self.steps if isinstance(step, BfvBatchSquare))
