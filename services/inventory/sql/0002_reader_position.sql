-- How far each outside reader has acknowledged each stream, for when the stream is made anew.
create table reader_position (
    reader text not null,
    stream text not null,
    position bigint not null,
    primary key (reader, stream)
);
