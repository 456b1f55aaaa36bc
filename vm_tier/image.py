"""The disk that every host starts from: Debian 12, what a host needs, this checkout, and the agent's unit."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.commands import run
from lab.errors import LabError
from volery.setup.programs import REPOSITORY

MIRROR = "http://deb.debian.org/debian"
FIRST = "ca-certificates,systemd-sysv,udev,iproute2,python3-minimal"
PACKAGES = (
    "linux-image-amd64 initramfs-tools openssh-server nfs-kernel-server nfs-common dbus kmod procps"
    " kdump-tools makedumpfile fence-agents iputils-ping"
)
MODULES = "virtio_blk virtio_pci ext4 virtio_net virtio_rng virtio_scsi i6300esb"
SIZE = "5G"
BUILD_SECONDS = 3600.0

SET_UP = """
set -e
export DEBIAN_FRONTEND=noninteractive
printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
apt-get -q update
apt-get -q -y install --no-install-recommends {packages}
cd /opt/volery && sh deploy/bootstrap.sh run
rm /usr/sbin/policy-rc.d
"""
ENDS = """
set -e
printf '%s\\n' {modules} > /etc/initramfs-tools/modules
printf 'MODULES=list\\nCOMPRESS=gzip\\n' > /etc/initramfs-tools/conf.d/vm-tier
update-initramfs -u
kernel=$(linux-version list | tail -1)
/etc/kernel/postinst.d/kdump-tools "$kernel"
cp /etc/kdump/sysctl.conf "/var/lib/kdump/latest_sysctls-$kernel"
passwd -d root
printf 'kvm_amd\\n' > /etc/modules-load.d/vm-tier.conf
printf '[nfsd]\\nvers3=n\\ngrace-time=15\\n' > /etc/nfs.conf.d/vm-tier.conf
cp /opt/volery/deploy/volery-agent.service /etc/systemd/system/
systemctl -q enable systemd-networkd systemd-network-generator
systemctl -q disable {unwanted}
ssh-keygen -A
apt-get clean
rm -rf /var/lib/apt/lists/* /root/.cache /usr/share/doc /usr/share/man
"""
UNWANTED = "nfs-server apt-daily.timer apt-daily-upgrade.timer e2scrub_reap kdump-tools iscsid open-iscsi libvirt-guests"


@dataclass(frozen=True)
class Image:
    """Files of a built one."""

    directory: Path

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def disk(self) -> Path:
        return self.directory / "host.qcow2"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def key(self) -> Path:
        """Opens every host's root account over SSH."""
        return self.directory / "key"


def build(directory: Path) -> Image:
    """What is missing of it. Raises LabError."""
    image = Image(directory)
    if image.disk.exists():
        return image
    directory.mkdir(parents=True, exist_ok=True)
    if not (image.root / "opt/volery/.venv/bin/python").exists():
        _make_root(image)
    if not image.key.exists():
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(image.key)])
    _finish(image)
    return image


def _make_root(image: Image) -> None:
    root = image.root
    if not (root / "usr/bin/python3").exists():
        shutil.rmtree(root, ignore_errors=True)
        run(
            ["debootstrap", "--variant=minbase", f"--include={FIRST}", "bookworm", str(root), MIRROR],
            timeout_seconds=BUILD_SECONDS,
        )
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    own = bundle.read_bytes()
    # Whoever stands between this machine and the package index is trusted here, and nowhere later.
    shutil.copyfile("/etc/ssl/certs/ca-certificates.crt", bundle)
    _checkout(root / "opt/volery")
    _in(root, SET_UP.format(packages=PACKAGES))
    bundle.write_bytes(own)


def _checkout(into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", "HEAD"], capture_output=True, check=False
    )
    if packed.returncode:
        raise LabError(f"the checkout {REPOSITORY} can't be packed: {packed.stderr.decode()}")
    subprocess.run(["tar", "-x", "-C", str(into)], input=packed.stdout, check=True)


def _finish(image: Image) -> None:
    root = image.root
    _checkout(root / "opt/volery")
    _in(root, ENDS.format(modules=MODULES, unwanted=UNWANTED))
    authorized = root / "root/.ssh/authorized_keys"
    authorized.parent.mkdir(mode=0o700, exist_ok=True)
    authorized.write_text(image.key.with_suffix(".pub").read_text())
    for name, target in (("vmlinuz", image.kernel), ("initrd.img", image.initrd)):
        newest = sorted((root / "boot").glob(f"{name}-*"))[-1]
        shutil.copyfile(newest, target)
    raw = image.directory / "host.raw"
    run(["truncate", "-s", SIZE, str(raw)])
    run(["mkfs.ext4", "-q", "-F", "-d", str(root), str(raw)], timeout_seconds=BUILD_SECONDS)
    run(["qemu-img", "convert", "-O", "qcow2", str(raw), f"{image.disk}.new"], timeout_seconds=BUILD_SECONDS)
    raw.unlink()
    Path(f"{image.disk}.new").rename(image.disk)


def _in(root: Path, script: str) -> None:
    """Runs it in the new root, with its own /proc, in a mount namespace that ends with it."""
    enter = f'mount --bind /proc {root}/proc && exec chroot {root} sh -c "$1"'
    run(["unshare", "--mount", "sh", "-c", enter, "sh", script], timeout_seconds=BUILD_SECONDS)
