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


def _short(text: str) -> bytes:
    """Return a short string (4.2.5.3); raises `ValueError` over 255 bytes, or `UnicodeEncodeError`."""
    octets = text.encode()
    if len(octets) > 255:
        raise ValueError(f"an AMQP short string has at most 255 bytes, this one {len(octets)}")
    return bytes((len(octets),)) + octets


_OCTETS = [bytes((number,)) for number in range(256)]

#: The properties that a relay sets, and no others: content_type, delivery_mode, message_id, type, app_id.
_OUR_FLAGS = 1 << 15 | 1 << 12 | 1 << 7 | 1 << 5 | 1 << 3
_APP_ID = "imrelay"
_CONTENT_TYPE = _short("application/json")
_SIZE_OF_MID = 26
#: What of a relay's header stands before the octet of delivery_mode, and what behind the message id of a text.
_BEFORE_MID = _OUR_FLAGS.to_bytes(2, "big") + _CONTENT_TYPE
_AFTER_TEXT_MID = _short("text") + _short(_APP_ID) + bytes((_END,))
#: The header of a relay's text, and the start of the body frame behind it: type, size of the payload, body size,
#: `_BEFORE_MID`, size of the message id, message id, `_AFTER_TEXT_MID`, type, size of the payload.
_OUR_CONTENT = struct.Struct(f">B2xI4xQ{len(_BEFORE_MID)}sxB{_SIZE_OF_MID}s{len(_AFTER_TEXT_MID)}sB2xI")
_OUR_HEADER_SIZE = _OUR_CONTENT.size - _BEFORE - _AROUND


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
        #: Whose delivery it is; for the consumer to set.
        self.channel: object = None

    @classmethod
    def from_pika(cls, method: spec.Basic.Deliver, properties: spec.BasicProperties, body: bytes) -> Delivery:
        """Make one of what pika has decoded."""
        stamp = properties.timestamp
        return cls(
            method.consumer_tag,
            method.delivery_tag,
            bool(method.redelivered),
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
    """Take what begins at `start` out of the buffer.

    Returns (what it is, its channel, where the next frame begins); with None for "what" while the rest of it has
    not arrived. Returns None where this is nothing for the hot path. `body_max` is the largest payload of a body
    frame on this connection; a message of several body frames is left to pika.
    """
    end = len(buffer)
    if end - start < _METHOD_START.size:
        return None
    kind, channel, size, method = _METHOD_START.unpack_from(buffer, start)
    if kind != _METHOD:
        return None
    if method == _ACK:
        return _take_confirm(buffer, start, channel)
    if method != _DELIVER:
        return None
    header = start + size + _AROUND
    if end - header >= _OUR_CONTENT.size:
        kind, header_size, body_size, before, size_of_mid, mid, after, next_kind, next_size = (
            _OUR_CONTENT.unpack_from(buffer, header)
        )
        if after == _AFTER_TEXT_MID and before == _BEFORE_MID and body_size == next_size <= body_max:
            body = header + _OUR_CONTENT.size
            after_body = body + body_size
            at = start + 12 + buffer[start + 11]
            if after_body >= end:
                return None, channel, start
            if (
                kind == _HEADER
                and header_size == _OUR_HEADER_SIZE
                and size_of_mid == len(mid)
                and next_kind == _BODY
                and buffer[header - 1] == buffer[after_body] == _END
                and at + _TAG_AND_BIT.size < header
                and mid.isascii()
            ):
                tag, redelivered = _TAG_AND_BIT.unpack_from(buffer, at)
                return (
                    Delivery(
                        buffer[start + 12 : at].decode("utf-8", "replace"),
                        tag,
                        redelivered != 0,
                        buffer[body:after_body],
                        mid.decode(),
                        False,
                        True,
                        None,
                    ),
                    channel,
                    after_body + 1,
                )
    return _take_delivery(buffer, start, header, body_max, channel)


def _take_delivery(
    buffer: bytes, start: int, header: int, body_max: int, channel: int
) -> tuple[Delivery | None, int, int] | None:
    """Take a delivery whose properties may be any; its content header begins at `header`."""
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
    tag, redelivered = _TAG_AND_BIT.unpack_from(buffer, at)
    method = spec.Basic.Deliver(buffer[start + 12 : at].decode(errors="replace"), tag, redelivered != 0)
    content = buffer[body + _BEFORE : end - 1] if body_size else b""
    properties = read_properties(flags, buffer[header + _HEADER_START.size : body - 1])
    return Delivery.from_pika(method, properties, content), channel, end


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


def read_header(buffer: bytes, start: int) -> frame.Header:
    """Read the content header frame at `start` as pika does, but with `read_properties`."""
    _, channel, size, _, _, body_size, flags = _HEADER_START.unpack_from(buffer, start)
    octets = buffer[start + _HEADER_START.size : start + _BEFORE + size]
    return frame.Header(channel, body_size, read_properties(flags, octets))


def encode_ack(channel: int, tag: int, multiple: bool) -> bytes:
    """Return a `basic.ack` frame."""
    return _ACK_FRAME.pack(_METHOD, channel, 13, _ACK, tag, multiple, _END)


class PublishTemplate:
    """All of a publish that is the same for every message of a channel.

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
