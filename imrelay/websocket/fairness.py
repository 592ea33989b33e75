"""Turns of the event loop for sockets that have more to do than one turn allows.

gevent's own `run_callback` does not suit: it runs up to 50 callbacks before it looks at the clock, and no socket
is read or written meanwhile. Here the event loop polls all sockets between two rounds.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from time import monotonic
from weakref import WeakKeyDictionary

from gevent.hub import Hub, get_hub
from gevent.hub import Waiter as _Waiter

__all__ = ["Turns", "turns_of", "yield_turn"]

#: Seconds of one round, after which the event loop polls.
_ROUND = 0.002


class Turns:
    """Calls what was added, each callback once and in order, for a short time in each turn of the event loop."""

    __slots__ = ("__weakref__", "_idle", "_pid", "_queue")

    def __init__(self, hub: Hub) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        # Not a timer: with one that is due the event loop would wait for a millisecond where nothing else happens.
        # The priority is the highest, or else it would be called only when no socket has anything.
        self._idle = hub.loop.idle(priority=hub.loop.MAXPRI)
        self._pid = os.getpid()

    @property
    def is_of_this_process(self) -> bool:
        """Tell whether no fork came in between."""
        return self._pid == os.getpid()

    def add(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the event loop, once, when it is its turn; it must not block nor raise."""
        if not self._queue:
            self._idle.start(self._run_round)
        self._queue.append(callback)

    def _run_round(self) -> None:
        queue = self._queue
        until = monotonic() + _ROUND
        for _ in range(len(queue)):
            queue.popleft()()
            if monotonic() >= until:
                break
        if not queue:
            self._idle.stop()


_turns: WeakKeyDictionary[Hub, Turns] = WeakKeyDictionary()


def turns_of(hub: Hub) -> Turns:
    """Return the turns of the sockets that run on `hub`."""
    turns = _turns.get(hub)
    if turns is None or not turns.is_of_this_process:
        turns = _turns[hub] = Turns(hub)
    return turns


def yield_turn() -> None:
    """Let all others have a turn, sockets that have become readable included; called in a greenlet.

    `gevent.sleep(0)` comes back up to 50 times before the event loop looks at its sockets again.
    """
    hub = get_hub()
    waiter = _Waiter(hub)
    turns_of(hub).add(lambda: waiter.switch(None))  # does nothing where the greenlet was killed meanwhile
    waiter.get()
