"""However the bytes of a connection are split, each channel gets its frames, whole and in order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec
from pika.amqp_object import Method
from pika.exceptions import InvalidFrameError

from imrelay.broker.inbound import Inbound

FRAME_MAX = 4_096
BODY_MAX = FRAME_MAX - 8


class Events:
    """A channel that remembers what it was given."""

    def __init__(self, seen: list[tuple[Any, ...]], number: int, *, takes_deliveries: bool = True) -> None:
        self._seen = seen
        self._number = number
        self.on_delivery = self._on_delivery if takes_deliveries else None
        self.on_confirm = lambda tag, multiple, accepted: seen.append((number, "confirm", tag, multiple))

    def _on_delivery(self, taken: Any) -> None:
        self._seen.append((self._number, "deliver", taken.tag, taken.mid, taken.body))

    def receive_method(self, method: Method) -> None:
        """Remember a method."""
        self._seen.append((self._number, method.NAME))

    def receive_content(self, method: Method, properties: spec.BasicProperties, body: bytes) -> None:
        """Remember a message."""
        tag = getattr(method, "delivery_tag", 0)
        self._seen.append((self._number, method.NAME, tag, properties.message_id, body))


def message(channel: int, method: Any, mid: str, body: bytes) -> list[bytes]:
    """Return the frames of a message."""
    parts = [body[at : at + BODY_MAX] for at in range(0, len(body), BODY_MAX)]
    properties = spec.BasicProperties(message_id=mid, app_id="imrelay", headers={"a": "b"})
    frames = [frame.Method(channel, method), frame.Header(channel, len(body), properties)]
    return [one.marshal() for one in frames] + [frame.Body(channel, part).marshal() for part in parts]


def encode(kind: str, channel: int, number: int, size: int) -> tuple[list[bytes], tuple[Any, ...]]:
    """Return the frames of one thing that a broker sends, and what its channel has to be given."""
    body = bytes([number % 256]) * size
    if kind == "deliver":
        method = spec.Basic.Deliver("inbox", number, False, "direct_message", "ben")
        return message(channel, method, f"m{number}", body), (channel, kind, number, f"m{number}", body)
    if kind == "return":
        method = spec.Basic.Return(312, "NO_ROUTE", "direct_message", "nobody")
        frames = message(channel, method, f"m{number}", body)
        return frames, (channel, "Basic.Return", 0, f"m{number}", body)
    if kind == "confirm":
        return [frame.Method(channel, spec.Basic.Ack(number)).marshal()], (channel, kind, number, False)
    if kind == "heartbeat":
        return [frame.Heartbeat().marshal()], (0, frame.Heartbeat().marshal())
    return [frame.Method(channel, spec.Channel.OpenOk()).marshal()], (channel, "Channel.OpenOk")


things = st.tuples(
    st.sampled_from(["deliver", "return", "confirm", "heartbeat", "open-ok"]),
    st.integers(1, 3),
    st.one_of(st.just(0), st.integers(1, 200), st.integers(BODY_MAX - 2, 3 * BODY_MAX)),
)


@given(st.lists(things, max_size=8), st.lists(st.integers(1, 5_000), min_size=1, max_size=20))
def test_what_arrives_in_pieces_is_what_was_sent(sent: list[tuple[str, int, int]], cuts: list[int]) -> None:
    """Deliveries, returns, confirms and methods of three channels arrive once each and in order."""
    octets, expected = b"", []
    for number, (kind, channel, size) in enumerate(sent):
        frames, event = encode(kind, channel, number, size)
        octets += b"".join(frames)
        expected.append(event)
    seen: list[tuple[Any, ...]] = []
    channels = {number: Events(seen, number) for number in (1, 2, 3)}
    inbound = Inbound(channels, lambda data: seen.append((0, data)))
    inbound.frame_max = FRAME_MAX
    at = number = 0
    while at < len(octets):
        inbound.feed(octets[at : (at := at + cuts[number % len(cuts)])])
        number += 1
    assert seen == expected


def test_messages_of_several_channels_may_be_interleaved() -> None:
    """The frames of one message keep together on their channel alone."""
    one, expected_one = encode("deliver", 1, 1, 3 * BODY_MAX)
    two, expected_two = encode("return", 2, 2, 2 * BODY_MAX)
    seen: list[tuple[Any, ...]] = []
    inbound = Inbound({1: Events(seen, 1), 2: Events(seen, 2)}, lambda data: None)
    inbound.frame_max = FRAME_MAX
    for pair in zip(one, [*two, b""], strict=True):
        inbound.feed(b"".join(pair))
    assert seen == [expected_two, expected_one]


@pytest.mark.parametrize("size", [0, 5, 2 * BODY_MAX])
def test_a_channel_without_on_delivery_gets_all_properties(size: int) -> None:
    """A channel for messages of any kind gets the properties as they were set."""
    frames, _ = encode("deliver", 1, 7, size)
    seen: list[tuple[Any, ...]] = []
    inbound = Inbound({1: Events(seen, 1, takes_deliveries=False)}, lambda data: None)
    inbound.frame_max = FRAME_MAX
    inbound.feed(b"".join(frames))
    assert seen == [(1, "Basic.Deliver", 7, "m7", b"\x07" * size)]


def test_what_is_for_a_channel_that_has_ended_is_dropped() -> None:
    """Late frames hinder nobody, and the rest of a message whose channel ends in its middle means nothing."""
    seen: list[tuple[Any, ...]] = []
    channels = {1: Events(seen, 1), 2: Events(seen, 2)}
    inbound = Inbound(channels, lambda data: None)
    inbound.frame_max = FRAME_MAX
    frames, _ = encode("deliver", 1, 1, 3 * BODY_MAX)
    for one in frames[:3]:
        inbound.feed(one)
    del channels[1]
    for one in frames[3:]:
        inbound.feed(one)
    for kind in ("deliver", "return", "confirm", "open-ok"):
        inbound.feed(b"".join(encode(kind, 1, 2, 5)[0]))
    channels[1] = Events(seen, 1)
    inbound.feed(b"".join(encode("deliver", 1, 3, 5)[0] + encode("confirm", 2, 4, 0)[0]))
    assert [event[:3] for event in seen] == [(1, "deliver", 3), (2, "confirm", 4)]


@pytest.mark.parametrize(
    "octets",
    [
        b"HTTP",
        b"AMQP\x00\x01\x00\x00",
        b"\x01\x00\x01\x00\x01\x00\x00",
        frame.Method(1, spec.Channel.OpenOk()).marshal()[:-1] + b"\x00",
        frame.Header(1, 5, spec.BasicProperties()).marshal()[:-1] + b"\x00",
        frame.Method(1, spec.Basic.Deliver("t" * 40, 1, False, "", "")).marshal()[:30] + b"\x00" * 200,
    ],
    ids=["text", "version", "size", "method", "header", "deliver"],
)
def test_what_is_no_frame_is_an_error(octets: bytes) -> None:
    """Another protocol, a frame over the limit, and one without its end: nothing more is waited for."""
    inbound = Inbound({1: Events([], 1)}, lambda data: None)
    inbound.frame_max = FRAME_MAX
    with pytest.raises(InvalidFrameError):
        inbound.feed(octets)
