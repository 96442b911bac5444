"""Against the prepared data: the committed list, the originals, the arrays."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from hemacrypt import embedded
from hemacrypt.model.preprocess import Preprocessing
from training.datasets import CellImages, embedded_part, heldout_subjects, load_cells, split_cells

pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module")
def arrays32(shared_data: Path) -> CellImages:
    return load_cells(shared_data)


def test_the_committed_list_is_that_of_the_data(shared_data: Path, arrays32: CellImages) -> None:
    with (shared_data / "cnmc_heldout.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {name for row in rows for name in row["group"].split("+")} == heldout_subjects()
    assert {row["sha256_of_original_bmp"] for row in rows} == set(arrays32.sha256[arrays32.final])
    with np.load(shared_data / "cnmc_32.npz", allow_pickle=False) as archive:
        assert (archive["heldout"] == arrays32.heldout).all()
        assert ((archive["dup_of"] < 0) >= (arrays32.dup_of < 0)).all()


def test_counts_are_those_of_the_readme_but_for_one_picture_in_two_files(arrays32: CellImages) -> None:
    assert len(arrays32) == 8039
    # 7,935 by digest of the file; UID_51_59_2_all and UID_55_12_2_all are one picture under two headers.
    assert (arrays32.dup_of < 0).sum() == 7934
    assert {"51+55+75+78", "20+21", "H3+H10", "H2+H4+H5+H6"} <= set(arrays32.groups)
    assert len(arrays32.final) == 1354


@pytest.mark.parametrize("block", [10, 5])
def test_originals_reproduce_the_arrays_to_one_level(shared_data: Path, block: int) -> None:
    preprocessing = Preprocessing(block=block)
    prepared = load_cells(shared_data, preprocessing)
    originals = load_cells(shared_data / "cnmc_originals", preprocessing)

    def keys(cells: CellImages) -> list[tuple[str, str]]:  # one image may stand under several subjects
        return list(zip(cells.sha256.tolist(), cells.subjects.tolist(), strict=True))

    where = {key: row for row, key in enumerate(keys(prepared))}
    pairs = [(row, where[key]) for row, key in enumerate(keys(originals)) if key in where]
    assert len(pairs) > 500
    ours, theirs = (np.array(rows) for rows in zip(*pairs, strict=True))
    difference = np.abs(originals.images[ours].astype(int) - prepared.images[theirs])
    assert difference.max() <= 1
    for name in ("labels", "subjects", "splits", "heldout"):
        assert (getattr(originals, name)[ours] == getattr(prepared, name)[theirs]).all(), name


def test_embedded_cells_are_those_marked_for_the_demo(shared_data: Path, arrays32: CellImages) -> None:
    with (shared_data / "cnmc_heldout.csv").open(newline="") as file:
        marked = {row["sha256_of_original_bmp"]: row for row in csv.DictReader(file) if row["demo"] == "1"}
    cells = embedded.sample()
    assert {cell.sha256_of_original_bmp for cell in cells} == set(marked)
    for cell in cells:
        row = marked[cell.sha256_of_original_bmp]
        assert (str(cell.label), cell.subject, cell.group) == (row["label"], row["subject"], row["group"])
    where = {digest: row for row, digest in enumerate(arrays32.sha256.tolist())}
    rows = [where[cell.sha256_of_original_bmp] for cell in cells]
    images = embedded_part(Preprocessing()).images
    assert np.abs(images.astype(int) - arrays32.images[rows]).max() <= 1


@pytest.mark.parametrize("protocol", ["image", "subject"])
def test_parts_have_sensible_sizes(arrays32: CellImages, protocol: str) -> None:
    split = split_cells(arrays32, protocol)  # type: ignore[arg-type]
    sizes = {part: len(rows) for part, rows in split.parts.items()}
    assert sizes["train"] > 4000
    assert sizes["validation"] > 500
    assert 1200 < sizes["test"] < 1500
    for part in ("train", "validation", "test"):
        assert 0.4 < arrays32.labels[split.rows(arrays32, part)].mean() < 0.8
