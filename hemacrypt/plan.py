"""The plan: how one network runs under CKKS. Plain data — the planner writes it, engines and clients read it.

*Level* l means that the primes q_0 … q_l are left; a fresh ciphertext has the highest level and every rescale takes
one level away. Rotations are to the left: after a rotation by k, slot s holds what slot s + k held before.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import PlanError
from hemacrypt.network import Array
from hemacrypt.security import LARGEST_MODULUS_BITS, check_security

PRIME_LIMIT = 1 << 30
# Far more primes than any secure modulus below 2^30 a prime can have; bounds what a stranger may ask us to check.
_MOST_PRIMES = 64


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

    def parms_id(self, level: int | None = None) -> bytes:
        """Return SEAL's name for the parameters at a level, 32 bytes; None names the key level, special prime included.

        SEAL 4, ``EncryptionParameters::compute_parms_id``: BLAKE2b-256 over the 64-bit words scheme (2 is CKKS),
        degree, primes, plain modulus (0 in CKKS).
        """
        key_level = (*self.data_primes, self.special_prime)
        primes = key_level if level is None else self.data_primes[: level + 1]
        words = (2, self.degree, *primes, 0)
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

    def galois_element(self, step: int) -> int:
        """Return the automorphism X -> X^g that rotates by ``step`` slots to the left: g = 3^step mod 2N."""
        return pow(3, step, 2 * self.degree)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the values of a layer lie in the slots.

    Parameters
    ----------
    positions:
        Value i lies in slot ``positions[i]``; distinct, below ``period``.
    period:
        The same content repeats every ``period`` slots; divides ``slots``.
    slots:
        Number of slots of the ciphertext.

    Raises
    ------
    PlanError
        If positions repeat or lie outside the period.
    """

    positions: npt.NDArray[np.int64]
    period: int
    slots: int

    def __post_init__(self) -> None:
        positions = np.array(self.positions, dtype=np.int64)
        if positions.ndim != 1 or positions.size == 0:
            raise PlanError(f"a layout needs a list of positions; got shape {positions.shape}")
        if self.period < 1 or self.slots % self.period or positions.min() < 0 or positions.max() >= self.period:
            raise PlanError(f"positions must lie in a period that divides {self.slots} slots; period is {self.period}")
        if np.unique(positions).size != positions.size:
            raise PlanError("two values share a slot; every value needs its own")
        positions.setflags(write=False)
        object.__setattr__(self, "positions", positions)

    @property
    def copies(self) -> int:
        """How often the content stands in the slots."""
        return self.slots // self.period

    def pack(self, values: npt.ArrayLike) -> Array:
        """Lay values into slots, shape (values,) -> (slots,); slots without a value are zero."""
        block, flat = np.zeros(self.period), np.asarray(values, dtype=np.float64).reshape(-1)
        if flat.size != self.positions.size:
            raise PlanError(f"got {flat.size} values; this layout holds {self.positions.size}")
        block[self.positions] = flat
        return np.tile(block, self.copies)

    def unpack(self, slots: npt.ArrayLike) -> Array:
        """Read values from slots, shape (slots,) -> (values,), as the mean over all copies.

        The rounding noise of the last rescale differs from copy to copy, so the mean has less of it.
        """
        means: Array = self._copies(slots).mean(axis=0)
        return means

    def spread(self, slots: npt.ArrayLike) -> float:
        """Return how far a copy of a value lies from the mean of its copies at most."""
        copies = self._copies(slots)
        return float(np.abs(copies - copies.mean(axis=0)).max())

    def _copies(self, slots: npt.ArrayLike) -> Array:
        return np.asarray(slots, dtype=np.float64).reshape(self.copies, self.period)[:, self.positions]


@dataclass(frozen=True)
class Baby:
    """One rotated copy of a layer's input: the copy number ``parent`` rotated by ``step``."""

    parent: int
    step: int


@dataclass(frozen=True)
class Term:
    """One product of the inner sum: diagonal number ``diagonal`` times rotated copy number ``baby``."""

    baby: int
    diagonal: int


