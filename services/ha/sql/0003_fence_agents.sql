-- Which fence agents a host can run against the others' BMCs: names, separated by spaces.

alter table host add column fence_agents text not null default '';
