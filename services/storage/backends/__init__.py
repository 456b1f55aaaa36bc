"""One module per kind of storage: where a disk's volume is, what it can be, and how its storage is connected. Pure."""
