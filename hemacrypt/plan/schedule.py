"""In which order a batch flows through the layers, so that little of it is in memory at any time.

Values arrive in chunks and are used once: every output that a chunk contributes to is an *open* sum from its first
contribution to its last, and closes then. What closes is squared and becomes a chunk of the next layer. A convolution
whose image arrives row by row keeps a few rows of outputs open; a dense layer keeps its outputs, which are few, and no
input at all. Engines carry the schedule out; planners read from it how much memory that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from hemacrypt.plan.batch_plan import BatchLinear, BatchPlan, Numbers
from hemacrypt.plan.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan

# Values that are brought to the next layer at once. More share a reduction, fewer take less memory.
CHUNK: Final = 192
# Rows of a matrix that the kernels multiply in one pass, largest first.
ROWS: Final = (8, 4, 2, 1)
_RESIDUE_BYTES: Final = 4


@dataclass(frozen=True, eq=False)
class Chunk:
    """What happens when some inputs of a layer arrive.

    Attributes
    ----------
    inputs:
        Which values arrive, shape (count,).
    groups:
        Rows with the same columns together: first column, number of columns, first weight, first row, number of rows
        (one of `ROWS`); shape (groups, 5).
    columns:
        Numbers within ``inputs``, int32.
    weights:
        int32; in each group column by column.
    sums:
        Place among the open sums of each row.
    opens:
        Whether a row begins its sum, shape (rows,).
    closing:
        Outputs that are complete now, and the places of their sums; shape (closed,) each.
    """

    inputs: Numbers
    groups: Numbers
    columns: npt.NDArray[np.int32]
    weights: npt.NDArray[np.int32]
    sums: Numbers
    opens: npt.NDArray[np.bool_]
    closing: tuple[Numbers, Numbers]


@dataclass(frozen=True, eq=False)
class LayerSchedule:
    """The chunks of one layer.

    Attributes
    ----------
    chunks:
        In order.
    open:
        Most sums that are open at once.
    largest:
        Most inputs of a chunk.
    """

    chunks: tuple[Chunk, ...]
    open: int
    largest: int


def make_schedule(plan: BatchPlan | BfvBatchPlan) -> tuple[LayerSchedule, ...]:
    """Arrange the work of every layer."""
    arriving = _pieces(np.array(plan.public.input_order, dtype=np.int64))
    layers: list[LayerSchedule] = []
    for linear in plan.linears:
        layers.append(_layer(linear, arriving))
        closed = [chunk.closing[0] for chunk in layers[-1].chunks]
        arriving = [piece for outputs in closed if outputs.size for piece in _pieces(outputs)]
    return tuple(layers)


def memory_bytes(plan: BatchPlan | BfvBatchPlan, layers: Sequence[LayerSchedule], threads: int) -> int:
    """Return how many bytes of working arrays an evaluation takes at most, inputs and outputs on the wire not counted.

    Parameters
    ----------
    plan, layers:
        The plan and its schedule.
    threads:
        How many threads share the work; each has arrays of its own for key switches and for reading.
    """
    degree, primes = plan.parameters.degree, len(plan.parameters.data_primes)
    total = sum(2 * (level + 1) * (level + 2) * degree for level in plan.relinearisation_levels)  # keys
    linears: Sequence[BatchLinear | BfvBatchLinear] = plan.linears
    for linear, layer in zip(linears, layers, strict=True):
        values = linear.polynomials * (linear.level + 1) * degree
        total += (layer.open + layer.largest) * values
        total += 4 * len(linear.weights)  # weights, columns and what describes them
    # Digits of a key switch, the value itself, its residues in SEAL's 64 bits and their serialisations.
    each = (primes + 8) * (primes + 1) * degree + 16 * 2 * primes * degree
    return _RESIDUE_BYTES * (total + threads * each)


def _pieces(values: Numbers) -> list[Numbers]:
    return [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]


def _layer(linear: BatchLinear | BfvBatchLinear, arriving: Sequence[Numbers]) -> LayerSchedule:
    chunk_of = np.empty(linear.inputs, dtype=np.int64)
    index_of = np.empty(linear.inputs, dtype=np.int64)
    for number, inputs in enumerate(arriving):
        chunk_of[inputs], index_of[inputs] = number, np.arange(len(inputs))
    chunk, index = chunk_of[linear.columns], index_of[linear.columns]
    order = np.lexsort((index, linear.rows, chunk))
    chunk, index, rows, weights = chunk[order], index[order], linear.rows[order], linear.weights[order]
    first_chunk = np.full(linear.outputs, len(arriving))
    last_chunk = np.full(linear.outputs, -1)
    np.minimum.at(first_chunk, rows, chunk)
    np.maximum.at(last_chunk, rows, chunk)
    bounds = np.searchsorted(chunk, np.arange(len(arriving) + 1))
    place_of = np.empty(linear.outputs, dtype=np.int64)
    free: list[int] = []
    used = 0
    chunks: list[Chunk] = []
    for number, inputs in enumerate(arriving):
        part = slice(bounds[number], bounds[number + 1])
        for output in np.flatnonzero(first_chunk == number):
            if not free:
                free.append(used)
                used += 1
            place_of[output] = free.pop()
        closed = np.flatnonzero(last_chunk == number)
        groups, columns, values, ordered = _group(rows[part], index[part], weights[part])
        sums, opens = place_of[ordered], first_chunk[ordered] == number
        chunks.append(Chunk(inputs, groups, columns, values, sums, opens, (closed, place_of[closed])))
        free.extend(reversed(place_of[closed].tolist()))
    return LayerSchedule(tuple(chunks), used, max(len(inputs) for inputs in arriving))


def _group(
    rows: Numbers, index: Numbers, weights: Numbers
) -> tuple[Numbers, npt.NDArray[np.int32], npt.NDArray[np.int32], Numbers]:
    """Put rows with the same columns together; entries come sorted by row, then by column."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    stops = np.append(starts[1:], len(rows))
    alike: dict[bytes, list[int]] = {}
    for run, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        alike.setdefault(index[start:stop].tobytes(), []).append(run)
    groups: list[tuple[int, int, int, int, int]] = []
    columns: list[Numbers] = []
    values: list[Numbers] = []
    ordered: list[int] = []
    at_column = at_weight = 0
    for runs in alike.values():
        used = index[starts[runs[0]] : stops[runs[0]]]
        columns.append(used)
        done = 0
        while done < len(runs):
            count = next(size for size in ROWS if size <= len(runs) - done)
            together = runs[done : done + count]
            groups.append((at_column, len(used), at_weight, len(ordered), count))
            values.append(np.stack([weights[starts[run] : stops[run]] for run in together], axis=1).reshape(-1))
            ordered += [int(rows[starts[run]]) for run in together]
            at_weight += count * len(used)
            done += count
        at_column += len(used)
    return (
        np.array(groups, dtype=np.int64).reshape(-1, 5),
        np.concatenate([*columns, np.empty(0, np.int64)]).astype(np.int32),
        np.concatenate([*values, np.empty(0, np.int64)]).astype(np.int32),
        np.array(ordered, dtype=np.int64),
    )
