"""Shows what each connection, channel, queue, exchange, binding and consumer takes of RabbitMQ's memory.

It starts a node of its own, opens many of each kind, one kind after the other, and reads the node's memory before
and after, by Erlang's account: at once, when the node has been idle for some seconds (its processes hibernate by
then), and after a garbage collection of all its processes. Then it does the same with whole users, as imrelay
declares them and in leaner ways. All figures are KiB for one of the kind.

PSS, which the operating system counts, is rough: a node has memory to spare at its start, and what one kind gave
back the next one takes. Of a connection, Erlang counts buffers of some MiB that it never touches.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.broker import Broker
from benchmark.broker_objects import LAYOUTS, PARTS, Maker
from benchmark.child_process import add_node_options, end_on_signals, node_environment
from benchmark.traffic import broker_at_rest
from benchmark.usage import resident_kib

__all__ = ["main", "parse", "row", "shares"]

_HEAD = ("at once", "idle", "collected", "processes", "tables", "PSS")


@dataclass(frozen=True, slots=True)
class Account:
    """The node's memory in KiB: all of Erlang's account, its processes, its tables; and the system's (PSS)."""

    total: float
    processes: float
    tables: float
    resident: float

    @classmethod
    def now(cls, node: Broker) -> Account:
        """Read it."""
        found = node.evaluate("[erlang:memory(K) div 1024 || K <- [total, processes, ets]]")
        return cls(*(float(one) for one in found.strip("[]").split(",")), resident_kib(node.pids))


#: Erlang: for each kind of process, by the function that it runs: how many there are and the bytes that they have.
_BY_FUNCTION = """
[io:format("~s:~s ~b ~b~n", [M, F, N, B]) || {{M, F, _}, {N, B}} <- maps:to_list(lists:foldl(fun(P, All) ->
    case process_info(P, memory) of
        {memory, B} -> maps:update_with(proc_lib:translate_initial_call(P), fun({N, A}) -> {N + 1, A + B} end,
            {1, B}, All);
        undefined -> All
    end end, #{}, processes()))], ok"""


def processes(node: Broker) -> dict[str, tuple[int, float]]:
    """Return the node's processes by the function that each runs: their number, and the KiB of all of them."""
    found = {}
    for line in node.evaluate(" ".join(_BY_FUNCTION.split())).splitlines():
        if len(fields := line.split()) == 3:
            found[fields[0]] = int(fields[1]), int(fields[2]) / 1024
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="scripts/broker-memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="of each kind; default: %(default)s")
    parser.add_argument(
        "--idle", type=float, default=12.0, metavar="S", help="seconds until idle; default: %(default)s"
    )
    parser.add_argument("--only", choices=("parts", "users"), help="one of the two tables")
    parser.add_argument("--match", default="", metavar="TEXT", help="lines that contain this alone (users only)")
    parser.add_argument("--processes", action="store_true", help="show the Erlang processes of each kind")
    add_node_options(parser)
    options = parser.parse_args(arguments)
    if not 1 <= options.count <= 10_000:
        parser.error("--count: from 1 to 10000")
    return options


def measure(
    node: Broker, maker: Maker, make: Callable[[Maker, int], object], count: int, idle: float
) -> list[float]:
    """Make `count` objects; return what one takes, in the order of the table's head."""
    before = Account.now(node)
    for number in range(count):
        make(maker, number)
    at_once = Account.now(node)
    time.sleep(idle)
    broker_at_rest(node.pids)
    later = Account.now(node)
    node.collect_garbage()
    after = Account.now(node)
    return [
        (new - old) / count
        for new, old in (
            (at_once.total, before.total),
            (later.total, before.total),
            (after.total, before.total),
            (after.processes, before.processes),
            (after.tables, before.tables),
            (after.resident, before.resident),
        )
    ]


def shares(
    before: Mapping[str, tuple[int, float]], after: Mapping[str, tuple[int, float]], count: int
) -> Iterator[str]:
    """Yield a line for each kind of process that `count` objects brought: how many each has, and their KiB."""
    for function, (number, kib) in sorted(after.items(), key=lambda item: -item[1][1]):
        number_before, kib_before = before.get(function, (0, 0.0))
        if number - number_before >= count / 20:
            each = (number - number_before) / count
            yield f"    {each:6.2f} processes, {(kib - kib_before) / count:6.2f} KiB together: {function}"


def row(title: str, cells: Sequence[str | float]) -> str:
    """Return a line of the table."""
    shown = [cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells]
    return f"{title:<42}" + "".join(f"{cell:>11}" for cell in shown)


def main(arguments: list[str]) -> int:
    """Print a line for each kind, as it is measured."""
    options = parse(arguments)
    end_on_signals()
    tables = {"parts": PARTS, "users": LAYOUTS}
    for name in tables if options.only is None else [options.only]:
        with tempfile.TemporaryDirectory(prefix="imrelay-memory-") as folder:
            # The node's own collector, which comes about once a minute, would blur the first two columns.
            settings = ["background_gc_enabled = false", *options.set]
            node = Broker(Path(folder) / "broker", settings=settings, extra=node_environment(options))
            try:
                node.start()
                print(f"KiB for one of {options.count}; RabbitMQ {node.control('version')}", flush=True)
                print_table(name, tables[name], node, options)
            finally:
                node.stop()
    return 0


def print_table(
    name: str, rows: Mapping[str, Callable[[Maker, int], object]], node: Broker, options: argparse.Namespace
) -> None:
    """Measure and print one line after the other."""
    maker = Maker(node.url)
    print(row(name, _HEAD), flush=True)
    for title, make in rows.items():
        if name == "users" and options.match not in title:
            continue
        node.collect_garbage()
        before = processes(node)
        print(row(title, measure(node, maker, make, options.count, options.idle)), flush=True)
        if options.processes:
            for line in shares(before, processes(node), options.count):
                print(line, flush=True)
    maker.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
