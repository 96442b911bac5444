"""How a network of a study is trained: a fixed number of epochs, labels and teachers, the last weights.

With teachers the loss is that of Hinton, Vinyals and Dean (2015, section 2): ``(1 - alpha)`` times the cross-entropy
with the labels plus ``alpha T²`` times the Kullback-Leibler divergence from the teachers' softmax at temperature
``T``. Nothing is chosen while training, so no part of the data is spent on choosing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hemacrypt.model.preprocess import Pixels
from training import fit
from training.fit import AugmentedCells, Auroc, logits
from training.settings import Settings
from training.study.config import ModelConfig
from training.study.divisions import preprocessing_of
from training.study.views import DrawnViews, MatchedViews
from training.symmetry import ORDER, transformed

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.uint8]
History = dict[str, list[float]]


class Diverged(Exception):  # noqa: N818 - not an error of anybody's: a result, and recorded as such
    """A loss or a logit is no longer a finite number."""


@dataclass(frozen=True)
class Lesson:
    """What a learner is given. Cells that it is tested on are not among it, except to draw curves.

    Attributes
    ----------
    config:
        The model.
    images:
        uint8, shape (n, size, size, 3).
    labels:
        uint8, shape (n,): 1 leukaemic, 0 normal.
    weights:
        float32, shape (n,): how much each cell counts.
    soft:
        The teachers' mean logits, float64, shape (n, 2); None without teachers, or where they answer to views.
    answers:
        The teachers' mean logits for each of the configuration's views, float32, shape (views, n, 2).
    watched:
        Images and labels that learning curves are drawn for, and nothing else; None for the held-out groups.
    features:
        ``model.keras`` of the network that `ModelConfig.features` names, trained in the same division.
    seed:
        Of weights, order, augmentation and dropout.
    callbacks:
        Keras callbacks: progress and tracker.
    """

    config: ModelConfig
    images: Pixels
    labels: Labels
    weights: Floats
    soft: Doubles | None
    answers: Floats | None
    watched: tuple[Pixels, Labels] | None
    features: Path | None
    seed: int
    callbacks: Sequence[keras.callbacks.Callback] = ()


@dataclass(frozen=True)
class Learned:
    """What a learner gives back.

    Attributes
    ----------
    logits:
        Images, uint8 (n, size, size, 3) -> float64 (n, 2).
    history:
        For each epoch ``loss``, ``cross_entropy``, ``accuracy``, ``auroc``, and with ``test_`` before the last three
        those of the watched part. Empty where nothing is learned in epochs.
    weights:
        What training started from, in words.
    parameters, multiply_adds:
        Size of the network, and multiplications of one image; 0 where that means nothing.
    network:
        What ``model.keras`` is written from; None where there is no such thing.
    """

    logits: Callable[[Pixels], Doubles]
    history: History
    weights: str = "from scratch"
    parameters: int = 0
    multiply_adds: int = 0
    network: keras.Model | None = None


class TaughtLoss(keras.losses.Loss):  # type: ignore[misc]  # Keras has no types
    """Cross-entropy with labels, mixed with the divergence from teachers.

    Targets have four columns: the label, one-hot, and the teachers' logits.
    """

    def __init__(self, alpha: float, temperature: float, smoothing: float) -> None:
        super().__init__(name="taught")
        self._alpha, self._temperature, self._smoothing = alpha, temperature, smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return one loss per image, shape (batch,)."""
        hard = keras.losses.categorical_crossentropy(
            y_true[:, :2], y_pred, from_logits=True, label_smoothing=self._smoothing
        )
        if not self._alpha:
            return hard
        wanted = keras.ops.log_softmax(y_true[:, 2:] / self._temperature)
        found = keras.ops.log_softmax(y_pred / self._temperature)
        divergence = keras.ops.sum(keras.ops.exp(wanted) * (wanted - found), axis=-1)
        return (1 - self._alpha) * hard + self._alpha * self._temperature**2 * divergence


class _Accuracy(keras.metrics.CategoricalAccuracy):  # type: ignore[misc]  # Keras has no types
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch; of the targets the first two columns."""
        super().update_state(y_true[:, :2], y_pred, sample_weight)


class _CrossEntropy(keras.metrics.CategoricalCrossentropy):  # type: ignore[misc]  # Keras has no types
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch; of the targets the first two columns."""
        super().update_state(y_true[:, :2], y_pred, sample_weight)


