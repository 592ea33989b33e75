"""What the broker sends: frames are read from the bytes that have arrived and passed to their channels.

A delivery or a confirm that has arrived whole takes one step (`codec.take`). Everything else is read frame by
frame: methods by pika's codec, content (a large message, a returned one) put together here. What is for the
connection itself, channel 0, goes to pika as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from pika import spec
from pika.amqp_object import Method
from pika.exceptions import InvalidFrameError, UnexpectedFrameError
from pika.frame import Header

from imrelay.broker.codec import Confirm, Delivery, read_body, read_header, read_method, take

__all__ = ["Inbound", "Receiver"]

#: Bytes of a frame before its payload, and before and after it together (AMQP 0-9-1, 2.3.5).
_BEFORE, _AROUND = 7, 8
_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
#: Bytes of the largest frame until the two sides have agreed on that.
_FIRST_FRAME_MAX = 131_072
#: Methods that content follows.
_WITH_CONTENT = (spec.Basic.Deliver, spec.Basic.Return)


class Receiver(Protocol):
    """What a connection needs of a channel; none of it may block."""

    #: None: deliveries go to `receive_content`.
    on_delivery: Callable[[Delivery], None] | None
    #: Gets (delivery tag, multiple, whether it was a `basic.ack`); None: confirms mean nothing.
    on_confirm: Callable[[int, bool, bool], None] | None

    def receive_method(self, method: Method) -> None:
        """Take a method without content."""

    def receive_content(self, method: Method, properties: spec.BasicProperties, body: bytes) -> None:
        """Take a `basic.deliver` or a `basic.return` with all that belongs to it."""

    def shut_down(self) -> None:
        """Begin to close, since the connection is being closed; the owner is told of the end."""

    def receive_end(self, reason: BaseException) -> None:
        """Take note that the connection has ended."""


class _Content:
    """A message of which the body has yet to arrive, or a part of it."""

    __slots__ = ("left", "method", "parts", "properties")

    def __init__(self, method: Method) -> None:
        self.method = method
        self.properties: spec.BasicProperties | None = None
        self.parts: list[bytes] = []
        #: Bytes of the body that are still to come.
        self.left = 0


class Inbound:
    """The frames of one connection, from bytes to the channels in `receivers`, by their numbers.

    `on_connection_frame` gets each frame of channel 0. What is for a channel that is not there is dropped.
    """

    def __init__(self, receivers: Mapping[int, Receiver], on_connection_frame: Callable[[bytes], None]) -> None:
        self._receivers = receivers
        self._on_connection_frame = on_connection_frame
        #: The largest frame in bytes; what the two sides agree upon is for the owner to set.
        self.frame_max = _FIRST_FRAME_MAX
        #: The bytes of a frame, or of a message, that has not arrived whole.
        self._rest = b""
        #: By the number of the channel.
        self._contents: dict[int, _Content] = {}

    def feed(self, data: bytes) -> None:
        """Take what has arrived; what is not complete stays for the next time.

        Raises pika's `InvalidFrameError` and `UnexpectedFrameError` for what is no AMQP or out of order, and what
        receivers raise: the connection cannot go on then.
        """
        buffer = self._rest + data if self._rest else data
        at, end = 0, len(buffer)
        body_max = self.frame_max - _AROUND
        receivers = self._receivers
        while at < end:
            taken = take(buffer, at, body_max)
            if taken is not None:
                what, number, after = taken
                if what is None:
                    break
                receiver = receivers.get(number)
                if receiver is None:
                    at = after
                    continue
                if isinstance(what, Delivery):
                    if receiver.on_delivery is not None:
                        at = after
                        receiver.on_delivery(what)
                        continue
                elif isinstance(what, Confirm):
                    at = after
                    if receiver.on_confirm is not None:
                        receiver.on_confirm(what.tag, what.multiple, True)
                    continue
            after = self._frame_end(buffer, at)
            if after > end:
                break
            self._take_frame(buffer, at, after)
            at = after
        self._rest = buffer[at:]

    def _frame_end(self, buffer: bytes, at: int) -> int:
        """Return where the frame at `at` ends; beyond the buffer while that is not known."""
        if buffer[at] not in (_METHOD, _HEADER, _BODY, _HEARTBEAT):
            raise InvalidFrameError(f"what came is no AMQP 0-9-1: {buffer[at : at + 16]!r}")
        if len(buffer) - at < _BEFORE:
            return len(buffer) + 1
        size = int.from_bytes(buffer[at + 3 : at + _BEFORE], "big") + _AROUND
        if size > self.frame_max:
            raise InvalidFrameError(f"a frame of {size} bytes came; {self.frame_max} is the largest allowed")
        return at + size

    def _take_frame(self, buffer: bytes, at: int, after: int) -> None:
        kind, number = buffer[at], int.from_bytes(buffer[at + 1 : at + 3], "big")
        if number == 0 or kind == _HEARTBEAT:
            self._on_connection_frame(buffer[at:after])
            return
        receiver = self._receivers.get(number)
        if receiver is None:
            self._contents.pop(number, None)
        elif kind == _METHOD:
            method = read_method(buffer, at, after)
            if number in self._contents:
                raise UnexpectedFrameError(f"{method.NAME} within a message on channel {number}")
            if isinstance(method, _WITH_CONTENT):
                self._contents[number] = _Content(method)
            else:
                receiver.receive_method(method)
        elif kind == _HEADER:
            self._take_header(receiver, read_header(buffer, at))
        else:
            self._take_body(receiver, number, read_body(buffer, at, after))

    def _take_header(self, receiver: Receiver, header: Header) -> None:
        content = self._contents.get(header.channel_number)
        if content is None or content.properties is not None:
            raise UnexpectedFrameError(f"a content header out of order on channel {header.channel_number}")
        content.properties = header.properties
        content.left = header.body_size
        self._hand_over(receiver, header.channel_number, content)

    def _take_body(self, receiver: Receiver, number: int, fragment: bytes) -> None:
        content = self._contents.get(number)
        if content is None or content.properties is None or len(fragment) > content.left:
            raise UnexpectedFrameError(f"{len(fragment)} bytes of a body out of order on channel {number}")
        content.parts.append(fragment)
        content.left -= len(fragment)
        self._hand_over(receiver, number, content)

    def _hand_over(self, receiver: Receiver, number: int, content: _Content) -> None:
        """Give a message that is complete to its channel."""
        if content.left:
            return
        del self._contents[number]
        method, body = content.method, b"".join(content.parts)
        assert content.properties is not None
        if isinstance(method, spec.Basic.Deliver) and receiver.on_delivery is not None:
            tag, again = method.delivery_tag, method.redelivered
            delivery = Delivery.from_properties(method.consumer_tag, tag, again, content.properties, body)
            receiver.on_delivery(delivery)
        else:
            receiver.receive_content(method, content.properties, body)
