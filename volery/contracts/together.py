"""What may happen together: one table of what is at work on an object against what comes to it. Pure.

Inventory asks it of VMs and hosts, storage of disks; the page docs/reference/together.md is made of it. What the status of
a VM, a disk or a host forbids by itself (starting what runs, opening what is illegal) isn't in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from volery.contracts.errors import Kind, Refused


class Work(StrEnum):
    """What is done with a VM, its disks or its host."""

    CREATE = "create"
    START = "start"
    RESTART = "restart"
    """By high availability."""
    RUN = "run"
    """The VM runs; nothing is done to it."""
    STOP = "stop"
    CONTROL = "control"
    """Reboot, reset, pause, unpause: its QEMU stays."""
    SUSPEND = "suspend"
    """Also afterwards: a suspended VM expects its disks as they were."""
    MIGRATE = "migrate"
    DEVICES = "devices"
    """Disks, NICs and media that come and go."""
    EDIT = "edit"
    """Of a VM or a disk: done at once, so it holds nothing."""
    DELETE = "delete"
    FILL = "fill"
    """A new disk: blank, copied or imported."""
    RESIZE = "resize"
    COPY = "copy"
    """The disk that is read for a copy."""
    UPLOAD = "upload"
    DOWNLOAD = "download"
    REMOVE = "remove"
    """A disk is deleted."""
    SNAPSHOT = "snapshot"
    MERGE = "merge"
    """A snapshot is deleted, committed or reverted to: volumes become one, or go."""
    MOVE = "move"
    """A disk goes to another storage domain."""
    BACKUP = "backup"
    MAINTAIN = "maintain"
    """The VMs of a host leave it."""


COMING = frozenset({Work.MOVE, Work.BACKUP})
"""Decided here, and not built yet."""


class Outcome(StrEnum):
    """What becomes of a newcomer."""

    TOGETHER = "together"
    WAITS = "waits"
    """It begins, or is asked again, by itself, once the holder has ended."""
    REFUSED = "refused"
    """Whoever asked is told who holds what, and what to do."""
    CANCELS = "cancels"
    """The holder is ended cleanly, and the newcomer goes on."""


@dataclass(frozen=True, slots=True)
class Rule:
    outcome: Outcome
    unless_reading: bool = False
    """Together all the same when the VM only reads the disk."""


LETTERS: Mapping[str, Rule] = {
    "T": Rule(Outcome.TOGETHER),
    "W": Rule(Outcome.WAITS),
    "w": Rule(Outcome.WAITS, unless_reading=True),
    "R": Rule(Outcome.REFUSED),
    "r": Rule(Outcome.REFUSED, unless_reading=True),
    "C": Rule(Outcome.CANCELS),
}

W = Work
NEWCOMERS: tuple[Work, ...] = (
    *(W.START, W.RESTART, W.STOP, W.CONTROL, W.SUSPEND, W.MIGRATE, W.DEVICES, W.EDIT, W.DELETE),
    *(W.RESIZE, W.COPY, W.UPLOAD, W.DOWNLOAD, W.REMOVE),
    *(W.SNAPSHOT, W.MERGE, W.MOVE, W.BACKUP),
    W.MAINTAIN,
)
"""The columns. What is made anew meets nobody, and a VM that runs has been started."""

# A guest may end by itself at any moment, so what works on a running VM's disks outlives that, and a stop never waits for it.
# A snapshot is deleted or reverted to while its VM is down: it holds no host, and there is nothing to stop.
# A backup is never urgent: it waits its turn, and makes way for high availability and maintenance.
# fmt: off
ROWS: Mapping[Work, str] = {
    #            start            devices   resize     remove  snapshot
    #            | restart        | edit    | copy     |       | merge
    #            | | stop         | | delete| | upload |       | | move
    #            | | | control    | | |     | | | download     | | | backup
    #            | | | | suspend  | | |     | | | | |          | | | |   maintain
    #            | | | | | migrate| | |     | | | | |          | | | |   |
    W.CREATE:   "R W R R R R      R T R     T T T T R          R R R W   W",
    W.START:    "R W R R R R      R T R     R r R r R          R R R W   W",
    W.RESTART:  "R W R R R R      R T R     R r R r R          R R R W   W",
    W.RUN:      "R R T T T T      T T R     T r R r R          T R T T   T",
    W.STOP:     "R R R R R R      R T R     T r R r R          R R R W   W",
    W.CONTROL:  "R W R R R R      R T R     T r R r R          R R R W   W",
    W.SUSPEND:  "R R R R R R      R T R     R r R r R          R R R W   W",
    W.MIGRATE:  "R R R R R R      R T R     R r R r R          R R R W   W",
    W.DEVICES:  "R W R R R R      R T R     T r R r R          R R R W   W",
    W.DELETE:   "R R R R R R      R T R     T T T T R          R R R R   T",
    W.FILL:     "R W T T T W      R T W     R R R R R          R R R W   T",
    W.RESIZE:   "R W T T T W      R T W     R R R R R          R R R W   W",
    W.COPY:     "r w T T T w      r T W     R T R T R          R R R T   T",
    W.UPLOAD:   "R W T T T R      R T W     R R R R R          R R R W   T",
    W.DOWNLOAD: "r w T T T r      r T W     R T R T R          R R R T   T",
    W.REMOVE:   "R W T T T W      R T W     R R R R R          R R R R   T",
    W.SNAPSHOT: "R W R R R R      R T R     R R R R R          R R R W   W",
    W.MERGE:    "R W R R R R      R T R     R R R R R          R R R W   T",
    W.MOVE:     "R W T T R R      R T R     R R R R R          R R R W   W",
    W.BACKUP:   "R C C T R R      R T R     R T R T R          R R R W   C",
    W.MAINTAIN: "T T T T T T      T T T     T T T T T          T T R W   R",
}
# fmt: on
"""Holder → what becomes of each newcomer. The lines above name the columns from left to right, as NEWCOMERS does."""

TABLE: Mapping[tuple[Work, Work], Rule] = {
    (holder, newcomer): LETTERS[letter]
    for holder, row in ROWS.items()
    for newcomer, letter in zip(NEWCOMERS, row.split(), strict=True)
}
EXCLUSIVE = Rule(Outcome.REFUSED)
"""Of a holder that this release doesn't know: nothing comes to what it holds."""

