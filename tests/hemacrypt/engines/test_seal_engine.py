"""The encrypted evaluation by SEAL against numbers in the clear, and everything it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal

from client_sdk._crypto import KeyHolder
from hemacrypt.engines.clear.ckks import ClearEngine
from hemacrypt.errors import FormatError, HemacryptError
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.planner import KEY_BUDGET
from hemacrypt.planner.noise import NoiseModel
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from tests.hemacrypt.setups import Setup

RANDOM = np.random.default_rng(40).random((2, 3, 32, 32))


def check(setup: Setup, images: npt.ArrayLike) -> float:
    """Compare an encrypted evaluation with the clear engine; return error over bound."""
    expected = ClearEngine(setup.plan).predict(images)
    error = float(np.abs(setup.predict(images) - expected).max())
    assert error <= setup.plan.public.logit_error_bound
    return error / setup.plan.public.logit_error_bound


@pytest.mark.parametrize(
    "image",
    [RANDOM[0], RANDOM[1], np.zeros((3, 32, 32)), np.ones((3, 32, 32)), np.eye(32)[None].repeat(3, 0)],
    ids=["random-0", "random-1", "all-zero", "all-one", "diagonal"],
)
def test_the_cell_network_is_within_the_predicted_bound(cell: Setup, image: npt.NDArray[np.float64]) -> None:
    print(f"error / bound: {check(cell, image):.4f}")


def _network(shape: tuple[int, int, int], *layers: Convolution | Dense) -> CollapsedNetwork:
    return CollapsedNetwork(shape, layers)


def _normal(seed: int, *shape: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


SMALL_NETWORKS = {
    "regression-1-logit": _network((1, 5, 7), Dense(_normal(1, 1, 35) / 3, _normal(2, 1))),
    "regression-10-logits": _network((3, 5, 4), Dense(_normal(3, 10, 60) / 4, _normal(4, 10))),
    "wide-regression": _network((2, 16, 40), Dense(_normal(5, 5, 1280) / 9, _normal(6, 5))),
    "convolution-only": _network(
        (2, 6, 5), Convolution(_normal(7, 3, 2, 3, 2) / 2, _normal(8, 3), (2, 6, 5), 2, ((1, 0), (0, 1)))
    ),
    "one-square": _network(
        (2, 7, 9),
        Convolution(_normal(9, 4, 2, 3, 3) / 4, _normal(10, 4) / 3, (2, 7, 9), 2, ((1, 1), (1, 1))),
        Dense(_normal(11, 3, 80) / 9, _normal(12, 3)),
    ),
    "growing-dense": _network(
        (1, 2, 2),
        Dense(_normal(13, 20, 4) / 2, _normal(14, 20)),
        Dense(_normal(15, 1, 20) / 4, _normal(16, 1)),
    ),
}


@pytest.mark.parametrize("name", list(SMALL_NETWORKS))
def test_small_networks_are_within_the_predicted_bound(name: str) -> None:
    network = SMALL_NETWORKS[name]
    setup = Setup.of(network)
    ratios = [check(setup, np.random.default_rng(seed).random(network.input_shape)) for seed in range(2)]
    ratios += [check(setup, np.full(network.input_shape, value)) for value in (0.0, 1.0)]
    print(f"error / bound: {max(ratios):.4f}")
    np.testing.assert_allclose(
        ClearEngine(setup.plan).predict(np.ones(network.input_shape)), network(np.ones(network.inputs)), atol=1e-9
    )


def test_the_bound_holds_where_every_logit_lies_in_one_slot_only() -> None:
    """Without copies nothing averages: rounding errors times a secret's have the tails of a Laplace distribution."""
    layer = Convolution(np.full((1, 1, 1, 1), 0.7), np.full(1, -0.2), (1, 32, 64))
    setup = Setup.of(_network((1, 32, 64), layer))
    assert setup.plan.public.output_layout.copies == 1
    rng = np.random.default_rng(41)
    for _ in range(20):
        check(setup, rng.random((1, 32, 64)))


