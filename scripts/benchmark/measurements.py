"""The measurements by the names that `--only` takes."""

from __future__ import annotations

from benchmark.crowd import Crowd
from benchmark.traffic import Traffic

__all__ = ["MEASUREMENTS"]

#: By the names of `--only`.
MEASUREMENTS: dict[str, Traffic | Crowd] = {
    "window1": Traffic("5 pairs, 1 message in flight each, 100 B", pairs=5, window=1),
    "window8": Traffic("5 pairs, 8 messages in flight each, 100 B", pairs=5, window=8),
    "window64": Traffic("5 pairs, 64 messages in flight each, 100 B", pairs=5, window=64),
    "pairs100": Traffic("100 pairs, 4 messages in flight each, 100 B", pairs=100, window=4),
    "open1000": Traffic("100 pairs, 1,000 messages a second over all (open loop), 100 B", pairs=100, rate=1000.0),
    "size1k": Traffic("5 pairs, 8 messages in flight each, 1 KiB", pairs=5, window=8, size=1024),
    "size16k": Traffic("5 pairs, 8 messages in flight each, 16 KiB", pairs=5, window=8, size=16_384),
    "memory": Crowd("2,000 idle sockets", (2000,), turns=2),
    "crowd": Crowd(
        "10,000 idle sockets; relay CPU per message (8 in flight on 5 pairs) at 10, 1,000 and 10,000 users",
        (10, 1000, 10_000),
        turns=1,
    ),
}
