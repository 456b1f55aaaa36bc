"""A machine's UUID, asked of a Redfish BMC: a program of its own, so that a BMC that hangs holds up nothing else.

Reads one JSON object from its standard input, prints one to its standard output: `{"uuid": …}` or `{"problem": …}`.
Standard library only. It follows no redirection and uses no proxy: the password goes to the BMC that was named.
"""

import base64
import http.client
import json
import ssl
import sys

MAX_BYTES = 1024 * 1024


class Unusable(Exception):
    """What the BMC answered is of no use; the message says why."""


def get(asked: dict[str, str], uri: str) -> dict[str, object]:
    """The JSON object behind a URI of the BMC. Raises Unusable, OSError, HTTPException."""
    context = ssl.create_default_context()
    if asked["insecure"]:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    port = int(asked["port"]) or 443
    connection = http.client.HTTPSConnection(
        asked["address"], port, timeout=float(asked["seconds"]), context=context
    )
    login = base64.b64encode(f"{asked['username']}:{asked['password']}".encode()).decode()
    headers = {"authorization": f"Basic {login}", "accept": "application/json", "odata-version": "4.0"}
    try:
        connection.request("GET", uri, headers=headers)
        answer = connection.getresponse()
        if answer.status in (401, 403):
            raise Unusable(f"the BMC refuses the login ({answer.status})")
        if answer.status != 200:
            raise Unusable(f"the BMC answers {answer.status} for {uri}")
        found = json.loads(answer.read(MAX_BYTES))
    finally:
        connection.close()
    if not isinstance(found, dict):
        raise Unusable(f"{uri} is no Redfish resource")
    return found


def system_of(asked: dict[str, str]) -> str:
    """The URI of the one system, where none was named. fence_redfish would take the last of several."""
    root = get(asked, asked["redfish_uri"])
    members = get(asked, _link(root.get("Systems"), "Systems")).get("Members")
    if not isinstance(members, list) or len(members) != 1:
        count = len(members) if isinstance(members, list) else 0
        raise Unusable(f"the BMC has {count} systems: set systems_uri to the one that is meant")
    return _link(members[0], "Members")


def _link(value: object, what: str) -> str:
    uri = value.get("@odata.id") if isinstance(value, dict) else None
    if not isinstance(uri, str) or not uri.startswith("/"):
        raise Unusable(f"the BMC's {what} has no address")
    return uri


def main() -> dict[str, str]:
    asked = json.load(sys.stdin)
    try:
        return {"uuid": str(get(asked, asked["systems_uri"] or system_of(asked)).get("UUID") or "")}
    except Unusable as problem:
        return {"problem": str(problem)}
    except ValueError as problem:
        return {"problem": f"the BMC's answer can't be read: {problem}"}
    except (OSError, http.client.HTTPException) as problem:
        return {"problem": f"the BMC can't be asked: {problem or type(problem).__name__}"}


if __name__ == "__main__":
    print(json.dumps(main()))
