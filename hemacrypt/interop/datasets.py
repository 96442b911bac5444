"""Labelled images in the forms that CryptoNets' programs and CIFAR-10 have them, and NumPy's.

* Text, one image a line, tabs between fields (``test.tsv`` of the paper on ALL, ``cifar-test.tsv``): a label, then
  every value, channel by channel. ``BatchReader.cs`` of microsoft/CryptoNets calls this its dense format.
* Text, sparse (``MNIST-28x28-test.txt``): a label, the number of values, then ``index:value`` for those that are not
  zero. ``BatchReader.cs`` reads it with ``SparseFormat``.
* CIFAR-10's binary batches (https://www.cs.toronto.edu/~kriz/cifar.html): 3073 bytes an image, the label, then 1024
  bytes each of red, green and blue, row by row.
* ``.npz`` with an array ``images`` and perhaps ``labels``.

Files may come from anywhere: nothing is unpickled, and sizes are checked before memory is asked for.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from hemacrypt.errors import InteropError
from hemacrypt.model.network import Shape

CIFAR_SHAPE: Shape = (3, 32, 32)
_CIFAR_RECORD, _CIFAR_100_RECORD, _CIFAR_CLASSES = 3073, 3074, 10
# 1 GiB of float32: more than any of these sets, and what a planted file may cost at most.
_MOST_VALUES = 1 << 28
# A value as text: index, colon, and more digits than any number needs.
_LONGEST_FIELD = 64


@dataclass(frozen=True)
class LabelledImages:
    """Images as a file has them, before any preprocessing.

    Attributes
    ----------
    images:
        Shape (n, channels, height, width), float32 or uint8.
    labels:
        Shape (n,), int64; None where the file has none.
    """

    images: npt.NDArray[np.generic]
    labels: npt.NDArray[np.int64] | None


def read_images(
    path: Path, shape: Shape, *, limit: int | None = None, label_column: int = 0, columns_first: bool = False
) -> LabelledImages:
    """Read images by the ending of the file's name: ``.npz``, ``.bin`` (CIFAR-10), ``.tsv`` or ``.txt``.

    Parameters
    ----------
    shape:
        (channels, height, width) that the images must have.
    limit:
        Read only so many images; None reads all.
    label_column, columns_first:
        See `read_tsv`; of text only.

    Raises
    ------
    InteropError
        If the file is none of these, damaged, or holds images of another shape.
    """
    ending = path.suffix.lower()
    if ending == ".npz":
        return read_npz(path, shape, limit=limit)
    if ending == ".bin":
        if shape != CIFAR_SHAPE:
            raise InteropError(f"{path} holds CIFAR-10 images of shape {CIFAR_SHAPE}; the network reads {shape}")
        return read_cifar10(path, limit=limit)
    if ending in (".tsv", ".txt"):
        return read_tsv(path, shape, limit=limit, label_column=label_column, columns_first=columns_first)
    raise InteropError(f"{path} ends in {ending or 'nothing'}; expected images in .npz, .bin (CIFAR-10), .tsv or .txt")


def read_tsv(
    path: Path,
    shape: Shape,
    *,
    limit: int | None = None,
    label_column: int = 0,
    columns_first: bool = False,
) -> LabelledImages:
    """Read images as text, one a line: a label and all values, or sparse.

    Parameters
    ----------
    shape:
        (channels, height, width).
    limit:
        Read only so many lines; None reads all.
    label_column:
        Which field of the dense format is the label; from 0, negative for a file without labels.
    columns_first:
        Whether the values of a channel are listed column by column, as ``GetCIFAR.cs`` writes them; they are turned.

    Returns
    -------
    LabelledImages
        float32.

    Raises
    ------
    InteropError
        If a line is not of that form; the message names it.
    """
    values = prod(shape)
    most = min(_MOST_VALUES // values, limit if limit is not None else _MOST_VALUES)
    images: list[npt.NDArray[np.float32]] = []
    labels: list[int] = []
    with _opened(path) as file, np.errstate(over="ignore"):
        longest = (values + 2) * _LONGEST_FIELD
        while (line := file.readline(longest)) and len(images) < most:
            where = f"{path}, line {len(images) + 1}"
            if not line.strip():
                raise InteropError(f"{where} is empty; expected a label and {values} values")
            if len(line) == longest and not line.endswith(b"\n"):
                raise InteropError(f"{where} is longer than {values} values can be; is the image of shape {shape}?")
            try:
                fields = line.decode("ascii").rstrip("\r\n").split("\t")
                label, image = (
                    _sparse(fields, values) if _is_sparse(fields, values) else _dense(fields, values, label_column)
                )
            except ValueError as error:
                raise InteropError(f"{where}: {error}") from None
            images.append(image)
            labels += [] if label is None else [label]
        if line and len(images) != limit:
            raise InteropError(f"{path} has more than {most:,} images; read fewer at once (--limit)")
    if not images:
        raise InteropError(f"{path} holds no image; expected one a line")
    channels, height, width = shape
    stacked = np.stack(images).reshape(-1, channels, *((width, height) if columns_first else (height, width)))
    return LabelledImages(
        np.ascontiguousarray(stacked.swapaxes(2, 3)) if columns_first else stacked,
        np.array(labels, dtype=np.int64) if labels else None,
    )


def read_cifar10(path: Path, *, limit: int | None = None) -> LabelledImages:
    """Read a binary batch of CIFAR-10.

    Returns
    -------
    LabelledImages
        uint8, shape (n, 3, 32, 32): red, green, blue.

    Raises
    ------
    InteropError
        If its size is no multiple of 3073 bytes (CIFAR-100 has 3074), or a label is beyond 9.
    """
    with _opened(path) as file:
        size = path.stat().st_size
        if size == 0 or size % _CIFAR_RECORD:
            kind = "; CIFAR-100 has two labels an image" if size and size % _CIFAR_100_RECORD == 0 else ""
            raise InteropError(
                f"{path} has {size:,} bytes, no multiple of {_CIFAR_RECORD}{kind}; expected a batch of CIFAR-10's "
                "binary version"
            )
        count = min(size // _CIFAR_RECORD, _MOST_VALUES // _CIFAR_RECORD, limit or size)
        records = np.frombuffer(file.read(count * _CIFAR_RECORD), dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    wrong = np.flatnonzero(records[:, 0] >= _CIFAR_CLASSES)
    if wrong.size:
        raise InteropError(
            f"{path}, record {wrong[0] + 1}: label {records[wrong[0], 0]}; CIFAR-10 has 0 to {_CIFAR_CLASSES - 1}"
        )
    return LabelledImages(records[:, 1:].reshape(-1, *CIFAR_SHAPE), records[:, 0].astype(np.int64))


def read_npz(path: Path, shape: Shape, *, limit: int | None = None) -> LabelledImages:
    """Read ``images`` and, if it is there, ``labels`` from a file of NumPy's.

    Images may be (n, channels, height, width) or (n, height, width, channels), of one channel also (n, height, width).

    Raises
    ------
    InteropError
        If it is no such file, arrays are missing, of another shape or no numbers.
    """
    channels, height, width = shape
    # Read in this order where two of them are the same.
    orders = {shape: shape, (height, width, channels): None}
    try:
        with _opened(path) as file, zipfile.ZipFile(file) as archive:
            images = _member(archive, path, "images")
            labels = _member(archive, path, "labels") if "labels.npy" in archive.namelist() else None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        raise InteropError(f"{path} is no .npz file ({type(error).__name__}); write it with numpy.savez") from None
    if channels == 1 and images.shape[1:] == (height, width):
        images = images[:, None]
    if images.ndim != 4 or images.shape[1:] not in orders or not len(images):
        raise InteropError(f"{path} has images of shape {images.shape}; expected (n, {channels}, {height}, {width})")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "ui"):
        raise InteropError(f"{path} has labels {labels.shape}, {labels.dtype}; expected one integer for each image")
    if images.shape[1:] != shape:
        images = np.moveaxis(images, 3, 1)
    return LabelledImages(images[:limit], None if labels is None else labels[:limit].astype(np.int64))


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> npt.NDArray[np.generic]:
    """Read one array, after its header was looked at: what it says is what memory is asked for."""
    if f"{name}.npy" not in archive.namelist():
        raise InteropError(f"{path} holds no array {name!r}; write it with numpy.savez(…, {name}=…)")
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError("unknown version")
        shape, _, dtype = read_header[version](member)
        if dtype.kind not in "uif":
            raise InteropError(f"{path}: {name} is of type {dtype}; expected numbers")
        if prod(shape) > _MOST_VALUES or prod(shape) * dtype.itemsize > archive.getinfo(f"{name}.npy").file_size:
            raise InteropError(
                f"{path}: {name} claims the shape {shape}, more than the file holds or can be read at once"
            )
    with archive.open(f"{name}.npy") as member:
        array: npt.NDArray[np.generic] = np.lib.format.read_array(member, allow_pickle=False)
    return array


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise InteropError(f"cannot read {path}: {error.strerror}; name a file of images") from error


def _is_sparse(fields: list[str], values: int) -> bool:
    # A sparse image that is black has two fields and no colon.
    return any(":" in field for field in fields[2:3]) or (len(fields) == 2 and values != 1)


def _dense(fields: list[str], values: int, label_column: int) -> tuple[int | None, npt.NDArray[np.float32]]:
    label = None
    if 0 <= label_column < len(fields):
        label = _integer(fields.pop(label_column), "the label")
    if len(fields) != values:
        raise ValueError(f"{len(fields)} values; expected {values} beside the label")
    return label, _finite(np.array(fields, dtype=np.float32))


def _sparse(fields: list[str], values: int) -> tuple[int, npt.NDArray[np.float32]]:
    label, said = _integer(fields[0], "the label"), _integer(fields[1], "the number of values")
    if said != values:
        raise ValueError(f"an image of {said} values; expected {values}")
    image = np.zeros(values, dtype=np.float32)
    for field in fields[2:]:
        index, colon, value = field.partition(":")
        place = _integer(index, "an index")
        if not colon or not 0 <= place < values:
            raise ValueError(f"{field[:40]!r} is no index:value with an index below {values}")
        image[place] = float(value)
    return label, _finite(image)


def _integer(field: str, what: str) -> int:
    try:
        return int(field)
    except ValueError:
        raise ValueError(f"{field[:40]!r} is not {what}, a whole number") from None


def _finite(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not np.isfinite(image).all():
        raise ValueError("a value is not a finite number")
    return image
