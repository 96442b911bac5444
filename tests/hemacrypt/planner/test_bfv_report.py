"""An exact plan explained: bits and budgets of every step, no weight told, and the options of `hemacrypt plan`."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from hemacrypt import cli
from hemacrypt.embedded import bundle_path
from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.planner.latency.bfv import plan_bfv_bundle
from hemacrypt.planner.report.bfv import bits_of, describe_bfv, show_bfv
from hemacrypt.planner.throughput.bfv import plan_bfv_batch_bundle

COMMAND = typer.Typer()
COMMAND.command()(cli.plan)


@pytest.fixture(scope="module")
def plan() -> BfvPlan:
    return plan_bfv_bundle(Bundle.read(bundle_path()))


def test_a_description_is_plain_json_without_weights(plan: BfvPlan) -> None:
    told = json.loads(json.dumps(describe_bfv(plan)))
    assert [step["kind"] for step in told["steps"]] == ["affine", "square", "affine", "square", "affine"]
    assert [step["bits"] for step in told["steps"]] == [bits_of(value) for value in plan.step_magnitudes]
    assert all(step["measured_bits"] <= step["bits"] for step in told["steps"])
    assert told["logit_bits"] <= told["plain_bits"]
    assert told["plain_moduli"] == list(plan.public.plain_moduli)
    assert max(len(value) for step in told["steps"] for value in step.values() if isinstance(value, (list, str))) < 80


def test_the_tables_name_every_step_and_reason(plan: BfvPlan) -> None:
    output = io.StringIO()
    show_bfv(plan, Console(file=output, width=300))
    for text in (*(step.name for step in plan.steps), *plan.reasons, *map(str, plan.public.plain_moduli), "worst case"):
        assert text in output.getvalue()


def test_bits_count_the_sign() -> None:
    assert [bits_of(largest) for largest in (0, 1, 127, 128)] == [1, 2, 8, 9]


def test_the_command_takes_what_the_planner_takes() -> None:
    moduli = [957181001729, 957181034497, 957181526017]
    asked = ["--degree", "16384", "--plain-moduli", ",".join(map(str, moduli)), "--magnitudes", "measured"]
    done = CliRunner().invoke(COMMAND, ["--scheme", "bfv", "--json", *asked])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["scheme"], told["degree"], told["plain_moduli"]) == ("bfv", 16384, moduli)


def test_a_batch_is_explained_too() -> None:
    done = CliRunner().invoke(COMMAND, ["--scheme", "bfv", "--images", "5000", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["layout"], told["images"], len(told["plain_moduli"])) == ("batch", 8192, 3)
    assert [step["rotations"] for step in told["steps"]] == [0] * 5
    output = io.StringIO()
    show_bfv(plan_bfv_batch_bundle(Bundle.read(bundle_path())), Console(file=output, width=300))
    assert "BFV batches" in output.getvalue()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--scheme", "bfv", "--plain-moduli", "7,x"], "expected integers"),
        (["--degree", "8192"], "add --scheme bfv"),
        (["--scheme", "bfv", "--images", "3", "--degree", "8192"], "leave out --degree"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], reason: str) -> None:
    done = CliRunner().invoke(COMMAND, [*options])
    assert isinstance(done.exception, PlanError)
    assert reason in str(done.exception)
