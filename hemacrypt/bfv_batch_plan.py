"""The plan of an exact batch: one value of the network in each ciphertext, one image in each slot of both rows.

`hemacrypt.batch_plan` with BFV in the place of CKKS: a weight is an integer, the same in all slots, so an affine map is
an integer matrix times ciphertexts and multiplies their noise by no more than its weights. Plaintext moduli can
therefore be larger, and fewer, than where diagonals are encoded (`hemacrypt.bfv_plan`).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hemacrypt.batch_plan import LARGEST_ROW, LARGEST_WEIGHT, Numbers
from hemacrypt.bfv_plan import Integers, check_plain_moduli
from hemacrypt.errors import PlanError
from hemacrypt.plan import KeyGroup, Parameters, check_key_groups


@dataclass(frozen=True, eq=False)
class BfvBatchLinear:
    """An affine map as an integer matrix, then modulus switches.

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
        int64, shape (plaintext moduli, outputs), reduced to (-t/2, t/2).
    """

    name: str
    level: int
    next_level: int
    inputs: int
    outputs: int
    rows: Numbers
    columns: Numbers
    weights: Numbers
    bias: Integers

    # What `hemacrypt.batch_schedule` and engines ask of both schemes: squares are relinearised at once.
    polynomials = 2
    relinearise = False

    def __post_init__(self) -> None:
        absolute = np.abs(self.weights)
        if not len(self.rows) == len(self.columns) == len(self.weights) or self.bias.shape[1:] != (self.outputs,):
            raise PlanError(f"{self.name}: entries or biases are missing; plan the network again")
        sums = np.bincount(self.rows, absolute.astype(np.float64), self.outputs)
        if absolute.max(initial=0) >= LARGEST_WEIGHT or sums.max() > LARGEST_ROW:
            raise PlanError(f"{self.name}: integer weights add up to {sums.max():.3g}; at most {LARGEST_ROW} fit")
        if not sums.all():
            raise PlanError(
                f"{self.name}: output {int(np.argmin(sums))} has only zero weights, which nothing would encrypt; "
                "remove it and count its bias into the next layer"
            )

    @property
    def rescales(self) -> int:
        """How many primes are divided out at the end."""
        return self.level - self.next_level


@dataclass(frozen=True)
class BfvBatchSquare:
    """Square every value, relinearise, switch down.

    Attributes
    ----------
    level, next_level:
        Level of the input and of the output.
    inputs:
        Number of values.
    """

    level: int
    next_level: int
    name: str = "square"
    inputs: int = 0

    relinearise = True

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
    model, labels, parameters, plain_moduli, keys, largest_logit, proven, quantisation_error, preprocessing_digest:
        As in `hemacrypt.bfv_plan.PublicBfvPlan`.
    input_order:
        Ciphertext k of each plaintext modulus holds input value ``input_order[k]``.
    input_level, output_level:
        Levels of the fresh ciphertexts and of the replies.
    input_scale, output_scale:
        An input value v is sent as the integer nearest to ``v * input_scale``; a logit n stands for
        ``n / output_scale``.
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
        if sorted(self.input_order) != list(range(len(self.input_order))) or not self.input_order:
            raise PlanError("the input order does not name every value once; ask the service for its plan again")
        if not 0 <= self.output_level <= self.input_level <= self.parameters.top_level:
            raise PlanError(
                f"levels {self.input_level} and {self.output_level} do not descend from {self.parameters.top_level}"
            )
        check_key_groups(self.parameters, self.keys)
        if not 0 < 2 * self.largest_logit < math.prod(self.plain_moduli):
            raise PlanError(f"logits up to {self.largest_logit} do not fit the plaintext moduli; take one more")
        if not (0 < self.input_scale < math.inf and 0 < self.output_scale < math.inf):
            raise PlanError(f"scales {self.input_scale:g} and {self.output_scale:g}; expected positive numbers")

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
        """Ciphertexts of a request, all plaintext moduli together."""
        return len(self.plain_moduli) * self.inputs

    @property
    def output_ciphertexts(self) -> int:
        """Ciphertexts of a reply, all plaintext moduli together."""
        return len(self.plain_moduli) * self.outputs

    def pack(self, images: npt.ArrayLike) -> Integers:
        """Quantise images and lay them into slots.

        Parameters
        ----------
        images:
            Shape (images, …) with one image's values in all further axes.

        Returns
        -------
        int64 array
            Shape (inputs, 2, slots), in the order of sending. Slot s, both rows counted through, holds image s modulo
            the number of images, so that whoever decrypts can see that copies agree.

        Raises
        ------
        PlanError
            If there is no image, there are more than slots, they have another size, or hold numbers that are not
            finite or out of range.
        """
        given = np.asarray(images, dtype=np.float64)
        if given.ndim < 2 or not 1 <= len(given) <= self.images:
            raise PlanError(
                f"got images of shape {given.shape}; expected 1 to {self.images} of {self.inputs} values: split batches"
            )
        flat = given.reshape(len(given), -1)
        if flat.shape[1] != self.inputs:
            raise PlanError(f"got images of {flat.shape[1]} values; this plan reads {self.inputs}: preprocess them")
        scaled = np.rint(flat * self.input_scale)
        if not np.abs(scaled).max() < min(math.prod(self.plain_moduli) / 2, 2.0**53):
            raise PlanError("the images hold values that are no finite numbers of moderate size; preprocess them first")
        laid = scaled.astype(np.int64).T[list(self.input_order)][:, np.arange(self.images) % len(flat)]
        return laid.reshape(self.inputs, 2, -1)

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 that client and service compare before they compute, hexadecimal."""
        content = {
            "scheme": "bfv",
            "layout": "batch",
            "model": self.model,
            "labels": self.labels,
            "parameters": [self.parameters.degree, self.parameters.data_primes, self.parameters.special_prime],
            "plain_moduli": self.plain_moduli,
            "order": self.input_order,
            "levels": [self.input_level, self.output_level],
            "scales": [self.input_scale.hex(), self.output_scale.hex()],
            "keys": self.keys,
            "preprocessing": self.preprocessing_digest,
            "bounds": [str(self.largest_logit), self.proven, self.quantisation_error.hex()],
        }
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class BfvBatchPlan:
    """How a batch runs through one quantised network under BFV, weights included.

    Attributes
    ----------
    public:
        The half that clients receive.
    steps:
        Linear, Square, Linear, …
    noise_budgets:
        Predicted bits of noise budget that are left after each step.
    weight_scales:
        What the weights of each affine map were multiplied by before they were rounded.
    step_magnitudes, step_measured, reasons:
        As in `hemacrypt.bfv_plan.BfvPlan`.
    estimated_ms:
        Predicted milliseconds on one core for a whole batch, however many of its slots are used.
    """

    public: PublicBfvBatchPlan
    steps: tuple[BfvBatchStep, ...]
    noise_budgets: tuple[float, ...]
    weight_scales: tuple[float, ...]
    step_magnitudes: tuple[int, ...]
    step_measured: tuple[int, ...] | None = None
    reasons: tuple[str, ...] = ()
    estimated_ms: float = 0.0

    @property
    def parameters(self) -> Parameters:
        """Degree and modulus chain."""
        return self.public.parameters

    @property
    def relinearisation_levels(self) -> tuple[int, ...]:
        """Levels at which something is relinearised, highest first."""
        return tuple(sorted({step.level for step in self.squares}, reverse=True))

    @property
    def linears(self) -> tuple[BfvBatchLinear, ...]:
        """The affine maps in order."""
        return tuple(step for step in self.steps if isinstance(step, BfvBatchLinear))

    @property
    def squares(self) -> tuple[BfvBatchSquare, ...]:
        """The squares in order; number i stands between the affine maps i and i + 1."""
        return tuple(step for step in self.steps if isinstance(step, BfvBatchSquare))
