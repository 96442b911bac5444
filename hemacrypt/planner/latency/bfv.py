"""Planning an exact evaluation under BFV: integers, plaintext moduli, degree, chain, levels; or why there is none.

Layouts, diagonals and turns are found as for CKKS (`hemacrypt.planner.latency.ckks`), with rows in the place of real
and imaginary parts. What differs: integers grow with every layer and must fit the product of the plaintext moduli, and
the noise of every operation is in proportion to the plaintext modulus. A small modulus leaves more noise budget, a
large one holds more, so fewer evaluations are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, Literal

import numpy as np

from hemacrypt.errors import NetworkError, PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork
from hemacrypt.model.quantise import PRECISION, Exact, QuantisedNetwork, at_scales, quantise
from hemacrypt.plan.bfv_batch_plan import BfvBatchPlan
from hemacrypt.plan.bfv_plan import (
    LARGEST_PLAIN_BITS,
    MOST_PLAIN_MODULI,
    BfvLinear,
    BfvPlan,
    BfvSquare,
    BfvStep,
    Integers,
    PublicBfvPlan,
    centred,
    check_plain_moduli,
)
from hemacrypt.plan.plan import PRIME_LIMIT, KeyGroup, Layout, Parameters, Turn, is_prime, united
from hemacrypt.plan.security import LARGEST_MODULUS_BITS
from hemacrypt.planner import chain, costs, limits
from hemacrypt.planner.bfv_noise import BfvNoiseModel, Noise
from hemacrypt.planner.latency.choices import Choice, Chooser, Partial, affordable
from hemacrypt.planner.latency.diagonals import MatrixForm, power_of_two_from
from hemacrypt.planner.latency.rotations import Split, arrange, splits
from hemacrypt.seal import sizes

Magnitudes = Literal["worst", "measured"]

# Bytes of evaluation keys at degree 8192 unless the operator says otherwise: less than CKKS plans take
# (`hemacrypt.planner.latency.ckks.KEY_BUDGET`), so that what these need for one image is likely to serve.
_USUAL_KEYS: Final = 30_000_000
# With measured magnitudes, logits may be 2^4 times as large as the largest that calibration saw, as under CKKS.
HEADROOM_BITS: Final = 4
# Precisions that the weights get where the plaintext moduli have room, and where moduli that were asked for lack it.
_FINER: Final = (2.0**-9, 2.0**-8.5, 2.0**-8, 2.0**-7.5)
_COARSER: Final = (2.0**-6.5, 2.0**-6)
# A last map without rotate-and-sum has so many diagonals at most.
_MOST_UNSUMMED: Final = 512
# A modulus switch pays where it leaves noise of at least so many bits; the more, the less of the budget it costs. None:
# one switch after every step, so that levels and keys are those of CKKS.
_POLICIES: Final = (None, 0.0, 3.0, 6.0, 9.0, 12.0)


@dataclass(frozen=True, eq=False)
class _Maps:
    """One way to lay out a network: everything but levels and moduli."""

    source: Layout
    targets: tuple[Layout, ...]
    steps: tuple[BfvStep, ...]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A complete choice."""

    maps: _Maps
    parameters: Parameters
    moduli: tuple[int, ...]
    steps: tuple[BfvStep, ...]
    shares_keys: bool

    @property
    def milliseconds(self) -> float:
        return costs.exact_ms(self.parameters, self.steps, len(self.moduli))


def plan_bfv_bundle(bundle: Bundle, **options: Any) -> BfvPlan:
    """Plan the exact evaluation of a bundle's network; options as in `plan_bfv`."""
    manifest = bundle.manifest
    return plan_bfv(bundle.network, manifest.name, manifest.labels, manifest.preprocessing.digest, **options)


