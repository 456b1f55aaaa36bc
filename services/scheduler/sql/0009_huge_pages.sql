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

create or replace view capacity as
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
