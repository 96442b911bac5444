"""Cell images of C-NMC 2019 with their subjects, duplicates and the separation that every figure rests on.

Three sources give one and the same `CellImages`: the release as downloaded, lossless copies with an ``index.csv``,
and arrays prepared beforehand. Three facts of the data shape this module:

- identical images occur under different subjects and folds, so subjects are joined into *groups* and duplicates
  are dropped. Identity is that of the pixels: files of the preliminary test carry another BMP header, so their
  SHA-256 differs where the picture does not;
- one subject gives up to 757 cells, so a split by image says little about the next patient;
- the subjects listed in ``heldout_subjects.txt`` are for final figures and take part in nothing else.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hemacrypt import embedded
from hemacrypt.model.preprocess import Pixels, Preprocessing, read_pixels
from training.errors import DataError, RunError

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]
Strings = npt.NDArray[np.str_]
Protocol = Literal["image", "subject"]
Part = Literal["train", "validation", "test"]
Progress = Callable[[Iterable[Path], int], Iterable[Path]]

LABELS = ("normal", "leukaemic")
SPLIT_FILE = "split.json"
PROTOCOL_WORDS: Mapping[Protocol, str] = {
    "image": "split by image, as the paper; optimistic: the same subjects on both sides",
    "subject": "subject-disjoint: no person, nor any joined to them by an identical image, on both sides",
}
HELDOUT_WORDS = "held-out subjects: no model that ships was trained, tuned, calibrated or selected on them"
SOURCE = (
    "C-NMC 2019: Gupta, A., & Gupta, R. (2019). ALL Challenge dataset of ISBI 2019. The Cancer Imaging Archive. "
    "doi 10.7937/tcia.2019.dc64i46r"
)
_UID = re.compile(r"UID_(H?\d+)_\d+_\d+_(all|hem)\.(?:bmp|png)", re.IGNORECASE)
_FOLD = re.compile(r"fold_\d+", re.IGNORECASE)
_PRELIM_COLUMNS = {"Patient_ID", "new_names", "labels"}
_INDEX_COLUMNS = {"stored_file", "split", "label", "subject", "release_name", "sha256_of_original_bmp"}


@dataclass(frozen=True)
class CellImages:
    """Reduced images and what is known about each; row ``i`` of every array is the same cell.

    Attributes
    ----------
    images:
        uint8, shape (n, size, size, 3), as `Preprocessing.reduce` gives them.
    labels:
        uint8, shape (n,): 1 leukaemic, 0 normal.
    subjects:
        Person, as in the release; normal donors begin with ``H``.
    groups:
        Subjects that share an identical image, joined by ``+``.
    files:
        Name of the file in the release.
    splits:
        ``fold_0``, ``fold_1``, ``fold_2`` or ``prelim``.
    sha256:
        SHA-256 of the original file, hexadecimal.
    dup_of:
        -1, or the earlier row with the identical image; int32.
    heldout:
        True for the groups that no model is trained, tuned, calibrated or selected on.

    Raises
    ------
    DataError
        If the arrays differ in length, a label is neither 0 nor 1, or there is no row at all.
    """

    images: Pixels
    labels: npt.NDArray[np.uint8]
    subjects: Strings
    groups: Strings
    files: Strings
    splits: Strings
    sha256: Strings
    dup_of: npt.NDArray[np.int32]
    heldout: Bools

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) != 1 or not len(self.images):
            raise DataError(f"arrays of unequal or no length: {lengths}; every array needs one entry per cell")
        strange = set(np.unique(self.labels)) - {0, 1}
        if strange:
            raise DataError(f"got labels {sorted(strange)}; expected 0 (normal) and 1 (leukaemic) only")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pool(self) -> Rows:
        """Rows that may be trained on: distinct images outside the held-out groups."""
        return np.flatnonzero((self.dup_of < 0) & ~self.heldout)

    @property
    def final(self) -> Rows:
        """Rows for final figures: distinct images of the held-out groups."""
        return np.flatnonzero((self.dup_of < 0) & self.heldout)

    def take(self, rows: Rows) -> CellImages:
        """Return some rows, as they are; ``dup_of`` is -1, for what it points to may be gone."""
        taken = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        return CellImages(**taken | {"dup_of": np.full(len(rows), -1, dtype=np.int32)})

    def rows_of(self, digests: Sequence[str], what: str) -> Rows:
        """Return the rows of some images, named by the SHA-256 of their originals, in that order, shape (n,).

        Parameters
        ----------
        what:
            What they are, for the message.

        Raises
        ------
        DataError
            If one of them is not among these.
        """
        where = {digest: row for row, digest in reversed(list(enumerate(self.sha256.tolist())))}
        missing = [digest for digest in digests if digest not in where]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(digests)} images of {what} are not in this data "
                f"(first SHA-256 {missing[0][:16]}…); point --data at the data that the run was trained on"
            )
        return np.array([where[digest] for digest in digests], dtype=np.intp)

    def fingerprint(self, rows: Rows) -> str:
        """Return the SHA-256 over the sorted SHA-256 of some rows: equal for equal sets of images, in any order."""
        return hashlib.sha256("\n".join(sorted(self.sha256[rows].tolist())).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Which rows serve what, as content digests, so that it means the same with every source of the data.

    Attributes
    ----------
    protocol:
        ``image`` or ``subject``.
    seed:
        The number that the division was drawn with.
    parts:
        SHA-256 of the originals of ``train``, ``validation`` and ``test``.
    """

    protocol: Protocol
    seed: int
    parts: Mapping[Part, tuple[str, ...]]

    @property
    def words(self) -> str:
        """The protocol in words; stands beside every figure."""
        return PROTOCOL_WORDS[self.protocol]

    def rows(self, cells: CellImages, part: Part) -> Rows:
        """Return the rows of one part in the order of the split, shape (n,).

        Raises
        ------
        DataError
            If an image of the part is not among the cells.
        """
        return cells.rows_of(self.parts[part], f"the {part} part")

    def write(self, run: Path) -> None:
        """Write ``split.json`` into the folder of a run."""
        content = {"protocol": self.protocol, "words": self.words, "seed": self.seed, "parts": dict(self.parts)}
        (run / SPLIT_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, run: Path) -> Split:
        """Read ``split.json`` of a run.

        Raises
        ------
        RunError
            If the file is missing or not a split.
        """
        path = run / SPLIT_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            parts: dict[Part, tuple[str, ...]] = {part: tuple(content["parts"][part]) for part in get_args(Part)}
            if content["protocol"] not in PROTOCOL_WORDS:
                raise ValueError(content["protocol"])
            return cls(content["protocol"], int(content["seed"]), parts)
        except FileNotFoundError:
            raise RunError(f"{path} is missing; name a folder written by `hemacrypt train`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a split ({type(error).__name__}); train the run again") from error


