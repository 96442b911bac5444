"""Encoded diagonals on disk: encoding thousands of them takes seconds, mapping a file none.

A file is named after what it was made from and after what it holds, both as digests, and the second one is checked
whenever the file is opened: a damaged or planted file is thrown away and made again. Files are mapped, not read, so
all workers of a machine share one copy in memory. They tell as much as the bundle does, so only their owner may read
them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hemacrypt.engines.vector.kernels.ntt import Words

# Changes whenever the layout of the arrays does.
_FORMAT = b"hemacrypt diagonals 1"


class DiagonalCache:
    """Arrays of one directory.

    Parameters
    ----------
    directory:
        Where files are kept; made when it is not there.
    limit:
        Bytes that all files may take; the ones that were not opened for longest go first.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit

    def get(self, parts: Sequence[bytes | memoryview], shape: tuple[int, ...], make: Callable[[Words], None]) -> Words:
        """Return an array, mapped from a file if there is one, else made.

        Parameters
        ----------
        parts:
            Everything that the content depends on.
        shape:
            Shape of the array.
        make:
            Fills the array.

        Returns
        -------
        array of uint32
            Read-only when it is mapped. Where the disk is full or may not be written, it is made in memory.
        """
        name = self._name(parts, shape)
        found = self._open(name, shape)
        if found is not None:
            return found
        array = np.empty(shape, dtype=np.uint32)
        make(array)
        try:
            self._write(name, array)
        except OSError:
            # A cache that cannot be written is no reason not to serve.
            return array
        mapped = self._open(name, shape)
        return array if mapped is None else mapped

    @staticmethod
    def _name(parts: Sequence[bytes | memoryview], shape: tuple[int, ...]) -> str:
        hashed = hashlib.blake2b(_FORMAT, digest_size=20)
        for part in (repr(shape).encode(), *parts):
            hashed.update(len(part).to_bytes(8, "little"))
            hashed.update(part)
        return hashed.hexdigest()

    def _open(self, name: str, shape: tuple[int, ...]) -> Words | None:
        try:
            candidates = sorted(self._directory.glob(f"{name}-*.u32"))
        except OSError:
            return None
        for path in candidates:
            try:
                if path.stat().st_size == 4 * int(np.prod(shape)):
                    mapped: Words = np.memmap(path, dtype=np.uint32, mode="r", shape=shape)
                    if path.stem == f"{name}-{_digest(mapped)}":
                        os.utime(path)
                        return mapped
                path.unlink()
            except OSError:
                continue
        return None

    def _write(self, name: str, array: Words) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room(array.nbytes)
        descriptor, scratch = tempfile.mkstemp(dir=self._directory, prefix=".new-")  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(array.view(np.uint8).data)
            Path(scratch).rename(self._directory / f"{name}-{_digest(array)}.u32")
        except OSError:
            Path(scratch).unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> None:
        if needed > self._limit:
            raise OSError(f"{needed} bytes are more than the cache's limit of {self._limit}")
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._directory.glob("*.u32"))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + needed <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def _digest(array: Words) -> str:
    return hashlib.blake2b(array.view(np.uint8).data, digest_size=20).hexdigest()
