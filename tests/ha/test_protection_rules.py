"""Whether a VM is protected, row by row, and what must hold whatever is put together."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.ha.policies.protection import CODES, HostProof, judge, why_no_proof
from volery.contracts.fencing import FenceDevice
from volery.contracts.power import Identity, PowerManagement
from volery.contracts.protection import ReasonCode, VmNeed
from volery.contracts.scheduling import HostVerdict, Need, Room, Verdict

NOW = datetime.now(UTC)
C = ReasonCode


def power(**fields: Any) -> PowerManagement:
    made = {
        "id": "h1",
        "revision": 1,
        "created_at": NOW,
        "updated_at": NOW,
        "devices": (FenceDevice(agent="fence_redfish", address="bmc1"),),
        "identity": Identity.CHECKED,
        "test_passed": True,
    }
    return PowerManagement(**(made | fields))


def proof(host_id: str = "h1", **fields: Any) -> HostProof:
    return HostProof(**({"id": host_id, "name": host_id.upper(), "power": power()} | fields))


def vm(**fields: Any) -> VmNeed:
    need = Need(vm_id="v", cluster_id="c", memory_bytes=1, vcpus=1, name="web")
    need = replace(need, **{k: fields.pop(k) for k in ("host_ids",) if k in fields})
    return VmNeed(**({"need": need, "host_id": "h1", "highly_available": True} | fields))


def nearest(*rules: str) -> HostVerdict:
    verdicts = tuple(
        Verdict(rule=r, passed=False, message=f"{r} is missing", change=f"mend {r}") for r in rules
    )
    return HostVerdict(host_id="h2", name="H2", verdicts=verdicts)


FITS = Room(vm_id="v", hosts=1, up=1, fitting=1)
FULL = Room(vm_id="v", hosts=1, up=1, nearest=nearest("memory"))
PROOFS = {h: proof(h) for h in ("h1", "h2")}
NO_POWER = {h: proof(h, power=None) for h in ("h1", "h2")}

CASES: dict[str, tuple[VmNeed, Room, dict[str, HostProof], list[ReasonCode]]] = {
    "all is well": (vm(), FITS, PROOFS, []),
    "its host has no BMC, but a lease that resets it": (
        vm(), FITS, PROOFS | {"h1": proof(power=None, lease="shared")}, [],
    ),
    "only another host has such a lease": (
        vm(), FITS, NO_POWER | {"h2": proof("h2", power=None, lease="shared")}, [C.NO_PROOF],
    ),
    "restarted on its own host, as asked": (vm(same_host=True), FITS, PROOFS, [C.SAME_HOST]),
    "local disk": (
        vm(local_host_id="h1"),
        Room(vm_id="v", hosts=1, up=1, nearest=nearest("storage")),
        PROOFS,
        [C.LOCAL_DISK],
    ),
    "local disk, and no room either": (
        vm(local_host_id="h1"),
        Room(vm_id="v", hosts=1, up=1, nearest=nearest("memory", "storage")),
        PROOFS,
        [C.LOCAL_DISK, C.CAPACITY],
    ),
    "pinned to its host": (
        vm(host_ids=("h1",)),
        Room(vm_id="v", hosts=1, up=1, nearest=nearest("pinned")),
        PROOFS,
        [C.PINNED],
    ),
    "pinned to its host and another that is full": (
        vm(host_ids=("h1", "h2")), FULL, PROOFS, [C.CAPACITY],
    ),
    "pinned to others, of which none fits": (
        vm(host_ids=("h1", "h3")),
        Room(vm_id="v", hosts=1, up=1, nearest=nearest("pinned")),
        PROOFS,
        [C.PINNED],
    ),
    "no power management": (vm(), FITS, NO_POWER, [C.NO_PROOF]),
    "no power management, and no room": (vm(), FULL, NO_POWER, [C.NO_PROOF, C.CAPACITY]),
    "fencing is paused": (vm(), FITS, {"h1": proof(paused="until noon")}, [C.FENCING_PAUSED]),
    "no other host": (vm(), Room(vm_id="v"), PROOFS, [C.NO_OTHER_HOST]),
    "no other host is up": (
        vm(), Room(vm_id="v", hosts=1, nearest=nearest("host_state")), PROOFS, [C.NO_OTHER_HOST],
    ),
    "a disk can't be used now": (vm(unready=("it is locked",)), FITS, PROOFS, [C.STORAGE]),
    "others lack its network": (
        vm(), Room(vm_id="v", hosts=2, up=2, nearest=nearest("network")), PROOFS, [C.NETWORK],
    ),
    "others lack its devices, or have given them away": (
        vm(), Room(vm_id="v", hosts=2, up=2, nearest=nearest("host_devices")), PROOFS, [C.HOST_DEVICES],
    ),
    "down, and two hosts fit": (vm(host_id=""), replace(FITS, hosts=2, fitting=2), PROOFS, []),
    "down, and one host fits": (
        vm(host_id=""), replace(FULL, hosts=2, up=2, fitting=1), PROOFS, [C.CAPACITY],
    ),
    "down, in a cluster of one": (vm(host_id=""), FITS, PROOFS, [C.NO_OTHER_HOST]),
    "down, and one host can be proven dead": (
        vm(host_id=""), replace(FITS, hosts=2, fitting=2), {**NO_POWER, "h2": proof("h2")}, [],
    ),
    "down, and no host can be": (
        vm(host_id=""), replace(FITS, hosts=2, fitting=2), NO_POWER, [C.NO_PROOF],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_reasons(case: str) -> None:
    need, room, proofs, codes = CASES[case]
    found = judge(need, room, proofs)
    assert [reason.code for reason in found] == codes
    assert all(reason.message and reason.change for reason in found)


PROOF_CASES: dict[str, tuple[HostProof, str]] = {
    "none": (proof(power=None), "has no power management"),
    "off": (proof(power=power(enabled=False)), "is switched off"),
    "nobody knows whose": (proof(power=power(identity=Identity.UNCHECKED)), "isn't certain"),
    "another's": (
        proof(power=power(identity=Identity.MISMATCH, test_words="it says 42")), "it says 42",
    ),
    "failed": (proof(power=power(test_passed=False, test_words="no route")), "failed: no route"),
    "nobody has the agent": (proof(lacking=("fence_redfish",)), "fence_redfish"),
    "paused": (proof(paused="until noon by ann"), "until noon by ann"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROOF_CASES)
def test_what_a_death_could_not_be_proven_by(case: str) -> None:
    host, words = PROOF_CASES[case]
    (reason,) = why_no_proof(host)
    assert words in reason.message
    assert "H1" in reason.message


def test_a_refused_room_says_which_host_is_nearest_and_the_change_is_the_scheduler_s() -> None:
    (reason,) = judge(vm(), FULL, PROOFS)
    assert "the nearest is H2: memory is missing" in reason.message
    assert reason.change == "mend memory"


rooms = st.builds(
    lambda hosts, fitting, rules: Room(
        vm_id="v",
        hosts=max(hosts, fitting),
        up=fitting,
        fitting=fitting,
        nearest=nearest(*sorted(rules)) if rules and hosts > fitting else None,
    ),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sets(st.sampled_from(sorted(CODES)), min_size=1),
)
proofs_of = st.sampled_from([PROOFS, NO_POWER, {**PROOFS, "h1": proof(power=None)}])
needs = st.builds(
    vm,
    host_id=st.sampled_from(["", "h1"]),
    same_host=st.booleans(),
    local_host_id=st.sampled_from(["", "h1"]),
    host_ids=st.sampled_from([(), ("h1",), ("h1", "h2")]),
)


@settings(max_examples=500, deadline=None)
@given(needs, rooms, proofs_of)
def test_protected_means_provable_and_room_and_nothing_against_it(
    need: VmNeed, room: Room, proofs: dict[str, HostProof]
) -> None:
    found = judge(need, room, proofs)
    if not found:
        assert room.fitting >= (1 if need.host_id else 2)
        assert not need.same_host
        assert not need.local_host_id
        assert len(need.need.host_ids) != 1
        assert any(not why_no_proof(p) for p in proofs.values())
        assert not need.host_id or not why_no_proof(proofs[need.host_id])
    said = [(reason.code, reason.message) for reason in found]
    assert len(set(said)) == len(said)


@settings(max_examples=300, deadline=None)
@given(needs, rooms, proofs_of)
def test_more_room_and_more_power_management_never_take_protection_away(
    need: VmNeed, room: Room, proofs: dict[str, HostProof]
) -> None:
    before = judge(need, room, proofs)
    after = judge(need, replace(room, hosts=room.hosts + 1, fitting=room.fitting + 1), PROOFS)
    assert before or not after
    if room.hosts >= 2:
        assert {r.code for r in after} <= {r.code for r in before}
