"""The registry looks at every session, and ends every session, whatever one of them does."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from gevent.event import Event

from imrelay.sessions import registry
from imrelay.sessions.registry import Registry

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


class FakeMember:
    """A session that fails where the test says so."""

    def __init__(self, owner: Registry, *, fails: str = "") -> None:
        self._owner = owner
        self._fails = fails
        self.checked = Event()
        self.checks = 0
        self.closed: list[int] = []
        owner.join(self)

    def check(self) -> None:
        """Note it."""
        self.checks += 1
        self.checked.set()
        if "check" in self._fails:
            raise RuntimeError("cannot be checked")

    def finish(self, code: int, reason: str) -> None:
        """Leave."""
        if "finish" in self._fails:
            raise RuntimeError("cannot be finished")
        self._owner.leave(self)

    def close(self, code: int, reason: str) -> None:
        """Note it and leave."""
        self.closed.append(code)
        if "close" in self._fails:
            raise RuntimeError("cannot be closed")
        self._owner.leave(self)


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry that looks at its members all the time."""
    monkeypatch.setattr(registry, "CHECK_INTERVAL", 0.001)
    made = Registry(10)
    with gevent.Timeout(PATIENCE):
        yield made
    made.stop()


def test_a_session_that_cannot_be_checked_is_closed(owner: Registry) -> None:
    """It is closed with 1011 and not looked at again; the others are looked at, round after round."""
    good = [FakeMember(owner) for _ in range(4)]
    bad, worse = FakeMember(owner, fails="check"), FakeMember(owner, fails="check close")
    owner.start()
    for _ in range(3):
        for member in good:
            member.checked.clear()
            assert member.checked.wait(PATIENCE)
    assert (bad.checks, bad.closed) == (1, [1011])
    assert (worse.checks, worse.closed) == (1, [1011])
    assert not any(member.closed for member in good)
    assert len(owner) == 5, "the one that cannot be closed still counts"


def test_the_checks_go_on_after_a_round_that_fails(owner: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that fails as a whole is logged, and the next rounds come."""
    failed = Event()

    def fail(interval: float) -> None:
        monkeypatch.setattr(registry.gevent, "sleep", real)
        failed.set()
        raise RuntimeError("odd")

    real = gevent.sleep
    member = FakeMember(owner)
    owner.start()
    assert member.checked.wait(PATIENCE)
    monkeypatch.setattr(registry.gevent, "sleep", fail)
    assert failed.wait(PATIENCE)
    member.checked.clear()
    assert member.checked.wait(PATIENCE)


def test_a_session_that_cannot_be_finished_does_not_prevent_the_others(owner: Registry) -> None:
    """At the stop each of the others is ended; the faulty one is closed after the time."""
    bad, worse = FakeMember(owner, fails="finish"), FakeMember(owner, fails="finish close")
    good = [FakeMember(owner) for _ in range(4)]
    assert owner.drain(1012, "stopping", timeout=0.05) == 2
    assert bad.closed == worse.closed == [1012]
    assert len(owner) == 1
    assert not any(member.closed for member in good)
