"""The measurements: what is done to a running system, and the figures that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from accounts import cpu_seconds, machine_cpu_seconds, resident_kib
from load import Client, Loop, Meter, Pair, closed_loop, connect, open_loop, probe
from systems import Running, System

__all__ = ["MEASUREMENTS", "Crowd", "Figures", "Traffic", "broker_at_rest", "measure_crowd"]

#: What one measurement found: key -> number, None where it does not apply, text for `error` and `note`.
Figures = dict[str, Any]

#: From this share of a core on, the load generator may be what is measured.
NEAR_A_CORE = 0.9
#: From this share of a core on, what else the machine does is said beside the figures.
MUCH_OF_OTHERS = 0.25
#: Seconds after which the memory of idle sockets is read, for collectors and buffers to settle.
_SETTLE = 2.0
#: Idle sockets that are there before memory is read the first time: what the first ones cost is not theirs.
_WARM_SOCKETS = 50


@dataclass(frozen=True, slots=True)
class Mark:
    """The clock, the CPU time of each side and of all (seconds), and the messages that came, at one moment."""

    clock: float
    relay: float
    broker: float
    load: float
    machine: float
    count: int

    @classmethod
    def now(cls, running: Running, broker: list[int], count: int) -> Mark:
        """Read them all."""
        cpu = cpu_seconds(running.pids), cpu_seconds(broker), time.process_time(), machine_cpu_seconds()
        return cls(time.perf_counter(), *cpu, count)

    def minus(self, earlier: Mark) -> Mark:
        """Return what was between two moments."""
        return Mark(*(mine - other for mine, other in zip(astuple(self), astuple(earlier), strict=True)))

    @property
    def others(self) -> float:
        """CPU time of everything else on the machine: kernel threads, other people."""
        return max(0.0, self.machine - self.relay - self.broker - self.load)

    def note(self) -> str | None:
        """Return what makes the figures between two moments doubtful; None where nothing does."""
        if self.load / self.clock >= NEAR_A_CORE:
            return f"the load generator was at {self.load / self.clock:.0%} of a core: it may be the limit"
        if self.others / self.clock >= MUCH_OF_OTHERS:
            return f"other processes took {self.others / self.clock:.0%} of a core"
        return None


@dataclass(frozen=True)
class Traffic:
    """Messages between pairs: `window` under way on each, or `rate` a second over all."""

    title: str
    pairs: int
    size: int = 100
    window: int = 0
    rate: float = 0.0

    def run(self, running: Running, broker: list[int], warm: float, seconds: float) -> Figures:
        """Measure it on sockets of its own."""
        loop = Loop()
        try:
            return self.run_on(loop, running, broker, warm, seconds)
        finally:
            loop.close()

    def run_on(self, loop: Loop, running: Running, broker: list[int], warm: float, seconds: float) -> Figures:
        """Measure it while the sockets of `loop` are connected too."""
        senders, receivers = _couple(loop, running, self.pairs)
        meter = Meter()
        # Twice what can be under way, at least, so that a number tells whether it is early or late.
        laps = 256 if self.size > 4096 or self.pairs > 20 else max(256, 16 * self.window)
        pairs = [
            Pair(meter, sender, receiver, self.size, self.window, laps)
            for sender, receiver in zip(senders, receivers, strict=True)
        ]
        marks: list[Mark] = []

        def mark() -> None:
            marks.append(Mark.now(running, broker, meter.count))

        if self.rate:
            open_loop(loop, pairs, rate=self.rate, warm=warm, seconds=seconds, mark=mark)
        else:
            closed_loop(loop, pairs, warm=warm, seconds=seconds, mark=mark)
        for client in (*senders, *receivers):
            client.close()
        return _figures(running, meter, marks[1].minus(marks[0]))


@dataclass(frozen=True)
class Crowd:
    """Idle sockets, and the cost of a message while they are there."""

    title: str
    #: How many users are connected at each step; memory and connects are taken of the last.
    steps: tuple[int, ...]
    #: It is measured in so many turns at most: memory hardly moves, and thousands of connects take long.
    turns: int

    def prepare(self, running: Running) -> Figures:
        """Connect all users once, so that each has what the server keeps for it; return how quick that was."""
        loop = Loop()
        try:
            users = self._users(0, self.steps[-1])
            begun = time.perf_counter()
            _connect_all(loop, running, users)
            return {"first_connects": len(users) / (time.perf_counter() - begun)}
        finally:
            loop.close()

    def run(self, running: Running, broker: list[int], warm: float, seconds: float) -> Figures:
        """Measure memory, connects, and with more than one step the cost per message at each."""
        loop = Loop()
        figures: Figures = {}
        traffic = Traffic("", pairs=5, window=8)
        # The busy pairs are ten users of each step.
        busy = 10 if len(self.steps) > 1 else 0
        connected = 0
        try:
            _connect_all(loop, running, [f"w{number:05d}" for number in range(_WARM_SOCKETS)])
            traffic.run_on(loop, running, broker, 0.2, 0.3)
            _idle(loop, broker)
            before = resident_kib(running.pids), resident_kib(broker)
            for step in self.steps:
                users = self._users(connected, step - busy)
                connected += len(users)
                begun = Mark.now(running, broker, 0)
                _connect_all(loop, running, users)
                spent = Mark.now(running, broker, len(users)).minus(begun)
                _idle(loop, broker)
                if step == self.steps[-1]:
                    after = resident_kib(running.pids), resident_kib(broker)
                    figures["relay_kib"] = (after[0] - before[0]) / connected if running.pids else None
                    figures["broker_kib"] = (after[1] - before[1]) / connected
                    figures |= _connect_figures(running, spent)
                if busy:
                    # Twice as long as others: there are fewer turns of a crowd.
                    of_step = traffic.run_on(loop, running, broker, warm, 2 * seconds)
                    figures |= {
                        f"{key}_{step}": of_step.get(key) for key in ("relay_us", "both_us", "error", "note")
                    }
            if busy:
                first, last = self.steps[0], self.steps[-1]
                for cost in ("relay_us", "both_us"):
                    if figures[f"{cost}_{first}"]:
                        figures[f"{cost}_growth"] = figures[f"{cost}_{last}"] / figures[f"{cost}_{first}"]
                for key in ("error", "note"):
                    texts = [f"at {step}: {text}" for step in self.steps if (text := figures.pop(f"{key}_{step}"))]
                    if texts:
                        figures[key] = "; ".join([*([figures[key]] if key in figures else []), *texts])
        finally:
            loop.close()
        return figures

    @staticmethod
    def _users(begin: int, end: int) -> list[str]:
        return [f"i{number:05d}" for number in range(begin, end)]


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


def broker_at_rest(broker: list[int], seconds: float = 60.0, tend: Callable[[float], None] = time.sleep) -> None:
    """Wait until the broker is done with what it was given: below a tenth of a core for half a second."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begun, before = time.monotonic(), cpu_seconds(broker)
        tend(0.5)
        if cpu_seconds(broker) - before < 0.1 * (time.monotonic() - begun):
            return


