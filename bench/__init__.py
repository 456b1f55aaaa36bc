"""How fast Volery is against the raw parts it stands on, measured in one run: `make bench`."""
