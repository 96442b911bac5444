"""A plan in words and tables."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hemacrypt.plan.plan import LinearStep, Parameters, Plan
from hemacrypt.planner.costs import plan_ms, step_ms
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.sizes import full_ciphertext_bytes, key_bytes, one_key_bytes, seeded_ciphertext_bytes


def describe_parameters(parameters: Parameters) -> dict[str, Any]:
    """Return degree and modulus chain as plain values."""
    return {
        "degree": parameters.degree,
        "slots": parameters.slots,
        "data_primes": parameters.data_primes,
        "special_prime": parameters.special_prime,
        "modulus_bits": parameters.modulus_bits,
        "security_bits": 128,
    }


def describe(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values: no weights, everything else that explains it."""
    parameters, public = plan.parameters, plan.public
    steps = [
        {
            "name": step.name,
            "level": step.level,
            "modulus_bits": round(parameters.bits_at(step.level), 1),
            "input_scale_bits": round(math.log2(step.input_scale), 2),
            "weight_scale_bits": round(math.log2(step.weight_scale), 2) if isinstance(step, LinearStep) else None,
            "output_scale_bits": round(math.log2(step.output_scale), 2),
            "kind": "affine" if isinstance(step, LinearStep) else step.kind,
            "inputs": step.inputs,
            "outputs": step.outputs,
            "rotations": len(step.rotations),
            "keys": len(set(step.rotations)) + (not isinstance(step, LinearStep)),
            "multiplications": step.multiplications,
            "largest_value": peak,
            "error": error,
            "estimated_ms": round(step_ms(parameters, step), 1),
            "ciphertext_bytes": step.inputs * full_ciphertext_bytes(parameters, step.level),
        }
        for step, peak, error in zip(plan.steps, plan.step_peaks, plan.step_errors, strict=True)
    ]
    return {
        "model": public.model,
        "plan_id": public.plan_id,
        **describe_parameters(parameters),
        "steps": steps,
        "images": public.images,
        "layouts": {
            name: {
                "ciphertexts": layout.ciphertexts,
                "period": layout.period,
                "imaginary": int(layout.flags.sum()),
                "images": layout.images,
            }
            for name, layout in (("input", public.input_layout), ("output", public.output_layout))
        },
        "keys": [group._asdict() for group in public.keys],
        "logit_error_bound": public.logit_error_bound,
        "logit_error_floor": public.logit_error_floor,
        "guard_limit": public.guard_limit,
        "logit_limit": public.logit_limit,
        "magnitudes": "measured" if plan.calibrated else "worst case",
        "estimated_ms": round(plan_ms(parameters, plan.steps), 1),
        "bytes": {
            "upload": public.input_layout.ciphertexts * seeded_ciphertext_bytes(parameters, parameters.top_level),
            "largest_upload": public.input_layout.ciphertexts * sealformat.largest_ciphertext(parameters),
            "reply": public.output_layout.ciphertexts * full_ciphertext_bytes(parameters, 0),
            "evaluation_keys": round(key_bytes(parameters, public.keys)),
        },
        "reasons": plan.reasons,
    }


def show(plan: Plan, console: Console) -> None:
    """Print a plan for people."""
    told = describe(plan)
    console.print(
        f"[bold]{told['model']}[/]: CKKS, degree N = {told['degree']}, {told['slots']} slots, "
        f"{len(told['data_primes'])} data primes and a special one, {told['modulus_bits']} bits, 128-bit security"
    )
    table(
        console,
        "What happens to the numbers",
        ("step", "level", "scale in", "weights", "scale out", "largest value", "error, 1 s.d."),
        [
            (
                step["name"],
                f"{step['level']} → {step['level'] - 1}",
                f"2^{step['input_scale_bits']:.2f}",
                "" if step["weight_scale_bits"] is None else f"2^{step['weight_scale_bits']:.2f}",
                f"2^{step['output_scale_bits']:.2f}",
                f"{step['largest_value']:.3g}",
                f"{step['error']:.1e}",
            )
            for step in told["steps"]
        ],
    )
    degree = plan.parameters.degree
    table(
        console,
        "What it costs",
        ("step", "ciphertexts", "turns", "products", "ms, one core", "input kB", "keys MB, shared"),
        [
            (
                step["name"],
                f"{step['inputs']} → {step['outputs']}",
                str(step["rotations"]),
                str(step["multiplications"]),
                f"{step['estimated_ms']:.1f}",
                f"{step['ciphertext_bytes'] / 1e3:.0f}",
                f"{step['keys'] * one_key_bytes(degree, step['level']) / 1e6:.1f}",
            )
            for step in told["steps"]
        ],
    )
    sizes = told["bytes"]
    console.print(
        f"On the wire, about: image up {sizes['upload'] / 1e3:.0f} kB (seeded), reply {sizes['reply'] / 1e3:.0f} kB, "
        f"evaluation keys {sizes['evaluation_keys'] / 1e6:.1f} MB once ({plan.public.galois_keys} Galois keys and "
        f"{sum(group.relinearise for group in plan.public.keys)} relinearisation keys, each for its level alone)."
    )
    console.print(
        f"Logits are off by at most {told['logit_error_bound']:.1e} (six standard deviations, copies averaged) and may "
        f"reach ±{told['logit_limit']:.0f}; magnitudes are {told['magnitudes']}. "
        + (
            "A guard refuses images whose hidden values are larger than any calibration image made them: the bound is "
            f"for the largest that it lets pass, {told['logit_error_floor']:.1e} for the smallest. "
            if told["guard_limit"]
            else ""
        )
        + f"About {told['estimated_ms']:.0f} ms on one core for {told['images']} image{'s' * (told['images'] > 1)}."
    )
    for reason in told["reasons"]:
        console.print(f"· {reason}", highlight=False)


def table(console: Console, title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table whose first column holds words."""
    printed = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for number, heading in enumerate(headings):
        printed.add_column(heading, justify="right" if number else "left")
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
