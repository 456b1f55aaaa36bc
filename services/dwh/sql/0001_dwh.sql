-- What was: versions of configuration, samples, aggregates.

-- Every revision of every object that was announced, once. valid_to null: it is the newest.
create table config_version (
    noun text not null,
    id text not null,
    revision bigint not null,
    valid_from timestamptz not null,
    valid_to timestamptz,
    deleted boolean not null,      -- a tombstone: what it holds is how the object ended
    doc text not null,
    primary key (noun, id, revision)
);
create index config_version_current on config_version (noun, id) where valid_to is null;
create index config_version_ended on config_version (valid_to) where valid_to is not null;

-- Times in which facts were lost.
create table gap (
    stream text not null,
    noticed_at timestamptz not null default now(),
    primary key (stream, noticed_at)
);

-- Owners whose objects were listed since their last gap.
create table listed (
    stream text primary key,
    at timestamptz not null default now()
);

-- Minute samples, by day. The label says what the object was part of at the time.
create table host_minute (
    at timestamptz not null,
    id text not null,
    cpu_percent double precision,
    memory_used_bytes double precision,
    memory_bytes double precision,
    swap_used_bytes double precision,
    load double precision,
    vm_count double precision,
    received_bytes_per_second double precision,
    sent_bytes_per_second double precision,
    primary key (id, at)
) partition by range (at);

create table vm_minute (
    at timestamptz not null,
    id text not null,
    host_id text not null,
    cpu_percent double precision,
    memory_used_bytes double precision,
    memory_bytes double precision,
    primary key (id, at)
) partition by range (at);

create table disk_minute (
    at timestamptz not null,
    id text not null,
    vm_id text not null,
    read_bytes_per_second double precision,
    written_bytes_per_second double precision,
    read_requests_per_second double precision,
    write_requests_per_second double precision,
    allocated_bytes double precision,
    primary key (id, at)
) partition by range (at);

create table nic_minute (
    at timestamptz not null,
    id text not null,
    vm_id text not null,
    received_bytes_per_second double precision,
    sent_bytes_per_second double precision,
    received_packets_per_second double precision,
    sent_packets_per_second double precision,
    dropped_packets_per_second double precision,
    primary key (id, at)
) partition by range (at);

-- Aggregates: means over the minutes that there are, and the highest minute. Hours by month.
create table host_hour (
    at timestamptz not null,
    id text not null,
    minutes integer not null,
    cpu_percent double precision,
    memory_used_bytes double precision,
    memory_bytes double precision,
    swap_used_bytes double precision,
    load double precision,
    vm_count double precision,
    received_bytes_per_second double precision,
    sent_bytes_per_second double precision,
    max_cpu_percent double precision,
    max_memory_used_bytes double precision,
    max_memory_bytes double precision,
    max_swap_used_bytes double precision,
    max_load double precision,
    max_vm_count double precision,
    max_received_bytes_per_second double precision,
    max_sent_bytes_per_second double precision,
    primary key (id, at)
) partition by range (at);

create table vm_hour (
    at timestamptz not null,
    id text not null,
    host_id text not null,         -- where it was last
    minutes integer not null,
    cpu_percent double precision,
    memory_used_bytes double precision,
    memory_bytes double precision,
    max_cpu_percent double precision,
    max_memory_used_bytes double precision,
    max_memory_bytes double precision,
    primary key (id, at)
) partition by range (at);

create table disk_hour (
    at timestamptz not null,
    id text not null,
    vm_id text not null,
    minutes integer not null,
    read_bytes_per_second double precision,
    written_bytes_per_second double precision,
    read_requests_per_second double precision,
    write_requests_per_second double precision,
    allocated_bytes double precision,
    max_read_bytes_per_second double precision,
    max_written_bytes_per_second double precision,
    max_read_requests_per_second double precision,
    max_write_requests_per_second double precision,
    max_allocated_bytes double precision,
    primary key (id, at)
) partition by range (at);

create table nic_hour (
    at timestamptz not null,
    id text not null,
    vm_id text not null,
    minutes integer not null,
    received_bytes_per_second double precision,
    sent_bytes_per_second double precision,
    received_packets_per_second double precision,
    sent_packets_per_second double precision,
    dropped_packets_per_second double precision,
    max_received_bytes_per_second double precision,
    max_sent_bytes_per_second double precision,
    max_received_packets_per_second double precision,
    max_sent_packets_per_second double precision,
    max_dropped_packets_per_second double precision,
    primary key (id, at)
) partition by range (at);

create table host_day (like host_hour including indexes);
create table vm_day (like vm_hour including indexes);
create table disk_day (like disk_hour including indexes);
create table nic_day (like nic_hour including indexes);

-- Hours and days whose samples changed since they were last aggregated.
create table dirty (
    noun text not null,
    span text not null,            -- hour, day
    at timestamptz not null,
    touched bigint not null default 1,
    primary key (noun, span, at)
);

-- Which definition of the views is in force.
create table views (
    single boolean primary key default true check (single),
    hash text not null,
    names text[] not null
);
