-- Set while PostgreSQL is known to be older than the hosts: nothing is started, moved or deleted.
create table quarantine (
    single boolean primary key default true check (single),
    reason text not null,
    since timestamptz not null default now()
);

-- Hosts that have not reported since.
create table quarantine_host (
    host_id text primary key
);
