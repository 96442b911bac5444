"""The key directory: who may read it, what it refuses, and what is left when something breaks off."""

from __future__ import annotations

import base64
import json
import os
import traceback
from pathlib import Path

import pytest

from client_sdk import Client, KeysMissingError
from client_sdk import _keys as keys_module
from client_sdk._crypto import KeyHolder
from client_sdk._keys import KeyDirectory
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.plan.plan import PublicPlan
from hemacrypt.planner import plan_network
from hemacrypt.seal.evaluation_keys import EvaluationKeys, key_set_id
from tests.client_sdk.conftest import Small


@pytest.fixture
def directory(tmp_path: Path) -> KeyDirectory:
    return KeyDirectory(tmp_path / "deep" / "keys")


@pytest.fixture
def made(directory: KeyDirectory, small: Small) -> KeyDirectory:
    directory.create(small.plan)
    return directory


@pytest.fixture(scope="module")
def other() -> PublicPlan:
    """A plan with other rotations and degree."""
    import numpy as np

    random = np.random.default_rng(9)
    layers = (Dense(random.normal(size=(40, 48)) / 7, np.zeros(40)), Dense(random.normal(size=(2, 40)), np.zeros(2)))
    return plan_network(CollapsedNetwork((3, 4, 4), layers)).public


def test_only_the_owner_can_read_keys(made: KeyDirectory) -> None:
    assert made.path.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.path.iterdir()}
    assert modes == {"secret.key": 0o600, "evaluation.keys": 0o600, "keys.json": 0o600}


def test_an_open_umask_opens_nothing(directory: KeyDirectory, small: Small) -> None:
    before = os.umask(0)
    try:
        directory.create(small.plan)
    finally:
        os.umask(before)
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in directory.path.iterdir())


def test_keys_are_read_as_they_were_written(made: KeyDirectory, small: Small) -> None:
    assert made.exists
    info = made.info()
    blob = made.evaluation_blob()
    assert (info.model, info.requirements_id) == ("small", small.plan.requirements_id)
    assert info.key_set_id == key_set_id(blob)
    assert [bool(keys.galois) for keys in EvaluationKeys.from_bytes(blob).levels] == [
        bool(group.elements) for group in small.plan.keys
    ]
    assert made.open(small.plan).secret_bytes()[:16] == (made.path / "secret.key").read_bytes()[:16]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620, 0o610])
def test_a_secret_key_that_others_may_touch_is_refused(made: KeyDirectory, small: Small, mode: int) -> None:
    (made.path / "secret.key").chmod(mode)
    with pytest.raises(KeysMissingError, match=f"chmod 600 {made.path}"):
        made.open(small.plan)
    (made.path / "secret.key").chmod(0o600)
    made.open(small.plan)


def test_keys_are_not_overwritten_unless_told(made: KeyDirectory, small: Small) -> None:
    before = {path.name: path.read_bytes() for path in made.path.iterdir()}
    with pytest.raises(KeysMissingError, match="--replace"):
        made.create(small.plan)
    assert {path.name: path.read_bytes() for path in made.path.iterdir()} == before
    made.create(small.plan, replace=True)
    after = {path.name: path.read_bytes() for path in made.path.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)
    made.open(small.plan)


def test_a_lone_secret_key_is_not_overwritten_either(directory: KeyDirectory, small: Small) -> None:
    directory.path.mkdir(parents=True)
    (directory.path / "secret.key").write_bytes(b"somebody's only copy")
    with pytest.raises(KeysMissingError):
        directory.create(small.plan)
    assert (directory.path / "secret.key").read_bytes() == b"somebody's only copy"


def test_no_bit_of_the_secret_key_flips_unnoticed(made: KeyDirectory, small: Small) -> None:
    """A key that is not the one that encrypted decrypts to noise, and noise has a label too."""
    path = made.path / "secret.key"
    content = path.read_bytes()
    unnoticed = []
    for position in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[position] ^= 0x04
        path.write_bytes(damaged)
        try:
            made.open(small.plan)
        except KeysMissingError:
            continue
        unnoticed.append(position)
    assert unnoticed == []


@pytest.mark.parametrize("content", [b"", b"\x5e", b"not a key at all", bytes(60_000)])
def test_a_secret_key_that_is_none_is_refused(made: KeyDirectory, small: Small, content: bytes) -> None:
    (made.path / "secret.key").write_bytes(content)
    with pytest.raises(KeysMissingError, match="damaged"):
        made.open(small.plan)


def test_a_secret_key_that_was_cut_off_is_refused(made: KeyDirectory, small: Small) -> None:
    path = made.path / "secret.key"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(KeysMissingError, match="damaged"):
        made.open(small.plan)


def test_a_secret_key_of_somebody_else_is_refused(made: KeyDirectory, small: Small) -> None:
    """It is a fine key, but not the one that the evaluation keys were made with."""
    (made.path / "secret.key").write_bytes(KeyHolder(small.plan).secret_bytes())
    with pytest.raises(KeysMissingError):
        made.open(small.plan)


