-- Journals of hosts that were admitted once, and another one since: what the stream still holds of them is history.
create table left_journal (
    host_id text not null,
    generation text not null,
    primary key (host_id, generation)
);
