"""The ledger: the messages that the relay has accepted and not yet answered; bounded in number, bytes and time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator

from gevent.event import Event

from imrelay.broker.publication import Publication
from imrelay.errors import AnswerableError, BrokerUnavailable

__all__ = ["Ledger"]

logger = logging.getLogger(__name__)


class _Turn:
    """A greenlet that waits for room for a message of `size` bytes."""

    __slots__ = ("is_admitted", "size", "wakeup")

    def __init__(self, size: int) -> None:
        self.size = size
        self.wakeup = Event()
        #: Whether the room is taken for it.
        self.is_admitted = False


class Ledger:
    """Up to `size` messages of `size_bytes` together, each for `timeout` seconds; iterating: oldest first.

    One message that is larger than that on its own is accepted while there is no other.
    """

    def __init__(self, size: int, timeout: float, size_bytes: int) -> None:
        self._size = size
        self._size_bytes = size_bytes
        self._timeout = timeout
        self._pending: dict[Publication, None] = {}
        #: What is taken, for messages that are pending or just being added.
        self._taken = self._taken_bytes = 0
        self._turns: deque[_Turn] = deque()
        self._empty: Event | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Publication]:
        return iter(self._pending)

    @property
    def held_bytes(self) -> int:
        """Bytes of the bodies that are kept."""
        return self._taken_bytes

    @property
    def is_filling(self) -> bool:
        """Whether over half of the room is taken."""
        return 2 * self._taken > self._size

    def add(self, publication: Publication) -> None:
        """Accept a message; blocks while there is no room. Its `on_done` will be called once.

        Raises `BrokerUnavailable` when there was no room within the time limit, or the ledger was closed.
        """
        size = len(publication.body)
        if self._turns or not self._has_room(size):
            self._wait_for_room(size)
        else:
            self._take(size)
        if self._closed:
            self._give_back(size)
            raise BrokerUnavailable("the relay is stopping; this message was not accepted")
        publication.deadline = time.monotonic() + self._timeout
        self._pending[publication] = None

    def answer(self, publication: Publication, error: AnswerableError | None) -> None:
        """Tell the sender: it was confirmed, or why not. The first answer counts; may be called from the hub.

        The body is let go: a broker that takes and does not confirm must not keep it here.
        """
        if publication.done:
            return
        publication.done = True
        del self._pending[publication]
        size = len(publication.body)
        try:
            publication.on_done(publication, error)
        except Exception:  # one sender's fault is not that of the others, who are answered in the same loop
            logger.exception("the sender of message %s could not be answered", publication.mid)
        publication.body = publication.sent = b""
        self._give_back(size)
        if self._empty is not None and not self._taken:
            self._empty.set()

    def expire(self) -> bool:
        """Answer what was not confirmed in time; tell whether there was any."""
        now = time.monotonic()
        late = []
        for publication in self._pending:
            if publication.deadline > now:
                break
            late.append(publication)
        for publication in late:
            self._give_up(publication, f"within {self._timeout:g} seconds")
        return bool(late)

    def wait_empty(self, timeout: float) -> int:
        """Block until every message has been answered, or for `timeout` seconds; return how many were not."""
        deadline = time.monotonic() + timeout
        while self._taken:  # also by one that has waited for room and is just being added
            self._empty = Event()
            if not self._empty.wait(max(0.0, deadline - time.monotonic())):
                break
        return len(self._pending)

    def close(self) -> None:
        """Accept nothing more, and answer what is left with `BrokerUnavailable`."""
        self._closed = True
        for publication in list(self._pending):
            self._give_up(publication, "before the relay stopped")
        for turn in self._turns:
            turn.wakeup.set()

    def _give_up(self, publication: Publication, when: str) -> None:
        """Answer a message that was not confirmed: what has not left this process is withdrawn."""
        if publication.handed_over:
            why = f"the broker did not confirm this message {when}: it may arrive all the same"
        else:
            why = f"this message could not be given to the broker {when}; it was withdrawn"
        self.answer(publication, BrokerUnavailable(why, uncertain=publication.handed_over))

    def _has_room(self, size: int) -> bool:
        taken = self._taken
        return not taken or (taken < self._size and self._taken_bytes + size <= self._size_bytes)

    def _take(self, size: int) -> None:
        self._taken += 1
        self._taken_bytes += size

    def _give_back(self, size: int) -> None:
        self._taken -= 1
        self._taken_bytes -= size
        if self._turns:
            self._admit()

    def _admit(self) -> None:
        """Let in those who wait, in their order, as far as there is room."""
        while self._turns and self._has_room(self._turns[0].size):
            turn = self._turns.popleft()
            self._take(turn.size)
            turn.is_admitted = True
            turn.wakeup.set()

    def _wait_for_room(self, size: int) -> None:
        """Block until it is this greenlet's turn and there is room, which is then taken."""
        if self._closed:
            self._take(size)
            return
        turn = _Turn(size)
        self._turns.append(turn)
        try:
            turn.wakeup.wait(self._timeout)
        except BaseException:
            if turn.is_admitted:
                self._give_back(size)
            raise
        finally:
            if not turn.is_admitted:
                self._turns.remove(turn)
                self._admit()  # the others may need less room
        if turn.is_admitted:
            return
        if self._closed:
            raise BrokerUnavailable("the relay is stopping; this message was not accepted")
        raise BrokerUnavailable("too many messages wait for the broker; this one was not accepted")
