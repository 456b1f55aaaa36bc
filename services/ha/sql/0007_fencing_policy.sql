-- When a cluster's silent hosts are spared, as its administrator set it. A cluster without a row has the defaults.

create table fencing_policy (
    id text primary key,           -- the cluster's
    revision bigint not null,
    doc text not null,
    private text not null
);
