"""The pool attaches what is still wanted, one socket of a user after the other, and no user waits for another."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import gevent
import pytest
from gevent.event import Event

from imrelay.broker import pool
from imrelay.broker.connection import Connection, ConnectionState
from imrelay.broker.consumer import Consumer
from imrelay.broker.consumer_state import ConsumerState
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.topology import Topology
from imrelay.errors import ChannelLost
from imrelay.settings.values import InboxConfig

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
#: So many looks at a connection without a pause are a busy loop.
MANY_LOOKS = 10_000


class Held(Consumer):
    """A consumer whose attaching lasts until the test lets it end; it then fails if the test says so."""

    def __init__(self, keeper: Any, user: str, mailbox: Mailbox) -> None:
        super().__init__(keeper, user, mailbox)
        self.begun, self.may_end, self.ended = Event(), Event(), Event()
        self.failure: ChannelLost | None = None
        #: How often it was begun to attach it.
        self.attempts = 0

    def attach(self, connection: Connection, topology: Topology, prefetch: int) -> None:
        """Wait for the test."""
        self.attempts += 1
        self.begun.set()
        self.may_end.wait()
        self.ended.set()
        if self.failure is not None:
            raise self.failure
        if not self.is_closed:
            self._subscription._enter(ConsumerState.ACTIVE)


class FakeConnection:
    """A connection that is open when the test says so, and counts how often `is_open` is read."""

    channel_max = 2047
    channels = 0
    state = ConnectionState.OPEN
    reason = ""

    def __init__(self, on_state: Callable[[ConnectionState], None]) -> None:
        self.looks = 0
        self._on_state = on_state
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether it is open; fails in a busy loop."""
        self.looks += 1
        assert self.looks < MANY_LOOKS, "somebody looks again and again"
        return self._is_open

    def open(self) -> None:
        """Open it, and say so."""
        self._is_open = True
        self._on_state(ConnectionState.OPEN)

    def start(self) -> None:
        """Begin."""

    def close(self) -> None:
        """End."""


class HeldPool:
    """A pool on one connection, with consumers that the test holds."""

    def __init__(self) -> None:
        self.connections: list[FakeConnection] = []
        self.pool = ConsumerPool(
            self._new_connection,
            Topology("direct_message", InboxConfig()),
            prefetch=10,
            channels_per_connection=2000,
        )
        self.pool.start()
        self.connection = self.connections[0]

    def consume(self, user: str) -> Held:
        """Have a consumer of the user attached."""
        return cast(Held, self.pool.consume(user, Mailbox()))

    def fill(self) -> list[Held]:
        """Keep all attachers busy, each with a user of its own."""
        held = [self.consume(f"holds {number}") for number in range(pool._PARALLEL)]
        for consumer in held:
            assert consumer.begun.wait(PATIENCE)
        return held

    def attach_last(self) -> None:
        """Attach one more, of another user: those before it have had their turn."""
        last = self.consume("last")
        last.may_end.set()
        assert last.ended.wait(PATIENCE)
        gevent.sleep(0)

    def _new_connection(self, name: str, on_state: Callable[[ConnectionState], None]) -> Connection:
        self.connections.append(FakeConnection(on_state))
        return cast(Connection, self.connections[-1])


@pytest.fixture
def attaching(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldPool]:
    """A pool whose connection is not yet open."""
    monkeypatch.setattr(pool, "Consumer", Held)
    made = HeldPool()
    with gevent.Timeout(PATIENCE * 3):
        yield made
    made.pool.stop()
    gevent.killall(attachers())


def attachers() -> list[gevent.Greenlet]:
    """Return the greenlets that attach consumers."""
    greenlets = [item for item in gc.get_objects() if isinstance(item, gevent.Greenlet)]
    return [greenlet for greenlet in greenlets if greenlet.name == "attacher" and not greenlet.dead]


def assert_nothing_left(consumer: weakref.ref[Held]) -> None:
    """Assert that nobody holds the consumer any more."""
    gc.collect()
    left = consumer()
    assert left is None, gc.get_referrers(left)


def test_a_socket_that_closes_in_the_queue_is_not_attached(attaching: HeldPool) -> None:
    """A consumer whose socket closes while others are attached never takes a channel, and nothing of it stays."""
    attaching.connection.open()
    held = attaching.fill()
    waiting = attaching.consume("waiting")
    assert not waiting.begun.is_set()
    waiting.close()
    begun, remains = waiting.begun, weakref.ref(waiting)
    del waiting
    assert_nothing_left(remains)  # while it would still be waiting
    for consumer in held:
        consumer.may_end.set()
    attaching.attach_last()
    assert not begun.is_set()
    assert all(consumer.is_attached for consumer in held)


def test_a_socket_that_closes_before_there_is_a_connection_is_not_attached(attaching: HeldPool) -> None:
    """A consumer whose socket closes while the broker is away never takes a channel, and nothing of it stays."""
    waiting = attaching.consume("waiting")
    gevent.sleep(0)
    assert attaching.connection.looks, "it does not wait for the connection"
    waiting.close()
    attaching.connection.open()
    attaching.attach_last()
    assert not waiting.attempts
    remains = weakref.ref(waiting)
    del waiting
    assert_nothing_left(remains)


