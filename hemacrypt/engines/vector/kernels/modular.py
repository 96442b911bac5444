"""Arithmetic modulo primes below 2^30 in 32-bit lanes: what every kernel is made of.

LLVM turns the loops that use these into AVX-512, AVX2 or NEON. Residues are uint32. A product by a constant that is
known ahead takes Shoup's form: with ``shoup = floor(w * 2^32 / q)`` the quotient is one high product away, and the
result lies below 2q (Harvey, "Faster arithmetic for number-theoretic transforms", 2014, §2). A sum of products, whose
factors both vary, is held in 64 bits and reduced once by Montgomery's method, which divides by 2^32; one factor is
stored multiplied by 2^32 beforehand.

Kernels see public data only — ciphertexts, evaluation keys, weights — so their timing gives nothing away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numba.extending
import numpy as np

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def kernel(function: Kernel) -> Kernel:
    """Compile a function: without the GIL, without bounds checks (lengths are checked before), cached on disk."""
    compiled = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")(function)
    # Numba looks for changes in the file of a function alone, not in those of the kernels that it calls: without this,
    # a changed kernel would go on living inside others that were compiled before.
    compiled._cache._cache_file._source_stamp = sources()
    return cast("Kernel", compiled)


@cache
def sources() -> str:
    """Return a digest of all sources of this package."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that kernels call out of one that generates LLVM code; see `numba.extending.intrinsic`."""
    return cast("Callable[..., Any]", numba.extending.intrinsic(function))


@kernel
def shoup_product(value: Any, factor: Any, shoup: Any, prime: Any) -> Any:
    """Return ``value * factor`` modulo the prime, below twice the prime; ``value`` may be any 32-bit number."""
    quotient = np.uint32((np.uint64(value) * np.uint64(shoup)) >> np.uint64(32))
    return np.uint32(value * factor - quotient * prime)


@kernel
def below(value: Any, bound: Any) -> Any:
    """Subtract ``bound`` once if that leaves no negative number: brings a value below 2 * bound under bound."""
    return min(value, np.uint32(value - bound))


@kernel
def montgomery(total: Any, prime: Any, inverse: Any) -> Any:
    """Return ``total / 2^32`` modulo the prime, below the prime, for totals below 2^63.

    Parameters
    ----------
    total:
        uint64.
    prime:
        uint32, below 2^30.
    inverse:
        uint32, inverse of the prime modulo 2^32.
    """
    multiple = np.uint64(np.uint32(np.uint32(total) * inverse)) * np.uint64(prime)
    # The low halves are equal, so the difference of the high halves is exact; it lies above -q and below 2^31.
    value = np.uint32((total >> np.uint64(32)) + np.uint64(prime) - (multiple >> np.uint64(32)))
    value = below(value, np.uint32(2 * prime))
    return below(value, prime)


@kernel
def companion(factor: Any, prime: Any) -> Any:
    """Return Shoup's companion ``floor(factor * 2^32 / prime)`` of one constant below the prime."""
    return np.uint32((np.uint64(factor) << np.uint64(32)) // np.uint64(prime))


@kernel
def share(total: Any, part: Any, parts: Any) -> Any:
    """Return where share number ``part`` of ``total`` units of work starts and stops; shares differ by one at most."""
    return total * part // parts, total * (part + 1) // parts


def shoup_of(factors: np.typing.NDArray[np.uint64], prime: int) -> np.typing.NDArray[np.uint32]:
    """Return Shoup's companions ``floor(w * 2^32 / q)`` of constants below the prime."""
    return ((factors << np.uint64(32)) // np.uint64(prime)).astype(np.uint32)
