"""A datacenter of simulated agents, each on its own authenticated connection, against the real control plane."""