def test_a_socket_that_closes_in_the_pause_is_not_attached(
    attaching: HeldPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that failed, and whose socket closes before the next attempt, is not attached again."""
    pauses: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    monkeypatch.setattr(
        pool.gevent, "spawn_later", lambda pause, function, *arguments: pauses.append((function, arguments))
    )
    attaching.connection.open()
    refused = attaching.consume("refused")
    refused.failure = ChannelLost("no")
    refused.may_end.set()
    assert refused.ended.wait(PATIENCE)
    gevent.sleep(0)
    [(function, arguments)] = pauses
    held = attaching.fill()
    refused.close()
    function(*arguments)
    assert refused.attempts == 1
    remains = weakref.ref(refused)
    del refused, arguments
    pauses.clear()
    assert_nothing_left(remains)  # while it would be waiting for the others
    assert all(consumer.attempts == 1 for consumer in held)


def test_sockets_of_one_user_are_attached_one_after_the_other(attaching: HeldPool) -> None:
    """A further socket of a user has to find the first one on the broker: it is begun when that has ended."""
    attaching.connection.open()
    sockets = [attaching.consume("one") for _ in range(3)]
    left = list(sockets)
    while left:
        gevent.wait([socket.begun for socket in left], timeout=PATIENCE, count=1)
        attaching.attach_last()  # others have had the time to begin too soon
        begun = [socket for socket in left if socket.begun.is_set()]
        assert len(begun) == 1
        left.remove(begun[0])
        begun[0].may_end.set()
    assert sockets[-1].ended.wait(PATIENCE)
    assert [socket.attempts for socket in sockets] == [1, 1, 1]


def test_a_busy_user_does_not_hold_up_another(attaching: HeldPool) -> None:
    """More waiting sockets of one user than are attached at a time: the socket of another user gets its turn."""
    attaching.connection.open()
    busy = [attaching.consume("busy") for _ in range(pool._PARALLEL * 3)]
    assert busy[0].begun.wait(PATIENCE)
    attaching.attach_last()
    assert not any(socket.begun.is_set() for socket in busy[1:])
    for socket in busy:
        socket.may_end.set()
    for socket in busy:
        assert socket.ended.wait(PATIENCE)


def test_looking_for_a_free_user_does_not_grow_with_those_who_wait(
    attaching: HeldPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sockets wait for a busy user, only so many greenlets look after them, each once in a while."""
    monkeypatch.setattr(pool, "_MOMENT", PATIENCE * 100)
    attaching.connection.open()
    busy = [attaching.consume("busy") for _ in range(1000)]
    assert busy[0].begun.wait(PATIENCE)
    for _ in range(100):
        gevent.sleep(0)
    assert 1 < attaching.connection.looks <= pool._PARALLEL
    assert len(attachers()) <= pool._PARALLEL


def test_an_attacher_that_fails_loses_no_consumer(
    attaching: HeldPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong around the attaching of a socket is logged, and the socket is attached after a pause."""
    failures = iter([RuntimeError("odd"), ValueError("odder")])
    real = attaching.pool._wait_for_connection

    def fail() -> Connection | None:
        for failure in failures:
            raise failure
        return real()

    monkeypatch.setattr(attaching.pool, "_wait_for_connection", fail)
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.01)
    attaching.connection.open()
    consumers = [attaching.consume("one"), attaching.consume("two"), attaching.consume("three")]
    for consumer in consumers:
        consumer.may_end.set()
        assert consumer.ended.wait(PATIENCE)
    gevent.sleep(0)
    assert [consumer.attempts for consumer in consumers] == [1, 1, 1]
    assert all(consumer.is_attached for consumer in consumers)
    assert sum(record.exc_info is not None for record in caplog.records) == 2


def test_a_consumer_that_cannot_be_bound_again_does_not_prevent_the_others(
    attaching: HeldPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rebinder looks at every consumer, round after round, whatever one of them raises."""
    seen = {name: Event() for name in ("one", "two", "three")}

    def bind(consumer: Held, topology: Topology) -> None:
        seen[consumer.user].set()
        raise RuntimeError("odd")

    monkeypatch.setattr(pool, "_REBIND_INTERVAL", 0.001)
    monkeypatch.setattr(Held, "rebind_live", bind)
    for name in seen:
        attaching.consume(name)
    attaching.pool._rebinder.kill()
    attaching.pool.start()
    for _ in range(2):
        for event in seen.values():
            assert event.wait(PATIENCE)
            event.clear()


def test_the_rebinder_outlives_a_fault_of_a_round(attaching: HeldPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that fails as a whole is followed by the next ones."""
    bound = Event()
    monkeypatch.setattr(pool, "_REBIND_INTERVAL", 0.001)
    monkeypatch.setattr(Held, "rebind_live", lambda consumer, topology: bound.set())
    consumers = attaching.pool._consumers
    attaching.pool._consumers = cast(Any, None)  # which nobody can go through
    attaching.pool._rebinder.kill()
    attaching.pool.start()
    rebinder = attaching.pool._rebinder
    gevent.sleep(0.01)
    attaching.pool._consumers = consumers
    attaching.consume("one")
    assert bound.wait(PATIENCE)
    assert attaching.pool._rebinder is rebinder
