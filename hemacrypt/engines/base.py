"""What every engine does: a plan, keys and ciphertext bytes in, ciphertext bytes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.plan import Plan

Keys = TypeVar("Keys")


class Engine(ABC, Generic[Keys]):
    """Carries out one plan; prepares everything that does not depend on a request when it is made.

    Parameters
    ----------
    plan:
        The plan, weights included.
    """

    name: ClassVar[str]

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @abstractmethod
    def load_keys(self, keys: EvaluationKeys) -> Keys:
        """Check a client's evaluation keys and bring them into the engine's own form.

        Raises
        ------
        FormatError
            If they do not fit the plan.
        """

    @abstractmethod
    def evaluate(self, ciphertext: bytes, keys: Keys) -> bytes:
        """Evaluate the network on one serialised ciphertext and return the serialised logits.

        Parameters
        ----------
        ciphertext:
            Straight from the wire; checked here before anything else happens.
        keys:
            What `load_keys` returned.

        Raises
        ------
        FormatError
            If the ciphertext is not what the plan demands.
        """
