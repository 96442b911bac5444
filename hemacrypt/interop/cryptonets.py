"""CryptoNets' weight files: two CSV files with one line of numbers per layer, and a description of the layers.

Two families of programs write them: the paper on ALL (``all_weights.csv``, ``all_bias.csv``, as in our bundles) and
Microsoft's CryptoNets (``CifarWeight.csv``, ``CifarBias.csv``; ``MnistLargeWeight.csv``, ``MnistLargeBias.csv``). The
files hold no shapes: those stand in the programs. Here they are declared in a `Geometry`, a small JSON file
(docs/interop.md); those of the two public networks come with this package.

The conventions are those of https://github.com/microsoft/CryptoNets (MIT licence; read at commit 92fae15162f2):

* ``NeuralNetworks/WeightsReader.cs``: a line per layer, split at commas, each part a number. Biases likewise.
* ``NeuralNetworks/ConvolutionEngine.cs``: no kernel is flipped. Weight k of map m stands at ``m * kernel size + k``,
  with k over channels, rows, columns, the last fastest (``Location``). Windows start at ``-Lowerpadding`` and end at
  most at ``InputShape + Upperpadding`` (``CornerGenerator``); what lies outside is zero. A ``Stride`` of 1000, or as
  many as there are channels, means one step over all of them. Window w of map m makes value ``m * windows + w``, so
  values are channel first.
* ``NeuralNetworks/PoolLayer.cs``, ``LLPoolLayer.cs``: with ``Bias == null`` every map has one weight more, the last,
  which is its bias; with ``Weights == null`` the layer is a mean over windows in which zeros of the padding count.
* ``NeuralNetworks/LLDenseLayer.cs``: a matrix in row-major order, one row per output. ``CryptoNets/CryptoNets.cs``
  keeps its second layer (pooling and dense layers collapsed, 845 × 100) the other way round and transposes it.
* ``LowLatencyCryptoNets/LoLaCryptonets.cs``, ``CifarCryptoNet/LolaCifarCryptoNet.cs``: geometry of the public
  networks. ``NormalizationFactor`` (or a division of the first weights) by 256 is part of the network, our ``scale``;
  ``Scale`` and ``WeightsScale`` only say how numbers are rounded to integers, and a plan chooses that by itself.
* ``DataPreprocess/GetCIFAR.cs`` writes every channel of an image column by column; a network trained on such files
  has rows and columns exchanged: ``columns_first``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hemacrypt.errors import InteropError, NetworkError
from hemacrypt.interop import Imported
from hemacrypt.model.folding import Fold, Padding
from hemacrypt.model.network import Array, CollapsedNetwork, Dense, Linear

WEIGHTS_CSV, BIAS_CSV, GEOMETRY = "all_weights.csv", "all_bias.csv", "geometry.json"
PUBLIC = {"CifarWeight.csv": "cifar", "MnistLargeWeight.csv": "mnist-large"}
_LARGEST_GEOMETRY = 1 << 20
# Double.ToString needs at most 24 characters; a program that writes more digits has room.
_LONGEST_NUMBER = 64
_Size = Annotated[int, Field(ge=1, le=1 << 20)]
_Zeros = Annotated[int, Field(ge=0, le=4096)]
_Bias = Literal["file", "weights", "none"]


class _Declaration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ConvolutionDeclared(_Declaration):
    """A convolution: ``maps`` kernels over all channels, each of ``kernel`` rows and columns.

    ``bias`` says where biases are: ``file``, a line of the bias file; ``weights``, the last number of every map;
    ``none``.
    """

    kind: Literal["convolution"] = "convolution"
    maps: _Size
    kernel: tuple[_Size, _Size]
    stride: _Size = 1
    padding: tuple[tuple[_Zeros, _Zeros], tuple[_Zeros, _Zeros]] = ((0, 0), (0, 0))
    bias: _Bias = "file"


class DenseDeclared(_Declaration):
    """A dense layer; ``order`` says whether the numbers of an output or of an input stand together."""

    kind: Literal["dense"] = "dense"
    outputs: _Size
    order: Literal["outputs-first", "inputs-first"] = "outputs-first"
    bias: _Bias = "file"


class MeanPoolDeclared(_Declaration):
    """A mean over windows of every channel; it has no line in the files."""

    kind: Literal["mean-pool"] = "mean-pool"
    kernel: tuple[_Size, _Size]
    stride: _Size
    padding: tuple[tuple[_Zeros, _Zeros], tuple[_Zeros, _Zeros]] = ((0, 0), (0, 0))


class SquareDeclared(_Declaration):
    """A square; it has no line in the files."""

    kind: Literal["square"] = "square"


LayerDeclared = Annotated[
    ConvolutionDeclared | DenseDeclared | MeanPoolDeclared | SquareDeclared, Field(discriminator="kind")
]


class Geometry(_Declaration):
    """What the CSV files leave out: the shape of the input, and every layer in order."""

    input_shape: tuple[_Size, _Size, _Size]
    scale: float = Field(1.0, gt=0, le=1e6, description="factor from an image's values to network input")
    columns_first: bool = False  # images, and with them kernels, list columns before rows
    labels: tuple[str, ...] | None = None
    layers: tuple[LayerDeclared, ...] = Field(min_length=1, max_length=100)


def read_geometry(path: Path) -> Geometry:
    """Read a geometry file.

    Raises
    ------
    InteropError
        If it cannot be read, or is no geometry; the message names the field.
    """
    try:
        if path.stat().st_size > _LARGEST_GEOMETRY:
            raise InteropError(
                f"{path} has {path.stat().st_size:,} bytes; a geometry has at most {_LARGEST_GEOMETRY:,}"
            )
        return Geometry.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InteropError(f"cannot read the geometry {path}: {error.strerror}; see docs/interop.md") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InteropError(f"{path} is no geometry: {where}: {first['msg']}; see docs/interop.md") from error


def public_geometry(name: str) -> Geometry:
    """Return the geometry of a network of microsoft/CryptoNets: ``cifar`` or ``mnist-large``."""
    return read_geometry(Path(__file__).parent / "geometries" / f"{name}.json")


def read_cryptonets(source: Path, geometry: Geometry | None = None) -> Imported:
    """Read a network from CryptoNets' files.

    Parameters
    ----------
    source:
        A directory with ``all_weights.csv`` and ``all_bias.csv``, or with one ``<Name>Weight.csv`` and
        ``<Name>Bias.csv``; or the file with the weights itself.
    geometry:
        What the files leave out. None: ``geometry.json`` beside them, or that of a public network that has this name.

    Raises
    ------
    InteropError
        If files are missing, hold what is no number, or other numbers than the geometry says; the message names file
        and line.
    """
    weights = _weights_file(source)
    biases = weights.with_name(
        BIAS_CSV if weights.name == WEIGHTS_CSV else weights.name.removesuffix("Weight.csv") + "Bias.csv"
    )
    geometry = geometry or _geometry_of(weights)
    channels, height, width = geometry.input_shape
    shape = (channels, width, height) if geometry.columns_first else geometry.input_shape
    reader = _Reader(geometry, shape)
    try:
        with ExitStack() as stack:
            reader.weights = _Lines(weights, stack.enter_context(weights.open("rb")))
            # A network that keeps its biases with its weights, or has none, needs no second file.
            if biases.is_file() or any(getattr(layer, "bias", None) == "file" for layer in geometry.layers):
                reader.biases = _Lines(biases, stack.enter_context(biases.open("rb")))
            linears = reader.read()
    except OSError as error:
        raise InteropError(f"cannot read {error.filename}: {error.strerror}; name the file with weights") from error
    except NetworkError as error:
        raise InteropError(f"{weights}: {error}; correct the geometry") from error
    return Imported(shape, linears, geometry.scale, geometry.labels, geometry.columns_first)


def write_cryptonets(network: CollapsedNetwork, directory: Path, scale: float, labels: tuple[str, ...]) -> None:
    """Write a network as CryptoNets' files, with the geometry beside them.

    A convolution whose bias depends on the position is written as the dense layer that it equals: CryptoNets has one
    bias for each map.

    Parameters
    ----------
    directory:
        Made if it is not there.
    scale:
        Factor from an image's values to network input.

    Raises
    ------
    InteropError
        If the directory is not empty, or the disk refuses.
    """
    linears = [_with_plain_bias(layer) for layer in network.linears]
    layers: list[LayerDeclared] = []
    for layer in linears:
        layers += [SquareDeclared()] if layers else []
        layers.append(_declared(layer))
    geometry = Geometry(input_shape=network.input_shape, scale=scale, labels=labels, layers=tuple(layers))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise InteropError(f"{directory} is not empty; name a new directory")
        with (
            (directory / WEIGHTS_CSV).open("w", newline="\n") as weights,
            (directory / BIAS_CSV).open("w", newline="\n") as biases,
        ):
            for layer in linears:
                weights.write(_line(layer.weight if isinstance(layer, Dense) else layer.kernel))
                biases.write(_line(layer.bias))
        (directory / GEOMETRY).write_text(geometry.model_dump_json(indent=2, exclude_none=True) + "\n")
    except OSError as error:
        raise InteropError(f"cannot write {directory}: {error.strerror}; check space and permissions") from error


class _Reader:
    """Walks a geometry and takes a line of the files for every layer that has numbers."""

    weights: _Lines
    biases: _Lines | None = None

    def __init__(self, geometry: Geometry, shape: tuple[int, int, int]) -> None:
        self._geometry = geometry
        self._fold = Fold(shape)

    def read(self) -> tuple[Linear, ...]:
        for number, layer in enumerate(self._geometry.layers):
            name = f"layer {number}, {layer.kind}"
            match layer:
                case ConvolutionDeclared():
                    self._convolution(name, layer)
                case DenseDeclared():
                    self._dense(name, layer)
                case MeanPoolDeclared():
                    rows, columns = self._turned(layer.kernel)
                    self._fold.mean_pooling(name, (rows, columns), layer.stride, self._padding(layer.padding))
                case SquareDeclared():
                    self._fold.square(name)
        for lines in (self.weights, self.biases):
            if lines is not None:
                lines.check_end()
        return self._fold.finish()

    def _convolution(self, name: str, layer: ConvolutionDeclared) -> None:
        shape = self._fold.map_shape
        if shape is None:
            raise NetworkError(f"{name!r} stands after a dense layer")
        padding, window = self._padding(layer.padding), self._turned(layer.kernel)
        high, wide = (
            (size + sum(zeros) - side) // layer.stride + 1
            for size, zeros, side in zip(shape[1:], padding, window, strict=True)
        )
        if high < 1 or wide < 1:
            raise NetworkError(f"{name!r} has a kernel larger than its map {shape}")
        places = layer.maps * high * wide
        weight, bias = self._numbers(name, layer.maps, shape[0] * prod(layer.kernel), layer.bias, places)
        kernel = weight.reshape(layer.maps, shape[0], *layer.kernel)
        if self._geometry.columns_first:
            kernel = kernel.transpose(0, 1, 3, 2)
        if bias.size != layer.maps:
            bias = bias.reshape(layer.maps, *self._turned((high, wide)))
            bias = bias.transpose(0, 2, 1) if self._geometry.columns_first else bias
        self._fold.convolution(name, kernel, bias, layer.stride, padding)

    def _dense(self, name: str, layer: DenseDeclared) -> None:
        inputs, shape = self._fold.values, self._fold.map_shape
        weight, bias = self._numbers(name, layer.outputs, inputs, layer.bias, layer.outputs, layer.order)
        if shape is not None:
            if self._geometry.columns_first:
                channels, height, width = shape
                weight = weight.reshape(-1, channels, width, height).transpose(0, 1, 3, 2).reshape(-1, inputs)
            self._fold.flatten()
        self._fold.dense(name, weight, bias)

    def _numbers(
        self, name: str, outputs: int, inputs: int, bias: _Bias, places: int, order: str = "outputs-first"
    ) -> tuple[Array, Array]:
        """Return weights, shape (outputs, inputs), and biases: one for each output, or for each place of its map."""
        inside = inputs + (bias == "weights")
        line = self.weights.numbers(name, outputs * inside)
        weight = line.reshape(outputs, inside) if order == "outputs-first" else line.reshape(inside, outputs).T
        if bias == "weights":
            return weight[:, :-1], weight[:, -1]
        if bias == "none" or self.biases is None:
            return weight, np.zeros(outputs)
        return weight, self.biases.numbers(name, outputs, places)

    def _turned(self, pair: tuple[int, int]) -> tuple[int, int]:
        return (pair[1], pair[0]) if self._geometry.columns_first else pair

    def _padding(self, padding: Padding) -> Padding:
        return (padding[1], padding[0]) if self._geometry.columns_first else padding


class _Lines:
    """Lines of numbers, never more of the file in memory than the geometry says that a line has."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._line = path, file, 0

    def numbers(self, name: str, *counts: int) -> Array:
        """Return the next line; it has to have one of some counts of numbers."""
        self._line += 1
        where = f"{self._path}, line {self._line}"
        limit = max(counts) * _LONGEST_NUMBER
        line = self._file.readline(limit)
        if not line.strip():
            raise InteropError(f"{where}: the file has no numbers for {name}; expected {counts[0]:,}")
        got = line.count(b",") + 1
        if got not in counts or (len(line) == limit and not line.endswith(b"\n")):
            expected = " or ".join(f"{count:,}" for count in dict.fromkeys(counts))
            raise InteropError(f"{where}: {got:,} numbers, {name} needs {expected}; correct the geometry or the file")
        try:
            values = np.array(line.decode("utf-8-sig").split(","), dtype=np.float64)
        except ValueError as error:
            raise InteropError(f"{where}: not a number ({error}); expected numbers separated by commas") from None
        if not np.isfinite(values).all():
            raise InteropError(f"{where}: number {int(np.argmin(np.isfinite(values))) + 1} is not finite")
        return values

    def check_end(self) -> None:
        """Make sure that nothing but empty lines is left."""
        while chunk := self._file.read(1 << 16):
            if chunk.strip():
                raise InteropError(
                    f"{self._path} has more than the {self._line} lines that the geometry has layers for"
                )


