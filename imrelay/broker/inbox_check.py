"""Making sure that users have an inbox, before a message is published to them: many in one round trip.

That a mandatory message does not come back does not prove an inbox: any other queue that is bound for that user
receives it. So inboxes are declared and bound first, or only looked for where none is to be created.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import gevent
from gevent.lock import Semaphore

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.broker.hanging_inboxes import HangingInboxes
from imrelay.broker.inbox_opening import inbox_exists, methods_for, open_inbox
from imrelay.broker.known_inboxes import KnownInbox
from imrelay.broker.mailbox import Bell
from imrelay.broker.route import Route
from imrelay.broker.topology import AS_IT_STANDS, Keep, Topology
from imrelay.errors import ChannelLost

__all__ = ["InboxCheck", "Outcome"]

logger = logging.getLogger(__name__)

#: Users of one round trip.
_BATCH = 64
#: Seconds for the answer to a batch; then it is divided, so that one queue without a leader delays no others.
#: Also for a check of one user, which is repeated later.
_BATCH_TIMEOUT = 5.0
#: Into how many parts a batch is divided that the broker refuses, or does not answer, for one of its users.
_PARTS = 8
#: Users of one part where inboxes are replicated: they take longer, on several nodes at the same time.
_REPLICATED_PART = 8
#: Channels on which parts are checked at the same time; as many more for users who could not be checked before.
_PARALLEL = 16
#: What is known is out of date after so many seconds, and after half of the inbox's expiry.
_KNOWN_FOR = 60.0
#: Seconds between two warnings.
_WARN_INTERVAL = 5.0

#: The inbox; None: there is none, and none is to be created; or the exception that prevented the check.
Outcome = KnownInbox | BaseException | None


class InboxCheck:
    """Makes sure of inboxes over the publisher's connection; `on_checked` is called with each outcome.

    `create`: inboxes that are not there are opened. `expires`: the `x-expires` of the topology, in seconds.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        on_checked: Callable[[Route, Outcome], None],
        *,
        create: bool,
        expires: float,
        clock: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._topology = topology
        self._on_checked = on_checked
        self._create = create
        self._expires = expires
        self._clock = clock
        self._queue: deque[Route] = deque()
        self._bell = Bell()
        #: Stays open for all batches, until the broker refuses one.
        self._channel: Channel | None = None
        self._hanging = HangingInboxes(connection)
        self._parallel = Semaphore(_PARALLEL)
        self._parallel_again = Semaphore(_PARALLEL)
        #: Users of one request: fewer after a refusal, which costs a channel, where most of them may be unknown.
        self._size = _REPLICATED_PART if topology.is_replicated else _BATCH
        self._largest = self._size
        self._stopped = False
        self._warned_at = -_WARN_INTERVAL

    def ask(self, route: Route) -> None:
        """Have a user's inbox made sure of, together with others; returns at once."""
        route.asked = len(route.waiting)
        self._queue.append(route)
        self._bell.ring()

    def forget(self) -> None:
        """Drop all that wait to be checked: the channel was lost, and the routes with it."""
        self._queue.clear()

    def stop(self) -> None:
        """End `run_checks`."""
        self._stopped = True
        self._bell.ring()

    def run_checks(self) -> None:
        """Check those who wait, batch by batch, until it is stopped."""
        while not self._stopped:
            if not self._queue:
                self._bell.wait()
                continue
            asked = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH))]
            doubtful = [one for one in asked if one.failures or one.user in self._hanging]
            self._spawn_parts(doubtful, 1)  # lest they hold up the others
            batch = [one for one in asked if one not in doubtful]
            if not batch:
                continue
            if self._topology.is_replicated or self._size == 1 or self._size < len(batch):
                self._spawn_parts(batch, self._size)
                continue
            try:
                if self._channel is None:
                    self._channel = Channel(self._connection)
                self._check_batch(self._channel, batch)
            except (Exception, gevent.Timeout) as exc:
                self._close_channel()  # answers to this batch may still come
                self._divide_or_fail(batch, exc)

    def _close_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _check_batch(self, channel: Channel, batch: Sequence[Route]) -> None:
        asked_at = self._clock()
        keeps = [AS_IT_STANDS[0] if one.inbox is None else one.inbox.keep for one in batch]
        users = zip((one.user for one in batch), keeps, strict=True)
        with gevent.Timeout(_BATCH_TIMEOUT):
            channel.call(*methods_for(self._topology, users, create=self._create))
        self._size = min(self._size * 2, self._largest)
        for one, keep in zip(batch, keeps, strict=True):
            expires = None if one.inbox is None else one.inbox.expires
            self._on_checked(one, self._known_inbox(asked_at, keep, expires))

    def _divide_or_fail(self, batch: Sequence[Route], exc: BaseException) -> None:
        """Divide a batch that the broker has refused or not answered; report the failure where it was lost."""
        is_for_one = isinstance(exc, gevent.Timeout) or (isinstance(exc, ChannelLost) and exc.reply_code)
        if is_for_one:
            logger.debug("%d inboxes are checked in parts: %s", len(batch), exc)
            self._size = max(1, len(batch) // _PARTS)
            self._spawn_parts(batch, self._size)
        else:
            self._fail(batch, exc)

    def _spawn_parts(self, batch: Sequence[Route], size: int) -> None:
        """Check so many users at a time over a channel of its own, several at the same time."""
        for at in range(0, len(batch), size):
            part = batch[at : at + size]
            gevent.spawn(self._run_part, part).name = f"inbox check:{part[0].user}"

    def _run_part(self, part: Sequence[Route]) -> None:
        try:
            with self._parallel_again if part[0].failures else self._parallel:
                if len(part) == 1:
                    self._check_one(part[0])
                    return
                channel = Channel(self._connection)
                try:
                    self._check_batch(channel, part)
                finally:
                    channel.close()
        except (Exception, gevent.Timeout) as exc:
            if len(part) > 1:
                self._divide_or_fail(part, exc)
            else:
                self._fail(part, exc)

    def _check_one(self, route: Route) -> None:
        """Check one user as thoroughly as it takes."""
        self._hanging.check(route.user)
        channels: list[Channel] = []

        def new_channel() -> Channel:
            channels.append(Channel(self._connection))
            return channels[-1]

        try:
            with gevent.Timeout(_BATCH_TIMEOUT):
                self._on_checked(route, self._find_one(route, new_channel))
        except gevent.Timeout:
            for channel in channels[-1:]:
                self._hanging.add(route.user, channel)
            raise

    def _find_one(self, route: Route, new_channel: Callable[[], Channel]) -> KnownInbox | None:
        asked_at = self._clock()
        if not self._create and not inbox_exists(new_channel, self._topology, route.user):
            return None
        keep, expires = open_inbox(new_channel, self._topology, route.user)
        self._size = min(self._size * 2, self._largest)
        return self._known_inbox(asked_at, keep, expires)

    def _known_inbox(self, asked_at: float, keep: Keep, expires: float | None) -> KnownInbox:
        if expires is None:
            expires = self._expires
        known_for = min(_KNOWN_FOR, expires / 2) if expires else _KNOWN_FOR
        return KnownInbox(asked_at + known_for, keep, expires)

    def _fail(self, batch: Sequence[Route], exc: BaseException) -> None:
        if not isinstance(exc, (ChannelLost, gevent.Timeout)):
            logger.error("inboxes could not be checked; they will be again", exc_info=exc)
        elif getattr(exc, "reply_code", True) and time.monotonic() - self._warned_at >= _WARN_INTERVAL:
            self._warned_at = time.monotonic()
            more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
            logger.warning("the inbox of %s%s could not be made sure of: %s", ascii(batch[0].user), more, exc)
        for one in batch:
            self._on_checked(one, exc)
