"""What a consumer that stands by sets aside: around its attaching, and while it changes over to the inbox."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from imrelay.broker.codec import Delivery
from imrelay.broker.overflow import Overflow, identify
from imrelay.broker.topology import LIVE_TAG

__all__ = ["LiveQueue"]

#: Messages of relays that are remembered as taken from the live queue.
_REMEMBERED = 256


class LiveQueue:
    """The live queue of one consumer on one channel, and the deliveries that are set aside because of it."""

    __slots__ = ("_taken", "early", "held", "is_ending", "name", "overflow", "set_aside")

    def __init__(self, *, is_alone: bool) -> None:
        """Begin; `is_alone`: the inbox had no consumer when this one came, so it may be the active one."""
        #: As the broker names it; empty until it has.
        self.name = ""
        #: What came from it until it is clear that the inbox has nothing older to give; then None.
        self.early: list[Delivery] | None = [] if is_alone else None
        #: What the inbox gave since it began to; None until then.
        self.held: list[Delivery] | None = None
        #: Whether it is being deleted: what still comes from it has no place to go back to.
        self.is_ending = False
        #: What came from it and had no room.
        self.overflow = Overflow()
        #: Bytes of what is set aside.
        self.set_aside = 0
        #: Messages of relays that the browser has taken from it last.
        self._taken: deque[str] = deque(maxlen=_REMEMBERED)

    def begin_to_hold(self) -> bool:
        """Note that the inbox gives something; tell whether it is the first time."""
        is_first = self.held is None
        self.held = self.held or []
        return is_first

    def hold(self, delivery: Delivery) -> None:
        """Set aside a delivery of the inbox, which has begun to give."""
        assert self.held is not None
        self.set_aside += len(delivery.body) + 1
        self.held.append(delivery)

    def take(self, delivery: Delivery) -> bool:
        """Take note of a delivery of the live queue; tell whether it was set aside."""
        if self.early is None:
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

        Only where nobody was there when this consumer came: then what the inbox gives up to the first message that
        the live queue has brought too is older than the live queue, and else could be newer.
        """
        early, self.early = self.early or [], None
        held = self.held or []
        ahead = {identify(delivery) for delivery in early}
        cut = next((at for at, one in enumerate(held) if identify(one) in ahead), len(held)) if ahead else 0
        settled = held[:cut] + early
        if self.held is not None:
            self.held = held[cut:]
        self.set_aside -= sum(len(delivery.body) + 1 for delivery in settled)
        return settled

    def merge(self) -> list[Delivery]:
        """Return what was set aside in its order, with what the live queue has brought too.

        The session knows repeats of relays by their ids. Those of other programs are not known: two
        messages of the same content may be one that came twice, or two, of which none may be left out.
        """
        return self.settle() + (self.held or [])
