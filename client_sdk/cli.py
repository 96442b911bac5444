"""The hospital's commands: ``models``, ``keygen``, ``register``, ``predict``, ``forget``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from client_sdk._client import Client
from client_sdk._results import Prediction, Scheme
from hemacrypt import DISCLAIMER
from hemacrypt.errors import ImageError

ServerOption = Annotated[
    str, typer.Option("--server", "-s", envvar="HEMACRYPT_SERVER", help="host:port of the service.")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Name of the model; see `hemacrypt models`.")]
KeysOption = Annotated[
    Path | None, typer.Option("--keys", "-k", help="Key directory; default: in the user's data directory.")
]
TlsOption = Annotated[
    Path | None, typer.Option("--tls-root", help="PEM certificate of the authority that signed the service's.")
]
_SERVER, _MODEL = "127.0.0.1:50051", "leukaemia"


class SchemeChoice(StrEnum):
    """How images are encrypted."""

    ckks = "ckks"
    bfv = "bfv"


class LayoutChoice(StrEnum):
    """How images are sent."""

    auto = "auto"
    single = "single"
    batch = "batch"


def models(server: ServerOption = _SERVER, tls_root: TlsOption = None) -> None:
    """List the models that a service offers."""
    with Client(server, "", key_directory=Path(), root_certificate=tls_root) as client:
        table = Table("model", "description", "plan")
        for model in client.models():
            table.add_row(escape(model.name), escape(model.description), escape(model.plan_id[:12]))
    Console().print(table)


def keygen(
    server: ServerOption = _SERVER,
    model: ModelOption = _MODEL,
    keys: KeysOption = None,
    tls_root: TlsOption = None,
    replace: Annotated[bool, typer.Option(help="Replace keys that are there already; they are lost.")] = False,
) -> None:
    """Generate a secret key, which stays here, and the evaluation keys that the service needs."""
    with Client(server, model, key_directory=keys, root_certificate=tls_root) as client:
        key_set = client.generate_keys(replace=replace)
        size = len(client.keys.evaluation_blob())
        print(f"secret key and evaluation keys ({size / 1e6:.1f} MB) are in {client.keys.path}")
        print(f"key set {key_set}; next: hemacrypt register")


def register(
    server: ServerOption = _SERVER, model: ModelOption = _MODEL, keys: KeysOption = None, tls_root: TlsOption = None
) -> None:
    """Upload the evaluation keys to the service; continues where an earlier upload broke off."""
    with (
        Client(server, model, key_directory=keys, root_certificate=tls_root) as client,
        Progress(TextColumn("evaluation keys"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bar,
    ):
        task = bar.add_task("upload", total=None)
        key_set = client.register(lambda sent, total: bar.update(task, completed=sent, total=total))
    print(f"registered key set {key_set}; next: hemacrypt predict IMAGE")


def predict(
    images: Annotated[list[Path], typer.Argument(help="Cell images: PNG, BMP or TIFF, 450x450, one cell on black.")],
    server: ServerOption = _SERVER,
    model: ModelOption = _MODEL,
    keys: KeysOption = None,
    tls_root: TlsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line per image.")] = False,
    layout: Annotated[
        LayoutChoice,
        typer.Option(help="One by one, all in batches, or whichever takes less time for so many images."),
    ] = LayoutChoice.auto,
    scheme: Annotated[
        SchemeChoice,
        typer.Option(help="ckks: logits within a bounded error. bfv: integer weights, exact, one by one, slower."),
    ] = SchemeChoice.ckks,
) -> None:
    """Encrypt images, have them evaluated, decrypt and print the answers."""
    if scheme is SchemeChoice.bfv and layout is LayoutChoice.batch:
        raise typer.BadParameter("batches are evaluated under ckks; leave --layout or --scheme out")
    console = Console()
    table = Table("image", "prediction", "probability", "ms", title=DISCLAIMER, title_justify="left")
    with Client(server, model, key_directory=keys, root_certificate=tls_root) as client:
        client.prepare()
        chosen = client.layout_for(len(images)) if layout is LayoutChoice.auto else layout.value
        if chosen == "batch" and scheme is SchemeChoice.ckks:
            answers = _in_batches(client, images)
        else:
            answers = _one_by_one(client, images, scheme.value)
        done = 0
        for answer in answers:
            done += 1
            if as_json:
                print(json.dumps(as_record(answer)))
            milliseconds = sum(asdict(answer.milliseconds).values()) / answer.images
            source, label = escape(answer.source), escape(answer.label)
            table.add_row(source, label, f"{answer.probability:.3f}", f"{milliseconds:.0f}")
    if not as_json and table.row_count:
        console.print(table)
    if done < len(images):
        raise typer.Exit(1)


def _one_by_one(client: Client, images: list[Path], scheme: Scheme) -> Iterator[Prediction]:
    for image in images:
        try:
            yield client.predict(image, scheme=scheme)
        except ImageError as error:
            typer.secho(f"error: {error}", err=True, fg="red")


def _in_batches(client: Client, images: list[Path]) -> Iterator[Prediction]:
    """Predict all images that can be read, and say which cannot."""
    preprocessing, pixels, names = client.preprocessing, [], []
    for image in images:
        try:
            reduced = preprocessing.read(image)
            preprocessing(reduced)
        except ImageError as error:
            typer.secho(f"error: {error}", err=True, fg="red")
            continue
        pixels.append(reduced)
        names.append(str(image))
    columns = TextColumn("ciphertexts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("upload", total=None)
        answers = client.predict_batch(pixels, lambda sent, total: bar.update(task, completed=sent, total=total))
    yield from (replace(answer, source=name) for answer, name in zip(answers, names, strict=True))


def forget(
    server: ServerOption = _SERVER, model: ModelOption = _MODEL, keys: KeysOption = None, tls_root: TlsOption = None
) -> None:
    """Delete the evaluation keys from the service; the keys here stay."""
    with Client(server, model, key_directory=keys, root_certificate=tls_root) as client:
        print("deleted from the service" if client.forget() else "the service had no such keys")


def as_record(answer: Prediction) -> dict[str, object]:
    """Return a prediction as plain values, for JSON."""
    return {
        "image": answer.source,
        "scheme": answer.scheme,
        "label": answer.label,
        "probabilities": answer.probabilities,
        # Digits below the error bound say nothing of the cell, but might of the key (see docs/threat-model.md).
        "logits": [_without_noise(logit, answer.error_bound) for logit in answer.logits.tolist()],
        "logit_error_bound": answer.error_bound,
        "quantisation_error": answer.quantisation_error,
        "milliseconds": asdict(answer.milliseconds),
        "bytes": asdict(answer.size),
        "note": DISCLAIMER,
    }


def _without_noise(logit: float, bound: float) -> float:
    """Round a logit to the digits that its error bound leaves; an exact one stays as it is."""
    return round(logit, max(-math.ceil(math.log10(bound)), 0)) if bound else logit
