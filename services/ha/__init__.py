"""ha: whether hosts are alive, and the restart of highly available VMs.

Owns the liveness of hosts, its evidence, and the restarts of VMs that crashed.
Answers: liveness of hosts, restarts, start groups and protection of VMs.
Announces: liveness, restarts, start groups and protection, changed and deleted.
Never: takes silence for death, restarts a VM without proof that it ended, or starts anything itself; it asks
inventory.
"""
