"""The plan of an exact evaluation: how a quantised network runs under BFV. Plain data, as `hemacrypt.plan.plan` is.

A BFV ciphertext with a batching-friendly plaintext modulus t holds N integers modulo t in two rows of N / 2 slots. The
automorphisms are those of CKKS: X -> X^(3^k) rotates both rows by k to the left, and X -> X^(-1), which conjugates
there, exchanges the rows (Smart and Vercauteren, "Fully homomorphic SIMD operations", 2014). So layouts and turns are
those of `hemacrypt.plan.plan` with a *row* in place of a part: `Layout.imaginary` means the second row.

Integers that no t holds are evaluated modulo several plaintext moduli, one ciphertext each, and put together by the
Chinese remainder theorem (CryptoNets, section 5.1). The ring, the modulus chain, the secret key and the evaluation keys
are those of CKKS: one set of keys serves both schemes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import PlanError
from hemacrypt.plan.plan import (
    Copy,
    KeyGroup,
    Layout,
    Parameters,
    Term,
    Turn,
    check_key_groups,
    digest,
    is_prime,
    requirements_id,
)

Integers = npt.NDArray[np.int64]

# SEAL takes plaintext moduli of up to 60 bits; more than so many of them are out of all reason.
LARGEST_PLAIN_BITS = 60
MOST_PLAIN_MODULI = 16


@dataclass(frozen=True, eq=False)
class BfvLinear:
    """An affine map over integers; the meaning of copies, giants and turns is that of `hemacrypt.plan.plan.LinearStep`.

    Attributes
    ----------
    name:
        What the layer is, for people.
    level, next_level:
        Level of the input and of the output; every level between them is one modulus switch.
    inputs:
        Number of input ciphertexts of each plaintext modulus.
    copies, giants, giant_step, turns:
        As in `hemacrypt.plan.plan.LinearStep`.
    diagonals:
        int64, shape (number, 2, slots): integers for both rows, the same for all plaintext moduli.
    bias:
        int64, shape (plaintext moduli, outputs, 2, slots), reduced to (-t/2, t/2).
    """

    name: str
    level: int
    next_level: int
    inputs: int
    copies: tuple[Copy, ...]
    giants: tuple[tuple[tuple[Term, ...], ...], ...]
    giant_step: int
    turns: tuple[tuple[Turn, ...], ...]
    diagonals: Integers
    bias: Integers

    @property
    def outputs(self) -> int:
        """Number of output ciphertexts of each plaintext modulus."""
        return len(self.giants)


@dataclass(frozen=True)
class BfvSquare:
    """Square every ciphertext, relinearise, switch down to ``next_level``.

    Attributes
    ----------
    level, next_level:
        Level of the input and of the output.
    inputs:
        Number of ciphertexts of each plaintext modulus.
    """

    level: int
    next_level: int
    inputs: int
    name: str = "square"

    @property
    def outputs(self) -> int:
        """Number of output ciphertexts."""
        return self.inputs


BfvStep = BfvLinear | BfvSquare


@dataclass(frozen=True, eq=False)
class PublicBfvPlan:
    """The half of an exact plan that a client receives.

    Attributes
    ----------
    model, labels, preprocessing_digest:
        As in `hemacrypt.plan.plan.PublicPlan`.
    parameters:
        Degree and modulus chain, shared with CKKS.
    plain_moduli:
        Plaintext moduli: distinct primes that are 1 modulo 2N.
    input_layout, output_layout:
        Slots of the image's values and of the logits, parts standing for rows.
    input_scale:
        An input value v is sent as the integer nearest to ``v * input_scale``.
    output_scale:
        An integer logit n stands for ``n / output_scale``.
    output_level:
        Level of the reply.
    keys:
        Evaluation keys that the service needs, highest level first.
    input_range:
        Smallest and largest integer that an input in range makes; for what lies beyond nothing is proven, and it is not
        encrypted.
    largest_logit:
        No valid input makes an integer logit larger than this; below half the product of the plaintext moduli.
    proven:
        Whether ``largest_logit`` is a worst-case bound over all inputs in range; otherwise it was measured.
    quantisation_error:
        Predicted standard deviation of a quantised logit from that of the unquantised network where every value is at
        its peak, in the network's units; no bound.
    """

    model: str
    labels: tuple[str, ...]
    parameters: Parameters
    plain_moduli: tuple[int, ...]
    input_layout: Layout
    output_layout: Layout
    input_scale: float
    output_scale: float
    output_level: int
    keys: tuple[KeyGroup, ...]
    input_range: tuple[int, int]
    largest_logit: int
    proven: bool
    quantisation_error: float
    preprocessing_digest: str = ""

    def __post_init__(self) -> None:
        check_plain_moduli(self.plain_moduli, self.parameters)
        slots = self.parameters.slots
        if self.input_layout.slots != slots or self.output_layout.slots != slots:
            raise PlanError(f"layouts have other slots than the {slots} of degree {self.parameters.degree}")
        if len(self.labels) != len(self.output_layout.positions):
            raise PlanError(f"{len(self.labels)} labels for {len(self.output_layout.positions)} logits")
        if self.input_layout.images != self.output_layout.images:
            raise PlanError(f"{self.input_layout.images} images in, {self.output_layout.images} out; expected as many")
        check_key_groups(self.parameters, self.keys)
        if not 0 <= self.output_level <= self.parameters.top_level:
            raise PlanError(
                f"replies of level {self.output_level}; the chain has levels 0 to {self.parameters.top_level}"
            )
        if not -(1 << 53) < self.input_range[0] <= self.input_range[1] < 1 << 53:
            raise PlanError(
                f"integer inputs from {self.input_range[0]} to {self.input_range[1]}; expected some, below 2^53"
            )
        check_exact_numbers(self.plain_moduli, self.largest_logit, (self.input_scale, self.output_scale))

    @property
    def images(self) -> int:
        """How many images one request carries."""
        return self.input_layout.images

    @property
    def input_ciphertexts(self) -> int:
        """Ciphertexts of a request: those of the first plaintext modulus, then of the second, and so on."""
        return len(self.plain_moduli) * self.input_layout.ciphertexts

    @property
    def output_ciphertexts(self) -> int:
        """Ciphertexts of a reply, ordered alike."""
        return len(self.plain_moduli) * self.output_layout.ciphertexts

    @cached_property
    def requirements_id(self) -> str:
        """SHA-256 over all that evaluation keys depend on, as for plans of CKKS: plans that share it share keys."""
        return requirements_id(self.parameters, self.keys)

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 that client and service compare before they compute, hexadecimal."""
        content = {
            "scheme": "bfv",
            "model": self.model,
            "labels": self.labels,
            "parameters": self.parameters.content,
            "plain_moduli": self.plain_moduli,
            "layouts": [
                [layout.positions.tolist(), np.flatnonzero(layout.flags).tolist(), layout.period, layout.ciphertexts,
                 layout.images]
                for layout in (self.input_layout, self.output_layout)
            ],
            "scales": [self.input_scale.hex(), self.output_scale.hex()],
            "output_level": self.output_level,
            "keys": self.keys,
            "preprocessing": self.preprocessing_digest,
            "bounds": [self.input_range, str(self.largest_logit), self.proven, self.quantisation_error.hex()],
        }  # fmt: skip
        return digest(content)


