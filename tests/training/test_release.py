"""The complete release: what is missing, altered or too much is named, and training has nothing of what is measured."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.model.preprocess import Preprocessing
from training import cli
from training.datasets import load_cells
from training.errors import DataError, RunError
from training.release import (
    Listed,
    audit,
    marked,
    preliminary_test,
    read_manifest,
    trained_subjects,
)

COLUMNS = ("split", "label", "subject", "file", "uid_name", "sha256", "bytes", "held")


def write_manifest(release: Path, path: Path) -> Path:
    """List every image of a tiny release as the manifest of the real one does."""
    names = {"1.bmp": "UID_60_1_1_all.bmp", "2.bmp": "UID_H31_1_1_hem.bmp"}
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for image in sorted(release.rglob("*.bmp")):
            folder = str(image.relative_to(release).parent)
            splits = ("fold_0", "fold_1", "fold_2", "prelim", "final")
            split = next(split for split in splits if split in folder)
            uid = "" if split == "final" else names.get(image.name, image.name)
            label = "" if split == "final" else str(int("_all" in uid))
            subject = uid.split("_")[1] if uid else ""
            content = image.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            table.writerow([split, label, subject, image.name, uid, digest, len(content), 0])
    return path


@pytest.fixture(scope="module")
def manifest(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(release, tmp_path_factory.mktemp("manifest") / "manifest.csv.gz")


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def only(folder: Path, name: str) -> Path:
    (found,) = folder.rglob(name)
    return found


def test_the_manifest_says_what_each_file_is(manifest: Path) -> None:
    listed = read_manifest(manifest)
    assert len(listed) == 11
    by_name = {(entry.split, entry.file): entry for entry in listed}
    assert by_name["prelim", "2.bmp"].subject == "H31"
    assert (by_name["prelim", "1.bmp"].label, by_name["prelim", "2.bmp"].label) == (1, 0)
    assert (by_name["final", "1.bmp"].label, by_name["final", "1.bmp"].subject) == (None, "")


def test_an_uncompressed_manifest_is_the_same(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_bytes(gzip.decompress(manifest.read_bytes()))
    assert read_manifest(tmp_path / "manifest.csv") == read_manifest(manifest)


def test_the_release_as_it_is_is_complete(release: Path, manifest: Path) -> None:
    seen: list[Path] = []

    def progress(paths: Any, total: int) -> Any:
        for path in paths:
            seen.append(path)
            yield path

    found = audit(release, read_manifest(manifest), progress)
    assert found.complete
    assert found.words == ""
    assert len(found.places) == len(seen) == 11


def test_what_is_missing_altered_or_superfluous_is_named(copy: Path, manifest: Path) -> None:
    only(copy, "UID_9_2_1_all.bmp").unlink()
    altered = only(copy, "UID_3_1_1_all.bmp")
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    cut = only(copy, "UID_4_1_1_all.bmp")
    cut.write_bytes(cut.read_bytes()[:-1])
    shutil.copy(only(copy, "UID_14_1_1_all.bmp"), copy / "again.png")
    # A second copy of a listed name is one too many, whether it is right or wrong, and wherever it sorts.
    for folder in ("a", "z"):
        (copy / folder / "fold_1").mkdir(parents=True)
        (copy / folder / "fold_1" / "UID_H2_2_1_hem.bmp").write_bytes(b"BM")
    found = audit(copy, read_manifest(manifest))
    assert found.missing == ("fold_2/UID_9_2_1_all.bmp",)
    assert found.altered == tuple(str(path.relative_to(copy)) for path in (altered, cut))
    assert found.superfluous == tuple(
        sorted(["again.png", "a/fold_1/UID_H2_2_1_hem.bmp", "z/fold_1/UID_H2_2_1_hem.bmp"])
    )
    assert not found.complete
    with pytest.raises(DataError, match=r"1 missing \(fold_2/UID_9_2_1_all\.bmp\); 2 altered .*; 3 superfluous"):
        preliminary_test(copy, read_manifest(manifest), frozenset(), Preprocessing())


@pytest.mark.parametrize("name", ["C-NMC_test_final_phase_data", "fold_1", "C-NMC_test_prelim_phase_data"])
def test_every_split_has_to_be_there(copy: Path, manifest: Path, name: str) -> None:
    for folder in [path for path in copy.rglob(name) if path.is_dir()]:
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(DataError, match=r"is not the release of the manifest: \d missing"):
        preliminary_test(copy, read_manifest(manifest), frozenset(), Preprocessing())


def test_the_preliminary_test_is_that_of_the_manifest(release: Path, manifest: Path) -> None:
    found = preliminary_test(release, read_manifest(manifest), frozenset({"3", "9", "H2"}), Preprocessing())
    assert found.cells.subjects.tolist() == ["60", "H31"]
    assert found.cells.splits.tolist() == ["prelim", "prelim"]
    assert found.cells.groups.tolist() == ["4+60", "H31"]
    for marks in (found.same_subject, found.same_image, found.same_group, found.repeated):
        assert not marks.any()
    part = found.part
    assert part.labels.tolist() == [1, 0]
    assert "2 of 2 cells; 0 left out" in part.words
    read = load_cells(release)
    for image, subject in zip(part.images, part.subjects, strict=True):
        np.testing.assert_array_equal(image, read.images[read.subjects == subject][0])


def test_a_cell_whose_image_was_trained_on_is_marked_although_its_subject_has_another_name(
    release: Path, manifest: Path
) -> None:
    found = preliminary_test(release, read_manifest(manifest), frozenset({"4"}), Preprocessing())
    assert found.same_subject.tolist() == [False, False]
    assert found.same_image.tolist() == found.same_group.tolist() == [True, False]
    assert "1 of 2 cells; 1 left out: 0 of subjects trained or validated on, 1 of subjects joined" in found.words
    with pytest.raises(DataError, match=r"1 of 2 cells .* not of both labels"):
        _ = found.part


def cells_of(folder: Path, write_arrays: Callable[[Path, int], Path], **changes: Any) -> Any:
    with np.load(write_arrays(folder, 40) / "cnmc_32.npz", allow_pickle=False) as archive:
        content = dict(archive)
    for name, rows in changes.items():
        for row, value in rows.items():
            content[name][row] = content["images"][value] if name == "images" else value
    np.savez(folder / "cnmc_32.npz", **content)
    return load_cells(folder)


def test_marks_and_words_by_hand(tmp_path: Path, write_arrays: Callable[[Path, int], Path]) -> None:
    # Rows 30 to 39 are preliminary; rows 2i and 2i+1 are a donor and a patient.
    people = dict(zip(range(30, 40), ["H70", "70", "H71", "71", "H72", "72", "H72", "73", "H73", "74"], strict=True))
    cells = cells_of(
        tmp_path,
        write_arrays,
        splits=dict.fromkeys(people, "prelim"),
        subjects=people,
        groups=people,
        images={31: 1, 38: 34},  # 70 shows an image of the patient in row 1; H73 one of H72
    )
    patient = str(cells.subjects[1])
    found = marked(cells, frozenset({patient, "71", "H99"}))
    assert found.cells.subjects.tolist() == list(people.values())
    assert np.flatnonzero(found.same_subject).tolist() == [3]
    assert np.flatnonzero(found.same_image).tolist() == [1]
    assert np.flatnonzero(found.same_group).tolist() == [1, 3]
    assert np.flatnonzero(found.repeated).tolist() == [8]
    assert found.part.subjects.tolist() == ["H70", "H71", "H72", "72", "H72", "73", "74"]
    assert "7 of 10 cells; 3 left out: 1 of subjects trained or validated on, 1 of subjects joined" in found.words
    assert "1 that stand there twice; 1 show an image of theirs" in found.words


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (["fold_9", "1", "3", "a.bmp", "", "0" * 64, "5", ""], "line 2 lists no file"),
        (["fold_0", "", "3", "a.bmp", "", "0" * 64, "5", ""], "line 2 lists no file"),
        (["final", "1", "", "a.bmp", "", "0" * 64, "5", ""], "line 2 lists no file"),
        (["fold_0", "1", "", "a.bmp", "", "0" * 64, "5", ""], "line 2 lists no file"),
        (["fold_0", "1", "3", "../a.bmp", "", "0" * 64, "5", ""], "line 2 lists no file"),
        (["fold_0", "1", "3", "", "", "0" * 64, "5", ""], "line 2 lists no file"),
        (["fold_0", "1", "3", "a.bmp", "", "0" * 63, "5", ""], "line 2 lists no file"),
        (["fold_0", "1", "3", "a.bmp", "", "0" * 64, "-5", ""], "line 2 lists no file"),
        (["fold_0", "1"], "line 2 lists no file"),
        (None, "no rows with the columns"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, row: list[str] | None, told: str) -> None:
    lines = [",".join(COLUMNS), *([",".join(row)] if row else [])]
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=told):
        read_manifest(tmp_path / "manifest.csv")


def test_a_manifest_that_cannot_be_read_or_lists_a_file_twice_is_refused(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        read_manifest(tmp_path / "absent.csv.gz")
    (tmp_path / "bad.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        read_manifest(tmp_path / "bad.csv.gz")
    (tmp_path / "cut.csv.gz").write_bytes(manifest.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        read_manifest(tmp_path / "cut.csv.gz")
    text = gzip.decompress(manifest.read_bytes()).decode()
    (tmp_path / "twice.csv").write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(DataError, match="twice"):
        read_manifest(tmp_path / "twice.csv")


def test_a_bundle_that_does_not_say_what_it_was_trained_on_is_refused() -> None:
    parts = {"train": {"groups": ["3+9", "H2"]}, "validation": {"groups": ["4"]}, "test": {"groups": ["14"]}}
    assert trained_subjects({"parts": parts}) == {"3", "9", "H2", "4"}
    for data in ({}, {"parts": {}}, {"parts": {"train": {"groups": []}}}, {"parts": None}):
        with pytest.raises(RunError, match="does not say which groups"):
            trained_subjects(data)


def bundle_of(folder: Path, train: list[str]) -> Path:
    rng = np.random.default_rng(0)
    network = CollapsedNetwork((3, 32, 32), (Dense(rng.normal(size=(2, 3072)), np.zeros(2)),))
    data = {"parts": {"train": {"groups": train}, "validation": {"groups": []}}}
    bundle = Bundle.create(
        network,
        name="tiny",
        labels=("normal", "leukaemic"),
        preprocessing=Preprocessing(),
        data=data,
    )
    bundle.write(folder)
    return folder


def call(*words: object) -> str:
    app = typer.Typer()
    app.command()(cli.evaluate)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_command_measures_on_the_preliminary_test(release: Path, manifest: Path, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", ["3+9", "H2"])
    out = tmp_path / "figures.json"
    words = ("--split", "prelim", "--data", release, "--manifest", manifest, "--out", out)
    assert "2 of 2 cells; 0 left out" in call(bundle, *words)
    found = json.loads(out.read_text())
    assert (found["n"], found["n_subjects"], found["split"]) == (2, 2, "prelim")
    assert "0 left out" in found["protocol"]
    with pytest.raises(DataError, match="not of both labels"):
        call(bundle_of(tmp_path / "other", ["4"]), *words)


def test_the_command_needs_split_and_manifest_together(release: Path, manifest: Path, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", [])
    with pytest.raises(RunError, match="belong together"):
        call(bundle, "--split", "prelim", "--data", release)
    with pytest.raises(RunError, match="belong together"):
        call(bundle, "--split", "heldout", "--data", release, "--manifest", manifest)


@pytest.mark.shared_data
def test_the_real_manifest_has_the_published_counts(shared_data: Path) -> None:
    listed = read_manifest(shared_data / "cnmc_manifest.csv.gz")
    assert len(listed) == 15_114
    assert Counter((entry.split, entry.label) for entry in listed) == {
        ("fold_0", 1): 2397, ("fold_0", 0): 1130, ("fold_1", 1): 2418, ("fold_1", 0): 1163,
        ("fold_2", 1): 2457, ("fold_2", 0): 1096, ("prelim", 1): 1219, ("prelim", 0): 648, ("final", None): 2586,
    }  # fmt: skip
    subjects = {split: {e.subject for e in listed if e.split == split} for split in ("prelim", "fold_0")}
    assert len(subjects["prelim"]) == 28
    assert all(isinstance(entry, Listed) for entry in listed)
    # No subject of the preliminary test is one of the folds by name; identical images are another matter.
    folds = {entry.subject for entry in listed if entry.split.startswith("fold")}
    assert not folds & subjects["prelim"]
    held = load_cells(shared_data)
    known = {entry.sha256 for entry in listed}
    assert set(held.sha256.tolist()) <= known