KINDS: Mapping[str, Work] = {
    "vm.create": W.CREATE,
    "vm.start": W.START,
    "vm.restart": W.RESTART,
    "vm.stop": W.STOP,
    "vm.reboot": W.CONTROL,
    "vm.reset": W.CONTROL,
    "vm.pause": W.CONTROL,
    "vm.unpause": W.CONTROL,
    "vm.suspend": W.SUSPEND,
    "vm.migrate": W.MIGRATE,
    "vm.attach_disk": W.DEVICES,
    "vm.detach_disk": W.DEVICES,
    "vm.attach_nic": W.DEVICES,
    "vm.update_nic": W.DEVICES,
    "vm.detach_nic": W.DEVICES,
    "vm.change_cd": W.DEVICES,
    "vm.delete": W.DELETE,
    "vm.snapshot": W.SNAPSHOT,
    "vm.delete_snapshot": W.MERGE,
    "vm.revert": W.MERGE,
    "disk.create": W.FILL,
    "disk.copy": W.FILL,
    "disk.resize": W.RESIZE,
    "disk.delete": W.REMOVE,
    "disk.snapshot": W.SNAPSHOT,
    "disk.merge": W.MERGE,
    "disk.revert": W.MERGE,
    "transfer.finish": W.UPLOAD,
    "host.maintain": W.MAINTAIN,
    "host.save_power": W.MAINTAIN,
    "host.activate": W.MAINTAIN,
    "host.wake": W.MAINTAIN,
}
"""Operations that hold a VM, a disk or a host: their kind → what they do with it."""


class Held(StrEnum):
    """What may be held, as a sentence calls it."""

    VM = "VM"
    DISK = "disk"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Thing:
    """The object that a newcomer comes to."""

    held: Held
    id: str
    name: str


class By(StrEnum):
    """Who may hold it."""

    OPERATION = "operation"
    TRANSFER = "transfer"
    VM = "VM"


DETAIL: Mapping[By | Held, str] = {
    By.OPERATION: "operation",
    By.TRANSFER: "transfer_id",
    By.VM: "vm_id",
    Held.VM: "vm_id",
    Held.DISK: "disk_id",
    Held.HOST: "host_id",
}
"""Where a program finds the holder, and what it holds, in a refusal's details."""
HELD = "held"
"""The rule in a refusal's details: it passes, and no other host would answer otherwise."""
ASKS_AGAIN = frozenset({W.RESTART})
"""Whose asker asks again by itself when it is told `unavailable`."""


@dataclass(frozen=True, slots=True)
class Holder:
    """One that holds an object."""

    by: By
    id: str
    work: Work | None
    """None: of a kind that this release doesn't know."""
    name: str = ""
    """"": it is called by its id."""
    reading: bool = False
    """A VM that only reads the disk."""


DONE: Mapping[tuple[Work, Held], str] = {
    (W.START, Held.VM): "started",
    (W.RESTART, Held.VM): "restarted",
    (W.STOP, Held.VM): "stopped",
    (W.SUSPEND, Held.VM): "suspended",
    (W.MIGRATE, Held.VM): "migrated",
    (W.DEVICES, Held.VM): "given or rid of devices",
    (W.DELETE, Held.VM): "deleted",
    (W.SNAPSHOT, Held.VM): "snapshotted",
    (W.MERGE, Held.VM): "reverted, or its snapshot deleted,",
    (W.START, Held.DISK): "used by a VM that starts",
    (W.RESTART, Held.DISK): "used by a VM that is restarted",
    (W.MIGRATE, Held.DISK): "used by a VM where it migrates to",
    (W.DEVICES, Held.DISK): "attached",
    (W.RESIZE, Held.DISK): "resized",
    (W.COPY, Held.DISK): "copied",
    (W.UPLOAD, Held.DISK): "uploaded into",
    (W.DOWNLOAD, Held.DISK): "downloaded",
    (W.REMOVE, Held.DISK): "deleted",
    (W.SNAPSHOT, Held.DISK): "snapshotted",
    (W.MERGE, Held.DISK): "merged or reverted",
    (W.MAINTAIN, Held.HOST): "put into maintenance",
}
"""What the newcomer would do with the object, as a sentence has it."""

