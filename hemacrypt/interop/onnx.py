"""ONNX models of the family: convolutions, means, normalisation, dense layers, squares and quadratic activations.

A model is read as one chain. Arithmetic between its layers is followed as a polynomial a x² + b x + c per channel of
the last layer's output x, so that ``Mul(x, x)``, ``Pow(x, 2)``, a bias added by itself, and a quadratic built of
``Mul`` and ``Add`` in any order all become what they are. When a layer needs such a value, it is folded: linear ones
as factor and constant, others as an activation. Nothing of the model is executed.

Source: the operators' definitions, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.helper import get_attribute_value

from hemacrypt.errors import InteropError, NetworkError
from hemacrypt.interop import Imported
from hemacrypt.model.folding import NO_PADDING, Fold, Padding, same_padding
from hemacrypt.model.network import Array, Shape

_LARGEST_FILE = 1 << 30
_INSTEAD = {
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Elu", "Gelu", "Sigmoid", "Tanh", "HardSwish", "Clip"), "Mul(x, x)"),
    **dict.fromkeys(
        ("Softmax", "LogSoftmax", "ArgMax"), "no node at all: logits have the same order; end the graph before it"
    ),
    "MaxPool": "AveragePool",
    "GlobalMaxPool": "GlobalAveragePool",
    "LayerNormalization": "BatchNormalization",
    "InstanceNormalization": "BatchNormalization",
    "Transpose": "a model with channels first throughout (input N, C, H, W)",
    "ConvTranspose": "Conv",
    "Concat": "one chain without branches",
}
_KNOWN = "Conv, AveragePool, BatchNormalization, Gemm, MatMul, Add, Mul, Pow or Flatten"


@dataclass(frozen=True)
class _Polynomial:
    """a x² + b x + c of what the fold wrote when it had ``base`` layers; each shape (channels,)."""

    base: int
    a: Array
    b: Array
    c: Array

    @property
    def degree(self) -> int:
        return 2 if self.a.any() else int(self.b.any())

    @property
    def trivial(self) -> bool:
        return not self.a.any() and bool((self.b == 1).all()) and not self.c.any()


_Constant = npt.NDArray[Any]
_Value = _Polynomial | _Constant
_Attributes = dict[str, Any]


def read_onnx(path: Path) -> Imported:
    """Read an ONNX model.

    Parameters
    ----------
    path:
        A file with one input, (N, channels, height, width) or (N, values), and one output, the logits. All weights
        are inside.

    Raises
    ------
    InteropError
        If the file is damaged, or the model not of the family; the message names the node and what to use instead.
    """
    graph = _load(path).graph
    reader = _Graph(graph)
    try:
        return Imported(reader.shape, reader.read())
    except NetworkError as error:
        raise InteropError(f"{path}: {error}") from error


def _load(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InteropError(f"{path} has {path.stat().st_size:,} bytes; at most {_LARGEST_FILE:,} are read")
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise InteropError(f"{path} keeps {tensor.name!r} in another file; save the model with weights inside")
        onnx.checker.check_model(model)
    except OSError as error:
        raise InteropError(f"cannot read {path}: {error.strerror}; name an ONNX file") from error
    except InteropError:
        raise
    except Exception as error:  # protobuf and the checker have exceptions of several libraries
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InteropError(f"{path} is no valid ONNX model ({first[0]}); export it again") from error
    return model


class _Graph:
    """Walks the nodes in order; every tensor is a constant or a polynomial of the last layer's output."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._values: dict[str, _Value] = {tensor.name: _array(tensor) for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self._values]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise InteropError(
                f"the model has {len(inputs)} inputs and {len(graph.output)} outputs; expected one of each"
            )
        self.shape, flat = _input_shape(inputs[0])
        self._fold = Fold(self.shape)
        if flat:
            self._fold.flatten()
        self._base = 0
        self._left = Counter(name for node in graph.node for name in node.input)
        self._left[graph.output[0].name] += 1
        self._values[inputs[0].name] = self._identity()
        self._name = ""

    def read(self) -> tuple[Any, ...]:
        for node in self._graph.node:
            self._name = f"{node.op_type} {node.name or node.output[0]}"
            handler = self._handlers().get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if handler is None:
                instead = _INSTEAD.get(node.op_type, _KNOWN)
                raise InteropError(f"node {self._name!r} does not fold; use {instead}")
            result = handler(node, {attribute.name: get_attribute_value(attribute) for attribute in node.attribute})
            self._left.subtract(node.input)
            self._values[node.output[0]] = self._settled(result)
        self._name = "the output"
        logits = self._values.get(self._graph.output[0].name)
        self._enter(logits)
        return self._fold.finish()

    def _handlers(self) -> dict[str, Callable[[onnx.NodeProto, _Attributes], _Value]]:
        return {
            "Constant": self._constant,
            "Identity": self._same,
            "Dropout": self._dropout,
            "Conv": self._convolution,
            "AveragePool": self._average,
            "GlobalAveragePool": self._global_average,
            "ReduceMean": self._reduce_mean,
            "BatchNormalization": self._normalisation,
            "Flatten": self._flatten,
            "Reshape": self._reshape,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "Add": lambda node, _: self._sum(node, 1.0),
            "Sub": lambda node, _: self._sum(node, -1.0),
            "Mul": lambda node, _: self._product(node),
            "Div": lambda node, _: self._quotient(node),
            "Neg": lambda node, _: self._negative(node),
            "Pow": lambda node, _: self._power(node),
        }

    # What tensors are.

    def _identity(self) -> _Polynomial:
        channels = self._fold.channels
        return _Polynomial(self._base, np.zeros(channels), np.ones(channels), np.zeros(channels))

    def _value(self, node: onnx.NodeProto, index: int) -> _Value:
        name = node.input[index] if index < len(node.input) else ""
        if name not in self._values:
            raise InteropError(f"node {self._name!r} reads {name!r}, which nothing has computed")
        value = self._values[name]
        if isinstance(value, _Polynomial) and value.base != self._base:
            raise InteropError(f"node {self._name!r} joins a branch that left the chain earlier; use one chain only")
        return value

    def _data(self, node: onnx.NodeProto, index: int) -> _Polynomial:
        value = self._value(node, index)
        if not isinstance(value, _Polynomial):
            raise InteropError(f"node {self._name!r} computes with constants alone; fold constants when you export")
        return value

    def _weight(self, node: onnx.NodeProto, index: int) -> _Constant:
        value = self._value(node, index)
        if isinstance(value, _Polynomial):
            raise InteropError(f"node {self._name!r} has weights that depend on the input; expected constants")
        return value

    def _optional(self, node: onnx.NodeProto, index: int) -> _Constant | None:
        return self._weight(node, index) if index < len(node.input) and node.input[index] else None

    def _enter(self, value: _Value | None) -> None:
        """Fold what stands between the last layer and a value, which is the only one from here on."""
        if not isinstance(value, _Polynomial) or value.base != self._base:
            raise InteropError(f"{self._name!r} does not depend on the last layer; expected one chain")
        if value.degree == 2:
            if not (value.b.any() or value.c.any() or (value.a != 1).any()):
                self._fold.square(self._name)
            else:
                self._fold.quadratic(self._name, value.a, value.b, value.c)
        elif not value.trivial:
            self._fold.scale_and_shift(self._name, value.b, value.c)
        self._base += 1

    def _layer(self, node: onnx.NodeProto) -> None:
        self._enter(self._data(node, 0))

    def _settled(self, value: _Value) -> _Value:
        """Fold a factor or constant at once if nothing else still needs what was there before it.

        So the square of x + c is a square, and not a quadratic activation whose vertex may lie far away.
        """
        if not isinstance(value, _Polynomial) or value.degree == 2 or value.trivial:
            return value
        if any(
            isinstance(other, _Polynomial) and other.base == self._base and self._left[name] > 0
            for name, other in self._values.items()
        ):
            return value
        self._enter(value)
        return self._identity()

    # Layers.

    def _constant(self, node: onnx.NodeProto, attributes: _Attributes) -> _Value:
        for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
            if (value := attributes.get(name, None)) is not None:
                return _array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
        raise InteropError(f"node {self._name!r} holds no number; expected a tensor")

    def _same(self, node: onnx.NodeProto, _: _Attributes) -> _Value:
        return self._value(node, 0)

    def _dropout(self, node: onnx.NodeProto, _: _Attributes) -> _Value:
        training = self._optional(node, 2)
        if training is not None and training.any():
            raise InteropError(f"node {self._name!r} is in training mode; export the model for inference")
        return self._value(node, 0)

    def _convolution(self, node: onnx.NodeProto, attributes: _Attributes) -> _Value:
        self._layer(node)
        kernel = self._weight(node, 1)
        if kernel.ndim != 4 or attributes.get("group", 1) != 1:
            raise InteropError(f"node {self._name!r} is grouped or not two-dimensional; use a plain Conv")
        bias = self._optional(node, 2)
        window = attributes.get("kernel_shape", list(kernel.shape[2:]))
        if list(window) != list(kernel.shape[2:]):
            raise InteropError(f"node {self._name!r} says kernel {list(window)} for weights {list(kernel.shape)}")
        stride, padding = self._window(attributes, kernel.shape[2:])
        self._fold.convolution(self._name, kernel, np.zeros(len(kernel)) if bias is None else bias, stride, padding)
        return self._identity()

    def _average(self, node: onnx.NodeProto, attributes: _Attributes) -> _Value:
        self._layer(node)
        window = attributes.get("kernel_shape", [])
        if len(window) != 2 or attributes.get("ceil_mode", 0):
            raise InteropError(f"node {self._name!r} is not two-dimensional or rounds up; use ceil_mode 0")
        stride, padding = self._window(attributes, window)
        if padding != NO_PADDING and not attributes.get("count_include_pad", 0):
            # Windows at the border would weigh their values differently: no convolution.
            raise InteropError(f"node {self._name!r} pads its windows; use count_include_pad=1 or no padding")
        self._fold.mean_pooling(self._name, (window[0], window[1]), stride, padding)
        return self._identity()

    def _global_average(self, node: onnx.NodeProto, _: _Attributes) -> _Value:
        self._layer(node)
        self._mean_of_maps()
        return self._identity()

    def _reduce_mean(self, node: onnx.NodeProto, attributes: _Attributes) -> _Value:
        self._layer(node)
        listed = self._optional(node, 1)
        axes = attributes.get("axes", []) if listed is None else listed.tolist()
        if {int(axis) % 4 for axis in axes} != {2, 3} or len(axes) != 2:
            raise InteropError(
                f"node {self._name!r} takes the mean over axes {axes}; expected height and width, 2 and 3"
            )
        self._mean_of_maps()
        if not attributes.get("keepdims", 1):
            self._fold.flatten()
        return self._identity()

    def _mean_of_maps(self) -> None:
        shape = self._fold.map_shape
        if shape is None or self._fold.flat:
            raise InteropError(f"node {self._name!r} needs a feature map; put it before Flatten")
        # One window: the stride is of no account.
        self._fold.mean_pooling(self._name, shape[1:], 1)

    def _normalisation(self, node: onnx.NodeProto, attributes: _Attributes) -> _Value:
        self._layer(node)
        if attributes.get("training_mode", 0):
            raise InteropError(f"node {self._name!r} is in training mode; export the model for inference")
        if self._fold.flat and self._fold.map_shape is not None and self._fold.values != self._fold.channels:
            raise InteropError(f"node {self._name!r} stands between Flatten and a dense layer; put it before Flatten")
        gamma, beta, mean, variance = (self._weight(node, index).astype(np.float64) for index in range(1, 5))
        deviation = variance + attributes.get("epsilon", 1e-5)
        if not (deviation > 0).all():
            raise InteropError(f"node {self._name!r} has variances that are not positive; train or export it again")
        scale = gamma / np.sqrt(deviation)
        self._fold.scale_and_shift(self._name, scale, beta - mean * scale)
        return self._identity()

    def _flatten(self, node: onnx.NodeProto, attributes: _Attributes) -> _Value:
        if attributes.get("axis", 1) not in (1, -3):
            raise InteropError(f"node {self._name!r} flattens from another axis than 1; use axis=1")
        return self._flattened(self._data(node, 0))

    def _reshape(self, node: onnx.NodeProto, _: _Attributes) -> _Value:
        value, target = self._data(node, 0), self._weight(node, 1).tolist()
        if len(target) != 2 or target[1] not in (-1, self._fold.values) or target[0] not in (-1, 0, 1):
            raise InteropError(
                f"node {self._name!r} makes the shape {target}; use Flatten, or a shape of (-1, {self._fold.values})"
            )
        return self._flattened(value)

    def _flattened(self, value: _Polynomial) -> _Polynomial:
        self._fold.flatten()
        return value

    def _gemm(self, node: onnx.NodeProto, attributes: _Attributes) -> _Value:
        self._layer(node)
        weight, bias = self._weight(node, 1).astype(np.float64), self._optional(node, 2)
        if attributes.get("transA", 0) or weight.ndim != 2:
            raise InteropError(f"node {self._name!r} transposes its input or has no matrix; use transA=0")
        weight = (weight if attributes.get("transB", 0) else weight.T) * attributes.get("alpha", 1.0)
        constant = np.zeros(()) if bias is None else bias.astype(np.float64) * attributes.get("beta", 1.0)
        return self._dense(weight, constant)

    def _matmul(self, node: onnx.NodeProto, _: _Attributes) -> _Value:
        self._layer(node)
        weight = self._weight(node, 1).astype(np.float64)
        if weight.ndim != 2:
            raise InteropError(f"node {self._name!r} has weights of shape {weight.shape}; expected (inputs, outputs)")
        return self._dense(weight.T, np.zeros(()))

    def _dense(self, weight: Array, bias: Array) -> _Value:
        self._fold.dense(self._name, weight, self._spread(bias, (1, len(weight)))[0])
        return self._identity()

    # Arithmetic.

    def _operands(self, node: onnx.NodeProto) -> tuple[_Polynomial, _Polynomial]:
        """Return both operands as polynomials; at least one has to depend on the input."""
        left, right = self._value(node, 0), self._value(node, 1)
        if not isinstance(left, _Polynomial) and not isinstance(right, _Polynomial):
            raise InteropError(f"node {self._name!r} computes with constants alone; fold constants when you export")
        return self._lifted(left), self._lifted(right)

    def _lifted(self, value: _Value) -> _Polynomial:
        if isinstance(value, _Polynomial):
            return value
        constant = self._per_channel(value)
        return _Polynomial(self._base, np.zeros_like(constant), np.zeros_like(constant), constant)

    def _sum(self, node: onnx.NodeProto, sign: float) -> _Value:
        left, right = self._operands(node)
        return _Polynomial(self._base, left.a + sign * right.a, left.b + sign * right.b, left.c + sign * right.c)

    def _product(self, node: onnx.NodeProto) -> _Value:
        left, right = self._operands(node)
        return self._squared(left) if left is right else self._multiplied(left, right)

    def _negative(self, node: onnx.NodeProto) -> _Value:
        return self._multiplied(self._data(node, 0), self._lifted(np.array(-1.0)))

    def _quotient(self, node: onnx.NodeProto) -> _Value:
        value, divisor = self._data(node, 0), self._weight(node, 1).astype(np.float64)
        if not divisor.all():
            raise InteropError(f"node {self._name!r} divides by zero")
        return self._multiplied(value, self._lifted(1.0 / divisor))

    def _power(self, node: onnx.NodeProto) -> _Value:
        value, exponent = self._data(node, 0), self._weight(node, 1)
        if not exponent.size or (exponent != 2).any():
            raise InteropError(f"node {self._name!r} raises to another power than 2; use Pow(x, 2)")
        return self._squared(value)

    def _squared(self, value: _Polynomial) -> _Polynomial:
        if value.degree == 2:
            self._enter(value)
            value = self._identity()
        return self._multiplied(value, value)

    def _multiplied(self, left: _Polynomial, right: _Polynomial) -> _Polynomial:
        if left.degree + right.degree > 2:
            raise InteropError(f"node {self._name!r} makes a polynomial of a degree beyond 2; use a square of a square")
        return _Polynomial(
            self._base,
            left.a * right.c + left.b * right.b + left.c * right.a,
            left.b * right.c + left.c * right.b,
            left.c * right.c,
        )

    def _per_channel(self, constant: _Constant) -> Array:
        """Return a constant that is the same at every place of a map as one number per channel."""
        shape = self._fold.map_shape
        if shape is None or self._fold.flat:
            values = self._spread(constant, (1, self._fold.values))[0]
            groups = values.reshape(self._fold.channels, -1)
        else:
            groups = self._spread(constant, (1, *shape))[0].reshape(shape[0], -1)
        if (groups != groups[:, :1]).any():
            raise InteropError(f"node {self._name!r} has a constant that differs from place to place within a channel")
        return np.array(groups[:, 0], dtype=np.float64)

    def _spread(self, constant: _Constant, shape: tuple[int, ...]) -> Array:
        try:
            return np.broadcast_to(constant.astype(np.float64), shape)
        except ValueError:
            raise InteropError(
                f"node {self._name!r} has a constant of shape {constant.shape} for values of shape {shape}"
            ) from None

    def _window(self, attributes: _Attributes, window: Any) -> tuple[int, Padding]:
        """Return stride and padding of a convolution or mean."""
        if any(step != 1 for step in attributes.get("dilations", [1, 1])):
            raise InteropError(f"node {self._name!r} is dilated; use dilations of 1")
        strides = attributes.get("strides", [1, 1])
        if len(strides) != 2 or strides[0] != strides[1]:
            raise InteropError(f"node {self._name!r} has strides {list(strides)}; expected the same in both directions")
        stride, shape = int(strides[0]), self._fold.map_shape
        automatic = attributes.get("auto_pad", b"NOTSET").decode()
        if automatic in ("SAME_UPPER", "SAME_LOWER") and shape is not None:
            padding = same_padding(shape, (int(window[0]), int(window[1])), stride)
            if automatic == "SAME_LOWER":
                padding = (padding[0][::-1], padding[1][::-1])
            return stride, padding
        pads = [0, 0, 0, 0] if automatic == "VALID" else attributes.get("pads", [0, 0, 0, 0])
        if len(pads) != 4:
            raise InteropError(f"node {self._name!r} has pads {list(pads)}; expected four numbers")
        return stride, ((int(pads[0]), int(pads[2])), (int(pads[1]), int(pads[3])))


def _array(tensor: onnx.TensorProto) -> _Constant:
    try:
        array = numpy_helper.to_array(tensor)
    except Exception as error:  # of NumPy, or of the library that knows the type
        raise InteropError(
            f"tensor {tensor.name!r} is damaged ({type(error).__name__}); export the model again"
        ) from error
    if array.dtype.kind not in "uifb":
        raise InteropError(f"tensor {tensor.name!r} is of type {array.dtype}; expected numbers")
    return np.asarray(array)


def _input_shape(value: onnx.ValueInfoProto) -> tuple[Shape, bool]:
    """Return (channels, height, width) of the input, and whether it is a vector: as many channels of one value."""
    sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    if len(sizes) not in (2, 4) or min(sizes[1:]) < 1 or sizes[0] > 1 or math.prod(sizes[1:]) > 1 << 22:
        raise InteropError(
            f"input {value.name!r} has the shape {sizes} (0: not fixed); expected (N, channels, height, width) or "
            "(N, values), all but N fixed"
        )
    return ((sizes[1], 1, 1), True) if len(sizes) == 2 else ((sizes[1], sizes[2], sizes[3]), False)
