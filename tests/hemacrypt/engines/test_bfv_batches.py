"""Exact batches under encryption: the integers of the quantised network for every image, on both engines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal

from client_sdk._crypto import BfvBatchKeyHolder
from hemacrypt.embedded import bundle_path
from hemacrypt.engines import ENCRYPTED_ENGINES, exact_batch_engine
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.model.quantise import QuantisedNetwork, at_scales
from hemacrypt.plan.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan, BfvBatchSquare
from hemacrypt.plan.plan import KeyGroup
from hemacrypt.planner.throughput.bfv import plan_bfv_batch, plan_bfv_batch_bundle
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys
from tests.hemacrypt.batches import random_network


@dataclass(frozen=True)
class Exact:
    """A network, its exact batch plan, a hospital's keys, and engines."""

    network: CollapsedNetwork
    plan: BfvBatchPlan

    @cached_property
    def quantised(self) -> QuantisedNetwork:
        return at_scales(self.network, self.plan.public.input_scale, self.plan.weight_scales)

    @cached_property
    def holder(self) -> BfvBatchKeyHolder:
        return BfvBatchKeyHolder(self.plan.public)

    @cached_property
    def keys(self) -> EvaluationKeys:
        return self.holder.evaluation_keys()

    @cached_property
    def engines(self) -> dict[str, tuple[Any, Any]]:
        made = {name: exact_batch_engine(name, self.plan) for name in ENCRYPTED_ENGINES}
        return {name: (engine, engine.load_keys(self.keys)) for name, engine in made.items()}

    def images(self, count: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).uniform(-1, 1, (count, *self.network.input_shape))

    def reply(self, name: str, uploads: list[bytes]) -> list[bytes]:
        engine, keys = self.engines[name]
        replies: list[bytes] = engine.evaluate(iter(uploads), keys)
        return replies


NETWORKS = {
    "no square": random_network(3, 0, size=4),
    "one square": random_network(4, 1, size=4),
    "two squares": random_network(5, 2, size=3),
}


def at_once(plan: BfvBatchPlan) -> BfvBatchPlan:
    """Return the same plan with squares that are relinearised at once."""
    steps: list[BfvBatchLinear | BfvBatchSquare] = []
    for step in plan.steps:
        if isinstance(step, BfvBatchSquare):
            steps.append(replace(step, relinearise=True))
        else:
            steps.append(replace(step, relinearise=False))
    levels = sorted({step.level for step in steps if step.relinearise}, reverse=True)
    public = replace(plan.public, keys=tuple(KeyGroup(level, True, ()) for level in levels))
    return replace(plan, public=public, steps=tuple(steps))


@pytest.fixture(scope="module", params=[*NETWORKS, "relinearised at once"])
def exact(request: pytest.FixtureRequest) -> Exact:
    if request.param in NETWORKS:
        network = NETWORKS[request.param]
        return Exact(network, plan_bfv_batch(network))
    plan = plan_bfv_batch(NETWORKS["two squares"])
    assert not any(step.relinearise for step in plan.squares)
    return Exact(NETWORKS["two squares"], at_once(plan))


@pytest.fixture(scope="module")
def simple() -> Exact:
    return Exact(NETWORKS["no square"], plan_bfv_batch(NETWORKS["no square"]))


def test_both_engines_return_the_integers_of_the_quantised_network(exact: Exact) -> None:
    images = exact.images(5)
    uploads = list(exact.holder.encrypt(images))
    assert len(uploads) == len(exact.plan.public.plain_moduli) * exact.network.inputs
    expected = exact.quantised.integers(images).astype(object)
    for name in ENCRYPTED_ENGINES:
        found = exact.holder.decrypt_integers(exact.reply(name, uploads), 5)
        assert found.tolist() == expected.tolist()
        assert all(type(value) is int for value in found.reshape(-1))


def test_every_slot_of_both_rows_holds_an_image(simple: Exact) -> None:
    public = simple.plan.public
    assert public.images == public.parameters.degree
    images = simple.images(public.images, seed=1)
    found = simple.holder.decrypt_integers(simple.reply("vector", list(simple.holder.encrypt(images))), len(images))
    assert (found == simple.quantised.integers(images)).all()


def test_logits_are_integers_divided_by_the_scale(simple: Exact) -> None:
    images = simple.images(3)
    logits = simple.holder.decrypt(simple.reply("seal", list(simple.holder.encrypt(images))), 3)
    np.testing.assert_array_equal(logits, simple.quantised.integers(images) / simple.plan.public.output_scale)


def test_threads_do_not_change_a_byte(exact: Exact) -> None:
    uploads = list(exact.holder.encrypt(exact.images(2)))
    _, keys = exact.engines["vector"]
    assert exact_batch_engine("vector", exact.plan, 2).evaluate(iter(uploads), keys) == exact.reply("vector", uploads)


