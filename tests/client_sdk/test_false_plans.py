"""A service that lies about its plan: the client refuses, by name, at once, and whatever the lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk import Client, ClientError, ReplyError
from hemacrypt.errors import HemacryptError, PlanError
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.preprocess import Pixels
from hemacrypt.plan.plan import PublicPlan, is_prime
from hemacrypt.plan.security import LARGEST_MODULUS_BITS
from hemacrypt.planner import plan_bundle
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


class _AnyName(str):
    """A name that every other is equal to."""

    def __ne__(self, other: object) -> bool:
        return False

    __eq__, __hash__ = object.__eq__, str.__hash__


class _Unnamed:
    """A plan's message as it is, but under whatever name its reader computes."""

    plan_id = _AnyName()

    def __init__(self, message: pb.PublicPlan) -> None:
        self._message = message

    def __getattr__(self, name: str) -> object:
        return getattr(self._message, name)


def _consistent(message: pb.GetModelResponse) -> bool:
    """Give plans their true names, as a liar would; return whether they are plans at all."""
    try:
        preprocessing = preprocessing_from_message(message.preprocessing)
        for plan in message.plans:
            unnamed: Any = _Unnamed(plan)
            plan.plan_id = plan_from_message(unnamed, "small", preprocessing).plan_id
    except PlanError:
        return False
    if message.plans:
        message.model.plan_id = message.plans[0].plan_id
    return True


def _field(message: Message, path: str) -> tuple[Any, str]:
    """Return what holds a field, named from the response down, and the field's own name."""
    *parents, name = path.split(".")
    holder: Any = message
    for parent in parents:
        holder = holder[int(parent)] if parent.isdigit() else getattr(holder, parent)
    return holder, name


def _set(path: str, *values: object) -> Callable[[pb.GetModelResponse], None]:
    """Replace a field, named from the response down, by a value, or a repeated field by values."""

    def change(message: pb.GetModelResponse) -> None:
        holder, name = _field(message, path)
        if holder.DESCRIPTOR.fields_by_name[name].is_repeated:
            del getattr(holder, name)[:]
            getattr(holder, name).extend(values)
        else:
            setattr(holder, name, *values)

    return change


def _replaced(path: str, index: int, value: int) -> Callable[[pb.GetModelResponse], None]:
    def change(message: pb.GetModelResponse) -> None:
        holder, name = _field(message, path)
        getattr(holder, name)[index] = value

    return change


def _keys(*groups: tuple[int, bool, Iterable[int]], plan: int = 0) -> Callable[[pb.GetModelResponse], None]:
    """Replace the key groups of a plan."""
    return _set(f"plans.{plan}.keys", *[pb.KeyGroup(level=a, relinearise=b, elements=c) for a, b, c in groups])


def _both(*changes: Callable[[pb.GetModelResponse], None]) -> Callable[[pb.GetModelResponse], None]:
    """Make several changes."""

    def change(message: pb.GetModelResponse) -> None:
        for one in changes:
            one(message)

    return change


