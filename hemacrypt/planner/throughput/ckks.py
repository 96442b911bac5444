"""Planning the throughput layout: where to relinearise and rescale, and at which scales.

All schedules of a small family are ordered by what they cost, and the first whose predicted error is small enough is
taken. A schedule says on which level the input is encrypted, how many primes each operation divides out, and whether
squares are relinearised at once or after the next affine map.

The error follows `hemacrypt.planner.noise`, with two differences. Weights are integers, not rounded polynomials: a
weight is off by at most half a unit, and that acts on the values alone, not on N coefficients. And the error is linear
in all variances, so each source is carried to the logits once and weighed by its scales afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Entries
from hemacrypt.plan.batch_plan import (
    LARGEST_ROW,
    LARGEST_WEIGHT,
    BatchLinear,
    BatchPlan,
    BatchSquare,
    BatchStep,
    PublicBatchPlan,
)
from hemacrypt.plan.plan import KeyGroup, Parameters
from hemacrypt.planner import chain
from hemacrypt.planner.latency.scales import HEADROOM_BITS
from hemacrypt.planner.noise import NoiseModel, rounded_up

# A bound on the error that is this part of the largest logit is small enough to stop looking for a better schedule.
TARGET = 1e-4
# A single slot, no mean over copies: see `noise.deviations_of_bound`.
DEVIATIONS = 6 * (1 + 1.4)
# Roundings of many weights add up to a normal distribution.
ROUNDING_DEVIATIONS = 6
# Scales in bits: below the first rounding swamps values, above the last float64 has no digits left to encode.
_FEWEST_BITS, _MOST_BITS = 12, 50
_SMALLEST_PEAK = 2.0**-20

# Milliseconds on one core with AVX-512, from benchmarks/batch.py; they order schedules, nothing more.
_PRODUCT_MS = 1e-6 / 18
_TRANSFORM_MS = 0.02 / 8192
_READ_MS = 0.22 / 8192
# SEAL stores a 30-bit residue in 8 bytes and compresses with zstd: measured 4.45 bytes for a residue of random bits.
_BYTES_PER_RESIDUE = 4.45
# A batch is hundreds of megabytes: schedules are compared as over a line of 1 Gbit/s.
BYTE_MS = 8e-6


@dataclass(frozen=True)
class _Schedule:
    """How many primes each affine map and each square divides out, and from which level.

    Attributes
    ----------
    level:
        Of the fresh ciphertexts.
    maps:
        Rescales after each affine map.
    square:
        Rescales after each square; None when relinearisation waits for the next affine map.
    """

    level: int
    maps: tuple[int, ...]
    square: int | None

    def levels(self) -> Iterator[tuple[int, int | None]]:
        """Yield the levels of the input of each affine map and of the square behind it."""
        level = self.level
        for number, rescales in enumerate(self.maps):
            last = number + 1 == len(self.maps)
            yield level, None if last else level - rescales
            level -= rescales + (0 if last else self.square or 0)

    @property
    def last_level(self) -> int:
        """Level of the replies."""
        return self.level - sum(self.maps) - (self.square or 0) * (len(self.maps) - 1)


@dataclass(frozen=True, eq=False)
class _Sources:
    """What each source of error at scale 1 adds to the variance of every logit, shape (logits,) each.

    Attributes
    ----------
    fresh:
        An error of variance 1 in every input.
    maps, squares:
        The same in every output of an affine map, of a square.
    roundings:
        The rounding of an affine map's weights.
    """

    fresh: Array
    maps: list[Array]
    squares: list[Array]
    roundings: list[Array]


def plan_batch_bundle(bundle: Bundle, parameters: Parameters | None = None) -> BatchPlan:
    """Plan batches for a bundle's network; see `plan_batch`."""
    manifest = bundle.manifest
    return plan_batch(bundle.network, manifest.name, manifest.labels, manifest.preprocessing.digest, parameters)


