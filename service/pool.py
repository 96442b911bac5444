"""Worker processes, one job each at a time, first come first served.

Processes and not threads, because TenSEAL keeps the GIL; started by exec and never forked, because gRPC does not
survive a fork. A worker that crashes, hangs or outgrows its memory is replaced; only its own job fails.
"""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog

from service.settings import Settings
from service.worker import LARGEST_HEADER, apart

log = structlog.get_logger()

# Names of key sets that fit a job's header with room to spare.
_MOST_FORGOTTEN = 200


class PoolError(Exception):
    """A job could not be done."""


class QueueFullError(PoolError):
    """Too many jobs wait already."""


class WorkerLostError(PoolError):
    """The worker ended or hung while it had the job."""


@dataclass(frozen=True)
class Job:
    """Something for a worker to do.

    Attributes
    ----------
    kind:
        ``predict``, ``batch`` or ``check_keys``.
    model, plan_id, key_set_id, keys:
        Model, name of its plan, name of the key set, and file that holds it.
    ciphertexts:
        The encrypted input, for ``predict``.
    spool:
        File with the encrypted input, for ``batch``; see `service.keystore.spooled`.
    """

    kind: str
    model: str
    plan_id: str
    key_set_id: str
    keys: Path
    ciphertexts: tuple[bytes, ...] = ()
    spool: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """A worker's answer.

    Attributes
    ----------
    job:
        What was to be done.
    header:
        ``ok``, and ``compute_us`` or the refusal.
    ciphertexts:
        The encrypted reply.
    queue_us:
        How long the job waited.
    """

    job: Job
    header: dict[str, Any]
    ciphertexts: tuple[bytes, ...]
    queue_us: int


class _Process:
    """One worker process and the pipe to it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._jobs = 0
        self.forget: set[str] = set()
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = {
                "bundles": [str(path) for path in settings.bundles],
                "engine": settings.engine,
                "cached_keys": settings.cached_keys,
                "memory_mb": settings.worker_memory_mb,
                "threads": settings.threads,
                "key_budget": settings.key_budget,
                "exact": settings.exact,
                "precision": settings.precision,
                "cache": settings.cache and str(settings.cache),
                "cache_limit_mb": settings.cache_limit_mb,
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.worker", str(theirs.fileno()), json.dumps(arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())

    def wait_ready(self) -> None:
        """Wait until the worker has prepared its models.

        Raises
        ------
        WorkerLostError
            If it ends or takes too long; it is stopped then, so that a late answer can never be taken for another.
        """
        with self._ending_when_lost():
            self._receive(self._settings.start_seconds, LARGEST_HEADER)

    def call(self, job: Job) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        """Have a job done.

        Raises
        ------
        WorkerLostError
            If the worker ends, hangs, or answers anything but this job; it is stopped then.
        """
        self._jobs += 1
        forget = set(self.forget)
        header = {
            "number": self._jobs,
            "job": job.kind,
            "model": job.model,
            "plan_id": job.plan_id,
            "sizes": [len(ciphertext) for ciphertext in job.ciphertexts],
            "key_set_id": job.key_set_id,
            "keys": str(job.keys),
            "spool": job.spool and str(job.spool),
            # A worker that has too much to forget forgets everything.
            "forget": sorted(forget) if len(forget) <= _MOST_FORGOTTEN else None,
        }
        seconds = self._settings.job_seconds if job.spool is None else self._settings.batch_seconds
        with self._ending_when_lost():
            self._connection.send_bytes(json.dumps(header).encode())
            self._connection.send_bytes(b"".join(job.ciphertexts))
            self.forget.difference_update(forget)
            reply = json.loads(self._receive(seconds, LARGEST_HEADER))
            if reply["number"] != self._jobs:
                raise WorkerLostError(f"worker answered job {reply['number']} when {self._jobs} was asked")
            body = self._receive(seconds, None)
            return reply, apart(body, reply.get("sizes", []))

    def _receive(self, seconds: float, largest: int | None) -> bytes:
        if not self._connection.poll(seconds):
            raise WorkerLostError(f"worker gave no answer within {seconds:g} s")
        return self._connection.recv_bytes(largest)

    @contextmanager
    def _ending_when_lost(self) -> Iterator[None]:
        """Stop the process whatever goes wrong: once a frame is missed, nothing it says can be trusted."""
        try:
            yield
        except WorkerLostError:
            self.stop()
            raise
        except Exception as error:
            code = self._process.poll()
            self.stop()
            raise WorkerLostError(f"worker ended with exit code {code}, {type(error).__name__}") from error

    def stop(self) -> None:
        """End the process: at once, for it holds nothing that is not elsewhere."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """A fixed number of workers and a bounded queue before them.

    Parameters
    ----------
    settings:
        Number of workers, limits, models.
    wait:
        Whether to wait until all are ready; else `wait_ready` does, and nothing may be submitted before.

    Raises
    ------
    WorkerLostError
        If a worker does not become ready.
    """

    def __init__(self, settings: Settings, *, wait: bool = True) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._pending = 0
        self._closed = False
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes = [_Process(settings) for _ in range(settings.workers)]
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="worker")
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until all workers have prepared their models.

        Raises
        ------
        WorkerLostError
            If one does not become ready; all are stopped then.
        """
        try:
            for process in self._processes:
                process.wait_ready()
                self._idle.put(process)
        except WorkerLostError:
            self.close()
            raise

    def submit(self, job: Job, wait_seconds: float = 0.0) -> Future[Outcome]:
        """Queue a job; cancel the future to give the place up.

        Parameters
        ----------
        job:
            What is to be done.
        wait_seconds:
            How long to wait for a place in the queue.

        Raises
        ------
        QueueFullError
            If as many jobs wait as are allowed to, and no place becomes free in time.
        """
        most = self._settings.workers + self._settings.queue
        with self._room:
            if not self._room.wait_for(lambda: self._pending < most, wait_seconds):
                raise QueueFullError
            self._pending += 1
        future = self._threads.submit(self._run, job, time.perf_counter())
        future.add_done_callback(self._done)
        return future

    @property
    def workers(self) -> int:
        """How many jobs run at a time."""
        return self._settings.workers

    def forget(self, key_set_id: str) -> None:
        """Have every worker drop a key set from memory before its next job."""
        with self._lock:
            for process in self._processes:
                process.forget.add(key_set_id)

    def close(self) -> None:
        """End all workers; jobs that run fail."""
        with self._lock:
            self._closed = True
            processes = list(self._processes)
        for process in processes:
            process.stop()

    def _done(self, _: Future[Outcome]) -> None:
        with self._room:
            self._pending -= 1
            self._room.notify()

    def _run(self, job: Job, submitted: float) -> Outcome:
        process = self._idle.get()
        queued = int((time.perf_counter() - submitted) * 1e6)
        try:
            header, ciphertexts = process.call(job)
        except WorkerLostError as error:
            if not self._closed:
                log.error("worker lost", job=job.kind, why=str(error))
                process = self._replace(process)
            raise
        finally:
            self._idle.put(process)
        return Outcome(job, header, ciphertexts, queued)

    def _replace(self, lost: _Process) -> _Process:
        lost.stop()
        fresh = _Process(self._settings)
        with self._lock:
            self._processes[self._processes.index(lost)] = fresh
            closed = self._closed
        if closed:
            fresh.stop()
            return fresh
        try:
            fresh.wait_ready()
        except WorkerLostError as error:
            # The next job finds it dead and tries again.
            log.error("worker did not start", why=str(error))
        return fresh
