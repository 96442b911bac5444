"""Small exact plans made by hand, and what evaluates them in the clear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, BfvSquare, BfvStep, Integers, PublicBfvPlan, centred
from hemacrypt.plan.plan import Copy, KeyGroup, Layout, Parameters, Term, Turn, is_prime


def primes_of(degree: int, bits: int, count: int, avoid: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the largest primes below 2^bits that are 1 modulo 2N, apart from some."""
    found: list[int] = []
    candidate = (1 << bits) - (1 << bits) % (2 * degree) + 1
    while len(found) < count:
        candidate -= 2 * degree
        if candidate < 2:
            raise ValueError(f"fewer than {count} primes of {bits} bits are 1 modulo {2 * degree}")
        if candidate not in avoid and is_prime(candidate):
            found.append(candidate)
    return tuple(found)


def chain(degree: int, data_primes: int) -> Parameters:
    """Return a chain of primes just below 2^30."""
    special, *data = primes_of(degree, 30, data_primes + 1)
    return Parameters(degree, tuple(data), special)


@dataclass(frozen=True)
class Handmade:
    """A dense network over integers, squares in between, planned by the textbook.

    Every vector repeats in all slots with one period P; the matrix goes by its P diagonals, baby-step giant-step.

    Attributes
    ----------
    plan:
        The plan.
    matrices, biases:
        The layers' integers.
    """

    plan: BfvPlan
    matrices: tuple[Integers, ...]
    biases: tuple[Integers, ...]

    def integers(self, images: npt.ArrayLike) -> npt.NDArray[np.object_]:
        """Evaluate images in the clear, shape (images, values) -> (images, logits), Python integers."""
        values = np.rint(np.asarray(images) * self.plan.public.input_scale).astype(np.int64).astype(object)
        for number, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            values = values @ matrix.T.astype(object) + bias
            if number < len(self.matrices) - 1:
                values = values * values
        return values