def plan_bfv(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    *,
    images: int = 1,
    plain_moduli: Sequence[int] | None = None,
    degree: int | None = None,
    magnitudes: Magnitudes = "worst",
    key_budget: int | None = None,
    parameters: Parameters | None = None,
) -> BfvPlan:
    """Plan the exact evaluation of a network, or say which layer forbids it.

    Parameters
    ----------
    network, name, labels, preprocessing_digest, key_budget:
        As in `hemacrypt.planner.plan_network`.
    images:
        1, or 2: then each row carries one image.
    plain_moduli:
        Plaintext moduli to use, checked; by default as few as hold the logits, as small as possible.
    degree:
        Polynomial degree to use; by default the smallest at which the noise budget suffices.
    magnitudes:
        ``worst``: no input in range makes a logit that the moduli do not hold. ``measured``: none that is less than 16
        times as large as the largest of the calibration data.
    parameters:
        Degree and chain to use, those of a CKKS plan for example, whose keys then serve both.

    Returns
    -------
    BfvPlan

    Raises
    ------
    PlanError
        If no parameters serve the network, or those that were asked for do not; it says which layer is at fault.
    """
    if images not in (1, 2):
        raise PlanError(f"{images} images in a request; an exact plan takes 1, or 2: one in each row")
    limits.check_network(network)
    quantised, largest = quantised_with_room(network, magnitudes, plain_moduli)
    found, rejected = _search(quantised, largest, images, plain_moduli, degree, key_budget, parameters)
    for precision in _FINER:
        # Room that the moduli have to spare makes the weights finer.
        finer = quantise(network, precision)
        if 2 * _largest_logit(finer, magnitudes) < math.prod(found.moduli):
            quantised, largest = finer, _largest_logit(finer, magnitudes)
            found, _ = _search(finer, largest, images, found.moduli, None, key_budget, found.parameters)
            break
    steps = _with_biases(found, quantised)
    public = PublicBfvPlan(
        model=name,
        labels=tuple(labels) if labels is not None else tuple(f"logit {i}" for i in range(network.outputs)),
        parameters=found.parameters,
        plain_moduli=found.moduli,
        input_layout=found.maps.source,
        output_layout=found.maps.targets[-1],
        input_scale=quantised.input_scale,
        output_scale=quantised.output_scale,
        output_level=steps[-1].next_level,
        keys=_keys(found.parameters, steps),
        input_range=quantised.input_bounds,
        largest_logit=largest,
        proven=magnitudes == "worst",
        quantisation_error=float(f"{quantised.deviation:.3e}"),
        preprocessing_digest=preprocessing_digest,
    )
    needed = sizes.key_bytes(found.parameters, public.keys)
    if key_budget is not None and needed > key_budget:
        raise PlanError(
            f"the evaluation keys would take {needed / 1e6:.1f} MB, the budget is {key_budget / 1e6:.1f} MB; "
            "raise the budget or use a smaller network"
        )
    return BfvPlan(
        public=public,
        steps=steps,
        noise_budgets=tuple(_budgets(found.parameters, found.moduli, steps)),
        step_magnitudes=quantised.largest,
        step_measured=quantised.measured,
        reasons=(*rejected, *_reasons(found, largest, magnitudes)),
        weight_scales=quantised.weight_scales,
    )


def quantised_for(network: CollapsedNetwork, plan: BfvPlan | BfvBatchPlan) -> QuantisedNetwork:
    """Return the integer network that a plan evaluates, made again from the network that it was planned for.

    Raises
    ------
    PlanError
        If the plan is for another network.
    """
    quantised = at_scales(network, plan.public.input_scale, plan.weight_scales)
    if quantised.output_scale != plan.public.output_scale or quantised.largest != plan.step_magnitudes:
        raise PlanError("the plan was made for another network; plan this one")
    return quantised


def quantised_with_room(
    network: CollapsedNetwork, magnitudes: Magnitudes, plain_moduli: Sequence[int] | None
) -> tuple[QuantisedNetwork, int]:
    """Return the integer network and its largest logit: coarser where moduli that were asked for hold no more."""
    room = math.prod(plain_moduli) if plain_moduli else math.inf
    try:
        for precision in (PRECISION, *_COARSER):
            quantised = quantise(network, precision)
            largest = _largest_logit(quantised, magnitudes)
            if 2 * largest < room:
                break
    except NetworkError as error:
        raise PlanError(str(error)) from None
    return quantised, largest