# ---------------------------------------------------------------------------------------------- splits


def _draw(seed: int, name: str) -> float:
    """Return a number in [0, 1) that depends on seed and name alone: no row order, no library version."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big") / 2**48


def split_by_image(cells: CellImages, seed: int = 0, test: float = 0.2, validation: float = 0.1) -> Split:
    """Divide the training pool by image, 80/20 as the paper does (section III.B.1).

    Every image is drawn by its own digest, so it falls into the same part whatever else is in the data. Held-out
    groups stay out of all parts.

    Parameters
    ----------
    seed:
        Another seed gives another division.
    test:
        Share of the pool that is tested on.
    validation:
        Share of the pool that epochs are chosen on; cut out of what remains for training.
    """
    parts: dict[Part, list[str]] = {"train": [], "validation": [], "test": []}
    for digest in cells.sha256[cells.pool].tolist():
        number = _draw(seed, digest)
        parts["test" if number < test else "validation" if number < test + validation else "train"].append(digest)
    return _checked(Split("image", seed, {part: tuple(rows) for part, rows in parts.items()}))


def split_by_subject(cells: CellImages, seed: int = 0, validation: float = 0.2) -> Split:
    """Divide the training pool by group of subjects; the test part is the held-out groups.

    Groups are visited in an order drawn from the seed, normal and leukaemic ones apart, and join the validation part
    while they fit into its share of the cells: the few very large groups stay in training.

    Parameters
    ----------
    seed:
        Another seed gives other validation groups. The test part is always the same.
    validation:
        Largest share of either label's cells to validate on.
    """
    pool = cells.pool
    chosen: set[str] = set()
    for label in (0, 1):
        of_label = pool[cells.labels[pool] == label]
        names, counts = np.unique(cells.groups[of_label], return_counts=True)
        room = validation * len(of_label)
        for name, count in sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda g: _draw(seed, g[0])):
            if name not in chosen and count <= room:
                chosen.add(name)
                room -= count
    validates = np.isin(cells.groups[pool], sorted(chosen))
    parts: dict[Part, Rows] = {"train": pool[~validates], "validation": pool[validates], "test": cells.final}
    return _checked(Split("subject", seed, {part: tuple(cells.sha256[rows].tolist()) for part, rows in parts.items()}))


def _checked(split: Split) -> Split:
    empty = [part for part, rows in split.parts.items() if not rows]
    if empty:
        raise DataError(f"nothing is left for {', '.join(empty)}; use more images or another --split-seed")
    return split


def split_cells(cells: CellImages, protocol: Protocol, seed: int = 0) -> Split:
    """Divide by the named protocol; see `split_by_image` and `split_by_subject`."""
    return split_by_image(cells, seed) if protocol == "image" else split_by_subject(cells, seed)


def load_split(
    run: Path, data: Path, part: Part = "test", preprocessing: Preprocessing | None = None
) -> tuple[Pixels, npt.NDArray[np.uint8], Strings]:
    """Return one part of the data that a run was made with.

    Parameters
    ----------
    run:
        Folder written by ``hemacrypt train``.
    data:
        Folder of the data; see `load_cells`.
    part:
        ``train``, ``validation`` or ``test``.

    Returns
    -------
    images, labels, subjects
        uint8 (n, size, size, 3); uint8 (n,); strings (n,).

    Raises
    ------
    RunError
        If the run has no split.
    DataError
        If the data lacks an image of the part.
    """
    cells = load_cells(data, preprocessing)
    rows = Split.read(run).rows(cells, part)
    return cells.images[rows], cells.labels[rows], cells.subjects[rows]


@dataclass(frozen=True)
class LabelledPart:
    """Cells to measure a model on, with the sentence that says what the figure means.

    Attributes
    ----------
    images:
        uint8, shape (n, size, size, 3).
    labels, subjects, groups:
        Shape (n,), as in `CellImages`.
    words:
        How these cells relate to those trained on.
    """

    images: Pixels
    labels: npt.NDArray[np.uint8]
    subjects: Strings
    groups: Strings
    words: str

    @classmethod
    def of(cls, cells: CellImages, rows: Rows, words: str) -> LabelledPart:
        """Take some rows."""
        return cls(cells.images[rows], cells.labels[rows], cells.subjects[rows], cells.groups[rows], words)

    def thinned(self, count: int) -> LabelledPart:
        """Return ``count`` cells taken at even distances."""
        rows = np.linspace(0, len(self.labels) - 1, count).round().astype(np.intp)
        return LabelledPart(
            self.images[rows], self.labels[rows], self.subjects[rows], self.groups[rows], f"{self.words}; {count} cells"
        )


def embedded_part(preprocessing: Preprocessing) -> LabelledPart:
    """Return the cells that come with Hemacrypt."""
    cells = embedded.sample()
    return LabelledPart(
        images=np.stack([preprocessing.reduce(read_pixels(cell.path, preprocessing.image_size)) for cell in cells]),
        labels=np.array([cell.label for cell in cells], dtype=np.uint8),
        subjects=np.array([cell.subject for cell in cells]),
        groups=np.array([cell.group for cell in cells]),
        words=HELDOUT_WORDS,
    )


# ---------------------------------------------------------------------------------------------- groups


def heldout_subjects() -> frozenset[str]:
    """Return the subjects that no model may be trained, tuned, calibrated or selected on."""
    text = resources.files("training").joinpath("heldout_subjects.txt").read_text(encoding="ascii")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def _first_rows(keys: Sequence[object]) -> list[int]:
    """For each key the first row that has it."""
    first: dict[object, int] = {}
    return [first.setdefault(key, row) for row, key in enumerate(keys)]


def _natural(name: str) -> tuple[str, int]:
    """Sort key of a subject: patients before donors, each by number."""
    return name.rstrip("0123456789"), int(re.sub(r"\D", "", name) or 0)


def _join_groups(names: Sequence[str], twins: Iterable[tuple[int, int]]) -> list[str]:
    """Join the groups of rows that show the same image.

    Parameters
    ----------
    names:
        For each row a subject or a group (subjects joined by ``+``).
    twins:
        Pairs of rows with identical images.
    """
    parent: dict[str, str] = {}

    def root(member: str) -> str:
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    members = {name: name.split("+") for name in set(names)}
    for parts in members.values():
        for part in parts:
            parent[root(part)] = root(parts[0])
    for one, other in twins:
        parent[root(members[names[one]][0])] = root(members[names[other]][0])
    joined: dict[str, list[str]] = {}
    for member in sorted(parent, key=_natural):
        joined.setdefault(root(member), []).append(member)
    return ["+".join(joined[root(members[name][0])]) for name in names]


def _assemble(
    images: Pixels,
    labels: Sequence[int],
    subjects: Sequence[str],
    groups: Sequence[str],
    files: Sequence[str],
    splits: Sequence[str],
    sha256: Sequence[str],
    identity: Sequence[object],
) -> CellImages:
    """Find duplicates, join groups, mark what is held out.

    Parameters
    ----------
    groups:
        Groups known beforehand, or the subjects.
    identity:
        What makes two rows the same image, besides an equal SHA-256.
    """
    by_file = _first_rows(sha256)
    by_picture = _first_rows(identity)
    twins = [(row, first) for firsts in (by_file, by_picture) for row, first in enumerate(firsts) if first != row]
    for row, first in twins:
        if labels[row] != labels[first]:
            raise DataError(
                f"{files[row]} and {files[first]} show the same image but are labelled {labels[row]} and "
                f"{labels[first]}; correct one of them"
            )
    earliest = np.minimum(by_file, by_picture)
    joined = _join_groups(groups, twins)
    held = heldout_subjects()
    return CellImages(
        images=images,
        labels=np.array(labels, dtype=np.uint8),
        subjects=np.array(subjects),
        groups=np.array(joined),
        files=np.array(files),
        splits=np.array(splits),
        sha256=np.array(sha256),
        dup_of=np.where(earliest == np.arange(len(labels)), -1, earliest).astype(np.int32),
        heldout=np.array([not held.isdisjoint(name.split("+")) for name in joined]),
    )


# ---------------------------------------------------------------------------------------------- readers


def data_folder(given: Path | None) -> Path:
    """Return the folder of the data: the one given, else that named by ``HEMACRYPT_DATA``.

    Raises
    ------
    DataError
        If neither names an existing folder.
    """
    named = given or (Path(os.environ["HEMACRYPT_DATA"]) if os.environ.get("HEMACRYPT_DATA") else None)
    if named is None:
        raise DataError("no data named; give --data FOLDER or set HEMACRYPT_DATA to the folder of C-NMC 2019")
    if not named.exists():
        raise DataError(f"{named} does not exist; give the folder of C-NMC 2019 or of its prepared arrays")
    return named


def load_cells(data: Path, preprocessing: Preprocessing | None = None, progress: Progress | None = None) -> CellImages:
    """Read cells from whichever of the three sources a folder holds.

    Parameters
    ----------
    data:
        A folder with prepared arrays (``cnmc_32.npz``), with lossless copies and their ``index.csv``, or the release;
        or an ``.npz`` file.
    preprocessing:
        How an original becomes a reduced image; 32x32 by default.
    progress:
        Wraps the files while they are read, ``progress(files, total)``; see `training.report.read_progress`.

    Raises
    ------
    DataError
        If the folder holds none of them, or what it holds is inconsistent.
    hemacrypt.errors.ImageError
        If an original cannot be read.
    """
    preprocessing = preprocessing or Preprocessing.model_validate({})
    arrays = data if data.suffix == ".npz" else data / f"cnmc_{preprocessing.size}.npz"
    if arrays.is_file():
        return read_arrays(arrays, preprocessing)
    if (data / "index.csv").is_file():
        return read_copies(data, preprocessing, progress)
    return read_release(data, preprocessing, progress)


def read_arrays(path: Path, preprocessing: Preprocessing) -> CellImages:
    """Read prepared arrays; nothing in them is unpickled.

    Raises
    ------
    DataError
        If the file is no such archive, lacks an array, or was prepared in another way than declared.
    """
    # The archives hold images that were cropped to 320x320 pixels before reduction.
    if (preprocessing.image_size, preprocessing.crop) != (450, 320):
        raise DataError(
            f"{path} was cropped to 320 of 450 pixels; the preprocessing wants {preprocessing.crop} of "
            f"{preprocessing.image_size}: read the original images instead"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = ("images", "labels", "subjects", "groups", "files", "splits", "sha256")
            stored: dict[str, npt.NDArray[Any]] = {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} is not an archive of prepared cells ({error}); restore it from its source") from error
    images = stored.pop("images")
    expected = (preprocessing.size, preprocessing.size, 3)
    if images.dtype != np.uint8 or images.shape[1:] != expected:
        raise DataError(
            f"{path} holds images of {images.shape[1:]}, {images.dtype}; expected {expected}, uint8: "
            "use the archive of the right size"
        )
    columns = {name: array.tolist() for name, array in stored.items()}
    return _assemble(images, **columns, identity=[image.tobytes() for image in images])


@dataclass(frozen=True)
class Original:
    """One original file with what is known before it is opened; no digest means: take that of the file."""

    path: Path
    label: int
    subject: str
    file: str
    split: str
    sha256: str | None = None


def read_copies(folder: Path, preprocessing: Preprocessing, progress: Progress | None = None) -> CellImages:
    """Read lossless copies of originals described by an ``index.csv``.

    Columns: ``stored_file, split, label, subject, release_name, sha256_of_original_bmp``.

    Raises
    ------
    DataError
        If the index lacks a column or names a file outside the folder.
    """
    rows = _table(folder / "index.csv")
    if not rows or not rows[0].keys() >= _INDEX_COLUMNS:
        raise DataError(f"{folder / 'index.csv'} has no rows with the columns {', '.join(sorted(_INDEX_COLUMNS))}")
    originals = []
    for row in rows:
        if Path(row["stored_file"]).name != row["stored_file"]:
            raise DataError(f"{folder / 'index.csv'} names {row['stored_file']!r}; expected a plain file name")
        label = _label(row["label"], folder / "index.csv")
        digest = row["sha256_of_original_bmp"]
        originals.append(
            Original(folder / row["stored_file"], label, row["subject"], row["release_name"], row["split"], digest)
        )
    return read_originals(originals, preprocessing, progress)


def read_release(folder: Path, preprocessing: Preprocessing, progress: Progress | None = None) -> CellImages:
    """Read the C-NMC 2019 release as it is downloaded and unpacked.

    Training images lie in ``…/fold_0|fold_1|fold_2/…/all|hem/``, those of the preliminary test in a folder whose name
    contains ``prelim``, described by a table with the columns ``Patient_ID, new_names, labels``. Whatever folders
    people have put around or between these does not matter. The final test was never labelled and is passed over.

    Raises
    ------
    DataError
        If there is no labelled image, or folder, file name and table contradict each other.
    """
    table = _prelim_table(folder)
    originals = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".bmp", ".png") and p.is_file()):
        parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
        folds = [part for part in parts if _FOLD.fullmatch(part)]
        if folds:
            originals.append(_fold_image(path, folds[-1], parts[-1]))
        elif any("prelim" in part for part in parts):
            if path.with_suffix(".bmp").name not in table:
                raise DataError(
                    f"{path} is not in the label table of the preliminary test ({len(table)} rows); "
                    "put the published table beside the images"
                )
            uid, label = table[path.with_suffix(".bmp").name]
            subject, named = _parse_uid(uid, path)
            if named != label:
                raise DataError(f"{path}: the table says label {label} but calls it {uid}; correct the table")
            originals.append(Original(path, label, subject, path.name, "prelim"))
    if not originals:
        raise DataError(
            f"{folder} holds no labelled cell; expected fold_0|fold_1|fold_2/all|hem/*.bmp as in the C-NMC 2019 "
            "release, an index.csv, or cnmc_32.npz"
        )
    return read_originals(originals, preprocessing, progress)


def _fold_image(path: Path, fold: str, folder: str) -> Original:
    subject, label = _parse_uid(path.name, path)
    if folder not in ("all", "hem") or label != int(folder == "all"):
        raise DataError(f"{path} lies in {folder!r}; its name says {'all' if label else 'hem'}: correct one of them")
    return Original(path, label, subject, path.name, fold)


def _parse_uid(name: str, path: Path) -> tuple[str, int]:
    """Return subject and label of a name like ``UID_H10_100_1_hem.bmp``."""
    match = _UID.fullmatch(name)
    if match is None:
        raise DataError(f"{path} is called {name!r}; expected UID_<subject>_<image>_<cell>_<all|hem>.bmp")
    return match[1].upper(), int(match[2].lower() == "all")


def _prelim_table(folder: Path) -> dict[str, tuple[str, int]]:
    """Return {file name: (UID name, label)} of every table of a preliminary test below a folder."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(folder.rglob("*.csv")):
        rows = _table(path)
        if rows and rows[0].keys() >= _PRELIM_COLUMNS:
            found.update({row["new_names"]: (row["Patient_ID"], _label(row["labels"], path)) for row in rows})
    return found


