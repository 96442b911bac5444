"""Pictures of a study: learning curves, bars with intervals, ROC and reliability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluate import Interval
from training.report import blank_figure
from training.study.config import Family, Protocol
from training.study.results import Pooled, Results
from training.study.runs import RunFolder

COLOURS: Mapping[Family, str] = {"square": "#c1443c", "ordinary": "#3b6ea5", "svm": "#5b9a6f", "baseline": "#9a9a9a"}
TITLES: Mapping[Protocol, str] = {
    "image": "split by image (optimistic)",
    "grouped": "grouped cross-validation (subject-disjoint)",
    "heldout": "held-out subjects",
}
_DOTS = 110
_BINS = 10


def draw_all(results: Results, out: Path) -> list[tuple[str, str]]:
    """Draw every picture that there is data for.

    Returns
    -------
    list
        Names of the files below ``out``, each with a sentence on what it shows.
    """
    drawn = []
    for name, draw, words in (
        ("curves.png", _curves, "Learning curves (figures 4–9 of the paper): cross-entropy and accuracy on training "
         "cells, augmented and with dropout, and on test cells, which are drawn and chose nothing."),
        ("bars.png", _bars, "AUROC and accuracy with 95 % intervals by groups of subjects."),
        ("roc.png", _roc, "ROC curves."),
        ("reliability.png", _reliability, "Reliability after temperature scaling: on the diagonal, probabilities mean "
         "what they say."),
    ):  # fmt: skip
        if draw(results, out / name):
            drawn.append((name, words))
    return drawn


def _curves(results: Results, path: Path) -> bool:
    histories = list(_histories(results))
    if not histories:
        return False
    columns = min(3, len(histories))
    rows = -(-len(histories) // columns)
    figure = blank_figure(4.2 * columns, 4.2 * rows)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for number, (title, history) in enumerate(histories):
        row, column = divmod(number, columns)
        for below, (name, words) in enumerate((("cross_entropy", "cross-entropy"), ("accuracy", "accuracy"))):
            axes = grid[2 * row + below, column]
            axes.set_visible(True)
            epochs = range(1, len(history[name]) + 1)
            axes.plot(epochs, history[name], label="training", color="#3b6ea5", linewidth=1)
            if f"test_{name}" in history:
                axes.plot(epochs, history[f"test_{name}"], label="test", color="#c1443c", linewidth=1)
            axes.set_ylabel(words, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            if not below:
                axes.set_title(title, fontsize=9)
                axes.legend(fontsize=7)
            elif row == rows - 1:
                axes.set_xlabel("epoch", fontsize=8)
    figure.savefig(path, dpi=_DOTS)
    return True


def _histories(results: Results) -> Any:
    """Yield title and history of every model that learns in epochs: of the split by image, else of the first fold."""
    for model in results.config.models:
        for protocol in ("image", "grouped"):
            folder = RunFolder.of(results.out, model.name, f"{protocol}-0", model.seeds[0])
            if folder.finished and (history := folder.history()):
                yield f"{model.name}, {protocol}", history
                break


def _tables(results: Results) -> list[tuple[Protocol, list[Pooled]]]:
    return [(protocol, table) for protocol in TITLES if (table := results.table(protocol))]


def _bars(results: Results, path: Path) -> bool:
    tables = _tables(results)
    if not tables:
        return False
    figure = blank_figure(11, sum(0.8 + 0.28 * len(table) for _, table in tables) + 0.6)
    grid = figure.subplots(
        len(tables), 2, squeeze=False, height_ratios=[0.8 + 0.28 * len(table) for _, table in tables]
    )
    for line, (protocol, table) in zip(grid, tables, strict=True):
        names = [found.model.name for found in table]
        for axes, metric in zip(line, ("auroc", "accuracy"), strict=True):
            values = [getattr(found.figures, metric) for found in table]
            axes.barh(
                range(len(table)),
                values,
                xerr=_whiskers(values, [found.figures.intervals[metric] for found in table]),
                color=[COLOURS[found.model.family] for found in table],
                error_kw={"linewidth": 0.8, "capsize": 2},
            )
            axes.set_yticks(range(len(table)), names if metric == "auroc" else [""] * len(table), fontsize=8)
            axes.invert_yaxis()
            axes.set_xlim(0.4, 1.0)
            axes.tick_params(axis="x", labelsize=7)
            axes.set_title(f"{'AUROC' if metric == 'auroc' else metric}: {TITLES[protocol]}", fontsize=9)
            axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=_DOTS)
    return True


def _whiskers(values: Sequence[float], intervals: Sequence[Interval]) -> Any:
    low, high = np.transpose(intervals)
    return np.maximum([np.subtract(values, low), np.subtract(high, values)], 0)


def _panels(results: Results, xlabel: str, ylabel: str) -> tuple[Any, list[tuple[Any, list[Pooled]]]]:
    """Return a figure with one square panel, diagonal drawn, for each protocol."""
    tables = _tables(results)
    if not tables:
        return None, []
    figure = blank_figure(5.2 * len(tables), 5.2)
    panels = []
    for axes, (protocol, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.6, linestyle=":")
        axes.set_title(TITLES[protocol], fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_ylabel(ylabel, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        panels.append((axes, table))
    return figure, panels


def _line(table: Sequence[Pooled], number: int) -> dict[str, Any]:
    """Return a style by which lines can be told apart: baselines dotted, each other model in a colour of its own."""
    if table[number].model.family == "baseline":
        return {"color": "#777777", "linestyle": (":", "--")[number % 2], "linewidth": 1}
    square = table[number].model.family == "square"
    return {"color": f"C{number}", "linestyle": "-" if square else "--", "linewidth": 1.6 if square else 1}


def _roc(results: Results, path: Path) -> bool:
    from sklearn.metrics import roc_curve

    figure, panels = _panels(results, "1 - specificity", "sensitivity")
    for axes, table in panels:
        for number, found in enumerate(table):
            false, true, _ = roc_curve(found.labels, found.logits[:, 1] - found.logits[:, 0])
            axes.plot(false, true, label=f"{found.model.name} {found.figures.auroc:.3f}", **_line(table, number))
        axes.legend(fontsize=6.5, loc="lower right")
    if panels:
        figure.savefig(path, dpi=_DOTS)
    return bool(panels)


def _reliability(results: Results, path: Path) -> bool:
    figure, panels = _panels(results, "predicted probability of leukaemic", "share that is leukaemic")
    for axes, table in panels:
        for number, found in enumerate(table):
            # Of two logits the softmax is the logistic function of their difference; this form never overflows.
            probability = (1 + np.tanh((found.scaled[:, 1] - found.scaled[:, 0]) / 2)) / 2
            where = np.minimum((probability * _BINS).astype(np.intp), _BINS - 1)
            counts = np.bincount(where, minlength=_BINS)
            filled = counts > 0
            mean, share = (np.bincount(where, v, _BINS)[filled] / counts[filled] for v in (probability, found.labels))
            axes.plot(
                mean, share, marker="o", markersize=3,
                label=f"{found.model.name} (ECE {found.figures.ece:.3f})", **_line(table, number),
            )  # fmt: skip
        axes.legend(fontsize=6.5, loc="upper left")
    if panels:
        figure.savefig(path, dpi=_DOTS)
    return bool(panels)
