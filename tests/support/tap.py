"""Looks into what passes a `Proxy`: the AMQP methods."""

from __future__ import annotations

import struct
import threading

__all__ = ["Method", "MethodTap"]

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
