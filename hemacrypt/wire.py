"""Public plans and preprocessing as protobuf messages and back. What comes from the wire is checked by the types."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import ValidationError

from hemacrypt.errors import PlanError
from hemacrypt.model.preprocess import AnyPreprocessing, ArrayPreprocessing, Preprocessing
from hemacrypt.plan.batch_plan import PublicBatchPlan
from hemacrypt.plan.bfv_plan import PublicBfvPlan
from hemacrypt.plan.plan import KeyGroup, Layout, Parameters, PublicPlan
from hemacrypt.seal.evaluation_keys import largest_key_set
from hemacrypt.v1 import inference_pb2 as pb

# No network of the family has more logits, and a label is a word; bounds what a stranger's plan may make us build.
_MOST_LABELS, _LONGEST_LABEL = 4096, 200
# Each rotation is a Galois key of megabytes; a plan that wants more than this would exhaust the client.
_LARGEST_KEY_SET = 2 << 30
# As many as the planner ever uses.
_MOST_CIPHERTEXTS = 64
# The same for all plaintext moduli together: more would be hundreds of megabytes for an image.
_MOST_EXACT_CIPHERTEXTS = 256
# Integers beyond this are not exact in float64, which is what an image's values are.
_LARGEST_INPUT_SCALE = 2.0**52
# Digits of the product of sixteen plaintext moduli of 60 bits.
_MOST_DIGITS = 290


def digest(ciphertexts: Iterable[bytes]) -> str:
    """Return the SHA-256 over ciphertexts, one after another, hexadecimal: what a request or reply carries."""
    hashed = hashlib.sha256()
    for ciphertext in ciphertexts:
        hashed.update(ciphertext)
    return hashed.hexdigest()


def plan_to_message(plan: PublicPlan) -> pb.PublicPlan:
    """Write a public plan as a message."""
    return pb.PublicPlan(
        labels=plan.labels,
        parameters=_parameters_to_message(plan.parameters),
        input_layout=_layout_to_message(plan.input_layout),
        input_scale=plan.input_scale,
        output_layout=_layout_to_message(plan.output_layout),
        output_scale=plan.output_scale,
        logit_error_bound=plan.logit_error_bound,
        logit_limit=plan.logit_limit,
        copy_error_bound=plan.copy_error_bound,
        guard_limit=plan.guard_limit,
        logit_error_floor=plan.logit_error_floor,
        keys=_keys_to_message(plan.keys),
        plan_id=plan.plan_id,
    )


def plan_from_message(message: pb.PublicPlan, model: str, preprocessing: AnyPreprocessing) -> PublicPlan:
    """Read a public plan from a message, together with the preprocessing that came with it.

    Raises
    ------
    PlanError
        If the plan is insecure or contradicts itself.
    """
    _check_said(message)
    if not 0 < message.copy_error_bound < math.inf:
        raise PlanError("the plan states no positive error bound for a copy")
    parameters = _parameters_from_message(message.parameters)
    plan = PublicPlan(
        model=model,
        labels=tuple(message.labels),
        parameters=parameters,
        input_layout=_layout_from_message(message.input_layout, parameters.slots),
        output_layout=_layout_from_message(message.output_layout, parameters.slots),
        input_scale=message.input_scale,
        output_scale=message.output_scale,
        keys=_keys_from_message(message.keys),
        logit_error_bound=message.logit_error_bound,
        logit_limit=message.logit_limit,
        copy_error_bound=message.copy_error_bound,
        preprocessing_digest=preprocessing.digest,
        guard_limit=message.guard_limit,
        logit_error_floor=message.logit_error_floor,
    )
    _check_read(plan, message.plan_id)
    return plan


def batch_plan_to_message(plan: PublicBatchPlan, break_even: int | None) -> pb.BatchPlan:
    """Write a public batch plan as a message.

    Parameters
    ----------
    plan:
        The plan.
    break_even:
        Fewest images for which a batch is better; None when it never is.
    """
    return pb.BatchPlan(
        labels=plan.labels,
        parameters=_parameters_to_message(plan.parameters),
        input_order=plan.input_order,
        input_level=plan.input_level,
        input_scale=plan.input_scale,
        output_level=plan.output_level,
        output_scale=plan.output_scale,
        logit_error_bound=plan.logit_error_bound,
        logit_limit=plan.logit_limit,
        keys=_keys_to_message(plan.keys),
        plan_id=plan.plan_id,
        break_even=break_even or 0,
    )


def batch_plan_from_message(message: pb.BatchPlan, model: str, preprocessing: AnyPreprocessing) -> PublicBatchPlan:
    """Read a public batch plan from a message; see `plan_from_message`.

    Raises
    ------
    PlanError
        If the plan is insecure or contradicts itself.
    """
    _check_said(message)
    plan = PublicBatchPlan(
        model=model,
        labels=tuple(message.labels),
        parameters=_parameters_from_message(message.parameters),
        input_order=tuple(message.input_order),
        input_level=message.input_level,
        output_level=message.output_level,
        input_scale=message.input_scale,
        output_scale=message.output_scale,
        keys=_keys_from_message(message.keys),
        logit_error_bound=message.logit_error_bound,
        logit_limit=message.logit_limit,
        preprocessing_digest=preprocessing.digest,
    )
    _check_read(plan, message.plan_id)
    return plan


def bfv_plan_to_message(plan: PublicBfvPlan) -> pb.BfvPlan:
    """Write a public plan for exact evaluation as a message."""
    return pb.BfvPlan(
        labels=plan.labels,
        parameters=_parameters_to_message(plan.parameters),
        plain_moduli=plan.plain_moduli,
        input_layout=_layout_to_message(plan.input_layout),
        output_layout=_layout_to_message(plan.output_layout),
        input_scale=plan.input_scale,
        output_scale=plan.output_scale,
        output_level=plan.output_level,
        keys=_keys_to_message(plan.keys),
        smallest_input=plan.input_range[0],
        largest_input=plan.input_range[1],
        largest_logit=str(plan.largest_logit),
        proven=plan.proven,
        quantisation_error=plan.quantisation_error,
        plan_id=plan.plan_id,
    )


def bfv_plan_from_message(message: pb.BfvPlan, model: str, preprocessing: AnyPreprocessing) -> PublicBfvPlan:
    """Read a public plan for exact evaluation from a message; see `plan_from_message`.

    Raises
    ------
    PlanError
        If the plan is insecure or contradicts itself.
    """
    _check_labels(message.labels)
    if not 0 <= message.quantisation_error < math.inf:
        raise PlanError("the plan states no quantisation error, a number from 0 upwards")
    if not 0 < message.input_scale <= _LARGEST_INPUT_SCALE:
        raise PlanError(f"input scale {message.input_scale:g}; expected more than 0 and at most 2^52")
    if len(message.largest_logit) > _MOST_DIGITS or not (
        message.largest_logit.isascii() and message.largest_logit.isdecimal()
    ):
        raise PlanError(f"the plan's largest logit is no number of at most {_MOST_DIGITS} decimal digits")
    parameters = _parameters_from_message(message.parameters)
    plan = PublicBfvPlan(
        model=model,
        labels=tuple(message.labels),
        parameters=parameters,
        plain_moduli=tuple(message.plain_moduli),
        input_layout=_rows_from_message(message.input_layout, parameters.slots),
        output_layout=_rows_from_message(message.output_layout, parameters.slots),
        input_scale=message.input_scale,
        output_scale=message.output_scale,
        output_level=message.output_level,
        keys=_keys_from_message(message.keys),
        input_range=(message.smallest_input, message.largest_input),
        largest_logit=int(message.largest_logit),
        proven=message.proven,
        quantisation_error=message.quantisation_error,
        preprocessing_digest=preprocessing.digest,
    )
    if max(plan.input_ciphertexts, plan.output_ciphertexts) > _MOST_EXACT_CIPHERTEXTS:
        raise PlanError(
            f"{plan.input_ciphertexts} ciphertexts there and {plan.output_ciphertexts} back; "
            f"at most {_MOST_EXACT_CIPHERTEXTS} are sent"
        )
    _check_read(plan, message.plan_id)
    return plan


def _check_said(message: pb.PublicPlan | pb.BatchPlan) -> None:
    """Check what a plan says to people, and its bounds."""
    _check_labels(message.labels)
    if not (0 < message.logit_error_bound < math.inf and 0 < message.logit_limit < math.inf):
        raise PlanError("the plan states no positive error bound and logit limit")


def _check_labels(labels: Sequence[str]) -> None:
    if len(labels) > _MOST_LABELS or any(len(label) > _LONGEST_LABEL for label in labels):
        raise PlanError(f"the plan has more than {_MOST_LABELS} labels or one of over {_LONGEST_LABEL} characters")
    if not all(label.isprintable() for label in labels):
        raise PlanError("a label has characters that do not print; labels are words")
    if len(set(labels)) != len(labels):
        raise PlanError("two labels are the same; answers could not be told apart")


def _check_read(plan: PublicPlan | PublicBatchPlan | PublicBfvPlan, plan_id: str) -> None:
    """Check what a plan asks for, and that it is the plan that was sent."""
    if largest_key_set(plan) > _LARGEST_KEY_SET:
        raise PlanError(
            f"the plan's {sum(len(group.elements) for group in plan.keys)} Galois keys may take "
            f"{largest_key_set(plan) >> 20} MiB; at most {_LARGEST_KEY_SET >> 20} MiB of keys are made for a service"
        )
    if plan.plan_id != plan_id:
        raise PlanError("the plan hashes to another name than it carries; client and service versions differ")


def preprocessing_to_message(preprocessing: AnyPreprocessing) -> pb.Preprocessing:
    """Write a preprocessing declaration as a message."""
    return pb.Preprocessing(**preprocessing.model_dump())


def preprocessing_from_message(message: pb.Preprocessing) -> AnyPreprocessing:
    """Read a preprocessing declaration from a message.

    Raises
    ------
    PlanError
        If the declaration contradicts itself, or is of a kind that this version does not know.
    """
    try:
        if message.kind == "array":
            return ArrayPreprocessing.model_validate(
                {
                    "shape": tuple(message.shape),
                    "scale": message.scale,
                    "smallest": message.smallest,
                    "largest": message.largest,
                }
            )
        # Services before this field existed leave it empty.
        if message.kind not in ("", "central-crop-block-mean"):
            raise PlanError(
                "the service preprocesses images in a way that this client does not know; upgrade hemacrypt"
            )
        return Preprocessing(
            image_size=message.image_size,
            crop=message.crop,
            block=message.block,
            scale=message.scale,
            largest_mean=message.largest_mean,
        )
    except ValidationError as error:
        problems = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise PlanError(f"the service declares an impossible preprocessing ({problems}); ask its operator") from None


def _parameters_to_message(parameters: Parameters) -> pb.Parameters:
    return pb.Parameters(
        degree=parameters.degree, data_primes=parameters.data_primes, special_prime=parameters.special_prime
    )


def _parameters_from_message(message: pb.Parameters) -> Parameters:
    return Parameters(message.degree, tuple(message.data_primes), message.special_prime)


def _keys_to_message(keys: Iterable[KeyGroup]) -> list[pb.KeyGroup]:
    return [pb.KeyGroup(level=group.level, relinearise=group.relinearise, elements=group.elements) for group in keys]


def _keys_from_message(messages: Iterable[pb.KeyGroup]) -> tuple[KeyGroup, ...]:
    return tuple(KeyGroup(group.level, group.relinearise, tuple(group.elements)) for group in messages)


def _layout_to_message(layout: Layout) -> pb.Layout:
    return pb.Layout(
        positions=layout.positions.tolist(),
        period=layout.period,
        ciphertexts=layout.ciphertexts,
        imaginary=np.flatnonzero(layout.flags).tolist(),
        factor=layout.factor,
        images=layout.images,
    )


def _layout_from_message(message: pb.Layout, slots: int) -> Layout:
    if message.ciphertexts > _MOST_CIPHERTEXTS:
        raise PlanError(f"a layout over {message.ciphertexts} ciphertexts; at most {_MOST_CIPHERTEXTS} are sent")
    positions = np.array(message.positions, dtype=np.int64)
    imaginary = np.zeros(positions.shape, dtype=bool)
    flagged = np.array(message.imaginary, dtype=np.int64)
    if flagged.size and flagged.max() >= positions.size:
        raise PlanError(f"value {flagged.max()} is said to be imaginary, there are {positions.size} values")
    imaginary[flagged] = True
    return Layout(positions, message.period, slots, message.ciphertexts, imaginary, message.factor, message.images)


def _rows_from_message(message: pb.Layout, slots: int) -> Layout:
    """Read a layout over rows of integer slots."""
    # The name of an exact plan does not cover the factor, which has no meaning there.
    if message.factor != 1:
        raise PlanError(f"a layout of integers with a factor of {message.factor:g}; expected 1")
    return _layout_from_message(message, slots)
