-- What inventory and network said of hosts, clusters, networks and VMs, and who holds which capacity.

-- One row per host: its capacity and what claims hold of it. A claim is written in the statement that raises
-- memory_used_bytes and vcpus_used under their limits, so no race can promise more than the limits. They are not
-- a check constraint: a host that shrinks must still be recordable.
create table host_capacity (
    id text primary key,
    revision bigint not null,
    name text not null,
    cluster_id text not null,
    status text not null,
    cpus integer not null,
    memory_bytes bigint not null,
    cpu_models text[] not null,
    machines text[] not null,
    memory_limit_bytes bigint not null,
    vcpus_limit integer not null,
    memory_used_bytes bigint not null default 0,
    vcpus_used integer not null default 0,
    gone boolean not null default false   -- deleted by its owner; kept while claims name it
);
create index host_capacity_cluster on host_capacity (cluster_id);

create table cluster (
    id text primary key,
    revision bigint not null,
    name text not null,
    cpu_model text not null,
    machine text not null,
    memory_overcommit_percent integer not null,
    cpu_overcommit_ratio double precision not null,
    balance text not null
);

create table network (
    id text primary key,
    revision bigint not null,
    name text not null,
    ready_host_ids text[] not null
);

create table vm (
    id text primary key,
    revision bigint not null,
    name text not null,
    epoch bigint not null,
    status text not null,
    host_id text not null,
    memory_bytes bigint not null,
    vcpus integer not null,
    deleted boolean not null,
    heard_at timestamptz not null default now()
);

create table claim (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    vm_id text not null,
    epoch bigint not null,
    host_id text not null,
    state text not null,
    memory_bytes bigint not null,
    vcpus integer not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    constraint claim_vm_epoch unique (vm_id, epoch)
);
create index claim_host on claim (host_id);
create index claim_tentative on claim (created_at) where state = 'tentative';

create table decision (
    id text primary key,
    vm_id text not null,
    host_id text not null,
    created_at timestamptz not null default now(),
    body bytea not null            -- the Placement as JSON, deflated
);
create index decision_created_at on decision (created_at);

create view capacity as
select id, name, cluster_id, status,
       json_build_object(
           'host_id', id, 'name', name, 'cluster_id', cluster_id, 'memory_bytes', memory_limit_bytes,
           'memory_used_bytes', memory_used_bytes, 'vcpus_limit', vcpus_limit, 'vcpus_used', vcpus_used,
           'schedulable', status = 'up')::text as doc
from host_capacity where not gone;

-- Every replica keeps the fleet in memory and follows these rows. Claims don't notify: notifying takes a lock
-- that makes commits wait for each other, and the guard above needs nobody's memory to be right.
create function tell_fleet() returns trigger language plpgsql as $$
begin
    perform pg_notify('scheduler_fleet', tg_table_name || ' ' || coalesce(new.id, old.id));
    return null;
end $$;
create trigger tell_fleet_rows after insert or delete on host_capacity
    for each row execute function tell_fleet();
create trigger tell_fleet_changes after update on host_capacity
    for each row when (
        (old.name, old.cluster_id, old.status, old.cpus, old.memory_bytes, old.cpu_models, old.machines,
         old.memory_limit_bytes, old.vcpus_limit, old.gone)
        is distinct from
        (new.name, new.cluster_id, new.status, new.cpus, new.memory_bytes, new.cpu_models, new.machines,
         new.memory_limit_bytes, new.vcpus_limit, new.gone))
    execute function tell_fleet();
create trigger tell_fleet after insert or update or delete on cluster
    for each row execute function tell_fleet();
create trigger tell_fleet after insert or update or delete on network
    for each row execute function tell_fleet();
