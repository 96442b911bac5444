"""The complete release of C-NMC 2019, checked file by file, and its preliminary test as a test of a bundle.

The release has 15,114 images. Their names, labels, subjects and SHA-256 are known from a manifest (a CSV table,
usually compressed) that is not part of this repository. With it a figure on the preliminary test is one on exactly the
published images, labels and persons; without it, on whatever somebody's copy holds.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hemacrypt.model.preprocess import Preprocessing
from training.datasets import Bools, CellImages, LabelledPart, Original, Progress, file_sha256, read_originals
from training.errors import DataError, RunError

SPLITS = ("fold_0", "fold_1", "fold_2", "prelim", "final")
_COLUMNS = {"split", "label", "subject", "file", "sha256", "bytes"}
_IMAGES = (".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif")
_FOLD = re.compile(r"fold_\d+")


@dataclass(frozen=True)
class Listed:
    """One file of the release, as its manifest lists it.

    Attributes
    ----------
    split:
        One of `SPLITS`.
    label:
        1 leukaemic, 0 normal, None in the final test, whose labels were never published.
    subject:
        Person; empty in the final test.
    file:
        Name, unique within a split.
    sha256:
        Hexadecimal.
    bytes:
        Size of the file.
    """

    split: str
    label: int | None
    subject: str
    file: str
    sha256: str
    bytes: int


def read_manifest(path: Path) -> list[Listed]:
    """Read the manifest of the release.

    Parameters
    ----------
    path:
        CSV with the columns ``split, label, subject, file, sha256, bytes`` and perhaps more; compressed by gzip if its
        name ends in ``.gz``.

    Raises
    ------
    DataError
        If it cannot be read, or a row is not as described.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8", newline="") as file
        ):
            rows = list(csv.DictReader(file))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a manifest ({error}); restore it from its source") from error
    if not rows or not rows[0].keys() >= _COLUMNS:
        raise DataError(
            f"{path} has no rows with the columns {', '.join(sorted(_COLUMNS))}; restore it from its source"
        )
    listed = [_listed(row, f"{path}, line {line}") for line, row in enumerate(rows, start=2)]
    if len({(entry.split, entry.file) for entry in listed}) != len(listed):
        raise DataError(f"{path} lists a file of a split twice; restore it from its source")
    return listed


def _listed(row: Mapping[str, str], place: str) -> Listed:
    labels = ("",) if row["split"] == "final" else ("0", "1")
    if (
        row["split"] not in SPLITS
        or row["label"] not in labels
        or not (row["subject"] or row["split"] == "final")
        or not re.fullmatch(r"[0-9a-f]{64}", row["sha256"] or "")
        or not re.fullmatch(r"[0-9]{1,12}", row["bytes"] or "")
        or not row["file"]
        or Path(row["file"]).name != row["file"]
    ):
        raise DataError(f"{place} lists no file of the release ({dict(row)}); restore the manifest from its source")
    label = int(row["label"]) if row["label"] else None
    return Listed(row["split"], label, row["subject"], row["file"], row["sha256"], int(row["bytes"]))


