"""VMs of a call that can't be started as they are: who must be on one host with one of them isn't placed, either."""

from __future__ import annotations

import pytest

from tests.scheduler.test_affinity_groups import TOGETHER, need, site
from tests.scheduler.test_many import ask
from tests.scheduler.test_rounds import held
from volery.contracts.scheduling import Place, PlaceMany
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings


@pytest.mark.parametrize("dry_run", [True, False])
async def test_who_must_be_with_one_that_can_not_start_is_not_placed(
    configured: Settings, database: DatabaseConfig, dry_run: bool
) -> None:
    async with site(configured, 2, 5) as at:
        a, b, c, d, alone = at.vms
        await at.group("web", a, b, **TOGETHER)
        await at.group("app", b, c, **TOGETHER)
        places = tuple(Place(need=need(v), epoch=1) for v in (a, b, d, alone))
        absent = {c.id: "VM vm2 is locked"}
        first, second, *others = await ask(at, PlaceMany(places=places, absent=absent, dry_run=dry_run))
        assert first.message == (
            "VM vm0 isn't placed: affinity groups web and app keep it on one host with a VM that can't be started: VM vm2 is locked"
        )
        assert second.message == (
            "VM vm1 isn't placed: affinity group app keeps it on one host with a VM that can't be started: VM vm2 is locked"
        )
        assert [bool(p.host_id) for p in (first, second, *others)] == [False, False, True, True]
        none = await ask(at, PlaceMany(places=places, absent=absent, dry_run=dry_run, all_or_nothing=True))
        assert not any(p.host_id for p in none)
        assert sum(found[2] for found in (await held(database)).values()) == (0 if dry_run else 2)
