"""The models that are served, each with its bundle and its plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hemacrypt.engines import DEFAULT_ENGINE
from hemacrypt.errors import BundleError
from hemacrypt.model.bundle import Bundle
from hemacrypt.plan.batch_plan import BatchPlan
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.plan.plan import Plan
from hemacrypt.plan.schedule import make_schedule, memory_bytes
from hemacrypt.planner import plan_bundle_layouts
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.evaluation_keys import largest_key_set

# What a worker takes of its address space besides a batch. Measured with the embedded model on two cores: 1.0 GB for
# libraries, weights and the first key set; 0.36 GB for exact evaluation, from its first use on; each further key set
# that stays loaded takes 75 MB, and as much again where it is used under BFV.
RESERVED_MB = 2600


@dataclass(frozen=True, eq=False)
class Model:
    """One served model.

    Attributes
    ----------
    bundle:
        What was read.
    plans:
        For one image first, then for several in one request; all need the same keys.
    batch:
        For a batch of images, with the same keys; None when the network cannot be evaluated so.
    no_batch:
        Why there is no batch plan.
    break_even:
        Fewest images for which a batch takes less time; None when it never does.
    exact:
        For one image under BFV, with the same keys; empty when the network is not evaluated so.
    no_exact:
        Why there is no exact plan.
    """

    bundle: Bundle
    plans: tuple[Plan, ...]
    batch: BatchPlan | None = None
    no_batch: str = "its network has no plan for batches"
    break_even: int | None = None
    exact: tuple[BfvPlan, ...] = ()
    no_exact: str = "the operator has switched BFV off"

    @property
    def name(self) -> str:
        """Name that clients use."""
        return self.bundle.manifest.name

    @property
    def largest_key_set(self) -> int:
        """Most bytes that a key set for this model may have."""
        return largest_key_set(self.plans[0].public)

    @property
    def largest_ciphertext(self) -> int:
        """Most bytes that one ciphertext for this model may have."""
        return sealformat.largest_ciphertext(self.plans[0].parameters)

    @property
    def largest_request(self) -> int:
        """Most bytes that the ciphertexts of a request for this model may have."""
        return self.largest_ciphertext * max(plan.public.input_ciphertexts for plan in self._every)

    @property
    def largest_reply(self) -> int:
        """Most bytes that the ciphertexts of a reply of this model may have."""
        replies = [(plan, 0) for plan in self.plans] + [(plan, plan.public.output_level) for plan in self.exact]
        return max(
            sealformat.largest_ciphertext(plan.parameters, level) * plan.public.output_ciphertexts
            for plan, level in replies
        )

    @property
    def _every(self) -> tuple[Plan | BfvPlan, ...]:
        return (*self.plans, *self.exact)

    def plan(self, plan_id: str) -> Plan | BfvPlan | None:
        """Return the plan of a name, of either scheme."""
        return next((plan for plan in self._every if plan.public.plan_id == plan_id), None)


def why_no_batches(model: Model, engine: str, threads: int, memory_mb: int, places: int = 1) -> str:
    """Return why a service cannot take batches for a model; nothing when it can.

    Parameters
    ----------
    model:
        The model.
    engine, threads, memory_mb:
        Engine of the workers, their threads, and the address space of each in MiB.
    places:
        How many batches the operator allows at a time.
    """
    if model.batch is None:
        return model.no_batch
    if not places:
        return "the operator has switched batches off"
    if engine != "vector":
        return f"the engine {engine} evaluates no batches"
    needed = memory_bytes(model.batch, make_schedule(model.batch), threads) >> 20
    if RESERVED_MB + needed > memory_mb:
        return (
            f"a batch takes {needed} MiB of memory besides {RESERVED_MB} MiB for everything else, "
            f"and workers have {memory_mb} MiB"
        )
    return ""


def load_models(
    directories: Iterable[Path],
    key_budget: int | None = None,
    *,
    exact: bool = True,
    precision: int | None = None,
    engine: str = DEFAULT_ENGINE,
) -> dict[str, Model]:
    """Read, check and plan every bundle.

    Parameters
    ----------
    directories:
        Where the bundles are.
    key_budget:
        Bytes that a client's evaluation keys may take on the wire; see `hemacrypt.planner.plan_network`.
    exact:
        Whether to plan BFV as well as CKKS.
    precision, engine:
        As in `hemacrypt.planner.plan_network`.

    Raises
    ------
    BundleError
        If a bundle is damaged, or two have the same name.
    PlanError
        If a network cannot be planned.
    """
    models: dict[str, Model] = {}
    for directory in directories:
        bundle = Bundle.read(directory)
        layouts = plan_bundle_layouts(bundle, key_budget, exact=exact, precision=precision, engine=engine)
        model = Model(bundle, layouts.plans, layouts.batch, layouts.no_batch, layouts.break_even, layouts.exact)
        if exact:
            model = replace(model, no_exact=layouts.no_exact)
        if model.name in models:
            raise BundleError(f"two bundles are called {model.name!r}; export one of them under another name")
        models[model.name] = model
    if not models:
        raise BundleError("no bundle to serve; name at least one directory written by `hemacrypt export`")
    return dict(sorted(models.items()))
