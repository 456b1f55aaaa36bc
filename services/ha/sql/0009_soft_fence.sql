-- Hosts whose agent is restarted over SSH before their power is touched.

create table soft_fence (
    id text primary key,           -- the host's
    revision bigint not null,
    doc text not null,
    private text not null,         -- ha's private key, sealed
    host_name text not null,
    cluster_id text not null,
    enabled boolean not null
);
