"""Training: seeded, with augmentation that cells allow, keeping the epoch that validates best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hemacrypt.model.preprocess import Pixels, Preprocessing
from training.datasets import CellImages, Rows, Split
from training.models import cryptonet
from training.settings import Settings

Floats = npt.NDArray[np.float32]
History = Mapping[str, Sequence[float]]


def network_input(images: Pixels, preprocessing: Preprocessing) -> Floats:
    """Return normalised images as Keras wants them, channel last: float32, shape (n, size, size, 3)."""
    return np.moveaxis(preprocessing.normalise(images), -3, -1)


def augment(batch: Floats, rng: np.random.Generator, shift: int, stain: float) -> Floats:
    """Turn, mirror, shift and tint cells at random; a cell has no upright position.

    Parameters
    ----------
    batch:
        float32, shape (n, size, size, 3), black around the cell.
    shift:
        Largest shift in pixels. What leaves on one side is lost, black follows on the other.
    stain:
        Largest relative change of brightness, and once more of each colour.

    Returns
    -------
    float32 array of the same shape

    Notes
    -----
    Mirroring along both axes and the diagonal reaches all eight symmetries of the square, each equally often.
    """
    out = batch.copy()
    upside, sideways, diagonal = rng.random((3, len(batch))) < 0.5
    out[upside] = out[upside, ::-1]
    out[sideways] = out[sideways, :, ::-1]
    out[diagonal] = out[diagonal].swapaxes(1, 2)
    if shift:
        size = batch.shape[1]
        padded = np.pad(out, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        for image, (y, x) in enumerate(rng.integers(0, 2 * shift + 1, (len(batch), 2))):
            out[image] = padded[image, y : y + size, x : x + size]
    if stain:
        brightness, colour = rng.uniform(-stain, stain, (len(batch), 1)), rng.uniform(-stain, stain, (len(batch), 3))
        out *= (1 + brightness + colour).astype(np.float32)[:, None, None, :]
    return out


def weigh(cells: CellImages, rows: Rows, label_balance: bool, group_power: float) -> Floats:
    """Return how much each cell counts in the loss.

    Subjects differ in their number of cells by a factor of 400, and there are twice as many leukaemic cells as normal
    ones; neither is true of the patients to come.

    Parameters
    ----------
    label_balance:
        Give both labels the same total weight.
    group_power:
        Divide by the number of cells of the same group to this power.

    Returns
    -------
    float32 array, shape (len(rows),), mean 1
    """
    _, group, size = np.unique(cells.groups[rows], return_inverse=True, return_counts=True)
    weights = size[group] ** -group_power
    if label_balance:
        labels = cells.labels[rows]
        weights = weights / np.bincount(labels, weights, minlength=2)[labels]
    scaled: Floats = (weights / weights.mean()).astype(np.float32)
    return scaled


class AugmentedCells(keras.utils.PyDataset):  # type: ignore[misc]  # Keras has no types
    """Batches of augmented training cells; each depends on seed, epoch and number alone, not on who asks when."""

    def __init__(self, images: Floats, targets: Floats, weights: Floats, settings: Settings) -> None:
        super().__init__()
        self._images, self._targets, self._weights, self._settings = images, targets, weights, settings
        self._epoch = 0
        self._shuffle()

    def _shuffle(self) -> None:
        self._order = np.random.default_rng((self._settings.seed, self._epoch)).permutation(len(self._images))

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._settings.batch_size)

    def __getitem__(self, index: int) -> tuple[Floats, Floats, Floats]:
        size = self._settings.batch_size
        rows = self._order[index * size : (index + 1) * size]
        rng = np.random.default_rng((self._settings.seed, self._epoch, index))
        images = augment(self._images[rows], rng, self._settings.shift, self._settings.stain)
        return images, self._targets[rows], self._weights[rows]

    def on_epoch_end(self) -> None:
        """Shuffle anew."""
        self._epoch += 1
        self._shuffle()


class Auroc(keras.metrics.AUC):  # type: ignore[misc]  # Keras has no types
    """Area under the ROC curve of the logits' difference, leukaemic minus normal."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch: one-hot labels and logits, shape (batch, 2) each."""
        super().update_state(y_true[:, 1], y_pred[:, 1] - y_pred[:, 0], sample_weight)


def fit(
    cells: CellImages,
    split: Split,
    settings: Settings,
    preprocessing: Preprocessing,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> tuple[keras.Sequential, History]:
    """Train on the train part and keep the weights of the epoch with the lowest validation loss.

    The test part is not looked at. Equal settings, data and machine give equal weights.

    Returns
    -------
    model, history
        The trained model; for each epoch ``loss``, ``accuracy``, ``val_loss``, ``val_accuracy``, ``val_auroc``.
    """
    keras.utils.set_random_seed(settings.seed)
    tf.config.experimental.enable_op_determinism()
    train, validation = split.rows(cells, "train"), split.rows(cells, "validation")
    batches = AugmentedCells(
        network_input(cells.images[train], preprocessing),
        _one_hot(cells.labels[train]),
        weigh(cells, train, settings.label_balance, settings.group_power),
        settings,
    )
    model = cryptonet(settings, preprocessing.size)
    falling = keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.epochs * len(batches))
    model.compile(
        optimizer=keras.optimizers.AdamW(
            falling, weight_decay=settings.weight_decay, global_clipnorm=settings.clip_norm
        ),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
        metrics=["accuracy", Auroc(from_logits=True, name="auroc", num_thresholds=1000)],
    )
    best = keras.callbacks.EarlyStopping("val_loss", patience=settings.epochs, restore_best_weights=True)
    history = model.fit(
        batches,
        epochs=settings.epochs,
        validation_data=(
            network_input(cells.images[validation], preprocessing),
            _one_hot(cells.labels[validation]),
            weigh(cells, validation, settings.label_balance, settings.group_power),
        ),
        validation_batch_size=512,
        callbacks=[best, *callbacks],
        shuffle=False,  # the batches shuffle themselves
        verbose=0,
    )
    return model, history.history


def logits(model: Any, images: Floats) -> npt.NDArray[np.float64]:
    """Return the logits of channel-last images, float64, shape (n, 2)."""
    return np.asarray(model.predict(images, batch_size=512, verbose=0), dtype=np.float64)


def _one_hot(labels: npt.NDArray[np.uint8]) -> Floats:
    return np.eye(2, dtype=np.float32)[labels]
