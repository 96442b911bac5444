"""Augmentation and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from hemacrypt.model.preprocess import Preprocessing
from training.datasets import load_cells, split_by_image
from training.fit import AugmentedCells, augment, fit, weigh
from training.settings import Settings

BATCH = np.random.default_rng(0).random((64, 8, 8, 3), dtype=np.float32)


def test_turning_and_mirroring_moves_pixels_and_changes_none() -> None:
    out = augment(BATCH, np.random.default_rng(1), shift=0, stain=0.0)
    assert (np.sort(out.reshape(64, 64, 3), axis=1) == np.sort(BATCH.reshape(64, 64, 3), axis=1)).all()
    symmetries = {
        next(k for k in range(8) if (out[i] == np.rot90(BATCH[i][:, :: 1 - 2 * (k // 4)], k % 4)).all())
        for i in range(64)
    }
    assert symmetries == set(range(8))


def test_a_shift_brings_black_in() -> None:
    out = augment(np.ones_like(BATCH), np.random.default_rng(1), shift=2, stain=0.0)
    rows_lost = (out[:, :, 4, 0] == 0).sum(axis=1)
    assert set(rows_lost) == {0, 1, 2}
    assert set(np.unique(out)) == {0.0, 1.0}


def test_stain_leaves_black_black_and_stays_within_bounds() -> None:
    half = BATCH.copy()
    half[:, :4] = 0
    out = augment(np.ones_like(BATCH), np.random.default_rng(1), shift=0, stain=0.1)
    assert 0.8 <= out.min() < 0.9 < 1.1 < out.max() <= 1.2
    assert (augment(half, np.random.default_rng(1), 0, 0.1) == 0).sum() == (half == 0).sum()


def test_batches_hold_every_cell_once_per_epoch_and_depend_on_nothing_but_the_seed() -> None:
    targets = np.arange(10, dtype=np.float32)[:, None]
    one, other = (AugmentedCells(BATCH[:10], targets, targets[:, 0], Settings(batch_size=4)) for _ in range(2))
    first = [one[i] for i in range(len(one))]
    assert sorted(np.concatenate([y for _, y, _ in first]).ravel()) == list(range(10))
    assert (other[2][0] == first[2][0]).all()  # asked out of order
    one.on_epoch_end()
    assert [y.ravel().tolist() for _, y, _ in first] != [one[i][1].ravel().tolist() for i in range(len(one))]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_balance_labels_and_groups(arrays: Path, power: float) -> None:
    cells = load_cells(arrays)
    rows = cells.pool[3:]  # uneven
    assert (weigh(cells, rows, label_balance=False, group_power=0.0) == 1).all()
    weights = weigh(cells, rows, label_balance=True, group_power=power)
    assert weights.mean() == pytest.approx(1)
    totals = [weights[cells.labels[rows] == label].sum() for label in (0, 1)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    if power == 1:
        per_group = [weights[cells.groups[rows] == group].sum() for group in np.unique(cells.groups[rows])]
        assert np.std(per_group) < 1e-4 * np.mean(per_group)


def test_equal_seeds_give_equal_weights_and_others_do_not(arrays: Path) -> None:
    cells = load_cells(arrays)
    split = split_by_image(cells)
    small = {"protocol": "image", "epochs": 1, "first_maps": 4, "inner_maps": 4, "hidden": 8}

    def weights(seed: int) -> list[np.ndarray]:  # type: ignore[type-arg]
        model, history = fit(cells, split, Settings(seed=seed, **small), Preprocessing())
        assert set(history) == {"loss", "accuracy", "auroc", "val_loss", "val_accuracy", "val_auroc"}
        return model.get_weights()  # type: ignore[no-any-return]

    one, same, other = weights(1), weights(1), weights(2)
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("wrong", [{"first_maps": 17}, {"hidden": 65}, {"epochs": 0}, {"protocol": "x"}, {"speed": 1}])
def test_settings_that_the_encrypted_network_cannot_carry_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate(wrong)
