"""The fast engine on whole networks: within the plan's bound, beside SEAL, and closed to hostile bytes."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from client_sdk._crypto import KeyHolder
from hemacrypt.embedded import SampleCell, sample
from hemacrypt.engines import encrypted_engine
from hemacrypt.engines.vector.ckks import VectorEngine, VectorKeys
from hemacrypt.errors import FormatError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.plan.plan import Plan
from hemacrypt.planner import plan_bundle, plan_network
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.evaluation_keys import EvaluationKeys, LevelKeys


@pytest.fixture(scope="module")
def plans(bundle: Bundle) -> tuple[Plan, ...]:
    """The embedded model's plans for one image and for two; keys serve both."""
    return plan_bundle(bundle)


@pytest.fixture(scope="module")
def plan(plans: tuple[Plan, ...]) -> Plan:
    return plans[0]


@pytest.fixture(scope="module")
def holder(plan: Plan) -> KeyHolder:
    return KeyHolder(plan.public)


@pytest.fixture(scope="module")
def evaluation(holder: KeyHolder) -> EvaluationKeys:
    return holder.evaluation_keys()


@pytest.fixture(scope="module")
def engine(plan: Plan) -> VectorEngine:
    return VectorEngine(plan)


@pytest.fixture(scope="module")
def keys(engine: VectorEngine, evaluation: EvaluationKeys) -> VectorKeys:
    return engine.load_keys(evaluation)


def test_real_cells_come_out_as_in_the_clear_and_as_with_seal(
    bundle: Bundle,
    plan: Plan,
    holder: KeyHolder,
    evaluation: EvaluationKeys,
    engine: VectorEngine,
    keys: VectorKeys,
    cells: list[SampleCell],
) -> None:
    reference = encrypted_engine("seal", plan)
    seal_keys = reference.load_keys(evaluation)
    for cell in cells:
        image = bundle.manifest.preprocessing(cell.path)
        clear = bundle.network(image[None])
        ciphertext = holder.encrypt(image)
        ours = holder.decrypt(engine.evaluate(ciphertext, keys))
        theirs = holder.decrypt(reference.evaluate(ciphertext, seal_keys))
        assert np.abs(ours - clear).max() <= plan.public.logit_error_bound
        assert np.abs(ours - theirs).max() <= 2 * plan.public.logit_error_bound
        assert int(np.argmax(ours)) == int(np.argmax(clear))


def test_real_cells_in_pairs_come_out_as_in_the_clear(
    bundle: Bundle, plans: tuple[Plan, ...], holder: KeyHolder, keys: VectorKeys, cells: list[SampleCell]
) -> None:
    assert [plan.public.images for plan in plans] == [1, 2]
    assert plans[0].public.requirements_id == plans[1].public.requirements_id
    engine, serving = VectorEngine(plans[1]), holder.serving(plans[1].public)
    for first, second in zip(cells[:3], cells[3:], strict=True):
        images = np.stack([bundle.manifest.preprocessing(cell.path) for cell in (first, second)])
        found = serving.decrypt(engine.evaluate(serving.encrypt(images), keys))
        clear = bundle.network(images)
        assert np.abs(found - clear).max() <= plans[1].public.logit_error_bound
        assert found.argmax(axis=1).tolist() == clear.argmax(axis=1).tolist()


def test_replies_are_small_and_at_level_zero(
    plan: Plan, holder: KeyHolder, engine: VectorEngine, keys: VectorKeys
) -> None:
    (reply,) = engine.evaluate(holder.encrypt(np.full((3, 32, 32), 0.1)), keys)
    assert len(reply) <= 80_000
    read = sealformat.read_ciphertext(reply, plan.parameters, 0, plan.public.output_scale)
    assert read.polynomials.shape == (2, 1, plan.parameters.degree)