def plan_batch(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    parameters: Parameters | None = None,
) -> BatchPlan:
    """Plan the evaluation of a network on as many images as a ciphertext has slots (throughput layout).

    Parameters
    ----------
    network:
        Any chain of affine maps and squares.
    name:
        What clients call the model.
    labels:
        What each logit stands for; numbered when not given.
    preprocessing_digest:
        Names the preprocessing that clients must follow.
    parameters:
        Those of the latency plan, so that clients need one secret key only. When not given, they are chosen as for a
        latency plan; a network too wide for that layout gets the smallest secure degree.

    Returns
    -------
    BatchPlan

    Raises
    ------
    PlanError
        If no secure parameters serve the network, or an output of a layer depends on no input.
    """
    entries = [layer.entries() for layer in network.linears]
    for number, (layer, (rows, _, _)) in enumerate(zip(network.linears, entries, strict=True)):
        idle = layer.outputs - len(np.unique(rows))
        if idle:
            raise PlanError(
                f"layer {number} ({layer.describe()}) has {idle} outputs with only zero weights, which nothing would "
                "encrypt; remove them and count their biases into the next layer"
            )
    chosen = parameters or _parameters(network)
    with np.errstate(over="ignore", invalid="ignore"):
        peaks = [np.asarray(peak, dtype=np.float64) for peak in network.peaks]
        sources = _sources(network, entries, peaks)
    largest = [max(float(peak.max()), _SMALLEST_PEAK) for peak in peaks]
    if not all(math.isfinite(peak * peak) for peak in largest):
        raise PlanError("values up to infinity between the layers; train with smaller activations")
    search = _Search(network, entries, chosen, largest, sources)
    schedule, bits, bound = search.best()
    steps = search.steps(schedule, bits)
    last = steps[-1].output_scale
    levels = sorted({step.level for step in steps if step.relinearise}, reverse=True)
    order = np.arange(network.inputs).reshape(network.input_shape).transpose(1, 2, 0).reshape(-1)
    public = PublicBatchPlan(
        model=name,
        labels=tuple(labels) if labels is not None else tuple(f"logit {i}" for i in range(network.outputs)),
        parameters=chosen,
        # Row by row, all channels of a pixel together: a convolution then has few sums open at a time.
        input_order=tuple(order.tolist()),
        input_level=schedule.level,
        output_level=schedule.last_level,
        input_scale=2.0 ** bits[0],
        output_scale=last,
        keys=tuple(KeyGroup(level, True, ()) for level in levels),
        logit_error_bound=rounded_up(bound),
        logit_limit=2 ** (chosen.bits_at(schedule.last_level) - 1) / last,
        preprocessing_digest=preprocessing_digest,
    )
    return BatchPlan(
        public=public,
        steps=steps,
        estimated_ms=search.compute_ms(schedule),
        calibrated=network.magnitudes is not None,
        reasons=_reasons(network, chosen, schedule, bits),
    )


def _parameters(network: CollapsedNetwork) -> Parameters:
    return list(chain.candidates(network.squares, 1, []))[-1]


def _sources(network: CollapsedNetwork, entries: Sequence[Entries], peaks: Sequence[Array]) -> _Sources:
    """Carry every source of error back from the logits; where values are multiplied, at their peaks."""
    count = network.outputs
    variance, absolute = np.eye(count), np.eye(count)  # (logits, values): of errors that are independent, that agree
    maps: list[Array] = []
    squares: list[Array] = []
    roundings: list[Array] = []
    for number in reversed(range(len(network.linears))):
        layer, (rows, columns, values) = network.linears[number], entries[number]
        into = peaks[number - 1] ** 2 if number else np.full(network.inputs, max(map(abs, network.input_range)))
        maps.append(variance.sum(axis=1))
        # Weights of one output are off independently. A filter of a convolution is off alike at all its places, so
        # there deviations add up, not variances.
        off = np.sqrt(np.bincount(rows, into[columns] ** 2, layer.outputs) / 12) * absolute
        filters = len(layer.bias) if isinstance(layer, Convolution) else layer.outputs
        roundings.append((off.reshape(count, filters, -1).sum(axis=2) ** 2).sum(axis=1))
        variance = np.stack([np.bincount(columns, values**2 * gain[rows], layer.inputs) for gain in variance])
        absolute = np.stack([np.bincount(columns, np.abs(values) * gain[rows], layer.inputs) for gain in absolute])
        if number:
            squares.append(variance.sum(axis=1))
            slope = 2 * peaks[number - 1]
            variance, absolute = variance * slope**2, absolute * slope
    return _Sources(variance.sum(axis=1), maps[::-1], squares[::-1], roundings[::-1])