def test_sizes_on_the_wire_stay_within_their_bars(cell: Setup) -> None:
    (ciphertext,) = cell.holder.encrypt(RANDOM[0])
    (reply,) = cell.engine.evaluate([ciphertext], cell.keys)
    assert len(ciphertext) <= 245_000
    assert len(reply) <= 80_000
    assert len(cell.evaluation_keys.to_bytes()) <= KEY_BUDGET
    assert len(ciphertext) <= sealformat.largest_ciphertext(cell.plan.parameters)


def test_the_reply_is_at_the_lowest_level_and_the_planned_scale(cell: Setup) -> None:
    (reply,) = cell.reply(RANDOM[0])
    public = cell.plan.public
    checked = sealformat.check_ciphertext(reply, public.parameters, 0, public.output_scale, cell.minor)
    loaded = sealio.load(seal.Ciphertext(), sealio.make_context(public.parameters), checked)
    assert (loaded.size(), loaded.coeff_modulus_size(), loaded.scale) == (2, 1, public.output_scale)


def deviation_of_a_slot(setup: Setup) -> float:
    """Return the standard deviation of the last rescale's rounding, which dominates in a single slot."""
    public = setup.plan.public
    return float(np.sqrt(NoiseModel(public.parameters).rescale) / public.output_scale)


def test_every_slot_of_a_decrypted_reply_is_a_logit_or_the_guard_or_empty(cell: Setup) -> None:
    slots, layout = cell.slots(cell.reply(RANDOM[0])), cell.plan.public.output_layout
    (computed,) = layout.unpack(ClearEngine(cell.plan).run(cell.plan.public.input_layout.pack(RANDOM[0]))[0])
    np.testing.assert_allclose(computed[:2], cell.network(RANDOM[:1])[0], rtol=0, atol=1e-9)
    expected = layout.pack(computed)
    # A single slot has more rounding noise than the mean over all copies, with tails far beyond a Gaussian's; partial
    # sums would be off by orders more.
    assert np.abs(slots - expected).max() < 25 * np.sqrt(2) * deviation_of_a_slot(cell)


def test_every_slot_of_a_pairs_reply_holds_one_logit_of_each_image(pair: Setup) -> None:
    images = np.random.default_rng(43).random((2, 1, 4, 4))
    slots, layout = pair.slots(pair.reply(images)), pair.plan.public.output_layout
    expected = layout.pack(pair.network(images))
    assert (layout.images, layout.factor) == (2, pytest.approx(np.sqrt(2)))
    assert np.abs(slots - expected).max() < 25 * np.sqrt(2) * deviation_of_a_slot(pair) + 2 * (
        pair.plan.public.logit_error_bound
    )
    empty = np.ones(layout.period, dtype=bool)
    empty[layout.positions] = False
    assert empty.any()
    assert not expected[:, np.tile(empty, layout.copies)].any()


def test_a_full_ciphertext_gives_the_same_logits_as_a_seeded_one(cell: Setup) -> None:
    (seeded,) = cell.holder.encrypt(RANDOM[0])
    full = cell.full(seeded)
    assert len(full) > 1.9 * len(seeded)
    one, other = (cell.holder.decrypt(cell.engine.evaluate([content], cell.keys)) for content in (seeded, full))
    np.testing.assert_array_equal(one, other)


def test_evaluation_is_repeatable_and_leaves_no_trace_in_the_engine(one_square: Setup) -> None:
    image = np.linspace(0, 1, 16)
    first = one_square.holder.encrypt(image)
    reply = one_square.engine.evaluate(first, one_square.keys)
    one_square.engine.evaluate(one_square.holder.encrypt(1 - image), one_square.keys)
    with pytest.raises(FormatError):
        one_square.engine.evaluate(reply, one_square.keys)
    assert one_square.engine.evaluate(first, one_square.keys) == reply


def test_two_encryptions_of_one_image_differ(regression: Setup) -> None:
    assert regression.holder.encrypt(np.ones(16)) != regression.holder.encrypt(np.ones(16))


