"""SEAL objects to bytes and back. TenSEAL's binding reads and writes files only, so an anonymous file in memory serves.

Nothing here touches a disk where the system has ``memfd_create``; elsewhere a private temporary file is used, and it is
unlinked before this module returns.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from hemacrypt.errors import FormatError, PlanError
from hemacrypt.plan.plan import Parameters
from hemacrypt.seal import format as sealformat

# tenseal.sealapi carries no type information: its objects are Any by nature.
SealObject = Any
Context = Any


class _Savable(Protocol):
    def save(self, path: str) -> None: ...


Loaded = TypeVar("Loaded")


@contextmanager
def _private_file(content: bytes = b"") -> Iterator[tuple[int, str]]:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("seal", os.MFD_CLOEXEC)
        path, remove = f"/proc/self/fd/{descriptor}", False
    else:
        descriptor, path = tempfile.mkstemp(prefix="seal-")
        remove = True
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield descriptor, path
    finally:
        os.close(descriptor)
        if remove:
            os.unlink(path)  # noqa: PTH108 - a plain path from mkstemp


def dump(thing: _Savable) -> bytes:
    """Serialise a SEAL object (ciphertext, plaintext, key), compressed as SEAL was built to."""
    with _private_file() as (descriptor, path):
        thing.save(path)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            return file.read()


def load(empty: SealObject, context: Context, content: bytes) -> SealObject:
    """Fill an empty SEAL object from bytes that were checked (or written by this very process).

    Parameters
    ----------
    empty:
        A new ``seal.Ciphertext()``, ``seal.GaloisKeys()``, …
    context:
        The context that the object must be valid for.
    content:
        A stream from `hemacrypt.seal.format`, never bytes straight from the wire.

    Raises
    ------
    FormatError
        If SEAL finds a fault that was not found before.
    """
    with _private_file(content) as (_, path):
        try:
            empty.load(context, path)
        except (RuntimeError, ValueError):
            # The text of SEAL's exception is not for strangers; what could be said was said by sealformat.
            raise FormatError(type(empty).__name__, "SEAL itself refuses it; make it again") from None
    return empty


@cache
def seal_minor_version() -> int:
    """Return the minor version of the SEAL inside TenSEAL, as its own header tells."""
    written = dump(seal.Plaintext("1"))
    return int(sealformat.HEADER.unpack(written[: sealformat.HEADER.size])[3])


def make_context(parameters: Parameters, plain_modulus: int = 0) -> Context:
    """Build SEAL's context and make sure that SEAL agrees on every identifier and on 128-bit security.

    Parameters
    ----------
    parameters:
        Degree and modulus chain.
    plain_modulus:
        Plaintext modulus of BFV; 0 for CKKS.

    Raises
    ------
    PlanError
        If SEAL rejects the parameters or names a level otherwise than we do.
    """
    encryption = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV if plain_modulus else seal.SCHEME_TYPE.CKKS)
    encryption.set_poly_modulus_degree(parameters.degree)
    primes = (*parameters.data_primes, parameters.special_prime)
    encryption.set_coeff_modulus([seal.Modulus(prime) for prime in primes])
    if plain_modulus:
        encryption.set_plain_modulus(plain_modulus)
    context = seal.SEALContext(encryption, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise PlanError(f"SEAL rejects the parameters: {context.parameters_error_message()}; plan the network again")
    named = [
        (context.key_parms_id(), None),
        (context.first_parms_id(), parameters.top_level),
        (context.last_parms_id(), lowest_level(parameters, plain_modulus)),
    ]
    for words, level in named:
        if words != parms_id_words(parameters.parms_id(level, plain_modulus)):
            raise PlanError("this SEAL computes other parameter identifiers than SEAL 4; install tenseal >= 0.3.16")
    return context


def lowest_level(parameters: Parameters, plain_modulus: int = 0) -> int:
    """Return the lowest level whose modulus exceeds a plaintext modulus: SEAL's chain ends there.

    Raises
    ------
    PlanError
        If none does.
    """
    modulus = 1
    for level, prime in enumerate(parameters.data_primes):
        modulus *= prime
        if modulus > plain_modulus:
            return level
    raise PlanError(f"plaintext modulus {plain_modulus} exceeds the whole modulus chain; plan the network again")


def truncated_secret(secret: bytes, parameters: Parameters, level: int, plain_modulus: int = 0) -> bytes:
    """Cut a secret key to the primes q_0 … q_level and the special one: it is one small polynomial modulo each prime.

    Parameters
    ----------
    secret:
        As SEAL saves it, for the whole chain; never from the wire.
    parameters:
        The whole chain.
    level:
        Where keys made with the result will be used.
    plain_modulus:
        Plaintext modulus of the BFV that it shall decrypt; 0 for CKKS. The key that comes is one of CKKS.

    Raises
    ------
    FormatError
        If the secret key is damaged or for other parameters.
    """
    count, degree = len(parameters.data_primes) + 1, parameters.degree
    body = sealformat.unwrap(secret, 8 * count * degree + (1 << 16), "secret key")
    if len(body) < 8 * count * degree or not body.startswith(parameters.parms_id()):
        raise FormatError("secret key", "it is for other parameters than the plan's; use the key made for this plan")
    words = np.frombuffer(body[-8 * count * degree :], dtype="<u8").reshape(count, degree)
    rows = words[[*range(level + 1), count - 1]]
    return sealformat.plaintext_stream(rows, parameters.truncated(level), seal_minor_version(), plain_modulus)


def encode_rows(encoder: SealObject, rows: npt.NDArray[np.int64], plain_modulus: int) -> SealObject:
    """Return a BFV plaintext with these slots.

    Parameters
    ----------
    encoder:
        A ``seal.BatchEncoder``.
    rows:
        Integers of both rows, shape (2, slots); reduced here.
    plain_modulus:
        The encoder's plaintext modulus.
    """
    plain = seal.Plaintext()
    encoder.encode((rows % plain_modulus).reshape(-1).tolist(), plain)
    return plain


def coefficients(plain: SealObject) -> npt.NDArray[np.int64]:
    """Return the coefficients of a BFV plaintext, not in NTT form, in order, shape (count,)."""
    count = plain.coeff_count()
    body = sealformat.unwrap(dump(plain), 8 * count + (1 << 10), "plaintext")
    return np.frombuffer(body[-8 * count :], dtype="<i8")


def parms_id_words(identifier: bytes) -> list[int]:
    """Return a parms_id as the four 64-bit words that the binding takes."""
    return [int.from_bytes(identifier[start : start + 8], "little") for start in range(0, 32, 8)]
