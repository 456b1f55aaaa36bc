-- Scheduling policies, and which cluster was given which: policy_id is the truth, a policy's cluster_ids repeat it for
-- people, and both are written in one statement. A change of what a cluster's placements are decided by raises the
-- cluster's groups_revision, so that no placement is committed that was decided by what was before.

create table scheduling_policy (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    built_in boolean not null
);
create unique index scheduling_policy_name on scheduling_policy (name);
create trigger tell_fleet after insert or update or delete on scheduling_policy
    for each row execute function tell_fleet();

alter table cluster add column policy_id text not null default '';   -- '': the built-in one of its balance
