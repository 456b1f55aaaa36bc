-- The newest state of a host under which its power was ordered to save power. What was decided before that comes too late.
create table power_order (
    host_id text primary key,
    revision bigint not null,
    action text not null,
    at timestamptz not null
);
