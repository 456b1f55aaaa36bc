-- A host that falls asleep, sleeps or wakes gets no VMs: whoever writes that a VM may run there shares a lock on this row, and
-- whoever puts it to sleep looks for such VMs only after this was written.
alter table host add column power_saving text not null default 'awake';
