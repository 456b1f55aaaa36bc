"""`python -m vm_tier`: builds the image, boots two hosts, shows what only whole machines can show, and takes it down."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lab.errors import LabError
from vm_tier import image
from vm_tier.image import Image
from vm_tier.shows import SHOWS
from vm_tier.site import Site
from volery.client.transport import OperationFailed, ProblemError
from volery.setup.console import Output
from volery.setup.errors import SetupError

DIRECTORY = Path("/srv/volery-vmtier")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m vm_tier", description=__doc__)
    root.add_argument("--directory", type=Path, default=DIRECTORY, help="of everything; 5 GB")
    root.add_argument(
        "--subnet", default="", help="its first three bytes; by default 10.111.77, of containers 10.111.78"
    )
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("image", help="build the disk that hosts start from")
    verbs.add_parser("up", help="hosts and a control plane, or what is missing of them")
    root.add_argument(
        "--containers", action="store_true", help="hosts share this machine's kernel: quick, without NFS"
    )
    root.add_argument("--hosts", type=int, choices=(1, 2), default=2, help="`nfs` needs two")
    root.add_argument(
        "--nice", type=int, default=19, help="of the hosts that are started; 0 on an idle machine"
    )
    show = verbs.add_parser("show", help="show one thing, with figures")
    show.add_argument("what", choices=SHOWS)
    run = verbs.add_parser("exec", help="run a shell command on a host")
    run.add_argument("host", type=int, choices=(1, 2))
    run.add_argument("command")
    verbs.add_parser("down", help="end it; the image stays")
    return root


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    output = Output()
    site = Site(
        options.directory / ("containers" if options.containers else "site"),
        options.subnet or ("10.111.78" if options.containers else "10.111.77"),
        Image(options.directory / "image"),
        output,
        options.hosts,
        options.containers,
        options.nice,
    )
    try:
        act(site, options)
    except (LabError, SetupError, ProblemError, OperationFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def act(site: Site, options: argparse.Namespace) -> None:
    if options.verb == "down":
        site.down()
        return
    if options.verb == "exec":
        print(site.machines[options.host - 1].ssh(options.command), end="")
        return
    with site.output.step("Image") as step:
        image.build(site.image.directory)
        step.result = str(site.image.disk)
    if options.verb == "image":
        return
    client = site.up()
    if options.verb == "up":
        print(f"\nTry: VOLERY_HOME={site.home.path} bin/volery host list\n")
        return
    for name, value in SHOWS[options.what](site, client).items():
        print(f"{name:60}{value}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
