"""The pool: the connections that deliver, and the greenlets that attach consumers to them, some at a time."""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable

import gevent
from gevent.event import AsyncResult

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection, ConnectionState
from imrelay.broker.consumer import Consumer
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.topology import Topology
from imrelay.errors import ChannelLost
from imrelay.runtime.loops import run_for_ever

__all__ = ["ConsumerPool"]

logger = logging.getLogger(__name__)

#: Consumers that are being attached at the same time: a broker that has just come back is not overloaded.
_PARALLEL = 16
#: Seconds between two rounds in which the live queues are bound again.
_REBIND_INTERVAL = 10.0
#: Seconds between two checks of whether the user's other consumer is attached.
_MOMENT = 0.005
#: Bounds of the pause after a consumer could not be attached, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
#: `channel.close` code of AMQP 0-9-1.
_INTERNAL_ERROR = 541


class ConsumerPool:
    """The connections that deliver, and the greenlets that attach consumers to them.

    `new_connection` makes a connection by its name and a callback for its states; the pool starts and closes it.
    """

    def __init__(
        self,
        new_connection: Callable[[str, Callable[[ConnectionState], None]], Connection],
        topology: Topology,
        *,
        prefetch: int,
        channels_per_connection: int,
    ) -> None:
        self._new_connection = new_connection
        self._topology = topology
        self._prefetch = prefetch
        self._limit = channels_per_connection
        self._connections: list[Connection] = []
        self._consumers: set[Consumer] = set()
        self._queue: deque[Consumer] = deque()
        self._attachers = 0
        #: How often a consumer has been attached: whether the broker makes progress.
        self.attached = 0
        #: Users of whom a consumer is being attached. One at a time: a second one has to find the first on the
        #: broker.
        self._busy: set[str] = set()
        self._change: AsyncResult = AsyncResult()
        self._stopped = False
        self._kept_is_said = False
        self._rebinder: gevent.Greenlet | None = None

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._grow()
        self._rebinder = run_for_ever(self._run_rebinder, name="rebinder")

    def stop(self) -> None:
        """Close all connections, and with them all channels; what was not acknowledged goes back."""
        self._stopped = True
        if self._rebinder is not None:
            self._rebinder.kill(block=False)
        self._announce()
        gevent.joinall([gevent.spawn(connection.close) for connection in self._connections])

    @property
    def is_open(self) -> bool:
        """Whether consumers can be attached now."""
        return any(connection.is_open for connection in self._connections)

    @property
    def may_open_soon(self) -> bool:
        """Whether consumers can be attached, or a connection is just being opened."""
        return self.is_open or any(
            connection.state is ConnectionState.CONNECTING for connection in self._connections
        )

    @property
    def problem(self) -> str:
        """Why consumers cannot be attached."""
        return self._connections[0].reason if self._connections else "not started"

    def consume(self, user: str, mailbox: Mailbox) -> Consumer:
        """Begin to deliver a user's messages into a mailbox; returns at once."""
        consumer = self.prepare(user, mailbox)
        self.enqueue(consumer)
        return consumer

    def prepare(self, user: str, mailbox: Mailbox) -> Consumer:
        """Make a consumer that delivers once it is enqueued."""
        consumer = Consumer(self, user, mailbox)
        self._consumers.add(consumer)
        return consumer

    def wait_for_connection(self) -> Connection | None:
        """Block until there is a connection with room for a channel; None once the pool has been stopped."""
        return self._wait_for_connection()

    def forget(self, consumer: Consumer) -> None:
        """Remove a consumer that was closed."""
        self._consumers.discard(consumer)
        if not consumer.is_attached:
            with contextlib.suppress(ValueError):
                self._queue.remove(consumer)

    def wait_given_back(self, user: str, timeout: float) -> bool:
        """Block until an inbox has no consumer, or for `timeout` seconds; tell whether it has none.

        A quorum queue takes back what a consumer had, and counts that one no longer, in one step.
        """
        connection = next((one for one in self._connections if one.is_open), None)
        if connection is None:
            return False
        channel: Channel | None = None
        try:
            with gevent.Timeout(timeout, False):
                channel = Channel(connection)
                while channel.call(self._topology.ask_inbox(user))[0].consumer_count:
                    gevent.sleep(_MOMENT)
                return True
        except ChannelLost as exc:
            logger.debug("it is not known who consumes the messages of %s: %s", ascii(user), exc)
        finally:
            if channel is not None:
                channel.close()
        return False

    def rebind(self) -> None:
        """Bind all users again: the exchange had been deleted, and is there again without its bindings."""
        for consumer in self._consumers:
            consumer.rebind(self._topology)

    def enqueue(self, consumer: Consumer, lost: ChannelLost | None = None) -> None:
        """Have a consumer attached: at once, or after a pause where that has just failed.

        May be called from the event loop.
        """
        if consumer.is_closed:
            return
        if lost is not None:
            pause = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(consumer.failures, 10)))
            consumer.failures += 1
            if lost.reply_code:
                logger.warning(
                    "the broker refused the channel of %s: %s; again in %.1f s", ascii(consumer.user), lost, pause
                )
            gevent.spawn_later(pause, self.enqueue, consumer)
            return
        self._queue.append(consumer)
        if self._attachers < _PARALLEL:
            self._attachers += 1
            gevent.spawn(self._run_attacher).name = "attacher"

    def report_kept(self, user: str, lost: ChannelLost) -> None:
        """Log once that inboxes were made with other settings and are used as they are."""
        if not self._kept_is_said:
            self._kept_is_said = True
            logger.warning(
                "the inbox of %s was made with other [inbox] settings and is used as it is, like any "
                "other of that kind (said once): %s",
                ascii(user),
                lost,
            )

    def _run_rebinder(self) -> None:
        while True:
            gevent.sleep(_REBIND_INTERVAL)
            for consumer in list(self._consumers):
                try:
                    consumer.rebind_live(self._topology)
                except Exception:
                    logger.exception("the live queue of %s could not be bound again", ascii(consumer.user))

    def _run_attacher(self) -> None:
        try:
            while self._queue and not self._stopped:
                consumer = self._queue.popleft()
                try:
                    self._attach(consumer)
                except Exception:
                    logger.exception("the consumer of %s met a fault of the relay's", ascii(consumer.user))
                    self.enqueue(consumer, ChannelLost("a fault of the relay's", _INTERNAL_ERROR))
        finally:
            self._attachers -= 1

    def _attach(self, consumer: Consumer) -> None:
        connection = self._wait_for_connection()
        if connection is None or consumer.is_closed:
            return
        if consumer.user in self._busy:
            self._queue.append(consumer)
            gevent.sleep(_MOMENT)
            return
        self._busy.add(consumer.user)
        lost: ChannelLost | None = None
        try:
            consumer.attach(connection, self._topology, self._prefetch)
            self.attached += 1
        except ChannelLost as exc:
            lost = exc
        finally:
            self._busy.discard(consumer.user)
        if not (consumer.is_closed or consumer.is_attached or self._stopped):
            self.enqueue(consumer, lost)

    def _wait_for_connection(self) -> Connection | None:
        """Block until a connection with a free channel is open; None once the pool has been stopped."""
        while not self._stopped:
            change = self._change
            for connection in self._connections:
                if connection.is_open and connection.channels < min(self._limit, connection.channel_max):
                    return connection
            if all(
                connection.channels >= min(self._limit, connection.channel_max) for connection in self._connections
            ):
                self._grow()
            change.wait()
        return None

    def _grow(self) -> None:
        connection = self._new_connection(f"consume-{len(self._connections) + 1}", lambda state: self._announce())
        self._connections.append(connection)
        connection.start()

    def _announce(self) -> None:
        change, self._change = self._change, AsyncResult()
        change.set()
