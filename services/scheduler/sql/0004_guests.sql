-- How many VMs hold capacity on a host, and how many of them are highly available: counted where capacity is taken and given
-- back. What the previous release takes and gives back beside this one is counted with the next check of the counters, a
-- minute later at most; its claims count as not highly available.

alter table host_capacity add column guests integer not null default 0;
alter table host_capacity add column ha_guests integer not null default 0;
alter table claim add column high_availability boolean not null default false;
alter table cluster add column reserve_host_failures integer not null default 0;
