"""A loop that must live for ever outlives every exception, says so in the log, and ends when it is told to."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from gevent.event import Event

from imrelay.runtime import loops
from imrelay.runtime.loops import run_for_ever

ROOT = Path(__file__).resolve().parents[3]
#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """End a test that hangs."""
    with gevent.Timeout(PATIENCE):
        yield


class FailingLoop:
    """A loop that fails as often as it is told, then works until it is ended."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.works = Event()
        self.may_end = Event()

    def __call__(self) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.works.set()
        self.may_end.wait()


@pytest.mark.parametrize("failure", [RuntimeError("odd"), gevent.Timeout(1), MemoryError(), AssertionError()])
def test_an_unexpected_exception_is_logged_and_the_loop_goes_on(
    failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """After an exception of whatever kind the loop works; the log has its name and the traceback."""
    body = FailingLoop(failure)
    greenlet = run_for_ever(body, name="test", pause=0)
    assert body.works.wait(PATIENCE)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "the loop test" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is failure
    body.may_end.set()
    greenlet.join()
    assert greenlet.successful(), "a loop that returns has done its work"
    assert greenlet.name == "test"


def test_a_loop_that_is_killed_ends_at_once() -> None:
    """`kill` ends it, at work and in the pause after a failure."""
    working, pausing = FailingLoop(), FailingLoop(*(RuntimeError() for _ in range(9)))
    first = run_for_ever(working, name="first")
    second = run_for_ever(pausing, name="second", pause=PATIENCE * 10)
    assert working.works.wait(PATIENCE)
    gevent.killall([first, second])
    assert first.dead
    assert second.dead
    assert len(pausing.failures) == 8


@pytest.mark.parametrize(("ending", "status"), [("SystemExit(7)", 7), ("KeyboardInterrupt()", 130)])
def test_what_ends_the_process_is_not_kept_from_it(ending: str, status: int) -> None:
    """`SystemExit` and `KeyboardInterrupt` of a loop go where gevent takes them: to the main greenlet."""
    program = (
        "import gevent, signal\n"
        "from imrelay.runtime.loops import run_for_ever\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def body():\n"
        f"    raise {ending}\n"
        "run_for_ever(body, name='test', pause=0)\n"
        "gevent.sleep(20)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=PATIENCE, check=False, stderr=subprocess.DEVNULL
    )
    assert ended.returncode in (status, -2 if status == 130 else status)


def test_failures_that_repeat_do_not_flood_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same failure again and again is logged once in a while, with a count; another kind at once."""
    pauses: list[float] = []
    monkeypatch.setattr(loops.gevent, "sleep", pauses.append)
    clock = iter([float(number) for number in range(10_000)])
    monkeypatch.setattr(loops.time, "monotonic", lambda: next(clock))
    body = FailingLoop(*(RuntimeError(str(number)) for number in range(100)), ValueError())
    body.may_end.set()
    loops._run_loop(body, "test", 0.1)
    assert pauses[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert set(pauses[7:]) == {5.0}
    kinds = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert 2 <= kinds.count(RuntimeError) <= 6
    assert kinds[-1] is ValueError
    assert "times more" in caplog.records[1].getMessage()


def test_a_loop_that_worked_for_long_is_begun_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause is the first again when the loop had worked for a while before it failed."""
    pauses: list[float] = []
    monkeypatch.setattr(loops.gevent, "sleep", pauses.append)
    now = [0.0]
    monkeypatch.setattr(loops.time, "monotonic", lambda: now[0])
    rounds = iter([0.0, 0.0, 0.0, loops._FORGET_AFTER, 0.0])

    def body() -> None:
        lasts = next(rounds, None)
        if lasts is not None:
            now[0] += lasts
            raise RuntimeError

    loops._run_loop(body, "test", 0.1)
    assert pauses == [0.1, 0.2, 0.4, 0.1, 0.2]