_PRIMES = "plans.0.parameters.data_primes"
_SPECIAL = "plans.0.parameters.special_prime"
_LIES: dict[str, Callable[[pb.GetModelResponse], None]] = {
    "nothing at all": lambda message: message.Clear(),
    "no plan": lambda message: message.ClearField("plans"),
    "no parameters": lambda message: message.plans[0].ClearField("parameters"),
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
    "a special prime that is there already": lambda message: _set(_SPECIAL, message.plans[0].parameters.data_primes[0])(
        message
    ),
    **{
        f"degree {degree}": _set("plans.0.parameters.degree", degree)
        for degree in (0, 1, 2, 1024, 2048, 4095, 65536, 1 << 31, _UINT32)
    },
    "a position beyond the slots": _replaced("plans.0.input_layout.positions", 0, _SLOTS),
    "a position of 2^32 - 1": _replaced("plans.0.input_layout.positions", 0, _UINT32),
    "a position twice": lambda message: _replaced(
        "plans.0.input_layout.positions", 0, message.plans[0].input_layout.positions[1]
    )(message),
    "no positions": _set("plans.0.input_layout.positions"),
    "a million positions": _set("plans.0.input_layout.positions", *range(1_000_000)),
    "an output beyond the slots": _replaced("plans.0.output_layout.positions", 0, _SLOTS),
    **{f"period {period}": _set("plans.0.input_layout.period", period) for period in (0, 1, 3, 2 * _SLOTS, _UINT32)},
    **{f"output period {period}": _set("plans.0.output_layout.period", period) for period in (0, 3, _UINT32)},
    **{
        f"{field} {value}": _set(f"plans.0.{field}", value)
        for field in ("input_scale", "output_scale")
        for value in (math.nan, math.inf, -math.inf, 0.0, -1.0, 0.5, 1e300, 5e-324)
    },
    **{
        f"{field} {value}": _set(f"plans.0.{field}", value)
        for field in ("logit_error_bound", "logit_limit")
        for value in (math.nan, math.inf, 0.0, -1.0)
    },
    "one label": _set("plans.0.labels", "no"),
    "three labels": _set("plans.0.labels", "no", "yes", "perhaps"),
    "no label": _set("plans.0.labels"),
    "a million labels": _set("plans.0.labels", *(["x"] * 1_000_000)),
    "a label of a megabyte": _set("plans.0.labels", "no", "y" * 1_000_000),
    "one label twice": _set("plans.0.labels", "no", "no"),
    "a label that steers the terminal": _set("plans.0.labels", "no", "\x1b[2Jyes"),
    **{
        f"Galois element {element}": _keys((1, False, [element]))
        for element in (0, 1, 2, 4, 2 * _DEGREE, 2 * _DEGREE + 1, 4 * _DEGREE - 1, _UINT32)
    },
    "a Galois element twice": _keys((1, False, [3, 3])),
    "Galois elements that descend": _keys((1, False, [9, 3])),
    "a million Galois elements": _keys((1, False, range(3, 2_000_003, 2))),
    "a million times the same Galois element": _keys((1, False, [3] * 1_000_000)),
    "keys above the highest level": _keys((2, True, [3]), (1, False, [3])),
    "keys at level 2^32 - 1": _keys((_UINT32, True, [])),
    "keys of one level twice": _keys((1, True, []), (1, False, [3])),
    "keys in ascending order": _keys((0, False, [3]), (1, False, [3])),
    "a hundred thousand groups of keys": _keys(*[(1, True, ())] * 100_000),
    **{f"{count} input ciphertexts": _set("plans.0.input_layout.ciphertexts", count) for count in (0, 65, _UINT32)},
    **{f"{count} output ciphertexts": _set("plans.0.output_layout.ciphertexts", count) for count in (0, 65, _UINT32)},
    **{f"an imaginary value {value}": _set("plans.0.input_layout.imaginary", value) for value in (48, _UINT32)},
    "a value that is imaginary and shares its slot": _set("plans.0.input_layout.imaginary"),
    "an imaginary logit 2": _set("plans.0.output_layout.imaginary", 2),
    "a million imaginary values": _set("plans.0.input_layout.imaginary", *range(1_000_000)),
    **{
        f"{layout} factor {value}": _set(f"plans.0.{layout}_layout.factor", value)
        for layout in ("input", "output")
        for value in (0.0, -1.0, math.nan, math.inf, 1e-300, 1e6, 5e-324)
    },
    **{
        f"{count} images in and out": _both(
            _set("plans.0.input_layout.images", count), _set("plans.0.output_layout.images", count)
        )
        for count in (0, 2, 3, _UINT32)
    },
    "one image in, two out": _set("plans.0.output_layout.images", 2),
    "two images in, one out": _both(
        _set("plans.0.input_layout.images", 2),
        _set("plans.0.input_layout.imaginary"),
        _set("plans.0.input_layout.period", 64),
        _set("plans.0.input_layout.positions", *range(48)),
    ),
    **{f"image size {size}": _set("preprocessing.image_size", size) for size in (0, 7, 9, 100_000, _UINT32)},
    **{f"crop {crop}": _set("preprocessing.crop", crop) for crop in (0, 4, 7, 10, _UINT32)},
    **{f"block {block}": _set("preprocessing.block", block) for block in (0, 1, 3, 8, 16, _UINT32)},
    **{f"factor {value}": _set("preprocessing.scale", value) for value in (0.0, -1.0, math.nan, math.inf)},
    **{f"mean {value}": _set("preprocessing.largest_mean", value) for value in (0.0, -1.0, math.nan, 256.0, math.inf)},
    "another plan's name": _set("model.plan_id", "f" * 64),
    "no name": _set("model.plan_id", ""),
    "a plan under another name": _set("plans.0.plan_id", "f" * 64),
    "a plan without name": _set("plans.0.plan_id", ""),
    "a plan under another name, and named so": _both(
        _set("plans.0.plan_id", "f" * 64), _set("model.plan_id", "f" * 64)
    ),
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
    # The second plan would give away most lies about the first.
    del message.plans[1:]
    honest = pb.GetModelResponse()
    honest.CopyFrom(message)
    lie(message)
    assert message != honest
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
    plan, preprocessing = plan_bundle(bundle)[0].public, bundle.manifest.preprocessing
    message = pb.GetModelResponse(plans=[plan_to_message(plan)], preprocessing=preprocessing_to_message(preprocessing))
    message.model.plan_id = plan.plan_id
    with _told(message, tmp_path, plan.model) as client:
        assert client.plan.plan_id == plan.plan_id
    _keys((plan.parameters.top_level, False, range(3, plan.parameters.degree, 2)))(message)
    with _told(message, tmp_path, plan.model) as client, pytest.raises(ReplyError, match="keys"):
        assert client.plan


_UNENCODABLE: dict[str, Callable[[pb.GetModelResponse], None]] = {
    "factor 1e30": _set("preprocessing.scale", 1e30),
    "factor 1e300": _set("preprocessing.scale", 1e300),
    "scale 2^59": _set("plans.0.input_scale", 2.0**59),
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
        client._request(client.plan, [pixels])


def _falsified_pair(small: Small, lie: Callable[[pb.GetModelResponse], None]) -> pb.GetModelResponse:
    """Return a description whose second plan lies, and is named consistently."""
    message = small.message()
    assert [plan.input_layout.images for plan in message.plans] == [1, 2]
    lie(message)
    assert message != small.message()
    _consistent(message)
    return message


_PAIR_LIES: dict[str, Callable[[pb.GetModelResponse], None]] = {
    "other keys": _keys((1, False, [3]), plan=1),
    "more keys": lambda message: message.plans[1].keys.append(pb.KeyGroup(level=0, elements=[3])),
    "other parameters": _set("plans.1.parameters.data_primes", *_primes(_DEGREE, 2)[::-1]),
    "other labels": _set("plans.1.labels", "yes", "no"),
    "other values": _both(
        _set("plans.1.input_layout.positions", *range(47)),
    ),
    "three images": _both(_set("plans.1.input_layout.images", 3), _set("plans.1.output_layout.images", 3)),
    "no images": _both(_set("plans.1.input_layout.images", 0), _set("plans.1.output_layout.images", 0)),
    "one image out": _set("plans.1.output_layout.images", 1),
    "imaginary values": _set("plans.1.input_layout.imaginary", 0),
    "factor 0": _set("plans.1.input_layout.factor", 0.0),
    "a bound of 0": _set("plans.1.logit_error_bound", 0.0),
    "nothing": lambda message: message.plans[1].Clear(),
    "a third plan of nothing": lambda message: message.plans.extend([pb.PublicPlan()]),
    "a million plans of nothing": lambda message: message.plans.extend([pb.PublicPlan()] * 1_000_000),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("lie", _PAIR_LIES.values(), ids=_PAIR_LIES.keys())
def test_a_lie_about_pairs_is_refused(small: Small, tmp_path: Path, lie: Callable[[pb.GetModelResponse], None]) -> None:
    with _told(_falsified_pair(small, lie), tmp_path / "keys") as client:
        with pytest.raises(ReplyError) as refused:
            assert client.plan
        with pytest.raises(ReplyError):
            client.generate_keys()
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000
    assert not (tmp_path / "keys").exists()


def test_a_pair_plan_under_another_name_is_refused(small: Small, tmp_path: Path) -> None:
    for name in ("f" * 64, "", small.plan.plan_id):
        message = small.message()
        message.plans[1].plan_id = name
        with _told(message, tmp_path / "keys") as client, pytest.raises(ReplyError, match="another name"):
            assert client.plan


@pytest.mark.parametrize("named", [0, 1])
def test_a_pair_plan_cannot_stand_in_for_the_first(small: Small, tmp_path: Path, named: int) -> None:
    message = small.message()
    message.plans.reverse()
    message.model.plan_id = message.plans[named].plan_id
    with _told(message, tmp_path / "keys") as client, pytest.raises(ReplyError, match="another plan"):
        assert client.plan


def test_a_name_that_is_the_pair_plans_is_refused(small: Small, tmp_path: Path) -> None:
    message = small.message()
    message.model.plan_id = message.plans[1].plan_id
    with _told(message, tmp_path / "keys") as client, pytest.raises(ReplyError, match="another plan"):
        assert client.plan


def test_without_a_pair_plan_images_go_one_by_one(small: Small, tmp_path: Path) -> None:
    message = small.message()
    del message.plans[1:]
    with _told(message, tmp_path / "keys") as client:
        assert client.pair_plan is None
        assert [len(group) for _, group in client._grouped(["a", "b", "c"])] == [1, 1, 1]


def test_a_thousand_plans_are_not_read(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading one plan takes a moment; whoever sends ever so many must not keep the hospital busy for hours."""
    from client_sdk import _client

    message, read = small.message(), []
    message.plans.extend([message.plans[1]] * 1000)

    def counted(plan: pb.PublicPlan, *arguments: Any) -> PublicPlan:
        read.append(plan)
        return plan_from_message(plan, *arguments)

    monkeypatch.setattr(_client, "plan_from_message", counted)
    with _told(message, tmp_path / "keys") as client:
        assert client.pair_plan is not None
        assert client.pair_plan.plan_id == small.plans[1].public.plan_id
    assert len(read) <= 8


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
    *("input_layout.ciphertexts", "output_layout.ciphertexts", "input_layout.images", "output_layout.images"),
    *("input_layout.factor", "output_layout.factor"),
    *("input_scale", "output_scale", "logit_error_bound", "logit_limit"),
]
_LISTS = [
    *("parameters.data_primes", "input_layout.positions", "output_layout.positions", "input_layout.imaginary"),
    *("output_layout.imaginary", "keys.0.elements"),
]
_WHOLE = st.one_of(st.integers(0, 2 * _SLOTS), st.sampled_from([_DEGREE, 8192, 1 << 30, _UINT32]))
_GROUP = st.tuples(st.integers(0, 3), st.booleans(), st.lists(_WHOLE, max_size=5))
_REAL = st.one_of(st.floats(), st.floats(1e-6, 1e12))


@given(data=st.data())
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
def test_a_plan_with_random_values_is_refused_or_usable(
    small: Small, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    message = small.message()
    number = data.draw(st.integers(0, 1))
    if number == 0:
        del message.plans[1:]
    for path in data.draw(st.lists(st.sampled_from(["keys", *_SCALARS, *_LISTS]), min_size=1, max_size=2, unique=True)):
        if path == "keys":
            _keys(*data.draw(st.lists(_GROUP, max_size=3)), plan=number)(message)
        elif path in _LISTS:
            if not (path.startswith("keys") and not message.plans[number].keys):
                _set(f"plans.{number}.{path}", *data.draw(st.lists(_WHOLE, max_size=50)))(message)
        elif path.endswith(("scale", "bound", "limit", "factor")):
            _set(f"plans.{number}.{path}", data.draw(_REAL))(message)
        else:
            _set(f"plans.{number}.{path}", data.draw(_WHOLE))(message)
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
            request, _ = client._request(plan, [pixels])
            assert len(request.ciphertexts) == plan.input_layout.ciphertexts
            if client.pair_plan is not None:
                pair, _ = client._request(client.pair_plan, [pixels, pixels])
                assert pair.plan_id == client.pair_plan.plan_id
        except HemacryptError:
            return
        assert request.plan_id == plan.plan_id
        assert client._holder(plan).plan is plan
