"""The auditor's commands: ``demo`` and ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from client_sdk._results import Scheme
from client_sdk.cli import SchemeChoice
from hemacrypt import DISCLAIMER
from hemacrypt.embedded import find_bundle
from hemacrypt.engines import DEFAULT_ENGINE


def demo(
    out: Annotated[Path, typer.Option(help="Where the report and the picture go.")] = Path("build/demo"),
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many of the sample's cells.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of the service.")] = 1,
    engine: Annotated[str, typer.Option(help="Engine of the service: seal or vector.")] = DEFAULT_ENGINE,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="Name of an embedded bundle, or a directory. [default: balanced]"),
    ] = None,
) -> None:
    """Run the whole path on real cells: start a service, make keys, encrypt, predict, decrypt, compare, stop."""
    from audit.demo import run_demo

    raise typer.Exit(0 if run_demo(out, limit, workers, Console(), engine, find_bundle(model)) == 0 else 1)


def verify(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Bundle directory, or the name of an embedded bundle. [default: balanced]"),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Image files, folders, or .npz with `images` and `labels`; default: the embedded sample."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only images of an .npz for which this holds: a boolean array, or for example dup_of<0."),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Only these images of the .npz, in this order: .npy with row numbers.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, evenly spread.")] = None,
    scheme: Annotated[list[SchemeChoice] | None, typer.Option(help="Repeatable. [default: both]")] = None,
    engine: Annotated[str, typer.Option(help="Engine: vector, or seal, the reference.")] = DEFAULT_ENGINE,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Threads for one image (engine vector).")] = 1,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="ckks: two images at a time, where the model has a plan for that.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what came of it here.")] = None,
    logits_file: Annotated[
        Path | None, typer.Option("--logits", help="Write every image's logits, encrypted and clear, here (.npz).")
    ] = None,
) -> None:
    """Run a model encrypted and in the clear on real images, here, and compare: needs a bundle and no service.

    Exit status 1 when a prediction disagrees, an integer differs, or an error is beyond its bound.
    """
    from audit import verify as verifying
    from audit.cases import load
    from hemacrypt.embedded import find_bundle
    from hemacrypt.model.bundle import Bundle

    console = Console()
    chosen: list[Scheme] = [choice.value for choice in dict.fromkeys(scheme or SchemeChoice)]
    model, cases = Bundle.read(find_bundle(bundle)), load(images or (), where or (), limit, rows)
    for target in (logits_file, json_file):
        if target is not None:
            verifying.check_target(target)
    kept: dict[Scheme, Sequence[verifying.Outcome | None]] = {}
    console.print(
        f"[bold]Hemacrypt verify[/]: {escape(model.manifest.name)}, {len(cases)} images, {' and '.join(chosen)}"
    )
    records = verifying.verify(model, cases, chosen, engine, threads, console, kept.__setitem__, pairs)
    if logits_file is not None:
        verifying.write_logits(kept, cases, logits_file)
        console.print(f"written: {logits_file}", highlight=False)
    if json_file is not None:
        verifying.write(records, json_file)
        console.print(f"written: {json_file}", highlight=False)
    wrong = [(record["scheme"], told) for record in records for told in verifying.failures(record)]
    for name, told in wrong:
        typer.secho(f"{name}: {told}", err=True, fg="red")
    console.print(f"[bold]{DISCLAIMER}[/]")
    raise typer.Exit(1 if wrong else 0)
