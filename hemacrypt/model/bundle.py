"""The model bundle: the collapsed network on disk, with everything needed to use it and to trust it.

A bundle is a directory::

    manifest.json         schema version, preprocessing, labels, shapes, training settings, metrics, digests
    tensors.safetensors   kernels, matrices, biases, measured magnitudes (float32)
    all_weights.csv       the paper's form: one line per layer; only of networks of up to a million weights
    all_bias.csv
    MODEL_CARD.md         optional: for people, what the model is for, what it was measured on, what it cannot do

The manifest carries the SHA-256 of every other file and of itself (over its canonical JSON without that field), so
a changed byte anywhere is refused. Nothing in it is executable and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hemacrypt.errors import BundleError, NetworkError
from hemacrypt.model.network import Array, CollapsedNetwork, Convolution, Dense, Linear
from hemacrypt.model.preprocess import AnyPreprocessing

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
WEIGHTS_CSV = "all_weights.csv"
BIAS_CSV = "all_bias.csv"
CARD = "MODEL_CARD.md"
# Largest file that a reader opens: a bundle of the family is far below, a planted file may not exhaust memory.
_LARGEST = {MANIFEST: 4 << 20, TENSORS: 1 << 30, WEIGHTS_CSV: 2 << 30, BIAS_CSV: 64 << 20, CARD: 1 << 20}
# As text a weight takes three times its bytes: large networks go without.
_MOST_WEIGHTS_AS_TEXT = 1_000_000


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DenseRecord(_Record):
    """Geometry of a dense layer; its tensors are ``layers.<i>.weight`` and ``layers.<i>.bias``."""

    kind: Literal["dense"] = "dense"
    inputs: int = Field(ge=1)
    outputs: int = Field(ge=1)


class ConvolutionRecord(_Record):
    """Geometry of a convolution; its tensors are ``layers.<i>.weight`` and ``layers.<i>.bias``."""

    kind: Literal["convolution"] = "convolution"
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, int, int]
    kernel_size: tuple[int, int]
    stride: int = Field(ge=1)
    padding: tuple[tuple[int, int], tuple[int, int]]


LayerRecord = Annotated[DenseRecord | ConvolutionRecord, Field(discriminator="kind")]


class Manifest(_Record):
    """Everything about a bundle that is not a tensor."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    labels: tuple[str, ...]
    preprocessing: AnyPreprocessing
    layers: tuple[LayerRecord, ...] = Field(min_length=1)
    training: dict[str, Any] = Field(default_factory=dict, description="settings that make the run repeatable")
    data: dict[str, Any] = Field(default_factory=dict, description="fingerprint and protocol of the training data")
    metrics: dict[str, Any] = Field(default_factory=dict, description="figures, each with protocol and n")
    digests: dict[str, str] = Field(default_factory=dict, description="SHA-256 of every other file")
    digest: str = Field(default="", description="SHA-256 of this manifest without this field")

    def canonical(self) -> bytes:
        """Return the bytes that ``digest`` is taken over."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def text(self) -> str:
        """Return the exact content of ``manifest.json``."""
        return self.model_dump_json(indent=2) + "\n"

    def sealed(self) -> Manifest:
        """Return the manifest with its own digest filled in."""
        return self.model_copy(update={"digest": hashlib.sha256(self.canonical()).hexdigest()})


class Bundle:
    """A network together with its manifest.

    Attributes
    ----------
    manifest:
        The sealed manifest.
    network:
        The collapsed network.
    card:
        The model card, Markdown; empty where there is none.
    """

    def __init__(self, manifest: Manifest, network: CollapsedNetwork, card: str = "") -> None:
        if len(manifest.labels) != network.outputs:
            raise BundleError(f"{len(manifest.labels)} labels for {network.outputs} logits; give one label per logit")
        if manifest.preprocessing.input_shape != network.input_shape:
            raise BundleError(
                f"preprocessing makes {manifest.preprocessing.input_shape} but the network reads {network.input_shape}"
            )
        self.manifest = manifest
        self.network = network
        self.card = card

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the bundle's whole content, hexadecimal."""
        return self.manifest.digest

    @classmethod
    def create(
        cls,
        network: CollapsedNetwork,
        *,
        name: str,
        labels: tuple[str, ...],
        preprocessing: AnyPreprocessing,
        description: str = "",
        training: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        card: str = "",
    ) -> Bundle:
        """Put a bundle together in memory; `write` seals it.

        Raises
        ------
        BundleError
            If labels or preprocessing do not fit the network, or the name cannot be one.
        """
        try:
            manifest = Manifest(
                name=name,
                description=description,
                labels=labels,
                preprocessing=preprocessing,
                layers=tuple(_record(layer) for layer in network.linears),
                training=dict(training or {}),
                data=dict(data or {}),
                metrics=dict(metrics or {}),
            )
        except ValidationError as error:
            field, given = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["input"]
            raise BundleError(
                f"{field} {given!r} cannot be one; a name has lower-case letters, digits, '.', '_' and '-'"
            ) from None
        return cls(manifest, network, card)

    def with_card(self, card: str) -> Bundle:
        """Return the bundle, in memory, with a model card: Markdown for people, no part of what is computed."""
        return Bundle(self.manifest, self.network, card)

    def write(self, directory: Path) -> Bundle:
        """Write the bundle; the directory appears whole or not at all.

        Tensors are rounded to float32, the precision that they were trained in.

        Returns
        -------
        Bundle
            The bundle with digests, as a reader gets it.

        Raises
        ------
        BundleError
            If the directory exists and is not a bundle, the card is too long, or the disk refuses.
        """
        if directory.exists() and not _is_bundle(directory):
            raise BundleError(f"{directory} exists and is no bundle; name a new directory or remove it first")
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            try:
                self._write_files(staging)
                staging.chmod(0o755)
                written = Bundle.read(staging)
                _move_into_place(staging, directory)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise BundleError(f"cannot write {directory}: {error.strerror}; check space and permissions") from error
        return written

    def _write_files(self, staging: Path) -> None:
        tensors: dict[str, npt.NDArray[np.float32]] = {}
        for index, layer in enumerate(self.network.linears):
            parts = {"weight": layer.weight if isinstance(layer, Dense) else layer.kernel, "bias": layer.bias}
            if self.network.magnitudes is not None:
                parts["magnitude"] = self.network.magnitudes[index]
            tensors |= {f"layers.{index}.{part}": _float32(part, index, values) for part, values in parts.items()}
        (staging / TENSORS).write_bytes(safetensors.numpy.save(tensors))
        small = sum(values.size for values in tensors.values()) <= _MOST_WEIGHTS_AS_TEXT
        texts = {WEIGHTS_CSV: "weight", BIAS_CSV: "bias"} if small else {}
        for name, part in texts.items():
            with (staging / name).open("w", encoding="ascii", newline="\n") as file:
                for index in range(len(self.network.linears)):
                    # Nine significant digits bring every float32 back exactly.
                    file.write(",".join(f"{v:.9g}" for v in tensors[f"layers.{index}.{part}"].ravel()) + "\n")
        if self.card:
            (staging / CARD).write_text(self.card, encoding="utf-8", newline="\n")
        names = (TENSORS, *texts, *([CARD] if self.card else []))
        digests = {name: _sha256(staging / name) for name in names}
        manifest = self.manifest.model_copy(update={"digests": digests}).sealed()
        (staging / MANIFEST).write_text(manifest.text(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Bundle:
        """Read and check a bundle.

        Raises
        ------
        BundleError
            If a file is missing, altered, too large, or of another schema.
        """
        if not directory.is_dir():
            raise BundleError(f"{directory} is not a directory; expected a bundle written by `hemacrypt export`")
        extra = sorted({entry.name for entry in directory.iterdir()} - set(_LARGEST))
        if extra:
            raise BundleError(f"{directory} holds files that no bundle has ({', '.join(extra[:3])}); remove them")
        manifest = _read_manifest(_checked(directory / MANIFEST))
        optional = [
            name for name in (WEIGHTS_CSV, BIAS_CSV, CARD) if name in manifest.digests or (directory / name).exists()
        ]
        for name in (TENSORS, *optional):
            expected, got = manifest.digests.get(name, "none"), _sha256(_checked(directory / name))
            if got != expected:
                raise BundleError(
                    f"{directory / name} was changed: its SHA-256 is {got[:16]}…, the manifest says {expected[:16]}…; "
                    "restore the bundle from its source"
                )
        try:
            tensors = safetensors.numpy.load_file(directory / TENSORS)
            network = CollapsedNetwork(
                input_shape=manifest.preprocessing.input_shape,
                linears=tuple(_layer(i, record, tensors) for i, record in enumerate(manifest.layers)),
                input_range=manifest.preprocessing.input_range,
                magnitudes=_magnitudes(len(manifest.layers), tensors),
            )
        except (KeyError, NetworkError, safetensors.SafetensorError) as error:
            raise BundleError(
                f"{directory}: manifest and tensors disagree ({error}); export the model again"
            ) from error
        return cls(manifest, network, _read_card(directory / CARD) if CARD in optional else "")


def _float32(part: str, index: int, values: Array) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32, order="C")
    if not np.isfinite(rounded).all():
        raise BundleError(
            f"layers.{index}.{part} reaches {np.abs(values).max():.3g}; a bundle holds float32, up to 3.4e38: "
            "scale the network down"
        )
    return rounded


def _is_bundle(directory: Path) -> bool:
    return (directory / MANIFEST).is_file() and {entry.name for entry in directory.iterdir()} <= set(_LARGEST)


def _move_into_place(staging: Path, directory: Path) -> None:
    if not directory.exists():
        staging.rename(directory)
        return
    older = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        directory.rename(older)
        try:
            staging.rename(directory)
        except OSError:
            older.rename(directory)
            raise
    finally:
        shutil.rmtree(older, ignore_errors=True)


def _record(layer: Linear) -> DenseRecord | ConvolutionRecord:
    if isinstance(layer, Dense):
        return DenseRecord(inputs=layer.inputs, outputs=layer.outputs)
    return ConvolutionRecord(
        input_shape=layer.input_shape,
        output_shape=layer.output_shape,
        kernel_size=(int(layer.kernel.shape[2]), int(layer.kernel.shape[3])),
        stride=layer.stride,
        padding=layer.padding,
    )


def _layer(index: int, record: DenseRecord | ConvolutionRecord, tensors: Mapping[str, npt.NDArray[Any]]) -> Linear:
    weight, bias = tensors[f"layers.{index}.weight"], tensors[f"layers.{index}.bias"]
    layer: Linear
    if isinstance(record, DenseRecord):
        layer = Dense(weight, bias)
    else:
        layer = Convolution(weight, bias, record.input_shape, record.stride, record.padding)
    if _record(layer) != record:
        raise NetworkError(f"tensors of layer {index} make {_record(layer)}, the manifest says {record}")
    return layer


def _magnitudes(layers: int, tensors: Mapping[str, npt.NDArray[Any]]) -> tuple[Array, ...] | None:
    names = [f"layers.{index}.magnitude" for index in range(layers)]
    return tuple(tensors[name] for name in names) if names[0] in tensors else None


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise BundleError(f"{path} is missing; restore the bundle from its source")
    if path.stat().st_size > _LARGEST[path.name]:
        raise BundleError(f"{path} has {path.stat().st_size:,} bytes; expected at most {_LARGEST[path.name]:,}")
    return path


def _read_card(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is no text in UTF-8 ({error.reason}); restore it from its source") from error


def _read_manifest(path: Path) -> Manifest:
    text = path.read_bytes()
    try:
        version = json.loads(text).get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(f"{path} has schema {version}; this program reads {SCHEMA_VERSION}: export it again")
        manifest = Manifest.model_validate_json(text)
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} is no manifest ({type(error).__name__}); restore it from its source") from error
    if manifest.sealed().digest != manifest.digest or manifest.text().encode() != text:
        raise BundleError(f"{path} was changed: its digest does not match its content; restore it from its source")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
