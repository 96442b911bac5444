"""The generator that SEAL expands seeds with: BLAKE2Xb, sixty-four blocks at a time.

A seeded ciphertext or key carries 64 bytes in place of a polynomial of uniform residues. SEAL's generator fills buffers
of 4096 bytes; buffer number c is BLAKE2Xb of c under the seed as key, that is 64 independent BLAKE2b blocks of one root
(Aumasson, Neves, Wilcox-O'Hearn, Winnerlein, "BLAKE2X", 2016, §2). The blocks lie across the vector lanes.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.kernels.modular import below, companion, kernel, share, shoup_product
from hemacrypt.engines.vector.kernels.ntt import Words

_BUFFER: Final = 4096
_LANES: Final = _BUFFER // 64
_IV: Final = np.array(
    [
        0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
        0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
    ],
    dtype=np.uint64,
)  # fmt: skip
# Message words of each round, from RFC 7693 §2.7; rounds ten and eleven repeat the first two.
_SIGMA: Final = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
        [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
        [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
        [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
        [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
        [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
        [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
        [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
        [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
    ],
    dtype=np.int64,
)  # fmt: skip
# Columns, then diagonals.
_MIXES: Final = np.array(
    [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
     [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]],
    dtype=np.int64,
)  # fmt: skip


@kernel
def _rotated(value: Any, count: Any) -> Any:
    return (value >> np.uint64(count)) | (value << np.uint64(64 - count))


@kernel
def _expand(root: Any, initial: Any, out: Any, iv: Any, sigma: Any, mixes: Any) -> None:
    """Compute the 64 output blocks of one buffer.

    ``root``: the root hash, shape (8,); ``initial``: chaining value of each block, shape (8, 64); ``out``: (64, 8).
    """
    state = np.empty((16, initial.shape[1]), np.uint64)
    message = np.zeros(16, np.uint64)
    message[:8] = root
    for word in range(8):
        state[word] = initial[word]
        state[8 + word] = iv[word]
    for lane in range(initial.shape[1]):
        state[12, lane] ^= np.uint64(64)  # bytes of the message
        state[14, lane] ^= np.uint64(0xFFFFFFFFFFFFFFFF)  # the last block
    for step in range(12):
        words = sigma[step % 10]
        for mix in range(8):
            a, b = state[mixes[mix, 0]], state[mixes[mix, 1]]
            c, d = state[mixes[mix, 2]], state[mixes[mix, 3]]
            x, y = message[words[2 * mix]], message[words[2 * mix + 1]]
            for lane in range(a.shape[0]):
                p, q, r, s = a[lane], b[lane], c[lane], d[lane]
                p = p + q + x
                s = _rotated(s ^ p, 32)
                r = r + s
                q = _rotated(q ^ r, 24)
                p = p + q + y
                s = _rotated(s ^ p, 16)
                r = r + s
                q = _rotated(q ^ r, 63)
                a[lane], b[lane], c[lane], d[lane] = p, q, r, s
    for word in range(8):
        for lane in range(initial.shape[1]):
            out[lane, word] = initial[word, lane] ^ state[word, lane] ^ state[8 + word, lane]


@kernel
def _reduce(words: Any, prime: Any, limit: Any, out: Any) -> Any:
    """Reduce 64-bit words modulo a prime below 2^30; shapes (n,). Return whether a word was not below the limit."""
    up = np.uint32((np.uint64(1) << np.uint64(32)) % np.uint64(prime))
    up_companion, one, one_companion = companion(up, prime), np.uint32(1), companion(np.uint32(1), prime)
    uneven = False
    for n in range(words.shape[0]):
        uneven |= words[n] >= limit
        high = shoup_product(np.uint32(words[n] >> np.uint64(32)), up, up_companion, prime)
        low = shoup_product(np.uint32(words[n]), one, one_companion, prime)
        out[n] = below(np.uint32(below(high, prime) + below(low, prime)), prime)
    return uneven


@kernel
def _fill(roots: Any, first: Any, initial: Any, primes: Any, limits: Any, out: Any, constants: Any) -> Any:
    """Expand buffers into residues; see `Expansion`. Return whether any word was uneven.

    ``roots``: root hashes of the buffers from number ``first`` on, shape (buffers, 8); ``out``: shape (primes, N).
    """
    iv, sigma, mixes = constants
    words = np.empty((initial.shape[1], 8), np.uint64)
    flat, each = words.reshape(-1), initial.shape[1] * 8
    uneven = False
    for number in range(roots.shape[0]):
        _expand(roots[number], initial, words, iv, sigma, mixes)
        start = (first + number) * each
        row, at = start // out.shape[1], start % out.shape[1]
        uneven |= _reduce(flat, primes[row], limits[row], out[row, at : at + each])
    return uneven


def _initial_values() -> npt.NDArray[np.uint64]:
    """Return the chaining values of the output blocks: the initial vector xor their parameter blocks, shape (8, 64)."""
    values = np.repeat(_IV[:, None], _LANES, axis=1)
    values[0] ^= np.uint64(64 | 64 << 32)  # digest of 64 bytes, no key, no fan-out, leaves of 64 bytes
    values[1] ^= np.arange(_LANES, dtype=np.uint64) | np.uint64(_BUFFER << 32)  # number of the block, length of all
    values[2] ^= np.uint64(64 << 8)  # inner hash of 64 bytes
    return values


_INITIAL: Final = _initial_values()
_CONSTANTS: Final = (_IV, _SIGMA, _MIXES)


def _roots(seed: bytes, first: int, last: int) -> npt.NDArray[np.uint64]:
    """Return the root hashes of buffers first … last - 1, shape (buffers, 8)."""
    hashed = [
        hashlib.blake2b(number.to_bytes(8, "little"), key=seed, fanout=1, depth=1, node_offset=_BUFFER << 32).digest()
        for number in range(first, last)
    ]
    return np.frombuffer(b"".join(hashed), dtype="<u8").reshape(-1, 8)


def generate(seed: bytes, words: int) -> npt.NDArray[np.uint64]:
    """Return the first 64-bit words that SEAL's generator gives for a seed.

    Parameters
    ----------
    seed:
        64 bytes.
    words:
        How many words.
    """
    buffers = -(-8 * words // _BUFFER)
    out = np.empty((buffers, _LANES, 8), dtype=np.uint64)
    for root, block in zip(_roots(seed, 0, buffers), out, strict=True):
        _expand(root, _INITIAL, block, *_CONSTANTS)
    return out.reshape(-1)[:words]


class Expansion:
    """The polynomial of uniform residues that SEAL expands a seed into; threads may share the work.

    SEAL 4, ``sample_poly_uniform``: words that would make the residues uneven are drawn again, in order, from what
    follows. That happens about once in 2^34 words.

    Parameters
    ----------
    seed:
        64 bytes.
    primes:
        Below 2^30, shape (primes,).
    out:
        Written; shape (primes, N), N a multiple of 512: a buffer then belongs to one prime alone.
    """

    def __init__(self, seed: bytes, primes: Words, out: Words) -> None:
        self._seed, self._primes, self._out = seed, primes, out
        largest = (1 << 64) - 1
        self._limits = np.array([largest - largest % int(prime) - 1 for prime in primes], dtype=np.uint64)
        self._uneven = False

    def fill(self, part: int, parts: int) -> None:
        """Expand one share of the residues."""
        first, last = share(8 * self._out.size // _BUFFER, part, parts)
        roots = _roots(self._seed, first, last)
        if _fill(roots, first, _INITIAL, self._primes, self._limits, self._out, _CONSTANTS):
            self._uneven = True

    def finish(self) -> None:
        """Draw again what must be, once all shares are filled."""
        if self._uneven:
            words = generate(self._seed, self._out.size).reshape(self._out.shape)
            _draw_again(self._seed, words, words >= self._limits[:, None], self._limits)
            self._out[:] = words % self._primes.astype(np.uint64)[:, None]


def uniform_residues(seed: bytes, primes: Words, degree: int) -> Words:
    """Expand a seed into a polynomial, shape (primes, degree); see `Expansion`."""
    out = np.empty((len(primes), degree), dtype=np.uint32)
    expansion = Expansion(seed, primes, out)
    expansion.fill(0, 1)
    expansion.finish()
    return out


def _draw_again(
    seed: bytes, words: npt.NDArray[np.uint64], uneven: npt.NDArray[np.bool_], limits: npt.NDArray[np.uint64]
) -> None:
    used = words.size
    for row, column in np.argwhere(uneven):
        while words[row, column] >= limits[row]:
            words[row, column] = generate(seed, used + 1)[-1]
            used += 1
