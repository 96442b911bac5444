"""The plan: how one network runs under CKKS. Plain data — the planner writes it, engines and clients read it.

*Level* l means that the primes q_0 … q_l are left; a fresh ciphertext has the highest level and every rescale takes
one level away. Rotations are to the left: after a rotation by k, slot s holds what slot s + k held before. Slots are
complex; a *pair* plan carries a second image in the imaginary parts (docs/adr/0010-complex-slots.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import PlanError
from hemacrypt.model.network import Array, ComplexArray
from hemacrypt.plan.security import LARGEST_MODULUS_BITS, check_security

PRIME_LIMIT = 1 << 30
# Large logits have a scale below one; one below this cannot be meant.
SMALLEST_SCALE = 2.0**-512
# Far more primes than any secure modulus below 2^30 a prime can have; bounds what a stranger may ask us to check.
_MOST_PRIMES = 64
# Squares that are joined as real and imaginary part leave the imaginary one this much larger: i times the square root
# of two is X^(N/4) + X^(3N/4) in every slot, i alone is no small polynomial (SEAL numbers slots by powers of three).
JOIN_FACTOR = math.sqrt(2)


class Turn(NamedTuple):
    """An automorphism of the slots: a rotation to the left, then perhaps complex conjugation."""

    step: int
    conjugate: bool = False

    def __call__(self, slots: ComplexArray) -> ComplexArray:
        """Turn slots in the clear; the last axis holds them."""
        turned = np.roll(slots, -self.step, axis=-1)
        return turned.conj() if self.conjugate else turned


@dataclass(frozen=True)
class Parameters:
    """Degree and modulus chain of a CKKS scheme.

    Parameters
    ----------
    degree:
        Polynomial degree N, a power of two.
    data_primes:
        q_0, q_1, …: q_0 is the last to survive.
    special_prime:
        The prime P that key switching divides by; no ciphertext carries it.

    Raises
    ------
    PlanError
        If a prime is 2^30 or more, not 1 modulo 2N, repeated or composite, or security is below 128 bits.
    """

    degree: int
    data_primes: tuple[int, ...]
    special_prime: int

    def __post_init__(self) -> None:
        primes = (*self.data_primes, self.special_prime)
        if not self.data_primes or len(primes) > _MOST_PRIMES:
            raise PlanError(f"{len(self.data_primes)} data primes; expected 1 to {_MOST_PRIMES - 1}")
        if self.degree not in LARGEST_MODULUS_BITS:
            raise PlanError(f"polynomial degree {self.degree}; expected one of {list(LARGEST_MODULUS_BITS)}")
        if len(set(primes)) != len(primes):
            raise PlanError("the modulus chain repeats a prime; every prime must stand once")
        for prime in primes:
            if not 2 < prime < PRIME_LIMIT or prime % (2 * self.degree) != 1 or not is_prime(prime):
                raise PlanError(f"{prime} is no prime below 2^30 that is 1 modulo {2 * self.degree}")
        check_security(self.degree, self.modulus_bits)

    @property
    def modulus_bits(self) -> int:
        """Bits of the product of all primes, the special one included."""
        return math.prod((*self.data_primes, self.special_prime)).bit_length()

    @property
    def content(self) -> list[object]:
        """What digests of plans are taken over."""
        return [self.degree, self.data_primes, self.special_prime]

    @property
    def prime_bits(self) -> int:
        """Bits of the shortest data prime."""
        return min(self.data_primes).bit_length()

    @property
    def slots(self) -> int:
        """Numbers that one ciphertext holds: N / 2."""
        return self.degree // 2

    @property
    def top_level(self) -> int:
        """Level of a fresh ciphertext."""
        return len(self.data_primes) - 1

    def bits_at(self, level: int) -> float:
        """Return log2 of the ciphertext modulus at a level."""
        return sum(math.log2(prime) for prime in self.data_primes[: level + 1])

    def parms_id(self, level: int | None = None, plain_modulus: int = 0) -> bytes:
        """Return SEAL's name for the parameters at a level, 32 bytes; None names the key level, special prime included.

        SEAL 4, ``EncryptionParameters::compute_parms_id``: BLAKE2b-256 over the 64-bit words scheme (1 is BFV, 2 CKKS),
        degree, primes, plain modulus (0 in CKKS).
        """
        key_level = (*self.data_primes, self.special_prime)
        primes = key_level if level is None else self.data_primes[: level + 1]
        words = (1 if plain_modulus else 2, self.degree, *primes, plain_modulus)
        return hashlib.blake2b(struct.pack(f"<{len(words)}Q", *words), digest_size=32).digest()

    @cached_property
    def slot_exponents(self) -> npt.NDArray[np.int64]:
        """Exponents 3^j mod 2N: slot j is the value at the root of unity to that power; shape (slots,)."""
        exponents = np.ones(1, dtype=np.int64)
        while len(exponents) < self.slots:
            step = pow(3, len(exponents), 2 * self.degree)
            exponents = np.concatenate([exponents, exponents * step % (2 * self.degree)])
        exponents.setflags(write=False)
        return exponents

    @property
    def rescale_variance(self) -> float:
        """Variance in a slot, at scale 1, of rounding both polynomials; the second one meets the ternary secret."""
        return self.degree * (1 + 2 * self.degree / 3) / 24

    def truncated(self, level: int) -> Parameters:
        """Return the chain q_0 … q_level with the same special prime: what keys that are used there are made for."""
        return Parameters(self.degree, self.data_primes[: level + 1], self.special_prime)

    def galois_element(self, step: int, conjugate: bool = False) -> int:
        """Return g of the automorphism X -> X^g that rotates by ``step`` slots to the left: 3^step, or -3^step, mod 2N.

        Parameters
        ----------
        step:
            0 to slots - 1.
        conjugate:
            Whether the slots are conjugated as well.
        """
        element = pow(3, step, 2 * self.degree)
        return 2 * self.degree - element if conjugate else element


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the values of a layer lie in the slots of one or several ciphertexts.

    Parameters
    ----------
    positions:
        Value i lies in ciphertext ``positions[i] // period``, slot ``positions[i] % period``.
    period:
        The same content repeats every ``period`` slots; divides ``slots``.
    slots:
        Number of slots of a ciphertext.
    ciphertexts:
        How many ciphertexts there are.
    imaginary:
        Whether value i is an imaginary part; none is by default.
    factor:
        Imaginary parts hold their value times this.
    images:
        1, or 2: then the real parts hold one image and the imaginary parts another.

    Raises
    ------
    PlanError
        If two values share a place, or one lies outside.
    """

    positions: npt.NDArray[np.int64]
    period: int
    slots: int
    ciphertexts: int = 1
    imaginary: npt.NDArray[np.bool_] | None = None
    factor: float = 1.0
    images: int = 1

    def __post_init__(self) -> None:
        positions = np.array(self.positions, dtype=np.int64)
        if positions.ndim != 1 or positions.size == 0:
            raise PlanError(f"a layout needs a list of positions; got shape {positions.shape}")
        imaginary = np.zeros(positions.shape, bool) if self.imaginary is None else np.array(self.imaginary, dtype=bool)
        if imaginary.shape != positions.shape:
            raise PlanError(f"{imaginary.size} imaginary flags for {positions.size} positions; expected one for each")
        if self.period < 1 or self.slots % self.period or self.ciphertexts < 1:
            raise PlanError(f"period {self.period} in {self.ciphertexts} ciphertexts of {self.slots} slots cannot be")
        if positions.min() < 0 or positions.max() >= self.period * self.ciphertexts:
            raise PlanError(f"positions must lie in {self.ciphertexts} periods of {self.period} slots")
        if np.unique(2 * positions + imaginary).size != positions.size:
            raise PlanError("two values share a slot; every value needs its own")
        if self.images not in (1, 2) or (self.images == 2 and imaginary.any()):
            raise PlanError(f"{self.images} images with {np.count_nonzero(imaginary)} imaginary values cannot be")
        if not 2.0**-16 <= self.factor <= 2.0**16:
            raise PlanError(f"imaginary parts are {self.factor:g} times too large; expected a moderate factor")
        for name, array in (("positions", positions), ("imaginary", imaginary)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def flags(self) -> npt.NDArray[np.bool_]:
        """Whether each value is an imaginary part, shape (values,)."""
        assert self.imaginary is not None  # noqa: S101 - set when the layout was made
        return self.imaginary

    @property
    def mixes(self) -> bool:
        """Whether one image lies in real and imaginary parts alike."""
        return bool(self.flags.any())

    @property
    def copies(self) -> int:
        """How often the content stands in the slots."""
        return self.slots // self.period

    @property
    def ciphertext(self) -> npt.NDArray[np.int64]:
        """Ciphertext of each value, shape (values,)."""
        return self.positions // self.period

    @property
    def slot(self) -> npt.NDArray[np.int64]:
        """Slot of each value within the period, shape (values,)."""
        return self.positions % self.period

    def folded(self) -> Layout:
        """Move half of the values into imaginary parts: every other ciphertext, or the upper half of the period."""
        if self.ciphertexts > 1:
            return self.joined(1.0)
        half = self.period // 2
        return Layout(self.positions % half, half, self.slots, 1, self.positions >= half)

    def joined(self, factor: float) -> Layout:
        """Put two and two ciphertexts together, the second as ``factor`` times the imaginary part of the first."""
        whole, odd = divmod(self.ciphertext, 2)
        count = -(-self.ciphertexts // 2)
        return Layout(whole * self.period + self.slot, self.period, self.slots, count, odd == 1, factor)

    def pack(self, values: npt.ArrayLike) -> ComplexArray:
        """Lay values into slots; slots without a value are zero.

        Parameters
        ----------
        values:
            All values of all images, shape (images, …) or, for one image, (…).

        Returns
        -------
        array, shape (ciphertexts, slots)
        """
        flat = np.asarray(values, dtype=np.float64).reshape(-1)
        if flat.size != self.images * self.positions.size:
            raise PlanError(f"got {flat.size} values; this layout holds {self.images * self.positions.size}")
        real, other = flat[: self.positions.size], flat[self.positions.size :]
        block = np.zeros(self.ciphertexts * self.period, dtype=np.complex128)
        # Part by part: a product of infinity and a complex number would be no number.
        block.real[self.positions[~self.flags]] = real[~self.flags]
        block.imag[self.positions[self.flags]] = self.factor * real[self.flags]
        if self.images == 2:
            block.imag[self.positions] = self.factor * other
        return np.tile(block.reshape(self.ciphertexts, self.period), (1, self.copies))

    def unpack(self, slots: npt.ArrayLike) -> Array:
        """Read values from slots, shape (ciphertexts, slots) -> (images, values), as the mean over all copies.

        The rounding noise of the last rescale differs from copy to copy, so the mean has less of it.
        """
        means: Array = self._copies(slots).mean(axis=1)
        return means

    def spread(self, slots: npt.ArrayLike) -> float:
        """Return how far a copy of a value lies from the mean of its copies at most."""
        copies = self._copies(slots)
        return float(np.abs(copies - copies.mean(axis=1, keepdims=True)).max())

    def rest(self, slots: npt.ArrayLike) -> float:
        """Return the largest absolute value of parts of slots that hold no value: an evaluation leaves them at zero."""
        found = np.asarray(slots, dtype=np.complex128).reshape(self.ciphertexts, self.copies, self.period)
        parts = np.stack([found.real, found.imag]).transpose(0, 2, 1, 3).reshape(2, self.copies, -1)
        unused = np.ones((2, parts.shape[2]), dtype=bool)
        unused[self.flags.astype(np.intp), self.positions] = False
        if self.images == 2:
            unused[1] = unused[0]
        return float(np.abs(parts.transpose(1, 0, 2)[:, unused]).max(initial=0.0))

    def _copies(self, slots: npt.ArrayLike) -> Array:
        """Return every copy of every value, shape (images, copies, values)."""
        given = np.asarray(slots, dtype=np.complex128).reshape(self.ciphertexts, self.copies, self.period)
        found = given.transpose(1, 0, 2).reshape(self.copies, -1)[:, self.positions]
        real = np.where(self.flags, found.imag / self.factor, found.real)
        return np.stack([real, found.imag / self.factor]) if self.images == 2 else real[None]


@dataclass(frozen=True)
class Copy:
    """A rotated copy of a layer's input: the copy number ``parent`` rotated by ``step``; an input is its own parent."""

    parent: int
    step: int


@dataclass(frozen=True)
class Term:
    """One product of an inner sum: diagonal number ``diagonal`` times rotated copy number ``copy``."""

    copy: int
    diagonal: int


@dataclass(frozen=True, eq=False)
class LinearStep:
    """An affine map by generalised diagonals, baby-step giant-step, then turns that are added up, rescale, bias.

    For one output ciphertext with ``giants`` = (G_0, …, G_m), inner sums P_g = sum over terms of diagonal * copy and
    t = ``giant_step``, the map is rot_t(… rot_t(rot_t(P_m) + P_{m-1}) …) + P_0: Horner's rule, so a single Galois key
    serves all giant steps (Halevi and Shoup, "Faster homomorphic linear transformations in HElib", 2018, §4). For every
    group in ``turns`` the result is then replaced by itself plus itself turned by each of the group — before the
    rescale, where the scale is highest and the noise of a key switch weighs least. Groups double the sum of few slots
    (rotate-and-sum) or take twice the real part (conjugation), or both at once.

    Copies with one parent share its decomposition ("hoisting", ibid. §3); parents stand before their children.

    Attributes
    ----------
    name:
        What the layer is, for people.
    level:
        Level of the input; the output has one less.
    inputs:
        Number of input ciphertexts.
    copies:
        Rotated copies; the first ``inputs`` are the inputs themselves.
    giants:
        For each output ciphertext the terms of its inner sums, from giant step 0 upwards.
    giant_step:
        Rotation between two inner sums, 0 when there is one only.
    turns:
        Groups of turns to add, in order.
    diagonals:
        Shape (number, slots), already rotated to where Horner's rule needs them.
    bias:
        Shape (outputs, slots).
    input_scale, weight_scale, output_scale:
        Scales of the input, of the encoded diagonals, and after the rescale.
    """

    name: str
    level: int
    inputs: int
    copies: tuple[Copy, ...]
    giants: tuple[tuple[tuple[Term, ...], ...], ...]
    giant_step: int
    turns: tuple[tuple[Turn, ...], ...]
    diagonals: ComplexArray
    bias: ComplexArray
    input_scale: float
    weight_scale: float
    output_scale: float

    @property
    def outputs(self) -> int:
        """Number of output ciphertexts."""
        return len(self.giants)

    @property
    def rotations(self) -> tuple[Turn, ...]:
        """Every turn that is carried out, repetitions included."""
        copies = tuple(Turn(copy.step) for copy in self.copies[self.inputs :])
        giants = (Turn(self.giant_step),) * sum(len(giants) - 1 for giants in self.giants)
        return copies + giants + tuple(turn for group in self.turns for turn in group) * self.outputs

    @property
    def multiplications(self) -> int:
        """Number of products with an encoded diagonal."""
        return len(self.diagonals)


@dataclass(frozen=True)
class SquareStep:
    """Square, relinearise, rescale.

    ``plain`` squares every ciphertext, whose slots are real. ``joined`` squares real ciphertexts and puts two and two
    together, as real and imaginary part, before the relinearisation. ``parted`` takes real and imaginary part of each
    ciphertext (times two, with one conjugation), squares both and joins them again. A joined imaginary part is
    `JOIN_FACTOR` times too large.
    """

    level: int
    inputs: int
    kind: Literal["plain", "joined", "parted"]
    input_scale: float
    output_scale: float

    @property
    def name(self) -> str:
        """What the step is, for people."""
        return {"plain": "square", "joined": "square, join", "parted": "part, square, join"}[self.kind]

    @property
    def outputs(self) -> int:
        """Number of output ciphertexts."""
        return -(-self.inputs // 2) if self.kind == "joined" else self.inputs

    @property
    def squares(self) -> int:
        """How many ciphertexts are squared."""
        return 2 * self.inputs if self.kind == "parted" else self.inputs

    @property
    def rotations(self) -> tuple[Turn, ...]:
        """Conjugations that part real and imaginary part."""
        return (Turn(0, True),) * self.inputs if self.kind == "parted" else ()

    @property
    def multiplications(self) -> int:
        """Number of products of two ciphertexts."""
        return self.squares

    @staticmethod
    def gain(kind: str) -> float:
        """Return what the squares are too large by: parting doubles both parts."""
        return 4.0 if kind == "parted" else 1.0


Step = LinearStep | SquareStep


class KeyGroup(NamedTuple):
    """Evaluation keys that are used at one level, made for its modulus chain alone.

    Attributes
    ----------
    level:
        The level.
    relinearise:
        Whether a relinearisation key is among them.
    elements:
        Galois elements, ascending.
    """

    level: int
    relinearise: bool
    elements: tuple[int, ...]


def key_groups(parameters: Parameters, steps: Sequence[Step]) -> tuple[KeyGroup, ...]:
    """Collect the keys that steps use, highest level first."""
    groups: list[KeyGroup] = []
    for level in range(parameters.top_level, -1, -1):
        here = [step for step in steps if step.level == level]
        elements = {parameters.galois_element(*turn) for step in here for turn in step.rotations}
        squares = any(isinstance(step, SquareStep) for step in here)
        if elements or squares:
            groups.append(KeyGroup(level, squares, tuple(sorted(elements))))
    return tuple(groups)


def united(plans: Iterable[tuple[KeyGroup, ...]]) -> tuple[KeyGroup, ...]:
    """Return the keys that serve all of several plans."""
    found: dict[int, KeyGroup] = {}
    for groups in plans:
        for group in groups:
            before = found.get(group.level, KeyGroup(group.level, False, ()))
            elements = tuple(sorted({*before.elements, *group.elements}))
            found[group.level] = KeyGroup(group.level, before.relinearise or group.relinearise, elements)
    return tuple(found[level] for level in sorted(found, reverse=True))


def without_repeats(groups: Sequence[KeyGroup]) -> tuple[KeyGroup, ...]:
    """Leave out keys that a higher level has too: cut to fewer primes it serves every lower level."""
    left: list[KeyGroup] = []
    relinearises, known = False, set[int]()
    for group in groups:
        elements = tuple(element for element in group.elements if element not in known)
        relinearise = group.relinearise and not relinearises
        if elements or relinearise:
            left.append(KeyGroup(group.level, relinearise, elements))
        relinearises, known = relinearises or relinearise, known | set(elements)
    return tuple(left)


def check_key_groups(parameters: Parameters, groups: Sequence[KeyGroup]) -> None:
    """Make sure that key groups contradict neither each other nor the parameters.

    Raises
    ------
    PlanError
        If they do.
    """
    levels = [group.level for group in groups]
    if levels != sorted(set(levels), reverse=True) or not set(levels) <= set(range(len(parameters.data_primes))):
        raise PlanError("key groups must stand in descending order of their levels, each level once")
    for group in groups:
        if not group.elements and not group.relinearise:
            raise PlanError(f"the key group of level {group.level} has no keys; leave it out")
        if list(group.elements) != sorted(set(group.elements)):
            raise PlanError("Galois elements must be ascending and distinct")
        if any(element % 2 == 0 or not 1 < element < 2 * parameters.degree for element in group.elements):
            raise PlanError(f"Galois elements must be odd and lie between 3 and {2 * parameters.degree - 1}")


def requirements_id(parameters: Parameters, keys: Sequence[KeyGroup]) -> str:
    """Return the SHA-256 over all that evaluation keys depend on, hexadecimal: plans that share it share keys."""
    return digest([parameters.content, keys])


@dataclass(frozen=True, eq=False)
class PublicPlan:
    """The half of a plan that a client receives: no weights, nothing derived from them but sizes.

    Attributes
    ----------
    model:
        Name of the model.
    labels:
        What each logit stands for.
    parameters:
        Degree and modulus chain.
    input_layout, output_layout:
        Slots of the image's values and of the logits.
    input_scale, output_scale:
        Scale of the fresh ciphertext and of the reply.
    keys:
        Evaluation keys that the service needs, highest level first; they may serve other plans of the model as well.
    logit_error_bound:
        Predicted bound on the error of a decrypted logit, for all images that the guard lets pass.
    logit_limit:
        Logits beyond this absolute value do not fit the last modulus.
    copy_error_bound:
        Predicted bound on the error of a single copy of a logit, but for the rounding of the last rescale.
    preprocessing_digest:
        SHA-256 of the preprocessing that makes the input, hexadecimal; empty when none is declared.
    guard_limit:
        When above 0, a value more follows the logits, the *guard*: how large the values before the last square were
        (their squares' sum). Beyond this limit an image is unlike all that were calibrated on, and no bound holds.
    logit_error_floor:
        The bound where the guard is 0; between, the square of the bound grows with the guard.
    """

    model: str
    labels: tuple[str, ...]
    parameters: Parameters
    input_layout: Layout
    output_layout: Layout
    input_scale: float
    output_scale: float
    keys: tuple[KeyGroup, ...]
    logit_error_bound: float
    logit_limit: float
    copy_error_bound: float
    preprocessing_digest: str = ""
    guard_limit: float = 0.0
    logit_error_floor: float = 0.0

    def __post_init__(self) -> None:
        slots = self.parameters.slots
        if not (0 <= self.guard_limit < math.inf and 0 <= self.logit_error_floor <= self.logit_error_bound):
            raise PlanError(
                f"guard limit {self.guard_limit:g}, error from {self.logit_error_floor:g} to "
                f"{self.logit_error_bound:g}; expected finite numbers in ascending order"
            )
        if self.input_layout.slots != slots or self.output_layout.slots != slots:
            raise PlanError(f"layouts have other slots than the {slots} of degree {self.parameters.degree}")
        if len(self.labels) + self.guards != len(self.output_layout.positions):
            raise PlanError(
                f"{len(self.labels)} labels and {self.guards} guards for {len(self.output_layout.positions)} values"
            )
        if self.input_layout.images != self.output_layout.images:
            raise PlanError(f"{self.input_layout.images} images in, {self.output_layout.images} out; expected as many")
        check_key_groups(self.parameters, self.keys)
        top = self.parameters.top_level
        for least, scale, level in ((1.0, self.input_scale, top), (SMALLEST_SCALE, self.output_scale, 0)):
            if not least <= scale < 2 ** self.parameters.bits_at(level):
                raise PlanError(f"scale {scale:g} does not fit the modulus of level {level}")
        # Imaginary parts may be 2^16 times too large; nothing else keeps logits from filling the last prime.
        if self.logit_limit * self.output_scale < self.parameters.data_primes[0] / 2**18:
            raise PlanError(f"logits up to {self.logit_limit:g} need no scale as small as {self.output_scale:g}")

    @property
    def images(self) -> int:
        """How many images one request carries."""
        return self.input_layout.images

    @property
    def guards(self) -> int:
        """How many values follow the logits: 1, or 0 without a guard."""
        return int(self.guard_limit > 0)

    def error_bounds(self, guards: Array) -> Array:
        """Return the bound on the error of a logit for images whose guards have these values, shape (images,)."""
        if not self.guards:
            return np.full(np.shape(guards), self.logit_error_bound)
        used = np.maximum(np.asarray(guards) / self.guard_limit, 0)
        floor = self.logit_error_floor**2
        bounds: Array = np.sqrt(floor + (self.logit_error_bound**2 - floor) * used)
        return bounds

    @property
    def input_ciphertexts(self) -> int:
        """How many ciphertexts a request consists of."""
        return self.input_layout.ciphertexts

    @property
    def output_ciphertexts(self) -> int:
        """How many ciphertexts a reply consists of."""
        return self.output_layout.ciphertexts

    @property
    def galois_keys(self) -> int:
        """How many Galois keys there are in all."""
        return sum(len(group.elements) for group in self.keys)

    @property
    def copy_tolerance(self) -> float:
        """How far a single copy of a logit may lie from the mean of its copies.

        Copies differ by the rounding of the last rescale (see `hemacrypt.planner.noise`), here twenty standard
        deviations of it (in a slot it is Laplace, not Gaussian: exp(-1.4 k) of all slots lie beyond k),
        and by what was there before.
        """
        rounding = math.sqrt(self.parameters.rescale_variance) / self.output_scale
        return 20 * rounding + 2 * self.copy_error_bound

    @cached_property
    def requirements_id(self) -> str:
        """SHA-256 over all that evaluation keys depend on, hexadecimal: plans that share it share keys."""
        return requirements_id(self.parameters, self.keys)

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 that client and service compare before they compute, hexadecimal."""
        content = {
            "model": self.model,
            "labels": self.labels,
            "parameters": self.parameters.content,
            "layouts": [
                [
                    layout.positions.tolist(),
                    np.flatnonzero(layout.flags).tolist(),
                    [layout.period, layout.ciphertexts, layout.images, layout.factor.hex()],
                ]
                for layout in (self.input_layout, self.output_layout)
            ],
            "scales": [self.input_scale.hex(), self.output_scale.hex()],
            "keys": self.keys,
            "preprocessing": self.preprocessing_digest,
            "error": [
                bound.hex()
                for bound in (
                    self.logit_error_bound,
                    self.logit_limit,
                    self.copy_error_bound,
                    self.guard_limit,
                    self.logit_error_floor,
                )
            ],
        }
        return digest(content)


def digest(content: object) -> str:
    """Return the SHA-256 by which client and service compare plain values, hexadecimal."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Plan:
    """How one network runs under CKKS, weights included; stays with whoever owns the model.

    Attributes
    ----------
    public:
        The half that clients receive.
    steps:
        Linear, Square, Linear, …
    step_errors:
        Predicted standard deviation of the error after each step, in the units of the plan's values: those of the
        logits are the network's own, those between the layers are powers of two
        (`hemacrypt.planner.latency.normalise`).
    step_peaks:
        Largest absolute value expected after each step, in the same units.
    calibrated:
        Whether the peaks were measured; if not, they are worst-case bounds.
    reasons:
        Why the parameters are what they are, one sentence each.
    """

    public: PublicPlan
    steps: tuple[Step, ...]
    step_errors: tuple[float, ...]
    step_peaks: tuple[float, ...]
    calibrated: bool
    reasons: tuple[str, ...]

    @property
    def parameters(self) -> Parameters:
        """Degree and modulus chain."""
        return self.public.parameters


def is_prime(number: int) -> bool:
    """Tell whether a number below 2^64 is prime: Miller-Rabin with the first twelve primes, which decide there.

    Source: Sorenson and Webster, "Strong pseudoprimes to twelve prime bases", 2015.
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if number < 2:
        return False
    for prime in bases:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    # Four of them suffice below 3.2 * 10^9 (Jaeschke, "On strong pseudoprimes to several bases", 1993).
    for base in bases[: 4 if number < 3_200_000_000 else None]:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True
