"""Distributions: which family this machine is of, and how files of its packages are fetched.

Packages are downloaded and unpacked, not installed: the machine itself is left as it is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volery.setup.errors import SetupError

Name = Literal["debian", "ubuntu", "el"]


@dataclass(frozen=True)
class Family:
    """What the guest image's parts are called in a family of distributions."""

    name: Name
    kernel: str
    """The package that always names the newest kernel."""
    kernel_pattern: str
    """What the package that it depends on, the kernel itself, is called; a group is its version."""
    kernel_modules: tuple[str, ...]
    """Further packages with modules; {version} is filled in."""
    others: tuple[str, ...]
    """busybox and the guest agent."""
    busybox_hint: str = ""


FAMILIES: Mapping[Name, Family] = {
    "debian": Family(
        "debian",
        "linux-image-cloud-amd64",
        r"linux-image-(\d\S*-cloud-amd64)",
        (),
        ("busybox-static", "qemu-guest-agent"),
    ),
    "ubuntu": Family(
        "ubuntu",
        "linux-image-virtual",
        r"linux-image-(\d\S*-generic)",
        ("linux-modules-{version}",),
        ("busybox-static", "qemu-guest-agent"),
    ),
    "el": Family(
        "el",
        "kernel-core",
        r"kernel-core",
        ("kernel-modules-core",),
        ("busybox", "qemu-guest-agent"),
        "busybox is in EPEL: `dnf install epel-release` first.",
    ),
}

_FAMILY_OF: Mapping[str, Name] = {
    "ubuntu": "ubuntu",
    "debian": "debian",
    "rhel": "el",
    "centos": "el",
    "ol": "el",
    "rocky": "el",
    "almalinux": "el",
    "fedora": "el",
}


def family_of(os_release: str) -> Name:
    """The family that ID or else ID_LIKE of an os-release file names; SetupError for another."""
    fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    for word in [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]:
        if word in _FAMILY_OF:
            return _FAMILY_OF[word]
    raise SetupError(
        f"{fields.get('PRETTY_NAME', 'This system')} isn't supported. Volery sets itself up on Debian"
        " 12 and 13, Ubuntu 24.04 and Enterprise Linux 9 (Oracle, Rocky, Alma, Red Hat)."
    )


def family_of_this_machine() -> Name:
    return family_of(Path("/etc/os-release").read_text())


def fetch(family: Family, root: Path) -> None:
    """Downloads the kernel, its modules, busybox and the guest agent and unpacks them under root."""
    downloads = root.with_name(root.name + ".download")
    downloads.mkdir()
    root.mkdir()
    _FETCHERS[family.name](family, downloads)
    for package in sorted(downloads.iterdir()):
        _UNPACKERS[package.suffix](package, root)
    shutil.rmtree(downloads)


def _fetch_deb(family: Family, downloads: Path) -> None:
    try:
        _download_deb(family, downloads)
    except SetupError:
        # No lists yet, or lists older than what the mirror still has.
        _run(["apt-get", "-q", "update"], downloads)
        _download_deb(family, downloads)


def _download_deb(family: Family, downloads: Path) -> None:
    # Unsandboxed: apt's own user can't write into our directory.
    _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *_debian_names(family)], downloads)


def _debian_names(family: Family) -> list[str]:
    listing = _run(["apt-cache", "depends", family.kernel], Path("/"))
    match = re.search(rf"Depends: {family.kernel_pattern}$", listing, re.MULTILINE)
    if match is None:
        raise SetupError(
            f"apt knows no kernel by the name {family.kernel}. Run `apt-get update` and look whether"
            " its sources in /etc/apt are complete."
        )
    kernel = match[0].removeprefix("Depends: ")
    return [kernel, *(m.format(version=match[1]) for m in family.kernel_modules), *family.others]


def _fetch_rpm(family: Family, downloads: Path) -> None:
    names = [family.kernel, *family.kernel_modules, *family.others]
    failed = _try(["dnf", "-q", "download", "--arch", "x86_64", "--arch", "noarch", *names], downloads)
    if failed is not None:
        raise SetupError(f"dnf couldn't download {' '.join(names)}: {failed} {family.busybox_hint}")


_FETCHERS: Mapping[Name, Callable[[Family, Path], None]] = {
    "debian": _fetch_deb,
    "ubuntu": _fetch_deb,
    "el": _fetch_rpm,
}


def _unpack_deb(package: Path, root: Path) -> None:
    _run(["dpkg-deb", "-x", str(package), str(root)], root)


def _unpack_rpm(package: Path, root: Path) -> None:
    reader = subprocess.Popen(["rpm2cpio", str(package)], stdout=subprocess.PIPE)
    done = subprocess.run(["cpio", "-idmu", "--quiet"], stdin=reader.stdout, cwd=root, check=False)
    if reader.wait() or done.returncode:
        raise SetupError(f"{package.name} can't be unpacked: is it complete?")


_UNPACKERS: Mapping[str, Callable[[Path, Path], None]] = {".deb": _unpack_deb, ".rpm": _unpack_rpm}


def _try(command: Sequence[str], directory: Path) -> str | None:
    """None when it worked, else what the program said."""
    try:
        done = subprocess.run(list(command), cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SetupError(f"{command[0]} is missing on this system.") from error
    return None if done.returncode == 0 else done.stderr.strip()


def _run(command: Sequence[str], directory: Path) -> str:
    try:
        return subprocess.run(list(command), cwd=directory, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise SetupError(f"{command[0]} is missing on this system.") from error
    except subprocess.CalledProcessError as error:
        raise SetupError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
