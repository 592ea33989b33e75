"""Measures what imrelay costs, beside what one would use instead, all in one run that takes turns.

    scripts/bench                                                everything; about 25 minutes
    scripts/bench --quick                                        one short turn; figures of a glance
    scripts/bench --only window64 --systems imrelay,node --turns 1

It starts a RabbitMQ node of its own on 127.0.0.1, gives each system a virtual host there, and measures each
system in each turn, one after the other, so that whatever else happens on the machine happens to all. Ratios to
the Node.js server of the same turn are what counts; times of two runs cannot be compared. What the peers need is
installed into var/bench at the first run. RabbitMQ has to be there (scripts/start installs it).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from accounts import family, raise_descriptor_limit
from load import LoadError
from measure import MEASUREMENTS, Crowd, Figures, broker_at_rest, measure_crowd
from report import Results, table, verdicts
from systems import NAMES, TITLES, Broker, Running, System, Unavailable, make_systems, versions

from imrelay.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "var" / "bench"
#: Descriptors that a process needs beside one for each idle socket.
SPARE_DESCRIPTORS = 500


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", help=f"of {','.join(MEASUREMENTS)}; default: all")
    parser.add_argument("--systems", metavar="NAMES", help=f"of {','.join(NAMES)}; default: all")
    parser.add_argument("--turns", type=int, metavar="N", help="turns; the median is reported; default: 5")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one measurement; default: 2.5")
    parser.add_argument("--warm", type=float, metavar="S", help="warm-up before each; default: a third of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, of each turn, there")
    parser.add_argument("--quick", action="store_true", help="one turn of 1 second each, without the large crowd")
    options = parser.parse_args(arguments)
    options.turns = options.turns or (1 if options.quick else 5)
    options.seconds = options.seconds or (1.0 if options.quick else 2.5)
    options.warm = options.warm if options.warm is not None else options.seconds / 3
    default = [name for name in MEASUREMENTS if name != "crowd" or not options.quick]
    for key, known, all_of_them in (("only", MEASUREMENTS, default), ("systems", NAMES, list(NAMES))):
        given = getattr(options, key)
        names = given.split(",") if given else all_of_them
        if unknown := sorted(set(names) - set(known)):
            parser.error(f"--{key}: {', '.join(unknown)} is not one of {', '.join(known)}")
        setattr(options, key, [name for name in known if name in names])
    return options


class Run:
    """One run: the systems that could be had, those that serve now, and what was found."""

    def __init__(self, options: argparse.Namespace, systems: list[System], broker: list[int]) -> None:
        self.results = Results()
        self.left_out: dict[str, str] = {}
        self._options = options
        self._broker = broker
        self._systems: list[System] = []
        self._running: dict[str, Running] = {}
        self._began = time.monotonic()
        for system in systems:
            try:
                system.ready()
                self._systems.append(system)
            except Unavailable as exc:
                self._leave_out(system, str(exc))

    def turns(self) -> None:
        """Measure everything, in turns; each turn begins with another system."""
        for turn in range(self._options.turns):
            for name in self._options.only:
                measurement = MEASUREMENTS[name]
                if isinstance(measurement, Crowd) and turn >= measurement.turns:
                    continue
                first = turn % max(1, len(self._systems))
                for system in self._systems[first:] + self._systems[:first]:
                    if system.name not in self.left_out:
                        self._measure(turn, name, system)

    def stop(self) -> None:
        """Stop every system."""
        while self._running:
            self._running.popitem()[1].stop()

    def _measure(self, turn: int, name: str, system: System) -> None:
        measurement, options = MEASUREMENTS[name], self._options
        begun = time.monotonic()
        try:
            if isinstance(measurement, Crowd):
                figures = measure_crowd(measurement, system, self._broker, options.warm, options.seconds)
            else:
                running = self._running.get(system.name)
                if running is None:
                    running = self._running[system.name] = system.start()
                figures = measurement.run(running, self._broker, options.warm, options.seconds)
        except Unavailable as exc:
            self._leave_out(system, str(exc))
            return
        except (LoadError, OSError) as exc:
            figures = {"error": str(exc)}
            if failed := self._running.pop(system.name, None):
                failed.stop()
            broker_at_rest(self._broker)
        self.results.add(name, system.name, turn, figures)
        now = time.monotonic()
        say(
            f"[{now - self._began:5.0f} s] turn {turn + 1} of {options.turns}, {name}, {system.name}: "
            f"{brief(figures)} ({now - begun:.0f} s)"
        )

    def _leave_out(self, system: System, reason: str) -> None:
        self.left_out[system.name] = reason
        say(f"left out: {TITLES[system.name]}: {reason}")


def brief(figures: Figures) -> str:
    """Return figures in one line, for whoever watches."""
    keys = ("rate", "relay_us", "broker_us", "p50_ms", "p99_ms", "relay_kib", "connects", "relay_us_growth")
    shown = [f"{key} {figures[key]:.4g}" for key in keys if figures.get(key) is not None]
    return ", ".join([*shown, *([f"WRONG: {figures['error']}"] if "error" in figures else [])])


def say(text: str) -> None:
    """Tell whoever watches."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_folder() -> tuple[Path, int]:
    """Make a folder for this run, locked while it lives; remove those of runs that were killed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob("run-*"):
        with contextlib.suppress(OSError):
            held = os.open(old / "lock", os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(held)
    folder = CACHE / f"run-{secrets.token_hex(4)}"
    folder.mkdir()
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def drop_what_descriptors_forbid(options: argparse.Namespace) -> None:
    """Leave out the crowds that this process may not open sockets for."""
    limit = raise_descriptor_limit()
    for name in list(options.only):
        measurement = MEASUREMENTS[name]
        if isinstance(measurement, Crowd) and measurement.steps[-1] + SPARE_DESCRIPTORS > limit:
            say(f"{name} is left out: {measurement.steps[-1]} sockets, and only {limit} open files (ulimit -n)")
            options.only.remove(name)


def main(arguments: list[str]) -> int:
    """Run what was asked for, print the table, write the JSON; return 1 when a message went astray."""
    options = parse(arguments)
    drop_what_descriptors_forbid(options)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started it in the background
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    gc.disable()  # nothing here makes cycles by the message, and a collection would show in the latencies
    folder, lock = make_folder()
    broker = Broker(folder / "broker", free_port())
    run: Run | None = None
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        broker.start()
        pid = broker.pid
        assert pid is not None
        systems = make_systems(broker, folder, CACHE, options.systems)
        run = Run(options, systems, family(pid))
        say(f"the table is for {', '.join(options.only)}; {options.turns} turns; logs in {folder}")
        about = {
            "began": began,
            "options": {key: value for key, value in vars(options).items() if key != "json"},
            "cores": os.cpu_count(),
            "load_average_at_begin": os.getloadavg(),
            "versions": versions(broker, CACHE),
        }
        status = 0
        try:
            run.turns()
        except KeyboardInterrupt:
            say("interrupted: the table is of what there is")
            status = 130
        print(table(run.results, run.left_out))
        if options.json:
            found = {"about": about, "left_out": run.left_out, "targets": verdicts(run.results)}
            found["measurements"] = run.results.as_json()
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return status or int(run.results.has_errors)
    except SetupError as exc:
        say(str(exc))
        return 1
    finally:
        if run is not None:
            run.stop()
        broker.stop()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
