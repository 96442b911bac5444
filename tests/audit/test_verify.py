"""`hemacrypt verify`: encrypted against clear on a small model, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from audit import verify as verifying
from audit.cases import Case, load
from audit.verify import Outcome, combined, failures, verify
from client_sdk._exceptions import ClientError
from client_sdk._results import Scheme
from hemacrypt import DISCLAIMER
from hemacrypt.cli import application
from hemacrypt.errors import FormatError, ImageError
from tests.client_sdk.conftest import Small
from tests.large import write_large_bundle

_KEYS = {
    "scheme", "images", "disagreements", "exact", "max_logit_error", "logit_error_bound", "accuracy", "ms", "bytes",
    "note", "engine", "unreadable",
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    random = np.random.default_rng(12)
    return [Case(f"image {n}", random.integers(0, 256, (4, 4, 3), dtype=np.uint8), n % 2) for n in range(5)]


def _console() -> Console:
    return Console(file=StringIO(), width=150)


def _printed(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("engine", ["seal", "vector"])
def test_both_schemes_keep_their_promises(small: Small, cases: list[Case], engine: str) -> None:
    console = _console()
    approximate, exact = verify(small.bundle, cases, ("ckks", "bfv"), engine, 1, console)
    assert [record["scheme"] for record in (approximate, exact)] == ["ckks", "bfv"]
    for record in (approximate, exact):
        assert set(record) >= _KEYS
        assert (record["images"], record["disagreements"], record["note"]) == (5, 0, DISCLAIMER)
        assert failures(record) == []
        assert set(record["ms"]) == {"encrypt", "compute", "decrypt"}
        assert all(0 < stage["median"] <= stage["p95"] for stage in record["ms"].values())
        assert all(size > 0 for size in record["bytes"].values())
        assert record["accuracy"]["images"] == 5
        assert record["accuracy"]["encrypted"] == record["accuracy"]["clear"]
    assert approximate["exact"] is None
    assert 0 < approximate["max_logit_error"] <= approximate["logit_error_bound"]
    assert exact["exact"] is True
    assert exact["max_logit_error"] == exact["logit_error_bound"] == 0
    assert 0 < exact["quantisation"]["max_logit_error"] < 10 * exact["quantisation"]["predicted"]
    text = _printed(console)
    assert "the integers of 5 of 5 images are exactly those of the quantised network" in text
    assert "ckks: encrypted and clear disagree on 0 of 5 images" in text


def test_images_without_labels_have_no_accuracy(small: Small, cases: list[Case]) -> None:
    (record,) = verify(small.bundle, [replace(cases[0], label=None)], ("ckks",), "seal", 1, _console())
    assert record["accuracy"] is None


def test_an_image_that_is_none_shows_before_anything_is_computed(small: Small, cases: list[Case]) -> None:
    wrong = Case("wrong", np.zeros((5, 5, 3), dtype=np.uint8))
    console = _console()
    with pytest.raises(ImageError, match="expected"):
        verify(small.bundle, [*cases, wrong], ("ckks",), "seal", 1, console)
    assert _printed(console) == ""


def _spoilt(monkeypatch: pytest.MonkeyPatch, scheme: Scheme, number: int, by: float) -> None:
    """Add something to the first logit that one image decrypts to."""
    side = verifying._Approximate if scheme == "ckks" else verifying._Exact
    honest, calls = side.run, []

    def run(self: Any, some: Sequence[Case], values: Any) -> list[verifying.Outcome]:
        (outcome,) = honest(self, some, values)
        calls.append(some)
        if len(calls) - 1 != number:
            return [outcome]
        encrypted = outcome.encrypted + np.array([by, 0.0])
        return [replace(outcome, encrypted=encrypted, equal=None if outcome.equal is None else False)]

    monkeypatch.setattr(side, "run", run)


def test_a_wrong_prediction_is_found(small: Small, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    (honest,) = verify(small.bundle, cases, ("ckks",), "seal", 1, _console())
    assert honest["disagreements"] == 0
    _spoilt(monkeypatch, "ckks", 2, 1e3)
    first = small.bundle.network(small.bundle.manifest.preprocessing(cases[2].image)[None])[0]
    console = _console()
    (record,) = verify(small.bundle, cases, ("ckks",), "seal", 1, console)
    assert record["disagreements"] == int(np.argmax(first) != 0)
    assert record["max_logit_error"] == pytest.approx(1e3)
    assert "1 of 5 images are off by more than bounded" in failures(record)[-1]


def test_an_error_beyond_the_bound_is_found(small: Small, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    bound = small.plan.logit_error_bound
    _spoilt(monkeypatch, "ckks", 1, 3 * bound)
    (record,) = verify(small.bundle, cases, ("ckks",), "seal", 1, _console())
    (told,) = failures(record)
    assert told == "the logits of 1 of 5 images are off by more than bounded"


def test_a_single_wrong_integer_is_found(small: Small, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    _spoilt(monkeypatch, "bfv", 3, 1e-9)
    console = _console()
    (record,) = verify(small.bundle, cases, ("bfv",), "seal", 1, console)
    assert (record["exact"], record["inexact"], record["disagreements"]) == (False, 1, 0)
    assert failures(record)[0] == "the integers of 1 of 5 images are not those of the network"
    assert "image 3" in _printed(console)


def test_an_answer_that_cannot_be_read_counts(small: Small, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = verifying._Exact.run

    def run(self: Any, some: Sequence[Case], values: Any) -> list[verifying.Outcome]:
        if some[0].source == "image 4":
            raise FormatError("reply", "the copies of a logit disagree")
        return honest(self, some, values)

    monkeypatch.setattr(verifying._Exact, "run", run)
    (record,) = verify(small.bundle, cases, ("bfv",), "seal", 1, _console())
    assert (record["images"], record["disagreements"], record["inexact"], record["exact"]) == (5, 1, 1, False)
    assert record["unreadable"] == ["image 4: reply: the copies of a logit disagree"]
    assert failures(record)[0].startswith("1 answers cannot be read, the first is image 4")
    with pytest.raises(FormatError, match="no answer of 1 under bfv could be read"):
        verify(small.bundle, cases[4:], ("bfv",), "seal", 1, _console())


def test_logits_of_every_image_are_written_when_asked(
    small: Small, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = verifying._Exact.run

    def run(self: Any, some: Sequence[Case], values: Any) -> list[verifying.Outcome]:
        if some[0].source == "image 2":
            raise FormatError("reply", "the copies of a logit disagree")
        return honest(self, some, values)

    monkeypatch.setattr(verifying._Exact, "run", run)
    mixed = [*cases[:4], replace(cases[4], label=None)]
    kept: dict[Scheme, Any] = {}
    verify(small.bundle, mixed, ("ckks", "bfv"), "seal", 1, _console(), kept.__setitem__)
    verifying.check_target(tmp_path / "new" / "both")
    verifying.write_logits(kept, mixed, tmp_path / "new" / "both")
    with np.load(tmp_path / "new" / "both", allow_pickle=False) as archive:
        found = dict(archive)
    names = ("encrypted", "clear", "trained", "bound", "unreadable")
    assert set(found) == {"sources", "labels", *(f"{scheme}_{name}" for scheme in ("ckks", "bfv") for name in names)}
    assert found["sources"].tolist() == [case.source for case in cases]
    assert found["labels"].tolist() == [0, 1, 0, 1, -1]
    expected = small.bundle.network(np.stack([small.bundle.manifest.preprocessing(case.image) for case in cases]))
    np.testing.assert_allclose(found["ckks_clear"], expected, rtol=1e-12)
    assert found["ckks_encrypted"].dtype == np.float64
    assert (np.abs(found["ckks_encrypted"] - expected).max(axis=1) <= found["ckks_bound"]).all()
    assert (found["ckks_encrypted"] != expected).any()
    assert (found["ckks_unreadable"], found["bfv_unreadable"]) == (0, 1)
    read = [0, 1, 3, 4]
    np.testing.assert_array_equal(found["bfv_encrypted"][read], found["bfv_clear"][read])
    np.testing.assert_allclose(found["bfv_trained"][read], expected[read], rtol=1e-12)
    assert (found["bfv_bound"][read] == 0).all()
    for name in names[:4]:
        assert np.isnan(found[f"bfv_{name}"][2]).all()
    verifying.write_logits({"ckks": kept["ckks"]}, mixed, tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["encrypted"], found["ckks_encrypted"])
        assert set(archive) == {"sources", "labels", *names}


def test_logits_that_cannot_be_written_are_an_error_of_ours(small: Small, cases: list[Case], tmp_path: Path) -> None:
    kept: dict[Scheme, Any] = {}
    verify(small.bundle, cases[:1], ("ckks",), "seal", 1, _console(), kept.__setitem__)
    (tmp_path / "file").write_text("no folder")
    for failing in (verifying.check_target, lambda path: verifying.write_logits(kept, cases[:1], path)):
        with pytest.raises(ClientError, match="cannot write"):
            failing(tmp_path / "file" / "logits.npz")
    with pytest.raises(ClientError, match="is a folder"):
        verifying.check_target(tmp_path)


def test_quantisation_is_told_and_no_failure_of_encryption(small: Small, cases: list[Case]) -> None:
    (record,) = verify(small.bundle, cases, ("bfv",), "seal", 1, _console())
    record["quantisation"]["predicted"] = record["quantisation"]["max_logit_error"] / 2
    assert failures(record) == []


def test_two_records_are_put_together_and_one_is_left_as_it_is() -> None:
    base = {"images": 5, "disagreements": 0, "max_logit_error": 1e-6, "logit_error_bound": 1e-5, "exact": None}
    one, other = base | {"scheme": "ckks"}, base | {"scheme": "bfv", "exact": False, "disagreements": 2}
    assert combined([one]) is one
    both = combined([one, other])
    assert both["schemes"] == {"ckks": one, "bfv": other}
    assert (both["images"], both["disagreements"], both["exact"]) == (5, 2, False)
    assert combined([one, one | {"scheme": "other"}])["exact"] is None


@pytest.fixture
def folder(small: Small, tmp_path: Path) -> Path:
    small.bundle.write(tmp_path / "bundle")
    random = np.random.default_rng(13)
    np.savez(
        tmp_path / "cells.npz",
        images=random.integers(0, 256, (4, 4, 4, 3), dtype=np.uint8),
        labels=np.array([0, 1, 1, 0]),
        heldout=np.array([True, False, True, True]),
    )
    return tmp_path


@pytest.mark.parametrize("schemes", [["ckks"], ["bfv"], ["bfv", "ckks"], []])
def test_the_command_writes_json_and_exits_with_0(folder: Path, schemes: list[str]) -> None:
    arguments = ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--where", "heldout"]
    arguments += ["--engine", "seal", "--json", str(folder / "out" / "v.json")]
    arguments += [part for scheme in schemes for part in ("--scheme", scheme)]
    done = CliRunner().invoke(application(), arguments)
    assert done.exit_code == 0, done.output
    assert DISCLAIMER in " ".join(done.output.split())
    written = json.loads((folder / "out" / "v.json").read_text())
    assert set(written) >= {"images", "disagreements", "exact", "max_logit_error", "logit_error_bound", "note"}
    assert (written["images"], written["disagreements"]) == (3, 0)
    assert written["exact"] is (None if schemes == ["ckks"] else True)
    if len(schemes) == 1:
        assert written["scheme"] == schemes[0]
        assert set(written) >= _KEYS
    else:
        assert set(written["schemes"]) == {"ckks", "bfv"}


def test_the_command_writes_logits_of_chosen_rows(folder: Path) -> None:
    np.save(folder / "rows.npy", np.array([3, 1]))
    arguments = ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--engine", "seal"]
    arguments += ["--scheme", "ckks", "--rows", str(folder / "rows.npy"), "--logits", str(folder / "logits.npz")]
    done = CliRunner().invoke(application(), arguments)
    assert done.exit_code == 0, done.output
    with np.load(folder / "logits.npz", allow_pickle=False) as archive:
        assert archive["sources"].tolist() == ["cells.npz[3]", "cells.npz[1]"]
        assert archive["labels"].tolist() == [0, 1]
        assert archive["encrypted"].shape == archive["clear"].shape == (2, 2)
        np.testing.assert_allclose(archive["encrypted"], archive["clear"], atol=archive["bound"].max())


def test_the_command_exits_with_1_when_something_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoilt(monkeypatch, "bfv", 0, 1e-9)
    arguments = ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--engine", "seal"]
    done = CliRunner().invoke(application(), [*arguments, "--json", str(folder / "v.json")])
    assert done.exit_code == 1
    assert "bfv: the integers of 1 of 4 images are not those of the network" in done.output
    assert json.loads((folder / "v.json").read_text())["exact"] is False


def test_errors_of_the_command_are_one_line(folder: Path) -> None:
    program = Path(sys.executable).with_name("hemacrypt")
    for arguments in (
        ["verify", str(folder / "absent")],
        ["verify", str(folder / "bundle")],  # the embedded cells are no 8x8 images
        ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--where", "absent"],
        ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--engine", "other"],
        ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--rows", str(folder / "absent.npy")],
        ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--logits", str(folder)],
        ["verify", str(folder / "bundle"), "--images", str(folder / "cells.npz"), "--json", str(folder)],
    ):
        environment = os.environ | {"COLUMNS": "200"}
        done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert [line.startswith("error: ") for line in done.stderr.splitlines()] == [True]


def test_the_embedded_model_and_sample_are_what_is_verified_by_default() -> None:
    from hemacrypt.embedded import bundle_path
    from hemacrypt.model.bundle import Bundle

    cases = load([], limit=4)
    records = verify(Bundle.read(bundle_path()), cases, ("ckks", "bfv"), "vector", 2, _console())
    assert [failures(record) for record in records] == [[], []]
    assert [record["exact"] for record in records] == [None, True]


def test_a_model_of_cells_at_64_pixels_is_verified_on_the_embedded_sample(tmp_path: Path) -> None:
    bundle = write_large_bundle(tmp_path / "large")
    kept: dict[Scheme, Sequence[Outcome | None]] = {}
    (record,) = verify(bundle, load([], limit=6), ("ckks",), "seal", 1, _console(), kept.__setitem__)
    assert failures(record) == []
    told = [outcome.encrypted.argmax() for outcome in kept["ckks"] if outcome is not None]
    assert sorted(set(told)) == [0, 1]


def test_a_bundle_of_the_zoo_is_verified_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["verify", "balanced", "--limit", "1", "--engine", "seal", "--scheme", "ckks", "--json", "v.json"]
    done = CliRunner().invoke(application(), arguments)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "v.json").read_text())["disagreements"] == 0


def test_pairs_give_each_image_its_own_answer() -> None:
    from hemacrypt.embedded import bundle_path
    from hemacrypt.model.bundle import Bundle

    bundle, cases = Bundle.read(bundle_path()), load([], limit=3)
    kept: dict[Scheme, Sequence[Outcome | None]] = {}
    (record,) = verify(bundle, cases, ("ckks",), "vector", 1, _console(), kept.__setitem__, pairs=True)
    assert failures(record) == []
    assert (record["images"], record["images_at_a_time"]) == (3, 2)
    outcomes = [outcome for outcome in kept["ckks"] if outcome is not None]
    assert [outcome.case.source for outcome in outcomes] == [case.source for case in cases]
    for outcome in outcomes:
        clear = bundle.network(bundle.manifest.preprocessing(outcome.case.image)[None])[0]
        np.testing.assert_allclose(outcome.encrypted, clear, atol=outcome.bound)
    (single,) = verify(bundle, cases[:1], ("ckks",), "vector", 1, _console())
    assert single["images_at_a_time"] == 1
    assert record["bytes"]["upload_per_image"] < 0.6 * single["bytes"]["upload_per_image"]


def test_without_a_plan_for_pairs_images_go_one_by_one(small: Small, cases: list[Case]) -> None:
    console = _console()
    (record,) = verify(small.bundle, cases, ("ckks",), "seal", 1, console, pairs=True)
    assert failures(record) == []
    assert (record["images_at_a_time"] == 1) == ("go one by one" in _printed(console))
