"""What is measured: imrelay in some settings, and of two trees where wanted; its peers; how each is started."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pika

from benchmark.broker import Broker
from benchmark.installing import PEERS, ROOT, Installer, Unavailable
from benchmark.protocols import MqttProtocol, PlainProtocol, SocketIoProtocol, StompProtocol
from benchmark.usage import family

__all__ = ["BEFORE", "NAMES", "OURS", "TITLES", "Running", "System", "Trees", "make_systems", "with_before"]

EXCHANGE = "direct_message"
#: imrelay's own lines: the short name for `--systems`, and what it is.
OURS = {
    "imrelay": "imrelay",
    "unanswered": "imrelay, messages without id",
    "transient": "imrelay, no id, persistent = no",
}
#: What the short name of a line of the tree of `--against` ends with.
BEFORE = "-before"
#: The lines that there can be, in the order of the table.
TITLES = {
    **{name + end: f"{title}{', before' if end else ''}" for name, title in OURS.items() for end in ("", BEFORE)},
    "guaranteed": "Node.js: ws, imrelay's guarantees",
    "webmqtt": "RabbitMQ Web MQTT, QoS 1",
    "node": "Node.js: the article's server",
    "webstomp": "RabbitMQ Web STOMP",
    "aiopika": "aio-pika + websockets + uvloop",
    "socketio": "Flask-SocketIO + gevent + kombu",
}
#: What `--systems` takes.
NAMES = tuple(name for name in TITLES if not name.endswith(BEFORE))
#: The plugin of RabbitMQ that serves a line of the table.
_PLUGINS = {"webstomp": "rabbitmq_web_stomp", "webmqtt": "rabbitmq_web_mqtt"}
#: Seconds for a server to listen, and for it to stop.
_START, _STOP = 60.0, 10.0


@dataclass(frozen=True)
class Trees:
    """Whose `imrelay` is measured, and the interpreter for it."""

    now: Path = ROOT
    #: The checkout that is measured beside it.
    before: Path | None = None
    python: Path = Path(sys.executable)


@dataclass
class Running:
    """A system that serves."""

    address: tuple[str, int]
    protocol: PlainProtocol
    #: Its processes; none where all of it is inside the broker.
    pids: list[int]
    stop: Callable[[], None] = lambda: None


@dataclass
class System:
    """One line of the table: how it is got, started and spoken to."""

    name: str
    amqp_url: str
    #: Where its logs are written.
    folder: Path
    #: Install what it needs and return the command that serves, or raise `Unavailable`.
    prepare: Callable[[], list[str]]
    protocol: PlainProtocol
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] | None = None
    #: Where the broker itself serves it, if it does: it has no command then.
    broker_port: int = 0
    #: It keeps something for a user who is away, so that a second connect is not a first one.
    keeps_users: bool = False
    starts: int = 0

    def ready(self) -> None:
        """Have its command at hand; installs at the first time."""
        self.command = self.prepare()

    def start(self) -> Running:
        """Start it as processes of its own and return when it listens."""
        if not self.command:
            return Running(("127.0.0.1", self.broker_port), self.protocol, [])
        self.starts += 1
        log_path = self.folder / f"{self.name}-{self.starts}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*_ending_with_us(), *self.command],
                env=_plain_environment() | {"AMQP_URL": self.amqp_url} | self.environment,
                cwd=self.folder,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

        def stop() -> None:
            process.terminate()
            try:
                process.wait(_STOP)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

        try:
            address = _listening(process, log_path)
            time.sleep(0.3)  # connections to the broker open after the port does
            return Running(address, self.protocol, family(process.pid), stop)
        except BaseException:
            stop()
            raise


def with_before(names: list[str]) -> list[str]:
    """Return the names with those of the same lines of the other tree."""
    return [name for name in TITLES if name in names or name.removesuffix(BEFORE) in names]


def make_systems(
    broker: Broker, folder: Path, installer: Installer, names: list[str], trees: Trees | None = None
) -> list[System]:
    """Describe the systems `names` on virtual hosts of their own."""
    trees = trees or Trees()
    broker.add_vhosts([f"bench-{name}" for name in names])
    made = []
    for name in names:
        url = broker.url + quote(f"bench-{name}", safe="")
        if name.removesuffix(BEFORE) in OURS:
            made.append(_imrelay(name, url, folder, trees))
        elif name in _PLUGINS:
            made.append(_plugin(name, url, folder, broker))
        else:
            made.append(_peer(name, url, folder, installer))
    return made


def _imrelay(name: str, url: str, folder: Path, trees: Trees) -> System:
    """Describe imrelay with its default settings but for a free port and room for all idle and busy sockets."""
    kind = name.removesuffix(BEFORE)
    tree = trees.before if name.endswith(BEFORE) else trees.now
    assert tree is not None
    settings = folder / "imrelay.ini"
    settings.write_text("[server]\nport = 0\nmax_connections = 20000\ndrain_timeout = 2\n")
    environment = {
        "IMRELAY_CONFIG": str(settings),
        "IMRELAY_BROKER_URL": url,
        "IMRELAY_BROKER_PERSISTENT": "no" if kind == "transient" else "yes",
        "PYTHONPATH": str(tree.resolve()),
    }
    command = [str(trees.python), "-m", "imrelay", "serve"]
    protocol = PlainProtocol(answers=kind == "imrelay")
    return System(name, url, folder, lambda: command, protocol, environment, keeps_users=True)


def _plugin(name: str, url: str, folder: Path, broker: Broker) -> System:
    """Describe what the broker itself serves."""
    port = broker.ports.get(_PLUGINS[name], 0)
    vhost = f"bench-{name}"
    protocol: PlainProtocol
    if name == "webmqtt":
        protocol = MqttProtocol(vhost, *broker.credentials)
    else:
        protocol = StompProtocol(EXCHANGE, vhost, *broker.credentials)

    def prepare() -> list[str]:
        if not port:
            raise Unavailable(f"this RabbitMQ comes without the plugin {_PLUGINS[name]}")
        # STOMP itself cannot declare it, and the plugin for MQTT publishes to `amq.topic`.
        connection = pika.BlockingConnection(pika.URLParameters(url))
        connection.channel().exchange_declare(EXCHANGE, "direct", durable=True)
        connection.close()
        return []

    return System(name, url, folder, prepare, protocol, broker_port=port, keeps_users=name == "webmqtt")


def _peer(name: str, url: str, folder: Path, installer: Installer) -> System:
    """Describe a server of `peers/`."""
    protocol = PlainProtocol()
    if name in ("guaranteed", "node"):
        program = "guaranteed.js" if name == "guaranteed" else "article.js"
        if name == "guaranteed":
            protocol = PlainProtocol(answers=True)
        environment = {"NODE_PATH": str(installer.node_modules), "NODE_ENV": "production"}
        prepare = partial(installer.node, program)
        return System(name, url, folder, prepare, protocol, environment, keeps_users=name == "guaranteed")
    if name == "socketio":
        command = ["-m", "gevent.monkey", str(PEERS / "socketio_server.py")]
        return System(name, url, folder, partial(installer.python, command), SocketIoProtocol())
    return System(name, url, folder, partial(installer.python, [str(PEERS / "asyncio_server.py")]), protocol)


def _listening(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    until = time.monotonic() + _START
    while time.monotonic() < until:
        over = process.poll()
        text = log.read_text(errors="replace")
        if found := re.search(r"listening on http://([\d.]+):(\d+)", text):
            return found[1], int(found[2])
        if over is not None:
            last = text.strip().splitlines()[-1:] or ["(nothing printed)"]
            raise Unavailable(f"ended with status {over} during its start: {last[0]}")
        time.sleep(0.05)
    raise Unavailable(f"did not listen within {_START:g} s; its log is {log}")


def _ending_with_us() -> list[str]:
    """Return the prefix of a command that makes Linux end it when this process is gone, however that happened."""
    tool = shutil.which("setpriv")
    return [tool, "--pdeathsig", "TERM"] if tool else []


def _plain_environment() -> Mapping[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("IMRELAY_")}
    kept.pop("PYTHONPATH", None)  # it is the bench's own
    return kept
