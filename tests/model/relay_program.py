"""A relay for the model, run as a program: a wall clock that can be set, small kernel buffers, and a census.

Each line of standard input is answered with one line of JSON: `clock SECONDS` sets how far the wall clock is off,
`census` counts what is alive.
"""

from __future__ import annotations

import time

_true_time = time.time
_offset = 0.0


def _time() -> float:
    return _true_time() + _offset


time.time = _time  # before anything takes a reference to it

import json  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
import gevent.socket  # noqa: E402
from gevent.fileobject import FileObject  # noqa: E402

from imrelay.cli import main  # noqa: E402
from tests.support.counted_relay import census  # noqa: E402

#: Bytes that the kernel takes for a browser which does not read (Linux doubles it).
SEND_BUFFER = 4608
_listen = gevent.socket.socket.listen


def _listen_narrowly(self: gevent.socket.socket, *backlog: int) -> None:
    """Listen; accepted sockets have the send buffer of the listening one."""
    self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    _listen(self, *backlog)


def _answer() -> None:
    global _offset
    for line in FileObject(sys.stdin.fileno(), "r"):
        match line.split():
            case ["clock", seconds]:
                _offset = float(seconds)
                print(json.dumps(_offset), flush=True)
            case ["census"]:
                print(json.dumps(census()), flush=True)


if __name__ == "__main__":
    gevent.socket.socket.listen = _listen_narrowly
    gevent.spawn(_answer).name = "answer"
    sys.exit(main())
