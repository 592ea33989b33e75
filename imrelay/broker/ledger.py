"""The ledger: the messages that the relay has accepted and not yet answered for; bounded in number and in time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import gevent
from gevent.event import Event
from gevent.lock import Semaphore

from imrelay.broker.publication import Publication
from imrelay.errors import AnswerableError, BrokerUnavailable

__all__ = ["Ledger"]


class Ledger:
    """Up to `size` messages, each for `timeout` seconds at most; iterating gives the oldest first."""

    def __init__(self, size: int, timeout: float) -> None:
        self._size = size
        self._timeout = timeout
        self._pending: dict[str, Publication] = {}
        #: Greenlets that wait for room, and what wakes them.
        self._waiting = 0
        self._room = Semaphore(0)
        self._empty: Event | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Publication]:
        return iter(self._pending.values())

    def find(self, mid: str) -> Publication | None:
        """Return the message with this id of the relay's."""
        return self._pending.get(mid)

    @property
    def is_filling(self) -> bool:
        """Whether over half of the room is taken."""
        return 2 * len(self._pending) > self._size

    def add(self, publication: Publication) -> None:
        """Accept a message; blocks while there is no room. Its `on_done` will be called once.

        Raises `BrokerUnavailable` when there was no room within the time limit, or the ledger was closed.
        """
        if self._waiting or len(self._pending) >= self._size:
            self._wait_for_room()
        if self._closed:
            raise BrokerUnavailable("the relay is stopping; this message was not accepted")
        publication.deadline = time.monotonic() + self._timeout
        self._pending[publication.mid] = publication

    def answer(self, publication: Publication, error: AnswerableError | None) -> None:
        """Tell the sender: it was confirmed, or why not. The first answer counts; may be called from the hub."""
        if publication.done:
            return
        publication.done = True
        del self._pending[publication.mid]
        if self._waiting:
            self._room.release()
        if self._empty is not None and not self._pending:
            self._empty.set()
        publication.on_done(publication, error)

    def expire(self) -> bool:
        """Answer what was not confirmed in time; tell whether there was any."""
        now = time.monotonic()
        late = []
        for publication in self._pending.values():
            if publication.deadline > now:
                break
            late.append(publication)
        for publication in late:
            why = f"the broker did not confirm this message within {self._timeout:g} seconds"
            self.answer(publication, BrokerUnavailable(why))
        return bool(late)

    def wait_empty(self, timeout: float) -> int:
        """Block until every message has been answered, or for `timeout` seconds; return how many were not."""
        if self._pending:
            self._empty = Event()
            self._empty.wait(timeout)
        return len(self._pending)

    def close(self) -> None:
        """Accept nothing more, and answer what is left with `BrokerUnavailable`."""
        self._closed = True
        for publication in list(self._pending.values()):
            self.answer(publication, BrokerUnavailable("the relay is stopping; this message was not confirmed"))
        for _ in range(self._waiting):
            self._room.release()

    def _wait_for_room(self) -> None:
        """Block until it is this greenlet's turn and there is room."""
        self._waiting += 1
        try:
            with gevent.Timeout(self._timeout, False):
                self._room.acquire()
                while len(self._pending) >= self._size and not self._closed:
                    self._room.acquire()
                return
        finally:
            self._waiting -= 1
        raise BrokerUnavailable("too many messages wait for the broker; this one was not accepted")
