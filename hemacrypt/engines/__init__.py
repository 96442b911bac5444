"""Engines: interchangeable ways to carry out a plan. They know plans, never planners."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hemacrypt.engines.base import Engine, ExactEngine
from hemacrypt.engines.clear.ckks import ClearEngine
from hemacrypt.errors import PlanError
from hemacrypt.plan.batch_plan import BatchPlan
from hemacrypt.plan.bfv_batch_plan import BfvBatchPlan
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.plan.plan import Plan

if TYPE_CHECKING:
    from hemacrypt.engines.seal.bfv_batch import BfvBatchSealEngine
    from hemacrypt.engines.vector.batch import BatchEngine
    from hemacrypt.engines.vector.bfv_batch import BfvBatchEngine

__all__ = [
    "DEFAULT_ENGINE",
    "ENCRYPTED_ENGINES",
    "ClearEngine",
    "Engine",
    "ExactEngine",
    "batch_engine",
    "check_engine",
    "encrypted_bfv_engine",
    "encrypted_engine",
    "exact_batch_engine",
]

# Names of the engines that work on ciphertexts; `clear` never serves requests.
ENCRYPTED_ENGINES = ("vector", "seal")
DEFAULT_ENGINE = "vector"


@contextmanager
def _numba_for(who_needs: str) -> Iterator[None]:
    """Import kernels; where Numba is missing, say who needs it and where it comes from."""
    try:
        yield
    except ImportError as error:
        raise PlanError(f"{who_needs} Numba: pip install 'hemacrypt[service]' ({error})") from None


def check_engine(name: str) -> None:
    """Make sure that there is an engine of a name.

    Raises
    ------
    PlanError
        If there is none.
    """
    if name not in ENCRYPTED_ENGINES:
        raise PlanError(f"no engine is called {name!r}; choose one of {', '.join(ENCRYPTED_ENGINES)}")


def encrypted_engine(
    name: str, plan: Plan, threads: int = 1, cache: Path | None = None, cache_limit: int = 4 << 30
) -> Engine[Any]:
    """Make the engine of a name.

    Parameters
    ----------
    name:
        One of `ENCRYPTED_ENGINES`.
    plan:
        The plan, weights included.
    threads:
        How many threads share one request; `seal` has one in any case.
    cache, cache_limit:
        Directory for encoded diagonals, and the bytes that it may take; `seal` keeps none.

    Raises
    ------
    PlanError
        If there is no such engine, or what it needs is not installed.
    """
    check_engine(name)
    if name == "seal":
        # Imported here because the clear engine must work where TenSEAL has no wheel.
        from hemacrypt.engines.seal.ckks import SealEngine

        return SealEngine(plan)
    with _numba_for("the engine 'vector' needs"):
        from hemacrypt.engines.vector.cache import DiagonalCache
        from hemacrypt.engines.vector.ckks import VectorEngine

    return VectorEngine(plan, threads, DiagonalCache(cache, cache_limit) if cache else None)


def encrypted_bfv_engine(name: str, plan: BfvPlan, threads: int = 1) -> ExactEngine[Any]:
    """Make the engine of a name for an exact plan.

    Parameters
    ----------
    name:
        One of `ENCRYPTED_ENGINES`.
    plan:
        The plan, weights included.
    threads:
        How many threads share one request; `seal` has one in any case.

    Raises
    ------
    PlanError
        If there is no such engine, or what it needs is not installed.
    """
    check_engine(name)
    if name == "seal":
        from hemacrypt.engines.seal.bfv import BfvSealEngine

        return BfvSealEngine(plan)
    with _numba_for("the engine 'vector' needs"):
        from hemacrypt.engines.vector.bfv import BfvVectorEngine

    return BfvVectorEngine(plan, threads)


def exact_batch_engine(name: str, plan: BfvBatchPlan, threads: int = 1) -> BfvBatchEngine | BfvBatchSealEngine:
    """Make the engine of a name for exact batches.

    Parameters
    ----------
    name:
        One of `ENCRYPTED_ENGINES`.
    plan:
        The plan, weights included.
    threads:
        How many threads share one batch; `seal` has one in any case.

    Raises
    ------
    PlanError
        If there is no such engine, or what it needs is not installed.
    """
    check_engine(name)
    if name == "seal":
        from hemacrypt.engines.seal.bfv_batch import BfvBatchSealEngine

        return BfvBatchSealEngine(plan)
    with _numba_for("batches need"):
        from hemacrypt.engines.vector.bfv_batch import BfvBatchEngine

    return BfvBatchEngine(plan, threads)


def batch_engine(plan: BatchPlan, threads: int = 1) -> BatchEngine:
    """Make the engine that evaluates batches: `vector` has the only one.

    Parameters
    ----------
    plan:
        The plan, weights included.
    threads:
        How many threads share one batch.

    Raises
    ------
    PlanError
        If what it needs is not installed.
    """
    with _numba_for("batches need"):
        from hemacrypt.engines.vector.batch import BatchEngine

    return BatchEngine(plan, threads)
