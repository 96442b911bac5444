"""The bundle on disk: a faithful round trip, and nothing altered is ever read."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.errors import BundleError
from hemacrypt.model.bundle import BIAS_CSV, CARD, MANIFEST, TENSORS, WEIGHTS_CSV, Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.model.preprocess import Preprocessing

FILES = (MANIFEST, TENSORS, WEIGHTS_CSV, BIAS_CSV)
PREPROCESSING = Preprocessing(image_size=10, crop=8, block=2)
Change = Callable[[dict[str, Any]], None]


def network() -> CollapsedNetwork:
    rng = np.random.default_rng(1)
    convolution = Convolution(rng.normal(size=(2, 3, 3, 3)), rng.normal(size=2), (3, 4, 4), 2, ((0, 1), (1, 0)))
    linears = (convolution, Dense(rng.normal(size=(3, convolution.outputs)), rng.normal(size=3)))
    return CollapsedNetwork((3, 4, 4), linears, PREPROCESSING.input_range).calibrated(rng.random((4, 3, 4, 4)))


def make(**changes: Any) -> Bundle:
    settings: dict[str, Any] = {
        "name": "tiny",
        "labels": ("a", "b", "ç"),
        "preprocessing": PREPROCESSING,
        "description": "größer als nötig",
        "training": {"seed": 7, "rates": [0.25, 0.1], "nested": {"nothing": None}},
        "data": {"fingerprint": "00ff"},
        "metrics": {"accuracy": 0.875, "n": 8},
    }
    return Bundle.create(network(), **(settings | changes))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _written(tmp_path_factory.mktemp("pristine") / "bundle")


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def _written(directory: Path) -> Path:
    make().write(directory)
    return directory


def reseal(directory: Path, change: Change = lambda _: None) -> None:
    """Change the manifest, then make all digests fit, as a forger would."""
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    for name in content["digests"]:
        content["digests"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    change(content)
    content["digest"] = ""
    bare = {key: value for key, value in content.items() if key != "digest"}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    content["digest"] = hashlib.sha256(canonical).hexdigest()
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def replace_tensors(directory: Path, **changes: npt.NDArray[Any] | None) -> None:
    tensors = safetensors.numpy.load_file(directory / TENSORS)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    (directory / TENSORS).write_bytes(safetensors.numpy.save(tensors))


def test_a_bias_that_depends_on_the_position_survives_the_round_trip(tmp_path: Path) -> None:
    first, second = network().linears
    assert isinstance(first, Convolution)
    bias = np.random.default_rng(5).normal(size=first.output_shape).astype(np.float32)
    changed = CollapsedNetwork((3, 4, 4), (replace(first, bias=bias), second), PREPROCESSING.input_range)
    preprocessing = {"labels": ("a", "b", "c"), "preprocessing": PREPROCESSING}
    read = Bundle.create(changed, name="bordered", **preprocessing).write(tmp_path / "bundle").network
    np.testing.assert_array_equal(read.linears[0].bias, bias)
    line = (tmp_path / "bundle" / BIAS_CSV).read_text().splitlines()[0]
    np.testing.assert_array_equal(np.array(line.split(","), dtype=np.float32), bias.ravel())
    reference = changed(np.ones((1, 3, 4, 4)))
    np.testing.assert_allclose(read(np.ones((1, 3, 4, 4))), reference, rtol=1e-5, atol=1e-5)


def test_a_weight_beyond_float32_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    first, second = network().linears
    assert isinstance(second, Dense)
    large = CollapsedNetwork((3, 4, 4), (first, Dense(second.weight * 1e39, second.bias)), PREPROCESSING.input_range)
    bundle = Bundle.create(large, name="large", labels=("a", "b", "c"), preprocessing=PREPROCESSING)
    with pytest.raises(BundleError, match=r"layers\.1\.weight.*float32"):
        bundle.write(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Bad Name", "", "über", "a" * 65, "../up"])
def test_what_cannot_be_a_name_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(BundleError, match="cannot be one; a name has lower-case letters"):
        make(name=name)


def test_round_trip_keeps_the_network_in_float32_and_the_manifest(tmp_path: Path) -> None:
    original = make()
    returned = original.write(tmp_path / "deep" / "bundle")
    read = Bundle.read(tmp_path / "deep" / "bundle")
    assert read.manifest == returned.manifest
    assert read.digest == returned.digest
    assert len(read.digest) == 64
    for field in ("name", "description", "labels", "preprocessing", "layers", "training", "data", "metrics"):
        assert getattr(read.manifest, field) == getattr(original.manifest, field)
    first, second = read.network.linears
    source, target = original.network.linears
    assert isinstance(first, Convolution)
    assert isinstance(source, Convolution)
    assert isinstance(second, Dense)
    assert isinstance(target, Dense)
    np.testing.assert_array_equal(first.kernel, source.kernel.astype(np.float32))
    np.testing.assert_array_equal(second.weight, target.weight.astype(np.float32))
    np.testing.assert_array_equal(second.bias, target.bias.astype(np.float32))
    assert (first.stride, first.padding, first.input_shape) == (source.stride, source.padding, source.input_shape)
    assert read.network.magnitudes is not None
    assert original.network.magnitudes is not None
    for got, want in zip(read.network.magnitudes, original.network.magnitudes, strict=True):
        np.testing.assert_array_equal(got, want.astype(np.float32))
    assert read.network.input_range == PREPROCESSING.input_range


def test_writing_twice_gives_the_same_bytes(pristine: Path, tmp_path: Path) -> None:
    again = _written(tmp_path / "again")
    assert {name: (again / name).read_bytes() for name in FILES} == {
        name: (pristine / name).read_bytes() for name in FILES
    }


def test_a_bundle_without_magnitudes_stays_without(tmp_path: Path) -> None:
    plain = network()
    bare = CollapsedNetwork(plain.input_shape, plain.linears, plain.input_range)
    bundle = Bundle.create(bare, name="bare", labels=("a", "b", "c"), preprocessing=PREPROCESSING)
    assert bundle.write(tmp_path / "bundle").network.magnitudes is None


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    st.dictionaries(st.text('abcä"\\\n€', max_size=5), json_values, max_size=4), st.text("aé€\U0001f9ec\n", max_size=5)
)
def test_any_training_settings_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, training: dict[str, Any], description: str
) -> None:
    directory = tmp_path_factory.mktemp("json") / "bundle"
    read = make(training=training, description=description).write(directory)
    assert read.manifest.training == training
    assert read.manifest.description == description
    shutil.rmtree(directory.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_metrics_that_json_cannot_hold_become_null_in_a_readable_bundle(tmp_path: Path, value: float) -> None:
    make(metrics={"auc": value, "n": 8}).write(tmp_path / "bundle")
    assert Bundle.read(tmp_path / "bundle").manifest.metrics == {"auc": None, "n": 8}
    assert b"NaN" not in (tmp_path / "bundle" / MANIFEST).read_bytes()


def _flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["start", "middle", "end"])
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_is_refused(bundle: Path, name: str, place: str, bit: int) -> None:
    size = (bundle / name).stat().st_size
    _flip(bundle / name, {"start": 0, "middle": size // 2, "end": size - 1}[place], bit)
    with pytest.raises(BundleError):
        Bundle.read(bundle)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused(pristine: Path, name: str, place: float, bit: int) -> None:
    path = pristine / name
    position = int(place * path.stat().st_size)
    _flip(path, position, bit)
    try:
        with pytest.raises(BundleError):
            Bundle.read(pristine)
    finally:
        _flip(path, position, bit)
    Bundle.read(pristine)


def test_no_byte_of_the_manifest_can_change(bundle: Path) -> None:
    path = bundle / MANIFEST
    for position in range(0, path.stat().st_size, 2):
        _flip(path, position, position // 2 % 8)
        with pytest.raises(BundleError):
            Bundle.read(bundle)
        _flip(path, position, position // 2 % 8)
    Bundle.read(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, -1])
def test_a_truncated_file_is_refused(bundle: Path, name: str, left: int) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:left])
    with pytest.raises(BundleError, match=name):
        Bundle.read(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tail", [b"\n", b" ", b"\0"])
def test_appended_bytes_are_refused(bundle: Path, name: str, tail: bytes) -> None:
    with (bundle / name).open("ab") as file:
        file.write(tail)
    with pytest.raises(BundleError, match=name):
        Bundle.read(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing"):
        Bundle.read(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_the_place_of_a_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    (bundle / name).mkdir()
    with pytest.raises(BundleError, match=name):
        Bundle.read(bundle)


def test_an_extra_file_is_refused(bundle: Path) -> None:
    (bundle / "weights.pkl").write_bytes(b"")
    with pytest.raises(BundleError, match="weights\\.pkl"):
        Bundle.read(bundle)


@pytest.mark.parametrize(("name", "size"), [(MANIFEST, 5 << 20), (TENSORS, 2 << 30), (BIAS_CSV, 65 << 20)])
def test_a_huge_file_is_refused_unread(bundle: Path, name: str, size: int) -> None:
    with (bundle / name).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(BundleError, match="expected at most"):
        Bundle.read(bundle)


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a directory"):
        Bundle.read(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(BundleError, match="not a directory"):
        Bundle.read(tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"9" * 5000,
        b'{"schema_version": 1}',
        b'{"schema_version": true}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
    ],
    ids=["empty", "list", "object", "null", "binary", "digits", "bare", "true", "nested-list", "nested-object"],
)
def test_anything_but_a_manifest_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.read(bundle)


def test_a_reformatted_manifest_is_refused_although_it_says_the_same(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    (bundle / MANIFEST).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(BundleError, match="was changed"):
        Bundle.read(bundle)


def test_changed_tensors_with_a_stale_manifest_digest_are_refused(bundle: Path) -> None:
    replace_tensors(bundle, layers__1__bias=np.zeros(3, dtype=np.float32))
    content = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    content["digests"][TENSORS] = hashlib.sha256((bundle / TENSORS).read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(BundleError, match="digest does not match"):
        Bundle.read(bundle)


def test_the_forgery_of_these_tests_is_read_when_it_changes_nothing(bundle: Path, pristine: Path) -> None:
    """Without this the refusals below could have any reason."""
    reseal(bundle)
    assert (bundle / MANIFEST).read_bytes() == (pristine / MANIFEST).read_bytes()
    reseal(bundle, lambda content: content.update(description="other"))
    assert Bundle.read(bundle).manifest.description == "other"
    assert Bundle.read(bundle).digest != Bundle.read(pristine).digest


def _update(**changes: object) -> Change:
    return lambda content: content.update(changes)


def _first_layer(**changes: object) -> Change:
    return lambda content: content["layers"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_update(schema_version=2), "schema 2"),
        (_update(schema_version=0), "schema 0"),
        (_update(schema_version="1"), "schema 1"),
        (_update(surprise=1), "no manifest"),
        (_update(name="../up"), "no manifest"),
        (_update(labels=["a", "b"]), "2 labels for 3 logits"),
        (_update(labels=["a", "b", "c", "d"]), "4 labels for 3 logits"),
        (_update(layers=[]), "disagree|no manifest|no affine map"),
        (_update(digests={}), "was changed"),
        (lambda content: content["digests"].pop(BIAS_CSV), BIAS_CSV),
        (lambda content: content["layers"].pop(), "labels|disagree"),
        (lambda content: content["layers"].append(content["layers"][1]), "disagree"),
        (lambda content: content["layers"].reverse(), "disagree"),
        (lambda content: content["layers"][1].update(inputs=9), "disagree"),
        (_first_layer(stride=1), "disagree"),
        (_first_layer(stride=0), "no manifest"),
        (_first_layer(padding=[[0, -1], [1, 0]]), "disagree"),
        (_first_layer(input_shape=[3, 8, 2]), "disagree"),
        (_first_layer(input_shape=[3, 0, 4]), "disagree"),
        (_first_layer(kernel_size=[3, 4]), "disagree"),
        (_first_layer(kind="recurrent"), "no manifest"),
        (lambda content: content["preprocessing"].update(block=4), "disagree"),
        (lambda content: content["preprocessing"].update(crop=7), "no manifest"),
    ],
)
def test_a_consistent_manifest_that_contradicts_its_tensors_is_refused(
    bundle: Path, change: Change, message: str
) -> None:
    reseal(bundle, change)
    with pytest.raises(BundleError, match=message):
        Bundle.read(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers__0__weight": None},
        {"layers__1__bias": None},
        {"layers__1__magnitude": None},
        {"layers__1__bias": np.full(3, np.nan, dtype=np.float32)},
        {"layers__1__bias": np.zeros(2, dtype=np.float32)},
        {"layers__1__weight": np.zeros(24, dtype=np.float32)},
        {"layers__0__magnitude": np.full(8, np.inf, dtype=np.float32)},
        {"layers__0__magnitude": np.zeros(7, dtype=np.float32)},
    ],
    ids=["no-weight", "no-bias", "half-magnitudes", "nan", "short", "flat", "infinite", "short-magnitude"],
)
def test_consistent_digests_over_impossible_tensors_are_refused(
    bundle: Path, changes: dict[str, npt.NDArray[Any] | None]
) -> None:
    replace_tensors(bundle, **changes)
    reseal(bundle)
    with pytest.raises(BundleError, match="disagree"):
        Bundle.read(bundle)


def test_tensors_in_no_safetensors_file_are_refused(bundle: Path) -> None:
    (bundle / TENSORS).write_bytes(b"\x80\x04pickled")
    reseal(bundle)
    with pytest.raises(BundleError, match="disagree"):
        Bundle.read(bundle)


def test_labels_must_fit_the_logits() -> None:
    with pytest.raises(BundleError, match="2 labels for 3 logits"):
        make(labels=("a", "b"))


def test_preprocessing_must_fit_the_network() -> None:
    with pytest.raises(BundleError, match=r"\(3, 2, 2\).*\(3, 4, 4\)"):
        make(preprocessing=Preprocessing(image_size=10, crop=8, block=4))


def test_an_older_bundle_is_replaced(bundle: Path) -> None:
    assert make(description="newer").write(bundle).manifest.description == "newer"
    assert sorted(entry.name for entry in bundle.iterdir()) == sorted(FILES)
    assert [entry.name for entry in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("content", [{"notes.txt": b"mine"}, {MANIFEST: b'{"name": "web app"}', "notes.txt": b"mine"}])
def test_a_directory_that_is_no_bundle_is_not_overwritten(tmp_path: Path, content: dict[str, bytes]) -> None:
    directory = tmp_path / "precious"
    directory.mkdir()
    for name, data in content.items():
        (directory / name).write_bytes(data)
    with pytest.raises(BundleError, match="is no bundle"):
        make().write(directory)
    assert {entry.name: entry.read_bytes() for entry in directory.iterdir()} == content


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_bytes(b"mine")
    with pytest.raises(BundleError, match="is no bundle"):
        make().write(tmp_path / "bundle")
    assert (tmp_path / "bundle").read_bytes() == b"mine"


def test_a_file_in_the_place_of_a_parent_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(BundleError, match="cannot write"):
        make().write(tmp_path / "file" / "bundle")


def _failing(method: str, name: str, error: Exception) -> Callable[..., Any]:
    real = getattr(Path, method)

    def fail(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if self.name == name:
            raise error
        return real(self, *arguments, **keywords)

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("method", "name"), [("write_bytes", TENSORS), ("open", BIAS_CSV), ("write_text", MANIFEST)])
def test_a_full_disk_leaves_no_part_of_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, _failing(method, name, FULL))
        with pytest.raises(BundleError, match="No space left"):
            make().write(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_any_other_failure_leaves_no_part_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", _failing("write_text", MANIFEST, RuntimeError("anything")))
        with pytest.raises(RuntimeError, match="anything"):
            make().write(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["write_text", "rename"])
def test_a_failed_replacement_leaves_the_older_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with monkeypatch.context() as patch:
        if method == "rename":
            # Whatever is moved into the place of the bundle does not arrive.
            real = Path.rename

            def fail(self: Path, target: Path) -> Path:
                if Path(target) == bundle and self.name.startswith(".") and (self / MANIFEST).is_file():
                    content = json.loads((self / MANIFEST).read_text(encoding="utf-8"))
                    if content["description"] == "newer":
                        raise FULL
                return real(self, target)

            patch.setattr(Path, "rename", fail)
        else:
            patch.setattr(Path, "write_text", _failing("write_text", MANIFEST, FULL))
        with pytest.raises(BundleError, match="No space left"):
            make(description="newer").write(bundle)
    assert Bundle.read(bundle).manifest.description == make().manifest.description
    assert [entry.name for entry in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("name", "part"), [(WEIGHTS_CSV, "weight"), (BIAS_CSV, "bias")])
def test_csv_holds_one_line_per_layer_with_every_float32_exactly(pristine: Path, name: str, part: str) -> None:
    tensors = safetensors.numpy.load_file(pristine / TENSORS)
    lines = (pristine / name).read_text(encoding="ascii").splitlines()
    assert len(lines) == 2
    for index, line in enumerate(lines):
        parsed = np.array([float(cell) for cell in line.split(",")]).astype(np.float32)
        np.testing.assert_array_equal(parsed, tensors[f"layers.{index}.{part}"].ravel())


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=48, max_size=48))
def test_csv_brings_back_any_float32(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    directory = tmp_path_factory.mktemp("csv") / "bundle"
    linear = Dense(np.array(values).reshape(1, 48), np.zeros(1))
    Bundle.create(CollapsedNetwork((3, 4, 4), (linear,)), name="any", labels=("a",), preprocessing=PREPROCESSING).write(
        directory
    )
    parsed = [float(cell) for cell in (directory / WEIGHTS_CSV).read_text(encoding="ascii").split(",")]
    np.testing.assert_array_equal(np.array(parsed).astype(np.float32), linear.weight[0].astype(np.float32))
    shutil.rmtree(directory.parent)


def test_large_networks_go_without_text_and_a_planted_one_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wide = Dense(rng.normal(size=(1000, 1020)), np.zeros(1000))
    linears = (Dense(rng.normal(size=(1020, 48)), np.zeros(1020)), wide)
    large = Bundle.create(
        CollapsedNetwork((3, 4, 4), linears),
        name="any",
        labels=tuple(map(str, range(1000))),
        preprocessing=PREPROCESSING,
    )
    written = large.write(tmp_path / "bundle")
    assert sorted(entry.name for entry in (tmp_path / "bundle").iterdir()) == sorted([MANIFEST, TENSORS])
    np.testing.assert_array_equal(written.network.linears[1].weight, wide.weight.astype(np.float32))
    (tmp_path / "bundle" / WEIGHTS_CSV).write_text("1\n")
    with pytest.raises(BundleError, match=f"{WEIGHTS_CSV} was changed"):
        Bundle.read(tmp_path / "bundle")


# ---------------------------------------------------------------------------------------------- model cards

TEXT = "# tiny\n\nFür niemanden.\n"


@pytest.fixture
def carded(tmp_path: Path) -> Path:
    make(card=TEXT).write(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_card_survives_the_round_trip_and_a_bundle_without_one_has_none(carded: Path, pristine: Path) -> None:
    assert (carded / CARD).read_bytes() == TEXT.encode()
    read = Bundle.read(carded)
    assert read.card == TEXT
    assert set(read.manifest.digests) == {TENSORS, WEIGHTS_CSV, BIAS_CSV, CARD}
    without = Bundle.read(pristine)
    assert without.card == ""
    assert CARD not in without.manifest.digests
    assert without.digest != read.digest
    assert without.with_card(TEXT).write(carded).digest == read.digest


def test_replacing_a_bundle_with_a_card_by_one_without_leaves_none(carded: Path) -> None:
    assert make().write(carded).card == ""
    assert sorted(entry.name for entry in carded.iterdir()) == sorted(FILES)


def test_no_byte_of_a_card_can_change(carded: Path) -> None:
    for position in range(len(TEXT.encode())):
        _flip(carded / CARD, position, position % 8)
        with pytest.raises(BundleError, match=CARD):
            Bundle.read(carded)
        _flip(carded / CARD, position, position % 8)
    assert Bundle.read(carded).card == TEXT


def test_a_card_cannot_be_taken_away_or_replaced_by_a_directory(carded: Path) -> None:
    (carded / CARD).unlink()
    with pytest.raises(BundleError, match=rf"{CARD} is missing"):
        Bundle.read(carded)
    (carded / CARD).mkdir()
    with pytest.raises(BundleError, match=CARD):
        Bundle.read(carded)


def test_a_card_that_the_manifest_does_not_know_is_refused(bundle: Path) -> None:
    (bundle / CARD).write_text(TEXT, encoding="utf-8")
    with pytest.raises(BundleError, match=f"{CARD} was changed.*the manifest says none"):
        Bundle.read(bundle)


def test_a_card_that_is_no_text_or_too_long_is_refused(carded: Path, tmp_path: Path) -> None:
    (carded / CARD).write_bytes(b"# \xff")
    reseal(carded)
    with pytest.raises(BundleError, match="no text in UTF-8"):
        Bundle.read(carded)
    (carded / CARD).write_bytes(b" " * (2 << 20))
    reseal(carded)
    with pytest.raises(BundleError, match="expected at most"):
        Bundle.read(carded)
    with pytest.raises(BundleError, match="expected at most"):
        make(card=" " * (2 << 20)).write(tmp_path / "long")
    assert not (tmp_path / "long").exists()
