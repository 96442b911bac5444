"""What every engine does: a plan, keys and serialised ciphertexts in, serialised ciphertexts out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from hemacrypt.errors import FormatError
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
    def evaluate(self, ciphertexts: Sequence[bytes], keys: Keys) -> list[bytes]:
        """Evaluate the network on one request and return the serialised logits.

        Parameters
        ----------
        ciphertexts:
            As many serialised ciphertexts as the plan's input layout has, straight from the wire; checked here before
            anything else happens.
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
        expected = self.plan.public.input_layout.ciphertexts
        if len(ciphertexts) != expected:
            raise FormatError("ciphertexts", f"{len(ciphertexts)} came; the plan lays its input over {expected}")
