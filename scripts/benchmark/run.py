"""Measures what imrelay costs, beside what one would use instead, all in one run that takes turns.

    scripts/bench                                                everything; more than an hour
    scripts/bench --quick                                        one short turn; figures of a glance
    scripts/bench --only window64 --systems imrelay,node --turns 1
    scripts/bench --against ../before --systems imrelay          two checkouts, as ratios of the same turn

It starts a RabbitMQ node of its own on 127.0.0.1, gives each system a virtual host there, and measures each
system in each turn, one after the other, so that whatever else happens on the machine happens to all. Ratios of
the same turn are what counts; times of two runs cannot be compared. What the peers need is installed into
var/bench at the first run. RabbitMQ has to be there (scripts/start installs it). How it is measured and how to
read the tables: scripts/benchmark/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.broker import Broker
from benchmark.child_process import (
    add_node_options,
    end_on_signals,
    free_ports,
    node_environment,
    say,
    work_folder,
)
from benchmark.clients import LoadError
from benchmark.crowd import Crowd, measure_crowd
from benchmark.installing import ROOT, Installer, Unavailable, versions
from benchmark.measurements import MEASUREMENTS
from benchmark.report import Results, table, verdicts
from benchmark.systems import NAMES, OURS, TITLES, Running, System, Trees, make_systems, with_before
from benchmark.traffic import Figures, Traffic, broker_at_rest
from benchmark.usage import raise_descriptor_limit
from imrelay.errors import SetupError

__all__ = ["main", "parse"]

CACHE = ROOT / "var" / "bench"
#: Descriptors that a process needs beside one for each idle socket.
_SPARE_DESCRIPTORS = 500
#: What each system has to do before it is measured, and for how long.
_WARM_UP = Traffic("", pairs=5, window=8)
_WARM_UP_SECONDS = 3.0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", help=f"of {','.join(MEASUREMENTS)}; default: all")
    parser.add_argument("--systems", metavar="NAMES", help=f"of {','.join(NAMES)}; default: all")
    parser.add_argument(
        "--against", type=Path, metavar="TREE", help="a checkout whose imrelay is measured as well"
    )
    parser.add_argument(
        "--python", type=Path, metavar="FILE", help="the interpreter of imrelay; default: that of .venv"
    )
    parser.add_argument("--turns", type=int, metavar="N", help="turns; the median is reported; default: 5")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one measurement; default: 2.5")
    parser.add_argument("--warm", type=float, metavar="S", help="warm-up before each; default: a third of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, of each turn, there")
    parser.add_argument("--quick", action="store_true", help="one turn of 1 second each, without the large crowd")
    add_node_options(parser)
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
    if options.against is not None:
        if not (options.against / "imrelay").is_dir():
            parser.error(f"--against: {options.against} has no imrelay/")
        if not set(options.systems) & set(OURS):
            parser.error(f"--against compares {', '.join(OURS)}: --systems names none of them")
        options.systems = with_before(options.systems)
    return options


class Setup:
    """Starts brokers in the folder of a run, and describes the systems on one."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._folder = folder
        self._trees = Trees(before=options.against, python=(options.python or Path(sys.executable)).absolute())
        self._installer = Installer(CACHE)
        self._settings, self._environment = options.set, node_environment(options)
        self._started = 0

    def start_broker(self) -> Broker:
        """Start a node that has carried nothing yet."""
        self._started += 1
        stomp, mqtt = free_ports(2)
        ports = {"rabbitmq_web_stomp": stomp, "rabbitmq_web_mqtt": mqtt}
        folder = self._folder / f"{self._started}"
        folder.mkdir()
        broker = Broker(folder / "broker", ports, self._settings, self._environment)
        broker.start()
        return broker

    def systems(self, broker: Broker, names: list[str]) -> list[System]:
        """Describe systems on that node; their logs are beside its folder."""
        return make_systems(broker, broker.data_dir.parent, self._installer, names, self._trees)


