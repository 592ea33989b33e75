"""Consumers: what brings a user's messages from the broker to one browser socket.

Each socket has a consumer with a channel of its own, on one of a small pool of connections. The first socket of a
user is the active consumer of the inbox; a further one stands by there and gets its copies from a live queue
until the broker promotes it. Who lost its channel is attached again by the pool, a bounded number at a time.
"""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Callable, Sequence

import gevent
from gevent.event import AsyncResult, Event
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection, State
from imrelay.broker.topology import INBOX_TAG, LIVE_TAG, Topology
from imrelay.errors import ChannelLost

__all__ = ["Consumer", "ConsumerPool", "Delivery", "Mailbox"]

logger = logging.getLogger(__name__)

#: Consumers that are being attached at the same time: a broker that has just come back is not knocked over again.
_PARALLEL = 16
#: Pause between two looks at a live queue that is still being emptied, in seconds.
_PROMOTION_PAUSE = 0.02
#: Bounds of the pause after the broker has refused a channel, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
#: `channel.close` codes of AMQP 0-9-1.
_PRECONDITION_FAILED, _INTERNAL_ERROR = 406, 541


class Delivery:
    """A message from the broker that waits to be taken (`basic.deliver`)."""

    __slots__ = ("body", "channel", "is_own", "may_repeat", "mid", "redelivered", "tag", "time_ms", "type")

    def __init__(
        self,
        channel: Channel,
        method: spec.Basic.Deliver,
        properties: spec.BasicProperties,
        body: bytes,
        *,
        was_live: bool,
    ) -> None:
        self.channel = channel
        self.tag: int = method.delivery_tag
        self.body = body
        #: The AMQP property `type`: text, binary, or whatever another program wrote there.
        self.type: str | None = properties.type
        #: The AMQP property `message_id`; without it there is no repeat detection.
        self.mid: str | None = properties.message_id
        #: The AMQP property `timestamp`, in milliseconds since 1970; other programs may set it.
        self.time_ms = None if properties.timestamp is None else int(properties.timestamp) * 1000
        #: Whether the broker has delivered it before, to anybody.
        self.redelivered: bool = method.redelivered
        #: Whether a relay published it, so that its body is a message.
        self.is_own: bool = properties.app_id == "imrelay"
        #: Whether it may have been delivered before. A message of another program that comes for the first time
        #: never is one: such programs may give many messages the same `message_id`.
        self.may_repeat = self.redelivered or self.is_own or was_live


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


