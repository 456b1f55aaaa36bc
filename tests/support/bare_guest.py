"""A guest of some sixty bytes for tests of the hypervisor: no system to boot, so it is there as soon as its QEMU is.

It watches the power button's bit in the chipset's registers, as ACPI has it, and its serial line, and at either does the
one thing that it was made for. QEMU loads it as a multiboot kernel.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from pathlib import Path

ADDRESS = 0x100000
HEADER = struct.Struct("<8I")
MAGIC, FLAGS = 0x1BADB002, 0x00010000
WRITTEN = 0x400000
"""Where it writes, if it does."""
PAGES = 8192


class AtButton(StrEnum):
    """What it does when its power button is pressed, or something comes by its serial line."""

    POWERS_OFF = "powers-off"
    PANICS = "panics"


_ACTS = {
    # mov dx, 0x604; mov ax, 0x2000; out dx, ax: sleep type 0 of QEMU's q35 is soft off
    AtButton.POWERS_OFF: b"\x66\xba\x04\x06\x66\xb8\x00\x20\x66\xef",
    # mov dx, 0x505; mov al, 1; out dx, al: the pvpanic device
    AtButton.PANICS: b"\x66\xba\x05\x05\xb0\x01\xee",
}
_LISTEN = b"\x66\xba\x02\x06\x66\xb8\x00\x01\x66\xef"  # mov dx, 0x602; mov ax, 0x100; out dx, ax
_SERIAL = b"\x66\xba\xfd\x03\xec\xa8\x01"  # mov dx, 0x3fd; in al, dx; test al, 1
_BUTTON = b"\x66\xba\x00\x06\x66\xed\xf6\xc4\x01"  # mov dx, 0x600; in ax, dx; test ah, 1
_HALT = b"\xeb\xfe"
_WRITE = b"".join(
    (
        *(b"\xbf", struct.pack("<I", WRITTEN)),  # mov edi, WRITTEN
        *(b"\xb9", struct.pack("<I", PAGES)),  # mov ecx, PAGES
        b"\xff\x07\x81\xc7\x00\x10\x00\x00\xe2\xf6",  # inc dword [edi]; add edi, 4096; loop
    )
)


def bare_guest(directory: Path, at_button: AtButton, *, writes: bool = False) -> Path:
    """The kernel's file. `writes`: it changes 32 MB of its memory all the time, so that a slow migration never ends."""
    skip = b"\x75" + struct.pack("<b", len(_BUTTON) + 2)  # jnz: something came, so the button doesn't matter
    body = (_WRITE if writes else b"") + _SERIAL + skip + _BUTTON
    again = b"\x74" + struct.pack("<b", -len(body) - 2)  # jz: not pressed
    code = _LISTEN + body + again + _ACTS[at_button] + _HALT
    end = ADDRESS + HEADER.size + len(code)
    checksum = -(MAGIC + FLAGS) & 0xFFFFFFFF
    places = (ADDRESS, ADDRESS, end, end, ADDRESS + HEADER.size)
    path = directory / f"{at_button.value}{'-writing' if writes else ''}.kernel"
    path.write_bytes(HEADER.pack(MAGIC, FLAGS, checksum, *places) + code)
    return path
