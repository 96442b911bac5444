"""The least that an evaluation can take: its counted primitives, each at the best speed that it reaches here alone.

Two parts that a machine cannot do without: arithmetic — transforms, rows multiplied and added up, other passes over
rows, each measured on operands in a near cache — and bytes: keys and diagonals come from memory once in every
evaluation, at the speed at which plain reading of memory goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels.modular import kernel
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.plan.plan import Parameters, Plan
from hemacrypt.planner import costs

_MEMORY_BYTES = 256 << 20
_TRIES = 30


def best(function: Callable[[], object], tries: int = _TRIES) -> float:
    """Return the shortest time of several calls, in milliseconds."""
    function()
    shortest = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        function()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest * 1e3


@kernel
def _read(words: Any) -> Any:
    total = np.uint64(0)
    for n in range(words.shape[0]):
        total += words[n]
    return total


@kernel
def _transform_often(times: Any, row: Any, tables: Any) -> None:
    for _ in range(times):
        kernels.to_values(row, 0, tables)


@kernel
def _rotate_often(times: Any, digits: Any, over: Any, keys: Any, orders: Any, out: Any, tables: Any) -> None:
    for _ in range(times):
        kernels.rotate_add(digits, over[0], keys, orders, over, out, tables, 0, 1)


@kernel
def _pass_often(times: Any, rows: Any, out: Any, tables: Any) -> None:
    for _ in range(times):
        kernels.lift_first(rows, out, tables, 0, 1)


def floor(plan: Plan) -> dict[str, Any]:
    """Measure the primitives of a plan and add up what it takes at least.

    Returns
    -------
    dict
        ``floor_ms`` and ``parts``: milliseconds of transforms, products, passes and reading.
    """
    total = costs.Counts()
    for step in plan.steps:
        total += costs.count(step)
    transform, product, pass_ = _primitives(Ring(plan.parameters.truncated(plan.parameters.top_level)))
    words = np.ones(_MEMORY_BYTES // 8, dtype=np.uint64)
    reading = best(lambda: _read(words), 5) / _MEMORY_BYTES
    parts = {
        "transforms": total.transforms * transform,
        "products": total.products * product,
        "passes": total.passes * pass_,
        "reading keys and diagonals": total.rows_read * 4 * plan.parameters.degree * reading,
    }
    return {"floor_ms": sum(parts.values()), "parts": parts}


def _primitives(ring: Ring) -> tuple[float, float, float]:
    """Return the milliseconds of one transform, of one row of products, and of one pass over a row."""
    degree, tables = ring.parameters.degree, ring.tables
    row = np.arange(degree, dtype=np.uint32)
    many = 20
    # The other two at a small degree, where everything stays in the second-level cache; both grow linearly with it.
    given, near = ring.parameters, kernels.SEGMENT
    chain = SimpleNamespace(degree=near, data_primes=given.data_primes, special_prime=given.special_prime)
    small, primes = Ring(cast(Parameters, chain)), len(given.data_primes)
    keys = np.ones((primes + 1, 1, 1, kernels.SEGMENT // kernels.TILE, primes, 2, kernels.TILE), dtype=np.uint32)
    digits, order = np.ones((primes, primes + 1, near + kernels.PADDING), dtype=np.uint32), small.automorphism(3)[None]
    over, out = np.ones((2, primes + 1, near), dtype=np.uint32), np.empty((2, primes + 1, near), dtype=np.uint32)

    times, rows = degree / near / many, 2 * (primes + 1)
    pass_ = best(lambda: _pass_often(many, over[:1, :primes], out[:1], small.tables)) * times / primes
    rotation = best(lambda: _rotate_often(many, digits, over, keys, order, out, small.tables)) * times
    product = (rotation - 2 * rows * pass_) / (rows * primes)
    return best(lambda: _transform_often(many, row, tables)) / many, max(product, 0.0), pass_
