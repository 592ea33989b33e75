"""A relay process that tells what is alive in it, while it runs and when it has stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.harness import RelayProcess, plain_environment

__all__ = ["Census", "CountedRelay"]

#: Greenlets, our own objects, descriptors, threads and processes, each by name.
Census = dict[str, dict[str, int]]


class CountedRelay(RelayProcess):
    """A relay that can be asked what is alive in it; `environment` is what it gets beside the plain one."""

    program = "counted_relay.py"

    def __init__(self, directory: Path, arguments: list[str], **environment: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.log_path = directory / "relay.log"
        self.host, self.port, self.certificate = "", 0, ""
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(self.program)), *arguments],
                cwd=directory,
                env=plain_environment(**environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def census(self) -> Census:
        """Count what is alive now."""
        return dict(self.ask(""))

    def ask(self, question: str) -> Any:
        """Write a line to the program, and return what the JSON of its answer says."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{question}\n".encode())
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def last_census(self) -> Census:
        """Wait for its end, and return what was alive when it had stopped."""
        return dict(json.loads(self.process.communicate()[0].splitlines()[-1]))

    def kill(self) -> None:
        """Kill it with -9, where it has not ended, and close what leads to it."""
        self.process.kill()
        self.process.communicate()
