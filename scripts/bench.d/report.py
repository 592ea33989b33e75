"""What a run found, as ratios of the same turn, as a table, and beside the figures that are to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from measure import MEASUREMENTS, Crowd, Figures
from systems import TITLES

__all__ = ["TARGETS", "Results", "Target", "table", "verdicts"]

#: The system that others are given relative to.
BASE = "node"
_LOAD_COLUMNS = (
    # heading, key, digits, whether the ratio to the base stands beside it
    ("msg/s", "rate", 0, False),
    ("relay us", "relay_us", 1, True),
    ("broker us", "broker_us", 1, False),
    ("both us", "both_us", 1, True),
    ("p50 ms", "p50_ms", 2, True),
    ("p99 ms", "p99_ms", 2, True),
    ("max ms", "max_ms", 1, False),
)
_MEMORY_COLUMNS = (
    ("relay KiB", "relay_kib", 1, True),
    ("broker KiB", "broker_kib", 1, False),
    ("connects/s", "connects", 0, True),
    ("us of relay", "connect_relay_us", 0, True),
    ("us of broker", "connect_broker_us", 0, False),
    ("new users/s", "first_connects", 0, False),
)
_COST_COLUMNS = (
    ("us at 10", "relay_us_10", 1, False),
    ("us at 1,000", "relay_us_1000", 1, False),
    ("us at 10,000", "relay_us_10000", 1, False),
    ("growth", "relay_us_growth", 2, False),
    ("both grew", "both_us_growth", 2, False),
)


class Results:
    """All figures of a run: measurement -> system -> one entry a turn (None where that turn has none)."""

    def __init__(self) -> None:
        self.turns: dict[str, dict[str, list[Figures | None]]] = {}

    def add(self, measurement: str, system: str, turn: int, figures: Figures) -> None:
        """Keep the figures of one measurement of a turn (0, 1, …)."""
        entries = self.turns.setdefault(measurement, {}).setdefault(system, [])
        entries += [None] * (turn + 1 - len(entries))
        entries[turn] = figures

    def median(self, measurement: str, system: str, key: str) -> float | None:
        """Return the median over the turns; None where no turn has the figure."""
        values = [figures.get(key) for figures in self._of(measurement, system) if figures]
        values = [value for value in values if value is not None]
        return statistics.median(values) if values else None

    def ratio(self, measurement: str, system: str, key: str, base: str = BASE, base_key: str = "") -> float | None:
        """Return the median of the ratios to `base`, each of two figures of the same turn."""
        ratios = []
        for mine, other in zip(self._of(measurement, system), self._of(measurement, base), strict=False):
            if mine and other and mine.get(key) is not None and other.get(base_key or key):
                ratios.append(mine[key] / other[base_key or key])
        return statistics.median(ratios) if ratios else None

    def texts(self, measurement: str, system: str, key: str) -> list[str]:
        """Return the different texts (`error`, `note`) of the turns, in order."""
        found = [figures[key] for figures in self._of(measurement, system) if figures and figures.get(key)]
        return list(dict.fromkeys(found))

    @property
    def has_errors(self) -> bool:
        """Whether anything went wrong in any measurement."""
        return any(self.texts(name, system, "error") for name, found in self.turns.items() for system in found)

    def as_json(self) -> dict[str, Any]:
        """Return medians, ratios and the figures of each turn, ready for JSON."""
        return {
            measurement: {
                system: {
                    "median": {key: self.median(measurement, system, key) for key in _keys(entries)},
                    f"ratio_to_{BASE}": {key: self.ratio(measurement, system, key) for key in _keys(entries)},
                    "turns": entries,
                }
                for system, entries in systems.items()
            }
            for measurement, systems in self.turns.items()
        }

    def _of(self, measurement: str, system: str) -> list[Figures | None]:
        return self.turns.get(measurement, {}).get(system, [])


@dataclass(frozen=True)
class Target:
    """A figure that imrelay is to reach: an absolute one, or (with `base`) the ratio to another system's."""

    measurement: str
    system: str
    key: str
    limit: float
    text: str
    base: str = ""
    #: The value is to be at most the limit; else at least.
    is_most: bool = True

    def value(self, results: Results) -> float | None:
        """Return what was measured; None where it was not."""
        if self.base:
            return results.ratio(self.measurement, self.system, self.key, self.base)
        return results.median(self.measurement, self.system, self.key)


_RELAY, _BOTH = "relay CPU to Node's", "relay and broker CPU"
_INBOX = "connects a second of users who have an inbox"

