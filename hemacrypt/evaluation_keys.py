"""Evaluation keys as they travel and as they are stored: two SEAL objects in one content-addressed blob.

Layout: ``HEMACRYPTKEYS1`` and two zero bytes, then for relinearisation and Galois keys each a 64-bit little-endian
length and that many bytes. A network that needs one of them not carries a length of zero.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from hemacrypt import sealformat
from hemacrypt.errors import FormatError
from hemacrypt.plan import PublicPlan

_MAGIC: Final = b"HEMACRYPTKEYS1\0\0"
_LENGTH: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class EvaluationKeys:
    """Serialised public keys that let a service multiply and rotate, and nothing else.

    Attributes
    ----------
    relinearisation, galois:
        SEAL's own serialisation, seeded or not; empty when the plan needs none.
    """

    relinearisation: bytes
    galois: bytes

    def to_bytes(self) -> bytes:
        """Return the blob."""
        parts = [_MAGIC]
        for part in (self.relinearisation, self.galois):
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
        for name in ("relinearisation key", "Galois keys"):
            if len(blob) - position < _LENGTH.size:
                raise FormatError(name, "the key set ends before it; upload it again")
            (length,) = _LENGTH.unpack_from(blob, position)
            position += _LENGTH.size
            if length > len(blob) - position:
                raise FormatError(name, f"{length} bytes promised, {len(blob) - position} came; upload it again")
            parts.append(blob[position : position + length])
            position += length
        if position != len(blob):
            raise FormatError("evaluation keys", f"{len(blob) - position} bytes follow their end; upload them again")
        return cls(*parts)

    def check_absent(self, plan: PublicPlan) -> None:
        """Make sure that there is nothing that a plan does not need.

        Raises
        ------
        FormatError
            If there is.
        """
        if self.relinearisation and not plan.needs_relinearisation:
            raise FormatError("relinearisation key", "this plan squares nothing and needs none; leave it out")
        if self.galois and not plan.rotation_steps:
            raise FormatError("Galois keys", "this plan rotates nothing and needs none; leave them out")

    def checked(self, plan: PublicPlan, minor: int) -> EvaluationKeys:
        """Return the same keys as uncompressed streams for SEAL, every byte compared with what the plan needs.

        Parameters
        ----------
        plan:
            What the keys must be for.
        minor:
            Minor version of the SEAL that will load them.

        Raises
        ------
        FormatError
            If they are for other parameters or rotations, or damaged.
        """
        self.check_absent(plan)
        relinearisation = galois = b""
        if plan.needs_relinearisation:
            relinearisation = sealformat.check_relinearisation_key(self.relinearisation, plan.parameters, minor)
        if plan.rotation_steps:
            galois = sealformat.check_galois_keys(self.galois, plan.parameters, plan.rotation_steps, minor)
        return EvaluationKeys(relinearisation, galois)


def key_set_id(blob: bytes) -> str:
    """Return the name of a key set: the SHA-256 of its blob, hexadecimal."""
    return hashlib.sha256(blob).hexdigest()


def largest_key_set(plan: PublicPlan) -> int:
    """Return how many bytes a key set for a plan may have: what fully expanded, uncompressed keys would need."""
    parameters, slack = plan.parameters, 1 << 16
    relinearisation = sealformat.key_set_bytes(parameters, 1, 1) if plan.needs_relinearisation else 0
    galois = sealformat.key_set_bytes(parameters, len(plan.rotation_steps), parameters.degree)
    return len(_MAGIC) + relinearisation + galois + slack
