"""inventory owns data centers, clusters, hosts, VMs, tags, accounts, and the lifecycle of every VM.

It answers the calls `inventory.*`, announces `fact.inventory.*`, gives hosts the orders `domain.*`, and hears
what hosts say about their domains. The epoch of every placement lives in its table `placement`, nowhere else.
It never picks a host (scheduler does) and never touches a volume (storage does).
"""
