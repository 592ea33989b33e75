"""A socket that closes while it is being attached to its inbox leaves no channel, consumer or queue behind."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import gevent
import pika
import pytest

from imrelay.broker import channel as channel_module
from imrelay.broker.codec import Delivery
from imrelay.broker.connection import Connection
from imrelay.broker.consumer import Consumer
from imrelay.broker.consumer_state import ConsumerState
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.topology import Topology
from imrelay.settings.values import InboxConfig
from tests.support.brokers import amqp
from tests.support.gate import Gate
from tests.support.harness import VirtualHost, eventually
from tests.support.tap import Method

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
OPEN_OK, CHANNEL_CLOSE, CONSUME_OK, DECLARE_OK = (20, 11), (20, 40), (60, 21), (50, 11)
_numbers = itertools.count(1)


class MailboxSocket:
    """A user's mailbox and consumer."""

    def __init__(self, pool: ConsumerPool, user: str) -> None:
        self.mailbox = Mailbox()
        self.consumer: Consumer = pool.consume(user, self.mailbox)

    def wait_attached(self) -> None:
        """Block until the broker delivers to it."""
        assert self.consumer.wait_attached(PATIENCE)

    def bodies(self) -> list[bytes]:
        """Block until there is something, and return the bodies of all of it."""
        return [item.body for item in self.mailbox.take() if isinstance(item, Delivery)]


@pytest.fixture
def user() -> str:
    """An id that no other test has used."""
    return f"user {next(_numbers)}"


@pytest.fixture
def queue_type() -> str:
    """The type of inboxes; a test may say another one."""
    return "classic"


@pytest.fixture
def pool(gate: Gate, queue_type: str) -> Iterator[ConsumerPool]:
    """A pool of this process's own, whose connection goes through the gate."""
    made = ConsumerPool(
        lambda name, on_state: Connection(lambda: [gate.url], name=name, heartbeat=60, on_state=on_state),
        Topology("direct_message", InboxConfig(queue_type=queue_type)),
        prefetch=10,
        channels_per_connection=100,
    )
    made.start()
    with gevent.Timeout(PATIENCE * 3):
        yield made
    made.stop()


@pytest.mark.parametrize(
    ("others", "method", "number"),
    [
        pytest.param(0, OPEN_OK, 1, id="its channel is opened"),
        pytest.param(0, CONSUME_OK, 1, id="it is subscribed"),
        pytest.param(0, DECLARE_OK, 2, id="the last answer"),
        pytest.param(1, DECLARE_OK, 2, id="it learns that it is not alone"),
        pytest.param(1, DECLARE_OK, 3, id="its live queue is made"),
        pytest.param(1, CONSUME_OK, 2, id="it is subscribed to its live queue"),
    ],
)
def test_a_socket_that_closes_while_it_is_attached_leaves_nothing(
    pool: ConsumerPool, gate: Gate, broker: VirtualHost, user: str, others: int, method: Method, number: int
) -> None:
    """It closes while an answer to its subscription is under way, and takes nothing from its user's others."""
    first = MailboxSocket(pool, user)
    first.wait_attached()
    sockets = [first] * others
    if not others:
        first.consumer.close()

    def is_all_that_is_there() -> bool:
        assert len(broker.channels()) == len(sockets)
        queues = broker.queues()
        assert queues[f"inbox.{user}"]["consumers"] == len(sockets)
        assert len([name for name in queues if not name.startswith("inbox.")]) == max(0, len(sockets) - 1)
        return True

    eventually(is_all_that_is_there, PATIENCE, sleep=gevent.sleep)
    gate.hold(method, number)
    hasty = MailboxSocket(pool, user)
    assert gate.wait_held(PATIENCE)
    assert not hasty.consumer.is_attached
    hasty.consumer.close()
    gate.let_pass()
    eventually(is_all_that_is_there, PATIENCE, sleep=gevent.sleep)
    assert not hasty.consumer.is_attached

    sockets.append(MailboxSocket(pool, user))
    sockets[-1].wait_attached()
    eventually(is_all_that_is_there, PATIENCE, sleep=gevent.sleep)
    with amqp(broker.url) as channel:
        channel.basic_publish("direct_message", user, b"there", mandatory=True)
    assert [socket.bodies() for socket in sockets] == [[b"there"]] * len(sockets)
    assert not hasty.consumer.is_attached
    for socket in sockets:
        socket.consumer.close()
    sockets.clear()
    eventually(is_all_that_is_there, PATIENCE, sleep=gevent.sleep)


