"""Every contract at once: subjects are unique, placeholders are fields, facts are past tense, pages are current."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.generate import HERE as PAGES_DIR
from docs.generate import PAGES, declared, public_facts
from volery.contracts.agent import CommittedWord
from volery.contracts.base import PLACEHOLDER, Call, Fact, Order, Owner, fill
from volery.contracts.ids import is_id, new_id

DECLARED = {name: what for name, (_, what) in declared().items()}
PAST = ("changed", "deleted", "reported", "happened", "finished", "progressed")


def test_subjects_are_unique() -> None:
    subjects = [what.kind if isinstance(what, Order) else what.subject for what in DECLARED.values()]
    assert len(subjects) == len(set(subjects))


@pytest.mark.parametrize("name", DECLARED)
def test_placeholders_are_fields(name: str) -> None:
    what = DECLARED[name]
    if isinstance(what, Order):
        return
    payload = what.question if isinstance(what, Call) else what.payload
    fields = {field.name for field in msgspec.structs.fields(payload)}
    assert set(PLACEHOLDER.findall(what.subject)) <= fields


def test_facts_are_past_tense_and_named_by_their_owner() -> None:
    for what in DECLARED.values():
        if isinstance(what, Fact):
            assert what.subject.startswith("fact.")
            assert (
                what.subject.rsplit(".", 1)[-1].removeprefix("order_").removeprefix("domain_").endswith(PAST)
            )
            assert what.owner in {*Owner, "host"}


def test_calls_go_to_owners() -> None:
    for what in DECLARED.values():
        if isinstance(what, Call):
            assert what.owner in {*Owner, "host"}


@given(st.text())
def test_nothing_can_change_the_shape_of_a_subject(text: str) -> None:
    word = CommittedWord(host_id=text, owner="inventory", generation="", seq=0)
    try:
        subject = fill("host.{host_id}.committed", word)
    except ValueError:
        return
    assert subject.count(".") == 2
    assert not set(subject) & set("*> \t\r\n")


def test_ids_sort_by_time_and_are_uuids() -> None:
    ids = [new_id() for _ in range(1000)]
    assert all(is_id(i) for i in ids)
    assert ids[0][:8] <= ids[-1][:8]
    assert not is_id("../../etc/passwd")
    assert not is_id(ids[0].upper())


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (PAGES_DIR / name).read_text() == PAGES[name](), "run `make docs`"


def test_the_asyncapi_document_names_every_public_fact() -> None:
    document = json.loads((PAGES_DIR / "asyncapi.json").read_text())
    assert document["asyncapi"] == "3.0.0"
    addresses = {channel["address"] for channel in document["channels"].values()}
    assert addresses == {fact.subject for fact in public_facts()}
