"""What a person sees of training and evaluation: progress, learning curves, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.evaluate import Figures


def bar(console: Console) -> Progress:
    """Return a progress bar with count and remaining time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def read_progress(console: Console, files: Iterable[Path], total: int) -> Iterable[Path]:
    """Show a bar while image files are read; pass ``functools.partial(read_progress, console)`` to `load_cells`."""
    with bar(console) as progress:
        yield from progress.track(files, total=total, description="reading images")


def draw_curves(history: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw loss, accuracy and AUROC over the epochs into a PNG file.

    Parameters
    ----------
    history:
        As `training.fit.fit` returns it.
    title:
        Stands above; say how the data was divided.
    """
    # Imported here, and without pyplot: no window system is touched and no global figure is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    epochs = range(1, len(history["loss"]) + 1)
    best = min(epochs, key=lambda epoch: history["val_loss"][epoch - 1])
    for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "auroc"), strict=True):
        axes.plot(epochs, history[name], label="training")
        axes.plot(epochs, history[f"val_{name}"], label="validation")
        axes.axvline(best, color="grey", linestyle=":", label=f"kept: epoch {best}")
        axes.set(xlabel="epoch", title="cross-entropy" if name == "loss" else name.replace("auroc", "AUROC"))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def figures_table(parts: Mapping[str, Figures]) -> Table:
    """Return a table of figures with the protocol in words beside them."""
    words = "\n".join(f"{name}: {part.protocol}" for name, part in parts.items())
    table = Table(
        caption=f"{words}\nleukaemic = positive; 95 % intervals by resampling subjects", caption_justify="left"
    )
    for column in ("part", "cells", "subjects", "accuracy", "balanced", "AUROC", "sensitivity", "specificity"):
        table.add_column(column, justify="left" if column == "part" else "right", overflow="fold")
    for name, part in parts.items():
        table.add_row(
            Path(name).name,
            str(part.n),
            str(part.n_subjects),
            "{:.1%}\n({:.0%}-{:.0%})".format(part.accuracy, *part.accuracy_interval),
            f"{part.balanced_accuracy:.1%}",
            "{:.3f}\n({:.2f}-{:.2f})".format(part.auroc, *part.auroc_interval),
            f"{part.sensitivity:.1%}",
            f"{part.specificity:.1%}",
        )
    return table
