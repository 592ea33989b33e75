"""What a connection keeps while it speaks plain HTTP."""

from __future__ import annotations

import gevent

from imrelay.websocket.body import Allowance, SocketReader
from imrelay.websocket.head import Framing

__all__ = ["NO_HTTP", "HttpState"]


class HttpState:
    """The state of one connection while it speaks plain HTTP; a WebSocket drops it, to save memory."""

    __slots__ = ("framing", "is_counted", "is_extra", "reader", "taking", "undecided")

    def __init__(self, reader: SocketReader | None) -> None:
        self.reader = reader
        #: What is left of the time for the client to take the answer.
        self.taking = Allowance(0.0)
        self.framing = Framing(0, False)
        #: Whether the connection is counted in `http_connections`, and whether it came when that was full.
        self.is_counted = self.is_extra = False
        #: The greenlet that waits for the head of an extra connection's request.
        self.undecided: gevent.Greenlet | None = None


#: What all WebSockets share in place of a state of their own.
NO_HTTP = HttpState(None)
