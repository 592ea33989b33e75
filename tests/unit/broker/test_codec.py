"""The codec for AMQP frames agrees with pika's, and leaves alone the frames that it does not know."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import frame, spec

from imrelay.broker.codec import Confirm, Delivery, PublishTemplate, encode_ack, read_header, take

BODY_MAX = 131_064
short_strings = st.text(max_size=60).filter(lambda text: len(text.encode()) <= 255)
tags = st.integers(0, 2**64 - 1)
channels = st.integers(1, 65_535)


def pika_publish(
    channel: int, key: str, mid: str, binary: bool, body: bytes, persistent: bool, size: int
) -> bytes:
    """Return what pika writes for the publish of a relay."""
    properties = spec.BasicProperties(
        content_type="application/json",
        delivery_mode=2 if persistent else 1,
        message_id=mid,
        type="binary" if binary else "text",
        app_id="imrelay",
    )
    method = spec.Basic.Publish(exchange="direct_message", routing_key=key, mandatory=True)
    pieces = [frame.Method(channel, method).marshal(), frame.Header(channel, len(body), properties).marshal()]
    pieces += [frame.Body(channel, body[at : at + size]).marshal() for at in range(0, len(body), size)]
    return b"".join(pieces)


def pika_delivery(
    body: bytes, properties: spec.BasicProperties, *, channel: int = 5, tag: int = 8, redelivered: bool = False
) -> bytes:
    """Return what a broker writes for a delivery."""
    method = spec.Basic.Deliver("inbox", tag, redelivered, "direct_message", "ben")
    pieces = [frame.Method(channel, method).marshal(), frame.Header(channel, len(body), properties).marshal()]
    if body:
        pieces.append(frame.Body(channel, body).marshal())
    return b"".join(pieces)


OURS = spec.BasicProperties(
    content_type="application/json", delivery_mode=2, message_id="01M84", type="text", app_id="imrelay"
)


@given(channels, short_strings, short_strings, st.booleans(), st.binary(max_size=300), st.booleans())
def test_a_publish_is_written_as_pika_writes_it(
    channel: int, key: str, mid: str, binary: bool, body: bytes, persistent: bool
) -> None:
    """A publish has the very bytes that pika would send, over as many body frames."""
    template = PublishTemplate(channel, "direct_message", persistent=persistent, body_max=100)
    written = template.encode_method(key) + template.encode_content(mid, binary, body)
    assert written == pika_publish(channel, key, mid, binary, body, persistent, 100)


@pytest.mark.parametrize(("key", "mid"), [("k" * 256, "m"), ("k", "ü" * 128)])
def test_what_amqp_has_no_room_for_is_refused(key: str, mid: str) -> None:
    """A routing key or a message id of over 255 bytes raises ValueError instead of breaking the connection."""
    template = PublishTemplate(1, "direct_message", persistent=True, body_max=BODY_MAX)
    with pytest.raises(ValueError, match="255"):
        template.encode_method(key) + template.encode_content(mid, False, b"{}")


@given(channels, tags, st.booleans())
def test_an_acknowledgement_is_written_as_pika_writes_it(channel: int, tag: int, multiple: bool) -> None:
    """A basic.ack has the very bytes that pika would send."""
    assert encode_ack(channel, tag, multiple) == frame.Method(channel, spec.Basic.Ack(tag, multiple)).marshal()


@given(channels, tags, st.booleans(), st.binary(max_size=200))
def test_a_confirm_is_read_as_pika_reads_it(channel: int, tag: int, multiple: bool, after: bytes) -> None:
    """A basic.ack of the broker's is taken whole, whatever follows it."""
    octets = frame.Method(channel, spec.Basic.Ack(tag, multiple)).marshal()
    taken = take(b"zz" + octets + after, 2, BODY_MAX)
    assert taken is not None
    what, number, end = taken
    assert isinstance(what, Confirm)
    assert (what.tag, what.multiple, number, end) == (tag, multiple, channel, 2 + len(octets))


