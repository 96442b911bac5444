"""A plan explained: what it promises about sizes is what SEAL writes, and no weight is told."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from hemacrypt.planner.report.ckks import describe, show
from tests.hemacrypt.setups import Setup


@pytest.mark.parametrize("name", ["cell", "one_square", "regression", "pair", "spread"])
def test_estimated_sizes_are_within_five_percent_of_the_real_ones(name: str, request: pytest.FixtureRequest) -> None:
    setup: Setup = request.getfixturevalue(name)
    told = describe(setup.plan)["bytes"]
    public = setup.plan.public
    uploads = setup.holder.encrypt(np.full((public.images, *setup.network.input_shape), 0.5))
    assert told["upload"] == pytest.approx(sum(map(len, uploads)), rel=0.05)
    assert told["reply"] == pytest.approx(sum(map(len, setup.engine.evaluate(uploads, setup.keys))), rel=0.05)
    assert told["evaluation_keys"] == pytest.approx(len(setup.evaluation_keys.to_bytes()), rel=0.05)
    assert told["largest_upload"] > sum(len(setup.full(upload)) for upload in uploads)


def test_a_description_is_plain_json_without_weights(cell: Setup) -> None:
    told = json.loads(json.dumps(describe(cell.plan)))
    assert [step["level"] for step in told["steps"]] == [5, 4, 3, 2, 1]
    # Half the diagonals of the convolution's 144, four of the last map for the guard's sake, and one product a square.
    assert sum(step["multiplications"] for step in told["steps"]) == 72 + 64 + 4 + 2
    assert [step["kind"] for step in told["steps"]] == ["affine", "plain", "affine", "plain", "affine"]
    assert told["layouts"]["input"] == {"ciphertexts": 1, "period": 2048, "imaginary": 1024, "images": 1}
    assert told["keys"] == [
        {"level": group.level, "relinearise": group.relinearise, "elements": list(group.elements)}
        for group in cell.plan.public.keys
    ]
    assert told["plan_id"] == cell.plan.public.plan_id
    # One number per step and field: nowhere a list as long as a layer.
    assert max(len(value) for step in told["steps"] for value in step.values() if isinstance(value, (list, str))) < 80


def test_the_table_names_every_step_and_reason(cell: Setup) -> None:
    output = io.StringIO()
    show(cell.plan, Console(file=output, width=250))
    for text in (*(step.name for step in cell.plan.steps), *cell.plan.reasons, "N = 8192", "210 bits", "for 1 image."):
        assert text in output.getvalue()


def test_the_table_tells_of_two_images_and_of_several_ciphertexts(pair: Setup, spread: Setup) -> None:
    for setup, texts in ((pair, ("part, square, join", "for 2 images.")), (spread, ("square, join", "2 → 1"))):
        output = io.StringIO()
        show(setup.plan, Console(file=output, width=250))
        for text in (*texts, *setup.plan.reasons):
            assert text in output.getvalue()