class Consumer:
    """The deliveries of one user to one mailbox, through as many channels, one after the other, as it takes."""

    __slots__ = (
        "_attached",
        "_channel",
        "_closed",
        "_held",
        "_live",
        "_mailbox",
        "_newest",
        "_ordered_from",
        "_pool",
        "_was_live",
        "failures",
        "is_attached",
        "user",
    )

    def __init__(self, pool: ConsumerPool, user: str, mailbox: Mailbox) -> None:
        self.user = user
        #: Refusals in a row.
        self.failures = 0
        #: Whether the broker delivers to it now.
        self.is_attached = False
        self._pool = pool
        self._mailbox = mailbox
        self._closed = False
        self._channel: Channel | None = None
        self._attached: Event | None = None
        #: The name of the live queue, while there is one.
        self._live: str | None = None
        self._was_live = False
        #: Deliveries of the inbox that wait until the live queue is empty; None when not being promoted.
        self._held: list[Delivery] | None = None
        #: The delivery tag that came last.
        self._newest = 0
        #: From this delivery tag on, tags come out of the mailbox in their order.
        self._ordered_from: float = 0

    @property
    def is_standing_by(self) -> bool:
        """Whether it gets its messages from a live queue, so that the inbox may repeat them one day."""
        return self._live is not None

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def wait_attached(self, timeout: float) -> bool:
        """Block until messages are delivered, or for `timeout` seconds; tell whether they are."""
        if not self.is_attached and not self._closed:
            self._attached = Event()
            self._attached.wait(timeout)
            self._attached = None
        return self.is_attached

    def ack(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge deliveries that were taken from the mailbox, in the order in which they came out of it.

        Those of a channel that has gone are skipped: the broker delivers them again.
        """
        channel = self._channel
        tags = [delivery.tag for delivery in taken if delivery.channel is channel]
        if channel is None or not tags:
            return
        if tags[0] >= self._ordered_from:
            channel.ack(tags[-1])
        else:
            self.ack_each(taken)

    def ack_each(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge these deliveries and no others, in whatever order they came."""
        channel = self._channel
        if channel is not None:
            for delivery in taken:
                if delivery.channel is channel:
                    channel.send(spec.Basic.Ack(delivery.tag))

    def rebind(self, topology: Topology) -> None:
        """Bind the user's exchange and inbox again, where an operator has deleted what held them."""
        if self._channel is not None and self.is_attached:
            for method in topology.declare_user(self.user, keep_inbox=True):
                self._channel.send(method)

    def close(self) -> None:
        """End it: what was not acknowledged goes to the user's next socket. Idempotent, returns at once."""
        self._closed = True
        self._pool.forget(self)
        self._leave()
        if self._attached is not None:
            self._attached.set()

    def attach(self, connection: Connection, topology: Topology, prefetch: int) -> None:
        """Open a channel and consume; blocks for one round trip, or two where the user has another socket.

        Called by the pool alone. Raises `ChannelLost` when the broker refuses or the connection ends.
        """
        self._live = self._held = None
        self._newest = 0
        self._ordered_from = 0
        keep_inbox = keep_exchange = False
        while True:
            channel = Channel(
                connection, on_delivery=self._on_delivery, on_cancel=self._on_cancel, on_lost=self._on_lost
            )
            self._channel = channel
            try:
                self._consume(channel, topology, prefetch, keep_inbox, keep_exchange)
                break
            except ChannelLost as exc:
                self._channel = None
                if exc.reply_code != _PRECONDITION_FAILED or keep_exchange:
                    raise
                # first take the inbox as it is; if that was not it, the exchange too
                keep_inbox, keep_exchange = True, keep_inbox
                self._pool.report_kept(self.user, exc)
        self.is_attached = True
        self.failures = 0
        if self._attached is not None:
            self._attached.set()

    def _consume(
        self, channel: Channel, topology: Topology, prefetch: int, keep_inbox: bool, keep_exchange: bool
    ) -> None:
        answers = channel.call(
            *topology.declare_user(self.user, keep_inbox=keep_inbox, keep_exchange=keep_exchange),
            spec.Basic.Qos(prefetch_count=prefetch),
            topology.consume_inbox(self.user),
            topology.ask_inbox(self.user),
        )
        if answers[-1].consumer_count > 1:
            live = channel.call(topology.declare_live())[0].queue
            self._live, self._was_live = live, True
            channel.call(*topology.consume_live(self.user, live))

    def _on_delivery(self, method: spec.Basic.Deliver, properties: spec.BasicProperties, body: bytes) -> None:
        """Take a delivery, in the hub."""
        channel = self._channel
        if channel is None:
            return
        self._newest = method.delivery_tag
        delivery = Delivery(channel, method, properties, body, was_live=self._was_live)
        if self._live is not None and method.consumer_tag == INBOX_TAG:
            if self._held is None:
                self._held = []
                self._ordered_from = math.inf
                gevent.spawn(self._run_promotion, channel, self._live).name = f"promotion:{self.user}"
            self._held.append(delivery)
        else:
            self._mailbox.put(delivery)

    def _run_promotion(self, channel: Channel, live: str) -> None:
        """Change over from the live queue to the inbox, without a gap and without a message out of order.

        The inbox begins with what the former active consumer had not taken, which may be later than what the
        live queue still holds: so that is emptied first, and the inbox's deliveries are held meanwhile.
        """
        try:
            while channel.call(spec.Queue.Declare(queue=live, passive=True))[0].message_count:
                gevent.sleep(_PROMOTION_PAUSE)
            channel.call(spec.Basic.Cancel(LIVE_TAG))  # the last consumer: the live queue goes with it
        except ChannelLost:
            return
        if self._channel is channel and self._held is not None:
            for delivery in self._held:
                self._mailbox.put(delivery)
            self._ordered_from = self._newest + 1
            self._live = self._held = None

    def _on_cancel(self) -> None:
        """The broker ended a consumer: its queue was deleted or its node lost (`basic.cancel`); in the hub."""
        attached = self.is_attached
        logger.info("the broker cancelled a consumer of %s", ascii(self.user))
        self._leave()
        if attached:  # else `attach` finds out by itself
            self._pool.enqueue(self)

    def _on_lost(self, lost: ChannelLost) -> None:
        """The channel ended, in the hub."""
        if self.is_attached:
            self._leave()
            self._pool.enqueue(self, lost if lost.reply_code else None)

    def _leave(self) -> None:
        self.is_attached = False
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


class ConsumerPool:
    """The connections that deliver, and the greenlets that attach consumers to them.

    `new_connection` makes a connection by its name and a callback for its states; the pool starts and closes it.
    """

    def __init__(
        self,
        new_connection: Callable[[str, Callable[[State], None]], Connection],
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
        self._change: AsyncResult = AsyncResult()
        self._stopped = False
        self._kept_is_said = False

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._grow()

    def stop(self) -> None:
        """Close all connections, and with them all channels; what was not acknowledged goes back."""
        self._stopped = True
        self._announce()
        for connection in self._connections:
            connection.close()

    @property
    def is_open(self) -> bool:
        """Whether consumers can be attached now."""
        return any(connection.is_open for connection in self._connections)

    @property
    def problem(self) -> str:
        """Why consumers cannot be attached."""
        return self._connections[0].problem if self._connections else "not started"

    def consume(self, user: str, mailbox: Mailbox) -> Consumer:
        """Begin to deliver a user's messages into a mailbox; returns at once."""
        consumer = Consumer(self, user, mailbox)
        self._consumers.add(consumer)
        self.enqueue(consumer)
        return consumer

    def forget(self, consumer: Consumer) -> None:
        """Know nothing more of a consumer that was closed."""
        self._consumers.discard(consumer)

    def rebind(self) -> None:
        """Bind all users again: the exchange had been deleted, and is there again without its bindings."""
        for consumer in self._consumers:
            consumer.rebind(self._topology)

    def enqueue(self, consumer: Consumer, lost: ChannelLost | None = None) -> None:
        """Have a consumer attached: at once, or after a pause where that has just failed.

        May be called from the hub.
        """
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
        """Say once that settings have changed since inboxes were made; those are used as they are."""
        if not self._kept_is_said:
            self._kept_is_said = True
            logger.warning(
                "the inbox of %s was made with other [inbox] settings and is used as it is, like any "
                "other of that kind (said once): %s",
                ascii(user),
                lost,
            )

    def _run_attacher(self) -> None:
        try:
            while self._queue and not self._stopped:
                self._attach(self._queue.popleft())
        finally:
            self._attachers -= 1

    def _attach(self, consumer: Consumer) -> None:
        lost: ChannelLost | None = None
        try:
            connection = self._wait_for_connection()
            if connection is not None and not consumer.is_closed:
                consumer.attach(connection, self._topology, self._prefetch)
        except ChannelLost as exc:
            lost = exc
        except Exception:
            logger.exception("the consumer of %s met a fault of the relay's", ascii(consumer.user))
            lost = ChannelLost("a fault of the relay's", _INTERNAL_ERROR)
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
