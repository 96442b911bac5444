"""HElayers: an ONNX model, with parameters and packing chosen by its optimiser; SEAL inside."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pyhelayers
from onnx import TensorProto, helper, numpy_helper

from benchmarks.peers.worker import Array, CaseFile, Options, serve


def _model(case: CaseFile) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    value, flat = "image", False

    def node(kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{kind.lower()}{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [output], name=f"node{len(nodes)}", **attributes))
        return output

    for number, layer in enumerate(case.layers):
        names = [f"weight{number}", f"bias{number}"]
        for name, values in zip(names, (layer.weight, layer.bias), strict=True):
            weights.append(numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name))
        if number:
            value = node("Mul", [value, value])
        if layer.convolves:
            top, bottom, left, right = layer.padding
            strides, pads = [layer.stride] * 2, [top, left, bottom, right]
            value = node("Conv", [value, *names], kernel_shape=list(layer.weight.shape[2:]), strides=strides, pads=pads)
        else:
            value = value if flat else node("Flatten", [value])
            flat = True
            value = node("Gemm", [value, *names], transB=1)
    outputs = case.logits.shape[1]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, *case.images.shape[1:]])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, outputs])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


class HElayers:
    """A compiled and encoded model."""

    def __init__(self, case: CaseFile, batch: int) -> None:
        self._outputs = case.logits.shape[1]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            onnx.save(_model(case), str(path))
            plain = pyhelayers.PlainModel.create(pyhelayers.PlainModelHyperParams(), [str(path)])
        wanted = pyhelayers.HeRunRequirements()
        wanted.set_he_context_options([pyhelayers.DefaultContext()])
        wanted.set_model_encrypted(False)
        wanted.optimize_for_batch_size(batch)
        profile = pyhelayers.HeModel.compile(plain, wanted)
        self._context = pyhelayers.HeModel.create_context(profile)
        self._model = plain.get_empty_he_model(self._context)
        self._model.encode(plain, profile)
        self._coder = self._model.create_model_io_encoder()

    def encrypt(self, images: Array) -> Any:
        """Encrypt a batch."""
        request = pyhelayers.EncryptedData(self._context)
        self._coder.encode_encrypt(request, [images])
        return request

    def compute(self, request: Any) -> Any:
        """Evaluate the network."""
        reply = pyhelayers.EncryptedData(self._context)
        self._model.predict(reply, request)
        return reply

    def decrypt(self, reply: Any) -> npt.ArrayLike:
        """Return the logits."""
        return np.asarray(self._coder.decrypt_decode_output(reply)).reshape(-1, self._outputs)

    def facts(self, request: Any, reply: Any) -> dict[str, Any]:
        """Return sizes as HElayers serialises (keys: the whole context), and its version."""
        whole = {"upload": request, "reply": reply, "keys": self._context}
        sizes = {name: len(thing.save_to_buffer()) for name, thing in whole.items()}
        return {"bytes": sizes, "version": version("pyhelayers")}


def prepare(case: CaseFile, options: Options) -> HElayers:
    """Make HElayers ready for a case."""
    return HElayers(case, options.batch)


if __name__ == "__main__":
    serve(prepare)
