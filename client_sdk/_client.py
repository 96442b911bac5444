"""The client: one object for everything a hospital does with one model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import platformdirs
import tenacity

from client_sdk._crypto import BatchKeyHolder, BfvKeyHolder, KeyHolder
from client_sdk._exceptions import ClientError, ReplyError, RequestRefusedError, ServiceUnavailableError
from client_sdk._keys import KeyDirectory
from client_sdk._results import Bytes, Milliseconds, ModelInfo, Prediction, Scheme
from client_sdk._transport import open_channel, printable, refused, statuses_as_exceptions
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.model.network import Array
from hemacrypt.model.preprocess import AnyPreprocessing
from hemacrypt.plan.batch_plan import PublicBatchPlan
from hemacrypt.plan.bfv_plan import PublicBfvPlan
from hemacrypt.plan.plan import PublicPlan
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import (
    batch_plan_from_message,
    bfv_plan_from_message,
    digest,
    plan_from_message,
    preprocessing_from_message,
)

# A file; or pixels of a cell; or numbers, where the model declares that it reads them as they are.
Image = Path | str | npt.NDArray[Any]
Layout = Literal["single", "batch"]
Progress = Callable[[int, int], None]
# What `Predict` takes a request for.
_AnyPlan = PublicPlan | PublicBfvPlan

_CHUNK = 512 * 1024
# For one image and for two; more would be of no use to this client.
_MOST_PLANS = 8
# A batch is hundreds of megabytes up and minutes of work; a longer timeout of the client counts.
_BATCH_SECONDS = 3600.0
# What a service says when a client that catches up may try again.
_BEHIND = ("KEY_SET_NOT_FOUND", "PLAN_CHANGED")


def default_key_directory(model: str) -> Path:
    """Return where keys are kept when no directory is named."""
    return platformdirs.user_data_path("hemacrypt") / "keys" / model


class Client:
    """Asks one service about one model.

    Parameters
    ----------
    target:
        ``host:port`` of the service.
    model:
        Name of the model.
    key_directory:
        Where the keys are or will be; by default in the user's data directory.
    root_certificate:
        PEM file for TLS; without it the channel itself is not encrypted.
    timeout:
        Seconds that one call may take.

    Raises
    ------
    ServiceUnavailableError, RequestRefusedError
        By every method that speaks with the service.
    """

    def __init__(
        self,
        target: str,
        model: str,
        *,
        key_directory: Path | str | None = None,
        root_certificate: Path | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.target = target
        self.model = model
        self.keys = KeyDirectory(Path(key_directory) if key_directory is not None else default_key_directory(model))
        self._timeout = timeout
        self._channel = open_channel(target, root_certificate)
        self._stub = pb_grpc.EncryptedInferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._opened: KeyHolder | None = None
        self._holders: dict[str, KeyHolder | BfvKeyHolder] = {}
        self._batch_holder: BatchKeyHolder | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel and forget the secret key."""
        self._channel.close()
        self._forget_holders()

    def _forget_holders(self) -> None:
        self._opened = None
        self._holders.clear()
        self._batch_holder = None

    def models(self) -> list[ModelInfo]:
        """List what the service offers."""
        with statuses_as_exceptions(self.target):
            answer = self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout)
        return [ModelInfo(*map(printable, (m.name, m.description, m.plan_id))) for m in answer.models]

    @cached_property
    def _described(self) -> _Described:
        with statuses_as_exceptions(self.target):
            answer = self._stub.GetModel(pb.GetModelRequest(name=self.model), timeout=self._timeout)
        try:
            preprocessing = preprocessing_from_message(answer.preprocessing)
            plans = tuple(plan_from_message(plan, self.model, preprocessing) for plan in answer.plans[:_MOST_PLANS])
            batch = (
                batch_plan_from_message(answer.batch, self.model, preprocessing) if answer.HasField("batch") else None
            )
            exact = tuple(bfv_plan_from_message(plan, self.model, preprocessing) for plan in answer.exact[:_MOST_PLANS])
        except PlanError as error:
            raise ReplyError(f"the plan that {self.target} sent cannot be used: {error}") from error
        if not plans or plans[0].plan_id != answer.model.plan_id or plans[0].images != 1:
            raise ReplyError(f"{self.target} describes another plan than it names; client and service versions differ")
        channels, height, width = preprocessing.input_shape
        requests: tuple[_AnyPlan, ...] = (*plans, *exact)
        sizes = [len(plan.input_layout.positions) for plan in requests] + ([batch.inputs] if batch else [])
        if any(size != channels * height * width for size in sizes):
            raise ReplyError(f"the plan and the preprocessing that {self.target} sent do not fit together")
        every: tuple[_AnyPlan | PublicBatchPlan, ...] = (*requests, batch) if batch else requests
        if any(plan.requirements_id != plans[0].requirements_id or plan.labels != plans[0].labels for plan in every):
            raise ReplyError(f"the plans that {self.target} sent need different keys or name different labels")
        return _Described(plans, preprocessing, batch, answer.batch.break_even or None, exact)

    def refresh(self) -> None:
        """Forget what the service said about the model, so that it is asked again."""
        self.__dict__.pop("_described", None)
        self._forget_holders()

    @property
    def plan(self) -> PublicPlan:
        """The public half of the model's plan for one image."""
        return self._described.plans[0]

    @property
    def pair_plan(self) -> PublicPlan | None:
        """The plan for two images in one request, if the service has one: less work for each than alone."""
        return next((plan for plan in self._described.plans if plan.images == 2), None)

    @property
    def batch_plan(self) -> PublicBatchPlan | None:
        """The plan for thousands of images at once, if the service takes batches."""
        return self._described.batch

    @property
    def exact_plan(self) -> PublicBfvPlan | None:
        """The plan for one image under BFV, if the service evaluates the model exactly."""
        return next((plan for plan in self._described.exact if plan.images == 1), None)

    def _plan_for(self, scheme: Scheme) -> _AnyPlan:
        """Return the plan of a scheme for one image.

        Raises
        ------
        RequestRefusedError
            If the service does not offer the scheme.
        """
        if scheme == "ckks":
            return self.plan
        if scheme != "bfv":
            raise ClientError(f"no scheme is called {scheme!r}; choose 'ckks' or 'bfv'")
        if self.exact_plan is None:
            raise RequestRefusedError(
                "FAILED_PRECONDITION",
                "SCHEME_NOT_SERVED",
                f"{self.target} does not evaluate {self.model} under BFV; use CKKS, or ask its operator, whose log "
                "says why",
            )
        return self.exact_plan

    def layout_for(self, images: int) -> Layout:
        """Say how so many images are better sent, by what the service says of the time that both ways take.

        Returns
        -------
        str
            ``batch`` for `predict_batch`, ``single`` for `predict` and `predict_many`.
        """
        least = self._described.break_even if self.batch_plan else None
        return "batch" if least is not None and images >= least else "single"

    @property
    def preprocessing(self) -> AnyPreprocessing:
        """How an image becomes the model's input."""
        return self._described.preprocessing

    def generate_keys(self, *, replace: bool = False) -> str:
        """Generate a secret key and the evaluation keys of the plan; return the name of the key set.

        Raises
        ------
        KeysMissingError
            If there are keys already and they may not be replaced.
        """
        self._forget_holders()
        self._opened = self.keys.create(self.plan, replace=replace)
        return self.keys.info().key_set_id

    def register(self, progress: Progress | None = None) -> str:
        """Upload the evaluation keys, from where an earlier upload broke off; return the name of the key set.

        Parameters
        ----------
        progress:
            Called with bytes sent and bytes in all.

        Raises
        ------
        KeysMissingError
            If there are no keys for this plan.
        """
        info = self.keys.info_for(self.plan)
        blob = self.keys.evaluation_blob()
        resumable = tenacity.retry_if_exception_type(ServiceUnavailableError) | tenacity.retry_if_exception(
            lambda error: (
                isinstance(error, RequestRefusedError)
                and error.reason in ("OFFSET_MISMATCH", "UPLOAD_IN_PROGRESS", "UPLOAD_INCOMPLETE")
            )
        )
        for attempt in tenacity.Retrying(
            retry=resumable,
            wait=tenacity.wait_random_exponential(0.2, max=5),
            stop=tenacity.stop_after_attempt(6),
            reraise=True,
        ):
            with attempt:
                self._upload(blob, info.key_set_id, progress or (lambda sent, total: None))
        return info.key_set_id

    def _upload(self, blob: bytes, key_set_id: str, progress: Progress) -> None:
        with statuses_as_exceptions(self.target):
            request = pb.GetKeySetRequest(key_set_id=key_set_id)
            status = self._stub.GetKeySet(request, timeout=self._timeout)
            if status.state == pb.KEY_SET_STATE_READY:
                progress(len(blob), len(blob))
                return
            offset = min(status.received_bytes, len(blob))

            def pieces() -> Iterator[pb.RegisterKeysRequest]:
                header = pb.KeySetHeader(
                    model=self.model,
                    plan_id=self.plan.plan_id,
                    key_set_id=key_set_id,
                    total_bytes=len(blob),
                    offset=offset,
                )
                yield pb.RegisterKeysRequest(header=header)
                for start in range(offset, len(blob), _CHUNK):
                    yield pb.RegisterKeysRequest(chunk=blob[start : start + _CHUNK])
                    progress(min(start + _CHUNK, len(blob)), len(blob))

            self._stub.RegisterKeys(pieces(), timeout=max(self._timeout, 600.0))

    def prepare(self, progress: Progress | None = None) -> str:
        """Make sure that there are keys and that the service has them; return the name of the key set."""
        if not self.keys.exists:
            self.generate_keys()
        return self.register(progress)

    def forget(self) -> bool:
        """Delete the evaluation keys from the service; return whether it had any. The local keys stay."""
        request = pb.DeleteKeySetRequest(key_set_id=self.keys.info().key_set_id)
        with statuses_as_exceptions(self.target):
            return bool(self._stub.DeleteKeySet(request, timeout=self._timeout).existed)

    def predict(self, image: Image, *, scheme: Scheme = "ckks") -> Prediction:
        """Encrypt one image, have it evaluated, decrypt the answer.

        Parameters
        ----------
        image:
            A file (PNG, BMP, TIFF), the original pixels, or pixels that are reduced already; uint8.
        scheme:
            ``ckks``, whose logits are off by a bounded error, or ``bfv``: the network with integer weights, exactly.

        Returns
        -------
        Prediction

        Raises
        ------
        ImageError
            If the image is none, or not of the kind that the model reads.
        KeysMissingError
            If there are no keys for this plan.
        RequestRefusedError
            If the service refuses the image, or does not offer the scheme.
        ReplyError
            If the answer is not what it should be.
        """
        plan = self._plan_for(scheme)
        request, encrypt_ms = self._request(plan, [image])
        started = time.perf_counter()
        try:
            answer = self._predict_once(request)
        except RequestRefusedError as refusal:
            if refusal.reason not in _BEHIND:
                raise
            # The service lost the keys, or serves a new version of the model: catch up and try again, once.
            self.refresh()
            self.register()
            plan = self._plan_for(scheme)
            request, encrypt_ms = self._request(plan, [image])
            started = time.perf_counter()
            answer = self._predict_once(request)
        elapsed = (time.perf_counter() - started) * 1e3
        return self._read(plan, [_name(image)], request, encrypt_ms, answer, elapsed)[0]

    def predict_many(self, images: Iterable[Image], *, scheme: Scheme = "ckks") -> Iterator[Prediction]:
        """Predict images over one stream, yielding results in order while later images are still on their way.

        Images of a sequence or an array, which are all there already, go in pairs where the service has a plan for
        that. Those of any other iterable go one by one: none ever waits for a partner.

        Parameters
        ----------
        images, scheme:
            As in `predict`.

        Raises
        ------
        RequestRefusedError
            At the first image that the service refuses; besides what `predict` raises.
        ReplyError
            If the service answers more, fewer or other images than it was asked.
        """
        sent: SimpleQueue[_Sent] = SimpleQueue()
        failed: list[Exception] = []
        self._holder(self._plan_for(scheme))

        def requests() -> Iterator[pb.PredictRequest]:
            try:
                for plan, group in self._grouped(images, scheme):
                    request, encrypt_ms = self._request(plan, group)
                    names = [_name(image) for image in group]
                    sent.put(_Sent(plan, names, request, encrypt_ms, time.perf_counter()))
                    yield request
            except Exception as error:
                # gRPC would swallow it in its own thread; the reader raises it instead.
                failed.append(error)

        with statuses_as_exceptions(self.target):
            for index, answer in enumerate(self._stub.PredictStream(requests(), timeout=None)):
                if sent.empty() or answer.index != index:
                    raise ReplyError(
                        f"{self.target} answered an image that was not asked; the answers cannot be told apart"
                    )
                asked = sent.get()
                elapsed = (time.perf_counter() - asked.started) * 1e3
                if answer.WhichOneof("result") != "prediction":
                    refusal, names = answer.refusal, " and ".join(asked.names)
                    raise refused(refusal.code, refusal.reason, f"{names}: {refusal.message}", {})
                yield from self._read(
                    asked.plan, asked.names, asked.request, asked.encrypt_ms, answer.prediction, elapsed
                )
        if failed:
            raise failed[0]
        if not sent.empty():
            raise ReplyError(f"{self.target} ended the stream with {sent.qsize()} requests unanswered; ask again")

    def predict_batch(self, images: Sequence[Image], progress: Progress | None = None) -> list[Prediction]:
        """Predict many images in batches of up to N / 2: one value in each ciphertext, one image in each slot.

        A batch costs the same however many images it has; `layout_for` says from how many on that pays. Ciphertexts
        are made while others are sent, so few are in memory at a time.

        Parameters
        ----------
        images:
            As in `predict`.
        progress:
            Called with ciphertexts sent and ciphertexts in all. When both are equal, the service has begun to compute.

        Returns
        -------
        list
            One prediction for each image, in order; images of one batch share its times and bytes.

        Raises
        ------
        ImageError
            If an image is none, or not of the kind that the model reads; nothing was sent then.
        KeysMissingError
            If there are no keys for this plan.
        RequestRefusedError
            If the service takes no batches, or refuses this one.
        ReplyError
            If the answer is not what it should be.
        """
        told = progress or (lambda sent, total: None)
        answers: list[Prediction] = []
        values = self._preprocessed(images)
        while len(answers) < len(images):
            try:
                answers += self._next_batch(images, values, len(answers), told)
            except RequestRefusedError as refusal:
                if refusal.reason not in _BEHIND:
                    raise
                # As in `predict`: catch up and try again, once. The service refuses before much has been sent.
                self.refresh()
                self.register()
                values = self._preprocessed(images)
                answers += self._next_batch(images, values, len(answers), told)
        return answers

    def _preprocessed(self, images: Sequence[Image]) -> list[npt.NDArray[np.float32]]:
        return [self.preprocessing(image) for image in images]

    def _next_batch(
        self, images: Sequence[Image], values: list[npt.NDArray[np.float32]], start: int, progress: Progress
    ) -> list[Prediction]:
        """Have the batch evaluated that begins at an image."""
        plan = self.batch_plan
        if plan is None:
            raise RequestRefusedError(
                "FAILED_PRECONDITION",
                "BATCHES_NOT_SERVED",
                f"{self.target} takes no batches for {self.model}; send the images one by one",
            )
        total = plan.inputs * math.ceil(len(images) / plan.images)
        done = plan.inputs * (start // plan.images)
        names = [_name(image) for image in images[start : start + plan.images]]
        batch = np.stack(values[start : start + plan.images])
        return self._batch(plan, batch, names, lambda sent: progress(done + sent, total))

    def _batch(
        self, plan: PublicBatchPlan, values: npt.NDArray[np.float32], names: list[str], told: Callable[[int], None]
    ) -> list[Prediction]:
        """Have one batch evaluated."""
        if self._batch_holder is None or self._batch_holder.plan.plan_id != plan.plan_id:
            self._batch_holder = self._own().serving_batches(plan)
        sent = _SentBatch()
        try:
            ciphertexts = self._batch_holder.encrypt(values)
        except PlanError as error:
            raise ReplyError(f"the plan that {self.target} sent cannot be used: {error}") from error
        header = pb.BatchHeader(model=self.model, plan_id=plan.plan_id, key_set_id=self.keys.info().key_set_id)

        def requests() -> Iterator[pb.PredictBatchRequest]:
            try:
                yield sent.counted(pb.PredictBatchRequest(header=header))
                for number in range(plan.inputs):
                    started = time.perf_counter()
                    content = next(ciphertexts)
                    sent.encrypt_ms += (time.perf_counter() - started) * 1e3
                    message = pb.BatchCiphertext(content=content, sha256=digest([content]))
                    yield sent.counted(pb.PredictBatchRequest(ciphertext=message))
                    told(number + 1)
            except Exception as error:
                # gRPC would swallow it in its own thread, and the service must not take the rest for a whole batch.
                sent.failed.append(error)
                call.cancel()

        started = time.perf_counter()
        replies: list[pb.PredictBatchResponse] = []
        call = self._stub.PredictBatch(requests(), timeout=max(self._timeout, _BATCH_SECONDS))
        try:
            with statuses_as_exceptions(self.target):
                for reply in call:
                    if reply.index != len(replies) or reply.index == plan.outputs:
                        raise ReplyError(f"{self.target} answered a logit that was not asked; do not use the batch")
                    if digest([reply.ciphertext]) != reply.ciphertext_sha256:
                        raise ReplyError(f"the answer for {len(values)} images was damaged on the way; ask again")
                    replies.append(reply)
        except RequestRefusedError:
            if sent.failed:
                raise sent.failed[0] from None
            raise
        finally:
            call.cancel()
        elapsed, started = (time.perf_counter() - started) * 1e3, time.perf_counter()
        try:
            logits = self._batch_holder.decrypt([reply.ciphertext for reply in replies], len(values))
        except FormatError as error:
            raise ReplyError(f"the answer for {len(values)} images cannot be decrypted: {error}") from error
        timing = replies[0].timing
        queue_ms, compute_ms = timing.queue_us / 1e3, timing.compute_us / 1e3
        milliseconds = Milliseconds(
            encrypt=sent.encrypt_ms,
            upload=max(elapsed - sent.encrypt_ms - queue_ms - compute_ms, 0.0),
            queue=queue_ms,
            compute=compute_ms,
            decrypt=(time.perf_counter() - started) * 1e3,
        )
        size = Bytes(upload=sent.size, reply=sum(reply.ByteSize() for reply in replies))
        return [
            Prediction(
                source=name,
                labels=plan.labels,
                logits=row,
                error_bound=plan.logit_error_bound,
                milliseconds=milliseconds,
                size=size,
                images=len(values),
            )
            for name, row in zip(names, logits, strict=True)
        ]

    def _grouped(self, images: Iterable[Image], scheme: Scheme = "ckks") -> Iterator[tuple[_AnyPlan, list[Image]]]:
        single = self._plan_for(scheme)
        offered: tuple[_AnyPlan, ...] = self._described.plans if scheme == "ckks" else self._described.exact
        pair = next((plan for plan in offered if plan.images == 2), None)
        if pair is None or not isinstance(images, Sequence | np.ndarray):
            yield from ((single, [image]) for image in images)
            return
        for start in range(0, len(images), 2):
            group = list(images[start : start + 2])
            yield (pair if len(group) == 2 else single), group

    def _own(self) -> KeyHolder:
        """Return the holder of the secret key for the plan for one image; the key is read once."""
        if self._opened is None:
            self._opened = self.keys.open(self.plan)
        return self._opened

    def _holder(self, plan: _AnyPlan) -> KeyHolder | BfvKeyHolder:
        """Return what encrypts and decrypts for a plan."""
        if plan.plan_id not in self._holders:
            own = self._own()
            self._holders[plan.plan_id] = own.serving(plan) if isinstance(plan, PublicPlan) else own.serving_exact(plan)
        return self._holders[plan.plan_id]

    def _request(self, plan: _AnyPlan, images: list[Image]) -> tuple[pb.PredictRequest, float]:
        holder = self._holder(plan)
        key_set_id = self.keys.info().key_set_id
        started = time.perf_counter()
        try:
            ciphertexts = holder.encrypt(np.stack([self.preprocessing(image) for image in images]))
        except PlanError as error:
            raise ReplyError(f"the plan that {self.target} sent cannot be used: {error}") from error
        encrypt_ms = (time.perf_counter() - started) * 1e3
        request = pb.PredictRequest(
            model=self.model,
            plan_id=plan.plan_id,
            key_set_id=key_set_id,
            ciphertexts=ciphertexts,
            ciphertext_sha256=digest(ciphertexts),
        )
        return request, encrypt_ms

    def _predict_once(self, request: pb.PredictRequest) -> pb.PredictResponse:
        with statuses_as_exceptions(self.target):
            answer: pb.PredictResponse = self._stub.Predict(request, timeout=self._timeout)
        return answer

    def _read(
        self,
        plan: _AnyPlan,
        names: list[str],
        request: pb.PredictRequest,
        encrypt_ms: float,
        answer: pb.PredictResponse,
        elapsed_ms: float,
    ) -> list[Prediction]:
        """Decrypt an answer: one prediction for each image of the request, which share its times and bytes."""
        started, told = time.perf_counter(), " and ".join(names)
        if digest(answer.ciphertexts) != answer.ciphertext_sha256:
            raise ReplyError(f"the answer for {told} was damaged on the way; ask again")
        try:
            answers = self._decrypted(plan, answer.ciphertexts)
        except FormatError as error:
            raise ReplyError(f"the answer for {told} cannot be decrypted: {error}") from error
        decrypt_ms = (time.perf_counter() - started) * 1e3
        queue_ms, compute_ms = answer.timing.queue_us / 1e3, answer.timing.compute_us / 1e3
        milliseconds = Milliseconds(
            encrypt=encrypt_ms,
            upload=max(elapsed_ms - queue_ms - compute_ms, 0.0),
            queue=queue_ms,
            compute=compute_ms,
            decrypt=decrypt_ms,
        )
        size = Bytes(upload=request.ByteSize(), reply=answer.ByteSize())
        exact = isinstance(plan, PublicBfvPlan)
        return [
            Prediction(
                source=name,
                labels=plan.labels,
                logits=logits,
                error_bound=bound,
                milliseconds=milliseconds,
                size=size,
                images=plan.images,
                scheme="bfv" if exact else "ckks",
                integers=integers,
                quantisation_error=plan.quantisation_error if isinstance(plan, PublicBfvPlan) else 0.0,
            )
            for name, (logits, bound, integers) in zip(names, answers, strict=True)
        ]

    def _decrypted(
        self, plan: _AnyPlan, replies: Sequence[bytes]
    ) -> Iterator[tuple[Array, float, tuple[int, ...] | None]]:
        """Return each image's logits, the bound on their error and, under BFV, the integers that they stand for."""
        holder = self._holder(plan)
        if isinstance(holder, KeyHolder):
            logits, bounds = holder.decrypt_bounded(replies)
            return zip(logits, bounds.tolist(), repeat(None))
        rows = [tuple(map(int, row)) for row in holder.decrypt_integers(replies)]
        return iter([(np.array(row, dtype=np.float64) / holder.plan.output_scale, 0.0, row) for row in rows])


@dataclass(frozen=True, eq=False)
class _Described:
    """What a service says of a model: plans for few images, preprocessing, plan for batches and when they pay."""

    plans: tuple[PublicPlan, ...]
    preprocessing: AnyPreprocessing
    batch: PublicBatchPlan | None
    break_even: int | None
    exact: tuple[PublicBfvPlan, ...]


@dataclass
class _SentBatch:
    """What gRPC's thread has encrypted and sent of a batch, and what went wrong there."""

    encrypt_ms: float = 0.0
    size: int = 0
    failed: list[Exception] = field(default_factory=list)

    def counted(self, message: pb.PredictBatchRequest) -> pb.PredictBatchRequest:
        self.size += message.ByteSize()
        return message


@dataclass(frozen=True)
class _Sent:
    """A request of a stream that waits for its answer."""

    plan: _AnyPlan
    names: list[str]
    request: pb.PredictRequest
    encrypt_ms: float
    started: float


def _name(image: Image) -> str:
    return str(image) if isinstance(image, (str, Path)) else "pixels"
