"""Plain data of a plan: parameters, layouts, what a client receives — and SEAL's agreement with all of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt import sealio
from hemacrypt.errors import PlanError
from hemacrypt.plan import Layout, Parameters, PublicPlan, is_prime
from hemacrypt.security import LARGEST_MODULUS_BITS, check_security
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


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.integers(0, 6), st.integers(0, 3), st.integers(0, 2**16))
def test_a_layout_unpacks_what_it_packed(log_period: int, log_copies: int, seed: int) -> None:
    period, copies = 1 << log_period, 1 << log_copies
    rng = np.random.default_rng(seed)
    positions = rng.permutation(period)[: int(rng.integers(1, period + 1))]
    layout = Layout(positions, period, period * copies)
    values = rng.normal(size=len(positions))
    slots = layout.pack(values)
    np.testing.assert_allclose(layout.unpack(slots), values, rtol=1e-15)
    assert np.count_nonzero(slots) == copies * len(positions)
    np.testing.assert_array_equal(slots[:period][positions], values)
    np.testing.assert_array_equal(slots, np.tile(slots[:period], copies))
    # Noise of the copies averages out.
    noisy = slots.reshape(copies, period) + np.arange(copies)[:, None]
    np.testing.assert_allclose(layout.unpack(noisy.reshape(-1)), values + (copies - 1) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "period", "slots", "message"),
    [
        ([0, 0], 4, 8, "share a slot"),
        ([4], 4, 8, "lie in a period"),
        ([-1], 4, 8, "lie in a period"),
        ([0], 3, 8, "lie in a period"),
        ([0], 0, 8, "lie in a period"),
        ([], 4, 8, "list of positions"),
        ([[0, 1]], 4, 8, "list of positions"),
    ],
)
def test_impossible_layouts_are_refused(positions: list[int], period: int, slots: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Layout(np.array(positions, dtype=np.int64), period, slots)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_packing_another_number_of_values_is_refused(count: int) -> None:
    layout = Layout(np.arange(4), 4, 8)
    with pytest.raises((PlanError, ValueError)):
        layout.pack(np.ones(count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a",)}, "1 labels for 3 logits"),
        ({"rotation_steps": (0, 1)}, "between 1 and 2047"),
        ({"rotation_steps": (1, 2048)}, "between 1 and 2047"),
        ({"rotation_steps": (2, 1)}, "ascending and distinct"),
        ({"rotation_steps": (1, 1)}, "ascending and distinct"),
        ({"input_scale": 2.0**61}, "does not fit the modulus of level 1"),
        ({"output_scale": 2.0**31}, "does not fit the modulus of level 0"),
        ({"output_scale": 0.0}, "does not fit"),
        ({"output_scale": float("nan")}, "does not fit"),
        ({"input_scale": -(2.0**20)}, "does not fit"),
        ({"input_layout": Layout(np.arange(4), 4, 4096)}, "other slots than the 2048"),
        ({"output_layout": Layout(np.arange(3), 4, 4096)}, "other slots than the 2048"),
    ],
)
def test_a_public_plan_that_contradicts_itself_is_refused(
    regression: Setup, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        replace(regression.plan.public, **changes)


def test_the_plan_id_names_everything_that_client_and_service_must_share(regression: Setup) -> None:
    public = regression.plan.public
    variants: list[PublicPlan] = [
        replace(public, model="other"),
        replace(public, labels=("a", "b", "c")),
        replace(public, parameters=replace(public.parameters, data_primes=public.parameters.data_primes[::-1])),
        replace(public, input_layout=Layout(public.input_layout.positions[::-1], public.input_layout.period, 2048)),
        replace(public, output_layout=Layout(public.output_layout.positions[::-1], public.output_layout.period, 2048)),
        replace(public, input_scale=public.input_scale * (1 + 2**-52)),
        replace(public, output_scale=public.output_scale * (1 + 2**-52)),
        replace(public, rotation_steps=public.rotation_steps[1:]),
        replace(public, needs_relinearisation=True),
        replace(public, logit_error_bound=public.logit_error_bound * 2),
        replace(public, logit_limit=public.logit_limit * 2),
    ]
    assert len({public.plan_id, *(variant.plan_id for variant in variants)}) == 12
    assert replace(public).plan_id == public.plan_id


def test_plans_that_need_the_same_keys_share_their_requirements(regression: Setup) -> None:
    public = regression.plan.public
    same = [replace(public, model="other"), replace(public, labels=("a", "b", "c")), replace(public, logit_limit=9.0)]
    assert {variant.requirements_id for variant in same} == {public.requirements_id}
    other = [
        replace(public, parameters=replace(public.parameters, data_primes=public.parameters.data_primes[::-1])),
        replace(public, rotation_steps=public.rotation_steps[1:]),
        replace(public, needs_relinearisation=True),
    ]
    assert len({public.requirements_id, *(variant.requirements_id for variant in other)}) == 4
