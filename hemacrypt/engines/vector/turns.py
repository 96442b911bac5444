"""Whole key switches over QP, barriers included: one call from Python for each, however many threads share it.

Numba spends some microseconds on every call from Python, about as long as one transform takes; a request makes a
hundred and fifty calls less like this.
"""

from __future__ import annotations

from typing import Any

from hemacrypt.engines.vector.kernels import (
    divide_both,
    fold_both,
    lift,
    lift_all,
    lower,
    lower_over_qp,
    rotate_add,
    scale_down,
)
from hemacrypt.engines.vector.modular import kernel, share
from hemacrypt.engines.vector.team import meet


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
        Written; shape (k, k + 1, N or more).
    words:
        The team's words; see `team.meet`.

    Returns
    -------
    Whether all parts came to every barrier.
    """
    lower(second, coefficients, tables, part, parts)
    if not meet(words, parts):
        return False
    lift(second, coefficients, digits, tables, part, parts)
    return meet(words, parts)


@kernel
def open_copy(
    polynomial: Any, over: Any, coefficients: Any, digits: Any, tables: Any, words: Any, part: Any, parts: Any
) -> Any:
    """Divide a polynomial over QP by the special prime and decompose it; see `open_fresh`.

    The division takes place among coefficients, where the decomposition needs them.

    Parameters
    ----------
    polynomial:
        Shape (k + 1, N).
    over, coefficients:
        Working memory, shapes (k + 1, N) and (k, N).
    """
    lower_over_qp(polynomial, over, tables, part, parts)
    if not meet(words, parts):
        return False
    scale_down(over, coefficients, tables, part, parts)
    if not meet(words, parts):
        return False
    lift_all(coefficients, digits, tables, part, parts)
    return meet(words, parts)


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
    if not open_fresh(second, coefficients, digits, tables, words, part, parts):
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
    over: Any,
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
        The ciphertext, shape (2, k + 1, N).
    keys, orders, base, out:
        As in `kernels.rotate_add`; ``base`` may be ``total``.
    over, coefficients, digits, words:
        As in `open_copy`.
    """
    if not open_copy(total[1], over, coefficients, digits, tables, words, part, parts):
        return False
    rotate_add(digits, total[0], keys, orders, base, out, tables, part, parts)
    return meet(words, parts)


@kernel
def horner(
    sums: Any,
    keys: Any,
    orders: Any,
    even: Any,
    odd: Any,
    over: Any,
    coefficients: Any,
    digits: Any,
    tables: Any,
    words: Any,
    part: Any,
    parts: Any,
) -> Any:
    """Add up inner sums by Horner's rule: the last one turned and added to the one before, and so on.

    Parameters
    ----------
    sums:
        Ciphertexts over QP, shape (sums, 2, k + 1, N).
    keys, orders:
        The one key of the turn, as in `kernels.rotate_add`.
    even, odd:
        Two ciphertexts over QP. With s sums the result lies in ``even`` if s is even, else in ``odd``.
    over, coefficients, digits, words:
        As in `open_copy`.
    """
    last = sums.shape[0] - 1
    for number in range(last - 1, -1, -1):
        given = sums[last] if number == last - 1 else (even if (last - number) % 2 == 0 else odd)
        out = even if (last - number) % 2 else odd
        base = sums[number]
        if not turn(given, keys, orders, base, out, over, coefficients, digits, tables, words, part, parts):
            return False
    return True


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
