-- Power management of hosts, what was switched, and what fencing needs to know of hosts.

-- Hosts as inventory last said.
create table host (
    id text primary key,
    revision bigint not null,
    name text not null,
    cluster_id text not null,
    status text not null,
    hardware_uuid text not null,
    boot_id text not null
);

create table power_management (
    id text primary key,           -- the host's
    revision bigint not null,
    doc text not null,
    private text not null,         -- secrets, sealed
    host_name text not null,
    cluster_id text not null,
    enabled boolean not null,
    identity text not null,
    test_passed boolean not null,
    tested_at timestamptz
);

create table fence_record (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    host_id text not null,
    host_name text not null,
    cluster_id text not null,
    state text not null,
    requested_by text not null
);
create index fence_record_host on fence_record (host_id, id);

create table fencing_pause (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    scope text not null,
    object_id text not null
);

-- The brake's window: hosts that ha ordered off. Written under the leader's fencing token.
create table power_off (
    host_id text not null,
    boot_id text not null,
    cluster_id text not null,
    at timestamptz not null,
    primary key (host_id, boot_id)
);
create index power_off_window on power_off (cluster_id, at);
