"""An exact plan in words and tables: the dry run in integers, the noise budget, what it costs."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from hemacrypt.plan.bfv_batch_plan import (
    BfvBatchLinear,
    BfvBatchPlan,
    BfvBatchSquare,
    BfvBatchStep,
    PublicBfvBatchPlan,
)
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, BfvStep
from hemacrypt.planner import costs
from hemacrypt.planner.report.ckks import describe_parameters, table
from hemacrypt.seal import sizes
from hemacrypt.seal.sizes import full_ciphertext_bytes, seeded_ciphertext_bytes

ExactPlan = BfvPlan | BfvBatchPlan


def describe_bfv(plan: ExactPlan) -> dict[str, Any]:
    """Return an exact plan as plain values: no weights, everything else that explains it.

    Magnitudes come as bits, sign included: what integers need for any input in range, and on calibration data.
    """
    parameters, public = plan.parameters, plan.public
    moduli, scales = public.plain_moduli, iter(plan.weight_scales)
    measured = plan.step_measured or (None,) * len(plan.steps)
    steps = [
        {
            "name": step.name,
            "kind": "affine" if _affine(step) else "square",
            "level": step.level,
            "next_level": step.next_level,
            "modulus_bits": round(parameters.bits_at(step.level), 1),
            "weight_scale": next(scales, None) if _affine(step) else None,
            "largest_value": float(largest),
            "bits": bits_of(largest),
            "measured_bits": None if seen is None else bits_of(seen),
            "noise_budget": round(budget, 1),
            "inputs": step.inputs,
            "outputs": step.outputs,
            "rotations": _rotations(step),
            "multiplications": _products(step),
            "estimated_ms": _step_ms(plan, step),
        }
        for step, largest, seen, budget in zip(
            plan.steps, plan.step_magnitudes, measured, plan.noise_budgets, strict=True
        )
    ]
    level = public.input_level if isinstance(public, PublicBfvBatchPlan) else parameters.top_level
    uploads, replies = public.input_ciphertexts, public.output_ciphertexts
    return {
        "scheme": "bfv",
        "layout": "batch" if isinstance(plan, BfvBatchPlan) else "latency",
        "model": public.model,
        "plan_id": public.plan_id,
        **describe_parameters(parameters),
        "plain_moduli": moduli,
        "plain_bits": round(math.log2(math.prod(moduli)), 1),
        "input_scale": public.input_scale,
        "output_scale": public.output_scale,
        "logit_bits": bits_of(public.largest_logit),
        "magnitudes": "worst case" if public.proven else "measured",
        "quantisation_error": public.quantisation_error,
        "steps": steps,
        "images": public.images,
        "output_level": public.output_level,
        "keys": [group._asdict() for group in public.keys],
        "estimated_ms": _estimates(plan),
        "bytes": {
            "upload": uploads * seeded_ciphertext_bytes(parameters, level),
            "reply": replies * full_ciphertext_bytes(parameters, public.output_level),
            "evaluation_keys": round(sizes.key_bytes(parameters, public.keys)),
        },
        "reasons": plan.reasons,
    }


def show_bfv(plan: ExactPlan, console: Console) -> None:
    """Print an exact plan for people."""
    told = describe_bfv(plan)
    moduli = ", ".join(map(str, told["plain_moduli"]))
    what = "BFV" if told["layout"] == "latency" else "BFV batches"
    console.print(
        f"[bold]{told['model']}[/]: {what}, degree N = {told['degree']}, two rows of {told['slots']} slots, "
        f"{len(told['data_primes'])} data primes and a special one, {told['modulus_bits']} bits, 128-bit security; "
        f"plaintext moduli {moduli} ({told['plain_bits']:.1f} bits)",
        highlight=False,
    )
    table(
        console,
        "What happens to the integers",
        ("step", "level", "weights times", "largest", "bits", "bits, measured", "noise budget, bits"),
        [
            (
                step["name"],
                f"{step['level']} → {step['next_level']}",
                "" if step["weight_scale"] is None else f"{step['weight_scale']:.4g}",
                f"{step['largest_value']:.3g}",
                str(step["bits"]),
                "" if step["measured_bits"] is None else str(step["measured_bits"]),
                f"{step['noise_budget']:.1f}",
            )
            for step in told["steps"]
        ],
    )
    table(
        console,
        f"What it costs, {len(plan.public.plain_moduli)} times",
        ("step", "ciphertexts", "turns", "products", "ms in all, one core"),
        [
            (
                step["name"],
                f"{step['inputs']} → {step['outputs']}",
                str(step["rotations"]),
                str(step["multiplications"]),
                "" if step["estimated_ms"] is None else f"{step['estimated_ms']:.1f}",
            )
            for step in told["steps"]
        ],
    )
    sizes = told["bytes"]
    console.print(
        f"On the wire, about: image up {sizes['upload'] / 1e3:.0f} kB (seeded), reply {sizes['reply'] / 1e3:.0f} kB, "
        f"evaluation keys {sizes['evaluation_keys'] / 1e6:.1f} MB once; CKKS plans on the same ring share them."
    )
    console.print(
        f"Integers are exact; logits need {told['logit_bits']} bits ({told['magnitudes']}). Rounding the network makes "
        f"logits deviate by {told['quantisation_error']:.2g} at most where every value is at its peak (one standard "
        f"deviation), far less on ordinary images. On one core for {told['images']} image{'s' * (told['images'] > 1)}, "
        f"about: {', '.join(f'{name} {ms:.0f} ms' for name, ms in told['estimated_ms'].items())}."
    )
    for reason in told["reasons"]:
        console.print(f"· {reason}", highlight=False)


def bits_of(largest: int) -> int:
    """Return the bits that integers up to an absolute value need, sign included."""
    return largest.bit_length() + 1


def _affine(step: BfvStep | BfvBatchStep) -> bool:
    return isinstance(step, BfvLinear | BfvBatchLinear)


def _rotations(step: BfvStep | BfvBatchStep) -> int:
    if not isinstance(step, BfvLinear):
        return 0
    giants = sum(len(giants) - 1 for giants in step.giants)
    return len(step.copies) - step.inputs + giants + sum(map(len, step.turns)) * step.outputs


def _products(step: BfvStep | BfvBatchStep) -> int:
    if isinstance(step, BfvLinear):
        return len(step.diagonals)
    return len(step.weights) if isinstance(step, BfvBatchLinear) else step.inputs


def _step_ms(plan: ExactPlan, step: BfvStep | BfvBatchStep) -> float | None:
    if isinstance(step, BfvBatchLinear | BfvBatchSquare):
        return None
    return round(costs.exact_step_ms(plan.parameters, step, len(plan.public.plain_moduli)), 1)


def _estimates(plan: ExactPlan) -> dict[str, float]:
    """Return the milliseconds of an engine whose squares are its own, of one that leaves them to SEAL, and of SEAL."""
    if isinstance(plan, BfvBatchPlan):
        return {"vector": round(plan.estimated_ms, 1)}
    count, parameters = len(plan.public.plain_moduli), plan.parameters
    maps = [step for step in plan.steps if isinstance(step, BfvLinear)]
    squares = [step for step in plan.steps if not isinstance(step, BfvLinear)]
    fast, slow = (costs.exact_ms(parameters, maps, count, primitives) for primitives in (costs.VECTOR, costs.SEAL))
    own, theirs = (costs.exact_ms(parameters, squares, count, primitives) for primitives in (costs.VECTOR, costs.SEAL))
    return {
        "vector": round(fast + own, 1),
        "vector, squares by seal": round(fast + theirs, 1),
        "seal": round(slow + theirs, 1),
    }
