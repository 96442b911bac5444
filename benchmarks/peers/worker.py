"""The conversation between the harness and a process that measures one engine; needs nothing but NumPy.

A worker reads a case from an .npz file, prepares, evaluates once and prints ``{"ready": …}``. For each line
``UNTIMED TIMED`` on its standard input it evaluates so often and prints ``{"ms": […]}``; at the end of the input it
prints its result. That way the harness can interleave the engines of a run, and a person can call a worker by hand::

    echo 3 15 | PYTHON -m benchmarks.peers.openfhe_bsgs CASE.npz --variant manual
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Skipped(Exception):  # noqa: N818 - it is an answer, not an error
    """Raised where an engine cannot evaluate a case; the text says why."""


@dataclass(frozen=True)
class Layer:
    """One affine map.

    Attributes
    ----------
    weight:
        Matrix, shape (outputs, inputs), or kernel, shape (out channels, in channels, height, width).
    bias:
        One value per row or output channel.
    input_shape:
        (channels, height, width) that a convolution reads; empty for a matrix.
    stride:
        Step of a convolution.
    padding:
        (top, bottom, left, right) of a convolution.
    """

    weight: Array
    bias: Array
    input_shape: tuple[int, ...] = ()
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return self.weight.ndim == 4

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a convolution's output, (rows,) of a matrix."""
        if not self.convolves:
            return (len(self.weight),)
        top, bottom, left, right = self.padding
        height = (self.input_shape[1] + top + bottom - self.weight.shape[2]) // self.stride + 1
        width = (self.input_shape[2] + left + right - self.weight.shape[3]) // self.stride + 1
        return self.weight.shape[0], height, width

    @property
    def same_padding(self) -> int:
        """The padding of all four sides.

        Raises
        ------
        Skipped
            If sides differ.
        """
        if len(set(self.padding)) > 1:
            raise Skipped("its convolution pads all sides alike, this network's does not")
        return self.padding[0]


@dataclass(frozen=True)
class CaseFile:
    """What a case file holds: the affine maps (squares between them), images and their logits in float64."""

    layers: tuple[Layer, ...]
    images: Array
    logits: Array

    @classmethod
    def read(cls, path: str) -> CaseFile:
        """Read a case that `benchmarks.networks.Case.write` wrote."""
        with np.load(path) as file:
            layers: list[Layer] = []
            while f"weight{len(layers)}" in file:
                number = len(layers)
                weight, bias = file[f"weight{number}"], file[f"bias{number}"]
                if f"geometry{number}" not in file:
                    layers.append(Layer(weight, bias))
                    continue
                channels, height, width, stride, *padding = map(int, file[f"geometry{number}"])
                top, bottom, left, right = padding
                layers.append(Layer(weight, bias, (channels, height, width), stride, (top, bottom, left, right)))
            return cls(tuple(layers), file["images"], file["logits"])


class Subject(Protocol):
    """An engine that is ready to evaluate one network."""

    def encrypt(self, images: Array) -> Any:
        """Encrypt a batch, shape (batch, channels, height, width)."""

    def compute(self, request: Any) -> Any:
        """Evaluate under encryption: the only part that is timed."""

    def decrypt(self, reply: Any) -> npt.ArrayLike:
        """Return the logits, shape (batch, logits)."""

    def facts(self, request: Any, reply: Any) -> dict[str, Any]:
        """Return what else a row says: ``bytes`` (upload, reply, keys; None where unknown), ``version``, …"""


@dataclass(frozen=True)
class Options:
    """What a worker was asked for."""

    case: str
    threads: int
    batch: int
    variant: str


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Read a worker's command line."""
    parser = argparse.ArgumentParser(description="Measure one engine on one case.")
    parser.add_argument("case", help=".npz file with weights and images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="images per evaluation")
    parser.add_argument("--variant", default="", help="which of the engine's ways; see its script")
    return Options(**vars(parser.parse_args(arguments)))


def serve(prepare: Callable[[CaseFile, Options], Subject]) -> None:
    """Hold the conversation; `prepare` makes the engine ready.

    Libraries may write what they like to standard output: it ends up on standard error.
    """
    options = read_options()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    case = CaseFile.read(options.case)
    try:
        subject = prepare(case, options)
    except Skipped as reason:
        say({"skipped": str(reason)})
        return
    evaluations = 0
    answers: dict[int, list[list[float]]] = {}
    last: tuple[Any, Any] = None, None

    def evaluate() -> float:
        nonlocal evaluations, last
        chosen = (evaluations * options.batch + np.arange(options.batch)) % len(case.images)
        evaluations += 1
        request = subject.encrypt(case.images[chosen])
        started = time.perf_counter()
        reply = subject.compute(request)
        milliseconds = 1000 * (time.perf_counter() - started)
        logits = np.asarray(subject.decrypt(reply), dtype=np.float64).reshape(options.batch, -1)
        for image, row in zip(chosen.tolist(), logits.tolist(), strict=True):
            answers.setdefault(image, []).append(row)
        last = request, reply
        return milliseconds

    say({"ready": True, "first_ms": evaluate()})
    for line in sys.stdin:
        untimed, timed = map(int, line.split())
        for _ in range(untimed):
            evaluate()
        say({"ms": [evaluate() for _ in range(timed)]})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say({"answers": answers, "rss_mb": peak, **subject.facts(*last)})
