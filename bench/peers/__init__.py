"""Peers that rows measure beside ours: each in an environment of its own outside the repository, installed when it is first asked for."""
