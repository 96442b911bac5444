"""The number-theoretic transform of SEAL: same roots, same order, so residues can be exchanged as they are.

Forward, it evaluates a polynomial of degree N at the odd powers of a 2N-th root of unity, in bit-reversed order, by
Cooley-Tukey butterflies; back by Gentleman-Sande. Values stay below 4q between stages and are reduced at the end
(Harvey 2014, §3). Two or three stages are taken at a time, so that residues are loaded and stored less often. The last
four stages forward, and the first four back, work within blocks of sixteen neighbours, that is within a vector; there
lanes of two vectors change places between the stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.kernels.modular import below, companion, kernel, shoup_of, shoup_product
from hemacrypt.engines.vector.kernels.simd import (
    LANES,
    evens,
    first_1,
    first_2,
    first_4,
    first_8,
    load,
    load_2,
    load_4,
    load_8,
    mixed_high,
    mixed_low,
    odds,
    second_1,
    second_2,
    second_4,
    second_8,
    spread,
    spread_wide,
    store,
    times,
    times_each,
    under,
)

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Tables:
    """Roots of unity modulo one prime.

    Attributes
    ----------
    prime:
        The prime q, 1 modulo 2N.
    roots, roots_shoup:
        Powers of the root in bit-reversed order, shape (N,).
    inverse_roots, inverse_roots_shoup:
        Their inverses in the same order, shape (N,).
    scale, scale_shoup:
        1 / N, shape (1,).
    """

    prime: int
    roots: Words
    roots_shoup: Words
    inverse_roots: Words
    inverse_roots_shoup: Words
    scale: Words
    scale_shoup: Words


def bit_reversed(count: int) -> npt.NDArray[np.int64]:
    """Return 0 … count - 1 with their bits reversed, shape (count,); count is a power of two."""
    order = np.zeros(1, dtype=np.int64)
    while len(order) < count:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


def make_tables(prime: int, degree: int) -> Tables:
    """Compute the tables that SEAL computes: from the smallest primitive 2N-th root of unity."""
    root = _smallest_root(prime, 2 * degree)
    powers = _powers(root, degree, prime)
    inverse_powers = _powers(pow(root, -1, prime), degree, prime)
    order = bit_reversed(degree)
    roots, inverse_roots = powers[order], inverse_powers[order]
    scale = np.array([pow(degree, -1, prime)], dtype=np.uint64)
    return Tables(
        prime,
        roots.astype(np.uint32),
        shoup_of(roots, prime),
        inverse_roots.astype(np.uint32),
        shoup_of(inverse_roots, prime),
        scale.astype(np.uint32),
        shoup_of(scale, prime),
    )


def _powers(base: int, count: int, prime: int) -> npt.NDArray[np.uint64]:
    """Return base^0 … base^(count - 1) by doubling; products of residues below 2^30 fit 64 bits."""
    powers = np.ones(1, dtype=np.uint64)
    while len(powers) < count:
        step = np.uint64(pow(base, len(powers), prime))
        powers = np.concatenate([powers, powers * step % np.uint64(prime)])
    return powers


def _smallest_root(prime: int, order: int) -> int:
    root = next(
        candidate
        for candidate in (pow(base, (prime - 1) // order, prime) for base in range(2, prime))
        if pow(candidate, order // 2, prime) == prime - 1
    )
    # All primitive roots of this order are the odd powers of one.
    odd = _powers(root * root % prime, order // 2, prime) * np.uint64(root) % np.uint64(prime)
    return int(odd.min())


@kernel
def _up(a: Any, b: Any, w: Any, s: Any, prime: Any, double: Any) -> Any:
    """Take Cooley and Tukey's butterfly, a ± w * b: from below 4q to below 4q, one factor for all lanes."""
    a, b = under(a, double), times(b, w, s, prime)
    return a + b, a + double - b


@kernel
def _up_each(a: Any, b: Any, w: Any, s: Any, prime: Any, double: Any) -> Any:
    """Take Cooley and Tukey's butterfly with a factor for every lane."""
    a, b = under(a, double), times_each(b, w, s, prime)
    return a + b, a + double - b


