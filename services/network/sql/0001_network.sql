create table mac_pool (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    constraint mac_pool_name unique (name)
);

create table network (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    name text not null,
    data_center_id text not null,
    kind text not null,
    vlan integer not null,
    vni integer not null,
    subnet text not null,
    bridge text not null,
    mac_pool_id text not null,
    constraint network_name unique (data_center_id, name),
    constraint network_bridge unique (bridge),
    constraint network_mac_pool foreign key (mac_pool_id) references mac_pool (id)
);
create unique index network_vni on network (vni) where vni > 0;
-- One host may have any two networks of its data center, so no two NAT subnets overlap.
alter table network add constraint network_subnet
    exclude using gist ((subnet::inet) inet_ops with &&) where (subnet <> '');

create table attachment (
    id text primary key,
    revision bigint not null,
    doc text not null,
    private text not null,
    host_id text not null,
    network_id text not null,
    nic text not null,
    constraint attachment_once unique (host_id, network_id)
);
create index attachment_network on attachment (network_id);

-- Addresses that VMs have. `shared` ones were given by hand from a pool that allows it.
create table nic (
    id text primary key,
    vm_id text not null,
    network_id text,
    mac_pool_id text not null,
    address bigint not null,
    shared boolean not null default false,
    created_at timestamptz not null default now(),
    constraint nic_network foreign key (network_id) references network (id),
    constraint nic_pool foreign key (mac_pool_id) references mac_pool (id)
);
create unique index nic_address on nic (address) where not shared;
create index nic_any_address on nic (address);
create index nic_vm on nic (vm_id);
create index nic_by_network on nic (network_id);
create index nic_by_pool on nic (mac_pool_id);

-- What each host has applied, and what came of the last attempt (see model.HostState).
create table host_state (host_id text primary key, doc text not null);

-- What inventory said. Only as new as its facts.
create table data_center (id text primary key, name text not null);

create table cluster (id text primary key, name text not null, data_center_id text not null);

create table host (
    id text primary key,
    name text not null,
    data_center_id text not null,
    cluster_id text not null,
    status text not null,
    address text not null,
    nics text not null,
    boot_id text not null
);
create index host_data_center on host (data_center_id);

create table vm (id text primary key, name text not null);
