"""Fence agents: how a host's power is read and switched through its BMC, by whoever may run them.

`catalog` knows which agents this machine has and what they can be told, `rules` decides what they are told and what
their ends mean (pure), `running` runs one, `identity` asks which machine a BMC belongs to, `confirm` switches off and
looks twice, `asks` has another host do any of it. Secrets reach an agent by its standard input, or as memory that it
may read, and come back to nobody.
"""
