"""The simulation: real services and agents on virtual time, with bus, database, hypervisor and BMCs in memory."""
