"""What can go wrong on the client's side.

::

    HemacryptError
    └── ClientError
        ├── KeysMissingError          no key directory, or its keys are for another plan
        ├── ServiceUnavailableError   nobody answers, or not in time
        ├── RequestRefusedError       the service said no, with a reason
        └── ReplyError                the service's answer is not what it should be
"""

from __future__ import annotations

from hemacrypt.errors import HemacryptError


class ClientError(HemacryptError):
    """Base of the client's errors."""


class KeysMissingError(ClientError):
    """There are no keys for this model, or they do not fit its current plan."""


class ServiceUnavailableError(ClientError):
    """The service cannot be reached, is overloaded, or did not answer in time."""


class RequestRefusedError(ClientError):
    """The service refused a request.

    Attributes
    ----------
    status:
        Name of the gRPC status code, for example ``NOT_FOUND``.
    reason:
        Why, for programs: see docs/wire-protocol.md.
    metadata:
        Further facts from the service, for example ``received_bytes``.
    """

    def __init__(self, status: str, reason: str, message: str, metadata: dict[str, str] | None = None) -> None:
        super().__init__(f"{message} ({reason})")
        self.status = status
        self.reason = reason
        self.metadata = metadata or {}


class ReplyError(ClientError):
    """The service's answer is malformed; do not use it."""
