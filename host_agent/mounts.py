"""What a storage domain's directory is mounted from, and whether disks can be locked there across hosts.

For `host_agent.files`, so the standard library alone.
"""

from __future__ import annotations

import os

MOUNTS = "/proc/self/mountinfo"
NFS = ("nfs", "nfs4")


def mounted(top: str, table: str = MOUNTS) -> str:
    """The line of the kernel's table (proc(5), mountinfo) about what is mounted there; "" for none."""
    device = os.stat(top).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open(table, encoding="utf-8", errors="replace") as lines:
        return next((line for line in lines if line.split(" ", 3)[2:3] == [wanted]), "")


def mount_problem(path: str, line: str) -> str:
    """Why what is mounted there can hold no storage domain; "" when it can. `line`: of mountinfo."""
    kind, _, rest = line.partition(" - ")[2].partition(" ")
    if kind not in NFS:
        return ""
    source, _, words = rest.strip().partition(" ")
    options = dict(word.partition("=")[::2] for word in words.split(","))
    version = options.get("vers", "4" if kind == "nfs4" else "3")
    again = f"Mount {source} there with `-t nfs4 -o vers=4.2`, on every host, and try again"
    if not version.startswith("4"):
        return (
            f"{path} is mounted by NFS version {version}: its server would keep a dead host's locks until that host boots again, "
            f"so that none of its VMs could be started elsewhere. {again}"
        )
    if options.get("local_lock", "none") != "none":
        return (
            f"{path} is mounted with local_lock={options['local_lock']}: locks on disks would hold on one host only, so that two "
            f"could write the same one. {again}"
        )
    return ""
