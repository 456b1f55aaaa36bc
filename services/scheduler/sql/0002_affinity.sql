-- Affinity groups, and the counters that keep what was decided under them true when it is committed.

-- Counts the changes of the cluster's affinity groups. Every placement shares a lock on the row and names the count it
-- was decided under; the trigger tell_fleet tells every replica.
alter table cluster add column groups_revision bigint not null default 0;

create table affinity_group (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    cluster_id text not null,
    vm_ids text not null,                 -- JSON, like host_ids
    host_ids text not null,
    placements bigint not null default 0  -- counts claims of VMs that its enforcing rule between VMs concerns
);
create unique index affinity_group_name on affinity_group (cluster_id, name);
