-- Operations that were under way in a backup which was restored: what became of them afterwards only hosts know.
create table restored_operation (
    operation_id text primary key
);
