"""The state directory: modes, settings, secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from volery.setup import settings
from volery.setup.errors import SetupError
from volery.setup.home import Home, parse_settings, write_private


def test_secrets_are_root_s_alone_and_images_are_readable(home: Home) -> None:
    assert home.secrets.stat().st_mode & 0o777 == 0o700
    assert home.bus_credentials.stat().st_mode & 0o777 == 0o700
    assert home.settings_file.stat().st_mode & 0o777 == 0o600
    assert home.storage.stat().st_mode & 0o777 == 0o755


def test_creating_again_keeps_the_installation_and_repairs_modes(home: Home) -> None:
    before = home.installation
    home.secrets.chmod(0o755)
    home.create()
    assert home.installation == before
    assert home.secrets.stat().st_mode & 0o777 == 0o700


def test_settings_keep_comments_order_and_odd_values(home: Home) -> None:
    write_private(home.settings_file, "# mine\nA=1\n\nB=2\n")
    home.change_settings({"B": 'two "words" \\ here', "C": ""})
    assert home.settings() == {"A": "1", "B": 'two "words" \\ here', "C": ""}
    text = home.settings_file.read_text()
    assert text.startswith("# mine\nA=1\n\nB=")
    home.change_settings({"A": "1"})
    assert home.settings_file.read_text() == text


@pytest.mark.parametrize("line", ["novalue", "A B=1", "=x"])
def test_a_line_that_is_no_setting_is_named(line: str) -> None:
    with pytest.raises(SetupError, match="line 2"):
        parse_settings(f"A=1\n{line}\n", Path("settings.env"))


def test_a_line_break_can_t_smuggle_a_setting_in(home: Home) -> None:
    with pytest.raises(SetupError, match="line break"):
        home.change_settings({"A": "1\nB=2"})


def test_a_secret_is_made_once_and_private(home: Home) -> None:
    path = home.postgres_passwords / "ha.password"
    first = home.secret(path)
    assert len(first) >= 32
    assert home.secret(path) == first
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_place_that_can_t_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="VOLERY_HOME"):
        Home(tmp_path / "file" / "home").create()


def test_what_the_environment_says_about_set_up_is_kept(home: Home) -> None:
    settings.take(home, {"VOLERY_SETUP_LOCAL_HOST": "no", "VOLERY_HOME": "/x", "PATH": "/bin"})
    assert home.settings()["VOLERY_SETUP_LOCAL_HOST"] == "no"
    assert "VOLERY_HOME" not in home.settings()


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(home: Home, place: str) -> None:
    wrong = {"VOLERY_SETUP_NATSPORT": "1"}
    if place == "file":
        home.change_settings(wrong)
    with pytest.raises(SetupError, match=r"VOLERY_SETUP_NATSPORT is not a setting.*VOLERY_SETUP_NATS_PORT"):
        settings.take(home, wrong if place == "environment" else {})


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_section_that_does_not_exist_is_refused_with_the_one_that_may_be_meant(
    home: Home, place: str
) -> None:
    wrong = {"VOLERY_GATWAY_LISTEN": "0.0.0.0:1"}
    if place == "file":
        home.change_settings(wrong)
    with pytest.raises(
        SetupError, match=r"VOLERY_GATWAY_LISTEN belongs to no section.*VOLERY_GATEWAY_\?.*settings.env"
    ):
        settings.take(home, wrong if place == "environment" else {})
