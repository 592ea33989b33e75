"""Runs the state machine for hours with ever new seeds, and watches what grows: scripts/soak.

    scripts/soak --minutes 90
    scripts/soak --hours 8 --seed 7

One line a minute says how far it is and what each relay and the broker take, between two examples, when nobody is
connected. It ends at the first broken promise, with the shortest story that breaks it, or when the time is over,
with the growth of each figure per hour. Exit status 1 where a promise was broken or something grows.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from hypothesis import settings

from tests.model.fleet import PROFILES, WITNESSES, Fleet
from tests.model.machine import SETTINGS, Stage, run, staged
from tests.model.outside import Outside
from tests.support.brokers import node_pid, open_files, resident_kib
from tests.support.harness import Node, VirtualHost, eventually

__all__ = ["LIMITS", "Figures", "main"]

#: Examples between two looks at the clock, and steps of each.
_BATCH, _STEPS = 10, 30
#: Seconds between two lines.
_INTERVAL = 60.0
#: Part of the time that counts as warm-up, and the longest that does, in seconds.
_WARM_UP, _LONGEST_WARM_UP = 0.25, 900.0
#: Fewer lines than this after warm-up say nothing of growth.
_ENOUGH = 4
#: Unit -> growth per hour that is still none.
LIMITS = {"MiB": 8.0, "descriptors": 4.0, "greenlets": 2.0, "objects": 2.0, "on the broker": 2.0}


@dataclass
class Figures:
    """What was measured, minute by minute, by name; a name ends with its unit."""

    rows: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def add(self, at: float, row: dict[str, float]) -> None:
        """Add the figures of one moment, `at` in seconds."""
        self.rows.append((at, row))

    def growth(self) -> dict[str, float]:
        """Return the growth of each figure per hour, after warm-up; nothing where there are too few.

        It is the median of the slopes between any two moments (Theil-Sen), which a single outlier does not move.
        """
        if not self.rows:
            return {}
        begin = min(_LONGEST_WARM_UP, _WARM_UP * self.rows[-1][0])
        rows = [(at, row) for at, row in self.rows if at >= begin]
        if len(rows) < _ENOUGH:
            return {}
        found = {}
        for name in rows[-1][1]:
            points = [(at, row[name]) for at, row in rows if name in row]
            slopes = [(b - a) / (till - at) for (at, a), (till, b) in combinations(points, 2)]
            found[name] = 3600 * statistics.median(slopes) if slopes else 0.0
        return found

    def leaks(self) -> list[str]:
        """Return the names of what grows, and how fast."""
        grown = []
        for name, growth in self.growth().items():
            limit = next(limit for unit, limit in LIMITS.items() if name.endswith(unit))
            rise = self._rise(name)
            if growth > limit and rise > limit / 4:
                grown.append(f"{name}: {growth:+.1f} an hour, {rise:+.1f} in this run")
        return grown

    def _rise(self, name: str) -> float:
        values = [row[name] for _, row in self.rows if name in row]
        return values[-1] - statistics.median(values[: max(1, len(values) // 3)])


def measure(fleet: Fleet, vhost: VirtualHost) -> dict[str, float]:
    """Return what the witnesses among the relays and the broker take at rest."""
    row: dict[str, float] = {}
    for name in WITNESSES:
        relay = fleet.get(name)
        census = relay.census()
        row[f"{name} MiB"] = round(resident_kib(relay.pid) / 1024, 1)
        row[f"{name} descriptors"] = open_files(relay.pid)
        row[f"{name} greenlets"] = sum(census["greenlets"].values())
        row[f"{name} objects"] = sum(census["objects"].values())
    row["broker MiB"] = round(resident_kib(node_pid(vhost.node)) / 1024, 1)
    for name, count in vhost.census().items():
        row[f"{name} on the broker"] = count
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=None, help="the first seed; by default a random one")
    options = parser.parse_args(arguments)
    seconds = 3600 * options.hours + 60 * options.minutes
    if seconds <= 0:
        parser.error("give --hours or --minutes")
    first = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the relays and the broker end too
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        node = Node(Path(folder) / "data")
        try:
            vhost = VirtualHost(node, "soak")
            vhost.create()
            fleet, outside = Fleet(node, vhost, Path(folder)), Outside(vhost)
            try:
                return _soak(Stage(fleet, outside, outages=True), vhost, seconds, first)
            finally:
                outside.close()
                fleet.close()
        finally:
            node.stop()


def _soak(stage: Stage, vhost: VirtualHost, seconds: float, first: int) -> int:
    fleet, figures = stage.fleet, Figures()
    fleet.start(tuple(dict.fromkeys(name for profile in PROFILES.values() for name in profile.relays)))
    for name in WITNESSES:
        fleet.get(name)
    begun = told = time.monotonic()
    number = first
    print(f"seed {first}, {seconds / 60:g} minutes, process {os.getpid()}", flush=True)
    while time.monotonic() < begun + seconds:
        limits = settings(SETTINGS, max_examples=_BATCH, stateful_step_count=_STEPS)
        failure = run(staged(stage, number), limits)
        if failure:
            print(f"{failure}\nPROMISE BROKEN; again by scripts/soak --minutes 1 --seed {number}", flush=True)
            return 1
        number += 1
        if time.monotonic() - told >= _INTERVAL:
            told = time.monotonic()
            row = _at_rest(stage, vhost)
            figures.add(told - begun, row)
            print(_line(told - begun, stage, row), flush=True)
    return _conclude(stage, figures, number - first)


def _at_rest(stage: Stage, vhost: VirtualHost) -> dict[str, float]:
    """Measure when the channels of the last example have gone, and the inboxes of all examples."""
    for name in WITNESSES:
        stage.fleet.get(name).wait_until_ready()
    eventually(lambda: not any(queue["consumers"] for queue in vhost.user_queues().values()), 30)
    stage.outside.forget_all()
    return measure(stage.fleet, vhost)


def _line(seconds: float, stage: Stage, row: dict[str, float]) -> str:
    figures = ", ".join(f"{name} {value:g}" for name, value in row.items())
    return f"minute {seconds / 60:.1f}: {stage.examples} examples, {stage.steps} steps; {figures}"


def _conclude(stage: Stage, figures: Figures, batches: int) -> int:
    for name, growth in figures.growth().items():
        print(f"  {name}: {growth:+.2f} an hour, {figures.rows[-1][1][name]:g} at the end")
    leaks = figures.leaks()
    print(f"{stage.examples} examples, {stage.steps} steps in {batches} batches: no promise broken")
    print("GROWS: " + "; ".join(leaks) if leaks else "nothing grows")
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
