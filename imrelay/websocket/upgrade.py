"""How an application decides about a WebSocket handshake, and what takes the connection over.

A handler with `application_decides` calls its WSGI application for a handshake that is in order as for any
other request, with an `Upgrade` in `environ["imrelay.upgrade"]`. That object is how an application knows that this
server can upgrade. The application either answers as usual (403, 503, ...), or it hands an `Endpoint` to `accept`
and answers 101. The handler looks at the answer when the application has returned and its iterable is closed:

- status 101: the endpoint attaches, the client gets 101, the endpoint runs and is closed;
- any other status, or an exception: the endpoint is closed, and the answer goes out as plain HTTP.

The endpoint travels in an object that the handler made, and not in the application's answer, because an answer may
get lost on its way: a hook that runs after the view raises or returns another one, an error handler replaces it, a
middleware passes on an iterable of its own. From `accept` on the handler owns the endpoint and closes it, whatever
becomes of the answer. The answer's part is its status, which every middleware passes on.
"""

from __future__ import annotations

from typing import Any, Protocol

from imrelay.websocket.websocket import WebSocket

__all__ = ["UPGRADE", "Endpoint", "Upgrade"]

#: The key of the WSGI environ.
UPGRADE = "imrelay.upgrade"


class Endpoint(Protocol):
    """What an application runs on a WebSocket. The handler calls all of it in the connection's greenlet."""

    def attach(self) -> None:
        """Prepare, before the client gets 101; may block."""

    def run(self, websocket: WebSocket) -> None:
        """Use the socket until it ends; the handler closes it afterwards."""

    def close(self) -> None:
        """Release everything; called at the end, also where `attach` or `run` never was. Idempotent."""


class Upgrade:
    """A checked handshake that this server can upgrade."""

    __slots__ = ("_endpoint", "_is_settled", "local_address")

    def __init__(self, local_address: Any) -> None:
        #: Where the connection was accepted, as `getsockname` says it.
        self.local_address = local_address
        self._endpoint: Endpoint | None = None
        self._is_settled = False

    def accept(self, endpoint: Endpoint) -> None:
        """Have `endpoint` run on the socket if the answer to this request is 101; it is closed in any case.

        The last one counts: one that was accepted before it is closed. Raises RuntimeError, and closes `endpoint`,
        where the request has been answered already.
        """
        if self._is_settled:
            endpoint.close()
            raise RuntimeError("this request has been answered already; nothing can be accepted any more")
        former, self._endpoint = self._endpoint, endpoint
        if former is not None and former is not endpoint:
            former.close()

    def settle(self) -> Endpoint | None:
        """Return what was accepted, once, for the caller to close it; called by the handler."""
        self._is_settled = True
        endpoint, self._endpoint = self._endpoint, None
        return endpoint
