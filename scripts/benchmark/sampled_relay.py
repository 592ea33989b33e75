"""A relay that samples itself: run as a program it is `imrelay`, and says at its end where its CPU time went.

Every millisecond of CPU time, or as often as the kernel's clock allows, the module that is at work gets a sample:
the innermost module of imrelay, pika or gevent. What C does for a module (system calls, JSON, unmasking) counts as
that module's; the event loop's own as gevent's.
"""

from __future__ import annotations

from imrelay.cli import main  # isort: skip  (first: it patches)

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

#: Seconds of CPU time between two samples.
_EVERY = 0.001
_samples: Counter[str] = Counter()


def _sample(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        package = name.partition(".")[0]
        if package in ("imrelay", "pika", "gevent"):
            function = frame.f_code.co_name
            _samples[name if package == "imrelay" else package] += 1
            _samples[f"{name}:{function}"] += 1
            return
        frame = frame.f_back
    _samples["other"] += 1


def _clear(number: int, frame: FrameType | None) -> None:
    """Forget the start: what is measured begins now."""
    _samples.clear()
    signal.setitimer(signal.ITIMER_PROF, _EVERY, _EVERY)


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, _sample)
    signal.signal(signal.SIGUSR1, _clear)
    status = main()
    signal.setitimer(signal.ITIMER_PROF, 0)
    Path(os.environ["SAMPLES"]).write_text(json.dumps(_samples))
    sys.exit(status)
