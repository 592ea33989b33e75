"""Lets the model loose on broken copies of the package, and tells which of them it finds out."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hypothesis import Phase, settings

from tests.model.breakages import PACKAGE, Breakage
from tests.model.fleet import PROFILES, ROOT, Fleet
from tests.model.machine import SUITE, Stage, run, staged
from tests.model.outside import Outside
from tests.support.harness import Node, VirtualHost

__all__ = ["try_all"]


def try_all(breakages: Sequence[Breakage], seed: int | None) -> int:
    """Try each on one broker, print a line for each; return 1 where one was not found, else 0."""
    missed = []
    with tempfile.TemporaryDirectory(prefix="breakages-") as folder:
        node = Node(Path(folder) / "data")
        try:
            for breakage in breakages:
                vhost = VirtualHost(node, breakage.name)
                vhost.create()
                tree = Path(folder) / breakage.name
                tree.mkdir()
                try:
                    if not _try(breakage, vhost, tree, seed):
                        missed.append(breakage.name)
                finally:
                    vhost.delete()
                    shutil.rmtree(tree)
        finally:
            node.stop()
    print(f"{len(breakages) - len(missed)} of {len(breakages)} found; not: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def _try(breakage: Breakage, vhost: VirtualHost, tree: Path, seed: int | None) -> bool:
    """Break a copy of the package in a folder, and run the model against its relays."""
    for name in (PACKAGE, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    breakage.apply(tree / PACKAGE)
    fleet, outside = Fleet(vhost.node, vhost, tree / "relays", root=tree), Outside(vhost)
    try:
        fleet.start(tuple(dict.fromkeys(name for profile in PROFILES.values() for name in profile.relays)))
        for name in list(fleet.running):
            fleet.get(name)
        stage = Stage(fleet, outside, shrinking=0.0)
        begun = time.monotonic()
        failure = run(staged(stage, seed), settings(SUITE, phases=[Phase.generate]))
    finally:
        outside.close()
        fleet.close()
    if failure:
        seconds = stage.failed_at - begun
        found = f"found at example {stage.failed_example}, after {seconds:.0f} s: {failure.splitlines()[0][:160]}"
    else:
        found = f"NOT FOUND in {stage.examples} examples and {time.monotonic() - begun:.0f} s"
    print(f"{breakage.name:26} {found}", flush=True)
    return bool(failure)
