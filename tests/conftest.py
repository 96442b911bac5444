"""Fixtures that several parts of the tests share: the embedded model and a real service process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from audit.demo import running_service
from client_sdk import Client
from hemacrypt.embedded import SampleCell, bundle_path, sample
from hemacrypt.model.bundle import Bundle


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.read(bundle_path())


@pytest.fixture(scope="session")
def cells() -> list[SampleCell]:
    """Six cells of the sample, three of either label."""
    everything = sample()
    return everything[:90:30] + everything[90::30]


@pytest.fixture(scope="session")
def service_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared service keeps its store (``store``) and its log (``service.log``)."""
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="session")
def address(service_directory: Path) -> Iterator[str]:
    """Address of a real service process with the embedded bundle; stopped at the end."""
    log = service_directory / "service.log"
    with running_service(bundle_path(), service_directory, workers=2, log=log) as target:
        yield target


@pytest.fixture(scope="session")
def client(address: str, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of the shared service with registered keys."""
    keys = tmp_path_factory.mktemp("hospital") / "keys"
    with Client(address, bundle.manifest.name, key_directory=keys) as connected:
        connected.prepare()
        yield connected
