"""Tables of a study, for people and for programs.

::

    OUT/
      report.md      every table, with pictures, protocols and the command that made them
      results.csv    one line for each model, protocol and seed
      study.json     what the project's bars are measured on
      *.png          see training.study.plots
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hemacrypt import DISCLAIMER
from training.datasets import SOURCE
from training.errors import RunError
from training.evaluate import Difference, Figures
from training.study.config import Protocol
from training.study.plots import TITLES, draw_all
from training.study.results import CALIBRATED, Encrypted, Pooled, Results, collect
from training.study.runs import write_json

REPORT, TABLE, SUMMARY = "report.md", "results.csv", "study.json"
METRICS = (
    "accuracy",
    "balanced_accuracy",
    "weighted_f1",
    "auroc",
    "sensitivity",
    "specificity",
    "ece",
    "subject_auroc",
)
_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "weighted_f1": "weighted F1",
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ece": "ECE",
    "subject_auroc": "AUROC by subject",
}

_RIVALS = {"ordinary": "best ordinary network", "area": "area alone", "colour": "mean colour alone"}


def write_report(out: Path) -> Results:
    """Write tables and pictures of what lies in a study's folder.

    Raises
    ------
    RunError
        If the folder holds no study, or a file in it is broken.
    """
    results = collect(out)
    _write_csv(results, out / TABLE)
    write_json(out / SUMMARY, summary(results))
    pictures = draw_all(results, out)
    (out / REPORT).write_text("\n".join(_markdown(results, pictures)) + "\n", encoding="utf-8")
    return results


# ---------------------------------------------------------------------------------------------- JSON


def summary(results: Results) -> dict[str, Any]:
    """Return the content of ``study.json``.

    ``image_split.best_square_encrypted`` and ``subject_disjoint.best_square|best_ordinary`` are what the project
    measures itself by. Best is the largest AUROC in the clear; among encrypted results, the best of those. Models on
    held-out cells are those that were best in grouped cross-validation.
    """
    return {
        "study": results.config.name,
        "command": results.written.command,
        "machines": _machines(results),
        "hours": round(results.hours, 3),
        "disclaimer": DISCLAIMER,
        "image_split": _protocol_summary(results, "image"),
        "subject_disjoint": _protocol_summary(results, "grouped"),
        "held_out": _protocol_summary(results, "heldout"),
        "missing": [f"{missing.run}: {missing.why}" for missing in results.missing],
    }


def _protocol_summary(results: Results, protocol: Protocol) -> dict[str, Any] | None:
    table = results.table(protocol)
    if not table:
        return None
    square, ordinary = results.best(protocol, "square"), results.best(protocol, "ordinary")
    content: dict[str, Any] = {
        "protocol": table[0].words,
        "chosen_by": "largest AUROC of grouped cross-validation" if protocol == "heldout" else "largest AUROC",
        "calibration": CALIBRATED[protocol],
    }
    if square is not None:
        content["best_square"] = _valued(square)
        content["differences"] = {
            f"square_minus_{name}": _difference(square.minus(other)) for name, other in results.rivals(protocol).items()
        }
    if ordinary is not None:
        content["best_ordinary"] = _valued(ordinary)
    encrypted = [found for found in table if found.encrypted is not None and found.model.family == "square"]
    if encrypted:
        # On held-out cells nothing is chosen: what grouped cross-validation found best, if it was encrypted.
        candidates = [found for found in encrypted if protocol != "heldout" or found is square]
        best = max(candidates, key=lambda found: found.figures.auroc, default=None)
        if best is not None:
            content["best_square_encrypted"] = _encrypted(best)
    return content


def _valued(found: Pooled) -> dict[str, Any]:
    figures = found.figures
    return {
        "model": found.model.name,
        "n": figures.n,
        "subjects": figures.n_subjects,
        "groups": figures.n_groups,
        **{metric: _with_interval(figures, metric) for metric in METRICS},
        "ece_before_scaling": found.ece_before,
    }


def _with_interval(figures: Figures, metric: str) -> dict[str, Any]:
    return {"value": getattr(figures, metric), "interval": list(figures.intervals[metric])}


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        metric: {"value": value, "interval": list(difference.intervals[metric])}
        for metric, value in difference.values.items()
        if metric != "ece"  # of logits as they are; what counts is that after scaling
    }


def _encrypted(found: Pooled) -> dict[str, Any]:
    figures, encrypted = _both(found)
    return {
        "model": found.model.name,
        "accuracy": figures.accuracy,
        "auroc": figures.auroc,
        "n": figures.n,
        "n_test": len(found.labels),
        "intervals": {metric: list(figures.intervals[metric]) for metric in ("accuracy", "auroc")},
        "disagreements": found.disagreements,
        "milliseconds": encrypted.milliseconds,
        "engine": encrypted.engine,
    }


def _both(found: Pooled) -> tuple[Figures, Encrypted]:
    """Return figures and origin of encrypted logits that are known to be there."""
    figures, encrypted = found.encrypted_figures, found.encrypted
    if figures is None or encrypted is None:
        raise RunError(f"{found.model.name} has no encrypted logits under {found.protocol}")
    return figures, encrypted


# ---------------------------------------------------------------------------------------------- CSV


def _write_csv(results: Results, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ["protocol", "model", "family", "architecture", "weights", "seed", "n", "subjects", "groups", "parameters"]
            + ["multiply_adds", "seconds"]
            + [column for metric in METRICS for column in (metric, f"{metric}_low", f"{metric}_high")]
            + ["ece_before_scaling", "encrypted_accuracy", "encrypted_auroc", "disagreements", "encrypted_ms"]
        )
        for found in results.pooled:
            table.writerow(_csv_row(found))


def _csv_row(found: Pooled) -> list[Any]:
    figures, encrypted = found.figures, found.encrypted_figures
    one = found.results[0]
    return [
        *(found.protocol, found.model.name, found.model.family, found.model.architecture, found.start, found.seed),
        *(figures.n, figures.n_subjects, figures.n_groups, one.parameters, one.multiply_adds),
        round(sum(result.seconds for result in found.results), 2),
        *(f"{number:.6f}" for metric in METRICS for number in (getattr(figures, metric), *figures.intervals[metric])),
        f"{found.ece_before:.6f}",
        *(
            ["", "", "", ""]
            if encrypted is None or found.encrypted is None
            else [
                f"{encrypted.accuracy:.6f}",
                f"{encrypted.auroc:.6f}",
                found.disagreements,
                f"{found.encrypted.milliseconds:.2f}",
            ]
        ),
    ]


# ---------------------------------------------------------------------------------------------- Markdown


def _markdown(results: Results, pictures: Sequence[tuple[str, str]]) -> Iterable[str]:
    config = results.config
    yield f"# Study `{config.name}`"
    if config.description:
        yield f"\n{config.description}"
    yield f"\n> {DISCLAIMER}"
    yield f"\n- Command: `{results.written.command or 'hemacrypt study run'}`"
    yield f"- Machine: {'; '.join(_machines(results)) or 'nothing has run'}"
    yield f"- Time of all {len(results.runs)} runs together: {results.hours:.2f} hours"
    yield f"- Data: {SOURCE}"
    yield "- Leukaemic is positive. Brackets: 95 % intervals by resampling groups of subjects, not cells."
    yield "- Training is for a fixed number of epochs and the last weights are kept: no data chooses an epoch."
    if any(len(model.seeds) > 1 for model in config.models):
        yield "- Tables show the first seed of each model; the spread over all seeds stands below."
    for protocol in TITLES:
        yield from _protocol_section(results, protocol)
    yield from _seeds_section(results)
    if results.missing:
        yield "\n## Runs without results\n"
        yield from (f"- {missing.run}: {missing.why}" for missing in results.missing)
    if pictures:
        yield "\n## Pictures"
        yield from (f"\n![{words}]({name})\n\n{words}" for name, words in pictures)


def _protocol_section(results: Results, protocol: Protocol) -> Iterable[str]:
    if protocol not in results.config.protocols_in_use:
        return
    table = results.table(protocol)
    yield f"\n## {TITLES[protocol][0].upper()}{TITLES[protocol][1:]}\n"
    if not table:
        yield "No model has finished here; see the runs without results below."
        return
    yield f"{table[0].words[0].upper()}{table[0].words[1:]}. ECE: {CALIBRATED[protocol]}.\n"
    if protocol == "heldout" and any(found.temperatures is None for found in table):
        yield "A star marks an ECE without scaling: that model has no grouped cross-validation to fit one on.\n"
    columns = ["model", "family", "weights", "n", "subjects", "seeds", *_TITLES.values()]
    columns += ["AUROC of the folds"] if protocol == "grouped" else []
    yield from _table(columns, [_row(results, found) for found in table])
    encrypted = [found for found in table if found.encrypted is not None]
    if encrypted:
        yield "\nUnder encryption, the same networks:\n"
        columns = ["model", "cells", "accuracy", "AUROC", "other prediction than in the clear", "ms", "engine"]
        yield from _table(columns, [_encrypted_row(found) for found in encrypted])
    yield from _differences(results, protocol)


def _row(results: Results, found: Pooled) -> list[str]:
    figures = found.figures
    star = "" if found.temperatures is not None else "*"
    cells = [_bracketed(figures, metric) + (star if metric == "ece" else "") for metric in METRICS]
    if found.protocol == "grouped":
        folds = found.fold_aurocs
        cells.append(f"{np.mean(folds):.3f} ± {np.std(folds, ddof=1):.3f} ({min(folds):.3f}–{max(folds):.3f})")
    done = len(results.seeds(found.protocol, found.model.name))
    seeds = str(done) if done == len(found.model.seeds) else f"{done} of {len(found.model.seeds)}"
    return [
        *(f"`{found.model.name}`", found.model.family, found.start, str(figures.n)),
        *(f"{figures.n_subjects} ({figures.n_leukaemic_subjects} ALL)", seeds, *cells),
    ]


def _bracketed(figures: Figures, metric: str) -> str:
    low, high = figures.intervals[metric]
    return f"{getattr(figures, metric):.3f} [{low:.3f}, {high:.3f}]"


def _encrypted_row(found: Pooled) -> list[str]:
    figures, encrypted = _both(found)
    whole = "" if figures.n == len(found.labels) else f" of {len(found.labels)}"
    return [
        *(f"`{found.model.name}`", f"{figures.n}{whole}", _bracketed(figures, "accuracy")),
        *(_bracketed(figures, "auroc"), str(found.disagreements), f"{encrypted.milliseconds:.1f}", encrypted.engine),
    ]


def _differences(results: Results, protocol: Protocol) -> Iterable[str]:
    square = results.best(protocol, "square")
    rivals = results.rivals(protocol)
    if square is None or not rivals:
        return
    chosen = "by grouped cross-validation" if protocol == "heldout" else "by AUROC, on these cells"
    yield f"\nThe best square network (`{square.model.name}`, chosen {chosen}) minus others, on the same resamples:\n"
    lines = []
    for name, other in rivals.items():
        difference = square.minus(other)
        cells = [
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(difference.values[metric], *difference.intervals[metric])
            for metric in ("auroc", "accuracy", "balanced_accuracy")
        ]
        lines.append([f"{_RIVALS[name]} (`{other.model.name}`)", *cells])
    yield from _table(["minus", "AUROC", "accuracy", "balanced"], lines)


def _seeds_section(results: Results) -> Iterable[str]:
    lines = []
    for protocol in results.config.protocols_in_use:
        for model in results.config.models:
            if len(model.seeds) > 1 and protocol in results.config.protocols_of(model):
                diverged = {
                    run.seed
                    for run in results.runs
                    if (run.model, run.protocol, run.status) == (model.name, protocol, "diverged")
                }
                found = results.seeds(protocol, model.name)
                cells = [_spread([getattr(one.figures, metric) for one in found]) for metric in ("auroc", "accuracy")]
                lines.append([f"`{model.name}`", TITLES[protocol], f"{len(found)} of {len(model.seeds)}"])
                lines[-1] += [str(len(diverged)), *cells]
    if lines:
        yield "\n## Seeds\n\nMean ± standard deviation over the seeds (smallest–largest).\n"
        yield from _table(["model", "protocol", "seeds finished", "diverged", "AUROC", "accuracy"], lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    deviation = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return f"{np.mean(values):.3f} ± {deviation:.3f} ({min(values):.3f}–{max(values):.3f})"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    yield from (f"| {' | '.join(line)} |" for line in lines)


def _machines(results: Results) -> list[str]:
    return sorted({f"{run.machine}; TensorFlow on {run.device}" for run in results.runs})
