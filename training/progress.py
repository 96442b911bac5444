"""One line per epoch while a network trains."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import keras
from rich.console import Console

from training.report import bar


class EpochBar(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """A Keras callback and context manager that shows a bar over the epochs and prints the figures of each."""

    def __init__(self, console: Console, epochs: int) -> None:
        super().__init__()
        self._console, self._bar = console, bar(console)
        self._task = self._bar.add_task("training", total=epochs)

    def __enter__(self) -> EpochBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Print the epoch's figures and move the bar on."""
        values = logs or {}
        self._console.print(
            f"epoch {epoch + 1:3d}  loss {values['loss']:.4f}  accuracy {values['accuracy']:.4f}  |  validation: "
            f"loss {values['val_loss']:.4f}  accuracy {values['val_accuracy']:.4f}  AUROC {values['val_auroc']:.4f}"
        )
        self._bar.advance(self._task)
