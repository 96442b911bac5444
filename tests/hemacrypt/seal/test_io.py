"""SEAL objects in memory, and contexts that SEAL and we agree on."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal

from client_sdk._crypto import KeyHolder
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.plan.plan import Turn
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from tests.hemacrypt.setups import Setup


@pytest.mark.parametrize("in_memory", [True, False])
def test_objects_survive_without_leaving_a_file(
    regression: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_memory: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create")
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    context = sealio.make_context(regression.plan.parameters)
    plain = seal.Plaintext()
    seal.CKKSEncoder(context).encode([1.5, -2.0], 2.0**20, plain)
    content = sealio.dump(plain)
    assert sealio.dump(sealio.load(seal.Plaintext(), context, content)) == content
    with pytest.raises(FormatError):
        sealio.load(seal.Plaintext(), context, content[:-1])
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_the_minor_version_is_the_one_in_every_header(regression: Setup) -> None:
    (written,) = regression.holder.encrypt([0.5] * 16)
    assert sealformat.HEADER.unpack(written[:16])[3] == sealio.seal_minor_version() == regression.minor


def test_parms_ids_are_taken_as_little_endian_words() -> None:
    assert sealio.parms_id_words(bytes(range(32)))[:2] == [0x0706050403020100, 0x0F0E0D0C0B0A0908]


def test_a_seal_that_names_levels_otherwise_is_refused(regression: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = regression.plan.parameters
    real = type(parameters).parms_id
    monkeypatch.setattr(
        type(parameters),
        "parms_id",
        lambda self, level=None, plain=0: bytes(32) if level == 0 else real(self, level, plain),
    )
    with pytest.raises(PlanError, match="other parameter identifiers"):
        sealio.make_context(parameters)


# Secret keys for shorter chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_truncated_secret_is_the_same_secret_for_the_shorter_chain(one_square: Setup, level: int) -> None:
    """What the whole key encrypted at a level, the cut one decrypts, and keys made with the cut one switch rightly."""
    parameters, secret = one_square.plan.parameters, one_square.holder.secret_bytes()
    cut = parameters.truncated(level)
    whole, short = sealio.make_context(parameters), sealio.make_context(cut)
    shorter = sealio.load(seal.SecretKey(), short, sealio.truncated_secret(secret, parameters, level))
    encoder, plain = seal.CKKSEncoder(whole), seal.Plaintext()
    values = np.random.default_rng(level).normal(size=4096) + 1j * np.random.default_rng(9).normal(size=4096)
    scale = 2.0**24
    encoder.encode(values.tolist(), sealio.parms_id_words(parameters.parms_id(level)), scale, plain)
    encryptor = seal.Encryptor(whole, sealio.load(seal.SecretKey(), whole, secret))
    written = sealio.dump(encryptor.encrypt_symmetric(plain))
    moved = sealformat.check_ciphertext(written, cut, level, scale, one_square.minor)
    value = sealio.load(seal.Ciphertext(), short, moved)
    decryptor, evaluator = seal.Decryptor(short, shorter), seal.Evaluator(short)

    def decrypted(ciphertext: sealio.SealObject) -> npt.NDArray[np.complex128]:
        decryptor.decrypt(ciphertext, plain)
        return np.array(seal.CKKSEncoder(short).decode_complex(plain))

    np.testing.assert_allclose(decrypted(value), values, rtol=0, atol=2.0**-10)
    generator, galois, turned = seal.KeyGenerator(short, shorter), seal.GaloisKeys(), seal.Ciphertext()
    for turn in (Turn(5), Turn(0, True), Turn(4095, True)):
        element = cut.galois_element(*turn)
        generator.create_galois_keys([element], galois)
        evaluator.apply_galois(value, element, galois, turned)
        error = np.abs(decrypted(turned) - turn(values))
        # Some 2^13.7 of noise at this scale, far more in the few slots whose root lies near 1.
        assert np.median(error) < 2.0 ** (16 - 24)
    if level:
        relinearisation = seal.RelinKeys()
        generator.create_relin_keys(relinearisation)
        evaluator.square_inplace(value)
        evaluator.relinearize_inplace(value, relinearisation)
        assert np.median(np.abs(decrypted(value) - values**2)) < 2.0 ** (16 - 24)


def test_the_whole_chain_is_no_truncation(one_square: Setup) -> None:
    parameters, secret = one_square.plan.parameters, one_square.holder.secret_bytes()
    context = sealio.make_context(parameters)
    again = sealio.truncated_secret(secret, parameters, parameters.top_level)
    assert sealio.dump(sealio.load(seal.SecretKey(), context, again)) == secret


def test_a_secret_for_other_parameters_is_refused(one_square: Setup, regression: Setup, cell: Setup) -> None:
    with pytest.raises(FormatError, match="it is for other parameters"):
        sealio.truncated_secret(regression.holder.secret_bytes(), one_square.plan.parameters, 1)
    with pytest.raises(FormatError, match=r"bytes expected|other parameters"):
        sealio.truncated_secret(one_square.holder.secret_bytes(), regression.plan.parameters, 1)
    with pytest.raises(FormatError, match=r"bytes expected|other parameters"):
        sealio.truncated_secret(cell.holder.secret_bytes(), one_square.plan.parameters, 1)
    with pytest.raises(FormatError):
        KeyHolder(one_square.plan.public, regression.holder.secret_bytes())


def test_a_secret_for_another_chain_of_the_same_shape_is_refused(one_square: Setup) -> None:
    parameters, secret = one_square.plan.parameters, one_square.holder.secret_bytes()
    other = replace(parameters, data_primes=parameters.data_primes[::-1])
    with pytest.raises(FormatError, match="other parameters"):
        sealio.truncated_secret(secret, other, 1)


@pytest.mark.parametrize("length", [0, 15, 16, 100, -1])
def test_a_damaged_secret_is_refused(one_square: Setup, length: int) -> None:
    with pytest.raises(FormatError, match="secret key"):
        sealio.truncated_secret(one_square.holder.secret_bytes()[:length], one_square.plan.parameters, 1)
