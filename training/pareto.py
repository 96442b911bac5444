"""Accuracy against encrypted milliseconds: the front of a search, three points of it by name, tables and a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from hemacrypt import DISCLAIMER
from training.report import blank_figure
from training.study.runs import write_json

# How much AUROC each name may give up against the best of the front; it is the cheapest network that does not give up
# more. A fold's AUROC is known to a few thousandths at best, so `balanced` gives up what is hardly there.
ZOO: Final[Mapping[str, float]] = {"fast": 0.02, "balanced": 0.005, "accurate": 0.0}
RULE: Final = (
    "of the networks on the front, the cheapest whose AUROC is within "
    + ", ".join(f"{given:g} (`{name}`)" for name, given in ZOO.items())
    + " of the best one's"
)
MS: Final = "predicted ms, one thread"
Status = Literal["trained", "refused", "diverged"]


@dataclass(frozen=True)
class Tried:
    """One architecture of a search, and what became of it.

    Attributes
    ----------
    number:
        Of the trial, from 0.
    status:
        ``refused``: not trained (no plan, too dear, sizes that do not fit), or no plan of the trained network.
    reason:
        Why it has no AUROC; empty where it has one.
    model:
        ``architecture``, ``size`` and ``options`` of a model of a study.
    auroc:
        On the fold that the search measures on; None unless trained.
    ms:
        Predicted milliseconds of one encrypted evaluation; of the trained network with its own margins. None unless
        trained.
    planned_ms:
        The same of the untrained network; None where it has no plan.
    degree, key_megabytes, error_bound:
        Of the plan that ``ms`` belongs to: polynomial degree, size of the evaluation keys, and bound on a logit's
        error.
    squares, parameters, multiply_adds, seconds:
        Size of the network, and how long it trained.
    """

    number: int
    status: Status
    reason: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    auroc: float | None = None
    ms: float | None = None
    planned_ms: float | None = None
    degree: int | None = None
    key_megabytes: float | None = None
    error_bound: float | None = None
    squares: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    seconds: float | None = None

    @property
    def point(self) -> tuple[float, float] | None:
        """AUROC and milliseconds; None unless trained."""
        return None if self.auroc is None or self.ms is None else (self.auroc, self.ms)

    @property
    def words(self) -> str:
        """The architecture in a line."""
        given = self.model.get("options", {}).items()
        options = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in given
        )
        return f"{self.model.get('architecture', '?')} {self.model.get('size', '?')}: {options}"


def front(tried: Sequence[Tried]) -> list[Tried]:
    """Return the Pareto front: what nothing else beats in one objective without losing in the other.

    Returns
    -------
    list
        From the cheapest to the dearest. Of trials with the same AUROC and milliseconds all are on it.
    """
    points = [(one.point, one) for one in tried if one.point is not None]
    points.sort(key=lambda entry: (entry[0][1], -entry[0][0], entry[1].number))
    found: list[Tried] = []
    best: tuple[float, float] | None = None
    for point, one in points:
        if best is None or point[0] > best[0] or point == best:
            best = point
            found.append(one)
    return found


def zoo(tried: Sequence[Tried]) -> dict[str, Tried]:
    """Return the networks that `ZOO` names, by `RULE`; several names may mean the same one. Empty without a front."""
    along = front(tried)
    best = max((one.auroc for one in along if one.auroc is not None), default=0.0)
    return {
        name: next(one for one in along if one.auroc is not None and one.auroc >= best - given)
        for name, given in ZOO.items()
        if along
    }


def write_pareto(tried: Sequence[Tried], out: Path, about: Mapping[str, Any]) -> None:
    """Write ``pareto.csv``, ``pareto.json``, ``pareto.md`` and, if anything was trained, ``pareto.png``.

    Parameters
    ----------
    tried:
        All trials.
    out:
        An existing folder.
    about:
        How the search was made; stands in the JSON, and as a list at the beginning of the Markdown.

    Raises
    ------
    RunError
        If a file cannot be written.
    """
    along, named = front(tried), zoo(tried)
    _write_table(tried, along, named, out / "pareto.csv")
    content = {
        "about": dict(about),
        "objectives": ["auroc", MS],
        "rule": RULE,
        "front": [asdict(one) for one in along],
        "zoo": {name: asdict(one) for name, one in named.items()},
    }
    write_json(out / "pareto.json", content)
    (out / "pareto.md").write_text("\n".join(_markdown(tried, along, named, about)) + "\n", encoding="utf-8")
    if along:
        _draw(tried, along, named, out / "pareto.png")


def _write_table(tried: Sequence[Tried], along: Sequence[Tried], named: Mapping[str, Tried], path: Path) -> None:
    options = sorted({name for one in tried for name in one.model.get("options", {})})
    figures = ("auroc", "ms", "planned_ms", "degree", "key_megabytes", "error_bound")
    sizes = ("squares", "parameters", "multiply_adds", "seconds")
    on_front = {one.number for one in along}
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["trial", "status", "front", "zoo", *figures, "architecture", "size", *options, *sizes, "reason"]
        )
        for one in tried:
            names = " ".join(name for name, other in named.items() if other.number == one.number)
            given = one.model.get("options", {})
            table.writerow(
                [one.number, one.status, int(one.number in on_front), names]
                + [_cell(getattr(one, name)) for name in figures]
                + [one.model.get("architecture"), one.model.get("size")]
                + [_cell(given.get(name)) for name in options]
                + [_cell(getattr(one, name)) for name in sizes]
                + [one.reason]
            )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _markdown(
    tried: Sequence[Tried], along: Sequence[Tried], named: Mapping[str, Tried], about: Mapping[str, Any]
) -> list[str]:
    count = {status: sum(one.status == status for one in tried) for status in ("trained", "refused", "diverged")}
    lines = [f"# Search `{about.get('name', '')}`", "", f"> {DISCLAIMER}", ""]
    lines += [f"- {name[0].upper()}{name[1:]}: {value}" for name, value in about.items() if name != "name"]
    lines += [f"- Trials: {', '.join(f'{number} {status}' for status, number in count.items())}"]
    if not along:
        return [*lines, "", "Nothing was trained: there is no front."]
    lines += ["", f"Names: {RULE}.", "", f"| name | AUROC | {MS} | degree | keys, MB | network |", "|" + " --- |" * 6]
    for one in along:
        names = ", ".join(f"`{name}`" for name, other in named.items() if other.number == one.number)
        cells = [names, f"{one.auroc:.4f}", f"{one.ms:.1f}", f"{one.degree}", f"{one.key_megabytes:.1f}", one.words]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![All trials and the front](pareto.png)", "", "As models of a study:", "", "```toml"]
    for name, one in named.items():
        lines += ["[[models]]", f'name = "{name}"', 'family = "square"']
        lines += [f'architecture = "{one.model["architecture"]}"', f"size = {one.model['size']}"]
        options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in one.model["options"].items())
        lines += [f"options = {{ {options} }}", ""]
    return [*lines[:-1], "```"]


def _draw(tried: Sequence[Tried], along: Sequence[Tried], named: Mapping[str, Tried], path: Path) -> None:
    figure = blank_figure(7.5, 5)
    axes = figure.subplots()
    for architecture, colour in (("symmetric", "#c1443c"), ("squares", "#3b6ea5")):
        for squares, marker in ((2, "o"), (3, "^"), (4, "s")):
            points = [
                one.point
                for one in tried
                if one.point and (one.model.get("architecture"), one.squares) == (architecture, squares)
            ]
            if points:
                label = f"{architecture}, {squares} squares"
                axes.scatter([ms for _, ms in points], [auroc for auroc, _ in points], s=22, alpha=0.6,
                             color=colour, marker=marker, label=label)  # fmt: skip
    axes.step([one.ms for one in along], [one.auroc for one in along], where="post", color="#444444", label="front")
    for number, one in {one.number: one for one in named.values()}.items():
        names = ", ".join(name for name, other in named.items() if other.number == number)
        axes.scatter([one.ms], [one.auroc], s=110, facecolors="none", edgecolors="black", linewidths=1.4)
        axes.annotate(names, (one.ms, one.auroc), xytext=(6, 8), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlabel(MS)
    axes.set_ylabel("AUROC on the search's fold")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
