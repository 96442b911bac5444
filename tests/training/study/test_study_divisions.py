"""Divisions of a study: disjoint, complete, the same every time, and blind to held-out cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from training.datasets import CellImages, load_cells, split_by_image
from training.errors import DataError
from training.study.divisions import admitted, divide


@pytest.fixture(scope="module")
def cells(arrays: Path) -> CellImages:
    """Cells with groups of uneven size, so that folds have to be balanced."""
    read = load_cells(arrays)
    kept = np.array([row for row in range(len(read)) if row % 7 or read.subjects[row] not in ("2", "H3")])
    return taken(read, kept)


def taken(cells: CellImages, rows: np.ndarray) -> CellImages:  # type: ignore[type-arg]
    return replace(cells, **{field.name: getattr(cells, field.name)[rows] for field in fields(cells)})


def test_held_out_cells_are_gone_unless_asked_for(cells: CellImages) -> None:
    held = set(cells.sha256[cells.final].tolist())
    assert held
    blind, final = admitted(cells, final=False), admitted(cells, final=True)
    assert not held & set(blind.sha256.tolist())
    assert not blind.heldout.any()
    assert set(final.sha256.tolist()) == held | set(blind.sha256.tolist())
    with pytest.raises(DataError, match="read with --final only"):
        divide(blind, "heldout", 4)
    (division,) = divide(final, "heldout", 4)
    assert set(final.sha256[division.test].tolist()) == held
    assert not held & set(final.sha256[division.train].tolist())


@pytest.mark.parametrize("folds", [2, 4])
@pytest.mark.parametrize("final", [False, True])
def test_grouped_folds_are_disjoint_in_groups_complete_and_alike(cells: CellImages, folds: int, final: bool) -> None:
    seen = admitted(cells, final)
    divisions = divide(seen, "grouped", folds)
    tested = np.concatenate([division.test for division in divisions])
    assert sorted(tested.tolist()) == seen.pool.tolist()
    for division in divisions:
        assert not set(seen.groups[division.train]) & set(seen.groups[division.test])
        assert sorted([*division.train, *division.test]) == seen.pool.tolist()
    for label in (0, 1):
        counts = [int((seen.labels[division.test] == label).sum()) for division in divisions]
        largest = max(np.unique(seen.groups[seen.labels == label], return_counts=True)[1])
        assert max(counts) - min(counts) <= largest


@pytest.mark.parametrize("protocol", ["image", "grouped"])
def test_the_order_of_rows_does_not_matter(cells: CellImages, protocol: str) -> None:
    shuffled = taken(cells, np.random.default_rng(0).permutation(len(cells)))

    def parts(some: CellImages) -> list[set[str]]:
        seen = admitted(some, final=False)
        return [set(seen.sha256[division.test].tolist()) for division in divide(seen, protocol, 3)]  # type: ignore[arg-type]

    assert parts(cells) == parts(shuffled)


def test_the_split_by_image_trains_on_all_that_the_paper_does_not_test(cells: CellImages) -> None:
    seen = admitted(cells, final=False)
    (division,) = divide(seen, "image", 4, seed=3)
    assert set(seen.sha256[division.test].tolist()) == set(split_by_image(cells, 3).parts["test"])
    assert sorted([*division.train, *division.test]) == seen.pool.tolist()


def test_folds_without_a_label_are_refused(write_arrays: Callable[[Path, int], Path], tmp_path: Path) -> None:
    seen = admitted(load_cells(write_arrays(tmp_path, 60)), final=False)
    with pytest.raises(DataError, match="lacks a label; use more cells or fewer folds"):
        divide(seen, "grouped", 12)
