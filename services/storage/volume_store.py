"""The table of volumes: which files or LUNs are a part of which disk, in which order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.storage.store import DISKS, DiskPrivate, Pool
from volery.contracts.domain import ImageFormat
from volery.contracts.storage import Disk
from volery.contracts.volumes import Volume, VolumeState
from volery.runtime.tables import Change, Row, text_columns

_VOLUME = "id, disk_id, parent_id, state, format, size_bytes, snapshot_id, made_by, host_id"

Volumes = dict[str, list[Volume]]
"""By disk; a disk of which nothing is known has none."""


def _by_disk(rows: Iterable[dict[str, Any]]) -> Volumes:
    found: Volumes = {}
    for row in rows:
        fields = {key: value for key, value in row.items() if key != "disk_id"}
        fields |= {"state": VolumeState(row["state"]), "format": ImageFormat(row["format"])}
        found.setdefault(row["disk_id"], []).append(Volume(**fields))
    return found


@dataclass(frozen=True, slots=True)
class VolumeStore:
    pool: Pool

    async def of(self, disk_ids: Collection[str]) -> Volumes:
        sql = f"select {_VOLUME} from volume where disk_id = any($1::text[]) order by id"
        return _by_disk(map(dict, await self.pool.fetch(sql, list(disk_ids))))

    async def in_domain(self, domain_id: str) -> Volumes:
        sql = f"""select {_VOLUME} from volume where disk_id in
                  (select d.id from disk d where d.storage_domain_id = $1) order by id"""
        return _by_disk(map(dict, await self.pool.fetch(sql, domain_id)))

    async def of_snapshot(self, snapshot_id: str) -> Volumes:
        """Those that are frozen by it."""
        sql = f"select {_VOLUME} from volume where snapshot_id = $1 order by id"
        return _by_disk(map(dict, await self.pool.fetch(sql, snapshot_id)))

    async def leaving(self) -> list[str]:
        """Disks with volumes that are to be removed."""
        rows = await self.pool.fetch("select distinct disk_id from volume where state = 'removing'")
        return [row["disk_id"] for row in rows]

    async def undescribed(self) -> list[str]:
        """Disks whose documents don't say their volumes, as those of a former release."""
        sql = """select id from disk where position('"leaf_id":"' in doc) = 0 or position('"leaf_id":""' in doc) > 0
                 order by id limit 1000"""
        return [row["id"] for row in await self.pool.fetch(sql)]

    async def busy_disks(self, operation_id: str) -> list[Row[Disk, DiskPrivate]]:
        return await DISKS.where(self.pool, "busy_with <> '' and busy_with = $1", operation_id)

    def write(self, disk_id: str, volumes: Sequence[Volume]) -> Change:
        """These volumes as they are now, new ones and others. It is for a commit that changes the disk, too, or several
        could write at once."""
        return Change(
            """insert into volume (id, disk_id, parent_id, state, format, size_bytes, snapshot_id, made_by, host_id)
               select n.id, n.disk_id, n.parent_id, n.state, n.format, n.size_bytes::bigint, n.snapshot_id,
                      n.made_by, n.host_id
               from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[], {4}::text[], {5}::text[], {6}::text[],
                           {7}::text[], {8}::text[])
                   as n(id, disk_id, parent_id, state, format, size_bytes, snapshot_id, made_by, host_id)
               on conflict (id) do update set parent_id = excluded.parent_id, state = excluded.state,
                   size_bytes = excluded.size_bytes, snapshot_id = excluded.snapshot_id, host_id = excluded.host_id""",
            text_columns(
                (
                    v.id, disk_id, v.parent_id, v.state, v.format, v.size_bytes, v.snapshot_id, v.made_by, v.host_id
                )
                for v in volumes
            ),
            guarded=False,
        )  # fmt: skip

    def forget(self, volume_ids: Collection[str]) -> Change:
        return Change("delete from volume where id = any({0}::text[])", (list(volume_ids),), guarded=False)

    def forget_all(self, disk_id: str) -> Change:
        """Of a disk that ends."""
        return Change("delete from volume where disk_id = {0}", (disk_id,), guarded=False)
