"""The models that are served, each with its bundle and its plan."""

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
    """One served model."""

    bundle: Bundle
    plan: Plan

    @property
    def name(self) -> str:
        """Name that clients use."""
        return self.bundle.manifest.name

    @property
    def largest_key_set(self) -> int:
        """Most bytes that a key set for this model may have."""
        return largest_key_set(self.plan.public)

    @property
    def largest_ciphertext(self) -> int:
        """Most bytes that an encrypted image for this model may have."""
        return sealformat.largest_ciphertext(self.plan.parameters)


def load_models(directories: Iterable[Path]) -> dict[str, Model]:
    """Read, check and plan every bundle.

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
        model = Model(bundle, plan_bundle(bundle))
        if model.name in models:
            raise BundleError(f"two bundles are called {model.name!r}; export one of them under another name")
        models[model.name] = model
    if not models:
        raise BundleError("no bundle to serve; name at least one directory written by `hemacrypt export`")
    return dict(sorted(models.items()))
