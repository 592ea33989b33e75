"""Messages that wait for a slow socket are bounded in bytes; all of them arrive, once and in order."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket as sockets
from collections.abc import Iterator

import gevent
import pika
import pytest

from imrelay.broker import overflow_watch
from imrelay.broker.codec import Delivery
from imrelay.broker.connection import Connection
from imrelay.broker.consumer_state import ConsumerState
from imrelay.broker.live_queue import LiveQueue
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.overflow import Overflow
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.topology import LIVE_TAG, Topology
from imrelay.settings.values import InboxConfig
from tests.conftest import RelayFactory
from tests.support.brokers import amqp, publish_first
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import VirtualHost, eventually
from tests.support.proxy import Proxy

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
BUDGET = 200_000
#: Size of a message, in bytes.
LARGE = 60_000
_numbers = itertools.count(1)


@pytest.fixture
def user() -> str:
    """An id that no other test has used."""
    return f"slow {next(_numbers)}"


@contextlib.contextmanager
def new_pool(url: str, queue_type: str, *, prefetch: int = 100) -> Iterator[ConsumerPool]:
    made = ConsumerPool(
        lambda name, on_state: Connection(lambda: [url], name=name, heartbeat=60, on_state=on_state),
        Topology("direct_message", InboxConfig(queue_type=queue_type)),
        prefetch=prefetch,
        channels_per_connection=100,
    )
    made.start()
    yield made
    made.stop()


@pytest.fixture(params=["classic", "quorum"])
def pool(broker: VirtualHost, request: pytest.FixtureRequest) -> Iterator[ConsumerPool]:
    """A pool of this process's own."""
    with gevent.Timeout(PATIENCE * 6), new_pool(broker.url, request.param) as made:
        yield made


class Reader:
    """A socket whose writer takes as much as it is told to."""

    def __init__(self, pool: ConsumerPool, user: str, budget: int = BUDGET) -> None:
        self.mailbox = Mailbox(budget)
        #: At a quorum inbox 16 messages have room, and a socket begins with a live queue: each queue has that room
        #: while it changes over.
        self.is_replicated = pool._topology.is_replicated
        self.parts = 2 if self.is_replicated else 1
        self.consumer = pool.consume(user, self.mailbox)
        assert self.consumer.wait_attached(PATIENCE)
        self.room = self.mailbox.budget
        assert self.room == (1_064_960 if self.is_replicated else budget)
        self.seen: list[int] = []
        self.repeated: list[int] = []
        self.most = 0

    def wait_for_deliveries(self, count: int) -> None:
        """Block until so many deliveries have come, kept or not; or as many as a quorum inbox is asked for."""
        if self.is_replicated:
            count = min(count, 16)
        eventually(lambda: self.consumer._subscription._newest >= count, PATIENCE, sleep=gevent.sleep)

    def wait_promoted(self) -> None:
        """Block until it has no live queue."""
        active = (ConsumerState.ACTIVE, ConsumerState.OVERFLOWING)
        eventually(lambda: self.consumer.state in active, PATIENCE, sleep=gevent.sleep)

    def take(self) -> list[Delivery]:
        """Take what has come."""
        return [item for item in self.mailbox.take() if isinstance(item, Delivery)]

    def read(self, until: int, *, leave: bool = False) -> None:
        """Take and acknowledge until that number has come; `leave` what has come after it."""
        while until not in self.seen:
            taken = self.take()
            if leave:
                taken = [one for one in taken if int(one.body[:8]) <= until]
            gevent.sleep(0.002)  # while it writes, more comes
            self.most = max(self.most, self.mailbox.size)
            self.consumer.ack(taken)
            for one in taken:
                number = int(one.body[:8])
                (self.repeated if number in self.seen else self.seen).append(number)


def publish(url: str, user: str, numbers: range, size: int = LARGE) -> None:
    """Publish messages as another program, each with its number at its beginning."""
    first, *others = ((b"%08d" % number).ljust(size) for number in numbers)
    publish_first(url, user, first, sleep=gevent.sleep)
    with amqp(url) as channel:
        for body in others:
            channel.basic_publish("direct_message", user, body, mandatory=True)


def test_what_waits_for_a_socket_that_does_not_read_is_bounded(
    pool: ConsumerPool, broker: VirtualHost, user: str
) -> None:
    """120 messages of 60 KiB: the mailbox holds its budget; read slowly, all come, once and in order."""
    reader = Reader(pool, user)
    publish(broker.url, user, range(120))
    reader.wait_for_deliveries(100)
    assert 0 < reader.mailbox.size <= reader.room
    reader.read(119)
    assert reader.seen == list(range(120))
    assert reader.repeated == []
    assert reader.most <= reader.parts * reader.room
    eventually(lambda: broker.queues()[f"inbox.{user}"]["messages"] == 0, PATIENCE, sleep=gevent.sleep)
    publish(broker.url, user, range(120, 140), size=8)
    reader.read(139)
    assert reader.seen == list(range(140))
    reader.consumer.close()


