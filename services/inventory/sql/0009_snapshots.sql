create table snapshot (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    vm_id text not null,
    status text not null,
    constraint snapshot_name unique (vm_id, name)
);
