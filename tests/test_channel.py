"""Who has closed a publishing channel hears no more of it: a late answer would be taken for another message's."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.errors import ChannelLost
from tests.gate import Gate
from tests.harness import eventually
from tests.tap import Method

#: Guard against hanging, in seconds; no measure of speed.
PATIENCE = 20.0
EXCHANGE = "late"
RETURN, ACK, NACK = (60, 50), (60, 80), (60, 120)
#: The broker's answer -> the routing key that gets it.
ANSWERS = pytest.mark.parametrize(
    ("key", "method"), [("nobody", RETURN), ("somebody", ACK), ("full", NACK)], ids=["return", "ack", "nack"]
)


class Told:
    """A publishing channel, and what it has told."""

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
def test_an_answer_is_told(connection: Connection, key: str, method: Method) -> None:
    """While the channel is open, its owner is told of a return, an ack and a nack."""
    told = Told(connection)
    told.publish(key)
    answers = {RETURN: ["m1", (1, True)], ACK: [(1, True)], NACK: [(1, False)]}[method]
    eventually(lambda: len(told.answers) >= len(answers), PATIENCE, sleep=gevent.sleep)
    assert told.answers == answers


@ANSWERS
def test_an_answer_that_comes_after_the_close_is_not_told(
    connection: Connection, gate: Gate, key: str, method: Method
) -> None:
    """The broker had answered when the channel was closed, the answer arrives later: nobody is told."""
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
    """What followed connection.close would never be answered: who asks is told at once."""
    told = Told(connection)
    wire = connection._wire
    assert wire is not None
    wire.close()
    with pytest.raises(ChannelLost):
        told.channel.call(spec.Queue.Declare(queue="somebody", passive=True))


def test_a_refusal_is_told_to_who_asked(connection: Connection) -> None:
    """A channel that the broker closes in answer ends the call with the broker's code."""
    told = Told(connection)
    with pytest.raises(ChannelLost) as refused:
        told.channel.call(spec.Queue.Declare(queue="nowhere", passive=True), spec.Basic.Qos(prefetch_count=1))
    assert refused.value.reply_code == 404
