-- Past decisions can be listed: by VM, the newest first (ids are by time). The body keeps the explanation, doc what a
-- list shows; the previous release writes none, and its decisions are read by id only.

alter table decision add column doc text not null default '';
create index decision_vm on decision (vm_id, id);
