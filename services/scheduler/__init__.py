"""The scheduler: where a VM may run.

Owns the fleet model, claims (which VM holds which capacity on which host), affinity groups, scheduling policies with the
clusters that have them, plans, past decisions, and the licence report.
Answers: place, find room, confirm and release claims, list claims and capacity, get a decision, report which physical
CPUs VMs held; affinity groups and scheduling policies; which hosts of a cluster have too much; plans.
Announces: claims, affinity groups, scheduling policies and plans changed and deleted.
Asks inventory for the migrations of a plan.
Never: starts, moves or stops anything, and never says where a VM runs; that is inventory's.
"""
