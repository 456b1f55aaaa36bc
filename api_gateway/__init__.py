"""The gateway: REST, streams and consoles for people and programs.

Owns nothing that a restart would lose. Authenticates (inventory says who a bearer is), turns a request into the
question of one call, and passes the owner's bytes on. Follows every owner's stream once per process and writes
the same bytes to every client. Never decides anything about an object: its owner does.
"""
