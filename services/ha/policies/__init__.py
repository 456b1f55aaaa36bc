"""The judgements of ha, pure: what silence means, and when a crashed VM is restarted."""
