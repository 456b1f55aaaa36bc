"""Every setting of set-up itself (VOLERY_SETUP_*), documented; a typo is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping

from volery.runtime.config import ConfigError, refuse_unknown_sections
from volery.setup.errors import SetupError
from volery.setup.home import Home

PREFIX = "VOLERY_SETUP_"

SETTINGS: Mapping[str, str] = {
    "INSTALLATION": "Five letters in the names of this installation's units, bridges and domains; chosen by set-up.",
    "NATS_PORT": "TCP port of the bus; a free one is chosen, 4222 if possible, and kept.",
    "GATEWAY_PORT": "TCP port of REST; a free one is chosen, 8443 if possible, and kept.",
    "BUS_ADDRESS": "Address on which the bus listens; all of them (0.0.0.0) by default, for agents on other hosts.",
    "PUBLIC_ADDRESS": "Name or address under which other machines reach this one; by default that of the interface"
    " that leads outside.",
    "NAMES": "Further names and addresses for the certificates, separated by commas.",
    "LOCAL_HOST": "no: this machine runs the control plane only, and is no host itself.",
    "FIRST_VM": "Id of the VM that was made first; anything, such as none, keeps set-up from making one.",
    "PASSWORD_SHOWN": "yes once the admin's password was shown.",
    "PYTHON": "The Python from which .venv is made; only read from the environment.",
}


def take(home: Home, environment: Mapping[str, str] | None = None) -> None:
    """Keeps the VOLERY_SETUP_ variables of the caller's environment in settings.env.

    Raises SetupError for one, there or in the file, that isn't a setting, or a variable of a section that doesn't exist.
    """
    values = os.environ if environment is None else environment
    try:
        refuse_unknown_sections({**home.settings(), **values})
    except ConfigError as error:
        raise SetupError(f"{error}; look in the environment and in {home.settings_file}.") from None
    given = {key: value for key, value in values.items() if key.startswith(PREFIX)}
    for key in [*given, *(k for k in home.settings() if k.startswith(PREFIX))]:
        if key.removeprefix(PREFIX) not in SETTINGS:
            raise SetupError(
                f"{key} is not a setting. The settings are {', '.join(PREFIX + name for name in SETTINGS)};"
                f" look in the environment and in {home.settings_file}."
            )
    given.pop(f"{PREFIX}PYTHON", None)
    home.change_settings(given)