def test_two_hospitals_share_an_engine_without_meeting(one_square: Setup) -> None:
    other = KeyHolder(one_square.plan.public)
    others_keys = one_square.engine.load_keys(other.evaluation_keys())
    image = np.linspace(0, 1, 16)
    expected = one_square.network(image)
    bound = one_square.plan.public.logit_error_bound
    reply = one_square.engine.evaluate(other.encrypt(image), others_keys)
    assert np.abs(other.decrypt(reply) - expected).max() <= bound
    assert np.abs(one_square.predict(image) - expected).max() <= bound


def refused_or_garbled(holder: KeyHolder, reply: list[bytes], setup: Setup, images: npt.NDArray[np.float64]) -> bool:
    try:
        logits = holder.decrypt(reply)
    except FormatError:
        return True
    return bool(np.abs(logits - setup.network(images)).max() > 100 * setup.plan.public.logit_error_bound)


def test_a_reply_to_one_key_is_no_answer_under_another(cell: Setup) -> None:
    reply = cell.engine.evaluate(cell.holder.encrypt(RANDOM[0]), cell.keys)
    assert not refused_or_garbled(cell.holder, reply, cell, RANDOM[0])
    assert refused_or_garbled(KeyHolder(cell.plan.public), reply, cell, RANDOM[0])


def test_evaluation_under_another_hospitals_keys_is_no_answer(one_square: Setup) -> None:
    stranger = KeyHolder(one_square.plan.public)
    image = np.linspace(0, 1, 16)
    reply = one_square.engine.evaluate(stranger.encrypt(image), one_square.keys)
    assert refused_or_garbled(stranger, reply, one_square, image)
    assert refused_or_garbled(one_square.holder, reply, one_square, image)


def test_an_honest_reply_is_never_refused(regression: Setup) -> None:
    """Copies of a logit differ by rounding errors with the tails of a Laplace distribution, not of a Gaussian."""
    rng = np.random.default_rng(42)
    for _ in range(100):
        check(regression, rng.random(16))


def test_a_reply_of_another_plan_is_refused(cell: Setup, one_square: Setup, regression: Setup) -> None:
    reply = one_square.engine.evaluate(one_square.holder.encrypt(np.ones(16)), one_square.keys)
    with pytest.raises(FormatError):
        regression.holder.decrypt(reply)
    with pytest.raises(FormatError):
        cell.holder.decrypt(reply)
    with pytest.raises(FormatError):
        one_square.holder.decrypt(one_square.holder.encrypt(np.ones(16)))


def test_a_stored_secret_key_decrypts_again(regression: Setup) -> None:
    reply = regression.engine.evaluate(regression.holder.encrypt(np.ones(16)), regression.keys)
    again = KeyHolder(regression.plan.public, regression.holder.secret_bytes())
    np.testing.assert_array_equal(again.decrypt(reply), regression.holder.decrypt(reply))


@pytest.mark.parametrize("level", [2, 1, 0])
def test_an_upload_at_a_lower_level_is_refused(one_square: Setup, level: int) -> None:
    public = one_square.plan.public
    context, plain = sealio.make_context(public.parameters), seal.Plaintext()
    secret = sealio.load(seal.SecretKey(), context, one_square.holder.secret_bytes())
    words = sealio.parms_id_words(public.parameters.parms_id(level))
    seal.CKKSEncoder(context).encode([0.5] * 4096, words, 2.0**20, plain)
    lower = sealio.dump(seal.Encryptor(context, secret).encrypt_symmetric(plain))
    with pytest.raises(FormatError, match=rf"it belongs to level {level}"):
        one_square.engine.evaluate([lower], one_square.keys)