@dataclass(frozen=True, eq=False)
class BfvPlan:
    """How one quantised network runs under BFV, weights included; stays with whoever owns the model.

    Attributes
    ----------
    public:
        The half that clients receive.
    steps:
        Linear, Square, Linear, …
    noise_budgets:
        Predicted bits of noise budget that are left after each step, for the plaintext modulus that leaves least.
    step_magnitudes:
        For each step the largest absolute integer that any valid input can make (worst case).
    step_measured:
        The same for calibration data, from the network's measured magnitudes; None when nothing was measured.
    reasons:
        Why the parameters are what they are, one sentence each.
    weight_scales:
        What the weights of each affine map were multiplied by before they were rounded.
    """

    public: PublicBfvPlan
    steps: tuple[BfvStep, ...]
    noise_budgets: tuple[float, ...]
    step_magnitudes: tuple[int, ...]
    step_measured: tuple[int, ...] | None
    reasons: tuple[str, ...]
    weight_scales: tuple[float, ...] = ()

    @property
    def parameters(self) -> Parameters:
        """Degree and modulus chain."""
        return self.public.parameters


def check_exact_numbers(moduli: tuple[int, ...], largest_logit: int, scales: tuple[float, float]) -> None:
    """Make sure that logits fit their plaintext moduli, and that the scales of input and output are some.

    Raises
    ------
    PlanError
        If they do not, or are none.
    """
    if not 0 < 2 * largest_logit < math.prod(moduli):
        raise PlanError(f"logits up to {largest_logit} do not fit the plaintext moduli; take one more")
    if not all(0 < scale < math.inf for scale in scales):
        raise PlanError(f"scales {scales[0]:g} and {scales[1]:g}; expected positive numbers")


