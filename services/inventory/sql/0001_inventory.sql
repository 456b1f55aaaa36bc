create table data_center (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    constraint data_center_name unique (name)
);

create table cluster (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    data_center_id text not null references data_center (id),
    constraint cluster_name unique (name)
);
create index cluster_data_center on cluster (data_center_id);

create table host (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    cluster_id text not null references cluster (id),
    data_center_id text not null,
    status text not null,
    constraint host_name unique (name)
);
create index host_cluster on host (cluster_id);

create table vm (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    cluster_id text not null references cluster (id),
    data_center_id text not null,
    host_id text not null,
    status text not null,
    desired text not null,
    busy_with text not null,
    external boolean not null
);
-- An external VM keeps the name it came with.
create unique index vm_name on vm (data_center_id, name) where not external;
create index vm_host on vm (host_id);
create index vm_cluster on vm (cluster_id);
create index vm_unsettled on vm (id) where status <> desired;

-- Where a VM may run, and since which decision. The only place that raises an epoch.
create table placement (
    vm_id text primary key,
    epoch bigint not null,
    host_id text not null,
    state text not null,             -- none, starting, running, moving
    destination_id text not null default ''
);

create table template (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    constraint template_name unique (name)
);

create table app_user (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    constraint user_name unique (name)
);

create table token (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    user_id text not null
);
create index token_user on token (user_id);

create table reader (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    constraint reader_name unique (name)
);
