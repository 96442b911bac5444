"""A network with everything that an encrypted evaluation of it needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from client_sdk._crypto import KeyHolder
from hemacrypt import sealformat, sealio
from hemacrypt.engines.seal import SealEngine, SealKeys
from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.network import CollapsedNetwork
from hemacrypt.plan import Plan
from hemacrypt.planner import plan_network


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
    def of(cls, network: CollapsedNetwork) -> Setup:
        """Plan a network, make an engine and a hospital's keys."""
        plan = plan_network(network)
        engine, holder = SealEngine(plan), KeyHolder(plan.public)
        keys = holder.evaluation_keys()
        return cls(network, plan, engine, holder, keys, engine.load_keys(keys), sealio.seal_minor_version())

    def predict(self, image: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the logits of one image by the encrypted path."""
        return self.holder.decrypt(self.engine.evaluate(self.holder.encrypt(image), self.keys))

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
