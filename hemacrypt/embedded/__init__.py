"""What a fresh installation can show at once: a small zoo of trained bundles and a sample of real cells.

Each directory in ``zoo/`` is a bundle; its name says what was given up for what: `fast`, `balanced`, `deep`,
`accurate`. The name under which a bundle is served is that of its manifest.

The 180 cells belong to subjects that no shipped model was trained, tuned or calibrated on. ``cells/ATTRIBUTION.md``
says where they come from, ``cells/LICENCE.md`` under which terms they may be passed on.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from hemacrypt.errors import BundleError

_HERE = Path(__file__).resolve().parent
# The order in which they are told; whatever else lies there follows by name.
_ORDER = ("fast", "balanced", "deep", "accurate")
DEFAULT = "balanced"


@dataclass(frozen=True)
class SampleCell:
    """One cell of the embedded sample.

    Attributes
    ----------
    path:
        Lossless PNG with the 450x450 original pixels.
    label:
        1 leukaemic (ALL), 0 normal, as published with the data.
    subject:
        Name of the person in the release; normal donors begin with ``H``.
    group:
        Subjects that share an identical image, joined by ``+``; equal to ``subject`` for most.
    sha256_of_original_bmp:
        SHA-256 of the file in the C-NMC 2019 release, hexadecimal.
    """

    path: Path
    label: int
    subject: str
    group: str
    sha256_of_original_bmp: str


def zoo() -> tuple[str, ...]:
    """Return the names of the embedded bundles, the fastest first."""
    names = sorted(entry.name for entry in (_HERE / "zoo").iterdir() if entry.is_dir())
    return tuple(sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)))


def bundle_path(name: str = DEFAULT) -> Path:
    """Return the directory of an embedded bundle.

    Raises
    ------
    BundleError
        If there is none of that name.
    """
    if name not in zoo():
        raise BundleError(f"there is no bundle {name!r} in the zoo; it has {', '.join(zoo())}")
    return _HERE / "zoo" / name


def find_bundle(named: Path | None) -> Path:
    """Return the directory of a bundle that a user named: by its path, or one of the zoo by its name.

    Parameters
    ----------
    named:
        What stood in the command; None for the default of the zoo.

    Raises
    ------
    BundleError
        If the name is one of the zoo and something of that name lies in the working directory too, for nobody can
        tell which is meant; or if there is neither.
    """
    if named is None:
        return bundle_path()
    if str(named) in zoo():
        if named.exists():
            raise BundleError(
                f"{str(named)!r} is a bundle of the zoo, and something of that name lies here; write "
                f"{named.absolute()} for the latter, or call from another directory for the former"
            )
        return bundle_path(str(named))
    if not named.exists():
        raise BundleError(f"{named} does not exist; expected the directory of a bundle, or one of {', '.join(zoo())}")
    return named


def sample() -> list[SampleCell]:
    """Return the embedded cells, sorted by file name.

    Returns
    -------
    list of SampleCell
        180 cells, 90 of either label, of subjects held out for good.
    """
    cells = _HERE / "cells"
    with (cells / "cells.csv").open(encoding="ascii", newline="") as file:
        return [
            SampleCell(
                path=cells / row["file"],
                label=int(row["label"]),
                subject=row["subject"],
                group=row["group"],
                sha256_of_original_bmp=row["sha256_of_original_bmp"],
            )
            for row in csv.DictReader(file)
        ]
