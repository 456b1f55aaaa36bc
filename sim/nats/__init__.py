"""NATS in memory: a server with JetStream, and clients shaped like nats-py's, over links that can be cut."""

from __future__ import annotations

from sim.nats.client import MemoryClient
from sim.nats.server import Link, NatsServer

__all__ = ["Link", "MemoryClient", "NatsServer"]
