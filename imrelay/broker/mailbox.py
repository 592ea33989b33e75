"""What greenlets wait for: `Bell` wakes one of them, `Mailbox` holds what is to be written to a browser."""

from __future__ import annotations

from collections.abc import Callable

import gevent
from gevent import get_hub, getcurrent

from imrelay.broker.codec import Delivery

__all__ = ["Bell", "Mailbox"]


class Bell:
    """Wakes the one greenlet that waits; may be rung from anywhere, the event loop too. Cheaper than an `Event`.

    A ring while nobody waits is not remembered: check the condition before each `wait`.
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
        """Wake the greenlet that waits, in this turn of the event loop."""
        if self._waiting is not None and not self._is_rung:
            self._is_rung = True
            get_hub().loop.run_callback(self._wake)

    def _wake(self) -> None:
        self._is_rung = False
        if self._waiting is not None:  # else it was killed meanwhile
            self._waiting.switch()


class Mailbox(Bell):
    """What waits to be written to one socket: deliveries, and answers to its own messages; in order.

    The caller of `deliver` keeps to `budget`, in bytes of bodies; the caller of `put` bounds the answers. All but
    `take` may be called in the event loop.
    """

    __slots__ = ("_closed", "_fault", "_items", "_taken", "answer_bytes", "budget", "on_empty", "size")

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
        #: What `fail` was given.
        self._fault: Exception | None = None
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

        Once the mailbox is closed it is dropped: unacknowledged, it is delivered to another consumer.
        """
        if not self._closed:
            self._items.append(delivery)
            self.size += len(delivery.body) + 1
            if self._waiting is not None and not self._is_rung:
                self.ring()

    def close(self) -> None:
        """End it: `take` returns what is there, and then an empty list."""
        self._closed = True
        self.ring()

    def fail(self, fault: Exception) -> None:
        """End it because a delivery could not be added: who takes gets this exception next."""
        self._fault = fault
        self.close()

    def take(self) -> list[Delivery | bytes]:
        """Block until there is something, and return all of it; an empty list once it is closed and empty.

        Whoever takes again has written what was taken before. Raises what `fail` was given.
        """
        self.size -= self._taken
        self._taken = 0
        if self.on_empty is not None and not self.size and not self._closed:
            self.on_empty()
        while not self._items and not self._closed:
            self.wait()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        items, self._items = self._items, []
        self._taken = self.size
        self.answer_bytes = 0
        return items
