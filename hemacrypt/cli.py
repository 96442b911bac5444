"""The ``hemacrypt`` command: one program out of the commands of whichever extras are installed.

Each package names its commands as entry points (``hemacrypt.commands`` in pyproject.toml), so the parties need not
import each other to share a program.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hemacrypt import DISCLAIMER, __version__
from hemacrypt.errors import HemacryptError

# The order of a first visit, not of the alphabet.
_ORDER = (
    "demo", "verify", "train", "export", "convert", "plan", "evaluate", "study", "serve",
    "models", "keygen", "register", "predict", "forget",
)  # fmt: skip
_PANELS = {
    "audit": "First",
    "training": "Laboratory: train and export",
    "service": "Laboratory: serve",
    "client_sdk": "Hospital",
}


def plan(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Bundle directory, or the name of an embedded bundle. [default: balanced]"),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="1 or 2: the plan for so many in a request; more: which layout suits so many.")
    ] = 1,
    key_budget_mb: Annotated[
        float | None, typer.Option(help="Megabytes that evaluation keys may take. [default: about 34]")
    ] = None,
    precision: Annotated[
        int | None,
        typer.Option(help="k for logits to within 2^-k; ckks only. [default: what the model's margins ask for]"),
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose errors are predicted: vector or seal; ckks only.")] = "vector",
    scheme: Annotated[
        Literal["ckks", "bfv"], typer.Option(help="ckks: real numbers with a bounded error; bfv: integers, exactly.")
    ] = "ckks",
    plain_moduli: Annotated[
        str, typer.Option(help="Plaintext moduli to use, with commas; bfv only. [default: as few as are needed]")
    ] = "",
    degree: Annotated[
        int | None, typer.Option(help="Polynomial degree to use; bfv only. [default: the smallest that serves]")
    ] = None,
    magnitudes: Annotated[
        Literal["worst", "measured"],
        typer.Option(help="Room for any input in range, or for 16 times what training data made; bfv only."),
    ] = "worst",
    picture: Annotated[
        Path | None, typer.Option(help="Draw modulus chain and magnitudes into this file (png, svg, pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Explain how a model runs under encryption: parameters, levels, scales, rotations, error, sizes."""
    from hemacrypt.embedded import find_bundle
    from hemacrypt.errors import PlanError
    from hemacrypt.model.bundle import Bundle
    from hemacrypt.planner import plan_bundle_layouts
    from hemacrypt.planner.offer import describe_comparison, show_comparison
    from hemacrypt.planner.report.ckks import describe, show
    from hemacrypt.planner.report.picture import draw_plan

    budget = None if key_budget_mb is None else round(key_budget_mb * 1e6)
    if scheme == "bfv" and precision is not None:
        raise PlanError("a precision is chosen for CKKS only: under BFV integers are exact; leave it out")
    if scheme == "bfv":
        from hemacrypt.planner.latency.bfv import plan_bfv_bundle
        from hemacrypt.planner.report.bfv import ExactPlan, describe_bfv, show_bfv
        from hemacrypt.planner.throughput.bfv import plan_bfv_batch_bundle

        read, moduli = Bundle.read(find_bundle(bundle)), _integers(plain_moduli)
        exact: ExactPlan
        if images > 2:
            if degree is not None or budget is not None:
                raise PlanError("a batch's degree is chosen, and it has few keys; leave out --degree and the budget")
            exact = plan_bfv_batch_bundle(read, plain_moduli=moduli, magnitudes=magnitudes)
        else:
            exact = plan_bfv_bundle(
                read, images=images, plain_moduli=moduli, degree=degree, magnitudes=magnitudes, key_budget=budget
            )
        if as_json:
            print(json.dumps(describe_bfv(exact), indent=2))
        else:
            show_bfv(exact, Console())
        if picture is not None:
            draw_plan(describe_bfv(exact), picture)
        return
    if plain_moduli or degree is not None or magnitudes != "worst":
        raise PlanError("plaintext moduli, degree and magnitudes are chosen for BFV only; add --scheme bfv")
    layouts = plan_bundle_layouts(Bundle.read(find_bundle(bundle)), budget, precision=precision, engine=engine)
    if images > 2:
        if as_json:
            print(json.dumps(describe_comparison(layouts, images), indent=2))
        else:
            show_comparison(layouts, images, Console())
        return
    planned = next((plan for plan in layouts.plans if plan.public.images == images), None)
    if planned is None:
        raise PlanError(f"no plan carries {images} images: for this network and key budget one at a time is as fast")
    if as_json:
        print(json.dumps(describe(planned), indent=2))
    else:
        show(planned, Console())
    if picture is not None:
        draw_plan(describe(planned), picture)


def _integers(listed: str) -> tuple[int, ...] | None:
    """Read integers between commas; None where there are none."""
    from hemacrypt.errors import PlanError

    try:
        return tuple(int(word) for word in listed.split(",")) if listed else None
    except ValueError:
        raise PlanError(f"plaintext moduli {listed!r}; expected integers with commas between them") from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hemacrypt {__version__}")
        raise typer.Exit


def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Take the options that stand before any command; the work is in their callbacks."""


def _unavailable(entry: EntryPoint, error: ImportError) -> Callable[[], None]:
    package = entry.module.split(".")[0]
    extra = {"client_sdk": "client", "audit": "client,service"}.get(package, package)

    def explain() -> None:
        typer.secho(f"`{entry.name}` needs more: pip install 'hemacrypt[{extra}]' ({error})", err=True, fg="red")
        raise typer.Exit(1)

    explain.__doc__ = f"Not installed: pip install 'hemacrypt[{extra}]'."
    return explain


def application() -> typer.Typer:
    """Assemble the program from the installed commands."""
    app = typer.Typer(
        help=f"Ask a laboratory's network about a blood cell without showing the cell. {DISCLAIMER}",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_about)
    entries = {entry.name: entry for entry in entry_points(group="hemacrypt.commands")}
    for name in sorted(entries, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        entry = entries[name]
        try:
            command: Callable[..., Any] = entry.load()
        except ImportError as error:
            command = _unavailable(entry, error)
        panel = _PANELS.get(entry.module.split(".")[0], "Laboratory: train and export")
        if isinstance(command, typer.Typer):  # a command with commands of its own
            app.add_typer(command, name=name, rich_help_panel=panel)
            continue
        app.command(name, rich_help_panel=panel)(command)
    return app


def main() -> None:
    """Run the program; errors of ours become one line and exit status 1."""
    try:
        application()()
    except HemacryptError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(1)
