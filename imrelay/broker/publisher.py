"""The publisher: one greenlet that publishes every message of this process and has its sender answered.

Messages wait in a bounded queue, go out in batches with `mandatory`, and are done when the broker has confirmed
them. What a lost connection leaves unconfirmed is published again, in order and with the same message id.

A message is handed over when it is written to the connection. As long as the kernel has not taken all of that, and
while too many are not confirmed, the next ones stay in the queue; those that stay too long are withdrawn. Before
the first message to a user, and when what is known is out of date, the publisher makes sure of the user's inbox:
messages wait in a `Route` for that, as they do after one came back.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import gevent
from gevent.event import Event

from imrelay.broker.batch_writer import BatchWriter
from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection, ConnectionState
from imrelay.broker.inbox_check import InboxCheck, Outcome
from imrelay.broker.known_inboxes import KnownInbox, KnownInboxes
from imrelay.broker.ledger import Ledger
from imrelay.broker.mailbox import Bell
from imrelay.broker.publication import Publication
from imrelay.broker.refusals import Refusals
from imrelay.broker.route import Route
from imrelay.broker.routes import Routes
from imrelay.broker.topology import AS_IT_STANDS, Topology
from imrelay.broker.unconfirmed import Unconfirmed
from imrelay.errors import ChannelLost
from imrelay.runtime.loops import run_for_ever

__all__ = ["Publisher"]

logger = logging.getLogger(__name__)

#: How often the deadlines of waiting messages are looked at, in seconds.
_SWEEP = 0.2
#: Pause after the channel went with its connection, in seconds.
_LOST_PAUSE = 0.02
#: Seconds for which a user without an inbox counts as being at another server.
_ELSEWHERE = 1.0
#: Pause after a fault of the publisher's own, in seconds.
_FAULT_PAUSE = 0.5
#: `channel.close` code of AMQP 0-9-1.
_NOT_FOUND = 404


class Publisher:
    """Publishes for all sessions of this process, on a connection of its own.

    `on_exchange_lost` is called when the exchange had been deleted and was declared again: its bindings are gone.
    `queue_size` and `queue_bytes` bound the messages that are not yet answered; `queue_size` also those that were
    handed over and not confirmed. `timeout` (seconds) is the longest time that a message waits for its answer, and
    the longest that it waits for room before. `inbox_expires` is the `x-expires` of new inboxes (seconds).
    `other_server`: users without an inbox may be at the article's Node.js server.
    """

    def __init__(
        self,
        new_connection: Callable[[str, Callable[[ConnectionState], None]], Connection],
        topology: Topology,
        *,
        queue_size: int,
        timeout: float,
        persistent: bool,
        create_unknown: bool,
        other_server: bool = False,
        queue_bytes: int = 1 << 26,
        inbox_expires: float = 0.0,
        on_exchange_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = new_connection("publish", self._on_state)
        self._topology = topology
        self._persistent = persistent
        self._on_exchange_lost = on_exchange_lost
        self._exchange_is_lost = False
        self._ledger = Ledger(queue_size, timeout, queue_bytes, self._enqueue)
        #: What is to be published next; shared with `_batches`, so it stays the same object.
        self._queue: deque[Publication] = deque()
        self._unconfirmed = Unconfirmed()
        self._max_unconfirmed = queue_size
        self._known = KnownInboxes()
        self._check = InboxCheck(
            self._connection, topology, self._on_checked, create=create_unknown, expires=inbox_expires, clock=clock
        )
        self._routes = self._new_routes(other_server, clock)
        self._refusals = Refusals(clock)
        self._batches = BatchWriter(
            self._queue,
            self._ledger,
            self._unconfirmed,
            self._routes,
            self._known,
            self._refusals,
            max_unconfirmed=queue_size,
            clock=clock,
        )
        self._channel: Channel | None = None
        #: Why the last channel ended, until `_recover` has handled it.
        self._lost: ChannelLost | None = None
        self._bell = Bell()
        self._stopped = False
        self._stopping = Event()
        self._greenlets: list[gevent.Greenlet] = []

    def _new_routes(self, other_server: bool, clock: Callable[[], float]) -> Routes:
        return Routes(
            self._ledger,
            self._connection,
            self._topology,
            self._known,
            persistent=self._persistent,
            ask=self._check.ask,
            requeue=self._requeue,
            renew=self._leave,
            elsewhere=(lambda: KnownInbox(clock() + _ELSEWHERE, AS_IT_STANDS[0], 0.0)) if other_server else None,
        )

    def start(self) -> None:
        """Begin to connect and to publish; returns at once."""
        self._connection.start()
        for role in (self._run_publisher, self._run_deadlines, self._check.run_checks):
            self._greenlets.append(run_for_ever(role, name=role.__name__.removeprefix("_run_")))

    def flush(self, timeout: float) -> int:
        """Block until every message has been answered, or for `timeout` seconds; return how many were not."""
        return self._ledger.wait_empty(timeout)

    def stop(self) -> None:
        """End it; what is still waiting is answered with `BrokerUnavailable`."""
        self._stopped = True
        self._stopping.set()
        self._bell.ring()
        self._check.stop()
        self._ledger.close()
        self._connection.close()
        gevent.joinall(self._greenlets, timeout=2)

    @property
    def connection(self) -> Connection:
        """The connection that publishes; the relay queue has a channel on it, too."""
        return self._connection

    @property
    def is_ready(self) -> bool:
        """Whether a message that came now would go out at once."""
        return self._channel is not None and self._connection.state is ConnectionState.OPEN

    @property
    def problem(self) -> str:
        """Why it is not ready, in one sentence."""
        return self._connection.reason or "the channel is being opened"

    def publish(self, publication: Publication, on_room: Callable[[], None]) -> bool:
        """Queue a message; tell whether there was room. Its `on_done` will be called once. Never blocks.

        Without room it waits for some, and its sender gives no other one before `on_room` is called: the message
        is queued then, or was answered with `BrokerUnavailable` because it had waited too long. May be called in
        the event loop. Raises `BrokerUnavailable` when the publisher was stopped, and `TooLarge` for a message
        over what the broker is known to take.
        """
        self._refusals.check_size(publication.body)
        if not self._ledger.add(publication, on_room):
            return False
        self._enqueue(publication)
        return True

    def withdraw(self, publication: Publication) -> None:
        """Forget a message that still waits for room, since its sender is gone; it gets no answer."""
        self._ledger.withdraw(publication)

    def _enqueue(self, publication: Publication) -> None:
        if not self._queue:  # otherwise the publisher is awake, or waits for something else
            self._bell.ring()
        self._queue.append(publication)

    def _on_state(self, state: ConnectionState) -> None:
        if state is ConnectionState.WAITING:
            self._refusals.forget_limit()
        self._bell.ring()

    def _on_checked(self, route: Route, outcome: Outcome) -> None:
        self._routes.checked(route, outcome)

    def _run_publisher(self) -> None:
        while not self._stopped:
            try:
                self._recover()
                if self._channel is None:
                    self._open()
                self._drain()
            except ChannelLost as exc:
                self._on_lost(exc)
            except Exception:
                logger.exception("the publisher met a fault of its own and begins anew")
                self._leave()
                gevent.sleep(_FAULT_PAUSE)

    def _recover(self) -> None:
        """After the loss of a channel, answer what the broker has refused, and pause."""
        lost, self._lost = self._lost, None
        if lost is None or self._stopped:
            return
        self._channel = None
        unconfirmed = self._unconfirmed.clear()
        if not self._refusals.is_one(lost):
            self._stopping.wait(_LOST_PAUSE)
            return
        for publication, error in self._refusals.judge(lost, unconfirmed, self._ledger):
            self._ledger.answer(publication, error)
        pause = self._refusals.pause
        logger.warning("the broker refused what was published; going on in %.1f s: %s", pause, ascii(lost.reason))
        self._stopping.wait(pause)

    def _open(self) -> None:
        """Open a channel on the next connection, and queue again all that was not confirmed on the last."""
        while not self._connection.wait_open(timeout=_SWEEP):
            if self._stopped:
                return
        channel = Channel(self._connection, on_lost=self._on_lost)
        channel.call(self._topology.declare_exchange())
        channel.confirm(self._on_confirm, self._on_return)
        channel.watch_drained(self._bell.ring)
        template = channel.prepare(self._topology.exchange, persistent=self._persistent)
        if channel.lost is not None:  # in the same read as the last answer
            raise channel.lost
        if self._exchange_is_lost:
            self._exchange_is_lost = False
            self._on_exchange_lost()
        self._unconfirmed.clear()
        self._routes.clear()
        self._check.forget()
        self._known.clear()
        self._refusals.prune()
        self._queue.clear()
        self._queue.extend(self._ledger)
        for publication in self._queue:
            publication.returned = False
        if self._queue:
            logger.info("publishing %d messages again or for the first time", len(self._queue))
        self._batches.begin(template)
        self._channel = channel
        self._bell.ring()

    def _drain(self) -> None:
        """Publish what is queued, until the channel is lost; blocks while there is nothing to do."""
        while self._channel is not None and not self._stopped:
            if not self._queue or not self._may_publish(self._channel):
                self._bell.wait()
            else:
                self._batches.publish(self._channel)
                if self._queue:
                    gevent.sleep(0)

    def _may_publish(self, channel: Channel) -> bool:
        """Tell whether the next message may be handed over."""
        is_open = self._connection.state is ConnectionState.OPEN  # and not blocked
        return is_open and self._batches.has_room and not channel.has_unsent

    def _requeue(self, publications: Sequence[Publication]) -> None:
        """Have messages published before all that is queued."""
        self._queue.extendleft(reversed(publications))
        self._bell.ring()

    def _on_lost(self, lost: ChannelLost) -> None:
        """The channel ended; in the event loop too."""
        self._lost = lost
        self._exchange_is_lost = self._exchange_is_lost or lost.reply_code == _NOT_FOUND
        self._channel = None
        self._bell.ring()

    def _leave(self) -> None:
        """Close the channel; the publisher opens another one, and publishes again what was not confirmed."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._bell.ring()

    def _on_return(self, mid: str | None) -> None:
        """A message came back: its user has no inbox (`basic.return`); its `basic.ack` follows."""
        publication = self._unconfirmed.take_back(mid or "")
        if publication is not None:
            self._routes.note_returned(publication, self._unconfirmed.count(publication.user))

    def _on_confirm(self, tag: int, multiple: bool, accepted: bool) -> None:
        """The broker has taken or refused one or more messages (`basic.ack`, `basic.nack`); in the event loop."""
        is_plain = accepted and not self._routes.by_user and not self._refusals.suspects
        for publication in self._unconfirmed.take(tag, multiple):
            if is_plain:
                self._ledger.answer(publication, None)
            else:
                self._refusals.clear(publication)
                self._routes.settle(publication, accepted)
        if self._queue:  # which may have waited for this
            self._bell.ring()

    def _run_deadlines(self) -> None:
        """Answer what the broker did not confirm in time; deadlines are in the order of acceptance."""
        while not self._stopped:
            gevent.sleep(_SWEEP)
            if self._ledger.expire():  # while the broker is away, what has been answered must not pile up
                queued = list(self._queue)
                self._queue.clear()
                self._queue.extend(publication for publication in queued if not publication.done)
                for publication in queued:
                    if publication.done:
                        self._routes.skip(publication)
                self._routes.prune()
                self._refusals.prune()
                self._forget_overdue()
                self._bell.ring()

    def _forget_overdue(self) -> None:
        """Open another channel if half of what may be under way was not confirmed in time.

        A queue that confirms nothing, while its leader hangs or is gone, must not keep all other users' messages
        from being handed over. A broker that answers nothing opens no other channel, and gets no more messages.
        """
        overdue = self._unconfirmed.count_answered()
        if self._channel is not None and 2 * overdue >= self._max_unconfirmed:
            logger.warning("%d messages were not confirmed in time: going on over another channel", overdue)
            self._leave()
