"""Batches under encryption: within the plan's bound for every image, SEAL's residues, closed to hostile bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal

from client_sdk._crypto import BatchKeyHolder, KeyHolder
from hemacrypt.engines.vector.batch import BatchEngine
from hemacrypt.engines.vector.ckks import VectorEngine
from hemacrypt.engines.vector.kernels import polynomials as kernels
from hemacrypt.engines.vector.kernels import products
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.plan.batch_plan import BatchLinear, BatchPlan
from hemacrypt.plan.plan import KeyGroup
from hemacrypt.planner import plan_layouts
from hemacrypt.planner.throughput.ckks import plan_batch
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys
from tests.hemacrypt.batches import Batch, random_network


@pytest.fixture(scope="module")
def small() -> Batch:
    return Batch.of(random_network(1, 2))


@pytest.mark.parametrize(("squares", "convolutions"), [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("seed", [2, 3])
def test_random_networks_stay_within_their_bound_for_every_image(seed: int, squares: int, convolutions: int) -> None:
    batch = Batch.of(random_network(seed, squares, convolutions=convolutions))
    assert batch.error(batch.images(batch.plan.public.images, seed)) <= batch.plan.public.logit_error_bound


@pytest.mark.parametrize("count", [1, 7, 4096])
def test_any_part_of_a_batch_may_be_used(small: Batch, count: int) -> None:
    images = small.images(count)
    logits = small.holder.decrypt(small.evaluate(small.holder.encrypt(images)), count)
    assert logits.shape == (count, 3)
    assert np.abs(logits - small.network(images)).max() <= small.plan.public.logit_error_bound


@pytest.mark.parametrize("schedule", ["at once", "later"])
def test_residues_are_seals(small: Batch, schedule: str) -> None:
    plan = small.plan if schedule == "later" else _relinearising_at_once(small.plan)
    engine = BatchEngine(plan)
    uploads = list(small.holder.encrypt(small.images(5)))
    holder = BatchKeyHolder(plan.public, small.holder.secret_bytes())
    keys = holder.evaluation_keys()
    ours = engine.evaluate(uploads, engine.load_keys(keys))
    theirs = _with_seal(plan, uploads, keys)
    for mine, reply in zip(ours, theirs, strict=True):
        parameters, public = plan.parameters, plan.public
        read = [
            sealformat.read_ciphertext(data, parameters, public.output_level, public.output_scale).polynomials
            for data in (mine, reply)
        ]
        assert np.array_equal(*read)


def _relinearising_at_once(plan: BatchPlan) -> BatchPlan:
    """Return a plan with the same scales whose squares wait for nothing."""
    steps = tuple(
        replace(step, relinearise=False) if isinstance(step, BatchLinear) else replace(step, relinearise=True)
        for step in plan.steps
    )
    changed = replace(plan, steps=steps)
    keys = tuple(KeyGroup(level, True, ()) for level in changed.relinearisation_levels)
    return replace(changed, public=replace(plan.public, keys=keys))


def _with_seal(plan: BatchPlan, uploads: list[bytes], keys: EvaluationKeys) -> list[bytes]:
    """Carry a plan out with SEAL's own operations; constants are encoded by SEAL too."""
    parameters, public, minor = plan.parameters, plan.public, sealio.seal_minor_version()
    context = sealio.make_context(parameters)
    encoder, evaluator = seal.CKKSEncoder(context), seal.Evaluator(context)
    switching = {}
    for group, serialised in keys.grouped(public):
        short = parameters.truncated(group.level)
        checked = sealformat.check_relinearisation_key(serialised.relinearisation, short, minor)
        smaller = sealio.make_context(short)
        switching[group.level] = seal.Evaluator(smaller), sealio.load(seal.RelinKeys(), smaller, checked)

    def constant(value: int, level: int, scale: float) -> Any:
        plain = seal.Plaintext()
        encoder.encode(float(value), sealio.parms_id_words(parameters.parms_id(level)), 1.0, plain)
        plain.scale = scale
        return plain

    def load(upload: bytes) -> Any:
        checked = sealformat.check_ciphertext(
            upload, parameters, public.input_level, public.input_scale, sealio.seal_minor_version()
        )
        return sealio.load(seal.Ciphertext(), context, checked)

    def lowered(value: Any, level: int, relinearise: bool, rescales: int, scale: float) -> Any:
        if relinearise:
            switch, key = switching[level]
            switch.relinearize_inplace(value, key)
        for _ in range(rescales):
            evaluator.rescale_to_next_inplace(value)
        value.scale = scale
        return value

    values = [load(uploads[place]) for place in np.argsort(public.input_order)]
    for step in plan.steps:
        if not isinstance(step, BatchLinear):
            for value in values:
                evaluator.square_inplace(value)
                lowered(value, step.level, step.relinearise, step.rescales, step.output_scale)
            continue
        outputs = []
        for output in range(step.outputs):
            total, term = None, None
            for place in np.flatnonzero((step.rows == output) & (step.weights != 0)):
                term = seal.Ciphertext()
                weight = constant(int(step.weights[place]), step.level, step.weight_scale)
                evaluator.multiply_plain(values[step.columns[place]], weight, term)
                if total is None:
                    total = term
                else:
                    evaluator.add_inplace(total, term)
            assert total is not None
            bias = round(float(step.bias[output]) * step.product_scale)
            evaluator.add_plain_inplace(total, constant(bias, step.level, total.scale))
            outputs.append(lowered(total, step.level, step.relinearise, step.rescales, step.output_scale))
        values = outputs
    return [sealio.dump(value) for value in values]


