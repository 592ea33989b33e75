"""A call on a channel ends when the channel ends, and nothing is reported of a channel that was closed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import gevent
import pytest
from pika import spec

from imrelay.broker import channel as channel_module
from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.errors import ChannelLost
from tests.support.gate import Gate
from tests.support.harness import eventually
from tests.support.tap import Method

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
EXCHANGE = "late"
RETURN, ACK, NACK = (60, 50), (60, 80), (60, 120)
#: The broker's answer -> the routing key that gets it.
ANSWERS = pytest.mark.parametrize(
    ("key", "method"), [("nobody", RETURN), ("somebody", ACK), ("full", NACK)], ids=["return", "ack", "nack"]
)


class Told:
    """A publishing channel, and the answers that its owner got."""

    def __init__(self, connection: Connection) -> None:
        self.answers: list[Any] = []
        self.channel = Channel(connection)
        self.channel.call(
            spec.Exchange.Declare(exchange=EXCHANGE),
            spec.Queue.Declare(queue="somebody"),
            spec.Queue.Bind(queue="somebody", exchange=EXCHANGE, routing_key="somebody"),
            spec.Queue.Declare(queue="full", arguments={"x-max-length": 0, "x-overflow": "reject-publish"}),
            spec.Queue.Bind(queue="full", exchange=EXCHANGE, routing_key="full"),
        )
        self.channel.confirm(
            lambda tag, multiple, accepted: self.answers.append((tag, accepted)), self.answers.append
        )
        self._template = self.channel.prepare(EXCHANGE, persistent=False)

    def publish(self, key: str) -> None:
        """Publish a message."""
        content = self._template.encode_content("m1", False, b"{}")
        self.channel.publish(self._template.encode_method(key) + content, at_once=True)


@ANSWERS
def test_the_owner_is_told_of_each_answer(connection: Connection, key: str, method: Method) -> None:
    """While the channel is open, its owner gets a return, an ack and a nack."""
    told = Told(connection)
    told.publish(key)
    answers = {RETURN: ["m1", (1, True)], ACK: [(1, True)], NACK: [(1, False)]}[method]
    eventually(lambda: len(told.answers) >= len(answers), PATIENCE, sleep=gevent.sleep)
    assert told.answers == answers


@ANSWERS
def test_an_answer_after_the_close_is_dropped(
    connection: Connection, gate: Gate, key: str, method: Method
) -> None:
    """The broker had answered when the channel was closed, the answer arrives later: its owner gets nothing."""
    told = Told(connection)
    gate.hold(method)
    told.publish(key)
    assert gate.wait_held(PATIENCE)
    told.channel.close()
    gate.let_pass()
    eventually(lambda: not connection.channels, PATIENCE, sleep=gevent.sleep)  # channel.close-ok came behind it
    assert connection.is_open
    assert told.answers == []


def test_nothing_is_asked_of_a_connection_that_is_being_closed(connection: Connection) -> None:
    """What follows connection.close is never answered: the call raises at once."""
    told = Told(connection)
    adapter = connection._adapter
    assert adapter is not None
    adapter.shut_down()
    with pytest.raises(ChannelLost):
        told.channel.call(spec.Queue.Declare(queue="somebody", passive=True))


def test_calls_of_several_greenlets_go_one_after_the_other(connection: Connection) -> None:
    """Each gets the answer to what it has asked, and the last ones wait until it is their turn."""
    channel = Channel(connection)
    names = [f"asked {number}" for number in range(5)]
    asking = [gevent.spawn(channel.call, spec.Queue.Declare(queue=name, exclusive=True)) for name in names]
    gevent.joinall(asking, timeout=PATIENCE)
    assert [one.get(block=False)[0].queue for one in asking] == names
    assert not channel.is_asking
    channel.close()


def test_a_refusal_ends_the_call_with_its_code(connection: Connection) -> None:
    """A channel that the broker closes in answer ends the call with the broker's code."""
    told = Told(connection)
    with pytest.raises(ChannelLost) as refused:
        told.channel.call(spec.Queue.Declare(queue="nowhere", passive=True), spec.Basic.Qos(prefetch_count=1))
    assert refused.value.reply_code == 404


def test_a_call_without_an_answer_ends_in_time(
    connection: Connection, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends with what is missing, the channel is closed, and a late answer reaches nobody."""
    told = Told(connection)
    gate.hold((50, 11))
    monkeypatch.setattr(channel_module, "ANSWER_TIMEOUT", 0.1)
    with pytest.raises(ChannelLost, match=r"did not answer within 0\.1 s: no Queue\.DeclareOk"):
        told.channel.call(spec.Queue.Declare(queue="somebody", passive=True))
    with pytest.raises(ChannelLost):
        told.channel.call(spec.Basic.Qos(prefetch_count=1))
    monkeypatch.setattr(channel_module, "ANSWER_TIMEOUT", PATIENCE)
    gate.let_pass()
    other = Channel(connection)
    assert other.call(spec.Queue.Declare(queue="full", passive=True))[0].queue == "full"
    eventually(lambda: connection.channels == 1, PATIENCE, sleep=gevent.sleep)
    assert connection.is_open


class FakeAdapter:
    """Stands for an adapter, so that a test says what one read of the connection brings."""

    is_open = True

    def __init__(self) -> None:
        self.channels: dict[int, Channel] = {}
        self.outbound = SimpleNamespace(emit=lambda frames: None)

    def add_channel(self, channel: Channel) -> tuple[FakeAdapter, int]:
        """Take a channel, as a connection does."""
        self.channels[1] = channel
        return self, 1

    def forget_channel(self, number: int) -> None:
        """Let go of it."""
        del self.channels[number]


def test_a_refusal_in_the_same_read_as_an_answer_ends_the_call() -> None:
    """One read has an answer and then the channel's end: a call that awaits two answers ends."""
    channel = Channel(cast(Connection, FakeAdapter()))
    asking = gevent.spawn(channel.call, spec.Exchange.Declare(exchange="e"), spec.Queue.Declare(queue="q"))
    gevent.sleep(0)

    def read() -> None:
        channel.receive_method(spec.Exchange.DeclareOk())
        channel.receive_method(spec.Channel.Close(406, "no", 0, 0))

    gevent.get_hub().loop.run_callback(read)
    with gevent.Timeout(PATIENCE), pytest.raises(ChannelLost) as refused:
        asking.get()
    assert refused.value.reply_code == 406


def test_a_cancel_after_the_close_is_dropped() -> None:
    """A late cancel of a closed channel would end the one that has taken its place."""
    cancelled: list[bool] = []
    channel = Channel(cast(Connection, FakeAdapter()), on_cancel=lambda: cancelled.append(True))
    channel.receive_method(spec.Basic.Cancel("inbox"))
    assert cancelled == [True]
    channel.close()
    channel.receive_method(spec.Basic.Cancel("inbox"))
    assert cancelled == [True]
