-- Physical CPUs. Which ones a claim holds says cpu_use; a host counts them, and every change of what is held raises
-- cpus_revision: a claim of physical CPUs is committed only under the revision that they were chosen under, so no two hold
-- the same one alone. largest_shared is never too low: it is raised with each claim, and lowered when somebody looks, a minute
-- later at most. What the previous release claims beside this one is counted then, too.

alter table host_capacity
    add column cores text not null default '',             -- as inventory reports them; '': not heard yet
    add column cpus_revision bigint not null default 0,
    add column cpus_exclusive integer not null default 0,  -- one VM's alone
    add column vcpus_exclusive integer not null default 0, -- of the VMs that have CPUs alone
    add column largest_shared integer not null default 0;  -- vCPUs of the largest VM that has no CPUs of its own
alter table claim
    add column cpu_pinning text not null default '',
    add column exclusive_cpus integer not null default 0;
update host_capacity h set largest_shared = coalesce((select max(vcpus) from claim c where c.host_id = h.id), 0);

create trigger tell_fleet_cores after update on host_capacity
    for each row when (old.cores is distinct from new.cores)
    execute function tell_fleet();

-- Which VM holds, or held, which physical CPUs of which host: written and closed with its claim, kept for whoever asks years
-- later. What is held now is read from here, since a replica of the previous release that confirms a claim writes its
-- document without its CPUs.
create table cpu_use (
    id text primary key,                  -- the claim's: by time
    vm_id text not null,
    vm_name text not null,
    epoch bigint not null,
    host_id text not null,
    host_name text not null,
    policy text not null,
    cpus text not null,                   -- JSON, like exclusive
    exclusive text not null,
    vcpus integer not null,
    cores integer not null,
    sockets integer not null,
    began_at timestamptz not null default now(),
    ended_at timestamptz                  -- null: it holds them
);
create index cpu_use_ended_at on cpu_use (ended_at);
create index cpu_use_held on cpu_use (host_id) where ended_at is null;
