"""What a run of `benchmarks.engines` found, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
_OURS = ("vector", "seal", "throughput")


def milliseconds(row: Row, statistic: str = "median") -> float:
    """Return the milliseconds of one evaluation: their median, min or p95."""
    return float(row["compute_ms"][statistic])


def fastest(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """Return the row with the smallest median among those with the wanted values; None when there is none."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return min(found, key=milliseconds, default=None)


@dataclass(frozen=True)
class Bar:
    """A figure that the project set itself, and what was measured.

    Attributes
    ----------
    name:
        What it is about.
    value:
        Measured; None when its rows are missing.
    limit:
        At most this, or at least this.
    at_least:
        Which of the two.
    unit:
        Of both.
    """

    name: str
    value: float | None
    limit: float
    at_least: bool = False
    unit: str = "ms"

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.value is None:
            return "not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if met else "not met"


def bars(results: dict[str, Any], statistic: str = "median") -> list[Bar]:
    """Compare the medians (or another statistic) of a run with every bar."""
    rows: list[Row] = results["rows"]

    def whole(row: Row) -> float:
        return milliseconds(row, statistic)

    def each(row: Row) -> float:
        """Return core milliseconds for each image."""
        return whole(row) * float(row["threads"]) / float(row["batch"])

    def vector(network: str, threads: int = 1, batch: int = 1, **wanted: Any) -> Row | None:
        return fastest(rows, engine="vector", network=network, threads=threads, batch=batch, **wanted)

    def of(row: Row | None, value: Callable[[Row], float] = whole) -> float | None:
        return None if row is None else value(row)

    def ratio(above: Row | None, below: Row | None, value: Callable[[Row], float] = whole) -> float | None:
        return None if above is None or below is None else value(above) / value(below)

    ours = vector("rp")
    peer = fastest((row for row in rows if row["engine"] not in _OURS), network="rp", threads=1, batch=1)
    peer_name = f" ({peer['engine']})" if peer else ""
    slots = ours["slots"] if ours else "real"
    same = fastest(rows, engine="seal", network="rp", batch=1, slots=slots)
    mnist = fastest(rows, engine="throughput", network="cryptonets-mnist", threads=1)
    cells = fastest(rows, engine="throughput", network="leukaemia", threads=1)
    alone = ("rp", "vector", slots, 1, 1)
    kept = [
        floor["ratio"]
        for floor in results["floors"]
        if tuple(floor[part] for part in ("network", "engine", "slots", "threads", "batch")) == alone
    ]
    keys = of(vector("leukaemia"), lambda row: row["bytes"]["keys"] / 1e6)
    complex_, real = vector("rp", slots="complex"), vector("rp", slots="real")
    return [
        Bar("rp, one image, one thread", of(ours), 30),
        Bar(f"rp, fastest peer{peer_name} / vector", ratio(peer, ours), 10, True, "×"),
        Bar("rp, seal on the same plan / vector", ratio(same, ours), 6, True, "×"),
        Bar("rp, two threads / one thread", ratio(vector("rp", 2, slots=slots), ours), 0.6, unit="×"),
        Bar("rp, complex slots / real slots, one image", ratio(complex_, real), 0.7, unit="×"),
        Bar(
            "rp, complex slots, two images, for each / one image in real slots",
            ratio(vector("rp", batch=2), real, each),
            0.6,
            unit="×",
        ),
        Bar("rp, distance to the floor", min(kept, default=None), 2, unit="×"),
        Bar("r, one image, one thread", of(vector("r")), 70),
        Bar("leukaemia, one image, one thread", of(vector("leukaemia")), 30),
        Bar("leukaemia, evaluation keys", keys, 35, unit="MB"),
        Bar("leukaemia, batch, for each image and core", of(cells, each), 6),
        Bar("cryptonets-mnist, batch, for each image and core", of(mnist, each), 1.5),
        Bar("lola-cifar, one image, one thread", of(vector("lola-cifar")), 5000),
    ]


