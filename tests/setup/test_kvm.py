"""The probe tells an accelerator that runs guests from one that only says so."""

from __future__ import annotations

import json
import time

from volery.setup import kvm
from volery.setup.home import Home


def test_the_boot_sector_runs_under_emulation() -> None:
    program = kvm.emulator()
    assert program is not None
    found = kvm.boot_sector(program, "tcg", "max", 30)
    assert found.works, found.reason


def test_an_accelerator_that_does_not_exist_does_not_work() -> None:
    program = kvm.emulator()
    assert program is not None
    found = kvm.boot_sector(program, "hax", "max", 30)
    assert not found.works
    assert "hax" in found.reason


def test_a_guest_that_hangs_is_given_up() -> None:
    program = kvm.emulator()
    assert program is not None
    started = time.monotonic()
    found = kvm.boot_sector(program, "tcg", "max", 0.01)
    assert not found.works
    assert "did not run its first instructions" in found.reason
    assert time.monotonic() - started < 5


def test_the_answer_is_kept_for_this_boot_only(home: Home) -> None:
    first = kvm.probe(home)
    kept = home.run / "kvm.json"
    started = time.monotonic()
    assert kvm.probe(home) == first
    assert time.monotonic() - started < 0.05
    known = json.loads(kept.read_text())
    kept.write_text(json.dumps({**known, "works": not first.works}))
    assert kvm.probe(home).works != first.works
    kept.write_text(json.dumps({**known, "for": ["another boot"], "works": not first.works}))
    assert kvm.probe(home).works == first.works
