"""Evaluation keys as they travel and as they are stored: SEAL objects, two for each level, in one blob.

A key that is used at level l is made for the primes q_0 … q_l and the special one alone: fewer digits, fewer rows.
SEAL names parameters by their primes, so a key of the shorter chain fits a ciphertext of that level as it is.

Layout: ``HEMACRYPTKEYS2`` and two zero bytes, then for each key group of the plan its relinearisation and its Galois
keys, each a 64-bit little-endian length and that many bytes. What a group does not have carries a length of zero.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from hemacrypt.errors import FormatError
from hemacrypt.plan.batch_plan import PublicBatchPlan
from hemacrypt.plan.bfv_batch_plan import PublicBfvBatchPlan
from hemacrypt.plan.bfv_plan import PublicBfvPlan
from hemacrypt.plan.plan import KeyGroup, PublicPlan
from hemacrypt.seal import format as sealformat

AnyPublicPlan = PublicPlan | PublicBatchPlan | PublicBfvPlan | PublicBfvBatchPlan

_MAGIC: Final = b"HEMACRYPTKEYS2\0\0"
_LENGTH: Final = struct.Struct("<Q")
# A plan has one group for each level, and far fewer levels than this.
_MOST_PARTS: Final = 128


@dataclass(frozen=True)
class LevelKeys:
    """Serialised public keys for one level, which let a service multiply and rotate there, and nothing else.

    Attributes
    ----------
    relinearisation, galois:
        SEAL's own serialisation, seeded or not; empty when the group has none.
    """

    relinearisation: bytes
    galois: bytes

    def check_present(self, group: KeyGroup) -> None:
        """Make sure that there is exactly what a group of the plan needs.

        Raises
        ------
        FormatError
            If there is more or less.
        """
        where = f"at level {group.level}"
        if bool(self.relinearisation) != group.relinearise:
            told = "is missing" if group.relinearise else "is not needed; leave it out"
            raise FormatError("relinearisation key", f"{where} it {told}")
        if bool(self.galois) != bool(group.elements):
            told = "are missing" if group.elements else "are not needed; leave them out"
            raise FormatError("Galois keys", f"{where} they {told}")


@dataclass(frozen=True)
class EvaluationKeys:
    """Keys for every group of a plan, in the plan's order."""

    levels: tuple[LevelKeys, ...]

    def to_bytes(self) -> bytes:
        """Return the blob."""
        parts = [_MAGIC]
        for keys in self.levels:
            for part in (keys.relinearisation, keys.galois):
                parts += [_LENGTH.pack(len(part)), part]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, blob: bytes) -> EvaluationKeys:
        """Take a blob apart.

        Raises
        ------
        FormatError
            If it is none, or its lengths do not add up.
        """
        if not blob.startswith(_MAGIC):
            raise FormatError("evaluation keys", "not a key set of this version; send what `hemacrypt keygen` wrote")
        parts: list[bytes] = []
        position = len(_MAGIC)
        while position < len(blob):
            name = "Galois keys" if len(parts) % 2 else "relinearisation key"
            if len(parts) == _MOST_PARTS:
                raise FormatError("evaluation keys", f"more than {_MOST_PARTS // 2} levels; no plan has so many")
            if len(blob) - position < _LENGTH.size:
                raise FormatError(name, "the key set ends before it; upload it again")
            (length,) = _LENGTH.unpack_from(blob, position)
            position += _LENGTH.size
            if length > len(blob) - position:
                raise FormatError(name, f"{length} bytes promised, {len(blob) - position} came; upload it again")
            parts.append(blob[position : position + length])
            position += length
        if len(parts) % 2:
            raise FormatError("Galois keys", "the key set ends before them; upload it again")
        return cls(tuple(LevelKeys(*parts[index : index + 2]) for index in range(0, len(parts), 2)))

    def grouped(self, plan: AnyPublicPlan) -> list[tuple[KeyGroup, LevelKeys]]:
        """Return the plan's groups with their keys, after making sure that nothing is missing or too many.

        Raises
        ------
        FormatError
            If anything is.
        """
        if len(self.levels) != len(plan.keys):
            raise FormatError(
                "evaluation keys",
                f"for {len(self.levels)} levels; the plan needs {len(plan.keys)}: make new ones",
            )
        for group, keys in zip(plan.keys, self.levels, strict=True):
            keys.check_present(group)
        return list(zip(plan.keys, self.levels, strict=True))


def key_set_id(blob: bytes) -> str:
    """Return the name of a key set: the SHA-256 of its blob, hexadecimal."""
    return hashlib.sha256(blob).hexdigest()


def largest_key_set(plan: AnyPublicPlan) -> int:
    """Return how many bytes a key set for a plan may have: what fully expanded, uncompressed keys would need."""
    total, slack = len(_MAGIC), 1 << 14
    for group in plan.keys:
        parameters = plan.parameters.truncated(group.level)
        total += sealformat.key_set_bytes(parameters, 1, 1) if group.relinearise else 0
        total += sealformat.key_set_bytes(parameters, len(group.elements), parameters.degree) + slack
    return total
