"""Views: the same at both sizes, answered by the teacher, gone through one by one."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from training.study.config import Views
from training.study.views import DrawnViews, MatchedViews, answered

CELLS = 12


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(5)
    # Blocks of equal pixels: reduction to 32x32 then loses nothing, and the two sizes can be compared exactly.
    small = rng.integers(0, 256, (CELLS, 32, 32, 3), dtype=np.uint8)
    return small.repeat(2, axis=1).repeat(2, axis=2)


def all_of(drawn: DrawnViews, images: np.ndarray, view: int) -> np.ndarray:
    return drawn.of(images, np.full(CELLS, view), np.arange(CELLS))


def test_both_sizes_show_the_same_view(images: np.ndarray) -> None:
    drawn = DrawnViews.draw(Views(count=3, shift=3, stain=0.1, mix=0.5), CELLS)
    for view in range(3):
        large = all_of(drawn, images, view)
        reduced = large.reshape(CELLS, 32, 2, 32, 2, 3).mean(axis=(2, 4))
        np.testing.assert_allclose(all_of(drawn, images[:, ::2, ::2], view), reduced, atol=1e-6)


def test_views_vary_and_can_be_drawn_again(images: np.ndarray) -> None:
    views = Views(count=2)
    one, other = DrawnViews.draw(views, CELLS), DrawnViews.draw(views, CELLS)
    np.testing.assert_array_equal(all_of(one, images, 1), all_of(other, images, 1))
    assert np.abs(all_of(one, images, 0) - all_of(one, images, 1)).max() > 0.1


def test_a_plain_view_is_one_of_the_eight_symmetries(images: np.ndarray) -> None:
    drawn = DrawnViews.draw(Views(count=1, shift=0, stain=0, mix=0), CELLS)
    for cell, made in enumerate(all_of(drawn, images, 0)):
        eight = [np.rot90(side, turns) for turns in range(4) for side in (images[cell], images[cell][:, ::-1])]
        assert any(np.allclose(made * 255, one, atol=1e-3) for one in eight)


def test_what_is_shifted_out_is_black() -> None:
    white = np.full((CELLS, 64, 64, 3), 255, dtype=np.uint8)
    drawn = DrawnViews.draw(Views(count=4, shift=8, stain=0, mix=0), CELLS)
    for cell, made in enumerate(all_of(drawn, white, 0)):
        for axis, step in enumerate(drawn.shift[0, cell] * 2):
            # Place p shows what was at p + step, which lies outside for some.
            inside = (np.arange(64) + step >= 0) & (np.arange(64) + step < 64)
            np.testing.assert_array_equal(made.any(axis=(1 - axis, 2)), inside)


def test_labels_are_mixed_as_images_are() -> None:
    drawn = DrawnViews.draw(Views(count=1, mix=1.0), CELLS)
    hard = np.eye(2, dtype=np.float32)[np.arange(CELLS) % 2]
    found = drawn.targets(hard, np.zeros(CELLS, dtype=np.intp), np.arange(CELLS))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    for cell in range(CELLS):
        own = float(found[cell, cell % 2])
        same = drawn.other[0, cell] % 2 == cell % 2
        assert own == pytest.approx(1 if same else drawn.share[0, cell])


def test_every_view_comes_before_any_comes_again(images: np.ndarray) -> None:
    count, drawn = 4, DrawnViews.draw(Views(count=4), CELLS)
    # The answer to view v of cell c is (v, c): the batches then tell what they showed.
    answers = np.stack(np.meshgrid(np.arange(count), np.arange(CELLS), indexing="ij"), axis=-1).astype(np.float32)
    weights, hard = np.ones(CELLS, dtype=np.float32), np.eye(2, dtype=np.float32)[[0] * CELLS]
    batches = MatchedViews(drawn, images, hard, weights, answers, seed=3, batch_size=5)
    seen = []
    for _ in range(count):
        for index in range(len(batches)):
            shown, targets, _ = batches[index]
            for image, (view, cell) in zip(shown, targets[:, 2:].astype(int), strict=True):
                np.testing.assert_array_equal(image, drawn.of(images, np.array([view]), np.array([cell]))[0])
                seen.append((view, cell))
        batches.on_epoch_end()
    assert len(set(seen)) == len(seen) == count * CELLS


def test_the_teacher_answers_to_the_views(images: np.ndarray, tmp_path: Path) -> None:
    teacher = keras.Sequential([keras.Input((64, 64, 3)), keras.layers.AveragePooling2D(64), keras.layers.Flatten()])
    teacher.add(keras.layers.Dense(2))
    path = tmp_path / "model.keras"
    teacher.save(path)
    drawn = DrawnViews.draw(Views(count=3), CELLS)
    answers = answered(path, images, drawn)
    assert answers.shape == (3, CELLS, 2)
    expected = teacher.predict(all_of(drawn, images, 2), verbose=0)
    np.testing.assert_allclose(answers[2], expected, atol=1e-5)
