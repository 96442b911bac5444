"""Curves of runs as local TensorBoard files: ``tensorboard --logdir OUT/tensorboard``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import keras
import tensorflow as tf


class Tracker(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Writes losses, metrics, learning rate and configuration of one run; a context manager.

    Parameters
    ----------
    folder:
        Of this run alone; event files of an earlier try are removed.
    content:
        The configuration, kept as text.
    advance:
        Called after every epoch.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], advance: Callable[[], None]) -> None:
        super().__init__()
        self._folder, self._content, self._advance = folder, content, advance

    def __enter__(self) -> Tracker:
        for old in self._folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = tf.summary.create_file_writer(str(self._folder))
        with self._writer.as_default():
            # Four blanks: a block of code in Markdown.
            text = json.dumps(self._content, indent=2, sort_keys=True).replace("\n", "\n    ")
            tf.summary.text("config", f"    {text}", step=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the epoch's values."""
        values = {name.replace("val_", "test_"): value for name, value in (logs or {}).items() if name != "val_loss"}
        values["learning_rate"] = float(self.model.optimizer.learning_rate)
        with self._writer.as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step=epoch + 1)
        self._advance()

    def final(self, values: Mapping[str, float]) -> None:
        """Write figures of the whole run, as ``final/<name>``."""
        with self._writer.as_default():
            for name, value in values.items():
                tf.summary.scalar(f"final/{name}", value, step=0)
