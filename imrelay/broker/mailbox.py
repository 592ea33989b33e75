"""What a greenlet waits for: a bell that anybody rings, and what is to be written to one browser socket."""

from __future__ import annotations

from collections.abc import Callable

import gevent
from gevent import get_hub, getcurrent

from imrelay.broker.codec import Delivery

__all__ = ["Bell", "Delivery", "Mailbox"]


class Bell:
    """What one greenlet waits for, and anybody rings, the event loop too. An `Event`, for many, costs more.

    A ring that nobody waits for is not remembered: look at what you wait for before each `wait`.
    """

    __slots__ = ("_is_rung", "_waiting")

    def __init__(self) -> None:
        self._waiting: gevent.Greenlet | None = None
        self._is_rung = False

    def wait(self) -> None:
        """Block until it is rung."""
        self._waiting = getcurrent()
        try:
            get_hub().switch()
        finally:
            self._waiting = None

    def ring(self) -> None:
        """Wake who waits, in this turn of the loop."""
        if self._waiting is not None and not self._is_rung:
            self._is_rung = True
            get_hub().loop.run_callback(self._wake)

    def _wake(self) -> None:
        self._is_rung = False
        if self._waiting is not None:  # else it was killed meanwhile
            self._waiting.switch()


class Mailbox(Bell):
    """What waits to be written to one socket: deliveries, and answers of this process; in order.

    Who delivers keeps to `budget`, in bytes of bodies; answers are bounded by who puts them. All but `take` may be
    called in the event loop.
    """

    __slots__ = ("_closed", "_items", "_taken", "answer_bytes", "budget", "on_empty", "size")

    def __init__(self, budget: int = 1_048_576) -> None:
        super().__init__()
        self.budget = budget
        #: Bytes of the deliveries that wait or are being written; each counts one more, so that 0 means none.
        self.size = 0
        #: Called in the greenlet that takes, when all deliveries that were there have been written.
        self.on_empty: Callable[[], None] | None = None
        self._taken = 0
        self._items: list[Delivery | bytes] = []
        self._closed = False
        #: Bytes of the answers that wait.
        self.answer_bytes = 0

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def put(self, answer: bytes) -> None:
        """Add an answer."""
        self._items.append(answer)
        self.answer_bytes += len(answer)
        if self._waiting is not None and not self._is_rung:
            self.ring()

    def deliver(self, delivery: Delivery) -> None:
        """Add a delivery.

        Once the mailbox is closed it is left out: unacknowledged, the broker gives it to somebody else.
        """
        if not self._closed:
            self._items.append(delivery)
            self.size += len(delivery.body) + 1
            if self._waiting is not None and not self._is_rung:
                self.ring()

    def close(self) -> None:
        """End it: who takes gets what is there, and then an empty list."""
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
        self.answer_bytes = 0
        return items
