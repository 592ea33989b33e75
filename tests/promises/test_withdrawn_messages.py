"""A message that was answered with an error is not delivered later, unless the error said `uncertain`."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from typing import Any

import gevent
import pytest

from imrelay.broker.ledger import Ledger
from imrelay.broker.publication import Publication
from imrelay.broker.unconfirmed import Unconfirmed
from imrelay.errors import AnswerableError, BrokerUnavailable
from tests.conftest import RelayFactory
from tests.support.brokers import amqp
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import VirtualHost, eventually
from tests.support.proxy import Proxy
from tests.support.publishing import PATIENCE, running_publisher


def test_a_frozen_broker_repeats_and_loses_nothing(relay: RelayFactory, broker: VirtualHost) -> None:
    """What was withdrawn never arrives, what is uncertain at most once; sent again, all arrives just once."""
    senders, each, filling = 4, 200, "x" * 15_000
    away = relay()
    with Proxy(broker.url) as proxy:
        host = relay(broker_url=proxy.url, broker_publish_timeout=2)
        wait_until_ready(host)
        with Browser(away, "ben") as ben:
            browsers = [Browser(host, f"sender {number}") for number in range(senders)]
            for browser in browsers:
                browser.say("ben", "before", id="before")
                browser.ack()
                assert ben.read()["content"] == "before"
            proxy.cut()
            texts = {}
            for browser in browsers:
                for number in range(each):
                    key = (browser.user, number)
                    texts[key] = browser.say("ben", [*key, filling], id=number)
            uncertain, withdrawn = set(), set()
            for browser in browsers:
                for _ in range(each):
                    error = browser.error()
                    assert (error["code"], error["temporary"]) == ("broker_unavailable", True)
                    (uncertain if error.get("uncertain") else withdrawn).add((browser.user, error["id"]))
            assert uncertain | withdrawn == texts.keys()
            assert len(uncertain) > 10
            assert len(withdrawn) > 10
            proxy.heal()
            arrived: Counter[tuple[str, int]] = Counter()
            wait_until_ready(host)
            browsers[0].say("ben", "healed", id="healed")
            assert browsers[0].ack()["id"] == "healed"
            while (content := ben.read()["content"]) != "healed":
                arrived[content[0], content[1]] += 1
            assert not arrived.keys() & withdrawn
            assert set(arrived.values()) <= {1}
            for browser in browsers:
                for number in range(each):
                    browser.send(texts[browser.user, number])
            for browser in browsers:
                assert sorted(browser.ack()["id"] for _ in range(each)) == list(range(each))
                browser.say("ben", "end", id="end")
                browser.ack()
            ends = 0
            while ends < senders:
                content = ben.read()["content"]
                if content == "end":
                    ends += 1
                else:
                    arrived[content[0], content[1]] += 1
            assert arrived == Counter(dict.fromkeys(texts, 1))
            for browser in browsers:
                browser.close()


def test_an_id_keeps_its_mid_only_where_the_end_was_uncertain(relay: RelayFactory, broker: VirtualHost) -> None:
    """Acknowledged, an id may stand for another message; other bytes under an id are another one at any time."""
    with Proxy(broker.url) as proxy:
        host, away = relay(broker_url=proxy.url, broker_publish_timeout=1), relay()
        wait_until_ready(host)
        with Browser(host, "ann") as ann, Browser(away, "bob") as bob:
            texts = [ann.say("bob", "same", id=1) for _ in range(2)]
            first, second = ann.ack()["mid"], ann.ack()["mid"]
            assert first != second
            assert [bob.receive(), bob.receive()] == texts
            proxy.stall()
            one = json.dumps({"to": {"id": "bob"}, "content": "one", "id": 2})  # the relay adds who it is from
            other = json.dumps({"to": {"id": "bob"}, "content": "other", "id": 2})
            ann.send(one)
            assert ann.error()["uncertain"] is True
            assert bob.read()["content"] == "one"
            proxy.heal()
            ann.send(one)
            mid = ann.ack()["mid"]
            ann.send(one)
            assert ann.ack()["mid"] != mid
            ann.send(other)
            assert ann.ack()["mid"] != mid
            assert [bob.read()["content"] for _ in range(2)] == ["one", "other"]
            assert bob.rest() == []


def test_what_was_published_again_and_refused_is_uncertain(relay: RelayFactory, broker: VirtualHost) -> None:
    """A full inbox refuses the second copy of a message whose first copy it has: that is no `inbox_full`."""
    with Proxy(broker.url) as proxy:
        host = relay(broker_url=proxy.url, inbox_max_length=1)
        wait_until_ready(host)
        with Browser(host, "ann") as ann:
            ann.say("cid", "opens the inbox", id=0)
            ann.ack()
            with Browser(host, "cid") as cid:
                assert cid.read()["content"] == "opens the inbox"
            eventually(lambda: not broker.queues()["inbox.cid"]["consumers"])
            proxy.stall()
            text = ann.say("cid", "once", id=1)
            eventually(lambda: broker.queues()["inbox.cid"]["messages"] == 1)
            proxy.reset()
            proxy.heal()
            error = ann.error()
            assert (error["code"], error["id"], error.get("uncertain")) == ("broker_unavailable", 1, True)
            ann.say("cid", "no room", id=2)
            error = ann.error()
            assert (error["code"], error["id"], error.get("uncertain")) == ("inbox_full", 2, None)
            with Browser(host, "cid") as cid:
                assert cid.receive() == text
                ann.send(text)
                assert ann.ack()["id"] == 1
                assert cid.rest() == []


def test_a_full_inbox_shows_no_tab_a_message_twice(relay: RelayFactory) -> None:
    """A tab that stood by has shown what was answered with inbox_full; sent again, only the others show it."""
    host = relay(inbox_max_length=2, broker_prefetch=1)
    with Browser(host, "ann") as ann, Browser(host, "tabby", subprotocols=["imrelay.v1"]) as stuck:
        assert "welcome" in stuck.read()
        ann.say("tabby", 0, id=0)
        ann.ack()
        seq = stuck.read()["seq"]
        with Browser(host, "tabby") as tab:
            texts = {}
            for number in range(1, 4):
                texts[number] = ann.say("tabby", number, id=number)
            answers = [ann.read() for _ in texts]
            (error,) = [answer["error"] for answer in answers if "error" in answer]
            assert (error["code"], error["temporary"]) == ("inbox_full", True)
            assert "not kept" in error["message"]
            assert "may have shown it" in error["message"]
            assert [tab.read()["content"] for _ in texts] == [1, 2, 3]
            contents = []
            for _ in range(2):  # there is room again
                stuck.send(json.dumps({"ack": seq}))
                frame = stuck.read()
                seq = frame["seq"]
                contents.append(frame["message"]["content"])
            ann.send(texts[error["id"]])
            assert ann.ack()["id"] == error["id"]
            stuck.send(json.dumps({"ack": seq}))
            contents.append(stuck.read()["message"]["content"])
            assert contents == [1, 2, 3]
            ann.say("tabby", "last", id="last")
            assert ann.ack()["id"] == "last"
            assert tab.read()["content"] == "last"


@pytest.mark.parametrize("how", ["frozen", "confirms nothing"])
def test_a_broker_that_stops_makes_nothing_grow(broker: VirtualHost, how: str) -> None:
    """What is handed over stays within its bounds in number and bytes; of what was answered no body is kept."""
    size, body = 300, b"x" * 40_000  # more than kernels keep
    with Proxy(broker.url) as proxy, running_publisher(proxy.url, queue_size=size, timeout=1) as sender:
        sender.send("gus", "first")
        sender.wait()
        publisher = sender.publisher
        (proxy.cut if how == "frozen" else proxy.stall)()
        channel = publisher._channel
        assert channel is not None
        for number in range(3 * size):
            with suppress(BrokerUnavailable):  # no room in time
                sender.send("gus", f"m{number}", body)
            assert len(publisher._unconfirmed) <= size
            assert publisher._ledger.held_bytes <= size * len(body)
            assert channel._outbound.unsent_bytes <= 65_536 + len(body)
        answers = dict(sender.wait())
        del answers["first"]
        assert all(isinstance(error, BrokerUnavailable) for error in answers.values())
        handed_over = {one.mid for one in sender.publications if one.handed_over} - {"first"}
        assert {mid for mid, error in answers.items() if error is not None and error.uncertain} == handed_over
        assert 0 < len(handed_over) <= size
        assert not any(one.body or one.sent for one in sender.publications)
        assert not publisher._queue
        proxy.heal()
        sender.send("gus", "last", b"last")
        assert sender.wait()["last"] is None
        with amqp(broker.url) as consumer:
            assert consumer.queue_declare("inbox.gus", passive=True).method.message_count <= 2 + len(handed_over)
            consumer.queue_delete("inbox.gus")


def test_a_stop_says_what_may_have_left(broker: VirtualHost) -> None:
    """When the relay stops, what was handed over is uncertain, and what was not never leaves."""
    body = b"x" * 60_000
    with Proxy(broker.url) as proxy:
        with running_publisher(proxy.url) as sender:
            sender.send("ben", "first")
            sender.wait()
            proxy.cut()
            for number in range(300):
                sender.send("ben", f"m{number}", body)
            channel = sender.publisher._channel
            eventually(lambda: channel is not None and channel.has_unsent, PATIENCE, sleep=gevent.sleep)
        answers = sender.answers
        assert len(answers) == 301
        uncertain = {mid for mid, error in answers.items() if error is not None and error.uncertain}
        assert uncertain == {one.mid for one in sender.publications[1:] if one.handed_over}
        assert 0 < len(uncertain) < 300


def publication(mid: str, on_done: Any, body: bytes = b"{}") -> Publication:
    return Publication("ben", body, False, mid, 0, None, on_done)


def test_one_sender_that_fails_keeps_no_other_from_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    """An exception in one answer is logged, and the others that are late get theirs."""
    ledger = Ledger(10, 0.0, 1000)
    answered: list[str] = []

    def fail(publication: Publication, error: AnswerableError | None) -> None:
        raise RuntimeError("a fault of the session's")

    ledger.add(publication("m1", fail), nothing)
    ledger.add(publication("m2", lambda publication, error: answered.append(publication.mid)), nothing)
    assert ledger.expire()
    assert answered == ["m2"]
    assert len(ledger) == ledger.held_bytes == 0
    assert "m1 could not be answered" in caplog.text


def nothing() -> None:
    """Nobody waits to be told of room."""


class Room:
    """A ledger of 10 messages and 1,000 bytes, and the order in which it accepts messages of one sender each."""

    def __init__(self, timeout: float = PATIENCE) -> None:
        self.order: list[str] = []
        self.told: list[str] = []
        self.errors: dict[str, AnswerableError | None] = {}
        self.ledger = Ledger(10, timeout, 1000, lambda publication: self.order.append(publication.mid))
        self.made: dict[str, Publication] = {}

    def add(self, mid: str, size: int = 2) -> None:
        def answered(publication: Publication, error: AnswerableError | None) -> None:
            self.errors[mid] = error

        made = self.made[mid] = publication(mid, answered, b"x" * size)
        if self.ledger.add(made, lambda: self.told.append(mid)):
            self.order.append(mid)

    def answer(self, mid: str) -> None:
        self.ledger.answer(self.made[mid], None)


def test_room_is_given_in_order_and_by_size() -> None:
    """Messages get room in turn; one that is larger than all room is alone; none waits while there is room."""
    room = Room()
    room.add("large", 5000)
    for number in range(4):
        room.add(f"w{number}", 300)
    room.add("small", 1)
    assert room.order == ["large"]
    room.answer("large")
    assert room.order == ["large", "w0", "w1", "w2"], "one that is small does not overtake"
    assert room.told == ["w0", "w1", "w2"]
    assert room.ledger.held_bytes == 900
    room.answer("w1")
    assert room.order[4:] == ["w3", "small"] == room.told[3:]
    assert room.ledger.held_bytes == 901


def test_a_message_that_is_withdrawn_makes_way() -> None:
    """When the first one in the line leaves, those behind it have their room; nobody is told of it any more."""
    room = Room()
    room.add("here", 900)
    room.add("large", 500)
    room.add("small", 50)
    room.ledger.withdraw(room.made["large"])
    assert room.order == ["here", "small"]
    assert room.told == ["small"]
    assert "large" not in room.errors
    room.ledger.withdraw(room.made["here"])  # it does not wait: nothing happens
    assert len(room.ledger) == 2


def test_who_waits_too_long_for_room_is_told() -> None:
    """After the time limit a message that waits is refused, certainly; the sender goes on, and those behind it."""
    room = Room(0.0)
    room.add("here", 900)
    room.add("large", 500)
    room.ledger._timeout = PATIENCE
    room.add("small", 50)
    room.made["here"].deadline += PATIENCE
    assert not room.ledger.expire()
    error = room.errors["large"]
    assert isinstance(error, BrokerUnavailable)
    assert not error.uncertain
    assert room.told == ["large", "small"]
    assert room.order == ["here", "small"]


def test_a_ledger_that_is_closed_answers_who_waits() -> None:
    """At the end each message is answered once, also those that had no room; later ones are refused."""
    room = Room()
    room.add("here", 900)
    room.add("large", 500)
    room.ledger.close()
    assert all(isinstance(room.errors[mid], BrokerUnavailable) for mid in ("here", "large"))
    assert room.order == ["here"]
    assert room.told == ["large"]
    with pytest.raises(BrokerUnavailable, match="stopping"):
        room.add("late")


def test_a_stop_waits_for_who_has_just_got_room() -> None:
    """The ledger is not empty in the moment in which a message that waited takes the place of the last one."""
    room = Room()
    room.add("here", 900)
    room.add("next", 500)
    with gevent.Timeout(PATIENCE):
        waiting = gevent.spawn(room.ledger.wait_empty, PATIENCE)
        gevent.sleep(0)
        room.answer("here")
        gevent.sleep(0)
        assert not waiting.ready()
        room.answer("next")
        assert waiting.get() == 0


def test_a_confirm_costs_what_it_confirms() -> None:
    """After many single confirms, one for several messages looks at these and at none of those before."""
    looked = 0

    class Counted(dict[int, Publication]):
        def __iter__(self) -> Any:
            nonlocal looked
            for key in super().__iter__():
                looked += 1
                yield key

        def pop(self, *arguments: Any) -> Any:
            nonlocal looked
            looked += 1
            return super().pop(*arguments)

    unconfirmed = Unconfirmed()
    unconfirmed.by_tag = Counted()
    for number in range(10_000):
        tag = unconfirmed.add(publication(f"m{number}", None))
        assert [one.mid for one in unconfirmed.take(tag, False)] == [f"m{number}"]
    for number in range(5):
        unconfirmed.add(publication(f"n{number}", None))
    looked = 0
    assert [one.mid for one in unconfirmed.take(10_003, True)] == ["n0", "n1", "n2"]
    assert looked <= 3 + 4
    assert len(unconfirmed) == 2
