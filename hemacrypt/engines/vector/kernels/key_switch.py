"""Whole layers over QP, barriers included: one call from Python for each, however many threads share it.

Every return to Python takes the GIL again, and threads that come back together wait for each other, longer than some
transforms take. So a layer is one call.
"""

from __future__ import annotations

from typing import Any

from hemacrypt.engines.vector.kernels.barrier import meet
from hemacrypt.engines.vector.kernels.modular import kernel, share
from hemacrypt.engines.vector.kernels.polynomials import (
    divide_both,
    divide_rows,
    divide_special,
    fold_both,
    fold_row,
    fold_special,
    lift,
    lift_all,
    lift_first,
    lower,
    lower_over_qp,
    part_both,
    rotate_add,
    rotate_and_sum,
    scale_down,
    square,
    square_join,
)


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
    lower(second, coefficients, tables, True, part, parts)
    if not meet(words, parts):
        return False
    lift(second, coefficients, digits, tables, True, part, parts)
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
def finish(total: Any, biases: Any, out: Any, tables: Any, words: Any, part: Any, parts: Any) -> Any:
    """Divide a ciphertext over QP by the special prime and by the last data primes, then add a plaintext.

    Parameters
    ----------
    total:
        Shape (2, k + 1, N); lost.
    biases:
        Shape (primes that are left, N), or (0, N) for none.
    out:
        Written; shape (2, primes that are left, N): one prime less than k is CKKS' rescale, BFV may keep all or less.
    """
    if out.shape[1] == total.shape[1] - 2:
        fold_both(total, tables, part, parts)
        if not meet(words, parts):
            return False
        divide_both(total, out, tables, part, parts)
    elif not _divide_each(total, out, tables, words, part, parts):
        return False
    if not meet(words, parts):
        return False
    start, stop = share(biases.shape[0], part, parts)
    for row in range(start, stop):
        prime, x, y = tables[0][row], out[0, row], biases[row]
        for n in range(x.shape[0]):
            value = x[n] + y[n]
            x[n] = min(value, value - prime)
    return meet(words, parts)


