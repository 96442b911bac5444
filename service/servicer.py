"""The methods of the service: admission first, then a worker, then the answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from google.rpc import code_pb2

from hemacrypt.plan.batch_plan import BatchPlan
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.plan.plan import Plan
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.sizes import seeded_ciphertext_bytes
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import (
    batch_plan_to_message,
    bfv_plan_to_message,
    digest,
    plan_to_message,
    preprocessing_to_message,
)
from service import errors
from service.catalogue import Model
from service.errors import Refused, answered, refuse, translated
from service.keystore import KeySetInfo, KeyStore, Spool
from service.pool import Job, Outcome, QueueFullError, WorkerLostError, WorkerPool
from service.settings import Settings

log = structlog.get_logger()
Message = TypeVar("Message")

# A request without a deadline is given up after this time; the queue is never that long.
_LONGEST_WAIT_SECONDS = 3600.0
# How often a batch that waits for its turn looks whether its client is still there.
_PATIENCE_SECONDS = 0.5


class InferenceServicer(pb_grpc.EncryptedInferenceServicer):
    """Implements ``hemacrypt.v1.EncryptedInference``.

    Parameters
    ----------
    models:
        What is served, by name.
    store:
        Where evaluation keys are.
    pool:
        Who computes.
    settings:
        Limits of streams.
    batchless:
        Why no batches are taken for a model, by its name; nothing where they are.
    """

    def __init__(
        self,
        models: dict[str, Model],
        store: KeyStore,
        pool: WorkerPool,
        settings: Settings,
        batchless: dict[str, str],
    ) -> None:
        self._models = models
        self._store = store
        self._pool = pool
        self._settings = settings
        self._streams = threading.BoundedSemaphore(settings.streams)
        self._batchless = batchless
        self._batches = threading.BoundedSemaphore(settings.batch_places)

    @answered
    def ListModels(  # noqa: N802 - gRPC's name
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        """List the models that are served."""
        return pb.ListModelsResponse(models=[_summary(model) for model in self._models.values()])

    @answered
    def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        """Return the public half of a model's plan."""
        model = self._model(request.name)
        return pb.GetModelResponse(
            model=_summary(model),
            plans=[plan_to_message(plan.public) for plan in model.plans],
            preprocessing=preprocessing_to_message(model.bundle.manifest.preprocessing),
            largest_key_set=model.largest_key_set,
            largest_ciphertext=model.largest_ciphertext,
            batch=batch_plan_to_message(model.batch.public, model.break_even)
            if model.batch is not None and not self._batchless[model.name]
            else None,
            exact=[bfv_plan_to_message(plan.public) for plan in model.exact],
        )

    @answered
    def RegisterKeys(  # noqa: N802
        self, request_iterator: Iterator[pb.RegisterKeysRequest], context: grpc.ServicerContext
    ) -> pb.RegisterKeysResponse:
        """Receive, check and store a key set."""
        with self._stream_place():
            messages = watched(request_iterator, context, self._settings.stream_idle_seconds)
            return self._register(messages, context)

    def _register(
        self, messages: Iterator[pb.RegisterKeysRequest], context: grpc.ServicerContext
    ) -> pb.RegisterKeysResponse:
        first = next(messages, None)
        if first is None or first.WhichOneof("part") != "header":
            raise errors.invalid("HEADER_EXPECTED", "header", "the first message of an upload must be its header")
        header = first.header
        model = self._model(header.model)
        self._check_plan(model, header.plan_id)
        if not 0 < header.total_bytes <= model.largest_key_set:
            raise errors.invalid(
                "KEYS_TOO_LARGE",
                "total_bytes",
                f"a key set of {header.total_bytes} bytes; the plan allows {model.largest_key_set}",
            )
        if self._store.status(header.key_set_id).ready:
            self._check_keys(header.key_set_id, model)
            return pb.RegisterKeysResponse(key_set_id=header.key_set_id)
        info = KeySetInfo(model.name, model.plans[0].public.requirements_id)
        with self._store.upload(header.key_set_id, info, header.total_bytes, header.offset) as upload:
            for message in messages:
                if message.WhichOneof("part") != "chunk":
                    raise errors.invalid("CHUNK_EXPECTED", "chunk", "after the header only chunks may follow")
                upload.write(message.chunk)
            upload.check_complete()
            job = Job("check_keys", model.name, header.plan_id, header.key_set_id, upload.path)
            try:
                self._outcome(self._submit(job), context)
            except Refused as refusal:
                if refusal.reason == "KEYS_INVALID":
                    self._store.discard(header.key_set_id)
                raise
            upload.commit()
        return pb.RegisterKeysResponse(key_set_id=header.key_set_id)

    @answered
    def GetKeySet(  # noqa: N802
        self, request: pb.GetKeySetRequest, context: grpc.ServicerContext
    ) -> pb.GetKeySetResponse:
        """Tell how much of a key set is here."""
        status = self._store.status(request.key_set_id)
        state = pb.KEY_SET_STATE_ABSENT
        if status.ready:
            state = pb.KEY_SET_STATE_READY
        elif status.received:
            state = pb.KEY_SET_STATE_PARTIAL
        return pb.GetKeySetResponse(state=state, received_bytes=status.received, model=status.model)

    @answered
    def DeleteKeySet(  # noqa: N802
        self, request: pb.DeleteKeySetRequest, context: grpc.ServicerContext
    ) -> pb.DeleteKeySetResponse:
        """Delete a key set from disk and from the workers' memory."""
        existed = self._store.delete(request.key_set_id)
        if existed:
            self._pool.forget(request.key_set_id)
        return pb.DeleteKeySetResponse(existed=existed)

    @answered
    def Predict(self, request: pb.PredictRequest, context: grpc.ServicerContext) -> pb.PredictResponse:  # noqa: N802
        """Evaluate a model on one encrypted image."""
        future = self._admit(request)
        # A client that hangs up gives its place in the queue to the next.
        context.add_callback(lambda: _give_up(future))
        return _prediction(self._outcome(future, context))

    def PredictStream(  # noqa: N802
        self, request_iterator: Iterator[pb.PredictRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictStreamResponse]:
        """Evaluate a model on many encrypted images; each answer goes out as soon as it and all before it are there."""
        try:
            place = self._stream_place()
        except Refused as refusal:
            refuse(context, refusal)
        with place:
            # As many requests are read ahead as there are workers, so that all of them have work.
            entries: queue.Queue[Future[Outcome] | Refused | None] = queue.Queue(self._pool.workers + 1)
            context.add_callback(lambda: _drain(entries))
            reader = threading.Thread(target=self._read_stream, args=(request_iterator, context, entries), daemon=True)
            reader.start()
            index = 0
            while (entry := entries.get()) is not None:
                yield self._stream_reply(index, entry, context)
                index += 1

    def _read_stream(
        self,
        requests: Iterator[pb.PredictRequest],
        context: grpc.ServicerContext,
        entries: queue.Queue[Future[Outcome] | Refused | None],
    ) -> None:
        """Admit requests as they come; blocks while the answers are behind, which holds the client back."""
        try:
            for request in watched(requests, context, self._settings.stream_idle_seconds):
                entries.put(self._admit_or_refuse(request, context))
                if not context.is_active():
                    break
        except grpc.RpcError:
            log.info("stream ended by its client")
        finally:
            entries.put(None)

    def PredictBatch(  # noqa: N802
        self, request_iterator: Iterator[pb.PredictBatchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictBatchResponse]:
        """Evaluate a model on a batch of encrypted images; the answers go out when all are there."""
        try:
            with translated("PredictBatch"), self._stream_place():
                messages = watched(request_iterator, context, self._settings.stream_idle_seconds)
                replies = self._batch(messages, context)
        except Refused as refusal:
            refuse(context, refusal)
        yield from replies

    def _batch(
        self, messages: Iterator[pb.PredictBatchRequest], context: grpc.ServicerContext
    ) -> list[pb.PredictBatchResponse]:
        first = next(messages, None)
        if first is None or first.WhichOneof("part") != "header":
            raise errors.invalid("HEADER_EXPECTED", "header", "the first message of a batch must be its header")
        header = first.header
        model = self._model(header.model)
        plan = self._batch_plan(model, header.plan_id)
        keys = self._check_keys(header.key_set_id, model)
        public = plan.public
        # A little more than the estimate, so that a full store shows before everything has been sent.
        expected = public.inputs * seeded_ciphertext_bytes(public.parameters, public.input_level) * 51 // 50
        with self._store.spool(expected) as spool:
            # A client that hangs up has its batch dropped, which also stops the worker that reads it.
            context.add_callback(spool.drop)
            self._receive_batch(messages, plan, spool)
            waiting = time.perf_counter()
            self._take_batch_place(context)
            job = Job("batch", model.name, header.plan_id, header.key_set_id, keys, spool=spool.path)
            try:
                future = self._submit(job, _remaining(context))
            except BaseException:
                self._batches.release()
                raise
            # The place is free when the worker is, which may be later than this call.
            future.add_done_callback(lambda _: self._batches.release())
            context.add_callback(lambda: _give_up(future))
            waited = int((time.perf_counter() - waiting) * 1e6)
            outcome = self._outcome(future, context)
        timing = pb.Timing(queue_us=waited + outcome.queue_us, compute_us=outcome.header["compute_us"])
        log.info("answered a batch", model=model.name, queue_us=timing.queue_us, compute_us=timing.compute_us)
        return [
            pb.PredictBatchResponse(
                index=index, ciphertext=ciphertext, ciphertext_sha256=digest([ciphertext]), timing=timing
            )
            for index, ciphertext in enumerate(outcome.ciphertexts)
        ]

    def _batch_plan(self, model: Model, plan_id: str) -> BatchPlan:
        """Return the batch plan of a model, if batches are taken for it and the client follows it."""
        why = self._batchless[model.name]
        if model.batch is None or why:
            raise errors.outdated(
                "BATCHES_NOT_SERVED",
                model.name,
                f"this service takes no batches for {model.name} ({why}); send the images one by one",
            )
        if model.batch.public.plan_id != plan_id:
            raise self._plan_changed(model)
        return model.batch

    @staticmethod
    def _receive_batch(messages: Iterator[pb.PredictBatchRequest], plan: BatchPlan, spool: Spool) -> None:
        """Write the ciphertexts of a batch to disk, one by one; their content is checked by the worker."""
        public, count = plan.public, 0
        largest = sealformat.largest_ciphertext(public.parameters, public.input_level)
        for message in messages:
            if message.WhichOneof("part") != "ciphertext":
                raise errors.invalid("CIPHERTEXT_EXPECTED", "part", "after the header only ciphertexts may follow")
            content = message.ciphertext.content
            if count == public.inputs:
                raise _wrong_number("more", public.inputs)
            if not 0 < len(content) <= largest:
                raise errors.invalid(
                    "CIPHERTEXT_INVALID",
                    "ciphertexts",
                    f"number {count} has {len(content)} bytes; expected 1 to {largest}: one ciphertext",
                )
            if digest([content]) != message.ciphertext.sha256:
                raise errors.invalid(
                    "DIGEST_MISMATCH",
                    "sha256",
                    f"ciphertext {count} does not hash to the digest sent with it; it was damaged on the way: "
                    "send the batch again",
                )
            spool.write(content)
            count += 1
        if count < public.inputs:
            raise _wrong_number(str(count), public.inputs)

    def _take_batch_place(self, context: grpc.ServicerContext) -> None:
        """Wait until another batch may be evaluated, no longer than the client does."""
        end = time.monotonic() + _remaining(context)
        while not self._batches.acquire(timeout=_PATIENCE_SECONDS):
            if not context.is_active():
                raise Refused(code_pb2.CANCELLED, "CANCELLED", "the client gave the request up")
            if time.monotonic() > end:
                raise Refused(
                    code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed while other batches ran"
                )

    def _stream_place(self) -> AbstractContextManager[None]:
        """Take one of the places for streams, to be given back at the end of a ``with``."""
        if not self._streams.acquire(blocking=False):
            raise errors.busy(
                code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", "too many streams are open; try again later", 5.0
            )

        @contextmanager
        def holding() -> Iterator[None]:
            try:
                yield
            finally:
                self._streams.release()

        return holding()

    def _admit_or_refuse(self, request: pb.PredictRequest, context: grpc.ServicerContext) -> Future[Outcome] | Refused:
        try:
            with translated("PredictStream"):
                # A stream holds its client back by itself, so a full queue makes it wait instead of refusing.
                return self._admit(request, wait_seconds=_remaining(context))
        except Refused as refusal:
            return refusal

    def _stream_reply(
        self, index: int, entry: Future[Outcome] | Refused, context: grpc.ServicerContext
    ) -> pb.PredictStreamResponse:
        try:
            with translated("PredictStream"):
                if isinstance(entry, Refused):
                    raise entry
                return pb.PredictStreamResponse(index=index, prediction=_prediction(self._outcome(entry, context)))
        except Refused as refusal:
            told = pb.Refusal(code=refusal.code, reason=refusal.reason, message=refusal.message)
            return pb.PredictStreamResponse(index=index, refusal=told)

    def _admit(self, request: pb.PredictRequest, wait_seconds: float = 0.0) -> Future[Outcome]:
        """Check everything that can be checked without parsing the ciphertext, then queue it."""
        model = self._model(request.model)
        expected = self._check_plan(model, request.plan_id).public.input_ciphertexts
        if len(request.ciphertexts) != expected:
            raise errors.invalid(
                "CIPHERTEXT_INVALID",
                "ciphertexts",
                f"{len(request.ciphertexts)} ciphertexts; the plan lays its input over {expected}",
            )
        for ciphertext in request.ciphertexts:
            if not 0 < len(ciphertext) <= model.largest_ciphertext:
                raise errors.invalid(
                    "CIPHERTEXT_INVALID",
                    "ciphertexts",
                    f"{len(ciphertext)} bytes; expected 1 to {model.largest_ciphertext}: one ciphertext",
                )
        if digest(request.ciphertexts) != request.ciphertext_sha256:
            raise errors.invalid(
                "DIGEST_MISMATCH",
                "ciphertext_sha256",
                "the ciphertext does not hash to the digest sent with it; it was damaged on the way: send it again",
            )
        path = self._check_keys(request.key_set_id, model)
        ciphertexts = tuple(request.ciphertexts)
        return self._submit(
            Job("predict", model.name, request.plan_id, request.key_set_id, path, ciphertexts), wait_seconds
        )

    def _check_keys(self, key_set_id: str, model: Model) -> Path:
        """Return the file of a key set that serves a model."""
        path, info = self._store.path_of(key_set_id)
        if info.requirements_id != model.plans[0].public.requirements_id:
            raise errors.outdated(
                "KEYS_FOR_OTHER_PARAMETERS",
                key_set_id,
                f"the key set was made for other parameters (model {info.model}); generate keys for {model.name}",
            )
        return path

    def _model(self, name: str) -> Model:
        model = self._models.get(name)
        if model is None:
            served = ", ".join(self._models)
            raise errors.missing(
                "MODEL_NOT_FOUND", "hemacrypt.v1.Model", name[:64], f"no such model; this service has: {served}"
            )
        return model

    @classmethod
    def _check_plan(cls, model: Model, plan_id: str) -> Plan | BfvPlan:
        plan = model.plan(plan_id)
        if plan is None:
            raise cls._plan_changed(model)
        return plan

    @staticmethod
    def _plan_changed(model: Model) -> Refused:
        return errors.outdated(
            "PLAN_CHANGED",
            model.name,
            f"the request follows another plan of {model.name} than the service; "
            "call GetModel again and generate keys for its plan",
        )

    def _submit(self, job: Job, wait_seconds: float = 0.0) -> Future[Outcome]:
        try:
            return self._pool.submit(job, wait_seconds)
        except QueueFullError:
            raise errors.busy(
                code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", "too many requests wait for a worker; try again", 1.0
            ) from None

    def _outcome(self, future: Future[Outcome], context: grpc.ServicerContext) -> Outcome:
        """Wait for a worker's answer, no longer than the client's deadline."""
        try:
            outcome = future.result(_remaining(context))
        except TimeoutError:
            future.cancel()
            raise Refused(
                code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed before the answer was ready"
            ) from None
        except CancelledError:
            raise Refused(code_pb2.CANCELLED, "CANCELLED", "the client gave the request up") from None
        except WorkerLostError:
            raise errors.busy(
                code_pb2.UNAVAILABLE, "WORKER_LOST", "the worker that had this request ended; try again", 2.0
            ) from None
        header = outcome.header
        if header["ok"]:
            return outcome
        kind = header["refusal"]
        if kind == "ciphertext":
            raise errors.invalid("CIPHERTEXT_INVALID", header["field"], header["message"])
        if kind == "keys":
            raise errors.invalid("KEYS_INVALID", header["field"], header["message"])
        if kind == "given up":
            raise Refused(code_pb2.CANCELLED, "CANCELLED", "the client gave the request up")
        if kind == "engine":
            raise EngineFailedError(header["error"])
        self._store.delete_if_damaged(outcome.job.key_set_id)
        raise errors.missing(
            "KEY_SET_NOT_FOUND",
            "hemacrypt.v1.KeySet",
            outcome.job.key_set_id,
            "the key set was deleted or damaged on the service's disk; register it again",
        )


def _wrong_number(came: str, expected: int) -> Refused:
    return errors.invalid(
        "CIPHERTEXT_INVALID",
        "ciphertexts",
        f"{came} came; the batch plan has {expected} inputs, in one ciphertext each",
    )


def _give_up(future: Future[Outcome]) -> None:
    future.cancel()


class EngineFailedError(Exception):
    """The engine gave up on a ciphertext and keys that had passed every check."""


def _drain(entries: queue.Queue[Future[Outcome] | Refused | None]) -> None:
    """Give up everything that waits for an answer nobody will read, and make room for the reader's last word."""
    while True:
        try:
            entry = entries.get_nowait()
        except queue.Empty:
            return
        if isinstance(entry, Future):
            entry.cancel()
        elif entry is None:
            entries.put(None)
            return


def watched(messages: Iterator[Message], context: grpc.ServicerContext, seconds: float) -> Iterator[Message]:
    """Pass messages on; cancel the call when the client is silent for too long before the next one."""
    while True:
        timer = threading.Timer(seconds, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            message = next(messages)
        except StopIteration:
            return
        finally:
            timer.cancel()
        yield message


def _remaining(context: grpc.ServicerContext) -> float:
    """Return the seconds until the client's deadline."""
    # Without a deadline gRPC says None, or a number of seconds that no clock can hold.
    remaining = context.time_remaining()
    return _LONGEST_WAIT_SECONDS if remaining is None else min(max(remaining, 0.0), _LONGEST_WAIT_SECONDS)


def _summary(model: Model) -> pb.ModelSummary:
    manifest: Any = model.bundle.manifest
    return pb.ModelSummary(name=model.name, description=manifest.description, plan_id=model.plans[0].public.plan_id)


def _prediction(outcome: Outcome) -> pb.PredictResponse:
    timing = pb.Timing(queue_us=outcome.queue_us, compute_us=outcome.header["compute_us"])
    log.info("answered", model=outcome.job.model, queue_us=timing.queue_us, compute_us=timing.compute_us)
    return pb.PredictResponse(
        ciphertexts=outcome.ciphertexts, timing=timing, ciphertext_sha256=digest(outcome.ciphertexts)
    )
