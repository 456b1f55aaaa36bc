-- Raised by every quarantine: numbers of orders and epochs of placements begin above it, because the hosts have seen
-- higher ones than a restored database remembers.
create table restore_base (
    single boolean primary key default true check (single),
    base bigint not null
);
insert into restore_base (base) values (0);
