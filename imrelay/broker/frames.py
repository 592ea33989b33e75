"""The frames of the hot path, read from and written to bytes in one step each (AMQP 0-9-1, 2.3.5 and 4.2).

pika decodes a delivery as three frames, through objects and callbacks for each; on the way of every message that
is most of its cost. Here a whole `basic.deliver` (method, header and body) and a `basic.ack` of the broker's come
out of the receive buffer at once, and a publish or an acknowledgement is packed from what is the same every time.
Whatever else arrives, or is not the common shape, is left to pika: `take` then says None.

    frame     type (1)  channel (2)  size (4)  payload (size)  0xCE
    deliver   60 60  consumer tag  delivery tag (8)  redelivered (1)  exchange  routing key
    header    60 0   body size (8)  property flags (2)  properties
"""

from __future__ import annotations

import struct

from pika import frame, spec

__all__ = ["Confirm", "Delivery", "PublishTemplate", "encode_ack", "read_header", "read_properties", "take"]

_END = 0xCE
_METHOD, _HEADER, _BODY = 1, 2, 3
#: type, channel, size of the payload, class, method
_METHOD_START = struct.Struct(">BHIHH")
#: delivery tag, redelivered or multiple
_TAG_AND_BIT = struct.Struct(">QB")
#: type, channel, size of the payload, class, weight, body size, property flags
_HEADER_START = struct.Struct(">BHIHHQH")
_BODY_START = struct.Struct(">BHI")
_ACK_FRAME = struct.Struct(">BHIHHQBB")

_BASIC, _DELIVER, _ACK, _PUBLISH = 60, 60, 80, 40
#: The properties that a relay sets, and no others: content_type, delivery_mode, message_id, type, app_id.
_OUR_FLAGS = 1 << 15 | 1 << 12 | 1 << 7 | 1 << 5 | 1 << 3
#: Frame overhead: 7 bytes before the payload, one after it.
_BEFORE, _AROUND = 7, 8


class Delivery:
    """A message from the broker that waits to be taken (`basic.deliver`)."""

    __slots__ = (
        "body", "channel", "consumer_tag", "is_own", "may_repeat", "mid", "redelivered", "tag", "time_ms", "type"
    )  # fmt: skip

    def __init__(
        self,
        consumer_tag: str,
        tag: int,
        redelivered: bool,
        body: bytes,
        *,
        mid: str | None,
        kind: str | None,
        app_id: str | None,
        time_ms: int | None = None,
    ) -> None:
        self.consumer_tag = consumer_tag
        self.tag = tag
        #: Whether the broker has delivered it before, to anybody.
        self.redelivered = redelivered
        self.body = body
        #: The AMQP property `message_id`; without it there is no repeat detection.
        self.mid = mid
        #: The AMQP property `type`: text, binary, or whatever another program wrote there.
        self.type = kind
        #: The AMQP property `timestamp`, in milliseconds since 1970; other programs may set it.
        self.time_ms = time_ms
        #: Whether a relay published it, so that its body is a message.
        self.is_own = app_id == "imrelay"
        #: Whose delivery it is, and whether it may have been delivered before: for the consumer to set.
        self.channel: object = None
        self.may_repeat = True

    @classmethod
    def from_pika(cls, method: spec.Basic.Deliver, properties: spec.BasicProperties, body: bytes) -> Delivery:
        """Make one of what pika has decoded."""
        stamp = properties.timestamp
        return cls(
            method.consumer_tag,
            method.delivery_tag,
            bool(method.redelivered),
            body,
            mid=properties.message_id,
            kind=properties.type,
            app_id=properties.app_id,
            time_ms=None if stamp is None else int(stamp) * 1000,
        )


class Confirm:
    """The broker's `basic.ack` on a channel with publisher confirms."""

    __slots__ = ("multiple", "tag")

    def __init__(self, tag: int, multiple: bool) -> None:
        self.tag = tag
        self.multiple = multiple


def take(buffer: bytes, start: int, body_max: int) -> tuple[Delivery | Confirm | None, int, int] | None:
    """Take what begins at `start` out of the buffer.

    Returns (what it is, its channel, where the next frame begins); with None for "what" while the rest of it has
    not arrived. Returns None where this is nothing for the hot path. `body_max` is the largest payload of a body
    frame on this connection; a message of several body frames is left to pika.
    """
    if len(buffer) - start < 11:
        return None
    kind, channel, size, class_id, method = _METHOD_START.unpack_from(buffer, start)
    if kind != _METHOD or class_id != _BASIC:
        return None
    if method == _ACK:
        return _take_confirm(buffer, start, channel)
    if method != _DELIVER:
        return None
    header = start + size + _AROUND
    if len(buffer) < header + _HEADER_START.size:
        return None, channel, start
    kind, _, header_size, _, _, body_size, flags = _HEADER_START.unpack_from(buffer, header)
    if kind != _HEADER or body_size > body_max:
        return None
    body = header + header_size + _AROUND
    end = body + body_size + _AROUND if body_size else body
    if len(buffer) < end:
        return None, channel, start
    if body_size and (_BODY_START.unpack_from(buffer, body)[::2] != (_BODY, body_size)):
        return None
    if buffer[header - 1] != _END or buffer[body - 1] != _END or buffer[end - 1] != _END:
        return None
    at = start + 12 + buffer[start + 11]
    if at + _TAG_AND_BIT.size >= header:
        return None
    consumer_tag = buffer[start + 12 : at].decode(errors="replace")
    tag, redelivered = _TAG_AND_BIT.unpack_from(buffer, at)
    content = buffer[body + _BEFORE : end - 1] if body_size else b""
    properties = buffer[header + _HEADER_START.size : body - 1]
    if flags == _OUR_FLAGS:
        delivery = _ours(consumer_tag, tag, redelivered != 0, content, properties)
    else:
        delivery = _theirs(consumer_tag, tag, redelivered != 0, content, flags, properties)
    return None if delivery is None else (delivery, channel, end)


