"""The commands ``hemacrypt study run | report | list | search``; TensorFlow is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hemacrypt import DISCLAIMER
from training.cli import DataOption, quiet_tensorflow
from training.datasets import data_folder
from training.study.config import read_study, shipped

app = typer.Typer(
    help="Train and compare many models: run a study, report on it, list the studies.", no_args_is_help=True
)


@app.command()
def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name of a shipped study, or a TOML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for runs and reports; an interrupted study goes on.")],
    data: DataOption = None,
    final: Annotated[
        bool, typer.Option("--final", help="Also measure on the held-out subjects. Once, when nothing will change.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="MODEL", help="This model and what it needs; repeatable.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Redo finished runs, and replace runs of another kind.")
    ] = False,
    full_size: Annotated[
        bool, typer.Option("--full-size", help="Ordinary networks at their published width; wants a GPU.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for TensorFlow; default: all.")] = None,
) -> None:
    """Run what a study names and is not there yet, then report.

    Held-out subjects are neither read nor measured on without --final.
    """
    console = Console()
    quiet_tensorflow(threads)
    config = read_study(study)
    if full_size:
        config = config.full_size()
    from training.study.report import write_report
    from training.study.runner import Study, run_study

    whole = Study(config, data_folder(data), final, only or (), console)
    skipped = [model.name for model in whole.models if "heldout" in config.protocols_of(model)]
    if skipped and not final:
        console.print(f"held-out subjects: not read, and {len(skipped)} models not run on them; that is for --final")
    command = f"hemacrypt study run {Path(study).name} --data DATA --out OUT"
    command += f"{' --full-size' if full_size else ''}{' --final' if final else ''}"
    outcomes = run_study(whole, out, again, command, console)
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    console.print(", ".join(f"{count} runs {status}" for status, count in counts.items()))
    write_report(out)
    console.print(f"{out / 'report.md'}: tables and pictures")
    console.print(DISCLAIMER)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Folder that `hemacrypt study run` has written.")]) -> None:
    """Make tables and pictures out of the runs that are there; trains nothing."""
    from training.study.report import write_report

    write_report(out)
    Console().print(f"{out / 'report.md'}: tables and pictures")


@app.command("list")
def list_studies() -> None:
    """List the studies that come with Hemacrypt, with their models."""
    table = Table("study", "models", "protocols", "about")
    for name in shipped():
        study = read_study(name)
        models = ", ".join(model.name for model in study.models)
        table.add_row(name, models, ", ".join(study.protocols), study.description)
    Console().print(table)


@app.command()
def search(
    out: Annotated[Path, typer.Option("--out", help="Folder of trials and results; an interrupted search goes on.")],
    config: Annotated[
        str, typer.Argument(metavar="[CONFIG]", help="A TOML file; default: the one shipped.")
    ] = "default",
    data: DataOption = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="In all, refused ones and those of earlier calls included.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every trial; default: as the file says.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="MINUTES", help="Begin no trial after this time.")
    ] = None,
    budget_ms: Annotated[
        float | None, typer.Option("--budget-ms", min=0, help="Train nothing whose predicted time is longer.")
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option("--teacher", metavar="RUN", help="Finished run of a study in the same division; repeatable."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for TensorFlow; default: all.")] = None,
) -> None:
    """Search square networks that are accurate and cheap under encryption; see docs/studies.md.

    Trials are compared on cells of the training pool. Held-out subjects are not read.
    """
    console = Console()
    quiet_tensorflow(threads)
    from training.search import Search, read_search

    chosen = read_search(config)
    if epochs is not None:
        chosen = chosen.model_copy(update={"epochs": epochs})
    searched = Search(chosen, data_folder(data), out, teacher or (), budget_ms, console)
    given = {"--trials": trials, "--epochs": epochs, "--timeout": timeout, "--budget-ms": budget_ms}
    words = [f"{name} {value:g}" for name, value in given.items() if value is not None]
    words += ["--teacher RUN"] * len(teacher or ())
    try:
        searched.run(chosen.trials if trials is None else trials, timeout)
    finally:
        searched.report(" ".join(["hemacrypt study search", Path(config).name, "--data DATA --out OUT", *words]))
    console.print(f"{out / 'pareto.md'}: the front, tables and a picture")
    console.print(DISCLAIMER)
