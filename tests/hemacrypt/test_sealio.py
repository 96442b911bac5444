"""SEAL objects in memory, and contexts that SEAL and we agree on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import tenseal.sealapi as seal

from hemacrypt import sealformat, sealio
from hemacrypt.errors import FormatError, PlanError
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
    written = regression.holder.encrypt([0.5] * 16)
    assert sealformat.HEADER.unpack(written[:16])[3] == sealio.seal_minor_version() == regression.minor


def test_parms_ids_are_taken_as_little_endian_words() -> None:
    assert sealio.parms_id_words(bytes(range(32)))[:2] == [0x0706050403020100, 0x0F0E0D0C0B0A0908]


def test_a_seal_that_names_levels_otherwise_is_refused(regression: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = regression.plan.parameters
    real = type(parameters).parms_id
    monkeypatch.setattr(
        type(parameters), "parms_id", lambda self, level=None: bytes(32) if level == 0 else real(self, level)
    )
    with pytest.raises(PlanError, match="other parameter identifiers"):
        sealio.make_context(parameters)