@dataclass(frozen=True, eq=False)
class LinearStep:
    """An affine map by generalised diagonals, baby-step giant-step, then rotate-and-sum, rescale, bias.

    With ``giants`` = (G_0, …, G_m), inner sums P_g = sum over terms of diagonal * baby and t = ``giant_step``, the map
    is rot_t(… rot_t(rot_t(P_m) + P_{m-1}) …) + P_0: Horner's rule, so a single Galois key serves all giant steps
    (Halevi and Shoup, "Faster homomorphic linear transformations in HElib", 2018, §4). For every k in ``sums`` the
    result is then replaced by itself plus itself rotated by k — before the rescale, where the scale is highest and the
    noise of a key switch weighs least.

    Attributes
    ----------
    name:
        What the layer is, for people.
    level:
        Level of the input; the output has one less.
    babies:
        Rotated copies; number 0 is the input itself.
    giants:
        Terms of each inner sum, from giant step 0 upwards.
    giant_step:
        Rotation between two inner sums, 0 when there is one only.
    sums:
        Rotations of the rotate-and-sum, in order.
    diagonals:
        Shape (number, slots), already rotated to where Horner's rule needs them.
    bias:
        Shape (slots,).
    input_scale, weight_scale, output_scale:
        Scales of the input, of the encoded diagonals, and after the rescale.
    """

    name: str
    level: int
    babies: tuple[Baby, ...]
    giants: tuple[tuple[Term, ...], ...]
    giant_step: int
    sums: tuple[int, ...]
    diagonals: Array
    bias: Array
    input_scale: float
    weight_scale: float
    output_scale: float

    @property
    def rotation_steps(self) -> tuple[int, ...]:
        """Every rotation that is carried out, in order, repetitions included."""
        babies = tuple(baby.step for baby in self.babies[1:])
        return babies + (self.giant_step,) * (len(self.giants) - 1) + self.sums

    @property
    def multiplications(self) -> int:
        """Number of products with an encoded diagonal."""
        return len(self.diagonals)


@dataclass(frozen=True)
class SquareStep:
    """Square every slot, relinearise, rescale."""

    level: int
    input_scale: float
    output_scale: float
    name: str = "square"

    @property
    def rotation_steps(self) -> tuple[int, ...]:
        """A square rotates nothing."""
        return ()

    @property
    def multiplications(self) -> int:
        """One product of two ciphertexts."""
        return 1


Step = LinearStep | SquareStep


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
    rotation_steps:
        Rotations that need a Galois key, ascending.
    needs_relinearisation:
        Whether the network squares anything.
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
    input_layout: Layout
    output_layout: Layout
    input_scale: float
    output_scale: float
    rotation_steps: tuple[int, ...]
    needs_relinearisation: bool
    logit_error_bound: float
    logit_limit: float
    preprocessing_digest: str = ""

    def __post_init__(self) -> None:
        slots = self.parameters.slots
        if self.input_layout.slots != slots or self.output_layout.slots != slots:
            raise PlanError(f"layouts have other slots than the {slots} of degree {self.parameters.degree}")
        if len(self.labels) != len(self.output_layout.positions):
            raise PlanError(f"{len(self.labels)} labels for {len(self.output_layout.positions)} logits")
        if any(not 0 < step < slots for step in self.rotation_steps):
            raise PlanError(f"rotation steps must lie between 1 and {slots - 1}")
        if list(self.rotation_steps) != sorted(set(self.rotation_steps)):
            raise PlanError("rotation steps must be ascending and distinct")
        for scale, level in ((self.input_scale, self.parameters.top_level), (self.output_scale, 0)):
            if not 1 <= scale < 2 ** self.parameters.bits_at(level):
                raise PlanError(f"scale {scale:g} does not fit the modulus of level {level}")

    @property
    def copy_tolerance(self) -> float:
        """How far a single copy of a logit may lie from the mean of its copies.

        Copies differ by the rounding of the last rescale (see `hemacrypt.planner.noise`), here twenty standard
        deviations of it (in a slot it is Laplace, not Gaussian: exp(-1.4 k) of all slots lie beyond k),
        and by what the error bound covers.
        """
        rounding = math.sqrt(self.parameters.rescale_variance) / self.output_scale
        return 20 * rounding + 2 * self.logit_error_bound

    @cached_property
    def requirements_id(self) -> str:
        """SHA-256 over all that evaluation keys depend on, hexadecimal: plans that share it share keys."""
        return _digest([self._parameters, self.rotation_steps, self.needs_relinearisation])

    @property
    def _parameters(self) -> list[object]:
        return [self.parameters.degree, self.parameters.data_primes, self.parameters.special_prime]

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 that client and service compare before they compute, hexadecimal."""
        content = {
            "model": self.model,
            "labels": self.labels,
            "parameters": self._parameters,
            "layouts": [
                [layout.positions.tolist(), layout.period] for layout in (self.input_layout, self.output_layout)
            ],
            "scales": [self.input_scale.hex(), self.output_scale.hex()],
            "keys": [self.rotation_steps, self.needs_relinearisation],
            "preprocessing": self.preprocessing_digest,
            "error": [self.logit_error_bound.hex(), self.logit_limit.hex()],
        }
        return _digest(content)


def _digest(content: object) -> str:
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
        Predicted standard deviation of the error after each step, in the units of the network's values.
    step_peaks:
        Largest absolute value expected after each step.
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
    """Tell whether a number below 3.2 * 10^9 is prime (Miller-Rabin; bases of Jaeschke, 1993, decide below that)."""
    if number < 2:
        return False
    for prime in (2, 3, 5, 7):
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
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
