"""ONNX models: folded, they equal ONNX's own reference evaluator; whatever does not fold is refused by name."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hemacrypt.errors import InteropError
from hemacrypt.interop.onnx import read_onnx
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense

SHAPE = (2, 7, 8)


class Model:
    """A graph put together node by node, the last output being the next input unless others are named."""

    def __init__(self, shape: Sequence[int | str] = ("N", *SHAPE), seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape, self.nodes, self.weights, self.last = shape, list[Any](), list[Any](), "x"

    def weight(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def random(self, *shape: int) -> str:
        return self.weight(self.rng.normal(size=shape) / 2)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, list(inputs), [output], name=f"{op.lower()}{len(self.nodes)}", **attributes)
        )
        self.last = output
        return output

    def then(self, op: str, *weights: str, **attributes: Any) -> Model:
        self.add(op, self.last, *weights, **attributes)
        return self

    def square(self) -> Model:
        self.add("Mul", self.last, self.last)
        return self

    def head(self, inputs: int, outputs: int = 3) -> Model:
        return self.then("Flatten").then("Gemm", self.random(outputs, inputs), self.random(outputs), transB=1)

    def proto(self) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(self.shape))
        y = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, ["N", "K"])
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])

    def save(self, folder: Path) -> Path:
        onnx.save(self.proto(), folder / "model.onnx")
        return folder / "model.onnx"

    def check(self, folder: Path, squares: int) -> CollapsedNetwork:
        found = read_onnx(self.save(folder))
        network = CollapsedNetwork(found.input_shape, found.linears)
        x = np.random.default_rng(9).normal(size=(3, *self.shape[1:])).astype(np.float32)  # type: ignore[arg-type]
        (expected,) = ReferenceEvaluator(self.proto()).run(None, {"x": x})
        got = network(x.reshape(3, -1))
        np.testing.assert_allclose(got, expected.reshape(3, -1), rtol=2e-5, atol=2e-5 * np.abs(expected).max())
        assert network.squares == squares
        return network


def test_convolutions_pooling_and_dense_layers(tmp_path: Path) -> None:
    model = Model().then("Conv", "w0", "w1", pads=[1, 0, 2, 1], strides=[2, 2], kernel_shape=[3, 3])
    model.random(4, 2, 3, 3), model.random(4)
    model.square().then("AveragePool", kernel_shape=[2, 2], strides=[1, 1]).then("Dropout").then("Identity")
    network = model.head(4 * 3 * 3).check(tmp_path, 1)
    assert [type(layer) for layer in network.linears] == [Convolution, Dense]
    assert isinstance(network.linears[0], Convolution)
    assert network.linears[0].padding == ((1, 2), (0, 1))


@pytest.mark.parametrize("automatic", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(tmp_path: Path, automatic: str) -> None:
    model = Model(("N", 2, 8, 8))
    model.then("Conv", model.random(3, 2, 3, 3), auto_pad=automatic, strides=[2, 2]).square()
    model.head(3 * (9 if automatic == "VALID" else 16)).check(tmp_path, 1)


def test_padded_means_that_count_their_zeros(tmp_path: Path) -> None:
    model = Model()
    model.then("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1)
    model.square().head(2 * 4 * 4).check(tmp_path, 1)


@pytest.mark.parametrize("how", ["GlobalAveragePool", "ReduceMean, kept", "ReduceMean"])
def test_the_mean_of_whole_maps(tmp_path: Path, how: str) -> None:
    model = Model()
    model.then("Conv", model.random(5, 2, 3, 3)).square()
    if how == "GlobalAveragePool":
        model.then(how)
    else:
        model.then("ReduceMean", axes=[2, -1], keepdims=int(how.endswith("kept")))
    if how == "ReduceMean":
        model.then("Gemm", model.random(5, 3)).check(tmp_path, 1)
    else:
        model.head(5).check(tmp_path, 1)


def test_normalisation_on_maps_and_vectors(tmp_path: Path) -> None:
    model = Model()

    def normalise(channels: int) -> None:
        variance = model.weight(model.rng.uniform(0.5, 2, channels))
        weights = [model.random(channels) for _ in range(3)]
        model.then("BatchNormalization", *weights, variance, epsilon=0.01)

    normalise(2)
    model.then("Conv", model.random(3, 2, 3, 3), pads=[1, 1, 1, 1])
    normalise(3)
    model.square().then("Flatten").then("MatMul", model.random(3 * 56, 6))
    normalise(6)
    model.square().then("MatMul", model.random(6, 2)).then("Add", model.random(2)).check(tmp_path, 2)


def test_gemm_in_all_its_forms(tmp_path: Path) -> None:
    model = Model(("N", 10))
    model.then("Gemm", model.random(10, 6), model.random(1, 6), alpha=0.5, beta=-2.0).square()
    model.then("Gemm", model.random(6, 4), model.weight(0.25)).square().then("Gemm", model.random(2, 4), transB=1)
    network = model.check(tmp_path, 2)
    assert network.input_shape == (10, 1, 1)


@pytest.mark.parametrize("target", [(-1, 112), (0, -1), (1, 112)])
def test_reshaping_to_a_vector_is_flattening(tmp_path: Path, target: tuple[int, int]) -> None:
    model = Model((1, *SHAPE))
    model.then("Reshape", model.weight(target, np.int64)).then("Gemm", model.random(112, 4)).square()
    found = read_onnx(model.then("Gemm", model.random(4, 2)).save(tmp_path))
    assert [layer.outputs for layer in found.linears] == [4, 2]


def test_inputs_may_be_normalised_before_padding(tmp_path: Path) -> None:
    model = Model()
    model.then("Sub", model.random(2, 1, 1)).then("Div", model.weight([[[2.0]], [[3.0]]]))
    model.then("Conv", model.random(3, 2, 3, 3), pads=[1, 1, 1, 1]).square()
    network = model.head(3 * 56).check(tmp_path, 1)
    assert isinstance(network.linears[0], Convolution)


def quadratic(model: Model, form: str, channels: int, rank: int = 4) -> None:
    """Write a x² + b x + c in one of the ways in which it is written."""
    x, shape = model.last, (channels, 1, 1) if rank == 4 else (channels,)
    a, b, c = (model.random(*shape) for _ in range(3))
    two = model.weight(2.0)
    if form == "powers":
        model.add("Add", model.add("Add", model.add("Mul", a, model.add("Pow", x, two)), model.add("Mul", b, x)), c)
    elif form == "Horner":
        model.add("Add", model.add("Mul", model.add("Add", model.add("Mul", x, a), b), x), c)
    elif form == "factors":
        model.add("Mul", model.add("Sub", x, a), model.add("Add", model.add("Neg", x), b))
    elif form == "difference":
        model.add("Sub", c, model.add("Sub", model.add("Mul", x, x), model.add("Mul", x, b)))
    elif form == "no square at all":
        model.add("Sub", model.add("Mul", x, a), model.add("Mul", b, x))


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("form", ["powers", "Horner", "factors", "difference", "no square at all"])
def test_a_quadratic_activation_however_it_is_written(tmp_path: Path, form: str, rank: int) -> None:
    model = Model()
    model.then("Conv", model.random(3, 2, 3, 3))
    if rank == 2:
        model.then("Flatten").then("Gemm", model.random(90, 3))
    quadratic(model, form, 3, rank)
    model.head(90 if rank == 4 else 3).check(tmp_path, 0 if form.startswith("no") else 1)


def test_a_scalar_quadratic_after_flatten(tmp_path: Path) -> None:
    model = Model()
    model.then("Conv", model.random(3, 2, 3, 3)).then("Flatten")
    x = model.last
    model.add("Add", model.add("Mul", x, x), model.add("Mul", x, model.weight(0.5)))
    model.then("Gemm", model.random(90, 2)).check(tmp_path, 1)


def test_a_bias_of_its_own_makes_no_activation_of_a_square(tmp_path: Path) -> None:
    model = Model()
    model.then("Conv", model.random(3, 2, 3, 3)).then("Add", model.weight(np.full((1, 3, 1, 1), 1000.0)))
    network = model.square().head(90).check(tmp_path, 1)
    # Doubled channels would show here.
    assert network.linears[0].outputs == 90


def test_squares_of_squares_and_a_quadratic_at_the_end(tmp_path: Path) -> None:
    model = Model()
    model.then("Conv", model.random(3, 2, 7, 8)).square().then("Mul", model.weight(0.5)).square()
    model.then("Flatten").then("Gemm", model.random(3, 2))
    quadratic(model, "powers", 2, 2)
    model.check(tmp_path, 3)


def test_constants_may_be_nodes(tmp_path: Path) -> None:
    model = Model()
    value = numpy_helper.from_array(np.float32(model.rng.normal(size=(3, 112))), "k")
    model.then("Flatten")
    flat, weight = model.last, model.add("Constant", value=value)
    half = model.add("Constant", value_float=0.5)
    model.add("Gemm", flat, weight, transB=1)
    model.then("Mul", half).square().then("Gemm", model.random(3, 2)).check(tmp_path, 1)


def refused(model: Model, folder: Path, words: str) -> None:
    with pytest.raises(InteropError, match=words):
        read_onnx(model.save(folder))


SIMPLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "Relu": ("Relu", {}, r"'Relu relu0' does not fold; use Mul\(x, x\)"),
    "Sigmoid": ("Sigmoid", {}, r"use Mul\(x, x\)"),
    "Softmax": ("Softmax", {}, "'Softmax softmax0'.*no node at all"),
    "MaxPool": ("MaxPool", {"kernel_shape": [2, 2]}, "use AveragePool"),
    "Transpose": ("Transpose", {"perm": [0, 2, 3, 1]}, "channels first"),
    "another op": ("Abs", {}, "'Abs abs0' does not fold; use Conv, AveragePool"),
    "padded mean": ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, "count_include_pad=1"),
    "rounded up": ("AveragePool", {"kernel_shape": [2, 2], "ceil_mode": 1}, "use ceil_mode 0"),
    "uneven stride": ("AveragePool", {"kernel_shape": [2, 2], "strides": [1, 2]}, "the same in both directions"),
    "other axes": ("ReduceMean", {"axes": [1]}, "expected height and width"),
    "all axes": ("ReduceMean", {}, "expected height and width"),
    "flatten all": ("Flatten", {"axis": 0}, "use axis=1"),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_nodes_that_do_not_fold_are_refused_by_name(tmp_path: Path, name: str) -> None:
    op, attributes, words = SIMPLE[name]
    refused(Model().then(op, **attributes), tmp_path, words)


def test_convolutions_of_other_kinds_are_refused(tmp_path: Path) -> None:
    model = Model()
    refused(model.then("Conv", model.random(2, 1, 3, 3), group=2), tmp_path, "'Conv conv0' is grouped")
    model = Model()
    refused(model.then("Conv", model.random(2, 2, 3, 3), dilations=[2, 2]), tmp_path, "use dilations of 1")
    model = Model()
    refused(model.then("Conv", model.random(2, 3, 3, 3)), tmp_path, "'Conv conv0': convolution reads 3 channels")
    model = Model()
    refused(model.then("Gemm", model.random(112, 2)), tmp_path, "'Gemm gemm0' reads a feature map; put Flatten")
    model = Model().then("Flatten")
    refused(model.then("Gemm", model.random(111, 2)), tmp_path, "reads 111 values but gets 112")


def test_what_is_no_chain_is_refused(tmp_path: Path) -> None:
    model = Model(("N", 2, 7, 7))
    start = model.last
    model.then("Conv", model.random(2, 2, 3, 3), pads=[1, 1, 1, 1])
    model.add("Add", model.last, start)
    refused(model, tmp_path, r"'Add add1' joins a branch")

    model = Model()
    model.then("Conv", model.random(2, 2, 3, 3))
    model.add("Add", model.random(2), model.random(2))
    refused(model, tmp_path, "computes with constants alone")


def test_arithmetic_beyond_the_family_is_refused(tmp_path: Path) -> None:
    model = Model()
    model.then("Conv", model.random(2, 2, 3, 3))
    x = model.last
    refused(model.then("Pow", model.weight(3.0)), tmp_path, r"use Pow\(x, 2\)")
    model.nodes.pop()
    model.add("Mul", model.add("Mul", x, x), x)
    refused(model, tmp_path, "degree beyond 2")

    model = Model()
    model.then("Conv", model.random(2, 2, 3, 3)).then("Mul", model.random(2, 5, 6))
    refused(model, tmp_path, "'Mul mul1' has a constant that differs from place to place")

    model = Model()
    model.then("Conv", model.random(2, 2, 3, 3)).then("Add", model.random(5, 1, 1))
    refused(model, tmp_path, r"a constant of shape \(5, 1, 1\) for values of shape \(1, 2, 5, 6\)")

    model = Model()
    refused(model.then("Div", model.weight(0.0)), tmp_path, "divides by zero")


def test_a_square_at_either_end_is_refused(tmp_path: Path) -> None:
    refused(Model().square().head(112), tmp_path, "nothing linear stands before 'Gemm")
    refused(Model().head(112).square(), tmp_path, "ends in a Square")


@pytest.mark.parametrize("shape", [("N", 2, "H", 8), ("N", 2, 7), (4, 2, 7, 8)])
def test_inputs_of_other_shapes_are_refused(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    refused(Model(shape).then("Identity"), tmp_path, "all but N fixed")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07garbage")
    with pytest.raises(InteropError, match="no valid ONNX model"):
        read_onnx(path)
    with pytest.raises(InteropError, match="No such file"):
        read_onnx(tmp_path / "none.onnx")

    model = Model()
    model.then("Conv", model.random(2, 2, 3, 3))
    proto = model.proto()
    proto.graph.initializer[0].raw_data = b"1234"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InteropError, match=r"w0|no valid ONNX model"):
        read_onnx(path)

    proto = model.proto()
    onnx.save(proto, path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    with pytest.raises(InteropError, match="'w0' in another file"):
        read_onnx(path)

    model = Model()
    model.then("Conv", model.weight(np.full((2, 2, 3, 3), np.nan)))
    refused(model, tmp_path, "'Conv conv0': .*not finite")


def test_an_operator_of_another_domain_is_refused(tmp_path: Path) -> None:
    model = Model()
    model.nodes.append(helper.make_node("Conv", ["x"], ["y"], name="c", domain="other"))
    model.last = "y"
    proto = model.proto()
    proto.opset_import.append(helper.make_opsetid("other", 1))
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(InteropError, match="'Conv c' does not fold"):
        read_onnx(tmp_path / "model.onnx")


def whole_model() -> bytes:
    """Return a model with every kind of node that is read."""
    model = Model(("N", 1, 5, 5))
    model.then("Conv", model.random(2, 1, 3, 3), model.random(2), pads=[1, 1, 1, 1], strides=[2, 2]).square()
    model.then("BatchNormalization", *(model.weight([1.0, 2.0]) for _ in range(4)))
    model.then("AveragePool", kernel_shape=[2, 2]).then("Dropout")
    quadratic(model, "Horner", 2)
    content: bytes = model.head(8, 2).proto().SerializeToString()
    return content


WHOLE = whole_model()


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_an_altered_file_is_read_or_refused_and_nothing_else(changes: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for place, byte in changes:
        content[place] = byte
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Numbers of any size may overflow on the way to being refused.
        warnings.simplefilter("ignore", RuntimeWarning)
        (Path(folder) / "model.onnx").write_bytes(content)
        try:
            found = read_onnx(Path(folder) / "model.onnx")
        except InteropError:
            return
        CollapsedNetwork(found.input_shape, found.linears)
