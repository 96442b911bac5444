"""Readers, groups, duplicates, splits."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hemacrypt.errors import ImageError
from hemacrypt.model.preprocess import Preprocessing
from training import datasets
from training.datasets import CellImages, Split, load_cells, load_split, split_by_image, split_by_subject
from training.errors import DataError, RunError


@pytest.fixture(scope="module")
def cells(release: Path) -> CellImages:
    return load_cells(release)


def row(cells: CellImages, subject: str, file: str | None = None) -> int:
    rows = [i for i, s in enumerate(cells.subjects) if s == subject and file in (None, cells.files[i])]
    assert len(rows) == 1
    return rows[0]


def test_release_is_read_whole_whatever_the_folders_around_it(cells: CellImages) -> None:
    assert len(cells) == 10  # the final test has no labels and is passed over
    assert sorted(cells.splits.tolist()) == ["fold_0"] * 4 + ["fold_1"] * 2 + ["fold_2"] * 2 + ["prelim"] * 2
    assert cells.images.shape == (10, 32, 32, 3)
    assert cells.labels[row(cells, "H31")] == 0
    assert cells.labels[row(cells, "60")] == 1
    assert cells.files[row(cells, "60")] == "1.bmp"


def test_release_gives_digest_of_file_and_pixels_of_the_one_preprocessing(release: Path, cells: CellImages) -> None:
    path = next(release.rglob("UID_14_1_1_all.bmp"))
    at = row(cells, "14")
    assert cells.sha256[at] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (cells.images[at] == Preprocessing().reduce(np.asarray(Image.open(path)))).all()


def test_subjects_with_an_identical_image_become_one_group(cells: CellImages) -> None:
    assert cells.groups[row(cells, "3")] == "3+9"
    assert set(cells.groups[cells.subjects == "9"]) == {"3+9"}
    # Other bytes, same picture: the preliminary test carries another header.
    assert cells.groups[row(cells, "4")] == cells.groups[row(cells, "60")] == "4+60"
    assert cells.sha256[row(cells, "4")] != cells.sha256[row(cells, "60")]


def test_duplicates_point_to_the_first_row_and_leave_the_pool(cells: CellImages) -> None:
    assert cells.dup_of[row(cells, "9", "UID_9_1_1_all.bmp")] == row(cells, "3")
    assert (cells.dup_of >= 0).sum() == 3
    assert (cells.dup_of < np.arange(len(cells))).all()
    assert len(cells.pool) == 10 - 3 - 2


def test_held_out_subjects_are_no_part_of_the_pool(cells: CellImages) -> None:
    assert set(cells.subjects[cells.heldout]) == {"14", "H1"}
    assert set(cells.subjects[cells.final]) == {"14", "H1"}
    assert not set(cells.pool) & set(cells.final)


def test_a_group_is_held_out_when_one_of_its_subjects_is() -> None:
    joined = datasets._join_groups(["14", "H9", "7+8", "H9"], [(0, 2)])
    assert joined == ["7+8+14", "H9", "7+8+14", "H9"]
    assert datasets._join_groups(["a2+b1", "b1"], []) == ["a2+b1", "a2+b1"]


def test_lossless_copies_with_an_index_give_the_same_cells(release: Path, cells: CellImages, tmp_path: Path) -> None:
    originals = [p for p in sorted(release.rglob("*.bmp")) if "final" not in str(p)]
    with (tmp_path / "index.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["stored_file", "split", "label", "subject", "release_name", "sha256_of_original_bmp"])
        for i, digest in enumerate(cells.sha256):
            path = next(p for p in originals if hashlib.sha256(p.read_bytes()).hexdigest() == digest)
            Image.open(path).save(tmp_path / f"{i}.png")
            table.writerow([f"{i}.png", cells.splits[i], cells.labels[i], cells.subjects[i], cells.files[i], digest])
    copies = load_cells(tmp_path)
    for name in ("labels", "subjects", "groups", "files", "splits", "sha256", "dup_of", "heldout"):
        assert getattr(copies, name).tolist() == getattr(cells, name).tolist(), name
    assert (copies.images == cells.images).all()


def test_64_pixels_are_a_matter_of_declaring_them(release: Path) -> None:
    assert load_cells(release, Preprocessing(block=5)).images.shape == (10, 64, 64, 3)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("UID_5_1_1_all.bmp", "fold_0/hem", "lies in 'hem'; its name says all"),
        ("cell.bmp", "fold_0/all", "expected UID_<subject>_<image>_<cell>_<all|hem>.bmp"),
        ("77.bmp", "C-NMC_test_prelim_phase_data", "not in the label table"),
    ],
)
def test_contradictions_are_refused(release: Path, tmp_path: Path, name: str, folder: str, message: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    shutil.copy(next(release.rglob("*.bmp")), tmp_path / folder / name)
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        load_cells(tmp_path)


def test_a_table_that_contradicts_its_own_names_is_refused(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prelim"
    folder.mkdir()
    shutil.copy(next(release.rglob("*.bmp")), folder / "1.bmp")
    (folder / "labels.csv").write_text("Patient_ID,new_names,labels\nUID_60_1_1_all.bmp,1.bmp,0\n")
    with pytest.raises(DataError, match="the table says label 0"):
        load_cells(tmp_path)


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected fold_0"):
        load_cells(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        datasets.data_folder(tmp_path / "nothing")


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "fold_0" / "all").mkdir(parents=True)
    (tmp_path / "fold_0" / "all" / "UID_1_1_1_all.bmp").write_bytes(b"BM no image")
    with pytest.raises(ImageError, match="UID_1_1_1_all"):
        load_cells(tmp_path)


def test_archives_with_pickles_or_missing_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "cnmc_32.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="not an archive of prepared cells"):
        load_cells(tmp_path)
    np.savez(tmp_path / "cnmc_32.npz", images=np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="not an archive of prepared cells"):
        load_cells(tmp_path)


def test_arrays_prepared_in_another_way_are_refused(arrays: Path) -> None:
    with pytest.raises(DataError, match="cropped to 320"):
        load_cells(arrays / "cnmc_32.npz", Preprocessing(crop=290))
    with pytest.raises(DataError, match="expected \\(64, 64, 3\\)"):
        load_cells(arrays / "cnmc_32.npz", Preprocessing(block=5))


def test_an_identical_image_under_two_labels_is_refused(arrays: Path, tmp_path: Path) -> None:
    with np.load(arrays / "cnmc_32.npz") as archive:
        content = dict(archive)
    content["images"][3] = content["images"][0]
    np.savez(tmp_path / "cnmc_32.npz", **content)
    with pytest.raises(DataError, match="show the same image but are labelled"):
        load_cells(tmp_path)


# ---------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("divide", [split_by_image, split_by_subject])
def test_no_image_is_in_two_parts_and_all_of_the_pool_is_used(arrays: Path, divide, seed: int) -> None:  # type: ignore[no-untyped-def]
    cells = load_cells(arrays)
    split = divide(cells, seed)
    parts = [set(split.parts[part]) for part in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts))
    everything = cells.pool if split.protocol == "image" else np.concatenate([cells.pool, cells.final])
    assert set.union(*parts) == set(cells.sha256[everything])


@pytest.mark.parametrize("seed", range(4))
def test_the_subject_protocol_shares_no_group(arrays: Path, seed: int) -> None:
    cells = load_cells(arrays)
    split = split_by_subject(cells, seed)
    groups = [set(cells.groups[split.rows(cells, part)]) for part in ("train", "validation", "test")]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    assert groups[2] == {"14", "H1"}


@pytest.mark.parametrize("divide", [split_by_image, split_by_subject])
def test_held_out_cells_neither_train_nor_validate(arrays: Path, divide) -> None:  # type: ignore[no-untyped-def]
    cells = load_cells(arrays)
    split = divide(cells)
    held = set(cells.sha256[cells.heldout])
    assert not held & {*split.parts["train"], *split.parts["validation"]}
    if split.protocol == "image":
        assert not held & set(split.parts["test"])


def test_an_image_falls_into_the_same_part_whatever_else_there_is(arrays: Path) -> None:
    cells = load_cells(arrays)
    half = CellImages(**{name: getattr(cells, name)[::2] for name in CellImages.__dataclass_fields__})
    whole, part = split_by_image(cells), split_by_image(half)
    for name in ("train", "validation", "test"):
        assert set(part.parts[name]) == set(whole.parts[name]) & set(half.sha256[half.pool])


def test_split_survives_the_disk_and_means_the_same_after_reordering(arrays: Path, tmp_path: Path) -> None:
    cells = load_cells(arrays)
    split = split_by_image(cells, seed=3)
    split.write(tmp_path)
    assert Split.read(tmp_path) == split
    images, labels, subjects = load_split(tmp_path, arrays)
    rows = split.rows(cells, "test")
    assert (images == cells.images[rows]).all()
    assert (labels == cells.labels[rows]).all()
    assert (subjects == cells.subjects[rows]).all()


def test_a_split_of_other_data_or_a_damaged_one_is_refused(arrays: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"split.json is missing"):
        load_split(tmp_path, arrays)
    (tmp_path / "split.json").write_text(json.dumps({"protocol": "other", "seed": 0, "parts": {}}))
    with pytest.raises(RunError, match="is not a split"):
        load_split(tmp_path, arrays)
    Split("image", 0, {"train": ("a",), "validation": ("b",), "test": ("c",)}).write(tmp_path)
    with pytest.raises(DataError, match="1 of 1 images of the test part are not in this data"):
        load_split(tmp_path, arrays)


def test_fingerprint_depends_on_the_images_alone(arrays: Path) -> None:
    cells = load_cells(arrays)
    assert cells.fingerprint(cells.pool) == cells.fingerprint(cells.pool[::-1])
    assert cells.fingerprint(cells.pool) != cells.fingerprint(cells.pool[1:])
