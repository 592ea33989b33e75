"""A relay that says at its end how many AMQP frames pika had to decode, and how often it read and wrote.

Run as a program it is `imrelay`; its last line of standard output is JSON.
"""

from __future__ import annotations

from imrelay.cli import main  # isort: skip  (first: it patches)

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from imrelay.broker import wire
from imrelay.websocket import wire as websocket_wire

counts: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, counting its calls."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **keywords)

    return call


if __name__ == "__main__":
    wire.decode_frame = counted("decoded by pika", wire.decode_frame)
    wire.Wire.flush = counted("amqp writes", wire.Wire.flush)
    wire.Wire._on_data_available = counted("amqp reads", wire.Wire._on_data_available)
    websocket_wire.Wire._write = counted("websocket writes", websocket_wire.Wire._write)
    websocket_wire.Wire._on_readable = counted("websocket reads", websocket_wire.Wire._on_readable)
    status = main()
    print(json.dumps(counts), flush=True)
    sys.exit(status)