def show(results: dict[str, Any], console: Console) -> None:
    """Print everything."""
    for network in dict.fromkeys(row["network"] for row in results["rows"]):
        console.print(_rows_table(network, [row for row in results["rows"] if row["network"] == network]))
    for floor in results["floors"]:
        show_floor(floor, console)
    console.print(_bars_table(bars(results), bars(results, "min")))
    machine = results["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}, kernel {machine['kernel']}, "
        f"load {machine['load']:.1f} before and {machine.get('load_after', machine['load']):.1f} after"
    )
    console.print(", ".join(f"{name} {number}" for name, number in results["versions"].items()))


def show_floor(floor: dict[str, Any], console: Console) -> None:
    """Print what the primitives of a plan cost alone.

    Parameters
    ----------
    floor:
        ``floor_ms``, and ``parts``: milliseconds of each kind of primitive; ``measured_ms`` and ``ratio`` where known.
    console:
        Where to.
    """
    title = f"Floor of {floor.get('network', 'a plan')}, {floor.get('engine', 'any engine')}"
    table = Table("primitive", "ms", "share", title=title)
    for name, milliseconds in sorted(floor["parts"].items(), key=lambda part: -part[1]):
        table.add_row(name, f"{milliseconds:.2f}", f"{milliseconds / floor['floor_ms']:.0%}")
    table.add_row("floor", f"{floor['floor_ms']:.2f}", "100%", style="bold")
    if "measured_ms" in floor:
        table.add_row("measured", f"{floor['measured_ms']:.2f}", f"{floor['ratio']:.0%}")
    console.print(table)


def _bytes(number: float | None, estimated: bool) -> str:
    if number is None:
        return "–"
    size = f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
    return f"~{size}" if estimated else size


def _rows_table(network: str, rows: list[Row]) -> Table:
    names = ("engine", "slots", "threads", "batch", "median (min, p95) ms", "runs", "logit error", "differ")
    table = Table(*names, "up", "reply", "keys", "peak RSS", title=network)
    for row in sorted(rows, key=lambda row: milliseconds(row) / row["batch"]):
        times, sizes = row["compute_ms"], row["bytes"]
        table.add_row(
            row["engine"],
            row["slots"],
            str(row["threads"]),
            str(row["batch"]),
            f"{times['median']:.1f} ({times['min']:.1f}, {times['p95']:.1f})",
            str(row["repetitions"]),
            f"{row['logit_error']:.1e}",
            f"{row['disagreements']} of {row['images']}",
            *(_bytes(sizes[name], row["bytes_estimated"]) for name in ("upload", "reply", "keys")),
            f"{row['rss_mb']:.0f} MB",
        )
    return table


def _bars_table(medians: list[Bar], minima: list[Bar]) -> Table:
    table = Table("", "bar", "from medians", "", "from minima", "", title="Bars")
    for pair in zip(medians, minima, strict=True):
        shown = ["–" if bar.value is None else f"{bar.value:.3g} {bar.unit}" for bar in pair]
        bar = pair[0]
        limit = f"{'≥' if bar.at_least else '≤'} {bar.limit:g} {bar.unit}"
        table.add_row(bar.name, limit, shown[0], pair[0].verdict, shown[1], pair[1].verdict)
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Draw the milliseconds for each image, one panel for each network, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    networks = list(dict.fromkeys(row["network"] for row in rows))
    if not networks:
        return
    counts = [sum(row["network"] == network for row in rows) for network in networks]
    figure, panels = plt.subplots(
        len(networks),
        1,
        figsize=(9, 0.32 * sum(counts) + 1.0 * len(networks)),
        squeeze=False,
        gridspec_kw={"height_ratios": counts},
        layout="constrained",
    )
    for network, panel in zip(networks, panels[:, 0], strict=True):
        shown = sorted(
            (row for row in rows if row["network"] == network), key=lambda row: -milliseconds(row) / row["batch"]
        )
        labels = [f"{row['engine']}, {row['slots']}, {row['threads']} thr., batch {row['batch']}" for row in shown]
        values = [milliseconds(row) / row["batch"] for row in shown]
        colours = ["tab:blue" if row["engine"] in _OURS else "tab:grey" for row in shown]
        drawn = panel.barh(labels, values, color=colours)
        panel.bar_label(drawn, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=3)
        panel.set(xscale="log", xlim=(min(values) / 2, max(values) * 2), title=network)
    panels[-1, 0].set_xlabel("milliseconds for each image (median)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
