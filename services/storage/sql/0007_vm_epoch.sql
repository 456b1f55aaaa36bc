-- Under which epoch a VM was placed last, as inventory announced it: by that its facts are compared with what it asked.
alter table vm add column epoch bigint not null default 0;
