-- Whether a VM has a host now (`host_id` is where it runs or ran last), and its cluster.
alter table vm add column placed boolean not null default false;
alter table vm add column cluster_id text not null default '';
