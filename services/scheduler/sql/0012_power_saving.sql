-- Hosts that sleep to save power, or that were woken once; a row counts while its revision is the one that host_capacity has.
create table host_sleep (
    host_id text primary key,
    revision bigint not null,
    power_saving text not null,
    proven_at timestamptz
);

-- Hosts that sleep and would have taken a VM that found no place: the leader wakes them.
create table host_wanted (
    host_id text primary key,
    cluster_id text not null,
    vm_name text not null,
    at timestamptz not null
);
