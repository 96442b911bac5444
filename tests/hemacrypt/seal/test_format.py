"""SEAL's streams read by us: what is valid passes unchanged, everything else is refused before SEAL sees it."""

from __future__ import annotations

import resource
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hemacrypt.errors import FormatError
from hemacrypt.plan.plan import Parameters
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from tests.hemacrypt.setups import Setup

HEADER = 16
# Offsets inside a ciphertext's body, from the layout in the module's description.
NTT, SIZE, DEGREE, PRIMES, SCALE, CORRECTION, ARRAY, COUNT, RESIDUES = 32, 33, 41, 49, 57, 65, 73, 89, 97
NONE, ZLIB, ZSTD = 0, 1, 2
FUZZ = settings(deadline=None, derandomize=True, database=None, max_examples=300)


class Uploads:
    """Valid ciphertexts of the logistic regression and what it takes to change them."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.parameters: Parameters = setup.plan.parameters
        self.scale = setup.plan.public.input_scale
        (self.seeded,) = setup.holder.encrypt(np.linspace(0, 1, 16))
        self.full = setup.full(self.seeded)
        self.context = sealio.make_context(self.parameters)
        self.polynomial = self.parameters.degree * len(self.parameters.data_primes)

    def check(self, data: bytes) -> bytes:
        return self.setup.checked(data)

    def load(self, data: bytes) -> sealio.SealObject:
        return sealio.load(seal.Ciphertext(), self.context, self.check(data))

    def decrypt(self, ciphertext: sealio.SealObject) -> npt.NDArray[np.complex128]:
        plain = seal.Plaintext()
        secret = sealio.load(seal.SecretKey(), self.context, self.setup.holder.secret_bytes())
        seal.Decryptor(self.context, secret).decrypt(ciphertext, plain)
        return np.array(seal.CKKSEncoder(self.context).decode_complex(plain))

    def body(self, *, seeded: bool = True) -> bytearray:
        return bytearray(sealformat.unwrap(self.seeded if seeded else self.full, 1 << 24, "test"))

    def stream(self, body: bytes, compression: int = NONE) -> bytes:
        content = zstandard.ZstdCompressor().compress(bytes(body)) if compression == ZSTD else bytes(body)
        return wrapped(content, self.setup.minor, compression)


def wrapped(content: bytes, minor: int, compression: int = NONE) -> bytes:
    return sealformat.header(HEADER + len(content), minor, compression) + content


@pytest.fixture(scope="module")
def uploads(regression: Setup) -> Uploads:
    return Uploads(regression)


def patched(body: bytearray, offset: int, layout: str, value: float) -> bytearray:
    struct.pack_into("<" + layout, body, offset, value)
    return body


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("compression", [NONE, ZSTD])
def test_a_valid_ciphertext_reaches_seal_unchanged(uploads: Uploads, seeded: bool, compression: int) -> None:
    original = uploads.seeded if seeded else uploads.full
    stream = uploads.stream(bytes(uploads.body(seeded=seeded)), compression)
    checked = uploads.check(stream)
    assert checked == uploads.check(original) == uploads.check(checked)
    assert len(checked) == HEADER + sealformat.ciphertext_bytes(uploads.parameters, 1, seeded=seeded)
    direct = sealio.load(seal.Ciphertext(), uploads.context, original)
    np.testing.assert_array_equal(uploads.decrypt(uploads.load(stream)), uploads.decrypt(direct))
    (expected,) = uploads.setup.plan.public.input_layout.pack(np.linspace(0, 1, 16))
    np.testing.assert_allclose(uploads.decrypt(direct), expected, atol=1e-3)


@pytest.mark.parametrize("seeded", [True, False])
def test_every_upload_is_below_the_largest_size(uploads: Uploads, seeded: bool) -> None:
    body = bytes(uploads.body(seeded=seeded))
    largest = sealformat.largest_ciphertext(uploads.parameters)
    assert len(uploads.stream(body)) <= largest
    assert len(uploads.stream(body, ZSTD)) <= largest


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("compression", [NONE, ZSTD])
@pytest.mark.parametrize("honest", [True, False], ids=["header-fixed", "header-stale"])
def test_a_truncated_ciphertext_is_refused(uploads: Uploads, seeded: bool, compression: int, honest: bool) -> None:
    whole = uploads.stream(bytes(uploads.body(seeded=seeded)), compression)
    lengths = {0, 1, 15, 16, 17, 48, 49, 100, 113, 200, len(whole) // 2, *range(len(whole) - 100, len(whole))}
    for length in lengths:
        cut = whole[:length]
        if honest and length >= HEADER:
            cut = wrapped(cut[HEADER:], uploads.setup.minor, compression)
        with pytest.raises(FormatError):
            uploads.check(cut)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("tail", [b"\0", b"\0" * 8, b"x" * 81, b"\x28\xb5\x2f\xfd"])
def test_trailing_bytes_are_refused(uploads: Uploads, seeded: bool, tail: bytes) -> None:
    body = bytes(uploads.body(seeded=seeded))
    minor = uploads.setup.minor
    for compression in (NONE, ZSTD):
        with pytest.raises(FormatError, match="promises"):
            uploads.check(uploads.stream(body, compression) + tail)
        with pytest.raises(FormatError):
            uploads.check(uploads.stream(body + tail, compression))
    compressed = zstandard.ZstdCompressor().compress(body)
    for after in (tail, compressed, zstandard.ZstdCompressor().compress(tail)):
        with pytest.raises(FormatError):
            uploads.check(wrapped(compressed + after, minor, ZSTD))


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("position", range(HEADER))
@pytest.mark.parametrize("compression", [NONE, ZSTD])
def test_a_changed_header_is_refused_or_replaced(uploads: Uploads, position: int, flip: int, compression: int) -> None:
    body = bytes(uploads.body())
    changed = bytearray(uploads.stream(body, compression))
    changed[position] ^= flip
    # The minor version and the reserved bytes mean nothing to us; what SEAL loads has a header of ours.
    if position in (4, 6, 7):
        assert uploads.check(bytes(changed)) == uploads.check(uploads.stream(body))
    else:
        with pytest.raises(FormatError):
            uploads.check(bytes(changed))


@pytest.mark.parametrize("compression", [ZLIB, 3, 4, 255])
def test_other_compressions_are_refused(uploads: Uploads, compression: int) -> None:
    with pytest.raises(FormatError, match=f"compression {compression} is not accepted"):
        uploads.check(wrapped(bytes(uploads.body()), uploads.setup.minor, compression))


def test_a_body_of_another_compression_than_declared_is_refused(uploads: Uploads) -> None:
    compressed = zstandard.ZstdCompressor().compress(bytes(uploads.body()))
    with pytest.raises(FormatError):
        uploads.check(wrapped(compressed, uploads.setup.minor, NONE))
    with pytest.raises(FormatError, match="compressed content is damaged"):
        uploads.check(wrapped(bytes(uploads.body()), uploads.setup.minor, ZSTD))


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    size, block = 1 << 30, bytes(1 << 20)

    def compress(compressor: zstandard.ZstdCompressor, declared: int) -> bytes:
        pieces = compressor.compressobj(size=declared)
        return b"".join(pieces.compress(block) for _ in range(size // len(block))) + pieces.flush()

    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    return {
        "declared": compress(zstandard.ZstdCompressor(level=1), size),
        "undeclared": compress(zstandard.ZstdCompressor(level=1), -1),
        "wide-window": compress(zstandard.ZstdCompressor(compression_params=wide), -1),
    }


@pytest.mark.parametrize("kind", ["declared", "undeclared", "wide-window"])
@pytest.mark.parametrize("target", ["ciphertext", "Galois keys"])
def test_a_compression_bomb_is_refused_without_room_for_it(
    uploads: Uploads, bombs: dict[str, bytes], kind: str, target: str
) -> None:
    stream = wrapped(bombs[kind], uploads.setup.minor, ZSTD)
    assert len(stream) < 200_000
    parameters, elements = uploads.parameters, planned_elements(uploads.setup)
    checks: dict[str, Callable[[bytes], bytes]] = {
        "ciphertext": uploads.check,
        "Galois keys": lambda data: check_galois(uploads.setup, data),
    }
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            checks[target](stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    allowed = sealformat.key_set_bytes(parameters, len(elements), parameters.degree)
    assert peak < 2 * allowed + (1 << 20) < 1 << 27
    # Memory that Python does not trace: the decompressor's window among it, in KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 1 << 18


@pytest.mark.parametrize(
    ("offset", "layout", "value", "field"),
    [
        *[(NTT, "B", value, "form") for value in (0, 2, 255)],
        *[(SIZE, "Q", value, "shape") for value in (0, 1, 3, 1 << 61, (1 << 64) - 1)],
        *[(DEGREE, "Q", value, "shape") for value in (0, 2048, 8192, 1 << 60, (1 << 64) - 1)],
        *[(PRIMES, "Q", value, "shape") for value in (0, 1, 3, 1 << 60)],
        *[(CORRECTION, "Q", value, "form") for value in (0, 2, (1 << 64) - 1)],
        *[
            (SCALE, "d", value, "scale")
            for value in (0.0, -0.0, -1.0, 1.0, 2.0**20, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"))
        ],
        *[(COUNT, "Q", value, "ciphertext") for value in (0, 1, 8191, 8193, 1 << 61, (1 << 64) - 1)],
        (ARRAY, "H", 0xA15F, "ciphertext"),
        (ARRAY + 2, "B", 17, "ciphertext"),
        (ARRAY + 3, "B", 3, "ciphertext"),
        (ARRAY + 5, "B", ZLIB, "ciphertext"),
        (ARRAY + 5, "B", ZSTD, "ciphertext"),
        *[(ARRAY + 8, "Q", value, "ciphertext") for value in (0, 23, 65561, 1 << 63)],
    ],
)
@pytest.mark.parametrize("seeded", [True, False])
def test_a_changed_field_is_refused_by_its_name(
    uploads: Uploads, offset: int, layout: str, value: float, field: str, seeded: bool
) -> None:
    with pytest.raises(FormatError) as refusal:
        uploads.check(uploads.stream(patched(uploads.body(seeded=seeded), offset, layout, value)))
    assert refusal.value.field == field


def test_the_scale_must_be_right_to_the_last_bit(uploads: Uploads) -> None:
    for neighbour in (np.nextafter(uploads.scale, np.inf), np.nextafter(uploads.scale, 0)):
        with pytest.raises(FormatError, match="scale"):
            uploads.check(uploads.stream(patched(uploads.body(), SCALE, "d", float(neighbour))))


def test_the_count_of_the_other_form_is_refused(uploads: Uploads) -> None:
    with pytest.raises(FormatError):
        uploads.check(uploads.stream(patched(uploads.body(), COUNT, "Q", 2 * uploads.polynomial)))
    with pytest.raises(FormatError):
        uploads.check(uploads.stream(patched(uploads.body(seeded=False), COUNT, "Q", uploads.polynomial)))


def test_a_full_ciphertext_cut_into_a_seedless_half_is_refused(uploads: Uploads) -> None:
    half = uploads.body(seeded=False)[: RESIDUES + 8 * uploads.polynomial]
    patched(patched(half, COUNT, "Q", uploads.polynomial), ARRAY + 8, "Q", 24 + 8 * uploads.polynomial)
    with pytest.raises(FormatError, match="ends after"):
        uploads.check(uploads.stream(half))


@pytest.mark.parametrize("level", [None, 0])
def test_another_level_is_refused_by_name(uploads: Uploads, level: int | None) -> None:
    body = uploads.body()
    body[:32] = uploads.parameters.parms_id(level)
    with pytest.raises(FormatError, match="level: it belongs to " + ("level 0" if level == 0 else "other")):
        uploads.check(uploads.stream(body))


def test_other_parameters_are_refused(uploads: Uploads, one_square: Setup) -> None:
    parameters = one_square.plan.parameters
    (foreign,) = one_square.holder.encrypt(np.ones(16))
    with pytest.raises(FormatError):
        uploads.check(foreign)
    with pytest.raises(FormatError, match="level: it belongs to other parameters"):
        sealformat.check_ciphertext(uploads.seeded, parameters, 3, one_square.plan.public.input_scale, 0)
    exchanged = Parameters(4096, uploads.parameters.data_primes[::-1], uploads.parameters.special_prime)
    with pytest.raises(FormatError, match="level: it belongs to other parameters"):
        sealformat.check_ciphertext(uploads.seeded, exchanged, 1, uploads.scale, 0)


@pytest.mark.parametrize("seeded", [True, False])
def test_a_residue_that_is_not_below_its_prime_is_refused(uploads: Uploads, seeded: bool) -> None:
    degree, primes = uploads.parameters.degree, uploads.parameters.data_primes
    for polynomial in range(1 if seeded else 2):
        for number, prime in enumerate(primes):
            for index in (0, 1, degree // 2, degree - 1):
                offset = RESIDUES + 8 * ((polynomial * len(primes) + number) * degree + index)
                for value in (prime, prime + 1, 1 << 30, 1 << 32, (1 << 64) - 1):
                    with pytest.raises(FormatError, match="residue is not below its prime"):
                        uploads.check(uploads.stream(patched(uploads.body(seeded=seeded), offset, "Q", value)))
                largest = uploads.stream(patched(uploads.body(seeded=seeded), offset, "Q", prime - 1))
                assert uploads.check(largest)[HEADER + offset :][:8] == struct.pack("<Q", prime - 1)


def test_a_ciphertext_that_encrypts_nothing_is_refused(uploads: Uploads) -> None:
    body = uploads.body(seeded=False)
    second = RESIDUES + 8 * uploads.polynomial
    body[second:] = bytes(8 * uploads.polynomial)
    with pytest.raises(FormatError, match="nothing is encrypted"):
        uploads.check(uploads.stream(body))
    body[second] = 1
    assert uploads.load(uploads.stream(body)).size() == 2


@pytest.mark.parametrize("generator", [0, 2, 3, 255])
def test_a_seed_of_another_generator_is_refused(uploads: Uploads, generator: int) -> None:
    body = uploads.body()
    assert body[-65] == 1
    body[-65] = generator
    with pytest.raises(FormatError, match=f"generator {generator}; expected Blake2xb"):
        uploads.check(uploads.stream(body))


@pytest.mark.parametrize("position", range(-81, -65))
def test_a_changed_seed_header_is_refused_or_harmless(uploads: Uploads, position: int) -> None:
    body = uploads.body()
    body[position] ^= 0xFF
    check_refused_or_loaded(uploads, uploads.stream(body))


def test_another_seed_is_another_ciphertext(uploads: Uploads) -> None:
    body = uploads.body()
    body[-1] ^= 1
    changed = uploads.decrypt(uploads.load(uploads.stream(body)))
    assert np.abs(changed - uploads.decrypt(uploads.load(uploads.seeded))).max() > 1


def check_refused_or_loaded(uploads: Uploads, stream: bytes) -> bool:
    """Whatever is accepted must load in SEAL; nothing but a FormatError may come of the rest."""
    try:
        checked = uploads.check(stream)
    except FormatError:
        return False
    ciphertext = sealio.load(seal.Ciphertext(), uploads.context, checked)
    assert (ciphertext.size(), ciphertext.poly_modulus_degree()) == (2, uploads.parameters.degree)
    return True


mutations = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@FUZZ
@given(mutations, st.booleans(), st.sampled_from(["all", "start", "end"]), st.booleans())
def test_random_damage_is_refused_or_harmless(
    uploads: Uploads, changes: list[tuple[float, int]], seeded: bool, region: str, compressed: bool
) -> None:
    data = bytearray(uploads.stream(bytes(uploads.body(seeded=seeded)), ZSTD if compressed else NONE))
    for place, value in changes:
        reach = len(data) if region == "all" else 130
        position = int(place * reach)
        data[len(data) - 1 - position if region == "end" else position] = value
    check_refused_or_loaded(uploads, bytes(data))


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(uploads: Uploads, content: bytes, honest: bool) -> None:
    data = wrapped(content, uploads.setup.minor, len(content) % 3) if honest else content
    with pytest.raises(FormatError):
        uploads.check(data)
    with pytest.raises(FormatError):
        sealformat.check_relinearisation_key(data, uploads.parameters, uploads.setup.minor)
    with pytest.raises(FormatError):
        sealformat.check_galois_keys(data, uploads.parameters, (3,), uploads.setup.minor)


# Keys -----------------------------------------------------------------------------------------------------------------


def planned_elements(setup: Setup) -> tuple[int, ...]:
    """Return the Galois elements of the logistic regression's only level, the top one."""
    (group,) = setup.plan.public.keys
    assert group.level == setup.plan.parameters.top_level
    return group.elements


