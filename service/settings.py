"""Settings of the service, from the command line, the environment (``HEMACRYPT_…``) or defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

import platformdirs
from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hemacrypt.engines import DEFAULT_ENGINE


def _cores() -> int:
    # The cores that this process may use, which in a container are fewer than the machine's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseSettings):
    """Everything an operator can set."""

    model_config = SettingsConfigDict(env_prefix="HEMACRYPT_", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = Field(50051, ge=0, le=65535)
    """Port to listen on; 0 lets the system choose."""
    bundles: tuple[Path, ...] = ()
    """Directories of the models to serve."""
    store: Path = Field(default_factory=lambda: platformdirs.user_data_path("hemacrypt") / "service")
    """Where evaluation keys are kept."""
    engine: str = DEFAULT_ENGINE
    """Engine that evaluates; see ``hemacrypt.engines``."""
    schemes: tuple[Literal["ckks", "bfv"], ...] = ("ckks", "bfv")
    """Schemes to offer: ``ckks`` always, for keys are registered for its plan; ``bfv`` is exact and slower."""
    precision: int | None = Field(None, ge=0, le=64)
    """Logits to within 2^-precision, with the smallest parameters that give them. By default as margins ask for."""
    workers: int = Field(default_factory=_cores, ge=1, le=256)
    """Worker processes; each evaluates one request at a time on as many cores as it has threads."""
    threads: int = Field(1, ge=1, le=64)
    """Threads that each worker gives to one request (engine `vector`): more answer sooner, fewer answer more."""
    queue: int = Field(64, ge=1, le=10_000)
    """Requests that may wait for a worker before new ones are refused."""
    job_seconds: float = Field(120.0, gt=0)
    """A worker that takes longer for one job is stopped and started again."""
    batch_seconds: float = Field(1800.0, gt=0)
    """The same for a batch of images."""
    batches: int | None = Field(None, ge=0, le=256)
    """Batches that are evaluated at a time; 0 offers none. By default one worker is left for single images."""
    start_seconds: float = Field(300.0, gt=0)
    """How long a worker may take to become ready; the first one on a machine compiles the engine."""
    cached_keys: int = Field(8, ge=1, le=1000)
    """Key sets that each worker keeps loaded; one takes about 75 MB for the leukaemia model."""
    key_budget_mb: int | None = Field(None, ge=1)
    """Megabytes that a client's evaluation keys may take; fewer make the service slower. By default about 34."""
    cache: Path | None = Field(default_factory=lambda: platformdirs.user_cache_path("hemacrypt") / "diagonals")
    """Where encoded weights are kept between starts, readable by their owner alone."""
    cache_limit_mb: int = Field(8192, ge=1)
    """Disk space that encoded weights may take."""
    worker_memory_mb: int = Field(4096, ge=512)
    """Address space that a worker may use, a batch included; beyond it, it is stopped and started again."""
    store_limit_mb: int = Field(20_000, ge=1)
    """Disk space that evaluation keys, and batches that wait or are evaluated, may take."""
    upload_idle_hours: float = Field(24.0, gt=0)
    """An unfinished upload is deleted after this time without progress."""
    grace_seconds: float = Field(20.0, ge=0)
    """How long running requests may finish when the service is told to stop."""
    tls_certificate: Path | None = None
    """PEM certificate chain; with `tls_key` the service speaks TLS."""
    tls_key: Path | None = None
    """PEM private key of the certificate."""
    streams: int = Field(32, ge=1, le=1000)
    """Streams (uploads and many images) at a time; each holds a thread while it is open."""
    stream_idle_seconds: float = Field(60.0, gt=0)
    """A stream whose client is silent for so long is ended."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError(
                "TLS needs both a certificate and its key; give --tls-certificate and --tls-key, or neither"
            )
        return self

    @field_validator("schemes")
    @classmethod
    def _ckks_is_among_the_schemes(cls, schemes: tuple[str, ...]) -> tuple[str, ...]:
        if "ckks" not in schemes:
            raise ValueError("every model is served under CKKS; give ckks or ckks,bfv")
        return schemes

    @property
    def exact(self) -> bool:
        """Whether models are also evaluated exactly, under BFV."""
        return "bfv" in self.schemes

    @property
    def batch_places(self) -> int:
        """How many batches are evaluated at a time."""
        return max(1, self.workers - 1) if self.batches is None else min(self.batches, self.workers)

    @property
    def key_budget(self) -> int | None:
        """Bytes that a client's evaluation keys may take."""
        return self.key_budget_mb and self.key_budget_mb * 1_000_000

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in ("localhost", "::1", "[::1]") or self.host.startswith("127.")
