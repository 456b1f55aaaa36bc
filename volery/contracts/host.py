"""Hosts: KVM machines with an agent. States after oVirt's VDSStatus."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from msgspec import UNSET, UnsetType

from volery.contracts.agent import HostCapabilities
from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.operation import ListQuery, Operation, Page


class HostStatus(StrEnum):
    INSTALLING = "installing"
    """Its token was issued; the agent has not reported yet."""
    UP = "up"
    PREPARING_FOR_MAINTENANCE = "preparing_for_maintenance"
    MAINTENANCE = "maintenance"
    NON_RESPONSIVE = "non_responsive"
    """ha hears nothing from it. Its VMs are `unknown`, and nothing starts them elsewhere without proof."""
    NON_OPERATIONAL = "non_operational"
    """It answers, but can't run VMs of its cluster: see `reasons`."""
    CONNECTING = "connecting"
    """ha misses its beats, but has not given it up."""
    DOWN = "down"
    """ha has proof that it is off or was reset, and it has not come back: its VMs have ended."""


class PowerSaving(StrEnum):
    """How far a host is on its way to sleep and back. One that isn't awake gets no VMs, and is in maintenance or on its way."""

    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    """It is emptied and then switched off."""
    ASLEEP = "asleep"
    """It was switched off to save power. Its silence means nothing."""
    WAKING = "waking"
    """It was switched on and has not reported yet."""


class HostProblem(Message):
    """A part of a living host that is dead."""

    reason: str
    """storage_unreachable, network_missing"""
    object_kind: str
    """storage_domain, network"""
    object_id: str
    object_name: str
    message: str
    since: datetime


class Host(Entity):
    name: str
    cluster_id: str
    data_center_id: str
    status: HostStatus = HostStatus.INSTALLING
    reasons: tuple[str, ...] = ()
    """Why it is non-operational, as codes: cpu_incompatible, libvirt_too_old, kvm_missing, storage_unreachable, …"""
    problems: tuple[HostProblem, ...] = ()
    """What it has lost that other hosts of its cluster have."""
    address: str = ""
    """Where its image server, migration and tunnels are reached."""
    comment: str = ""
    tags: tuple[str, ...] = ()
    capabilities: HostCapabilities = HostCapabilities()
    boot_id: str = ""
    agent_generation: str = ""
    enrolled_at: datetime | None = None
    clock_skew_seconds: float = 0.0
    """Warned about above 2 s; never used to decide anything."""
    warnings: tuple[str, ...] = ()
    vm_count: int = 0
    memory_committed_bytes: int = 0
    busy_with: str = ""
    maintenance_reason: str = ""
    power_saving: PowerSaving = PowerSaving.AWAKE
    power_saving_reason: str = ""
    """Why it sleeps, or why it could not be switched off or woken."""
    power_on_proven_at: datetime | None = None
    """When it last reported after its BMC had switched it on from off."""


class CreateHost(Message):
    """Announces a host; the answer carries a one-time token for `volery-agent enrol`."""

    name: str
    cluster_id: str
    comment: str = ""
    tags: tuple[str, ...] = ()
    token_seconds: int = 3600


class HostToken(Message):
    host: Host
    enrolment_token: str
    """Shown once."""
    command: str
    """What to run on the host."""


class RenewHostToken(Message):
    id: str
    token_seconds: int = 3600


class UpdateHost(Message):
    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    comment: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    cluster_id: str | UnsetType = UNSET


class MaintainHost(Message):
    """Move every VM away, a few at a time, then leave the host alone. VMs that can't move are named and the operation
    fails, unless `stop_vms` says to shut them down; those that have left by then stay where they are. The result names
    who `moved`, was `stopped` or `ended` by itself; that of a dry run has a `plan`: where each VM would go, or why nowhere.

    VMs leave by a plan of the scheduler's (an evacuation), which a step names, with the VMs that have no place in it; without
    one when the scheduler makes none."""

    id: str
    if_revision: int = 0
    reason: str = ""
    stop_vms: bool = False
    dry_run: bool = False
    avoided_host_ids: tuple[str, ...] = ()
    """Hosts to which a VM goes by the plan only if no other takes it."""


class ActivateHost(Message):
    id: str
    if_revision: int = 0


class SavePower(Message):
    """Move every VM away as for maintenance, then switch the host off through its BMC. Refused where that could not be proven
    or undone: without tested power management, where ha itself runs, where the cluster's promise wouldn't hold. Until it is
    woken it gets no VMs, and nobody takes its silence for a death."""

    id: str
    if_revision: int = 0
    reason: str = ""
    empty_only: bool = False
    """Refused while there are VMs on it."""
    dry_run: bool = False


class WakeHost(Message):
    """Switch a sleeping host on through its BMC and use it again once it has reported."""

    id: str
    if_revision: int = 0
    reason: str = ""


class SetLiveness(Message):
    """ha to inventory: what it concluded about a host, and for which boot."""

    host_id: str
    state: str
    """up, connecting, non_responsive"""
    boot_id: str = ""


CREATE_HOST = Call("inventory.host.create", CreateHost, HostToken, mutates=True)
RENEW_HOST_TOKEN = Call("inventory.host.renew_token", RenewHostToken, HostToken, mutates=True)
UPDATE_HOST = Call("inventory.host.update", UpdateHost, Host, mutates=True)
DELETE_HOST = Call("inventory.host.delete", DeleteById, Done, mutates=True)
GET_HOST = Call("inventory.host.get", GetById, Host)
LIST_HOSTS = Call("inventory.host.list", ListQuery, Page)
MAINTAIN_HOST = Call("inventory.host.maintain", MaintainHost, Operation, mutates=True)
ACTIVATE_HOST = Call("inventory.host.activate", ActivateHost, Operation, mutates=True)
"""A host that sleeps is woken."""
SAVE_POWER = Call("inventory.host.save_power", SavePower, Operation, mutates=True, timeout_seconds=30)
WAKE_HOST = Call("inventory.host.wake", WakeHost, Operation, mutates=True)

HOST_CHANGED = Fact("fact.inventory.host.{id}.changed", Host)
HOST_DELETED = Fact("fact.inventory.host.{id}.deleted", Host)
