-- The newest version of every object that exists, and how objects looked over time, for reports.

create view current_configuration as
select noun, id, revision, valid_from, doc::json as doc
from config_version
where valid_to is null and not deleted;

create view deleted_objects as
select noun, id, valid_from as deleted_at, doc::json ->> 'name' as name
from config_version
where valid_to is null and deleted;

create view host_configuration as
select id, revision, valid_from, valid_to, deleted,
       doc::json ->> 'name' as name,
       doc::json ->> 'cluster_id' as cluster_id,
       doc::json ->> 'status' as status,
       (doc::json -> 'capabilities' ->> 'cpus')::integer as cpus,
       (doc::json -> 'capabilities' ->> 'memory_bytes')::bigint as memory_bytes
from config_version where noun = 'host';

create view vm_configuration as
select id, revision, valid_from, valid_to, deleted,
       doc::json ->> 'name' as name,
       doc::json ->> 'cluster_id' as cluster_id,
       doc::json ->> 'host_id' as host_id,
       doc::json ->> 'status' as status,
       (doc::json ->> 'memory_bytes')::bigint as memory_bytes,
       (doc::json ->> 'vcpus')::integer as vcpus
from config_version where noun = 'vm';

create view disk_configuration as
select id, revision, valid_from, valid_to, deleted,
       doc::json ->> 'name' as name,
       doc::json ->> 'storage_domain_id' as storage_domain_id,
       doc::json ->> 'status' as status,
       (doc::json ->> 'size_bytes')::bigint as size_bytes
from config_version where noun = 'disk';

create view storage_domain_configuration as
select id, revision, valid_from, valid_to, deleted,
       doc::json ->> 'name' as name,
       doc::json ->> 'status' as status,
       (doc::json ->> 'capacity_bytes')::bigint as capacity_bytes,
       (doc::json ->> 'available_bytes')::bigint as available_bytes,
       (doc::json ->> 'committed_bytes')::bigint as committed_bytes
from config_version where noun = 'storage_domain';

create view cluster_configuration as
select id, revision, valid_from, valid_to, deleted,
       doc::json ->> 'name' as name,
       doc::json ->> 'data_center_id' as data_center_id
from config_version where noun = 'cluster';

create view network_configuration as
select id, revision, valid_from, valid_to, deleted,
       doc::json ->> 'name' as name,
       doc::json ->> 'kind' as kind,
       (doc::json ->> 'vlan')::integer as vlan
from config_version where noun = 'network';
