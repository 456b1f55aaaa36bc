-- VMs that are brought back after a blackout though they aren't highly available.
alter table vm add column after_blackout boolean not null default false;
