"""dwh: what was.

Owns configuration versions of every object, minute samples of hosts, VMs, disks and NICs, and their hourly and
daily aggregates.
Answers: versions (also at a time), samples, gaps.
Announces: nothing.
Never: is read by another service to decide something, and nothing waits for it.
"""
