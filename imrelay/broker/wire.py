"""pika's connection and channel, with a short way for what every message passes: see `frames`.

Inbound, deliveries and confirms go from the receive buffer straight to the channel's owner; all else goes
through pika. Outbound, the frames of one turn of the loop leave in one system call, without a watcher where the
socket takes them at once: pika writes each publish in three pieces and makes its write watcher anew around each.
What nobody waits for, acknowledgements and most confirms, waits a few milliseconds for company in both directions.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

import gevent
import pika
from pika import spec
from pika.adapters.gevent_connection import GeventConnection, _GeventSelectorIOLoop
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport
from pika.amqp_object import Method
from pika.frame import Method as MethodFrame
from pika.frame import decode_frame

from imrelay.broker.frames import Delivery, read_header, take

__all__ = ["Wire", "WireChannel"]

logger = logging.getLogger(__name__)

#: Bytes that are read from the broker at once; then others have their turn.
_READ_SIZE = 65_536
#: How long acknowledgements wait for company, in seconds: alone, each would cost both sides a system call and the
#: broker a turn. What a crash in that time leaves unacknowledged is delivered again with the same message id.
_LATER = 0.005
#: Bytes that end the patience for replies before the time: see `expect`.
_PLENTY = 16_384
#: What a frame has before its payload, and around it (AMQP 0-9-1, 2.3.5).
_BEFORE, _AROUND = 7, 8
#: The first octet of a content header frame; and of a protocol header, which is no frame.
_HEADER = 2
_PROTOCOL_HEADER = ord("A")


class _Line(list[Any]):
    """A queue that takes no memory while it is empty, as a deque does."""

    __slots__ = ()

    def popleft(self) -> Any:
        """Take the first."""
        return self.pop(0)


#: Consumer tags of pika's own consumers, of which there are none.
_NOBODY: set[str] = set()


class WireChannel(pika.channel.Channel):  # type: ignore[misc]
    """pika's channel with one road for deliveries, confirms and cancels; called in the hub, they may not raise."""

    on_delivery: Callable[[Delivery], None] | None = None
    #: In the place of `on_delivery`: (delivery tag, all properties, body).
    on_message: Callable[[int, spec.BasicProperties, bytes], None] | None = None
    on_cancel: Callable[[], None] | None = None
    #: Called with (reply code, reply text) when the broker closes the channel while its own side does.
    on_crossed: Callable[[int, str], None] | None = None
    #: The kinds of answers that go to `on_reply` instead of through pika's callbacks.
    awaited: Sequence[type[Method]] = ()
    on_reply: Callable[[Method], None] | None = None
    #: (delivery tag, multiple, whether it was a `basic.ack`)
    on_confirm: Callable[[int, bool, bool], None] | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # There is a channel for each socket, so what pika reserves for calls that we do not make adds up.
        self._blocked = _Line()
        self._cancelled = self._consumers_with_noack = _NOBODY

    def _add_callbacks(self) -> None:
        """Have pika see to what a broker may send of its own accord; RabbitMQ sends no `channel.flow`."""
        number, callbacks = self.channel_number, self.callbacks
        callbacks.add(number, spec.Basic.Cancel, self._on_cancel, False)
        callbacks.add(number, spec.Channel.Close, self._on_close_from_broker, True)

    def _on_cancel(self, method_frame: Any) -> None:
        """Take a `basic.cancel` of the broker's."""
        super()._on_cancel(method_frame)
        if self.on_cancel is not None:
            self.on_cancel()

    def _on_close_from_broker(self, method_frame: Any) -> None:
        """Take the broker's `channel.close`; RabbitMQ does not always answer one of ours that it has crossed."""
        is_crossed = self.is_closing
        super()._on_close_from_broker(method_frame)
        if is_crossed and self.on_crossed is not None:
            self.on_crossed(method_frame.method.reply_code, method_frame.method.reply_text)

    def _on_deliver(self, method_frame: Any, header_frame: Any, body: bytes) -> None:
        """Take a delivery that pika has put together: a large one, or one of a rare shape."""
        if self.on_delivery is not None:
            self.on_delivery(Delivery.from_pika(method_frame.method, header_frame.properties, body))
        elif self.on_message is not None:
            self.on_message(method_frame.method.delivery_tag, header_frame.properties, body)


