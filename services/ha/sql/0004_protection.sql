-- Whether the death of its host would bring each highly available VM back elsewhere.

create table protection (
    id text primary key,           -- the VM's
    revision bigint not null,
    doc text not null,
    private text not null,
    vm_name text not null,
    cluster_id text not null,
    host_id text not null,
    protected boolean not null
);
create index protection_cluster on protection (cluster_id, id);

-- Restarted on its own host only.
alter table vm add column same_host boolean not null default false;
