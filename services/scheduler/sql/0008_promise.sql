-- The promise that a cluster survives the loss of hosts. `promises` counts what may change whether it holds: a claim in a
-- cluster that enforces it is committed only under the count that its check was made under.

alter table cluster add column admission_control text not null default 'off';
alter table cluster add column promises bigint not null default 0;

-- The count is no news to anybody: notifying at every claim would make commits wait for each other.
drop trigger tell_fleet on cluster;
create trigger tell_fleet_rows after insert or delete on cluster
    for each row execute function tell_fleet();
create trigger tell_fleet_changes after update on cluster
    for each row when (
        (old.revision, old.groups_revision, old.policy_id, old.reserve_host_failures, old.admission_control)
        is distinct from
        (new.revision, new.groups_revision, new.policy_id, new.reserve_host_failures, new.admission_control))
    execute function tell_fleet();

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
