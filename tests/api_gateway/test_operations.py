"""Operations of all services as one list, and each by the prefix of its id."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from api_gateway.operations import keyset_token
from tests.api_gateway.scripted import Deployed, Script, decoded, deployed, operation
from volery.contracts.base import Owner, encode
from volery.contracts.ids import new_id
from volery.contracts.operation import (
    CANCEL_OPERATION,
    GET_OPERATION,
    LIST_OPERATIONS,
    ListQuery,
    Operation,
    Page,
)
from volery.runtime.bus import Caller
from volery.setup.embedded import Embedded


def owned(script: Script, owner: Owner, operations: list[Operation], most: int = 1000) -> None:
    """Lists these as the runtime does: by id, behind the page's token, at most so many at once."""

    def listed(query: ListQuery, caller: Caller) -> Page:
        newest_first = query.order_by == "-id"
        found = sorted(operations, key=lambda o: o.id, reverse=newest_first)
        if wanted := query.filter.get("object_id"):
            found = [o for o in found if o.object_id == wanted]
        if query.page:
            (last,) = msgspec.json.decode(_unpadded(query.page))
            found = [o for o in found if (o.id < last if newest_first else o.id > last)]
        limit = min(query.limit, most)
        items = tuple(msgspec.Raw(encode(o)) for o in found[:limit])
        return Page(items=items, next=keyset_token(found[limit - 1].id) if len(found) > limit else "")

    script.on(LIST_OPERATIONS[owner], listed)


def _unpadded(token: str) -> bytes:
    import base64

    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def some(count: int, seed: int) -> dict[Owner, list[Operation]]:
    choose = random.Random(seed)
    made: dict[Owner, list[Operation]] = {owner: [] for owner in Owner}
    for _ in range(count):
        owner = choose.choice(list(Owner))
        made[owner].append(operation(owner, id=f"{owner}-{new_id()}"))
    return made


async def walk(gateway: Deployed, **query: Any) -> list[str]:
    found, page = [], ""
    while True:
        answer = await gateway.get("/operations", params={**query, **({"page": page} if page else {})})
        assert answer.status_code == 200, answer.text
        body = decoded(answer)
        assert len(body["items"]) <= int(query.get("limit", 100))
        assert body["missing"] == []
        found += [item["id"] for item in body["items"]]
        page = body["next"]
        assert ("link" in answer.headers) == bool(page)
        if not page:
            return found


async def test_a_walk_sees_every_operation_once_in_the_order_of_creation(gateway: Deployed) -> None:
    for seed, (limit, most) in enumerate([(1, 1000), (7, 1000), (10, 3), (100, 4), (50, 50)]):
        made = some(60, seed)
        for owner, operations in made.items():
            owned(gateway.script, owner, operations, most)
        ids = sorted((o.id for all_ in made.values() for o in all_), key=lambda i: i.partition("-")[2])
        assert await walk(gateway, limit=limit) == ids
        assert await walk(gateway, limit=limit, order_by="-id") == ids[::-1]


async def test_filters_go_to_every_service(gateway: Deployed) -> None:
    made = some(20, 1)
    for owner, operations in made.items():
        owned(gateway.script, owner, operations)
    one = made[Owner.STORAGE][0]
    assert await walk(gateway, **{"filter.object_id": one.object_id}) == [one.id]


async def test_a_service_that_is_away_is_named(nats: Embedded) -> None:
    async with deployed(nats.url, Script(silent={Owner.HA})) as gateway:
        page = decoded(await gateway.get("/operations"))
        assert page["missing"] == ["ha"]


async def test_odd_queries_are_refused(gateway: Deployed) -> None:
    for query in (
        "order_by=state",
        "search=x",
        "limit=0",
        "limit=1001",
        "page=x",
        "page=eyJhIjoiYiJ9",
        "page=%C3%A4",
    ):
        answer = await gateway.get(f"/operations?{query}")
        assert answer.status_code == 400, query


async def test_each_is_found_at_the_service_that_drives_it(gateway: Deployed) -> None:
    one = operation(Owner.STORAGE, revision=3)
    gateway.script.on(GET_OPERATION[Owner.STORAGE], lambda q, c: one if q.id == one.id else None)
    gateway.script.on(CANCEL_OPERATION[Owner.STORAGE], one)
    answer = await gateway.get(f"/operations/{one.id}")
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (200, encode(one), '"3"')
    same = await gateway.get(f"/operations/{one.id}", headers={"if-none-match": 'W/"2", "3"'})
    assert same.status_code == 304
    for answer in (
        await gateway.http.delete(f"/operations/{one.id}"),
        await gateway.http.post(f"/operations/{one.id}/cancel", json={}),
    ):
        assert answer.status_code == 202
        assert answer.headers["location"] == f"/api/v1/operations/{one.id}"
    assert len(gateway.script.questions(CANCEL_OPERATION[Owner.STORAGE])) == 2
    assert (await gateway.get(f"/operations/inventory-{new_id()}")).status_code == 404
