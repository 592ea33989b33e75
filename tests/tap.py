"""Looks into what passes a `Proxy`: the AMQP methods, to count them or to hold them up."""

from __future__ import annotations

import struct
import threading

__all__ = ["Gate", "Method", "MethodTap"]

#: Class and method id (AMQP 0-9-1).
Method = tuple[int, int]


class MethodTap:
    """A tap that sees each method, one at a time, and the end of each connection."""

    def __init__(self) -> None:
        self._rest: dict[tuple[int, bool], bytes] = {}
        self._lock = threading.Lock()

    def __call__(self, data: bytes, to_broker: bool, connection: int) -> None:
        with self._lock:
            if not data:
                self.on_end(connection)
            key = (connection, to_broker)
            data = self._rest.get(key, b"") + data
            if data.startswith(b"AMQP"):
                data = data[8:]
            while len(data) >= 7:
                kind, channel, size = struct.unpack(">BHI", data[:7])
                if len(data) < size + 8:
                    break
                if kind == 1:
                    self.on_method(connection, channel, struct.unpack(">HH", data[7:11]), to_broker)
                data = data[size + 8 :]
            self._rest[key] = data

    def on_method(self, connection: int, channel: int, method: Method, to_broker: bool) -> None:
        """See a method that is about to be passed on."""

    def on_end(self, connection: int) -> None:
        """See that one direction of a connection has ended."""


class Gate(MethodTap):
    """Holds up what comes from the broker, from a certain method on."""

    def __init__(self) -> None:
        super().__init__()
        #: Set while it holds something up.
        self.holds = threading.Event()
        self._may_pass = threading.Event()
        self._method: Method | None = None
        self._left = 0

    def hold(self, method: Method, number: int = 1) -> None:
        """Hold up the next such method (or the one after so many), and what comes with it or behind it."""
        self.holds.clear()
        self._may_pass.clear()
        self._left = number
        self._method = method

    def let_pass(self) -> None:
        """Let pass what is held up, and all that comes."""
        self._method = None
        self._may_pass.set()

    def __call__(self, data: bytes, to_broker: bool, connection: int) -> None:
        super().__call__(data, to_broker, connection)
        if not to_broker and self.holds.is_set():
            self._may_pass.wait()

    def on_method(self, connection: int, channel: int, method: Method, to_broker: bool) -> None:
        """Close the gate at the method that is waited for."""
        if not to_broker and method == self._method:
            self._left -= 1
            if not self._left:
                self.holds.set()