class Wire(GeventConnection):  # type: ignore[misc]
    """One AMQP connection from its attempt to its end."""

    def __init__(self, parameters: pika.URLParameters, **callbacks: Callable[..., None]) -> None:
        self._unsent: list[bytes] = []
        self._flush_is_due = False
        self._hub = gevent.get_hub()
        # Begun by `again` and stopped when they fire: one without `repeat` fires at once when it is started anew.
        self._later = self._hub.loop.timer(_LATER, _LATER)
        self._frame_buffer = b""
        #: Whether the kernel keeps quiet about what has come, up to `_PLENTY`, until the timer looks.
        self._is_patient = False
        self._patience = self._hub.loop.timer(_LATER, _LATER)
        self._raw: Any = None
        #: Called when the kernel has taken all that was to be sent, after it had not for a while; in the hub.
        self.on_drained: Callable[[], None] | None = None
        super().__init__(parameters, custom_ioloop=_ioloop(), **callbacks)

    @property
    def body_max(self) -> int:
        """The largest payload of a body frame, in bytes; known once the connection is open."""
        return int(self._body_max_length)

    @property
    def has_unsent(self) -> bool:
        """Whether the kernel did not take all that was to be sent: see `on_drained`.

        What this turn of the loop has yet to send does not count: it goes with the next that is sent.
        """
        transport = self._transport
        return transport is not None and transport.get_write_buffer_size() > 0

    def emit(self, frames: bytes) -> None:
        """Send complete frames, together with all others of this turn of the loop. May be called from the hub."""
        self._unsent.append(frames)
        if not self._flush_is_due:
            self._flush_is_due = True
            self._hub.loop.run_callback(self.flush)

    def emit_now(self, frames: bytes) -> None:
        """Send complete frames, and what waits to be sent, at once."""
        self._unsent.append(frames)
        self.flush()

    def emit_later(self, frames: bytes) -> None:
        """Send complete frames with the next that are sent, or after `_LATER`. May be called from the hub."""
        self._unsent.append(frames)
        if not self._flush_is_due and not self._later.active:
            self._later.again(self.flush)

    def _adapter_emit_data(self, data: bytes) -> None:
        self.emit(data)

    def flush(self) -> None:
        """Send now what waits to be sent. May be called from the hub."""
        self._flush_is_due = False
        if self._later.active:
            self._later.stop()
        unsent = self._unsent
        if not unsent:
            return
        data = b"".join(unsent) if len(unsent) > 1 else unsent[0]
        unsent.clear()
        transport = self._transport
        if transport is None:
            return
        if self._raw is not None and not transport.get_write_buffer_size():
            try:
                sent = self._raw.send(data)
            except OSError:
                sent = 0  # full, or lost: pika's own way of writing finds out which
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    def expect(self, *, at_once: bool) -> None:
        """Say that something will come, and whether anybody waits for it; else it is read a little later.

        One wake-up of the process then serves for many confirms. Does nothing on a TLS connection.
        """
        if at_once:
            if self._is_patient:
                self._set_patience(False)
        elif not self._is_patient and self._raw is not None:
            self._set_patience(True)
            self._patience.again(self._on_patience_end)

    def _set_patience(self, is_patient: bool) -> None:
        self._is_patient = is_patient
        with contextlib.suppress(OSError):
            self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _PLENTY if is_patient else 1)

    def _on_patience_end(self) -> None:
        self._patience.stop()
        if self._is_patient and self._raw is not None:
            self._set_patience(False)
            self._on_readable()

    def _create_channel(self, channel_number: int, on_open_callback: Callable[..., None] | None) -> WireChannel:
        return WireChannel(self, channel_number, on_open_callback)

    def _proto_connection_made(self, transport: Any) -> None:
        super()._proto_connection_made(transport)
        produce = transport._produce
        transport._produce = lambda: self._produce(transport, produce)
        if type(transport) is _AsyncPlaintextTransport:
            self._raw = getattr(transport._sock, "_sock", transport._sock)  # below gevent's
            self._nbio.set_reader(transport._sock.fileno(), self._on_readable)

    def _produce(self, transport: Any, produce: Callable[[], None]) -> None:
        """Have pika write what it has buffered, and tell when that was all; it raises where the kernel is full."""
        try:
            produce()
        finally:
            if self.on_drained is not None and not transport.get_write_buffer_size():
                self.on_drained()

    def _proto_connection_lost(self, error: BaseException | None) -> None:
        self._raw = None
        self._later.stop()
        self._patience.stop()
        super()._proto_connection_lost(error)

    def _on_readable(self) -> None:
        """Read once, in the hub; how a connection ends is left to pika."""
        transport = self._transport
        if transport is None or transport._state != transport._STATE_ACTIVE:
            return
        try:
            data = self._raw.recv(_READ_SIZE)
            if data:
                self._on_data_available(data)
            else:
                transport._on_socket_readable()
        except BlockingIOError:
            pass
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("what came from the broker could not be read")
            transport._initiate_abort(error)

    def _on_data_available(self, data_in: bytes) -> None:
        """Take what has arrived; the rest, less than a frame, stays for the next time."""
        buffer: bytes = self._frame_buffer + data_in if self._frame_buffer else data_in
        at, end = 0, len(buffer)
        body_max = self._body_max_length or 0
        try:
            while at < end:
                taken = take(buffer, at, body_max)
                if taken is not None:
                    what, number, after = taken
                    if what is None:
                        break
                    channel = self._channels.get(number)
                    if channel is None:
                        pass
                    elif isinstance(what, Delivery):
                        if channel.on_delivery is not None:
                            at = after
                            channel.on_delivery(what)
                            continue
                    elif channel.on_confirm is not None:
                        at = after
                        channel.on_confirm(what.tag, what.multiple, True)
                        continue
                after = _frame_end(buffer, at)
                if after > end:
                    break
                frame = read_header(buffer, at) if buffer[at] == _HEADER else decode_frame(buffer[at:after])[1]
                at = after
                if not self._reply(frame):
                    self._process_frame(frame)
        finally:
            self.bytes_received += at
            self._frame_buffer = buffer[at:]

    def _reply(self, frame: Any) -> bool:
        """Give an answer to who asked, without pika's bookkeeping for it; tell whether it was one."""
        if not isinstance(frame, MethodFrame):
            return False
        channel = self._channels.get(frame.channel_number)
        if channel is None or channel.on_reply is None or type(frame.method) not in channel.awaited:
            return False
        channel.on_reply(frame.method)
        return True


def _frame_end(buffer: bytes, at: int) -> int:
    """Return where the frame at `at` ends; beyond the buffer if that is not yet known."""
    if buffer[at] == _PROTOCOL_HEADER:
        return at + _AROUND
    if len(buffer) - at < _BEFORE:
        return len(buffer) + 1
    return at + int.from_bytes(buffer[at + 3 : at + _BEFORE], "big") + _AROUND


_loops: dict[gevent.hub.Hub, _GeventSelectorIOLoop] = {}


def _ioloop() -> _GeventSelectorIOLoop:
    """Return the one pika loop of this hub: a new one per attempt to connect would leak a pipe each."""
    hub = gevent.get_hub()
    if hub not in _loops:
        _loops.clear()  # another hub means that this is a child after a fork
        _loops[hub] = _GeventSelectorIOLoop(hub)
    return _loops[hub]
