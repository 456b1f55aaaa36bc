"""A machine becomes a host, and renews what it got. Nobody is logged in: token and signature are the proof.

Bodies are decoded leniently, as between services: the agent may be of a newer release than the gateway.
"""

from __future__ import annotations

import hashlib

import msgspec

from api_gateway.desk import Desk
from api_gateway.exchange import ANONYMOUS, Exchange
from api_gateway.question import decoded_body
from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.enrolment import (
    ENROL_HOST,
    RENEW_HOST_CERTIFICATE,
    RENEW_SUBJECT,
    Enrol,
    RenewCertificate,
)
from volery.contracts.errors import Kind, Refused
from volery.runtime.bus import Caller
from volery.runtime.signing import verify

_ENROL = msgspec.json.Decoder(Enrol)
_RENEW = msgspec.json.Decoder(RenewCertificate)


async def enrol(desk: Desk, http: Exchange) -> None:
    """POST /enrolment"""
    body, ask = await decoded_body(http, _ENROL, desk.config.body_limit_bytes)
    desk.attempts.take(
        f"enrolment:{http.address}", f"enrolment-token:{hashlib.sha256(ask.token.encode()).hexdigest()}"
    )
    await http.answer(200, await desk.ask(ENROL_HOST, body, Caller(ANONYMOUS)))


async def renew(desk: Desk, http: Exchange) -> None:
    """POST /enrolment/renew: who holds the key is checked here, that it is the host's by inventory."""
    body, ask = await decoded_body(http, _RENEW, desk.config.body_limit_bytes)
    signature = http.header(SIGNATURE_HEADER.lower().encode()) or ""
    if not verify(ask.public_key, RENEW_SUBJECT, body, signature):
        raise Refused(
            Kind.UNAUTHENTICATED,
            "the renewal is not signed by the key it names (header Volery-Signature over the body as it is sent): "
            "renew from the host's own agent, or enrol it again",
        )
    await http.answer(200, await desk.ask(RENEW_HOST_CERTIFICATE, body, Caller(f"host:{ask.host_id[:64]}")))
