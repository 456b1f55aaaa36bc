"""The scheduler: where a VM may run.

Owns the fleet model, claims (which VM holds which capacity on which host), affinity groups and past decisions.
Answers: place, find room, confirm and release claims, list claims and capacity, get a decision; affinity groups.
Announces: claims and affinity groups changed and deleted.
Never: starts, moves or stops anything, and never says where a VM runs; that is inventory's.
"""
