-- How long hosts and VMs were in each state: exact to the change, not to the sample.

create view status_period as
select noun, id, status, min(valid_from) as since, nullif(max(coalesce(valid_to, 'infinity')), 'infinity') as until
from (
    select noun, id, status, valid_from, valid_to,
           count(*) filter (where changed) over (partition by noun, id order by revision) as period
    from (
        select noun, id, revision, valid_from, valid_to, doc::json ->> 'status' as status,
               (doc::json ->> 'status') is distinct from
                   lag(doc::json ->> 'status') over (partition by noun, id order by revision) as changed
        from config_version
        where noun in ('host', 'vm') and not deleted
    ) versions
) periods
group by noun, id, status, period;

create view host_uptime as
select id, sum(extract(epoch from coalesce(until, now()) - since)) filter (where status = 'up') as up_seconds,
       sum(extract(epoch from coalesce(until, now()) - since)) as known_seconds
from status_period where noun = 'host' group by id;

create view vm_uptime as
select id, sum(extract(epoch from coalesce(until, now()) - since)) filter (where status = 'up') as up_seconds,
       sum(extract(epoch from coalesce(until, now()) - since)) as known_seconds
from status_period where noun = 'vm' group by id;
