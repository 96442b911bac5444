"""Plans as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hemacrypt.errors import PlanError
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.planner import plan_network
from hemacrypt.planner.latency.bfv import plan_bfv
from hemacrypt.planner.report.bfv import describe_bfv
from hemacrypt.planner.report.ckks import describe
from hemacrypt.planner.report.picture import draw_plan


@pytest.fixture(scope="module")
def network() -> CollapsedNetwork:
    rng = np.random.default_rng(1)
    layers = (Dense(rng.normal(size=(4, 8)), np.zeros(4)), Dense(rng.normal(size=(2, 4)), np.zeros(2)))
    return CollapsedNetwork((1, 2, 4), layers).calibrated(rng.random((20, 8)))


@pytest.mark.parametrize("scheme", ["ckks", "bfv"])
def test_both_schemes_are_drawn(scheme: str, network: CollapsedNetwork, tmp_path: Path) -> None:
    told = describe(plan_network(network)) if scheme == "ckks" else describe_bfv(plan_bfv(network))
    draw_plan(told, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 500
    # Bars in the colour of scales, or of the plaintext modulus.
    assert (pixels == (0x30, 0x63, 0x8E)).all(axis=2).sum() > 5000
    draw_plan(told, tmp_path / "plan.svg")
    assert "<svg" in (tmp_path / "plan.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["missing/plan.png", "plan.nothing"])
def test_a_file_that_cannot_be_written_is_named(name: str, network: CollapsedNetwork, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot write .*name a \.png"):
        draw_plan(describe(plan_network(network)), tmp_path / name)
