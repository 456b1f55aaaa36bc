-- Hosts that can stand in for each other: one has lost a storage domain only while another of them has it.
alter table host add column cluster_id text not null default '';
