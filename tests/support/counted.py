"""Relays that count: what is alive in the process, or the frames that pika decodes and the reads and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

from tests.support.harness import RelayProcess, eventually, plain_environment

__all__ = ["Census", "CountedRelay", "FrameCountingRelay"]

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


class FrameCountingRelay:
    """A relay that runs `counted_frames`: it counts frames that pika decodes, and its reads and writes."""

    def __init__(self, directory: Path, url: str) -> None:
        self.log_path = directory / "relay.log"
        arguments = ["serve", f"--broker-url={url}", "--server-port=0", "--broker-persistent=no"]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.counted_frames", *arguments],
                cwd=Path(__file__).parents[2],
                env=plain_environment(),
                stdout=subprocess.PIPE,
                stderr=log,
            )
        line = eventually(lambda: [row for row in self._log() if "listening on http://" in row])[0]
        self.url = "ws" + line.rpartition("http")[2]

    def _log(self) -> list[str]:
        return self.log_path.read_text().splitlines()

    def connect(self, user: str) -> WebSocket:
        """Open a socket of a user."""
        return create_connection(f"{self.url}/{user}", timeout=30)

    def stop(self) -> dict[str, int]:
        """Stop it, and return its counts."""
        self._process.terminate()
        output, _ = self._process.communicate(timeout=30)
        counts: dict[str, int] = json.loads(output.splitlines()[-1])
        return counts
