-- What ha knows of hosts, which VMs it watches over, and the restarts it asked for.

create table liveness (
    id text primary key,           -- the host's
    revision bigint not null,
    doc text not null,
    private text not null,
    host_name text not null,
    cluster_id text not null,
    state text not null
);

-- VMs as inventory last said, as far as restarting them needs it.
create table vm (
    id text primary key,
    revision bigint not null,
    name text not null,
    epoch bigint not null,
    status text not null,
    desired text not null,
    reason text not null,
    host_id text not null,         -- where it runs, or ran last
    enabled boolean not null,
    priority integer not null,
    busy boolean not null
);
create index vm_crashed on vm (id) where enabled and status = 'down' and desired = 'up';

create table restart (
    id text primary key,           -- the VM's
    revision bigint not null,
    doc text not null,
    private text not null,
    vm_id text not null,
    vm_name text not null,
    gave_up boolean not null
);
