-- Which host was ordered to write a dead host's lease free, and has not said how that ended: until then the number is not
-- given to another boot. '': none.
alter table lockspace_member add column freer_host_id text not null default '';
