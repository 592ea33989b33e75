"""A consumer: what brings a user's messages from the broker to one browser socket.

Each socket has a consumer with a channel of its own. The first socket of a user is the active consumer of the
inbox; a further one stands by there and gets its copies from a live queue until the broker promotes it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol

import gevent
from gevent.event import Event
from pika import spec

from imrelay.broker.channel import Channel
from imrelay.broker.connection import Connection
from imrelay.broker.mailbox import Delivery, Mailbox
from imrelay.broker.topology import AS_IT_STANDS, INBOX_TAG, LIVE_TAG, Keep, Topology
from imrelay.errors import ChannelLost

__all__ = ["Consumer", "Keeper"]

logger = logging.getLogger(__name__)

#: Pause between two looks at a live queue that is still being emptied, in seconds.
_PROMOTION_PAUSE = 0.02
#: `channel.close` code of AMQP 0-9-1.
_PRECONDITION_FAILED = 406


class Keeper(Protocol):
    """Who attaches consumers: the pool."""

    def enqueue(self, consumer: Consumer, lost: ChannelLost | None = None) -> None:
        """Have a consumer attached; after a pause where `lost` says that this has just failed."""

    def forget(self, consumer: Consumer) -> None:
        """Know nothing more of a consumer that was closed."""

    def report_kept(self, user: str, lost: ChannelLost) -> None:
        """Take note that an inbox was made with other settings and is used as it is."""


class Consumer:
    """The deliveries of one user to one mailbox, through as many channels, one after the other, as it takes."""

    __slots__ = (
        "_attached",
        "_channel",
        "_closed",
        "_held",
        "_hurry_from",
        "_keeper",
        "_live",
        "_mailbox",
        "_newest",
        "_ordered_from",
        "_unsaid",
        "_was_live",
        "failures",
        "is_attached",
        "user",
    )

    def __init__(self, keeper: Keeper, user: str, mailbox: Mailbox) -> None:
        self.user = user
        #: Refusals in a row.
        self.failures = 0
        #: Whether the broker delivers to it now.
        self.is_attached = False
        self._keeper = keeper
        self._mailbox = mailbox
        self._closed = False
        self._channel: Channel | None = None
        self._attached: Event | None = None
        #: The name of the live queue, while there is one.
        self._live: str | None = None
        self._was_live = False
        #: Deliveries of the inbox that wait until the live queue is empty; None when not being promoted.
        self._held: list[Delivery] | None = None
        #: Acknowledgements since the last that was sent at once, and how many make the next one so.
        self._unsaid = self._hurry_from = 0
        #: The delivery tag that came last.
        self._newest = 0
        #: From this delivery tag on, tags come out of the mailbox in their order.
        self._ordered_from: float = 0

    @property
    def has_stood_by(self) -> bool:
        """Whether it got messages from a live queue, which the inbox may repeat one day."""
        return self._was_live

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
        channel, last = self._channel, taken[-1]
        if channel is None or last.channel is not channel:
            return
        first = taken[0] if taken[0].channel is channel else next(one for one in taken if one.channel is channel)
        if first.tag >= self._ordered_from:
            channel.ack(last.tag, multiple=True, at_once=self._is_urgent(len(taken)))
        else:
            self.ack_each(taken)

    def ack_each(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge these deliveries and no others, in whatever order they came."""
        channel = self._channel
        if channel is None:
            return
        at_once = self._is_urgent(len(taken))
        for delivery in taken:
            if delivery.channel is channel:
                channel.ack(delivery.tag, multiple=False, at_once=at_once)

    def _is_urgent(self, count: int) -> bool:
        """Tell whether the broker should hear of acknowledgements now, lest it run out of what it may deliver."""
        self._unsaid += count
        if self._unsaid < self._hurry_from:
            return False
        self._unsaid = 0
        return True

    def rebind(self, topology: Topology) -> None:
        """Bind the user's exchange and inbox again, where an operator has deleted what held them."""
        if self._channel is not None and self.is_attached:
            for method in topology.declare_user(self.user, AS_IT_STANDS[1]):
                self._channel.send(method)

    def rebind_live(self, topology: Topology) -> None:
        """Bind the live queue again, if there is one: nobody is told when an operator deletes its exchange.

        Where that has not been made again, the broker closes the channel, and all of it comes back with the next.
        """
        if self._channel is not None and self.is_attached and self._live is not None and self._held is None:
            self._channel.send(topology.bind_live(self.user, self._live))

    def close(self) -> None:
        """End it: what was not acknowledged goes to the user's next socket. Idempotent, returns at once."""
        self._closed = True
        self._keeper.forget(self)
        self._leave()
        if self._attached is not None:
            self._attached.set()

    def attach(self, connection: Connection, topology: Topology, prefetch: int) -> None:
        """Open a channel and consume; blocks for one round trip, or two where the user has another socket.

        Called by the pool alone. Raises `ChannelLost` when the broker refuses or the connection ends.
        """
        self._live = self._held = None
        self._newest = self._unsaid = 0
        self._hurry_from = prefetch // 2
        self._ordered_from = 0
        for keep in AS_IT_STANDS:
            channel = Channel(
                connection, on_delivery=self._on_delivery, on_cancel=self._on_cancel, on_lost=self._on_lost
            )
            self._channel = channel
            try:
                self._consume(channel, topology, prefetch, keep)
                if self._channel is not channel or channel.lost is not None:  # with the last answer
                    raise channel.lost or ChannelLost("the channel is being closed")
                break
            except ChannelLost as exc:
                self._channel = None
                if exc.reply_code != _PRECONDITION_FAILED or keep is AS_IT_STANDS[-1]:
                    raise
                self._keeper.report_kept(self.user, exc)
            except BaseException:
                self._leave()
                raise
        self.is_attached = True
        self.failures = 0
        if self._held is not None:
            self._promote(channel)
        if self._attached is not None:
            self._attached.set()

    def _consume(self, channel: Channel, topology: Topology, prefetch: int, keep: Keep) -> None:
        # A passive declare counts who stands by at a classic queue, but not at a quorum queue (RabbitMQ 3.10):
        # there it has to be asked before, and the pool sees to it that nobody else of this process is in between.
        ask = topology.ask_inbox(self.user)
        before = [ask] if topology.is_replicated or keep.inbox else []
        answers = channel.call(
            *topology.declare_user(self.user, keep),
            *before,
            spec.Basic.Qos(prefetch_count=prefetch),
            topology.consume_inbox(self.user),
            ask,
        )
        if answers[-1].consumer_count > 1 or (before and answers[0].consumer_count > 0):
            # All in one, and the consumer before the binding: a live queue that never had a consumer would outlive
            # its socket, whatever ends the channel meanwhile. Without a name it is the one declared last, and the
            # last answer says that it has been bound.
            self._live, self._was_live = "", True
            self._live = channel.call(
                topology.declare_live(), topology.consume_live(""), topology.bind_live(self.user, ""), ask
            )[0].queue

    def _on_delivery(self, delivery: Delivery) -> None:
        """Take a delivery, in the hub."""
        channel = self._channel
        if channel is None:
            return
        self._newest = delivery.tag
        delivery.channel = channel
        # A message of another program that comes for the first time is no repeat, whatever its id: such programs
        # may give many messages the same one.
        delivery.may_repeat = delivery.redelivered or delivery.is_own or self._was_live
        if self._live is not None and delivery.consumer_tag == INBOX_TAG:
            if self._held is None:
                self._held = []
                self._ordered_from = math.inf
                if self.is_attached:
                    self._promote(channel)
            self._held.append(delivery)
        else:
            self._mailbox.deliver(delivery)

    def _promote(self, channel: Channel) -> None:
        """Begin to change over; not while `attach` still uses the channel."""
        gevent.spawn(self._run_promotion, channel, self._live).name = f"promotion:{self.user}"

    def _run_promotion(self, channel: Channel, live: str) -> None:
        """Change over from the live queue to the inbox, without a gap and without a message out of order.

        But what waited in the inbox from before this socket came, and nobody took, it gets after newer messages.
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
                self._mailbox.deliver(delivery)
            self._ordered_from = self._newest + 1
            self._live = self._held = None

    def _on_cancel(self) -> None:
        """The broker ended a consumer: its queue was deleted or its node lost (`basic.cancel`); in the hub."""
        attached = self.is_attached
        logger.info("the broker cancelled a consumer of %s", ascii(self.user))
        self._leave()
        if attached:  # else `attach` finds out by itself
            self._keeper.enqueue(self)

    def _on_lost(self, lost: ChannelLost) -> None:
        """The channel ended, in the hub."""
        if self.is_attached:
            self._leave()
            self._keeper.enqueue(self, lost if lost.reply_code else None)

    def _leave(self) -> None:
        self.is_attached = False
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
