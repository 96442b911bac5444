"""Exact plans under encryption: both engines return the integers of the network in the clear, every single one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal

from client_sdk._crypto import BfvKeyHolder, KeyHolder
from hemacrypt.engines import ENCRYPTED_ENGINES, ExactEngine, encrypted_bfv_engine
from hemacrypt.engines.vector.bfv import BfvVectorEngine
from hemacrypt.engines.vector.ckks import VectorEngine
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, pack_rows
from hemacrypt.plan.plan import united
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys
from tests.hemacrypt.handmade import Handmade, chain, handmade, primes_of
from tests.hemacrypt.setups import Setup

PAPER = (957181001729, 957181034497)
PRIMES = primes_of(8192, 20, 5)


@dataclass(frozen=True)
class Exact:
    """A handmade network, a hospital's keys, and the engines."""

    made: Handmade

    @property
    def plan(self) -> BfvPlan:
        return self.made.plan

    @cached_property
    def holder(self) -> BfvKeyHolder:
        return BfvKeyHolder(self.plan.public)

    @cached_property
    def keys(self) -> EvaluationKeys:
        return self.holder.evaluation_keys()

    @cached_property
    def engines(self) -> dict[str, tuple[ExactEngine[Any], Any]]:
        made = {name: encrypted_bfv_engine(name, self.plan) for name in ENCRYPTED_ENGINES}
        return {name: (engine, engine.load_keys(self.keys)) for name, engine in made.items()}

    def images(self, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.uniform(-1, 1, (self.plan.public.images, self.made.matrices[0].shape[1]))

    def reply(self, name: str, images: np.ndarray) -> list[bytes]:
        engine, keys = self.engines[name]
        replies: list[bytes] = engine.evaluate(self.holder.encrypt(images), keys)
        return replies

    def integers(self, name: str, images: np.ndarray) -> np.ndarray:
        return self.holder.decrypt_integers(self.reply(name, images))

    def budgets(self, replies: list[bytes]) -> list[int]:
        """Return the noise budgets that SEAL finds in a reply."""
        public, found = self.plan.public, []
        each, minor = public.output_layout.ciphertexts, sealio.seal_minor_version()
        for number, reply in enumerate(replies):
            modulus = public.plain_moduli[number // each]
            context = sealio.make_context(public.parameters, modulus)
            top = public.parameters.top_level
            secret = sealio.truncated_secret(self.holder.secret_bytes(), public.parameters, top, modulus)
            decryptor = seal.Decryptor(context, sealio.load(seal.SecretKey(), context, secret))
            checked = sealformat.check_ciphertext(reply, public.parameters, public.output_level, 1.0, minor, modulus)
            found.append(decryptor.invariant_noise_budget(sealio.load(seal.Ciphertext(), context, checked)))
        return found


CASES: dict[str, Handmade] = {
    "one map": handmade((6, 3), chain(4096, 2), primes_of(4096, 17, 1), drops=(0,), largest=3),
    "one map, switched": handmade((6, 3), chain(8192, 3), primes_of(8192, 17, 1), drops=(1,), largest=3),
    "one square": handmade((6, 4, 3), chain(8192, 5), PRIMES[:2]),
    "two squares, five moduli": handmade((6, 4, 4, 3), chain(8192, 6), PRIMES),
    "two images": handmade((6, 4, 3), chain(8192, 5), PRIMES[:2], images=2),
    "both rows": handmade((12, 8, 3), chain(8192, 5), PRIMES[:2], mixed=True),
    "two ciphertexts": handmade((12, 8, 3), chain(8192, 5), PRIMES[:2], ciphertexts=2),
    "two images, two ciphertexts": handmade((12, 8, 3), chain(8192, 5), PRIMES[:2], ciphertexts=2, images=2),
    "uneven switches": handmade((6, 4, 3), chain(8192, 6), PRIMES[:2], drops=(0, 2, 1)),
    "switches at once": handmade((6, 4, 3), chain(8192, 6), PRIMES[:2], drops=(2, 1, 1)),
    "large weights that wrap": handmade((6, 4, 3), chain(8192, 6), PRIMES[:3], largest=5000),
}


@pytest.fixture(scope="module", params=CASES)
def exact(request: pytest.FixtureRequest) -> Exact:
    return Exact(CASES[request.param])


@pytest.fixture(scope="module")
def square() -> Exact:
    return Exact(CASES["one square"])


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_integers_are_exact(exact: Exact, name: str) -> None:
    count = exact.plan.public.images
    cases = [exact.images(seed) for seed in range(2)] + [np.ones_like(exact.images(0)), np.zeros_like(exact.images(0))]
    for images in cases:
        expected = exact.made.integers(images)
        # The plan's promise holds, so that the comparison means something.
        assert abs(expected).max() <= exact.plan.public.largest_logit
        found = exact.integers(name, images)
        assert found.shape == (count, len(exact.plan.public.labels))
        assert all(type(value) is int for value in found.reshape(-1))
        assert (found == expected).all()


def test_logits_are_integers_divided_by_the_scale(square: Exact) -> None:
    images = square.images(4)
    logits = square.holder.decrypt(square.reply("vector", images))
    assert logits.dtype == np.float64
    np.testing.assert_array_equal(logits, square.made.integers(images).astype(float) / 1000.0)


def test_integers_beyond_64_bits_with_the_moduli_of_the_paper() -> None:
    exact = Exact(handmade((6, 4, 4, 3), chain(16384, 13), PAPER, largest=50))
    images = exact.images(0)
    expected = exact.made.integers(images)
    assert abs(expected).max() > 2**63
    for name in ENCRYPTED_ENGINES:
        assert (exact.integers(name, images) == expected).all()


def test_engines_leave_as_much_noise_budget_as_each_other(exact: Exact) -> None:
    images = exact.images(7)
    budgets = [exact.budgets(exact.reply(name, images)) for name in ENCRYPTED_ENGINES]
    assert min(map(min, budgets)) > 0
    assert np.abs(np.subtract(*budgets)).max() <= 2


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bytes(exact: Exact, threads: int) -> None:
    engine, keys = exact.engines["vector"]
    shared = BfvVectorEngine(exact.plan, threads)
    uploads = exact.holder.encrypt(exact.images(3))
    assert shared.evaluate(uploads, keys) == engine.evaluate(uploads, keys) == shared.evaluate(uploads, keys)


def test_warming_up_leaves_nothing_behind(square: Exact) -> None:
    engine = BfvVectorEngine(square.plan)
    engine.warm_up()
    images = square.images(5)
    _, keys = square.engines["vector"]
    found = square.holder.decrypt_integers(engine.evaluate(square.holder.encrypt(images), keys))
    assert (found == square.made.integers(images)).all()


def test_keys_of_a_holder_for_ckks_serve_exact_plans(one_square: Setup) -> None:
    """The same secret key, and the very evaluation keys, of a hospital that came for CKKS."""
    plan, parameters = one_square.plan.public, one_square.plan.parameters
    made = handmade((6, 4, 3), parameters, PRIMES[:2])
    groups = united([plan.keys, made.plan.public.keys])
    both, public = replace(plan, keys=groups), replace(made.plan.public, keys=groups)
    ckks = KeyHolder(both)
    keys, exact = ckks.evaluation_keys(), ckks.serving_exact(public)
    assert exact.secret_bytes() == ckks.secret_bytes()
    images = np.linspace(-1, 1, 6)
    for name in ENCRYPTED_ENGINES:
        engine = encrypted_bfv_engine(name, replace(made.plan, public=public))
        reply = engine.evaluate(exact.encrypt(images), engine.load_keys(keys))
        assert (exact.decrypt_integers(reply) == made.integers(images[None])).all()
    # And the same keys evaluate the plan of CKKS.
    logits = one_square.network(one_square.images(0))
    engine = VectorEngine(replace(one_square.plan, public=both))
    found = ckks.decrypt(engine.evaluate(ckks.encrypt(one_square.images(0)), engine.load_keys(keys)))
    assert np.abs(found - logits).max() <= plan.logit_error_bound


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_more_or_fewer_ciphertexts_than_planned_are_refused(exact: Exact, name: str) -> None:
    engine, keys = exact.engines[name]
    uploads, expected = exact.holder.encrypt(exact.images(0)), exact.plan.public.input_ciphertexts
    assert len(uploads) == expected
    for wrong in ([], uploads[1:], [*uploads, uploads[0]]):
        with pytest.raises(FormatError, match=f"{len(wrong)} came; the plan lays its input over {expected}"):
            engine.evaluate(wrong, keys)


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_ciphertexts_of_the_moduli_in_another_order_are_refused(square: Exact, name: str) -> None:
    engine, keys = square.engines[name]
    with pytest.raises(FormatError, match="level: it belongs to other parameters"):
        engine.evaluate(square.holder.encrypt(square.images(0))[::-1], keys)


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_a_reply_to_one_key_is_no_answer_under_another(square: Exact, name: str) -> None:
    reply = square.reply(name, square.images(1))
    with pytest.raises(FormatError, match="copies of a logit disagree"):
        BfvKeyHolder(square.plan.public).decrypt_integers(reply)


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_evaluation_under_another_hospitals_keys_is_no_answer(square: Exact, name: str) -> None:
    engine, _ = square.engines[name]
    foreign = engine.load_keys(BfvKeyHolder(square.plan.public).evaluation_keys())
    reply = engine.evaluate(square.holder.encrypt(square.images(1)), foreign)
    with pytest.raises(FormatError, match="copies of a logit disagree"):
        square.holder.decrypt_integers(reply)


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_too_much_noise_is_told_and_never_a_wrong_integer(name: str) -> None:
    short = Exact(handmade((6, 4, 3), chain(8192, 3), primes_of(8192, 24, 2), drops=(0, 0, 0)))
    with pytest.raises(FormatError, match="copies of a logit disagree"):
        short.integers(name, short.images(0))


def test_replies_that_are_mixed_up_are_refused(square: Exact) -> None:
    one, other = square.reply("vector", square.images(1)), square.reply("vector", square.images(2))
    for wrong in ([], one[:1], [*one, *other], one[::-1]):
        with pytest.raises(FormatError):
            square.holder.decrypt_integers(wrong)


def test_integers_that_no_valid_image_makes_are_refused(square: Exact) -> None:
    """Residues of two different replies are consistent each for itself, and together a random integer."""
    images = [square.images(1), square.images(2)]
    one, other = (square.reply("vector", each) for each in images)
    largest = int(max(abs(square.made.integers(each)).max() for each in images))
    bounded = replace(square.plan.public, largest_logit=largest)
    holder = BfvKeyHolder(bounded, square.holder.secret_bytes())
    assert (holder.decrypt_integers(one) == square.made.integers(images[0])).all()
    with pytest.raises(FormatError, match=f"exceeds {largest}"):
        holder.decrypt_integers([one[0], other[1]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 2.0**53])
def test_an_image_that_cannot_be_encrypted_is_refused_by_name(square: Exact, value: float) -> None:
    images = square.images(0)
    images[0, 3] = value
    with pytest.raises(PlanError, match="for which alone the logits are exact"):
        square.holder.encrypt(images)


def test_images_of_another_size_are_refused(square: Exact) -> None:
    for wrong in (np.zeros(5), np.zeros((2, 6)), np.zeros(0)):
        with pytest.raises(PlanError):
            square.holder.encrypt(wrong)


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_diagonals_that_are_zero_modulo_t_are_left_out(name: str) -> None:
    """Weights that are multiples of one of the moduli count for the others alone."""
    made = handmade((4, 2), chain(8192, 5), PRIMES[:2], drops=(0,))
    (step,) = made.plan.steps
    assert isinstance(step, BfvLinear)
    matrix = made.matrices[0].copy()
    diagonals = step.diagonals.copy()
    # One whole diagonal, in both rows and all copies of the period.
    places, period = np.arange(4), 4
    diagonals[1] *= PRIMES[0]
    for slot in places[:2]:
        matrix[slot, (slot + 1) % period] *= PRIMES[0]
    changed = Handmade(replace(made.plan, steps=(replace(step, diagonals=diagonals),)), (matrix,), made.biases)
    exact = Exact(changed)
    assert (exact.integers(name, exact.images(0)) == changed.integers(exact.images(0))).all()


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_a_map_that_is_zero_modulo_t_is_refused_with_the_reason(name: str) -> None:
    made = handmade((4, 2), chain(8192, 5), PRIMES[:2], drops=(0,))
    (step,) = made.plan.steps
    assert isinstance(step, BfvLinear)
    nothing = replace(made.plan, steps=(replace(step, diagonals=step.diagonals * PRIMES[1]),))
    with pytest.raises(PlanError, match=f"zero modulo {PRIMES[1]}"):
        encrypted_bfv_engine(name, nothing)


def test_there_are_no_other_engines(square: Exact) -> None:
    with pytest.raises(PlanError, match="no engine is called 'clear'"):
        encrypted_bfv_engine("clear", square.plan)


# The key holder ------------------------------------------------------------------------------------------------------


def test_uploads_are_seeded_fresh_and_below_the_largest_size(square: Exact) -> None:
    images, public = square.images(0), square.plan.public
    one, other = square.holder.encrypt(images), square.holder.encrypt(images)
    assert all(first != second for first, second in zip(one, other, strict=True))
    for number, upload in enumerate(one):
        residues = sealformat.read_ciphertext(
            upload, public.parameters, public.parameters.top_level, 1.0, public.plain_moduli[number]
        )
        assert residues.seed is not None
        assert len(upload) <= sealformat.largest_ciphertext(public.parameters)


def test_values_are_rounded_to_the_nearest_integer_of_the_input_scale() -> None:
    exact = Exact(handmade((2, 2), chain(4096, 2), primes_of(4096, 17, 1), drops=(0,)))
    scale = exact.plan.public.input_scale
    for offset in (-0.4, 0.4):
        images = np.array([[(7 + offset) / scale, (-3 + offset) / scale]])
        expected = exact.made.matrices[0].astype(object) @ np.array([7, -3], dtype=object) + exact.made.biases[0]
        assert (exact.integers("seal", images) == expected).all()


def test_a_stored_secret_key_decrypts_again(square: Exact) -> None:
    public = square.plan.public
    assert repr(square.holder) == "BfvKeyHolder(model='handmade', degree=8192)"
    again = BfvKeyHolder(public, square.holder.secret_bytes())
    assert again.secret_bytes() == square.holder.secret_bytes()
    images = square.images(8)
    assert (again.decrypt_integers(square.reply("seal", images)) == square.made.integers(images)).all()


def test_slots_that_hold_no_logit_must_be_zero(square: Exact) -> None:
    """A reply that SEAL decrypts well, with the right logits in all copies, but with something beside them."""
    public, minor = square.plan.public, sealio.seal_minor_version()
    ones = pack_rows(public.output_layout, np.arange(1, 4))
    assert math.prod(ones.shape) > 0
    ones[ones == 0] = 5
    replies = []
    for modulus in public.plain_moduli:
        context = sealio.make_context(public.parameters, modulus)
        secret = sealio.truncated_secret(square.holder.secret_bytes(), public.parameters, 4, modulus)
        encryptor = seal.Encryptor(context, sealio.load(seal.SecretKey(), context, secret))
        plain = sealio.encode_rows(seal.BatchEncoder(context), ones[0], modulus)
        value = seal.Ciphertext()
        encryptor.encrypt_symmetric(plain, value)
        words = sealio.parms_id_words(public.parameters.parms_id(public.output_level, modulus))
        seal.Evaluator(context).mod_switch_to_inplace(value, words)
        replies.append(sealio.dump(value))
    assert minor >= 0
    with pytest.raises(FormatError, match="copies of a logit disagree"):
        square.holder.decrypt_integers(replies)
