"""The registry of the sessions in this process: counts them, finds them by id, and ends them at a stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import gevent
from gevent.event import Event

from imrelay.runtime.loops import run_for_ever

__all__ = ["Member", "Registry"]

#: Close code of a session whose browser has come back on another connection.
RESUMED = 4409
#: Seconds between two checks of all sessions.
CHECK_INTERVAL = 1.0

logger = logging.getLogger(__name__)


class Member(Protocol):
    """What the registry needs of a session."""

    user: str
    #: The name by which a session may be resumed; empty where it may not.
    id: str

    def finish(self, code: int, reason: str) -> None:
        """End the session when what is under way to it has been written; returns at once."""

    def close(self, code: int, reason: str) -> None:
        """End the session now; returns at once."""

    def wait_detached(self, timeout: float) -> bool:
        """Block after the end until the broker has back what was not taken; tell whether that was in time."""

    def check(self) -> None:
        """End the session if it has to; called every `CHECK_INTERVAL`."""


class Registry:
    """Counts the sessions from their handshake on, and closes them all when the relay stops."""

    def __init__(self, max_connections: int) -> None:
        self._max = max_connections
        self._members: set[Member] = set()
        self._by_id: dict[str, Member] = {}
        self._empty = Event()
        self._empty.set()
        #: Members whose `check` has failed: they have been closed, and are not looked at again.
        self._faulty: set[Member] = set()
        #: Whether the relay is stopping: nobody may join any more.
        self.is_draining = False
        self._checker: gevent.Greenlet | None = None

    def start(self) -> None:
        """Begin to check the sessions; returns at once."""
        if self._checker is None:
            self._checker = run_for_ever(self._run_checker, name="session-checker")

    def stop(self) -> None:
        """Check them no more."""
        if self._checker is not None:
            self._checker.kill()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def is_full(self) -> bool:
        """Whether `max_connections` sessions are counted."""
        return len(self._members) >= self._max

    def join(self, member: Member) -> None:
        """Count a session, from before its upgrade."""
        self._members.add(member)
        self._empty.clear()

    def leave(self, member: Member) -> None:
        """No longer count a session. Idempotent."""
        self._members.discard(member)
        self._faulty.discard(member)
        if not self._members:
            self._empty.set()

    def register(self, member: Member) -> None:
        """Let a session be found by its id, until `forget`."""
        self._by_id[member.id] = member

    def forget(self, member: Member) -> None:
        """Let a session be found no longer. Idempotent."""
        self._by_id.pop(member.id, None)

    def end(self, user: str, session: str, timeout: float) -> None:
        """End a session whose browser has come back, if it is one of this user; does nothing the second time.

        Blocks until the broker has back what was not taken, or for `timeout` seconds.
        """
        member = self._by_id.get(session)
        if member is not None and member.user == user:
            member.close(RESUMED, "resumed by another connection")
            member.wait_detached(timeout)

    def drain(self, code: int, reason: str, timeout: float) -> int:
        """End every session as soon as it has finished, and after `timeout` seconds at once.

        Blocks until all have left, or for about a second longer than `timeout`; returns how many had not finished.
        """
        self.is_draining = True
        for member in list(self._members):
            self._end(member.finish, code, reason)
        self._empty.wait(timeout)
        late = list(self._members)
        for member in late:
            self._end(member.close, code, reason)
        self._empty.wait(1)
        return len(late)

    def _run_checker(self) -> None:
        while True:
            gevent.sleep(CHECK_INTERVAL)
            for member in self._members - self._faulty:
                try:
                    member.check()
                except Exception:
                    logger.exception("a session cannot be checked: closing it")
                    self._faulty.add(member)
                    self._end(member.close, 1011, "a fault of the relay's")

    @staticmethod
    def _end(end: Callable[[int, str], None], code: int, reason: str) -> None:
        """End one member; an exception is logged, so that the others are ended too."""
        try:
            end(code, reason)
        except Exception:
            logger.exception("a session cannot be closed")
