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

import pika

from imrelay.broker.inbound import Inbound
from imrelay.broker.outbound import Outbound
from imrelay.websocket import transport as websocket_wire

counts: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, counting its calls."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **keywords)

    return call


if __name__ == "__main__":
    pika.frame.decode_frame = counted("decoded by pika", pika.frame.decode_frame)
    Outbound.flush = counted("amqp writes", Outbound.flush)  # type: ignore[method-assign]
    Inbound.feed = counted("amqp reads", Inbound.feed)  # type: ignore[method-assign]
    websocket_wire.Wire._write = counted("websocket writes", websocket_wire.Wire._write)
    websocket_wire.Wire._on_readable = counted("websocket reads", websocket_wire.Wire._on_readable)
    status = main()
    print(json.dumps(counts), flush=True)
    sys.exit(status)