def test_a_message_larger_than_the_budget_comes_alone(pool: ConsumerPool, broker: VirtualHost, user: str) -> None:
    """The mailbox never holds two of them, and all come."""
    reader = Reader(pool, user, budget=4096)
    size = reader.room + 1
    publish(broker.url, user, range(20), size)
    reader.wait_for_deliveries(20)
    reader.read(19)
    assert reader.seen == list(range(20))
    assert reader.most <= reader.parts * (size + 1)
    reader.consumer.close()


def test_a_slow_tab_takes_nothing_from_another(pool: ConsumerPool, broker: VirtualHost, user: str) -> None:
    """Two sockets that do not read, the active one and one that stands by: either gets all, and when one goes."""
    active, other = Reader(pool, user), Reader(pool, user)
    publish(broker.url, user, range(30))
    active.wait_for_deliveries(30)
    other.wait_for_deliveries(30)
    assert max(active.mailbox.size, other.mailbox.size) <= other.room
    active.read(10)
    active.consumer.close()  # the inbox begins to deliver to the other one, whose live queue is far from empty
    publish(broker.url, user, range(30, 60))
    other.read(59)
    assert other.seen == list(range(60))
    assert other.most <= 2 * other.room, "while it changes over, either queue has a budget"
    other.consumer.close()


def test_a_tab_without_room_is_promoted_all_the_same(pool: ConsumerPool, broker: VirtualHost, user: str) -> None:
    """The active one goes while the other one's mailbox is full: the inbox begins there, and is emptied."""
    active, other = Reader(pool, user), Reader(pool, user)
    publish(broker.url, user, range(30))
    active.wait_for_deliveries(30)
    other.wait_for_deliveries(30)
    active.consumer.close()
    other.wait_for_deliveries(60)
    assert other.mailbox.size + LARGE > BUDGET
    reader = gevent.spawn(other.read, 60)
    eventually(lambda: broker.queues()[f"inbox.{user}"]["messages"] == 0, PATIENCE, sleep=gevent.sleep)
    publish(broker.url, user, range(30, 61), size=8)
    reader.join()
    eventually(lambda: broker.queues()[f"inbox.{user}"]["messages"] == 0, PATIENCE, sleep=gevent.sleep)
    assert other.seen == list(range(61))
    other.consumer.close()


def test_what_a_slow_socket_has_taken_is_not_given_to_the_next_one(
    pool: ConsumerPool, broker: VirtualHost, user: str
) -> None:
    """Also where it came from a live queue that was never emptied, so that nothing changed over to the inbox."""
    active, slow = Reader(pool, user), Reader(pool, user)
    publish_first(broker.url, user, b"%08d" % 0, sleep=gevent.sleep)
    for reader in (active, slow):
        reader.read(0)
    with amqp(broker.url) as channel:
        for number in range(1, 60):
            own = pika.BasicProperties(app_id="imrelay", message_id=f"{number:026}")
            body = (b"%08d" % number).ljust(LARGE)
            channel.basic_publish("direct_message", user, body, own, mandatory=True)
    slow.wait_for_deliveries(60)
    active.consumer.close()
    slow.read(20)
    left = 60 - len(slow.seen)
    assert left > 20
    eventually(lambda: broker.queues()[f"inbox.{user}"]["messages"] == left, PATIENCE, sleep=gevent.sleep)
    slow.consumer.close()
    assert slow.consumer.wait_detached(PATIENCE)
    other = Reader(pool, user)
    other.read(59)
    assert slow.seen + other.seen == list(range(60))
    other.consumer.close()


def test_what_a_slow_socket_has_left_comes_to_the_next_ones_in_order(
    pool: ConsumerPool, broker: VirtualHost, user: str
) -> None:
    """A quorum queue takes back what a consumer had in the order of its deliveries, not of the messages."""
    reader = Reader(pool, user)
    publish(broker.url, user, range(1))
    reader.wait_promoted()
    publish(broker.url, user, range(1, 60))
    seen: list[int] = []
    for last in (7, 20, 30, 40, 59):
        reader = reader if not seen else Reader(pool, user)
        reader.read(last, leave=True)
        reader.consumer.close()
        assert reader.consumer.wait_detached(PATIENCE)
        seen += reader.seen
    assert seen == list(range(60))


@pytest.mark.parametrize("pool", ["quorum"], indirect=True)
def test_sockets_of_relays_with_other_settings_get_what_is_left_in_order(
    pool: ConsumerPool, broker: VirtualHost, user: str
) -> None:
    """Every socket asks a quorum inbox for as much as the one before it had: what that left stays together."""
    with new_pool(broker.url, "quorum", prefetch=1) as narrow:
        seen: list[int] = []
        for where, budget in ((pool, BUDGET), (narrow, 4096), (pool, 4096), (narrow, BUDGET)):
            reader = Reader(where, user, budget)
            if not seen:
                publish(broker.url, user, range(1), size=8)
                reader.wait_promoted()
                reader.consumer.ack(reader.take())  # from the live queue and from the inbox
                publish(broker.url, user, range(1, 21), size=8)
            reader.wait_for_deliveries(16)
            first = reader.take()[0]
            reader.consumer.ack([first])
            seen.append(int(first.body))
            reader.consumer.close()
            assert reader.consumer.wait_detached(PATIENCE)
        reader = Reader(pool, user)
        reader.read(20)
        assert seen + reader.seen == list(range(1, 21))
        reader.consumer.close()


