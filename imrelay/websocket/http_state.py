"""What a connection keeps while it speaks plain HTTP."""

from __future__ import annotations

import gevent

from imrelay.websocket.body import Allowance, SocketReader
from imrelay.websocket.head import Framing

__all__ = ["NO_HTTP", "HttpState"]


class HttpState:
    """What a connection has while it speaks plain HTTP. One object: a WebSocket lets go of it."""

    __slots__ = ("framing", "is_counted", "is_crowded", "reader", "taking", "undecided")

    def __init__(self, reader: SocketReader | None) -> None:
        self.reader = reader
        #: What is left of the time for the client to take the answer.
        self.taking = Allowance(0.0)
        self.framing = Framing(0, False)
        #: Whether the connection is counted in `admission`, and came when that was full.
        self.is_counted = self.is_crowded = False
        #: The greenlet that waits for the head of one of the crowd.
        self.undecided: gevent.Greenlet | None = None


#: What all WebSockets have in place of their own.
NO_HTTP = HttpState(None)
