"""The training side's commands: ``train``, ``export``, ``evaluate``.

TensorFlow is imported inside the commands, so that ``hemacrypt --help`` does not wait for it.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer
from rich.console import Console

from hemacrypt import DISCLAIMER
from hemacrypt.embedded import find_bundle
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.preprocess import Preprocessing
from training import datasets
from training.errors import RunError
from training.settings import Settings, defaults, read_json

if TYPE_CHECKING:
    from training.evaluate import Figures

_DESCRIPTION = (
    "CryptoNets for ALL: is this blood cell leukaemic? One segmented, stain-normalised cell on black (450x450, as "
    "C-NMC 2019) is reduced to 32x32 pixels; convolution, square, dense, square, dense. Decision support for research, "
    "not a diagnosis."
)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="HEMACRYPT_DATA",
        help="Folder of C-NMC 2019: the release as unpacked, lossless copies with index.csv, or cnmc_32.npz.",
    ),
]


def _preprocessing() -> Preprocessing:
    return Preprocessing.model_validate({})


def quiet_tensorflow(threads: int | None = None) -> None:
    """Keep TensorFlow's start-up chatter off the terminal; has to happen before it is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if threads is not None:
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)


def _load(data: Path | None, preprocessing: Preprocessing, console: Console) -> datasets.CellImages:
    from training.report import read_progress

    folder = datasets.data_folder(data)
    return datasets.load_cells(folder, preprocessing, partial(read_progress, console))


def train(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the run into.")],
    data: DataOption = None,
    protocol: Annotated[
        Literal["image", "subject"],
        typer.Option(help="image: 80/20 by image, as the paper, optimistic; subject: no person on both sides."),
    ] = "subject",
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 60 by image, 30 by subject.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order, augmentation, dropout.")] = None,
    split_seed: Annotated[int | None, typer.Option(min=0, help="Of the division into train, validation, test.")] = None,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="settings.json of an earlier run; takes the place of all others.")
    ] = None,
    final: Annotated[
        bool, typer.Option("--final", help="Subject protocol: also measure on the held-out subjects. Once, at the end.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for TensorFlow; default: all.")] = None,
) -> None:
    """Train the network on labelled cells; write model, figures, curves and split into a folder.

    The defaults are those of the shipped bundle. Afterwards: hemacrypt export.
    """
    console = Console()
    quiet_tensorflow(threads)
    if settings_file is not None:
        settings = read_json(settings_file, Settings)
    else:
        given = {"epochs": epochs, "seed": seed, "split_seed": split_seed}
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = Settings.model_validate({**defaults(protocol).model_dump(), **chosen})
    preprocessing = _preprocessing()
    cells = _load(data, preprocessing, console)
    from training.progress import EpochBar
    from training.report import figures_table
    from training.run import train_run

    console.print(f"{len(cells.pool)} cells to train on; {len(cells.final)} held out")
    console.print(f"protocol: {datasets.PROTOCOL_WORDS[settings.protocol]}")
    with EpochBar(console, settings.epochs) as progress:
        metrics = train_run(cells, settings, out, preprocessing, final, [progress])
    console.print(figures_table(metrics.parts))
    console.print(f"kept epoch {metrics.kept_epoch} of {settings.epochs} (lowest validation loss)")
    console.print(f"{out}: model, figures, curves, settings and split")
    console.print(DISCLAIMER)


def export(
    run: Annotated[Path, typer.Argument(help="Folder written by hemacrypt train.")],
    out: Annotated[Path, typer.Option("--out", help="Bundle directory to write.")],
    data: DataOption = None,
    name: Annotated[str, typer.Option(help="Name under which the bundle is served.")] = "leukaemia",
    description: Annotated[str, typer.Option(help="What the model is, in a sentence.")] = _DESCRIPTION,
) -> None:
    """Fold a trained model into affine maps and squares, check it on every test image and write the bundle."""
    console = Console()
    quiet_tensorflow()
    preprocessing = _preprocessing()
    cells = _load(data, preprocessing, console)
    from training.run import export_run

    bundle, difference = export_run(run, out, cells, preprocessing, name, description)
    tell_export(out, bundle, difference, "the test images", console)


