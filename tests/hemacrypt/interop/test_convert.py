"""``hemacrypt convert``, as a user calls it: from a file of another program to a bundle that is planned and served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from client_sdk import Client
from hemacrypt.embedded import bundle_path
from hemacrypt.errors import BundleError, ImageError, InteropError
from hemacrypt.interop.cli import convert
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.preprocess import ArrayPreprocessing, Preprocessing
from service.server import Service
from service.settings import Settings
from tests.hemacrypt.interop.test_cryptonets import by_hand, write


def call(*words: object) -> str:
    """Run the command and return what it printed, with line breaks made blanks."""
    app = typer.Typer()
    app.command()(convert)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def pixels(n: int = 50) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 9, (n, 1, 6, 6), dtype=np.uint8)


def test_cryptonets_files_become_a_bundle(tmp_path: Path) -> None:
    source, out = write(tmp_path / "Tiny Net"), tmp_path / "bundle"
    printed = call(source, out, "--range", 0, 8, "--labels", "no, yes", "--description", "by hand")
    assert "worst-case bounds" in printed
    assert "layer 0: conv 3×3/2 1→2" in printed
    bundle = Bundle.read(out)
    assert bundle.manifest.name == "tiny-net"
    assert "rounding the weights to float32 changes logits by at most" in printed
    assert bundle.manifest.labels == ("no", "yes")
    assert bundle.manifest.preprocessing == ArrayPreprocessing(shape=(1, 6, 6), scale=0.125, smallest=0, largest=8)
    assert bundle.network.magnitudes is None
    for image in pixels(3):
        got = bundle.network(bundle.manifest.preprocessing(image))[0]
        np.testing.assert_allclose(got, by_hand(image[0].astype(float)), rtol=1e-5)


def test_calibration_measures_what_the_images_reach(tmp_path: Path) -> None:
    text = "\n".join("\t".join(map(str, [1, *image.ravel()])) for image in pixels())
    (tmp_path / "test.tsv").write_text(text + "\n")
    np.savez(tmp_path / "train.npz", images=pixels())
    bundles = []
    for number, file in enumerate(("test.tsv", "train.npz")):
        out = tmp_path / f"bundle{number}"
        words = ("--range", 0, 8, "--name", "tiny", "--calibrate", tmp_path / file)
        assert "measured on 50 images" in call(write(tmp_path / "net"), out, *words)
        bundles.append(Bundle.read(out))
    assert bundles[0].digest == bundles[1].digest
    expected = bundles[0].network.calibrated(pixels() / 8).magnitudes
    measured = bundles[0].network.magnitudes
    assert measured is not None
    assert expected is not None
    for peak, truth in zip(measured, expected, strict=True):
        np.testing.assert_allclose(peak, truth, rtol=1e-6)
    assert "measured on 7 images" in call(tmp_path / "net", tmp_path / "few", *words, "--limit", 7)
    with pytest.raises(ImageError, match="not between 0 and 4"):
        call(tmp_path / "net", tmp_path / "other", "--range", 0, 4, "--calibrate", tmp_path / "train.npz")


def test_a_bundle_goes_out_as_cryptonets_files_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "geometry beside them" in call("balanced", tmp_path / "files")
    declared = Bundle.read(bundle_path()).manifest.preprocessing
    (tmp_path / "cells.json").write_text(declared.model_dump_json())
    call(tmp_path / "files", tmp_path / "again", "--preprocessing", tmp_path / "cells.json")
    before, after = Bundle.read(bundle_path()), Bundle.read(tmp_path / "again")
    assert isinstance(after.manifest.preprocessing, Preprocessing)
    assert after.manifest.labels == before.manifest.labels
    x = np.random.default_rng(0).random((3, *declared.input_shape))
    np.testing.assert_array_equal(after.network(x), before.network(x))


def onnx_model(path: Path) -> Path:
    weight = numpy_helper.from_array(np.eye(3, 36, dtype=np.float32), "w")
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"], transB=1)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight])), path)
    return path


def test_an_onnx_file_becomes_a_bundle_that_is_served(tmp_path: Path) -> None:
    """Export, plan, serve, encrypt, evaluate, decrypt: a network that reads arrays goes the way of a cell."""
    call(onnx_model(tmp_path / "Model.onnx"), tmp_path / "bundle", "--scale", 0.25, "--range", 0, 8)
    bundle = Bundle.read(tmp_path / "bundle")
    assert bundle.manifest.name == "model"
    assert bundle.manifest.labels == ("0", "1", "2")
    settings = Settings(
        bundles=(tmp_path / "bundle",), host="127.0.0.1", port=0, store=tmp_path / "store", workers=1, engine="seal"
    )
    service = Service(settings)
    service.start()
    try:
        target = f"127.0.0.1:{service.port}"
        with Client(target, "model", key_directory=tmp_path / "keys") as client:
            assert client.preprocessing == bundle.manifest.preprocessing
            client.prepare()
            image = pixels(1)[0]
            answer = client.predict(image)
            with pytest.raises(ImageError, match="not between 0 and 8"):
                client.predict(image * 9 + 9)
    finally:
        service.stop()
    np.testing.assert_allclose(answer.logits, image.ravel()[:3] / 4, atol=answer.error_bound)
    assert answer.label == str(np.argmax(image.ravel()[:3]))


def test_a_false_use_is_refused(tmp_path: Path) -> None:
    net = write(tmp_path / "net")
    (tmp_path / "words.json").write_text("{")
    (tmp_path / "kind.json").write_text(json.dumps({"kind": "array", "shape": [1, 6, 6], "smallest": 9, "largest": 8}))
    for words, message in (
        (
            (tmp_path / "none", tmp_path / "out"),
            "no directory with CryptoNets' files and ends in none of .keras, .onnx",
        ),
        ((onnx_model(tmp_path / "m.onnx"), tmp_path / "out", "--geometry", "cifar"), "describes itself"),
        ((net, tmp_path / "out", "--geometry", "cifar"), "convolution needs 15,936"),
        ((net, tmp_path / "out", "--geometry", tmp_path / "no.json"), "cannot read the geometry"),
        ((net, tmp_path / "out", "--range", 8, 0), "no range"),
        ((net, tmp_path / "out", "--name", "My Net"), "name 'My Net' cannot be one"),
        ((net, tmp_path / "out", "--labels", "a,a"), "two labels are the same"),
        ((net, tmp_path / "out", "--preprocessing", tmp_path / "no.json"), "cannot read"),
        ((net, tmp_path / "out", "--preprocessing", tmp_path / "words.json"), "is no JSON"),
        ((net, tmp_path / "out", "--preprocessing", tmp_path / "kind.json"), "impossible: .*no range"),
    ):
        with pytest.raises((InteropError, BundleError), match=message):
            call(*words)
    with pytest.raises(BundleError, match="3 labels for 2 logits"):
        call(net, tmp_path / "out", "--labels", "a,b,c")
    (tmp_path / "wrong.json").write_text(ArrayPreprocessing(shape=(1, 5, 5)).model_dump_json())
    with pytest.raises(BundleError, match="preprocessing makes"):
        call(net, tmp_path / "out", "--preprocessing", tmp_path / "wrong.json")
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hemacrypt.interop.onnx", None)
    with pytest.raises(InteropError, match=r"pip install 'hemacrypt\[onnx\]'"):
        call(onnx_model(tmp_path / "m.onnx"), tmp_path / "out")
