"""The units are what systemd accepts, and carry the installation in their names."""

from __future__ import annotations

import subprocess
from pathlib import Path

from volery.setup import systemd
from volery.setup.home import Home


def test_systemd_finds_nothing_wrong_with_the_units(home: Home, tmp_path: Path) -> None:
    units = systemd.render(home)
    for name, text in units.items():
        assert name.startswith(f"volery-{home.installation}")
        (tmp_path / name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr == ""


def test_a_place_with_special_characters_is_escaped(home: Home) -> None:
    odd = Home(home.path / '50% "new"')
    odd.create()
    text = systemd.render(odd)[systemd.unit(odd, "nats")]
    assert f'"VOLERY_HOME={home.path}/50%% \\"new\\""' in text
