"""An ha that says and answers what a test holds of hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.support.speaker import Speaker
from volery.contracts.base import Entity, Owner
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.liveness import (
    GET_LIVENESS,
    LIST_LIVENESS,
    HostLiveness,
    LivenessState,
    Proof,
    ProofKind,
)
from volery.runtime.bus import Caller


@dataclass
class Bell(Speaker):
    owner: Owner = Owner.HA
    asked: list[str] = field(default_factory=list)
    """Hosts that it was asked about, one by one."""

    def __post_init__(self) -> None:
        self.lists = [(LIST_LIVENESS, HostLiveness)]
        self.answers = [(GET_LIVENESS, self._one)]

    async def _one(self, _: Speaker, ask: GetById, caller: Caller) -> Entity:
        self.asked.append(ask.id)
        if ask.id not in self.objects:
            raise Refused(Kind.NOT_FOUND, "there is no such host")
        return self.objects[ask.id]

    def holds(
        self, host_id: str, boot_id: str, state: LivenessState, proof_of: str = "", *former: str
    ) -> HostLiveness:
        """What it says when it is asked from now on: of the newest proof, and of those before it."""
        now = datetime.now(UTC)

        def proof(of: str) -> Proof:
            return Proof(id=new_id(), kind=ProofKind.BMC_OFF, at=now, boot_id=of)

        said = HostLiveness(
            id=host_id,
            revision=1,
            created_at=now,
            updated_at=now,
            host_name="h1",
            state=state,
            boot_id=boot_id,
            proof=proof(proof_of) if proof_of else None,
            former=tuple(proof(of) for of in former),
        )
        self.knows(said)
        return said
