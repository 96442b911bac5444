"""CryptoNets' files: a network that was written by hand is what it says, and nothing else is read."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.errors import InteropError
from hemacrypt.interop.cryptonets import Geometry, public_geometry, read_cryptonets, write_cryptonets
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from tests.hemacrypt.setups import Setup

Array = npt.NDArray[np.float64]

# A network as microsoft/CryptoNets would declare it, small: 6x6 grey pixels over 8; two maps of 3x3 with stride 2 and
# one zero below and to the right ("Upperpadding"), whose last weight is the bias; square; a dense layer kept with the
# weights of an input together; square; a dense layer.
WEIGHTS = """\
0.5,-0.25,0.125, 0.75,0,-0.5, 0.25,0.375,-0.125, 0.0625,-0.5,0.25,0.5, -0.25,0.125,0.625, 0,-0.375,0.25, -0.1875
{second}
0.5,-0.25,0.125,-0.75,0.25,0.375
"""
BIASES = "0.25,-0.125,0.0625\n-0.5,0.75\n"
GEOMETRY = {
    "input_shape": [1, 6, 6],
    "scale": 0.125,
    "layers": [
        {"kind": "convolution", "maps": 2, "kernel": [3, 3], "stride": 2, "padding": [[0, 1], [0, 1]],
         "bias": "weights"},
        {"kind": "square"},
        {"kind": "dense", "outputs": 3, "order": "inputs-first"},
        {"kind": "square"},
        {"kind": "dense", "outputs": 2},
    ],
}  # fmt: skip
SECOND = [((7 * k) % 11 - 5) / 16 for k in range(18 * 3)]


def by_hand(image: Array) -> list[float]:
    """Evaluate the network above with loops over its numbers, in the order in which CryptoNets' programs take them."""
    first, _, third = ([float(number) for number in line.split(",")] if "{" not in line else []
                       for line in WEIGHTS.splitlines())  # fmt: skip
    padded = np.zeros((7, 7))
    padded[:6, :6] = image / 8
    hidden = []
    for m, y, x in itertools.product(range(2), range(3), range(3)):
        total = first[10 * m + 9]
        for i, j in itertools.product(range(3), range(3)):
            total += first[10 * m + 3 * i + j] * padded[2 * y + i, 2 * x + j]
        hidden.append(total**2)
    middle = []
    for n, bias in enumerate((0.25, -0.125, 0.0625)):
        middle.append((bias + sum(SECOND[3 * k + n] * value for k, value in enumerate(hidden))) ** 2)
    return [bias + sum(third[3 * n + k] * middle[k] for k in range(3)) for n, bias in enumerate((-0.5, 0.75))]