def _table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({error}); restore it from its source") from error


def _label(text: str, path: Path) -> int:
    if text not in ("0", "1"):
        raise DataError(f"{path} has the label {text!r}; expected 0 (normal) or 1 (leukaemic)")
    return int(text)


def read_originals(
    originals: Sequence[Original], preprocessing: Preprocessing, progress: Progress | None
) -> CellImages:
    """Read and reduce originals, find duplicates by pixels and join groups.

    Raises
    ------
    DataError
        If an image stands under two labels, or there is none.
    hemacrypt.errors.ImageError
        If a file cannot be read.
    """
    reduced = np.empty((len(originals), preprocessing.size, preprocessing.size, 3), dtype=np.uint8)
    digests: list[str] = []
    pictures: list[bytes] = []
    paths: Iterator[Path] | Iterable[Path] = (original.path for original in originals)
    for row, path in enumerate(progress(paths, len(originals)) if progress else paths):
        pixels = read_pixels(path, preprocessing.image_size)
        reduced[row] = preprocessing.reduce(pixels)
        pictures.append(hashlib.sha256(pixels.tobytes()).digest())
        digests.append(originals[row].sha256 or file_sha256(path))
    subjects = [original.subject for original in originals]
    return _assemble(
        reduced,
        labels=[original.label for original in originals],
        subjects=subjects,
        groups=subjects,
        files=[original.file for original in originals],
        splits=[original.split for original in originals],
        sha256=digests,
        identity=pictures,
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
