"""The hospital's side: make keys, encrypt cells, ask the service, decrypt and read the answer.

>>> from client_sdk import Client
>>> with Client("lab.example:50051", "leukaemia", key_directory="keys") as client:  # doctest: +SKIP
...     client.prepare()
...     print(client.predict("cell.png").label)
"""

from client_sdk._client import Client
from client_sdk._exceptions import (
    ClientError,
    KeysMissingError,
    ReplyError,
    RequestRefusedError,
    ServiceUnavailableError,
)
from client_sdk._results import Bytes, Milliseconds, ModelInfo, Prediction, Scheme

__all__ = [
    "Bytes",
    "Client",
    "ClientError",
    "KeysMissingError",
    "Milliseconds",
    "ModelInfo",
    "Prediction",
    "ReplyError",
    "RequestRefusedError",
    "Scheme",
    "ServiceUnavailableError",
]
