"""Which layout suits a number of images: one image in one ciphertext, or one value in each ciphertext.

The latency layout takes the same time for each image; a batch takes the same time whatever part of it is used. So there
is a number of images from which on batches are better, and below it they waste slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hemacrypt.batch_plan import BatchPlan
from hemacrypt.errors import PlanError
from hemacrypt.plan import Plan
from hemacrypt.planner.batch import BYTE_MS
from hemacrypt.planner.costs import plan_ms
from hemacrypt.planner.report import full_ciphertext_bytes, seeded_ciphertext_bytes

Layout = Literal["latency", "batch"]


@dataclass(frozen=True)
class Comparison:
    """The two layouts side by side, and what is to be preferred.

    Attributes
    ----------
    layout:
        The better one: less time to compute and to send together, over a line of 1 Gbit/s.
    images:
        How many images were asked about.
    break_even:
        Fewest images for which a batch is better; None when it never is.
    latency_ms, batch_ms:
        Predicted milliseconds for each image on one core.
    latency_bytes, batch_bytes:
        Bytes for each image on the wire, there and back.
    reasons:
        The same in words, one sentence each.
    """

    layout: Layout
    images: int
    break_even: int | None
    latency_ms: float
    batch_ms: float
    latency_bytes: float
    batch_bytes: float
    reasons: tuple[str, ...]


def compare_layouts(latency: Plan, batch: BatchPlan, images: int) -> Comparison:
    """Say which of two plans of one network is better for a number of images.

    Parameters
    ----------
    latency, batch:
        Both plans.
    images:
        At least 1; more than a batch holds make several batches.

    Raises
    ------
    PlanError
        If there is to be no image.
    """
    if images < 1:
        raise PlanError(f"{images} images; expected at least 1")
    parameters, public = batch.parameters, batch.public
    single_ms = plan_ms(latency.parameters, latency.steps)
    single_bytes = seeded_ciphertext_bytes(latency.parameters, latency.parameters.top_level)
    single_bytes += full_ciphertext_bytes(latency.parameters, 0)
    whole_bytes = public.inputs * seeded_ciphertext_bytes(parameters, public.input_level)
    whole_bytes += public.outputs * full_ciphertext_bytes(parameters, public.output_level)
    single, whole = single_ms + single_bytes * BYTE_MS, batch.estimated_ms + whole_bytes * BYTE_MS
    batches = math.ceil(images / public.images)
    better: Layout = "batch" if batches * whole < images * single else "latency"
    needed = math.floor(whole / single) + 1
    break_even = needed if needed <= public.images else None
    return Comparison(
        layout=better,
        images=images,
        break_even=break_even,
        latency_ms=single_ms,
        batch_ms=batches * batch.estimated_ms / images,
        latency_bytes=single_bytes,
        batch_bytes=batches * whole_bytes / images,
        reasons=(
            f"one by one, an image takes {single_ms:.3g} ms and {single_bytes / 1e3:.0f} kB",
            f"{batches} {'batch' if batches == 1 else 'batches'} of {public.images} slots take "
            f"{batches * batch.estimated_ms / 1e3:.3g} s and {batches * whole_bytes / 1e6:.0f} MB in all: "
            f"{batches * batch.estimated_ms / images:.3g} ms and {batches * whole_bytes / images / 1e3:.0f} kB "
            f"for each of {images} images",
            "a full batch is no better than its images one by one"
            if break_even is None
            else f"batches are better from {break_even} images on, computing and sending over 1 Gbit/s taken together",
        ),
    )
