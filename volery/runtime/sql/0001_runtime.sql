-- What every owner's schema holds beside its own nouns. Runs with the owner's role and schema.

-- Facts on their way into the log, written by the statement that made them true.
create table outbox (
    id bigint generated always as identity primary key,
    subject text not null,
    body bytea not null            -- the CloudEvent without its id and sequence, from the comma on
);

-- The gapless, ordered history of this owner. Stream sequence = position.
create table log (
    position bigint primary key,
    subject text not null,
    body bytea not null,
    at timestamptz not null default now()
);

-- One row: the counter that gives positions, and the id that changes when the past was rewritten.
create table log_head (
    single boolean primary key default true check (single),
    history text not null,
    position bigint not null
);
insert into log_head (history, position)
values (substr(replace(gen_random_uuid()::text, '-', ''), 1, 12), 0);

-- How far this service has heard other owners' streams; committed with the effect.
create table heard (
    stream text primary key,
    history text not null,
    position bigint not null
);

-- How far this service has heard each host, and which journal it admitted.
create table heard_host (
    host_id text primary key,
    generation text not null,
    seq bigint not null
);

-- First answers, by principal and key, for a day.
create table request (
    principal text not null,
    key text not null,
    hash text not null,
    answer bytea not null,
    created_at timestamptz not null default now(),
    primary key (principal, key)
);
create index request_created_at on request (created_at);

create table operation (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    kind text not null,
    state text not null,
    object_id text not null,
    principal text not null,
    created_at timestamptz not null
);
create index operation_state on operation (state) where state in ('pending', 'running', 'cancelling');
create index operation_object on operation (object_id);
create index operation_created_at on operation (created_at);

-- Orders to hosts, kept until their operation is old.
create table host_order (
    order_id text primary key,
    host_id text not null,
    object_id text not null,
    kind text not null,
    epoch bigint not null,
    order_seq bigint not null,
    operation_id text not null,
    body bytea not null,
    state text not null,           -- waiting, acknowledged, cancelling, finished
    outcome text not null default '',
    problem text not null default '',
    result bytea,
    fencing_token bigint not null,
    deadline_seconds double precision not null,
    repeat_safe boolean not null,
    created_at timestamptz not null default now()
);
create index host_order_open on host_order (host_id) where state <> 'finished';
create index host_order_operation on host_order (operation_id);

-- Counts the orders of each object; the agent refuses one that comes out of order.
create table order_seq (
    object_id text primary key,
    seq bigint not null
);

-- One row: the fencing token of whoever leads this service's background work.
create table leader (
    single boolean primary key default true check (single),
    token bigint not null
);
insert into leader (token) values (0);
