"""A child process that ends with the relay, and the lock on its pid file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from imrelay.errors import SetupError

__all__ = ["Child", "end_holder", "is_free_lock", "lock_file", "read_pid", "until"]

logger = logging.getLogger(__name__)

#: Seconds between two checks of something that gives no event (a port, a lock).
_TICK = 0.05
#: The limit of open files for a child, as far as the hard limit allows: each connection and each busy queue needs
#: some.
_NODE_FILES = 65_536

#: Run in a fresh interpreter between the relay and the program: write the pid into the locked file, ask Linux
#: for SIGTERM when the relay is gone, raise the limit of open files, become the program.
_LAUNCHER = """\
import os, resource, signal, sys
parent, lock, files, *command = sys.argv[1:]
os.ftruncate(int(lock), 0)
os.pwrite(int(lock), b"%d\\n" % os.getpid(), 0)
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)
except (ImportError, AttributeError, OSError):
    pass
if os.getppid() != int(parent):
    sys.exit(1)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
want = int(files) if hard == resource.RLIM_INFINITY else min(int(files), hard)
if soft != resource.RLIM_INFINITY and soft < want:
    resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execv(command[0], command)
"""


class Child:
    """A child process that holds the lock of `<name>.pid` while it runs and gets SIGTERM when the relay dies.

    It has a session of its own, so a Ctrl-C at the terminal, which goes to the whole foreground group, does not
    reach it: the relay decides when it ends.
    """

    def __init__(self, name: str, command: list[str], data_dir: Path, env: dict[str, str]) -> None:
        self.output = data_dir / "log" / f"{name}.out"
        try:
            lock = lock_file(data_dir / f"{name}.pid")
        except BlockingIOError as exc:
            raise SetupError(f"another {name} runs on {data_dir}: end it by hand") from exc
        try:
            with self.output.open("wb") as output:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        "-c",
                        _LAUNCHER,
                        str(os.getpid()),
                        str(lock),
                        str(_NODE_FILES),
                        *command,
                    ],
                    env=env,
                    cwd=data_dir,
                    pass_fds=(lock,),
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
        finally:
            os.close(lock)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        return self._process.wait()

    def stop(self, seconds: float) -> None:
        """Ask it to end, wait for it, kill it when it has not ended after so many seconds."""
        if not self.alive:
            return
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.warning("process %d did not end within %g s of SIGTERM: killing it", self.pid, seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def last_output(self) -> str:
        """Return the end of what it printed, as the end of a sentence; empty where it printed nothing."""
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in self.output.read_text(errors="replace").splitlines()]
            if words := " | ".join([line for line in lines if line][-3:]):
                return f"; it ends with: {words[-400:]}"
        return ""


def lock_file(path: Path) -> int:
    """Return a descriptor that holds the file's lock while it is open; `BlockingIOError` when another does."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def locked() -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    if not until(locked, 0.5):  # longer than `is_free_lock` of another process holds it
        os.close(lock)
        raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
    return lock


def is_free_lock(path: Path) -> bool:
    """Whether nobody holds the file's lock; also when there is no such file."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def end_holder(path: Path, number: signal.Signals, seconds: float) -> bool:
    """Send a signal to the process that holds the lock of its pid file; return whether it let go in time."""
    # Read while the lock is held: the pid is then the holder's own and no later process's.
    if pid := read_pid(path):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
    return until(lambda: is_free_lock(path), seconds)


def until(ready: Callable[[], bool], seconds: float) -> bool:
    """Call `ready` until it returns true, for at most so many seconds; return its last result."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(_TICK)
    return True
