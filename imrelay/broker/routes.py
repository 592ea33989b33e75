"""Routes: what waits for one user until it is known that the user's inbox is there.

    asked --> there --> over                                the inbox is made sure of, and all goes on
      ^         |
      |         +-----> alone --> over                      quorum inboxes: the first message goes alone
      +---------------- returned                            an inbox that was there is gone: once more

Order between one sender and one recipient is kept by this: what is to be published to a user with a route waits
in it, and a route goes on only when the broker has answered for all that was under way to the user before.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import gevent

from imrelay.broker.connection import Connection
from imrelay.broker.inbox_opening import offer
from imrelay.broker.known_inboxes import KnownInbox, KnownInboxes
from imrelay.broker.ledger import Ledger
from imrelay.broker.publication import Publication
from imrelay.broker.topology import Topology
from imrelay.errors import AnswerableError, BrokerUnavailable, ChannelLost, InboxFull, RecipientUnknown

__all__ = ["Route", "Routes"]

logger = logging.getLogger(__name__)

#: Pause before a message is offered again, or an inbox asked for again, in seconds.
_PAUSE = 0.5
#: The longest pause before an inbox is asked for again, after it could not be opened again and again, in seconds.
_LONGEST_PAUSE = 5.0
#: How often a refused message that went alone is offered again.
_OFFERS = 6


class Route:
    """Messages to one user that wait until the user's inbox was made sure of."""

    __slots__ = (
        "alone",
        "asked",
        "failures",
        "in_flight",
        "inbox",
        "is_asked",
        "is_there",
        "returned",
        "user",
        "waiting",
    )

    def __init__(self, user: str, in_flight: int, inbox: KnownInbox | None) -> None:
        self.user = user
        #: Messages under way to the user, of those before the route or the one that goes alone.
        self.in_flight = in_flight
        #: What was known of the inbox before, and then what is.
        self.inbox = inbox
        #: Whether the inbox is being asked for, and how many messages waited then.
        self.is_asked = False
        self.asked = 0
        self.is_there = False
        self.returned: list[Publication] = []
        self.waiting: deque[Publication] = deque()
        self.alone: Publication | None = None
        #: How often in a row the inbox could not be asked for, or what was published to it came back.
        self.failures = 0


