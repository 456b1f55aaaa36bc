"""The agent on each host: owns libvirt, the host's storage and network mounts, and its journal.

It hears signed orders and journals them before it acknowledges; it says what happens on its host as numbered
facts, spooled on disk until their owner committed them. It never decides policy, and its death touches no VM.
"""
