"""What every engine does: a plan, keys and serialised ciphertexts in, serialised ciphertexts out; CKKS and BFV."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from hemacrypt.errors import FormatError
from hemacrypt.plan.bfv_plan import BfvPlan
from hemacrypt.plan.plan import Plan
from hemacrypt.seal.evaluation_keys import EvaluationKeys

Keys = TypeVar("Keys")
AnyPlan = TypeVar("AnyPlan", Plan, BfvPlan)


class BaseEngine(ABC, Generic[AnyPlan, Keys]):
    """Carries out one plan; prepares everything that does not depend on a request when it is made.

    Parameters
    ----------
    plan:
        The plan, weights included.
    """

    name: ClassVar[str]

    def __init__(self, plan: AnyPlan) -> None:
        self.plan: AnyPlan = plan

    @abstractmethod
    def load_keys(self, keys: EvaluationKeys) -> Keys:
        """Check a client's evaluation keys and bring them into the engine's own form.

        Raises
        ------
        FormatError
            If they do not fit the plan.
        """

    @abstractmethod
    def evaluate(self, ciphertexts: Sequence[bytes], keys: Keys) -> list[bytes]:
        """Evaluate the network on one request and return the serialised logits.

        Parameters
        ----------
        ciphertexts:
            As many serialised ciphertexts as the plan demands, straight from the wire; checked before anything else
            happens.
        keys:
            What `load_keys` returned, of this engine or of that of another plan with the same keys.

        Raises
        ------
        FormatError
            If a ciphertext is not what the plan demands, or there are more or fewer.
        """

    def warm_up(self) -> None:
        """Do whatever only the first request would have to wait for; nothing by default."""

    def check_count(self, ciphertexts: Sequence[bytes]) -> None:
        """Make sure that there are as many ciphertexts as the plan demands.

        Raises
        ------
        FormatError
            If not.
        """
        expected = self.plan.public.input_ciphertexts
        if len(ciphertexts) != expected:
            raise FormatError("ciphertexts", f"{len(ciphertexts)} came; the plan lays its input over {expected}")


class Engine(BaseEngine[Plan, Keys], Generic[Keys]):
    """Carries out a plan for CKKS."""


class ExactEngine(BaseEngine[BfvPlan, Keys], Generic[Keys]):
    """Carries out a plan for BFV: integers, the same network for every plaintext modulus."""
