"""The scheduler: where a VM may run.

Owns the fleet model, claims (which VM holds which capacity on which host), affinity groups, scheduling policies with the
clusters that have them, and past decisions.
Answers: place, find room, confirm and release claims, list claims and capacity, get a decision; affinity groups and
scheduling policies; which hosts of a cluster have too much.
Announces: claims, affinity groups and scheduling policies changed and deleted.
Never: starts, moves or stops anything, and never says where a VM runs; that is inventory's.
"""
