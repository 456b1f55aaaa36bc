-- Devices of hosts that VMs have for themselves. What a host has is one row, written after the host's own, whose lock orders
-- claims; `uses` counts how often devices of it were given or taken back, and a claim of some is committed only under the
-- count that they were chosen under.

create table host_device_list (
    host_id text primary key,
    revision bigint not null,              -- the host's
    devices text not null,                 -- JSON, as inventory reports them
    uses bigint not null default 0
);

create trigger tell_fleet_rows after insert or delete on host_device_list
    for each row execute function tell_fleet_of_cell();
create trigger tell_fleet_changes after update on host_device_list
    for each row when (old.devices is distinct from new.devices)
    execute function tell_fleet_of_cell();

-- What is held of them: whole devices ('' is no type), and mediated ones by type and number.
create table claim_device (
    claim_id text not null,
    host_id text not null,
    device text not null,
    mdev_type text not null,
    number integer not null,
    vm_id text not null,
    vm_name text not null,
    primary key (claim_id, device, mdev_type, number)
);
create index claim_device_host on claim_device (host_id);
create unique index claim_device_whole on claim_device (host_id, device) where mdev_type = '';

alter table vm add column devices text not null default '[]';   -- JSON: what it was given with its last start
