"""The plan of the throughput layout: one value of the network in each ciphertext, one image in each slot.

The layout of CryptoNets (Gilad-Bachrach et al., "CryptoNets: applying neural networks to encrypted data with high
throughput and accuracy", 2016): input value i of up to N / 2 images fills the slots of ciphertext i. Nothing is ever
rotated. A weight is the same in all slots, so its plaintext is a constant, the same integer modulo every prime in every
place, and an affine map is a product of an integer matrix with ciphertexts. Plain data, as `hemacrypt.plan.plan` is:
the planner writes it, engines and clients read it.

A square makes three polynomials of two. Relinearisation may follow at once, or — being linear — after the next affine
map, which often has far fewer outputs than inputs. Rescales, too, stand where they are worth their time: none to two
after each operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import PlanError
from hemacrypt.model.network import Array
from hemacrypt.plan.plan import KeyGroup, Parameters, check_key_groups, digest, requirements_id

Numbers = npt.NDArray[np.int64]

# Absolute weights of one output may add up to this as integers: sums of 64 bits then need one reduction, at their end.
LARGEST_ROW = 1 << 32
# A weight is below this as an integer.
LARGEST_WEIGHT = 1 << 31


@dataclass(frozen=True, eq=False)
class BatchLinear:
    """An affine map as an integer matrix; then relinearisation, if it waited so long; then rescales.

    Attributes
    ----------
    name:
        What the layer is, for people.
    level:
        Level of the input.
    inputs, outputs:
        Number of values read and written.
    rows, columns, weights:
        The entries of the matrix that are not zero, shape (entries,) each; weights are integers, rounded at
        ``weight_scale``.
    bias:
        Shape (outputs,); added as a constant at the scale of the product.
    relinearise:
        Whether the input has three polynomials, which the sums are brought back from.
    rescales:
        How many primes are divided out at the end.
    input_scale, weight_scale, output_scale:
        Scales of the input, of the weights, and after the rescales.
    """

    name: str
    level: int
    inputs: int
    outputs: int
    rows: Numbers
    columns: Numbers
    weights: Numbers
    bias: Array
    relinearise: bool
    rescales: int
    input_scale: float
    weight_scale: float
    output_scale: float

    def __post_init__(self) -> None:
        absolute = np.abs(self.weights)
        if not len(self.rows) == len(self.columns) == len(self.weights) or len(self.bias) != self.outputs:
            raise PlanError(f"{self.name}: entries or biases are missing; plan the network again")
        sums = np.bincount(self.rows, absolute.astype(np.float64), self.outputs)
        if absolute.max(initial=0) >= LARGEST_WEIGHT or sums.max() > LARGEST_ROW:
            raise PlanError(f"{self.name}: integer weights add up to {sums.max():.3g}; at most {LARGEST_ROW} fit")
        if not sums.all():
            raise PlanError(
                f"{self.name}: all weights of output {int(np.argmin(sums))} are so small that they round to zero; "
                "scale it up, or remove it and count its bias into the next layer"
            )

    @property
    def polynomials(self) -> int:
        """Polynomials of each input."""
        return 3 if self.relinearise else 2

    @property
    def product_scale(self) -> float:
        """Scale of the sums, before the rescales."""
        return self.input_scale * self.weight_scale


@dataclass(frozen=True)
class BatchSquare:
    """Square every value; relinearise unless the next affine map does; rescale.

    Attributes
    ----------
    level:
        Level of the input.
    relinearise:
        Whether relinearisation follows at once; without it nothing is rescaled.
    rescales:
        How many primes are divided out at the end.
    input_scale, output_scale:
        Scales before and after.
    """

    level: int
    relinearise: bool
    rescales: int
    input_scale: float
    output_scale: float
    name: str = "square"


BatchStep = BatchLinear | BatchSquare


@dataclass(frozen=True, eq=False)
class PublicBatchPlan:
    """The half of a batch plan that a client receives: no weights, nothing derived from them but sizes.

    Attributes
    ----------
    model:
        Name of the model.
    labels:
        What each logit stands for.
    parameters:
        Degree and modulus chain.
    input_order:
        Ciphertext k holds input value ``input_order[k]``; the order in which they are sent and used.
    input_level, output_level:
        Levels of the fresh ciphertexts and of the replies.
    input_scale, output_scale:
        Their scales.
    keys:
        Evaluation keys that are registered for it, highest level first: relinearisation keys of its own, and whatever
        else other plans of the model need.
    logit_error_bound:
        Predicted bound on the error of a decrypted logit.
    logit_limit:
        Logits beyond this absolute value do not fit the last modulus.
    preprocessing_digest:
        SHA-256 of the preprocessing that makes the input, hexadecimal; empty when none is declared.
    """

    model: str
    labels: tuple[str, ...]
    parameters: Parameters
    input_order: tuple[int, ...]
    input_level: int
    output_level: int
    input_scale: float
    output_scale: float
    keys: tuple[KeyGroup, ...]
    logit_error_bound: float
    logit_limit: float
    preprocessing_digest: str = ""

    def __post_init__(self) -> None:
        if sorted(self.input_order) != list(range(len(self.input_order))) or not self.input_order:
            raise PlanError("the input order does not name every value once; ask the service for its plan again")
        if not 0 <= self.output_level <= self.input_level <= self.parameters.top_level:
            raise PlanError(
                f"levels {self.input_level} and {self.output_level} do not descend from {self.parameters.top_level}"
            )
        check_key_groups(self.parameters, self.keys)
        for scale, level in ((self.input_scale, self.input_level), (self.output_scale, self.output_level)):
            if not 1 <= scale < 2 ** self.parameters.bits_at(level):
                raise PlanError(f"scale {scale:g} does not fit the modulus of level {level}")

    @property
    def images(self) -> int:
        """Most images of one batch: the slots of a ciphertext."""
        return self.parameters.slots

    @property
    def inputs(self) -> int:
        """Number of ciphertexts that a batch is sent as."""
        return len(self.input_order)

    @property
    def outputs(self) -> int:
        """Number of ciphertexts that come back, one for each logit."""
        return len(self.labels)

    def pack(self, images: npt.ArrayLike) -> Array:
        """Lay images into slots.

        Parameters
        ----------
        images:
            Shape (images, …) with one image's values in all further axes.

        Returns
        -------
        array
            Shape (inputs, slots): the content of each ciphertext, in the order of sending. Slot s holds image s modulo
            the number of images, so that whoever decrypts can see that copies agree.

        Raises
        ------
        PlanError
            If there is no image, there are more than slots, or they have another size.
        """
        given = np.asarray(images, dtype=np.float64)
        if given.ndim < 2 or not 1 <= len(given) <= self.images:
            raise PlanError(
                f"got images of shape {given.shape}; expected 1 to {self.images} of {self.inputs} values: split batches"
            )
        flat = given.reshape(len(given), -1)
        if flat.shape[1] != self.inputs:
            raise PlanError(f"got images of {flat.shape[1]} values; this plan reads {self.inputs}: preprocess them")
        return flat.T[list(self.input_order)][:, np.arange(self.images) % len(flat)]

    def unpack(self, slots: npt.ArrayLike, images: int) -> Array:
        """Read logits from slots, shape (outputs, slots) -> (images, outputs).

        Raises
        ------
        PlanError
            If the slots are not those of all logits, or the images cannot have been in one batch.
        """
        content = np.asarray(slots, dtype=np.float64)
        if content.shape != (self.outputs, self.images) or not 1 <= images <= self.images:
            raise PlanError(
                f"got slots of shape {content.shape} for {images} images; "
                f"expected {(self.outputs, self.images)} for 1 to {self.images}"
            )
        return content[:, :images].T.copy()

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 that client and service compare before they compute, hexadecimal."""
        content = {
            "layout": "batch",
            "model": self.model,
            "labels": self.labels,
            "parameters": self.parameters.content,
            "order": self.input_order,
            "levels": [self.input_level, self.output_level],
            "scales": [self.input_scale.hex(), self.output_scale.hex()],
            "keys": self.keys,
            "preprocessing": self.preprocessing_digest,
            "error": [self.logit_error_bound.hex(), self.logit_limit.hex()],
        }
        return digest(content)

    @cached_property
    def requirements_id(self) -> str:
        """SHA-256 over all that evaluation keys depend on, hexadecimal: plans that share it share keys."""
        return requirements_id(self.parameters, self.keys)


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """How a batch of images runs through one network, weights included; stays with whoever owns the model.

    Attributes
    ----------
    public:
        The half that clients receive.
    steps:
        Linear, Square, Linear, …
    estimated_ms:
        Predicted milliseconds on one core for a whole batch, however many of its slots are used.
    calibrated:
        Whether the largest values between the layers were measured; if not, they are worst-case bounds.
    reasons:
        Why the plan is what it is, one sentence each.
    """

    public: PublicBatchPlan
    steps: tuple[BatchStep, ...]
    estimated_ms: float
    calibrated: bool
    reasons: tuple[str, ...]

    @property
    def parameters(self) -> Parameters:
        """Degree and modulus chain."""
        return self.public.parameters

    @property
    def relinearisation_levels(self) -> tuple[int, ...]:
        """Levels at which something is relinearised, highest first."""
        return tuple(sorted({step.level for step in self.steps if step.relinearise}, reverse=True))

    @property
    def linears(self) -> tuple[BatchLinear, ...]:
        """The affine maps in order."""
        return tuple(step for step in self.steps if isinstance(step, BatchLinear))

    @property
    def squares(self) -> tuple[BatchSquare, ...]:
        """The squares in order; number i stands between the affine maps i and i + 1."""
        return tuple(step for step in self.steps if isinstance(step, BatchSquare))
