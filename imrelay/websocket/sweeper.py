"""One greenlet per process that looks at the deadlines of all its sockets.

Nothing is created on import, and nothing outlives a fork: the sweeper belongs to the hub that the first socket
of a process runs on.
"""

from __future__ import annotations

import logging
import os
from time import monotonic
from typing import Protocol
from weakref import WeakKeyDictionary

import gevent
from gevent.hub import Hub

__all__ = ["Sweeper", "Swept", "sweeper_of"]

logger = logging.getLogger(__name__)

#: Seconds between two rounds: a tenth of the shortest deadline, within these bounds.
_MIN_TICK, _MAX_TICK = 0.02, 0.5
#: Sockets looked at before other greenlets get their turn.
_SLICE = 256
#: Seconds before the next round after one that failed as a whole.
_FAULT_PAUSE = 1.0


class Swept(Protocol):
    """An object with deadlines."""

    @property
    def due(self) -> float:
        """The next moment (`time.monotonic`) at which something may have to be done."""

    def on_due(self, now: float) -> None:
        """Do it, and move `due`; called in the sweeper's greenlet, must not block."""

    def abort(self) -> None:
        """End at once: `on_due` has failed."""


class Sweeper:
    """Calls `on_due` of every socket whose time has come, late by one tick at most."""

    __slots__ = ("__weakref__", "_greenlet", "_pid", "_sockets", "_tick")

    def __init__(self) -> None:
        self._sockets: set[Swept] = set()
        self._greenlet: gevent.Greenlet | None = None
        self._tick = _MAX_TICK
        self._pid = os.getpid()

    @property
    def is_of_this_process(self) -> bool:
        """Tell whether no fork came in between."""
        return self._pid == os.getpid()

    def add(self, socket: Swept, *, shortest: float) -> None:
        """Look after `socket`; `shortest` of its deadlines, in seconds, sets how often."""
        self._sockets.add(socket)
        self._tick = min(self._tick, max(_MIN_TICK, shortest / 10))
        if self._greenlet is None or self._greenlet.dead:
            self._greenlet = gevent.spawn(self._run_sweeper)
            self._greenlet.name = "sweeper"

    def discard(self, socket: Swept) -> None:
        """Forget `socket`."""
        self._sockets.discard(socket)

    def _run_sweeper(self) -> None:
        """End when no socket is left, so that the process may end."""
        while self._sockets:
            try:
                gevent.sleep(self._tick)
                self._sweep()
            except Exception:
                logger.exception("deadlines could not be looked at; again in %g s", _FAULT_PAUSE)
                gevent.sleep(_FAULT_PAUSE)

    def _sweep(self) -> None:
        sockets = list(self._sockets)
        for start in range(0, len(sockets), _SLICE):
            if start:
                gevent.sleep(0)
            now = monotonic()
            for socket in sockets[start : start + _SLICE]:
                try:
                    if socket.due <= now:
                        socket.on_due(now)
                except Exception:
                    logger.exception("a deadline could not be kept")
                    self._abort(socket)

    def _abort(self, socket: Swept) -> None:
        self._sockets.discard(socket)
        try:
            socket.abort()
        except Exception:
            logger.exception("a socket whose deadline could not be kept could not be ended")


_sweepers: WeakKeyDictionary[Hub, Sweeper] = WeakKeyDictionary()


def sweeper_of(hub: Hub) -> Sweeper:
    """Return the sweeper of the sockets that run on `hub`."""
    sweeper = _sweepers.get(hub)
    if sweeper is None or not sweeper.is_of_this_process:
        sweeper = _sweepers[hub] = Sweeper()
    return sweeper
