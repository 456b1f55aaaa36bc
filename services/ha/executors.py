"""Who runs fence agents: a host of the cluster that ha hears well, or ha's own process where the agents are installed."""

from __future__ import annotations

import asyncio
import logging
from functools import cache
from pathlib import Path

from services.ha.policies.fencing import is_majority
from services.ha.state import Ha
from services.ha.watch import Watch
from volery.contracts.errors import Refused
from volery.contracts.fencing import AskPower, FenceDevice, PowerAction, PowerAnswer
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.liveness import LivenessState
from volery.fencing import process, running
from volery.fencing.asks import ask_host
from volery.runtime.clock import monotonic

log = logging.getLogger(__name__)

HEARD_SECONDS = 2.0
"""An executor has beaten within this: four beats."""
TTL_MS = 5000
"""An executor that is older than this, by its own clock, refuses: it was frozen, and what it was asked is long past."""
NOT_EXPECTED = (HostStatus.MAINTENANCE, HostStatus.INSTALLING)
WITNESS_SECONDS = 1.0
WITNESSED_SECONDS = 10.0
"""How long the answer of the witnesses counts."""


def in_cluster(ha: Ha, cluster_id: str) -> list[Watch]:
    return [w for w in ha.clusters[cluster_id].values() if w.known] if cluster_id in ha.clusters else []


def expected_in(ha: Ha, cluster_id: str) -> list[Watch]:
    """Hosts of a cluster that should answer: without those in maintenance or proven dead."""
    return [
        w
        for w in in_cluster(ha, cluster_id)
        if w.facts.status not in NOT_EXPECTED and w.state is not LivenessState.DEAD
    ]


def has_majority(ha: Ha, cluster_id: str, now: float) -> bool:
    """Whether enough of a cluster's hosts answers."""
    expected = expected_in(ha, cluster_id)
    return is_majority(sum(_heard(w, now) for w in expected), len(expected))


def _heard(watch: Watch, now: float) -> bool:
    return (
        watch.state is LivenessState.UP and watch.beat_at is not None and now - watch.beat_at < HEARD_SECONDS
    )


def heard_in(ha: Ha, cluster_id: str, now: float) -> list[Watch]:
    """Hosts of a cluster that beat well."""
    return [w for w in in_cluster(ha, cluster_id) if _heard(w, now)]


def executors(ha: Ha, target: Watch, agents: list[str]) -> list[Watch]:
    """Hosts of its cluster that may be asked, those that have the agents and were heard last first; none when they are
    the smaller side. Whoever lacks the agent refuses, and the next is asked."""
    now = monotonic()
    heard = [w for w in heard_in(ha, target.facts.cluster_id, now) if w is not target]
    if not has_majority(ha, target.facts.cluster_id, now):
        return []

    def fitness(watch: Watch) -> tuple[bool, float]:
        return set(agents) <= set(watch.facts.fence_agents), watch.beat_at or 0.0

    return sorted(heard, key=fitness, reverse=True)


def can_execute(ha: Ha, target: Watch, agents: list[str]) -> bool:
    return bool(executors(ha, target, agents)) or own_hands(agents)


def own_hands(agents: list[str]) -> bool:
    """Whether this machine has every one of these agents."""
    return bool(agents) and all(process.find_program(name) for name in agents)


def runs_here(target: Watch) -> bool:
    """Whether this process runs on that very boot of that host."""
    return _own_boot_id() == target.boot_id != ""


@cache
def _own_boot_id() -> str:
    """This machine's, which no process outlives; "" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


async def run(
    ha: Ha, target: Watch, action: PowerAction, device: FenceDevice, secrets: dict[str, str]
) -> tuple[PowerAnswer, str]:
    """What a device said to whoever asked it, and who that was. An answer that was lost says nothing, in words: whoever
    acted reads the status next. Switching is asked of one executor only; a reading that was lost, of the next."""
    words: list[str] = []
    for executor in executors(ha, target, [device.agent])[:3]:
        name = f"host {executor.facts.name}"
        try:
            return await _ask(ha, executor, target, action, device, secrets), name
        except Refused as refused:
            words.append(refused.message)
            if refused.kind == "timeout" and action not in (PowerAction.STATUS, PowerAction.IDENTITY):
                return _nothing(action, words), name
    if own_hands([device.agent]) and not (runs_here(target) and action is PowerAction.OFF):
        try:
            return await running.run(action, device, secrets), "ha"
        except Refused as refused:
            words.append(refused.message)
    return _nothing(action, words), ""


def _nothing(action: PowerAction, words: list[str]) -> PowerAnswer:
    said = "; ".join(dict.fromkeys(words)) or "no host of its cluster can run its fence agent now"
    return PowerAnswer(ask_id="", action=action, words=said)


async def _ask(
    ha: Ha,
    executor: Watch,
    target: Watch,
    action: PowerAction,
    device: FenceDevice,
    secrets: dict[str, str],
) -> PowerAnswer:
    assert executor.beat is not None
    ask = AskPower(
        host_id=executor.facts.id,
        ask_id=new_id(),
        target_host_id=target.facts.id,
        target_boot_id=target.boot_id,
        action=action,
        device=device,
        secrets=secrets,
        beat_seq=executor.beat.beat_seq,
        ttl_ms=TTL_MS,
        fencing_token=ha.core.orders.token,
    )
    return await ask_host(ha.orders, ha.sign, ask)


async def is_cut_off(ha: Ha, target: Watch) -> bool:
    """Whether it may be ha that is alone: most hosts of the cluster are silent, and most witnesses too."""
    if has_majority(ha, target.facts.cluster_id, monotonic()):
        return False
    return not await _witnessed(ha)


async def _witnessed(ha: Ha) -> bool:
    """Whether at least half of the witnesses answer. Without any, nobody says so."""
    at, answered = ha.witnessed
    if monotonic() - at < WITNESSED_SECONDS:
        return answered
    addresses = [a.strip() for a in ha.config.witnesses.split(",") if a.strip()]
    found = await asyncio.gather(*(_answers(address) for address in addresses))
    answered = bool(found) and sum(found) * 2 >= len(found)
    ha.witnessed = (monotonic(), answered)
    if not answered:
        log.warning(
            "most hosts of a cluster are silent and no witness answers: ha may be cut off, and fences nobody"
        )
    return answered


async def _answers(address: str) -> bool:
    """Whether a TCP connection is taken, or refused by a machine that lives."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(
            asyncio.open_connection(host.strip("[]"), int(port)), WITNESS_SECONDS
        )
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return True
