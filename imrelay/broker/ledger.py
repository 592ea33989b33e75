"""The ledger: the messages that the relay has accepted and not yet answered; bounded in number, bytes and time."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from gevent.event import Event

from imrelay.broker.publication import Publication
from imrelay.errors import AnswerableError, BrokerUnavailable

__all__ = ["Ledger"]

logger = logging.getLogger(__name__)


class Ledger:
    """Up to `size` messages of `size_bytes` together, each for `timeout` seconds; iterating: oldest first.

    One message that is larger than that on its own is accepted while there is no other. Messages for which there
    is no room wait, one for each sender, and are accepted in their order; `on_accepted` is called with each of
    those. Nothing here but `wait_empty` blocks, and all else may be called in the event loop.
    """

    def __init__(
        self,
        size: int,
        timeout: float,
        size_bytes: int,
        on_accepted: Callable[[Publication], None] = lambda publication: None,
    ) -> None:
        self._size = size
        self._size_bytes = size_bytes
        self._timeout = timeout
        self._on_accepted = on_accepted
        self._pending: dict[Publication, None] = {}
        #: Bytes of the bodies in `_pending`.
        self._pending_bytes = 0
        #: The messages for which there was no room, and what tells the sender that it may give the next one.
        self._waiting: OrderedDict[Publication, Callable[[], None]] = OrderedDict()
        self._empty: Event | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Publication]:
        return iter(self._pending)

    @property
    def held_bytes(self) -> int:
        """Bytes of the bodies that are kept."""
        return self._pending_bytes

    @property
    def is_filling(self) -> bool:
        """Whether over half of the room is taken."""
        return 2 * len(self._pending) > self._size

    def add(self, publication: Publication, on_room: Callable[[], None]) -> bool:
        """Accept a message, or let it wait for room; tell whether it was accepted. Its `on_done` is called once.

        A sender whose message waits gives no other one before `on_room` is called: then the message was accepted,
        or was answered because it had waited for `timeout` seconds. Raises `BrokerUnavailable` once it is closed.
        """
        if self._closed:
            raise BrokerUnavailable("the relay is stopping; this message was not accepted")
        publication.deadline = time.monotonic() + self._timeout
        if self._waiting or not self._has_room(len(publication.body)):
            self._waiting[publication] = on_room
            return False
        self._pending[publication] = None
        self._pending_bytes += len(publication.body)
        return True

    def withdraw(self, publication: Publication) -> None:
        """Forget a message if it still waits for room: its sender is gone, and gets no answer."""
        if self._waiting.pop(publication, None) is not None:
            publication.done = True
            publication.body = publication.sent = b""
            self._admit()  # the next one may need less room

    def answer(self, publication: Publication, error: AnswerableError | None) -> None:
        """Tell the sender that it was confirmed, or why not. The first answer counts.

        The body is dropped: a broker that takes messages and does not confirm them must not keep them in memory.
        """
        if publication.done:
            return
        del self._pending[publication]
        self._pending_bytes -= len(publication.body)
        self._tell(publication, error)
        if self._waiting:
            self._admit()
        if self._empty is not None and not self._pending:
            self._empty.set()

    def _tell(self, publication: Publication, error: AnswerableError | None) -> None:
        """Give a sender its answer."""
        publication.done = True
        try:
            publication.on_done(publication, error)
        except Exception:  # the other senders, who are answered in the same loop, still get their answers
            logger.exception("the sender of message %s could not be answered", publication.mid)
        publication.body = publication.sent = b""

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
        while self._waiting and next(iter(self._waiting)).deadline <= now:
            self._refuse_first("too many messages wait for the broker; this one was not accepted")
        if self._waiting:
            self._admit()  # those behind them may need less room
        return bool(late)

    def wait_empty(self, timeout: float) -> int:
        """Block until every message has been answered, or for `timeout` seconds; return how many were not."""
        deadline = time.monotonic() + timeout
        while self._pending:  # while any wait for room, some are pending
            self._empty = Event()
            if not self._empty.wait(max(0.0, deadline - time.monotonic())):
                break
        return len(self._pending)

    def close(self) -> None:
        """Accept nothing more, and answer what is left with `BrokerUnavailable`."""
        self._closed = True
        while self._waiting:
            self._refuse_first("the relay is stopping; this message was not accepted")
        for publication in list(self._pending):
            self._give_up(publication, "before the relay stopped")

    def _give_up(self, publication: Publication, when: str) -> None:
        """Answer a message that was not confirmed: what has not left this process is withdrawn."""
        if publication.handed_over:
            why = f"the broker did not confirm this message {when}: it may arrive all the same"
        else:
            why = f"this message could not be given to the broker {when}; it was withdrawn"
        self.answer(publication, BrokerUnavailable(why, uncertain=publication.handed_over))

    def _has_room(self, size: int) -> bool:
        count = len(self._pending)
        return not count or (count < self._size and self._pending_bytes + size <= self._size_bytes)

    def _admit(self) -> None:
        """Accept messages that wait, in their order, as far as there is room."""
        waiting = self._waiting
        while waiting and self._has_room(len(next(iter(waiting)).body)):
            publication, on_room = waiting.popitem(last=False)
            publication.deadline = time.monotonic() + self._timeout
            self._pending[publication] = None
            self._pending_bytes += len(publication.body)
            self._on_accepted(publication)
            self._go_on(publication, on_room)

    def _refuse_first(self, why: str) -> None:
        """Answer the message that has waited longest for room."""
        publication, on_room = self._waiting.popitem(last=False)
        self._tell(publication, BrokerUnavailable(why))
        self._go_on(publication, on_room)

    @staticmethod
    def _go_on(publication: Publication, on_room: Callable[[], None]) -> None:
        try:
            on_room()
        except Exception:
            logger.exception("the sender of message %s could not be told to go on", publication.mid)
