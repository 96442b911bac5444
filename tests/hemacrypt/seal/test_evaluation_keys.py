"""The container of evaluation keys, and keys compared with what a plan needs."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import cast

import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk._crypto import KeyHolder
from hemacrypt.engines.seal.ckks import SealEngine
from hemacrypt.engines.vector.ckks import VectorEngine
from hemacrypt.errors import FormatError
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys, LevelKeys, key_set_id, largest_key_set
from tests.hemacrypt.setups import Setup

MAGIC = b"HEMACRYPTKEYS2\0\0"


def blob(*parts: bytes, lengths: tuple[int, ...] | None = None) -> bytes:
    sizes = lengths or tuple(len(part) for part in parts)
    return MAGIC + b"".join(struct.pack("<Q", size) + part for size, part in zip(sizes, parts, strict=True))


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=50)), max_size=5))
def test_round_trip(levels: list[tuple[bytes, bytes]]) -> None:
    keys = EvaluationKeys(tuple(LevelKeys(*level) for level in levels))
    assert keys.to_bytes() == blob(*(part for level in levels for part in level))
    assert EvaluationKeys.from_bytes(keys.to_bytes()) == keys


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a key set of this version"),
        (MAGIC[:-1], "not a key set of this version"),
        (MAGIC.replace(b"2", b"1") + blob(b"ab", b"cd")[16:], "not a key set of this version"),
        (MAGIC + b"\0" * 7, "relinearisation key: the key set ends before it"),
        (blob(b"ab"), "Galois keys: the key set ends before them"),
        (blob(b"ab") + b"\0" * 7, "Galois keys: the key set ends before it"),
        (blob(b"ab", b"cd", lengths=(2, 3)), "Galois keys: 3 bytes promised, 2 came"),
        (blob(b"ab", b"cd", lengths=(2**64 - 1, 2)), "relinearisation key: 18446744073709551615 bytes promised"),
        (blob(b"ab", b"cd", lengths=(2, 2**63)), "Galois keys: 9223372036854775808 bytes promised"),
        (blob(b"ab", b"cd", lengths=(2, 1)), "relinearisation key: the key set ends before it"),
        (blob(b"ab", b"cd") + b"\0", "relinearisation key: the key set ends before it"),
        (blob(b"ab", b"cd")[:-1], "Galois keys: 2 bytes promised, 1 came"),
        (blob(b"ab", b"cd", b"ef"), "Galois keys: the key set ends before them"),
        (blob(*[b""] * 129), "more than 64 levels; no plan has so many"),
        (blob(*[b"x"] * 130), "more than 64 levels; no plan has so many"),
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


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(
    st.lists(st.binary(max_size=6), min_size=1, max_size=6),
    st.data(),
    st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1)),
)
def test_a_length_that_was_changed_is_refused_or_cuts_the_same_bytes_elsewhere(
    parts: list[bytes], data: st.DataObject, length: int
) -> None:
    changed = data.draw(st.integers(0, len(parts) - 1))
    lengths = [len(part) for part in parts]
    lengths[changed] = length
    content = blob(*parts, lengths=tuple(lengths))
    try:
        keys = EvaluationKeys.from_bytes(content)
    except FormatError:
        return
    assert keys.to_bytes() == content
    assert sum(len(level.relinearisation) + len(level.galois) for level in keys.levels) < len(content)


def test_a_key_set_is_named_by_the_digest_of_its_content(regression: Setup) -> None:
    content = regression.evaluation_keys.to_bytes()
    assert key_set_id(content) == hashlib.sha256(content).hexdigest()
    assert key_set_id(content) != key_set_id(regression.holder.evaluation_keys().to_bytes())


ENGINES = {"seal": SealEngine, "vector": VectorEngine}


@pytest.fixture(params=list(ENGINES))
def load(request: pytest.FixtureRequest, one_square: Setup) -> Callable[[EvaluationKeys], object]:
    """Return what loads keys for the network with one square, in either engine."""
    return cast(Callable[[EvaluationKeys], object], ENGINES[request.param](one_square.plan).load_keys)


def changed(keys: EvaluationKeys, number: int, **parts: bytes) -> EvaluationKeys:
    """Return a key set with one level's keys replaced."""
    levels = list(keys.levels)
    levels[number] = replace(levels[number], **parts)
    return EvaluationKeys(tuple(levels))


