"""Evaluation keys on disk: content-addressed, resumable to upload, there again after a restart.

Layout of the store::

    <key set id>/keys       the blob, exactly as uploaded; its SHA-256 is the id
    <key set id>/info.json  what it was checked for
    <key set id>.part       an upload that is not complete, with the model's name in <key set id>.part.json
    <random>.batch          the ciphertexts of a batch until it is evaluated: for each its length (64 bits,
                            little-endian), then its bytes

A key set appears whole (a directory is renamed into place) or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from google.rpc import code_pb2

from service import errors

_ID = re.compile(r"[0-9a-f]{64}")
_STAGING = re.compile(r"\.[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}\.part")
_NOTE = re.compile(r"[0-9a-f]{64}\.part\.json")
_BATCH = re.compile(r"[0-9a-f]{32}\.batch")
_LENGTH = struct.Struct("<Q")
# A batch that grows beyond what was expected asks for room in steps of this many bytes.
_STEP = 16 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class KeySetInfo:
    """What a stored key set is for: the model it came with, and the plans that it serves (`requirements_id`)."""

    model: str
    requirements_id: str


@dataclass(frozen=True)
class KeySetStatus:
    """How much of a key set is here."""

    ready: bool
    received: int
    model: str


class KeyStore:
    """Stores key sets below one directory.

    Parameters
    ----------
    root:
        The directory; made if it does not exist, readable by its owner alone.
    limit:
        Most bytes that everything in it may take.
    idle_seconds:
        An upload without progress for so long is deleted.
    """

    def __init__(self, root: Path, limit: int, idle_seconds: float) -> None:
        self.root = root
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._uploading: dict[str, int] = {}
        self._spooled: dict[str, int] = {}
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.sweep()

    def sweep(self) -> None:
        """Delete uploads that nobody has continued for too long, and what a crash left half-made.

        Only names that the store itself gives are touched: the directory may be one that holds other things too.
        """
        with self._lock:
            for path in self.root.iterdir():
                if _STAGING.fullmatch(path.name) or (_BATCH.fullmatch(path.name) and path.name not in self._spooled):
                    self._remove(path)
                elif _PART.fullmatch(path.name) and path.name[:64] not in self._uploading and self._is_idle(path):
                    self._remove(path)
                    self._remove(self._part_info(path))
                elif _NOTE.fullmatch(path.name) and not path.with_suffix("").exists() and self._is_idle(path):
                    self._remove(path)

    def _is_idle(self, path: Path) -> bool:
        try:
            return time.time() - path.stat().st_mtime > self._idle_seconds
        except FileNotFoundError:
            return False

    def status(self, key_set_id: str) -> KeySetStatus:
        """Tell how much of a key set is here.

        Raises
        ------
        Refused
            INVALID_ARGUMENT if the id is none.
        """
        directory, part = self._paths(key_set_id)
        with suppress(FileNotFoundError):
            if info := self._info(directory):
                return KeySetStatus(True, (directory / "keys").stat().st_size, info.model)
        with suppress(FileNotFoundError):
            return KeySetStatus(False, part.stat().st_size, self._part_model(part))
        return KeySetStatus(False, 0, "")

    def path_of(self, key_set_id: str) -> tuple[Path, KeySetInfo]:
        """Return the blob of a key set that is ready, and what it is for.

        Raises
        ------
        Refused
            NOT_FOUND if it is not here.
        """
        directory, _ = self._paths(key_set_id)
        info = self._info(directory)
        if info is None:
            raise errors.missing(
                "KEY_SET_NOT_FOUND",
                "hemacrypt.v1.KeySet",
                key_set_id,
                f"key set {key_set_id[:12]}… is not registered here; register it and try again",
            )
        return directory / "keys", info

    def delete(self, key_set_id: str) -> bool:
        """Delete a key set, whole or partial; return whether there was any.

        Raises
        ------
        Refused
            ABORTED while it is being uploaded.
        """
        directory, part = self._paths(key_set_id)
        with self._lock:
            if key_set_id in self._uploading:
                raise _in_progress()
            existed = directory.exists() or part.exists()
            for path in (directory, part, self._part_info(part)):
                self._remove(path)
        return existed

    def delete_if_damaged(self, key_set_id: str) -> None:
        """Delete a key set whose bytes no longer hash to its name."""
        path = self._paths(key_set_id)[0] / "keys"
        if path.is_file() and _sha256(path) != key_set_id:
            self.delete(key_set_id)

    @contextmanager
    def upload(self, key_set_id: str, info: KeySetInfo, total: int, offset: int) -> Iterator[Upload]:
        """Open an upload at an offset; only one per key set at a time.

        Raises
        ------
        Refused
            ABORTED if the same key set is being uploaded now, OUT_OF_RANGE if the offset is not what has arrived,
            RESOURCE_EXHAUSTED if the store is full.
        """
        _, part = self._paths(key_set_id)
        self.sweep()
        with self._lock:
            if key_set_id in self._uploading:
                raise _in_progress()
            received = part.stat().st_size if part.is_file() else 0
            if offset and (offset != received or offset > total):
                raise errors.Refused(
                    code_pb2.OUT_OF_RANGE,
                    "OFFSET_MISMATCH",
                    f"the upload continues at {offset} but {received} bytes have arrived; continue there",
                    received_bytes=str(received),
                )
            if not self._has_room(total - offset):
                raise errors.Refused(
                    code_pb2.RESOURCE_EXHAUSTED,
                    "STORE_FULL",
                    "the service has no room for this key set; delete one that is not needed or ask its operator",
                )
            self._uploading[key_set_id] = total - offset
        try:
            with self._disk_errors(part, self._part_info(part)):
                self._part_info(part).write_text(json.dumps({"model": info.model}), encoding="utf-8")
                with part.open("r+b" if offset else "wb") as file:
                    file.seek(offset)
                    yield Upload(self, key_set_id, info, total, offset, file.fileno(), part)
        finally:
            with self._lock:
                del self._uploading[key_set_id]

    @contextmanager
    def spool(self, expected: int) -> Iterator[Spool]:
        """Open a file for the ciphertexts of a batch; it is gone at the end, whatever happens.

        Parameters
        ----------
        expected:
            Bytes that will come, about; room for them is kept.

        Raises
        ------
        Refused
            RESOURCE_EXHAUSTED if the store is full.
        """
        name = f"{secrets.token_hex(16)}.batch"
        path = self.root / name
        with self._lock:
            if not self._has_room(expected):
                raise _no_room_for_a_batch()
            self._spooled[name] = expected
        try:
            with self._disk_errors(path):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb", buffering=0):
                    yield Spool(self, path, descriptor)
        finally:
            with self._lock:
                del self._spooled[name]
                self._remove(path)

    def take(self, name: str, size: int) -> None:
        """Count bytes that are about to be written to a spool.

        Raises
        ------
        Refused
            RESOURCE_EXHAUSTED if the store is full.
        """
        with self._lock:
            left = self._spooled[name] - size
            if left < 0:
                self._spooled[name], more = 0, max(_STEP, -left)
                if not self._has_room(more):
                    raise _no_room_for_a_batch()
                left += more
            self._spooled[name] = left

    def _has_room(self, size: int) -> bool:
        promised = sum(self._uploading.values()) + sum(self._spooled.values())
        return self._used() + promised + size <= self._limit

    @contextmanager
    def _disk_errors(self, *partial: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            for path in partial:
                self._remove(path)
            raise errors.Refused(
                code_pb2.RESOURCE_EXHAUSTED,
                "STORE_FULL",
                "the service's disk is full; nothing was stored. Try again later or ask its operator",
            ) from None

    def commit(self, key_set_id: str, info: KeySetInfo) -> None:
        """Turn a checked upload into a key set."""
        directory, part = self._paths(key_set_id)
        staging = self.root / f".{key_set_id}"
        with self._disk_errors(part, self._part_info(part), staging):
            self._remove(staging)
            staging.mkdir(mode=0o700)
            (staging / "info.json").write_text(json.dumps(info.__dict__), encoding="utf-8")
            part.rename(staging / "keys")
            _sync(staging)
            self._remove(directory)
            staging.rename(directory)
            _sync(self.root)
        self._remove(self._part_info(part))

    def discard(self, key_set_id: str) -> None:
        """Delete an upload that turned out to be worthless."""
        _, part = self._paths(key_set_id)
        self._remove(part)
        self._remove(self._part_info(part))

    def _paths(self, key_set_id: str) -> tuple[Path, Path]:
        # The id becomes a file name, so nothing but 64 hexadecimal digits may pass.
        if not _ID.fullmatch(key_set_id):
            raise errors.invalid(
                "KEY_SET_ID_INVALID", "key_set_id", "a key set's id is the SHA-256 of its bytes, 64 hexadecimal digits"
            )
        return self.root / key_set_id, self.root / f"{key_set_id}.part"

    @staticmethod
    def _part_info(part: Path) -> Path:
        return part.with_name(part.name + ".json")

    def _part_model(self, part: Path) -> str:
        try:
            return str(json.loads(self._part_info(part).read_text(encoding="utf-8"))["model"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    @staticmethod
    def _info(directory: Path) -> KeySetInfo | None:
        try:
            content = json.loads((directory / "info.json").read_text(encoding="utf-8"))
            return KeySetInfo(model=str(content["model"]), requirements_id=str(content["requirements_id"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _used(self) -> int:
        total = 0
        for path in self.root.rglob("*"):
            # A batch may be dropped at any moment.
            with suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Upload:
    """An upload in progress."""

    def __init__(
        self, store: KeyStore, key_set_id: str, info: KeySetInfo, total: int, offset: int, descriptor: int, part: Path
    ) -> None:
        self._store, self._key_set_id, self._info = store, key_set_id, info
        self._total, self._received, self._descriptor = total, offset, descriptor
        self.path = part

    def write(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises
        ------
        Refused
            INVALID_ARGUMENT if more comes than was announced.
        """
        if self._received + len(chunk) > self._total:
            self._store.discard(self._key_set_id)
            raise errors.invalid(
                "UPLOAD_TOO_LONG", "chunk", f"more than the announced {self._total} bytes came; start again"
            )
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._received += len(chunk)

    def check_complete(self) -> None:
        """Make sure that everything announced has arrived and hashes to its name.

        Raises
        ------
        Refused
            FAILED_PRECONDITION if bytes are missing (what came is kept), INVALID_ARGUMENT if the digest differs.
        """
        if self._received < self._total:
            raise errors.outdated(
                "UPLOAD_INCOMPLETE",
                self._key_set_id,
                f"{self._received} of {self._total} bytes have arrived and are kept; continue there",
            )
        os.fsync(self._descriptor)
        if _sha256(self.path) != self._key_set_id:
            self._store.discard(self._key_set_id)
            raise errors.invalid(
                "DIGEST_MISMATCH", "key_set_id", "the bytes that came do not hash to the key set's id; upload again"
            )

    def commit(self) -> None:
        """Make the key set usable."""
        self._store.commit(self._key_set_id, self._info)


