"""Import of Keras models: an entry point of ``hemacrypt.importers``, so that `hemacrypt` imports no Keras."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras

from hemacrypt.errors import InteropError
from hemacrypt.interop import Imported
from training.collapse import collapse, refusal
from training.errors import CollapseError

_LARGEST_CONFIG, _LARGEST_FILE = 4 << 20, 1 << 30
_MODELS = ("Sequential", "Functional")
_LAYERS = (
    "InputLayer", "Dropout", "Rescaling", "Flatten", "Conv2D", "AveragePooling2D", "BatchNormalization", "Dense",
    "Square", "Quadratic",
)  # fmt: skip
# Keras imports the module that an object in the file names; only these need to be.
_MODULES = ("keras", "training.models", "builtins")


def read_keras(path: Path) -> Imported:
    """Read a model that Keras saved as ``.keras``.

    Parameters
    ----------
    path:
        A `keras.Sequential`, or a functional model that is a chain, of the layers that `training.collapse` folds,
        reading (height, width, channels). A file that names others is refused before Keras opens it.

    Raises
    ------
    InteropError
        If the file cannot be read, or the model is not of the family; the message names the layer.
    """
    _check(path)
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever Keras and h5py raise for a damaged file
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InteropError(f"{path} cannot be loaded ({first[0]}); save it again with model.save") from error
    try:
        network = collapse(_as_sequential(model))
    except CollapseError as error:
        raise InteropError(f"{path}: {error}") from error
    return Imported(network.input_shape, network.linears)


def _check(path: Path) -> None:
    """Look at the layers' names before Keras does."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InteropError(f"{path} has {path.stat().st_size:,} bytes; at most {_LARGEST_FILE:,} are read")
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > _LARGEST_CONFIG:
                raise InteropError(f"{path} describes its layers in more than {_LARGEST_CONFIG:,} bytes")
            config = json.loads(archive.read("config.json"))
        kind, layers = config["class_name"], config["config"].get("layers", [])
        _check_modules(path, config)
        named = [(layer["class_name"], layer["config"].get("name", "")) for layer in layers]
    except OSError as error:
        raise InteropError(f"cannot read {path}: {error.strerror}; name a .keras file") from error
    except (zipfile.BadZipFile, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InteropError(
            f"{path} is no .keras file of Keras 3 ({type(error).__name__}); save it with model.save('….keras')"
        ) from error
    if kind not in _MODELS:
        raise InteropError(f"{path} is a {kind}; expected a Sequential or functional model")
    for layer, name in named:
        if layer not in _LAYERS:
            raise InteropError(f"{path}: {refusal(name, layer)}")


def _check_modules(path: Path, value: Any) -> None:
    """Refuse a description that would have Keras import code from elsewhere."""
    if isinstance(value, dict):
        module = value.get("module")
        if isinstance(module, str) and not any(module == known or module.startswith(f"{known}.") for known in _MODULES):
            raise InteropError(f"{path} wants code of the module {module!r}, which is not loaded; use layers that fold")
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_modules(path, part)


def _as_sequential(model: Any) -> keras.Sequential:
    """Return a functional model that is a chain as what `collapse` reads."""
    if isinstance(model, keras.Sequential):
        return model
    before = None
    for layer in model.layers:
        if before is not None and layer.input is not before:
            raise CollapseError(f"{layer.name!r} does not read the layer before it; expected a chain without branches")
        before = layer.output
    if len(model.outputs) != 1 or model.outputs[0] is not before:
        raise CollapseError("the model's output is not its last layer's; expected a chain without branches")
    return keras.Sequential(model.layers)
