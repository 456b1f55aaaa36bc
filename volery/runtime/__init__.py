"""How things are said: bus, database, log, operations, orders, services, configuration, telemetry."""
