"""The frames of the hot path, read from and written to bytes in one step each (AMQP 0-9-1, 2.3.5 and 4.2).

pika decodes a delivery as three frames, with objects and callbacks for each, which would take most of the time of
every message. Here a whole `basic.deliver` (method, header and body) and a `basic.ack` of the broker's come
out of the receive buffer in one step, and a publish or an acknowledgement is packed into a prepared template.
Whatever else arrives, and a message of several body frames, is read frame by frame: `take` returns None for it.

    frame     type (1)  channel (2)  size (4)  payload (size)  0xCE
    deliver   60 60  consumer tag  delivery tag (8)  redelivered (1)  exchange  routing key
    header    60 0   body size (8)  property flags (2)  properties
"""

from __future__ import annotations

import struct

from pika import frame, spec
from pika.amqp_object import Method
from pika.exceptions import InvalidFrameError

__all__ = [
    "Confirm",
    "Delivery",
    "PublishTemplate",
    "encode_ack",
    "encode_message",
    "encode_method",
    "read_body",
    "read_header",
    "read_method",
    "read_properties",
    "take",
]

_END = 0xCE
_METHOD, _HEADER, _BODY = 1, 2, 3
#: Class in the upper half, method in the lower.
_DELIVER, _ACK, _PUBLISH = 60 << 16 | 60, 60 << 16 | 80, 60 << 16 | 40
_BASIC = 60
#: type, channel, size of the payload, class and method
_METHOD_START = struct.Struct(">BHII")
#: delivery tag, redelivered or multiple
_TAG_AND_BIT = struct.Struct(">QB")
#: type, channel, size of the payload, class, weight, body size, property flags
_HEADER_START = struct.Struct(">BHIHHQH")
#: The same up to the body size, class and weight in one
_CONTENT_START = struct.Struct(">BHIIQ")
_BODY_START = struct.Struct(">BHI")
_ACK_FRAME = struct.Struct(">BHIIQBB")
#: Frame overhead: 7 bytes before the payload, one after it.
_BEFORE, _AROUND = 7, 8
#: The smallest payload of a content header, in bytes.
_HEADER_MIN = _HEADER_START.size - _BEFORE


def _short(text: str) -> bytes:
    """Return a short string (4.2.5.3); raises `ValueError` over 255 bytes, or `UnicodeEncodeError`."""
    octets = text.encode()
    if len(octets) > 255:
        raise ValueError(f"an AMQP short string has at most 255 bytes, this one {len(octets)}")
    return bytes((len(octets),)) + octets


_OCTETS = [bytes((number,)) for number in range(256)]

#: The property flags of a relay's messages: content_type, delivery_mode, message_id, type, app_id.
_OUR_FLAGS = 1 << 15 | 1 << 12 | 1 << 7 | 1 << 5 | 1 << 3
_APP_ID = "imrelay"
_CONTENT_TYPE = _short("application/json")
_MID_SIZE = 26
#: The parts of a relay's header before the octet of delivery_mode, and after the message id of a text.
_BEFORE_MID = _OUR_FLAGS.to_bytes(2, "big") + _CONTENT_TYPE
_AFTER_TEXT_MID = _short("text") + _short(_APP_ID) + bytes((_END,))
#: The header of a relay's text: type, size of the payload, body size, `_BEFORE_MID`, size of the message id,
#: message id, `_AFTER_TEXT_MID`. The first three are there in each header.
_OUR_HEADER = struct.Struct(f">B2xI4xQ{len(_BEFORE_MID)}sxB{_MID_SIZE}s{len(_AFTER_TEXT_MID)}s")


class Delivery:
    """A message from the broker that waits to be taken (`basic.deliver`)."""

    __slots__ = (
        "binary", "body", "channel", "consumer_tag", "is_own", "mid", "redelivered", "tag", "time_ms"
    )  # fmt: skip

    def __init__(
        self,
        consumer_tag: str,
        tag: int,
        redelivered: bool,
        body: bytes,
        mid: str | None,
        binary: bool,
        is_own: bool,
        time_ms: int | None,
    ) -> None:
        self.consumer_tag = consumer_tag
        self.tag = tag
        #: Whether the broker has delivered it before, to anybody.
        self.redelivered = redelivered
        self.body = body
        #: The AMQP property `message_id`.
        self.mid = mid
        #: Whether the AMQP property `type` says that it came in a binary frame.
        self.binary = binary
        #: Whether a relay published it (`app_id`): its body is a message, its `message_id` tells repeats.
        self.is_own = is_own
        #: The AMQP property `timestamp`, in milliseconds since 1970; other programs may set it.
        self.time_ms = time_ms
        #: The channel that it came over; set by the subscription.
        self.channel: object = None

    @classmethod
    def from_properties(
        cls, consumer_tag: str, tag: int, redelivered: bool, properties: spec.BasicProperties, body: bytes
    ) -> Delivery:
        """Make one from any properties."""
        stamp = properties.timestamp
        return cls(
            consumer_tag,
            tag,
            redelivered,
            body,
            properties.message_id,
            properties.type == "binary",
            properties.app_id == _APP_ID,
            None if stamp is None else int(stamp) * 1000,
        )


