"""Small reads of connected storage: what can't be read is told once, what hangs stalls nothing."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from host_agent import children, places
from host_agent.config import AgentConfig
from host_agent.places import ConnectedDomain
from host_agent.storage_watch import watch
from tests.support.agent_host import iscsi_target, make_host
from tests.support.agent_process import AgentProcess, enrol_by_hand, listener
from tests.support.plain_bus import PlainBus
from tests.support.toy_host import Control
from volery.contracts.agent import StorageChecked
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import DirectoryLocation, IscsiLocation, StorageLocation

MIB = 1024 * 1024
QUICK = {"storage_check_seconds": 0.05, "storage_check_timeout_seconds": 1.0}


class Told:
    """What the watch said, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.news = asyncio.Condition()

    async def tell(self, domain_id: str, problem: str) -> None:
        async with self.news:
            self.said.append((domain_id, problem))
            self.news.notify_all()

    async def until(self, count: int) -> tuple[str, str]:
        """The newest, once so many were said."""
        async with asyncio.timeout(15), self.news:
            await self.news.wait_for(lambda: len(self.said) >= count)
            return self.said[count - 1]


def directory(config: AgentConfig, top: Path) -> ConnectedDomain:
    """A connected directory domain with its marker."""
    domain_id = new_id()
    root = top / domain_id
    root.mkdir(parents=True)
    (root / "domain.json").write_text(json.dumps({"domain_id": domain_id}))
    return connect(config, domain_id, DirectoryLocation(path=str(top)), str(root))


def connect(
    config: AgentConfig, domain_id: str, location: StorageLocation, root: str = ""
) -> ConnectedDomain:
    domain = ConnectedDomain(domain_id=domain_id, location=location, root=root)
    places.remember(config, domain)
    return domain


@asynccontextmanager
async def watched(config: AgentConfig) -> AsyncIterator[Told]:
    host = make_host(Path(config.state_dir), **QUICK)
    told = Told()
    task = asyncio.create_task(watch(host, told.tell))
    try:
        yield told
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return AgentConfig(state_dir=str(tmp_path / "state"))


async def test_a_directory_that_went_away_is_told_once_and_so_is_its_return(
    config: AgentConfig, tmp_path: Path
) -> None:
    domain, other = directory(config, tmp_path / "a"), directory(config, tmp_path / "b")
    async with watched(config) as told:
        (tmp_path / "a").rename(tmp_path / "away")
        ident, problem = await told.until(1)
        assert ident == domain.domain_id
        assert "No such file or directory" in problem
        (tmp_path / "b").rename(tmp_path / "gone")
        assert (await told.until(2))[0] == other.domain_id
        (tmp_path / "away").rename(tmp_path / "a")
        assert await told.until(3) == (domain.domain_id, "")


async def test_one_that_hangs_is_told_and_delays_no_other(config: AgentConfig, tmp_path: Path) -> None:
    domain, other = directory(config, tmp_path / "a"), directory(config, tmp_path / "b")
    async with watched(config) as told:
        hang(domain)
        ident, problem = await told.until(1)
        assert ident == domain.domain_id
        assert "did not come back within 1 s" in problem
        Path(other.root).rename(tmp_path / "gone")
        assert (await told.until(2))[0] == other.domain_id
        mend(domain)
        assert await told.until(3) == (domain.domain_id, "")


def hang(domain: ConnectedDomain) -> None:
    """Whoever opens its marker waits for ever."""
    marker = Path(domain.root) / "domain.json"
    marker.unlink()
    os.mkfifo(marker)


def mend(domain: ConnectedDomain) -> None:
    marker = Path(domain.root) / "domain.json"
    marker.unlink()
    marker.write_text("{}")


async def test_a_read_that_cannot_be_killed_is_not_repeated(config: AgentConfig, tmp_path: Path) -> None:
    domain = directory(config, tmp_path / "a")
    lock = Path(config.state_dir) / "locks" / f"check-{domain.domain_id}"
    async with (
        children.held(lock, wait_seconds=0, otherwise="") as descriptor,
        children.child(["sleep", "60"], pass_fds=(descriptor,)),
        watched(config) as told,
    ):
        _, problem = await told.until(1)
        assert "hangs: a former read of it has not come back" in problem


async def test_a_target_that_is_gone_is_told(config: AgentConfig, tmp_path: Path) -> None:
    domain_id = new_id()
    with iscsi_target(tmp_path) as target:
        target.add_lun(1, 4 * MIB)
        target.add_lun(2, 4 * MIB)
        connect(config, domain_id, IscsiLocation(portal=target.portal, iqn=target.iqn))
        async with watched(config) as told:
            await asyncio.sleep(0.5)
            target.remove_lun(1)  # the one that is asked: another one will do
            await asyncio.sleep(0.5)
            assert told.said == []
            target.kill()
            ident, problem = await told.until(1)
            assert ident == domain_id
            assert problem


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[PlainBus]:
    server = PlainBus(tmp_path / "bus")
    server.start()
    yield server
    server.kill()


async def test_an_agent_whose_storage_hangs_goes_on_beating(tmp_path: Path, bus: PlainBus) -> None:
    control = Control()
    config = AgentConfig(state_dir=str(tmp_path / "state"))
    enrol_by_hand(tmp_path / "state", control, bus.url)
    domain = directory(config, tmp_path / "a")
    quick = {"VOLERY_AGENT_STORAGE_CHECK_SECONDS": "0.1", "VOLERY_AGENT_STORAGE_CHECK_TIMEOUT_SECONDS": "2"}
    agent = AgentProcess(tmp_path / "state", quick)
    async with listener(bus, control) as ear:
        try:
            agent.start()
            await ear.until(lambda: ear.of("storage.reported"))
            hang(domain)
            before = (await ear.until(lambda: ear.beat)).beat_seq
            (said,) = await ear.until(lambda: ear.of("storage.check_reported"))
            assert isinstance(said, StorageChecked)
            assert (said.domain_id, said.readable) == (domain.domain_id, False)
            assert "did not come back within 2 s" in said.problem
            now = (await ear.until(lambda: ear.beat)).beat_seq
            assert now - before >= 20, "2 s of beats every 0.05 s, on a busy machine"
            mend(domain)
            await ear.until(lambda: len(ear.of("storage.check_reported")) == 2)
            assert ear.of("storage.check_reported")[1].readable
            assert agent.stop() == 0
        finally:
            agent.kill()
