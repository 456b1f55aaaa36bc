"""network owns logical networks, MAC pools, and which host has which network on which of its NICs.

It answers the calls `network.*`, announces `fact.network.*`, gives hosts the order `network.apply` with the whole
set of networks that they must have, and hears what hosts say about their bridges. It follows inventory's facts
about data centers, clusters, hosts and VMs in tables of its own. It never touches a host but by an order, and
never decides where a VM runs.
"""
