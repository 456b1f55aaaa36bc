"""What a fence agent may be told, and what its end means: rows against the real agents' own metadata."""

from __future__ import annotations

from typing import Any

import pytest

from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import FenceDevice, PowerAction, PowerState
from volery.fencing import rules
from volery.fencing.catalog import Catalog
from volery.fencing.identity import normal, same_machine
from volery.fencing.ipmitool import arguments
from volery.fencing.metadata import read_metadata

SECRETS = {"password": "s3cret"}


def device(**changes: Any) -> FenceDevice:
    fields: dict[str, Any] = {"agent": "fence_redfish", "address": "10.0.0.1", "username": "admin"}
    return FenceDevice(**(fields | changes))


GOOD = [
    (device(), SECRETS),
    (
        device(address="bmc-7.example.org", port=8443, options={"ssl_insecure": "1", "systems_uri": "/x"}),
        SECRETS,
    ),
    (device(address="fe80::1"), SECRETS),
    (device(agent="fence_ipmilan", options={"lanplus": "1", "cipher": "17", "power_wait": "5"}), SECRETS),
    (device(agent="fence_ipmilan", username=""), {}),
    (device(agent="fence_ilo4"), SECRETS),
    (device(agent="fence_apc", options={"plug": "3"}), {"password": "with\u00e4 = and # inside"}),
]

BAD: list[tuple[FenceDevice, dict[str, str], str]] = [
    (device(agent="fence_nonsense"), SECRETS, "isn't installed on this machine"),
    (device(agent="fence_redfisch"), SECRETS, "or name fence_redfish"),
    (device(agent="../../bin/sh"), SECRETS, "isn't a fence agent's name"),
    (device(agent="fence_redfish; reboot"), SECRETS, "isn't a fence agent's name"),
    (device(agent="fence_dummy"), SECRETS, "made for tests"),
    (device(agent="fence_kdump"), SECRETS, "no proof"),
    (device(agent="fence_brocade", options={"plug": "3"}), SECRETS, "doesn't switch and read power"),
    (device(agent="fence_ovh"), SECRETS, "doesn't switch and read power"),
    (device(agent="fence_apc_snmp", options={"plug": "3"}), SECRETS, "hands its password to snmpget"),
    (device(agent="fence_apc"), SECRETS, "fence_apc needs plug"),
    (device(username=""), SECRETS, "fence_redfish needs username"),
    (device(address="-h"), SECRETS, "neither a host name nor an IP address"),
    (device(address="10.0.0.1:443"), SECRETS, "the port apart from it"),
    (device(address="a b"), SECRETS, "neither a host name"),
    (device(address="https://bmc/"), SECRETS, "neither a host name"),
    (device(port=70000), SECRETS, "port 70000 doesn't exist"),
    (device(timeout_seconds=0.1), SECRETS, "may take 1 to 60 s, not 0.1"),
    (device(timeout_seconds=600), SECRETS, "may take 1 to 60 s, not 600"),
    (device(options={"ssl_insecur": "1"}), SECRETS, "no option 'ssl_insecur': did you mean ssl_insecure"),
    (device(options={"wibble": "1"}), SECRETS, "no option 'wibble': its man page"),
    (device(options={"ssl_insecure": "maybe"}), SECRETS, "ssl_insecure of fence_redfish must be 1 or 0"),
    (device(options={"power_wait": "-1"}), SECRETS, "power_wait of fence_redfish must be a whole number"),
    (device(agent="fence_ipmilan", options={"auth": "md6"}), SECRETS, "must be one of md5, password, none"),
    (
        device(options={"password": "x"}),
        {},
        "password of fence_redfish is a secret: give it with the secrets",
    ),
    (device(), {"passwort": "x"}, "did you mean password"),
    (device(), {"systems_uri": "/x"}, "systems_uri of fence_redfish is no secret"),
    (device(), {"password": "a\naction=on"}, "one line of at most"),
    (device(options={"systems_uri": "/x\nssl_insecure=1"}), SECRETS, "one line of at most"),
    (device(username="a\nb"), SECRETS, "one line of at most"),
    (device(), {"password": " x"}, "can't begin or end with a blank"),
    (device(), {"password": '"x"'}, "stand in quotes"),
    (device(), {"password": ""}, "is empty"),
    (device(options={"password_script": "/bin/sh"}), {}, "it runs a program on the host"),
    (
        device(agent="fence_ipmilan", options={"ipmitool_path": "/bin/sh"}),
        {},
        "it runs a program on the host",
    ),
    (device(options={"debug_file": "/etc/passwd"}), SECRETS, "it writes a file"),
    (device(options={"action": "reboot"}), SECRETS, "Volery sets it for each action"),
    (device(agent="fence_ipmilan", options={"method": "cycle"}), SECRETS, "never cycles power"),
    (
        device(agent="fence_ipmilan", options={"hexadecimal_kg": "00"}),
        SECRETS,
        "every user of the host can read",
    ),
    (device(options={"verbose": "1"}), SECRETS, "it would print secrets"),
    (
        device(agent="fence_virsh", options={"plug": "x", "ssh_options": "-o ProxyCommand=x"}),
        SECRETS,
        "run programs",
    ),
]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog()


@pytest.mark.parametrize(("good", "secrets"), GOOD)
async def test_what_can_be_used(catalog: Catalog, good: FenceDevice, secrets: dict[str, str]) -> None:
    await catalog.check_device(good, secrets)