@pytest.mark.parametrize(
    "method", [pytest.param(CHANNEL_CLOSE, id="refused"), pytest.param(OPEN_OK, id="before it is refused")]
)
def test_a_socket_that_closes_between_two_attempts_leaves_no_consumer(
    pool: ConsumerPool, gate: Gate, broker: VirtualHost, user: str, method: Method
) -> None:
    """The inbox has other settings, the first attempt is refused, and the socket closes: no second attempt."""
    with amqp(broker.url) as channel:
        channel.queue_declare(f"inbox.{user}", durable=True, arguments={"x-single-active-consumer": True})
        gate.hold(method)
        hasty = MailboxSocket(pool, user)
        assert gate.wait_held(PATIENCE)
        hasty.consumer.close()
        gate.let_pass()
        next_one = MailboxSocket(pool, user)
        next_one.wait_attached()
        channel.basic_publish("direct_message", user, b"there", mandatory=True)
        assert set(next_one.bodies()) == {b"there"}  # from its live queue, and from the inbox
        assert broker.queues()[f"inbox.{user}"]["consumers"] == 1
        assert len(broker.channels()) == 2
        next_one.consumer.close()


def test_a_broker_that_does_not_answer_is_asked_again(
    pool: ConsumerPool, gate: Gate, broker: VirtualHost, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A declare that hangs while the connection lives ends that attempt and does not confuse the next."""
    monkeypatch.setattr(channel_module, "ANSWER_TIMEOUT", 0.2)
    gate.hold(DECLARE_OK, 2)
    socket = MailboxSocket(pool, user)
    assert gate.wait_held(PATIENCE)
    eventually(lambda: socket.consumer.failures, PATIENCE, sleep=gevent.sleep)
    assert not socket.consumer.is_attached
    gate.let_pass()
    monkeypatch.setattr(channel_module, "ANSWER_TIMEOUT", PATIENCE)
    socket.wait_attached()
    with amqp(broker.url) as channel:
        channel.basic_publish("direct_message", user, b"there", mandatory=True)
    assert socket.bodies() == [b"there"]
    assert pool.is_open
    socket.consumer.close()


def test_a_promotion_that_is_not_answered_is_begun_anew(
    pool: ConsumerPool, gate: Gate, broker: VirtualHost, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says whether the live queue is empty: the consumer attaches again, and nothing is lost."""
    first, second = MailboxSocket(pool, user), MailboxSocket(pool, user)
    first.wait_attached()
    second.wait_attached()
    with amqp(broker.url) as channel:
        channel.basic_publish("direct_message", user, b"one", mandatory=True)
        assert first.bodies() == second.bodies() == [b"one"]
        gate.hold(DECLARE_OK)
        monkeypatch.setattr(channel_module, "ANSWER_TIMEOUT", 0.2)
        first.consumer.close()
        assert gate.wait_held(PATIENCE)
        eventually(lambda: not second.consumer.is_attached, PATIENCE, sleep=gevent.sleep)
        gate.let_pass()
        monkeypatch.setattr(channel_module, "ANSWER_TIMEOUT", PATIENCE)
        second.wait_attached()
        assert second.bodies() == [b"one"]  # the session recognises repeats
        channel.basic_publish("direct_message", user, b"two", mandatory=True)
        assert second.bodies() == [b"two"]
    second.consumer.close()


@pytest.mark.parametrize("takes", [True, False])
def test_a_socket_that_closes_during_its_promotion_gives_back_what_it_has_not_taken(
    pool: ConsumerPool, gate: Gate, broker: VirtualHost, user: str, takes: bool
) -> None:
    """What it has taken from its live queue does not come again to the next socket; all else does."""
    first, second = MailboxSocket(pool, user), MailboxSocket(pool, user)
    first.wait_attached()
    second.wait_attached()
    own = pika.BasicProperties(app_id="imrelay", message_id="0" * 26, type="text")
    with amqp(broker.url) as channel:
        channel.basic_publish("direct_message", user, b"one", own, mandatory=True)
        (delivery,) = second.mailbox.take()
        assert isinstance(delivery, Delivery)
        if takes:
            second.consumer.ack([delivery])
        gate.hold(DECLARE_OK)
        first.consumer.close()
        assert second.consumer.state is ConsumerState.STANDING_BY
        eventually(lambda: second.consumer.state is ConsumerState.PROMOTING, PATIENCE, sleep=gevent.sleep)
        second.consumer.close()
        gate.let_pass()
        assert second.consumer.wait_detached(PATIENCE)  # else the third would get what is new first
        third = MailboxSocket(pool, user)
        third.wait_attached()
        channel.basic_publish("direct_message", user, b"two", mandatory=True)
        bodies: list[bytes] = []
        while b"two" not in bodies:
            bodies += third.bodies()
        assert bodies == ([b"two"] if takes else [b"one", b"two"])
    third.consumer.close()


def test_each_state_of_a_consumer_is_logged(
    pool: ConsumerPool, broker: VirtualHost, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The second socket of a user stands by, is promoted when the first closes, and is closed for good."""
    first = MailboxSocket(pool, user)
    first.wait_attached()
    assert first.consumer.state is ConsumerState.ACTIVE
    with caplog.at_level(logging.DEBUG, logger="imrelay.broker.subscription"):
        second = MailboxSocket(pool, user)
        second.wait_attached()
        assert second.consumer.state is ConsumerState.STANDING_BY
        first.consumer.close()
        assert first.consumer.state is ConsumerState.CLOSED
        with amqp(broker.url) as channel:
            channel.basic_publish("direct_message", user, b"for who is promoted", mandatory=True)
        eventually(lambda: second.consumer.state is ConsumerState.ACTIVE, PATIENCE, sleep=gevent.sleep)
        for _ in range(2):
            second.consumer.close()
    states = [record.args[1] for record in caplog.records if isinstance(record.args, tuple)]
    states.remove("CLOSED")  # the first one
    assert states == ["ATTACHING", "BINDING", "STANDING_BY", "PROMOTING", "ACTIVE", "CLOSED"]


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_socket_is_detached_when_its_inbox_has_back_what_it_had_not_taken(
    pool: ConsumerPool, broker: VirtualHost, user: str
) -> None:
    """A quorum queue hears of the end of a channel after that was confirmed."""
    queue = f"inbox.{user}"
    with amqp(broker.url) as channel:
        for number in range(20):
            socket = MailboxSocket(pool, user)
            socket.wait_attached()
            if not number:
                for body in (b"one", b"two", b"three"):
                    channel.basic_publish("direct_message", user, body, mandatory=True)
            bodies: list[bytes] = []
            while len(bodies) < 3:
                bodies += socket.bodies()
            socket.consumer.close()
            assert socket.consumer.wait_detached(PATIENCE)
            found = channel.queue_declare(queue, passive=True).method
            assert (found.consumer_count, found.message_count) == (0, 3), f"round {number}"


@pytest.mark.parametrize("queue_type", ["quorum"])
def test_another_socket_is_not_waited_for(pool: ConsumerPool, user: str) -> None:
    """It has been promoted: then nobody can tell whether the inbox has back what the first had not taken."""
    first, second = MailboxSocket(pool, user), MailboxSocket(pool, user)
    first.wait_attached()
    second.wait_attached()
    first.consumer.close()
    assert not first.consumer.wait_detached(PATIENCE)
    assert second.consumer.is_attached
    second.consumer.close()
    assert second.consumer.wait_detached(PATIENCE)
