"""Has another host run a fence agent: one request, signed as orders are, and its answer or the reason why there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec
import nats.errors
from nats.aio.client import Client

from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.base import encode, fill
from volery.contracts.errors import Kind, Problem, Refused, unavailable
from volery.contracts.fencing import POWER_SUBJECT, AskPower, PowerAnswer
from volery.runtime.bus import ERROR_HEADER

SLACK_SECONDS = 5.0
"""For the way there and back, and for a device whose time is over to be ended."""

Sign = Callable[[str, bytes], str]


async def ask_host(client: Client, sign: Sign, ask: AskPower) -> PowerAnswer:
    """The executor's answer. `client` must be one that never queues: what is sent late is no longer meant.

    Raises Refused: with the executor's own words when it did nothing; `timeout` when it did not answer, so that it is
    unknown what was done: read the status, never repeat the action; `unavailable` when nobody heard the question.
    """
    subject = fill(POWER_SUBJECT, ask)
    body = encode(ask)
    headers = {SIGNATURE_HEADER: sign(subject, body)}
    patience = ask.device.timeout_seconds + SLACK_SECONDS
    try:
        message = await client.request(subject, body, timeout=patience, headers=headers)
    except nats.errors.NoRespondersError:
        raise unavailable(
            f"host {ask.host_id} hears no questions now, so nothing was done: ask another",
            host_id=ask.host_id,
        ) from None
    except (nats.errors.Error, TimeoutError) as error:
        raise Refused(
            Kind.TIMEOUT,
            f"host {ask.host_id} did not answer within {patience:g} s ({error or type(error).__name__}); whether it did"
            f" {ask.action.value} is unknown: read the status",
            host_id=ask.host_id,
        ) from error
    if message.headers and ERROR_HEADER in message.headers:
        raise _refusal(message.data, ask)
    with contextlib.suppress(msgspec.DecodeError):
        answer = msgspec.json.decode(message.data, type=PowerAnswer)
        if (answer.ask_id, answer.action) == (ask.ask_id, ask.action):
            return answer
    raise Refused(
        Kind.TIMEOUT,
        f"host {ask.host_id} answered what can't be read or is for another question; whether it did {ask.action.value} is"
        " unknown: read the status",
        host_id=ask.host_id,
    )


def _refusal(body: bytes, ask: AskPower) -> Refused:
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.DecodeError:
        return unavailable(f"host {ask.host_id} refused without a reason", host_id=ask.host_id)
    return Refused(problem.kind, problem.message, **problem.details)