def test_any_number_of_threads_gives_the_same_bytes(small: Batch) -> None:
    uploads = list(small.holder.encrypt(small.images(3)))
    alone = small.evaluate(uploads)
    for threads in (2, 3, 5):
        assert BatchEngine(small.plan, threads).evaluate(uploads, small.keys) == alone


def test_memory_stays_within_what_the_engine_says() -> None:
    network = random_network(5, 1, size=24)
    for threads in (1, 2):
        batch = Batch.of(network, threads)
        uploads = list(batch.holder.encrypt(batch.images(2)))
        tracemalloc.start()
        try:
            batch.engine.evaluate(iter(uploads), batch.keys)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # A bound that is far from what is used would tell a service nothing.
        assert 0.5 * batch.engine.memory_bytes < peak <= batch.engine.memory_bytes


def test_ciphertexts_are_asked_for_a_few_at_a_time(small: Batch) -> None:
    uploads = list(small.holder.encrypt(small.images(1)))
    engine, asked = BatchEngine(small.plan, 2), 0

    def arriving() -> Iterator[bytes]:
        nonlocal asked
        for number, upload in enumerate(uploads):
            asked += 1
            yield b"" if number == 5 else upload

    with pytest.raises(FormatError):
        engine.evaluate(arriving(), small.keys)
    assert asked == 6


def test_the_wrong_number_of_ciphertexts_is_refused(small: Batch) -> None:
    uploads = list(small.holder.encrypt(small.images(1)))
    for wrong, told in ((uploads[:-1], f"{len(uploads) - 1} came"), ([], "0 came"), ([*uploads, b""], "more came")):
        with pytest.raises(FormatError, match=told) as raised:
            small.evaluate(wrong)
        assert raised.value.field == "ciphertexts"


def test_other_levels_scales_and_garbage_are_refused(small: Batch) -> None:
    uploads, public = list(small.holder.encrypt(small.images(1))), small.plan.public
    changed = {
        "level": replace(public, input_level=public.input_level - 1),
        "scale": replace(public, input_scale=2 * public.input_scale),
    }
    for field, other in changed.items():
        foreign = next(BatchKeyHolder(other).encrypt(small.images(1)))
        for place in (0, len(uploads) - 1):
            with pytest.raises(FormatError) as raised:
                small.evaluate([*uploads[:place], foreign, *uploads[place + 1 :]])
            assert raised.value.field == field
    for garbage in (
        b"",
        b"\0" * 100,
        uploads[1][:-1],
        uploads[1] + b"\0",
        uploads[1][:50] + bytes(len(uploads[1]) - 50),
    ):
        with pytest.raises(FormatError):
            small.evaluate([uploads[0], garbage, *uploads[2:]])
    assert small.error(small.images(2)) <= public.logit_error_bound


def test_keys_are_checked(small: Batch) -> None:
    (first, *others) = small.evaluation_keys.levels
    for relinearisation in (first.relinearisation[:-1], b""):
        damaged = replace(first, relinearisation=relinearisation)
        with pytest.raises(FormatError, match="relinearisation key"):
            small.engine.load_keys(EvaluationKeys((damaged, *others)))
    with pytest.raises(FormatError, match="levels"):
        small.engine.load_keys(EvaluationKeys(tuple(others)))
    no_square = BatchEngine(plan_batch(random_network(6, 0)))
    assert no_square.load_keys(EvaluationKeys(())) == {}
    with pytest.raises(FormatError, match="the plan needs 0"):
        no_square.load_keys(small.evaluation_keys)


def test_a_key_set_serves_all_layouts(small: Batch) -> None:
    layouts = plan_layouts(small.network)
    batch = layouts.batch
    assert batch is not None
    hospital = KeyHolder(layouts.plans[0].public)
    keys, holder, engine = hospital.evaluation_keys(), hospital.serving_batches(batch.public), BatchEngine(batch)
    images = small.images(4)
    found = holder.decrypt(engine.evaluate(holder.encrypt(images), engine.load_keys(keys)), 4)
    assert np.abs(found - small.network(images)).max() <= batch.public.logit_error_bound
    for plan in layouts.plans:
        latency = VectorEngine(plan)
        alone = hospital.serving(plan.public)
        few = images[: plan.public.images]
        logits = alone.decrypt(latency.evaluate(alone.encrypt(few), latency.load_keys(keys)))
        assert np.abs(logits - small.network(few)).max() <= plan.public.logit_error_bound


def test_warming_up_compiles_all_there_is(small: Batch) -> None:
    small.engine.warm_up()
    compiled = {kernel: len(kernel.signatures) for kernel in (products.multiply, products.close, kernels.square)}
    small.evaluate(small.holder.encrypt(small.images(1)))
    assert all(len(kernel.signatures) == count for kernel, count in compiled.items())


def test_an_engine_needs_a_thread(small: Batch) -> None:
    with pytest.raises(PlanError, match="at least 1"):
        BatchEngine(small.plan, 0)


def test_time_is_told(small: Batch) -> None:
    seconds: dict[str, float] = {}
    small.engine.evaluate(small.holder.encrypt(small.images(1)), small.keys, seconds)
    assert set(seconds) == {"read", "products", "close"}
    assert min(seconds.values()) > 0


def test_many_inputs_come_in_several_chunks() -> None:
    rng = np.random.default_rng(8)
    layers = (
        Dense(rng.normal(size=(500, 16)) / 4, rng.normal(size=500)),
        Dense(rng.normal(size=(2, 500)) / 22, np.ones(2)),
    )
    batch = Batch.of(CollapsedNetwork((1, 4, 4), layers, (-1, 1)).calibrated(rng.uniform(-1, 1, (50, 1, 4, 4))))
    assert len(batch.engine.layers[1].chunks) > 1
    assert batch.error(batch.images(20)) <= batch.plan.public.logit_error_bound
