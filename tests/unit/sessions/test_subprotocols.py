"""What a protocol makes of deliveries and acknowledges of them, without a broker or a socket."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import cast

import pytest

from imrelay.broker.codec import Delivery
from imrelay.broker.consumer import Consumer
from imrelay.errors import BadMessage
from imrelay.messages.submission import ClientAck
from imrelay.sessions.subprotocols import V1, Plain, remembered


class RecordingConsumer:
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
    return Delivery("inbox", tag, False, b"{}", mid and ulid(mid), False, True, None)


def ulid(mid: str, time: str = "01M8000000") -> str:
    """Return an id of a relay's that ends in so many characters, made at another time where one is given."""
    return time + mid.rjust(16, "0")


def test_a_message_that_came_twice_takes_one_place_of_the_prefetch() -> None:
    """imrelay.v1: of two copies of a message one is acknowledged at once, the other when the browser takes it."""
    consumer = RecordingConsumer()
    protocol = V1(cast(Consumer, consumer), node_envelope=False, remembered=1_024)
    assert protocol.encode(delivery(1, "a")) is not None
    assert protocol.encode(delivery(2, "a")) is None
    assert consumer.acked == [1]
    protocol.control(ClientAck(1))
    assert consumer.acked == [1, 2]
    assert protocol.encode(delivery(3, "a")) is None
    assert consumer.acked == [1, 2, 3]


def test_an_ack_takes_what_was_sent_and_no_more() -> None:
    """imrelay.v1: an acknowledgement is cumulative, and one of what was not sent takes nothing."""
    consumer = RecordingConsumer()
    protocol = V1(cast(Consumer, consumer), node_envelope=False, remembered=1_024)
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
    protocol = V1(cast(Consumer, RecordingConsumer()), node_envelope=False, remembered=1_024, clock=lambda: now)
    assert not protocol.is_overdue(10)
    protocol.encode(delivery(1, "a"))
    now = 111.0
    assert protocol.is_overdue(10)
    protocol.control(ClientAck(1))
    assert not protocol.is_overdue(10)


def test_a_plain_socket_gets_a_repeat_once() -> None:
    """Plain: a repeat is not sent again, and is acknowledged like any other."""
    consumer = RecordingConsumer()
    protocol = Plain(cast(Consumer, consumer), node_envelope=False, remembered=1_024)
    first, second = delivery(1, "a"), delivery(2, "a")
    assert protocol.encode(first) == (b"{}", False)
    assert protocol.encode(second) is None
    protocol.written([first, second])
    assert consumer.acked == [1, 2]


@pytest.mark.parametrize("kind", [Plain, V1])
def test_one_message_id_for_many_messages_of_another_program_is_no_repeat(kind: type[Plain]) -> None:
    """What comes from a program that always sets the same message id is all sent, also what comes again."""
    protocol = kind(cast(Consumer, RecordingConsumer()), node_envelope=False, remembered=1_024)
    for tag in range(1, 7):
        foreign = Delivery("inbox", tag, tag > 3, b"{}", ulid("same"), False, False, None)
        assert protocol.encode(foreign) is not None


@pytest.mark.parametrize("kind", [Plain, V1])
def test_a_message_is_known_by_what_follows_the_time_in_its_id(kind: type[Plain]) -> None:
    """Two ids of a relay's name one message when their last 16 characters agree."""
    protocol = kind(cast(Consumer, RecordingConsumer()), node_envelope=False, remembered=1_024)
    for tag, (mid, is_new) in enumerate(
        [(ulid("a"), True), (ulid("a", "01M9999999"), False), (ulid("b"), True), (ulid("a"), False)]
    ):
        made = protocol.encode(Delivery("inbox", tag, False, b"{}", mid, False, True, None))
        assert (made is not None) is is_new


def test_what_is_remembered() -> None:
    """At least `remembered` messages of the last hour are known when they come again, at most twice as many."""
    now = 0.0
    protocol = Plain(cast(Consumer, RecordingConsumer()), node_envelope=False, remembered=2_000, clock=lambda: now)
    for tag in range(7_000):
        assert protocol.encode(delivery(tag, str(tag))) is not None
        if tag >= 2_000:
            assert protocol.encode(delivery(tag, str(tag - 1_999))) is None
    assert protocol.encode(delivery(1, str(2_999))) is not None
    now += 4_000  # whatever comes again comes before what is new
    assert [protocol.encode(delivery(tag, str(tag))) for tag in range(5_001, 7_000)] == [None] * 1_999
    assert protocol.encode(delivery(1, "new")) is not None
    assert protocol.encode(delivery(1, "6999")) is None
    now += 4_000
    assert protocol.encode(delivery(1, "newer")) is not None
    assert protocol.encode(delivery(1, "6999")) is not None


def test_who_has_stood_by_remembers_more_and_longer() -> None:
    """What a live queue brought, the inbox may repeat long after: 10,000 messages are known for ever."""
    now = 0.0
    consumer = RecordingConsumer()
    consumer.has_stood_by = True
    protocol = Plain(cast(Consumer, consumer), node_envelope=False, remembered=2_000, clock=lambda: now)
    for tag in range(9_999):
        now += 10
        assert protocol.encode(delivery(tag, str(tag))) is not None
    assert protocol.encode(delivery(1, "0")) is None


@pytest.mark.parametrize(("queue", "expected"), [(1, 1_024), (1_000, 2_000), (5_000, 10_000), (100_000, 20_000)])
def test_how_many_are_remembered_follows_what_may_be_published_again(queue: int, expected: int) -> None:
    """Twice what one relay may publish again, within bounds."""
    assert remembered(queue) == expected


def test_what_another_program_sent_over_a_lost_channel_is_forgotten() -> None:
    """imrelay.v1: such a message comes again with a number of its own, and what came before takes no memory."""
    consumer = RecordingConsumer()
    protocol = V1(cast(Consumer, consumer), node_envelope=False, remembered=1_024)
    for number in range(3):
        channel = object()
        for tag in (1, 2):
            foreign = Delivery("inbox", tag, number > 0, b"{}", "same", False, False, None)
            foreign.channel = channel
            assert protocol.encode(foreign) is not None
    protocol.control(ClientAck(6))
    assert consumer.acked == [1, 2]


def test_no_body_is_held_once_it_was_written() -> None:
    """imrelay.v1: of a message that waits for its acknowledgement only what is needed for that stays here."""
    protocol = V1(cast(Consumer, RecordingConsumer()), node_envelope=False, remembered=1_024)
    deliveries = [
        Delivery("inbox", tag, False, b"%061440d" % tag, ulid(str(tag)), False, True, None) for tag in range(100)
    ]
    assert sum(len((protocol.encode(one) or (b"", False))[0]) for one in deliveries) > 100 * 61_440
    assert sum(len(one.body) for one in deliveries) == 0
    assert bytes_within(protocol) < 200_000


def bytes_within(root: object) -> int:
    """Return the size of all that an object leads to, each counted once, without code."""
    seen: set[int] = set()
    waiting: list[object] = [root]
    total = 0
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(found))
        total += sys.getsizeof(found)
        waiting += gc.get_referents(found)
    return total
