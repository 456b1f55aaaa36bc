-- What each host said its processes have open, known to inventory or not: such a LUN is never given to a disk.
create table host_lun (
    host_id text primary key,
    luns text not null,
    seen_at timestamptz not null default now()
);
-- LUNs of disks that were made before LUNs were claimed.
update disk set private = (private::jsonb || '{"claimed": true}')::text where lun >= 0 and status = 'ok';
