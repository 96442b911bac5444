"""Views of training cells that teacher and student see alike.

A student that imitates its teacher on the training images alone learns how the teacher remembers them. Shown the
same *views* (turned, shifted, tinted, mixed with another cell) and the teacher's answer to each, it learns the
teacher's function, also between and beside the cells. That is function matching (Beyer et al., Knowledge
distillation: A good teacher is patient and consistent, CVPR 2022, section 3.1).

The views are drawn once and are the same for all students, so that a teacher answers once. They are made from whole
numbers of pixels of a 32x32 image, so an image of 64x64 pixels and its reduction to 32x32 show the same view.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt

from hemacrypt.model.preprocess import Pixels
from training.fit import network_input
from training.study.config import Views
from training.study.divisions import preprocessing_of
from training.symmetry import ORDER, transformed

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
_GRID = 32


@dataclass(frozen=True)
class DrawnViews:
    """For each view and each cell, how it is varied.

    Attributes
    ----------
    symmetry:
        Index into `training.symmetry.SYMMETRIES`, shape (views, cells).
    shift:
        Rows and columns in 32nds of the width, shape (views, cells, 2).
    colour:
        Factors of red, green and blue, float32, shape (views, cells, 3).
    share:
        Share of the cell itself, float32, shape (views, cells); 1 where nothing is mixed in.
    other:
        The cell that is mixed in, shape (views, cells); itself varied as in the same view.
    """

    symmetry: Rows
    shift: Rows
    colour: Floats
    share: Floats
    other: Rows

    @classmethod
    def draw(cls, views: Views, cells: int) -> DrawnViews:
        """Draw views of so many cells; the same for equal arguments."""
        rng = np.random.default_rng((views.seed, cells))
        shape = (views.count, cells)
        brightness, colour = rng.uniform(-1, 1, (*shape, 1)), rng.uniform(-1, 1, (*shape, 3))
        mixed = rng.random(shape) < views.mix
        return cls(
            symmetry=rng.integers(0, ORDER, shape),
            shift=rng.integers(-views.shift, views.shift + 1, (*shape, 2)),
            colour=(1 + views.stain * (brightness + colour)).astype(np.float32),
            share=np.where(mixed, rng.uniform(0.5, 1, shape), 1).astype(np.float32),
            other=np.stack([rng.permutation(cells) for _ in range(views.count)]),
        )

    def of(self, images: Pixels, view: Rows, rows: Rows) -> Floats:
        """Make one view each of some cells.

        Parameters
        ----------
        images:
            All cells, uint8, shape (cells, size, size, 3), size a multiple of 32.
        view, rows:
            Which view of which cell, shape (n,) each.

        Returns
        -------
        float32 array, shape (n, size, size, 3), of values as in [0, 1] but for the colour factors
        """
        share = self.share[view, rows][:, None, None, None]
        made = self._alone(images, view, rows)
        mixed = np.flatnonzero(share[:, 0, 0, 0] < 1)
        if len(mixed):
            added = self._alone(images, view[mixed], self.other[view[mixed], rows[mixed]])
            made[mixed] = share[mixed] * made[mixed] + (1 - share[mixed]) * added
        return made

    def targets(self, hard: Floats, view: Rows, rows: Rows) -> Floats:
        """Mix labels as the images are mixed; ``hard`` is one-hot, shape (cells, 2)."""
        share = self.share[view, rows][:, None]
        return share * hard[rows] + (1 - share) * hard[self.other[view, rows]]

    def _alone(self, images: Pixels, view: Rows, rows: Rows) -> Floats:
        size = images.shape[1]
        turned = np.empty((len(rows), *images.shape[1:]), dtype=np.uint8)
        symmetry = self.symmetry[view, rows]
        for number in range(ORDER):
            chosen = symmetry == number
            turned[chosen] = transformed(images[rows[chosen]], number, (1, 2))
        step = self.shift[view, rows] * (size // _GRID)
        edge = int(np.abs(step).max(initial=0))
        # What leaves on one side is lost, black follows on the other.
        padded = np.pad(turned, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        places = edge + step[:, :, None] + np.arange(size)
        which = np.arange(len(rows))[:, None, None]
        shifted = padded[which, places[:, 0, :, None], places[:, 1, None, :]]
        values = network_input(shifted, preprocessing_of(size))
        made: Floats = values * self.colour[view, rows][:, None, None, :]
        return made


def answered(network: Path, images: Pixels, drawn: DrawnViews) -> Floats:
    """Return a teacher's logits for every view.

    Parameters
    ----------
    network:
        Its ``model.keras``.
    images:
        The cells at the teacher's size, uint8, shape (cells, size, size, 3).

    Returns
    -------
    float32 array, shape (views, cells, 2)
    """
    teacher = keras.saving.load_model(network, compile=False, safe_mode=True)
    cells, part = np.arange(len(images)), 512
    answers = np.empty((len(drawn.symmetry), len(images), 2), dtype=np.float32)
    for view in range(len(answers)):
        for rows in np.array_split(cells, -(-len(cells) // part)):
            made = drawn.of(images, np.full(len(rows), view), rows)
            answers[view, rows] = teacher.predict_on_batch(made)
    return answers


class MatchedViews(keras.utils.PyDataset):  # type: ignore[misc]  # Keras has no types
    """Batches of views with labels and the teachers' answers; every epoch shows one view of each cell.

    Parameters
    ----------
    drawn:
        The views.
    images, hard, weights:
        Cells, one-hot labels and how much each counts.
    answers:
        The teachers' logits, float32, shape (views, cells, 2).
    seed, batch_size:
        Each batch depends on seed, epoch and number alone.
    """

    def __init__(
        self,
        drawn: DrawnViews,
        images: Pixels,
        hard: Floats,
        weights: Floats,
        answers: Floats,
        seed: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self._drawn, self._images, self._hard, self._weights, self._answers = drawn, images, hard, weights, answers
        self._seed, self._size, self._epoch = seed, batch_size, 0
        self._shuffle()

    def _shuffle(self) -> None:
        rng = np.random.default_rng((self._seed, self._epoch))
        self._order = rng.permutation(len(self._images))
        # Cell i begins at a view of its own and goes through all of them before any comes again.
        first = np.random.default_rng(self._seed).integers(0, len(self._answers), len(self._images))
        self._view = (first + self._epoch) % len(self._answers)

    def __len__(self) -> int:
        return -(-len(self._images) // self._size)

    def __getitem__(self, index: int) -> tuple[Floats, Floats, Floats]:
        rows = self._order[index * self._size : (index + 1) * self._size]
        view = self._view[rows]
        targets = np.concatenate([self._drawn.targets(self._hard, view, rows), self._answers[view, rows]], axis=1)
        return self._drawn.of(self._images, view, rows), targets, self._weights[rows]

    def on_epoch_end(self) -> None:
        """Go on to the next views, in another order."""
        self._epoch += 1
        self._shuffle()