def test_the_network_with_one_square_needs_keys_of_every_kind(one_square: Setup) -> None:
    groups = one_square.plan.public.keys
    assert [(group.level, group.relinearise, bool(group.elements)) for group in groups] == [
        (3, False, True),
        (2, True, False),
        (1, False, True),
    ]
    assert groups[0].elements != groups[2].elements


def test_keys_are_accepted_in_the_plans_order_only(one_square: Setup, load: Callable[[EvaluationKeys], object]) -> None:
    keys = one_square.evaluation_keys
    load(keys)
    load(EvaluationKeys.from_bytes(keys.to_bytes()))
    for order in permutations(keys.levels):
        if order != keys.levels:
            with pytest.raises(FormatError):
                load(EvaluationKeys(order))


def test_needed_keys_are_those_of_the_shorter_chains(one_square: Setup) -> None:
    for group, keys in one_square.evaluation_keys.grouped(one_square.plan.public):
        parameters = one_square.plan.parameters.truncated(group.level)
        context = sealio.make_context(parameters)
        if group.relinearise:
            checked = sealformat.check_relinearisation_key(keys.relinearisation, parameters, one_square.minor)
            sealio.load(seal.RelinKeys(), context, checked)
            assert len(checked) > len(keys.relinearisation)
            assert sealformat.check_relinearisation_key(checked, parameters, one_square.minor) == checked
        if group.elements:
            checked = sealformat.check_galois_keys(keys.galois, parameters, group.elements, one_square.minor)
            loaded = sealio.load(seal.GaloisKeys(), context, checked)
            assert all(loaded.has_key(element) for element in group.elements)
            assert len(checked) > len(keys.galois)
            assert sealformat.check_galois_keys(checked, parameters, group.elements, one_square.minor) == checked


def test_a_plan_without_squares_takes_no_relinearisation_key(regression: Setup, one_square: Setup) -> None:
    (keys,) = regression.evaluation_keys.levels
    assert keys.relinearisation == b""
    regression.engine.load_keys(regression.evaluation_keys)
    unasked = replace(keys, relinearisation=one_square.evaluation_keys.levels[1].relinearisation)
    with pytest.raises(FormatError, match="relinearisation key: at level 1 it is not needed; leave it out"):
        regression.engine.load_keys(EvaluationKeys((unasked,)))


