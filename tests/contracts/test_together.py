"""The table of what may happen together: whole, safe by a second look, and played to its last cell."""

from __future__ import annotations

import itertools

import pytest

from services.inventory import model
from services.inventory.service import service as inventory
from services.storage.service import make_service
from tests.inventory import test_together as of_vms
from tests.storage import test_together as of_disks
from volery.contracts import together
from volery.contracts.errors import Kind, Refused
from volery.contracts.together import (
    COMING,
    DOES,
    DONE,
    HELD,
    KINDS,
    NEWCOMERS,
    TABLE,
    By,
    Held,
    Holder,
    Outcome,
    Thing,
    Work,
)

W = Work
HOLD_NOTHING = frozenset(
    {
        "cluster.upgrade",
        "host.evacuate",
        "transfer.cancel",
        "transfer.create",
        "vm.start_many",
    }
)
"""Kinds of operations that hold no VM, disk or host: the hosts, VMs or disks that they work on are held by others."""
FILLED = frozenset({W.FILL, W.UPLOAD, W.REMOVE, W.RESIZE, W.MERGE})
"""Works that write a volume, or its tables, from outside of a VM."""
READ = frozenset({W.COPY, W.DOWNLOAD})
OPENERS = frozenset({W.START, W.RESTART, W.MIGRATE, W.DEVICES})
OPEN = frozenset({W.START, W.RESTART, W.RUN, W.STOP, W.CONTROL, W.SUSPEND, W.MIGRATE, W.DEVICES})
"""Works of a VM that has its disks open, or opens them."""


def test_every_cell_is_decided_and_played() -> None:
    """Fails when a work is built without its cells' tests, and when what is said to be coming has come."""
    built = [work for work in Work if work not in COMING]
    holders = [work for work in built if work is not W.EDIT]  # done at once
    newcomers = [work for work in built if work in NEWCOMERS]
    assert set(Work) - set(NEWCOMERS) == {W.CREATE, W.FILL, W.RUN}
    assert set(TABLE) == set(itertools.product(set(Work) - {W.EDIT}, NEWCOMERS))
    assert set(itertools.product(holders, newcomers)) - of_vms.CELLS - of_disks.CELLS == set()
    assert COMING.isdisjoint(KINDS.values()), "it is built: take it out of COMING, and play its cells"


def test_every_kind_of_operation_is_in_it() -> None:
    kinds = {
        kind
        for service in (inventory, make_service())
        for part in service.parts
        for kind in (procedure.kind for procedure in part.procedures_)
        if not kind.startswith("storage_domain.")
    }
    assert kinds - HOLD_NOTHING == set(KINDS)


def test_nobody_cancels_yet() -> None:
    """Whoever builds what is cancelled builds the cancelling: no service does it so far."""
    cancelled = {holder for (holder, _), rule in TABLE.items() if rule.outcome is Outcome.CANCELS}
    assert cancelled == {W.BACKUP}


WRITES = frozenset({W.FILL, W.UPLOAD, W.REMOVE})
"""Works after which a volume has other content."""
CHANGES_CHAIN = frozenset({W.SNAPSHOT, W.MERGE})
"""Works after which a disk has other volumes: whoever opens or writes one meanwhile may have a wrong one."""
NEVER: tuple[tuple[frozenset[Work], frozenset[Work]], ...] = (
    (WRITES, FILLED | READ | OPENERS | {W.BACKUP}),
    (FILLED | READ, WRITES | frozenset({W.RESIZE, W.MERGE, W.MOVE})),
    (OPEN, frozenset({W.UPLOAD, W.REMOVE, W.MERGE})),
    (OPEN - {W.RUN}, frozenset({W.SNAPSHOT})),
    (CHANGES_CHAIN, FILLED | READ | CHANGES_CHAIN | OPENERS),
    (FILLED | READ, CHANGES_CHAIN),
)
"""Holders and newcomers that never work on one volume at a time."""
ONE_READS: tuple[tuple[frozenset[Work], frozenset[Work]], ...] = (
    (OPEN, READ),
    (READ, OPENERS),
)
"""Those that do only when the VM reads."""