def _largest_logit(quantised: QuantisedNetwork, magnitudes: Magnitudes) -> int:
    if magnitudes == "worst":
        return max(quantised.largest[-1], 1)
    measured = quantised.measured
    if measured is None:
        raise PlanError(
            "no magnitudes were measured for this network; calibrate it on training data or plan with the worst case"
        )
    return measured[-1] << HEADROOM_BITS


def _search(
    quantised: QuantisedNetwork,
    largest: int,
    images: int,
    plain_moduli: Sequence[int] | None,
    degree: int | None,
    key_budget: int | None,
    parameters: Parameters | None,
) -> tuple[_Candidate, list[str]]:
    """Return the best choice of the first degree that has one, and a sentence for everything that was rejected."""
    rejected: list[str] = []
    network = quantised.network
    widest = max(network.inputs, *(layer.outputs for layer in network.linears))
    for chains in chains_for(network.squares, widest, degree, parameters):
        tried = chains[0]
        fault = _unusable(plain_moduli, tried, largest, quantised)
        if fault:
            rejected.append(f"degree {tried.degree} was rejected: {fault}")
            continue
        ways = _ways(quantised, images, tried, key_budget)
        for choice in (chains[:1], chains[1:]):
            # The chain of CKKS first: what it serves needs no other keys.
            usual = choice[:1] == chains[:1]
            candidates = [
                replace(found, shares_keys=found.shares_keys and usual)
                for tried in choice
                for found in _fitting(ways, tried, largest, plain_moduli)
            ]
            if candidates:
                return min(candidates, key=lambda found: (not found.shares_keys, found.milliseconds)), rejected
            if choice:
                rejected.append(_fault(ways, choice[-1], largest, plain_moduli))
    raise PlanError("; ".join(rejected[-2:]) + "; " + _advice(quantised, largest))


def chains_for(
    squares: int, widest: int, degree: int | None, parameters: Parameters | None
) -> Iterator[list[Parameters]]:
    """Yield for each degree the chains to try, that of a CKKS plan first."""
    if parameters is not None:
        if degree not in (None, parameters.degree):
            raise PlanError(f"degree {degree} was asked for, and parameters of degree {parameters.degree}")
        yield [parameters]
        return
    if degree is not None and degree not in LARGEST_MODULUS_BITS:
        raise PlanError(f"polynomial degree {degree}; expected one of {list(LARGEST_MODULUS_BITS)}")
    smallest = chain.smallest_degree(squares, widest) if degree is None else degree
    usual = chain.data_primes_needed(squares)
    for tried, bits in LARGEST_MODULUS_BITS.items():
        most = bits // chain.PRIME_BITS - 1
        if tried < smallest or most < 1 or (degree is not None and tried != degree):
            continue
        yield [_parameters(tried, length) for length in range(min(usual, most), most + 1)]


def _parameters(degree: int, length: int) -> Parameters:
    primes = chain.primes_below(PRIME_LIMIT, degree)
    special = next(primes)
    return Parameters(degree, tuple(next(primes) for _ in range(length)), special)


def _unusable(
    plain_moduli: Sequence[int] | None, parameters: Parameters, largest: int, quantised: QuantisedNetwork
) -> str:
    """Say what is wrong with plaintext moduli that were asked for; nothing if all is well."""
    if plain_moduli is None:
        return ""
    try:
        check_plain_moduli(tuple(plain_moduli), parameters)
    except PlanError as error:
        return str(error)
    product = math.prod(plain_moduli)
    if 2 * largest < product:
        return ""
    return (
        f"the logits need {largest.bit_length() + 1} bits, the plaintext moduli that were asked for hold "
        f"{product.bit_length() - 1}"
    )


class _RowChooser(Chooser):
    """Chooses layouts of rows; the last map with rotate-and-sum, or without."""

    summed = True

    def _forms(self, path: Partial, number: int) -> list[tuple[MatrixForm, list[tuple[float, Split]]]]:
        if self.summed or number < self._network.squares:
            return super()._forms(path, number)
        layer, source = self._network.linears[number], path.layout
        if source.period > _MOST_UNSUMMED or power_of_two_from(layer.outputs) > source.period:
            return []
        target = Layout(np.arange(layer.outputs), source.period, source.slots, 1, images=source.images)
        form = MatrixForm(layer, self._entries[number], source, target, None)
        return [(form, splits(form, self.parameters.degree, self._level(number)))]


