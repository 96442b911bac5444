"""Fixtures of the client's tests: a small model, and a service of which every answer can be falsified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from client_sdk import Client
from hemacrypt.engines.base import BaseEngine
from hemacrypt.engines.seal.bfv import BfvSealEngine
from hemacrypt.engines.seal.ckks import SealEngine, SealKeys
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Dense
from hemacrypt.model.preprocess import Pixels, Preprocessing
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.plan.plan import Plan, PublicPlan
from hemacrypt.planner import plan_bundle
from hemacrypt.seal.evaluation_keys import EvaluationKeys, key_set_id
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import bfv_plan_to_message, digest, plan_to_message, preprocessing_to_message


@dataclass(frozen=True)
class Small:
    """A logistic regression on 4x4 pixels with two logits: degree 4096, keys within a tenth of a second."""

    bundle: Bundle
    plans: tuple[Plan, ...]
    exact: tuple[BfvPlan, ...] = ()

    @property
    def plan(self) -> PublicPlan:
        return self.plans[0].public

    @cached_property
    def engines(self) -> dict[str, BaseEngine[Any, SealKeys]]:
        approximate = {plan.public.plan_id: SealEngine(plan) for plan in self.plans}
        return approximate | {plan.public.plan_id: BfvSealEngine(plan) for plan in self.exact}

    @property
    def engine(self) -> BaseEngine[Any, SealKeys]:
        """The engine of the plan for one image."""
        return self.engines[self.plan.plan_id]

    def message(self) -> pb.GetModelResponse:
        """Return what an honest service says about the model."""
        return pb.GetModelResponse(
            model=pb.ModelSummary(name="small", description="a test", plan_id=self.plan.plan_id),
            plans=[plan_to_message(plan.public) for plan in self.plans],
            preprocessing=preprocessing_to_message(self.bundle.manifest.preprocessing),
            largest_key_set=1 << 30,
            largest_ciphertext=1 << 20,
            exact=[bfv_plan_to_message(plan.public) for plan in self.exact],
        )


def make_small(labels: tuple[str, str] = ("no", "yes"), scale: float = 1 / 255) -> Small:
    """Make the small model with other labels or another preprocessing factor."""
    random = np.random.default_rng(5)
    network = CollapsedNetwork((3, 4, 4), (Dense(random.normal(size=(2, 48)) / 7, random.normal(size=2)),))
    preprocessing = Preprocessing(image_size=8, crop=8, block=2, scale=scale)
    bundle = Bundle.create(network, name="small", labels=labels, preprocessing=preprocessing)
    return Small(bundle, plan_bundle(bundle))


@pytest.fixture(scope="session")
def small() -> Small:
    return make_small()


@pytest.fixture(scope="session")
def pixels() -> Pixels:
    return np.random.default_rng(6).integers(0, 256, (4, 4, 3), dtype=np.uint8)


class Impostor(pb_grpc.EncryptedInferenceServicer):
    """A service that computes honestly, but whose last word on everything can be changed.

    ``tamper`` gets the name of the method, the honest answer and the gRPC context, and returns what is sent.
    """

    def __init__(self, small: Small) -> None:
        self.small = small
        self.keys: dict[str, Any] = {}
        self.calls: list[str] = []
        self.tamper: Callable[[str, Any, grpc.ServicerContext], Any] = lambda method, answer, context: answer

    def _answer(self, method: str, answer: Any, context: grpc.ServicerContext) -> Any:
        self.calls.append(method)
        return self.tamper(method, answer, context)

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self._answer("ListModels", pb.ListModelsResponse(models=[self.small.message().model]), context)

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self._answer("GetModel", self.small.message(), context)

    def GetKeySet(self, request: pb.GetKeySetRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        known = request.key_set_id in self.keys
        state = pb.KEY_SET_STATE_READY if known else pb.KEY_SET_STATE_ABSENT
        return self._answer("GetKeySet", pb.GetKeySetResponse(state=state), context)

    def RegisterKeys(  # noqa: N802
        self, request_iterator: Iterator[pb.RegisterKeysRequest], context: grpc.ServicerContext
    ) -> Any:
        blob = b"".join(message.chunk for message in request_iterator)
        self.keys[key_set_id(blob)] = self.small.engine.load_keys(EvaluationKeys.from_bytes(blob))
        return self._answer("RegisterKeys", pb.RegisterKeysResponse(key_set_id=key_set_id(blob)), context)

    def evaluate(self, request: pb.PredictRequest) -> pb.PredictResponse:
        engine = self.small.engines[request.plan_id]
        reply = engine.evaluate(request.ciphertexts, self.keys[request.key_set_id])
        return pb.PredictResponse(ciphertexts=reply, ciphertext_sha256=digest(reply))

    def Predict(self, request: pb.PredictRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self._answer("Predict", self.evaluate(request), context)

    def PredictStream(  # noqa: N802
        self, request_iterator: Iterator[pb.PredictRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictStreamResponse]:
        honest = [
            pb.PredictStreamResponse(index=index, prediction=self.evaluate(request))
            for index, request in enumerate(request_iterator)
        ]
        yield from self._answer("PredictStream", honest, context)


@contextmanager
def serving(impostor: Impostor) -> Iterator[str]:
    """Serve an impostor on a free port of this machine; yield the address."""
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        pb_grpc.add_EncryptedInferenceServicer_to_server(impostor, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@dataclass(frozen=True)
class Met:
    """An impostor and a client that has registered its keys there."""

    impostor: Impostor
    client: Client
    address: str


@pytest.fixture
def met(small: Small, tmp_path: Path) -> Iterator[Met]:
    impostor = Impostor(small)
    with serving(impostor) as address, Client(address, "small", key_directory=tmp_path / "keys") as client:
        client.prepare()
        impostor.calls.clear()
        yield Met(impostor, client, address)
