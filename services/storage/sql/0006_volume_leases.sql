-- Leases under which hosts' programs write a disk's volume are kept beside those of VMs: vm_id is then the disk's.
alter table vm_lease add column of_disk boolean not null default false;
