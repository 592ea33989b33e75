"""How many connections of a process may speak plain HTTP at the same time, and a log of what was refused."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from time import monotonic

__all__ = ["EXTRA_CONNECTIONS", "HttpConnections", "Place", "RefusalLog"]

#: Connections beyond the bound that may still send one request each, within `EXTRA_SECONDS`.
EXTRA_CONNECTIONS, EXTRA_SECONDS = 16, 1.0
#: Seconds between two lines about refusals of one kind.
_LOG_INTERVAL = 10.0


class Place(enum.Enum):
    """How a new connection is treated."""

    #: It is served.
    FREE = "free"
    #: It is beyond the bound and may send one request: a WebSocket handshake and a path in `served_when_full` are
    #: served, all else is refused. One that has sent nothing is ended as soon as another one comes.
    EXTRA = "extra"
    #: It is refused at once.
    NONE = "none"


class RefusalLog:
    """Writes a warning when something is refused, and then one in `_LOG_INTERVAL` with how many there were."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._count = 0
        self._quiet_until = float("-inf")

    def note(self, what: str) -> None:
        """Count one refusal; `what` is the sentence to log."""
        self._count += 1
        now = self._clock()
        if now >= self._quiet_until:
            self._logger.warning("%s; refused so far: %d", what, self._count)
            self._quiet_until = now + _LOG_INTERVAL


class HttpConnections:
    """Counts the HTTP connections of a process; one that has become a WebSocket is no longer counted."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._count = 0
        #: How to end the extra connections that have not yet sent a request, the oldest first.
        self._undecided: dict[Callable[[], None], None] = {}
        self._log = RefusalLog(logging.getLogger(__name__))

    def __len__(self) -> int:
        return self._count

    def enter(self) -> Place:
        """Count a new connection and return how it is treated; one that is refused is not counted."""
        if self._count < self.max_connections:
            self._count += 1
            return Place.FREE
        self._log.note(f"max_http_connections ({self.max_connections}) are open, one more was refused")
        if self._count < self.max_connections + EXTRA_CONNECTIONS or self._end_oldest():
            self._count += 1
            return Place.EXTRA
        return Place.NONE

    def await_request(self, end: Callable[[], None]) -> None:
        """Note an extra connection without a request; `end` is called, once, if another one needs its place."""
        self._undecided[end] = None

    def note_request(self, end: Callable[[], None]) -> None:
        """Note that an extra connection has sent its request, or is gone. Idempotent."""
        self._undecided.pop(end, None)

    def _end_oldest(self) -> bool:
        """End the extra connection that has waited longest without a request, if there is one."""
        for end in self._undecided:
            del self._undecided[end]
            end()
            return True
        return False

    def leave(self) -> None:
        """No longer count a connection."""
        self._count -= 1

    def come_back(self) -> None:
        """Count a connection again that was to become a WebSocket and did not."""
        self._count += 1
