"""The run's own RabbitMQ node: imrelay's private one, with Web STOMP and Web MQTT where they are installed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmark.usage import family
from imrelay.private_node.installation import find_scripts
from imrelay.private_node.node import PrivateBroker

__all__ = ["Broker"]

#: What a plugin that is started needs to be told: the port of its WebSockets is filled in.
_SETTINGS = {
    "rabbitmq_web_stomp": (
        "stomp.listeners.tcp = none",
        "web_stomp.tcp.ip = 127.0.0.1",
        "web_stomp.tcp.port = {port}",
    ),
    "rabbitmq_web_mqtt": (
        "mqtt.listeners.tcp = none",
        "mqtt.allow_anonymous = false",
        # As many unacknowledged messages as imrelay and the Node.js server allow; by default 10.
        "mqtt.prefetch = 100",
        "web_mqtt.tcp.ip = 127.0.0.1",
        "web_mqtt.tcp.port = {port}",
    ),
}


class Broker(PrivateBroker):
    """A private node with plugins, each of which listens for WebSockets on a port of its own."""

    def __init__(
        self,
        data_dir: Path,
        ports: dict[str, int] | None = None,
        settings: Sequence[str] = (),
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Describe a node in `data_dir`.

        Args:
            data_dir: Its folder, which is empty or not there.
            ports: The port of each plugin that is wanted.
            settings: Lines for its configuration file.
            extra: What its environment has besides.
        """
        super().__init__(data_dir)
        wanted = ports or {}
        #: The ports of the plugins that this RabbitMQ has.
        self.ports = {plugin: port for plugin, port in wanted.items() if _is_installed(plugin)}
        self._settings = list(settings)
        self._extra = dict(extra or {})

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the node, with a list of plugins of its own."""
        return (
            super().environment | {"RABBITMQ_ENABLED_PLUGINS_FILE": str(self.data_dir / "plugins")} | self._extra
        )

    @property
    def pids(self) -> list[int]:
        """The node's processes; only while it runs."""
        assert self.pid is not None
        return family(self.pid)

    @property
    def credentials(self) -> tuple[str, str]:
        """The name and the password of the node's only user."""
        found = re.match(r"amqp://([^:]+):([^@]+)@", self.url)
        assert found is not None
        return found[1], found[2]

    def start(self) -> None:
        """Start the node with its plugins."""
        folder = self.data_dir / "conf.d"
        folder.mkdir(parents=True, mode=0o700)
        (self.data_dir / "plugins").write_text(f"[{','.join(self.ports)}].\n")
        lines = [line.format(port=port) for plugin, port in self.ports.items() for line in _SETTINGS[plugin]]
        (folder / "bench.conf").write_text("".join(f"{line}\n" for line in (*lines, *self._settings)))
        # The private node takes over a folder that is empty, or one that it has used.
        (self.data_dir / "relay.lock").touch(mode=0o600)
        super().start()

    def add_vhosts(self, names: Sequence[str]) -> None:
        """Create virtual hosts in which the node's user may do everything."""
        user, _ = self.credentials
        steps = "".join(
            f'rabbit_vhost:add(<<"{name}">>, <<"bench">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"{user}">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"bench">>), '
            for name in names
        )
        self.evaluate(steps + "ok")

    def memory_kib(self) -> float:
        """Return what the node's Erlang has allocated for all that it holds, in KiB."""
        return int(self.evaluate("erlang:memory(total)")) / 1024

    def collect_garbage(self) -> None:
        """Have each process of the node collect its garbage, as `background_gc_enabled` does at times."""
        self.evaluate("[garbage_collect(P) || P <- processes()], ok")

    def evaluate(self, expression: str) -> str:
        """Run an Erlang expression (without its dot) in the node; return how Erlang prints its value."""
        return self.control("eval", expression + ".")

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` and return what it printed."""
        return subprocess.run(
            [str(self.scripts / "rabbitmqctl"), "--quiet", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=True,
        ).stdout.strip()


def _is_installed(plugin: str) -> bool:
    folder = find_scripts()
    places = (folder.parent, *folder.parent.glob("lib/rabbitmq_server-*"))
    return any(list(place.glob(f"plugins/{plugin}-*")) for place in places)
