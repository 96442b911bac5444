"""TenSEAL's own high-level API, as in its tutorial 4: im2col convolution, then encrypted vector times matrix.

Its im2col takes one channel, so an image is one ciphertext for each; `mm` encodes and rotates for every row of the
matrix inside the call, which takes minutes.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal

from benchmarks.peers.worker import Array, CaseFile, Options, Skipped, serve

# 256 windows of 25 pixels, rounded up to 32, fill 8192 slots.
_DEGREE, _FIRST_BITS, _SCALE_BITS = 16384, 50, 33


class TenSeal:
    """A context and plain weights for one network of one convolution and matrices."""

    def __init__(self, case: CaseFile, threads: int) -> None:
        self._convolution, *self._matrices = case.layers
        bits = [_FIRST_BITS, *[_SCALE_BITS] * (2 * len(case.layers)), _FIRST_BITS]
        self._context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=_DEGREE, coeff_mod_bit_sizes=bits, n_threads=threads
        )
        self._context.global_scale = 2.0**_SCALE_BITS
        self._context.generate_galois_keys()
        self._plain = [(layer.weight.T.tolist(), layer.bias.tolist()) for layer in self._matrices]

    def encrypt(self, images: Array) -> Any:
        """Encrypt one image as the windows of each channel."""
        layer = self._convolution
        top, bottom, left, right = layer.padding
        padded = np.pad(images[0], ((0, 0), (top, bottom), (left, right)))
        height, width = layer.weight.shape[2:]
        return [
            tenseal.im2col_encoding(self._context, channel.tolist(), height, width, layer.stride) for channel in padded
        ]

    def compute(self, request: Any) -> Any:
        """Evaluate the network."""
        maps = []
        for kernels, bias in zip(self._convolution.weight, self._convolution.bias, strict=True):
            parts = [
                channel.conv2d_im2col(kernel.tolist(), windows)
                for (channel, windows), kernel in zip(request, kernels, strict=True)
            ]
            maps.append(sum(parts[1:], parts[0]) + float(bias))
        value = tenseal.CKKSVector.pack_vectors(maps)
        for matrix, bias in self._plain:
            value.square_()
            value = value.mm(matrix) + bias
        return value

    def decrypt(self, reply: Any) -> npt.ArrayLike:
        """Return the logits."""
        return np.asarray(reply.decrypt())

    def facts(self, request: Any, reply: Any) -> dict[str, Any]:
        """Return sizes as TenSEAL serialises, and its version."""
        keys = self._context.serialize(
            save_public_key=False, save_secret_key=False, save_galois_keys=True, save_relin_keys=True
        )
        upload = sum(len(channel.serialize()) for channel, _ in request)
        sizes = {"upload": upload, "reply": len(reply.serialize()), "keys": len(keys)}
        return {"bytes": sizes, "version": version("tenseal")}


def prepare(case: CaseFile, options: Options) -> TenSeal:
    """Make TenSEAL ready for a case."""
    if options.batch > 1 or any(layer.convolves for layer in case.layers[1:]):
        raise Skipped("its API has one image in a ciphertext and no convolution after the first layer")
    return TenSeal(case, options.threads)


if __name__ == "__main__":
    serve(prepare)
