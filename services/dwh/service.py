"""dwh's table: what it answers, hears and does by itself."""

from __future__ import annotations

from services.dwh import gaps, samples, versions
from services.dwh.config import DwhConfig
from services.dwh.state import open_dwh
from volery.contracts.base import Owner
from volery.runtime.service import Service

service = Service(
    name=Owner.DWH,
    open=open_dwh,
    config=DwhConfig,
    parts=[versions.part, gaps.part, samples.part],
    on_gap=gaps.notice,
    on_lead=samples.begin,
)
