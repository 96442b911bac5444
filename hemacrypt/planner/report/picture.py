"""A plan as a picture: the modulus chain, and what fills it along the network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hemacrypt.errors import PlanError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SCALE, _VALUES, _NOISE, _FREE, _EDGE = "#30638e", "#d1495b", "#888888", "#e7ecef", "#444444"
# Values that are smaller than this are drawn as this.
_SMALLEST = 2.0**-20


def draw_plan(told: dict[str, Any], path: Path) -> None:
    """Draw a plan that `report.describe` or `bfv_report.describe_bfv` put into plain values.

    Every step is a bar as high as the modulus at its level, in bits. Under CKKS it holds the scale of the product that
    the step makes and the largest value above it; what is left is headroom. Under BFV it holds the noise, the plaintext
    modulus above it, and the noise budget is left; beside it stand the bits that the integers need.

    Parameters
    ----------
    told:
        The plan.
    path:
        File to write; its ending decides on the kind (png, svg, pdf).

    Raises
    ------
    PlanError
        If matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError("pictures need matplotlib: pip install 'hemacrypt[client]'") from None
    exact = told.get("scheme") == "bfv"
    figure = Figure(figsize=(max(7.0, 1.7 * len(told["steps"]) + 3), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{told['model']}: {'BFV' if exact else 'CKKS'}, N = {told['degree']}, {told['modulus_bits']} bits in "
        f"{len(told['data_primes'])} data primes and a special one, 128-bit security",
        fontsize=11,
    )
    chain, values = figure.subplots(2, 1, height_ratios=[2.2, 1], sharex=True)
    (_draw_noise if exact else _draw_scales)(chain, told)
    (_draw_integers if exact else _draw_values)(values, told)
    names = [step["name"] for step in told["steps"]]
    values.set_xticks(range(len(names)), names, fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot write {path} ({error}); name a .png, .svg or .pdf file in a folder of yours") from None


def _draw_scales(axes: Axes, told: dict[str, Any]) -> None:
    """Draw what each product holds before its rescale."""
    for place, step in enumerate(told["steps"]):
        factor = step["input_scale_bits"] if step["weight_scale_bits"] is None else step["weight_scale_bits"]
        scale, bits = step["input_scale_bits"] + factor, step["modulus_bits"]
        value = math.log2(max(step["largest_value"], _SMALLEST)) + 1
        _bar(axes, place, bits, [(scale, _SCALE), (max(value, 0.0), _VALUES)])
        axes.text(place, bits + 2, f"level {step['level']}", ha="center", fontsize=8)
    _legend(axes, [("scale of the product", _SCALE), ("largest value, with sign", _VALUES), ("headroom", _FREE)])
    axes.set(ylabel="bits of the modulus", title="Modulus chain: a prime goes with every step", ylim=(0, None))


def _draw_values(axes: Axes, told: dict[str, Any]) -> None:
    places = range(len(told["steps"]))
    axes.plot(places, [max(step["largest_value"], _SMALLEST) for step in told["steps"]], "o-", color=_VALUES)
    axes.plot(places, [step["error"] for step in told["steps"]], "s--", color=_NOISE)
    axes.set(yscale="log", ylabel="units of the plan", title=f"Largest value ({told['magnitudes']}) and error (1 s.d.)")
    axes.legend(["largest value", "error of a slot"], fontsize=8)


def _draw_noise(axes: Axes, told: dict[str, Any]) -> None:
    """Draw what is left of the modulus after each step: noise, plaintext, budget."""
    plain = math.log2(max(told["plain_moduli"]))
    for place, step in enumerate(told["steps"]):
        bits = step["modulus_bits"] * (step["next_level"] + 1) / (step["level"] + 1)
        noise = max(bits - plain - 1 - step["noise_budget"], 0.0)
        _bar(axes, place, bits, [(noise, _NOISE), (plain + 1, _SCALE)])
        axes.text(place, bits + 2, f"level {step['next_level']}", ha="center", fontsize=8)
    _legend(axes, [("noise", _NOISE), ("plaintext modulus, with sign", _SCALE), ("noise budget left", _FREE)])
    axes.set(ylabel="bits of the modulus", title="Modulus chain after each step", ylim=(0, None))


def _draw_integers(axes: Axes, told: dict[str, Any]) -> None:
    places = range(len(told["steps"]))
    axes.plot(places, [step["bits"] for step in told["steps"]], "o-", color=_VALUES, label="any input in range")
    if all(step["measured_bits"] is not None for step in told["steps"]):
        measured = [step["measured_bits"] for step in told["steps"]]
        axes.plot(places, measured, "o--", color=_SCALE, label="calibration data")
    axes.axhline(told["plain_bits"], color=_EDGE, linewidth=0.8, label="product of the plaintext moduli")
    axes.set(ylabel="bits", title="Bits that the integers need (only the last must fit)", ylim=(0, None))
    axes.legend(fontsize=8)


def _bar(axes: Axes, place: int, whole: float, parts: list[tuple[float, str]]) -> None:
    axes.bar(place, whole, 0.6, color=_FREE, edgecolor=_EDGE)
    bottom = 0.0
    for height, colour in parts:
        axes.bar(place, height, 0.6, bottom=bottom, color=colour)
        bottom += height


def _legend(axes: Axes, entries: list[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=colour, label=label) for label, colour in entries], fontsize=8, loc="upper right")
