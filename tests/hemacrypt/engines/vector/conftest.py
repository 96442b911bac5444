"""SEAL beside our kernels: one small ring, SEAL's objects for it, and the way between the two."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal

from hemacrypt.engines.vector.primitives import Evaluator, switching_key
from hemacrypt.engines.vector.ring import Ring
from hemacrypt.plan.plan import Parameters
from hemacrypt.planner.chain import choose_parameters
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio

Residues = npt.NDArray[np.uint32]
STEPS = (1, 5, 2047)
SCALE = 2.0**20


@dataclass(frozen=True)
class Beside:
    """SEAL and our evaluator over the same parameters and keys."""

    parameters: Parameters
    evaluator: Evaluator
    context: Any
    seal: Any
    relinearisation: Any
    galois: Any
    our_relinearisation: Residues
    our_galois: dict[int, Any]

    def to_seal(self, residues: Residues, scale: float = SCALE) -> Any:
        """Hand residues to SEAL as a ciphertext."""
        minor = sealio.seal_minor_version()
        stream = sealformat.ciphertext_stream(residues, self.parameters, scale, minor)
        return sealio.load(seal.Ciphertext(), self.context, stream)

    def from_seal(self, ciphertext: Any) -> Residues:
        """Read a ciphertext of any size out of SEAL's serialisation."""
        body = sealformat.unwrap(sealio.dump(ciphertext), 1 << 26, "ciphertext")
        size, degree, primes = struct.unpack("<3Q", body[33:57])
        words = np.frombuffer(body[97:], dtype="<u8")
        return words.reshape(size, primes, degree).astype(np.uint32)

    def random(self, rng: np.random.Generator, level: int, kind: str = "uniform") -> Residues:
        """Make the residues of a ciphertext: uniform, as large as can be, or sparse."""
        primes = np.array(self.parameters.data_primes[: level + 1], dtype=np.uint64)[None, :, None]
        shape = (2, level + 1, self.parameters.degree)
        if kind == "largest":
            return np.broadcast_to(primes - 1, shape).astype(np.uint32)
        values = rng.integers(0, primes, shape, dtype=np.uint64).astype(np.uint32)
        if kind == "sparse":
            values[:, :, 1:] = 0
            values[:, :, 0] |= 1
        return values


def beside_of(parameters: Parameters) -> Beside:
    """Make SEAL's objects and ours for the same parameters and keys."""
    context = sealio.make_context(parameters)
    generator = seal.KeyGenerator(context)
    conjugation = 2 * parameters.degree - 1
    elements = {step: parameters.galois_element(step) for step in STEPS} | {0: conjugation}
    relinearisation, galois = seal.RelinKeys(), seal.GaloisKeys()
    seeded = (
        sealio.dump(generator.create_relin_keys()),
        sealio.dump(generator.create_galois_keys(list(elements.values()))),
    )
    minor = sealio.seal_minor_version()
    evaluator = Evaluator(Ring(parameters))
    checked = sealformat.check_galois_keys(seeded[1], parameters, elements.values(), minor)
    sealio.load(galois, context, checked)
    sealio.load(relinearisation, context, sealformat.check_relinearisation_key(seeded[0], parameters, minor))
    found = sealformat.read_galois_keys(seeded[1], parameters, elements.values())
    return Beside(
        parameters=parameters,
        evaluator=evaluator,
        context=context,
        seal=seal.Evaluator(context),
        relinearisation=relinearisation,
        galois=galois,
        our_relinearisation=switching_key(evaluator.ring, sealformat.read_relinearisation_key(seeded[0], parameters)),
        our_galois={step: evaluator.rotation_key(found[element], element) for step, element in elements.items()},
    )


@pytest.fixture(scope="session")
def beside() -> Beside:
    # Four data primes and degree 8192 show everything that six do, in a third of the time.
    return beside_of(choose_parameters(8192, 1))


@pytest.fixture(scope="session", params=[0, 1, 2, 3])
def truncated(request: pytest.FixtureRequest) -> Beside:
    """Return the same for the shorter chains that the keys of each level are made for."""
    return beside_of(choose_parameters(8192, 1).truncated(request.param))
