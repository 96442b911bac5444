"""Which layout suits a number of images: one image in one ciphertext, or one value in each ciphertext.

The latency layout takes the same time for each image; a batch takes the same time whatever part of it is used. So there
is a number of images from which on batches are better, and below it they waste slots. Both are planned together, with
the same parameters and one set of keys, and so is the exact evaluation under BFV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.console import Console

from hemacrypt.errors import PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork
from hemacrypt.plan.batch_plan import BatchPlan
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.plan.plan import Plan, united, without_repeats
from hemacrypt.planner.costs import plan_ms
from hemacrypt.planner.latency.bfv import plan_bfv
from hemacrypt.planner.latency.choices import KEY_BUDGET
from hemacrypt.planner.latency.ckks import plan_model
from hemacrypt.planner.throughput.ckks import BYTE_MS, plan_batch
from hemacrypt.seal.sizes import full_ciphertext_bytes, key_bytes, seeded_ciphertext_bytes

Layout = Literal["latency", "batch"]


@dataclass(frozen=True)
class Layouts:
    """All plans of one network; one secret key and one set of evaluation keys serve them.

    Attributes
    ----------
    plans:
        For one image first, then for several in one request.
    batch:
        For a batch of images; None when the network cannot be evaluated so.
    no_batch:
        Why there is no batch plan; empty when there is one.
    exact:
        For one image under BFV; empty when the network cannot be evaluated so with the same parameters and keys, or
        nobody asked for it.
    no_exact:
        Why there is no exact plan; empty when there is one.
    """

    plans: tuple[Plan, ...]
    batch: BatchPlan | None
    no_batch: str
    exact: tuple[BfvPlan, ...] = ()
    no_exact: str = "not asked for"

    @property
    def break_even(self) -> int | None:
        """Fewest images for which a batch is better; None when it never is, or there is no batch plan."""
        return None if self.batch is None else compare_layouts(self.plans, self.batch, 1).break_even


def plan_layouts(
    network: CollapsedNetwork,
    name: str = "network",
    labels: Sequence[str] | None = None,
    preprocessing_digest: str = "",
    *,
    key_budget: int | None = None,
    exact: bool = False,
    precision: int | None = None,
    engine: str = "vector",
    margins: Mapping[str, float] | None = None,
) -> Layouts:
    """Plan a network for few images and for batches, and on request for exact evaluation.

    Parameters
    ----------
    network, name, labels, preprocessing_digest, key_budget, precision, engine, margins:
        As in `hemacrypt.planner.plan_model`.
    exact:
        Whether to plan BFV as well.

    Raises
    ------
    PlanError
        If the network cannot be planned for one image; that it cannot be planned for batches or under BFV is no error.
    """

    def latency(budget: int | None) -> tuple[Plan, ...]:
        return plan_model(
            network, name, labels, preprocessing_digest,
            key_budget=budget, precision=precision, engine=engine, margins=margins,
        )  # fmt: skip

    layouts = _approximate(latency, network, name, labels, preprocessing_digest, key_budget)
    return _with_exact(layouts, network, labels, preprocessing_digest, key_budget) if exact else layouts


def _approximate(
    latency: Callable[[int | None], tuple[Plan, ...]],
    network: CollapsedNetwork,
    name: str,
    labels: Sequence[str] | None,
    preprocessing_digest: str,
    key_budget: int | None,
) -> Layouts:
    """Plan few images and batches under CKKS; ``latency`` plans few images within a budget for keys."""
    plans = latency(key_budget)
    try:
        batch = plan_batch(network, name, labels, preprocessing_digest, plans[0].parameters)
    except PlanError as error:
        return Layouts(plans, None, str(error))
    parameters, budget = batch.parameters, KEY_BUDGET if key_budget is None else key_budget
    alone = key_bytes(parameters, plans[0].public.keys)
    keys = united([plans[0].public.keys, batch.public.keys])
    # A network that needs more than the usual budget for one image may need what it needs.
    if key_bytes(parameters, keys) > max(budget, alone):
        try:
            plans = latency(math.floor(budget - key_bytes(parameters, batch.public.keys)))
        except PlanError:
            return Layouts(plans, None, f"the keys of a batch do not fit the budget of {budget / 1e6:.1f} MB as well")
        keys = united([plans[0].public.keys, batch.public.keys])
    return Layouts(
        tuple(replace(plan, public=replace(plan.public, keys=keys)) for plan in plans),
        replace(batch, public=replace(batch.public, keys=keys)),
        "",
    )


def _with_exact(
    layouts: Layouts,
    network: CollapsedNetwork,
    labels: Sequence[str] | None,
    preprocessing_digest: str,
    key_budget: int | None,
) -> Layouts:
    """Add a plan under BFV, if one works with the parameters that are there and the keys keep within the budget."""
    first, budget = layouts.plans[0].public, KEY_BUDGET if key_budget is None else key_budget
    allowed, why = max(budget, key_bytes(first.parameters, first.keys)), ""
    for exact_budget in (None, round(0.8 * budget), round(0.6 * budget)):
        try:
            plan = plan_bfv(
                network,
                first.model,
                labels,
                preprocessing_digest,
                key_budget=exact_budget,
                parameters=first.parameters,
            )
        except PlanError as error:
            # That fewer keys do not suffice is of no interest to who would be served with more.
            why = why or str(error)
            break
        keys = united([first.keys, plan.public.keys])
        if keys != first.keys:
            # Both schemes turn by the same steps, but here not at the same levels: a key that either needs is made
            # once, for the highest level where it is used.
            keys = without_repeats(keys)
        needed = key_bytes(first.parameters, keys)
        if needed <= allowed:
            why = ""
            break
        why = f"the keys would take {needed / 1e6:.1f} MB together, the budget is {budget / 1e6:.1f} MB"
    if why:
        return replace(layouts, no_exact=why)
    return replace(
        layouts,
        plans=tuple(replace(plan, public=replace(plan.public, keys=keys)) for plan in layouts.plans),
        batch=layouts.batch and replace(layouts.batch, public=replace(layouts.batch.public, keys=keys)),
        exact=(replace(plan, public=replace(plan.public, keys=keys)),),
        no_exact="",
    )


def plan_bundle_layouts(
    bundle: Bundle,
    key_budget: int | None = None,
    *,
    exact: bool = False,
    precision: int | None = None,
    engine: str = "vector",
) -> Layouts:
    """Plan a bundle's network, by default as exact as its margins ask for; see `plan_layouts`."""
    manifest = bundle.manifest
    return plan_layouts(
        bundle.network,
        manifest.name,
        manifest.labels,
        manifest.preprocessing.digest,
        key_budget=key_budget,
        exact=exact,
        precision=precision,
        engine=engine,
        margins=manifest.metrics.get("margins"),
    )


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


