"""The small guest image: built without mounting anything, and it really boots."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.setup.guest import booted
from volery.setup import guest_image
from volery.setup.errors import SetupError
from volery.setup.guest_image import Entry, GuestImage, cpio
from volery.setup.home import Home
from volery.setup.packages import family_of

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache() -> Home:
    """Kept between test runs: fetching a kernel each time would be rude to the mirror."""
    home = Home(REPOSITORY / "build" / "guest")
    home.path.parent.mkdir(exist_ok=True)
    home.create()
    return home


@pytest.fixture(scope="module")
def image(cache: Home) -> GuestImage:
    return guest_image.build(cache)


def overlay(image: GuestImage, place: Path) -> str:
    path = place / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image.disk), "-F", "qcow2", str(path)],
        check=True,
    )
    return str(path)


def wait_for(ask: object, seconds: float = 20) -> None:
    assert callable(ask)
    deadline = time.monotonic() + seconds
    while not ask():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_boots_from_its_disk_with_its_name_an_address_and_a_counter(
    image: GuestImage, tmp_path: Path
) -> None:
    content = tmp_path / "content"
    content.mkdir()
    (content / "tick").touch()
    disk = tmp_path / "tick.raw"
    with disk.open("wb") as file:
        file.truncate(16 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-L", "volery-tick", "-d", str(content), str(disk)], check=True)
    drives = [
        "-drive", f"file={overlay(image, tmp_path)},format=qcow2,if=virtio",
        "-drive", f"file={disk},format=raw,if=virtio",
    ]  # fmt: skip
    with booted(tmp_path, drives) as guest:
        assert guest.ask("guest-get-host-name")["host-name"] == "web-1"
        assert guest.ask("guest-get-osinfo")["id"] == "volery-guest"

        def addresses() -> list[str]:
            nics = guest.ask("guest-network-get-interfaces")
            return [a["ip-address"] for nic in nics for a in nic.get("ip-addresses", [])]

        wait_for(lambda: "10.0.2.15" in addresses())
        wait_for(lambda: int(guest.run("tail -1 /mnt/tick") or 0) >= 3)
        assert {f["mountpoint"] for f in guest.ask("guest-get-fsinfo")} == {"/data", "/mnt"}
        assert guest.run("echo kept > /data/kept; sync; wget -q -O- http://127.0.0.1/") == "web-1\n"
        guest.press_power_button()
        assert guest.process.returncode == 0
    counted = subprocess.run(
        ["debugfs", "-R", "cat /tick", str(disk)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert counted == [str(n) for n in range(1, len(counted) + 1)]
    assert len(counted) >= 3


def test_boots_without_a_disk_and_takes_its_name_from_a_cloud_init_disc(
    image: GuestImage, tmp_path: Path
) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "meta-data").write_text("instance-id: i-1\nlocal-hostname: from-the-disc\n")
    disc = tmp_path / "seed.iso"
    subprocess.run(
        ["xorriso", "-as", "mkisofs", "-quiet", "-V", "cidata", "-J", "-r", "-o", str(disc),
         str(tmp_path / "seed")],
        check=True, capture_output=True,
    )  # fmt: skip
    arguments = [
        "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", "console=ttyS0 quiet",
        "-device", "virtio-scsi-pci", "-drive", f"file={disc},if=none,id=cd,media=cdrom,readonly=on",
        "-device", "scsi-cd,drive=cd", "-fw_cfg", "name=opt/volery/hostname,string=from-firmware",
    ]  # fmt: skip
    with booted(tmp_path, arguments) as guest:
        assert guest.ask("guest-get-host-name")["host-name"] == "from-the-disc"
        assert guest.run("cat /sys/firmware/qemu_fw_cfg/by_name/opt/volery/hostname/raw") == "from-firmware"
        guest.shut_down()
        assert guest.process.returncode == 0


def test_building_again_does_nothing_and_a_lost_file_is_built(cache: Home, image: GuestImage) -> None:
    before = image.disk.stat().st_mtime_ns
    again = guest_image.build(cache)
    assert not again.built
    assert again.disk.stat().st_mtime_ns == before
    assert again.sha256 == image.sha256


def test_other_inputs_are_noticed(home: Home, cache: Home, image: GuestImage) -> None:
    for path in (image.disk, image.kernel, image.initrd):
        (home.images / path.name).symlink_to(path)
    record = json.loads((cache.images / "volery-guest.json").read_text())
    (home.images / "volery-guest.json").write_text(json.dumps(record))
    assert not guest_image.build(home).built
    (home.images / "volery-guest.json").write_text(json.dumps({**record, "inputs": "other"}))
    assert guest_image._kept(home, record["inputs"]) is None


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    entries = [Entry("a", 0o040755), Entry("a/b", 0o100644, b"12345"), Entry("c", 0o100755, b"")]
    archive = cpio(entries)
    assert archive == cpio(entries)
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "a" / "b").read_bytes() == b"12345"
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("os_release", "family"),
    [
        ('ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n', "debian"),
        ("ID=ubuntu\nID_LIKE=debian\n", "ubuntu"),
        ('ID="ol"\nID_LIKE="fedora"\n', "el"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "el"),
        ("ID=mint\nID_LIKE=\"ubuntu debian\"\n", "ubuntu"),
    ],
)  # fmt: skip
def test_distributions_are_told_by_their_kin(os_release: str, family: str) -> None:
    assert family_of(os_release) == family


def test_an_unknown_system_is_told_what_is_supported() -> None:
    with pytest.raises(SetupError, match=r"Plan 9 isn.t supported.*Debian"):
        family_of('ID=plan9\nPRETTY_NAME="Plan 9"\n')
