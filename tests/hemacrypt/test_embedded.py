"""The zoo: bundles that are found by a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hemacrypt.embedded import bundle_path, find_bundle, zoo
from hemacrypt.errors import BundleError
from hemacrypt.model.bundle import Bundle


def test_every_bundle_of_the_zoo_can_be_read_and_balanced_is_among_them() -> None:
    assert "balanced" in zoo()
    assert set(zoo()) <= {"fast", "balanced", "deep", "accurate"}
    for name in zoo():
        assert Bundle.read(bundle_path(name)).network.squares >= 1
    assert bundle_path() == bundle_path("balanced")


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(BundleError, match=r"no bundle 'splendid' in the zoo; it has .*balanced"):
        bundle_path("splendid")


def test_a_bundle_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_bundle(None) == find_bundle(Path("balanced")) == bundle_path("balanced")
    (tmp_path / "mine").mkdir()
    assert find_bundle(Path("mine")) == Path("mine")
    with pytest.raises(BundleError, match=r"yours does not exist; .* or one of .*balanced"):
        find_bundle(Path("yours"))


def test_a_folder_with_a_name_of_the_zoo_is_not_taken_for_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "balanced"
    folder.mkdir()
    with pytest.raises(BundleError, match=f"something of that name lies here; write {folder} for the latter"):
        find_bundle(Path("balanced"))
    assert find_bundle(folder) == folder
