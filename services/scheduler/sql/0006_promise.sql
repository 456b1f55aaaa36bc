-- The promise that a cluster survives the loss of hosts.

alter table cluster add column admission_control text not null default 'off';

-- Counts what may change whether a cluster's promise holds: a claim in a cluster that enforces it is committed only under the
-- count that its check was made under. A row of its own, since a change of `cluster` is told to every replica.
create table promise_count (
    cluster_id text primary key,
    changes bigint not null
);
insert into promise_count (cluster_id, changes) select id, 0 from cluster;

-- What a VM that holds capacity would ask of another host, as its owner said last, and where it would go.
create table promised_vm (
    vm_id text primary key,
    cluster_id text not null,
    need text not null,
    lost_host_id text not null default '',     -- its refuge is for the loss of this host
    refuge_host_id text not null default '',   -- there it is brought back, unless that changes; '': nowhere, or not known
    asked_at timestamptz not null default now()
);

-- Changes that their owner asked about and is about to make: they count as made until they are heard of.
create table promise_hold (
    id text primary key,
    cluster_id text not null,
    doc text not null,
    of_cluster boolean not null,               -- of the cluster itself: over with the next that is heard of it
    until timestamptz not null
);

create table promise (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    cluster_id text not null,
    kept boolean not null
);
