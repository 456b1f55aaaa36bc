-- Every file or LUN that is a part of a disk, or that was begun and may be there. Written together with a new revision of
-- the disk; what the disk's document says of volumes is copied from here.
create table volume (
    id text primary key,
    disk_id text not null,
    parent_id text not null,
    state text not null,
    format text not null,
    size_bytes bigint not null,
    snapshot_id text not null,
    made_by text not null,
    host_id text not null
);
create index volume_disk on volume (disk_id);
create index volume_snapshot on volume (snapshot_id) where snapshot_id <> '';
-- A chain is a line: no volume has two others directly above it.
create unique index volume_above on volume (disk_id, parent_id) where state <> 'new' and state <> 'removing';
-- A disk's first volume has its id, so that files keep their names.
insert into volume (id, disk_id, parent_id, state, format, size_bytes, snapshot_id, made_by, host_id)
select id, id, '', 'ok', format, size_bytes, '', '', '' from disk;
