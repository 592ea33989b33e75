"""What a protocol makes of deliveries and acknowledges of them, without a broker or a socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from imrelay.broker.consumer import Consumer
from imrelay.broker.frames import Delivery
from imrelay.errors import BadMessage
from imrelay.protocol import V1, Plain
from imrelay.submission import ClientAck


class FakeConsumer:
    """Remembers what was acknowledged, by tag."""

    has_stood_by = False

    def __init__(self) -> None:
        self.acked: list[int] = []

    def ack(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge."""
        self.acked += [delivery.tag for delivery in taken]

    ack_each = ack


def delivery(tag: int, mid: str | None) -> Delivery:
    """Return what a relay has published."""
    return Delivery("inbox", tag, False, b"{}", mid, False, True, None)


def test_a_message_that_came_twice_takes_one_place_of_the_prefetch() -> None:
    """imrelay.v1: of two copies of a message one is acknowledged at once, the other when the browser takes it."""
    consumer = FakeConsumer()
    protocol = V1(cast(Consumer, consumer), node_envelope=False)
    assert protocol.encode(delivery(1, "a")) is not None
    assert protocol.encode(delivery(2, "a")) is None
    assert consumer.acked == [1]
    protocol.control(ClientAck(1))
    assert consumer.acked == [1, 2]
    assert protocol.encode(delivery(3, "a")) is None
    assert consumer.acked == [1, 2, 3]


def test_an_ack_takes_what_was_sent_and_no_more() -> None:
    """imrelay.v1: an acknowledgement is cumulative, and one of what was not sent takes nothing."""
    consumer = FakeConsumer()
    protocol = V1(cast(Consumer, consumer), node_envelope=False)
    for tag in (1, 2, 3):
        protocol.encode(delivery(tag, f"m{tag}"))
    with pytest.raises(BadMessage, match="4 was not sent"):
        protocol.control(ClientAck(4))
    assert consumer.acked == []
    protocol.control(ClientAck(2))
    assert consumer.acked == [1, 2]


def test_overdue_is_what_stays_unacknowledged() -> None:
    """imrelay.v1: the oldest message counts, and nothing does once all are acknowledged."""
    now = 100.0
    protocol = V1(cast(Consumer, FakeConsumer()), node_envelope=False, clock=lambda: now)
    assert not protocol.is_overdue(10)
    protocol.encode(delivery(1, "a"))
    now = 111.0
    assert protocol.is_overdue(10)
    protocol.control(ClientAck(1))
    assert not protocol.is_overdue(10)


def test_a_plain_socket_gets_a_repeat_once() -> None:
    """Plain: a repeat is not sent again, and is acknowledged like any other."""
    consumer = FakeConsumer()
    protocol = Plain(cast(Consumer, consumer), node_envelope=False)
    first, second = delivery(1, "a"), delivery(2, "a")
    assert protocol.encode(first) == (b"{}", False)
    assert protocol.encode(second) is None
    protocol.written([first, second])
    assert consumer.acked == [1, 2]


def test_one_message_id_for_many_messages_of_another_program_is_no_repeat() -> None:
    """What comes for the first time from a program that always sets the same message id is all sent."""
    protocol = Plain(cast(Consumer, FakeConsumer()), node_envelope=False)
    for tag in (1, 2, 3):
        foreign = Delivery("inbox", tag, False, b"{}", "same", False, False, None)
        foreign.may_repeat = False
        assert protocol.encode(foreign) is not None