@kernel
def _down(a: Any, b: Any, w: Any, s: Any, prime: Any, double: Any) -> Any:
    """Take Gentleman and Sande's butterfly, a + b and w * (a - b): from below 2q to below 2q, one factor."""
    return under(a + b, double), times(a + double - b, w, s, prime)


@kernel
def _down_each(a: Any, b: Any, w: Any, s: Any, prime: Any, double: Any) -> Any:
    """Take Gentleman and Sande's butterfly with a factor for every lane."""
    return under(a + b, double), times_each(a + double - b, w, s, prime)


@kernel
def _down_last(a: Any, b: Any, scale: Any, w: Any, s: Any, prime: Any, double: Any) -> Any:
    """Take Gentleman and Sande's butterfly; unless ``scale`` is None, scale the sum as well, and reduce both."""
    if scale is None:
        return _down(a, b, w, s, prime, double)
    up, up_shoup = scale
    return under(times(a + b, up, up_shoup, prime), prime), under(times(a + double - b, w, s, prime), prime)


@kernel
def _root(roots: Any, shoup: Any, place: Any) -> Any:
    """Return a root in all lanes and its companion in all wide ones, as `lanes.times` takes them."""
    return spread(roots[place]), spread_wide(np.uint64(shoup[place]))


@kernel
def _last_root(roots: Any, shoup: Any, place: Any, prime: Any, scale: Any) -> Any:
    """Return 1 / N in all lanes, or None if ``scale`` is None, and a root for the last stage back, times 1 / N."""
    if scale is None:
        root, root_shoup = _root(roots, shoup, place)
        return None, root, root_shoup
    factor, factor_shoup = scale
    root = below(shoup_product(roots[place], factor, factor_shoup, prime), prime)
    both = spread(factor), spread_wide(np.uint64(factor_shoup))
    return both, spread(root), spread_wide(np.uint64(companion(root, prime)))


@kernel
def _middle_stages(count: Any) -> Any:
    """Count the stages outside blocks of sixteen."""
    stages = -4
    while count > 1:
        count, stages = count >> 1, stages + 1
    return stages


@kernel
def _at_once(stages: Any) -> Any:
    """Return how many of so many stages to take next, three or two, so that never a single one is left."""
    return 3 if stages == 3 or stages > 4 else 2


@kernel
def _entering(source: Any, place: Any, offset: Any) -> Any:
    """Read residues, moved by an offset unless it is None: which of the two is decided when this is compiled."""
    if offset is None:
        return load(source, place)
    return load(source, place) + offset


@kernel
def _up_three(
    source: Any, target: Any, start: Any, reach: Any, block: Any, roots: Any, shoup: Any, prime: Any, offset: Any
) -> None:
    """Take three stages forward: residues ``start + 0 … 8 * reach - 1``, which are number ``block`` of their kind.

    ``block`` counts on from 1, 2, 4 … as roots do: block b of a stage splits into 2b and 2b + 1. An ``offset`` in all
    lanes is added to what is read; None adds nothing.
    """
    q, double = spread(prime), spread(np.uint32(2 * prime))
    w1, s1 = _root(roots, shoup, block)
    w2, s2 = _root(roots, shoup, 2 * block)
    w3, s3 = _root(roots, shoup, 2 * block + 1)
    w4, s4 = _root(roots, shoup, 4 * block)
    w5, s5 = _root(roots, shoup, 4 * block + 1)
    w6, s6 = _root(roots, shoup, 4 * block + 2)
    w7, s7 = _root(roots, shoup, 4 * block + 3)
    for n in range(start, start + reach, LANES):
        a, b = _entering(source, n, offset), _entering(source, n + reach, offset)
        c, d = _entering(source, n + 2 * reach, offset), _entering(source, n + 3 * reach, offset)
        e, f = _entering(source, n + 4 * reach, offset), _entering(source, n + 5 * reach, offset)
        g, h = _entering(source, n + 6 * reach, offset), _entering(source, n + 7 * reach, offset)
        a, e = _up(a, e, w1, s1, q, double)
        b, f = _up(b, f, w1, s1, q, double)
        c, g = _up(c, g, w1, s1, q, double)
        d, h = _up(d, h, w1, s1, q, double)
        a, c = _up(a, c, w2, s2, q, double)
        b, d = _up(b, d, w2, s2, q, double)
        e, g = _up(e, g, w3, s3, q, double)
        f, h = _up(f, h, w3, s3, q, double)
        a, b = _up(a, b, w4, s4, q, double)
        c, d = _up(c, d, w5, s5, q, double)
        e, f = _up(e, f, w6, s6, q, double)
        g, h = _up(g, h, w7, s7, q, double)
        store(target, n, a)
        store(target, n + reach, b)
        store(target, n + 2 * reach, c)
        store(target, n + 3 * reach, d)
        store(target, n + 4 * reach, e)
        store(target, n + 5 * reach, f)
        store(target, n + 6 * reach, g)
        store(target, n + 7 * reach, h)


