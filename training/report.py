"""What a person sees of training and evaluation: progress, learning curves, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.evaluate import Figures

_ROWS = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "weighted_f1": "weighted F1", "auroc": "AUROC",
    "sensitivity": "sensitivity", "specificity": "specificity", "ece": "calibration error",
    "subject_auroc": "AUROC by subject", "subject_accuracy": "accuracy by subject",
}  # fmt: skip
# Everything else is a share of cells or of subjects, and stands in per cent.
_NUMBERS = ("weighted_f1", "auroc", "ece", "subject_auroc")


def bar(console: Console) -> Progress:
    """Return a progress bar with count and remaining time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def read_progress(console: Console, files: Iterable[Path], total: int, words: str = "reading images") -> Iterable[Path]:
    """Show a bar while image files are read; pass ``functools.partial(read_progress, console)`` to `load_cells`."""
    with bar(console) as progress:
        yield from progress.track(files, total=total, description=words)


def blank_figure(width: float, height: float) -> Any:
    """Return an empty figure of that size in inches."""
    # Imported here, and without pyplot: no window system is touched and no global figure is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(history: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw loss, accuracy and AUROC over the epochs into a PNG file.

    Parameters
    ----------
    history:
        As `training.fit.fit` returns it.
    title:
        Stands above; say how the data was divided.
    """
    figure = blank_figure(12, 4)
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
    caption = f"{words}\nleukaemic = positive; 95 % intervals by resampling groups of subjects"
    table = Table("", caption=caption, caption_justify="left")
    for name in parts:
        table.add_column(Path(name).name, justify="right", overflow="fold")
    table.add_row("cells", *(str(part.n) for part in parts.values()))
    table.add_row("subjects", *(str(part.n_subjects) for part in parts.values()))
    for key, words in _ROWS.items():
        table.add_row(words, *(_figure(part, key) for part in parts.values()))
    return table


def _figure(part: Figures, name: str) -> str:
    """Return a figure with its interval."""
    form = "{:.3f} ({:.3f}-{:.3f})" if name in _NUMBERS else "{:.1%} ({:.0%}-{:.0%})"
    return form.format(getattr(part, name), *part.intervals[name])
