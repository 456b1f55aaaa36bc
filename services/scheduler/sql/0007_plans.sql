-- Plans, and what active ones hold. A VM or host is held by one plan at a time, whoever makes plans: the key says so. `rank`
-- is that of the plan's kind, lower first: a plan takes what it needs from plans of a higher one.

create table plan (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    cluster_id text not null,
    kind text not null,
    state text not null,
    created_at timestamptz not null
);
create index plan_running on plan (cluster_id) where state = 'running';

create table plan_hold (
    noun text not null,                   -- vm or host
    object_id text not null,
    plan_id text not null,
    rank integer not null,
    target_host_id text not null default '',   -- where the plan takes the VM
    constraint plan_hold_once primary key (noun, object_id)
);
create index plan_hold_plan on plan_hold (plan_id);
