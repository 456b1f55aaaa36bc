-- Every two seconds the leader looks at the groups of VMs that were heard of since: without reading all VMs.

create index vm_heard_at on vm (heard_at);
