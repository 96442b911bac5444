"""``hemacrypt convert``: models of other programs to bundles, and bundles to CryptoNets' files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from hemacrypt.embedded import find_bundle, zoo
from hemacrypt.errors import InteropError
from hemacrypt.interop import Imported
from hemacrypt.interop.cryptonets import PUBLIC, public_geometry, read_cryptonets, read_geometry, write_cryptonets
from hemacrypt.interop.datasets import read_images
from hemacrypt.model.bundle import MANIFEST, Bundle
from hemacrypt.model.calibration import calibrated_on
from hemacrypt.model.network import CollapsedNetwork
from hemacrypt.model.preprocess import AnyPreprocessing, ArrayPreprocessing, Preprocessing

# Images in work at once while magnitudes are measured: a wide network writes megabytes for each.
_AT_ONCE = 64


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="model.keras, model.onnx, a directory with CryptoNets' weight files, or a bundle (or a zoo name)."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Bundle directory to write; from a bundle: directory for CryptoNets' files.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name under which the bundle is served. [default: from the source's name]")
    ] = None,
    description: Annotated[str, typer.Option(help="What the model is, in a sentence.")] = "",
    labels: Annotated[
        str | None, typer.Option(help="What the logits stand for, in order, separated by commas. [default: 0,1,…]")
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option(
            help=f"CryptoNets' files: the JSON file that describes the layers, or {' or '.join(PUBLIC.values())}. "
            "[default: geometry.json beside them]"
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Factor from an image's values to the network's input. [default: as declared, else 1/255]"),
    ] = None,
    value_range: Annotated[
        tuple[float, float], typer.Option("--range", help="Smallest and largest value of an image, before the factor.")
    ] = (0.0, 255.0),
    preprocessing: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the whole declaration of a bundle's preprocessing, instead of the two above."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Training images (.npz, .tsv, .txt, CIFAR-10 .bin) on which to measure magnitudes."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Calibrate on so many images only.")] = None,
) -> None:
    """Turn a model of Keras, ONNX or CryptoNets into a bundle, or a bundle into CryptoNets' files.

    Layers are folded exactly; whatever does not fold is refused by name. See docs/interop.md.
    """
    console = Console()
    source = find_bundle(source) if str(source) in zoo() else source
    if (source / MANIFEST).is_file():
        _export(Bundle.read(source), out, console)
        return
    imported = _imported(source, geometry)
    declared = _declaration(imported, scale, value_range, preprocessing)
    network = CollapsedNetwork(imported.input_shape, imported.linears, declared.input_range)
    measured = "no images were given (--calibrate): plans will use worst-case bounds, far larger than what occurs"
    margins: dict[str, float] = {}
    probes = np.random.default_rng(0).uniform(*declared.input_range, (_AT_ONCE, network.inputs))
    if calibrate is not None:
        images = read_images(calibrate, declared.input_shape, limit=limit, columns_first=imported.columns_first).images
        batches = (_input(declared, images[start : start + _AT_ONCE]) for start in range(0, len(images), _AT_ONCE))
        network, margins = calibrated_on(network, batches)
        measured = f"magnitudes measured on {len(images)} images"
        probes = _input(declared, images[:_AT_ONCE])
    words = tuple(label.strip() for label in labels.split(",")) if labels is not None else imported.labels
    words = words or tuple(str(number) for number in range(network.outputs))
    if len(set(words)) != len(words):
        raise InteropError("two labels are the same; answers could not be told apart")
    converted = Bundle.create(
        network,
        name=name or _name_of(source),
        description=description,
        labels=words,
        preprocessing=declared,
        training={"converted_from": source.name},
        metrics={"margins": margins} if margins else {},
    )
    bundle = converted.write(out)
    for index, (layer, peaks) in enumerate(zip(bundle.network.linears, bundle.network.peaks, strict=True)):
        console.print(f"layer {index}: {layer.describe()}, values up to {np.max(peaks):.3g}", highlight=False)
    console.print(f"input: {declared.input_shape}, from {declared.input_range[0]:g} to {declared.input_range[1]:g}")
    console.print(measured)
    difference = np.abs(network(probes) - bundle.network(probes)).max()
    probed = "these images" if calibrate is not None else "random inputs"
    console.print(f"rounding the weights to float32 changes logits by at most {difference:.1e} on {probed}")
    console.print(f"{out}: bundle {bundle.manifest.name}, digest {bundle.digest[:16]}…")


def _export(bundle: Bundle, out: Path, console: Console) -> None:
    preprocessing = bundle.manifest.preprocessing
    write_cryptonets(bundle.network, out, preprocessing.scale, bundle.manifest.labels)
    console.print(f"{out}: CryptoNets' files of bundle {bundle.manifest.name}, with the geometry beside them")


def _imported(source: Path, geometry: str | None) -> Imported:
    """Choose the reader: by the ending of a file's name, else CryptoNets'."""
    importers = {f".{entry.name}": entry for entry in entry_points(group="hemacrypt.importers")}
    entry = importers.get(source.suffix.lower())
    if entry is None:
        if not source.is_dir() and source.suffix.lower() != ".csv":
            known = ", ".join(sorted(importers))
            raise InteropError(f"{source} is no directory with CryptoNets' files and ends in none of {known}")
        return read_cryptonets(source, _geometry(geometry))
    if geometry is not None:
        raise InteropError(f"--geometry describes CryptoNets' files; {source} describes itself")
    try:
        read: Callable[[Path], Imported] = entry.load()
    except ImportError as error:
        extra = "training" if entry.module.startswith("training") else entry.name
        raise InteropError(f"reading {source} needs more: pip install 'hemacrypt[{extra}]' ({error})") from error
    return read(source)


def _geometry(named: str | None) -> Any:
    if named is None:
        return None
    return public_geometry(named) if named in PUBLIC.values() else read_geometry(Path(named))


def _declaration(
    imported: Imported, scale: float | None, value_range: tuple[float, float], file: Path | None
) -> Preprocessing | ArrayPreprocessing:
    adapter: TypeAdapter[Preprocessing | ArrayPreprocessing] = TypeAdapter(AnyPreprocessing)
    try:
        if file is not None:
            return adapter.validate_python(json.loads(file.read_bytes()))
        return ArrayPreprocessing(
            shape=imported.input_shape,
            scale=scale or imported.scale or 1 / 255,
            smallest=value_range[0],
            largest=value_range[1],
        )
    except OSError as error:
        raise InteropError(f"cannot read {file}: {error.strerror}; name a JSON file") from error
    except ValidationError as error:
        problems = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise InteropError(f"this preprocessing is impossible: {problems}") from error
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{file} is no JSON ({error}); see docs/bundle-format.md for the fields") from error


def _input(declared: Preprocessing | ArrayPreprocessing, images: Any) -> Any:
    """Return network input of images as `ArrayPreprocessing` reads them, or of cells that are reduced already."""
    return declared.normalise(np.moveaxis(images, 1, -1) if isinstance(declared, Preprocessing) else images)


def _name_of(source: Path) -> str:
    """Return what a bundle of a file may be called: its name in lower case, other characters as dashes."""
    whole = source.resolve().stem.removesuffix("Weight")
    stem = re.sub(r"[^a-z0-9._-]+", "-", whole.lower()).lstrip("._-")
    return stem[:64] or "model"
