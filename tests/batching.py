"""A small model that is quick in both layouts: 48 inputs, one square, degree 8192; and the messages of its batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import Array, CollapsedNetwork, Dense
from hemacrypt.model.preprocess import Pixels, Preprocessing
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import digest

NAME = "tiny"
PREPROCESSING = Preprocessing(image_size=8, crop=8, block=2)


def make_bundle() -> Bundle:
    """Make the model: two affine maps with a square between them, 4x4 pixels of three channels."""
    random = np.random.default_rng(5)
    layers = (
        Dense(random.normal(size=(5, 48)) / 7, random.normal(size=5) / 3),
        Dense(random.normal(size=(2, 5)) / 3, random.normal(size=2) / 3),
    )
    network = CollapsedNetwork((3, 4, 4), layers).calibrated(random.random((300, 3, 4, 4)))
    return Bundle.create(network, name=NAME, labels=("no", "yes"), preprocessing=PREPROCESSING)


def make_images(count: int, seed: int = 0) -> list[Pixels]:
    """Make reduced images as the model reads them."""
    random = np.random.default_rng(seed)
    # Bright images are refused as no cells.
    return [random.integers(0, 90, (4, 4, 3), dtype=np.uint8) for _ in range(count)]


def clear_logits(bundle: Bundle, images: Iterable[Pixels]) -> Array:
    """Return the logits of the clear network, shape (images, 2)."""
    return bundle.network(np.stack([PREPROCESSING(image) for image in images]))


def messages(header: pb.BatchHeader, ciphertexts: Iterable[bytes]) -> Iterator[pb.PredictBatchRequest]:
    """Make the messages of a batch."""
    yield pb.PredictBatchRequest(header=header)
    yield from map(message, ciphertexts)


def message(ciphertext: bytes) -> pb.PredictBatchRequest:
    """Make the message of one ciphertext, with its digest."""
    return pb.PredictBatchRequest(
        ciphertext=pb.BatchCiphertext(content=ciphertext, sha256=digest([ciphertext])),
    )
