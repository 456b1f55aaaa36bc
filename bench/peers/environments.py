"""Where peers are installed: a virtual environment for each Python program, Debian's packages unpacked, all in a cache directory.

Nothing of them is a dependency of the product, and nothing of the product is installed beside them. Versions are pinned: of
Python programs with all that they need in <name>.txt, of Debian's packages by Debian's stable release.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path
from shutil import rmtree

CACHE = Path(os.environ.get("VOLERY_BENCH_PEERS", Path.home() / ".cache" / "volery-bench"))
PINNED = Path(__file__).parent
HTOOLS_PACKAGES = ("ganeti-htools-3.0", "libpcre3")
"""hbal, and the one library of its that a small Debian lacks."""
HTOOLS_PROGRAMS = "usr/lib/ganeti/3.0/usr/bin"
LIBRARIES = "lib/x86_64-linux-gnu:usr/lib/x86_64-linux-gnu"


def pinned(name: str, package: str) -> str:
    """The version that a peer's environment has of a package."""
    lines = (PINNED / f"{name}.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


def environment(name: str) -> Path:
    """The directory of a peer's virtual environment with what bench/peers/<name>.txt pins."""
    wanted = PINNED / f"{name}.txt"
    place = CACHE / name
    mark = place / "installed"
    said = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()
    if mark.exists() and mark.read_text() == said:
        return place
    print(f"  installing the peer {name} into {place} …", file=sys.stderr, flush=True)
    rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    subprocess.run([place / "bin" / "pip", "install", "-q", "--no-deps", "-r", wanted], check=True)
    mark.write_text(said)
    return place


def htools() -> Path:
    """The directory of Ganeti's programs: where VOLERY_BENCH_HTOOLS says, installed, or unpacked from Debian's package."""
    if said := os.environ.get("VOLERY_BENCH_HTOOLS"):
        return Path(said)
    if (installed := Path("/") / HTOOLS_PROGRAMS / "hbal").exists():
        return installed.parent
    place = CACHE / "htools"
    if not (place / "installed").exists():
        print(
            f"  unpacking Debian's {', '.join(HTOOLS_PACKAGES)} into {place} …", file=sys.stderr, flush=True
        )
        rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        subprocess.run(["apt-get", "-qq", "download", *HTOOLS_PACKAGES], cwd=place, check=True)
        for package in place.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, place], check=True)
        (place / "installed").touch()
    return place / HTOOLS_PROGRAMS


def htools_environ() -> dict[str, str]:
    """With the libraries that were unpacked beside them."""
    found = ":".join(str(CACHE / "htools" / each) for each in LIBRARIES.split(":"))
    return {**os.environ, "LD_LIBRARY_PATH": found}
