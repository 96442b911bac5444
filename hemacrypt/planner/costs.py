"""What an operation costs, to compare layouts; fitted to SEAL without AVX-512 at degree 8192 on one core."""

from __future__ import annotations

from collections.abc import Iterable

from hemacrypt.plan import LinearStep, Parameters, Step


def rotation_ms(degree: int, level: int) -> float:
    """Return the milliseconds of one key switch: quadratic in the primes, for each digit meets every prime."""
    primes = level + 1
    return (0.075 * primes * (primes + 1) + 0.375 * primes) * degree / 8192


def multiplication_ms(degree: int, level: int) -> float:
    """Return the milliseconds of one product with an encoded diagonal, its addition included."""
    return 0.055 * (level + 1) * degree / 8192


def rescale_ms(degree: int, level: int) -> float:
    """Return the milliseconds of one rescale."""
    return 0.18 * (level + 1) * degree / 8192


def linear_ms(degree: int, level: int, rotations: int, multiplications: int) -> float:
    """Return the milliseconds of an affine map."""
    work = rotations * rotation_ms(degree, level) + multiplications * multiplication_ms(degree, level)
    return work + rescale_ms(degree, level)


def step_ms(parameters: Parameters, step: Step) -> float:
    """Return the estimated milliseconds of one step of a plan."""
    degree = parameters.degree
    if isinstance(step, LinearStep):
        return linear_ms(degree, step.level, len(step.rotation_steps), step.multiplications)
    square = 2 * multiplication_ms(degree, step.level)
    return square + rotation_ms(degree, step.level) + rescale_ms(degree, step.level)


def plan_ms(parameters: Parameters, steps: Iterable[Step]) -> float:
    """Return the estimated milliseconds of a whole evaluation."""
    return sum(step_ms(parameters, step) for step in steps)