def test_the_noise_budget_is_what_was_predicted_or_more(exact: Exact) -> None:
    public, minor = exact.plan.public, sealio.seal_minor_version()
    uploads = list(exact.holder.encrypt(exact.images(4)))
    for name in ENCRYPTED_ENGINES:
        replies = exact.reply(name, uploads)
        for number, modulus in enumerate(public.plain_moduli):
            context = sealio.make_context(public.parameters, modulus)
            top = public.parameters.top_level
            secret = sealio.truncated_secret(exact.holder.secret_bytes(), public.parameters, top, modulus)
            decryptor = seal.Decryptor(context, sealio.load(seal.SecretKey(), context, secret))
            for reply in replies[number * public.outputs : (number + 1) * public.outputs]:
                checked = sealformat.check_ciphertext(
                    reply, public.parameters, public.output_level, 1.0, minor, modulus
                )
                budget = decryptor.invariant_noise_budget(sealio.load(seal.Ciphertext(), context, checked))
                # SEAL counts whole bits, rounded down.
                assert exact.plan.noise_budgets[-1] - 1 <= budget <= exact.plan.noise_budgets[-1] + 10


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_more_fewer_or_other_ciphertexts_are_refused(exact: Exact, name: str) -> None:
    uploads = list(exact.holder.encrypt(exact.images(1)))
    with pytest.raises(FormatError, match="ciphertexts"):
        exact.reply(name, uploads[:-1])
    with pytest.raises(FormatError, match="more came than"):
        exact.reply(name, [*uploads, uploads[0]])
    with pytest.raises(FormatError, match="ciphertext"):
        exact.reply(name, [uploads[0][:-1], *uploads[1:]])
    if len(exact.plan.public.plain_moduli) > 1:
        with pytest.raises(FormatError, match="level: it belongs to other parameters"):
            exact.reply(name, uploads[::-1])


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_a_reply_to_one_key_is_no_answer_under_another(simple: Exact, name: str) -> None:
    reply = simple.reply(name, list(simple.holder.encrypt(simple.images(3))))
    other = BfvBatchKeyHolder(simple.plan.public)
    with pytest.raises(FormatError, match="copies of a logit disagree"):
        other.decrypt_integers(reply, 3)
    for wrong in ([], reply[:-1], reply * 2):
        with pytest.raises(FormatError, match=f"{len(wrong)} ciphertexts came"):
            simple.holder.decrypt_integers(wrong, 3)


def test_integers_that_no_valid_image_makes_are_refused(simple: Exact) -> None:
    images = simple.images(2)
    reply = simple.reply("vector", list(simple.holder.encrypt(images)))
    largest = int(abs(simple.quantised.integers(images)).max())
    secret = simple.holder.secret_bytes()
    fitting = BfvBatchKeyHolder(replace(simple.plan.public, largest_logit=largest), secret)
    assert (fitting.decrypt_integers(reply, 2) == simple.quantised.integers(images)).all()
    strict = BfvBatchKeyHolder(replace(simple.plan.public, largest_logit=largest - 1), secret)
    with pytest.raises(FormatError, match=f"exceeds {largest - 1}"):
        strict.decrypt_integers(reply, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_images_that_cannot_be_encrypted_are_refused_by_name(simple: Exact, value: float) -> None:
    images = simple.images(2)
    images[1, 0, 1, 1] = value
    with pytest.raises(PlanError, match="no finite numbers of moderate size"):
        simple.holder.encrypt(images)
    fine = simple.images(2)
    for wrong in (fine[0], fine[:0], fine[:, :, 1:]):
        with pytest.raises(PlanError, match="got images"):
            simple.holder.encrypt(wrong)


@pytest.mark.parametrize("name", ENCRYPTED_ENGINES)
def test_negative_and_large_weights_are_exact(name: str) -> None:
    weight = np.array([[-1.0, 2.0**-9, 1.0], [2.0**-9, -1.0, -1.0]])
    network = CollapsedNetwork((1, 1, 3), (Dense(weight, np.array([5.0, -7.0])),), (-1.0, 1.0))
    exact = Exact(network, plan_bfv_batch(network))
    images = np.array([[[[-1.0, 1.0, 0.5]]], [[[1.0, -1.0, -0.25]]]])
    found = exact.holder.decrypt_integers(exact.reply(name, list(exact.holder.encrypt(images))), 2)
    assert (found == exact.quantised.integers(images)).all()


def test_an_output_that_depends_on_nothing_is_refused() -> None:
    network = CollapsedNetwork((1, 1, 2), (Dense(np.array([[1.0, 2.0], [0.0, 0.0]]), np.zeros(2)),))
    with pytest.raises(PlanError, match="output 1 has only zero weights"):
        plan_bfv_batch(network)


def test_a_stored_secret_key_is_used_again(simple: Exact) -> None:
    holder = BfvBatchKeyHolder(simple.plan.public, simple.holder.secret_bytes())
    assert holder.secret_bytes() == simple.holder.secret_bytes()
    assert repr(holder) == "BfvBatchKeyHolder(model='network', degree=4096)"


def test_the_embedded_network_needs_few_moduli(simple: Exact) -> None:
    bundle = Bundle.read(bundle_path())
    plan = plan_bfv_batch_bundle(bundle)
    assert plan.public.images == 8192
    assert len(plan.public.plain_moduli) <= 3
    assert min(plan.noise_budgets) > 0
    first = plan.linears[0]
    assert isinstance(first, BfvBatchLinear)
    assert plan.public.plan_id != simple.plan.public.plan_id