def apart(pairs: tuple[tuple[frozenset[Work], frozenset[Work]], ...]) -> list[tuple[Work, Work]]:
    return [
        pair
        for holders, newcomers in pairs
        for pair in itertools.product(holders, newcomers)
        if pair[1] in NEWCOMERS
    ]


def test_two_never_write_one_volume_nor_is_it_read_while_it_is_written() -> None:
    wrong = {
        pair for pair in apart(NEVER) if TABLE[pair].unless_reading or TABLE[pair].outcome is Outcome.TOGETHER
    }
    assert wrong == set()
    wrong = {
        pair
        for pair in apart(ONE_READS)
        if not TABLE[pair].unless_reading or TABLE[pair].outcome is Outcome.TOGETHER
    }
    assert wrong == set()


def test_neither_high_availability_nor_maintenance_waits_for_a_backup() -> None:
    for newcomer in (W.RESTART, W.MAINTAIN):
        assert TABLE[W.BACKUP, newcomer].outcome is Outcome.CANCELS


def test_every_refusal_has_its_words() -> None:
    """Who is refused or waits is told what would be done, who holds what, and what that one does."""
    for action, (work, done) in model.WORK.items():
        assert work in NEWCOMERS, action
        assert done
    held = {Held.VM: of_vms.HOLDERS, Held.DISK: of_disks.OF_DISKS, Held.HOST: (W.MAINTAIN,)}
    for thing, works in held.items():
        for holder in works:
            assert any((holder, by) in DOES for by in By), holder
        for newcomer in NEWCOMERS:
            if (newcomer, thing) in DONE:
                assert DONE[newcomer, thing]


def test_what_is_at_work_in_a_way_that_this_release_does_not_know_lets_nothing_in() -> None:
    thing, holder = Thing(Held.DISK, "d1", "data"), Holder(By.OPERATION, "storage-1", None)
    for newcomer in (W.START, W.RESIZE, W.COPY, W.UPLOAD, W.DOWNLOAD, W.REMOVE):
        with pytest.raises(Refused) as refused:
            together.refuse(newcomer, thing, [holder], reading=True)
        assert refused.value.details == {"disk_id": "d1", "operation": "storage-1", "rule": HELD}
        assert (
            "while operation storage-1 is at work on it: wait for it, or cancel it" in refused.value.message
        )


@pytest.mark.parametrize(
    ("newcomer", "thing", "holder", "kind", "sentence"),
    [
        (
            W.STOP,
            Thing(Held.VM, "v", "web"),
            Holder(By.OPERATION, "inventory-1", W.MIGRATE),
            Kind.CONFLICT,
            "VM web can't be stopped while operation inventory-1 migrates it: wait for it, or cancel it",
        ),
        (
            W.RESTART,
            Thing(Held.VM, "v", "web"),
            Holder(By.OPERATION, "inventory-1", W.CONTROL),
            Kind.UNAVAILABLE,
            "VM web can't be restarted while operation inventory-1 reboots, resets, pauses or unpauses it: wait for it, "
            "or cancel it",
        ),
        (
            W.DOWNLOAD,
            Thing(Held.DISK, "d", "data"),
            Holder(By.VM, "v", W.RUN, name="web"),
            Kind.CONFLICT,
            "disk data can't be downloaded while VM web runs with it: what is read would fit no moment; stop the VM first",
        ),
        (
            W.START,
            Thing(Held.DISK, "d", "data"),
            Holder(By.OPERATION, "storage-1", W.COPY),
            Kind.CONFLICT,
            "disk data can't be used by a VM that starts while operation storage-1 reads it: wait for it, or cancel it",
        ),
    ],
)
def test_how_a_refusal_reads(newcomer: Work, thing: Thing, holder: Holder, kind: Kind, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        together.refuse(newcomer, thing, [holder])
    assert (refused.value.kind, refused.value.message) == (kind, sentence)