def test_a_secret_key_of_other_parameters_is_refused(made: KeyDirectory, small: Small, other: PublicPlan) -> None:
    (made.path / "secret.key").write_bytes(KeyHolder(other).secret_bytes())
    with pytest.raises(KeysMissingError, match="damaged"):
        made.open(small.plan)


def test_a_missing_secret_key_is_told(made: KeyDirectory, small: Small) -> None:
    (made.path / "secret.key").unlink()
    with pytest.raises(KeysMissingError, match=r"secret\.key"):
        made.open(small.plan)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_evaluation_keys_that_changed_on_disk_are_not_sent(made: KeyDirectory, damage: str) -> None:
    path = made.path / "evaluation.keys"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage])
    with pytest.raises(KeysMissingError, match="missing or changed"):
        made.evaluation_blob()


def test_keys_for_other_parameters_are_refused(made: KeyDirectory, other: PublicPlan) -> None:
    with pytest.raises(KeysMissingError, match=r"other parameters \(model small\)"):
        made.open(other)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"model": "small"}', b"\xff\xfe", b'{"x": 1}'])
def test_keys_without_a_readable_note_are_unusable(made: KeyDirectory, small: Small, content: bytes) -> None:
    (made.path / "keys.json").write_bytes(content)
    for use in (made.info, made.evaluation_blob, lambda: made.open(small.plan)):
        with pytest.raises(KeysMissingError):
            use()


def test_a_directory_that_is_none_holds_no_keys(directory: KeyDirectory, small: Small) -> None:
    assert not directory.exists
    with pytest.raises(KeysMissingError, match="hemacrypt keygen"):
        directory.open(small.plan)


@pytest.mark.parametrize("breaks_at", ["secret.key", "evaluation.keys", "keys.json"])
@pytest.mark.parametrize("there_were_keys", [False, True])
def test_making_keys_that_breaks_off_leaves_no_mixture(
    directory: KeyDirectory, small: Small, monkeypatch: pytest.MonkeyPatch, breaks_at: str, there_were_keys: bool
) -> None:
    if there_were_keys:
        directory.create(small.plan)
    write = keys_module._write_private

    def breaks_off(path: Path, content: bytes) -> None:
        if path.name == breaks_at:
            raise OSError("the machine went down")
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(keys_module, "_write_private", breaks_off)
        with pytest.raises(OSError, match="went down"):
            directory.create(small.plan, replace=True)
    assert not (directory.path / "keys.json").exists()
    for use in (directory.info, directory.evaluation_blob, lambda: directory.open(small.plan)):
        with pytest.raises(KeysMissingError):
            use()
    directory.create(small.plan, replace=True)
    directory.open(small.plan)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "secret.key"
    keys_module._write_private(target, b"old")

    def fails(descriptor: int) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="no space"):
            keys_module._write_private(target, b"new")
    assert target.read_bytes() == b"old"
    # What the failure left does not stand in the way, nor is it followed if somebody put a link there.
    (tmp_path / ".secret.key.new").unlink(missing_ok=True)
    (tmp_path / ".secret.key.new").symlink_to(tmp_path / "elsewhere")
    keys_module._write_private(target, b"new")
    assert target.read_bytes() == b"new"
    assert not (tmp_path / "elsewhere").exists()


def _forms(secret: bytes) -> set[str]:
    """Return how pieces of the secret key could look in a text."""
    blocks = [secret[start : start + 12] for start in range(40, len(secret) - 12, len(secret) // 50)]
    forms = {repr(block)[2:-1] for block in blocks} | {block.hex() for block in blocks}
    return forms | {base64.b64encode(block).decode() for block in blocks}


def test_no_text_shows_the_secret_key(made: KeyDirectory, small: Small, other: PublicPlan) -> None:
    holder = made.open(small.plan)
    secret = (made.path / "secret.key").read_bytes()
    with Client("127.0.0.1:1", "small", key_directory=made.path) as client:
        client._opened = holder
        texts = [f(thing) for f in (repr, str) for thing in (client, holder, made, made.info())]
        client.close()
        assert client._opened is None
    path = made.path / "secret.key"
    for content in (secret[:-1], secret[:40] + b"x" + secret[41:], KeyHolder(other).secret_bytes()):
        path.write_bytes(content)
        try:
            made.open(small.plan)
        except KeysMissingError as error:
            texts += ["".join(traceback.format_exception(error)), repr(error)]
    texts.append(json.dumps(json.loads((made.path / "keys.json").read_text())))
    assert len(texts) >= 9
    assert not [form for form in _forms(secret) for text in texts if form in text]
    # The search is able to find it.
    assert [form for form in _forms(secret) if form in f"{secret!r}"]
    assert [form for form in _forms(secret) if form in secret.hex()]
