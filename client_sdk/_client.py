"""The client: one object for everything a hospital does with one model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import platformdirs
import tenacity

from client_sdk._crypto import KeyHolder
from client_sdk._exceptions import ReplyError, RequestRefusedError, ServiceUnavailableError
from client_sdk._keys import KeyDirectory
from client_sdk._results import Bytes, Milliseconds, ModelInfo, Prediction
from client_sdk._transport import open_channel, printable, refused, statuses_as_exceptions
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.plan import PublicPlan
from hemacrypt.preprocess import Pixels, Preprocessing
from hemacrypt.v1 import inference_pb2 as pb
from hemacrypt.v1 import inference_pb2_grpc as pb_grpc
from hemacrypt.wire import plan_from_message, preprocessing_from_message

Image = Path | str | Pixels
Progress = Callable[[int, int], None]

_CHUNK = 512 * 1024


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

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel and forget the secret key."""
        self._channel.close()
        self._opened = None

    def models(self) -> list[ModelInfo]:
        """List what the service offers."""
        with statuses_as_exceptions(self.target):
            answer = self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout)
        return [ModelInfo(*map(printable, (m.name, m.description, m.plan_id))) for m in answer.models]

    @cached_property
    def _described(self) -> tuple[PublicPlan, Preprocessing]:
        with statuses_as_exceptions(self.target):
            answer = self._stub.GetModel(pb.GetModelRequest(name=self.model), timeout=self._timeout)
        try:
            preprocessing = preprocessing_from_message(answer.preprocessing)
            plan = plan_from_message(answer.plan, self.model, preprocessing)
        except PlanError as error:
            raise ReplyError(f"the plan that {self.target} sent cannot be used: {error}") from error
        if plan.plan_id != answer.model.plan_id:
            raise ReplyError(f"{self.target} describes another plan than it names; client and service versions differ")
        channels, height, width = preprocessing.input_shape
        if len(plan.input_layout.positions) != channels * height * width:
            raise ReplyError(f"the plan and the preprocessing that {self.target} sent do not fit together")
        return plan, preprocessing

    def refresh(self) -> None:
        """Forget what the service said about the model, so that it is asked again."""
        self.__dict__.pop("_described", None)
        self._opened = None

    @property
    def plan(self) -> PublicPlan:
        """The public half of the model's plan."""
        return self._described[0]

    @property
    def preprocessing(self) -> Preprocessing:
        """How a cell image becomes the model's input."""
        return self._described[1]

    def generate_keys(self, *, replace: bool = False) -> str:
        """Generate a secret key and the evaluation keys of the plan; return the name of the key set.

        Raises
        ------
        KeysMissingError
            If there are keys already and they may not be replaced.
        """
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

    def predict(self, image: Image) -> Prediction:
        """Encrypt one image, have it evaluated, decrypt the answer.

        Parameters
        ----------
        image:
            A file (PNG, BMP, TIFF), the original pixels, or pixels that are reduced already; uint8.

        Returns
        -------
        Prediction

        Raises
        ------
        ImageError
            If the image is none, or not of the kind that the model reads.
        KeysMissingError
            If there are no keys for this plan.
        ReplyError
            If the answer is not what it should be.
        """
        request, encrypt_ms = self._request(image)
        started = time.perf_counter()
        try:
            answer = self._predict_once(request)
        except RequestRefusedError as refusal:
            if refusal.reason not in ("KEY_SET_NOT_FOUND", "PLAN_CHANGED"):
                raise
            # The service lost the keys, or serves a new version of the model: catch up and try again, once.
            self.refresh()
            self.register()
            request, encrypt_ms = self._request(image)
            started = time.perf_counter()
            answer = self._predict_once(request)
        elapsed = (time.perf_counter() - started) * 1e3
        return self._read(_name(image), request, encrypt_ms, answer, elapsed)

    def predict_many(self, images: Iterable[Image]) -> Iterator[Prediction]:
        """Predict images over one stream, yielding results in order while later images are still on their way.

        Raises
        ------
        RequestRefusedError
            At the first image that the service refuses; besides what `predict` raises.
        ReplyError
            If the service answers more, fewer or other images than it was asked.
        """
        sent: SimpleQueue[tuple[str, pb.PredictRequest, float, float]] = SimpleQueue()
        failed: list[Exception] = []
        self._holder()

        def requests() -> Iterator[pb.PredictRequest]:
            try:
                for image in images:
                    request, encrypt_ms = self._request(image)
                    sent.put((_name(image), request, encrypt_ms, time.perf_counter()))
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
                name, request, encrypt_ms, started = sent.get()
                elapsed = (time.perf_counter() - started) * 1e3
                if answer.WhichOneof("result") != "prediction":
                    refusal = answer.refusal
                    raise refused(refusal.code, refusal.reason, f"{name}: {refusal.message}", {})
                yield self._read(name, request, encrypt_ms, answer.prediction, elapsed)
        if failed:
            raise failed[0]
        if not sent.empty():
            raise ReplyError(f"{self.target} ended the stream with {sent.qsize()} images unanswered; ask again")

    def _holder(self) -> KeyHolder:
        if self._opened is None:
            self._opened = self.keys.open(self.plan)
        return self._opened

    def _request(self, image: Image) -> tuple[pb.PredictRequest, float]:
        holder = self._holder()
        key_set_id = self.keys.info().key_set_id
        started = time.perf_counter()
        try:
            ciphertext = holder.encrypt(self.preprocessing(image))
        except PlanError as error:
            raise ReplyError(f"the plan that {self.target} sent cannot be used: {error}") from error
        encrypt_ms = (time.perf_counter() - started) * 1e3
        request = pb.PredictRequest(
            model=self.model,
            plan_id=self.plan.plan_id,
            key_set_id=key_set_id,
            ciphertext=ciphertext,
            ciphertext_sha256=hashlib.sha256(ciphertext).hexdigest(),
        )
        return request, encrypt_ms

    def _predict_once(self, request: pb.PredictRequest) -> pb.PredictResponse:
        with statuses_as_exceptions(self.target):
            answer: pb.PredictResponse = self._stub.Predict(request, timeout=self._timeout)
        return answer

    def _read(
        self, name: str, request: pb.PredictRequest, encrypt_ms: float, answer: pb.PredictResponse, elapsed_ms: float
    ) -> Prediction:
        started = time.perf_counter()
        if hashlib.sha256(answer.ciphertext).hexdigest() != answer.ciphertext_sha256:
            raise ReplyError(f"the answer for {name} was damaged on the way; ask again")
        try:
            logits = self._holder().decrypt(answer.ciphertext)
        except FormatError as error:
            raise ReplyError(f"the answer for {name} cannot be decrypted: {error}") from error
        decrypt_ms = (time.perf_counter() - started) * 1e3
        queue_ms, compute_ms = answer.timing.queue_us / 1e3, answer.timing.compute_us / 1e3
        return Prediction(
            source=name,
            labels=self.plan.labels,
            logits=logits,
            error_bound=self.plan.logit_error_bound,
            milliseconds=Milliseconds(
                encrypt=encrypt_ms,
                upload=max(elapsed_ms - queue_ms - compute_ms, 0.0),
                queue=queue_ms,
                compute=compute_ms,
                decrypt=decrypt_ms,
            ),
            size=Bytes(upload=request.ByteSize(), reply=answer.ByteSize()),
        )


def _name(image: Image) -> str:
    return str(image) if isinstance(image, (str, Path)) else "pixels"