def check_plain_moduli(moduli: tuple[int, ...], parameters: Parameters) -> None:
    """Make sure that plaintext moduli are distinct primes that slots exist for and that no chain prime equals.

    Raises
    ------
    PlanError
        If they are not.
    """
    if not 1 <= len(moduli) <= MOST_PLAIN_MODULI or len(set(moduli)) != len(moduli):
        raise PlanError(f"{len(moduli)} plaintext moduli; expected 1 to {MOST_PLAIN_MODULI}, all different")
    for modulus in moduli:
        if not 2 < modulus < 1 << LARGEST_PLAIN_BITS or modulus % (2 * parameters.degree) != 1 or not is_prime(modulus):
            raise PlanError(
                f"plaintext modulus {modulus} is no prime below 2^{LARGEST_PLAIN_BITS} that is 1 modulo "
                f"{2 * parameters.degree}; without that there are no slots"
            )
        if modulus in (*parameters.data_primes, parameters.special_prime):
            raise PlanError(f"plaintext modulus {modulus} also stands in the modulus chain; choose another")


def centred(values: npt.ArrayLike, modulus: int) -> Integers:
    """Reduce integers of any size to (-t/2, t/2], int64; Python integers beyond int64 come as arrays of objects."""
    reduced = np.asarray(values, dtype=object) % modulus
    found: Integers = np.where(reduced > modulus // 2, reduced - modulus, reduced).astype(np.int64)
    return found


def combine(residues: Sequence[npt.NDArray[np.generic]], moduli: Iterable[int]) -> npt.NDArray[np.object_]:
    """Put residues together by the Chinese remainder theorem, centred around zero: Python integers.

    Parameters
    ----------
    residues:
        One array for each modulus, all of one shape.
    moduli:
        Distinct primes.
    """
    listed = tuple(moduli)
    product = math.prod(listed)
    total = np.zeros(np.shape(residues[0]), dtype=object)
    for residue, modulus in zip(residues, listed, strict=True):
        others = product // modulus
        total = (total + np.asarray(residue).astype(object) * (others * pow(others, -1, modulus))) % product
    return np.where(total > product // 2, total - product, total)


def pack_rows(layout: Layout, values: npt.ArrayLike) -> Integers:
    """Lay integers into both rows: one image each, or one image's two halves, or the same image twice.

    Parameters
    ----------
    layout:
        Where values lie.
    values:
        Integers below 2^53 in absolute value, all values of all images.

    Returns
    -------
    int64 array, shape (ciphertexts, 2, slots)
    """
    slots = layout.pack(values)
    second = slots.imag if layout.images == 2 or layout.mixes else slots.real
    return np.rint(np.stack([slots.real, second], axis=1)).astype(np.int64)


def read_rows(layout: Layout, rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return every copy of every value from rows of shape (ciphertexts, 2, slots), shape (images, copies, values).

    Both rows count as copies where they hold the same image. Of an exact evaluation all copies are equal.
    """
    shape = (layout.ciphertexts, 2, layout.copies, layout.period)
    found = np.asarray(rows).reshape(shape).transpose(1, 2, 0, 3).reshape(2, layout.copies, -1)[..., layout.positions]
    if layout.images == 2:
        return found
    return found.reshape(1, 2 * layout.copies, -1)
