"""Connecting storage domains: markers, strangers, what hangs, and iSCSI discovery with CHAP."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_agent import children, files, iscsi, mounts, places, storage
from host_agent.action import Host
from tests.support.agent_host import IscsiTarget, iscsi_target, make_host, qemu_img, running
from volery.contracts.agent import StorageDomainReport
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import (
    ConnectStorage,
    DirectoryLocation,
    DisconnectStorage,
    DiscoverIscsi,
    IscsiLocation,
    StorageLocation,
)

MIB = 1024 * 1024
USER, PASSWORD = "volery", "chap-secret-12"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return make_host(tmp_path / "state")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


async def connect(
    host: Host,
    location: StorageLocation | Path,
    domain_id: str,
    *,
    initialise: bool = False,
    known: tuple[str, ...] = (),
) -> StorageDomainReport:
    where = DirectoryLocation(path=str(location)) if isinstance(location, Path) else location
    order = ConnectStorage(domain_id=domain_id, location=where, initialise=initialise, known=known)
    return await storage.connect(host, order, running())


async def test_connect_initialises_once_and_a_second_host_finds_it(
    host: Host, shared: Path, tmp_path: Path
) -> None:
    domain_id = new_id()
    report = await connect(host, shared, domain_id, initialise=True)
    assert report.reachable
    assert 0 < report.available_bytes <= report.capacity_bytes
    marker = shared / domain_id / "domain.json"
    assert json.loads(marker.read_text()) == {
        "domain_id": domain_id,
        "installation": "test01",
        "version": 1,
    }
    before = marker.stat().st_ino
    other = make_host(tmp_path / "other")
    assert (await connect(other, shared, domain_id)).reachable
    assert (await connect(host, shared, domain_id, initialise=True)).reachable
    assert marker.stat().st_ino == before
    assert sorted(os.listdir(shared / domain_id)) == ["disks", "domain.json", "staging"]


async def test_a_directory_that_is_not_there_or_lost_its_mount_is_refused(host: Host, shared: Path) -> None:
    with pytest.raises(Refused, match="isn't a directory") as refused:
        await connect(host, shared / "absent", new_id(), initialise=True)
    assert refused.value.kind is Kind.NOT_FOUND
    with pytest.raises(Refused, match="Is the shared storage mounted"):
        await connect(host, shared, new_id())
    (shared / "file").touch()
    with pytest.raises(Refused, match="isn't a directory"):
        await connect(host, shared / "file", new_id(), initialise=True)
    assert places.connected(host.config) == ()


@pytest.mark.parametrize("path", ["relative", "/tmp/../etc", "", "/tmp/a\nb"])
async def test_odd_paths_are_refused(host: Host, path: str) -> None:
    order = ConnectStorage(domain_id=new_id(), location=DirectoryLocation(path=path), initialise=True)
    with pytest.raises(Refused, match="absolute path") as refused:
        await storage.connect(host, order, running())
    assert refused.value.kind is Kind.INVALID


NFS = "97 28 0:51 / /mnt rw,relatime shared:7 - {kind} nas:/vms rw,vers={version},hard,proto=tcp,local_lock={locks}\n"


@pytest.mark.parametrize(
    ("kind", "version", "locks", "problem"),
    [
        ("nfs4", "4.2", "none", ""),
        ("nfs4", "4.0", "none", ""),
        ("nfs", "3", "none", "NFS version 3: its server would keep a dead host's locks"),
        ("nfs", "3", "all", "NFS version 3"),
        ("nfs4", "4.1", "posix", "local_lock=posix: locks on disks would hold on one host only"),
        ("ext4", "3", "all", ""),
    ],
)
def test_nfs_that_keeps_or_has_no_locks_is_refused(kind: str, version: str, locks: str, problem: str) -> None:
    said = mounts.mount_problem("/mnt", NFS.format(kind=kind, version=version, locks=locks))
    assert problem in said
    assert bool(said) is bool(problem)
    assert not said or "Mount nas:/vms there with `-t nfs4 -o vers=4.2`" in said


def test_the_kernels_table_says_what_a_directory_is_mounted_from(shared: Path, tmp_path: Path) -> None:
    device = os.stat(shared).st_dev
    line = mounts.mounted(str(shared))
    assert line.split()[2] == f"{os.major(device)}:{os.minor(device)}"
    assert mounts.mount_problem(str(shared), line) == ""


def test_a_domain_on_such_a_mount_is_not_made(shared: Path, tmp_path: Path) -> None:
    """With a table of our own, as its program reads the kernel's: nothing is touched before it is refused."""
    device = os.stat(shared).st_dev
    table = tmp_path / "mountinfo"
    line = NFS.format(kind="nfs", version="3", locks="none")
    table.write_text(line.replace("0:51", f"{os.major(device)}:{os.minor(device)}"))
    asked = {"path": str(shared), "domain_id": new_id(), "installation": "test01", "initialise": True}
    with pytest.raises(files.Refusal, match="NFS version 3"):
        files.connect(asked, str(table))
    assert os.listdir(shared) == []


