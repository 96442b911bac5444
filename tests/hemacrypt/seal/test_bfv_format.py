"""BFV ciphertexts read by us: what the plan demands passes, everything else is refused by name before SEAL sees it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import tenseal.sealapi as seal

from client_sdk._crypto import BfvKeyHolder
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from tests.hemacrypt.handmade import Handmade, chain, handmade, primes_of
from tests.hemacrypt.setups import Setup

NTT, SIZE, DEGREE, PRIMES, SCALE, CORRECTION, COUNT, RESIDUES = 32, 33, 41, 49, 57, 65, 89, 97
MODULI = primes_of(4096, 20, 2)


class Upload:
    """A seeded BFV ciphertext, its expansion, and what reads them."""

    def __init__(self) -> None:
        self.made: Handmade = handmade((6, 3), chain(4096, 2), MODULI, drops=(0,))
        self.parameters, self.minor = self.made.plan.parameters, sealio.seal_minor_version()
        self.holder = BfvKeyHolder(self.made.plan.public)
        self.seeded, self.other = self.holder.encrypt(np.linspace(0, 1, 6))
        self.context = sealio.make_context(self.parameters, MODULI[0])
        self.full = sealio.dump(self.load(self.seeded))

    def check(self, data: bytes, modulus: int = MODULI[0], level: int = 1) -> bytes:
        return sealformat.check_ciphertext(data, self.parameters, level, 1.0, self.minor, modulus)

    def load(self, data: bytes) -> sealio.SealObject:
        return sealio.load(seal.Ciphertext(), self.context, self.check(data))

    def changed(self, offset: int, layout: str, value: float, *, seeded: bool) -> bytes:
        body = bytearray(sealformat.unwrap(self.seeded if seeded else self.full, 1 << 24, "test"))
        struct.pack_into("<" + layout, body, offset, value)
        return sealformat.header(sealformat.HEADER.size + len(body), self.minor) + body


@pytest.fixture(scope="module")
def upload() -> Upload:
    return Upload()


@pytest.mark.parametrize("seeded", [True, False])
def test_a_valid_ciphertext_reaches_seal_unchanged(upload: Upload, seeded: bool) -> None:
    original = upload.seeded if seeded else upload.full
    checked = upload.check(original)
    assert checked == upload.check(checked)
    assert len(checked) == 16 + sealformat.ciphertext_bytes(upload.parameters, 1, seeded=seeded)
    loaded = upload.load(original)
    assert not loaded.is_ntt_form()
    assert loaded.parms_id() == sealio.parms_id_words(upload.parameters.parms_id(1, MODULI[0]))


def test_residues_are_those_that_seal_holds(upload: Upload) -> None:
    found = sealformat.read_ciphertext(upload.full, upload.parameters, 1, 1.0, MODULI[0])
    loaded = upload.load(upload.full)
    # The binding shows the first word of each polynomial.
    assert [loaded.data(number) for number in range(2)] == found.polynomials[:, 0, 0].tolist()


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize(
    ("offset", "layout", "value", "field"),
    [
        *[(NTT, "B", value, "form") for value in (1, 2, 255)],
        *[(SIZE, "Q", value, "shape") for value in (0, 1, 3, 1 << 61)],
        *[(DEGREE, "Q", value, "shape") for value in (0, 2048, 8192)],
        *[(PRIMES, "Q", value, "shape") for value in (0, 1, 3, 1 << 60)],
        *[(CORRECTION, "Q", value, "form") for value in (0, 2)],
        *[(SCALE, "d", value, "scale") for value in (0.0, -1.0, 2.0, 2.0**20, np.nextafter(1, 2), np.inf, np.nan)],
        *[(COUNT, "Q", value, "ciphertext") for value in (0, 1, 8191, 8193, (1 << 64) - 1)],
        *[(RESIDUES, "Q", value, "residues") for value in (1 << 30, 1 << 32, (1 << 64) - 1)],
    ],
)
def test_a_changed_field_is_refused_by_its_name(
    upload: Upload, offset: int, layout: str, value: float, field: str, seeded: bool
) -> None:
    with pytest.raises(FormatError) as refusal:
        upload.check(upload.changed(offset, layout, value, seeded=seeded))
    assert refusal.value.field == field


@pytest.mark.parametrize("seeded", [True, False])
def test_residues_end_below_their_primes(upload: Upload, seeded: bool) -> None:
    for number, prime in enumerate(upload.parameters.data_primes):
        place = RESIDUES + 8 * (4096 * number + 7)
        assert upload.check(upload.changed(place, "Q", prime - 1, seeded=seeded))
        with pytest.raises(FormatError, match="residue is not below its prime"):
            upload.check(upload.changed(place, "Q", prime, seeded=seeded))


def test_the_other_plaintext_modulus_the_other_level_and_the_other_scheme_are_refused(upload: Upload) -> None:
    with pytest.raises(FormatError, match="level: it belongs to other parameters"):
        upload.check(upload.other)
    with pytest.raises(FormatError, match="level: it belongs to other parameters"):
        sealformat.check_ciphertext(upload.seeded, upload.parameters, 1, 1.0, upload.minor)
    lower = upload.load(upload.seeded)
    seal.Evaluator(upload.context).mod_switch_to_next_inplace(lower)
    with pytest.raises(FormatError, match="level: it belongs to level 0"):
        upload.check(sealio.dump(lower))
    assert upload.check(sealio.dump(lower), level=0)


def test_a_ckks_ciphertext_is_none_of_bfv(upload: Upload, regression: Setup) -> None:
    (foreign,) = regression.holder.encrypt(np.ones(16))
    with pytest.raises(FormatError, match="level: it belongs to other parameters"):
        sealformat.check_ciphertext(foreign, regression.plan.parameters, 1, 1.0, upload.minor, MODULI[0])


def test_a_ciphertext_that_encrypts_nothing_is_refused(upload: Upload) -> None:
    body = bytearray(sealformat.unwrap(upload.full, 1 << 24, "test"))
    body[RESIDUES + 16 * 4096 :] = bytes(16 * 4096)
    with pytest.raises(FormatError, match="nothing is encrypted"):
        upload.check(sealformat.header(16 + len(body), upload.minor) + body)


def test_what_we_write_is_what_seal_reads(upload: Upload) -> None:
    residues = sealformat.read_ciphertext(upload.full, upload.parameters, 1, 1.0, MODULI[0]).polynomials
    stream = sealformat.ciphertext_stream(residues.astype(np.uint32), upload.parameters, 1.0, upload.minor, MODULI[0])
    assert upload.check(stream) == upload.check(upload.full)


def test_a_relabelled_ciphertext_comes_back_as_it_was(upload: Upload) -> None:
    parameters, minor = upload.parameters, upload.minor
    value = upload.load(upload.full)
    seal.Evaluator(upload.context).transform_to_ntt_inplace(value)
    largest = sealformat.ciphertext_bytes(parameters, 1, seeded=False)
    there = sealformat.relabelled(sealio.dump(value), largest, parameters.parms_id(1), minor)
    ckks = sealio.load(seal.Ciphertext(), sealio.make_context(parameters), there)
    assert ckks.is_ntt_form()
    back = sealformat.relabelled(sealio.dump(ckks), largest, parameters.parms_id(1, MODULI[0]), minor)
    returned = sealio.load(seal.Ciphertext(), upload.context, back)
    seal.Evaluator(upload.context).transform_from_ntt_inplace(returned)
    assert upload.check(sealio.dump(returned)) == upload.check(upload.full)


def test_a_context_names_every_level_as_we_do_and_ends_where_the_plaintext_modulus_does_not_fit() -> None:
    parameters = chain(16384, 13)
    small, paper = primes_of(16384, 20, 1)[0], 957181001729
    assert sealio.lowest_level(parameters) == sealio.lowest_level(parameters, small) == 0
    assert sealio.lowest_level(parameters, paper) == 1
    context = sealio.make_context(parameters, paper)
    assert context.last_parms_id() == sealio.parms_id_words(parameters.parms_id(1, paper))
    with pytest.raises(PlanError, match="exceeds the whole modulus chain"):
        sealio.lowest_level(chain(4096, 1), paper)


def test_a_secret_key_of_bfv_is_no_secret_key_of_ckks(upload: Upload) -> None:
    secret, parameters = upload.holder.secret_bytes(), upload.parameters
    renamed = sealio.truncated_secret(secret, parameters, 1, MODULI[0])
    assert sealio.load(seal.SecretKey(), upload.context, renamed) is not None
    with pytest.raises(FormatError):
        sealio.load(seal.SecretKey(), sealio.make_context(parameters), renamed)
    with pytest.raises(FormatError, match="SecretKey"):
        BfvKeyHolder(handmade((6, 3), chain(8192, 2), primes_of(8192, 20, 1)).plan.public, secret)
