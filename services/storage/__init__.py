"""storage owns storage domains, disks and image transfers: what exists where, who uses it, and who may write it.

It answers the calls `storage.*`, announces `fact.storage.*`, gives hosts the orders `storage.*`, `volume.*` and
`transfer.*`, and hears what hosts say about their storage. It follows inventory's facts about data centers, hosts
and VMs in tables of its own. Of clusters it knows only which hosts can stand in for
each other. It never starts a VM, and never deletes what it did not make.
"""
