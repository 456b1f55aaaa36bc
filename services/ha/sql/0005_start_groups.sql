-- Which VMs are brought back before which others.

create table start_group (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    cluster_id text not null
);
create unique index start_group_name on start_group (cluster_id, name);

-- Counts the changes of a cluster's order, so that two at once can't close a circle.
create table start_order (
    cluster_id text primary key,
    revision bigint not null
);

-- Whether its guest agent answers.
alter table vm add column agent boolean not null default false;
