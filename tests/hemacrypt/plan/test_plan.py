"""Plain data of a plan: parameters, layouts, what a client receives — and SEAL's agreement with all of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.errors import PlanError
from hemacrypt.plan.plan import (
    JOIN_FACTOR,
    Copy,
    KeyGroup,
    Layout,
    LinearStep,
    Parameters,
    PublicPlan,
    SquareStep,
    Term,
    Turn,
    is_prime,
    key_groups,
    united,
)
from hemacrypt.plan.security import LARGEST_MODULUS_BITS, check_security
from hemacrypt.seal import io as sealio
from tests.hemacrypt.setups import Setup

# The largest primes below 2^30 that are 1 modulo 16384, from SEAL's own search.
PRIMES_8192 = tuple(modulus.value() for modulus in seal.CoeffModulus.Create(8192, [30] * 7))


def parameters_8192(primes: int = 6) -> Parameters:
    return Parameters(8192, PRIMES_8192[1 : primes + 1], PRIMES_8192[0])


def chain(context: sealio.Context) -> Iterator[sealio.SealObject]:
    data = context.first_context_data()
    while data is not None:
        yield data
        data = data.next_context_data()


@pytest.mark.parametrize("primes", [1, 2, 4, 6])
def test_seal_names_every_level_as_we_do(primes: int) -> None:
    parameters = parameters_8192(primes)
    context = sealio.make_context(parameters)
    assert context.key_parms_id() == sealio.parms_id_words(parameters.parms_id())
    levels = list(chain(context))
    assert [data.chain_index() for data in levels] == list(range(primes - 1, -1, -1))
    for data in levels:
        assert data.parms_id() == sealio.parms_id_words(parameters.parms_id(data.chain_index()))
        expected = parameters.data_primes[: data.chain_index() + 1]
        assert tuple(modulus.value() for modulus in data.parms().coeff_modulus()) == expected
        assert data.total_coeff_modulus_bit_count() == pytest.approx(parameters.bits_at(data.chain_index()), abs=1)


def test_every_name_of_a_level_is_different() -> None:
    names = {parameters_8192(primes).parms_id(level) for primes in (3, 6) for level in (None, 0, 1, 2)}
    # Levels 0 to 2 of the two chains are the same parameters; the key levels are not.
    assert len(names) == 5


@pytest.mark.parametrize("degree", list(LARGEST_MODULUS_BITS))
def test_our_security_table_is_the_one_compiled_into_seal(degree: int) -> None:
    assert LARGEST_MODULUS_BITS[degree] == seal.CoeffModulus.MaxBitCount(degree, seal.SEC_LEVEL_TYPE.TC128)


def test_the_security_table_is_enforced_to_the_bit() -> None:
    check_security(8192, 218)
    with pytest.raises(PlanError, match="219 bits at degree 8192 is below 128-bit security"):
        check_security(8192, 219)
    with pytest.raises(PlanError, match="no security estimate"):
        check_security(8191, 10)


def _a_prime_of_bits(bits: int, degree: int) -> int:
    return next(c for c in range((1 << bits) + 1, 1 << 34, 2 * degree) if all(c % p for p in range(3, 200_000, 2)))


ONE_TOO_LARGE = _a_prime_of_bits(30, 8192)


@pytest.mark.parametrize(
    ("degree", "data", "special", "message"),
    [
        (8192, (ONE_TOO_LARGE,), PRIMES_8192[0], "no prime below 2\\^30"),
        (8192, PRIMES_8192[1:3], ONE_TOO_LARGE, "no prime below 2\\^30"),
        (8192, (16384 * 2 + 1,), PRIMES_8192[0], "no prime below 2\\^30"),
        (8192, (1073741789,), PRIMES_8192[0], "1 modulo 16384"),
        (8192, (PRIMES_8192[1], PRIMES_8192[1]), PRIMES_8192[0], "repeats a prime"),
        (8192, (PRIMES_8192[1],), PRIMES_8192[1], "repeats a prime"),
        (8192, (*PRIMES_8192[1:], 1), PRIMES_8192[0], "1 is no prime"),
        (8192, (-16383,), PRIMES_8192[0], "-16383 is no prime"),
        (8192, (0,), PRIMES_8192[0], "0 is no prime"),
        (8192, (), PRIMES_8192[0], "0 data primes"),
        (8192, PRIMES_8192 * 10, 3, "70 data primes"),
        (4096, PRIMES_8192[1:4], PRIMES_8192[0], "below 128-bit security; at most 109 bits"),
        (1000, PRIMES_8192[1:2], PRIMES_8192[0], "polynomial degree 1000"),
        (65536, PRIMES_8192[1:2], PRIMES_8192[0], "polynomial degree 65536"),
        (0, PRIMES_8192[1:2], PRIMES_8192[0], "polynomial degree 0"),
        (-8192, PRIMES_8192[1:2], PRIMES_8192[0], "polynomial degree -8192"),
    ],
)
def test_parameters_out_of_the_rules_are_refused(
    degree: int, data: tuple[int, ...], special: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        Parameters(degree, data, special)


def test_eight_primes_of_thirty_bits_are_below_128_bit_security() -> None:
    primes = tuple(modulus.value() for modulus in seal.CoeffModulus.Create(16384, [30] * 8))
    assert Parameters(16384, primes[1:], primes[0]).modulus_bits == 240
    with pytest.raises(PlanError, match="240 bits at degree 8192 is below 128-bit security"):
        Parameters(8192, primes[1:], primes[0])


def test_modulus_bits_count_the_special_prime() -> None:
    parameters = parameters_8192(6)
    assert parameters.modulus_bits == 210
    assert parameters.bits_at(5) == pytest.approx(180, abs=0.01)
    assert parameters.bits_at(0) == pytest.approx(30, abs=0.01)
    assert (parameters.slots, parameters.top_level) == (4096, 5)


def sieve(limit: int) -> list[int]:
    marks = np.ones(limit, dtype=bool)
    marks[:2] = False
    for number in range(2, int(limit**0.5) + 1):
        if marks[number]:
            marks[number * number :: number] = False
    return [int(prime) for prime in np.flatnonzero(marks)]


SMALL_PRIMES = sieve(32768 + 1)


def by_trial_division(number: int) -> bool:
    return number >= 2 and all(number % prime for prime in itertools.takewhile(lambda p: p * p <= number, SMALL_PRIMES))


@settings(deadline=None, derandomize=True, database=None, max_examples=400)
@given(st.integers(0, (1 << 30) - 1))
def test_primality_agrees_with_trial_division(number: int) -> None:
    assert is_prime(number) == by_trial_division(number)


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(st.sampled_from([1024, 4096, 8192, 32768]), st.integers(1, 1 << 18))
def test_primality_agrees_on_candidates_of_a_chain(degree: int, multiple: int) -> None:
    number = (multiple * 2 * degree + 1) % (1 << 30)
    assert is_prime(number) == by_trial_division(number)


def test_primality_of_every_number_below_20000() -> None:
    primes = set(sieve(20_000))
    assert {number for number in range(-5, 20_000) if is_prime(number)} == primes


@pytest.mark.parametrize(
    "number",
    [
        *(561, 1105, 1729, 2465, 2821, 6601, 8911, 825265, 321197185),  # Carmichael
        *(2047, 3277, 4033, 4681, 8321, 15841, 1016801),  # strong pseudoprimes to base 2
        *(1373653, 1530787, 25326001, 161304001, 960946321),  # to bases 2, 3 and to 2, 3, 5
        32749 * 32749,
        32719 * 32749,
    ],
)
def test_composites_that_look_prime_are_found(number: int) -> None:
    assert not by_trial_division(number)
    assert not is_prime(number)


def test_a_rotation_key_of_ours_rotates_to_the_left() -> None:
    parameters = parameters_8192(2)
    context = sealio.make_context(parameters)
    generator, encoder = seal.KeyGenerator(context), seal.CKKSEncoder(context)
    keys = seal.GaloisKeys()
    generator.create_galois_keys([parameters.galois_element(3)], keys)
    plain, turned, decoded = seal.Plaintext(), seal.Ciphertext(), seal.Plaintext()
    encoder.encode([float(slot) for slot in range(4096)], 2.0**30, plain)
    fresh = sealio.load(
        seal.Ciphertext(),
        context,
        sealio.dump(seal.Encryptor(context, generator.secret_key()).encrypt_symmetric(plain)),
    )
    seal.Evaluator(context).rotate_vector(fresh, 3, keys, turned)
    seal.Decryptor(context, generator.secret_key()).decrypt(turned, decoded)
    expected = np.roll(np.arange(4096.0), -3)
    np.testing.assert_allclose(encoder.decode_double(decoded), expected, atol=0.1)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw a layout of any kind: copies, several ciphertexts, imaginary parts or two images, a factor."""
    period, copies = 1 << draw(st.integers(0, 6)), 1 << draw(st.integers(0, 3))
    ciphertexts, images = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2]))
    factor = draw(st.sampled_from([1.0, 0.5, JOIN_FACTOR, JOIN_FACTOR**3, 2.0**-16, 2.0**16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kinds = 2 if images == 1 and draw(st.booleans()) else 1
    room = rng.permutation(period * ciphertexts * kinds)
    chosen = room[: int(rng.integers(1, len(room) + 1))]
    return Layout(chosen // kinds, period, period * copies, ciphertexts, chosen % kinds == 1, factor, images)


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(layouts(), st.integers(0, 2**16))
def test_a_layout_unpacks_what_it_packed(layout: Layout, seed: int) -> None:
    count = len(layout.positions)
    values = np.random.default_rng(seed).normal(size=(layout.images, count))
    slots = layout.pack(values)
    assert slots.shape == (layout.ciphertexts, layout.slots)
    np.testing.assert_allclose(layout.unpack(slots), values, rtol=1e-14)
    assert layout.spread(slots) == 0
    parts = np.count_nonzero(slots.real) + np.count_nonzero(slots.imag)
    assert parts == layout.copies * layout.images * count
    # The definition, value by value.
    for number, position in enumerate(layout.positions):
        places = slots[position // layout.period, position % layout.period :: layout.period]
        assert len(places) == layout.copies
        if layout.images == 2:
            expected = values[0, number] + 1j * layout.factor * values[1, number]
            np.testing.assert_array_equal(places, np.full(layout.copies, expected))
        elif layout.flags[number]:
            np.testing.assert_array_equal(places.imag, np.full(layout.copies, layout.factor * values[0, number]))
        else:
            np.testing.assert_array_equal(places.real, np.full(layout.copies, values[0, number]))
    # Noise of the copies averages out, and `spread` says how much of it there is.
    noise = np.repeat(np.arange(layout.copies), layout.period) * (1 + 1j * layout.factor)
    noisy = layout.unpack(slots + noise)
    np.testing.assert_allclose(noisy, values + (layout.copies - 1) / 2, rtol=1e-9, atol=1e-9)
    assert layout.spread(slots + noise) == pytest.approx((layout.copies - 1) / 2, abs=1e-9)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 5), st.integers(0, 2**16))
def test_folding_moves_half_of_the_values_into_imaginary_parts(
    log_period: int, log_copies: int, ciphertexts: int, seed: int
) -> None:
    period = 1 << log_period
    rng = np.random.default_rng(seed)
    # Every ciphertext holds something.
    chosen = rng.permutation(period * ciphertexts)
    layout = Layout(chosen, period, period << log_copies, ciphertexts)
    folded = layout.folded()
    values = rng.normal(size=len(chosen))
    whole, halves = layout.pack(values), folded.pack(values)
    np.testing.assert_array_equal(folded.unpack(halves)[0], values)
    assert folded.mixes
    if ciphertexts == 1:
        assert folded.period == period // 2
        expected = whole[:, : period // 2] + 1j * whole[:, period // 2 : period]
        np.testing.assert_array_equal(halves[:, : period // 2], expected)
    else:
        assert folded.ciphertexts == -(-ciphertexts // 2)
        other = np.zeros_like(halves)
        other[: ciphertexts // 2] = whole[1::2]
        np.testing.assert_array_equal(halves, whole[::2] + 1j * other)


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(st.integers(1, 7), st.floats(0.1, 10), st.integers(0, 2**16))
def test_joining_puts_two_and_two_ciphertexts_together(ciphertexts: int, factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = Layout(rng.permutation(4 * ciphertexts), 4, 8, ciphertexts)
    joined, values = layout.joined(factor), rng.normal(size=4 * ciphertexts)
    whole = layout.pack(values)
    expected = whole[::2].copy()
    expected[: ciphertexts // 2] += 1j * factor * whole[1::2]
    np.testing.assert_allclose(joined.pack(values), expected, rtol=1e-15)
    assert joined.ciphertexts == -(-ciphertexts // 2)


@pytest.mark.parametrize(
    ("positions", "period", "slots", "message"),
    [
        ([0, 0], 4, 8, "share a slot"),
        ([4], 4, 8, "lie in 1 periods of 4 slots"),
        ([-1], 4, 8, "lie in 1 periods of 4 slots"),
        ([0], 3, 8, "period 3 in 1 ciphertexts of 8 slots cannot be"),
        ([0], 0, 8, "period 0 in 1 ciphertexts of 8 slots cannot be"),
        ([0], -4, 8, "period -4 in 1 ciphertexts of 8 slots cannot be"),
        ([0], 16, 8, "period 16 in 1 ciphertexts of 8 slots cannot be"),
        ([], 4, 8, "list of positions"),
        ([[0, 1]], 4, 8, "list of positions"),
    ],
)
def test_impossible_layouts_are_refused(positions: list[int], period: int, slots: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Layout(np.array(positions, dtype=np.int64), period, slots)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ciphertexts": 0}, "in 0 ciphertexts of 8 slots cannot be"),
        ({"ciphertexts": -1}, "in -1 ciphertexts of 8 slots cannot be"),
        ({"positions": np.array([0, 12])}, "lie in 3 periods of 4 slots"),
        ({"positions": np.array([5, 2, 5])}, "share a slot"),
        ({"positions": np.array([5, 5]), "imaginary": np.array([True, True])}, "share a slot"),
        ({"imaginary": np.array([True])}, "1 imaginary flags for 3 positions"),
        ({"imaginary": np.ones((1, 3), bool)}, "3 imaginary flags for 3 positions"),
        ({"images": 0}, "0 images"),
        ({"images": 3}, "3 images"),
        ({"images": 2, "imaginary": np.array([False, True, False])}, "2 images with 1 imaginary values cannot be"),
        ({"factor": 0.0}, "0 times too large; expected a moderate factor"),
        ({"factor": -1.0}, "expected a moderate factor"),
        ({"factor": 2.0**-17}, "expected a moderate factor"),
        ({"factor": 2.0**17}, "expected a moderate factor"),
        ({"factor": math.inf}, "expected a moderate factor"),
        ({"factor": math.nan}, "expected a moderate factor"),
    ],
)
def test_impossible_complex_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"positions": np.array([0, 7, 9]), "period": 4, "slots": 8, "ciphertexts": 3}
    Layout(**fields)
    with pytest.raises(PlanError, match=message):
        Layout(**(fields | changes))


def test_real_and_imaginary_part_of_one_slot_hold_a_value_each() -> None:
    layout = Layout(np.array([1, 1]), 4, 8, imaginary=np.array([False, True]), factor=2.0)
    np.testing.assert_array_equal(layout.pack([3, 5]), [[0, 3 + 10j, 0, 0] * 2])


@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize("images", [1, 2])
def test_packing_another_number_of_values_is_refused(count: int, images: int) -> None:
    layout = Layout(np.arange(4), 4, 8, images=images)
    with pytest.raises(PlanError, match=f"got {count * images} values; this layout holds {4 * images}"):
        layout.pack(np.ones(count * images))


@pytest.mark.parametrize("step", [0, 1, 5, 7])
@pytest.mark.parametrize("conjugate", [False, True])
def test_a_turn_rotates_to_the_left_and_then_conjugates(step: int, conjugate: bool) -> None:
    rng = np.random.default_rng(step)
    slots = rng.normal(size=(3, 8)) + 1j * rng.normal(size=(3, 8))
    turned = Turn(step, conjugate)(slots)
    for index in range(8):
        expected = slots[:, (index + step) % 8]
        np.testing.assert_array_equal(turned[:, index], expected.conj() if conjugate else expected)


def _square(level: int, kind: Literal["plain", "joined", "parted"], inputs: int = 1) -> SquareStep:
    return SquareStep(level, inputs, kind, 1.0, 1.0)


def _linear(level: int, copies: tuple[int, ...], giant_step: int, turns: tuple[tuple[Turn, ...], ...]) -> LinearStep:
    made = (Copy(0, 0), *(Copy(0, step) for step in copies))
    giants = tuple((Term(0, 0),) for _ in range(2 if giant_step else 1))
    nothing = np.zeros((1, 4096), dtype=np.complex128)
    return LinearStep("layer", level, 1, made, (giants,), giant_step, turns, nothing, nothing, 1.0, 1.0, 1.0)


def test_keys_are_collected_level_by_level_and_no_level_is_named_for_nothing() -> None:
    parameters = parameters_8192(6)
    element = parameters.galois_element
    steps = (
        _linear(5, (1, 2, 1), 64, ((Turn(0, True), Turn(1, True)),)),
        _square(4, "plain"),
        _linear(3, (), 0, ()),
        _square(2, "parted"),
        _linear(1, (7,), 0, ((Turn(2),), (Turn(4),))),
    )
    assert key_groups(parameters, steps) == (
        KeyGroup(5, False, tuple(sorted({element(1), element(2), element(64), 16383, element(1, True)}))),
        KeyGroup(4, True, ()),
        KeyGroup(2, True, (16383,)),
        KeyGroup(1, False, tuple(sorted({element(2), element(4), element(7)}))),
    )


def test_the_united_keys_serve_every_plan_and_hold_nothing_more() -> None:
    one = (KeyGroup(5, False, (3, 27)), KeyGroup(4, True, ()), KeyGroup(1, False, (9,)))
    other = (KeyGroup(5, True, (9, 27)), KeyGroup(4, False, (5,)), KeyGroup(2, True, ()))
    expected = (
        KeyGroup(5, True, (3, 9, 27)),
        KeyGroup(4, True, (5,)),
        KeyGroup(2, True, ()),
        KeyGroup(1, False, (9,)),
    )
    assert united([one, other]) == united([other, one]) == united([one, other, one]) == expected
    assert united([one]) == united([one, one]) == one
    assert united([]) == ()


def test_squares_count_what_they_read_write_and_turn() -> None:
    for inputs in range(1, 6):
        plain, joined, parted = (_square(3, kind, inputs) for kind in ("plain", "joined", "parted"))
        assert (plain.outputs, plain.squares, plain.rotations) == (inputs, inputs, ())
        assert (joined.outputs, joined.squares, joined.rotations) == ((inputs + 1) // 2, inputs, ())
        assert (parted.outputs, parted.squares, parted.rotations) == (inputs, 2 * inputs, (Turn(0, True),) * inputs)
    assert [SquareStep.gain(kind) for kind in ("plain", "joined", "parted")] == [1, 1, 4]


@pytest.mark.parametrize("level", range(6))
def test_a_truncated_chain_names_its_lower_levels_as_the_whole_one_does(level: int) -> None:
    parameters = parameters_8192(6)
    cut = parameters.truncated(level)
    assert (cut.data_primes, cut.special_prime) == (parameters.data_primes[: level + 1], parameters.special_prime)
    assert [cut.parms_id(lower) for lower in range(level + 1)] == [parameters.parms_id(n) for n in range(level + 1)]
    assert (cut.parms_id() == parameters.parms_id()) == (level == parameters.top_level)


def test_a_conjugation_key_of_ours_conjugates_after_it_rotates() -> None:
    parameters = parameters_8192(2)
    context = sealio.make_context(parameters)
    generator, encoder = seal.KeyGenerator(context), seal.CKKSEncoder(context)
    keys, element = seal.GaloisKeys(), parameters.galois_element(3, conjugate=True)
    generator.create_galois_keys([element], keys)
    rng = np.random.default_rng(9)
    slots = rng.normal(size=4096) + 1j * rng.normal(size=4096)
    plain, turned, decoded = seal.Plaintext(), seal.Ciphertext(), seal.Plaintext()
    encoder.encode(slots.tolist(), 2.0**30, plain)
    fresh = sealio.load(
        seal.Ciphertext(),
        context,
        sealio.dump(seal.Encryptor(context, generator.secret_key()).encrypt_symmetric(plain)),
    )
    seal.Evaluator(context).apply_galois(fresh, element, keys, turned)
    seal.Decryptor(context, generator.secret_key()).decrypt(turned, decoded)
    np.testing.assert_allclose(encoder.decode_complex(decoded), Turn(3, True)(slots), atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a",)}, "1 labels and 0 guards for 3 values"),
        ({"keys": (KeyGroup(1, False, (1, 3)),)}, "odd and lie between 3 and 8191"),
        ({"keys": (KeyGroup(1, False, (3, 8193)),)}, "odd and lie between 3 and 8191"),
        ({"keys": (KeyGroup(1, False, (3, 4)),)}, "odd and lie between 3 and 8191"),
        ({"keys": (KeyGroup(1, False, (-3, 3)),)}, "odd and lie between 3 and 8191"),
        ({"keys": (KeyGroup(1, False, (9, 3)),)}, "ascending and distinct"),
        ({"keys": (KeyGroup(1, False, (3, 3)),)}, "ascending and distinct"),
        ({"keys": (KeyGroup(0, False, (3,)), KeyGroup(1, False, (3,)))}, "descending order of their levels"),
        ({"keys": (KeyGroup(1, False, (3,)), KeyGroup(1, True, ()))}, "each level once"),
        ({"keys": (KeyGroup(2, False, (3,)),)}, "descending order of their levels"),
        ({"keys": (KeyGroup(-1, False, (3,)),)}, "descending order of their levels"),
        ({"input_scale": 2.0**61}, "does not fit the modulus of level 1"),
        ({"output_scale": 2.0**31}, "does not fit the modulus of level 0"),
        ({"output_scale": 0.0}, "does not fit"),
        ({"output_scale": float("nan")}, "does not fit"),
        ({"input_scale": -(2.0**20)}, "does not fit"),
        ({"input_layout": Layout(np.arange(4), 4, 4096)}, "other slots than the 2048"),
        ({"output_layout": Layout(np.arange(3), 4, 4096)}, "other slots than the 2048"),
        ({"input_layout": Layout(np.arange(4), 4, 2048, images=2)}, "2 images in, 1 out"),
        ({"output_layout": Layout(np.arange(3), 4, 2048, images=2)}, "1 images in, 2 out"),
    ],
)
def test_a_public_plan_that_contradicts_itself_is_refused(
    regression: Setup, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        replace(regression.plan.public, **changes)


def other_keys(public: PublicPlan) -> list[PublicPlan]:
    (group,) = public.keys
    return [
        replace(public, keys=(group._replace(elements=group.elements[1:]),)),
        replace(public, keys=(group._replace(relinearise=True),)),
        replace(public, keys=(group._replace(level=0),)),
        replace(public, keys=(group, KeyGroup(0, True, ()))),
        replace(public, keys=()),
    ]


def test_the_plan_id_names_everything_that_client_and_service_must_share(regression: Setup) -> None:
    public = regression.plan.public
    variants: list[PublicPlan] = [
        replace(public, model="other"),
        replace(public, labels=("a", "b", "c")),
        replace(public, parameters=replace(public.parameters, data_primes=public.parameters.data_primes[::-1])),
        replace(public, input_scale=public.input_scale * (1 + 2**-52)),
        replace(public, output_scale=public.output_scale * (1 + 2**-52)),
        replace(public, logit_error_bound=public.logit_error_bound * 2),
        replace(public, logit_limit=public.logit_limit * 2),
        replace(public, preprocessing_digest="0" * 64),
        replace(
            public,
            input_layout=Layout(np.arange(16), 16, 2048, images=2),
            output_layout=Layout(np.arange(3), 4, 2048, images=2),
        ),
        *other_keys(public),
    ]
    for name in ("input_layout", "output_layout"):
        layout: Layout = getattr(public, name)
        changed = [
            replace(layout, positions=layout.positions[::-1]),
            replace(layout, period=2 * layout.period),
            replace(layout, ciphertexts=2),
            replace(layout, imaginary=~layout.flags),
            replace(layout, factor=layout.factor * (1 + 2**-52)),
        ]
        variants += [replace(public, **{name: other}) for other in changed]
    assert len({public.plan_id, *(variant.plan_id for variant in variants)}) == len(variants) + 1
    assert replace(public).plan_id == public.plan_id


def test_plans_that_need_the_same_keys_share_their_requirements(regression: Setup) -> None:
    public = regression.plan.public
    same = [replace(public, model="other"), replace(public, labels=("a", "b", "c")), replace(public, logit_limit=9.0)]
    assert {variant.requirements_id for variant in same} == {public.requirements_id}
    other = [
        replace(public, parameters=replace(public.parameters, data_primes=public.parameters.data_primes[::-1])),
        *other_keys(public),
    ]
    assert len({public.requirements_id, *(variant.requirements_id for variant in other)}) == len(other) + 1
