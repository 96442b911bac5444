"""The images that `hemacrypt verify` runs on: the embedded sample, image files, folders of them, or arrays."""

from __future__ import annotations

import operator
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemacrypt.embedded import sample
from hemacrypt.errors import ImageError
from hemacrypt.model.preprocess import Pixels

_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
_CONDITION = re.compile(r"(\w+)(?:\s*(<=|>=|==|!=|<|>)\s*(-?\d+))?")
_COMPARISONS: dict[str, Callable[[Any, int], Any]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """One image, and what it is known to show.

    Attributes
    ----------
    source:
        Where it came from.
    image:
        A file, or pixels; what `hemacrypt.model.preprocess.Preprocessing` takes.
    label:
        Number of the true label, if it is known.
    """

    source: str
    image: Path | Pixels
    label: int | None = None


def load(
    paths: Sequence[Path], where: Sequence[str] = (), limit: int | None = None, rows: Path | None = None
) -> list[Case]:
    """Find the images.

    Parameters
    ----------
    paths:
        PNG, BMP and TIFF files, folders that are searched for them, and ``.npz`` archives with ``images`` (uint8, shape
        (number, height, width, 3)) and perhaps ``labels``; the embedded sample when there are none.
    where:
        Conditions on other arrays of an archive, of which all must hold: the name of a boolean array, or a comparison
        with an integer such as ``dup_of<0``.
    limit:
        At most so many images, evenly spread.
    rows:
        An ``.npy`` file with whole numbers, shape (number,): only these images of the one archive, in this order. Those
        for which a condition does not hold are left out.

    Returns
    -------
    list of Case
        In the order of the paths, folders by name, archives by ``rows``; at least one.

    Raises
    ------
    ImageError
        If a path holds no images, or an archive or the file of rows is not as described.
    """
    if rows is not None and [path.suffix for path in paths] != [".npz"]:
        raise ImageError("rows (--rows) select images of one .npz archive; name one, and nothing else, with --images")
    if where and not any(path.suffix == ".npz" for path in paths):
        raise ImageError("conditions (--where) select images of an .npz archive; name one with --images")
    cases = [case for path in paths for case in _at(path, where, rows)] if paths else _embedded()
    if not cases:
        raise ImageError("no image is left; name other --images or a weaker --where")
    if limit is not None and limit < len(cases):
        cases = [cases[index] for index in np.linspace(0, len(cases) - 1, limit).astype(int)]
    return cases


def _embedded() -> list[Case]:
    return [Case(cell.path.name, cell.path, cell.label) for cell in sample()]


def _at(path: Path, where: Sequence[str], rows: Path | None) -> list[Case]:
    if path.suffix == ".npz":
        return _archive(path, where, rows)
    if not path.is_dir():
        return [Case(str(path), path)]
    found = sorted(inner for inner in path.rglob("*") if inner.suffix.lower() in _SUFFIXES)
    if not found:
        raise ImageError(f"{path} holds no PNG, BMP or TIFF file; name another folder")
    return [Case(str(inner), inner) for inner in found]


def _archive(path: Path, where: Sequence[str], rows: Path | None) -> list[Case]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = _array(archive, "images", path)
            labels = _array(archive, "labels", path) if "labels" in archive else None
            conditions = [_condition(archive, condition, path) for condition in where]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ImageError(
            f"{path} is no .npz archive of plain arrays ({type(error).__name__}); write it again"
        ) from None
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ImageError(f"{path}: images of shape {images.shape}, {images.dtype}; expected (number, h, w, 3), uint8")
    for name, array in (("labels", labels), *zip(where, conditions, strict=True)):
        if array is not None and array.shape != images.shape[:1]:
            raise ImageError(
                f"{path}: {name} has shape {array.shape}; expected one entry for each of {len(images)} images"
            )
    chosen = np.arange(len(images)) if rows is None else _rows(rows, len(images))
    kept = chosen[np.logical_and.reduce(conditions)[chosen]] if conditions else chosen
    return [
        Case(f"{path.name}[{index}]", images[index], None if labels is None else int(labels[index])) for index in kept
    ]


def _rows(path: Path, images: int) -> npt.NDArray[np.int64]:
    """Read which images to take."""
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ImageError(f"{path} is no .npy file of a plain array ({type(error).__name__}); write it again") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ImageError(f"{path} holds {found.dtype} of shape {found.shape}; expected whole numbers, shape (number,)")
    if len(found) and not 0 <= found.min() <= found.max() < images:
        raise ImageError(f"{path} names rows {found.min()} to {found.max()}; the archive has 0 to {images - 1}")
    if len(np.unique(found)) != len(found):
        raise ImageError(f"{path} names a row more than once; an image counts once: name each row once")
    return found.astype(np.int64)


def _condition(archive: Any, condition: str, path: Path) -> npt.NDArray[np.bool_]:
    """Return which images a condition holds for."""
    read = _CONDITION.fullmatch(condition.strip())
    if read is None:
        raise ImageError(
            f"{condition!r} is no condition; expected the name of an array, or a comparison such as dup_of<0"
        )
    name, comparison, number = read.groups()
    array = _array(archive, name, path)
    if comparison is None:
        if array.dtype != np.bool_:
            raise ImageError(
                f"{path}: {name} holds {array.dtype}; expected booleans, or a comparison such as {name}==1"
            )
        return array
    if array.dtype.kind not in "iufb":
        raise ImageError(f"{path}: {name} holds {array.dtype}, which no number compares with")
    return np.asarray(_COMPARISONS[comparison](array, int(number)))


def _array(archive: Any, name: str, path: Path) -> npt.NDArray[Any]:
    if name not in archive:
        raise ImageError(f"{path} has no array {name!r}; it has {', '.join(archive.files)}")
    found: npt.NDArray[Any] = archive[name]
    return found
