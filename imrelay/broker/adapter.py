"""A gevent adapter for pika, by the interface of pika's own adapters.

No other module knows a private name of pika's, and this one knows these:

pika calls                            and is told by
  _adapter_connect_stream               _on_stream_connected     the socket is there: begin the AMQP handshake
  _adapter_disconnect_stream            _on_data_available       frames of channel 0, as they came
  _adapter_emit_data                    _on_stream_terminated    the socket is gone, and why
  _adapter_call_later
  _adapter_remove_timeout
  _adapter_add_callback_threadsafe

pika negotiates the connection, sends and checks heartbeats, and closes. What belongs to a channel goes past it:
see `inbound`, `outbound` and `channel`. One greenlet, the one that calls `run`, opens the socket, reads it and
ends it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import gevent
import pika
from pika.exceptions import AMQPError, ConnectionOpenAborted, StreamLostError
from pika.tcp_socket_opts import set_sock_opts

from imrelay.broker.inbound import Inbound, Receiver
from imrelay.broker.outbound import Outbound
from imrelay.broker.stream import READ_SIZE, Addresses, Stream, open_stream

__all__ = ["Adapter"]

logger = logging.getLogger(__name__)

#: Events of libev's io watchers: the descriptor is readable; it is writable.
_READ, _WRITE = 1, 2
#: Seconds for which replies that nobody waits for are left in the kernel, and bytes that end this earlier: see
#: `expect`.
_READ_DELAY, _READ_AT_ONCE = 0.005, 16_384
#: What surrounds the payload of a frame, in bytes (AMQP 0-9-1, 2.3.5).
_AROUND = 8


class Adapter(pika.connection.Connection):  # type: ignore[misc]
    """One AMQP connection from its attempt to its end.

    `on_open` is called when the AMQP handshake is done. It, the channels and pika's callbacks are called in the
    greenlet of `run` or in the event loop: none of them may block.
    """

    def __init__(
        self, parameters: pika.connection.Parameters, addresses: Addresses, *, on_open: Callable[[], None]
    ) -> None:
        #: By their numbers; each stays until it has ended on both sides.
        self.channels: dict[int, Receiver] = {}
        #: Takes the frames that are to be sent.
        self.outbound = Outbound(self._on_write_failure)
        self._addresses = addresses
        self._when_open = on_open
        self._hub = gevent.get_hub()
        self._inbound = Inbound(self.channels, self._on_data_available)
        self._stream: Stream | None = None
        #: The greenlet of `run`, and whether it waits for bytes.
        self._greenlet: Any = None
        self._is_waiting = False
        self._reader: Any = None
        self._is_shutting_down = self._is_ending = False
        #: What ended it, where pika does not know it.
        self._failure: Exception | None = None
        self._write_error: OSError | None = None
        #: Why it has ended.
        self._end_reason: BaseException | None = None
        self._handshake_timer: Any = None
        # Begun by `again` and stopped when it fires: one without `repeat` fires at once when it is started anew.
        self._delay_timer = self._hub.loop.timer(_READ_DELAY, _READ_DELAY)
        #: Whether the kernel reports no fewer than `_READ_AT_ONCE` bytes, until the timer fires.
        self._is_delayed = False
        super().__init__(
            parameters,
            on_open_callback=self._on_opened,
            on_open_error_callback=self._on_ended,
            on_close_callback=self._on_ended,
        )

    @property
    def body_max(self) -> int:
        """The largest payload of a body frame, in bytes; known once the connection is open."""
        return int(self.params.frame_max) - _AROUND

    # -- the life of the connection ---------------------------------------------------------------------------

    def run(self) -> BaseException:
        """Open the connection, read it until it ends, and return why it did; to be called once, by one greenlet.

        The parameters' `socket_timeout` is for TCP and for TLS, each, and `stack_timeout` for these and the AMQP
        handshake together, in seconds. `shut_down` and `abort` end it, and so does killing the greenlet.
        """
        self._greenlet = gevent.getcurrent()
        try:
            self._stream = self._open_stream()
            self._begin(self._stream)
            self._read(self._stream)
        except OSError as exc:
            self._failure = exc if self._stream is None else StreamLostError(f"the connection was lost: {exc}")
        except AMQPError as exc:
            self._failure = exc
        except Exception as exc:
            logger.exception("what came from the broker could not be read")
            self._failure = exc
        except BaseException:  # it was killed
            self._failure = ConnectionOpenAborted("closed")
            raise
        finally:
            self._release()
        assert self._end_reason is not None
        return self._end_reason

    def shut_down(self) -> None:
        """Close the channels, and after the last of them the connection, with the handshakes of AMQP.

        Returns at once. The connection has to be open.
        """
        self._is_shutting_down = True
        for channel in list(self.channels.values()):
            channel.shut_down()
        self._close_behind_channels()

    def forget_channel(self, number: int) -> None:
        """Remove a channel that has ended; its number may be used again."""
        self.channels.pop(number, None)
        if self._is_shutting_down:
            self._close_behind_channels()

    def _close_behind_channels(self) -> None:
        if not self.channels and self.is_open:
            self.close()

    def abort(self, error: Exception) -> None:
        """End the connection without the handshake of AMQP. Returns at once; may be called from the event loop."""
        if not self._is_ending:
            self._failure = error
            self._adapter_disconnect_stream()

    def _open_stream(self) -> Stream:
        parameters = self.params
        tls = None
        if parameters.ssl_options is not None:
            tls = parameters.ssl_options.context, parameters.ssl_options.server_hostname or parameters.host
        return open_stream(
            self._addresses.find(parameters.host, parameters.port),
            step_timeout=parameters.socket_timeout,
            timeout=parameters.stack_timeout,
            prepare=self._prepare_socket,
            tls=tls,
        )

    def _prepare_socket(self, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_sock_opts(self.params.tcp_options, sock)

    def _begin(self, stream: Stream) -> None:
        """Begin the AMQP handshake."""
        left = stream.deadline - time.monotonic()
        self._handshake_timer = self._adapter_call_later(left, self._on_handshake_timeout)
        self.outbound.start(stream)
        self._on_stream_connected()

    def _on_handshake_timeout(self) -> None:
        self._handshake_timer = None
        seconds = self.params.stack_timeout
        self.abort(TimeoutError(f"the broker did not finish the AMQP handshake within {seconds:g} s"))

    def _on_opened(self, connection: Adapter) -> None:
        self._stop_handshake_timer()
        self._inbound.frame_max = self.params.frame_max
        self._when_open()

    def _stop_handshake_timer(self) -> None:
        timer, self._handshake_timer = self._handshake_timer, None
        if timer is not None:
            self._adapter_remove_timeout(timer)

    def _release(self) -> None:
        """Close the socket, and tell pika, which calls `_on_ended`."""
        self._is_ending = True
        self._stop_handshake_timer()
        self._delay_timer.stop()
        self._delay_timer.close()
        self.outbound.stop()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        self._on_stream_terminated(self._failure)

    def _on_ended(self, connection: Adapter, reason: BaseException) -> None:
        """Tell the channels first, so that all have ended when the owner learns of the connection's end."""
        self._end_reason = reason
        channels = list(self.channels.values())
        self.channels.clear()
        for channel in channels:
            try:
                channel.receive_end(reason)
            except Exception:
                logger.exception("a channel failed to take the end of its connection")

    # -- reading ----------------------------------------------------------------------------------------------

    def _read(self, stream: Stream) -> None:
        """Read until pika or `abort` ends the connection. Raises what the connection meets.

        Other greenlets have their turn after each `READ_SIZE` bytes.
        """
        self._reader = self._hub.loop.io(stream.fileno(), _READ)
        # Started once for all reads. While this greenlet waits for anything else a switch would be an error:
        # nothing that is called from here may block.
        self._reader.start(self._greenlet.switch)
        try:
            while not self._is_ending:
                # what came before a write failed usually says why: it is read first
                if self._write_error is None and not (stream.is_tls and stream.has_decrypted):
                    self._wait()
                left = READ_SIZE
                while left > 0 and not self._is_ending:
                    size = self._read_once(stream)
                    # TLS gives a record at a time; of a plain socket one read is enough
                    left = left - size if size and stream.is_tls else 0
        finally:
            self._is_waiting = False
            self._reader.stop()
            self._reader.close()

    def _wait(self) -> None:
        """Block until a watcher or `_wake` switches back."""
        self._is_waiting = True
        self._hub.switch()
        self._is_waiting = False

    def _read_once(self, stream: Stream) -> int:
        """Take what has arrived and return how much it was, in bytes."""
        data = stream.receive()
        if data:
            self.bytes_received += len(data)
            self._inbound.feed(data)
            if stream.wants_to_read:
                self.outbound.resume()
            return len(data)
        if data is not None:
            raise StreamLostError("the broker has closed the TCP connection")
        if self._write_error is not None:
            raise self._write_error
        if stream.wants_to_write:
            self._wait_writable(stream)
        return 0

    def _wait_writable(self, stream: Stream) -> None:
        """Block until the socket is writable or the connection is to end; the rest is read afterwards."""
        self._reader.stop()
        writer = self._hub.loop.io(stream.fileno(), _WRITE)
        writer.start(self._greenlet.switch)
        try:
            self._wait()
        finally:
            writer.stop()
            writer.close()
        self._reader.start(self._greenlet.switch)

    def _wake(self) -> None:
        """Have the wait for bytes end; to be called in the event loop."""
        if self._is_waiting:
            self._greenlet.switch()

    def _on_write_failure(self, error: OSError) -> None:
        self._write_error = error
        self._hub.loop.run_callback(self._wake)

    def expect(self, *, at_once: bool) -> None:
        """Note that a confirm will come, and whether anybody waits for it; if not, it is read a little later.

        So the process wakes up once for many confirms. Does nothing on a TLS connection.
        """
        if at_once:
            if self._is_delayed:
                self.delay_reads(False)
        elif not self._is_delayed and self._stream is not None and not self._stream.is_tls:
            self.delay_reads(True)
            self._delay_timer.again(self._on_delay_end)

    def delay_reads(self, is_delayed: bool) -> None:
        """Have the kernel report the socket as readable from `_READ_AT_ONCE` bytes on, or from one again."""
        self._is_delayed = is_delayed
        if self._stream is not None:
            self._stream.set_low_water(_READ_AT_ONCE if is_delayed else 1)

    def _on_delay_end(self) -> None:
        self._delay_timer.stop()
        if self._is_delayed:
            self.delay_reads(False)
            self._wake()

    # -- what pika asks of an adapter -------------------------------------------------------------------------

    def _adapter_connect_stream(self) -> None:
        """Leave it to `run`, which is called next."""

    def _adapter_disconnect_stream(self) -> None:
        """Have `run` end the connection; it then calls `_on_stream_terminated`."""
        self._is_ending = True
        self._hub.loop.run_callback(self._wake)

    def _adapter_emit_data(self, data: bytes) -> None:
        """Send a frame of pika's."""
        self.outbound.emit(data)

    def _adapter_call_later(self, delay: float, callback: Callable[[], Any]) -> Any:
        """Call back in the event loop after so many seconds; return what `_adapter_remove_timeout` takes."""
        timer = self._hub.loop.timer(max(0.0, delay))
        timer.start(self._run_timer, timer, callback)
        return timer

    def _adapter_remove_timeout(self, timeout_id: Any) -> None:
        """Call that back no more."""
        timeout_id.stop()
        timeout_id.close()

    def _adapter_add_callback_threadsafe(self, callback: Callable[[], Any]) -> None:
        """Call back in the event loop as soon as possible; may be called from any thread."""
        self._hub.loop.run_callback_threadsafe(self._run_callback, callback)

    def _run_timer(self, timer: Any, callback: Callable[[], Any]) -> None:
        timer.close()
        self._run_callback(callback)

    def _run_callback(self, callback: Callable[[], Any]) -> None:
        """Call back; an exception ends this connection and nothing else."""
        try:
            callback()
        except Exception as exc:
            logger.exception("a callback of pika's failed")
            self.abort(exc)
