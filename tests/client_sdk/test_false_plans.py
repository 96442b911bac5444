"""A service that lies about its plan: the client refuses, by name, at once, and whatever the lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk import Client, ClientError, ReplyError
from hemacrypt.bundle import Bundle
from hemacrypt.errors import HemacryptError, PlanError
from hemacrypt.plan import is_prime
from hemacrypt.planner import plan_bundle
from hemacrypt.preprocess import Pixels
from hemacrypt.security import LARGEST_MODULUS_BITS
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.wire import (
    plan_from_message,
    plan_to_message,
    preprocessing_from_message,
    preprocessing_to_message,
)
from tests.client_sdk.conftest import Small

_DEGREE = 4096
_SLOTS = _DEGREE // 2
_UINT32 = 2**32 - 1


def _primes(degree: int, count: int) -> list[int]:
    """Return the largest primes below 2^30 that are 1 modulo 2N."""
    found: list[int] = []
    candidate = (1 << 30) - (1 << 30) % (2 * degree) + 1
    while len(found) < count:
        candidate -= 2 * degree
        if is_prime(candidate):
            found.append(candidate)
    return found


def _told(message: pb.GetModelResponse, directory: Path, model: str = "small") -> Client:
    """Return a client whose service says this about the model."""
    client = Client("127.0.0.1:1", model, key_directory=directory)
    client._stub = SimpleNamespace(GetModel=lambda request, timeout: message)
    return client


def _consistent(message: pb.GetModelResponse) -> bool:
    """Give a message the plan's true name, as a liar would; return whether it is a plan at all."""
    try:
        preprocessing = preprocessing_from_message(message.preprocessing)
        message.model.plan_id = plan_from_message(message.plan, "small", preprocessing).plan_id
    except PlanError:
        return False
    return True


def _set(path: str, *values: object) -> Callable[[pb.GetModelResponse], None]:
    """Replace a field, named from the response down, by a value, or a repeated field by values."""

    def change(message: pb.GetModelResponse) -> None:
        *parents, name = path.split(".")
        holder = message
        for parent in parents:
            holder = getattr(holder, parent)
        if holder.DESCRIPTOR.fields_by_name[name].is_repeated:
            del getattr(holder, name)[:]
            getattr(holder, name).extend(values)
        else:
            setattr(holder, name, *values)

    return change


def _replaced(path: str, index: int, value: int) -> Callable[[pb.GetModelResponse], None]:
    def change(message: pb.GetModelResponse) -> None:
        *parents, name = path.split(".")
        holder = message
        for parent in parents:
            holder = getattr(holder, parent)
        getattr(holder, name)[index] = value

    return change