@pytest.mark.parametrize(
    ("number", "absent", "message"),
    [
        (0, "galois", "Galois keys: at level 3 they are missing"),
        (1, "relinearisation", "relinearisation key: at level 2 it is missing"),
        (2, "galois", "Galois keys: at level 1 they are missing"),
    ],
)
def test_an_absent_key_that_is_needed_is_refused(
    one_square: Setup, load: Callable[[EvaluationKeys], object], number: int, absent: str, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        load(changed(one_square.evaluation_keys, number, **{absent: b""}))


@pytest.mark.parametrize(
    ("number", "extra", "message"),
    [
        (0, "relinearisation", "relinearisation key: at level 3 it is not needed; leave it out"),
        (1, "galois", "Galois keys: at level 2 they are not needed; leave them out"),
        (2, "relinearisation", "relinearisation key: at level 1 it is not needed; leave it out"),
    ],
)
def test_a_key_that_is_not_needed_is_refused(
    one_square: Setup, load: Callable[[EvaluationKeys], object], number: int, extra: str, message: str
) -> None:
    keys = one_square.evaluation_keys
    other = keys.levels[1].relinearisation if extra == "relinearisation" else keys.levels[0].galois
    with pytest.raises(FormatError, match=message):
        load(changed(keys, number, **{extra: other}))


def test_more_or_fewer_levels_than_planned_are_refused(
    one_square: Setup, load: Callable[[EvaluationKeys], object]
) -> None:
    levels = one_square.evaluation_keys.levels
    for wrong in ((), levels[:1], levels[:-1], levels[1:], (*levels, levels[-1]), (*levels, LevelKeys(b"", b""))):
        with pytest.raises(FormatError, match=f"evaluation keys: for {len(wrong)} levels; the plan needs 3"):
            load(EvaluationKeys(wrong))


def test_keys_of_another_level_are_refused_although_they_have_the_right_rotations(
    one_square: Setup, load: Callable[[EvaluationKeys], object]
) -> None:
    """A key is made for the primes of its level; of the same secret it would still be another key."""
    public = one_square.plan.public
    relinearising, rotating = public.keys[1], public.keys[2]
    for level in range(4):
        groups = (public.keys[0], relinearising._replace(level=level), rotating._replace(level=level))
        made = [KeyHolder(replace(public, keys=(group,)), one_square.holder.secret_bytes()) for group in groups[1:]]
        (relinearisation,), (galois,) = (holder.evaluation_keys().levels for holder in made)
        for number, wrong in ((1, relinearisation), (2, galois)):
            subject = changed(
                one_square.evaluation_keys, number, relinearisation=wrong.relinearisation, galois=wrong.galois
            )
            if level == public.keys[number].level:
                load(subject)
            else:
                with pytest.raises(FormatError, match=r"other parameters|bytes expected|rows|ends after"):
                    load(subject)


def test_exchanged_keys_are_refused(one_square: Setup, load: Callable[[EvaluationKeys], object]) -> None:
    keys = one_square.evaluation_keys
    with pytest.raises(FormatError):
        load(EvaluationKeys(tuple(LevelKeys(level.galois, level.relinearisation) for level in keys.levels)))
    with pytest.raises(FormatError, match="relinearisation key"):
        load(changed(keys, 1, relinearisation=keys.levels[2].galois))
    with pytest.raises(FormatError, match="Galois keys"):
        load(changed(keys, 2, galois=keys.levels[1].relinearisation))


def test_keys_of_another_plan_are_refused(one_square: Setup, cell: Setup, regression: Setup) -> None:
    with pytest.raises(FormatError, match="for 5 levels; the plan needs 3: make new ones"):
        one_square.engine.load_keys(cell.evaluation_keys)
    with pytest.raises(FormatError, match="for 3 levels; the plan needs 5: make new ones"):
        cell.engine.load_keys(one_square.evaluation_keys)
    (foreign,) = regression.evaluation_keys.levels
    with pytest.raises(FormatError, match=r"other parameters|at most"):
        one_square.engine.load_keys(changed(one_square.evaluation_keys, 0, galois=foreign.galois))


def test_the_largest_key_set_holds_seeded_and_fully_expanded_keys(one_square: Setup, regression: Setup) -> None:
    for setup in (one_square, regression):
        expanded: list[LevelKeys] = []
        uncompressed: list[LevelKeys] = []
        for group, keys in setup.evaluation_keys.grouped(setup.plan.public):
            parameters = setup.plan.parameters.truncated(group.level)
            context = sealio.make_context(parameters)
            # Loaded and saved again, every key carries both polynomials.
            relinearisation = galois = full_relinearisation = full_galois = b""
            if group.relinearise:
                checked = sealformat.check_relinearisation_key(keys.relinearisation, parameters, setup.minor)
                relinearisation = sealio.dump(sealio.load(seal.RelinKeys(), context, checked))
                full_relinearisation = sealformat.check_relinearisation_key(relinearisation, parameters, setup.minor)
            if group.elements:
                checked = sealformat.check_galois_keys(keys.galois, parameters, group.elements, setup.minor)
                galois = sealio.dump(sealio.load(seal.GaloisKeys(), context, checked))
                full_galois = sealformat.check_galois_keys(galois, parameters, group.elements, setup.minor)
            expanded.append(LevelKeys(relinearisation, galois))
            uncompressed.append(LevelKeys(full_relinearisation, full_galois))
        whole = EvaluationKeys(tuple(expanded))
        assert len(whole.to_bytes()) > 1.6 * len(setup.evaluation_keys.to_bytes())
        full = len(EvaluationKeys(tuple(uncompressed)).to_bytes())
        assert full <= largest_key_set(setup.plan.public) < 1.1 * full + (1 << 18)
        loaded = setup.engine.load_keys(whole)
        image = np_image(setup)
        reply = setup.engine.evaluate(setup.holder.encrypt(image), loaded)
        error = abs(setup.holder.decrypt(reply) - setup.network(image)).max()
        assert error <= setup.plan.public.logit_error_bound


def np_image(setup: Setup) -> list[float]:
    return [(7 * i % 5) / 5 for i in range(setup.network.inputs)]
