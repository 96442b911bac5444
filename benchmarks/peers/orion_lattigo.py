"""Orion: its own packing and its hoisted, double-hoisted Lattigo backend, at N = 8192.

Lattigo does not check security; the modulus of 217 bits is below the 218 that the homomorphic encryption standard
allows for a ternary secret at this degree. The secret's weight is the degree itself: no coefficient is zero.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Orion imports torchvision for data sets, which nothing here uses.
_stub: Any = ModuleType("torchvision")
_stub.datasets, _stub.transforms = SimpleNamespace(), SimpleNamespace()
sys.modules.setdefault("torchvision", _stub)

import orion  # noqa: E402
import orion.nn  # noqa: E402

from benchmarks.peers.worker import Array, CaseFile, Layer, Options, Skipped, serve  # noqa: E402

_LOG_DEGREE, _DATA_BITS, _SPECIAL_BITS = 13, [29, 26, 26, 26, 26, 26], [29, 29]
# Orion hands Lattigo the natural logarithm of this ratio, rounded down; 8 was the fastest of 2, 4 and 8.
_BABY_GIANT_RATIO = 8


def _tensor(values: Array) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _module(layer: Layer) -> Any:
    if layer.convolves:
        outputs, inputs, side, _ = layer.weight.shape
        module = orion.nn.Conv2d(inputs, outputs, side, layer.stride, layer.same_padding, bsgs_ratio=_BABY_GIANT_RATIO)
    else:
        module = orion.nn.Linear(layer.weight.shape[1], len(layer.weight), bsgs_ratio=_BABY_GIANT_RATIO)
    module.weight.data, module.bias.data = _tensor(layer.weight), _tensor(layer.bias)
    return module


class _Network(orion.nn.Module):
    """The affine maps with squares between them."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleList(_module(layer) for layer in layers)
        self.squares = torch.nn.ModuleList(orion.nn.Quad() for _ in layers[1:])
        self.flatten = orion.nn.Flatten()
        self._first_matrix = next(number for number, layer in enumerate(layers) if not layer.convolves)

    def forward(self, x: Any) -> Any:
        """Evaluate in the clear, or encrypted."""
        for number, linear in enumerate(self.linears):
            if number:
                x = self.squares[number - 1](x)
            if number == self._first_matrix:
                x = self.flatten(x)
            x = linear(x)
        return x


class Orion:
    """A compiled network."""

    def __init__(self, case: CaseFile) -> None:
        if len(_DATA_BITS) != 2 * len(case.layers):
            raise Skipped(f"its modulus chain here serves three affine maps, not {len(case.layers)}")
        self._outputs = case.logits.shape[1]
        self._keys = 1
        scheme = orion.init_scheme(
            {
                "ckks_params": {
                    "LogN": _LOG_DEGREE,
                    "LogQ": _DATA_BITS,
                    "LogP": _SPECIAL_BITS,
                    "LogScale": _DATA_BITS[-1],
                    "H": 1 << _LOG_DEGREE,
                    "RingType": "Standard",
                },
                "orion": {"backend": "lattigo", "embedding_method": "hybrid", "debug": False, "io_mode": "none"},
            }
        )
        make_key = scheme.backend.GenerateLinearTransformRotationKey

        def counted(element: int) -> Any:
            self._keys += 1
            return make_key(element)

        scheme.backend.GenerateLinearTransformRotationKey = counted
        self._network = _Network(case.layers)
        self._network.eval()
        orion.fit(self._network, _tensor(case.images[:1]))  # one image: Orion packs a batch as it was fitted
        self._level = orion.compile(self._network)
        self._network.he()

    def encrypt(self, images: Array) -> Any:
        """Encrypt one image."""
        return orion.encrypt(orion.encode(_tensor(images), self._level))

    def compute(self, request: Any) -> Any:
        """Evaluate the network."""
        return self._network(request)

    def decrypt(self, reply: Any) -> npt.ArrayLike:
        """Return the logits."""
        return np.asarray(reply.decrypt().decode(), dtype=np.float64).ravel()[: self._outputs]

    def facts(self, request: Any, reply: Any) -> dict[str, Any]:
        """Return sizes computed from the parameters (Orion serialises none of these), and the version.

        Keys of output rotations are made on the way and not counted.
        """
        polynomial = 8 << _LOG_DEGREE
        primes = len(_DATA_BITS) + len(_SPECIAL_BITS)
        digits = -(-len(_DATA_BITS) // len(_SPECIAL_BITS))
        sizes = {
            "upload": 2 * polynomial * (self._level + 1) * len(request.ids),
            "reply": 2 * polynomial * (reply.level() + 1) * len(reply.ids),
            "keys": 2 * polynomial * primes * digits * self._keys,
        }
        return {"bytes": sizes, "bytes_estimated": True, "version": version("orion_fhe")}


def prepare(case: CaseFile, options: Options) -> Orion:
    """Make Orion ready for a case."""
    if options.batch > 1:
        raise Skipped("its packing holds one image")
    torch.set_num_threads(options.threads)
    return Orion(case)


if __name__ == "__main__":
    serve(prepare)
