"""The one exception of the lab: what happened, to which object, why, and what to do about it."""

from __future__ import annotations


class LabError(Exception):
    """A lab action that failed. Its text is meant for the person at the command line."""
