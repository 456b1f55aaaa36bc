"""`make clean` removes what carries this installation's id, and nothing else, and only when told to."""

from __future__ import annotations

import io
import subprocess
import uuid
from collections.abc import Iterator

import pytest
from rich.console import Console

from volery.setup import clean, embedded, libvirt_daemons
from volery.setup.console import Output
from volery.setup.errors import SetupError
from volery.setup.home import Home

DOMAIN = """
<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory>
  <metadata><volery:domain xmlns:volery="https://volery.dev/domain/1" installation="{installation}"/></metadata>
  <os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
"""


def run(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def virsh(*arguments: str) -> str:
    return run("virsh", "-q", "-c", "qemu:///system", *arguments)


@pytest.fixture
def output() -> Output:
    return Output(Console(file=io.StringIO(), width=200))


@pytest.fixture
def machines(home: Home) -> Iterator[dict[str, str]]:
    """One defined domain of this installation, one of another."""
    libvirt_daemons.ensure()
    made = {}
    for owner, installation in (("ours", home.installation), ("theirs", "ggggg")):
        ident = str(uuid.uuid4())
        xml = home.run / f"{owner}.xml"
        xml.write_text(DOMAIN.format(name=f"t-{ident[:8]}", uuid=ident, installation=installation))
        virsh("define", str(xml))
        made[owner] = ident
    yield made
    for ident in made.values():
        subprocess.run(
            ["virsh", "-q", "-c", "qemu:///system", "undefine", ident], capture_output=True, check=False
        )


@pytest.fixture
def devices(home: Home) -> Iterator[dict[str, str]]:
    """A bridge and a packet filter table of this installation, and a bridge of another."""
    made = {"ours": f"vt{home.installation}", "theirs": "vtggggg"}
    for name in made.values():
        run("ip", "link", "add", name, "type", "bridge")
    run("nft", "add", "table", "inet", f"volery_{home.installation}")
    yield made
    for name in made.values():
        subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
    table = f"volery_{home.installation}"
    subprocess.run(["nft", "delete", "table", "inet", table], capture_output=True, check=False)


def test_everything_of_this_installation_goes_and_the_rest_stays(
    machines: dict[str, str], devices: dict[str, str], output: Output
) -> None:
    with embedded.temporary_home("volery-clean-") as other:
        home = Home(other.path.with_name(other.path.name + "-real"))
        home.create()
        # The same id as the fixtures' installation.
        fixture = next(n for n in devices.values() if n != "vtggggg").removeprefix("vt")
        home.change_settings({"VOLERY_SETUP_INSTALLATION": fixture})
        embedded.start_nats(home, embedded.NatsOptions(preferred_port=None))
        server = embedded.status(home, "nats")
        assert server is not None
        assert clean.clean(home, output, yes=True)
        assert not home.path.exists()
        assert not server.alive()
    left = virsh("list", "--all", "--uuid").split()
    assert machines["ours"] not in left
    assert machines["theirs"] in left
    links = run("ip", "-br", "link")
    assert devices["ours"] not in links
    assert devices["theirs"] in links
    assert fixture not in run("nft", "list", "tables")


def test_without_a_yes_nothing_is_removed(home: Home, output: Output) -> None:
    assert not clean.clean(home, output, yes=False, ask=lambda _: False)
    assert home.settings_file.exists()


def test_files_that_are_not_ours_stop_it(home: Home, output: Output) -> None:
    (home.path / "thesis.txt").write_text("")
    with pytest.raises(SetupError, match=r"thesis.txt"):
        clean.clean(home, output, yes=True)
    assert home.settings_file.exists()


def test_where_nothing_is_set_up_it_says_so(home: Home, output: Output) -> None:
    assert clean.clean(Home(home.path / "nowhere"), output, yes=True)
