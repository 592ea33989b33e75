"""The mailbox, in which deliveries wait for the writer of one browser socket."""

from __future__ import annotations

import gevent

from imrelay.broker.frames import Delivery

__all__ = ["Delivery", "Mailbox"]


class Mailbox:
    """What waits for one socket's writer: deliveries, and frames from this process; in order.

    It has no bound of its own: deliveries are bounded by the prefetch, frames by who puts them.
    """

    __slots__ = ("_closed", "_items", "_reader")

    def __init__(self) -> None:
        self._items: list[Delivery | bytes] = []
        self._reader: gevent.Greenlet | None = None
        self._closed = False

    def put(self, item: Delivery | bytes) -> None:
        """Add an item and wake the reader. May be called from the hub.

        Once it is closed, deliveries are left out: unacknowledged, the broker gives them to somebody else.
        """
        if self._closed and isinstance(item, Delivery):
            return
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """End it: the reader gets what is there and then an empty list. May be called from the hub."""
        self._closed = True
        self._wake()

    def take(self) -> list[Delivery | bytes]:
        """Block until there is something, and return all of it; an empty list once it is closed and empty."""
        while not self._items and not self._closed:
            self._reader = gevent.getcurrent()
            try:
                gevent.get_hub().switch()
            finally:
                self._reader = None
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            gevent.get_hub().loop.run_callback(reader.switch)
