"""Settings from the environment: what isn't one is refused before anything starts, with what may have been meant."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from volery.runtime.config import ConfigError, TelemetryConfig, read, refuse_unknown_sections

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("VOLERY_BUSS_SERVERS", "VOLERY_BUS_"),
        ("VOLERY_INVENTRY_PUBLIC_URL", "VOLERY_INVENTORY_"),
        ("VOLERY_AGENTS_STATE_DIR", "VOLERY_AGENT_"),
        ("VOLERY_SCHEDULLER", "VOLERY_SCHEDULER_"),
        ("VOLERY_TELEMETERY_LOG_LEVEL", "VOLERY_TELEMETRY_"),
        ("VOLERY_HOMES", ""),
        ("VOLERY_QQQQ_X", ""),
        ("VOLERY_", ""),
    ],
)
def test_a_section_that_does_not_exist_is_refused(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name} belongs to no section")) as refused:
        refuse_unknown_sections({"PATH": "/bin", name: "1"})
    said = str(refused.value)
    assert (f"did you mean {meant}?" in said) is bool(meant)
    assert "VOLERY_DATABASE_, VOLERY_TELEMETRY_" in said


def test_what_exists_is_no_typo() -> None:
    refuse_unknown_sections(
        {"VOLERY_HOME": "/x", "VOLERY_TARGET": "up", "VOLERY_BUS_SERVERS": "s", "VOLERYX": "1", "HOME": "/"}
    )


LINKS = {
    "_PORT": "tcp://10.0.0.7:8080",
    "_PORT_8080_TCP": "tcp://10.0.0.7:8080",
    "_PORT_8080_TCP_ADDR": "10.0.0.7",
    "_SERVICE_HOST": "10.0.0.7",
    "_SERVICE_PORT": "8080",
    "_SERVICE_PORT_HTTPS": "8080",
}


@pytest.mark.parametrize("service", ["VOLERY", "VOLERY_CONSOLE", "VOLERY_TELEMETRY"])
def test_where_kubernetes_has_services_of_that_name_is_no_setting(service: str) -> None:
    environ = {service + link: value for link, value in LINKS.items()}
    refuse_unknown_sections(environ)
    assert read("VOLERY_TELEMETRY_", TelemetryConfig, environ) == TelemetryConfig()
    with pytest.raises(ConfigError, match="VOLERY_STUP_NATS_PORT belongs to no section"):
        refuse_unknown_sections(environ | {"VOLERY_STUP_NATS_PORT": "4222"})


@pytest.mark.parametrize("program", ["services", "services.storage", "api_gateway", "host_agent"])
def test_a_program_does_not_start_with_a_typo(program: str) -> None:
    environ = os.environ | {"VOLERY_STORRAGE_KEY_FILE": "/secret", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", program], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode not in (0, None)
    assert "VOLERY_STORRAGE_KEY_FILE belongs to no section" in ended.stderr
    assert "did you mean VOLERY_STORAGE_?" in ended.stderr
    assert "Traceback" not in ended.stderr