def write(directory: Path, name: str = "Tiny{}.csv", **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    weights, biases = (
        ("all_weights.csv", "all_bias.csv") if name == "all" else (name.format(p) for p in ("Weight", "Bias"))
    )
    text = WEIGHTS.format(second=",".join(map(str, SECOND)))
    (directory / weights).write_text(str(changes.get("weights", text)))
    (directory / biases).write_text(str(changes.get("biases", BIASES)))
    (directory / "geometry.json").write_text(json.dumps(GEOMETRY | dict(changes.get("geometry", {}))))  # type: ignore[call-overload]
    return directory


def images(n: int = 6) -> Array:
    return np.random.default_rng(4).integers(0, 9, (n, 6, 6)).astype(np.float64)


def imported(directory: Path) -> CollapsedNetwork:
    found = read_cryptonets(directory)
    assert found.scale is not None
    return CollapsedNetwork(found.input_shape, found.linears, (0.0, 8 * found.scale))


@pytest.mark.parametrize("name", ["Tiny{}.csv", "all"])
def test_a_network_written_by_hand_equals_its_evaluation_by_hand(tmp_path: Path, name: str) -> None:
    network = imported(write(tmp_path, name))
    assert [type(layer) for layer in network.linears] == [Convolution, Dense, Dense]
    expected = [by_hand(image) for image in images()]
    np.testing.assert_allclose(network(images()[:, None] / 8), expected, rtol=1e-13)


def test_it_runs_encrypted_within_its_bound(tmp_path: Path) -> None:
    network = imported(write(tmp_path))
    network = network.calibrated(np.random.default_rng(1).integers(0, 9, (200, 1, 6, 6)) / 8)
    setup = Setup.of(network)
    for image in images(2):
        got = setup.predict(image[None, None] / 8)[0]
        assert np.abs(got - by_hand(image)).max() < setup.plan.public.logit_error_bound


def test_windows_line_ends_spaces_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    plain = imported(write(tmp_path / "plain"))
    text = "\ufeff" + WEIGHTS.format(second=", ".join(map(str, SECOND))).replace("\n", "\r\n") + "\r\n"
    odd = imported(write(tmp_path / "odd", weights=text))
    np.testing.assert_array_equal(odd(images()[:, None]), plain(images()[:, None]))


def test_a_network_that_reads_columns_first_is_turned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel, dense, bias = rng.normal(size=(2, 3, 3, 2)), rng.normal(size=(2, 2 * 3 * 3)), rng.normal(size=2)
    (tmp_path / "Weight.csv").write_text("\n".join(",".join(map(repr, w.ravel().tolist())) for w in (kernel, dense)))
    (tmp_path / "Bias.csv").write_text("\n".join(",".join(map(repr, bias.tolist())) for _ in range(2)))
    layers = [
        {"kind": "convolution", "maps": 2, "kernel": [3, 2], "stride": 2, "padding": [[1, 0], [0, 0]]},
        {"kind": "square"},
        {"kind": "dense", "outputs": 2},
    ]
    plain = Geometry.model_validate({"input_shape": [3, 6, 7], "layers": layers})
    turned = read_cryptonets(tmp_path, plain.model_copy(update={"columns_first": True}))
    straight = read_cryptonets(tmp_path, plain)
    assert turned.columns_first
    assert turned.input_shape == (3, 7, 6)
    x = rng.normal(size=(4, 3, 6, 7))
    np.testing.assert_allclose(
        CollapsedNetwork((3, 7, 6), turned.linears)(x.swapaxes(2, 3)), CollapsedNetwork((3, 6, 7), straight.linears)(x)
    )


def test_pooling_has_no_line_and_counts_its_padding(tmp_path: Path) -> None:
    (tmp_path / "PoolWeight.csv").write_text("1,2,3,4,5,6,7,8\n")
    geometry = Geometry.model_validate(
        {
            "input_shape": [2, 3, 3],
            "layers": [
                {"kind": "mean-pool", "kernel": [2, 2], "stride": 2, "padding": [[0, 1], [0, 1]]},
                {"kind": "dense", "outputs": 1, "bias": "none"},
            ],
        }
    )
    found = read_cryptonets(tmp_path, geometry)
    x = np.arange(18.0).reshape(1, 2, 3, 3)
    means = [
        x[0, c, y : y + 2, z : z + 2].sum() / 4 for c, y, z in itertools.product(range(2), (0, 2), (0, 2))
    ]  # fmt: skip
    assert CollapsedNetwork((2, 3, 3), found.linears)(x)[0, 0] == pytest.approx(np.dot(means, range(1, 9)))


def test_pooling_gives_the_numbers_of_cryptonets_own_test(tmp_path: Path) -> None:
    """``EvenPool`` in microsoft/CryptoNets, NeuralNetworksTest/LayersTest.cs: 48 values counted up, windows of 2x2."""
    (tmp_path / "EvenWeight.csv").write_text(",".join(str(float(i == j)) for i in range(12) for j in range(12)))
    pool = {"kind": "mean-pool", "kernel": [2, 2], "stride": 2}
    geometry = {"input_shape": [3, 4, 4], "layers": [pool, {"kind": "dense", "outputs": 12, "bias": "none"}]}
    found = read_cryptonets(tmp_path, Geometry.model_validate(geometry))
    expected = [2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5, 34.5, 36.5, 42.5, 44.5]
    np.testing.assert_array_equal(CollapsedNetwork((3, 4, 4), found.linears)(np.arange(48.0))[0], expected)


def test_what_we_write_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    bordered = Convolution(rng.normal(size=(2, 3, 3, 3)), rng.normal(size=(2, 3, 3)), (3, 5, 5), 2, ((1, 1), (1, 1)))
    plain = Convolution(rng.normal(size=(3, 1, 2, 2)), rng.normal(size=3), (1, 6, 6), 1, ((0, 0), (0, 0)))
    network = CollapsedNetwork((1, 6, 6), (plain, bordered, Dense(rng.normal(size=(2, 18)), rng.normal(size=2))))
    write_cryptonets(network, tmp_path / "out", 0.25, ("no", "yes"))
    found = read_cryptonets(tmp_path / "out")
    assert (found.scale, found.labels, found.input_shape) == (0.25, ("no", "yes"), (1, 6, 6))
    x = rng.normal(size=(3, 1, 6, 6))
    np.testing.assert_array_equal(found.linears[0](x.reshape(3, -1)), plain(x.reshape(3, -1)))
    np.testing.assert_allclose(CollapsedNetwork((1, 6, 6), found.linears)(x), network(x), rtol=1e-12)
    with pytest.raises(InteropError, match="is not empty"):
        write_cryptonets(network, tmp_path / "out", 1.0, ("no", "yes"))


def test_the_public_networks_have_the_shapes_that_their_programs_say() -> None:
    for name, maps in (("cifar", ((83, 14), (112, 7))), ("mnist-large", ((83, 12), (163, 4)))):
        geometry = public_geometry(name)
        _, size, _ = geometry.input_shape
        shapes = []
        for layer in geometry.layers:
            if layer.kind == "convolution":
                size = (size + sum(layer.padding[0]) - layer.kernel[0]) // layer.stride + 1
                shapes.append((layer.maps, size))
        assert tuple(shapes) == maps
        assert geometry.labels is not None
        assert len(geometry.labels) == 10


def test_a_public_name_needs_no_geometry_file(tmp_path: Path) -> None:
    (tmp_path / "MnistLargeWeight.csv").write_text("1,2,3\n")
    (tmp_path / "MnistLargeBias.csv").write_text("1\n")
    with pytest.raises(InteropError, match=r"line 1: 3 numbers, layer 0, convolution needs 5,312"):
        read_cryptonets(tmp_path)


REFUSED = {
    "too few": ({"weights": "1,2,3\n"}, r"TinyWeight\.csv, line 1: 3 numbers, layer 0, convolution needs 20"),
    "a line too few": ({"biases": "0.25,-0.125,0.0625\n"}, r"TinyBias\.csv, line 2: .* has no numbers for layer 4"),
    "a line too many": ({"biases": BIASES + "1,2\n"}, r"TinyBias\.csv has more than the 2 lines"),
    "no number": ({"biases": "0.25,x,0\n1,2\n"}, r"TinyBias\.csv, line 1: not a number"),
    "an empty field": ({"biases": "0.25,,0\n1,2\n"}, r"line 1: not a number"),
    "not finite": ({"biases": "0.25,1e999,0\n1,2\n"}, r"line 1: number 2 is not finite"),
    "bytes": ({"biases": "\x00\x01,\x02,\x03\n"}, r"line 1: not a number"),
    "endless numbers": ({"biases": "1" * 9999 + ",2,3\n"}, r"line 1: .* numbers, layer 2, dense needs 3"),
    "unknown layer": ({"geometry": {"layers": [{"kind": "relu"}]}}, r"geometry: layers.0: .*'square'"),
    "no layer": ({"geometry": {"layers": []}}, r"geometry: layers"),
    "unknown field": ({"geometry": {"strides": 2}}, r"geometry: strides: Extra inputs"),
    "kernel too large": (
        {"geometry": {"layers": [{"kind": "convolution", "maps": 1, "kernel": [1000000, 1000000]}]}},
        r"kernel larger than its map",
    ),
    "convolution of a vector": (
        {"geometry": {"layers": [{"kind": "dense", "outputs": 2, "bias": "none"},
                                 {"kind": "convolution", "maps": 1, "kernel": [1, 1]}],
                      "input_shape": [1, 1, 10]}},
        r"layer 1, convolution' stands after a dense layer",
    ),
    "square at the end": (
        {"geometry": {"layers": [*GEOMETRY["layers"], {"kind": "square"}]}},  # type: ignore[misc]
        r"ends in a Square",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_do_not_fit_are_refused_by_line(tmp_path: Path, name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(InteropError, match=words):
        read_cryptonets(write(tmp_path, **changes))  # type: ignore[arg-type]


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match="found: none"):
        read_cryptonets(tmp_path)
    (tmp_path / "AWeight.csv").write_text("1\n")
    with pytest.raises(InteropError, match=r"write a geometry\.json"):
        read_cryptonets(tmp_path)
    (tmp_path / "geometry.json").write_text('{"input_shape": [1, 1, 1], "layers": [{"kind": "dense", "outputs": 1}]}')
    with pytest.raises(InteropError, match=r"ABias\.csv: No such file"):
        read_cryptonets(tmp_path)
    (tmp_path / "BWeight.csv").write_text("1\n")
    with pytest.raises(InteropError, match=r"found: AWeight\.csv, BWeight\.csv"):
        read_cryptonets(tmp_path)
    (tmp_path / "ABias.csv").write_text("1\n")
    assert len(read_cryptonets(tmp_path / "AWeight.csv").linears) == 1
    with pytest.raises(InteropError, match="not named"):
        read_cryptonets(tmp_path / "ABias.csv")


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(
    st.sampled_from(["TinyWeight.csv", "TinyBias.csv", "geometry.json"]), st.binary(min_size=1, max_size=4), st.data()
)
def test_an_altered_file_is_read_or_refused_and_nothing_else(name: str, bytes_: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder)) / name
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:place] + bytes_ + content[place + len(bytes_) :])
        try:
            found = read_cryptonets(Path(folder))
        except InteropError:
            return
        CollapsedNetwork(found.input_shape, found.linears)