@dataclass(frozen=True)
class Audit:
    """What a folder has of the release.

    Attributes
    ----------
    places:
        Where each file that is as listed lies.
    missing, altered, superfluous:
        Listed files that are not there; listed files with other content; images there that are not listed. Sorted.
    """

    places: Mapping[Listed, Path]
    missing: tuple[str, ...]
    altered: tuple[str, ...]
    superfluous: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the folder holds every image of the release, unaltered, and no other."""
        return not (self.missing or self.altered or self.superfluous)

    @property
    def words(self) -> str:
        """What is wrong, with the first names of each kind."""
        kinds = {"missing": self.missing, "altered": self.altered, "superfluous": self.superfluous}
        return "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in kinds.items()
            if names
        )


def audit(folder: Path, listed: Sequence[Listed], progress: Progress | None = None) -> Audit:
    """Check the SHA-256 of every image below a folder against the manifest.

    Files are told apart by name and split, which the folders around them tell: ``fold_0`` to ``fold_2``, one whose name
    contains ``prelim``, one whose name contains ``final``. Files that are no images, such as tables, are passed over.

    Parameters
    ----------
    progress:
        Wraps the files while they are read; see `training.datasets.load_cells`.
    """
    expected = {(entry.split, entry.file): entry for entry in listed}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())
    places: dict[Listed, Path] = {}
    altered: dict[Listed, str] = {}
    superfluous: list[str] = []
    for path in progress(paths, len(paths)) if progress else paths:
        name = str(path.relative_to(folder))
        entry = expected.get((_split_of(path.relative_to(folder)), path.name))
        if entry is None or entry in places:
            superfluous.append(name)
        elif path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256:
            places[entry] = path
        else:
            altered[entry] = name
    # A second copy of a name may be wrong where the first is right: then it is one too many.
    superfluous += [name for entry, name in altered.items() if entry in places]
    wrong = [name for entry, name in altered.items() if entry not in places]
    missing = [f"{entry.split}/{entry.file}" for entry in listed if entry not in places and entry not in altered]
    return Audit(places, *(tuple(sorted(names)) for names in (missing, wrong, superfluous)))


def _split_of(path: Path) -> str:
    parts = [part.lower() for part in path.parts[:-1]]
    folds = [part for part in parts if _FOLD.fullmatch(part)]
    if folds:
        return folds[-1]
    return next((split for split in ("prelim", "final") if any(split in part for part in parts)), "")


@dataclass(frozen=True)
class PreliminaryTest:
    """The cells of the preliminary test, with what each has to do with a bundle's training.

    Attributes
    ----------
    cells:
        All of them; groups are those of the whole release.
    same_subject:
        The subject was trained or validated on.
    same_image:
        The picture also stands, in whatever split, under another entry of a subject that was trained or validated on.
    same_group:
        The subject was, or is joined by identical images to one that was. Includes both of the above.
    repeated:
        The picture stands earlier in the preliminary test already.
    """

    cells: CellImages
    same_subject: Bools
    same_image: Bools
    same_group: Bools
    repeated: Bools

    @property
    def part(self) -> LabelledPart:
        """What may be measured: distinct cells of groups that training has nothing of.

        Raises
        ------
        DataError
            If no cell, or none of one label, is left.
        """
        kept = np.flatnonzero(~self.same_group & ~self.repeated)
        if set(self.cells.labels[kept].tolist()) != {0, 1}:
            raise DataError(
                f"{len(kept)} of {len(self.cells)} cells of the preliminary test are of groups that the bundle was not "
                "trained on, and not of both labels; measure a bundle that was trained on the folds alone"
            )
        return LabelledPart.of(self.cells, kept, self.words)

    @property
    def words(self) -> str:
        """The protocol in words, with how many cells are left out, and why."""
        out = self.same_group | self.repeated
        joined, twice = self.same_group & ~self.same_subject, self.repeated & ~self.same_group
        return (
            "preliminary test of C-NMC 2019, every file of the release checked, subject-disjoint from training and "
            f"validation: {len(out) - out.sum()} of {len(out)} cells; {out.sum()} left out: {self.same_subject.sum()} "
            f"of subjects trained or validated on, {joined.sum()} of subjects joined to these by an identical image, "
            f"{twice.sum()} that stand there twice; {self.same_image.sum()} show an image of theirs"
        )


def preliminary_test(
    folder: Path,
    listed: Sequence[Listed],
    trained: frozenset[str],
    preprocessing: Preprocessing,
    checking: Progress | None = None,
    reading: Progress | None = None,
) -> PreliminaryTest:
    """Check the release and read its preliminary test.

    All labelled images are read, since an image of the preliminary test carries another header than its twin in a fold,
    and only the pixels tell.

    Parameters
    ----------
    folder:
        The release, unpacked.
    listed:
        Its manifest, see `read_manifest`.
    trained:
        Subjects that the bundle was trained or validated on, see `trained_subjects`.
    preprocessing:
        The bundle's.
    checking, reading:
        Wrap the files while they are checked, and read.

    Raises
    ------
    DataError
        If the folder is not exactly the release; the message names what is missing, altered or superfluous.
    hemacrypt.errors.ImageError
        If an image cannot be read.
    """
    found = audit(folder, listed, checking)
    if not found.complete:
        raise DataError(f"{folder} is not the release of the manifest: {found.words}; unpack the release again, alone")
    # The order decides which of two identical images counts as the earlier one; so it is that of the manifest.
    originals = [
        Original(found.places[entry], entry.label, entry.subject, entry.file, entry.split, entry.sha256)
        for entry in listed
        if entry.label is not None
    ]
    cells = read_originals(originals, preprocessing, reading)
    return marked(cells, trained)


def marked(cells: CellImages, trained: frozenset[str]) -> PreliminaryTest:
    """Pick the preliminary test out of all labelled cells and mark what training has something of."""
    first = np.where(cells.dup_of < 0, np.arange(len(cells)), cells.dup_of)
    seen = np.isin(cells.subjects, sorted(trained))
    # How many entries of trained subjects show the same picture, this entry itself not counted.
    others = np.bincount(first, seen, len(cells))[first] - seen
    prelim = np.flatnonzero(cells.splits == "prelim")
    earlier = np.ones(len(prelim), dtype=np.bool_)
    earlier[np.unique(first[prelim], return_index=True)[1]] = False
    return PreliminaryTest(
        cells=cells.take(prelim),
        same_subject=seen[prelim],
        same_image=others[prelim] > 0,
        same_group=np.array([not trained.isdisjoint(group.split("+")) for group in cells.groups[prelim].tolist()]),
        repeated=earlier,
    )


def trained_subjects(data: Mapping[str, Any]) -> frozenset[str]:
    """Return the subjects that a bundle was trained or validated on: validation chose the epoch, so it counts.

    Parameters
    ----------
    data:
        ``data`` of the bundle's manifest.

    Raises
    ------
    RunError
        If the manifest does not say.
    """
    try:
        groups = [group for part in ("train", "validation") for group in data["parts"][part]["groups"]]
    except (KeyError, TypeError) as error:
        raise RunError(
            "the bundle does not say which groups of subjects it was trained on (data.parts.train.groups and "
            "data.parts.validation.groups of its manifest); export it again with this version"
        ) from error
    return frozenset(subject for group in groups for subject in group.split("+"))
