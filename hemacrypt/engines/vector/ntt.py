"""The number-theoretic transform of SEAL: same roots, same order, so residues can be exchanged as they are.

Forward, it evaluates a polynomial of degree N at the odd powers of a 2N-th root of unity, in bit-reversed order, by
Cooley-Tukey butterflies; back by Gentleman-Sande. Values stay below 4q between stages and are reduced at the end
(Harvey 2014, §3). Two stages are taken at a time; the last three work on groups of eight neighbours, with the vector
lanes across the groups, for there neighbours are too close together to fill a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.modular import below, kernel, shoup_of, shoup_product

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
def forward(values: Any, roots: Any, shoup: Any, prime: Any) -> None:
    """Transform in place; values may be any number below 4q, results are below q. Shape (N,), N at least 16."""
    count = values.shape[0]
    double = np.uint32(2 * prime)
    blocks, reach = 1, count >> 1
    while reach >= 16:
        half = reach >> 1
        for block in range(blocks):
            w1, s1 = roots[blocks + block], shoup[blocks + block]
            w2, s2 = roots[2 * (blocks + block)], shoup[2 * (blocks + block)]
            w3, s3 = roots[2 * (blocks + block) + 1], shoup[2 * (blocks + block) + 1]
            start = 2 * block * reach
            x0 = values[start : start + half]
            x1 = values[start + half : start + reach]
            x2 = values[start + reach : start + reach + half]
            x3 = values[start + reach + half : start + 2 * reach]
            for j in range(half):
                a, b = below(x0[j], double), below(x1[j], double)
                c, d = shoup_product(x2[j], w1, s1, prime), shoup_product(x3[j], w1, s1, prime)
                e, f = np.uint32(a + c), np.uint32(a + double - c)
                g = shoup_product(np.uint32(b + d), w2, s2, prime)
                h = shoup_product(np.uint32(b + double - d), w3, s3, prime)
                e, f = below(e, double), below(f, double)
                x0[j], x1[j] = np.uint32(e + g), np.uint32(e + double - g)
                x2[j], x3[j] = np.uint32(f + h), np.uint32(f + double - h)
        blocks, reach = blocks << 2, reach >> 2
    if reach == 8:
        for block in range(blocks):
            w1, s1 = roots[blocks + block], shoup[blocks + block]
            x0, x1 = values[16 * block : 16 * block + 8], values[16 * block + 8 : 16 * block + 16]
            for j in range(8):
                a, b = below(x0[j], double), shoup_product(x1[j], w1, s1, prime)
                x0[j], x1[j] = np.uint32(a + b), np.uint32(a + double - b)
        blocks, reach = blocks << 1, reach >> 1
    groups = count >> 3
    r1, t1 = roots[groups : 2 * groups], shoup[groups : 2 * groups]
    r2, t2 = roots[2 * groups : 4 * groups], shoup[2 * groups : 4 * groups]
    r4, t4 = roots[4 * groups :], shoup[4 * groups :]
    for g in range(groups):
        k = 8 * g
        a0, a1, a2, a3 = values[k], values[k + 1], values[k + 2], values[k + 3]
        w1, s1 = r1[g], t1[g]
        b0 = shoup_product(values[k + 4], w1, s1, prime)
        b1 = shoup_product(values[k + 5], w1, s1, prime)
        b2 = shoup_product(values[k + 6], w1, s1, prime)
        b3 = shoup_product(values[k + 7], w1, s1, prime)
        a0, a1, a2, a3 = below(a0, double), below(a1, double), below(a2, double), below(a3, double)
        a4, a5 = np.uint32(a0 + double - b0), np.uint32(a1 + double - b1)
        a6, a7 = np.uint32(a2 + double - b2), np.uint32(a3 + double - b3)
        a0, a1, a2, a3 = np.uint32(a0 + b0), np.uint32(a1 + b1), np.uint32(a2 + b2), np.uint32(a3 + b3)
        w1, s1, w2, s2 = r2[2 * g], t2[2 * g], r2[2 * g + 1], t2[2 * g + 1]
        b0, b1 = shoup_product(a2, w1, s1, prime), shoup_product(a3, w1, s1, prime)
        b2, b3 = shoup_product(a6, w2, s2, prime), shoup_product(a7, w2, s2, prime)
        a0, a1, a4, a5 = below(a0, double), below(a1, double), below(a4, double), below(a5, double)
        a2, a3 = np.uint32(a0 + double - b0), np.uint32(a1 + double - b1)
        a6, a7 = np.uint32(a4 + double - b2), np.uint32(a5 + double - b3)
        a0, a1, a4, a5 = np.uint32(a0 + b0), np.uint32(a1 + b1), np.uint32(a4 + b2), np.uint32(a5 + b3)
        b0 = shoup_product(a1, r4[4 * g], t4[4 * g], prime)
        b1 = shoup_product(a3, r4[4 * g + 1], t4[4 * g + 1], prime)
        b2 = shoup_product(a5, r4[4 * g + 2], t4[4 * g + 2], prime)
        b3 = shoup_product(a7, r4[4 * g + 3], t4[4 * g + 3], prime)
        a0, a2, a4, a6 = below(a0, double), below(a2, double), below(a4, double), below(a6, double)
        values[k] = below(below(np.uint32(a0 + b0), double), prime)
        values[k + 1] = below(below(np.uint32(a0 + double - b0), double), prime)
        values[k + 2] = below(below(np.uint32(a2 + b1), double), prime)
        values[k + 3] = below(below(np.uint32(a2 + double - b1), double), prime)
        values[k + 4] = below(below(np.uint32(a4 + b2), double), prime)
        values[k + 5] = below(below(np.uint32(a4 + double - b2), double), prime)
        values[k + 6] = below(below(np.uint32(a6 + b3), double), prime)
        values[k + 7] = below(below(np.uint32(a6 + double - b3), double), prime)


@kernel
def inverse(values: Any, roots: Any, shoup: Any, prime: Any, scale: Any, scale_shoup: Any) -> None:
    """Transform back in place; values are below q, and so are the results. Shape (N,), N at least 16.

    ``roots`` are the inverse roots; ``scale`` is 1 / N.
    """
    count = values.shape[0]
    double = np.uint32(2 * prime)
    groups = count >> 3
    r1, t1 = roots[groups : 2 * groups], shoup[groups : 2 * groups]
    r2, t2 = roots[2 * groups : 4 * groups], shoup[2 * groups : 4 * groups]
    r4, t4 = roots[4 * groups :], shoup[4 * groups :]
    for g in range(groups):
        k = 8 * g
        a0, a1, a2, a3 = values[k], values[k + 1], values[k + 2], values[k + 3]
        a4, a5, a6, a7 = values[k + 4], values[k + 5], values[k + 6], values[k + 7]
        b0, b1 = np.uint32(a0 + a1), np.uint32(a2 + a3)
        b2, b3 = np.uint32(a4 + a5), np.uint32(a6 + a7)
        a1 = shoup_product(np.uint32(a0 + double - a1), r4[4 * g], t4[4 * g], prime)
        a3 = shoup_product(np.uint32(a2 + double - a3), r4[4 * g + 1], t4[4 * g + 1], prime)
        a5 = shoup_product(np.uint32(a4 + double - a5), r4[4 * g + 2], t4[4 * g + 2], prime)
        a7 = shoup_product(np.uint32(a6 + double - a7), r4[4 * g + 3], t4[4 * g + 3], prime)
        a0, a2, a4, a6 = b0, b1, b2, b3
        w1, s1, w2, s2 = r2[2 * g], t2[2 * g], r2[2 * g + 1], t2[2 * g + 1]
        b0, b1 = below(np.uint32(a0 + a2), double), below(np.uint32(a1 + a3), double)
        b2, b3 = below(np.uint32(a4 + a6), double), below(np.uint32(a5 + a7), double)
        a2 = shoup_product(np.uint32(a0 + double - a2), w1, s1, prime)
        a3 = shoup_product(np.uint32(a1 + double - a3), w1, s1, prime)
        a6 = shoup_product(np.uint32(a4 + double - a6), w2, s2, prime)
        a7 = shoup_product(np.uint32(a5 + double - a7), w2, s2, prime)
        a0, a1, a4, a5 = b0, b1, b2, b3
        w1, s1 = r1[g], t1[g]
        values[k], values[k + 1] = below(np.uint32(a0 + a4), double), below(np.uint32(a1 + a5), double)
        values[k + 2], values[k + 3] = below(np.uint32(a2 + a6), double), below(np.uint32(a3 + a7), double)
        values[k + 4] = shoup_product(np.uint32(a0 + double - a4), w1, s1, prime)
        values[k + 5] = shoup_product(np.uint32(a1 + double - a5), w1, s1, prime)
        values[k + 6] = shoup_product(np.uint32(a2 + double - a6), w1, s1, prime)
        values[k + 7] = shoup_product(np.uint32(a3 + double - a7), w1, s1, prime)
    blocks, reach = groups >> 1, 8
    while blocks >= 1:
        for block in range(blocks):
            w1, s1 = roots[blocks + block], shoup[blocks + block]
            start = 2 * block * reach
            x0, x1 = values[start : start + reach], values[start + reach : start + 2 * reach]
            for j in range(reach):
                a, b = x0[j], x1[j]
                x0[j] = below(np.uint32(a + b), double)
                x1[j] = shoup_product(np.uint32(a + double - b), w1, s1, prime)
        blocks, reach = blocks >> 1, reach << 1
    for j in range(count):
        values[j] = below(shoup_product(values[j], scale, scale_shoup, prime), prime)
