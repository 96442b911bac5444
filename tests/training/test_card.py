"""The model card says what the manifest says, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hemacrypt import DISCLAIMER
from hemacrypt.embedded import bundle_path
from hemacrypt.model.bundle import CARD, Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.model.preprocess import ArrayPreprocessing, Preprocessing
from training.calibration import Calibration
from training.card import model_card
from training.errors import RunError
from training.evaluate import figures, paired_difference, subject_scores

SECTIONS = (
    "Intended use", "Data", "Figures", "By subject", "Confounders", "Calibration", "Limits", "Ethics and privacy",
    "How to make it again",
)  # fmt: skip


def measured(seed: int, protocol: str) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = (np.arange(60) % 2).astype(np.uint8)
    logits = rng.normal(size=(60, 2)) + np.eye(2)[labels]
    subjects = np.array([f"{'' if y else 'H'}{i // 2 % 5}" for i, y in enumerate(labels)])
    other = rng.normal(size=(60, 2))
    return {
        "figures": figures(logits, labels, subjects, protocol).model_dump(mode="json"),
        "difference": paired_difference(logits, other, labels, subjects).model_dump(mode="json"),
        "scores": [score.model_dump(mode="json") for score in subject_scores(logits, labels, subjects)],
    }


def bundle_with(**fields: Any) -> Bundle:
    network = CollapsedNetwork((3, 4, 4), (Dense(np.ones((2, 48)), np.zeros(2)),))
    preprocessing = Preprocessing(image_size=10, crop=8, block=2)
    return Bundle.create(
        network, name="tiny", labels=("normal", "leukaemic"), preprocessing=preprocessing, **fields
    )  # fmt: skip


@pytest.fixture(scope="module")
def full() -> Bundle:
    test, baseline = measured(1, "by the moon"), measured(2, "by the sun")
    calibration = Calibration(temperature=1.2345, fitted_on="folds", ece_before=0.111, ece_after=0.022, n=123)
    return bundle_with(
        description="A model.",
        training={"seed": 4711, "epochs": 3},
        data={
            "source": "somewhere",
            "protocol_in_words": "by lot",
            "fingerprint": "00ff",
            "parts": {"train": {"images": 765, "leukaemic": 432, "groups": ["a", "b", "c"]}},
        },
        metrics={
            "test": test["figures"],
            "margins": {"0.5": 98.7654},
            "baselines": {"area": baseline["figures"]},
            "differences": {"model minus area": test["difference"]},
            "calibration": calibration.model_dump(mode="json"),
            "subject_scores": {"test": test["scores"]},
        },
    )


def test_every_section_stands_in_a_card_with_figures_protocol_and_intervals(full: Bundle) -> None:
    card = model_card(full.manifest)
    assert card.startswith("# Model card: tiny\n")
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == list(SECTIONS)
    assert DISCLAIMER in card
    test = full.manifest.metrics["test"]
    for name in test["intervals"]:
        low, high = test["intervals"][name]
        assert f"{test[name]:.3f} ({low:.3f} to {high:.3f})" in card
    difference = full.manifest.metrics["differences"]["model minus area"]
    low, high = difference["intervals"]["auroc"]
    assert f"{difference['values']['auroc']:+.3f} ({low:+.3f} to {high:+.3f})" in card
    area = full.manifest.metrics["baselines"]["area"]
    assert f"{area['auroc']:.3f}" in card.split("## Confounders")[1]
    for words in ("by the moon", "by the sun", "by lot", "somewhere", "00ff", "| train | 765 | 432 | 3 |", "A model."):
        assert words in card
    for words in ("temperature 1.234", "123 cells (folds)", "before 0.111, after 0.022", '"seed": 4711'):
        assert words in card
    for score in full.manifest.metrics["subject_scores"]["test"]:
        assert f"| {score['subject']} | {'leukaemic' if score['label'] else 'normal'} | {score['cells']} |" in card
    assert "98.7654" not in card


def test_a_manifest_that_says_nothing_gives_a_card_without_figures() -> None:
    card = model_card(bundle_with().manifest)
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == list(SECTIONS)
    assert card.count("Not recorded in this bundle.") == 6
    # No share and no number with a fraction is left, but that of the licence.
    assert re.findall(r"\d+\.\d+|\d %", card.replace("CC BY 3.0", "").replace("Attribution 3.0", "")) == []


def test_a_number_that_changes_in_the_manifest_changes_in_the_card(full: Bundle) -> None:
    test = full.manifest.metrics["test"] | {"auroc": 0.12345}
    changed = full.manifest.model_copy(update={"metrics": full.manifest.metrics | {"test": test}})
    assert "0.123 (" in model_card(changed)
    assert "0.123 (" not in model_card(full.manifest)


def test_words_of_the_manifest_break_no_table(full: Bundle) -> None:
    parts = {"a|b\nc": {"images": 1, "leukaemic": 1, "groups": []}}
    changed = full.manifest.model_copy(update={"data": {"parts": parts}})
    assert r"| a\|b c | 1 | 1 | 0 |" in model_card(changed)


def test_the_shipped_card_has_the_figures_of_every_protocol() -> None:
    bundle = Bundle.read(bundle_path())
    assert bundle.card
    for protocol in ("grouped", "image", "heldout"):
        part = bundle.manifest.metrics[protocol]
        assert f"{part['auroc']:.3f} (" in bundle.card
        assert part["protocol"] in bundle.card


def test_older_bundles_have_a_card_with_the_intervals_that_they_have() -> None:
    manifest = Bundle.read(bundle_path()).manifest
    # As bundles before 0.2 kept them: one interval for accuracy and one for AUROC, and no others.
    part = dict(manifest.metrics["heldout"])
    part |= {f"{name}_interval": part["intervals"][name] for name in ("accuracy", "auroc")}
    del part["intervals"]
    card = model_card(manifest.model_copy(update={"metrics": {"validation": part}}))
    low, high = part["auroc_interval"]
    assert f"{part['auroc']:.3f} (" in card
    assert f"{low:.3f}" in card
    assert f"{high:.3f}" in card
    assert part["protocol"] in card


def test_the_card_goes_into_the_bundle_and_comes_back(full: Bundle, tmp_path: Path) -> None:
    card = model_card(full.manifest)
    read = full.with_card(card).write(tmp_path / "bundle")
    assert read.card == card == (tmp_path / "bundle" / CARD).read_text(encoding="utf-8")
    # The card does not depend on digests, so it can be made again from what it lies beside.
    assert model_card(read.manifest) == card


def test_other_models_get_no_card_about_blood_cells() -> None:
    network = CollapsedNetwork((1, 2, 2), (Dense(np.ones((2, 4)), np.zeros(2)),))
    bundle = Bundle.create(network, name="arrays", labels=("a", "b"), preprocessing=ArrayPreprocessing(shape=(1, 2, 2)))
    with pytest.raises(RunError, match="reads arrays, not cells"):
        model_card(bundle.manifest)