@pytest.mark.parametrize(
    "network",
    [
        CollapsedNetwork((1, 8, 8), (Dense(np.random.default_rng(1).normal(size=(3, 64)), np.ones(3)),)),
        CollapsedNetwork(
            (2, 8, 8),
            (
                Convolution(np.random.default_rng(2).normal(size=(4, 2, 3, 3)) / 4, np.zeros(4), (2, 8, 8), 2),
                Dense(np.random.default_rng(3).normal(size=(1, 36)) / 6, np.ones(1)),
            ),
        ),
    ],
    ids=["logistic regression", "one square, one logit"],
)
def test_small_networks_stay_within_their_bound(network: CollapsedNetwork) -> None:
    images = np.random.default_rng(4).random((3, *network.input_shape))
    calibrated = network.calibrated(images)
    planned = plan_network(calibrated)
    holder, engine = KeyHolder(planned.public), VectorEngine(planned)
    keys = engine.load_keys(holder.evaluation_keys())
    for image, clear in zip(images, calibrated(images), strict=True):
        found = holder.decrypt(engine.evaluate(holder.encrypt(image), keys))
        assert np.abs(found - clear).max() <= planned.public.logit_error_bound


def test_threads_share_an_engine_and_keys(
    bundle: Bundle, plan: Plan, holder: KeyHolder, engine: VectorEngine, keys: VectorKeys
) -> None:
    images = np.stack([bundle.manifest.preprocessing(cell.path) for cell in sample()[:3]])
    ciphertexts = [holder.encrypt(image) for image in images]
    replies: dict[int, list[bytes]] = {}

    def work(number: int) -> None:
        replies[number] = engine.evaluate(ciphertexts[number], keys)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, clear in enumerate(bundle.network(images)):
        assert np.abs(holder.decrypt(replies[number]) - clear).max() <= plan.public.logit_error_bound


def test_hostile_ciphertexts_end_in_format_errors(holder: KeyHolder, engine: VectorEngine, keys: VectorKeys) -> None:
    (valid,) = holder.encrypt(np.zeros((3, 32, 32)))
    body = bytearray(sealformat.unwrap(valid, 1 << 24, "ciphertext"))
    rng = np.random.default_rng(6)
    refused = 0
    for _ in range(60):
        changed = bytearray(body)
        # The first hundred bytes hold every length, identifier and number that steers anything.
        for place in rng.integers(0, 100, 3):
            changed[place] = rng.integers(0, 256)
        try:
            engine.evaluate([sealformat.header(16 + len(changed), 3) + bytes(changed)], keys)
        except FormatError:
            refused += 1
    assert refused >= 55
    for cut in (0, 15, 16, 17, len(valid) // 2, len(valid) - 1):
        with pytest.raises(FormatError):
            engine.evaluate([valid[:cut]], keys)


def test_foreign_keys_are_refused(engine: VectorEngine, evaluation: EvaluationKeys) -> None:
    levels = evaluation.levels
    with pytest.raises(FormatError):
        engine.load_keys(EvaluationKeys(tuple(LevelKeys(each.galois, each.relinearisation) for each in levels)))
    cut = replace(levels[0], galois=levels[0].galois[:-1])
    with pytest.raises(FormatError, match="Galois keys"):
        engine.load_keys(EvaluationKeys((cut, *levels[1:])))
    with pytest.raises(FormatError):
        engine.load_keys(EvaluationKeys(levels[::-1]))
    with pytest.raises(FormatError, match="the plan needs 5"):
        engine.load_keys(EvaluationKeys(levels[1:]))


@pytest.mark.parametrize("factor", [1e-13, 0.0])
def test_one_ciphertext_of_weights_that_vanish_is_computed(factor: float) -> None:
    weights = np.random.default_rng(0).normal(size=(5000, 4))
    weights[4096:] *= factor
    layers = (Dense(weights, np.ones(5000)), Dense(np.ones((1, 5000)) / 5000, np.zeros(1)))
    check_small(CollapsedNetwork((1, 2, 2), layers))


def test_weights_that_vanish_beside_their_biases_are_computed() -> None:
    check_small(CollapsedNetwork((1, 4, 4), (Dense(np.full((2, 16), 1e-14), np.ones(2)),)))


def check_small(network: CollapsedNetwork) -> None:
    plan = plan_network(network)
    engine, holder = VectorEngine(plan), KeyHolder(plan.public)
    image = np.full(network.input_shape, 0.5)
    reply = engine.evaluate(holder.encrypt(image), engine.load_keys(holder.evaluation_keys()))
    assert np.abs(holder.decrypt(reply) - network(image)).max() < plan.public.logit_error_bound
