"""A forwarding TCP proxy for the way between a relay and its broker, which can be cut, stalled and reset."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Proxy"]

#: Called with each piece of data on its way, whether it goes to the broker, and the number of its connection;
#: with no data when that direction has ended.
Tap = Callable[[bytes, bool, int], None]


class Proxy:
    """Listens on a port of loopback and forwards each connection to the broker of an AMQP URL.

    While it is cut, nothing passes and nobody is told: no reset, no end of stream, and a new connection is
    taken by the system and answered by nothing. What was held passes when it is healed, as TCP sends again what
    was lost. `tap` sees all data before it is passed on.
    """

    def __init__(self, url: str, *, tap: Tap | None = None) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 5672)
        self._tap = tap
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._passes = {True: threading.Event(), False: threading.Event()}
        self._ends: set[socket.socket] = set()
        self._closed = False
        self._lock = threading.Lock()
        #: Connections that it has taken so far.
        self.taken = 0
        host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        #: The URL of the broker through here.
        self.url = urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{host}"))
        self.heal()
        self._thread = self._spawn(self._run_listener)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def cut(self) -> None:
        """Let nothing pass any more, in either direction."""
        self._passes[True].clear()
        self._passes[False].clear()

    def stall(self) -> None:
        """Let nothing pass that comes from the broker; what goes to it passes."""
        self._passes[False].clear()

    def heal(self) -> None:
        """Let everything pass, first what was held."""
        self._passes[True].set()
        self._passes[False].set()

    def reset(self) -> None:
        """End every connection with a reset on both sides; what was held is lost. New ones are taken."""
        with self._lock:
            ends, self._ends = self._ends, set()
        for end in ends:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # wakes the thread that reads it, which closes it
                end.shutdown(socket.SHUT_RD)
            end.close()

    def close(self) -> None:
        """Take no more connections and end those that are there."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal()
        self.reset()
        self._thread.join(10)

    def _run_listener(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                self._passes[True].wait()
                far = socket.create_connection(self._target)
            except OSError:
                if self._closed:
                    return
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._ends |= {near, far}
                self.taken += 1
            self._spawn(self._run_direction, near, far, True, self.taken)
            self._spawn(self._run_direction, far, near, False, self.taken)

    def _run_direction(self, source: socket.socket, sink: socket.socket, to_broker: bool, number: int) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                self._passes[to_broker].wait()
                if self._tap is not None:
                    self._tap(data, to_broker, number)
                sink.sendall(data)
        if self._tap is not None:
            self._tap(b"", to_broker, number)
        self._passes[to_broker].wait()
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    @staticmethod
    def _spawn(function: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        return thread
