"""The hospital's side of a batch: what is encrypted, and which replies are believed."""

from __future__ import annotations

import numpy as np
import pytest

from client_sdk._crypto import BatchKeyHolder, KeyHolder
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.planner import plan_network
from hemacrypt.seal import format as sealformat
from tests.hemacrypt.batches import Batch, random_network


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.of(random_network(1, 1))


def test_ciphertexts_are_seeded_and_at_the_plans_level(batch: Batch) -> None:
    public, uploads = batch.plan.public, list(batch.holder.encrypt(batch.images(2)))
    assert len(uploads) == public.inputs
    for upload in uploads:
        read = sealformat.read_ciphertext(upload, public.parameters, public.input_level, public.input_scale)
        assert read.seed is not None


def test_images_that_cannot_be_encrypted_are_refused_before_any_is(batch: Batch) -> None:
    images = batch.images(2)
    for wrong in (images[:, :, :-1], images * np.inf, images * 1e60):
        with pytest.raises(PlanError):
            batch.holder.encrypt(wrong)


def test_replies_are_checked(batch: Batch) -> None:
    replies = batch.evaluate(batch.holder.encrypt(batch.images(2)))
    with pytest.raises(FormatError, match="one for each logit"):
        batch.holder.decrypt(replies[:-1], 2)
    with pytest.raises(FormatError):
        batch.holder.decrypt([*replies[:-1], replies[-1][:-1]], 2)
    with pytest.raises(FormatError):
        batch.holder.decrypt(list(batch.holder.encrypt(batch.images(2)))[: len(replies)], 2)


@pytest.mark.parametrize(("count", "told"), [(1, "disagree"), (4096, "too large")])
def test_replies_under_another_key_are_no_logits(batch: Batch, count: int, told: str) -> None:
    replies = batch.evaluate(batch.holder.encrypt(batch.images(count)))
    with pytest.raises(FormatError, match=told):
        BatchKeyHolder(batch.plan.public).decrypt(replies, count)


def test_a_secret_key_of_other_parameters_is_refused(batch: Batch) -> None:
    other = KeyHolder(plan_network(random_network(1, 0)).public)
    with pytest.raises(FormatError):
        BatchKeyHolder(batch.plan.public, other.secret_bytes())


def test_no_key_is_shown(batch: Batch) -> None:
    assert repr(batch.holder) == "BatchKeyHolder(model='network', degree=8192)"
