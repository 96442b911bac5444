"""What a fresh installation can show at once: one trained bundle and a small sample of real cells.

The 180 cells belong to subjects that no shipped model was trained, tuned or calibrated on. ``cells/ATTRIBUTION.md``
says where they come from, ``cells/LICENCE.md`` under which terms they may be passed on.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent


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


def bundle_path() -> Path:
    """Return the directory of the embedded model bundle."""
    return _HERE / "bundle"


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