def compare_layouts(latency: Plan | Sequence[Plan], batch: BatchPlan, images: int) -> Comparison:
    """Say which layout of one network is better for a number of images.

    Parameters
    ----------
    latency:
        The plans for one image and for several in one request; the best for each image counts.
    batch:
        The plan for a batch.
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
    plans = (latency,) if isinstance(latency, Plan) else latency
    single, single_ms, single_bytes = min(_each(plan) for plan in plans)
    whole_bytes = public.inputs * seeded_ciphertext_bytes(parameters, public.input_level)
    whole_bytes += public.outputs * full_ciphertext_bytes(parameters, public.output_level)
    whole = batch.estimated_ms + whole_bytes * BYTE_MS
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


def _each(plan: Plan) -> tuple[float, float, float]:
    """Return what an image costs with sending in milliseconds, then its milliseconds and its bytes."""
    parameters, public = plan.parameters, plan.public
    sent = public.input_layout.ciphertexts * seeded_ciphertext_bytes(parameters, parameters.top_level)
    sent += public.output_layout.ciphertexts * full_ciphertext_bytes(parameters, 0)
    milliseconds = plan_ms(parameters, plan.steps) / public.images
    return milliseconds + sent / public.images * BYTE_MS, milliseconds, sent / public.images


def describe_comparison(layouts: Layouts, images: int) -> dict[str, Any]:
    """Return as plain values which layout suits a number of images, and why.

    Raises
    ------
    PlanError
        If the network has no plan for batches.
    """
    if layouts.batch is None:
        raise PlanError(f"this network is not evaluated in batches: {layouts.no_batch}")
    public = layouts.batch.public
    return asdict(compare_layouts(layouts.plans, layouts.batch, images)) | {
        "model": public.model,
        "batch": {
            "plan_id": public.plan_id,
            "images": public.images,
            "ciphertexts": {"input": public.inputs, "output": public.outputs},
            "levels": {"input": public.input_level, "output": public.output_level},
            "logit_error_bound": public.logit_error_bound,
            "reasons": layouts.batch.reasons,
        },
    }


def show_comparison(layouts: Layouts, images: int, console: Console) -> None:
    """Print for people which layout suits a number of images, and why."""
    told = describe_comparison(layouts, images)
    better = "in batches" if told["layout"] == "batch" else "one by one"
    console.print(f"[bold]{told['model']}[/]: {images} images are better sent {better}")
    for reason in (*told["reasons"], *told["batch"]["reasons"]):
        console.print(f"· {reason}", highlight=False)
    console.print(f"· logits of a batch are off by at most {told['batch']['logit_error_bound']:.1e}", highlight=False)
