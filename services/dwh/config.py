"""Settings of dwh: VOLERY_DWH_*."""

from __future__ import annotations

import msgspec


class DwhConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_DWH_."""

    minute_hours: int = 48
    """How long minute samples are kept: a whole day is there at any time (oVirt: 24)."""
    hour_days: int = 60
    """How long hourly aggregates are kept (oVirt's full scale: 1,440 hours)."""
    day_days: int = 1827
    """How long daily aggregates are kept (oVirt's full scale: five years)."""
    version_days: int = 365
    """How long a configuration version is kept after it ended. Current ones always are."""
    unwritten_minutes: int = 60
    """Minutes of samples kept in memory while PostgreSQL is away; the oldest are dropped then."""