def test_what_was_sent_back_to_a_broker_that_is_slow_is_awaited(
    broker: VirtualHost, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence alone says nothing: it comes in its order when the broker goes on."""
    monkeypatch.setattr(overflow_watch, "_RETURNING", 0.2)
    with gevent.Timeout(PATIENCE), Proxy(broker.url) as proxy, new_pool(proxy.url, "classic") as pool:
        reader = Reader(pool, user)
        publish(broker.url, user, range(20))
        reader.wait_for_deliveries(20)
        proxy.stall()
        reading = gevent.spawn(reader.read, 19)
        channel = reader.consumer._channel
        assert channel is not None
        eventually(lambda: channel.is_asking, PATIENCE, sleep=gevent.sleep)
        overflow = reader.consumer._subscription._overflow
        assert overflow.awaited
        proxy.heal()
        reading.join()
        assert reader.seen == list(range(20))
        assert overflow.awaited == 0
        reader.consumer.close()


def test_what_was_thrown_away_meanwhile_is_not_awaited(
    pool: ConsumerPool, broker: VirtualHost, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that are purged after they were sent back do not keep newer ones from coming."""
    monkeypatch.setattr(overflow_watch, "_RETURNING", 0.2)
    reader = Reader(pool, user)
    publish(broker.url, user, range(20))
    reader.wait_for_deliveries(20)
    # as if a purge had come between the return and the next delivery
    overflow = reader.consumer._subscription._overflow
    channel = reader.consumer._channel
    assert channel is not None
    for tag in overflow.send_back(BUDGET):
        channel.discard(tag)
    reader.read(19)
    assert reader.seen == sorted(reader.seen)
    assert 0 in reader.seen
    publish(broker.url, user, range(20, 60))
    reader.read(59)
    assert reader.seen[-40:] == list(range(20, 60))
    reader.consumer.close()


def test_a_plain_browser_that_reads_slowly_gets_all(relay: RelayFactory, broker: VirtualHost, user: str) -> None:
    """120 messages of 60 KiB to a real socket that does not read at first: all come, once and in order."""
    host = relay(websocket_max_send_buffer=BUDGET, websocket_max_message_size=2 * LARGE)
    wait_until_ready(host)
    small = [(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 8192)]
    with Browser(host, f"{user}'s friend") as sender, Browser(host, user, sockopt=small) as slow:
        texts = [sender.say(user, number, fill="x" * LARGE, id=number) for number in range(120)]
        assert sorted(sender.ack()["id"] for _ in texts) == list(range(120))
        assert [json.loads(slow.receive())["content"] for _ in texts] == list(range(120))
        assert slow.rest() == []


def delivery(tag: int, body: bytes, *, mid: str | None = None, is_own: bool = False) -> Delivery:
    """Return a delivery of the inbox."""
    return Delivery("inbox", tag, False, body, mid, False, is_own, None)


def test_what_is_under_way_goes_behind_what_is_awaited() -> None:
    """A delivery that is not awaited is newer; what is gone is passed over; equal messages are counted."""
    overflow = Overflow()
    for tag, body in enumerate((b"a", b"b", b"b", b"c"), 1):
        overflow.refuse(delivery(tag, body))
    assert overflow.send_back(6) == [1, 2, 3]
    newer = delivery(5, b"d")
    assert not overflow.admit(newer)
    overflow.refuse(newer)
    assert overflow.admit(delivery(6, b"a"))
    again = delivery(7, b"b")
    again.redelivered = True
    assert overflow.admit(again)
    assert not again.redelivered, "its socket has not seen it"
    assert overflow.send_back(4) == [4]  # the second b is still awaited
    assert overflow.admit(delivery(8, b"c")), "so that b has expired"
    assert overflow.awaited == 0
    assert overflow.send_back(0) == [5], "one may be larger than the room"
    assert overflow.admit(delivery(9, b"d"))
    assert not overflow


def test_what_was_taken_from_the_live_queue_is_known_though_there_was_no_room_for_it_again() -> None:
    """The inbox's copy of it, whose body was dropped, is acknowledged when the socket ends; no other is."""
    live = LiveQueue(is_alone=False)
    own = delivery(1, b"own", mid="mid of a relay", is_own=True)
    own.consumer_tag = LIVE_TAG
    live.note_taken([own])
    overflow = Overflow()
    overflow.refuse(delivery(2, b"foreign"))
    overflow.refuse(delivery(3, b"own", mid="mid of a relay", is_own=True))
    live.hold(delivery(4, b"own", mid="mid of a relay", is_own=True))
    assert live.pop_taken(overflow) == [4, 3]
    assert live.pop_taken(overflow) == []
    assert (live.set_aside, live.held) == (0, [])
    assert overflow.send_back(100) == [2]
