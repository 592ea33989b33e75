"""How many connections of a process may speak plain HTTP at the same time, and a log of what was refused."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from time import monotonic

__all__ = ["CROWD", "Admission", "Place", "RefusalLog"]

#: Connections beyond the bound that may still say what they want, each within `CROWD_SECONDS`.
CROWD, CROWD_SECONDS = 16, 1.0
#: Seconds between two lines about refusals of one kind.
_LOG_INTERVAL = 10.0


class Place(enum.Enum):
    """What a new connection gets."""

    #: It is served.
    FREE = "free"
    #: It may say what it wants: a WebSocket and what `served_in_a_crowd` names are served, all else is refused.
    #: Who says nothing goes as soon as another one comes.
    CROWDED = "crowded"
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


class Admission:
    """Counts the HTTP connections of a process; one that has become a WebSocket is no longer counted."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._count = 0
        #: How to end those of the crowd that have not yet said what they want, the oldest first.
        self._undecided: dict[Callable[[], None], None] = {}
        self._log = RefusalLog(logging.getLogger(__name__))

    def __len__(self) -> int:
        return self._count

    def enter(self) -> Place:
        """Count a new connection and say what it gets; one that gets no place is not counted."""
        if self._count < self.max_connections:
            self._count += 1
            return Place.FREE
        self._log.note(f"max_http_connections ({self.max_connections}) are here, one more was refused")
        if self._count < self.max_connections + CROWD or self._end_oldest():
            self._count += 1
            return Place.CROWDED
        return Place.NONE

    def listen_to(self, end: Callable[[], None]) -> None:
        """Note that one of the crowd may speak now; `end` is called, once, when it has to go for another."""
        self._undecided[end] = None

    def has_spoken(self, end: Callable[[], None]) -> None:
        """Note that one of the crowd has said what it wants, or is gone. Idempotent."""
        self._undecided.pop(end, None)

    def _end_oldest(self) -> bool:
        """End the one of the crowd that has had the most time to speak, if there is one."""
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
