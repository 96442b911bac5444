"""What the client returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hemacrypt.model.network import Array

Scheme = Literal["ckks", "bfv"]


@dataclass(frozen=True)
class ModelInfo:
    """A model that a service offers."""

    name: str
    description: str
    plan_id: str


@dataclass(frozen=True)
class Milliseconds:
    """Where the time of one prediction went.

    Attributes
    ----------
    encrypt:
        Preprocessing, encoding, encryption.
    upload:
        Transport both ways: the whole call less queue and compute.
    queue:
        Waiting for a worker on the service.
    compute:
        Evaluation on the service.
    decrypt:
        Decryption and decoding.
    """

    encrypt: float
    upload: float
    queue: float
    compute: float
    decrypt: float


@dataclass(frozen=True)
class Bytes:
    """What one prediction sent and received."""

    upload: int
    reply: int


@dataclass(frozen=True)
class Prediction:
    """The decrypted answer for one image. Decision support, not a diagnosis.

    Attributes
    ----------
    source:
        Where the image came from.
    labels:
        What each logit stands for.
    logits:
        Shape (labels,). They do not show when the prediction is printed or logged.
    error_bound:
        Bound on the error that encryption added to a logit; 0 under BFV, which is exact.
    milliseconds, size:
        Cost of the request that carried the image.
    images:
        How many images the request carried.
    scheme:
        ``ckks``, or ``bfv``: then the logits are those of the network with integer weights.
    integers:
        The integer logits themselves, under BFV.
    quantisation_error:
        How far integer weights and inputs may have moved a logit, as the plan predicts; 0 under CKKS.
    """

    source: str
    labels: tuple[str, ...]
    logits: Array = field(repr=False)
    error_bound: float
    milliseconds: Milliseconds
    size: Bytes
    images: int = 1
    scheme: Scheme = "ckks"
    integers: tuple[int, ...] | None = field(default=None, repr=False)
    quantisation_error: float = 0.0

    @property
    def index(self) -> int:
        """Number of the largest logit; with one logit, whether it is positive."""
        return int(self.logits[0] > 0) if len(self.logits) == 1 else int(np.argmax(self.logits))

    @property
    def label(self) -> str:
        """What the model says the cell is; with one logit, the label or ``not`` the label."""
        if len(self.logits) == 1:
            return self.labels[0] if self.logits[0] > 0 else f"not {self.labels[0]}"
        return self.labels[self.index]

    @property
    def probabilities(self) -> dict[str, float]:
        """The model's probability of each label: softmax of the logits, or the logistic function of a single one."""
        if len(self.logits) == 1:
            return {self.labels[0]: float((1 + np.tanh(self.logits[0] / 2)) / 2)}
        shifted = np.exp(self.logits - self.logits.max())
        return dict(zip(self.labels, (shifted / shifted.sum()).tolist(), strict=True))

    @property
    def probability(self) -> float:
        """The model's probability of `label`."""
        if len(self.logits) == 1:
            positive = self.probabilities[self.labels[0]]
            return positive if self.logits[0] > 0 else 1 - positive
        return self.probabilities[self.label]

    @property
    def decided_beyond_error(self) -> bool:
        """Whether the label would be the same for every error of encryption and quantisation within their bounds."""
        bound = self.error_bound + self.quantisation_error
        if len(self.logits) == 1:
            return bool(abs(self.logits[0]) > bound)
        top = np.sort(self.logits)[-2:]
        return bool(top[1] - top[0] > 2 * bound)
