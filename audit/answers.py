"""What the demonstration learns of a cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client_sdk._results import Prediction
from hemacrypt.embedded import SampleCell
from hemacrypt.model.network import Array


@dataclass(frozen=True)
class Answer:
    """One cell's answers, encrypted and in the clear."""

    cell: SampleCell
    encrypted: Prediction
    clear: Array

    @property
    def clear_index(self) -> int:
        """Number of the label that the clear network gives."""
        return int(np.argmax(self.clear))

    @property
    def agrees(self) -> bool:
        """Whether both give the same label."""
        return self.encrypted.index == self.clear_index

    @property
    def logit_error(self) -> float:
        """Largest difference of a logit."""
        return float(np.abs(self.encrypted.logits - self.clear).max())