@kernel
def _divide_each(total: Any, out: Any, tables: Any, words: Any, part: Any, parts: Any) -> Any:
    """Divide by the special prime, then by one data prime after another; as `finish`, but for its last barrier."""
    level, left = total.shape[1] - 1, out.shape[1]
    for row in range(level, left - 1, -1):
        number = tables[0].shape[0] - 1 if row == level else row
        fold_row(total, row, number, tables, part, parts)
        if not meet(words, parts):
            return False
        divide_rows(total, row, number, tables, part, parts)
        if not meet(words, parts):
            return False
    start, stop = share(2 * left, part, parts)
    for unit in range(start, stop):
        out[unit // left, unit % left] = total[unit // left, unit % left]
    return True


@kernel
def affine(
    values: Any,
    copies: Any,
    all_digits: Any,
    openings: Any,
    rotations: Any,
    products: Any,
    sums: Any,
    turns: Any,
    biases: Any,
    out: Any,
    sides: Any,
    work: Any,
    tables: Any,
    words: Any,
    part: Any,
    parts: Any,
) -> Any:
    """Carry out an affine map.

    Parameters
    ----------
    values:
        Input ciphertexts, shape (inputs, 2, k, N).
    copies, all_digits, sums:
        Working memory for the copies that are decomposed or inputs, their digits, and the inner sums, shapes
        (ready, 2, k + 1, N), (decompositions, k, k + 1, N or more), (sums, 2, k + 1, N).
    openings:
        Place of each copy that is decomposed, the decomposition that it comes from, keys (flat, one for each copy that
        is no input) and orders, shape (copies, N).
    rotations, products:
        Keys, orders, starts, opened, parents, targets, ready and diagonals, bounds, terms of `kernels.rotate_and_sum`.
    turns:
        Bounds of the sums of each output; key and order of the giant step; keys of all groups (flat), where each
        group's begin, orders of all groups, where each group's begin.
    biases, out:
        Shapes (outputs, primes that are left, N) and (outputs, 2, primes that are left, N); the latter is written.
    sides, work:
        Two ciphertexts over QP and one that is zero; ``over``, ``coefficients`` and ``digits`` of `turn`.
    words:
        The team's words.

    Returns
    -------
    Whether all parts came to every barrier.
    """
    inputs, rows, count = values.shape[0], copies.shape[2], copies.shape[3]
    over, coefficients, _ = work
    lift_first(
        values.reshape(2 * inputs, rows - 1, count),
        copies[:inputs].reshape(2 * inputs, rows, count),
        tables,
        part,
        parts,
    )
    if not meet(words, parts):
        return False
    places, origins, keys, orders = openings
    each, made = 2 * rows * (rows - 1) * count, 0
    for number in range(places.shape[0]):
        place, opened = places[number], all_digits[number]
        if place < inputs:
            if not open_fresh(values[place, 1], coefficients, opened, tables, words, part, parts):
                return False
            continue
        parent, key = copies[places[origins[number]], 0], keys[made * each : (made + 1) * each]
        rotate_add(
            all_digits[origins[number]],
            parent,
            key,
            orders[made : made + 1],
            sides[2],
            copies[place],
            tables,
            part,
            parts,
        )
        made += 1
        if not meet(words, parts):
            return False
        if not open_copy(copies[place, 1], over, coefficients, opened, tables, words, part, parts):
            return False
    keys, orders, starts, opening, parents, targets, ready = rotations
    diagonals, bounds, terms = products
    rotate_and_sum(
        all_digits, copies, keys, orders, starts, opening, parents, targets, ready, diagonals, bounds, terms, sums,
        tables, part, parts,
    )  # fmt: skip
    if not meet(words, parts):
        return False
    for output in range(out.shape[0]):
        if not _output(sums, output, turns, biases[output], out[output], sides, work, tables, words, part, parts):
            return False
    return True


@kernel
def _output(
    sums: Any,
    output: Any,
    turns: Any,
    biases: Any,
    out: Any,
    sides: Any,
    work: Any,
    tables: Any,
    words: Any,
    part: Any,
    parts: Any,
) -> Any:
    """Add up the inner sums of one output by Horner's rule, add its groups of turns, divide, add the bias."""
    outputs, giant_keys, giant_orders, keys, key_starts, orders, order_starts = turns
    over, coefficients, digits = work
    first, last = outputs[output], outputs[output + 1] - 1
    total, free, other = sums[last], sides[0], sides[1]
    for number in range(last - 1, first - 1, -1):
        if not turn(
            total, giant_keys, giant_orders, sums[number], free, over, coefficients, digits, tables, words, part, parts
        ):
            return False
        total, free, other = free, other, free
    for group in range(key_starts.shape[0] - 1):
        these = keys[key_starts[group] : key_starts[group + 1]]
        turned = orders[order_starts[group] : order_starts[group + 1]]
        if not turn(total, these, turned, total, free, over, coefficients, digits, tables, words, part, parts):
            return False
        total, free, other = free, other, free
    return finish(total, biases, out, tables, words, part, parts)


@kernel
def square_plain(
    value: Any, key: Any, order: Any, product: Any, out: Any, sides: Any, work: Any, tables: Any, words: Any, part: Any,
    parts: Any,
) -> Any:  # fmt: skip
    """Square a ciphertext, relinearise and rescale it.

    Parameters
    ----------
    value, out:
        Shapes (2, k, N) and (2, k - 1, N); the latter is written.
    key, order:
        The relinearisation key and the order that changes nothing, as in `kernels.rotate_add`.
    product:
        Working memory, shape (3, k, N).
    sides, work, words:
        As in `affine`.
    """
    square(value, product, tables, part, parts)
    return relinearise(product, key, order, out, sides, work, tables, words, part, parts)


@kernel
def square_two(
    real: Any, imaginary: Any, root: Any, key: Any, order: Any, product: Any, out: Any, sides: Any, work: Any,
    tables: Any, words: Any, part: Any, parts: Any,
) -> Any:  # fmt: skip
    """Square two ciphertexts and join them, relinearise and rescale; see `square_plain` and `kernels.square_join`."""
    square_join(real, imaginary, product, root, tables, part, parts)
    return relinearise(product, key, order, out, sides, work, tables, words, part, parts)


@kernel
def relinearise(
    product: Any, key: Any, order: Any, out: Any, sides: Any, work: Any, tables: Any, words: Any, part: Any, parts: Any
) -> Any:
    """Bring three polynomials back to two and rescale; see `square_plain`."""
    if not meet(words, parts):
        return False
    lift_first(product[:2], sides[1], tables, part, parts)
    if not meet(words, parts):
        return False
    _, coefficients, digits = work
    if not switch(
        product[2], sides[2][0], key, order, sides[1], sides[0], coefficients, digits, tables, words, part, parts
    ):
        return False
    return finish(sides[0], product[0, :0], out, tables, words, part, parts)


@kernel
def relinearise_lowered(
    product: Any, key: Any, order: Any, out: Any, sides: Any, work: Any, tables: Any, words: Any, part: Any, parts: Any
) -> Any:
    """Bring three polynomials back to two, the third being given as coefficients for `lift_all`; see `relinearise`."""
    lift_first(product[:2], sides[1], tables, part, parts)
    _, _, digits = work
    lift_all(product[2], digits, tables, part, parts)
    if not meet(words, parts):
        return False
    rotate_add(digits, sides[2][0], key, order, sides[1], sides[0], tables, part, parts)
    if not meet(words, parts):
        return False
    return finish(sides[0], product[0, :0], out, tables, words, part, parts)


@kernel
def part_complex(
    value: Any, key: Any, order: Any, conjugated: Any, out: Any, sides: Any, work: Any, tables: Any, words: Any,
    part: Any, parts: Any,
) -> Any:  # fmt: skip
    """Take a ciphertext apart: twice its real part, and twice i times its imaginary part.

    Parameters
    ----------
    value:
        Shape (2, k, N).
    key, order:
        Of the conjugation.
    conjugated:
        Working memory, shape (2, k, N).
    out:
        Written; shape (2, 2, k, N).
    sides, work, words:
        As in `affine`.
    """
    lift_first(value[:1], sides[1][:1], tables, part, parts)
    if not meet(words, parts):
        return False
    _, coefficients, digits = work
    if not switch(
        value[1], sides[1][0], key, order, sides[2], sides[0], coefficients, digits, tables, words, part, parts
    ):
        return False
    fold_special(sides[0], tables, part, parts)
    if not meet(words, parts):
        return False
    divide_special(sides[0], conjugated, tables, part, parts)
    if not meet(words, parts):
        return False
    part_both(value, conjugated, out[0], out[1], tables, part, parts)
    return meet(words, parts)
