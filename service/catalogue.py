"""The models that are served, each with its bundle and its plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hemacrypt import sealformat
from hemacrypt.bundle import Bundle
from hemacrypt.errors import BundleError
from hemacrypt.evaluation_keys import largest_key_set
from hemacrypt.plan import Plan
from hemacrypt.planner import plan_bundle


@dataclass(frozen=True, eq=False)
class Model:
    """One served model.

    Attributes
    ----------
    bundle:
        What was read.
    plans:
        For one image first, then for several in one request; all need the same keys.
    """

    bundle: Bundle
    plans: tuple[Plan, ...]

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
        return self.largest_ciphertext * max(plan.public.input_layout.ciphertexts for plan in self.plans)

    def plan(self, plan_id: str) -> Plan | None:
        """Return the plan of a name."""
        return next((plan for plan in self.plans if plan.public.plan_id == plan_id), None)


def load_models(directories: Iterable[Path], key_budget: int | None = None) -> dict[str, Model]:
    """Read, check and plan every bundle.

    Parameters
    ----------
    directories:
        Where the bundles are.
    key_budget:
        Bytes that a client's evaluation keys may take on the wire; see `hemacrypt.planner.plan_network`.

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
        model = Model(bundle, plan_bundle(bundle, key_budget))
        if model.name in models:
            raise BundleError(f"two bundles are called {model.name!r}; export one of them under another name")
        models[model.name] = model
    if not models:
        raise BundleError("no bundle to serve; name at least one directory written by `hemacrypt export`")
    return dict(sorted(models.items()))
