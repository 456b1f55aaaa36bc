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


@pytest.fixture(params=["redfish", "ipmi"])
def machine(request: pytest.FixtureRequest, tmp_path: Path, certificate: Path) -> Iterator[Machine]:
    """A machine that is on, reached by each real agent."""
    made = machines.redfish(tmp_path, certificate) if request.param == "redfish" else machines.ipmi(tmp_path)
    with made as one:
        one.chassis.power_on()
        (one.chassis.directory / "switched").unlink()
        yield one


@pytest.fixture
def redfish(tmp_path: Path, certificate: Path) -> Iterator[Machine]:
    with machines.redfish(tmp_path, certificate) as one:
        yield one


@pytest.fixture
def ipmi(tmp_path: Path) -> Iterator[Machine]:
    with machines.ipmi(tmp_path) as one:
        yield one
