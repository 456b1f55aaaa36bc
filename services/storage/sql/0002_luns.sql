-- What each host said its processes have open, known to inventory or not: such a LUN is never given to a disk.
create table host_lun (
    host_id text primary key,
    luns text not null,
    claims text not null,
    seen_at timestamptz not null default now()
);
-- How often a LUN was given to a disk. Stays when its domain goes: hosts remember their newest claim, and one that is
-- newer than this says that this database is older than the storage.
create table lun_claim (
    iqn text not null,
    lun integer not null,
    claim bigint not null,
    primary key (iqn, lun)
);
-- LUNs of disks that were made before LUNs were claimed.
update disk set private = (private::jsonb || '{"claimed": true}')::text where lun >= 0 and status = 'ok';
