"""SEAL's serialised objects, read by us: every byte is checked before SEAL — or a kernel — sees any of them.

SEAL's own loader is native code and must be assumed to be unsafe on hostile input. So an object from the wire is
decompressed here with an exact bound, every length, identifier, scale and residue is compared with what the plan
demands, and SEAL is handed a stream that *we* write, uncompressed, with headers and version as this SEAL expects.

Layout (SEAL 4, little-endian)::

    header       A1 5E as 16-bit 0xA15E · header size 16 · version major, minor · compression · 16-bit 0 · 64-bit size
    ciphertext   parms_id 32 · NTT form 1 · polynomials 8 · degree 8 · primes 8 · scale 8 · correction factor 8 ·
                 array: header 16 · count 8 · residues 8 each [· seed: header 16 · generator 1 · seed 64]
    key set      parms_id 32 · rows 8 · per row: keys 8 · per key: header 16 · ciphertext

A seeded ciphertext (symmetric encryption) carries the first polynomial and the seed that the second expands from.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zstandard

from hemacrypt.errors import FormatError
from hemacrypt.plan.plan import Parameters

HEADER: Final = struct.Struct("<HBBBBHQ")
_MAGIC: Final = 0xA15E
_MAJOR: Final = 4
_NONE, _ZLIB, _ZSTD = 0, 1, 2
_CIPHERTEXT: Final = struct.Struct("<32sBQQQdQ")
_COUNT: Final = struct.Struct("<Q")
_GENERATOR_BLAKE2XB: Final = 1
_SEED_BYTES: Final = HEADER.size + 1 + 64
# zstd may not ask for a larger window than this, whatever its header claims.
_WINDOW: Final = 1 << 27
# What compression can add to incompressible residues.
_SLACK: Final = 4096


@dataclass(frozen=True, eq=False)
class Residues:
    """A checked ciphertext or key component.

    Attributes
    ----------
    polynomials:
        uint64, shape (1 or 2, primes, degree), under CKKS in NTT form, under BFV coefficients; every entry is below its
        prime.
    seed:
        64 bytes that the second polynomial expands from, when there is one only.
    """

    polynomials: npt.NDArray[np.uint64]
    seed: bytes | None


@dataclass(frozen=True)
class _Reader:
    """A cursor over bytes that fails by name instead of reading past the end.

    Headers of inner objects are replaced, while they are read, by the ones that the local SEAL writes.
    """

    data: memoryview
    field: str
    minor: int
    position: list[int]

    @classmethod
    def over(cls, data: bytearray, field: str, minor: int) -> _Reader:
        return cls(memoryview(data), field, minor, [0])

    @property
    def at(self) -> int:
        return self.position[0]

    def take(self, count: int) -> memoryview:
        start = self.position[0]
        if count > len(self.data) - start:
            raise FormatError(self.field, f"ends after {len(self.data)} bytes, {count} more were expected at {start}")
        self.position[0] = start + count
        return self.data[start : start + count]

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def finish(self) -> None:
        left = len(self.data) - self.position[0]
        if left:
            raise FormatError(self.field, f"{left} bytes follow its end")


def header(size: int, minor: int, compression: int = _NONE) -> bytes:
    """Return the 16 bytes that stand before every SEAL object of ``size`` bytes, header included."""
    return HEADER.pack(_MAGIC, HEADER.size, _MAJOR, minor, compression, 0, size)


def unwrap(data: bytes, largest: int, field: str) -> bytes:
    """Check a SEAL header and return the object behind it, decompressed.

    Parameters
    ----------
    data:
        The serialised object.
    largest:
        Most bytes that the decompressed object may have; no more are ever allocated.
    field:
        What to call the object in errors.

    Raises
    ------
    FormatError
        If the header is not SEAL's, sizes disagree, or the object is larger.
    """
    if len(data) < HEADER.size:
        raise FormatError(field, f"{len(data)} bytes are no SEAL object; send what `save` wrote")
    magic, header_size, major, _minor, compression, _reserved, size = HEADER.unpack(data[: HEADER.size])
    if magic != _MAGIC or header_size != HEADER.size:
        raise FormatError(field, "does not begin with SEAL's header; send what `save` wrote")
    if major != _MAJOR:
        raise FormatError(field, f"was written by SEAL {major}; expected SEAL {_MAJOR}")
    if size != len(data):
        raise FormatError(field, f"its header promises {size} bytes, {len(data)} came; it was cut off or extended")
    if compression == _NONE:
        if size - HEADER.size > largest:
            raise FormatError(field, f"holds {size - HEADER.size} bytes, at most {largest} were expected")
        body = data[HEADER.size :]
    elif compression == _ZSTD:
        body = _inflate(memoryview(data)[HEADER.size :], largest, field)
    else:
        raise FormatError(field, f"compression {compression} is not accepted; use none or zstd")
    return body


def _inflate(compressed: memoryview, largest: int, field: str) -> bytes:
    try:
        declared = zstandard.get_frame_parameters(compressed).content_size
        if largest < declared != zstandard.CONTENTSIZE_UNKNOWN:
            raise FormatError(field, f"decompresses to more than the {largest} bytes expected")
        # One byte more than allowed tells a bomb from a fit without ever holding the bomb.
        body: bytes = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompress(
            compressed, max_output_size=largest + 1, allow_extra_data=False
        )
    except zstandard.ZstdError:
        raise FormatError(field, "its compressed content is damaged") from None
    if len(body) > largest:
        raise FormatError(field, f"decompresses to more than the {largest} bytes expected")
    return body


def ciphertext_bytes(parameters: Parameters, level: int, *, seeded: bool) -> int:
    """Return the exact size of a decompressed two-polynomial ciphertext at a level, without header."""
    polynomials = 1 if seeded else 2
    array = HEADER.size + _COUNT.size + 8 * polynomials * parameters.degree * (level + 1)
    return _CIPHERTEXT.size + array + (_SEED_BYTES if seeded else 0)


def largest_ciphertext(parameters: Parameters, level: int | None = None) -> int:
    """Return how many bytes a serialised ciphertext may have, compressed or not; at the highest level by default."""
    at = parameters.top_level if level is None else level
    return HEADER.size + ciphertext_bytes(parameters, at, seeded=False) + _SLACK


def check_ciphertext(
    data: bytes, parameters: Parameters, level: int, scale: float, minor: int, plain_modulus: int = 0
) -> bytes:
    """Check a ciphertext from the wire against what the plan demands.

    Parameters
    ----------
    data:
        Serialised ciphertext, seeded or full.
    parameters, level, scale:
        What it must be encrypted under; the scale of BFV is 1.
    minor:
        Minor version of the SEAL that will load it.
    plain_modulus:
        Plaintext modulus of BFV, whose ciphertexts are in coefficient form; 0 for CKKS, where they are in NTT form.

    Returns
    -------
    bytes
        An equal, uncompressed stream for SEAL to load.

    Raises
    ------
    FormatError
        If anything differs: length, parameters, level, scale, form, residues.
    """
    body, _ = _read_ciphertext(data, parameters, level, scale, minor, plain_modulus)
    return header(HEADER.size + len(body), minor) + body


def read_ciphertext(data: bytes, parameters: Parameters, level: int, scale: float, plain_modulus: int = 0) -> Residues:
    """Check a ciphertext from the wire and return its residues; see `check_ciphertext`."""
    return _read_ciphertext(data, parameters, level, scale, 0, plain_modulus)[1]


def _read_ciphertext(
    data: bytes, parameters: Parameters, level: int, scale: float, minor: int, plain_modulus: int
) -> tuple[bytearray, Residues]:
    body = bytearray(unwrap(data, ciphertext_bytes(parameters, level, seeded=False), "ciphertext"))
    reader = _Reader.over(body, "ciphertext", minor)
    primes = parameters.data_primes[: level + 1]
    residues = _read_body(reader, parameters.parms_id(level, plain_modulus), primes, scale, parameters, plain_modulus)
    reader.finish()
    return body, residues


def _read_body(
    reader: _Reader,
    parms_id: bytes,
    primes: tuple[int, ...],
    scale: float,
    parameters: Parameters,
    plain_modulus: int = 0,
) -> Residues:
    degree = parameters.degree
    got_id, ntt, size, got_degree, count_primes, got_scale, correction = reader.unpack(_CIPHERTEXT)
    if got_id != parms_id:
        known = {parameters.parms_id(level, plain_modulus): level for level in range(parameters.top_level + 1)}
        where = f"level {known[got_id]}" if got_id in known else "other parameters"
        raise FormatError("level", f"it belongs to {where}; expected {len(primes)} primes of the plan: follow GetModel")
    if (size, got_degree, count_primes) != (2, degree, len(primes)):
        raise FormatError(
            "shape",
            f"{size} polynomials of degree {got_degree} over {count_primes} primes; "
            f"expected 2 of degree {degree} over {len(primes)}",
        )
    if got_scale != scale:
        raise FormatError("scale", f"2^{_log2(got_scale)}; expected 2^{_log2(scale)} as the plan says")
    if ntt != (0 if plain_modulus else 1) or correction != 1:
        told = "BFV ciphertext in coefficient form" if plain_modulus else "CKKS ciphertext in NTT form"
        raise FormatError("form", f"it is not a {told}")
    residues = _read_array(reader, degree, primes)
    if not residues.polynomials[-1].any():
        raise FormatError("residues", "a whole polynomial is zero, so nothing is encrypted")
    return residues


def _read_array(reader: _Reader, degree: int, primes: tuple[int, ...]) -> Residues:
    """Check the residues, and the seed if there is one."""
    polynomial = degree * len(primes)
    array_size = _nested_header(reader)
    (count,) = reader.unpack(_COUNT)
    if count not in (polynomial, 2 * polynomial) or array_size != HEADER.size + _COUNT.size + 8 * count:
        raise FormatError(
            reader.field, f"holds {count} residues; expected {polynomial} and a seed, or {2 * polynomial}"
        )
    residues = np.frombuffer(reader.take(8 * count), dtype="<u8").reshape(-1, len(primes), degree)
    limits = np.array(primes, dtype=np.uint64)[None, :, None]
    if (residues >= limits).any():
        raise FormatError("residues", "a residue is not below its prime; it was not written by SEAL")
    return Residues(residues, _read_seed(reader) if count == polynomial else None)


def _nested_header(reader: _Reader) -> int:
    place = reader.take(HEADER.size)
    fields: tuple[int, ...] = HEADER.unpack(place)
    magic, header_size, major, _minor, compression, _reserved, size = fields
    if (magic, header_size, major, compression) != (_MAGIC, HEADER.size, _MAJOR, _NONE):
        raise FormatError(reader.field, "an inner SEAL header is damaged")
    place[:] = header(size, reader.minor)
    return size


def _read_seed(reader: _Reader) -> bytes:
    size = _nested_header(reader)
    (generator,) = reader.take(1)
    if size != _SEED_BYTES or generator != _GENERATOR_BLAKE2XB:
        raise FormatError(
            reader.field, f"its seed has generator {generator}; expected Blake2xb ({_GENERATOR_BLAKE2XB})"
        )
    return bytes(reader.take(64))


def key_set_bytes(parameters: Parameters, keys: int, rows: int) -> int:
    """Return the most bytes that a decompressed key set of ``keys`` key-switching keys can have, without header."""
    primes = len(parameters.data_primes) + 1
    full = _CIPHERTEXT.size + HEADER.size + _COUNT.size + 16 * parameters.degree * primes
    return 32 + 8 + 8 * rows + keys * len(parameters.data_primes) * (HEADER.size + full + _SEED_BYTES)


def check_relinearisation_key(data: bytes, parameters: Parameters, minor: int) -> bytes:
    """Check a relinearisation key from the wire; return an equal, uncompressed stream for SEAL to load.

    Raises
    ------
    FormatError
        If it is anything but one relinearisation key for these parameters.
    """
    return _check_key_set(data, parameters, {0}, 1, "relinearisation key", minor)


def check_galois_keys(data: bytes, parameters: Parameters, elements: Iterable[int], minor: int) -> bytes:
    """Check Galois keys from the wire; return an equal, uncompressed stream for SEAL to load.

    Parameters
    ----------
    data:
        Serialised keys.
    parameters:
        What they must be made for.
    elements:
        The Galois elements that there must be keys for: all of these, no others.
    minor:
        Minor version of the SEAL that will load them.

    Raises
    ------
    FormatError
        If they are anything else.
    """
    rows = {(element - 1) // 2 for element in elements}
    return _check_key_set(data, parameters, rows, parameters.degree, "Galois keys", minor)


def read_relinearisation_key(data: bytes, parameters: Parameters) -> list[Residues]:
    """Check a relinearisation key from the wire; return its components, one for each data prime."""
    return _read_key_set(data, parameters, {0}, 1, "relinearisation key", 0)[1][0]


def read_galois_keys(data: bytes, parameters: Parameters, elements: Iterable[int]) -> dict[int, list[Residues]]:
    """Check Galois keys from the wire; return the components of the key for each Galois element."""
    rows = {(element - 1) // 2: element for element in elements}
    found = _read_key_set(data, parameters, set(rows), parameters.degree, "Galois keys", 0)[1]
    return {element: found[row] for row, element in rows.items()}


def key_set_stream(components: Iterable[npt.NDArray[np.uint64]], row: int, parameters: Parameters, minor: int) -> bytes:
    """Write a set of one key-switching key, as SEAL does, uncompressed.

    Parameters
    ----------
    components:
        One for each data prime: residues modulo every prime, the special one last; shape (2, primes, degree).
    row:
        Where the key stands: 0 for a relinearisation key, (g - 1) / 2 for that of Galois element g.
    parameters:
        What it belongs to.
    minor:
        Minor version of SEAL to name in the headers.
    """
    keys = []
    for residues in components:
        words, count = residues.astype("<u8").tobytes(), _COUNT.pack(residues.size)
        body = _CIPHERTEXT.pack(parameters.parms_id(), 1, 2, parameters.degree, residues.shape[1], 1.0, 1)
        body += header(HEADER.size + len(count) + len(words), minor) + count + words
        keys.append(header(HEADER.size + len(body), minor) + body)
    body = parameters.parms_id() + _COUNT.pack(row + 1) + _COUNT.pack(0) * row + _COUNT.pack(len(keys)) + b"".join(keys)
    return header(HEADER.size + len(body), minor) + body


def _check_key_set(
    data: bytes, parameters: Parameters, present: set[int], most_rows: int, field: str, minor: int
) -> bytes:
    body, _ = _read_key_set(data, parameters, present, most_rows, field, minor)
    return header(HEADER.size + len(body), minor) + body


def _read_key_set(
    data: bytes, parameters: Parameters, present: set[int], most_rows: int, field: str, minor: int
) -> tuple[bytearray, dict[int, list[Residues]]]:
    body = bytearray(unwrap(data, key_set_bytes(parameters, len(present), most_rows), field))
    reader = _Reader.over(body, field, minor)
    key_level, primes = parameters.parms_id(), (*parameters.data_primes, parameters.special_prime)
    if bytes(reader.take(32)) != key_level:
        raise FormatError(field, "made for other parameters; generate keys for the plan that GetModel returns")
    (rows,) = reader.unpack(_COUNT)
    if not max(present, default=-1) < rows <= most_rows:
        raise FormatError(field, f"{rows} rows; expected more than {max(present, default=-1)} and at most {most_rows}")
    found: dict[int, list[Residues]] = {}
    for row in range(rows):
        (keys,) = reader.unpack(_COUNT)
        expected = len(parameters.data_primes) if row in present else 0
        if keys != expected:
            raise FormatError(field, f"row {row} has {keys} keys; the plan's rotations need {expected} there")
        for _ in range(keys):
            start = reader.at
            size = _nested_header(reader)
            found.setdefault(row, []).append(_read_body(reader, key_level, primes, 1.0, parameters))
            if reader.at - start != size:
                raise FormatError(field, f"a key's header promises {size} bytes, it has {reader.at - start}")
    reader.finish()
    return body, found


def ciphertext_stream(
    residues: npt.NDArray[np.uint32], parameters: Parameters, scale: float, minor: int, plain_modulus: int = 0
) -> bytes:
    """Write a ciphertext as SEAL does, compressed.

    Parameters
    ----------
    residues:
        Under CKKS in NTT form, under BFV coefficients; shape (2, primes, degree).
    parameters, scale:
        What it is encrypted under; the level follows from the number of primes. The scale of BFV is 1.
    minor:
        Minor version of SEAL to name in the headers.
    plain_modulus:
        Plaintext modulus of BFV, 0 for CKKS.
    """
    size, primes, degree = residues.shape
    words = residues.astype("<u8").tobytes()
    count = _COUNT.pack(residues.size)
    name, ntt = parameters.parms_id(primes - 1, plain_modulus), 0 if plain_modulus else 1
    body = (
        _CIPHERTEXT.pack(name, ntt, size, degree, primes, scale, 1)
        + header(HEADER.size + len(count) + len(words), minor)
        + count
        + words
    )
    # Half of every word is empty: the fastest level packs as well as any, in half the time.
    compressed = zstandard.ZstdCompressor(level=-1).compress(body)
    return header(HEADER.size + len(compressed), minor, _ZSTD) + compressed


def relabelled(data: bytes, largest: int, name: bytes, minor: int) -> bytes:
    """Give an object of one scheme the name of the other's parameters; ring, primes and residues are the same.

    SEAL's CKKS rotates and switches keys in NTT form, where affine maps are cheap; its BFV does so among coefficients
    alone. Both do the same arithmetic, and check names only.

    Parameters
    ----------
    data:
        What the local SEAL saved, never from the wire: a ciphertext of scale 1, or a plaintext in NTT form.
    largest:
        Most bytes that it can have, decompressed.
    name:
        Its new parms_id; see `hemacrypt.plan.plan.Parameters.parms_id`.
    minor:
        Minor version of the SEAL that will load it.

    Returns
    -------
    bytes
        An uncompressed stream for SEAL to load.
    """
    body = bytearray(unwrap(data, largest, "relabelled"))
    body[: len(name)] = name
    return header(HEADER.size + len(body), minor) + body


def plaintext_stream(
    residues: npt.NDArray[np.uint64], parameters: Parameters, minor: int, plain_modulus: int = 0
) -> bytes:
    """Write a plaintext over all primes, the special one included, as SEAL does, uncompressed: a secret key is one.

    Parameters
    ----------
    residues:
        In NTT form, shape (primes, degree).
    parameters:
        What it belongs to.
    minor:
        Minor version of SEAL to name in the headers.
    plain_modulus:
        Plaintext modulus of BFV, 0 for CKKS.
    """
    words, count = residues.astype("<u8").tobytes(), _COUNT.pack(residues.size)
    array = header(HEADER.size + len(count) + len(words), minor) + count + words
    body = parameters.parms_id(None, plain_modulus) + count + struct.pack("<d", 1.0) + array
    return header(HEADER.size + len(body), minor) + body


def _log2(scale: float) -> str:
    return f"{np.log2(scale):.6g}" if 0 < scale < np.inf else "?"
