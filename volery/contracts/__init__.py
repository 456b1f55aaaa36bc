"""What may be said on the bus and over REST: one module per noun. Imports msgspec and nothing of ours."""