DOES: Mapping[tuple[Work, By], str] = {
    (W.CREATE, By.OPERATION): "makes it",
    (W.START, By.OPERATION): "starts it",
    (W.RESTART, By.OPERATION): "restarts it",
    (W.STOP, By.OPERATION): "stops it",
    (W.CONTROL, By.OPERATION): "reboots, resets, pauses or unpauses it",
    (W.SUSPEND, By.OPERATION): "suspends it",
    (W.MIGRATE, By.OPERATION): "migrates it",
    (W.DEVICES, By.OPERATION): "changes its devices",
    (W.DELETE, By.OPERATION): "deletes it",
    (W.FILL, By.OPERATION): "makes it",
    (W.RESIZE, By.OPERATION): "resizes it",
    (W.COPY, By.OPERATION): "reads it",
    (W.UPLOAD, By.OPERATION): "puts what was uploaded into it",
    (W.UPLOAD, By.TRANSFER): "uploads into it",
    (W.DOWNLOAD, By.TRANSFER): "reads it",
    (W.REMOVE, By.OPERATION): "deletes it",
    (W.SNAPSHOT, By.OPERATION): "makes a snapshot of it",
    (W.MERGE, By.OPERATION): "merges its volumes, or reverts it",
    (W.MAINTAIN, By.OPERATION): "is at work on it",
    (W.START, By.VM): "starts with it",
    (W.RUN, By.VM): "runs with it",
    (W.STOP, By.VM): "runs with it",
    (W.SUSPEND, By.VM): "is suspended and expects it as it was",
    (W.MIGRATE, By.VM): "migrates with it",
}
"""What the holder does with the object, likewise."""

WAIT = "wait for it, or cancel it"
REMEDY: Mapping[tuple[Work, By], str] = {
    (W.UPLOAD, By.TRANSFER): "finish it or cancel it first",
    (W.DOWNLOAD, By.TRANSFER): "wait for it, or cancel it",
    (W.START, By.VM): "wait until it runs, or stop the VM first",
    (W.RUN, By.VM): "stop the VM first",
    (W.STOP, By.VM): "wait until the VM has stopped",
    (W.SUSPEND, By.VM): "stop the VM first, which gives its memory up",
    (W.MIGRATE, By.VM): "wait until it has arrived, or stop the VM first",
}
"""What whoever is refused can do, where it isn't WAIT."""
SUSPENDED_GROWS = "resume or stop the VM first"
NO_MOMENT = "what is read would fit no moment; stop the VM first"
REMEDY_OF_PAIR: Mapping[tuple[Work, Work], str] = {
    (W.SUSPEND, W.RESIZE): SUSPENDED_GROWS,
    (W.RUN, W.COPY): NO_MOMENT,
    (W.RUN, W.DOWNLOAD): NO_MOMENT,
}
"""Holder and newcomer → likewise, for VMs that hold a disk."""


def rule(holder: Work | None, newcomer: Work) -> Rule:
    return EXCLUSIVE if holder is None else TABLE[holder, newcomer]


def outcome(holder: Holder, newcomer: Work, *, reading: bool = False) -> Outcome:
    """`reading`: the newcomer is a VM that only reads the disk, or opens nothing yet."""
    found = rule(holder.work, newcomer)
    return Outcome.TOGETHER if found.unless_reading and (reading or holder.reading) else found.outcome


def refuse(
    newcomer: Work, thing: Thing, holders: Iterable[Holder], *, done: str = "", reading: bool = False
) -> None:
    """Raises Refused, naming the first holder that doesn't let the newcomer come now, what it does and what to do. One that
    waits is told the same, and finds in the details whose end it waits for."""
    for holder in holders:
        if outcome(holder, newcomer, reading=reading) is not Outcome.TOGETHER:
            raise refusal(newcomer, thing, holder, done)


def refusal(newcomer: Work, thing: Thing, holder: Holder, done: str = "") -> Refused:
    """`done`: what the newcomer would do with it, where its kind of work is too wide a word."""
    details = {DETAIL[thing.held]: thing.id, DETAIL[holder.by]: holder.id, "rule": HELD}
    does, remedy = "is at work on it", WAIT
    if holder.work is not None:
        does = DOES[holder.work, holder.by]
        remedy = REMEDY.get((holder.work, holder.by), WAIT)
        details["holder"] = str(holder.work)
    if holder.by is By.VM and holder.work is not None:
        remedy = REMEDY_OF_PAIR.get((holder.work, newcomer), remedy)
    return Refused(
        Kind.UNAVAILABLE if newcomer in ASKS_AGAIN else Kind.CONFLICT,
        f"{thing.held} {thing.name} can't be {done or DONE[newcomer, thing.held]} while {holder.by} "
        f"{holder.name or holder.id} {does}: {remedy}",
        **details,
    )
