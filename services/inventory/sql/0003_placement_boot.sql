-- The boot of its host under which the VM runs, so that a proof of death ends exactly what ran under the boot that it
-- names. '': not known yet; the host's next report says it.
alter table placement add column boot_id text not null default '';
