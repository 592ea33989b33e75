"""Reminders: sessions that were resumed here while their relay could not be reached, to be ended when it can be.

A relay that has lost its link to the broker has no queue there until a moment after it is back, and looks like one
that is gone. The sessions that it still holds would come back beside those that have taken their place.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import gevent
from gevent.event import Event
from gevent.pool import Group

__all__ = ["Reminders"]

#: Seconds for which a relay is asked again.
_KEPT_FOR = 60.0
#: Pause before it is asked the second time, in seconds; doubled each time, up to the longest one.
_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: Relays that are asked again at the same time, and sessions of each: a browser may name any session.
_MAX_RELAYS, _MAX_SESSIONS = 64, 10_000


@dataclass(slots=True)
class _Reminder:
    user: str
    until: float
    ended: Event = field(default_factory=Event)


class Reminders:
    """The sessions by relay; one greenlet for each relay.

    `ask(user, session)` asks the relay of a session to end it, and tells whether that has been answered.
    """

    def __init__(self, ask: Callable[[str, str], bool]) -> None:
        self._ask = ask
        #: Incarnation of a relay -> its sessions by id, those that were added first in front.
        self._relays: dict[str, dict[str, _Reminder]] = {}
        self._greenlets = Group()

    def add(self, incarnation: str, user: str, session: str) -> Event:
        """Have a session ended when its relay can be reached, within a minute; returns an event that tells of it.

        If there are too many already, the relay is not asked again, and the event is never set.
        """
        reminder = _Reminder(user, time.monotonic() + _KEPT_FOR)
        sessions = self._relays.get(incarnation)
        if sessions is None:
            if len(self._relays) >= _MAX_RELAYS:
                return reminder.ended
            sessions = self._relays[incarnation] = {}
            self._greenlets.spawn(self._run_relay, incarnation, sessions).name = f"reminders:{incarnation}"
        if session in sessions:
            return sessions[session].ended
        if len(sessions) < _MAX_SESSIONS:
            sessions[session] = reminder
        return reminder.ended

    def stop(self) -> None:
        """Stop asking."""
        self._greenlets.kill()

    def _run_relay(self, incarnation: str, sessions: dict[str, _Reminder]) -> None:
        pause = _PAUSE
        try:
            while sessions:
                gevent.sleep(random.uniform(pause / 2, pause))
                session, reminder = next(iter(sessions.items()))
                if self._ask(reminder.user, session):
                    del sessions[session]
                    reminder.ended.set()
                    pause = 0.0  # it is there: on with the next one
                else:
                    _forget_late(sessions)
                    pause = min(max(_PAUSE, pause * 2), _LONGEST_PAUSE)
        finally:
            del self._relays[incarnation]


def _forget_late(sessions: dict[str, _Reminder]) -> None:
    """Forget those whose time is over, which stand in front: their relay cannot be reached, whichever is named."""
    now = time.monotonic()
    while sessions:
        session, reminder = next(iter(sessions.items()))
        if now < reminder.until:
            break
        del sessions[session]
