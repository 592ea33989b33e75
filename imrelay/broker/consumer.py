"""A consumer: delivers a user's messages from the broker to one browser socket.

Each socket has a consumer with a channel of its own. The first socket of a user is the active consumer of the
inbox; a further one stands by there and gets its copies from a live queue until the broker promotes it. So does
one that cannot know whether it is the first. Deliveries that its mailbox has no room for are sent back: see
`overflow`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from gevent.event import Event

from imrelay.broker.channel import Channel
from imrelay.broker.codec import Delivery
from imrelay.broker.connection import Connection
from imrelay.broker.consumer_state import ConsumerState
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.subscription import Subscription
from imrelay.broker.topology import AS_IT_STANDS, Topology
from imrelay.errors import ChannelLost

__all__ = ["Consumer", "Keeper"]

logger = logging.getLogger(__name__)

#: Seconds to wait, at most, until a quorum queue knows that a consumer has ended.
_GIVEN_BACK = 0.5
#: `channel.close` code of AMQP 0-9-1.
_PRECONDITION_FAILED = 406


class Keeper(Protocol):
    """What a consumer needs of the pool, which attaches it."""

    def enqueue(self, consumer: Consumer, lost: ChannelLost | None = None) -> None:
        """Have a consumer attached; after a pause where `lost` says that this has just failed."""

    def forget(self, consumer: Consumer) -> None:
        """Remove a consumer that was closed."""

    def wait_given_back(self, user: str, timeout: float) -> bool:
        """Block until an inbox has no consumer, or for `timeout` seconds; tell whether it has none."""

    def report_kept(self, user: str, lost: ChannelLost) -> None:
        """Log that an inbox was made with other settings and is used as it is."""


class Consumer:
    """The deliveries of one user to one mailbox, through as many channels, one after the other, as it takes."""

    __slots__ = (
        "_attached",
        "_channel",
        "_is_counted",
        "_keeper",
        "_leaving",
        "_mailbox",
        "_subscription",
        "_was_attached",
        "failures",
        "user",
    )

    def __init__(self, keeper: Keeper, user: str, mailbox: Mailbox) -> None:
        self.user = user
        #: Refusals in a row.
        self.failures = 0
        self._keeper = keeper
        self._mailbox = mailbox
        #: Whether the broker has ever delivered to it.
        self._was_attached = False
        #: Whether the inbox is a classic queue: what a channel had is back there when its end is confirmed.
        self._is_counted = True
        #: The channel that was closed last.
        self._leaving: Channel | None = None
        self._attached: Event | None = None
        self._channel: Channel | None = None
        self._subscription = self._subscribe(has_stood_by=False)

    @property
    def has_stood_by(self) -> bool:
        """Whether it got messages from a live queue, which the inbox may repeat one day."""
        return self._subscription.has_stood_by

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.state is ConsumerState.CLOSED

    @property
    def is_attached(self) -> bool:
        """Whether the broker delivers to it now."""
        return self.state.is_attached

    @property
    def state(self) -> ConsumerState:
        """What it is doing."""
        return self._subscription.state

    def wait_attached(self, timeout: float) -> bool:
        """Block until messages are delivered, or for `timeout` seconds; tell whether they are."""
        if not self.is_attached and not self.is_closed:
            self._attached = Event()
            self._attached.wait(timeout)
            self._attached = None
        return self.is_attached

    def ack(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge deliveries that were taken from the mailbox, in the order in which they came out of it.

        Those of a channel that has gone are skipped: the broker delivers them again.
        """
        self._subscription.acks.ack(taken)

    def ack_each(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge these deliveries and no others, in whatever order they came."""
        self._subscription.acks.ack_each(taken)

    def discard(self, delivery: Delivery) -> None:
        """Have the broker take away a delivery that cannot be written: if it came again it would fail again.

        It goes to the inbox's dead-letter exchange, where that exists.
        """
        self._subscription.acks.discard(delivery)

    def rebind(self, topology: Topology) -> None:
        """Bind the user's exchange and inbox again, where an operator has deleted what held them."""
        if self._channel is not None and self.is_attached:
            for method in topology.declare_user(self.user, AS_IT_STANDS[1]):
                self._channel.send(method)

    def rebind_live(self, topology: Topology) -> None:
        """Bind the live queue again, if there is one: an operator may have deleted its exchange without notice.

        Where that has not been made again, the broker closes the channel, and all of it comes back with the next.
        """
        live = self._subscription.live_queue
        if self._channel is not None and self.is_attached and live is not None:
            self._channel.send(topology.bind_live(self.user, live))

    def close(self) -> None:
        """End it: what was not acknowledged goes to the user's next socket. Idempotent, returns at once."""
        self._keeper.forget(self)
        self._leave(for_good=True)
        if self._attached is not None:
            self._attached.set()

    def wait_detached(self, timeout: float) -> bool:
        """Block, once it was closed, until the broker has back what was not acknowledged; tell whether it has.

        For `timeout` seconds at most, and for `_GIVEN_BACK` where another socket may have been promoted.
        """
        if self._leaving is None:
            return True
        until = time.monotonic() + timeout
        if not self._leaving.wait_ended(timeout):
            return False
        if self._is_counted:
            return True
        # A quorum queue learns of the end of a channel after that was confirmed.
        return self._keeper.wait_given_back(self.user, min(_GIVEN_BACK, until - time.monotonic()))

    def attach(self, connection: Connection, topology: Topology, prefetch: int) -> None:
        """Open a channel and consume; blocks for one round trip, or two where the user may have another socket.

        Called by the pool alone. Raises `ChannelLost` when the broker refuses or the connection ends. A consumer
        that is closed meanwhile leaves nothing behind, and returns.
        """
        for keep in AS_IT_STANDS:
            if self.is_closed:
                return
            self._subscription = subscription = self._subscribe(has_stood_by=self.has_stood_by)
            self._channel = channel = Channel(
                connection, on_delivery=subscription.on_delivery, on_cancel=self._on_cancel, on_lost=self._on_lost
            )
            try:
                self._is_counted = topology.counts_who_stands_by(keep)
                subscription.begin(channel, topology, prefetch, keep, is_again=self._was_attached)
                break
            except ChannelLost as exc:
                self._leave()
                if self.is_closed:  # what the broker has refused is no longer needed
                    return
                if exc.reply_code != _PRECONDITION_FAILED or keep is AS_IT_STANDS[-1]:
                    raise
                self._keeper.report_kept(self.user, exc)
            except BaseException:
                self._leave()
                raise
        self._was_attached = True
        self.failures = 0
        if self._attached is not None:
            self._attached.set()

    def _subscribe(self, *, has_stood_by: bool) -> Subscription:
        return Subscription(self.user, self._mailbox, has_stood_by=has_stood_by, on_fault=self._on_fault)

    def _on_fault(self, lost: ChannelLost) -> None:
        """The subscription cannot go on, and the broker has not ended its channel."""
        self._leave()
        self._keeper.enqueue(self, lost)

    def _on_cancel(self) -> None:
        """The broker ended a consumer: its queue was deleted or its node lost (`basic.cancel`)."""
        attached = self.is_attached
        logger.info("the broker cancelled a consumer of %s", ascii(self.user))
        self._leave()
        if attached:  # otherwise `attach` raises
            self._keeper.enqueue(self)

    def _on_lost(self, lost: ChannelLost) -> None:
        """The channel ended, in the event loop."""
        if self.is_attached:
            self._leave()
            self._keeper.enqueue(self, lost if lost.reply_code else None)

    def _leave(self, *, for_good: bool = False) -> None:
        """End the channel: what it delivered and was not acknowledged goes back to its queue."""
        channel, self._channel = self._channel, None
        self._subscription.close(for_good=for_good)
        if channel is not None:
            self._leaving = channel
            channel.close()