def _idle(loop: Loop, broker: list[int]) -> None:
    """Let things settle, and answer pings meanwhile."""

    def tend(seconds: float) -> None:
        loop.run(time.perf_counter() + seconds)

    tend(_SETTLE)
    broker_at_rest(broker, 20.0, tend)


def _couple(loop: Loop, running: Running, count: int) -> tuple[list[Client], list[Client]]:
    """Connect senders and receivers whose messages arrive."""
    names = [f"s{number:05d}" for number in range(count)] + [f"r{number:05d}" for number in range(count)]
    clients = connect(loop, running.wire, running.address, names)
    senders, receivers = clients[:count], clients[count:]
    probe(loop, list(zip(senders, receivers, strict=True)))
    return senders, receivers


def _connect_all(loop: Loop, running: Running, users: Sequence[str]) -> None:
    """Connect users, until a message of their own reaches those that came last."""
    clients = connect(loop, running.wire, running.address, users)
    probe(loop, [(client, client) for client in clients[-64:]])


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


def _figures(running: Running, meter: Meter, spent: Mark) -> Figures:
    """Return what the time between two marks and what came in it say."""
    count = spent.count
    figures: Figures = {
        "messages": count,
        "rate": count / spent.clock,
        "load_cpu": spent.load / spent.clock,
        "others_cpu": spent.others / spent.clock,
    }
    if count:
        figures["relay_us"] = spent.relay / count * 1e6 if running.pids else None
        figures["broker_us"] = spent.broker / count * 1e6
        figures["both_us"] = (spent.relay + spent.broker) / count * 1e6
        meter.latencies.sort()
        for key, share in (("p50_ms", 0.5), ("p99_ms", 0.99), ("max_ms", 1.0)):
            place = min(len(meter.latencies) - 1, int(share * len(meter.latencies)))
            figures[key] = meter.latencies[place] * 1e3
    else:
        figures["error"] = "no message arrived"
    if meter.faults:
        figures["error"] = ", ".join(f"{number} {fault}" for fault, number in sorted(meter.faults.items()))
        if meter.stranger is not None:
            figures["error"] += f"; first: {meter.stranger.decode(errors='replace')}"
    if note := spent.note():
        figures["note"] = note
    return figures


def measure_crowd(measurement: Crowd, system: System, broker: list[int], warm: float, seconds: float) -> Figures:
    """Measure a crowd on a fresh process of the system: its memory is to be that of these sockets alone."""
    figures: Figures = {}
    if system.keeps_users and system.prepared < measurement.steps[-1]:
        running = system.start()
        try:
            figures = measurement.prepare(running)
        finally:
            running.stop()
        system.prepared = measurement.steps[-1]
        broker_at_rest(broker)
    running = system.start()
    try:
        return figures | measurement.run(running, broker, warm, seconds)
    finally:
        running.stop()
        broker_at_rest(broker)