def galois_keys(setup: Setup) -> bytes:
    return setup.evaluation_keys.levels[0].galois


def galois(setup: Setup, elements: tuple[int, ...]) -> bytes:
    context = sealio.make_context(setup.plan.parameters)
    secret = sealio.load(seal.SecretKey(), context, setup.holder.secret_bytes())
    return sealio.dump(seal.KeyGenerator(context, secret).create_galois_keys(list(elements)))


def check_galois(setup: Setup, data: bytes) -> bytes:
    return sealformat.check_galois_keys(data, setup.plan.parameters, planned_elements(setup), setup.minor)


def plain_body(data: bytes) -> bytearray:
    return bytearray(sealformat.unwrap(data, 1 << 28, "test"))


@pytest.fixture(scope="module")
def galois_body(regression: Setup) -> bytearray:
    return plain_body(galois_keys(regression))


def test_valid_galois_keys_reach_seal_unchanged(regression: Setup, galois_body: bytearray) -> None:
    checked = check_galois(regression, galois_keys(regression))
    assert checked == check_galois(regression, wrapped(bytes(galois_body), regression.minor))
    assert checked[HEADER:] == galois_body
    context = sealio.make_context(regression.plan.parameters)
    loaded = sealio.load(seal.GaloisKeys(), context, checked)
    for element in planned_elements(regression):
        assert loaded.has_key(element)