def handmade(
    widths: Sequence[int],
    parameters: Parameters,
    moduli: Sequence[int],
    *,
    seed: int = 0,
    largest: int = 7,
    images: int = 1,
    ciphertexts: int = 1,
    mixed: bool = False,
    drops: Sequence[int] | None = None,
) -> Handmade:
    """Plan a random dense network.

    Parameters
    ----------
    widths:
        Values of the input and after each layer.
    parameters, moduli:
        Ring and plaintext moduli.
    seed, largest:
        Of the random weights, and how large they are at most.
    images:
        How many images a request carries.
    ciphertexts:
        Over how many ciphertexts every vector but the last is spread.
    mixed:
        Whether the second half of the input lies in the second row.
    drops:
        Modulus switches after each step; by default one after each but the last.
    """
    rng = np.random.default_rng(seed)
    slots, layers = parameters.slots, len(widths) - 1
    period = 1
    while period < max(-(-width // ciphertexts) for width in widths):
        period *= 2
    if drops is None:
        drops = [1] * (2 * layers - 2) + [0]
    matrices = [rng.integers(-largest, largest + 1, (widths[n + 1], widths[n])) for n in range(layers)]
    biases = [rng.integers(-100 * largest, 100 * largest + 1, widths[n + 1]) for n in range(layers)]

    def layout(width: int, *, rows: bool = False, spread: bool = True) -> Layout:
        places = np.arange(width)
        if rows:
            half = -(-width // 2)
            return Layout(places % half, period, slots, ciphertexts, places >= half)
        over = ciphertexts if spread else 1
        # Value i lies in ciphertext i mod c.
        return Layout(places % over * period + places // over, period, slots, over, images=images)

    layouts = [layout(widths[n], rows=mixed and n == 0, spread=n < layers) for n in range(layers + 1)]
    steps: list[BfvStep] = []
    level, groups = parameters.top_level, []
    for number in range(layers):
        source, target = layouts[number], layouts[number + 1]
        step = _dense(matrices[number], biases[number], source, target, level, level - drops[2 * number], moduli)
        steps.append(step)
        turns = {Turn(copy.step) for copy in step.copies[step.inputs :]} | {Turn(step.giant_step)}
        turns |= {turn for group in step.turns for turn in group}
        elements = {parameters.galois_element(*turn) for turn in turns if turn != Turn(0)}
        groups.append([level, False, elements])
        level = step.next_level
        if number < layers - 1:
            steps.append(BfvSquare(level, level - drops[2 * number + 1], target.ciphertexts))
            groups.append([level, True, set()])
            level = steps[-1].next_level
    keys = _united(groups)
    public = PublicBfvPlan(
        model="handmade",
        labels=tuple(str(n) for n in range(widths[-1])),
        parameters=parameters,
        plain_moduli=tuple(moduli),
        input_layout=layouts[0],
        output_layout=layouts[-1],
        input_scale=15.0,
        output_scale=1000.0,
        output_level=level,
        keys=keys,
        input_range=(-(1 << 40), 1 << 40),
        largest_logit=(math.prod(moduli) - 1) // 2,
        proven=True,
        quantisation_error=0.5,
    )
    return Handmade(BfvPlan(public, tuple(steps), (), (), None, ()), tuple(matrices), tuple(biases))


def _united(groups: Sequence[list[object]]) -> tuple[KeyGroup, ...]:
    levels: dict[int, tuple[bool, set[int]]] = {}
    for level, squares, elements in groups:
        before = levels.get(level, (False, set()))
        levels[level] = (before[0] or squares, before[1] | elements)
    return tuple(
        KeyGroup(level, squares, tuple(sorted(elements)))
        for level, (squares, elements) in sorted(levels.items(), reverse=True)
        if squares or elements
    )


def _dense(
    matrix: Integers, bias: Integers, source: Layout, target: Layout, level: int, next_level: int, moduli: Sequence[int]
) -> BfvLinear:
    period, slots = source.period, source.slots
    babies = 1 << (period.bit_length() // 2)
    giants = -(-period // babies)
    copies = [Copy(n, 0) for n in range(source.ciphertexts)]
    of: dict[tuple[int, int], int] = {(n, 0): n for n in range(source.ciphertexts)}
    for n in range(source.ciphertexts):
        for baby in range(1, babies):
            # Half of the copies are made from a copy, so that both kinds of rotation occur.
            parent = of[n, 1] if baby > 2 and baby % 2 else n
            step = baby - 1 if parent != n else baby
            of[n, baby] = len(copies)
            copies.append(Copy(parent, step))
    diagonals: list[Integers] = []
    terms: list[tuple[tuple[Term, ...], ...]] = []
    for output in range(target.ciphertexts):
        sums = []
        for giant in range(giants):
            inner = []
            for n in range(source.ciphertexts):
                for baby in range(babies):
                    rows = _diagonal(matrix, source, target, n, output, giant * babies + baby)
                    if rows.any():
                        inner.append(Term(of[n, baby], len(diagonals)))
                        diagonals.append(np.roll(rows, giant * babies, axis=-1))
            sums.append(tuple(inner))
        while len(sums) > 1 and not sums[-1]:
            sums.pop()
        terms.append(tuple(sums))
    biases = np.zeros((len(moduli), target.ciphertexts, 2, slots), dtype=np.int64)
    for m, modulus in enumerate(moduli):
        block = np.zeros((target.ciphertexts, period), dtype=np.int64)
        block.reshape(-1)[target.positions] = centred(bias, modulus)
        biases[m] = np.tile(block[:, None], (1, 2, slots // period))
    return BfvLinear(
        name=f"dense {matrix.shape[1]} -> {matrix.shape[0]}",
        level=level,
        next_level=next_level,
        inputs=source.ciphertexts,
        copies=tuple(copies),
        giants=tuple(terms),
        giant_step=babies if max(map(len, terms)) > 1 else 0,
        turns=((Turn(0, True),),) if source.mixes else (),
        diagonals=np.array(diagonals),
        bias=biases,
    )


def _diagonal(matrix: Integers, source: Layout, target: Layout, n: int, output: int, shift: int) -> Integers:
    """Return diagonal number ``shift`` of the part of a matrix from ciphertext n to ciphertext ``output``."""
    period = source.period
    rows = np.zeros((2, period), dtype=np.int64)
    for row in range(2):
        block = np.zeros((period, period), dtype=np.int64)
        columns = np.flatnonzero((source.ciphertext == n) & (source.flags == (row == 1) if source.mixes else True))
        lines = np.flatnonzero(target.ciphertext == output)
        block[np.ix_(target.slot[lines], source.slot[columns])] = matrix[np.ix_(lines, columns)]
        place = np.arange(period)
        rows[row] = block[place, (place + shift) % period]
    return np.tile(rows, (1, source.slots // period))
