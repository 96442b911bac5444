"""A network with everything that an encrypted evaluation of it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from client_sdk._crypto import KeyHolder
from hemacrypt.engines.seal.ckks import SealEngine, SealKeys
from hemacrypt.engines.vector.ckks import VectorEngine, VectorKeys
from hemacrypt.model.network import CollapsedNetwork
from hemacrypt.plan.plan import Plan
from hemacrypt.planner import plan_network
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys


@dataclass(frozen=True)
class Setup:
    """A network with everything needed to evaluate it under encryption."""

    network: CollapsedNetwork
    plan: Plan
    engine: SealEngine
    holder: KeyHolder
    evaluation_keys: EvaluationKeys
    keys: SealKeys
    minor: int

    @classmethod
    def of(cls, network: CollapsedNetwork, **options: Any) -> Setup:
        """Plan a network with options of `plan_network`, make an engine and a hospital's keys."""
        plan = plan_network(network, **options)
        engine, holder = SealEngine(plan), KeyHolder(plan.public)
        keys = holder.evaluation_keys()
        return cls(network, plan, engine, holder, keys, engine.load_keys(keys), sealio.seal_minor_version())

    @cached_property
    def vector(self) -> VectorEngine:
        """The fast engine, one thread."""
        return VectorEngine(self.plan)

    @cached_property
    def vector_keys(self) -> VectorKeys:
        """The same keys in the fast engine's form."""
        return self.vector.load_keys(self.evaluation_keys)

    def images(self, seed: int) -> npt.NDArray[np.float64]:
        """Return random images for one request, shape (images, channels, height, width)."""
        return np.random.default_rng(seed).random((self.plan.public.images, *self.network.input_shape))

    def predict(self, images: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the logits of the images of one request by the encrypted path, shape (images, logits)."""
        return self.holder.decrypt(self.reply(images))

    def reply(self, images: npt.ArrayLike) -> list[bytes]:
        """Encrypt and evaluate the images of one request."""
        return self.engine.evaluate(self.holder.encrypt(images), self.keys)

    def slots(self, replies: Sequence[bytes]) -> npt.NDArray[np.complex128]:
        """Decrypt a reply down to its slots, shape (ciphertexts, slots)."""
        public = self.plan.public
        context = sealio.make_context(public.parameters)
        decryptor = seal.Decryptor(context, sealio.load(seal.SecretKey(), context, self.holder.secret_bytes()))
        rows = []
        for reply in replies:
            checked = sealformat.check_ciphertext(reply, public.parameters, 0, public.output_scale, self.minor)
            plain = seal.Plaintext()
            decryptor.decrypt(sealio.load(seal.Ciphertext(), context, checked), plain)
            rows.append(seal.CKKSEncoder(context).decode_complex(plain))
        return np.array(rows)

    def checked(self, upload: bytes) -> bytes:
        """Return an upload as the stream that SEAL may load."""
        parameters = self.plan.parameters
        return sealformat.check_ciphertext(
            upload, parameters, parameters.top_level, self.plan.public.input_scale, self.minor
        )

    def full(self, upload: bytes) -> bytes:
        """Expand a seeded ciphertext into one with both polynomials, as SEAL writes it."""
        context = sealio.make_context(self.plan.parameters)
        return sealio.dump(sealio.load(seal.Ciphertext(), context, self.checked(upload)))
