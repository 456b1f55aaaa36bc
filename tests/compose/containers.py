"""podman and podman-compose as they run on a machine that is a container itself, with base images made here.

Two things are missing on such machines, and both are mended for our own processes only: without CAP_SYS_RESOURCE
crun can't raise limits, so a wrapper takes them out of what it is told; and crun takes a cgroup2 mounted beside
cgroup1 for an error, so podman runs in a mount namespace without it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = Path("/var/cache/volery-tests/compose")
"""The base system and podman's layers, so that only what changed is built again."""
RUN: Final = Path("/run/volery-compose-tests")
"""What podman forgets with a reboot. It refuses a storage that was used with another such place."""
MIRROR: Final = "http://deb.debian.org/debian"
RELEASE: Final = "bookworm"
PACKAGES: Final = "ca-certificates,python3,python3-venv,python3-dev,postgresql"
CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"
BASE: Final = f"localhost/volery-test-debian:{RELEASE}"
ENVIRONMENT: Final = "localhost/volery-test-environment:latest"
IMAGE: Final = "localhost/volery-test:latest"
POSTGRES: Final = "localhost/volery-test-postgres:latest"
UNIFIED: Final = Path("/sys/fs/cgroup/unified")

CRUN: Final = """\
#!/usr/bin/python3
import json, os, sys

given = sys.argv[1:]

def option(*names):
    for i, word in enumerate(given):
        if word in names and i + 1 < len(given):
            return given[i + 1]
        for name in names:
            if word.startswith(name + "="):
                return word.split("=", 1)[1]

def unlimited(path, process_of):
    with open(path) as file:
        config = json.load(file)
    for name in ("rlimits", "oomScoreAdj"):
        process_of(config).pop(name, None)
    with open(path, "w") as file:
        json.dump(config, file)

if "create" in given or "run" in given:
    unlimited(os.path.join(option("--bundle", "-b") or ".", "config.json"), lambda config: config["process"])
elif "exec" in given and option("--process", "-p"):
    unlimited(option("--process", "-p"), lambda config: config)
os.execv("/usr/bin/crun", ["crun"] + given)
"""

CONTAINERS_CONF: Final = """\
[engine]
runtime = "crun"
[engine.runtimes]
crun = ["{directory}/crun"]
[network]
network_backend = "netavark"
network_config_dir = "{directory}/networks"
"""

PODMAN: Final = """\
#!/bin/sh
# Health checks would be timers of systemd, which doesn't run here.
export CONTAINERS_CONF={directory}/containers.conf BUILDAH_ISOLATION=chroot DISABLE_HC_SYSTEMD=true
exec {enter} /usr/bin/podman --root {cache}/storage --runroot {run} --tmpdir {run}/tmp "$@"
"""


@dataclass
class Podman:
    """podman with a state of its own; `bin` is a directory for PATH in which `podman` is this one."""

    directory: Path
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.directory / "log"

    @property
    def bin(self) -> Path:
        return self.directory / "bin"

    def __call__(
        self, *arguments: str, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs podman; with `check`, fails with what it said."""
        return self._run([str(self.bin / "podman"), *arguments], check, **options)

    def _run(self, command: list[str], check: bool, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}\n")
        assert not check or done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout}\n{done.stderr}"
        return done


@contextmanager
def podman(directory: Path) -> Iterator[Podman]:
    """podman for the time of the block. One at a time on a machine: they share what was built."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for place in ("bin", "networks"):
        (directory / place).mkdir()
    with (CACHE / "lock").open("w") as lock, _mount_namespace(directory) as enter:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _program(directory / "crun", CRUN)
        (directory / "containers.conf").write_text(CONTAINERS_CONF.format(directory=directory))
        script = PODMAN.format(directory=directory, cache=CACHE, run=RUN, enter=shlex.join(enter))
        _program(directory / "bin" / "podman", script)
        yield Podman(directory)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@contextmanager
def _mount_namespace(directory: Path) -> Iterator[list[str]]:
    """The command that enters a mount namespace without the second cgroup tree; empty where there is none."""
    if not UNIFIED.is_mount():
        yield []
        return
    place = directory / "namespace"
    place.mkdir()
    handle = place / "mnt"
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "--make-private", place], check=True)
        handle.touch()
        subprocess.run(["unshare", f"--mount={handle}", "--propagation", "private", "true"], check=True)
        enter = ["nsenter", f"--mount={handle}"]
        subprocess.run([*enter, "umount", str(UNIFIED)], check=True)
        yield [*enter, f"--wd={ROOT}"]
    finally:
        # Layers of our storage are mounted in the namespace, which ends with its last process and this.
        subprocess.run(["umount", str(handle)], check=False)
        subprocess.run(["umount", str(place)], check=False)


