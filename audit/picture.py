"""The demonstration's picture: cells with their answers, agreement, errors, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from audit.answers import Answer
from hemacrypt import DISCLAIMER

_COLUMNS, _ROWS = 6, 2
_BLUE, _RED, _GREY = "#30638e", "#d1495b", "#888888"


def draw(answers: Sequence[Answer], report: dict[str, Any], labels: Sequence[str], path: Path) -> None:
    """Draw the report.

    Parameters
    ----------
    answers:
        At least one answer.
    report:
        What `audit.demo.summarise` returned.
    labels:
        What each logit stands for.
    path:
        PNG file to write.
    """
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Hemacrypt: {report['images']} encrypted cells of held-out subjects, {report['disagreements']} disagreements\n"
        f"accuracy {report['encrypted_accuracy']:.1%} encrypted, {report['clear_accuracy']:.1%} clear"
    )
    grid = figure.add_gridspec(_ROWS + 1, _COLUMNS, height_ratios=[1] * _ROWS + [1.5])
    chosen = np.linspace(0, len(answers) - 1, min(len(answers), _COLUMNS * _ROWS)).astype(int)
    for place, number in enumerate(chosen):
        _draw_cell(figure.add_subplot(grid[divmod(place, _COLUMNS)]), answers[number], labels)
    _draw_agreement(figure.add_subplot(grid[_ROWS, 0:2]), answers, labels)
    _draw_errors(figure.add_subplot(grid[_ROWS, 2:4]), answers, report)
    _draw_times(figure.add_subplot(grid[_ROWS, 4:6]), report)
    figure.supxlabel(DISCLAIMER, fontsize=9)
    figure.savefig(path, dpi=110)


def _draw_cell(axes: Any, answer: Answer, labels: Sequence[str]) -> None:
    with Image.open(answer.cell.path) as image:
        axes.imshow(np.asarray(image.convert("RGB"))[65:385, 65:385])
    right = answer.encrypted.index == answer.cell.label
    axes.set_title(
        f"{answer.encrypted.label} ({answer.encrypted.probability:.0%})\ntruth: {labels[answer.cell.label]}",
        fontsize=9,
        color=_BLUE if right else _RED,
    )
    axes.set_axis_off()


def _draw_agreement(axes: Any, answers: Sequence[Answer], labels: Sequence[str]) -> None:
    for label, colour in enumerate((_BLUE, _RED)):
        chosen = [answer for answer in answers if answer.cell.label == label]
        clear = [answer.clear[-1] - answer.clear[0] for answer in chosen]
        encrypted = [answer.encrypted.logits[-1] - answer.encrypted.logits[0] for answer in chosen]
        axes.scatter(clear, encrypted, s=14, color=colour, label=f"truth: {labels[label]}", alpha=0.7)
    axes.axhline(0, color=_GREY, linewidth=0.6)
    axes.axvline(0, color=_GREY, linewidth=0.6)
    axes.set(title="Difference of the two logits", xlabel="in the clear", ylabel="encrypted, then decrypted")
    axes.legend(fontsize=8)


def _draw_errors(axes: Any, answers: Sequence[Answer], report: dict[str, Any]) -> None:
    errors = [max(answer.logit_error, 1e-12) for answer in answers]
    bound = report["logit_error_bound"]
    bins = np.geomspace(min(*errors, bound) / 2, max(*errors, bound) * 2, 30)
    axes.hist(errors, bins=bins, color=_BLUE)
    axes.axvline(bound, color=_RED, label=f"the plan's bound, {bound:.1e}")
    axes.set_xscale("log")
    axes.set(title="What encryption adds to a logit", xlabel="largest logit error of an image", ylabel="images")
    axes.legend(fontsize=8)


def _draw_times(axes: Any, report: dict[str, Any]) -> None:
    stages = list(report["ms"])
    medians = [report["ms"][stage]["median"] for stage in stages]
    over = [report["ms"][stage]["p95"] - report["ms"][stage]["median"] for stage in stages]
    bars = axes.bar(stages, medians, yerr=[np.zeros(len(stages)), over], color=_BLUE, capsize=4)
    axes.bar_label(bars, labels=[f"{value:.0f}" for value in medians], padding=6)
    axes.margins(y=0.12)
    axes.set(title="Time of one image, median and p95", ylabel="milliseconds")