def settle(seed: int) -> None:
    """Make what follows depend on the seed alone, and forget earlier networks."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def network_input(images: Pixels) -> Floats:
    """Return normalised images, channel last: float32, shape (n, size, size, 3), as any bundle normalises them."""
    return fit.network_input(images, preprocessing_of(images.shape[1]))


def targets(labels: Labels, soft: Doubles | None) -> Floats:
    """Return targets of `TaughtLoss`: float32, shape (n, 4)."""
    hard = np.eye(2, dtype=np.float32)[labels]
    return np.concatenate([hard, np.zeros_like(hard) if soft is None else soft.astype(np.float32)], axis=1)


def teach(network: keras.Model, lesson: Lesson) -> History:
    """Train a network that gives logits; its last weights stay.

    Returns
    -------
    History
        See `Learned`.

    Raises
    ------
    Diverged
        If the loss is not finite.
    """
    config, batches = lesson.config, _batches(lesson)
    taught = lesson.soft is not None or lesson.answers is not None
    falling = keras.optimizers.schedules.CosineDecay(config.learning_rate, config.epochs * len(batches))
    network.compile(
        optimizer=optimizer_of(config, falling),
        loss=TaughtLoss(config.alpha if taught else 0.0, config.temperature, config.label_smoothing),
        metrics=[
            _CrossEntropy(from_logits=True, name="cross_entropy"),
            _Accuracy(name="accuracy"),
            Auroc(from_logits=True, name="auroc", num_thresholds=1000),
        ],
    )
    watched = None
    if lesson.watched is not None:
        watched = network_input(lesson.watched[0]), targets(lesson.watched[1], None)
    found = network.fit(
        batches,
        epochs=config.epochs,
        validation_data=watched,
        validation_batch_size=512,
        callbacks=[keras.callbacks.TerminateOnNaN(), *lesson.callbacks],
        shuffle=False,  # the batches shuffle themselves
        verbose=0,
    )
    history: History = {
        name.replace("val_", "test_"): [float(value) for value in values]
        for name, values in found.history.items()
        if name != "val_loss"  # teachers say nothing about the watched part
    }
    losses = history["loss"]
    if len(losses) < config.epochs or not all(map(math.isfinite, losses)):
        raise Diverged(f"the loss is no number any more in epoch {len(losses)} of {config.epochs}")
    return history


def optimizer_of(config: ModelConfig, rate: Any) -> keras.optimizers.Optimizer:
    """Return AdamW, or Muon (Jordan et al. 2024) with the scaling of Liu et al. (2502.16982), section 2.2.

    Muon takes over weights that are matrices, of symmetric convolutions too; logits and vectors stay with AdamW.
    """
    decay, clip = config.weight_decay, config.clip_norm
    if config.optimizer == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=decay, global_clipnorm=clip)
    return keras.optimizers.Muon(
        rate, weight_decay=decay, adam_weight_decay=decay, global_clipnorm=clip, exclude_layers=["logits"]
    )


def _batches(lesson: Lesson) -> keras.utils.PyDataset:
    config = lesson.config
    if config.views is not None and lesson.answers is not None:
        hard = np.eye(2, dtype=np.float32)[lesson.labels]
        drawn = DrawnViews.draw(config.views, len(lesson.images))
        return MatchedViews(drawn, lesson.images, hard, lesson.weights, lesson.answers, lesson.seed, config.batch_size)
    return AugmentedCells(
        network_input(lesson.images),
        targets(lesson.labels, lesson.soft),
        lesson.weights,
        Settings(
            seed=lesson.seed,
            batch_size=config.batch_size,
            shift=config.augmentation.shift,
            stain=config.augmentation.stain,
        ),
    )


def logits_of(network: keras.Model) -> Callable[[Pixels], Doubles]:
    """Return the function from images to logits that a network is."""
    return lambda images: logits(network, network_input(images))


def over_symmetries(predict: Callable[[Pixels], Doubles]) -> Callable[[Pixels], Doubles]:
    """Return the mean over the eight symmetries of the square."""

    def mean(images: Pixels) -> Doubles:
        total = np.zeros((len(images), 2))
        for symmetry in range(ORDER):
            total += predict(np.ascontiguousarray(transformed(images, symmetry, (1, 2))))
        return total / ORDER

    return mean
