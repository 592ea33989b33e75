"""What a greenlet waits for: a bell that anybody rings, and the mailbox of one browser socket."""

from __future__ import annotations

from collections.abc import Callable

import gevent

from imrelay.broker.frames import Delivery

__all__ = ["Bell", "Delivery", "Mailbox"]


class Bell:
    """What one greenlet waits at and anybody rings, the hub too. Cheaper than an `Event`, which many may wait for.

    A ring that nobody waits for is not remembered: look at what you wait for before each `wait`.
    """

    __slots__ = ("_is_rung", "_waiting")

    def __init__(self) -> None:
        self._waiting: gevent.Greenlet | None = None
        self._is_rung = False

    def wait(self) -> None:
        """Block until it is rung."""
        self._waiting = gevent.getcurrent()
        try:
            gevent.get_hub().switch()
        finally:
            self._waiting = None

    def ring(self) -> None:
        """Wake who waits, in this turn of the loop."""
        if self._waiting is not None and not self._is_rung:
            self._is_rung = True
            gevent.get_hub().loop.run_callback(self._wake)

    def _wake(self) -> None:
        self._is_rung = False
        if self._waiting is not None:  # else it was killed meanwhile
            self._waiting.switch()


class Mailbox(Bell):
    """What waits for one socket's writer: deliveries, and frames from this process; in order.

    Who delivers keeps to `budget`, in bytes of bodies; frames are bounded by who puts them.
    """

    __slots__ = ("_closed", "_items", "_taken", "budget", "frame_bytes", "on_empty", "size")

    def __init__(self, budget: int = 1_048_576) -> None:
        super().__init__()
        self.budget = budget
        #: Bytes of the deliveries that wait or are being written; each counts one more, so that 0 means none.
        self.size = 0
        #: Called in the writer when all deliveries that were there have been written.
        self.on_empty: Callable[[], None] | None = None
        self._taken = 0
        self._items: list[Delivery | bytes] = []
        self._closed = False
        #: Bytes of the frames in it.
        self.frame_bytes = 0

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def put(self, frame: bytes) -> None:
        """Add a frame. May be called from the hub."""
        self._items.append(frame)
        self.frame_bytes += len(frame)
        self.ring()

    def deliver(self, delivery: Delivery) -> None:
        """Add a delivery. May be called from the hub.

        Once the mailbox is closed it is left out: unacknowledged, the broker gives it to somebody else.
        """
        if not self._closed:
            self._items.append(delivery)
            self.size += len(delivery.body) + 1
            if self._waiting is not None and not self._is_rung:
                self.ring()

    def close(self) -> None:
        """End it: the reader gets what is there and then an empty list. May be called from the hub."""
        self._closed = True
        self.ring()

    def take(self) -> list[Delivery | bytes]:
        """Block until there is something, and return all of it; an empty list once it is closed and empty.

        Whoever takes again has written what was taken before.
        """
        self.size -= self._taken
        self._taken = 0
        if self.on_empty is not None and not self.size and not self._closed:
            self.on_empty()
        while not self._items and not self._closed:
            self.wait()
        items, self._items = self._items, []
        self._taken = self.size
        self.frame_bytes = 0
        return items
