"""The dry run: the plan on numbers in the clear, with magnitudes and bits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hemacrypt.engines import ENCRYPTED_ENGINES, ClearEngine, Engine, encrypted_engine
from hemacrypt.engines.seal.ckks import SealEngine
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.planner.latency.normalise import normalised
from tests.hemacrypt.setups import Setup


def images(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    rng = np.random.default_rng(30)
    return np.concatenate([rng.random((count - 2, 3, 32, 32)), np.zeros((1, 3, 32, 32)), np.ones((1, 3, 32, 32))])


def test_it_equals_the_cell_network(cell: Setup) -> None:
    engine = ClearEngine(cell.plan)
    batch = images(8)
    got = np.concatenate([engine.predict(image) for image in batch])
    np.testing.assert_allclose(got, cell.network(batch), rtol=0, atol=1e-9)


def test_bytes_in_and_bytes_out_are_the_slots(cell: Setup) -> None:
    engine = ClearEngine(cell.plan)
    slots = cell.plan.public.input_layout.pack(images(3)[0])
    replies = engine.evaluate([row.astype("<c16").tobytes() for row in slots])
    np.testing.assert_array_equal([np.frombuffer(reply, dtype="<c16") for reply in replies], engine.run(slots)[0])


@pytest.mark.parametrize("length", [0, 1, 8 * 4096, 16 * 4096 - 1, 16 * 4096 + 16])
def test_another_number_of_slots_is_refused(cell: Setup, length: int) -> None:
    with pytest.raises(FormatError, match="4096 complex128 values"):
        ClearEngine(cell.plan).evaluate([bytes(length)])


@pytest.mark.parametrize("count", [0, 2, 100])
def test_another_number_of_ciphertexts_is_refused(cell: Setup, count: int) -> None:
    with pytest.raises(FormatError, match=f"ciphertexts: {count} came; the plan lays its input over 1"):
        ClearEngine(cell.plan).evaluate([bytes(16 * 4096)] * count)


def test_every_slot_of_the_cell_networks_reply_is_a_logit_or_the_guard_or_empty(cell: Setup) -> None:
    layout = cell.plan.public.output_layout
    for image, logits in zip(images(4), cell.network(images(4)), strict=True):
        (slots,) = ClearEngine(cell.plan).run(cell.plan.public.input_layout.pack(image))[0]
        (values,) = layout.unpack(slots)
        np.testing.assert_allclose(values[:2], logits, rtol=0, atol=1e-9)
        assert 0 < values[2] <= cell.plan.public.guard_limit * (1 + 1e-9)
        np.testing.assert_allclose(slots, layout.pack(values)[0], rtol=0, atol=1e-9)
        assert (layout.period, layout.copies, len(values)) == (4, 1024, 3)


def test_magnitudes_follow_the_network_layer_by_layer(cell: Setup) -> None:
    image = images(3)[0]
    magnitudes = ClearEngine(cell.plan).run(cell.plan.public.input_layout.pack(image))[1]
    written = [float(np.abs(values).max()) for values in normalised(cell.network).network.trace(image)[:-1]]
    # The last map writes the guard beside the logits.
    slots = ClearEngine(cell.plan).run(cell.plan.public.input_layout.pack(image))[0]
    written.append(float(np.abs(cell.plan.public.output_layout.unpack(slots)).max()))
    expected = [written[0], written[0] ** 2, written[1], written[1] ** 2, written[2]]
    assert [magnitude.largest for magnitude in magnitudes] == pytest.approx(expected, rel=1e-9)
    assert [magnitude.step for magnitude in magnitudes] == [step.name for step in cell.plan.steps]
    for magnitude, step in zip(magnitudes, cell.plan.steps, strict=True):
        assert magnitude.bits == pytest.approx(math.log2(magnitude.largest * step.output_scale) + 1)
        assert magnitude.modulus_bits == cell.plan.parameters.bits_at(step.level - 1)
        assert magnitude.bits < magnitude.modulus_bits


def test_engines_are_made_by_name(regression: Setup) -> None:
    assert set(ENCRYPTED_ENGINES) == {"seal", "vector"}
    engine: Engine[object] = encrypted_engine("seal", regression.plan)
    assert isinstance(engine, SealEngine)
    with pytest.raises(PlanError, match="no engine is called 'clear'; choose one of vector, seal"):
        encrypted_engine("clear", regression.plan)
