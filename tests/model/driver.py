"""Takes in what comes to the sockets of one example, in one thread, and waits for what must come."""

from __future__ import annotations

import json
import selectors
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.model.client import ModelClient, split_v1
from tests.model.fleet import Fleet, ModelRelay, Profile
from tests.model.history import History, Message, SessionRecord, Violation
from tests.model.outside import Outside
from tests.support.harness import eventually

__all__ = ["Driver", "ModelTab"]

#: Seconds in which what must come has to come: a guard, generous for a busy machine.
_GUARD = 20.0
#: Connections of a relay to its broker: one to publish, one to consume.
_CONNECTIONS = 2
#: At most so many bytes does the kernel take for a browser that does not read: 14,336 were measured (Linux).
_KERNEL = 18_000


@dataclass(eq=False)
class ModelTab:
    """A browser's socket and what is known of its session."""

    session: SessionRecord
    client: ModelClient
    #: The session's own name for itself (`welcome`).
    token: str = ""
    #: Its browser does not read at the moment.
    is_slow: bool = False
    #: Its end is expected.
    is_ending: bool = False
    #: Up to which seq it has acknowledged, and pongs that came.
    acked: int = 0
    pongs: int = 0
    pings: int = 0


class Driver:
    """The users, sockets and relays of one example, and what comes from them."""

    def __init__(
        self, fleet: Fleet, outside: Outside, profile: Profile, number: int, *, guard: float = _GUARD
    ) -> None:
        self.fleet = fleet
        self.outside = outside
        self._guard = guard
        self.profile = profile
        self.users = [f"{name}{number}" for name in ("ann", "bob", "cid")]
        self.history = History(
            max_length=profile.max_length, refusing=profile.refusing, begins_live=profile.begins_live
        )
        self.history.excused |= profile.hasty
        self.tabs: list[ModelTab] = []
        #: Half-open ones.
        self.abandoned: list[ModelTab] = []
        #: Connections whose browsers have not noticed that a relay has ended them.
        self._ghosts: list[ModelClient] = []
        self.story: list[str] = []
        #: Relays that are paused or have no link at the moment, and those whose link only is held up.
        self._troubled: set[str] = set()
        self._stalled: set[str] = set()
        #: Relays that have lost their links since they were ready last.
        self._cut: set[str] = set()
        #: What was sent for each message: the relay may have added `from` to it.
        self._payloads: dict[Message, bytes] = {}
        #: Connections that the links of relays had taken when they were reset.
        self._taken: dict[str, int] = {}
        self._is_acking = False
        self._audits: set[str] = set()
        fleet.start(profile.relays)
        for name in profile.relays:
            self.calm(name)
            fleet.get(name).set_clock(0)

    def settle(self) -> None:
        """Let everything be read and acknowledged, and wait for what must come."""
        self.tell("all is read and acknowledged")
        for name in self.profile.relays:
            self.calm(name)
        for tab in self.tabs:
            tab.is_slow = False
        self._is_acking = True
        try:
            self.wait(self._is_settled, "")
        finally:
            self._is_acking = False
        for user in {tab.session.user for tab in self.tabs if not tab.session.is_attached}:
            self._await_consumers(user, is_exact=True)  # each socket comes back by itself after a lost link

    def _is_settled(self) -> bool:
        for tab in self.tabs:
            if tab.session.v1 and (tab.acked < len(tab.session.arrivals) or tab.pongs < tab.pings):
                return False
        return not any(True for _ in self.missing())

    def missing(self) -> Iterable[str]:
        """Yield what is still to come."""
        for message in self.history.unanswered():
            yield f"an answer to {message}"
        for tab in self.tabs:
            for message in self.history.due(tab.session):
                yield f"{message} at {tab.session.name}"

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Take in what comes until a condition holds; raises `Violation` where they do not."""
        deadline = time.monotonic() + self._guard
        self.pump()
        while not condition():
            if time.monotonic() > deadline:
                raise Violation(f"this did not come within {self._guard:g} s: {what or ', '.join(self.missing())}")
            self.pump(0.05)

    def pump(self, timeout: float = 0.0) -> None:
        """Take in what has come, or comes within `timeout` seconds."""
        with selectors.DefaultSelector() as selector:
            for tab in self.tabs:
                if not tab.is_slow:
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if tab.client.wants_to_write else 0)
                    selector.register(tab.client.sock, events, tab)
            ready = [key.data for key, _ in selector.select(timeout)]
        for tab in ready:
            self._read(tab)
        if self._is_acking:
            for tab in self.tabs:
                if tab.session.v1 and tab.pongs == tab.pings:
                    self.history.ack(tab.session, tab.acked)
                    if tab.acked < len(tab.session.arrivals):
                        self._ack(tab, len(tab.session.arrivals))

    def _read(self, tab: ModelTab) -> None:
        for payload, binary in tab.client.pump():
            self._receive(tab, payload, binary)
        if tab.client.is_over:
            self._note_end(tab)

    def _note_end(self, tab: ModelTab) -> None:
        client = tab.client
        self._end(tab, lossy=client.was_reset and client.close_code is None)
        if not tab.is_ending:
            raise Violation(f"{tab.session.name} was closed by the relay, code {client.close_code}")

    def _receive(self, tab: ModelTab, payload: bytes, binary: bool) -> None:
        session = tab.session
        if session.v1:
            numbered = split_v1(payload)
            if numbered is not None:
                self._take_in(tab, binary=binary, **numbered)
                return
        if payload.startswith((b'{"ack":{', b'{"error":{')) and not binary:
            self.history.answer(session, json.loads(payload))
        elif payload.startswith(b'{"pong":') and session.v1:
            tab.pongs += 1
        elif payload.startswith(b'{"welcome":') and session.v1 and not tab.token:
            tab.token = json.loads(payload)["welcome"]["session"]
        else:
            self._take_in(tab, binary=binary, bodies=[payload])

    def _take_in(self, tab: ModelTab, *, bodies: list[bytes], **facts: Any) -> None:
        for body in bodies:
            message = self.history.find(tab.session, body)
            if message is not None:
                self.history.arrive(tab.session, message, **facts)
                return
        raise Violation(f"{tab.session.name} got what nobody sent: {bodies[0][:200]!r}")

    def wake(self, relay: str) -> None:
        """Let a paused process go on."""
        if relay in self._troubled and relay in self.fleet.running:
            self.fleet.running[relay].resume()

    def calm(self, relay: str) -> None:
        """End what holds up a relay, and wait until it can reach its broker."""
        self.wake(relay)
        process = self.fleet.get(relay)
        process.link.heal()
        self._troubled.discard(relay)
        self._stalled.discard(relay)
        try:
            if relay in self._taken:  # else it may not have noticed yet, and call itself ready
                wanted = self._taken.pop(relay) + _CONNECTIONS
                eventually(lambda: process.link.taken >= wanted, self._guard)
            process.wait_until_ready()
        except AssertionError as exc:
            raise Violation(f"{relay} does not become ready: {exc}") from None
        if relay in self._cut:
            self._cut.discard(relay)
            self.history.recover(relay)

    def await_gone(self, user: str) -> None:
        """Wait until the broker has no consumer of the user's sockets that have ended."""
        if all(s.gone_at is not None or s.is_open for s in self.history.sessions if s.user == user):
            return
        here = [session for session in self.history.sessions if session.user == user and session.gone_at is None]
        for relay in dict.fromkeys(session.relay for session in here):  # also where one has ended, unnoticed yet
            self.calm(relay)
        self._await_consumers(user, is_exact=False)
        self.history.gone(user)

    def _await_consumers(self, user: str, *, is_exact: bool) -> None:
        """Wait until an inbox has as many consumers as sockets are there, or no more; raises `Violation`."""
        count = sum(tab.session.user == user for tab in [*self.tabs, *self.abandoned])

        def is_reached() -> bool:
            consumers = self.outside.consumers(user)
            return consumers == count if is_exact else consumers <= count

        try:
            eventually(is_reached, self._guard)
        except AssertionError:
            consumers = self.outside.consumers(user)
            raise Violation(
                f"the inbox of {user} has {consumers} consumers, and {count} sockets are there"
            ) from None

    def check_log(self, process: ModelRelay) -> None:
        """Raise `Violation` where a relay has met a fault of its own."""
        news = process.news()
        if "Traceback" in news or " ERROR " in news:
            raise Violation(f"a relay met a fault of its own:\n{news[-4000:]}")

    def tell(self, line: str) -> None:
        """Add a step to the story."""
        self.story.append(line)

    def _end(self, tab: ModelTab, *, lossy: bool) -> None:
        if tab in self.tabs:
            self.tabs.remove(tab)
        if tab in self.abandoned:
            self.abandoned.remove(tab)
        self.history.end(tab.session, lossy=lossy, room=_KERNEL + tab.client.incomplete)

    def _drop(self, tab: ModelTab) -> None:
        """Reset a half-open socket."""
        tab.client.reset()
        self._end(tab, lossy=True)