#: Set for imrelay in either setting.
_COMMON = (
    ("window64", "relay_us", 0.5, f"{_RELAY}, 64 in flight", BASE),
    ("window8", "relay_us", 0.65, f"{_RELAY}, 8 in flight", BASE),
    ("window1", "relay_us", 1.0, f"{_RELAY}, 1 in flight", BASE),
    ("pairs100", "relay_us", 0.6, f"{_RELAY}, 100 pairs with 4 in flight", BASE),
    ("size16k", "relay_us", 0.6, f"{_RELAY}, 16 KiB, 8 in flight", BASE),
    ("window64", "both_us", 0.7, f"{_BOTH} to Web STOMP's, 64 in flight", "webstomp"),
    ("open1000", "p50_ms", 1.0, "p50 to Node's, 1,000 messages a second", BASE),
    ("open1000", "p99_ms", 1.0, "p99 to Node's, 1,000 messages a second", BASE),
    ("memory", "relay_kib", 24.0, "KiB per idle socket, of 2,000", ""),
    ("crowd", "relay_kib", 24.0, "KiB per idle socket, of 10,000", ""),
    ("crowd", "relay_us_growth", 1.15, "relay CPU at 10,000 users to that at 10", ""),
)

TARGETS = (
    *(Target(measurement, system, *rest) for system in ("imrelay", "transient") for measurement, *rest in _COMMON),
    Target("window64", "imrelay", "both_us", 1.2, f"{_BOTH} to Node's, 64 in flight", BASE),
    Target("window64", "transient", "both_us", 0.85, f"{_BOTH} to Node's, 64 in flight", BASE),
    *(
        Target(measurement, system, "connects", 1200.0, f"{_INBOX}, {count}", is_most=False)
        for system in ("imrelay", "transient")
        for measurement, count in (("memory", "2,000"), ("crowd", "10,000 in one process"))
    ),
)


def verdicts(results: Results) -> list[dict[str, Any]]:
    """Return each target of what was measured, with its value (None: no base to compare) and if it was reached."""
    found = []
    for target in TARGETS:
        if target.system not in results.turns.get(target.measurement, {}):
            continue
        value = target.value(results)
        reached = None
        if value is not None:
            reached = value <= target.limit if target.is_most else value >= target.limit
        found.append(asdict(target) | {"value": value, "reached": reached})
    return found


def table(results: Results, left_out: Mapping[str, str]) -> str:
    """Return the whole report as text."""
    lines = [
        "Medians of the turns; xN is the median of the ratios to the Node.js server of the same turn.",
        "us: microseconds of CPU per message (in the tables of idle sockets: per connect); load: the load",
        "generator's share of a core; new users: who connect for the first time, so that an inbox is made.",
    ]
    for measurement, systems in results.turns.items():
        lines += ["", f"{measurement}: {MEASUREMENTS[measurement].title}"]
        columns: Sequence[tuple[str, str, int, bool]] = _LOAD_COLUMNS
        if isinstance(MEASUREMENTS[measurement], Crowd):
            columns = _MEMORY_COLUMNS + (_COST_COLUMNS if measurement == "crowd" else ())
        lines += _block(results, measurement, [name for name in TITLES if name in systems], columns)
    for system, reason in left_out.items():
        lines += ["", f"left out: {TITLES[system]}: {reason}"]
    lines += ["", "Figures to reach:"]
    for verdict in verdicts(results):
        sign = "<=" if verdict["is_most"] else ">="
        value = "-" if verdict["value"] is None else f"{verdict['value']:,.2f}"
        reached = {None: "not measured", True: "reached", False: "NOT REACHED"}[verdict["reached"]]
        what = f"{verdict['text']} ({TITLES[verdict['system']]})"
        lines.append(f"  {reached:<12} {value:>9} {sign} {verdict['limit']:<6,g} {what}")
    return "\n".join(lines)


def _block(
    results: Results, measurement: str, systems: list[str], columns: Sequence[tuple[str, str, int, bool]]
) -> Iterator[str]:
    """Yield the lines of one measurement."""
    has_load = columns is _LOAD_COLUMNS
    head = f"  {'':<32}"
    for heading, _, _, is_relative in columns:
        head += f" {heading:>12}" + (" " * 6 if is_relative else "")
    yield (head + ("  load" if has_load else "")).rstrip()
    for system in systems:
        line = f"  {TITLES[system]:<32}"
        for _, key, digits, is_relative in columns:
            value = results.median(measurement, system, key)
            line += f" {'-' if value is None else f'{value:,.{digits}f}':>12}"
            if is_relative:
                ratio = results.ratio(measurement, system, key)
                line += f" {'' if ratio is None else f'x{ratio:.2f}':<5}"
        share = results.median(measurement, system, "load_cpu")
        yield (line + (f"  {share:>4.0%}" if has_load and share is not None else "")).rstrip()
        for text in results.texts(measurement, system, "error"):
            yield f"    WRONG: {text}"
        if notes := results.texts(measurement, system, "note"):
            yield f"    note: {notes[0]}" + (" (and so in other turns)" if notes[1:] else "")


def _keys(entries: Sequence[Figures | None]) -> list[str]:
    found = {key for figures in entries if figures for key, value in figures.items() if not isinstance(value, str)}
    return sorted(found)
