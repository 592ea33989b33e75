"""A relay that can be asked what is alive in it: greenlets, sessions, descriptors, threads, processes.

Run as a program it is `imrelay`, answers each line of its standard input with one line of JSON, and says the same
once more when it has stopped. `COUNTED_RABBITMQ` names a folder with a RabbitMQ to take for the installed one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import gevent
from gevent.fileobject import FileObject
from greenlet import greenlet

from imrelay.cli import main
from imrelay.private_node import installation


def census() -> dict[str, dict[str, int]]:
    """Count what is alive, by name: greenlets, threads, processes, classes of our own, kinds of descriptors."""
    gc.collect()
    everything = gc.get_objects()
    greenlets = (item for item in everything if isinstance(item, greenlet) and not item.dead)
    objects = (type(item) for item in everything if str(type(item).__module__).startswith("imrelay."))
    return {
        "greenlets": Counter(getattr(item, "name", type(item).__name__).partition(":")[0] for item in greenlets),
        "objects": Counter(kind.__name__ for kind in objects),
        "descriptors": Counter(filter(None, map(_kind, os.listdir("/proc/self/fd")))),
        "threads": Counter(thread.name for thread in threading.enumerate() if not _is_gevents(thread)),
        "processes": Counter(_children()),
    }


def _kind(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").partition(":")[0]
    except OSError:
        return ""  # the one that lists them


def _is_gevents(thread: threading.Thread) -> bool:
    """Tell whether a thread is one of gevent's pool, which are there for ever."""
    return isinstance(thread, threading._DummyThread)


def _children() -> list[str]:
    """Return the names of the processes that this one has started and not yet waited for."""
    found = Path("/proc/self/task").glob("*/children")
    return [Path(f"/proc/{pid}/comm").read_text().strip() for path in found for pid in path.read_text().split()]


def answer() -> None:
    """Answer questions until there are no more."""
    for _ in FileObject(sys.stdin.fileno(), "r"):
        print(json.dumps(census()), flush=True)


if __name__ == "__main__":
    if folder := os.environ.get("COUNTED_RABBITMQ"):
        installation._PLACES = (folder,)
    answering = gevent.spawn(answer)
    answering.name = "answer"
    status = main()
    print(json.dumps(census()), flush=True)
    sys.exit(status)
