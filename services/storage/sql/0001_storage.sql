create table storage_domain (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    kind text not null,
    data_center_id text not null,
    status text not null,
    host_id text not null,
    iqn text not null,
    constraint storage_domain_name unique (name)
);
-- A target in two domains would give one LUN to two disks. Portals have aliases, so the target's name counts.
create unique index storage_domain_iqn on storage_domain (iqn) where kind = 'iscsi';
create index storage_domain_data_center on storage_domain (data_center_id);

create table disk (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    storage_domain_id text not null references storage_domain (id),
    data_center_id text not null,
    status text not null,
    content text not null,
    format text not null,
    lun integer not null,
    size_bytes bigint not null,
    busy_with text not null,
    uses text not null
);
create index disk_domain on disk (storage_domain_id);
create index disk_name on disk (name);
create index disk_unsettled on disk (id) where status <> 'ok' or busy_with <> '';
create index disk_used on disk (id) where uses <> '[]';
-- Two disks never get one LUN.
create unique index disk_lun on disk (storage_domain_id, lun) where lun >= 0;

create table transfer (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    disk_id text not null,
    direction text not null,
    state text not null,
    host_id text not null,
    expires_at timestamptz
);
create index transfer_disk on transfer (disk_id);
create index transfer_open on transfer (expires_at) where state in ('opening', 'ready', 'finishing');

-- What inventory said. Only as new as its facts.
create table data_center (id text primary key, name text not null);

create table host (
    id text primary key,
    name text not null,
    data_center_id text not null,
    status text not null,
    data_address text not null
);
create index host_data_center on host (data_center_id);

create table vm (
    id text primary key,
    name text not null,
    host_id text not null,
    status text not null
);

-- Directories of deleted domains whose marker a host has still to remove.
create table leftover (
    domain_id text primary key,
    host_id text not null,
    data_center_id text not null,
    path text not null,
    created_at timestamptz not null default now()
);
