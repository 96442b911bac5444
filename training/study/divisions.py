"""Which cells a model of a study is trained on and which it is tested on.

Three protocols, each with the words that stand beside every figure:

``image``
    80/20 by image, as the paper: the test part of `training.datasets.split_by_image`, everything else of the pool
    for training. Optimistic, because the same persons are on both sides.
``grouped``
    k folds by group of subjects on the training pool; every cell of the pool is tested exactly once, by a model that
    saw no cell of its group.
``heldout``
    Training on the whole pool, test on the held-out groups. Once, at the end.

There is no validation part: a study trains for a fixed number of epochs and keeps the last weights, so no part of
the data chooses anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from hemacrypt.model.preprocess import Preprocessing
from training.datasets import (
    HELDOUT_WORDS,
    PROTOCOL_WORDS,
    CellImages,
    Progress,
    Rows,
    load_cells,
    split_by_image,
)
from training.errors import DataError
from training.study.config import Protocol

WORDS: dict[Protocol, str] = {
    "image": PROTOCOL_WORDS["image"],
    "grouped": "grouped cross-validation on the training pool: every cell is tested by a model that saw no cell of "
    "its person, nor of any joined to them by an identical image",
    "heldout": f"trained on the whole pool, tested on the {HELDOUT_WORDS}",
}


@dataclass(frozen=True)
class Division:
    """Train and test rows of one fold.

    Attributes
    ----------
    protocol, fold:
        Fold 0 is the only one of ``image`` and ``heldout``.
    train, test:
        Row numbers, shape (n,); no row is in both.
    """

    protocol: Protocol
    fold: int
    train: Rows
    test: Rows

    @property
    def words(self) -> str:
        """The protocol in words."""
        return WORDS[self.protocol]

    @property
    def name(self) -> str:
        """Folder of the division, such as ``grouped-2``."""
        return f"{self.protocol}-{self.fold}"


def admitted(cells: CellImages, final: bool) -> CellImages:
    """Return the cells that a study may see: distinct ones, and those of the held-out groups only if asked for.

    What is not returned cannot be evaluated on by mistake further down.
    """
    rows = np.concatenate([cells.pool, cells.final]) if final else cells.pool
    return replace(cells, **{field.name: getattr(cells, field.name)[rows] for field in fields(cells)})


def preprocessing_of(size: int) -> Preprocessing:
    """Return the declaration that gives images of that width."""
    return Preprocessing.model_validate({"block": 320 // size})


def read_cells(
    data: Path, sizes: Iterable[int], final: bool = False, progress: Progress | None = None
) -> dict[int, CellImages]:
    """Read the cells that a study may see, at each of some widths; row i is the same cell at all of them.

    Parameters
    ----------
    data, progress:
        As in `training.datasets.load_cells`.
    final:
        As in `admitted`.

    Raises
    ------
    DataError
        If the data cannot be read, or is not the same cells at all sizes.
    """
    cells = {size: admitted(load_cells(data, preprocessing_of(size), progress), final) for size in sorted(set(sizes))}
    first, *others = cells.values()
    if any(other.sha256.tolist() != first.sha256.tolist() for other in others):
        raise DataError(f"{data} does not hold the same cells at {sorted(cells)} pixels; prepare them together")
    return cells


def divide(cells: CellImages, protocol: Protocol, folds: int, seed: int = 0) -> tuple[Division, ...]:
    """Divide by one protocol.

    Parameters
    ----------
    cells:
        As `admitted` returns them.
    folds:
        Number of folds of ``grouped``.
    seed:
        Of the split by image.

    Raises
    ------
    DataError
        If a part would be empty or lack a label, or held-out cells are wanted and not admitted.
    """
    pool = cells.pool
    if protocol == "image":
        tested = np.isin(cells.sha256[pool], split_by_image(cells, seed).parts["test"])
        divisions = [Division("image", 0, pool[~tested], pool[tested])]
    elif protocol == "grouped":
        fold_of = _grouped_folds(cells, folds)
        divisions = [Division("grouped", fold, pool[fold_of != fold], pool[fold_of == fold]) for fold in range(folds)]
    else:
        if not len(cells.final):
            raise DataError("held-out cells are not among the data; they are read with --final only")
        divisions = [Division("heldout", 0, pool, cells.final)]
    for division in divisions:
        for part, rows in (("train", division.train), ("test", division.test)):
            if set(cells.labels[rows].tolist()) != {0, 1}:
                raise DataError(f"the {part} part of {division.name} lacks a label; use more cells or fewer folds")
    return tuple(divisions)


def _grouped_folds(cells: CellImages, folds: int) -> Rows:
    """Return the fold of each cell of the pool, shape (n,).

    Groups are visited by falling size and go where so far the fewest cells of their label are, so the folds are alike
    in size and mixture although groups differ by a factor of 400. Nothing is drawn: the same data gives the same
    folds, in any order of its rows.
    """
    labels, groups = cells.labels[cells.pool], cells.groups[cells.pool]
    names, where, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    leukaemic = np.bincount(where, labels, minlength=len(names)) * 2 > sizes
    filled = np.zeros((2, folds), dtype=np.int64)
    fold_of_group = np.zeros(len(names), dtype=np.intp)
    for group in sorted(range(len(names)), key=lambda group: (-sizes[group], names[group])):
        label = int(leukaemic[group])
        fold = int(np.argmin(filled[label]))
        filled[label, fold] += sizes[group]
        fold_of_group[group] = fold
    return fold_of_group[where]
