-- Huge pages, counted by themselves: memory_bytes is from now on what a host has beside them, and a VM that they back holds
-- only QEMU's overhead of it. What the previous release writes beside this one knows none, and neither do its VMs; hosts are
-- listed again by whoever leads next, and the same revision is taken again where it says something else.

alter table host_capacity add column pages_2m integer not null default 0;
alter table host_capacity add column pages_2m_used integer not null default 0;
alter table host_capacity add column pages_1g integer not null default 0;
alter table host_capacity add column pages_1g_used integer not null default 0;
alter table claim add column pages_2m integer not null default 0;
alter table claim add column pages_1g integer not null default 0;
alter table vm add column hugepage_kib integer not null default 0;
alter table vm add column numa_nodes text not null default '[]';   -- JSON

-- The previous release goes on reading `capacity`.
create view capacity_of_host as
select id, name, cluster_id, status,
       json_build_object(
           'host_id', id, 'name', name, 'cluster_id', cluster_id, 'memory_bytes', memory_limit_bytes,
           'memory_used_bytes', memory_used_bytes, 'vcpus_limit', vcpus_limit, 'vcpus_used', vcpus_used,
           'schedulable', status = 'up', 'pages_2m', pages_2m, 'pages_2m_used', pages_2m_used,
           'pages_1g', pages_1g, 'pages_1g_used', pages_1g_used)::text as doc
from host_capacity where not gone;

create trigger tell_fleet_pages after update on host_capacity
    for each row when ((old.pages_2m, old.pages_1g) is distinct from (new.pages_2m, new.pages_1g))
    execute function tell_fleet();

-- NUMA cells of hosts, and what claims of VMs hold there whose nodes are pinned to them. Other VMs' memory is in any cell:
-- nobody knows in which, so none of it is counted here.
create table host_cell (
    host_id text not null,
    cell integer not null,
    cpus integer not null,
    memory_bytes bigint not null,          -- beside huge pages
    pages_2m integer not null,
    pages_1g integer not null,
    memory_used_bytes bigint not null default 0,
    pages_2m_used integer not null default 0,
    pages_1g_used integer not null default 0,
    primary key (host_id, cell)
);
create table claim_cell (
    claim_id text not null,
    host_id text not null,
    cell integer not null,
    memory_bytes bigint not null,
    pages_2m integer not null,
    pages_1g integer not null,
    primary key (claim_id, cell)
);
create index claim_cell_host on claim_cell (host_id);

create function tell_fleet_of_cell() returns trigger language plpgsql as $$
begin
    perform pg_notify('scheduler_fleet', 'host_capacity ' || coalesce(new.host_id, old.host_id));
    return null;
end $$;
create trigger tell_fleet_rows after insert or delete on host_cell
    for each row execute function tell_fleet_of_cell();
create trigger tell_fleet_changes after update on host_cell
    for each row when ((old.cpus, old.memory_bytes, old.pages_2m, old.pages_1g)
                       is distinct from (new.cpus, new.memory_bytes, new.pages_2m, new.pages_1g))
    execute function tell_fleet_of_cell();
