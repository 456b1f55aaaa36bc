-- Twice a second each silent host's VMs are counted, of hundreds of thousands.
create index vm_host on vm (host_id);