_PRIMES = "plan.parameters.data_primes"
_SPECIAL = "plan.parameters.special_prime"
_LIES: dict[str, Callable[[pb.GetModelResponse], None]] = {
    "nothing at all": lambda message: message.Clear(),
    "no plan": lambda message: message.ClearField("plan"),
    "no parameters": lambda message: message.plan.ClearField("parameters"),
    "no preprocessing": lambda message: message.ClearField("preprocessing"),
    "too many bits for the degree": _set(_PRIMES, *_primes(_DEGREE, 3)),
    "far too many bits": _set(_PRIMES, *_primes(_DEGREE, 40)),
    "two hundred primes": _set(_PRIMES, *_primes(_DEGREE, 200)),
    "a million primes": _set(_PRIMES, *([12289] * 1_000_000)),
    "no primes": _set(_PRIMES),
    "a prime above 2^30": _replaced(_PRIMES, 0, 4_294_967_291),
    "a prime of 2^30 + ...": _replaced(
        _PRIMES, 0, next(p for p in range((1 << 30) + 1, 1 << 31, 2 * _DEGREE) if is_prime(p))
    ),
    "a composite": _replaced(
        _PRIMES, 0, next(p for p in range((1 << 29) + 1, 1 << 30, 2 * _DEGREE) if not is_prime(p))
    ),
    "a prime that is not 1 modulo 2N": _replaced(_PRIMES, 0, 1_073_741_789),
    "a prime of 0": _replaced(_PRIMES, 0, 0),
    "a prime of 1": _replaced(_PRIMES, 0, 1),
    "a special prime of 0": _set(_SPECIAL, 0),
    "a special prime of 2^32 - 1": _set(_SPECIAL, _UINT32),
    "a special prime that is there already": lambda message: _set(_SPECIAL, message.plan.parameters.data_primes[0])(
        message
    ),
    **{
        f"degree {degree}": _set("plan.parameters.degree", degree)
        for degree in (0, 1, 2, 1024, 2048, 4095, 65536, 1 << 31, _UINT32)
    },
    "a position beyond the slots": _replaced("plan.input_layout.positions", 0, _SLOTS),
    "a position of 2^32 - 1": _replaced("plan.input_layout.positions", 0, _UINT32),
    "a position twice": lambda message: _replaced(
        "plan.input_layout.positions", 0, message.plan.input_layout.positions[1]
    )(message),
    "no positions": _set("plan.input_layout.positions"),
    "a million positions": _set("plan.input_layout.positions", *range(1_000_000)),
    "an output beyond the slots": _replaced("plan.output_layout.positions", 0, _SLOTS),
    **{f"period {period}": _set("plan.input_layout.period", period) for period in (0, 1, 3, 2 * _SLOTS, _UINT32)},
    **{f"output period {period}": _set("plan.output_layout.period", period) for period in (0, 3, _UINT32)},
    **{
        f"{field} {value}": _set(f"plan.{field}", value)
        for field in ("input_scale", "output_scale")
        for value in (math.nan, math.inf, -math.inf, 0.0, -1.0, 0.5, 1e300, 5e-324)
    },
    **{
        f"{field} {value}": _set(f"plan.{field}", value)
        for field in ("logit_error_bound", "logit_limit")
        for value in (math.nan, math.inf, 0.0, -1.0)
    },
    "one label": _set("plan.labels", "no"),
    "three labels": _set("plan.labels", "no", "yes", "perhaps"),
    "no label": _set("plan.labels"),
    "a million labels": _set("plan.labels", *(["x"] * 1_000_000)),
    "a label of a megabyte": _set("plan.labels", "no", "y" * 1_000_000),
    "one label twice": _set("plan.labels", "no", "no"),
    "a label that steers the terminal": _set("plan.labels", "no", "\x1b[2Jyes"),
    "a rotation by 0": _set("plan.rotation_steps", 0),
    "a rotation by all slots": _set("plan.rotation_steps", _SLOTS),
    "a rotation by 2^32 - 1": _set("plan.rotation_steps", _UINT32),
    "a rotation twice": _set("plan.rotation_steps", 1, 1),
    "rotations that descend": _set("plan.rotation_steps", 2, 1),
    "a million rotations": _set("plan.rotation_steps", *range(1_000_000)),
    "a million times the same rotation": _set("plan.rotation_steps", *([1] * 1_000_000)),
    **{f"image size {size}": _set("preprocessing.image_size", size) for size in (0, 7, 9, 100_000, _UINT32)},
    **{f"crop {crop}": _set("preprocessing.crop", crop) for crop in (0, 4, 7, 10, _UINT32)},
    **{f"block {block}": _set("preprocessing.block", block) for block in (0, 1, 3, 8, 16, _UINT32)},
    **{f"factor {value}": _set("preprocessing.scale", value) for value in (0.0, -1.0, math.nan, math.inf)},
    **{f"mean {value}": _set("preprocessing.largest_mean", value) for value in (0.0, -1.0, math.nan, 256.0, math.inf)},
    "another plan's name": _set("model.plan_id", "f" * 64),
    "no name": _set("model.plan_id", ""),
    "a name in capitals": lambda message: _set("model.plan_id", message.model.plan_id.upper())(message),
}


def test_the_truth_is_believed(small: Small, tmp_path: Path) -> None:
    client = _told(small.message(), tmp_path)
    assert client.plan.plan_id == small.plan.plan_id
    assert client.preprocessing == small.bundle.manifest.preprocessing
    client.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("lie", _LIES.values(), ids=_LIES.keys())
def test_a_lie_is_refused(
    small: Small, tmp_path: Path, request: pytest.FixtureRequest, lie: Callable[[pb.GetModelResponse], None]
) -> None:
    message = small.message()
    lie(message)
    assert message != small.message()
    if "name" not in request.node.callspec.id:
        # The name would give every other lie away as well; a liar corrects it.
        _consistent(message)
    with _told(message, tmp_path / "keys") as client:
        with pytest.raises(ReplyError) as refused:
            assert client.plan
        with pytest.raises(ReplyError):
            client.generate_keys()
    text = str(refused.value)
    assert text.isprintable()
    assert len(text) < 1000, "the refusal repeats what was sent, however long it was"
    assert not (tmp_path / "keys").exists()