def test_every_set_of_rotations_but_the_planned_one_is_refused(regression: Setup) -> None:
    elements, conjugation = planned_elements(regression), 2 * regression.plan.parameters.degree - 1
    other = regression.plan.parameters.galois_element(3)
    assert len(elements) > 2
    assert conjugation in elements
    assert other not in elements
    check_galois(regression, galois(regression, elements[::-1]))
    for wrong in (elements[1:], elements[:-1], (*elements, other), (*elements[1:], other)):
        with pytest.raises(FormatError, match="Galois keys"):
            check_galois(regression, galois(regression, wrong))


def test_keys_for_other_parameters_are_refused(regression: Setup, one_square: Setup) -> None:
    with pytest.raises(FormatError):
        check_galois(regression, one_square.evaluation_keys.levels[0].galois)
    group, parameters = one_square.plan.public.keys[0], one_square.plan.parameters
    with pytest.raises(FormatError, match="other parameters"):
        sealformat.check_galois_keys(galois_keys(regression), parameters, group.elements, one_square.minor)


def test_keys_in_the_place_of_others_are_refused(one_square: Setup) -> None:
    rotating, relinearising, _ = one_square.plan.public.keys
    minor, keys = one_square.minor, one_square.evaluation_keys.levels
    (upload,) = one_square.holder.encrypt(np.ones(16))
    for group in (rotating, relinearising):
        parameters = one_square.plan.parameters.truncated(group.level)
        with pytest.raises(FormatError, match="Galois keys"):
            sealformat.check_galois_keys(keys[1].relinearisation, parameters, rotating.elements, minor)
        with pytest.raises(FormatError, match="relinearisation key"):
            sealformat.check_relinearisation_key(keys[0].galois, parameters, minor)
        with pytest.raises(FormatError):
            sealformat.check_galois_keys(upload, parameters, rotating.elements, minor)
    assert sealformat.check_relinearisation_key(keys[1].relinearisation, parameters, minor)


