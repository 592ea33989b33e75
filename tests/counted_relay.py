"""A relay that can be asked what is alive in it: greenlets, sessions, descriptors.

Run as a program it is `imrelay`, and answers each line of its standard input with one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter

import gevent
from gevent.fileobject import FileObject
from greenlet import greenlet

from imrelay.cli import main


def census() -> dict[str, dict[str, int]]:
    """Count what is alive: greenlets by what they run, our own objects by class, descriptors by kind."""
    gc.collect()
    everything = gc.get_objects()
    greenlets = (item for item in everything if isinstance(item, greenlet) and not item.dead)
    objects = (type(item) for item in everything if str(type(item).__module__).startswith("imrelay."))
    return {
        "greenlets": Counter(getattr(item, "name", type(item).__name__).partition(":")[0] for item in greenlets),
        "objects": Counter(kind.__name__ for kind in objects),
        "descriptors": Counter(filter(None, map(_kind, os.listdir("/proc/self/fd")))),
    }


def _kind(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").partition(":")[0]
    except OSError:
        return ""  # the one that lists them


def answer() -> None:
    """Answer questions until there are no more."""
    for _ in FileObject(sys.stdin.fileno(), "r"):
        print(json.dumps(census()), flush=True)


if __name__ == "__main__":
    gevent.spawn(answer).name = "answer"
    sys.exit(main())