class Spool:
    """The ciphertexts of a batch while they arrive, and until they are evaluated."""

    def __init__(self, store: KeyStore, path: Path, descriptor: int) -> None:
        self._store, self._descriptor = store, descriptor
        self.path = path

    def write(self, ciphertext: bytes) -> None:
        """Append a ciphertext.

        Raises
        ------
        Refused
            RESOURCE_EXHAUSTED if the store is full.
        """
        framed = _LENGTH.pack(len(ciphertext)) + ciphertext
        self._store.take(self.path.name, len(framed))
        view = memoryview(framed)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def drop(self) -> None:
        """Delete the file now; whoever reads it notices and stops."""
        self.path.unlink(missing_ok=True)


def spooled(path: Path) -> Iterator[bytes]:
    """Read the ciphertexts of a spool one after the other.

    Raises
    ------
    SpoolDroppedError
        When the spool is deleted meanwhile: nobody waits for the answer any more.
    """
    try:
        with path.open("rb") as file:
            while length := file.read(_LENGTH.size):
                if not os.fstat(file.fileno()).st_nlink:
                    raise SpoolDroppedError
                yield file.read(_LENGTH.unpack(length)[0])
    except FileNotFoundError:
        raise SpoolDroppedError from None


class SpoolDroppedError(Exception):
    """The spool was deleted while it was read."""


def _no_room_for_a_batch() -> errors.Refused:
    return errors.Refused(
        code_pb2.RESOURCE_EXHAUSTED,
        "STORE_FULL",
        "the service has no room to keep this batch until it is evaluated; nothing was stored. Try again later, send "
        "the images one by one, or ask its operator",
    )


def _in_progress() -> errors.Refused:
    return errors.busy(code_pb2.ABORTED, "UPLOAD_IN_PROGRESS", "the same key set is being uploaded right now", 1.0)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
