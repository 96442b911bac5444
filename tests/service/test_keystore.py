"""The key store alone: resuming, limits, a disk that is really full, and what is left after a crash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2, error_details_pb2

from service.errors import Refused
from service.keystore import KeySetInfo, KeyStore

INFO = KeySetInfo("leukaemia", "requirements")
BLOB = bytes(range(256)) * 40
NAME = hashlib.sha256(BLOB).hexdigest()
HOUR = 3600.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def store(root: Path) -> KeyStore:
    return KeyStore(root, limit=1 << 20, idle_seconds=HOUR)


def _put(store: KeyStore, blob: bytes = BLOB) -> str:
    name = hashlib.sha256(blob).hexdigest()
    with store.upload(name, INFO, len(blob), 0) as upload:
        for start in range(0, len(blob), 1 << 12):
            upload.write(blob[start : start + (1 << 12)])
        upload.check_complete()
        upload.commit()
    return name


def _break_off(store: KeyStore, count: int) -> None:
    """Upload only the first bytes, as a client that hangs up."""
    with pytest.raises(ConnectionError), store.upload(NAME, INFO, len(BLOB), 0) as upload:  # noqa: PT012
        upload.write(BLOB[:count])
        raise ConnectionError


def _content(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def _metadata(refused: Refused) -> dict[str, str]:
    info = refused.details[0]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    return dict(info.metadata)


def test_a_key_set_is_absent_then_ready_then_deleted(store: KeyStore, root: Path) -> None:
    assert (store.status(NAME).ready, store.status(NAME).received) == (False, 0)
    assert _put(store) == NAME
    status = store.status(NAME)
    assert (status.ready, status.received, status.model) == (True, len(BLOB), INFO.model)
    path, info = store.path_of(NAME)
    assert path.read_bytes() == BLOB
    assert info == INFO
    assert _content(root) == {NAME, f"{NAME}/keys", f"{NAME}/info.json"}
    assert store.delete(NAME) is True
    assert store.delete(NAME) is False
    assert _content(root) == set()
    with pytest.raises(Refused) as refused:
        store.path_of(NAME)
    assert (refused.value.code, refused.value.reason) == (code_pb2.NOT_FOUND, "KEY_SET_NOT_FOUND")


def test_key_sets_survive_a_restart(store: KeyStore, root: Path) -> None:
    _put(store)
    path, info = KeyStore(root, 1 << 20, HOUR).path_of(NAME)
    assert (path.read_bytes(), info) == (BLOB, INFO)


def test_only_the_owner_can_enter_the_store(store: KeyStore, root: Path) -> None:
    _put(store)
    assert root.stat().st_mode & 0o777 == 0o700
    assert (root / NAME).stat().st_mode & 0o777 == 0o700


def test_an_upload_is_resumed_at_its_offset(store: KeyStore) -> None:
    _break_off(store, 3000)
    status = store.status(NAME)
    assert (status.ready, status.received, status.model) == (False, 3000, INFO.model)
    with store.upload(NAME, INFO, len(BLOB), 3000) as upload:
        upload.write(BLOB[3000:])
        upload.check_complete()
        upload.commit()
    assert store.path_of(NAME)[0].read_bytes() == BLOB


def test_an_upload_that_is_complete_but_unchecked_needs_no_more_bytes(store: KeyStore) -> None:
    _break_off(store, len(BLOB))
    assert store.status(NAME).ready is False
    with store.upload(NAME, INFO, len(BLOB), len(BLOB)) as upload:
        upload.check_complete()
        upload.commit()
    assert store.status(NAME).ready is True


def test_an_upload_from_the_start_throws_away_what_had_arrived(store: KeyStore) -> None:
    _break_off(store, 3000)
    with store.upload(NAME, INFO, len(BLOB), 0) as upload:
        upload.write(BLOB)
        upload.check_complete()
        upload.commit()
    assert store.path_of(NAME)[0].read_bytes() == BLOB


@pytest.mark.parametrize(("arrived", "offset"), [(0, 5), (3000, 2999), (3000, 3001), (3000, 1 << 40)])
def test_another_offset_is_refused_and_the_true_one_told(store: KeyStore, arrived: int, offset: int) -> None:
    if arrived:
        _break_off(store, arrived)
    with pytest.raises(Refused) as refused, store.upload(NAME, INFO, len(BLOB), offset):
        pytest.fail("the upload was opened")
    assert (refused.value.code, refused.value.reason) == (code_pb2.OUT_OF_RANGE, "OFFSET_MISMATCH")
    assert _metadata(refused.value) == {"received_bytes": str(arrived)}
    assert store.status(NAME).received == arrived


def test_a_second_upload_of_the_same_keys_at_the_same_time_is_refused(store: KeyStore) -> None:
    with store.upload(NAME, INFO, len(BLOB), 0) as upload:
        upload.write(BLOB[:10])
        with pytest.raises(Refused) as refused, store.upload(NAME, INFO, len(BLOB), 10):
            pytest.fail("the upload was opened twice")
        assert (refused.value.code, refused.value.reason) == (code_pb2.ABORTED, "UPLOAD_IN_PROGRESS")
        retry = refused.value.details[1]
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToSeconds() > 0
        # The first one is not disturbed, and another key set is nobody's concern.
        other = _put(store, b"other keys")
        upload.write(BLOB[10:])
        upload.check_complete()
        upload.commit()
    assert store.status(NAME).ready
    assert store.status(other).ready


def test_a_refused_upload_does_not_lock_its_name(store: KeyStore) -> None:
    for _ in range(2):
        with pytest.raises(Refused, match="0 bytes have arrived"), store.upload(NAME, INFO, len(BLOB), 7):
            pytest.fail("the upload was opened")
    _put(store)


def test_what_is_missing_at_the_end_is_told_and_what_came_is_kept(store: KeyStore) -> None:
    with pytest.raises(Refused) as refused, store.upload(NAME, INFO, len(BLOB), 0) as upload:  # noqa: PT012
        upload.write(BLOB[:99])
        upload.check_complete()
    assert (refused.value.code, refused.value.reason) == (code_pb2.FAILED_PRECONDITION, "UPLOAD_INCOMPLETE")
    assert store.status(NAME).received == 99


def test_bytes_beyond_the_announced_ones_are_thrown_away_with_the_rest(store: KeyStore, root: Path) -> None:
    with pytest.raises(Refused) as refused, store.upload(NAME, INFO, len(BLOB), 0) as upload:  # noqa: PT012
        upload.write(BLOB)
        upload.write(b"x")
    assert refused.value.reason == "UPLOAD_TOO_LONG"
    assert _content(root) == set()


def test_other_bytes_than_the_name_promises_are_thrown_away(store: KeyStore, root: Path) -> None:
    with pytest.raises(Refused) as refused, store.upload(NAME, INFO, len(BLOB), 0) as upload:  # noqa: PT012
        upload.write(BLOB[:-1] + b"x")
        upload.check_complete()
    assert (refused.value.code, refused.value.reason) == (code_pb2.INVALID_ARGUMENT, "DIGEST_MISMATCH")
    assert _content(root) == set()


def test_the_quota_counts_what_is_stored_what_is_promised_and_what_comes(root: Path) -> None:
    store = KeyStore(root, limit=3 * len(BLOB), idle_seconds=HOUR)
    _put(store)
    with store.upload("a" * 64, INFO, len(BLOB), 0):
        # One stored, one promised: a third does not fit, for the files that describe them take room as well.
        with pytest.raises(Refused) as refused, store.upload("b" * 64, INFO, len(BLOB), 0):
            pytest.fail("the upload was opened")
        assert (refused.value.code, refused.value.reason) == (code_pb2.RESOURCE_EXHAUSTED, "STORE_FULL")
        assert not {name for name in _content(root) if name.startswith("b")}
        with store.upload("c" * 64, INFO, len(BLOB) // 2, 0):
            pass
    store.delete(NAME)
    with store.upload("b" * 64, INFO, len(BLOB), 0):
        pass


def test_a_key_set_larger_than_the_store_is_refused(root: Path) -> None:
    store = KeyStore(root, limit=len(BLOB), idle_seconds=HOUR)
    with pytest.raises(Refused, match="no room"), store.upload(NAME, INFO, len(BLOB) + 1, 0):
        pytest.fail("the upload was opened")
    assert _content(root) == set()


_TRAVERSALS = [
    "",
    ".",
    "..",
    "../" + "0" * 61,
    "/etc/passwd",
    "0" * 63,
    "0" * 65,
    "0" * 64 + "\n",
    "0" * 64 + "/../x",
    "A" * 64,
    "g" * 64,
    "٣" * 64,
    "0" * 63 + "\0",
    f".{'0' * 63}",
    "0" * 59 + ".part",
]


@pytest.mark.parametrize("name", _TRAVERSALS)
def test_names_that_are_no_digest_touch_nothing(store: KeyStore, root: Path, tmp_path: Path, name: str) -> None:
    _put(store)
    before = {str(path) for path in tmp_path.rglob("*")}

    def upload() -> None:
        with store.upload(name, INFO, 3, 0) as opened:
            opened.write(b"abc")

    for action in (store.status, store.path_of, store.delete):
        with pytest.raises(Refused) as refused:
            action(name)
        assert (refused.value.code, refused.value.reason) == (code_pb2.INVALID_ARGUMENT, "KEY_SET_ID_INVALID")
    with pytest.raises(Refused, match="64 hexadecimal"):
        upload()
    assert {str(path) for path in tmp_path.rglob("*")} == before


def _age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_sweep_deletes_stale_uploads_and_keeps_fresh_ones_and_key_sets(store: KeyStore, root: Path) -> None:
    fresh, stale = "f" * 64, "5" * 64
    for name in (fresh, stale):
        with store.upload(name, INFO, 100, 0) as upload:
            upload.write(b"some")
    _put(store)
    _age(root / f"{stale}.part", HOUR + 60)
    _age(root / f"{stale}.part.json", HOUR + 60)
    _age(root / f"{fresh}.part", HOUR - 60)
    _age(root / NAME, 100 * HOUR)
    _age(root / NAME / "keys", 100 * HOUR)
    KeyStore(root, 1 << 20, HOUR)
    assert _content(root) == {f"{fresh}.part", f"{fresh}.part.json", NAME, f"{NAME}/keys", f"{NAME}/info.json"}
    assert store.status(fresh).received == 4
    assert store.status(stale).received == 0


def test_a_crash_before_the_renaming_leaves_nothing_after_a_restart(store: KeyStore, root: Path) -> None:
    _break_off(store, len(BLOB))
    staging = root / f".{NAME}"
    staging.mkdir()
    (staging / "info.json").write_text(json.dumps(INFO.__dict__))
    (root / f"{NAME}.part").rename(staging / "keys")
    restarted = KeyStore(root, 1 << 20, HOUR)
    assert not staging.exists()
    assert restarted.status(NAME).ready is False
    assert _put(restarted) == NAME
    # Whatever else the crash left is gone once the key set is there.
    assert _content(root) == {NAME, f"{NAME}/keys", f"{NAME}/info.json"}


def test_a_note_about_an_upload_that_is_gone_is_swept_once_it_is_stale(store: KeyStore, root: Path) -> None:
    _break_off(store, 10)
    (root / f"{NAME}.part").unlink()
    _age(root / f"{NAME}.part.json", 100 * HOUR)
    KeyStore(root, 1 << 20, HOUR)
    assert _content(root) == set()


@pytest.mark.parametrize("note", [None, b"", b"{", b"[]", b"3", b'{"model"', b"\xff\xfe", b"{}"])
def test_an_upload_without_a_readable_note_is_still_resumed(store: KeyStore, root: Path, note: bytes | None) -> None:
    _break_off(store, 10)
    path = root / f"{NAME}.part.json"
    path.unlink()
    if note is not None:
        path.write_bytes(note)
    status = store.status(NAME)
    assert (status.ready, status.received, status.model) == (False, 10, "")
    with store.upload(NAME, INFO, len(BLOB), 10) as upload:
        upload.write(BLOB[10:])
        upload.check_complete()
        upload.commit()
    assert store.status(NAME).ready


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"7", b"null", b'{"model": "x"}', b"\xff\xfe\0"])
def test_a_key_set_with_damaged_information_is_not_ready_and_can_be_uploaded_again(
    store: KeyStore, root: Path, damage: bytes
) -> None:
    _put(store)
    (root / NAME / "info.json").write_bytes(damage)
    assert store.status(NAME).ready is False
    with pytest.raises(Refused, match="not registered"):
        store.path_of(NAME)
    _put(store)
    assert store.status(NAME).ready
    assert store.path_of(NAME)[1] == INFO


def test_a_key_set_whose_keys_are_gone_is_not_ready_and_can_be_uploaded_again(store: KeyStore, root: Path) -> None:
    _put(store)
    (root / NAME / "keys").unlink()
    assert store.status(NAME).ready is False
    _put(store)
    assert store.status(NAME).ready


@pytest.mark.parametrize("failing", [1, 2])
def test_a_key_set_appears_whole_or_not_at_all(store: KeyStore, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    rename, calls = Path.rename, []

    def fails(self: Path, target: Any) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise OSError(errno.EIO, "the disk gave up")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="gave up"):
            _put(store)
    assert len(calls) == failing
    assert store.status(NAME).ready is False
    _put(store)
    assert store.path_of(NAME)[0].read_bytes() == BLOB


def test_keys_are_not_deleted_under_an_upload(store: KeyStore, root: Path) -> None:
    """Half an upload that loses its file could neither end well nor be told from one that did."""
    with store.upload(NAME, INFO, len(BLOB), 0) as upload:
        upload.write(BLOB[:100])
        with pytest.raises(Refused) as refused:
            store.delete(NAME)
        assert (refused.value.code, refused.value.reason) == (code_pb2.ABORTED, "UPLOAD_IN_PROGRESS")
        upload.write(BLOB[100:])
        upload.check_complete()
        with pytest.raises(Refused, match="right now"):
            store.delete(NAME)
        upload.commit()
    assert store.path_of(NAME)[0].read_bytes() == BLOB
    assert store.delete(NAME) is True
    assert _content(root) == set()


def test_a_sweep_spares_an_upload_that_goes_on(store: KeyStore, root: Path) -> None:
    with store.upload(NAME, INFO, len(BLOB), 0) as upload:
        upload.write(BLOB)
        _age(root / f"{NAME}.part", 100 * HOUR)
        store.sweep()
        upload.check_complete()
        upload.commit()
    assert store.status(NAME).ready


def test_a_sweep_touches_nothing_that_is_not_the_stores(store: KeyStore, root: Path) -> None:
    """Somebody may have named a directory that holds other things."""
    foreign = (".bashrc", ".ssh", "report.part", "x" * 64 + ".part", "notes.json")
    for name in foreign:
        (root / name).write_text("dear to somebody")
        _age(root / name, 100 * HOUR)
    KeyStore(root, 1 << 20, HOUR)
    assert _content(root) == set(foreign)


def test_only_damaged_keys_are_deleted_for_damage(store: KeyStore, root: Path) -> None:
    _put(store)
    store.delete_if_damaged(NAME)
    assert store.status(NAME).ready
    (root / NAME / "keys").write_bytes(BLOB[:-1])
    store.delete_if_damaged(NAME)
    assert store.status(NAME).ready is False
    assert _content(root) == set()
    store.delete_if_damaged(NAME)


def test_an_offset_beyond_the_announced_end_is_refused(store: KeyStore) -> None:
    _break_off(store, 3000)
    with pytest.raises(Refused) as refused, store.upload(NAME, INFO, 2000, 3000):
        pytest.fail("the upload was opened")
    assert refused.value.reason == "OFFSET_MISMATCH"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_told_and_leaves_nothing_behind(small_disk: Path) -> None:
    root = small_disk / "store"
    store = KeyStore(root, limit=1 << 30, idle_seconds=HOUR)
    kept = _put(store)
    large = b"k" * (4 << 20)
    with pytest.raises(Refused) as refused:
        _put(store, large)
    assert (refused.value.code, refused.value.reason) == (code_pb2.RESOURCE_EXHAUSTED, "STORE_FULL")
    assert _content(root) == {kept, f"{kept}/keys", f"{kept}/info.json"}
    assert store.path_of(kept)[0].read_bytes() == BLOB
    # The room is there again.
    assert store.status(_put(store, large[: 1 << 20])).ready


def _fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - the loop has no other end


def test_a_disk_that_fills_before_the_last_step_leaves_nothing_behind(small_disk: Path) -> None:
    root = small_disk / "store"
    store = KeyStore(root, limit=1 << 30, idle_seconds=HOUR)
    with pytest.raises(Refused) as refused, store.upload(NAME, INFO, len(BLOB), 0) as upload:  # noqa: PT012
        upload.write(BLOB)
        upload.check_complete()
        _fill(small_disk / "filler")
        upload.commit()
    assert refused.value.reason == "STORE_FULL"
    assert _content(root) == set()
    (small_disk / "filler").unlink()
    assert store.status(_put(store)).ready