@given(
    st.binary(max_size=300),
    channels,
    tags,
    st.booleans(),
    st.one_of(st.none(), short_strings),
    st.one_of(st.none(), st.sampled_from(["text", "binary", "other"])),
    st.one_of(st.none(), st.sampled_from(["imrelay", "cron"])),
    st.one_of(st.none(), st.just("application/json")),
    st.one_of(st.none(), st.integers(0, 2**40)),
    st.one_of(st.none(), st.dictionaries(st.sampled_from("abc"), st.integers(0, 9), max_size=2)),
)
def test_a_delivery_is_read_as_pika_reads_it(
    body: bytes,
    channel: int,
    tag: int,
    redelivered: bool,
    mid: str | None,
    kind: str | None,
    app_id: str | None,
    content_type: str | None,
    stamp: int | None,
    headers: dict[str, int] | None,
) -> None:
    """Whatever properties a program has set, a delivery says what was published."""
    properties = spec.BasicProperties(
        content_type=content_type,
        delivery_mode=1,
        headers=headers,
        message_id=mid,
        type=kind,
        app_id=app_id,
        timestamp=stamp,
    )
    octets = pika_delivery(body, properties, channel=channel, tag=tag, redelivered=redelivered)
    taken = take(octets + b"rest", 0, BODY_MAX)
    assert taken is not None
    what, number, end = taken
    assert isinstance(what, Delivery)
    assert (number, end, what.consumer_tag) == (channel, len(octets), "inbox")
    assert (what.body, what.tag, what.redelivered) == (body, tag, redelivered)
    assert (what.mid, what.binary, what.is_own) == (mid, kind == "binary", app_id == "imrelay")
    assert what.time_ms == (None if stamp is None else stamp * 1000)


def test_headers_that_pika_cannot_read_are_stepped_over() -> None:
    """A header with a date in the year 55,840, for which pika's codec raises, hides nothing behind it."""
    stamp = datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc)
    properties = spec.BasicProperties(headers={"when": stamp}, message_id="m", type="text", app_id="cron")
    seconds, milliseconds = (number.to_bytes(8, "big") for number in (1_700_000_000, 1_700_000_000_000))
    octets = pika_delivery(b"hello", properties).replace(seconds, milliseconds)
    assert milliseconds in octets
    taken = take(octets, 0, BODY_MAX)
    assert taken is not None
    assert isinstance(taken[0], Delivery)
    assert (taken[0].mid, taken[0].binary, taken[0].body) == ("m", False, b"hello")
    header = read_header(octets, octets.index(b"\xce\x02") + 1)
    assert (header.properties.message_id, header.properties.app_id, header.body_size) == ("m", "cron", 5)


def test_a_message_id_that_is_not_utf8_becomes_text() -> None:
    """Whatever octets another program has set, a message id is text."""
    octets = pika_delivery(b"hello", spec.BasicProperties(message_id="mmm")).replace(b"mmm", b"m\xffm")
    taken = take(octets, 0, BODY_MAX)
    assert taken is not None
    assert isinstance(taken[0], Delivery)
    assert taken[0].mid == "m\ufffdm"


@pytest.mark.parametrize("octets", [pika_delivery(b"hello", OURS), frame.Method(1, spec.Basic.Ack(9)).marshal()])
def test_a_part_is_left_until_the_rest_is_there(octets: bytes) -> None:
    """However a frame is cut, nothing is taken before its end has come, and nothing of it is lost."""
    for cut in range(len(octets)):
        taken = take(octets[:cut], 0, BODY_MAX)
        assert taken is None or (taken[0], taken[2]) == (None, 0)


@pytest.mark.parametrize(
    "octets",
    [
        frame.Heartbeat().marshal(),
        frame.Method(3, spec.Basic.Return(312, "NO_ROUTE", "direct_message", "nobody")).marshal(),
        frame.Method(3, spec.Basic.Nack(4)).marshal(),
        frame.Method(0, spec.Connection.Blocked("memory")).marshal(),
        frame.Method(3, spec.Queue.DeclareOk("q", 1, 2)).marshal(),
        frame.Header(3, 5, spec.BasicProperties()).marshal(),
    ],
)
def test_other_frames_are_left_alone(octets: bytes) -> None:
    """A frame that is neither a delivery nor a confirm is not touched."""
    assert take(octets + b"rest of the buffer", 0, BODY_MAX) is None


def test_a_message_of_several_frames_is_left_alone() -> None:
    """A body that is larger than one frame is put together elsewhere: see test_inbound."""
    assert take(pika_delivery(b"x" * 101, OURS), 0, 100) is None


@settings(max_examples=2000)
@given(st.data())
def test_broken_frames_are_left_alone(data: st.DataObject) -> None:
    """Whatever octet is wrong, the short way raises nothing and takes no more than is there."""
    octets = bytearray(pika_delivery(b"hello", OURS) + frame.Method(1, spec.Basic.Ack(9)).marshal())
    at = data.draw(st.integers(0, len(octets) - 1))
    octets[at] = data.draw(st.integers(0, 255))
    taken = take(bytes(octets), 0, BODY_MAX)
    assert taken is None or taken[2] <= len(octets)
