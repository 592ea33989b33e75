"""Where a relay's CPU time goes, module by module: what `scripts/relay-profile` runs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmark.broker import Broker
from benchmark.child_process import end_on_signals
from benchmark.installing import ROOT, Installer
from benchmark.measurements import MEASUREMENTS
from benchmark.systems import System, Trees, make_systems
from benchmark.traffic import Figures, Traffic

_SAMPLED = Path(__file__).resolve().parent / "sampled_relay.py"
WINDOWS = ("window1", "window8", "window64")
#: Modules with a smaller share are counted together.
_SMALL = 0.01


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/relay-profile", description=__doc__)
    parser.add_argument("--only", default="window1,window64", help=f"of {','.join(WINDOWS)}; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each; default: %(default)s")
    parser.add_argument("--tree", type=Path, default=ROOT, help="a checkout to profile; default: this one")
    parser.add_argument(
        "--persistent", action="store_true", help="with persistent = yes and an answer to each message"
    )
    parser.add_argument("--functions", action="store_true", help="show functions, not modules")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := sorted(set(options.only) - set(WINDOWS)):
        parser.error(f"--only: {', '.join(unknown)} is not one of {', '.join(WINDOWS)}")
    if not (options.tree / "imrelay").is_dir():
        parser.error(f"--tree: {options.tree} has no imrelay/")
    return options


def profile(system: System, broker: list[int], window: str, seconds: float) -> tuple[Figures, dict[str, int]]:
    """Run one measurement on a fresh relay that samples itself; return its figures and samples."""
    found = system.folder / f"samples-{window}"
    system.environment["SAMPLES"] = str(found)
    running = system.start()
    measurement = MEASUREMENTS[window]
    assert isinstance(measurement, Traffic)
    try:
        os.kill(running.pids[0], signal.SIGUSR1)
        figures = measurement.run(running, broker, 1.0, seconds)
    finally:
        running.stop()
    return figures, json.loads(found.read_text())


def table(title: str, figures: Figures, samples: dict[str, int], functions: bool) -> str:
    """Return the shares in descending order, in percent and in microseconds per message."""
    total = sum(number for name, number in samples.items() if ":" not in name)
    rows = sorted(((number, name) for name, number in samples.items() if (":" in name) is functions), reverse=True)
    lines = [f"{title}: {figures['relay_us']:.1f} us of CPU per message, {total} samples"]
    small = 0
    for number, name in rows:
        if number < _SMALL * total:
            small += number
        else:
            lines.append(f"  {number / total:6.1%} {number / total * figures['relay_us']:6.1f} us  {name}")
    lines.append(f"  {small / total:6.1%} {small / total * figures['relay_us']:6.1f} us  all others")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print a table for each window."""
    options = parse(arguments)
    end_on_signals()
    with tempfile.TemporaryDirectory(prefix="imrelay-profile-") as temporary:
        folder = Path(temporary)
        broker = Broker(folder / "broker")
        try:
            broker.start()
            name = "imrelay" if options.persistent else "transient"
            (system,) = make_systems(broker, folder, Installer(folder), [name], Trees(now=options.tree))
            system.command = [sys.executable, str(_SAMPLED), "serve"]
            for window in options.only:
                figures, samples = profile(system, broker.pids, window, options.seconds)
                print(table(MEASUREMENTS[window].title, figures, samples, options.functions), flush=True)
        finally:
            broker.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
