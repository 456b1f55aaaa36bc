from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.bmc import make_certificate
from tests.support import machines
from tests.support.machines import Machine


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bmc") / "bmc.pem"
    make_certificate(path)
    return path


@pytest.fixture(params=machines.KINDS)
def machine(request: pytest.FixtureRequest, tmp_path: Path, certificate: Path) -> Iterator[Machine]:
    """Reached by each real agent."""
    with machines.switched_on(request.param, tmp_path, certificate) as one:
        yield one


@pytest.fixture
def redfish(tmp_path: Path, certificate: Path) -> Iterator[Machine]:
    with machines.redfish(tmp_path, certificate) as one:
        yield one


@pytest.fixture
def ipmi(tmp_path: Path) -> Iterator[Machine]:
    with machines.ipmi(tmp_path) as one:
        yield one
