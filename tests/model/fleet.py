"""The relays of the model: processes that all examples share, each with a way to its broker that can be cut."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.harness import Node, RelayProcess, VirtualHost, eventually, plain_environment
from tests.support.proxy import Proxy

__all__ = ["PROFILES", "ROOT", "WITNESSES", "Fleet", "ModelRelay", "Profile"]

#: The folder of the package and its tests.
ROOT = Path(__file__).parents[2]
#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 60.0
#: Small limits, so that few messages reach them.
_COMMON: dict[str, object] = {
    "server-host": "127.0.0.1",
    "server-port": 0,
    "server-drain-timeout": 8,
    "broker-prefetch": 3,
    "broker-publish-queue": 8,
    "broker-publish-timeout": 45,
    "inbox-max-length": 6,
}


@dataclass(frozen=True)
class Profile:
    """The relays of one example, by name, and what is particular to them."""

    relays: tuple[str, ...]
    #: With fewer messages in it no inbox is full. A quorum queue that has been full takes nothing until it is down
    #: to 80 % of its limit, and hears of acknowledgements with delay.
    max_length: int = 6
    refusing: frozenset[str] = frozenset()
    #: Whether a relay may not know who else stands by at an inbox.
    begins_live: bool = False
    #: Relays whose `publish_timeout` is so short that senders are told of a broker that is stalled, lost or slow.
    hasty: frozenset[str] = frozenset()


#: Holds one large message for a slow browser, and not a second one.
_NARROW: dict[str, object] = {"websocket-max-send-buffer": 30_000}
#: Relay -> what it has beside `_COMMON`.
_SETTINGS: dict[str, dict[str, object]] = {
    "A": {},
    "B": _NARROW,
    "changed": {"inbox-max-length": 7, "inbox-expires": 86_400},
    "quorum1": {"inbox-queue-type": "quorum"},
    "quorum2": {"inbox-queue-type": "quorum"} | _NARROW,
    "refusing": {"inbox-unknown-recipient": "refuse", "broker-persistent": "no"},
    "hasty": {"broker-publish-timeout": 0.5} | _NARROW,
}
PROFILES: dict[str, Profile] = {
    "one relay": Profile(("A",)),
    "two relays": Profile(("A", "B")),
    "changed settings": Profile(("A", "changed"), begins_live=True),
    "quorum": Profile(("quorum1", "quorum2"), max_length=3, begins_live=True),
    "refusing": Profile(("refusing", "A"), refusing=frozenset({"refusing"})),
    "hasty": Profile(("hasty", "A"), hasty=frozenset({"hasty"})),
    "queue type changed": Profile(("A", "quorum1"), max_length=3, begins_live=True),
}
#: The first relay of each profile is never killed or stopped: what it takes after hours tells of leaks.
WITNESSES = tuple(dict.fromkeys(profile.relays[0] for profile in PROFILES.values()))


class ModelRelay(RelayProcess):
    """A relay whose wall clock can be set, and whose link to the broker can be stalled and lost."""

    def __init__(self, directory: Path, url: str, settings: dict[str, object], root: Path = ROOT) -> None:
        """Start it, of the package that stands in `root`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.log_path = directory / "relay.log"
        self.host, self.port = "", 0
        self.link = Proxy(url)
        arguments = [f"--{key}={value}" for key, value in (settings | {"broker-url": self.link.url}).items()]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.model.relay_program", "serve", *arguments],
                cwd=directory,  # where no config.ini is
                env=plain_environment(PYTHONPATH=str(root)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.is_ready = False
        self._told = 0

    def wait_until_ready(self) -> None:
        """Wait until it listens and can reach its broker."""
        if not self.port:
            self.wait_until_listening()
        eventually(self._look_ready, PATIENCE)

    def _look_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=PATIENCE):
                return True
        except urllib.error.HTTPError as exc:
            exc.close()
            return False

    def set_clock(self, seconds: float) -> None:
        """Set how far its wall clock is off."""
        self._ask(f"clock {seconds}")

    def census(self) -> dict[str, dict[str, int]]:
        """Count what is alive in it."""
        return dict(self._ask("census"))

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def pause(self) -> None:
        """Stop its process without its knowing (SIGSTOP)."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def news(self) -> str:
        """Return what it has logged since the last call."""
        with self.log_path.open("rb") as log:
            log.seek(self._told)
            news = log.read()
        self._told += len(news)
        return news.decode(errors="replace")

    def discard(self) -> None:
        """Kill it with -9, where it has not ended, and close what leads to it."""
        self.process.kill()
        self.process.communicate()
        self.link.close()


@dataclass
class Fleet:
    """Starts relays as they are asked for, and new ones in place of those that were killed or stopped."""

    node: Node
    vhost: VirtualHost
    directory: Path
    running: dict[str, ModelRelay] = field(default_factory=dict)
    #: How many relays have been started.
    started: int = 0
    #: Where the package stands.
    root: Path = ROOT

    def start(self, names: tuple[str, ...]) -> None:
        """Begin to start these relays; returns at once."""
        for name in names:
            if name not in self.running:
                self.started += 1
                directory = self.directory / f"{name}-{self.started}"
                self.running[name] = ModelRelay(directory, self.vhost.url, _COMMON | _SETTINGS[name], self.root)

    def get(self, name: str) -> ModelRelay:
        """Return a relay that can be used."""
        self.start((name,))
        relay = self.running[name]
        if not relay.is_ready:
            relay.wait_until_ready()
            relay.is_ready = True
        return relay

    def replace(self, name: str) -> None:
        """Discard a relay that was killed or has stopped, and begin to start its successor."""
        self.running.pop(name).discard()
        self.start((name,))

    def close(self) -> None:
        """End all of them."""
        for relay in self.running.values():
            relay.discard()
        self.running.clear()
