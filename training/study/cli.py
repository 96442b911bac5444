"""The commands of ``hemacrypt study``; TensorFlow is imported inside them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hemacrypt import DISCLAIMER
from training.cli import DataOption, quiet_tensorflow, tell_export
from training.datasets import data_folder
from training.study.config import Protocol, read_study, shipped

app = typer.Typer(
    help="Train and compare many models: run a study, report, export and encrypt its networks.",
    no_args_is_help=True,
)


class ProtocolChoice(StrEnum):
    """How the data was divided; see docs/studies.md."""

    image = "image"
    grouped = "grouped"
    heldout = "heldout"


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
    division: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="This division, such as grouped-2, for a process of its own; repeatable."),
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

    whole = Study(config, data_folder(data), final, only or (), console, division or ())
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


@app.command()
def export(
    study: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `hemacrypt study run` has written.")],
    model: Annotated[str, typer.Argument(help="A square model of the study, with keep_weights = true.")],
    protocol: Annotated[ProtocolChoice, typer.Option(help="Which of its networks: the protocol it was trained under,")],
    out: Annotated[Path, typer.Option("--out", help="Bundle directory to write.")],
    name: Annotated[str, typer.Option(help="Name under which the bundle is served.")] = "leukaemia",
    description: Annotated[str, typer.Option(help="What it is, in a sentence. [default: made of the layers]")] = "",
    fold: Annotated[int, typer.Option(min=0, help="the fold that it was not trained on (grouped),")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="and the seed. [default: the model's first]")] = None,
    data: DataOption = None,
) -> None:
    """Make a bundle of a study's network: folded, checked, with a fitted temperature, the study's figures and a card.

    Held-out cells are not read, not even for a network of the protocol heldout.
    """
    console = Console()
    quiet_tensorflow()
    from training.study.export import export_trained, study_cells, trained_run
    from training.study.results import collect

    results = collect(study, with_encrypted=False)
    run = trained_run(results, model, protocol.value, fold, seed)
    cells = study_cells(data_folder(data), run.model.size)
    bundle, difference = export_trained(results, run, cells, out, name, description)
    console.print(f"temperature {bundle.manifest.metrics['calibration']['temperature']:.3f}, in the last layer")
    tell_export(out, bundle, difference, f"the {'train' if run.protocol == 'heldout' else 'test'} images", console)


@app.command()
def encrypt(
    study: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `hemacrypt study run` has written.")],
    data: DataOption = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Only this model; repeatable. [default: all that kept weights]")
    ] = None,
    protocol: Annotated[
        list[ProtocolChoice] | None, typer.Option("--protocol", help="Only networks of this protocol; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many test cells of each network.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Threads for one image.")] = 1,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Two cells at a time: sooner done; milliseconds are then a throughput.")
    ] = False,
) -> None:
    """Evaluate the test cells of a study's square networks under encryption, and report again.

    What is there already is passed over. Exit status 1 when a network could not be evaluated.
    """
    console = Console()
    quiet_tensorflow()
    from training.study.encrypt import encrypt_study
    from training.study.report import write_report

    protocols: list[Protocol] = [choice.value for choice in protocol or ()]
    outcomes = encrypt_study(study, data_folder(data), model or (), protocols, limit, threads, pairs, console)
    write_report(study)
    console.print(f"{study / 'report.md'}: tables and pictures")
    console.print(DISCLAIMER)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


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
