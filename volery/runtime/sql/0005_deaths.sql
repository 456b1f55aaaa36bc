-- Boots of hosts that have ended by proof: nothing of them runs any more, and no order will be answered by them.
create table host_death (
    host_id text not null,
    boot_id text not null,
    proof text not null,                       -- as ha said it
    heard_at timestamptz not null default now(),
    primary key (host_id, boot_id)
);

-- The boot that an order was sent to last, or is about to be: its journal may have it. '': none yet.
alter table host_order add column boot_id text not null default '';
-- The boot under which the host said how it ended; '' when that isn't known.
alter table host_order add column ended_boot_id text not null default '';