class Run:
    """One run: the systems that could be had, those that serve now, and what was found."""

    def __init__(self, options: argparse.Namespace, setup: Setup, broker: Broker) -> None:
        """Prepare each system on a broker for all."""
        self.results = Results()
        self.left_out: dict[str, str] = {}
        self._options = options
        self._setup = setup
        self._broker = broker
        self._systems: list[System] = []
        self._running: dict[str, Running] = {}
        self._began = time.monotonic()
        for system in setup.systems(broker, options.systems):
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
                figures = self._measure_crowd(measurement, system)
            else:
                running = self._running.get(system.name) or self._start(system)
                figures = measurement.run(running, self._broker.pids, options.warm, options.seconds)
        except Unavailable as exc:
            self._leave_out(system, str(exc))
            return
        except (LoadError, OSError, SetupError, subprocess.SubprocessError) as exc:
            figures = {"error": str(exc)}
            if failed := self._running.pop(system.name, None):
                failed.stop()
            broker_at_rest(self._broker.pids)
        self.results.add(name, system.name, turn, figures)
        now = time.monotonic()
        say(
            f"[{now - self._began:5.0f} s] turn {turn + 1} of {options.turns}, {name}, {system.name}: "
            f"{brief(figures)} ({now - begun:.0f} s)"
        )

    def _start(self, system: System) -> Running:
        """Start a system and send messages through it, so that its code is compiled where it is by use."""
        running = self._running[system.name] = system.start()
        _WARM_UP.run(running, self._broker.pids, 0.0, _WARM_UP_SECONDS)
        return running

    def _measure_crowd(self, crowd: Crowd, system: System) -> Figures:
        """Measure it on a broker of its own."""
        broker = self._setup.start_broker()
        try:
            (alone,) = self._setup.systems(broker, [system.name])
            alone.ready()
            return measure_crowd(crowd, alone, broker, self._options.warm, self._options.seconds)
        finally:
            broker.stop()

    def _leave_out(self, system: System, reason: str) -> None:
        self.left_out[system.name] = reason
        say(f"left out: {TITLES[system.name]}: {reason}")


def brief(figures: Figures) -> str:
    """Return figures in one line, for whoever watches."""
    keys = ("rate", "relay_us", "broker_us", "p50_ms", "p99_ms", "relay_kib", "broker_kib", "connects")
    shown = [f"{key} {figures[key]:.4g}" for key in keys if figures.get(key) is not None]
    return ", ".join([*shown, *([f"WRONG: {figures['error']}"] if "error" in figures else [])])


def drop_what_descriptors_forbid(options: argparse.Namespace) -> None:
    """Leave out the crowds that this process may not open sockets for."""
    limit = raise_descriptor_limit()
    for name in list(options.only):
        measurement = MEASUREMENTS[name]
        if isinstance(measurement, Crowd) and measurement.steps[-1] + _SPARE_DESCRIPTORS > limit:
            say(f"{name} is left out: {measurement.steps[-1]} sockets, and only {limit} open files (ulimit -n)")
            options.only.remove(name)


def measure(options: argparse.Namespace, setup: Setup, broker: Broker) -> int:
    """Run what was asked for on a started broker, print the table, write the JSON; return the exit status."""
    about = _describe(options)
    run = Run(options, setup, broker)
    say(f"the table is for {', '.join(options.only)}; {options.turns} turns; logs in {broker.data_dir.parent}")
    about["versions"] = versions(broker, CACHE)
    status = 0
    try:
        run.turns()
    except KeyboardInterrupt:
        say("interrupted: the table is of what there is")
        status = 130
    finally:
        run.stop()
    print(table(run.results, run.left_out))
    if options.json:
        found = {"about": about, "left_out": run.left_out, "targets": verdicts(run.results)}
        found["measurements"] = run.results.as_json()
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return status or int(run.results.has_errors)


def main(arguments: list[str]) -> int:
    """Run what was asked for; return 1 when a message went astray or the broker could not be had."""
    options = parse(arguments)
    drop_what_descriptors_forbid(options)
    end_on_signals()
    gc.disable()  # nothing here makes cycles by the message, and a collection would show in the latencies
    with work_folder(CACHE) as folder:
        setup = Setup(options, folder)
        broker: Broker | None = None
        try:
            broker = setup.start_broker()
            return measure(options, setup, broker)
        except SetupError as exc:
            say(str(exc))
            return 1
        finally:
            if broker is not None:
                broker.stop()


def _describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the JSON says about this run."""
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key != "json"
        },
        "cores": os.cpu_count(),
        "load_average_at_begin": os.getloadavg(),
    }
