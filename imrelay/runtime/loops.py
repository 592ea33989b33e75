"""The one place that starts the loops which have to live as long as the process.

An exception that a loop did not expect is logged with its traceback, and the loop is begun again after a pause.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import gevent

__all__ = ["run_for_ever"]

logger = logging.getLogger(__name__)

#: Seconds before a loop that failed is begun again; doubles with each failure up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: Seconds without a failure after which the next pause is the first again.
_FORGET_AFTER = 30.0
#: Seconds between two tracebacks of one loop that fails in the same way; the failures between are only counted.
_REPEAT_AFTER = 60.0


def run_for_ever(body: Callable[[], None], *, name: str, pause: float = _FIRST_PAUSE) -> gevent.Greenlet:
    """Spawn a greenlet that calls `body`, and calls it again after each exception; return the greenlet.

    `body` is a loop: when it returns, its work is done and the greenlet ends. It has to be possible to call it
    again after any exception. `pause` (seconds) comes before the first new call; it doubles up to 5 s while
    failures follow each other. A `gevent.Timeout` that escapes `body` counts as a failure. `GreenletExit`
    (`kill`), `SystemExit` and `KeyboardInterrupt` end the loop.
    """
    greenlet = gevent.spawn(_run_loop, body, name, pause)
    greenlet.name = name
    return greenlet


def _run_loop(body: Callable[[], None], name: str, pause: float) -> None:
    failures = _Failures(name, pause)
    while True:
        began = time.monotonic()
        try:
            return body()
        except (Exception, gevent.Timeout) as exc:
            failures.add(exc, lived=time.monotonic() - began)
        gevent.sleep(failures.pause)


class _Failures:
    """The failures of one loop: how long to pause after the last one, and which of them to log."""

    def __init__(self, name: str, first_pause: float) -> None:
        #: Seconds to pause after the last failure.
        self.pause = 0.0
        self._name = name
        self._first_pause = first_pause
        self._kind: object = None
        self._logged_at = 0.0
        self._unlogged = 0

    def add(self, exc: BaseException, *, lived: float) -> None:
        """Count a failure that came `lived` seconds after the loop had been begun, and log it if that is due."""
        follows = self._kind is not None and lived < _FORGET_AFTER
        self.pause = min(max(self.pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE) if follows else self._first_pause
        now = time.monotonic()
        kind = _kind(exc)
        if kind == self._kind and now - self._logged_at < _REPEAT_AFTER:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} times more since the last such line)" if self._unlogged else ""
        sentence = "the loop %s met an unexpected exception and goes on in %.1f s%s"
        logger.error(sentence, self._name, self.pause, more, exc_info=exc)
        self._kind, self._logged_at, self._unlogged = kind, now, 0


def _kind(exc: BaseException) -> object:
    """Return what is equal for two exceptions of one type from one line of the source."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return type(exc), trace and (trace.tb_frame.f_code, trace.tb_lineno)