def _weights_file(source: Path) -> Path:
    if not source.is_dir():
        if source.name == WEIGHTS_CSV or source.name.endswith("Weight.csv"):
            return source
        raise InteropError(f"{source} is no directory and not named {WEIGHTS_CSV} or …Weight.csv; name one that is")
    found = sorted(_weights_in(source))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise InteropError(
            f"{source} has to hold one file {WEIGHTS_CSV} or …Weight.csv (found: {names}); name the file"
        )
    return found[0]


def _weights_in(directory: Path) -> Iterator[Path]:
    for path in directory.iterdir():
        if path.name == WEIGHTS_CSV or path.name.endswith("Weight.csv"):
            yield path


def _geometry_of(weights: Path) -> Geometry:
    beside = weights.with_name(GEOMETRY)
    if beside.exists():
        return read_geometry(beside)
    if weights.name in PUBLIC:
        return public_geometry(PUBLIC[weights.name])
    raise InteropError(
        f"{weights} says nothing about the shapes of its layers; write a {GEOMETRY} beside it (docs/interop.md), for "
        'example {"input_shape": [1, 28, 28], "layers": [{"kind": "dense", "outputs": 10}]}'
    )


def _with_plain_bias(layer: Linear) -> Linear:
    if isinstance(layer, Dense) or layer.bias.ndim == 1:
        return layer
    matrix = np.zeros((layer.outputs, layer.inputs))
    rows, columns, values = layer.entries()
    matrix[rows, columns] = values
    return Dense(matrix, layer.offset())


def _declared(layer: Linear) -> DenseDeclared | ConvolutionDeclared:
    if isinstance(layer, Dense):
        return DenseDeclared(outputs=layer.outputs)
    maps, _, high, wide = layer.kernel.shape
    return ConvolutionDeclared(maps=maps, kernel=(high, wide), stride=layer.stride, padding=layer.padding)


def _line(values: Array) -> str:
    # Nine significant digits bring every float32 back, seventeen every float64.
    digits = 9 if (values.astype(np.float32) == values).all() else 17
    return ",".join(f"{value:.{digits}g}" for value in values.ravel().tolist()) + "\n"
