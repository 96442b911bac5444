"""Times of the kernels: the best of many runs on one thread, and for those that stream, bytes per second.

``python benchmarks/kernels.py [--degree 8192] [--primes 6 4 2] [--threads 1]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels.barrier import Team, meet
from hemacrypt.engines.vector.kernels.modular import kernel
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.plan.plan import Parameters
from hemacrypt.planner.chain import primes_below

Words = npt.NDArray[np.uint32]

# Rotations from one decomposition, and copies, sums and diagonals of a layer: more than any cache holds.
_ROTATIONS = 16
_COPIES, _SUMS = 16, 16


def best(function: Callable[[], None], seconds: float = 0.5) -> float:
    """Return the shortest time of one call, in seconds."""
    function()
    shortest, end = np.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        function()
        shortest = min(shortest, time.perf_counter() - start)
    return float(shortest)


@kernel
def _repeat(values: Any, row: Any, tables: Any, times: Any, back: Any) -> None:
    for _ in range(times):
        if back:
            kernels.to_coefficients(values, row, tables)
        else:
            kernels.to_values(values, row, tables)


@kernel
def _read(words: Any) -> Any:
    total = np.uint64(0)
    for n in range(words.shape[0]):
        total += words[n]
    return total


@kernel
def _meet_often(words: Any, parts: Any, times: Any) -> None:
    for _ in range(times):
        meet(words, parts)


def report(name: str, seconds: float, streamed: int = 0) -> None:
    """Print one line."""
    rate = f"{streamed / seconds / 1e9:8.1f} GB/s" if streamed else ""
    print(f"  {name:<34}{seconds * 1e6:10.1f} µs{rate}")


def measure(ring: Ring, level: int, team: Team) -> None:
    """Print the times of all kernels at one level."""
    degree, tables = ring.parameters.degree, ring.tables
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Words:
        words = rng.integers(0, 1 << 29, shape, dtype=np.uint32)
        return cast(Words, words)

    def timed(name: str, function: Any, *arguments: Any, streamed: int = 0) -> None:
        def work(part: int) -> None:
            function(*arguments, tables, part, team.threads)

        report(name, best(lambda: team.run(work)), streamed)

    polynomial, first, value = random(level, degree), random(level + 1, degree), random(2, level, degree)
    digits, over = random(level, level + 1, degree), random(2, level + 1, degree)
    timed("lower", kernels.lower, polynomial, np.empty_like(polynomial))
    timed("lift", kernels.lift, polynomial, polynomial.copy(), digits)
    timed("lift_first", kernels.lift_first, polynomial[None], first[None])
    tiles = kernels.SEGMENT // kernels.TILE
    keys = random(level + 1, degree // kernels.SEGMENT, _ROTATIONS, tiles, level, 2, kernels.TILE)  # arranged
    orders = np.stack([ring.automorphism(pow(3, step, 2 * degree)) for step in range(1, _ROTATIONS + 1)])
    key, total = keys.nbytes // _ROTATIONS, np.empty_like(over)
    arguments: tuple[Any, ...] = (digits, first, keys, orders, over, total)
    timed(f"rotate_add, {_ROTATIONS}", kernels.rotate_add, *arguments, streamed=keys.nbytes)
    arguments = (digits, first, np.ascontiguousarray(keys[:, :, :1]), orders[:1], over, total)
    timed("rotate_add, 1, in cache", kernels.rotate_add, *arguments, streamed=key)
    copies, diagonals = random(_COPIES, 2, level + 1, degree), random(level + 1, degree // 64, _COPIES * _SUMS, 64)
    starts, terms = np.arange(_SUMS + 1) * _COPIES, np.arange(_COPIES * _SUMS)
    sums, none = random(_SUMS, 2, level + 1, degree), np.empty(0, dtype=np.int64)
    products = (diagonals, starts, terms % _COPIES, sums)
    arguments = (digits[None], copies, keys[:, :, :0].copy(), orders[:0], np.zeros(1, np.int64), none, none, none)
    streamed = diagonals.nbytes
    timed(
        f"sums alone, {_SUMS} × {_COPIES}", kernels.rotate_and_sum,
        *arguments, np.arange(_COPIES), *products, streamed=streamed,
    )  # fmt: skip
    once, made = np.arange(_ROTATIONS + 1), np.arange(_ROTATIONS)
    arguments = (digits[None], copies[:1], keys, orders, once, 0 * made, 0 * made, made + 1, np.zeros(1, np.int64))
    streamed += keys.nbytes
    timed(
        f"rotate_and_sum, {_ROTATIONS}, {_SUMS} × {_COPIES}", kernels.rotate_and_sum,
        *arguments, *products, streamed=streamed,
    )  # fmt: skip
    timed("fold_special, 2", kernels.fold_special, over)
    timed("divide_special, 2", kernels.divide_special, over, value)
    if level > 1:
        timed("fold_both, 2", kernels.fold_both, over)
        timed("divide_both, 2", kernels.divide_both, over, random(2, level - 1, degree))
    square = random(3, level, degree)
    timed("square_join", kernels.square_join, value, value, square, polynomial)
    timed("part", kernels.part_both, value, value, value.copy(), value.copy())
    report("square", best(lambda: kernels.square(value, square, tables, 0, 1)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--degree", type=int, default=8192)
    parser.add_argument("--primes", type=int, nargs="+", default=[6, 4, 2], help="data primes that are left")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    numbers = [prime for prime, _ in zip(primes_below(1 << 30, options.degree), range(7), strict=False)]
    chain = SimpleNamespace(degree=options.degree, data_primes=tuple(numbers[1:]), special_prime=numbers[0])
    ring, team = Ring(cast(Parameters, chain)), Team(options.threads)
    memory = np.ones(1 << 26, dtype=np.uint32)
    shares = np.array_split(memory, options.threads)
    report("plain reading of memory", best(lambda: team.run(lambda part: _read(shares[part]))), memory.nbytes)
    report("barrier", best(lambda: team.run(lambda part: _meet_often(team.words, team.threads, 1000))) / 1000)
    values = np.arange(options.degree, dtype=np.uint32)
    for name, back in (("forward", False), ("inverse", True)):
        report(f"ntt.{name}", best(lambda back=back: _repeat(values, 0, ring.tables, 20, back)) / 20)  # type: ignore[misc]
    for level in options.primes:
        print(f"N = {options.degree}, {level} data primes, threads: {options.threads}")
        measure(ring, level, team)


if __name__ == "__main__":
    main()
