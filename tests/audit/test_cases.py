"""Where `hemacrypt verify` gets its images from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from audit.cases import load
from hemacrypt.errors import ImageError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "cells.npz"
    random = np.random.default_rng(3)
    np.savez_compressed(
        path,
        images=random.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8),
        labels=np.array([0, 1, 0, 1, 0, 1], dtype=np.uint8),
        heldout=np.array([1, 1, 0, 1, 1, 0], dtype=bool),
        dup_of=np.array([-1, 0, -1, -1, -1, -1], dtype=np.int32),
        names=np.array(list("abcdef")),
    )
    return path


def _changed(archive: Path, **arrays: Any) -> Path:
    with np.load(archive) as before:
        content = dict(before) | arrays
    path = archive.with_name("changed.npz")
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def test_without_paths_there_is_the_embedded_sample() -> None:
    cases = load([])
    assert len(cases) == 180
    assert {case.label for case in cases} == {0, 1}


def test_a_limit_takes_images_that_lie_evenly(archive: Path) -> None:
    everything = [case.source for case in load([archive])]
    assert [case.source for case in load([archive], limit=3)] == [everything[0], everything[2], everything[5]]
    assert [case.source for case in load([archive], limit=60)] == everything


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        (["heldout"], [0, 1, 3, 4]),
        (["heldout", "dup_of<0"], [0, 3, 4]),
        (["labels == 1"], [1, 3, 5]),
        (["labels!=1", "heldout==1"], [0, 4]),
        (["dup_of >= 0"], [1]),
        (["dup_of > -1"], [1]),
        (["dup_of<= -1"], [0, 2, 3, 4, 5]),
    ],
)
def test_conditions_select_images_of_an_archive(archive: Path, where: list[str], expected: list[int]) -> None:
    with np.load(archive) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    cases = load([archive], where)
    assert [case.source for case in cases] == [f"cells.npz[{number}]" for number in expected]
    assert [case.label for case in cases] == labels[expected].tolist()
    for case, number in zip(cases, expected, strict=True):
        np.testing.assert_array_equal(case.image, images[number])


def test_an_archive_without_labels_has_none(archive: Path) -> None:
    assert {case.label for case in load([_changed(archive, labels=None)])} == {None}


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("heldout and 1", "no condition"),
        ("__import__('os')", "no condition"),
        ("dup_of<x", "no condition"),
        ("", "no condition"),
        ("absent", "no array 'absent'; it has images, labels, heldout, dup_of, names"),
        ("labels", "expected booleans, or a comparison such as labels==1"),
        ("names==1", "which no number compares with"),
        ("images==1", "images==1 has shape"),
        ("labels==7", "no image is left"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(archive: Path, where: str, told: str) -> None:
    with pytest.raises(ImageError, match=told):
        load([archive], [where])


@pytest.mark.parametrize(
    ("rows", "where", "expected"),
    [
        (np.array([4, 0, 3]), [], [4, 0, 3]),
        (np.array([5], dtype=np.uint8), [], [5]),
        (np.array([5, 4, 3, 2, 1, 0]), ["heldout", "dup_of<0"], [4, 3, 0]),
    ],
)
def test_rows_select_images_of_an_archive_in_their_order(
    archive: Path, rows: Any, where: list[str], expected: list[int]
) -> None:
    np.save(archive.with_name("rows.npy"), rows)
    cases = load([archive], where, rows=archive.with_name("rows.npy"))
    assert [case.source for case in cases] == [f"cells.npz[{number}]" for number in expected]
    with np.load(archive) as arrays:
        for case, number in zip(cases, expected, strict=True):
            np.testing.assert_array_equal(case.image, arrays["images"][number])
            assert case.label == arrays["labels"][number]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (np.array([0.0, 1.0]), "holds float64"),
        (np.array([True, False]), "holds bool"),
        (np.array([[0, 1]]), r"shape \(1, 2\)"),
        (np.array(3), r"shape \(\)"),
        (np.array([0, 6]), "names rows 0 to 6; the archive has 0 to 5"),
        (np.array([-1, 2]), "names rows -1 to 2"),
        (np.array([2, 1, 2]), "more than once"),
        (np.array([], dtype=int), "no image is left"),
        (np.array([{}]), "is no .npy file of a plain array"),
    ],
)
def test_rows_that_make_no_sense_are_refused(archive: Path, rows: Any, told: str) -> None:
    np.save(archive.with_name("rows.npy"), rows)
    with pytest.raises(ImageError, match=told):
        load([archive], rows=archive.with_name("rows.npy"))


def test_rows_need_a_file_and_one_archive(archive: Path) -> None:
    with pytest.raises(ImageError, match=r"is no \.npy file"):
        load([archive], rows=archive.with_name("absent.npy"))
    with pytest.raises(ImageError, match=r"is no \.npy file"):
        load([archive], rows=archive)
    np.save(archive.with_name("rows.npy"), np.array([0]))
    for paths in ([], [archive, archive], [archive.parent]):
        with pytest.raises(ImageError, match=r"of one \.npz archive"):
            load(paths, rows=archive.with_name("rows.npy"))


def test_conditions_need_an_archive(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"of an \.npz archive"):
        load([], ["heldout"])


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": None}, "no array 'images'"),
        ({"images": np.zeros((6, 4, 4, 3))}, "float64; expected"),
        ({"images": np.zeros((6, 4, 4), dtype=np.uint8)}, "expected"),
        ({"labels": np.zeros(5, dtype=np.uint8)}, "labels has shape"),
        ({"images": np.array([{}])}, "no .npz archive of plain arrays"),
    ],
)
def test_archives_that_are_otherwise_are_refused(archive: Path, arrays: dict[str, Any], told: str) -> None:
    with pytest.raises(ImageError, match=told):
        load([_changed(archive, **arrays)])


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("nothing of the kind")
    for name in ("text.npz", "absent.npz"):
        with pytest.raises(ImageError, match=r"no \.npz archive"):
            load([tmp_path / name])


def test_folders_are_searched_for_images(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("b.png", "a.BMP", "inner/c.tiff"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = load([tmp_path, tmp_path / "b.png"])
    assert [Path(case.source).name for case in found] == ["a.BMP", "b.png", "c.tiff", "b.png"]
    assert {case.label for case in found} == {None}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no PNG, BMP or TIFF file"):
        load([tmp_path / "empty"])
