-- What may run on a host is asked with each of its reports, of hundreds of thousands of placements.
create index placement_host on placement (host_id);
create index placement_destination on placement (destination_id) where destination_id <> '';
