"""The parts of the harness whose failure no other test would notice."""

from __future__ import annotations

import signal
import subprocess
import sys

#: Starts another program and then shows that it goes on when both signals come to it.
_PROGRAM = """
import signal, subprocess, sys
import tests.conftest
subprocess.run([sys.executable, "-S", "-c", sys.argv[1]], check=True)
signal.raise_signal(signal.SIGINT)
signal.raise_signal(signal.SIGHUP)
print("goes on")
"""
_CHILD = """
import signal
print(*(signal.getsignal(number) is not signal.SIG_IGN for number in (signal.SIGINT, signal.SIGHUP)))
"""


def test_what_a_run_in_the_background_starts_can_be_interrupted() -> None:
    """By `nohup` in the background of a script, a run ignores SIGINT and SIGHUP; what it starts does not."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, _CHILD],
        preexec_fn=ignore,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["True True", "goes on"]


def test_a_run_in_the_foreground_can_be_interrupted() -> None:
    """Where the signals are not ignored, they end the run as ever."""

    def restore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    for number in ("SIGINT", "SIGHUP"):
        program = f"import signal, tests.conftest; signal.raise_signal(signal.{number}); print('goes on')"
        done = subprocess.run(
            [sys.executable, "-c", program], preexec_fn=restore, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == -getattr(signal, number), done.stderr
        assert done.stdout == ""