def _ways(quantised: QuantisedNetwork, images: int, parameters: Parameters, key_budget: int | None) -> list[_Maps]:
    """Return layouts to choose from: the cheapest, and the cheapest whose last map adds less noise."""
    chooser = _RowChooser(quantised.network, "rows", images, parameters)
    level = parameters.top_level
    # Where keys are longer than at the usual degree, as many of them as usual.
    usual = _USUAL_KEYS * sizes.one_key_bytes(parameters.degree, level) / sizes.one_key_bytes(8192, min(level, 5))
    ways: list[_Maps] = []
    for summed in (True, False):
        chooser.summed = summed
        chooser._chosen_at.clear()
        try:
            chosen = affordable(chooser, key_budget, round(usual))
        except PlanError:
            if summed:
                raise
            continue
        steps: list[BfvStep] = []
        for number, choice in enumerate(chosen.choices):
            if number:
                steps.append(BfvSquare(0, 0, chosen.choices[number - 1].form.target.ciphertexts))
            steps.append(_prepared(choice))
        ways.append(_Maps(chosen.source, tuple(choice.form.target for choice in chosen.choices), tuple(steps)))
    return ways


def _prepared(choice: Choice) -> BfvLinear:
    """Lay out a map; levels and biases come later."""
    form = choice.form
    copies, terms, moves = arrange(form, choice.split)
    if not all(any(giants) for giants in terms):
        raise PlanError(
            f"{form.layer.describe()}: a whole ciphertext of its {form.layer.outputs} outputs would depend on no "
            "input; remove outputs that have only zero weights"
        )
    diagonals = _diagonals(form)
    for number, move in enumerate(moves):
        diagonals[number] = np.roll(diagonals[number], move, axis=-1)
    return BfvLinear(
        name=form.layer.describe(),
        level=0,
        next_level=0,
        inputs=form.source.ciphertexts,
        copies=copies,
        giants=terms,
        giant_step=choice.split.stride if choice.split.giants > 1 else 0,
        turns=choice.turns,
        diagonals=diagonals,
        bias=np.zeros((0, len(terms), 2, form.target.slots), dtype=np.int64),
    )


