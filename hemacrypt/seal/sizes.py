"""How many bytes SEAL's objects take on the wire, about: what planners compare and services reckon with.

SEAL stores a 30-bit residue in 8 bytes and compresses with zstd; measured are 4.45 bytes for a residue of random bits.
Upper bounds, for what strangers send, are in `hemacrypt.seal.format`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hemacrypt.plan.plan import KeyGroup, Parameters

_BYTES_PER_RESIDUE: Final = 4.45
# The same for keys, a little more than measured: plans are chosen by it, and their names must not change.
_BYTES_PER_KEY_RESIDUE: Final = 4.5
_BYTES_PER_DIGIT: Final = 400


def seeded_ciphertext_bytes(parameters: Parameters, level: int) -> int:
    """Estimate the bytes of a seeded ciphertext."""
    return round(_BYTES_PER_RESIDUE * parameters.degree * (level + 1))


def full_ciphertext_bytes(parameters: Parameters, level: int) -> int:
    """Estimate the bytes of a computed ciphertext, which no seed can stand for."""
    return 2 * seeded_ciphertext_bytes(parameters, level)


def one_key_bytes(degree: int, level: int) -> float:
    """Estimate the bytes of one seeded key for a level: a polynomial over all primes for each digit."""
    return (level + 1) * ((level + 2) * degree * _BYTES_PER_KEY_RESIDUE + _BYTES_PER_DIGIT)


def key_bytes(parameters: Parameters, groups: Iterable[KeyGroup]) -> float:
    """Estimate the bytes of all keys of some groups."""
    return sum(
        (len(group.elements) + group.relinearise) * one_key_bytes(parameters.degree, group.level) for group in groups
    )
