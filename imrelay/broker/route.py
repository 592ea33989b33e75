"""A route: the messages to one user that wait until it is known that the user's inbox is there.

    WAITING -> ASKED -> FOUND -> over                 the inbox is made sure of, and all goes on
       ^ ^      | ^       |
       | |      v |       +---> ALONE -> over         quorum inboxes: the first message goes alone
       | +-- PAUSING      |       |
       |                  |       v
       |                  |    OFFERED -> over        that one was refused: it is offered on fresh channels
       +------------------+-------+                   what was published came back: once more

A step is taken only when the broker has answered for all that was under way to the user before.
"""

from __future__ import annotations

import logging
from collections import deque
from enum import Enum, auto

from imrelay.broker.known_inboxes import KnownInbox
from imrelay.broker.publication import Publication

__all__ = ["Route", "RouteState"]

logger = logging.getLogger(__name__)


class RouteState(Enum):
    """What a route waits for."""

    WAITING = auto()
    """The broker's answers for what is under way to the user; then the inbox is asked for."""

    ASKED = auto()
    """The outcome of the check of the inbox."""

    PAUSING = auto()
    """The end of a pause before the inbox is asked for again."""

    FOUND = auto()
    """The inbox is there; the answers for what is under way, and then all that waits is published."""

    ALONE = auto()
    """The answer for one message, the only one under way; the others follow it."""

    OFFERED = auto()
    """The end of the attempts to have the one that went alone taken over other channels."""


class Route:
    """The messages to one user that wait until the inbox was made sure of."""

    __slots__ = ("alone", "asked", "failures", "in_flight", "inbox", "returned", "state", "user", "waiting")

    def __init__(self, user: str, in_flight: int, inbox: KnownInbox | None) -> None:
        self.user = user
        #: What it is doing; set by `enter` alone.
        self.state = RouteState.WAITING
        #: Messages under way to the user, of those before the route or the one that goes alone.
        self.in_flight = in_flight
        #: What was known of the inbox before the check, and what is known after it.
        self.inbox = inbox
        #: How many messages waited when the inbox was asked for.
        self.asked = 0
        #: The messages that came back since.
        self.returned: list[Publication] = []
        self.waiting: deque[Publication] = deque()
        #: The message that goes alone, which is published in spite of the route.
        self.alone: Publication | None = None
        #: How often in a row the inbox could not be asked for, or what was published to it came back.
        self.failures = 0

    def enter(self, state: RouteState) -> None:
        """Change the state."""
        logger.debug("the route to %a is %s, and was %s", self.user, state.name, self.state.name)
        self.state = state

    @property
    def may_go_on(self) -> bool:
        """Whether the next step may be taken: neither the broker nor a pause is waited for."""
        return not self.in_flight and self.state is not RouteState.ASKED and self.state is not RouteState.PAUSING

    def pop_asked(self) -> list[Publication]:
        """Take out what waited when the inbox was asked for."""
        return [self.waiting.popleft() for _ in range(min(self.asked, len(self.waiting)))]

    def pop_alone(self) -> Publication:
        """Take out the first message that waits, which goes alone, and return it."""
        self.alone = alone = self.waiting.popleft()
        self.in_flight = 1
        self.enter(RouteState.ALONE)
        return alone

    def take_back(self) -> bool:
        """Put what came back before what waits; tell whether some of it came back more than once."""
        returned = [publication for publication in self.returned if not publication.done]
        for publication in returned:
            publication.returned = False
        self.returned = []
        self.alone = None
        self.waiting.extendleft(reversed(returned))
        self.enter(RouteState.WAITING)
        return max((publication.returns for publication in returned), default=0) > 1

    def drop_answered(self) -> None:
        """Forget those at the front that were answered meanwhile."""
        while self.waiting and self.waiting[0].done:
            self.waiting.popleft()

    def prune(self) -> None:
        """Forget all that were answered meanwhile."""
        before = len(self.waiting)
        # what had been asked for stands at the front
        gone = sum(publication.done for publication in list(self.waiting)[: self.asked])
        self.asked = max(0, self.asked - gone)
        if before:
            self.waiting = deque(publication for publication in self.waiting if not publication.done)