@pytest.mark.parametrize("name", ["regression", "pair", "spread", "large_image"])
def test_more_or_fewer_ciphertexts_than_planned_are_refused(name: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    public = setup.plan.public
    uploads = setup.holder.encrypt(np.full((public.images, *setup.network.input_shape), 0.5))
    expected = public.input_layout.ciphertexts
    assert len(uploads) == expected
    for wrong in ([], uploads[1:], [*uploads, uploads[0]], uploads * 2):
        with pytest.raises(FormatError, match=f"{len(wrong)} came; the plan lays its input over {expected}"):
            setup.engine.evaluate(wrong, setup.keys)
    replies = setup.engine.evaluate(uploads, setup.keys)
    assert len(replies) == public.output_layout.ciphertexts
    for wrong in ([], replies * 2):
        with pytest.raises(FormatError, match=f"{len(wrong)} ciphertexts; expected {len(replies)}"):
            setup.holder.decrypt(wrong)


def test_an_upload_for_another_plan_is_refused(one_square: Setup, regression: Setup, cell: Setup) -> None:
    with pytest.raises(FormatError):
        one_square.engine.evaluate(cell.holder.encrypt(RANDOM[0]), one_square.keys)
    with pytest.raises(FormatError, match="other parameters"):
        one_square.engine.evaluate(regression.holder.encrypt(np.ones(16)), one_square.keys)


@pytest.mark.parametrize("content", [b"", b"\0" * 16, b"hello" * 1000])
def test_bytes_that_are_no_ciphertext_are_refused(regression: Setup, content: bytes) -> None:
    with pytest.raises(FormatError):
        regression.engine.evaluate([content], regression.keys)
    check(regression, np.ones(16))


def _one_pixel_shift(tiny: float) -> CollapsedNetwork:
    kernel = np.zeros((1, 1, 3, 3))
    kernel[0, 0, 1, 1], kernel[0, 0, 0, 0] = 1.0, tiny
    return _network((1, 8, 8), Convolution(kernel, np.zeros(1), (1, 8, 8), 1, ((1, 1), (1, 1))))


def _one_small_diagonal(tiny: float) -> CollapsedNetwork:
    return _network((1, 2, 2), Dense(np.array([[1.0, tiny, 0.5, tiny], [tiny, 1.0, tiny, -1.0]]), np.zeros(2)))


@pytest.mark.parametrize("tiny", [1e-4, 1e-9, 1e-30])
@pytest.mark.parametrize("make", [_one_pixel_shift, _one_small_diagonal])
def test_weights_too_small_to_encode_do_not_stop_the_evaluation(
    make: Callable[[float], CollapsedNetwork], tiny: float
) -> None:
    setup = Setup.of(make(tiny))
    check(setup, np.full(setup.network.input_shape, 0.5))


@pytest.mark.parametrize("factor", [1e-13, 0.0])
def test_a_ciphertext_of_weights_too_small_to_encode_is_computed(factor: float) -> None:
    """SEAL computes with no ciphertext that encrypts nothing; what can be planned must not fail later."""
    weight = _normal(51, 5000, 4)
    weight[4096:] *= factor
    network = _network((1, 2, 2), Dense(weight, np.ones(5000)), Dense(np.ones((1, 5000)) / 5000, np.zeros(1)))
    check(Setup.of(network), np.full(4, 0.5))


def test_logits_of_which_a_whole_ciphertext_is_constant_are_computed() -> None:
    weight = _normal(52, 2100, 4)
    weight[2000:] = 0.0
    check(Setup.of(_network((1, 2, 2), Dense(weight, _normal(53, 2100)))), np.full(4, 0.5))


def test_biases_far_larger_than_the_logits_are_evaluated() -> None:
    """Calibrated logits can be small although the bias is not: the affine part cancels it."""
    rng = np.random.default_rng(50)
    weight = np.full((2, 16), 100.0) + rng.normal(size=(2, 16))
    network = _network((1, 4, 4), Dense(weight, 1.0 - weight.sum(axis=1) / 2))
    calibrated = network.calibrated(np.full((1, 16), 0.5))
    assert calibrated.magnitudes is not None
    assert calibrated.magnitudes[0] == pytest.approx([1.0, 1.0])
    check(Setup.of(calibrated), np.full(16, 0.5))


@pytest.mark.parametrize(
    "image",
    [np.zeros(15), np.zeros(17), np.zeros(1), np.zeros(0), np.full(16, np.nan), np.full(16, np.inf), np.full(16, 1e30)],
    ids=["short", "long", "scalar", "empty", "nan", "infinite", "huge"],
)
def test_an_image_that_cannot_be_encrypted_is_refused_by_name(
    regression: Setup, image: npt.NDArray[np.float64]
) -> None:
    with pytest.raises(HemacryptError):
        regression.holder.encrypt(image)
