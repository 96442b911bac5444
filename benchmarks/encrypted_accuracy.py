"""Accuracy under encryption, on every image of a test part, through a real service process.

Each image is encrypted, sent, evaluated on the ciphertext and decrypted; the same network in the clear stands beside
it, and disagreements are counted image by image. Without arguments: the embedded bundle on the embedded sample. With
``--run`` and ``--data``: the test part of a training run, for example of the paper's protocol::

    hemacrypt train --protocol image --data DATA --out build/runs/image
    hemacrypt export build/runs/image --data DATA --out build/bundles/image --name image-split
    python benchmarks/encrypted_accuracy.py --bundle build/bundles/image --run build/runs/image --data DATA
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import track

from audit.demo import running_service
from client_sdk import Client
from hemacrypt import DISCLAIMER
from hemacrypt.embedded import find_bundle
from hemacrypt.engines import DEFAULT_ENGINE
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.preprocess import Preprocessing
from training.datasets import Split, embedded_part, load_cells, load_split
from training.evaluate import figures

Images = npt.NDArray[np.uint8]


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = model or platform.machine()
    names = ("hemacrypt", "tenseal", "numpy", "grpcio")
    return {"cpu": model, "python": platform.python_version()} | {name: version(name) for name in names}


def part_to_measure(
    run: Path | None, data: Path | None, heldout: bool, preprocessing: Preprocessing
) -> tuple[Images, npt.NDArray[np.uint8], npt.NDArray[np.str_], str]:
    """Return images, labels, subjects and the protocol in words."""
    if run is not None and data is not None:
        return *load_split(run, data, "test", preprocessing), Split.read(run).words
    if heldout and data is not None:
        cells = load_cells(data, preprocessing)
        rows = cells.heldout & (cells.dup_of < 0)
        return (
            cells.images[rows],
            cells.labels[rows],
            cells.subjects[rows],
            "held-out subjects, never trained or tuned on",
        )
    part = embedded_part(preprocessing)
    return part.images, part.labels, part.subjects, "embedded sample of held-out subjects, never trained or tuned on"


def main(
    bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle directory, or the name of an embedded bundle. [default: balanced]"),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Training run whose test part is used; needs --data.")] = None,
    data: Annotated[Path | None, typer.Option(envvar="HEMACRYPT_DATA", help="Folder of the C-NMC data.")] = None,
    heldout: Annotated[bool, typer.Option(help="Use all held-out subjects; needs --data.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of the service.")] = 2,
    engine: Annotated[str, typer.Option(help="Engine of the service: seal or vector.")] = DEFAULT_ENGINE,
    pairs: Annotated[bool, typer.Option(help="Send images in pairs, where the model has a plan for that.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many images, evenly spread.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("build/bench/encrypted_accuracy.json"),
) -> None:
    """Measure accuracy under encryption on a whole test part."""
    console = Console()
    directory = find_bundle(bundle)
    opened = Bundle.read(directory)
    images, labels, subjects, protocol = part_to_measure(run, data, heldout, opened.manifest.preprocessing)
    if limit is not None and limit < len(images):
        spread = np.linspace(0, len(images) - 1, limit).astype(int)
        images, labels, subjects = images[spread], labels[spread], subjects[spread]
    clear = np.concatenate(
        [
            opened.network(opened.manifest.preprocessing.normalise(part))
            for part in np.array_split(images, 1 + len(images) // 200)
        ]
    )
    with tempfile.TemporaryDirectory(prefix="hemacrypt-bench-") as scratch:
        here = Path(scratch)
        with (
            running_service(directory, here, workers, here / "service.log", engine) as target,
            Client(target, opened.manifest.name, key_directory=here / "keys") as client,
        ):
            client.prepare()
            started = time.perf_counter()
            # An array goes in pairs, an iterator one by one.
            answering = client.predict_many(images if pairs else iter(images))
            answers = list(track(answering, "encrypted", total=len(images), console=console))
            seconds = time.perf_counter() - started
    encrypted = np.stack([answer.logits for answer in answers])
    # For each image: those of a request share its time.
    compute = np.array([answer.milliseconds.compute / answer.images for answer in answers])
    report: dict[str, Any] = {
        "model": opened.manifest.name,
        "engine": engine,
        "bundle": opened.digest,
        "protocol": protocol,
        "images": len(images),
        "encrypted": figures(encrypted, labels, subjects, protocol).model_dump(mode="json"),
        "clear": figures(clear, labels, subjects, protocol).model_dump(mode="json"),
        "disagreements": int((encrypted.argmax(1) != clear.argmax(1)).sum()),
        "max_logit_error": float(np.abs(encrypted - clear).max()),
        "logit_error_bound": max(answer.error_bound for answer in answers),
        "images_per_request": max(answer.images for answer in answers),
        "compute_ms": {
            "median": float(np.median(compute)),
            "min": float(compute.min()),
            "p95": float(np.percentile(compute, 95)),
        },
        "seconds": seconds,
        "workers": workers,
        "machine": machine(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print_json(json.dumps(report))
    console.print(
        f"{protocol}: accuracy {report['encrypted']['accuracy']:.2%} encrypted, "
        f"{report['clear']['accuracy']:.2%} clear, {report['disagreements']} disagreements on {len(images)} images"
    )
    console.print(f"written: {out}. {DISCLAIMER}")
    sys.exit(0 if report["disagreements"] == 0 else 1)


if __name__ == "__main__":
    typer.run(main)
