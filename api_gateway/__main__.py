"""`python -m api_gateway` runs the gateway alone."""

from __future__ import annotations

from api_gateway.service import gateway
from volery.runtime.programs import run

if __name__ == "__main__":
    run(gateway)
