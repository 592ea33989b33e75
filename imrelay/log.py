"""What the log looks like: one line of text or one JSON object per event, on standard error."""

from __future__ import annotations

import json
import logging
import time

from imrelay.config import LogConfig

__all__ = ["configure"]


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


def configure(config: LogConfig) -> None:
    """Send the log of this process to standard error as the settings say."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if config.format == "json" else _Text())
    logging.basicConfig(handlers=[handler], level=config.level.upper(), force=True)
    if config.level != "debug":
        logging.getLogger("pika").setLevel(logging.CRITICAL)  # its troubles are told by the connection keeper