@kernel
def _up_two(
    source: Any, target: Any, start: Any, reach: Any, block: Any, roots: Any, shoup: Any, prime: Any, offset: Any
) -> None:
    """Take two stages forward, over ``4 * reach`` residues; see `_up_three`."""
    q, double = spread(prime), spread(np.uint32(2 * prime))
    w1, s1 = _root(roots, shoup, block)
    w2, s2 = _root(roots, shoup, 2 * block)
    w3, s3 = _root(roots, shoup, 2 * block + 1)
    for n in range(start, start + reach, LANES):
        a, b = _entering(source, n, offset), _entering(source, n + reach, offset)
        c, d = _entering(source, n + 2 * reach, offset), _entering(source, n + 3 * reach, offset)
        a, c = _up(a, c, w1, s1, q, double)
        b, d = _up(b, d, w1, s1, q, double)
        a, b = _up(a, b, w2, s2, q, double)
        c, d = _up(c, d, w3, s3, q, double)
        store(target, n, a)
        store(target, n + reach, b)
        store(target, n + 2 * reach, c)
        store(target, n + 3 * reach, d)


@kernel
def _up_8(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage whose butterflies reach eight lanes far."""
    return _up_each(first_8(x, y), second_8(x, y), load_2(roots, place), load_2(shoup, place), q, double)


@kernel
def _up_4(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage whose butterflies reach four lanes far."""
    return _up_each(first_4(x, y), second_4(x, y), load_4(roots, place), load_4(shoup, place), q, double)


@kernel
def _up_2(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage whose butterflies reach two lanes far."""
    return _up_each(first_2(x, y), second_2(x, y), load_8(roots, place), load_8(shoup, place), q, double)


@kernel
def _up_1(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage whose butterflies reach one lane far."""
    return _up_each(first_1(x, y), second_1(x, y), load(roots, place), load(shoup, place), q, double)


@kernel
def _up_last(values: Any, start: Any, stop: Any, roots: Any, shoup: Any, prime: Any) -> None:
    """Take the last four stages forward, within blocks of sixteen neighbours, and reduce; eight blocks at a time."""
    count = values.shape[0]
    q, double = spread(prime), spread(np.uint32(2 * prime))
    # One vector of a pair holds the upper inputs of sixteen butterflies, the other the lower ones. The picks keep
    # their groups in order, so that the roots are neighbours in their table. Four pairs, which need not wait for each
    # other, go side by side, for a processor does not look far enough ahead to find the next pair by itself.
    for n in range(start, stop, 8 * LANES):
        a, b = load(values, n), load(values, n + 16)
        c, d = load(values, n + 32), load(values, n + 48)
        e, f = load(values, n + 64), load(values, n + 80)
        g, h = load(values, n + 96), load(values, n + 112)
        i = (count + n) >> 4
        a, b = _up_8(a, b, roots, shoup, i, q, double)
        c, d = _up_8(c, d, roots, shoup, i + 2, q, double)
        e, f = _up_8(e, f, roots, shoup, i + 4, q, double)
        g, h = _up_8(g, h, roots, shoup, i + 6, q, double)
        i = (count + n) >> 3
        a, b = _up_4(a, b, roots, shoup, i, q, double)
        c, d = _up_4(c, d, roots, shoup, i + 4, q, double)
        e, f = _up_4(e, f, roots, shoup, i + 8, q, double)
        g, h = _up_4(g, h, roots, shoup, i + 12, q, double)
        i = (count + n) >> 2
        a, b = _up_2(a, b, roots, shoup, i, q, double)
        c, d = _up_2(c, d, roots, shoup, i + 8, q, double)
        e, f = _up_2(e, f, roots, shoup, i + 16, q, double)
        g, h = _up_2(g, h, roots, shoup, i + 24, q, double)
        i = (count + n) >> 1
        a, b = _up_1(a, b, roots, shoup, i, q, double)
        c, d = _up_1(c, d, roots, shoup, i + 16, q, double)
        e, f = _up_1(e, f, roots, shoup, i + 32, q, double)
        g, h = _up_1(g, h, roots, shoup, i + 48, q, double)
        a, b = under(under(a, double), q), under(under(b, double), q)
        c, d = under(under(c, double), q), under(under(d, double), q)
        e, f = under(under(e, double), q), under(under(f, double), q)
        g, h = under(under(g, double), q), under(under(h, double), q)
        store(values, n, mixed_low(a, b))
        store(values, n + 16, mixed_high(a, b))
        store(values, n + 32, mixed_low(c, d))
        store(values, n + 48, mixed_high(c, d))
        store(values, n + 64, mixed_low(e, f))
        store(values, n + 80, mixed_high(e, f))
        store(values, n + 96, mixed_low(g, h))
        store(values, n + 112, mixed_high(g, h))


@kernel
def forward_into(source: Any, target: Any, roots: Any, shoup: Any, prime: Any, offset: Any) -> None:
    """Transform into another array; ``source`` may be any number below 4q after moving, results are below q.

    Parameters
    ----------
    source:
        Shape (N,), N at least 1024.
    target:
        Written; shape (N,). May be ``source`` itself.
    offset:
        Added to every number first, in all lanes; or None.
    """
    count = source.shape[0]
    stages = _middle_stages(count)
    # What comes first is taken over the whole polynomial, the rest piece by piece, each of which stays in the
    # first-level cache.
    done = _at_once(stages)
    size = count >> done
    if done == 3:
        _up_three(source, target, 0, size, 1, roots, shoup, prime, offset)
    else:
        _up_two(source, target, 0, size, 1, roots, shoup, prime, offset)
    for base in range(0, count, size):
        reach, left = size, stages - done
        while left > 0:
            whole = reach
            if _at_once(left) == 3:
                reach, left = reach >> 3, left - 3
                for start in range(base, base + size, whole):
                    _up_three(target, target, start, reach, (count + start) // whole, roots, shoup, prime, None)
            else:
                reach, left = reach >> 2, left - 2
                for start in range(base, base + size, whole):
                    _up_two(target, target, start, reach, (count + start) // whole, roots, shoup, prime, None)
        _up_last(target, base, base + size, roots, shoup, prime)


@kernel
def forward(values: Any, roots: Any, shoup: Any, prime: Any) -> None:
    """Transform in place; values may be any number below 4q, results are below q. Shape (N,), N at least 1024."""
    forward_into(values, values, roots, shoup, prime, None)


@kernel
def _down_1(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage back whose butterflies reach one lane far."""
    return _down_each(evens(x, y), odds(x, y), load(roots, place), load(shoup, place), q, double)


@kernel
def _down_2(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage back whose butterflies reach two lanes far."""
    return _down_each(first_1(x, y), second_1(x, y), load_8(roots, place), load_8(shoup, place), q, double)


@kernel
def _down_4(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage back whose butterflies reach four lanes far."""
    return _down_each(first_2(x, y), second_2(x, y), load_4(roots, place), load_4(shoup, place), q, double)


@kernel
def _down_8(x: Any, y: Any, roots: Any, shoup: Any, place: Any, q: Any, double: Any) -> Any:
    """Take the stage back whose butterflies reach eight lanes far."""
    return _down_each(first_4(x, y), second_4(x, y), load_2(roots, place), load_2(shoup, place), q, double)


@kernel
def _down_first(source: Any, target: Any, start: Any, stop: Any, roots: Any, shoup: Any, prime: Any) -> None:
    """Take the first four stages back, within blocks of sixteen neighbours; the mirror image of `_up_last`."""
    count = source.shape[0]
    q, double = spread(prime), spread(np.uint32(2 * prime))
    for n in range(start, stop, 8 * LANES):
        a, b = load(source, n), load(source, n + 16)
        c, d = load(source, n + 32), load(source, n + 48)
        e, f = load(source, n + 64), load(source, n + 80)
        g, h = load(source, n + 96), load(source, n + 112)
        i = (count + n) >> 1
        a, b = _down_1(a, b, roots, shoup, i, q, double)
        c, d = _down_1(c, d, roots, shoup, i + 16, q, double)
        e, f = _down_1(e, f, roots, shoup, i + 32, q, double)
        g, h = _down_1(g, h, roots, shoup, i + 48, q, double)
        i = (count + n) >> 2
        a, b = _down_2(a, b, roots, shoup, i, q, double)
        c, d = _down_2(c, d, roots, shoup, i + 8, q, double)
        e, f = _down_2(e, f, roots, shoup, i + 16, q, double)
        g, h = _down_2(g, h, roots, shoup, i + 24, q, double)
        i = (count + n) >> 3
        a, b = _down_4(a, b, roots, shoup, i, q, double)
        c, d = _down_4(c, d, roots, shoup, i + 4, q, double)
        e, f = _down_4(e, f, roots, shoup, i + 8, q, double)
        g, h = _down_4(g, h, roots, shoup, i + 12, q, double)
        i = (count + n) >> 4
        a, b = _down_8(a, b, roots, shoup, i, q, double)
        c, d = _down_8(c, d, roots, shoup, i + 2, q, double)
        e, f = _down_8(e, f, roots, shoup, i + 4, q, double)
        g, h = _down_8(g, h, roots, shoup, i + 6, q, double)
        store(target, n, first_8(a, b))
        store(target, n + 16, second_8(a, b))
        store(target, n + 32, first_8(c, d))
        store(target, n + 48, second_8(c, d))
        store(target, n + 64, first_8(e, f))
        store(target, n + 80, second_8(e, f))
        store(target, n + 96, first_8(g, h))
        store(target, n + 112, second_8(g, h))


@kernel
def _down_three(
    values: Any, start: Any, reach: Any, block: Any, roots: Any, shoup: Any, prime: Any, scale: Any
) -> None:
    """Take three stages back, over ``8 * reach`` residues; the mirror image of `_up_three`."""
    q, double = spread(prime), spread(np.uint32(2 * prime))
    w0, w1, s1 = _last_root(roots, shoup, block, prime, scale)
    w2, s2 = _root(roots, shoup, 2 * block)
    w3, s3 = _root(roots, shoup, 2 * block + 1)
    w4, s4 = _root(roots, shoup, 4 * block)
    w5, s5 = _root(roots, shoup, 4 * block + 1)
    w6, s6 = _root(roots, shoup, 4 * block + 2)
    w7, s7 = _root(roots, shoup, 4 * block + 3)
    for n in range(start, start + reach, LANES):
        a, b = load(values, n), load(values, n + reach)
        c, d = load(values, n + 2 * reach), load(values, n + 3 * reach)
        e, f = load(values, n + 4 * reach), load(values, n + 5 * reach)
        g, h = load(values, n + 6 * reach), load(values, n + 7 * reach)
        a, b = _down(a, b, w4, s4, q, double)
        c, d = _down(c, d, w5, s5, q, double)
        e, f = _down(e, f, w6, s6, q, double)
        g, h = _down(g, h, w7, s7, q, double)
        a, c = _down(a, c, w2, s2, q, double)
        b, d = _down(b, d, w2, s2, q, double)
        e, g = _down(e, g, w3, s3, q, double)
        f, h = _down(f, h, w3, s3, q, double)
        a, e = _down_last(a, e, w0, w1, s1, q, double)
        b, f = _down_last(b, f, w0, w1, s1, q, double)
        c, g = _down_last(c, g, w0, w1, s1, q, double)
        d, h = _down_last(d, h, w0, w1, s1, q, double)
        store(values, n, a)
        store(values, n + reach, b)
        store(values, n + 2 * reach, c)
        store(values, n + 3 * reach, d)
        store(values, n + 4 * reach, e)
        store(values, n + 5 * reach, f)
        store(values, n + 6 * reach, g)
        store(values, n + 7 * reach, h)


@kernel
def _down_two(values: Any, start: Any, reach: Any, block: Any, roots: Any, shoup: Any, prime: Any, scale: Any) -> None:
    """Take two stages back, over ``4 * reach`` residues; the mirror image of `_up_two`."""
    q, double = spread(prime), spread(np.uint32(2 * prime))
    w0, w1, s1 = _last_root(roots, shoup, block, prime, scale)
    w2, s2 = _root(roots, shoup, 2 * block)
    w3, s3 = _root(roots, shoup, 2 * block + 1)
    for n in range(start, start + reach, LANES):
        a, b = load(values, n), load(values, n + reach)
        c, d = load(values, n + 2 * reach), load(values, n + 3 * reach)
        a, b = _down(a, b, w2, s2, q, double)
        c, d = _down(c, d, w3, s3, q, double)
        a, c = _down_last(a, c, w0, w1, s1, q, double)
        b, d = _down_last(b, d, w0, w1, s1, q, double)
        store(values, n, a)
        store(values, n + reach, b)
        store(values, n + 2 * reach, c)
        store(values, n + 3 * reach, d)


@kernel
def inverse_into(source: Any, target: Any, roots: Any, shoup: Any, prime: Any, scale: Any, scale_shoup: Any) -> None:
    """Transform back into another array; ``source`` is below 2q, results are below q.

    Parameters
    ----------
    source:
        Shape (N,), N at least 1024.
    target:
        Written; shape (N,). May be ``source`` itself.
    roots, shoup:
        The inverse roots and their companions, shape (N,).
    scale, scale_shoup:
        1 / N and its companion.
    """
    count = source.shape[0]
    stages = _middle_stages(count)
    last = _at_once(stages)
    size = count >> last
    for base in range(0, count, size):
        _down_first(source, target, base, base + size, roots, shoup, prime)
        reach, left = LANES, stages - last
        while left > 0:
            if _at_once(left) == 3:
                whole, left = reach << 3, left - 3
                for start in range(base, base + size, whole):
                    _down_three(target, start, reach, (count + start) // whole, roots, shoup, prime, None)
            else:
                whole, left = reach << 2, left - 2
                for start in range(base, base + size, whole):
                    _down_two(target, start, reach, (count + start) // whole, roots, shoup, prime, None)
            reach = whole
    if last == 3:
        _down_three(target, 0, size, 1, roots, shoup, prime, (scale, scale_shoup))
    else:
        _down_two(target, 0, size, 1, roots, shoup, prime, (scale, scale_shoup))


@kernel
def inverse(values: Any, roots: Any, shoup: Any, prime: Any, scale: Any, scale_shoup: Any) -> None:
    """Transform back in place; values are below 2q, results below q. Shape (N,), N at least 1024."""
    inverse_into(values, values, roots, shoup, prime, scale, scale_shoup)