class Confirm:
    """The broker's `basic.ack` on a channel with publisher confirms."""

    __slots__ = ("multiple", "tag")

    def __init__(self, tag: int, multiple: bool) -> None:
        self.tag = tag
        self.multiple = multiple


def take(buffer: bytes, start: int, body_max: int) -> tuple[Delivery | Confirm | None, int, int] | None:
    """Take the delivery or the confirm that begins at `start` out of the buffer.

    Returns (what it is, its channel, where the next frame begins); with None for "what" while the rest of it has
    not arrived. Returns None where it is anything else, or a message of several body frames. `body_max` is the
    largest payload of a body frame on this connection.
    """
    end = len(buffer)
    if end - start < _METHOD_START.size:
        return None
    kind, channel, size, method = _METHOD_START.unpack_from(buffer, start)
    if kind != _METHOD:
        return None
    if method == _ACK:
        return _take_confirm(buffer, start, channel)
    if method != _DELIVER or size > body_max:
        return None
    header = start + size + _AROUND
    before, mid, mid_size, behind = b"", b"", 0, b""
    if end - header >= _OUR_HEADER.size:  # most are a relay's texts: all of their header is read in one step
        kind, header_size, body_size, before, mid_size, mid, behind = _OUR_HEADER.unpack_from(buffer, header)
    elif end - header >= _HEADER_START.size:
        kind, _, header_size, _, _, body_size, _ = _HEADER_START.unpack_from(buffer, header)
    else:
        return None if end > header and buffer[header] != _HEADER else (None, channel, start)
    if kind != _HEADER or body_size > body_max or not _HEADER_MIN <= header_size <= body_max:
        return None
    body = header + header_size + _AROUND
    after = body + body_size + _AROUND if body_size else body
    if end < after:
        return None, channel, start
    if body_size:
        kind, _, size = _BODY_START.unpack_from(buffer, body)
        if kind != _BODY or size != body_size:
            return None
    if not buffer[header - 1] == buffer[body - 1] == buffer[after - 1] == _END:
        return None
    deliver = _read_deliver(buffer, start, header)
    if deliver is None:
        return None
    consumer_tag, tag, redelivered = deliver
    content = buffer[body + _BEFORE : after - 1] if body_size else b""
    if behind == _AFTER_TEXT_MID and before == _BEFORE_MID and mid_size == _MID_SIZE and mid.isascii():
        return Delivery(consumer_tag, tag, redelivered, content, mid.decode(), False, True, None), channel, after
    properties = read_header(buffer, header).properties
    return Delivery.from_properties(consumer_tag, tag, redelivered, properties, content), channel, after


def _read_deliver(buffer: bytes, start: int, after: int) -> tuple[str, int, bool] | None:
    """Return consumer tag, delivery tag and "redelivered" of a method frame; None where they are not in it.

    Exchange and routing key are not read: other programs may have put any octets there.
    """
    tag_start = start + _METHOD_START.size + 1
    tag_end = tag_start + buffer[tag_start - 1]
    if tag_end + _TAG_AND_BIT.size >= after:
        return None
    tag, redelivered = _TAG_AND_BIT.unpack_from(buffer, tag_end)
    return buffer[tag_start:tag_end].decode("utf-8", "replace"), tag, redelivered != 0


def _take_confirm(buffer: bytes, start: int, channel: int) -> tuple[Confirm | None, int, int] | None:
    end = start + _ACK_FRAME.size
    if len(buffer) < end:
        return None, channel, start
    tag, multiple = _TAG_AND_BIT.unpack_from(buffer, start + _METHOD_START.size)
    return (Confirm(tag, multiple != 0), channel, end) if buffer[end - 1] == _END else None


#: The properties in their order on the wire, from flag 15 down: octets; 0: a short string; None: a table.
_IN_ORDER = (
    ("content_type", 0),
    ("content_encoding", 0),
    ("headers", None),
    ("delivery_mode", 1),
    ("priority", 1),
    ("correlation_id", 0),
    ("reply_to", 0),
    ("expiration", 0),
    ("message_id", 0),
    ("timestamp", 8),
    ("type", 0),
    ("user_id", 0),
    ("app_id", 0),
)


def read_properties(flags: int, octets: bytes) -> spec.BasicProperties:
    """Read the properties that any program may have set, but step over its headers; raises nothing.

    pika's codec raises for what others write, such as a header with a timestamp in milliseconds, and what is
    raised ends the connection of all. A string that is not UTF-8 is read with replacement characters.
    """
    found = spec.BasicProperties()
    at, flag = 0, 1 << 15
    for name, size in _IN_ORDER:
        if flags & flag:
            if size is None:
                at += 4 + int.from_bytes(octets[at : at + 4], "big")
            elif size:
                setattr(found, name, int.from_bytes(octets[at : at + size], "big"))
                at += size
            else:
                end = at + 1 + (octets[at] if at < len(octets) else 0)
                setattr(found, name, octets[at + 1 : end].decode(errors="replace"))
                at = end
        flag >>= 1
    return found