class Routes:
    """The routes of one channel. What is called from the event loop or the publisher's greenlet does not block.

    `known` holds the inboxes that are known on this channel; `ask` has one made sure of, `requeue` has messages
    published before all others, and `renew` is to open another channel. `elsewhere` is given where users without
    an inbox may be at another kind of server, and returns what a message is tried with: one that comes back says
    that they are not.
    """

    def __init__(
        self,
        ledger: Ledger,
        connection: Connection,
        topology: Topology,
        known: KnownInboxes,
        *,
        persistent: bool,
        ask: Callable[[Route], None],
        requeue: Callable[[Sequence[Publication]], None],
        renew: Callable[[], None],
        elsewhere: Callable[[], KnownInbox] | None = None,
    ) -> None:
        #: The routes by user.
        self.by_user: dict[str, Route] = {}
        self._ledger = ledger
        self._connection = connection
        self._topology = topology
        self._persistent = persistent
        self._known = known
        self._ask = ask
        self._requeue = requeue
        self._renew = renew
        self._elsewhere = elsewhere

    def clear(self) -> None:
        """Forget all of them: the channel was lost, and all that waited has been queued again."""
        self.by_user = {}

    def begin(self, publication: Publication, in_flight: int) -> None:
        """Have a message wait until its user's inbox was made sure of; so many are under way to the user."""
        route = Route(publication.user, in_flight, self._known.find(publication.user))
        route.waiting.append(publication)
        self.by_user[publication.user] = route
        self._make_sure(route)  # while what is under way is answered

    def note_returned(self, publication: Publication, in_flight: int) -> None:
        """A message came back (`basic.return`), of so many that are under way to the user; its confirm follows."""
        user = publication.user
        if user not in self.by_user:
            self.by_user[user] = Route(user, in_flight, self._known.find(user))
        self._known.forget(user)

    def settle(self, publication: Publication, accepted: bool) -> None:
        """The broker has answered for a message (`basic.ack`, `basic.nack`), or it will never be published."""
        route = self.by_user.get(publication.user)
        if route is not None:
            route.in_flight -= 1
            if route.alone is publication and not accepted:
                gevent.spawn(self._run_offers, publication, route).name = f"offers:{publication.user}"
                return
            if publication.returned:
                route.returned.append(publication)
        if not accepted:
            self._refuse(publication)
        elif not publication.returned:
            self._ledger.answer(publication, None)
        if route is not None:
            self._advance(route)

    def skip(self, publication: Publication) -> None:
        """A message was answered before its turn came: if it was to go alone, another one is."""
        route = self.by_user.get(publication.user)
        if route is not None and route.alone is publication:
            route.in_flight -= 1
            route.alone = None
            self._advance(route)

    def checked(self, route: Route, outcome: KnownInbox | BaseException | None) -> None:
        """The inbox of a user was made sure of, or is not there, or nobody knows."""
        if self.by_user.get(route.user) is not route:
            return
        route.is_asked = False
        if isinstance(outcome, BaseException):
            self._make_sure_later(route)
            return
        if outcome is None:
            asked = [route.waiting.popleft() for _ in range(min(route.asked, len(route.waiting)))]
            tried = [one for one in asked if not one.returns] if self._elsewhere is not None else []
            for publication in asked:
                if publication not in tried:
                    self._answer(publication, RecipientUnknown("nobody with this id was ever here"))
            route.waiting.extendleft(reversed(tried))
            if tried and self._elsewhere is not None:
                outcome = self._elsewhere()
        route.is_there = outcome is not None
        if outcome is not None:
            route.inbox = outcome
        self._advance(route)

    def prune(self) -> None:
        """Keep nothing of what was answered meanwhile."""
        for route in self.by_user.values():
            before = len(route.waiting)
            # what had been asked for stands at the front
            gone = sum(publication.done for publication in list(route.waiting)[: route.asked])
            route.asked = max(0, route.asked - gone)
            if before:
                route.waiting = deque(publication for publication in route.waiting if not publication.done)

    def _advance(self, route: Route) -> None:
        """Take the next step, when all that was under way to the user has been answered."""
        if route.in_flight or route.is_asked:
            return
        if route.returned:
            self._take_back(route)
            return
        while route.waiting and route.waiting[0].done:
            route.waiting.popleft()
        if not route.is_there:
            if route.waiting:
                self._make_sure(route)
            else:
                del self.by_user[route.user]
            return
        assert route.inbox is not None
        is_met = route.alone is not None or self._known.find(route.user) is not None
        if self._topology.is_replicated and not is_met and route.waiting:
            route.alone = route.waiting.popleft()
            route.in_flight = 1
            self._requeue([route.alone])
            return
        del self.by_user[route.user]
        self._known.remember(route.user, route.inbox)
        self._requeue(route.waiting)

    def _take_back(self, route: Route) -> None:
        """Put what came back before what waits, and make sure of the inbox once more: not in a tight loop."""
        returned = [publication for publication in route.returned if not publication.done]
        for publication in returned:
            publication.returned = False
        again = max((publication.returns for publication in returned), default=0) > 1
        route.returned = []
        route.alone = None
        route.is_there = False
        route.waiting.extendleft(reversed(returned))
        if again:
            self._make_sure_later(route)
        else:
            self._advance(route)

    def _make_sure(self, route: Route) -> None:
        route.is_asked = True
        self._ask(route)

    def _make_sure_later(self, route: Route) -> None:
        route.is_asked = True
        pause = min(_PAUSE * 2**route.failures, _LONGEST_PAUSE)
        route.failures = min(route.failures + 1, 10)
        gevent.spawn_later(pause, self._run_again, route).name = f"again:{route.user}"

    def _run_again(self, route: Route) -> None:
        if self.by_user.get(route.user) is route:
            route.is_asked = False
            self._advance(route)

    def _refuse(self, publication: Publication) -> None:
        sentence = "the recipient's inbox is full: this message is not kept and will not be delivered later"
        more = "sockets of the recipient that stood by may have shown it"
        self._answer(publication, InboxFull(f"{sentence}; {more}"))

    def _answer(self, publication: Publication, refusal: AnswerableError) -> None:
        """Answer a message that was refused, unless another copy of it may have been taken."""
        if publication.is_doubtful:
            why = "this message was published again after its connection was lost, and refused then"
            refusal = BrokerUnavailable(f"{why}: it may have arrived the first time", uncertain=True)
        self._ledger.answer(publication, refusal)

    def _run_offers(self, publication: Publication, route: Route) -> None:
        """Find out whether an inbox that has refused a message is full, or had no leader at that moment.

        RabbitMQ goes on to refuse what comes over a channel whose first message found a quorum queue without a
        leader (3.10). So it is offered over fresh ones; when that is taken, the publisher needs a fresh one too.
        """
        accepted = False
        for _ in range(_OFFERS):
            gevent.sleep(_PAUSE)
            if self.by_user.get(publication.user) is not route or publication.done:
                break
            left = publication.deadline - time.monotonic()
            answer: bool | None = None
            try:
                answer = offer(
                    self._connection, self._topology, publication, persistent=self._persistent, timeout=left
                )
            except ChannelLost as exc:
                logger.debug("message %s could not be offered again: %s", publication.mid, exc)
            except Exception:  # the route has to end, or the user would never be reached again
                logger.exception("message %s could not be offered again", publication.mid)
            if answer is None:
                publication.is_doubtful = True
            elif answer:
                accepted = True
                break
        if accepted:
            self._ledger.answer(publication, None)
        if self.by_user.get(publication.user) is not route:  # the channel was lost, and all is queued again
            return
        if accepted:
            self._renew()
        else:
            self._refuse(publication)
            self._advance(route)
