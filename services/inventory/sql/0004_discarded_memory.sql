-- Memory of suspended VMs that nobody goes on from any more, until its host has said that the file is gone.
create table discarded_memory (
    host_id text not null,
    path text not null,
    vm_id text not null,
    primary key (host_id, path)
);
