"""What `volery host show` says of a host that has lost something."""

from __future__ import annotations

from datetime import UTC, datetime

from volery.cli import output
from volery.contracts.host import HostProblem


def test_what_it_lost_is_a_sentence_with_its_time() -> None:
    problems = [
        HostProblem(
            reason="storage_unreachable",
            object_kind="storage_domain",
            object_id=name,
            object_name=name,
            message=f"host h1 has lost storage domain {name}: it hangs",
            since=datetime(2026, 11, 29, 10, 20, 30, tzinfo=UTC),
        )
        for name in ("data", "more")
    ]
    assert output.cell("problems", output.plain(problems)) == (
        "host h1 has lost storage domain data: it hangs (since 2026-11-29 10:20:30)\n"
        "host h1 has lost storage domain more: it hangs (since 2026-11-29 10:20:30)"
    )
    assert output.cell("problems", {"h": "why"}) == '{"h": "why"}'