def test_the_secret_key_is_taken_for_no_evaluation_key(regression: Setup) -> None:
    secret = regression.holder.secret_bytes()
    with pytest.raises(FormatError):
        check_galois(regression, secret)
    with pytest.raises(FormatError):
        sealformat.check_relinearisation_key(secret, regression.plan.parameters, regression.minor)
    with pytest.raises(FormatError):
        regression.engine.evaluate([secret], regression.keys)


def test_truncated_and_extended_keys_are_refused(regression: Setup, galois_body: bytearray) -> None:
    content = bytes(galois_body)
    lengths = [0, 31, 32, 40, 48, 1000, len(content) // 2, len(content) - 8, len(content) - 1]
    damaged = [content[:length] for length in lengths] + [content + b"\0", content + bytes(8)]
    for body in damaged:
        with pytest.raises(FormatError):
            check_galois(regression, wrapped(body, regression.minor))
    with pytest.raises(FormatError, match="no SEAL object"):
        check_galois(regression, b"")
    with pytest.raises(FormatError, match="promises"):
        check_galois(regression, galois_keys(regression)[:-1])


def _first_key(setup: Setup) -> int:
    """Return the offset of the first key's header in the body of Galois keys."""
    row = min((element - 1) // 2 for element in planned_elements(setup))
    return 40 + 8 * (row + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body, first: patched(body, 32, "Q", 0), "0 rows"),
        (lambda body, first: patched(body, 32, "Q", 4097), "4097 rows"),
        (lambda body, first: patched(body, 32, "Q", (1 << 64) - 1), "rows"),
        (lambda body, first: patched(body, 40, "Q", 1), "row 0 has 1 keys"),
        (lambda body, first: patched(body, first - 8, "Q", 1), "has 1 keys; the plan's rotations need 2"),
        (lambda body, first: patched(body, first - 8, "Q", 1 << 60), "the plan's rotations need 2"),
        (lambda body, first: patched(body, first, "H", 0), "inner SEAL header"),
        (lambda body, first: patched(body, first + 5, "B", ZSTD), "inner SEAL header"),
        (lambda body, first: patched(body, first + HEADER + SCALE, "d", 2.0), "scale"),
        (lambda body, first: patched(body, first + HEADER + NTT, "B", 0), "NTT form"),
        (lambda body, first: patched(body, first + HEADER + RESIDUES, "Q", 1 << 31), "not below its prime"),
        (lambda body, first: patched(body, first + HEADER, "B", body[first + HEADER] ^ 1), "other parameters"),
    ],
)
def test_changed_keys_are_refused(
    regression: Setup, galois_body: bytearray, change: Callable[[bytearray, int], bytearray], message: str
) -> None:
    body = change(bytearray(galois_body), _first_key(regression))
    with pytest.raises(FormatError, match=message):
        check_galois(regression, wrapped(bytes(body), regression.minor))