async def test_an_id_that_is_a_path_is_refused(host: Host, shared: Path) -> None:
    with pytest.raises(Refused, match="isn't the id"):
        await connect(host, shared, "../escape", initialise=True)


async def test_another_installation_is_refused(host: Host, shared: Path, tmp_path: Path) -> None:
    domain_id = new_id()
    await connect(host, shared, domain_id, initialise=True)
    marker = shared / domain_id / "domain.json"
    marker.write_text(json.dumps({"domain_id": domain_id, "installation": "other", "version": 1}))
    for initialise in (False, True):
        with pytest.raises(Refused, match="another Volery") as refused:
            await connect(host, shared, domain_id, initialise=initialise)
        assert refused.value.kind is Kind.CONFLICT
    (report,) = await storage.report(host)
    assert not report.reachable
    assert "another Volery" in report.problem


@pytest.mark.parametrize("content", ["", "{", "[]", '{"domain_id": 1}', "\0\0"])
async def test_a_damaged_marker_is_refused(host: Host, shared: Path, content: str) -> None:
    domain_id = new_id()
    await connect(host, shared, domain_id, initialise=True)
    (shared / domain_id / "domain.json").write_text(content)
    with pytest.raises(Refused, match="marker"):
        await connect(host, shared, domain_id)


async def test_the_report_lists_volumes_and_strangers_also_after_a_restart(host: Host, shared: Path) -> None:
    domain_id = new_id()
    await connect(host, shared, domain_id, initialise=True)
    disks = shared / domain_id / "disks"
    thin, raw = disks / f"{new_id()}.qcow2", disks / f"{new_id()}.raw"
    qemu_img("create", "-q", "-f", "qcow2", thin, "64M")
    raw.write_bytes(b"x" * MIB)
    (disks / "notes.txt").touch()
    (disks / f"{new_id()}.raw").symlink_to("/etc/shadow")
    (shared / domain_id / "lost+found").mkdir()

    report = await connect(host, shared, domain_id, known=(str(thin),))
    assert {(v.path, v.size_bytes, str(v.format)) for v in report.volumes} == {
        (str(thin), 64 * MIB, "qcow2"),
        (str(raw), MIB, "raw"),
    }
    assert str(raw) in report.strangers
    assert str(thin) not in report.strangers
    assert len(report.strangers) == 4

    after_restart = make_host(Path(host.config.state_dir))
    (again,) = await storage.report(after_restart)
    assert again.volumes == report.volumes
    assert len(again.strangers) == 3
    await storage.disconnect(host, DisconnectStorage(domain_id=domain_id), running())
    await storage.disconnect(host, DisconnectStorage(domain_id=domain_id), running())
    assert await storage.report(host) == ()


async def test_a_removed_domain_takes_only_its_empty_directory_along(host: Host, shared: Path) -> None:
    (shared / "somebody's").touch()
    for stranger in ("", "disks/notes.txt", "staging/x", "lost+found"):
        domain_id = new_id()
        await connect(host, shared, domain_id, initialise=True)
        if stranger:
            (shared / domain_id / stranger).touch()
        order = DisconnectStorage(domain_id=domain_id, remove=True, path=str(shared))
        await storage.disconnect(host, order, running())
        await storage.disconnect(host, order, running())
        assert (shared / domain_id).exists() is bool(stranger)
    assert (shared / "somebody's").exists()


async def test_another_installations_directory_is_not_removed(host: Host, shared: Path) -> None:
    domain_id = new_id()
    await connect(host, shared, domain_id, initialise=True)
    marker = shared / domain_id / "domain.json"
    marker.write_text(json.dumps({"domain_id": domain_id, "installation": "other", "version": 1}))
    order = DisconnectStorage(domain_id=domain_id, remove=True, path=str(shared))
    with pytest.raises(Refused, match="another Volery"):
        await storage.disconnect(host, order, running())
    assert marker.exists()


async def test_a_look_that_hangs_is_reported_and_not_repeated(host: Host, shared: Path) -> None:
    domain_id = new_id()
    await connect(host, shared, domain_id, initialise=True)
    lock = Path(host.config.state_dir) / "locks" / f"look-{domain_id}"
    async with (
        children.held(lock, wait_seconds=0, otherwise="") as descriptor,
        children.child(["sleep", "60"], pass_fds=(descriptor,)),
    ):
        (report,) = await storage.report(host)
    assert not report.reachable
    assert "hangs" in report.problem
    (report,) = await storage.report(host)
    assert report.reachable


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IscsiTarget]:
    with iscsi_target(tmp_path_factory.mktemp("target"), USER, PASSWORD) as made:
        made.add_lun(1, 100 * MIB)
        made.add_lun(7, 50 * MIB)
        yield made


