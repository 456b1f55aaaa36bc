-- The leader asks every few seconds which VMs were heard of since it last looked: few among hundreds of thousands.

create index vm_heard on vm (heard_at);
