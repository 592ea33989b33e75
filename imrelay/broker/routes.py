"""The routes of the publisher's channel: the steps from state to state for the messages to one user.

They keep the order between one sender and one recipient: a message to a user with a route waits in it, and a route
takes its next step only when the broker has answered for all that was under way to the user before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import gevent

from imrelay.broker.connection import Connection
from imrelay.broker.inbox_opening import offer
from imrelay.broker.known_inboxes import KnownInbox, KnownInboxes
from imrelay.broker.ledger import Ledger
from imrelay.broker.publication import Publication
from imrelay.broker.route import Route, RouteState
from imrelay.broker.topology import Topology
from imrelay.errors import AnswerableError, BrokerUnavailable, ChannelLost, InboxFull, RecipientUnknown

__all__ = ["Routes"]

logger = logging.getLogger(__name__)

#: Pause before a message is offered again, or an inbox asked for again, in seconds.
_PAUSE = 0.5
#: The longest pause before an inbox is asked for again, after it could not be opened again and again, in seconds.
_LONGEST_PAUSE = 5.0
#: How often a refused message that went alone is offered again.
_OFFERS = 6


class Routes:
    """The routes of one channel. What is called from the event loop or the publisher's greenlet does not block.

    `known` holds the inboxes that are known on this channel; `ask` has one made sure of, `requeue` has messages
    published before all others, and `renew` is to open another channel. `elsewhere` is given where users without
    an inbox may be at another kind of server, and returns the inbox to try a message with: if that comes
    back, the user is not there.
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
        """Let a message wait until the inbox was made sure of; `in_flight` messages are under way to its user."""
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
                route.enter(RouteState.OFFERED)
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
            route.enter(RouteState.FOUND)
            self._advance(route)

    def checked(self, route: Route, outcome: KnownInbox | BaseException | None) -> None:
        """Take the outcome of a check: the inbox is there, or it is not, or the check has failed."""
        if self.by_user.get(route.user) is not route:
            return
        if isinstance(outcome, BaseException):
            self._make_sure_later(route)
            return
        if outcome is None:
            asked = route.pop_asked()
            tried = [one for one in asked if not one.returns] if self._elsewhere is not None else []
            for publication in asked:
                if publication not in tried:
                    self._answer(publication, RecipientUnknown("nobody with this id was ever here"))
            route.waiting.extendleft(reversed(tried))
            if tried and self._elsewhere is not None:
                outcome = self._elsewhere()
        if outcome is None:
            route.enter(RouteState.WAITING)
        else:
            route.inbox = outcome
            route.enter(RouteState.FOUND)
        self._advance(route)

    def prune(self) -> None:
        """Drop the messages that have been answered."""
        for route in self.by_user.values():
            route.prune()

    def _advance(self, route: Route) -> None:
        """Take the next step, when all that was under way to the user has been answered."""
        if not route.may_go_on:
            return
        if route.returned:
            self._take_back(route)
            return
        route.drop_answered()
        if route.state is RouteState.WAITING:
            if route.waiting:
                self._make_sure(route)
            else:
                del self.by_user[route.user]
            return
        assert route.inbox is not None
        is_met = route.state is not RouteState.FOUND or self._known.find(route.user) is not None
        if self._topology.is_replicated and not is_met:
            if route.waiting:
                self._requeue([route.pop_alone()])
            else:
                del self.by_user[route.user]
            return
        del self.by_user[route.user]
        self._known.remember(route.user, route.inbox)
        self._requeue(route.waiting)

    def _take_back(self, route: Route) -> None:
        """Put what came back before what waits, and make sure of the inbox once more: not in a tight loop."""
        if route.take_back():
            self._make_sure_later(route)
        else:
            self._advance(route)

    def _make_sure(self, route: Route) -> None:
        route.enter(RouteState.ASKED)
        self._ask(route)

    def _make_sure_later(self, route: Route) -> None:
        route.enter(RouteState.PAUSING)
        pause = min(_PAUSE * 2**route.failures, _LONGEST_PAUSE)
        route.failures = min(route.failures + 1, 10)
        gevent.spawn_later(pause, self._run_again, route).name = f"again:{route.user}"

    def _run_again(self, route: Route) -> None:
        if self.by_user.get(route.user) is route and route.state is RouteState.PAUSING:
            route.enter(RouteState.WAITING)
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
