"""Acknowledgements: one subscription tells the broker which deliveries were taken from its mailbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from imrelay.broker.channel import Channel
from imrelay.broker.codec import Delivery

__all__ = ["Acknowledgements"]


class Acknowledgements:
    """The acknowledgements of one subscription. A delivery of another channel is skipped: it is void."""

    __slots__ = ("_channel", "_first_ordered", "_hurry_from", "_unsaid", "is_ordered", "on_taken")

    def __init__(self) -> None:
        #: Called with all that was taken, before it is acknowledged; None while that is not needed.
        self.on_taken: Callable[[Sequence[Delivery]], None] | None = None
        #: Whether deliveries go to the mailbox in the order of their tags, and none is left out: then one
        #: acknowledgement is for many. The owner sets it to False, and `restore_order` back.
        self.is_ordered = True
        #: The first delivery tag of which that is true.
        self._first_ordered = 0
        self._channel: Channel | None = None
        #: Acknowledgements since the last that was sent at once, and how many make the next one so.
        self._unsaid = self._hurry_from = 0

    def start(self, channel: Channel, prefetch: int) -> None:
        """Acknowledge on this channel, whose consumers have this `prefetch`."""
        self._channel = channel
        self._hurry_from = prefetch // 2

    def stop(self) -> None:
        """Acknowledge nothing any more."""
        self._channel = None
        self.on_taken = None

    def restore_order(self, newest: int) -> None:
        """Deliveries are in order again, from the one after this tag on."""
        self.is_ordered = True
        self._first_ordered = newest + 1

    def ack(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge deliveries that were taken from the mailbox, in the order in which they came out of it.

        Those of a channel that has gone are skipped: the broker delivers them again.
        """
        channel, last = self._channel, taken[-1]
        if channel is None or last.channel is not channel:
            return
        first = taken[0] if taken[0].channel is channel else next(one for one in taken if one.channel is channel)
        if self.is_ordered and first.tag >= self._first_ordered:
            if self.on_taken is not None:
                self.on_taken(taken)
            channel.ack(last.tag, multiple=True, at_once=self._is_urgent(len(taken)))
        else:
            self.ack_each(taken)

    def ack_each(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge these deliveries and no others, in whatever order they came."""
        channel = self._channel
        if channel is None:
            return
        if self.on_taken is not None:
            self.on_taken(taken)
        at_once = self._is_urgent(len(taken))
        for delivery in taken:
            if delivery.channel is channel:
                channel.ack(delivery.tag, multiple=False, at_once=at_once)

    def ack_copies(self, tags: Sequence[int]) -> None:
        """Acknowledge deliveries that were left out, since their copies were taken; not urgent."""
        if self._channel is not None:
            for tag in tags:
                self._channel.ack(tag, multiple=False, at_once=False)

    def discard(self, delivery: Delivery) -> None:
        """Reject a delivery, so that it does not come again (`basic.reject`)."""
        if self._channel is not None and delivery.channel is self._channel:
            self._channel.discard(delivery.tag)

    def _is_urgent(self, count: int) -> bool:
        """Tell whether half of the prefetch is unacknowledged: without acknowledging, deliveries would stop."""
        self._unsaid += count
        if self._unsaid < self._hurry_from:
            return False
        self._unsaid = 0
        return True
