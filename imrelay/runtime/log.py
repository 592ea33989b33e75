"""What the log looks like: one line of text or one JSON object per event, on standard error."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import time
from collections.abc import Callable

from imrelay.runtime.log_stream import LogStream
from imrelay.settings.values import LogConfig

__all__ = ["configure"]

#: Seconds at the end of the process for what the log still has to write.
_FINISH_TIMEOUT = 2.0


class _Text(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO imrelay.server: listening on …`; a traceback follows on lines of its own."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")


class _Json(logging.Formatter):
    """`{"time":…,"level":…,"logger":…,"message":…}`, with `exception` where there is one."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(config: LogConfig) -> LogStream:
    """Send the log of this process, and all else that it writes to standard error, there as the settings say.

    Nothing blocks on that: see `LogStream`, which is returned, and which is finished when the interpreter ends.
    gevent prints exceptions of greenlets to `sys.stderr`, and Python those that end the process.
    """
    formatter = _Json() if config.format == "json" else _Text()
    # If the process was started without a standard error, descriptor 2 may be a socket by now.
    descriptor = sys.__stderr__.fileno() if sys.__stderr__ else os.open(os.devnull, os.O_WRONLY)
    stream = LogStream(descriptor, _notice(formatter))
    atexit.register(stream.finish, _FINISH_TIMEOUT)
    sys.stderr = stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=config.level.upper(), force=True)
    if config.level != "debug":
        logging.getLogger("pika").setLevel(logging.CRITICAL)  # the connection keeper logs what it reports
    return stream


def _notice(formatter: logging.Formatter) -> Callable[[int], str]:
    """Return the function that makes the line about dropped lines; it runs in a native thread without gevent."""
    sentence = "%d lines were dropped here: standard error did not take them"
    record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, sentence, (0,), None)

    def make(lines: int) -> str:
        record.created = time.time()
        record.msecs = record.created % 1 * 1000
        record.args = (lines,)
        return formatter.format(record) + "\n"

    return make