def read_method(buffer: bytes, start: int, after: int) -> Method:
    """Read the method frame from `start` to `after`, by pika's codec unless it is a `basic.deliver`.

    Raises `InvalidFrameError` where it is none.
    """
    if int.from_bytes(buffer[start + _BEFORE : start + _METHOD_START.size], "big") == _DELIVER:
        deliver = _read_deliver(buffer, start, after)
        if deliver is None or buffer[after - 1] != _END:
            raise InvalidFrameError("a basic.deliver without its end")
        return spec.Basic.Deliver(*deliver)
    return frame.decode_frame(buffer[start:after])[1].method


def read_header(buffer: bytes, start: int) -> frame.Header:
    """Read the content header frame at `start` as pika does, but with `read_properties`."""
    _, channel, size, _, _, body_size, flags = _HEADER_START.unpack_from(buffer, start)
    if size < _HEADER_MIN or buffer[start + _BEFORE + size] != _END:
        raise InvalidFrameError("a content header without its end")
    octets = buffer[start + _HEADER_START.size : start + _BEFORE + size]
    return frame.Header(channel, body_size, read_properties(flags, octets))


def read_body(buffer: bytes, start: int, after: int) -> bytes:
    """Return the payload of the body frame from `start` to `after`; raises `InvalidFrameError`."""
    if buffer[after - 1] != _END:
        raise InvalidFrameError("a body frame without its end")
    return buffer[start + _BEFORE : after - 1]


def encode_ack(channel: int, tag: int, multiple: bool) -> bytes:
    """Return a `basic.ack` frame."""
    return _ACK_FRAME.pack(_METHOD, channel, 13, _ACK, tag, multiple, _END)


def encode_method(channel: int, *methods: Method) -> bytes:
    """Return the frames of methods, one after the other."""
    return b"".join([frame.Method(channel, method).marshal() for method in methods])


def encode_message(
    channel: int, method: spec.Basic.Publish, properties: spec.BasicProperties, body: bytes, body_max: int
) -> bytes:
    """Return the frames of a publish with any properties; `body_max`: the largest payload of a body frame."""
    frames = [frame.Method(channel, method), frame.Header(channel, len(body), properties)]
    frames += [frame.Body(channel, body[at : at + body_max]) for at in range(0, len(body), body_max)]
    return b"".join([one.marshal() for one in frames])


class PublishTemplate:
    """The parts of a publish that are the same for every message of a channel.

    `body_max` is the largest payload of a body frame on this connection.
    """

    __slots__ = ("_after_mid", "_around_mid", "_before_key", "_before_mid", "_body_max", "_channel")

    def __init__(self, channel: int, exchange: str, *, persistent: bool, body_max: int) -> None:
        self._channel = channel
        self._body_max = body_max
        self._before_key = struct.pack(">IH", _PUBLISH, 0) + _short(exchange)
        self._before_mid = _BEFORE_MID + bytes((2 if persistent else 1,))
        self._after_mid = {
            binary: _short("binary" if binary else "text") + _short(_APP_ID) + bytes((_END,))
            for binary in (False, True)
        }
        #: Size of a header's payload without the message id itself.
        self._around_mid = {
            binary: 12 + len(self._before_mid) + len(after_mid) for binary, after_mid in self._after_mid.items()
        }

    def encode_method(self, key: str) -> bytes:
        """Return the method frame of a mandatory publish: the same for all messages with this routing key.

        Raises `ValueError` for a key that AMQP has no room for.
        """
        method = self._before_key + _short(key)
        # the bits, of which mandatory is the first, and the end of the frame
        return _BODY_START.pack(_METHOD, self._channel, len(method) + 1) + method + b"\x01\xce"

    def encode_content(self, mid: str, binary: bool, body: bytes) -> bytes:
        """Return the header and body frames that follow. Raises `ValueError` for such a message id."""
        size, octets, before_mid, after_mid = len(body), mid.encode(), self._before_mid, self._after_mid[binary]
        size_of_mid = len(octets)
        if size_of_mid > 255:
            _short(mid)  # raises
        header_size = self._around_mid[binary] + size_of_mid
        header = _CONTENT_START.pack(_HEADER, self._channel, header_size, _BASIC << 16, size)
        if 0 < size <= self._body_max:
            body_start = _BODY_START.pack(_BODY, self._channel, size)
            before_mid = self._before_mid
            return b"".join(
                (header, before_mid, _OCTETS[size_of_mid], octets, after_mid, body_start, body, b"\xce")
            )
        pieces = [header, self._before_mid, _OCTETS[size_of_mid], octets, after_mid]
        for at in range(0, size, self._body_max):
            part = body[at : at + self._body_max]
            pieces += (_BODY_START.pack(_BODY, self._channel, len(part)), part, b"\xce")
        return b"".join(pieces)
