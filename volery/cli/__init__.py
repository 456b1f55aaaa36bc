"""The `volery` command: resources as tables or `-o json|yaml`, operations with a progress bar, over REST only."""