@pytest.mark.parametrize(("bad", "secrets", "sentence"), BAD)
async def test_what_is_refused_and_why(
    catalog: Catalog, bad: FenceDevice, secrets: dict[str, str], sentence: str
) -> None:
    with pytest.raises(Refused, match=sentence) as refused:
        await catalog.check_device(bad, secrets)
    assert refused.value.kind in (Kind.INVALID, Kind.UNAVAILABLE)
    shown = repr(refused.value.problem())
    assert not any(secret and secret in shown for secret in secrets.values() if len(secret) > 3)


async def test_what_an_agent_is_told(catalog: Catalog) -> None:
    """Agents take the presence of a switch for on: one that is off is left out, unless it is on by itself."""
    agent = await catalog.describe("fence_redfish")
    options = {"ssl_insecure": "no", "ssl": "0"}
    told = rules.told(agent, device(port=8443, options=options), SECRETS, PowerAction.OFF)
    assert told["action"] == "off"
    assert (told["ip"], told["ipport"], told["username"]) == ("10.0.0.1", "8443", "admin")
    assert told["password"] == "s3cret"
    assert "ssl_insecure" not in told
    assert int(told["power_timeout"]) < device().timeout_seconds
    ilo = await catalog.describe("fence_ilo4")
    assert rules.told(ilo, device(options={"lanplus": "0"}), {}, PowerAction.STATUS)["lanplus"] == "0"
    assert rules.told(agent, device(address="fd00::7"), {}, PowerAction.STATUS)["ip"] == "[fd00::7]"
    assert rules.told(ilo, device(address="fd00::7"), {}, PowerAction.STATUS)["ip"] == "fd00::7"
    assert rules.lines({"a": "1", "b": "x=y"}) == b"a=1\nb=x=y\n"


@pytest.mark.parametrize(
    ("action", "exit_code", "output", "state"),
    [
        (PowerAction.STATUS, 0, "Status: ON\n", PowerState.ON),
        (PowerAction.STATUS, 2, "Status: OFF\n", PowerState.OFF),
        (PowerAction.STATUS, 2, "", PowerState.UNKNOWN),  # a usage error of many programs
        (PowerAction.STATUS, 2, "Status: ON\n", PowerState.UNKNOWN),
        (PowerAction.STATUS, 0, "Status: OFF\n", PowerState.UNKNOWN),
        (PowerAction.STATUS, 1, "Status: OFF\n", PowerState.UNKNOWN),
        (PowerAction.STATUS, -1, "Status: OFF\n", PowerState.UNKNOWN),
        (PowerAction.STATUS, 2, "Exit Status: OFFLINE", PowerState.UNKNOWN),
        (PowerAction.OFF, 0, "Success: Powered OFF", PowerState.OFF),
        (PowerAction.OFF, 1, "Success: Powered OFF", PowerState.UNKNOWN),
        (PowerAction.OFF, 2, "Status: OFF", PowerState.UNKNOWN),
        (PowerAction.ON, 0, "Success: Powered ON", PowerState.ON),
        (PowerAction.IDENTITY, 0, "Status: ON", PowerState.UNKNOWN),
    ],
)
def test_what_an_end_means(action: PowerAction, exit_code: int, output: str, state: PowerState) -> None:
    assert rules.state_of(action, exit_code, output) is state


def test_words_are_bounded_and_hide_secrets() -> None:
    said = (
        "one\ntwo\n"
        + "2026-11-29 00:51:44,300 ERROR: login pa%ss 'pa%25ss' failed\n\n\n"
        + "x" * 5000
        + "pa%ss"
    )
    words = rules.last_words(said, ["pa%ss"])
    assert len(words) <= rules.WORDS_LIMIT
    assert "pa%" not in words
    assert rules.last_words("2026-11-29 00:51:44,300 ERROR: denied pa%25ss\n", ["pa%ss"]) == (
        f"ERROR: denied {rules.HIDDEN}"
    )
    # Cut within a secret, nothing of it is left.
    secret = "abcdefghijklmnop" * 4
    assert "mnop" not in rules.last_words("y" * 20 + secret + "z" * (rules.WORDS_LIMIT - 10), [secret])
    assert rules.last_words("a\x1b[2Jb", []) == "a?[2Jb"
    assert rules.last_words("lost (<Connection object at 0x7f598e111550>: no route)", []) == (
        "lost (<Connection>: no route)"
    )


def test_the_same_machine_in_every_order_of_bytes() -> None:
    dmi = "00112233-4455-6677-8899-aabbccddeeff"
    for said in (
        dmi.upper(),
        "33221100-5544-7766-8899-aabbccddeeff",
        "ffeeddcc-bbaa-9988-7766-554433221100",
        "ccddeeff-aabb-8899-7766-554433221100",
    ):
        assert same_machine(said, dmi)
    for other in ("00112233-4455-6677-8899-aabbccddeefe", "", "none", dmi[:-1]):
        assert not same_machine(other, dmi)
    assert not same_machine("", "")
    assert normal("03000200-0400-0500-0006-000700080009") == ""  # half a vendor's boards
    assert not same_machine("0" * 32, "0" * 32)


def test_the_password_becomes_a_file() -> None:
    given = ["-I", "lan", "-P", "", "chassis", "power", "off"]
    assert arguments(given, "/proc/1/fd/3") == ["-I", "lan", "-f", "/proc/1/fd/3", "chassis", "power", "off"]
    assert arguments(given, "") == given


@pytest.mark.parametrize("xml", [b"", b"<a/>", b"not xml", b"<resource-agent><parameters/></resource-agent>"])
def test_what_is_no_metadata(xml: bytes) -> None:
    with pytest.raises(Refused, match="repair the package"):
        read_metadata("fence_x", "/usr/sbin/fence_x", xml)
