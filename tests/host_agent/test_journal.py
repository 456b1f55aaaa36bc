"""What the journal promises about numbers, epochs and order, whatever happens in between."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from host_agent.database import Database
from host_agent.facts import FactClass, Spooled
from host_agent.journal import Journal
from host_agent.orders import FINISHED
from host_agent.rules import Known, judge
from tests.support.toy_host import HOST_ID, TOY, Control
from volery.contracts.agent import CommittedWord, FromHost, OrderEnvelope, OrderFinished, OrderState, Outcome
from volery.contracts.base import encode
from volery.contracts.domain_orders import FORGET_DOMAIN, RUN_DOMAIN, STOP_DOMAIN
from volery.runtime.clock import utc_now

SUBJECT = f"fact.host.{HOST_ID}.inventory.toy"
BODY = b'{"host_id":"h","generation":"","seq":0,"boot_id":"b","at":"2026-01-01T00:00:00Z","after_seq":0}'


def word(journal: Journal, seq: int, owner: str = "inventory") -> CommittedWord:
    return CommittedWord(host_id=HOST_ID, owner=owner, generation=journal.generation, seq=seq)


async def put(journal: Journal, fact_class: FactClass = FactClass.EVENT, key: str | None = None) -> Spooled:
    return await journal.put("inventory", SUBJECT, BODY, fact_class, key)


def numbers(spooled: list[Spooled]) -> list[tuple[int, int]]:
    return [(fact.seq, fact.after_seq) for fact in spooled]


async def pending(journal: Journal) -> list[tuple[int, int]]:
    found = await journal.pending("inventory", 0, 1000)
    for fact in found:
        stamped = msgspec.json.decode(fact.body, type=FromHost)
        assert (stamped.seq, stamped.after_seq) == (fact.seq, fact.after_seq)
        assert stamped.generation == journal.generation
    return numbers(found)


@pytest.fixture
async def journal(tmp_path: Path) -> Any:
    opened = await Journal.open(tmp_path / "journal.sqlite", "boot-1")
    yield opened
    await opened.close()


async def test_facts_are_numbered_per_owner_and_go_on_after_a_restart(
    tmp_path: Path, journal: Journal
) -> None:
    assert numbers([await put(journal), await put(journal)]) == [(1, 0), (2, 1)]
    other = await journal.put("storage", SUBJECT, BODY, FactClass.EVENT)
    assert (other.seq, other.after_seq) == (1, 0)
    generation = journal.generation
    await journal.close()
    again = await Journal.open(tmp_path / "journal.sqlite", "boot-1")
    assert again.generation == generation
    assert await pending(again) == [(1, 0), (2, 1)]
    assert (await put(again)).seq == 3
    await again.close()


async def test_facts_say_what_was_confirmed_to_this_host_and_to_no_other(tmp_path: Path) -> None:
    """A host that was enrolled anew keeps its disk, but what was confirmed to the former one proves nothing."""

    async def confirmed(host_id: str, seq: int = 0) -> tuple[int, str]:
        journal = await Journal.open(tmp_path / "journal.sqlite", "boot-1", host_id=host_id)
        said = msgspec.json.decode((await put(journal)).body, type=FromHost)
        assert await journal.trim(word(journal, seq))
        await journal.close()
        return said.confirmed, journal.generation

    _, first = await confirmed("h1", 1)
    assert await confirmed("h1") == (1, first)
    number, second = await confirmed("h2")
    assert number == 0
    assert second != first
    assert await confirmed("h2") == (0, second)


async def test_a_newer_state_takes_the_older_one_out_without_a_gap(journal: Journal) -> None:
    await put(journal, FactClass.STATE, "domain:a")
    await put(journal, FactClass.STATE, "domain:b")
    await put(journal)
    await put(journal, FactClass.STATE, "domain:a")
    assert await pending(journal) == [(2, 0), (3, 2), (4, 3)]


async def test_the_owners_word_trims_and_nothing_else_does(journal: Journal) -> None:
    for _ in range(4):
        await put(journal)
    assert await journal.trim(word(journal, 2))
    assert await pending(journal) == [(3, 2), (4, 3)]
    assert await journal.trim(word(journal, 1))
    stranger = CommittedWord(host_id=HOST_ID, owner="inventory", generation="another", seq=4)
    assert await journal.trim(stranger)
    assert await journal.trim(word(journal, 0, "storage"))
    assert await pending(journal) == [(3, 2), (4, 3)]


async def test_a_word_beyond_the_journal_gives_it_a_new_name(journal: Journal) -> None:
    await put(journal)
    before = journal.generation
    assert not await journal.trim(word(journal, 2))
    assert await journal.renew_generation() != before
    reservation = await journal.begin_report("inventory", rebase=False)
    assert reservation.gap
    assert await pending(journal) == [(2, 0)]


async def test_a_report_keeps_its_place_before_what_happens_meanwhile(journal: Journal) -> None:
    await put(journal, FactClass.STATE, "domain:a")
    await put(journal, FactClass.RESULT)
    reservation = await journal.begin_report("inventory", rebase=False)
    await put(journal, FactClass.STATE, "domain:b")
    report = await journal.put_report(reservation, SUBJECT, BODY)
    assert (report.seq, report.after_seq) == (3, 2)
    assert await pending(journal) == [(2, 0), (3, 2), (4, 3)]


async def test_a_report_that_was_asked_for_follows_on_from_anything(journal: Journal) -> None:
    """What has no other way to its owner comes again just before it."""
    await put(journal, FactClass.STATE, "domain:a")
    await put(journal, FactClass.RESULT)
    await put(journal, FactClass.EVENT)
    reservation = await journal.begin_report("inventory", rebase=True)
    await journal.put_report(reservation, SUBJECT, BODY)
    assert await pending(journal) == [(4, 0), (5, 4), (6, 5)]
    subjects = [f.subject for f in await journal.pending("inventory", 0, 10)]
    assert len(subjects) == 3
    second = await journal.begin_report("inventory", rebase=True)
    await journal.put_report(second, SUBJECT, BODY)
    assert await pending(journal) == [(7, 0), (8, 7), (9, 8)]


async def test_an_orders_answer_names_the_fact_that_tells_its_end(journal: Journal) -> None:
    """So that its owner hears what was said before it, first. It may get another number, with a report that is asked for."""
    order = Control().order(journal.generation, 1, b"{}")

    async def named() -> int:
        return (await journal.accept(order, encode(order), "", 0, None)).ack.result_seq

    assert await named() == 0
    assert await journal.at_work(order.owner) == (order.kind,)
    assert await journal.at_work("storage") == ()
    await put(journal)
    finished = OrderFinished(
        host_id=HOST_ID,
        generation="",
        seq=0,
        after_seq=0,
        boot_id="b",
        at=utc_now(),
        order_id=order.order_id,
        kind=order.kind,
        object_id=order.object_id,
        epoch=order.epoch,
        outcome=Outcome.SUCCEEDED,
    )
    spooled = await journal.finish(order, FINISHED["inventory"], finished)
    assert await named() == spooled.seq == 2
    assert await journal.at_work(order.owner) == ()
    await journal.put_report(await journal.begin_report("inventory", rebase=True), SUBJECT, BODY)
    assert await named() == 4
    assert await pending(journal) == [(3, 0), (4, 3), (5, 4)]
    assert (await journal.cancel(order.order_id)).result_seq == 4


async def test_a_report_that_was_never_finished_leaves_no_gap(journal: Journal) -> None:
    await put(journal)
    await journal.begin_report("inventory", rebase=False)
    await put(journal)
    assert await pending(journal) == [(1, 0), (3, 1)]


async def test_a_full_spool_drops_states_then_events_never_results(tmp_path: Path) -> None:
    bound = 20 * len(BODY)
    journal = await Journal.open(tmp_path / "small.sqlite", "boot-1", spool_max_bytes=bound)
    for n in range(10):
        await put(journal, FactClass.STATE, f"domain:{n}")
    for _ in range(10):
        await put(journal, FactClass.EVENT)
    for _ in range(15):
        await put(journal, FactClass.RESULT)
    left = await pending(journal)
    assert [seq for seq, _ in left] == list(range(16, 36))
    assert left[0] == (16, 15)
    assert (await journal.positions())["inventory"].gap
    for _ in range(10):
        await put(journal, FactClass.RESULT)
    assert [seq for seq, _ in await pending(journal)] == list(range(21, 46))
    order = Control().order(journal.generation, 1, b"{}")
    refused = await journal.accept(order, encode(order), "", 0, None)
    assert refused.ack.state is OrderState.REFUSED
    reservation = await journal.begin_report("inventory", rebase=False)
    assert reservation.gap
    assert (await pending(journal))[0] == (46, 0)
    assert not (await journal.positions())["inventory"].gap
    await journal.close()


async def test_a_dropped_fact_is_a_gap_until_a_report(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path / "small.sqlite", "boot-1", spool_max_bytes=2 * len(BODY))
    await put(journal, FactClass.RESULT)
    await put(journal, FactClass.STATE, "a")
    await put(journal, FactClass.RESULT)
    assert await pending(journal) == [(1, 0), (3, 2)]
    await journal.trim(word(journal, 1))
    assert await pending(journal) == [(3, 2)]
    await journal.close()


async def test_many_writers_share_few_commits_and_keep_their_order(journal: Journal) -> None:
    spooled = await asyncio.gather(*(put(journal) for _ in range(500)))
    assert [fact.seq for fact in spooled] == list(range(1, 501))


async def test_what_reached_the_disk_is_told_in_the_order_of_its_numbers(journal: Journal) -> None:
    told: list[Any] = []
    journal.on_spooled(told.extend)

    async def report() -> None:
        await journal.put_report(await journal.begin_report("inventory", rebase=False), SUBJECT, BODY)

    await asyncio.gather(*(put(journal) for _ in range(50)), report(), *(put(journal) for _ in range(50)))
    seqs = [fact.seq for fact in told]
    assert sorted(set(seqs)) == list(range(1, 102))
    reserved = next(n for n, fact in enumerate(told) if not isinstance(fact, Spooled))
    assert seqs[:reserved] == sorted(seqs[:reserved])
    assert seqs[reserved] == max(seqs[: reserved + 1])


def values(db: sqlite3.Connection) -> list[int]:
    return [row[0] for row in db.execute("select x from t order by x")]


async def test_a_work_that_fails_disturbs_no_other(tmp_path: Path) -> None:
    database = Database(tmp_path / "any.sqlite", "create table if not exists t (x integer unique);")

    def insert(value: int) -> Any:
        return lambda db: db.execute("insert into t values (?)", (value,)).rowcount

    def fails(db: sqlite3.Connection) -> None:
        db.execute("insert into t values (100)")
        raise LookupError("on purpose")

    done = await asyncio.gather(
        *(database.do(work) for work in (insert(1), insert(1), fails, insert(2))), return_exceptions=True
    )
    assert [type(result) for result in done] == [int, sqlite3.IntegrityError, LookupError, int]
    assert await database.do(values) == [1, 2]
    await database.close()


async def test_a_waiter_that_goes_away_does_not_take_its_write_back(tmp_path: Path) -> None:
    database = Database(tmp_path / "any.sqlite", "create table if not exists t (x integer);")
    busy = threading.Event()
    first = asyncio.create_task(database.do(lambda _: busy.wait(10)))
    task = asyncio.create_task(database.do(lambda db: db.execute("insert into t values (1)").rowcount))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    busy.set()
    assert await first
    assert await database.do(values) == [1]
    await database.close()


async def test_a_damaged_journal_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"this is no database, but it is long enough to look at" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        await Journal.open(tmp_path / "journal.sqlite", "boot-1")


async def test_every_boot_has_a_number_of_its_own(tmp_path: Path) -> None:
    ordinals = []
    for boot in ("a", "a", "b", "c"):
        journal = await Journal.open(tmp_path / "journal.sqlite", boot)
        ordinals.append(journal.boot_ordinal)
        await journal.close()
    assert ordinals == [1, 1, 2, 3]


async def test_epochs_in_the_metadata_of_domains_survive_a_lost_journal(journal: Journal) -> None:
    await journal.learn("inventory", [("object-1", 7, 3)])
    control = Control()
    for epoch, seq, state in ((6, 9, "refused"), (7, 3, "refused"), (7, 4, "accepted")):
        order = control.order(journal.generation, 1, b"{}", epoch=epoch, order_seq=seq)
        assert (await journal.accept(order, encode(order), "", 0, None)).ack.state == state


@pytest.mark.parametrize(
    ("kind", "epoch", "closed", "obeyed"),
    [
        (RUN_DOMAIN.kind, 4, 4, False),
        (RUN_DOMAIN.kind, 5, 4, True),
        (STOP_DOMAIN.kind, 4, 4, True),
        (FORGET_DOMAIN.kind, 4, 4, True),
    ],
)
def test_nothing_starts_at_an_epoch_that_was_closed(kind: str, epoch: int, closed: int, obeyed: bool) -> None:
    order = Control().order("g", 1, b"{}", kind=kind, epoch=epoch, order_seq=10)
    known = Known(epoch=4, order_seq=9, closed_epoch=closed)
    assert (judge(order, known) is None) is obeyed


class Epochs(RuleBasedStateMachine):
    """Whatever is sent, repeated, finished, committed and restarted: an object's accepted orders only go up."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "journal.sqlite"
        self.control = Control()
        self.sent: list[OrderEnvelope] = []
        self.accepted: list[OrderEnvelope] = []
        self.answers: dict[str, Outcome] = {}
        self.cancelled: set[str] = set()
        self.open: list[OrderEnvelope] = []
        self.numbers: list[int] = []

    def do(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def begin(self) -> None:
        self.journal = self.do(Journal.open(self.path, "boot-1"))

    def give(self, order: OrderEnvelope) -> None:
        intake = self.do(self.journal.accept(order, encode(order), "", 0, None))
        if order.order_id in {a.order_id for a in self.accepted}:
            assert not intake.fresh
            assert intake.ack.outcome == self.answers.get(order.order_id)
            return
        before = [a for a in self.accepted if a.object_id == order.object_id]
        rightful = (
            order.order_id not in self.cancelled
            and all(a.epoch <= order.epoch and a.order_seq < order.order_seq for a in before)
            and all(a.fencing_token <= order.fencing_token for a in self.accepted)
        )
        assert intake.fresh is rightful
        if intake.fresh:
            self.accepted.append(order)
            self.open.append(order)
        else:
            assert intake.ack.state is OrderState.REFUSED

    @rule(
        object_id=st.sampled_from(["a", "b"]),
        epoch=st.integers(0, 5),
        seq=st.integers(1, 12),
        token=st.integers(0, 3),
    )
    def new_order(self, object_id: str, epoch: int, seq: int, token: int) -> None:
        order = self.control.order(
            "any", 1, b"{}", object_id=object_id, epoch=epoch, order_seq=seq, fencing_token=token
        )
        self.sent.append(order)
        self.give(order)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        self.give(data.draw(st.sampled_from(self.sent)))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from(self.sent))
        ack = self.do(self.journal.cancel(order.order_id))
        known = order.order_id in {a.order_id for a in self.accepted}
        assert (ack.state is OrderState.UNKNOWN) is not known
        if not known:
            self.cancelled.add(order.order_id)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), outcome=st.sampled_from(list(Outcome)))
    def finish(self, data: st.DataObject, outcome: Outcome) -> None:
        order = data.draw(st.sampled_from(self.open))
        self.open.remove(order)
        fact = OrderFinished(
            host_id=HOST_ID, generation="", seq=0, after_seq=0, boot_id="b", at=_now(),
            order_id=order.order_id, kind=order.kind, object_id=order.object_id, epoch=order.epoch,
            outcome=outcome,
        )  # fmt: skip
        spooled = self.do(self.journal.finish(order, FINISHED["inventory"], fact))
        assert not self.numbers or spooled.seq > self.numbers[-1]
        self.numbers.append(spooled.seq)
        self.answers[order.order_id] = outcome

    @rule(back=st.integers(0, 3))
    def commit(self, back: int) -> None:
        seq = max((self.numbers[-1] if self.numbers else 0) - back, 0)
        assert self.do(self.journal.trim(word(self.journal, seq)))

    @rule()
    def report(self) -> None:
        reservation = self.do(self.journal.begin_report("inventory", rebase=True))
        spooled = self.do(self.journal.put_report(reservation, SUBJECT, BODY))
        self.numbers.append(spooled.seq)

    @rule()
    def restart(self) -> None:
        self.do(self.journal.close())
        self.journal = self.do(Journal.open(self.path, "boot-1"))

    @invariant()
    def unfinished_orders_are_the_open_ones(self) -> None:
        if not hasattr(self, "journal"):
            return
        found = {order.envelope.order_id for order in self.do(self.journal.unfinished())}
        assert found == {order.order_id for order in self.open}

    @invariant()
    def facts_follow_on_from_one_another(self) -> None:
        if not hasattr(self, "journal"):
            return
        found = self.do(pending(self.journal))
        assert all(later[1] == earlier[0] for earlier, later in itertools.pairwise(found))

    def teardown(self) -> None:
        self.do(self.journal.close())
        self.loop.close()
        self.directory.cleanup()


def _now() -> Any:
    return msgspec.json.decode(BODY, type=FromHost).at


TestEpochs = Epochs.TestCase
TestEpochs.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


async def test_an_order_id_is_good_for_one_owner_only(journal: Journal) -> None:
    order = Control().order(journal.generation, 1, b"{}")
    await journal.accept(order, encode(order), "", 0, None)
    stolen = msgspec.structs.replace(order, owner="storage")
    intake = await journal.accept(stolen, encode(stolen), "", 0, None)
    assert (intake.fresh, intake.ack.state) == (False, OrderState.REFUSED)


async def test_ids_are_text_and_nothing_more(journal: Journal) -> None:
    order = Control().order(journal.generation, 1, b"{}", TOY, order_id="x'; drop table orders; --")
    assert (await journal.accept(order, encode(order), "", 0, None)).fresh
    assert len(await journal.unfinished()) == 1
    assert str(uuid.UUID(journal.generation)) == journal.generation