def build(podman: Podman) -> None:
    """The base image, the stand-in of PostgreSQL's image, and Volery's own from deploy/Dockerfile."""
    if podman("image", "exists", BASE, check=False).returncode:
        _import_base(podman)
    argument = f"--build-arg=BASE={BASE}"
    common = ("build", "--layers", "--pull=never", argument)
    dockerfile = ("-f", "deploy/Dockerfile")
    podman(*common, "-t", POSTGRES, "tests/compose/postgres")
    # Tagged, so that it isn't pruned: it takes longest and changes with the lock file only.
    podman(*common, *dockerfile, "--target=environment", "-t", ENVIRONMENT, ".")
    podman(*common, *dockerfile, "-t", IMAGE, ".")
    podman("image", "prune", "--force")


def _import_base(podman: Podman) -> None:
    """Debian with Python, in place of the official image of Python; trusting whom this machine trusts."""
    system = CACHE / "debian"
    shutil.rmtree(system, ignore_errors=True)
    bootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(system), MIRROR]
    podman._run(bootstrap, check=True)
    own = Path("/usr/local/share/ca-certificates")
    if own.is_dir():
        shutil.copytree(own, system / own.relative_to("/"), dirs_exist_ok=True)
        podman._run(["chroot", str(system), "update-ca-certificates"], check=True)
    archive = CACHE / "debian.tar"
    podman._run(["tar", "-C", str(system), "-cf", str(archive), "."], check=True)
    podman(
        "import", "--change", f"ENV PIP_CERT={CERTIFICATES}", "--change", 'CMD ["bash"]', str(archive), BASE
    )
    archive.unlink()
    shutil.rmtree(system)


@dataclass
class Stack:
    """docker-compose.yml, running under a name of its own."""

    podman: Podman
    name: str
    settings: Mapping[str, str]
    """What an administrator would write into `.env`."""

    def _compose(self, *arguments: str) -> None:
        environment = {**os.environ, **self.settings, "PATH": f"{self.podman.bin}:{os.environ['PATH']}"}
        self.podman._run(["podman-compose", "-p", self.name, *arguments], check=True, env=environment)

    def file(self) -> dict[str, Any]:
        """docker-compose.yml with the settings in place of its variables."""

        def value(match: re.Match[str]) -> str:
            return self.settings.get(match[1], match[2] or "")

        text = (ROOT / "docker-compose.yml").read_text()
        return dict(yaml.safe_load(re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, text)))

    def up(self) -> None:
        """Everything without a profile: podman-compose 1.0.3 doesn't know profiles."""
        services = [name for name, service in self.file()["services"].items() if "profiles" not in service]
        self._compose("up", "-d", "--no-build", *services)

    def down(self) -> None:
        self._compose("down", "-v")
        # podman-compose 1.0.3 leaves the network, and netavark 1.4 the empty chain of its published ports.
        network = f"{self.name}_default"
        self.podman("network", "rm", "--force", network)
        chain = f"NETAVARK-DN-{hashlib.sha512(network.encode()).hexdigest()[:13].upper()}"
        subprocess.run(["iptables", "-t", "nat", "-X", chain], check=False, capture_output=True)

    def start_agent(self, state: Path, **environment: str) -> None:
        """The service `agent`, as the file says, but with its state in a directory of the test's own."""
        agent = self.file()["services"]["agent"]
        settings = {k: v for k, v in agent["environment"].items() if v is not None} | environment
        arguments = ["run", "-d", f"--name={self.container('agent')}", f"--user={agent['user']}"]
        arguments += [f"--network={agent['network_mode']}", f"--pid={agent['pid']}"]
        arguments += ["--privileged"] if agent["privileged"] else []
        arguments += [f"--env={name}={value}" for name, value in settings.items()]
        arguments += [f"--volume={state}:/var/lib/volery", agent["image"], *agent["command"]]
        self.podman(*arguments)

    def container(self, service: str, number: int = 1) -> str:
        return f"{self.name}_{service}_{number}"

    def exec(self, service: str, *command: str, number: int = 1, check: bool = True) -> str:
        """What a command in the service's container says."""
        return self.podman("exec", self.container(service, number), *command, check=check).stdout

    def logs(self, service: str, number: int = 1) -> str:
        done = self.podman("logs", self.container(service, number), check=False)
        return done.stdout + done.stderr

    def kill(self, service: str, number: int = 1) -> None:
        self.podman("kill", "--signal=KILL", self.container(service, number))

    def containers(self) -> list[dict[str, Any]]:
        """All that exist, running or not."""
        told = self.podman("ps", "--all", f"--filter=name=^{self.name}_", "--format=json").stdout
        return list(json.loads(told))

    def volumes(self) -> list[str]:
        return self.podman("volume", "ls", "--quiet", f"--filter=name=^{self.name}_").stdout.split()
