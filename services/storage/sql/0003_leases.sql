-- What hosts said of leases with their present boot (LeaseAbility).
alter table host add column boot_id text not null default '';
alter table host add column leases text not null default '{}';

-- Each host's number in the lockspace of a storage domain. A host that is gone keeps it until it was given back.
create table lockspace_member (
    domain_id text not null,
    host_id text not null,
    number integer not null,
    asked boolean not null,
    boot_id text not null,
    generation bigint not null,
    io_timeout_seconds integer not null,
    reset_host boolean not null,
    primary key (domain_id, host_id),
    constraint lockspace_member_number unique (domain_id, number)
);
create index lockspace_member_host on lockspace_member (host_id);

-- Leases of VMs that may be on the storage. One that nobody needs any more is removed as soon as a host can.
create table vm_lease (
    domain_id text not null,
    vm_id text not null,
    doomed boolean not null,
    primary key (domain_id, vm_id)
);
create index vm_lease_vm on vm_lease (vm_id);
create index vm_lease_doomed on vm_lease (vm_id) where doomed;
