"""The sweeper: one greenlet for all sockets of a process, begun when needed, and not inherited by a fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gevent

from imrelay.websocket.sweeper import Sweeper

ROOT = Path(__file__).resolve().parents[3]


class FakeDeadline:
    """A thing with a deadline; says when it was looked at."""

    def __init__(self, sweeper, *, due=0.0, fails=False):
        self.sweeper, self.due, self.fails = sweeper, due, fails
        self.calls = self.aborted = 0

    def on_due(self, now):
        self.calls += 1
        if self.fails:
            raise RuntimeError("a deadline that cannot be kept")
        self.sweeper.discard(self)

    def abort(self):
        self.aborted += 1


def test_only_what_is_due_is_called_and_the_greenlet_ends_with_the_last():
    """What is due is called once in a round, the rest left alone; without sockets there is no greenlet."""
    sweeper = Sweeper()
    late = FakeDeadline(sweeper, due=float("inf"))
    sockets = [FakeDeadline(sweeper) for _ in range(600)]  # more than one slice
    for swept in (late, *sockets):
        sweeper.add(swept, shortest=0.1)
    greenlet = sweeper._greenlet
    while any(not swept.calls for swept in sockets):
        gevent.sleep(0.005)
    assert all(swept.calls == 1 for swept in sockets)
    assert late.calls == 0
    sweeper.discard(late)
    greenlet.join(timeout=10.0)
    assert greenlet.dead
    again = FakeDeadline(sweeper)
    sweeper.add(again, shortest=0.1)
    sweeper._greenlet.join(timeout=10.0)
    assert again.calls == 1


def test_one_fault_does_not_end_the_sweeping():
    """A socket whose deadline cannot be kept is ended, the others are looked after."""
    sweeper = Sweeper()
    bad, good = FakeDeadline(sweeper, fails=True), FakeDeadline(sweeper)
    sweeper.add(bad, shortest=0.1)
    sweeper.add(good, shortest=0.1)
    sweeper._greenlet.join(timeout=10.0)
    assert (bad.calls, bad.aborted, good.calls) == (1, 1, 1)


def test_a_fork_begins_anew():
    """The child of a fork has a sweeper and turns of its own, on the same hub object."""
    program = (
        "import os, gevent, gevent.os\n"
        "from imrelay.websocket.sweeper import sweeper_of\n"
        "from imrelay.websocket.fairness import turns_of\n"
        "hub = gevent.get_hub()\n"
        "before = sweeper_of(hub), turns_of(hub)\n"
        "assert (sweeper_of(hub), turns_of(hub)) == before\n"
        "child = gevent.os.fork()\n"
        "if not child:\n"
        "    ours = sweeper_of(gevent.get_hub()), turns_of(gevent.get_hub())\n"
        "    os._exit(0 if not set(ours) & set(before) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=20)


def test_a_socket_that_cannot_be_ended_either_does_not_end_the_sweeping():
    """`abort` and `due` may fail too; the others are looked after, in that round."""

    class Stubborn(FakeDeadline):
        def abort(self):
            self.aborted += 1
            raise RuntimeError("cannot be ended")

    class Timeless(FakeDeadline):
        due = property(lambda self: 1 // 0, lambda self, value: None)

    sweeper = Sweeper()
    sockets = Stubborn(sweeper, fails=True), Timeless(sweeper), FakeDeadline(sweeper)
    for swept in sockets:
        sweeper.add(swept, shortest=0.1)
    sweeper._greenlet.join(timeout=10.0)
    assert [(swept.calls, swept.aborted) for swept in sockets] == [(1, 1), (0, 1), (1, 0)]


def test_a_round_that_fails_is_followed_by_others(monkeypatch):
    """An exception of the sweeper's own is logged, and the next round comes."""
    monkeypatch.setattr("imrelay.websocket.sweeper._FAULT_PAUSE", 0.01)
    failures = [RuntimeError("odd"), RuntimeError("odd")]

    class FailingSweeper(Sweeper):
        __slots__ = ()

        def _sweep(self):
            if failures:
                raise failures.pop()
            super()._sweep()

    sweeper = FailingSweeper()
    swept = FakeDeadline(sweeper)
    sweeper.add(swept, shortest=0.1)
    sweeper._greenlet.join(timeout=10.0)
    assert not failures
    assert swept.calls == 1