def test_a_plan_that_wants_gigabytes_of_keys_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Each of these rotations is a fine one, but together they would take 20 GB of the hospital's memory."""
    plan, preprocessing = plan_bundle(bundle).public, bundle.manifest.preprocessing
    message = pb.GetModelResponse(plan=plan_to_message(plan), preprocessing=preprocessing_to_message(preprocessing))
    message.model.plan_id = plan.plan_id
    with _told(message, tmp_path, plan.model) as client:
        assert client.plan.plan_id == plan.plan_id
    _set("plan.rotation_steps", *range(1, plan.parameters.slots))(message)
    with _told(message, tmp_path, plan.model) as client, pytest.raises(ReplyError, match="keys"):
        assert client.plan


_UNENCODABLE: dict[str, Callable[[pb.GetModelResponse], None]] = {
    "factor 1e30": _set("preprocessing.scale", 1e30),
    "factor 1e300": _set("preprocessing.scale", 1e300),
    "scale 2^59": _set("plan.input_scale", 2.0**59),
}


@pytest.mark.parametrize("change", _UNENCODABLE.values(), ids=_UNENCODABLE.keys())
def test_numbers_that_no_plaintext_holds_are_an_error_by_name(
    small: Small, pixels: Pixels, tmp_path: Path, change: Callable[[pb.GetModelResponse], None]
) -> None:
    message = small.message()
    change(message)
    _consistent(message)
    with _told(message, tmp_path / "keys") as client, pytest.raises(ClientError):  # noqa: PT012
        client.generate_keys()
        client._request(pixels)


# Where a byte string is changed (in thousandths), and the bytes that take the place of as many others.
_DAMAGE = st.lists(st.tuples(st.integers(0, 999), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3)


@given(damage=_DAMAGE)
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
def test_a_description_with_random_damage_is_refused_or_usable(
    small: Small, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, bytes]]
) -> None:
    content = bytearray(small.message().SerializeToString())
    for where, replacement in damage:
        start = where * len(content) // 1000
        content[start : start + len(replacement)] = replacement
    try:
        message = pb.GetModelResponse.FromString(bytes(content))
    except DecodeError:
        return  # gRPC itself refuses it
    _check_refused_or_usable(message, pixels, tmp_path_factory.mktemp("keys") / "keys")


_SCALARS = [
    *("parameters.degree", "parameters.special_prime", "input_layout.period", "output_layout.period"),
    *("input_scale", "output_scale", "needs_relinearisation", "logit_error_bound", "logit_limit"),
]
_LISTS = ["parameters.data_primes", "input_layout.positions", "output_layout.positions", "rotation_steps"]
_WHOLE = st.one_of(st.integers(0, 2 * _SLOTS), st.sampled_from([_DEGREE, 8192, 1 << 30, _UINT32]))
_REAL = st.one_of(st.floats(), st.floats(1e-6, 1e12))


@given(data=st.data())
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_a_plan_with_random_values_is_refused_or_usable(
    small: Small, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    message = small.message()
    for path in data.draw(st.lists(st.sampled_from(_SCALARS + _LISTS), min_size=1, max_size=2, unique=True)):
        if path in _LISTS:
            _set(f"plan.{path}", *data.draw(st.lists(_WHOLE, max_size=50)))(message)
        elif path.endswith(("scale", "bound", "limit")):
            _set(f"plan.{path}", data.draw(_REAL))(message)
        elif path == "needs_relinearisation":
            _set(f"plan.{path}", True)(message)
        else:
            _set(f"plan.{path}", data.draw(_WHOLE))(message)
    _check_refused_or_usable(message, pixels, tmp_path_factory.mktemp("keys") / "keys")


def _check_refused_or_usable(message: pb.GetModelResponse, pixels: Pixels, directory: Path) -> None:
    """A client either refuses a description by name, or can do all that it does with one."""
    _consistent(message)
    with _told(message, directory) as client:
        try:
            plan = client.plan
        except ReplyError:
            return
        assert plan.plan_id == message.model.plan_id
        assert plan.parameters.modulus_bits <= LARGEST_MODULUS_BITS[plan.parameters.degree]
        try:
            client.generate_keys()
            request, _ = client._request(pixels)
        except HemacryptError:
            return
        assert request.plan_id == plan.plan_id
        assert client._holder().plan is plan
