"""A subscription: what one channel brings for one consumer, from the inbox and from a live queue.

deliveries --> mailbox        there is room, and nothing older is on its way
           --> set aside      it stands by, and it is not yet clear what comes first: see `live`
           --> sent back      there is no room: see `overflow`
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence

import gevent
from gevent.event import Event
from pika import spec
from pika.amqp_object import Method

from imrelay.broker.channel import Channel
from imrelay.broker.live_queue import LiveQueue
from imrelay.broker.mailbox import Delivery, Mailbox
from imrelay.broker.overflow import Overflow
from imrelay.broker.topology import LIVE_TAG, Topology
from imrelay.errors import ChannelLost

__all__ = ["Subscription"]

logger = logging.getLogger(__name__)

#: Pauses between looks at a live queue that is still being emptied, in seconds; the last one again and again.
_PROMOTION_PAUSES = (0.02, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5)
#: Longest time in which what waits in an inbox begins to come to its first consumer, in seconds; if it does not,
#: somebody else gets it.
_BEGINNING = 0.5
#: Seconds after a live queue is bound in which its messages are set aside, lest the inbox begins with older ones.
_SETTLING = 0.1
#: Longest time that what comes from a live queue is set aside because the inbox has no leader, in seconds.
_LEADERLESS = 10.0
#: Seconds without a delivery after which the broker is asked whether what was sent back is gone.
_RETURNING = 5.0
#: Messages under way to a socket from an inbox that may be a quorum queue: as many for every socket of every
#: relay, whatever its settings. One that asked for fewer than the one before it would get the oldest of what that
#: one has left, and leave them behind the others.
_FEW = 16
#: Room for each of those, in bytes: a browser's message at the default `max_message_size`, and what goes into it.
_ROOM = 65_536 + 1_024
#: `channel.close` code of AMQP 0-9-1.
_INTERNAL_ERROR = 541


class Subscription:
    """The deliveries of one channel to one mailbox. `on_fault` is called when the change to the inbox has failed.

    The owner opens the channel with `on_delivery`, calls `begin`, and closes both.
    """

    __slots__ = (
        "_channel",
        "_first",
        "_hurry_from",
        "_inbox",
        "_is_begun",
        "_is_smooth",
        "_live",
        "_mailbox",
        "_newest",
        "_on_fault",
        "_ordered_from",
        "_overflow",
        "_sends_back",
        "_unsaid",
        "_user",
        "has_stood_by",
    )

    def __init__(
        self, user: str, mailbox: Mailbox, *, has_stood_by: bool, on_fault: Callable[[ChannelLost], None]
    ) -> None:
        #: Whether this socket ever got messages from a live queue, which the inbox may repeat one day.
        self.has_stood_by = has_stood_by
        self._user = user
        self._mailbox = mailbox
        self._on_fault = on_fault
        self._channel: Channel | None = None
        #: Whether `begin` has ended, so that others may use the channel.
        self._is_begun = False
        #: The name of the inbox.
        self._inbox = ""
        #: Set by the first delivery, where that is waited for.
        self._first: Event | None = None
        #: The live queue, while there is one.
        self._live: LiveQueue | None = None
        #: Whether what the inbox brings and there is no room for is sent back to it, to come again in its order.
        self._sends_back = True
        #: What came from the inbox and had no room.
        self._overflow = Overflow()
        #: Whether a delivery has nothing to do but to go to the mailbox.
        self._is_smooth = False
        #: Acknowledgements since the last that was sent at once, and how many make the next one so.
        self._unsaid = self._hurry_from = 0
        #: The delivery tag that came last; 0 while none has come.
        self._newest = 0
        #: From this delivery tag on, tags come out of the mailbox in their order, and none is left out.
        self._ordered_from: float = 0

    @property
    def live_queue(self) -> str | None:
        """The name of the live queue; None where there is none, or none that lasts."""
        live = self._live
        return live.name if live is not None and live.held is None and live.name else None

    def begin(
        self,
        channel: Channel,
        topology: Topology,
        prefetch: int,
        declarations: list[Method],
        *,
        is_counted: bool,
        sends_back: bool,
        keeps_order: bool,
        is_again: bool,
    ) -> None:
        """Consume from the inbox, and from a live queue unless this is known to be the active consumer.

        Blocks for one round trip, or two. `is_counted`: the broker counts who stands by, and what another channel
        of this socket had is back, if it had one (`is_again`). `sends_back`: what there
        is no room for may be sent back. `keeps_order`: that keeps its place in the inbox, whatever happens after;
        another one is asked for few messages, and there is room for them unless they are unusually large.
        Raises `ChannelLost`.
        """
        self._channel = channel
        self._inbox = topology.inbox(self._user)
        self._sends_back = sends_back
        if not keeps_order:
            prefetch = _FEW
            self._mailbox.budget = max(self._mailbox.budget, _FEW * _ROOM)
        self._hurry_from = prefetch // 2
        self._first = None if is_counted else Event()
        ask = topology.ask_inbox(self._user)
        before, _, _, after = channel.call(
            *declarations, ask, spec.Basic.Qos(prefetch_count=prefetch), topology.consume_inbox(self._user), ask
        )
        self._check(channel)
        is_alone = not before.consumer_count
        if self._first is not None:
            is_alone = is_alone or is_again  # the one that is counted may be the lost one
            if is_alone and before.message_count:
                self._first.wait(_BEGINNING)
                self._check(channel)
            self._first = None
        # An inbox delivers to one consumer until that leaves: who has got anything is the active one.
        if not self._newest and not (is_counted and after.consumer_count <= 1):
            self._stand_by(channel, topology, ask, is_alone)
        self._is_begun = True
        live = self._live
        if live is None:
            self._end_overflow()
        elif live.held is not None:
            self._promote(channel, live)
        elif is_alone and after.consumer_count:
            gevent.spawn_later(_SETTLING, self._settle, live)
        elif is_alone:
            gevent.spawn(self._run_settling, channel, live, ask).name = f"settling:{self._user}"

    def _stand_by(self, channel: Channel, topology: Topology, ask: Method, is_alone: bool) -> None:
        # All in one, and the consumer before the binding: a live queue that never had a consumer would outlive its
        # socket, whatever ends the channel meanwhile. Without a name it is the one declared last, and the last
        # answer says that it has been bound.
        live = self._live = LiveQueue(is_alone=is_alone)
        self.has_stood_by = True
        declare, bind = topology.declare_live(), topology.bind_live(self._user, "")
        live.name = channel.call(declare, topology.consume_live(""), bind, ask)[0].queue
        self._check(channel)

    def _check(self, channel: Channel) -> None:
        """Raise `ChannelLost` if this has ended, with the last answer or while it was awaited."""
        if self._channel is not channel or channel.lost is not None:
            raise channel.lost or ChannelLost("the channel is being closed")

    def close(self) -> None:
        """Take nothing any more; the owner closes the channel. Idempotent.

        What the browser has taken from the live queue does not go back to the inbox.
        """
        self._ack_copies()
        self._channel = None
        self._live = None
        self._is_smooth = False
        self._mailbox.on_empty = None
        if self._first is not None:
            self._first.set()

    def ack(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge deliveries that were taken from the mailbox, in the order in which they came out of it.

        Those of a channel that has gone are skipped: the broker delivers them again.
        """
        channel, last = self._channel, taken[-1]
        if channel is None or last.channel is not channel:
            return
        first = taken[0] if taken[0].channel is channel else next(one for one in taken if one.channel is channel)
        if first.tag >= self._ordered_from:
            self._note_taken(taken)
            channel.ack(last.tag, multiple=True, at_once=self._is_urgent(len(taken)))
        else:
            self.ack_each(taken)

    def ack_each(self, taken: Sequence[Delivery]) -> None:
        """Acknowledge these deliveries and no others, in whatever order they came."""
        channel = self._channel
        if channel is None:
            return
        self._note_taken(taken)
        at_once = self._is_urgent(len(taken))
        for delivery in taken:
            if delivery.channel is channel:
                channel.ack(delivery.tag, multiple=False, at_once=at_once)

    def _note_taken(self, taken: Sequence[Delivery]) -> None:
        if self._live is not None:
            self._live.note_taken(taken)
            if self._live.held is not None:
                self._ack_copies()

    def _ack_copies(self) -> None:
        """Acknowledge to the inbox what the browser has taken from the live queue; it gives what follows."""
        if self._live is not None and self._channel is not None:
            for tag in self._live.pop_taken(self._overflow):
                self._channel.ack(tag, multiple=False, at_once=False)

    def discard(self, delivery: Delivery) -> None:
        """Reject a delivery without having it again (`basic.reject`)."""
        if self._channel is not None and delivery.channel is self._channel:
            self._channel.discard(delivery.tag)

    def _is_urgent(self, count: int) -> bool:
        """Tell whether the broker should hear of acknowledgements now, lest it run out of what it may deliver."""
        self._unsaid += count
        if self._unsaid < self._hurry_from:
            return False
        self._unsaid = 0
        return True

    def on_delivery(self, delivery: Delivery) -> None:
        """Take a delivery, in the event loop."""
        channel = self._channel
        if channel is None:
            return
        self._newest = delivery.tag
        delivery.channel = channel
        mailbox = self._mailbox
        if self._is_smooth and mailbox.size + len(delivery.body) < mailbox.budget:
            mailbox.deliver(delivery)
        else:
            self._sort(channel, delivery)

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
            is_first = live is not None and live.begin_to_hold()
            if self._sends_back and not self._has_place(self._overflow, delivery):
                self._refuse(self._overflow, delivery)
                self._ack_copies()
            elif live is not None:
                live.hold(delivery)
                self._ack_copies()
            else:
                self._mailbox.deliver(delivery)
                self._end_overflow()
            if live is not None and is_first:  # be there room for it or not
                self._ordered_from = math.inf
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
        self._is_smooth = False
        self._ordered_from = math.inf
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
        """Go back to the plain way if all that was refused has come again."""
        live = self._live
        if self._overflow or not self._is_begun:
            return
        if live is None:
            self._is_smooth = True
        elif live.overflow or live.held is not None:
            return
        if self._ordered_from == math.inf:
            self._mailbox.on_empty = None
            self._ordered_from = self._newest + 1

    def _run_watch(self, channel: Channel, overflow: Overflow) -> None:
        """Await no more what does not come back: it has expired or was thrown away meanwhile."""
        try:
            while overflow and self._channel is channel:
                before = overflow.awaited, self._newest
                gevent.sleep(_RETURNING)
                if overflow.awaited and self._is_silent(channel, overflow, before):
                    overflow.give_up()
                    if not self._mailbox.size:
                        self._on_room()
                    self._end_overflow()
        except ChannelLost as lost:
            if self._channel is channel:  # else the owner knows
                self._on_fault(lost)
        overflow.is_watched = False

    def _is_silent(self, channel: Channel, overflow: Overflow, before: tuple[int, int]) -> bool:
        """Tell whether nothing came since `before`, though the broker has answered: it may only have been slow.

        An answer of a queue comes behind its deliveries. The second one because RabbitMQ lets a consumer have more
        a moment after it was told that there is room.
        """
        for pause in (_SETTLING, 0):
            if self._channel is not channel or before != (overflow.awaited, self._newest) or channel.is_asking:
                return False
            queue = self._inbox if overflow is self._overflow or self._live is None else self._live.name
            channel.call(spec.Queue.Declare(queue=queue, passive=True))
            gevent.sleep(pause)
        return self._channel is channel and before == (overflow.awaited, self._newest)

    def _run_settling(self, channel: Channel, live: LiveQueue, ask: Method) -> None:
        """Settle when the inbox counts its consumer: a quorum queue without a leader counts and gives nothing."""
        until = time.monotonic() + _LEADERLESS
        try:
            for pause in itertools.chain(_PROMOTION_PAUSES, itertools.repeat(_PROMOTION_PAUSES[-1])):
                if self._live is not live or live.held is not None:  # it gives
                    return
                if channel.call(ask)[0].consumer_count or time.monotonic() > until:
                    break
                gevent.sleep(pause)
            gevent.sleep(_SETTLING)
            self._settle(live)
        except ChannelLost as lost:
            if self._channel is channel:  # else the owner knows
                self._on_fault(lost)

    def _settle(self, live: LiveQueue) -> None:
        """Deliver what came from the live queue at first, if the inbox has not begun to deliver meanwhile."""
        if self._live is live and (live.held is None or live.overflow):
            self._deliver(live.settle())

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._mailbox.deliver(delivery)

    def _promote(self, channel: Channel, live: LiveQueue) -> None:
        """Begin to change over; not while `begin` still uses the channel, which does it then."""
        if self._is_begun:
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

        But what waited in the inbox from before this socket came, and nobody took, it gets after newer messages.
        The inbox begins with what the former active consumer had not taken, which may be later than what the
        live queue still holds: so that is emptied first, and the inbox's deliveries are held meanwhile.
        """
        look = spec.Queue.Declare(queue=live.name, passive=True)
        for pause in itertools.chain(_PROMOTION_PAUSES, itertools.repeat(_PROMOTION_PAUSES[-1])):
            if not channel.call(look)[0].message_count and not live.overflow:
                break
            self._deliver(live.settle())  # else what is set aside would keep the rest from coming
            gevent.sleep(pause)
        live.is_ending = True
        channel.call(spec.Basic.Cancel(LIVE_TAG))  # the last consumer: the live queue goes with it
        if self._channel is not channel:
            return
        self._live = None
        self._deliver(live.merge())
        self._end_overflow()
        if self._overflow and not self._mailbox.size:
            self._on_room()
