"""What a lab left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lab.layout import LabLayout


def leftovers(lab: LabLayout) -> list[str]:
    """What the kernel still has of a lab, found without the lab's own means."""
    found = []
    for command in (["ip", "-o", "link"], ["ip", "netns"]):
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found += [line for line in lines.splitlines() if lab.switch in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/*{lab.name}*")]
    found += [str(path) for path in Path("/srv").glob(f"*{lab.name}*")]
    marks = (str(lab.state), lab.cgroup)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        for file in ("cmdline", "cgroup", "mountinfo"):
            try:
                content = (process / file).read_text(errors="replace")
            except OSError:
                continue
            if any(mark in content for mark in marks):
                found.append(f"{process.name} {file}")
    return found