async def test_discovery_finds_luns_with_their_exact_sizes(host: Host, target: IscsiTarget) -> None:
    found = await storage.discover(
        host, DiscoverIscsi(portal=target.portal, chap_user=USER, chap_password=PASSWORD), running()
    )
    (one,) = found.targets
    assert (one.iqn, one.problem) == (target.iqn, "")
    assert [(lun.lun, lun.size_bytes) for lun in one.luns] == [(1, 100 * MIB), (7, 50 * MIB)]


@pytest.mark.parametrize(("user", "password"), [("", ""), (USER, "wrong-secret"), ("other", PASSWORD)])
async def test_a_refused_login_says_so(host: Host, target: IscsiTarget, user: str, password: str) -> None:
    order = DiscoverIscsi(portal=target.portal, chap_user=user, chap_password=password)
    (one,) = (await storage.discover(host, order, running())).targets
    assert "CHAP" in one.problem
    assert PASSWORD not in one.problem
    where = IscsiLocation(portal=target.portal, iqn=target.iqn, chap_user=user, chap_password=password)
    with pytest.raises(Refused, match="CHAP") as refused:
        await connect(host, where, new_id())
    assert refused.value.kind is Kind.FORBIDDEN


async def test_a_target_whose_neighbour_refuses_us_is_listed(host: Host, tmp_path: Path) -> None:
    with iscsi_target(tmp_path, "neighbour", "another-secret") as crowded:
        crowded.add_target(2, "iqn.2026-11.test.volery:ours", USER, PASSWORD)
        crowded.add_lun(3, 64 * MIB, tid=2)
        where = IscsiLocation(
            portal=crowded.portal,
            iqn="iqn.2026-11.test.volery:ours",
            chap_user=USER,
            chap_password=PASSWORD,
        )
        report = await connect(host, where, domain_id := new_id(), known=("3",))
        assert [(v.path, v.size_bytes) for v in report.volumes] == [("3", 64 * MIB)]
        assert report.strangers == ()
        assert PASSWORD not in repr(await storage.report(host))
    (gone,) = await storage.report(host)
    assert (gone.domain_id, gone.reachable) == (domain_id, False)
    state = Path(host.config.state_dir) / "storage.json"
    assert state.stat().st_mode & 0o077 == 0


async def test_an_unknown_target_and_a_dead_portal_are_told_apart(host: Host, target: IscsiTarget) -> None:
    where = IscsiLocation(
        portal=target.portal, iqn="iqn.2026-11.test:none", chap_user=USER, chap_password=PASSWORD
    )
    with pytest.raises(Refused, match="has no target") as refused:
        await connect(host, where, new_id())
    assert refused.value.kind is Kind.NOT_FOUND
    with pytest.raises(Refused) as refused:
        await storage.discover(host, DiscoverIscsi(portal="127.0.0.1:1"), running())
    assert refused.value.kind is Kind.UNAVAILABLE


@pytest.mark.parametrize("portal", ["", "host", "host:x", "a b:1", "-s:1x", "h:1/../x", "u%p@h:1"])
async def test_odd_portals_are_refused(host: Host, portal: str) -> None:
    with pytest.raises(Refused, match="portal"):
        await storage.discover(host, DiscoverIscsi(portal=portal), running())


def test_only_disks_count_as_luns() -> None:
    output = (
        "Target:iqn.a:1 Portal:10.0.0.1:3260,1\n"
        "Lun:0    Type:STORAGE_ARRAY_CONTROLLER\n"
        "Lun:1    Type:DIRECT_ACCESS (Size:63M)\n"
        "Target:iqn.b:1 Portal:10.0.0.1:3260,1\n"
        "Lun:2    Type:DIRECT_ACCESS (Size:1G)\n"
        "Lun:5    Type:MMC\n"
    )
    assert iscsi.parse_luns(output, "iqn.a:1") == [1]
    assert iscsi.parse_luns(output, "iqn.b:1") == [2]
    assert iscsi.parse_luns(output, "iqn.c:1") == []


async def test_an_abandoned_domain_leaves_nothing_but_what_others_put_there(host: Host, shared: Path) -> None:
    first, second = new_id(), new_id()
    for domain_id in (first, second):
        await connect(host, shared, domain_id, initialise=True)
    (shared / second / "disks" / "stranger.raw").write_bytes(b"x")
    for domain_id in (first, second, new_id()):
        order = DisconnectStorage(domain_id=domain_id, remove=True, path=str(shared))
        await storage.disconnect(host, order, running())
    assert [path.name for path in shared.iterdir()] == [second]
    assert (shared / second / "domain.json").exists()
    assert places.connected(host.config) == ()
    half = new_id()
    (shared / half / "disks").mkdir(parents=True)
    order = DisconnectStorage(domain_id=half, remove=True, path=str(shared))
    await storage.disconnect(host, order, running())
    assert not (shared / half).exists()
