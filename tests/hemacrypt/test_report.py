"""A plan explained: what it promises about sizes is what SEAL writes, and no weight is told."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from hemacrypt.planner.report import describe, show
from tests.hemacrypt.setups import Setup


@pytest.mark.parametrize("name", ["cell", "one_square"])
def test_estimated_sizes_are_within_five_percent_of_the_real_ones(name: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    told = describe(setup.plan)["bytes"]
    upload = setup.holder.encrypt(np.full(setup.network.input_shape, 0.5))
    assert told["upload"] == pytest.approx(len(upload), rel=0.05)
    assert told["reply"] == pytest.approx(len(setup.engine.evaluate(upload, setup.keys)), rel=0.05)
    assert told["evaluation_keys"] == pytest.approx(len(setup.evaluation_keys.to_bytes()), rel=0.05)
    assert told["largest_upload"] > len(setup.full(upload))


def test_a_description_is_plain_json_without_weights(cell: Setup) -> None:
    told = json.loads(json.dumps(describe(cell.plan)))
    assert [step["level"] for step in told["steps"]] == [5, 4, 3, 2, 1]
    assert sum(step["multiplications"] for step in told["steps"]) == 144 + 64 + 2 + 2
    assert told["plan_id"] == cell.plan.public.plan_id
    # One number per step and field: nowhere a list as long as a layer.
    assert max(len(value) for step in told["steps"] for value in step.values() if isinstance(value, (list, str))) < 80


def test_the_table_names_every_step_and_reason(cell: Setup) -> None:
    output = io.StringIO()
    show(cell.plan, Console(file=output, width=200))
    for text in (*(step.name for step in cell.plan.steps), *cell.plan.reasons, "N = 8192", "210 bits"):
        assert text in output.getvalue()
