"""A subscription: what one channel delivers to one consumer, from the inbox and from a live queue.

What happens to a delivery:

    deliveries --> mailbox        there is room, and nothing older is on its way
               --> set aside      it is not yet clear what comes first: see `live_queue`
               --> sent back      there is no room: see `overflow`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import gevent
from gevent.event import Event
from pika import spec
from pika.amqp_object import Method

from imrelay.broker.acknowledgements import Acknowledgements
from imrelay.broker.channel import Channel
from imrelay.broker.codec import Delivery
from imrelay.broker.consumer_state import ConsumerState
from imrelay.broker.live_queue import LiveQueue
from imrelay.broker.mailbox import Mailbox
from imrelay.broker.overflow import Overflow
from imrelay.broker.overflow_watch import watch_overflow
from imrelay.broker.topology import LIVE_TAG, UNORDERED_BUDGET, UNORDERED_PREFETCH, Keep, Topology
from imrelay.errors import ChannelLost

__all__ = ["Subscription"]

logger = logging.getLogger(__name__)

#: Seconds for the first message of an inbox that has some; if none comes, another consumer is the active one.
_BEGINNING = 0.5
#: Seconds after a live queue is bound in which its messages are set aside, in case the inbox delivers older ones.
_SETTLING = 0.1
#: `channel.close` code of AMQP 0-9-1.
_INTERNAL_ERROR = 541

#: Used for each delivery: a global name is looked up faster than an attribute of the enum.
_BINDING, _PROMOTED = ConsumerState.BINDING, ConsumerState.PROMOTED
_STANDING_BY, _PROMOTING = ConsumerState.STANDING_BY, ConsumerState.PROMOTING
_ACTIVE, _OVERFLOWING = ConsumerState.ACTIVE, ConsumerState.OVERFLOWING


class Subscription:
    """The deliveries of one channel to one mailbox. `on_fault` is called when the subscription cannot go on.

    The owner opens the channel with `on_delivery`, calls `begin`, and closes both.
    """

    __slots__ = (
        "_channel", "_first", "_is_smooth", "_live", "_mailbox", "_newest", "_on_fault", "_overflow",
        "_sends_back", "_user", "acks", "has_stood_by", "state"
    )  # fmt: skip

    def __init__(
        self, user: str, mailbox: Mailbox, *, has_stood_by: bool, on_fault: Callable[[ChannelLost], None]
    ) -> None:
        #: Whether this socket ever got messages from a live queue, which the inbox may repeat one day.
        self.has_stood_by = has_stood_by
        #: For what is taken from the mailbox.
        self.acks = Acknowledgements()
        self._user = user
        self._mailbox = mailbox
        self._on_fault = on_fault
        self._channel: Channel | None = None
        #: What it is doing; set by `_enter` alone.
        self.state = ConsumerState.DETACHED
        #: Set by the first delivery, where that is waited for.
        self._first: Event | None = None
        #: The live queue, while there is one.
        self._live: LiveQueue | None = None
        #: Whether what the inbox brings and there is no room for is sent back to it, to come again in its order.
        self._sends_back = True
        self._overflow = Overflow()  # what came from the inbox and had no room
        #: Whether the state is `ACTIVE`, for each delivery to look at: it goes to the mailbox then.
        self._is_smooth = False
        #: The delivery tag that came last; 0 while none has come.
        self._newest = 0

    @property
    def live_queue(self) -> str | None:
        """The name of the live queue; None where there is none, or none that lasts."""
        return self._live.name if self._live is not None and self.state is _STANDING_BY else None

    def _enter(self, state: ConsumerState) -> None:
        logger.debug("the consumer of %a is %s, and was %s", self._user, state.name, self.state.name)
        self.state = state
        self._is_smooth = state is _ACTIVE

    def begin(self, channel: Channel, topology: Topology, prefetch: int, keep: Keep, *, is_again: bool) -> None:
        """Consume from the inbox, and from a live queue unless this is known to be the active consumer.

        Blocks for one round trip, or two. `is_again`: this socket has lost another channel, whose consumer a
        quorum queue may still count. Raises `ChannelLost`.
        """
        self._channel = channel
        self._enter(ConsumerState.ATTACHING)
        self._sends_back = topology.takes_back(keep)
        if not topology.takes_back_in_order(keep):
            prefetch = UNORDERED_PREFETCH
            self._mailbox.budget = max(self._mailbox.budget, UNORDERED_BUDGET)
        self.acks.start(channel, prefetch)
        is_counted = topology.counts_who_stands_by(keep)
        self._first = None if is_counted else Event()
        declarations, ask = topology.declare_user(self._user, keep), topology.ask_inbox(self._user)
        before, _, _, after = channel.call(
            *declarations, ask, spec.Basic.Qos(prefetch_count=prefetch), topology.consume_inbox(self._user), ask
        )
        self._check(channel)
        is_alone = not before.consumer_count
        if self._first is not None:
            is_alone = is_alone or is_again
            if is_alone and before.message_count:
                self._first.wait(_BEGINNING)
                self._check(channel)
            self._first = None
        # An inbox delivers to one consumer until that leaves: if anything has come, this is the active one.
        if not self._newest and not (is_counted and after.consumer_count <= 1):
            self._stand_by(channel, topology, is_alone)
            if is_alone and self.state is _STANDING_BY and self._live is not None:
                leaderless = None if after.consumer_count else ask
                gevent.spawn(self._run_settling, channel, self._live, leaderless).name = f"settling:{self._user}"
        else:
            self._become_active()

    def _stand_by(self, channel: Channel, topology: Topology, is_alone: bool) -> None:
        """Get copies from a live queue; blocks for one round trip. `is_alone`: as `LiveQueue` has it."""
        self._live = live = LiveQueue(is_alone=is_alone)
        self.acks.on_taken = self._note_taken
        self._enter(_BINDING)
        self.has_stood_by = True
        live.open(channel, topology, self._user)
        self._check(channel)
        if self.state is _PROMOTED:
            self._start_promotion(channel, live)
            return
        self._enter(_STANDING_BY)

    def _become_active(self) -> None:
        """Take from the inbox alone, from now on."""
        if self._overflow:
            self._enter(_OVERFLOWING)
        else:
            self._enter(_ACTIVE)
            self._restore_order()

    def _check(self, channel: Channel) -> None:
        """Raise `ChannelLost` if the channel has ended, with its last answer or while that was awaited."""
        if self._channel is not channel or channel.lost is not None:
            raise channel.lost or ChannelLost("the channel is being closed")

    def close(self, *, for_good: bool) -> None:
        """Take no more deliveries; the owner closes the channel. Idempotent.

        What the browser has taken from the live queue is acknowledged to the inbox too. `for_good`: the consumer
        is not attached again.
        """
        self._ack_copies()
        self.acks.stop()
        if self._channel is not None and self._live is not None:
            self._live.leave(self._channel)
        self._channel = None
        self._live = None
        if self.state is not ConsumerState.CLOSED:
            self._enter(ConsumerState.CLOSED if for_good else ConsumerState.DETACHED)
        self._mailbox.on_empty = None
        if self._first is not None:
            self._first.set()

    def _note_taken(self, taken: Sequence[Delivery]) -> None:
        """Take note of what the browser has taken, while there is a live queue."""
        live = self._live
        if live is not None:
            live.note_taken(taken)
            if self.state is not _STANDING_BY:  # the inbox may have begun to deliver
                self._ack_copies()

    def _ack_copies(self) -> None:
        """Acknowledge to the inbox what the browser has taken from the live queue, so that it goes on."""
        if self._live is not None and self._channel is not None:
            self.acks.ack_copies(self._live.pop_taken(self._overflow))

    def on_delivery(self, delivery: Delivery) -> None:
        """Take a delivery, in the event loop. A fault ends the mailbox, and not the connection of many others."""
        channel = self._channel
        if channel is None:
            return
        self._newest = delivery.tag
        delivery.channel = channel
        mailbox = self._mailbox
        try:
            if self._is_smooth and mailbox.size + len(delivery.body) < mailbox.budget:
                mailbox.deliver(delivery)
            else:
                self._sort(channel, delivery)
        except Exception as exc:
            mailbox.fail(exc)

    def _sort(self, channel: Channel, delivery: Delivery) -> None:
        """Deliver, set aside or refuse a delivery, in the event loop."""
        if self._mailbox.is_closed:  # what it holds is still being written; then the consumer is closed too
            return
        if self._first is not None:
            self._first.set()
        live = self._live
        if live is not None and delivery.consumer_tag == LIVE_TAG:
            if not (live.is_ending or self._has_place(live.overflow, delivery)):
                self._refuse(live.overflow, delivery)
                self._settle(live)
            elif not live.take(delivery):
                self._mailbox.deliver(delivery)
                self._end_overflow()
        else:
            if self._sends_back and not self._has_place(self._overflow, delivery):
                self._refuse(self._overflow, delivery)
                self._ack_copies()
            elif live is not None:
                live.hold(delivery)
                self._ack_copies()
            else:
                self._mailbox.deliver(delivery)
                self._end_overflow()
            if live is not None and self.state in (_STANDING_BY, _BINDING):  # whether there was room or not
                self._promote(channel, live)

    def _has_place(self, overflow: Overflow, delivery: Delivery) -> bool:
        """Tell whether a delivery is the next in its order, and has room."""
        if overflow:
            return overflow.admit(delivery)
        mailbox, live = self._mailbox, self._live
        used = mailbox.size + (live.set_aside if live is not None else 0)
        return not used or used + len(delivery.body) < mailbox.budget

    def _refuse(self, overflow: Overflow, delivery: Delivery) -> None:
        """Drop a delivery's body; it is sent back to its queue when there is room for it."""
        if not overflow.is_watched:
            overflow.is_watched = True
            gevent.spawn(self._run_watch, self._channel, overflow).name = f"overflow:{self._user}"
        overflow.refuse(delivery)
        if self.state is _ACTIVE:
            self._enter(_OVERFLOWING)
        self.acks.is_ordered = False
        self._mailbox.on_empty = self._on_room
        if not self._mailbox.size:
            self._on_room()

    def _on_room(self) -> None:
        """Have what was refused delivered again: the mailbox is empty. In the event loop or the session."""
        channel, live = self._channel, self._live
        overflow = self._overflow if live is None else live.overflow
        if channel is not None and overflow:
            channel.send_back(overflow.send_back(self._mailbox.budget))

    def _end_overflow(self) -> None:
        """Return to the normal state if all that was refused has come again."""
        if self.state is _OVERFLOWING and not self._overflow:
            self._enter(_ACTIVE)
        elif self.state is not _STANDING_BY or self._live is None or self._live.overflow:
            return
        self._restore_order()

    def _restore_order(self) -> None:
        if not self.acks.is_ordered:
            self._mailbox.on_empty = None
            self.acks.restore_order(self._newest)

    def _run_watch(self, channel: Channel, overflow: Overflow) -> None:
        """Stop waiting for what does not come back: it has expired or was purged meanwhile."""
        is_of_inbox = overflow is self._overflow
        try:
            watch_overflow(
                channel,
                overflow,
                progress=lambda: (overflow.awaited, self._newest) if self._channel is channel else None,
                queue=lambda: Topology.inbox(self._user) if is_of_inbox or self._live is None else self._live.name,
                on_given_up=self._on_given_up,
            )
        except ChannelLost as lost:
            if self._channel is channel:  # else the owner knows
                self._on_fault(lost)
        overflow.is_watched = False

    def _on_given_up(self) -> None:
        if not self._mailbox.size:
            self._on_room()
        self._end_overflow()

    def _run_settling(self, channel: Channel, live: LiveQueue, leaderless: Method | None) -> None:
        """Settle after `_SETTLING`; `leaderless`: how to ask an inbox that did not count its consumer."""
        try:
            if leaderless is not None:
                live.wait_for_leader(channel, leaderless)
            gevent.sleep(_SETTLING)
            self._settle(live)
        except ChannelLost as lost:
            if self._channel is channel:  # else the owner knows
                self._on_fault(lost)

    def _settle(self, live: LiveQueue) -> None:
        """Deliver what came from the live queue at first, if the inbox has not begun to deliver meanwhile."""
        if self._live is live and (self.state is _STANDING_BY or live.overflow):
            self._deliver(live.settle())

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._mailbox.deliver(delivery)

    def _promote(self, channel: Channel, live: LiveQueue) -> None:
        """The inbox has begun to deliver: change over to it, once `begin` does not use the channel any more."""
        self.acks.is_ordered = False
        if self.state is _BINDING:
            self._enter(_PROMOTED)
        else:
            self._start_promotion(channel, live)

    def _start_promotion(self, channel: Channel, live: LiveQueue) -> None:
        self._enter(_PROMOTING)
        gevent.spawn(self._run_promotion, channel, live).name = f"promotion:{self._user}"

    def _run_promotion(self, channel: Channel, live: LiveQueue) -> None:
        try:
            self._change_over(channel, live)
            return
        except ChannelLost as exc:
            lost = exc
        except Exception:
            logger.exception("the promotion of a consumer of %s met a fault of the relay's", ascii(self._user))
            lost = ChannelLost("a fault of the relay's", _INTERNAL_ERROR)
        if self._channel is channel:  # else the owner knows
            self._on_fault(lost)

    def _change_over(self, channel: Channel, live: LiveQueue) -> None:
        """Change over from the live queue to the inbox, without a gap and without a message out of order.

        The inbox begins with what the former active consumer had not taken, which may be newer than what the live
        queue still holds: so that is emptied first. What waited since before this socket came follows newer ones.
        """
        live.drain(channel, self._deliver)
        if self._channel is not channel:
            return
        self._live = None
        self.acks.on_taken = None
        self._deliver(live.merge())
        self._become_active()
        if self._overflow and not self._mailbox.size:
            self._on_room()
