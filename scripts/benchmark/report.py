"""What a run found, as ratios of the same turn, as a table, and beside the figures that are to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmark.crowd import Crowd
from benchmark.measurements import MEASUREMENTS
from benchmark.systems import BEFORE, TITLES
from benchmark.traffic import Figures

__all__ = ["RIVALS", "TARGETS", "Results", "Target", "table", "verdicts"]

_OTHERS = ("guaranteed", "webmqtt", "node", "webstomp", "aiopika", "socketio")
#: To which systems the figures of one are given as ratios, beside itself in the other tree.
RIVALS = {
    "imrelay": _OTHERS,
    "unanswered": ("node", "webstomp"),
    "transient": ("node", "webstomp"),
}
# heading, key, digits, whether the block of ratios has it
_LOAD_COLUMNS = (
    ("msg/s", "rate", 0, True),
    ("relay us", "relay_us", 1, True),
    ("broker us", "broker_us", 1, True),
    ("both us", "both_us", 1, True),
    ("p50 ms", "p50_ms", 2, True),
    ("p99 ms", "p99_ms", 2, True),
    ("max ms", "max_ms", 1, False),
    ("load", "load_cpu", 2, False),
)
_MEMORY_COLUMNS = (
    ("relay KiB", "relay_kib", 1, True),
    ("broker KiB", "broker_kib", 1, True),
    ("both KiB", "both_kib", 1, True),
    ("collected", "both_collected_kib", 1, True),
    ("known KiB", "known_kib", 1, True),
    ("kept KiB", "kept_kib", 1, True),
    ("connects/s", "connects", 0, True),
    ("us of relay", "connect_relay_us", 0, True),
    ("us of broker", "connect_broker_us", 0, True),
    ("new users/s", "first_connects", 0, True),
)
_COST_COLUMNS = (
    ("us at 10", "relay_us_10", 1, False),
    ("us at 1,000", "relay_us_1000", 1, False),
    ("us at 10,000", "relay_us_10000", 1, True),
    ("growth", "relay_us_growth", 2, False),
    ("both grew", "both_us_growth", 2, False),
)
_Columns = Sequence[tuple[str, str, int, bool]]
#: Characters of a line's title.
_WIDTH = 36


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

    def ratio(self, measurement: str, system: str, key: str, base: str) -> float | None:
        """Return the median of the ratios to the system `base`, each of two figures of the same turn."""
        ratios = []
        for mine, other in zip(self._of(measurement, system), self._of(measurement, base), strict=False):
            if mine and other and mine.get(key) is not None and other.get(key):
                ratios.append(mine[key] / other[key])
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
                    "ratios": {
                        base: {key: self.ratio(measurement, system, key, base) for key in _keys(entries)}
                        for base in rivals(system)
                        if base in systems
                    },
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


_SAME, _ARTICLE = "Node.js with the same guarantees", "the article's Node.js server"
_INFLIGHT = (("window64", 64), ("window8", 8), ("window1", 1))

TARGETS = (
    *(
        Target(
            name, "imrelay", "relay_us", limit, f"relay CPU to that of {_SAME}, {count} in flight", "guaranteed"
        )
        for (name, count), limit in zip(_INFLIGHT, (0.45, 0.60, 0.80), strict=True)
    ),
    *(
        Target(
            name, "imrelay", "both_us", limit, f"with the broker's CPU to {_SAME}, {count} in flight", "guaranteed"
        )
        for (name, count), limit in zip(_INFLIGHT, (0.65, 0.75, 0.90), strict=True)
    ),
    *(
        Target("open1000", "imrelay", f"{key}_ms", 1.0, f"{key} to {_SAME}, 1,000 messages a second", "guaranteed")
        for key in ("p50", "p99")
    ),
    *(
        Target(
            name, "unanswered", "relay_us", limit, f"relay CPU to that of {_ARTICLE}, {count} in flight", "node"
        )
        for (name, count), limit in zip(_INFLIGHT, (0.60, 0.70, 1.10), strict=True)
    ),
    Target(
        "memory", "imrelay", "connects", 1.5, "connects a second to those of before", f"imrelay{BEFORE}", False
    ),
    Target("memory", "imrelay", "relay_kib", 17.0, "KiB per idle socket in the relay, of 2,000"),
    Target("memory", "imrelay", "both_kib", 75.0, "KiB per idle socket in relay and broker, of 2,000"),
    Target("crowd", "imrelay", "relay_kib", 17.0, "KiB per idle socket in the relay, of 10,000"),
    Target("crowd", "imrelay", "both_kib", 75.0, "KiB per idle socket in relay and broker, of 10,000"),
    Target("crowd", "imrelay", "relay_us_growth", 1.15, "relay CPU at 10,000 users to that at 10"),
)


def rivals(system: str) -> list[str]:
    """Return the systems that this one is given as a ratio to: itself in the other tree, and others."""
    return [system + BEFORE, *RIVALS.get(system, ())]


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
        "Medians of the turns; a ratio is the median of the ratios to the other's figure of the same turn.",
        "us: microseconds of CPU per message (in the tables of idle sockets: per connect); load: the load",
        "generator's share of a core. KiB are of one idle socket, in the broker with all that is kept for its",
        "user; collected: both after a garbage collection in the broker; known: the broker's for who had an inbox",
        "before; kept: the broker's for who is away; new users: who connect for the first time.",
    ]
    for measurement, systems in results.turns.items():
        lines += ["", f"{measurement}: {MEASUREMENTS[measurement].title}"]
        columns: _Columns = _LOAD_COLUMNS
        if isinstance(MEASUREMENTS[measurement], Crowd):
            columns = _MEMORY_COLUMNS + (_COST_COLUMNS if measurement == "crowd" else ())
        names = [name for name in TITLES if name in systems]
        lines += _figures(results, measurement, names, columns)
        lines += _ratios(results, measurement, names, columns)
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


def _figures(results: Results, measurement: str, systems: list[str], columns: _Columns) -> Iterator[str]:
    """Yield the lines of one measurement: each system's medians, and what was wrong."""
    yield _row("", [heading for heading, _, _, _ in columns])
    for system in systems:
        medians = [(results.median(measurement, system, key), digits) for _, key, digits, _ in columns]
        cells = ["-" if value is None else f"{value:,.{digits}f}" for value, digits in medians]
        yield _row(TITLES[system], cells)
        for text in results.texts(measurement, system, "error"):
            yield f"    WRONG: {text}"
        if notes := results.texts(measurement, system, "note"):
            yield f"    note: {notes[0]}" + (" (and so in other turns)" if notes[1:] else "")


def _ratios(results: Results, measurement: str, systems: list[str], columns: _Columns) -> Iterator[str]:
    """Yield the lines of one measurement that compare imrelay with others."""
    compared = [column for column in columns if column[3]]
    for system in systems:
        found = [
            (base, [results.ratio(measurement, system, key, base) for _, key, _, _ in compared])
            for base in rivals(system)
            if base in systems
        ]
        if system not in RIVALS or not found:
            continue
        yield _row(f"{TITLES[system]}: ratio to", [heading for heading, *_ in compared])
        for base, values in found:
            yield _row(f"  {TITLES[base]}", ["-" if value is None else f"x{value:.2f}" for value in values])


def _row(title: str, cells: list[str]) -> str:
    return f"  {title:<{_WIDTH}}" + "".join(f" {cell:>12}" for cell in cells)


def _keys(entries: Sequence[Figures | None]) -> list[str]:
    found = {key for figures in entries if figures for key, value in figures.items() if not isinstance(value, str)}
    return sorted(found)
