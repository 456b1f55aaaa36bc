"""An agent's code that writes a volume under its lease.

`python -m tests.support.writing_program STATE_DIR LEASE VOLUME on` says "begun" when the first bytes are written, and goes on
without end. `… once WORD` writes a word and says what was there before, or "refused: …" when somebody else has the lease.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from host_agent import leased, luns
from tests.support.agent_host import make_host
from volery.contracts.domain import DomainLease, FileSource, ImageFormat
from volery.contracts.errors import Refused

TOOLS = {
    "on": """
import os, sys, time
volume, number = os.open(sys.argv[1], os.O_RDWR), 0
while True:
    os.pwrite(volume, number.to_bytes(8, "big") * 512, 0)
    number += 1
    if number == 1:
        print("begun", flush=True)
    time.sleep(0.001)  # many writes a second, and a processor left for the others
""",
    "once": """
import os, sys
volume = os.open(sys.argv[1], os.O_RDWR)
print(os.pread(volume, 8, 0).hex(), flush=True)
os.pwrite(volume, sys.argv[2].encode().ljust(8) * 512, 0)
os.fsync(volume)
""",
}


async def main(state_dir: str, lease: str, volume: str, how: str, *word: str) -> None:
    wanted = msgspec.json.decode(lease, type=DomainLease)
    host, target = make_host(Path(state_dir)), FileSource(path=volume, format=ImageFormat.RAW)
    try:
        async with luns.writing(host, wanted.key, target, wanted) as hold:
            await leased.run_holding(
                hold,
                [sys.executable, "-I", "-c", TOOLS[how], volume, *word],
                timeout_seconds=600,
                on_output=lambda piece: print(piece.decode(), end="", flush=True),
            )
    except Refused as refused:
        print(f"refused: {refused.message}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
