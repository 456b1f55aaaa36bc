"""`python -m lab`: makes a lab, looks at it, breaks it and takes it down."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lab import disk
from lab.board import Fault
from lab.errors import LabError
from lab.host import Host
from lab.lab import DEFAULT_NETWORKS, Lab
from volery.setup.errors import SetupError

HOST_ACTIONS: dict[str, tuple[Callable[[Host], None], str]] = {
    "power-off": (Host.power_off, "pull the plug: every process on the host dies"),
    "power-down": (Host.power_down, "shut it down in order: its agent ends the guests, then it goes off"),
    "power-on": (Host.power_on, "boot it, and wait until libvirtd answers"),
    "cut": (Host.cut, "pull the network cable"),
    "join": (Host.join, "plug the network cable in"),
    "cut-storage": (Host.cut_storage, "its way to the iSCSI portal is gone, and only its own"),
    "join-storage": (Host.join_storage, "it is there again"),
    "cut-disk": (
        disk.cut,
        "what it reads and writes on the lab's disk doesn't come back, and can't be interrupted",
    ),
    "join-disk": (disk.join, "it does again"),
    "kill-libvirtd": (Host.kill_libvirtd, "kill -9; it stays down"),
    "start-libvirtd": (Host.start_libvirtd, "start libvirtd again"),
    "kill-agent": (Host.kill_agent, "kill -9; it is started again after 0.5 s"),
    "start-agent": (Host.start_agent, "start the agent"),
    "freeze": (Host.freeze, "stop all its processes"),
    "thaw": (Host.thaw, "let them go on"),
}


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    home = os.environ.get("VOLERY_HOME", "/var/lib/volery")
    shared.add_argument("--state", type=Path, default=Path(home) / "lab", help="the lab's directory")
    shared.add_argument("--name", help="short name; by default derived from the directory")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    up = verbs.add_parser("up", parents=[shared], help="make the lab, or what is missing of it")
    up.add_argument("--hosts", type=int, default=3)
    up.add_argument("--bare", action="store_true", help="hosts only, without a control plane")
    up.add_argument("--kvm", action="store_true", help="let hosts see /dev/kvm")
    up.add_argument("--agent-command", type=shlex.split, help="what runs as agent on every host")
    up.add_argument("--disk", action="store_true", help="hosts that boot share a disk: see cut-disk")
    up.add_argument("--networks", default=DEFAULT_NETWORKS, help="where its /24 is taken from")
    down = verbs.add_parser("down", parents=[shared], help="remove the lab and its data")
    down.add_argument("--keep", action="store_true", help="leave disks, logs and configuration")
    status = verbs.add_parser("status", parents=[shared], help="show every host")
    status.add_argument("-o", "--output", choices=["table", "json"], default="table")
    for verb, (_, text) in HOST_ACTIONS.items():
        verbs.add_parser(verb, parents=[shared], help=text).add_argument("host", type=int)
    bmc = verbs.add_parser("bmc", parents=[shared], help="break a host's BMC, or mend it with `none`")
    bmc.add_argument("host", type=int)
    bmc.add_argument("fault", type=Fault, choices=list(Fault), metavar="|".join(Fault))
    run = verbs.add_parser("exec", parents=[shared], help="run a program on a host")
    run.add_argument("host", type=int)
    run.add_argument("command", nargs="+", metavar="-- COMMAND")
    return root


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        return act(Lab(options.state, options.name), options)
    except (LabError, SetupError) as error:
        print(error, file=sys.stderr)
        return 1


def act(lab: Lab, options: argparse.Namespace) -> int:
    if options.verb == "up":
        lab.up(
            options.hosts,
            kvm=options.kvm,
            agent_command=options.agent_command,
            networks=options.networks,
            with_disk=options.disk,
        )
        if not options.bare:
            join_plane(lab)
        show(lab, "table")
    elif options.verb == "down":
        leave_plane(lab, keep=options.keep)
        lab.down(keep=options.keep)
    elif options.verb == "status":
        show(lab, options.output)
    elif options.verb == "bmc":
        lab.bmc(options.host).set_fault(options.fault)
    elif options.verb == "exec":
        command = lab.host(options.host).enter(options.command)
        os.execvp(command[0], command)  # noqa: S606 - by argument list, no shell
    else:
        HOST_ACTIONS[options.verb][0](lab.host(options.host))
    return 0


def join_plane(lab: Lab) -> None:
    """The lab's control plane, and every host enrolled in it."""
    from lab import plane
    from volery.setup.console import Output

    plane.connect(lab, Output()).http.close()
    home = plane.home_of(lab).path
    print(f"\nTry: VOLERY_HOME={home} bin/volery host list\n")


def leave_plane(lab: Lab, *, keep: bool) -> None:
    """Ends the control plane. Its data goes with the hosts that it knows, unless they are kept."""
    from lab import plane
    from volery.setup.console import Output
    from volery.setup.down import down

    home = plane.home_of(lab)
    if home.path.exists():
        down(home, Output())
        if not keep:
            shutil.rmtree(home.path)


def show(lab: Lab, output: str) -> None:
    target = lab.target
    facts = {
        "name": lab.name,
        "state": str(lab.layout.state),
        "subnet": lab.subnet,
        "machine_address": lab.gateway,
        "shared_directory": str(lab.shared_on_hosts),
        "iscsi_portal": target.portal,
        "iscsi_target": target.name,
        "iscsi_user": target.user,
        "iscsi_password": target.password,
        "iscsi_luns": {str(number): size for number, size in target.luns.items()},
        "iscsi_running": target.process is not None,
        "bmc_user": lab.record.bmc_user,
        "bmc_password": lab.record.bmc_password,
    }
    hosts = [(host.status(), lab.bmc(host.number)) for host in lab.hosts]
    if output == "json":
        shown = [
            {**asdict(host), "bmc_address": bmc.address, "bmc_fault": bmc.fault, "dmi_uuid": bmc.board.uuid}
            for host, bmc in hosts
        ]
        print(json.dumps({**facts, "hosts": shown}, indent=2))
        return
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):18}{value}")
    print(f"\n{'host':6}{'address':16}{'power':8}{'cable':8}{'libvirtd':10}{'agent':8}{'guests':8}{'bmc':16}")
    for host, bmc in hosts:
        daemons = ("up" if host.libvirtd else "-", "up" if host.agent else "-")
        print(
            f"h{host.number:<5}{host.ip:16}{host.power:8}{host.cable:8}"
            f"{daemons[0]:10}{daemons[1]:8}{host.guests:<8}"
            f"{bmc.address:16}{'' if bmc.fault is Fault.NONE else bmc.fault}".rstrip()
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