def _diagonals(form: MatrixForm) -> Integers:
    """Return a form's diagonals for both rows, shape (diagonals, 2, slots).

    Where one image lies in both rows, each row's diagonals hold the weights of the columns that lie there.
    """
    _, columns, values = form.entries
    period = max(form.source.period, form.target.period)
    number, slot = form.places
    place = np.searchsorted(form.numbers, number)
    diagonals = np.zeros((len(form.numbers), 2, period), dtype=np.int64)
    weights = values.astype(np.int64)
    if form.source.mixes:
        np.add.at(diagonals, (place, form.source.flags[columns].astype(np.intp), slot), weights)
    else:
        for row in (0, 1):
            np.add.at(diagonals[:, row], (place, slot), weights)
    return np.tile(diagonals, (1, 1, form.target.slots // period))


def _fitting(
    ways: Sequence[_Maps], parameters: Parameters, largest: int, plain_moduli: Sequence[int] | None
) -> list[_Candidate]:
    """Return the choices that fit a chain, with as few plaintext moduli as possible."""
    wanted = [tuple(plain_moduli)] if plain_moduli else moduli_from_few_to_many(largest, parameters)
    for moduli in wanted:
        found = [
            _Candidate(maps, parameters, moduli, steps, policy is None)
            for maps in ways
            for policy in _POLICIES
            if (steps := _levelled(maps.steps, parameters, max(moduli), policy)) is not None
        ]
        if found:
            return found
    return []


def moduli_from_few_to_many(largest: int, parameters: Parameters) -> Iterator[tuple[int, ...]]:
    """Yield for every number of moduli the set that holds the logits and whose largest is smallest."""
    taken = {*parameters.data_primes, parameters.special_prime}
    for count in range(1, MOST_PLAIN_MODULI + 1):
        # The largest of them is no smaller than the root of what they have to hold.
        root = 1 << -(-(largest.bit_length() + 1) // count)
        if root >> LARGEST_PLAIN_BITS:
            continue
        below = (prime for prime in chain.primes_below(root, parameters.degree) if prime not in taken)
        window = tuple(islice(below, 2 * count))[::-1]
        for prime in _primes_from(root, 2 * parameters.degree):
            fitting = (window[end - count : end] for end in range(count, len(window) + 1))
            found = next((moduli for moduli in fitting if math.prod(moduli) > 2 * largest), None)
            if found is not None:
                yield found
                break
            if prime not in taken:
                window = (*window, prime)[-count:]
            if prime >> LARGEST_PLAIN_BITS:
                break


def _primes_from(start: int, step: int) -> Iterator[int]:
    """Yield primes that are 1 modulo ``step``, from ``start`` upwards."""
    candidate = start // step * step + 1
    while True:
        candidate += step
        if is_prime(candidate):
            yield candidate


def _levelled(
    steps: Sequence[BfvStep], parameters: Parameters, plain_modulus: int, policy: float | None
) -> tuple[BfvStep, ...] | None:
    """Give every step its levels; None if the noise budget does not suffice.

    Parameters
    ----------
    steps, parameters, plain_modulus:
        What is evaluated, and where.
    policy:
        Bits of noise that a modulus switch has to leave; None switches once after every step.
    """
    model, level, levelled = BfvNoiseModel(parameters, plain_modulus), parameters.top_level, []
    noises = [model.fresh] * steps[0].inputs
    for number, step in enumerate(steps):
        noises = model.step(replace(step, level=level), noises)
        last = number == len(steps) - 1
        target = reply_level(model, noises, level) if last else next_level(model, noises, level, policy)
        if target is None:
            return None
        noises = [model.switched(noise, level, target) for noise in noises]
        levelled.append(replace(step, level=level, next_level=target))
        level = target
    return tuple(levelled)


def next_level(model: BfvNoiseModel, noises: Sequence[Noise], level: int, policy: float | None) -> int:
    """Return the level that a step switches down to, by one of `_POLICIES`."""
    if policy is None:
        return max(level - 1, 0)
    bits = math.log2(max(noise.mean for noise in noises)) / 2
    while level and bits - math.log2(model.parameters.data_primes[level]) >= policy:
        bits -= math.log2(model.parameters.data_primes[level])
        level -= 1
    return level


def reply_level(model: BfvNoiseModel, noises: Sequence[Noise], level: int) -> int | None:
    """Return the lowest level at which the result still decrypts."""
    for target in range(level + 1):
        if all(model.budget(model.switched(noise, level, target) + 1 / 4, target) > 0 for noise in noises):
            return target
    return None


def _budgets(parameters: Parameters, moduli: Sequence[int], steps: Sequence[BfvStep]) -> list[float]:
    return BfvNoiseModel(parameters, max(moduli)).budgets(steps, steps[0].inputs)


def _with_biases(found: _Candidate, quantised: QuantisedNetwork) -> tuple[BfvStep, ...]:
    """Add the biases, reduced modulo each plaintext modulus."""
    steps, biases = list(found.steps), iter(quantised.biases)
    targets = iter(found.maps.targets)
    for number, step in enumerate(steps):
        if isinstance(step, BfvLinear):
            rows = _both_rows(next(targets), next(biases))
            steps[number] = replace(step, bias=np.stack([centred(rows, modulus) for modulus in found.moduli]))
    return tuple(steps)


def _both_rows(layout: Layout, values: Exact) -> Exact:
    """Lay Python integers into both rows alike, shape (ciphertexts, 2, slots)."""
    block = np.zeros(layout.ciphertexts * layout.period, dtype=object)
    block[layout.positions] = values
    return np.tile(block.reshape(layout.ciphertexts, 1, layout.period), (1, 2, layout.copies))


def _keys(parameters: Parameters, steps: Sequence[BfvStep]) -> tuple[KeyGroup, ...]:
    """Collect the evaluation keys that steps use, highest level first."""
    groups: list[tuple[KeyGroup, ...]] = []
    for step in steps:
        if isinstance(step, BfvSquare):
            groups.append((KeyGroup(step.level, True, ()),))
            continue
        turns = {Turn(copy.step) for copy in step.copies[step.inputs :]} | {
            turn for group in step.turns for turn in group
        }
        if any(len(giants) > 1 for giants in step.giants):
            turns.add(Turn(step.giant_step))
        if turns:
            elements = tuple(sorted(parameters.galois_element(*turn) for turn in turns))
            groups.append((KeyGroup(step.level, False, elements),))
    return united(groups)


def _fault(ways: Sequence[_Maps], parameters: Parameters, largest: int, plain_moduli: Sequence[int] | None) -> str:
    """Say at which step the noise budget of a chain runs out, for the smallest moduli that could serve."""
    wanted = [tuple(plain_moduli)] if plain_moduli else list(moduli_from_few_to_many(largest, parameters))
    where = f"degree {parameters.degree} with {len(parameters.data_primes)} data primes was rejected"
    if not wanted:
        return f"{where}: {MOST_PLAIN_MODULI} plaintext moduli do not hold logits of {largest.bit_length() + 1} bits"
    modulus = min(max(moduli) for moduli in wanted)
    steps = tuple(replace(step, level=parameters.top_level, next_level=parameters.top_level) for step in ways[-1].steps)
    budgets = BfvNoiseModel(parameters, modulus).budgets(steps, steps[0].inputs)
    empty = next((number for number, budget in enumerate(budgets) if budget <= 0), len(steps) - 1)
    return (
        f"{where}: the noise budget for plaintext moduli of {math.log2(modulus):.0f} bits is used up by step "
        f"{empty + 1} ({steps[empty].name})"
    )


def _advice(quantised: QuantisedNetwork, largest: int) -> str:
    """Say which layer makes the integers large, and what to do about it."""
    bits = [max(value, 1).bit_length() for value in quantised.largest[::2]]
    growth = [now - 2 * before for now, before in zip(bits, [0, *bits[:-1]], strict=True)]
    worst = int(np.argmax(growth[1:])) + 1 if len(growth) > 1 else 0
    return (
        f"the integers grow most in layer {worst} ({quantised.layers[worst].describe()}), to {bits[worst]} bits, and "
        f"the logits need {largest.bit_length() + 1}: use fewer squares, prune that layer or give it fewer inputs, a "
        "larger degree, other plaintext moduli, or plan with measured magnitudes"
    )


def _reasons(found: _Candidate, largest: int, magnitudes: Magnitudes) -> list[str]:
    parameters, moduli = found.parameters, found.moduli
    bits = " + ".join(f"{math.log2(modulus):.1f}" for modulus in moduli)
    how = "worst case" if magnitudes == "worst" else f"measured, with {HEADROOM_BITS} bits of headroom"
    reasons = [
        f"logits up to {largest:.3g} ({how}) need {largest.bit_length() + 1} bits; {len(moduli)} plaintext moduli "
        f"hold {math.log2(math.prod(moduli)):.1f} ({bits})",
        f"{len(parameters.data_primes)} data primes of 30 bits, {parameters.modulus_bits} modulus bits with the "
        f"special one (at most {LARGEST_MODULUS_BITS[parameters.degree]} at this degree for 128-bit security)",
        "one modulus switch after every step: levels and keys are those of CKKS"
        if found.shares_keys
        else "modulus switches where the noise allows them; keys of levels that CKKS does not use are needed",
    ]
    for step in found.steps:
        if isinstance(step, BfvLinear):
            opened = len({copy.parent for copy in step.copies[step.inputs :]})
            reasons.append(
                f"{step.name}: {len(step.diagonals)} diagonals, {len(step.copies) - step.inputs} rotated copies that "
                f"share {opened} decompositions, {max(map(len, step.giants))} giant steps, "
                f"{sum(map(len, step.turns))} turns added in {len(step.turns)} groups"
            )
    return reasons