def tell_export(out: Path, bundle: Bundle, difference: float, images: str, console: Console) -> None:
    """Print what was exported, and how well it agrees with Keras on which images."""
    from training.export import ROUNDING

    for index, (layer, peaks) in enumerate(zip(bundle.network.linears, bundle.network.peaks, strict=True)):
        console.print(f"layer {index}: {layer.describe()}, largest value on training cells {np.max(peaks):.3g}")
    console.print(f"largest relative difference from Keras on {images}: {difference:.1e} (at most {ROUNDING})")
    console.print(f"{out}: bundle {bundle.manifest.name}, digest {bundle.digest[:16]}…")


def evaluate(
    bundle_dir: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Bundle directory, or the name of an embedded bundle.")
    ],
    split: Annotated[
        str,
        typer.Option(
            help="A run's folder (its test part), 'heldout', 'demo' for the embedded cells, or 'prelim' for the "
            "preliminary test of the complete release."
        ),
    ] = "demo",
    data: DataOption = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="With --split prelim: cnmc_manifest.csv.gz, which lists every file of the complete release."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only so many cells, taken evenly from the part.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure a bundle in the clear on labelled cells: accuracy, AUROC, sensitivity, specificity.

    This is the collapsed network in float64, the figure that the encrypted evaluation has to reproduce.
    """
    console = Console()
    bundle = Bundle.read(find_bundle(bundle_dir))
    part = _labelled_part(split, data, manifest, bundle, console)
    if limit is not None and limit < len(part.labels):
        part = part.thinned(limit)
    from training.evaluate import figures
    from training.report import figures_table

    logits = bundle.network(bundle.manifest.preprocessing.normalise(part.images))
    found = figures(logits, part.labels, part.subjects, part.words, part.groups)
    console.print(figures_table({split: found}))
    console.print(DISCLAIMER)
    if out is not None:
        _write_json(out, bundle, split, found)


def _labelled_part(
    split: str, data: Path | None, manifest: Path | None, bundle: Bundle, console: Console
) -> datasets.LabelledPart:
    preprocessing = bundle.manifest.preprocessing
    if not isinstance(preprocessing, Preprocessing):
        raise RunError(f"bundle {bundle.manifest.name!r} reads arrays of shape {preprocessing.shape}, not cells")
    if (split == "prelim") != (manifest is not None):
        raise RunError("--split prelim and --manifest belong together: the manifest says what the complete release is")
    if manifest is not None:
        return _preliminary_test(data, manifest, bundle, preprocessing, console)
    if split == "demo":
        return datasets.embedded_part(preprocessing)
    cells = _load(data, preprocessing, console)
    if split == "heldout":
        return datasets.LabelledPart.of(cells, cells.final, datasets.HELDOUT_WORDS)
    if not Path(split).is_dir():
        raise RunError(f"--split {split!r} is no folder of a run; name one, or 'heldout', 'demo' or 'prelim'")
    drawn = datasets.Split.read(Path(split))
    return datasets.LabelledPart.of(cells, drawn.rows(cells, "test"), drawn.words)


def _preliminary_test(
    data: Path | None, manifest: Path, bundle: Bundle, preprocessing: Preprocessing, console: Console
) -> datasets.LabelledPart:
    from training import release
    from training.report import read_progress

    trained = release.trained_subjects(bundle.manifest.data)
    listed = release.read_manifest(manifest)
    checking, reading = (
        partial(read_progress, console, words=words) for words in ("checking the release", "reading images")
    )
    return release.preliminary_test(datasets.data_folder(data), listed, trained, preprocessing, checking, reading).part


def _write_json(out: Path, bundle: Bundle, split: str, found: Figures) -> None:
    content = {
        "bundle": bundle.manifest.name,
        "digest": bundle.digest,
        "engine": "clear",
        "split": split,
        **found.model_dump(mode="json"),
    }
    try:
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}; check the folder and its permissions") from error
