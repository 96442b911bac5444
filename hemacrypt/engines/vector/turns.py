"""Whole key switches over QP, barriers included: one call from Python for each, however many threads share it.

Numba spends some microseconds on every call from Python, about as long as one transform takes; a request makes a
hundred and fifty calls less like this.
"""

from __future__ import annotations

from typing import Any

from hemacrypt.engines.vector.kernels import (
    divide_both,
    divide_special,
    fold_both,
    fold_special,
    lift,
    lower,
    rotate_add,
)
from hemacrypt.engines.vector.modular import kernel, share
from hemacrypt.engines.vector.team import meet


@kernel
def _decompose(second: Any, coefficients: Any, digits: Any, tables: Any, words: Any, part: Any, parts: Any) -> Any:
    lower(second, coefficients, tables, part, parts)
    if not meet(words, parts):
        return False
    lift(second, coefficients, digits, tables, part, parts)
    return meet(words, parts)


@kernel
def _divide(polynomial: Any, second: Any, tables: Any, words: Any, part: Any, parts: Any) -> Any:
    """Divide one polynomial (k + 1, N) by the special prime into (k, N); its last row is changed."""
    both = polynomial.reshape(1, polynomial.shape[0], polynomial.shape[1])
    fold_special(both, tables, part, parts)
    if not meet(words, parts):
        return False
    divide_special(both, second.reshape(1, second.shape[0], second.shape[1]), tables, part, parts)
    return meet(words, parts)


@kernel
def _copy(polynomial: Any, scratch: Any, part: Any, parts: Any) -> None:
    start, stop = share(polynomial.shape[0], part, parts)
    for row in range(start, stop):
        scratch[row, :] = polynomial[row]


@kernel
def open_fresh(second: Any, coefficients: Any, digits: Any, tables: Any, words: Any, part: Any, parts: Any) -> Any:
    """Decompose a polynomial that is not over QP.

    Parameters
    ----------
    second:
        Shape (k, N).
    coefficients:
        Working memory, shape (k, N).
    digits:
        Written; shape (k, k + 1, N).
    words:
        The team's words; see `team.meet`.

    Returns
    -------
    Whether all parts came to every barrier.
    """
    return _decompose(second, coefficients, digits, tables, words, part, parts)


@kernel
def open_copy(
    polynomial: Any,
    scratch: Any,
    second: Any,
    coefficients: Any,
    digits: Any,
    tables: Any,
    words: Any,
    part: Any,
    parts: Any,
) -> Any:
    """Decompose a polynomial over QP; see `open_fresh`.

    Parameters
    ----------
    polynomial:
        Shape (k + 1, N).
    scratch, second:
        Working memory, shapes (k + 1, N) and (k, N).
    """
    _copy(polynomial, scratch, part, parts)
    if not meet(words, parts) or not _divide(scratch, second, tables, words, part, parts):
        return False
    return _decompose(second, coefficients, digits, tables, words, part, parts)


@kernel
def switch(
    second: Any,
    first: Any,
    keys: Any,
    orders: Any,
    base: Any,
    out: Any,
    coefficients: Any,
    digits: Any,
    tables: Any,
    words: Any,
    part: Any,
    parts: Any,
) -> Any:
    """Switch keys of a polynomial that is not over QP and add the result.

    Parameters
    ----------
    second:
        The polynomial, shape (k, N).
    first, keys, orders, base, out:
        As in `kernels.rotate_add`.
    coefficients, digits, words:
        As in `open_fresh`; the digits are working memory here.
    """
    if not _decompose(second, coefficients, digits, tables, words, part, parts):
        return False
    rotate_add(digits, first, keys, orders, base, out, tables, part, parts)
    return meet(words, parts)


@kernel
def turn(
    total: Any,
    keys: Any,
    orders: Any,
    base: Any,
    out: Any,
    keep: Any,
    scratch: Any,
    second: Any,
    coefficients: Any,
    digits: Any,
    tables: Any,
    words: Any,
    part: Any,
    parts: Any,
) -> Any:
    """Turn a ciphertext over QP in several ways and add the results to another; see `kernels.rotate_add`.

    Parameters
    ----------
    total:
        The ciphertext, shape (2, k + 1, N); lost unless ``keep`` is set.
    keys, orders, base, out:
        As in `kernels.rotate_add`.
    scratch, second, coefficients, digits, words:
        As in `open_copy`.
    """
    polynomial = total[1]
    if keep:
        _copy(polynomial, scratch, part, parts)
        if not meet(words, parts):
            return False
        polynomial = scratch
    if not _divide(polynomial, second, tables, words, part, parts):
        return False
    first = total[0]
    return switch(second, first, keys, orders, base, out, coefficients, digits, tables, words, part, parts)


@kernel
def finish(total: Any, biases: Any, out: Any, tables: Any, words: Any, part: Any, parts: Any) -> Any:
    """Divide a ciphertext over QP by the special prime and by the last data prime, then add a plaintext.

    Parameters
    ----------
    total:
        Shape (2, k + 1, N); lost.
    biases:
        Shape (k - 1, N), or (0, N) for none.
    out:
        Written; shape (2, k - 1, N).
    """
    fold_both(total, tables, part, parts)
    if not meet(words, parts):
        return False
    divide_both(total, out, tables, part, parts)
    if not meet(words, parts):
        return False
    start, stop = share(biases.shape[0], part, parts)
    for row in range(start, stop):
        prime, x, y = tables[0][row], out[0, row], biases[row]
        for n in range(x.shape[0]):
            value = x[n] + y[n]
            x[n] = min(value, value - prime)
    return meet(words, parts)