@pytest.mark.parametrize("position", range(16))
@pytest.mark.parametrize("part", ["key", "array", "seed"])
def test_a_changed_inner_header_of_a_key_is_refused_or_loads(
    regression: Setup, galois_body: bytearray, part: str, position: int
) -> None:
    first = _first_key(regression)
    primes = len(regression.plan.parameters.data_primes) + 1
    seed = first + HEADER + RESIDUES + 8 * regression.plan.parameters.degree * primes
    body = bytearray(galois_body)
    body[{"key": first, "array": first + HEADER + ARRAY, "seed": seed}[part] + position] ^= 0x11
    keys_refused_or_loaded(regression, wrapped(bytes(body), regression.minor))


def keys_refused_or_loaded(setup: Setup, stream: bytes) -> None:
    try:
        checked = check_galois(setup, stream)
    except FormatError:
        return
    sealio.load(seal.GaloisKeys(), sealio.make_context(setup.plan.parameters), checked)


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(st.integers(0, 2), st.integers(0, 300), st.integers(1, 255), st.booleans())
def test_random_damage_to_keys_is_refused_or_harmless(
    regression: Setup, galois_body: bytearray, place: int, distance: int, flip: int, anywhere: bool
) -> None:
    body = bytearray(galois_body)
    base = (0, _first_key(regression), len(body) - 301)[place]
    position = (base + distance * 2713) % len(body) if anywhere else base + distance
    body[position] ^= flip
    keys_refused_or_loaded(regression, wrapped(bytes(body), regression.minor))