class _Search:
    """Schedules and scales for one network under one modulus chain."""

    def __init__(
        self,
        network: CollapsedNetwork,
        entries: Sequence[Entries],
        parameters: Parameters,
        largest: Sequence[float],
        sources: _Sources,
    ) -> None:
        self._network, self._entries, self._parameters, self._sources = network, entries, parameters, sources
        model = NoiseModel(parameters)
        self._fresh, self._rescale = model.fresh + model.encoding, model.rescale
        self._switch = [float(model.key_switch(level).max()) for level in range(parameters.top_level + 1)]
        self._logs = [math.log2(prime) for prime in parameters.data_primes]
        self._room = [parameters.bits_at(level) - HEADROOM_BITS - 1 for level in range(parameters.top_level + 1)]
        self._peak_bits = [math.log2(peak) for peak in largest]
        self._target = TARGET * largest[-1]
        self._most = [_most_weight_bits(rows, values) for rows, _, values in entries]
        # Two bits of the largest weight at the least: fewer are no weights any more.
        self._least = [2 - math.floor(math.log2(float(np.abs(values).max()))) for _, _, values in entries]

    def best(self) -> tuple[_Schedule, tuple[int, ...], float]:
        """Return the cheapest schedule that is precise enough, else the most precise; its bits; its error bound."""
        best: tuple[_Schedule, tuple[int, ...], float] | None = None
        for schedule in sorted(self._schedules(), key=self._cost_ms):
            bits = self._best_bits(schedule)
            if bits is None:
                continue
            bound = self._bound(schedule, bits)
            if best is None or bound < best[2]:
                best = schedule, bits, bound
            if bound <= self._target:
                break
        if best is None:
            raise PlanError(
                f"values up to 2^{max(self._peak_bits):.0f} between the layers leave no room for a scale in "
                f"{len(self._parameters.data_primes)} primes of 30 bits; train with smaller activations"
            )
        return best

    def _schedules(self) -> Iterator[_Schedule]:
        """All maps but the first and the last rescale alike, and all squares do."""
        count = len(self._network.linears)
        for level in range(self._parameters.top_level + 1):
            for first, inner, last in product(range(3), repeat=3):
                maps = (last,) if count == 1 else (first, *[inner] * (count - 2), last)
                for square in (None, 0, 1, 2):
                    schedule = _Schedule(level, maps, square)
                    alike = (count < 3 and inner > 0) or (count < 2 and (first > 0 or square is not None))
                    if schedule.last_level >= 0 and not alike:
                        yield schedule

    def _scales(self, schedule: _Schedule, bits: Sequence[int]) -> Iterator[tuple[float, float, float, float]]:
        """Yield for each map, in bits: scale of input, of product, after the rescales, and of the product squared."""
        scale = float(bits[0])
        for number, (level, at_square) in enumerate(schedule.levels()):
            total = scale + bits[number + 1]
            after = total - sum(self._logs[level - schedule.maps[number] + 1 : level + 1])
            yield scale, total, after, 2 * after
            if at_square is not None:
                scale = 2 * after - sum(self._logs[at_square - (schedule.square or 0) + 1 : at_square + 1])

    def _fits(self, schedule: _Schedule, bits: Sequence[int]) -> bool:
        if not _FEWEST_BITS <= bits[0] <= _MOST_BITS:
            return False
        limits = zip(self._least, self._most, bits[1:], strict=True)
        if not all(least <= own <= most for least, most, own in limits):
            return False
        along = zip(schedule.levels(), self._scales(schedule, bits), self._peak_bits, strict=True)
        for (level, at_square), (scale, total, after, squared), peak in along:
            if min(scale, after) < _FEWEST_BITS or total + max(peak, 0) > self._room[level]:
                return False
            if at_square is not None and squared + max(2 * peak, 0) > self._room[at_square]:
                return False
        return True

    def _bound(self, schedule: _Schedule, bits: Sequence[int]) -> float:
        """Return the bound on the error of a logit."""
        sources = self._sources
        rounding = np.zeros_like(sources.fresh)
        variance = sources.fresh * (self._fresh * 4.0 ** -bits[0])
        for number, ((level, at_square), (_, total, _, squared)) in enumerate(
            zip(schedule.levels(), self._scales(schedule, bits), strict=True)
        ):
            added = self._rescaled(total, level, schedule.maps[number])
            if number and schedule.square is None:
                added += self._switch[level] * 4.0**-total
            variance = variance + added * sources.maps[number]
            rounding = rounding + sources.roundings[number] * 4.0 ** -bits[number + 1]
            if at_square is not None and schedule.square is not None:
                added = self._switch[at_square] * 4.0**-squared
                added += self._rescaled(squared, at_square, schedule.square)
                variance = variance + added * sources.squares[number]
        return float((DEVIATIONS * np.sqrt(variance) + ROUNDING_DEVIATIONS * np.sqrt(rounding)).max())

    def _rescaled(self, scale: float, level: int, rescales: int) -> float:
        """Return the variance that rescales from a scale in bits add."""
        added = 0.0
        for prime in range(level, level - rescales, -1):
            scale -= self._logs[prime]
            added += self._rescale * 4.0**-scale
        return added

    def _best_bits(self, schedule: _Schedule) -> tuple[int, ...] | None:
        """Find the scales of the input and of the weights with the smallest error; None when nothing fits.

        Every error falls with every scale, so scales grow until nothing fits, then trade bits with each other.
        """
        starts = (
            (first, *(least + (most - least) * part // 8 for least, most in zip(self._least, self._most, strict=True)))
            for first in range(_FEWEST_BITS, _MOST_BITS + 1, 2)
            for part in range(9)
        )
        found = [(self._bound(schedule, start), start) for start in starts if self._fits(schedule, start)]
        if not found:
            return None
        lowest, bits = min(found)
        count, step = len(bits), 4
        while step:
            better = None
            # A square doubles the bits that came before it, so a trade need not be even.
            for up, down, price in product(range(count), range(count), (0, step, 2 * step, 4 * step)):
                changed = list(bits)
                changed[up] += step
                if down != up:
                    changed[down] -= price
                trial = tuple(changed)
                if self._fits(schedule, trial) and (bound := self._bound(schedule, trial)) < lowest * 0.999:
                    better, lowest = trial, bound
            if better is None:
                step //= 2
            else:
                bits = better
        return bits

    def compute_ms(self, schedule: _Schedule) -> float:
        """Return the estimated milliseconds of a batch on one core, reading included."""
        degree, total = self._parameters.degree, 0.0
        products = transforms = 0
        for number, (level, at_square) in enumerate(schedule.levels()):
            late = number > 0 and schedule.square is None
            outputs = self._network.linears[number].outputs
            products += len(self._entries[number][2]) * (3 if late else 2) * (level + 1)
            transforms += outputs * (_relinearise(level) if late else 0)
            transforms += outputs * _rescale(level, schedule.maps[number])
            if at_square is not None and schedule.square is not None:
                transforms += outputs * (_relinearise(at_square) + _rescale(at_square, schedule.square))
        total += products * degree * _PRODUCT_MS + transforms * degree * _TRANSFORM_MS
        return total + self._network.inputs * (schedule.level + 1) * degree * _READ_MS

    def _cost_ms(self, schedule: _Schedule) -> float:
        polynomials = self._network.inputs * (schedule.level + 1)
        polynomials += 2 * self._network.outputs * (schedule.last_level + 1)
        sent = polynomials * self._parameters.degree * _BYTES_PER_RESIDUE
        return self.compute_ms(schedule) + sent * BYTE_MS

    def steps(self, schedule: _Schedule, bits: Sequence[int]) -> tuple[BatchStep, ...]:
        """Write a schedule down, weights rounded."""
        steps: list[BatchStep] = []
        primes = self._parameters.data_primes
        scale = 2.0 ** bits[0]
        for number, (level, at_square) in enumerate(schedule.levels()):
            layer, (rows, columns, values) = self._network.linears[number], self._entries[number]
            weight_scale = 2.0 ** bits[number + 1]
            after = scale * weight_scale
            for prime in primes[level : level - schedule.maps[number] : -1] if schedule.maps[number] else ():
                after /= prime
            steps.append(
                BatchLinear(
                    name=layer.describe(),
                    level=level,
                    inputs=layer.inputs,
                    outputs=layer.outputs,
                    rows=rows.astype(np.int64),
                    columns=columns.astype(np.int64),
                    weights=np.rint(values * weight_scale).astype(np.int64),
                    bias=layer.offset(),
                    relinearise=number > 0 and schedule.square is None,
                    rescales=schedule.maps[number],
                    input_scale=scale,
                    weight_scale=weight_scale,
                    output_scale=after,
                )
            )
            if at_square is not None:
                scale, rescales = after * after, schedule.square or 0
                for place in range(at_square, at_square - rescales, -1):
                    scale /= primes[place]
                steps.append(BatchSquare(at_square, schedule.square is not None, rescales, after, scale))
        return tuple(steps)


def _most_weight_bits(rows: np.typing.NDArray[np.intp], values: Array) -> int:
    """Return the bits of the largest weight scale at which integer weights can be summed without reduction."""
    absolute = np.abs(values)
    sums, counts = np.bincount(rows, absolute), np.bincount(rows)
    by_sum = math.floor(math.log2((LARGEST_ROW - float(counts.max())) / float(sums.max())))
    return min(by_sum, math.floor(math.log2((LARGEST_WEIGHT - 1) / float(absolute.max()))))


def _relinearise(level: int) -> int:
    """Count the transforms of a relinearisation: each digit to every prime, then twice the special prime's division."""
    primes = level + 1
    return primes + primes * primes + 2 * (primes + 1)


def _rescale(level: int, rescales: int) -> int:
    """Count the transforms of some rescales of two polynomials."""
    return sum(2 * (level + 1 - done) for done in range(rescales))


def _reasons(
    network: CollapsedNetwork, parameters: Parameters, schedule: _Schedule, bits: Sequence[int]
) -> tuple[str, ...]:
    reasons = [
        f"one value in each of {network.inputs} ciphertexts and one image in each of {parameters.slots} slots; a batch "
        "costs the same however many of them are used",
        f"ciphertexts carry {schedule.level + 1} of {len(parameters.data_primes)} primes; "
        f"scales: input 2^{bits[0]}, weights {', '.join(f'2^{own}' for own in bits[1:])}",
    ]
    if network.squares and schedule.square is None:
        reasons.append(
            f"relinearisation waits for the next affine map: {sum(m.outputs for m in network.linears[1:])} times "
            f"instead of {sum(m.outputs for m in network.linears[:-1])}"
        )
    return tuple(reasons)
