"""The live queue of a consumer that stands by, and the deliveries that are set aside because of it.

These are the first ones from the live queue, until it is clear that the inbox has nothing older, and those of the
inbox, until the live queue is empty and deleted.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence

import gevent
from pika import spec
from pika.amqp_object import Method

from imrelay.broker.channel import Channel
from imrelay.broker.codec import Delivery
from imrelay.broker.overflow import Overflow, identify
from imrelay.broker.topology import LIVE_TAG, Topology

__all__ = ["LiveQueue"]

#: Pauses between looks at a live queue that is still being emptied, in seconds; the last one again and again.
_PAUSES = (0.02, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5)
#: Messages of relays that are remembered as taken from the live queue.
_REMEMBERED = 256
#: Longest time for which what comes from it is set aside because the inbox has no leader, in seconds.
_LEADERLESS = 10.0


class LiveQueue:
    """The live queue of one consumer on one channel, and the deliveries that are set aside because of it."""

    __slots__ = ("_is_settled", "_taken", "early", "held", "is_ending", "name", "overflow", "set_aside", "unbind")

    def __init__(self, *, is_alone: bool) -> None:
        """Begin; `is_alone`: the inbox had no consumer when this one came, so it may be the active one."""
        #: As the broker names it; empty until `open` has returned.
        self.name = ""
        #: What is to be sent before it ends, see `Topology.unbind_live`; None until `open` has returned.
        self.unbind: Method | None = None
        #: Whether it is clear that the inbox has nothing older than what comes from the live queue.
        self._is_settled = not is_alone
        #: What came from it before that was clear.
        self.early: list[Delivery] = []
        #: What the inbox has delivered.
        self.held: list[Delivery] = []
        #: Whether it is being deleted: what still comes from it cannot be sent back.
        self.is_ending = False
        #: What came from it and had no room.
        self.overflow = Overflow()
        #: Bytes of what is set aside.
        self.set_aside = 0
        #: Messages of relays that the browser has taken from it last.
        self._taken: deque[str] = deque(maxlen=_REMEMBERED)

    def open(self, channel: Channel, topology: Topology, user: str) -> None:
        """Declare it, consume from it and bind it; blocks for one round trip. Raises `ChannelLost`."""
        # All in one, and the consumer before the binding: a live queue that never had a consumer would outlive its
        # socket, whatever ends the channel meanwhile. Without a name it is the one declared last, and the last
        # answer says that it has been bound.
        declare, bind, ask = topology.declare_live(), topology.bind_live(user, ""), topology.ask_inbox(user)
        self.name = channel.call(declare, topology.consume_live(""), bind, ask)[0].queue
        self.unbind = topology.unbind_live(user, self.name)

    def wait_for_leader(self, channel: Channel, ask: Method) -> None:
        """Block until the inbox counts its consumer or delivers something, or for `_LEADERLESS` seconds.

        A quorum queue without a leader counts no consumer and delivers nothing. Raises `ChannelLost`.
        """
        until = time.monotonic() + _LEADERLESS
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            if self.held or channel.call(ask)[0].consumer_count or time.monotonic() > until:
                return
            gevent.sleep(pause)

    def leave(self, channel: Channel) -> None:
        """Unbind it, before its channel is closed; may be called in the event loop."""
        if self.unbind is not None and not self.is_ending:
            channel.send(self.unbind)

    def drain(self, channel: Channel, deliver: Callable[[Sequence[Delivery]], None]) -> None:
        """Block until it is empty, and delete it; `deliver` gets what was set aside, so that the rest can come.

        What still comes while it is being deleted is for the caller to take. Raises `ChannelLost`.
        """
        look = spec.Queue.Declare(queue=self.name, passive=True)
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            if not channel.call(look)[0].message_count and not self.overflow:
                break
            deliver(self.settle())
            gevent.sleep(pause)
        self.is_ending = True
        assert self.unbind is not None  # `open` has returned
        channel.call(self.unbind, spec.Basic.Cancel(LIVE_TAG))  # the last consumer: the live queue goes with it

    def hold(self, delivery: Delivery) -> None:
        """Set aside a delivery of the inbox, which has begun to deliver."""
        self.set_aside += len(delivery.body) + 1
        self.held.append(delivery)

    def take(self, delivery: Delivery) -> bool:
        """Take note of a delivery of the live queue; tell whether it was set aside."""
        if self._is_settled:
            return False
        self.early.append(delivery)
        self.set_aside += len(delivery.body) + 1
        return True

    def note_taken(self, deliveries: Sequence[Delivery]) -> None:
        """Remember what the browser has taken from the live queue."""
        for delivery in deliveries:
            if delivery.is_own and delivery.mid is not None and delivery.consumer_tag == LIVE_TAG:
                self._taken.append(delivery.mid)

    def pop_taken(self, refused: Overflow) -> list[int]:
        """Set aside no more of the inbox's deliveries what the browser has taken from the live queue already.

        Returns their delivery tags, with those of `refused`, for which there was no room.
        """
        known = self._taken
        if not (self.held and known):
            return refused.pop(known)
        taken = [one for one in self.held if one.is_own and one.mid in known]
        if taken:
            self.held = [one for one in self.held if not (one.is_own and one.mid in known)]
            self.set_aside -= sum(len(one.body) + 1 for one in taken)
        return [one.tag for one in taken] + refused.pop(known)

    def settle(self) -> list[Delivery]:
        """Set aside no more of what comes from the live queue; return what was, and what the inbox gave before it.

        Needed only if there was no other consumer when this one came: then what the inbox delivers before the
        first message that the live queue has delivered too is older than the live queue; otherwise it could be
        newer.
        """
        early, self.early = self.early, []
        self._is_settled = True
        held = self.held
        ahead = {identify(delivery) for delivery in early}
        cut = next((at for at, one in enumerate(held) if identify(one) in ahead), len(held)) if ahead else 0
        settled = held[:cut] + early
        self.held = held[cut:]
        self.set_aside -= sum(len(delivery.body) + 1 for delivery in settled)
        return settled

    def merge(self) -> list[Delivery]:
        """Return what was set aside in its order, with what the live queue has brought too.

        The session recognises repeats of relays by their ids. Those of other programs are not recognised: two
        messages of the same content may be one that came twice, or two, of which none may be left out.
        """
        return self.settle() + self.held
