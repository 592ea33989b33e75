"""The state machine: hypothesis chooses the steps, `World` takes them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.model.driver import ModelTab
from tests.model.fleet import PROFILES, Fleet
from tests.model.history import Violation
from tests.model.outside import FOREIGN, Outside
from tests.model.world import World

__all__ = ["SEED", "SETTINGS", "SUITE", "Stage", "StateMachine", "run", "staged"]

#: What all runs have in common.
SETTINGS = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
#: What the suite runs, and with which seed: about a minute.
SUITE = settings(SETTINGS, max_examples=50, stateful_step_count=25)
SEED = 20260924

#: At most so many sockets at the same time.
_TABS = 6
#: Coming back takes its time.
_LOSSES = 3
_NUMBER = st.integers(0, 5)
#: Two of three draws choose the same user: so that there are second and third sockets.
_USER = st.sampled_from([0, 0, 0, 0, 1, 2])
_OFTEN, _SELDOM = st.sampled_from([True, True, True, False]), st.sampled_from([False, False, False, True])
#: What a wall clock may be off by, in seconds.
_CLOCKS = (-100_000, -1, 5, 100_000)
#: Seconds that are spent on shrinking a story, and the guard against waiting in vain meanwhile.
_SHRINKING = 45.0
_SHORT_GUARD = 6.0


class Stage:
    """What all examples of a run share; remembers the shortest story that broke a promise.

    `outages`: in some examples the broker itself is killed, restarted or frozen, which takes ten seconds.
    `shrinking`: seconds that are spent on making a story shorter.
    """

    def __init__(
        self, fleet: Fleet, outside: Outside, *, outages: bool = False, shrinking: float = _SHRINKING
    ) -> None:
        self.fleet = fleet
        self.outages = outages
        self.outside = outside
        self.examples = 0
        self.steps = 0
        self.failure = ""
        self._length = 0
        #: When a promise was found broken, by `time.monotonic`, and in which example.
        self.failed_at = 0.0
        self.failed_example = 0
        self._shrinking = shrinking

    def world(self, profile: str) -> World:
        """Begin an example."""
        self.examples += 1
        guard = {"guard": _SHORT_GUARD} if self.failure else {}
        return World(self.fleet, self.outside, PROFILES[profile], self.examples, **guard)

    def check_time(self) -> None:
        """Let everything fail at once when there was time enough for shrinking: so hypothesis comes to its end."""
        if self.failure and time.monotonic() - self.failed_at > self._shrinking:
            raise Violation("see the shortest story")

    def note_failure(self, world: World, violation: Violation) -> None:
        """Remember a story, if it is the shortest so far, with what the relays have logged."""
        if not self.failure:
            self.failed_at = time.monotonic()
            self.failed_example = self.examples
        elif self._length <= len(world.story):
            return
        self._length = len(world.story)
        lines = [f"{number:3}. {line}" for number, line in enumerate(world.story, 1)]
        self.failure = "\n".join([f"promise broken: {violation}", *lines])
        for name in world.profile.relays:
            relay = self.fleet.running.get(name)
            if relay is not None:
                lines = [line for line in relay.log.splitlines() if is_about(line, world.users)]
                self.failure += f"\nlog of {name}:\n" + "\n".join(lines[-15:])


def is_about(line: str, users: list[str]) -> bool:
    """Tell whether a line of a log is about these users, or about no user."""
    return "session of" not in line or any(f"'{user}'" in line for user in users)


class StateMachine(RuleBasedStateMachine):
    """Three users, up to two relays, a broker, and what may happen to them."""

    #: Set by `staged`.
    stage: ClassVar[Stage]

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self._is_broken = False
        self._may_end = True
        self._finale = ""
        self._may_break = False
        self._losses = 0
        self._has_settled = True

    # -- what the rules draw -------------------------------------------------------------------------------------

    @initialize(
        profile=st.sampled_from(sorted(PROFILES)),
        tabs=st.lists(st.tuples(_USER, _NUMBER, st.booleans()), min_size=2, max_size=3),
        rough=st.integers(0, 3),
        outage=st.integers(0, 39),
        finale=st.sampled_from(["", "", "", "", "", "", "kill", "stop"]),
    )
    def begin(self, profile: str, tabs: list[tuple[int, int, bool]], rough: int, outage: int, finale: str) -> None:
        """Choose the relays; some users are there from the beginning."""
        self._may_end = rough == 3
        self._finale = finale
        # what is not persistent does not survive a broker
        self._may_break = self.stage.outages and outage == 39 and profile != "refusing"
        self._do(self.stage.check_time)
        self.world = self.stage.world(profile)
        self.world.tell(f"relays: {profile}")
        for user, relay, v1 in tabs:
            self._do("connect", self._user(user), self._relay(relay), v1=v1)

    @precondition(lambda self: len(self._world.tabs) < _TABS)
    @rule(user=_USER, relay=_NUMBER, v1=st.booleans(), at_once=st.booleans(), resume=st.booleans())
    def connect(self, user: int, relay: int, v1: bool, at_once: bool, resume: bool) -> None:
        """Open a socket; the user may have others."""
        self._do("connect", self._user(user), self._relay(relay), v1=v1, at_once=at_once, resume=resume)

    @precondition(lambda self: self._world.tabs)
    @rule(tab=_NUMBER, to=_USER, count=st.integers(1, 5), binary=st.booleans(), bare=st.booleans())
    def send(self, tab: int, to: int, count: int, binary: bool, bare: bool) -> None:
        """Send, and wait for the answers."""
        self._do("send", self._tab(tab), self._user(to), count, binary=binary, bare=bare)

    @precondition(lambda self: self._world.tabs)
    @rule(tab=_NUMBER, to=_USER, count=st.integers(1, 8), ask=_OFTEN, large=_SELDOM)
    def send_without_waiting(self, tab: int, to: int, count: int, ask: bool, large: bool) -> None:
        """Send, so that the next steps find it under way."""
        self._do("send", self._tab(tab), self._user(to), count, ask=ask, large=large, wait=False)

    @precondition(lambda self: self._v1_tabs)
    @rule(tab=_NUMBER, share=st.sampled_from([1.0, 0.5]))
    def take(self, tab: int, share: float) -> None:
        """Acknowledge what came, or half of it."""
        self._do("take", self._v1_tabs[tab % len(self._v1_tabs)], share)

    @precondition(lambda self: self._world.tabs)
    @rule(tab=_NUMBER, how=st.sampled_from(["clean", "reset", "abandon"]))
    def close(self, tab: int, how: str) -> None:
        """End a socket, or leave it half-open."""
        self._do("close", self._tab(tab), how)

    @precondition(lambda self: not self._has_settled)
    @rule()
    def settle(self) -> None:
        """Wait for all that must come."""
        self._do("settle")
        self._has_settled = True

    @rule(relay=_NUMBER, how=st.sampled_from(["stall", "pause", "lose_link"]))
    def hold_up(self, relay: int, how: str) -> None:
        """Hold up what the broker says, or the relay itself; or cut its connections."""
        if how == "lose_link":
            self._losses += 1
        if self._losses <= _LOSSES:
            self._do(how, self._relay(relay))

    @precondition(lambda self: self._world.tabs and self._losses < _LOSSES)
    @rule(tab=_NUMBER, to=_USER, count=st.integers(1, 5))
    def lose_confirms(self, tab: int, to: int, count: int) -> None:
        """Let the broker have messages, but not the relay its confirms."""
        self._losses += 1
        sender = self._tab(tab)
        self._do("stall", sender.session.relay)
        self._do("send", sender, self._user(to), count, wait=False)
        self._do("await_arrived", self._user(to), count)
        self._do("lose_link", sender.session.relay)

    @precondition(lambda self: len(self._world.tabs) > 1)
    @rule(tab=_NUMBER, other=_NUMBER, how=st.sampled_from(["clean", "reset"]))
    def overrun(self, tab: int, other: int, how: str) -> None:
        """Send more to a browser than the kernel takes while it does not read, then end it."""
        victim = self._tab(tab)
        others = [one for one in self._world.tabs if one is not victim and not one.is_slow]
        if others:
            self._do("slow", victim)
            self._do("send", others[other % len(others)], victim.session.user, 3, large=True)
            self._do("close", victim, how)

    @precondition(lambda self: len(self._v1_tabs) > 1)
    @rule(tab=_NUMBER, count=st.integers(4, 6), how=st.sampled_from(["clean", "reset"]))
    def hand_over(self, tab: int, count: int, how: str) -> None:
        """Let one of a user's sockets take all and end, while others have not acknowledged theirs."""
        one = self._v1_tabs[tab % len(self._v1_tabs)]
        beside = [
            other for other in self._world.tabs if other.session.user == one.session.user and other is not one
        ]
        if beside:
            self._do("send", beside[0], one.session.user, count)
            for _ in range(3):
                self._do("take", one)
            self._do("close", one, how)

    @precondition(lambda self: self._v1_tabs)
    @rule(tab=_NUMBER, count=st.integers(2, 5), how=st.sampled_from(["clean", "reset"]), v1=_OFTEN)
    def come_back(self, tab: int, count: int, how: str, v1: bool) -> None:
        """Let a user leave with messages that nobody has acknowledged, and come back; nobody else is there."""
        one = self._v1_tabs[tab % len(self._v1_tabs)]
        user, relay = one.session.user, one.session.relay
        self._close_all(user, "clean")
        one = self._do("connect", user, relay, v1=True)
        self._do("send", one, user, count)
        self._do("take", one, 0.5)
        self._do("close", one, how)
        self._do("connect", user, relay, v1=v1)

    @precondition(lambda self: self._v1_tabs)
    @rule(tab=_NUMBER, relay=_NUMBER, count=st.integers(1, 3))
    def resume(self, tab: int, relay: int, count: int) -> None:
        """Let a user come back who is still there half-open, and has not acknowledged; something newer waits."""
        one = self._v1_tabs[tab % len(self._v1_tabs)]
        user = one.session.user
        for other in [other for other in self._world.tabs if other.session.user == user and other is not one]:
            self._do("close", other, "clean")
        self._do("send", one, user, count)
        self._do("close", one, "abandon")
        self._do("connect", user, self._relay(relay), v1=True, resume=True)
        self._do("publish", user, "own id", 2)
        self._do("settle")

    @precondition(lambda self: len(self._world.tabs) > 1)
    @rule(tab=_NUMBER, other=_NUMBER, count=st.integers(3, 4))
    def choke(self, tab: int, other: int, count: int) -> None:
        """Send more to a browser than the relay holds for it while it does not read, and let it read on."""
        victim = self._tab(tab)
        others = [one for one in self._world.tabs if one is not victim and not one.is_slow]
        if others:
            self._do("slow", victim)
            self._do("send", others[other % len(others)], victim.session.user, count, large=True)
            self._do("settle")

    @precondition(lambda self: self._world.profile.hasty and self._world.tabs)
    @rule(tab=_NUMBER, to=_USER)
    def outlast(self, tab: int, to: int) -> None:
        """Hear nothing from the broker for longer than the relay waits, with more than it hands over."""
        one = self._tab(tab)
        if one.session.relay in self._world.profile.hasty:
            self._do("calm", one.session.relay)
            self._do("stall", one.session.relay)
            self._do("send", one, self._user(to), 8)
            self._do("send", one, self._user(to), 2)
            self._do("settle")
            self._do("send_again", one)

    @precondition(lambda self: self._world.tabs)
    @rule(tab=_NUMBER, to=_USER, number=_NUMBER)
    def step_clock(self, tab: int, to: int, number: int) -> None:
        """Set a relay's clock between two messages."""
        one = self._tab(tab)
        self._do("send", one, self._user(to))
        self._do("step_clock", one.session.relay, _CLOCKS[number % len(_CLOCKS)])
        self._do("send", one, self._user(to))

    @precondition(lambda self: 0 < len(self._world.tabs) < _TABS)
    @rule(tab=_NUMBER, relay=_NUMBER, v1=st.booleans(), kind=st.sampled_from([k for k in FOREIGN if "equal" in k]))
    def repeat_ids(self, tab: int, relay: int, v1: bool, kind: str) -> None:
        """Let another program give equal ids to different messages, with two sockets to see them."""
        user = self._tab(tab).session.user
        self._do("connect", user, self._relay(relay), v1=v1)
        self._do("publish", user, kind, 2)
        self._do("settle")

    @precondition(lambda self: self._world.tabs)
    @rule(tab=_NUMBER, to=_USER, count=st.integers(1, 2))
    def lose_inbox(self, tab: int, to: int, count: int) -> None:
        """Let somebody delete the inbox of a user who is not there, when it is empty; then send to the user."""
        user = self._user(to)
        self._do("settle")
        self._close_all(user, "clean")
        others = [one for one in self._world.tabs if one.session.user != user]
        if others and self._do("delete_inbox", user):
            self._do("send", others[tab % len(others)], user, count)

    @rule(to=_USER, kind=st.sampled_from(["audit", *sorted(FOREIGN)]), count=st.integers(1, 3))
    def publish(self, to: int, kind: str, count: int) -> None:
        """Let another program publish, or have a queue of its own for a user's messages."""
        if kind == "audit":
            self._do("audit", self._user(to))
        else:
            self._do("publish", self._user(to), kind, count)

    @precondition(lambda self: self._world.tabs)
    @rule(tab=_NUMBER, what=st.sampled_from(["clock", "garbage", "slow", "again"]), number=_NUMBER)
    def disturb(self, tab: int, what: str, number: int) -> None:
        """Do what should not matter: set a clock, send bad input, do not read, send again what was uncertain."""
        one = self._tab(tab)
        if what == "clock":
            self._do("step_clock", one.session.relay, _CLOCKS[number % len(_CLOCKS)])
        elif what == "garbage":
            self._do("send_garbage", one, number)
        else:
            self._do("slow" if what == "slow" else "send_again", one)

    @precondition(lambda self: self._may_end and len(self._world.profile.relays) > 1)
    @rule(how=st.sampled_from(["kill", "stop"]))
    def end_relay(self, how: str) -> None:
        self._may_end = False
        self._do(how, self._world.profile.relays[-1])

    @precondition(lambda self: self._may_break)
    @rule(how=st.sampled_from(["kill", "restart", "freeze"]))
    def break_broker(self, how: str) -> None:
        self._may_break = False
        self._do("break_broker", how)

    def teardown(self) -> None:
        """Let all come to an end, and judge the whole."""
        if self.world is None:
            return
        try:
            if not self._is_broken and self._finale and len(self.world.profile.relays) > 1:
                self._do(self._finale, self.world.profile.relays[-1])
            if not self._is_broken:
                self._do("finish")
        finally:
            self.world.clean_up(is_broken=self._is_broken)

    # -- helpers -------------------------------------------------------------------------------------------------

    @property
    def _world(self) -> World:
        assert self.world is not None
        return self.world

    @property
    def _v1_tabs(self) -> list[ModelTab]:
        return [tab for tab in self._world.tabs if tab.session.v1]

    def _close_all(self, user: str, how: str) -> None:
        """End all sockets of a user."""
        for tab in [tab for tab in self._world.tabs if tab.session.user == user]:
            self._do("close", tab, how)

    def _user(self, number: int) -> str:
        return self._world.users[number % len(self._world.users)]

    def _relay(self, number: int) -> str:
        return self._world.profile.relays[number % len(self._world.profile.relays)]

    def _tab(self, number: int) -> ModelTab:
        return self._world.tabs[number % len(self._world.tabs)]

    def _do(self, step: str | Callable[[], None], *arguments: Any, **options: Any) -> Any:
        """Take a step; whatever breaks is raised here, so that hypothesis takes it for the same failure."""
        self.stage.steps += 1
        self._has_settled = False
        broken: Violation | None = None
        answer: Any = None
        try:
            answer = (step if callable(step) else getattr(self._world, step))(*arguments, **options)
        except Violation as violation:
            broken = violation
        except Exception as exc:
            broken = Violation("".join(traceback.format_exception(exc)))
        if broken is not None:
            self._is_broken = True
            if self.world is not None:
                self.stage.note_failure(self.world, broken)
            raise broken.with_traceback(None)
        return answer


def staged(stage: Stage, number: int | None = None) -> type[StateMachine]:
    """Return the machine of a stage, with a seed: by default that of the suite."""
    machine = type("StagedMachine", (StateMachine,), {"stage": stage})
    return seed(SEED if number is None else number)(machine)


def run(machine: type[StateMachine], limits: settings) -> str:
    """Run a machine; return the shortest story that breaks a promise, empty where none does."""
    try:
        run_state_machine_as_test(machine, settings=limits)
    except Exception:
        if not machine.stage.failure:
            raise
    return machine.stage.failure
