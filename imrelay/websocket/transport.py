"""The TCP (or TLS) connection of a WebSocket: two watchers of the event loop, and the only code that writes.

Nothing here blocks. Whoever sends, the bytes go to the kernel at once while it takes them; what it does not
take waits in the outbox, and the write watcher is then the only one that sends. Frames are given whole, by one
call each, so they cannot mix.
"""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from gevent.hub import Hub

from imrelay.websocket.fairness import turns_of
from imrelay.websocket.outbox import MAX_WRITE, Outbox, Write

__all__ = ["READ_SIZE", "WOULD_BLOCK", "Limits", "Transport", "resume"]

logger = logging.getLogger(__name__)

#: Bytes that are read from one socket in one turn of the event loop, at most.
READ_SIZE = 65_536

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_READ, _WRITE = 1, 2  # events of libev


class Limits(Protocol):
    """The class attributes of `WebSocketHandler` that a connection obeys."""

    max_message_size: int
    ping_interval: float
    ping_timeout: float
    send_timeout: float
    max_send_buffer: int
    close_timeout: float


def resume(waiting: Any, hub: Hub) -> None:
    """Switch into a greenlet that waits in the event loop; called in the event loop."""
    try:
        waiting.switch()
    except BaseException:  # of a raw greenlet that ended with it: reported as gevent reports it
        hub.handle_error(waiting, *sys.exc_info())


class Transport(ABC):
    """Reads and writes one socket in the event loop. `due` is the next deadline, see `sweeper`."""

    __slots__ = (
        "_hub",
        "_limits",
        "_outbox",
        "_pending",
        "_raw",
        "_reader",
        "_reading",
        "_sock",
        "_turns",
        "_writer",
        "due",
    )

    def __init__(self, sock: Any, hub: Hub, limits: Limits) -> None:
        """`sock` is gevent's socket or TLS socket; from here on nobody else uses it."""
        sock.settimeout(0.0)
        self._sock = sock
        #: The socket below gevent's plain one: calls that never wait need not go through gevent's.
        self._raw: Any = sock if hasattr(sock, "pending") else getattr(sock, "_sock", sock)
        self._hub = hub
        self._limits = limits
        self._turns = turns_of(hub)
        self._outbox: Outbox | None = None
        #: TLS alone: how many bytes were decrypted and not read. The watcher does not know of them. There may be
        #: some after the handshake; a read of ours takes the whole of a record.
        self._pending: Callable[[], int] | None = getattr(sock, "pending", None)
        self._reader = hub.loop.io(sock.fileno(), _READ)
        self._writer: Any = None
        self._reading = False
        self.due = float("inf")

    # -- what a subclass does with it, in the event loop ---------------------------------------------------------

    @abstractmethod
    def _on_bytes(self, data: bytes) -> None:
        """Take what was read."""

    @abstractmethod
    def _on_end_of_stream(self) -> None:
        """The peer will send nothing more."""

    @abstractmethod
    def _on_lost(self, reason: str) -> None:
        """The connection broke."""

    @abstractmethod
    def _on_flushed(self) -> None:
        """The kernel has taken everything."""

    @abstractmethod
    def _on_bug(self) -> None:
        """An unexpected exception was raised; its traceback is in the log already."""

    # -- reading ---------------------------------------------------------------------------------------------

    def _start_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._reader.start(self._on_readable)
            if self._pending is not None and self._pending():
                self._turns.add(self._on_readable)

    def _stop_reading(self) -> None:
        """Read nothing: the kernel's buffers fill, and then the peer's sends block."""
        if self._reading:
            self._reading = False
            self._reader.stop()

    def _on_readable(self) -> None:
        if not self._reading:
            return
        try:
            try:
                data = self._raw.recv(READ_SIZE)
            except WOULD_BLOCK:
                return
            except OSError as error:
                self._on_lost(f"connection lost: {error.strerror or error}")
                return
            if data:
                self._on_bytes(data)
            else:
                self._on_end_of_stream()
        except Exception:
            logger.exception("reading a socket failed")
            self._on_bug()

    # -- writing ---------------------------------------------------------------------------------------------

    def _write(self, data: bytes, *, pong: bool = False, last: bool = False) -> Write | None:
        """Send, or queue what the kernel does not take; return the write if it waits.

        Raises OSError where the connection is broken, BufferError where too much waits (except for the
        `last` frame of a connection).
        """
        outbox = self._outbox
        if outbox is None:
            try:
                # no more than `Outbox.next_bytes`: OpenSSL wants at least as many when it is asked again
                sent = self._raw.send(data if len(data) <= MAX_WRITE else memoryview(data)[:MAX_WRITE])
            except WOULD_BLOCK:
                sent = 0
            if sent == len(data):
                return None
            limits = self._limits
            # of what TLS did not take, it may have sent a part all the same
            started = sent > 0 or self._pending is not None
            outbox = Outbox(max_bytes=limits.max_send_buffer, timeout=limits.send_timeout, started=started)
            write = outbox.add(memoryview(data)[sent:], monotonic())
            self._outbox = outbox
            if self._writer is None:
                self._writer = self._hub.loop.io(self._sock.fileno(), _WRITE)
            self._writer.start(self._on_writable)
        elif pong:
            outbox.add_pong(data, monotonic())
            return None
        elif last or outbox.has_room(len(data)):
            write = outbox.add(data, monotonic())
        else:
            raise BufferError(f"more than {self._limits.max_send_buffer} bytes wait to be sent")
        if outbox.due < self.due:
            self.due = outbox.due
        return write

    def _on_writable(self) -> None:
        outbox = self._outbox
        if outbox is None:
            return
        try:
            try:
                sent = self._raw.send(outbox.next_bytes())
            except WOULD_BLOCK:
                return
            except OSError as error:
                self._on_lost(f"connection lost: {error.strerror or error}")
                return
            done = outbox.took(sent, monotonic()) if sent else []
            if not outbox:
                self._outbox = None
                self._writer.stop()
                self._on_flushed()
            self._wake_senders(done)
        except Exception:
            logger.exception("writing to a socket failed")
            self._on_bug()

    def _wake_senders(self, writes: list[Write]) -> None:
        for write in writes:
            if write.sender is not None:
                resume(write.sender, self._hub)

    # -- the end ---------------------------------------------------------------------------------------------

    def _half_close(self) -> None:
        """Send FIN, and still take what comes: a close with unread input would reset the connection."""
        try:
            if self._pending is not None:
                self._sock.unwrap()  # sends close_notify; does not wait for the peer's
            self._sock.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            pass  # the peer has closed first

    def _release(self, *, reset: bool = False) -> None:
        """Close the TCP connection and wake whoever still waits for bytes to leave.

        `reset` frees at once what the kernel still holds for a peer that does not read.
        """
        outbox, self._outbox = self._outbox, None
        self._reading = False
        for watcher in (self._reader, self._writer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._reader = self._writer = self._pending = None
        try:
            if reset:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._raw = None
            self._sock.close()
        except OSError:
            pass  # nothing is left to close
        if outbox is not None:
            self._hub.loop.run_callback(self._wake_senders, outbox.drop())
