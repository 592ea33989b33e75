"""Many idle sockets: the memory that they take, how fast they connect, and what a message costs meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.broker import Broker
from benchmark.clients import Loop
from benchmark.generator import connect, probe
from benchmark.systems import Running, System
from benchmark.traffic import Figures, Mark, Traffic, broker_at_rest
from benchmark.usage import resident_kib

__all__ = ["Crowd", "measure_crowd"]

#: Seconds after which the memory of idle sockets is read, for collectors and buffers to settle.
_SETTLE = 2.0
#: Idle sockets that are there before memory is read the first time: what the first ones cost is not theirs.
_WARM_SOCKETS = 50


@dataclass(frozen=True, slots=True)
class Memory:
    """What is in use, in KiB, at one moment."""

    relay: float
    #: The broker's processes as the operating system sees them, before and after a garbage collection.
    broker: float
    broker_collected: float
    #: What Erlang has allocated in the broker, after it.
    erlang: float

    @classmethod
    def now(cls, relay_pids: list[int], broker: Broker) -> Memory:
        """Read it all, and collect the broker's garbage meanwhile."""
        relay, before = resident_kib(relay_pids), resident_kib(broker.pids)
        broker.collect_garbage()
        broker_at_rest(broker.pids, 20.0)
        return cls(relay, before, resident_kib(broker.pids), broker.memory_kib())


@dataclass(frozen=True)
class Crowd:
    """Idle sockets, and the cost of a message while they are there."""

    title: str
    #: How many users are connected at each step; memory and connects are taken of the last.
    steps: tuple[int, ...]
    #: It is measured in so many turns at most: memory hardly moves, and thousands of connects take long.
    turns: int

    def prepare(self, running: Running, broker: Broker) -> Figures:
        """Connect all users once, so that each has what the server keeps for it.

        Return how quick that was, and what a user takes of the broker who is there for the first time.
        """
        loop = Loop()
        try:
            before = Memory.now([], broker)
            users = _users(0, self.steps[-1])
            begun = time.perf_counter()
            _connect_all(loop, running, users)
            figures = {"first_connects": len(users) / (time.perf_counter() - begun)}
            _idle(loop, broker.pids)
            return figures | _broker_figures(before, Memory.now([], broker), len(users))
        finally:
            loop.close()

    def run(self, running: Running, broker: Broker, warm: float, seconds: float) -> Figures:
        """Measure memory, connects, and with more than one step the cost per message at each."""
        loop = Loop()
        figures: Figures = {}
        pids = broker.pids
        traffic = Traffic("", pairs=5, window=8)
        # The busy pairs are ten users of each step.
        busy = 10 if len(self.steps) > 1 else 0
        connected = 0
        try:
            _connect_all(loop, running, [f"w{number:05d}" for number in range(_WARM_SOCKETS)])
            traffic.run_on(loop, running, pids, 0.2, 0.3)
            _idle(loop, pids)
            before = Memory.now(running.pids, broker)
            for step in self.steps:
                users = _users(connected, step - busy)
                connected += len(users)
                begun = Mark.now(running, pids, 0)
                _connect_all(loop, running, users)
                spent = Mark.now(running, pids, len(users)).minus(begun)
                _idle(loop, pids)
                if step == self.steps[-1]:
                    after = Memory.now(running.pids, broker)
                    figures["relay_kib"] = (after.relay - before.relay) / connected if running.pids else None
                    figures |= _broker_figures(before, after, connected)
                    figures |= _connect_figures(running, spent)
                if busy:
                    # Twice as long as others: there are fewer turns of a crowd.
                    of_step = traffic.run_on(loop, running, pids, warm, 2 * seconds)
                    figures |= {
                        f"{key}_{step}": of_step.get(key) for key in ("relay_us", "both_us", "error", "note")
                    }
        finally:
            loop.close()
        return self._compared(figures) if busy else figures

    def _compared(self, figures: Figures) -> Figures:
        """Add how the cost per message grew from the first step to the last, and join what was wrong at any."""
        first, last = self.steps[0], self.steps[-1]
        for cost in ("relay_us", "both_us"):
            if figures[f"{cost}_{first}"]:
                figures[f"{cost}_growth"] = figures[f"{cost}_{last}"] / figures[f"{cost}_{first}"]
        for key in ("error", "note"):
            texts = [f"at {step}: {text}" for step in self.steps if (text := figures.pop(f"{key}_{step}"))]
            if texts:
                figures[key] = "; ".join([*([figures[key]] if key in figures else []), *texts])
        return figures


def measure_crowd(crowd: Crowd, system: System, broker: Broker, warm: float, seconds: float) -> Figures:
    """Measure a crowd on a broker that has carried nothing yet, and on a fresh process of the system.

    The memory is to be that of these sockets alone: a broker that has carried others has memory to spare that the
    system counts already. What a user takes of the broker is measured when they come for the first time, with all
    that is kept for them.
    """
    first: Figures = {}
    if system.keeps_users:
        before = Memory.now([], broker)
        running = system.start()
        try:
            first = crowd.prepare(running, broker)
        finally:
            running.stop()
        broker_at_rest(broker.pids)
        first["kept_kib"] = (Memory.now([], broker).erlang - before.erlang) / crowd.steps[-1]
    running = system.start()
    try:
        figures = crowd.run(running, broker, warm, seconds)
    finally:
        running.stop()
    if system.keeps_users:
        figures["known_kib"] = figures.pop("broker_kib")
        del figures["broker_collected_kib"]
    figures |= first
    for key in ("", "collected_"):
        figures[f"both_{key}kib"] = (figures["relay_kib"] or 0.0) + figures[f"broker_{key}kib"]
    return figures


def _users(begin: int, end: int) -> list[str]:
    return [f"i{number:05d}" for number in range(begin, end)]


def _idle(loop: Loop, broker: list[int]) -> None:
    """Let things settle, and answer pings meanwhile."""

    def tend(seconds: float) -> None:
        loop.run(time.perf_counter() + seconds)

    tend(_SETTLE)
    broker_at_rest(broker, 20.0, tend)


def _connect_all(loop: Loop, running: Running, users: Sequence[str]) -> None:
    """Connect users, until a message of their own reaches those that came last."""
    clients = connect(loop, running.protocol, running.address, users)
    probe(loop, [(client, client) for client in clients[-64:]])


def _broker_figures(before: Memory, after: Memory, count: int) -> Figures:
    """Return what each of `count` users takes of the broker."""
    return {
        "broker_kib": (after.broker - before.broker) / count,
        "broker_collected_kib": (after.broker_collected - before.broker_collected) / count,
    }


def _connect_figures(running: Running, spent: Mark) -> Figures:
    """Return what connecting `spent.count` users took."""
    figures: Figures = {
        "connects": spent.count / spent.clock,
        "connect_relay_us": spent.relay / spent.count * 1e6 if running.pids else None,
        "connect_broker_us": spent.broker / spent.count * 1e6,
        "connect_load_cpu": spent.load / spent.clock,
    }
    if note := spent.note():
        figures["note"] = f"while they connected, {note}"
    return figures
