"""Fixtures of the auditor's tests: the small model and the pixels of the client's."""

from tests.client_sdk.conftest import pixels, small

__all__ = ["pixels", "small"]
