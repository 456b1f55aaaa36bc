"""A machine with an IOMMU: QEMU without KVM, the kernel of the tiny guest, and this machine's files, which it can't change.

It runs one program and goes off. For what this machine hasn't got: IOMMU groups, and devices that can be given to a guest.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.guest import CACHE, guest

VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
ROOT = Path(__file__).parents[2]
MEMORY = "2304M"
SECONDS = 480.0
DONE = "MACHINE-DONE"
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /dev /low /up /new; /bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev
for m in $(cat /lib/mod/order); do insmod /lib/mod/$m; done
mount -t virtiofs -o ro root /low; mount -t tmpfs -o size=600m up /up; mkdir /up/changed /up/work
mount -t overlay -o lowerdir=/low,upperdir=/up/changed,workdir=/up/work root /new
mount -t proc proc /new/proc; mount -t sysfs sys /new/sys; mount -t devtmpfs dev /new/dev
exec switch_root /new /bin/bash {script}
"""
SCRIPT = """
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root PYTHONPATH={root}
mkdir -p /dev/pts /dev/shm; mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm; mount -t tmpfs run /run; mkdir /run/lock
for m in vfio_iommu_type1 vfio-pci virtio_net; do modprobe -d {modules} -S {version} $m; done
mount -t tmpfs cg /sys/fs/cgroup
for c in cpu cpuacct cpuset memory blkio devices freezer pids; do
  mkdir /sys/fs/cgroup/$c; mount -t cgroup -o $c cg /sys/fs/cgroup/$c
done
ip link set lo up; ip addr add 192.0.2.1/24 dev eth1
printf 'listen_tls = 0\\nauth_unix_rw = "none"\\nunix_sock_group = "root"\\n' > /etc/libvirt/libvirtd.conf
printf 'user = "root"\\ngroup = "root"\\nsecurity_driver = "none"\\nstdio_handler = "file"\\n' > /etc/libvirt/qemu.conf
rm -rf /etc/libvirt/qemu/networks/autostart; mkdir -p /run/libvirt /var/lib/libvirt /var/log/libvirt
libvirtd -d -p /run/libvirtd.pid
cd {root}; {python} {program}
echo {done} $?; sync; echo o > /proc/sysrq-trigger; sleep 60
"""


def run(program: Path, directory: Path) -> str:
    """What the program printed, once the machine is off. The program finds a libvirtd at qemu:///system, `eth0` that is
    nobody's, and `eth1` with an address."""
    tiny = guest()
    kernel = next((CACHE / "packages").glob("linux-image-*/boot/vmlinuz-*"))
    modules, version = kernel.parents[1], kernel.name.removeprefix("vmlinuz-")
    script, initrd, console = directory / "machine.sh", directory / "machine.gz", directory / "machine.log"
    script.write_text(
        SCRIPT.format(
            root=ROOT, modules=modules, version=version, python=sys.executable, program=program, done=DONE
        )
    )
    _initrd(directory / "tree", initrd, modules, version, INIT.format(script=script))
    socket = directory / "files"
    files = subprocess.Popen(
        [
            VIRTIOFSD,
            f"--socket-path={socket}",
            "-o",
            "source=/",
            "-o",
            "cache=always",
            "-o",
            "sandbox=chroot",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(directory / "virtiofsd.log").open("wb"),
    )
    try:
        subprocess.run(["sh", "-c", f"while [ ! -S {socket} ]; do sleep 0.1; done"], check=True, timeout=20)
        subprocess.run(_command(tiny.kernel, initrd, console, socket), check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"the machine did not end; its console: {console.read_text()}") from error
    finally:
        files.kill()
        files.wait()
        with suppress(FileNotFoundError):
            os.unlink(socket)
    said = console.read_text(errors="replace").replace("\r", "")
    assert f"{DONE} 0" in said, said
    return said


def _command(kernel: Path, initrd: Path, console: Path, socket: Path) -> list[str]:
    def nic(number: int) -> list[str]:
        """Modern virtio that goes through the IOMMU; its network is QEMU's own."""
        device = f"virtio-net-pci,netdev=n{number},mac=52:54:00:00:00:0{number},iommu_platform=on,disable-legacy=on"
        return ["-netdev", f"user,id=n{number}", "-device", f"{device},romfile=,addr={3 + number}"]

    return [
        "qemu-system-x86_64", "-machine", "q35,memory-backend=mem", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
        "-m", MEMORY, "-object", f"memory-backend-memfd,id=mem,size={MEMORY},share=on", "-nodefaults", "-display", "none",
        "-serial", f"file:{console}", "-no-reboot", "-device", "intel-iommu,intremap=on", "-kernel", str(kernel),
        "-initrd", str(initrd), "-append", "console=ttyS0 intel_iommu=on net.ifnames=0 quiet panic=-1",
        "-chardev", f"socket,id=files,path={socket}", "-device", "vhost-user-fs-pci,chardev=files,tag=root,addr=3",
        *nic(1), *nic(2), "-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r",
    ]  # fmt: skip


def _initrd(tree: Path, made: Path, modules: Path, version: str, init: str) -> None:
    place = tree / "lib/mod"
    place.mkdir(parents=True)
    (tree / "bin").mkdir()
    shutil.copy("/usr/bin/busybox", tree / "bin/busybox")
    order: list[str] = []
    for module in ("virtio_pci", "virtiofs", "overlay"):
        shown = subprocess.run(
            ["modprobe", "-d", modules, "-S", version, "--show-depends", module],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for path in re.findall(r"insmod (\S+)", shown):
            if (name := os.path.basename(path)) not in order:
                order.append(name)
                shutil.copy(path, place / name)
    (place / "order").write_text("\n".join(order))
    (tree / "init").write_text(init)
    (tree / "init").chmod(0o755)
    names = "\0".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))).encode()
    archive = subprocess.run(
        ["cpio", "--null", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names, stdout=-1, check=True
    ).stdout
    made.write_bytes(gzip.compress(archive, 1))
