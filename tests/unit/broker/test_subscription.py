"""A subscription begins in order, whatever a quorum queue tells of its consumers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import gevent
import pytest
from pika import spec
from pika.amqp_object import Method

from imrelay.broker import live_queue, subscription
from imrelay.broker.channel import Channel
from imrelay.broker.codec import Delivery
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.subscription import Subscription
from imrelay.broker.topology import AS_IT_STANDS, INBOX_TAG, LIVE_TAG, Topology
from imrelay.settings.values import InboxConfig
from tests.support.harness import eventually

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


class ScriptedChannel:
    """Answers as a broker whose inbox counts as many consumers as the test says; its live queue is empty."""

    lost = None
    is_asking = False

    def __init__(self, *consumers: int) -> None:
        #: What the next looks at the inbox tell; the last one again and again.
        self.consumers = list(consumers)
        self.looks = 0
        #: All that was sent, in order.
        self.sent: list[Method] = []

    def call(self, *methods: Method) -> list[Any]:
        self.sent += methods
        return [self._answer(method) for method in methods if not getattr(method, "nowait", False)]

    def _answer(self, method: Method) -> object:
        if isinstance(method, spec.Queue.Declare) and method.passive and method.queue.startswith("inbox."):
            self.looks += 1
            count = self.consumers.pop(0) if len(self.consumers) > 1 else self.consumers[0]
            return SimpleNamespace(message_count=0, consumer_count=count)
        return SimpleNamespace(queue="live", message_count=0, consumer_count=0)

    def ack(self, tag: int, **how: bool) -> None:
        """Take note of nothing."""

    def send(self, method: Method) -> None:
        """Note what has no answer that is waited for."""
        self.sent.append(method)


class Beginning:
    """A subscription to a quorum inbox that has just begun."""

    def __init__(self, *consumers: int, is_again: bool = False) -> None:
        self.channel = ScriptedChannel(*consumers)
        self.mailbox = Mailbox()
        self.lost: list[Exception] = []
        self._tags = iter(range(1, 1_000))
        self.subscription = Subscription("ann", self.mailbox, has_stood_by=False, on_fault=self.lost.append)
        self.subscription.begin(
            cast(Channel, self.channel),
            Topology("direct_message", InboxConfig(queue_type="quorum")),
            100,
            AS_IT_STANDS[0],
            is_again=is_again,
        )

    def deliver(self, consumer: str, *numbers: int) -> None:
        """Let deliveries come, each an own message of that number."""
        for number in numbers:
            self.subscription.on_delivery(
                Delivery(consumer, next(self._tags), False, b"%d" % number, f"{number:026}", False, True, None)
            )

    @property
    def came(self) -> list[int]:
        """The numbers of what is in the mailbox, in order and without repeats."""
        numbers = [int(item.body) for item in self.mailbox._items if isinstance(item, Delivery)]
        return list(dict.fromkeys(numbers))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is waited for long."""
    monkeypatch.setattr(subscription, "_SETTLING", 0.01)
    monkeypatch.setattr(subscription, "_BEGINNING", 0.01)
    with gevent.Timeout(PATIENCE):
        yield


def test_an_inbox_without_a_leader_is_waited_for() -> None:
    """It counts no consumer, though there is one: the live queue's messages come after those that it holds."""
    one = Beginning(0, 0)
    one.deliver(LIVE_TAG, 5)
    eventually(lambda: one.channel.looks > 4, PATIENCE, sleep=gevent.sleep)
    assert one.came == []
    one.deliver(INBOX_TAG, 1, 2, 3, 4)
    eventually(lambda: one.came, PATIENCE, sleep=gevent.sleep)
    assert one.came == [1, 2, 3, 4, 5]
    assert one.lost == []


def test_an_inbox_that_has_a_leader_again_and_holds_nothing_is_not_waited_for() -> None:
    """What the live queue has brought comes when the inbox counts its consumer."""
    one = Beginning(0, 0)
    one.deliver(LIVE_TAG, 5)
    eventually(lambda: one.channel.looks > 4, PATIENCE, sleep=gevent.sleep)
    one.channel.consumers = [1]
    eventually(lambda: one.came == [5], PATIENCE, sleep=gevent.sleep)


def test_an_inbox_without_a_leader_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of the live queue come all the same after a while."""
    monkeypatch.setattr(live_queue, "_LEADERLESS", 0.05)
    one = Beginning(0, 0)
    one.deliver(LIVE_TAG, 5)
    eventually(lambda: one.came == [5], PATIENCE, sleep=gevent.sleep)


def test_a_socket_that_comes_back_takes_its_own_lost_consumer_for_nobody() -> None:
    """A quorum queue still counts the lost one, which had what it gives now: that is older than the live queue."""
    one = Beginning(1, 2, is_again=True)
    one.deliver(LIVE_TAG, 5)
    assert one.came == []
    one.deliver(INBOX_TAG, 1, 2, 3, 4)
    eventually(lambda: one.came, PATIENCE, sleep=gevent.sleep)
    assert one.came == [1, 2, 3, 4, 5]


def test_a_further_socket_gets_messages_at_once() -> None:
    """Where another socket is there, nothing of the live queue is held back."""
    one = Beginning(1, 2)
    one.deliver(LIVE_TAG, 5)
    assert one.came == [5]


def unbound(one: Beginning) -> list[tuple[str, str, str]]:
    """Return what was unbound: queue, exchange, key."""
    found = [method for method in one.channel.sent if isinstance(method, spec.Queue.Unbind)]
    return [(method.queue, method.exchange, method.routing_key) for method in found]


def test_a_live_queue_is_unbound_before_its_channel_ends() -> None:
    """RabbitMQ refuses a message that it routes to a queue which is just gone, though the inbox has taken it."""
    one = Beginning(1, 2)
    assert unbound(one) == []
    one.subscription.close(for_good=True)
    assert unbound(one) == [("live", "user.ann", "#")]


def test_a_live_queue_is_unbound_once_before_it_is_deleted() -> None:
    """When its socket is promoted; closing the socket then does not unbind it again."""
    one = Beginning(1, 2)
    one.deliver(INBOX_TAG, 1)
    eventually(lambda: one.came, PATIENCE, sleep=gevent.sleep)
    kinds = (spec.Queue.Unbind, spec.Basic.Cancel)
    unbind, cancel = (method for method in one.channel.sent if isinstance(method, kinds))
    assert isinstance(unbind, spec.Queue.Unbind)
    assert isinstance(cancel, spec.Basic.Cancel)
    one.subscription.close(for_good=True)
    assert len(unbound(one)) == 1
