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
from imrelay.websocket import transport

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
    transport.Transport._write = counted("websocket writes", transport.Transport._write)
    transport.Transport._on_readable = counted("websocket reads", transport.Transport._on_readable)
    status = main()
    print(json.dumps(counts), flush=True)
    sys.exit(status)
