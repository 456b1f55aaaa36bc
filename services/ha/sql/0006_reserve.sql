-- Whether clusters that ask for it have room for the VMs of hosts that die.

create table reserve (
    id text primary key,           -- the cluster's
    revision bigint not null,
    doc text not null,
    private text not null,
    cluster_name text not null,
    kept boolean not null
);
