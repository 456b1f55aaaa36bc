"""The last steps of `make up`, over REST only: first admin, defaults, this host, its image, a running VM."""

from __future__ import annotations

from volery.setup.console import Output
from volery.setup.up import Running


def finish(running: Running, output: Output) -> None:
    """Prints where the installation is reached."""
    output.say()
    output.say(f"Volery runs at {running.gateway_url}")
