-- Samples with the names that their objects have now.

create view host_samples as
select s.*, c.doc ->> 'name' as name
from host_minute s left join current_configuration c on c.noun = 'host' and c.id = s.id;

create view vm_samples as
select s.*, c.doc ->> 'name' as name
from vm_minute s left join current_configuration c on c.noun = 'vm' and c.id = s.id;

create view host_hours as
select s.*, c.doc ->> 'name' as name
from host_hour s left join current_configuration c on c.noun = 'host' and c.id = s.id;

create view vm_hours as
select s.*, c.doc ->> 'name' as name
from vm_hour s left join current_configuration c on c.noun = 'vm' and c.id = s.id;

create view host_days as
select s.*, c.doc ->> 'name' as name
from host_day s left join current_configuration c on c.noun = 'host' and c.id = s.id;

create view vm_days as
select s.*, c.doc ->> 'name' as name
from vm_day s left join current_configuration c on c.noun = 'vm' and c.id = s.id;
