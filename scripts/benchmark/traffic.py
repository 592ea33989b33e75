"""Messages between pairs of users: what they cost in CPU time, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from benchmark.clients import Client, Loop
from benchmark.generator import closed_loop, connect, open_loop, probe
from benchmark.pairs import Meter, Pair
from benchmark.systems import Running
from benchmark.usage import cpu_seconds, machine_cpu_seconds

__all__ = ["Figures", "Mark", "Traffic", "broker_at_rest"]

#: What one measurement found: key -> number, None where it does not apply, text for `error` and `note`.
Figures = dict[str, Any]

#: From this share of a core on, the load generator may be what is measured.
NEAR_A_CORE = 0.9
#: From this share of a core on, what else the machine does is said beside the figures.
MUCH_OF_OTHERS = 0.25


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


def broker_at_rest(broker: list[int], seconds: float = 60.0, tend: Callable[[float], None] = time.sleep) -> None:
    """Wait until the broker is done with what it was given: below a tenth of a core for half a second."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begun, before = time.monotonic(), cpu_seconds(broker)
        tend(0.5)
        if cpu_seconds(broker) - before < 0.1 * (time.monotonic() - begun):
            return


def _couple(loop: Loop, running: Running, count: int) -> tuple[list[Client], list[Client]]:
    """Connect senders and receivers whose messages arrive."""
    names = [f"s{number:05d}" for number in range(count)] + [f"r{number:05d}" for number in range(count)]
    clients = connect(loop, running.protocol, running.address, names)
    senders, receivers = clients[:count], clients[count:]
    probe(loop, list(zip(senders, receivers, strict=True)))
    return senders, receivers


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
