"""The container of evaluation keys, and keys compared with what a plan needs."""

from __future__ import annotations

import hashlib
import struct

import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt import sealio
from hemacrypt.errors import FormatError
from hemacrypt.evaluation_keys import EvaluationKeys, key_set_id, largest_key_set
from tests.hemacrypt.setups import Setup

MAGIC = b"HEMACRYPTKEYS1\0\0"


def blob(*parts: bytes, lengths: tuple[int, ...] | None = None) -> bytes:
    sizes = lengths or tuple(len(part) for part in parts)
    return MAGIC + b"".join(struct.pack("<Q", size) + part for size, part in zip(sizes, parts, strict=True))


@settings(deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=50), st.binary(max_size=50))
def test_round_trip(relinearisation: bytes, galois: bytes) -> None:
    keys = EvaluationKeys(relinearisation, galois)
    assert keys.to_bytes() == blob(relinearisation, galois)
    assert EvaluationKeys.from_bytes(keys.to_bytes()) == keys


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a key set of this version"),
        (MAGIC[:-1], "not a key set of this version"),
        (MAGIC.replace(b"1", b"2") + blob(b"ab", b"cd")[16:], "not a key set of this version"),
        (MAGIC, "relinearisation key: the key set ends before it"),
        (MAGIC + b"\0" * 7, "relinearisation key: the key set ends before it"),
        (blob(b"ab"), "Galois keys: the key set ends before it"),
        (blob(b"ab") + b"\0" * 7, "Galois keys: the key set ends before it"),
        (blob(b"ab", b"cd", lengths=(2, 3)), "Galois keys: 3 bytes promised, 2 came"),
        (blob(b"ab", b"cd", lengths=(2**64 - 1, 2)), "relinearisation key: 18446744073709551615 bytes promised"),
        (blob(b"ab", b"cd", lengths=(2, 2**63)), "Galois keys: 9223372036854775808 bytes promised"),
        (blob(b"ab", b"cd", lengths=(2, 1)), "1 bytes follow their end"),
        (blob(b"ab", b"cd") + b"\0", "1 bytes follow their end"),
        (blob(b"ab", b"cd")[:-1], "Galois keys: 2 bytes promised, 1 came"),
        (blob(b"ab", b"cd", b"ef"), "10 bytes follow their end"),
    ],
)
def test_a_damaged_container_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        EvaluationKeys.from_bytes(content)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_refused_or_mean_exactly_one_key_set(content: bytes, ours: bool) -> None:
    content = MAGIC + content if ours else content
    try:
        keys = EvaluationKeys.from_bytes(content)
    except FormatError:
        return
    assert keys.to_bytes() == content


def test_a_key_set_is_named_by_the_digest_of_its_content(regression: Setup) -> None:
    content = regression.evaluation_keys.to_bytes()
    assert key_set_id(content) == hashlib.sha256(content).hexdigest()
    assert key_set_id(content) != key_set_id(regression.holder.evaluation_keys().to_bytes())


def test_needed_keys_are_checked_and_reloadable(one_square: Setup) -> None:
    checked = one_square.evaluation_keys.checked(one_square.plan.public, one_square.minor)
    context = sealio.make_context(one_square.plan.parameters)
    sealio.load(seal.RelinKeys(), context, checked.relinearisation)
    sealio.load(seal.GaloisKeys(), context, checked.galois)
    assert len(checked.relinearisation) > len(one_square.evaluation_keys.relinearisation)
    assert checked.checked(one_square.plan.public, one_square.minor) == checked


def test_a_plan_without_squares_takes_no_relinearisation_key(regression: Setup, one_square: Setup) -> None:
    assert regression.evaluation_keys.relinearisation == b""
    regression.engine.load_keys(regression.evaluation_keys)
    with pytest.raises(FormatError, match="squares nothing and needs none"):
        regression.engine.load_keys(
            EvaluationKeys(one_square.evaluation_keys.relinearisation, regression.evaluation_keys.galois)
        )


@pytest.mark.parametrize("absent", ["relinearisation", "galois"])
def test_an_absent_key_that_is_needed_is_refused(one_square: Setup, absent: str) -> None:
    parts = {
        "relinearisation": one_square.evaluation_keys.relinearisation,
        "galois": one_square.evaluation_keys.galois,
    }
    with pytest.raises(FormatError, match="0 bytes are no SEAL object"):
        one_square.engine.load_keys(EvaluationKeys(**(parts | {absent: b""})))


def test_exchanged_keys_are_refused(one_square: Setup) -> None:
    keys = one_square.evaluation_keys
    with pytest.raises(FormatError):
        one_square.engine.load_keys(EvaluationKeys(keys.galois, keys.relinearisation))


def test_keys_of_another_plan_are_refused(one_square: Setup, cell: Setup) -> None:
    with pytest.raises(FormatError, match=r"more than the .* bytes expected|other parameters"):
        one_square.engine.load_keys(cell.evaluation_keys)
    with pytest.raises(FormatError, match=r"other parameters|at most"):
        cell.engine.load_keys(one_square.evaluation_keys)


def test_the_largest_key_set_holds_seeded_and_fully_expanded_keys(one_square: Setup, regression: Setup) -> None:
    for setup in (one_square, regression):
        context = sealio.make_context(setup.plan.parameters)
        checked = setup.evaluation_keys.checked(setup.plan.public, setup.minor)
        # Loaded and saved again, every key carries both polynomials.
        relinearisation = b""
        if checked.relinearisation:
            relinearisation = sealio.dump(sealio.load(seal.RelinKeys(), context, checked.relinearisation))
        expanded = EvaluationKeys(relinearisation, sealio.dump(sealio.load(seal.GaloisKeys(), context, checked.galois)))
        assert len(expanded.to_bytes()) > 1.6 * len(setup.evaluation_keys.to_bytes())
        full = expanded.checked(setup.plan.public, setup.minor)
        assert len(full.to_bytes()) <= largest_key_set(setup.plan.public)
        assert largest_key_set(setup.plan.public) < 1.1 * len(full.to_bytes()) + (1 << 17)
        keys = setup.engine.load_keys(expanded)
        image = np_image(setup)
        reply = setup.engine.evaluate(setup.holder.encrypt(image), keys)
        error = abs(setup.holder.decrypt(reply) - setup.network(image)[0]).max()
        assert error <= setup.plan.public.logit_error_bound


def np_image(setup: Setup) -> list[float]:
    return [(7 * i % 5) / 5 for i in range(setup.network.inputs)]