def _take_confirm(buffer: bytes, start: int, channel: int) -> tuple[Confirm | None, int, int] | None:
    end = start + _ACK_FRAME.size
    if len(buffer) < end:
        return None, channel, start
    tag, multiple = _TAG_AND_BIT.unpack_from(buffer, start + _METHOD_START.size)
    return (Confirm(tag, multiple != 0), channel, end) if buffer[end - 1] == _END else None


def _ours(consumer_tag: str, tag: int, redelivered: bool, body: bytes, properties: bytes) -> Delivery | None:
    """Read the properties that a relay sets: four short strings with one octet after the first."""
    try:
        at = 2 + properties[0]
        mid = properties[at + 1 : at + 1 + properties[at]].decode()
        at += 1 + properties[at]
        kind = properties[at + 1 : at + 1 + properties[at]].decode()
        at += 1 + properties[at]
        app_id = properties[at + 1 : at + 1 + properties[at]].decode()
    except (IndexError, UnicodeDecodeError):
        return None
    return Delivery(consumer_tag, tag, redelivered, body, mid=mid, kind=kind, app_id=app_id)


def _theirs(
    consumer_tag: str, tag: int, redelivered: bool, body: bytes, flags: int, properties: bytes
) -> Delivery:
    """Read the properties of another program."""
    method = spec.Basic.Deliver(consumer_tag, tag, redelivered)
    return Delivery.from_pika(method, read_properties(flags, properties), body)


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


def read_header(buffer: bytes, start: int) -> frame.Header:
    """Read the content header frame at `start` as pika does, but with `read_properties`."""
    _, channel, size, _, _, body_size, flags = _HEADER_START.unpack_from(buffer, start)
    octets = buffer[start + _HEADER_START.size : start + _BEFORE + size]
    return frame.Header(channel, body_size, read_properties(flags, octets))


def encode_ack(channel: int, tag: int, multiple: bool) -> bytes:
    """Return a `basic.ack` frame."""
    return _ACK_FRAME.pack(_METHOD, channel, 13, _BASIC, _ACK, tag, multiple, _END)


def _short(text: str) -> bytes:
    """Return a short string (4.2.5.3); raises `ValueError` over 255 bytes, or `UnicodeEncodeError`."""
    octets = text.encode()
    if len(octets) > 255:
        raise ValueError(f"an AMQP short string has at most 255 bytes, this one {len(octets)}")
    return bytes((len(octets),)) + octets


class PublishTemplate:
    """All of a publish that is the same for every message of a channel.

    `body_max` is the largest payload of a body frame on this connection.
    """

    __slots__ = ("_after_mid", "_before_key", "_before_mid", "_body_max", "_channel")

    def __init__(self, channel: int, exchange: str, *, persistent: bool, body_max: int) -> None:
        self._channel = channel
        self._body_max = body_max
        self._before_key = struct.pack(">HHH", _BASIC, _PUBLISH, 0) + _short(exchange)
        self._before_mid = _short("application/json") + bytes((2 if persistent else 1,))
        self._after_mid = {
            binary: _short("binary" if binary else "text") + _short("imrelay") for binary in (False, True)
        }

    def encode(self, key: str, mid: str, binary: bool, body: bytes) -> bytes:
        """Return the frames of one mandatory `basic.publish`: method, header and body.

        Raises `ValueError` for a routing key or a message id that AMQP has no room for.
        """
        channel = self._channel
        method = self._before_key + _short(key)
        properties = self._before_mid + _short(mid) + self._after_mid[binary]
        pieces = [
            _BODY_START.pack(_METHOD, channel, len(method) + 1),
            method,
            b"\x01\xce",  # the bits, of which mandatory is the first, and the end of the frame
            _HEADER_START.pack(_HEADER, channel, 14 + len(properties), _BASIC, 0, len(body), _OUR_FLAGS),
            properties,
            b"\xce",
        ]
        for at in range(0, len(body), self._body_max):
            part = body[at : at + self._body_max]
            pieces += (_BODY_START.pack(_BODY, channel, len(part)), part, b"\xce")
        return b"".join(pieces)
