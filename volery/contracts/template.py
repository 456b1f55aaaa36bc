"""Templates: what a VM is made from. Blank is always there; templates with disks come with a later release."""

from __future__ import annotations

from volery.contracts.base import Call, Entity, Fact
from volery.contracts.cluster import GetById
from volery.contracts.operation import ListQuery, Page

BLANK_TEMPLATE_ID = "00000000-0000-0000-0000-000000000000"
"""As in oVirt."""


class Template(Entity):
    name: str
    description: str = ""
    memory_bytes: int = 1024**3
    vcpus: int = 1


GET_TEMPLATE = Call("inventory.template.get", GetById, Template)
LIST_TEMPLATES = Call("inventory.template.list", ListQuery, Page)
TEMPLATE_CHANGED = Fact("fact.inventory.template.{id}.changed", Template)
TEMPLATE_DELETED = Fact("fact.inventory.template.{id}.deleted", Template)
