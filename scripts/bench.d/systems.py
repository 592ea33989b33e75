"""What is measured: imrelay in two settings, the peers, and the one private broker that carries them all."""

from __future__ import annotations

import hashlib
import json
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
from accounts import family
from wires import PlainWire, SocketIoWire, StompWire

from imrelay.broker.installed import find_scripts
from imrelay.broker.private import PrivateBroker

__all__ = ["NAMES", "TITLES", "Broker", "Running", "System", "Unavailable", "make_systems", "versions"]

EXCHANGE = "direct_message"
#: In the order of the table: the short name for `--systems`, and what it is.
TITLES = {
    "imrelay": "imrelay",
    "transient": "imrelay, persistent = no",
    "node": "Node.js: websocket + amqplib",
    "webstomp": "RabbitMQ Web STOMP",
    "aiopika": "aio-pika + websockets + uvloop",
    "socketio": "Flask-SocketIO + gevent + kombu",
}
NAMES = tuple(TITLES)

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
_PEERS = _HERE / "peers"
#: Seconds for installing a peer's packages, for a server to listen, and for it to stop.
_INSTALL, _START, _STOP = 300.0, 60.0, 10.0


class Unavailable(Exception):
    """A system cannot be had on this machine; says why in one sentence."""


class Broker(PrivateBroker):
    """The run's own RabbitMQ node: imrelay's private one, with Web STOMP where it is installed."""

    def __init__(self, data_dir: Path, stomp_port: int) -> None:
        super().__init__(data_dir)
        self.stomp_port = stomp_port
        #: Why Web STOMP is not there; empty where it is.
        self.no_stomp = ""
        if not self._has_stomp():
            self.no_stomp = "this RabbitMQ comes without the plugin rabbitmq_web_stomp"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the node, with a list of plugins of its own."""
        return super().environment | {"RABBITMQ_ENABLED_PLUGINS_FILE": str(self.data_dir / "plugins")}

    def start(self) -> None:
        """Start the node with its plugins."""
        settings = self.data_dir / "conf.d"
        settings.mkdir(parents=True, mode=0o700)
        (self.data_dir / "plugins").write_text("[].\n" if self.no_stomp else "[rabbitmq_web_stomp].\n")
        if not self.no_stomp:
            listen = f"web_stomp.tcp.ip = 127.0.0.1\nweb_stomp.tcp.port = {self.stomp_port}\n"
            (settings / "stomp.conf").write_text(f"stomp.listeners.tcp = none\n{listen}")
        # The private node takes over a folder that is empty, or one that it has used.
        (self.data_dir / "relay.lock").touch(mode=0o600)
        super().start()

    def add_vhosts(self, names: list[str]) -> None:
        """Create virtual hosts in which the node's user may do everything."""
        steps = "".join(
            f'rabbit_vhost:add(<<"{name}">>, <<"bench">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"imrelay">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"bench">>), '
            for name in names
        )
        self.control("eval", steps + "ok.")

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` and return what it printed."""
        return subprocess.run(
            [str(self.scripts / "rabbitmqctl"), "--quiet", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()

    def _has_stomp(self) -> bool:
        folder = find_scripts()
        places = (folder.parent, *folder.parent.glob("lib/rabbitmq_server-*"))
        return any(list(place.glob("plugins/rabbitmq_web_stomp-*")) for place in places)


@dataclass
class Running:
    """A system that serves."""

    address: tuple[str, int]
    wire: PlainWire
    #: Its processes; none where all of it is inside the broker.
    pids: list[int]
    stop: Callable[[], None] = lambda: None


@dataclass
class System:
    """One line of the table: how it is got, started and spoken to."""

    name: str
    amqp_url: str
    broker: Broker
    folder: Path
    #: Install what it needs and return the command that serves, or raise `Unavailable`.
    prepare: Callable[[], list[str]]
    wire: PlainWire
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] | None = None
    #: It keeps something for a user who is away, so that a second connect is not a first one.
    keeps_users: bool = False
    #: How many users of a crowd it knows already.
    prepared: int = 0
    starts: int = 0

    @property
    def title(self) -> str:
        """Its name in the table."""
        return TITLES[self.name]

    def ready(self) -> None:
        """Have its command at hand; installs at the first time."""
        self.command = self.prepare()

    def start(self) -> Running:
        """Start it as processes of its own and return when it listens."""
        if not self.command:
            return Running(("127.0.0.1", self.broker.stomp_port), self.wire, [])
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
            return Running(address, self.wire, family(process.pid), stop)
        except BaseException:
            stop()
            raise


def make_systems(broker: Broker, folder: Path, cache: Path, names: list[str]) -> list[System]:
    """Describe the systems `names` on virtual hosts of their own; `cache` keeps what is installed between runs."""
    installer = _Installer(cache)
    broker.add_vhosts([f"bench-{name}" for name in names])
    made = []
    for name in names:
        vhost = f"bench-{name}"
        url = broker.url + quote(vhost, safe="")
        environment: dict[str, str] = {}
        wire = PlainWire()
        if name in ("imrelay", "transient"):
            prepare = _imrelay
            environment = {
                "IMRELAY_CONFIG": str(_settings(folder)),
                "IMRELAY_BROKER_URL": url,
                "IMRELAY_BROKER_PERSISTENT": "no" if name == "transient" else "yes",
            }
        elif name == "node":
            prepare = installer.node
            environment = {"NODE_PATH": str(cache / "node" / "node_modules"), "NODE_ENV": "production"}
        elif name == "webstomp":
            prepare = partial(_web_stomp, broker, url)
            secret = re.match(r"amqp://([^:]+):([^@]+)@", broker.url)
            assert secret is not None
            wire = StompWire(EXCHANGE, vhost, secret[1], secret[2])
        else:
            program = [str(_PEERS / "asyncio_server.py")]
            if name == "socketio":
                program = ["-m", "gevent.monkey", str(_PEERS / "socketio_server.py")]
                wire = SocketIoWire()
            prepare = partial(installer.python, program)
        keeps = prepare is _imrelay
        made.append(System(name, url, broker, folder, prepare, wire, environment, keeps_users=keeps))
    return made


def versions(broker: Broker, cache: Path) -> dict[str, str]:
    """Return what was measured: versions of the interpreters, the broker and the peers' packages."""
    found = {"python": sys.version.split()[0], "rabbitmq": broker.control("version")}
    with suppress(OSError, subprocess.SubprocessError):
        found["node"] = _output(["node", "--version"]).lstrip("v")
    for package in ("websocket", "amqplib"):
        with suppress(OSError, ValueError):
            described = json.loads((cache / "node" / "node_modules" / package / "package.json").read_text())
            found[f"{package} (npm)"] = described["version"]
    with suppress(OSError, subprocess.SubprocessError):
        for line in _output([str(cache / "venv" / "bin" / "pip"), "freeze", "-q"]).splitlines():
            package, _, version = line.partition("==")
            if version:
                found[package.lower()] = version
    return found


class _Installer:
    """Installs the peers' packages from the registries that pip and npm are set up for; once."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._failed: dict[str, str] = {}

    def node(self) -> list[str]:
        """Return the command of the Node.js server."""
        for tool in ("node", "npm"):
            if not shutil.which(tool):
                raise Unavailable(f"{tool} is not on PATH: install nodejs and npm")
        there = self._cache / "node"
        package = _PEERS / "node" / "package.json"

        def install() -> None:
            shutil.rmtree(there, ignore_errors=True)
            there.mkdir(parents=True)
            shutil.copy(package, there)
            _run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], there)

        self._once(there, package, install)
        return ["node", str(_PEERS / "node" / "server.js")]

    def python(self, program: list[str]) -> list[str]:
        """Return the command of one of the Python servers."""
        there = self._cache / "venv"
        packages = _ROOT / "setup.cfg"

        def install() -> None:
            shutil.rmtree(there, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(there)], self._cache)
            pip = [str(there / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, "--editable", f"{_ROOT}[bench]"], self._cache)

        self._once(there, packages, install)
        return [str(there / "bin" / "python"), *program]

    def _once(self, there: Path, wanted: Path, install: Callable[[], None]) -> None:
        """Install unless a mark says that exactly this is installed already."""
        if there.name in self._failed:
            raise Unavailable(self._failed[there.name])
        mark = there / "installed"
        text = hashlib.sha256(wanted.read_bytes()).hexdigest()
        if mark.exists() and mark.read_text() == text:
            return
        print(f"bench: installing the packages of {wanted.relative_to(_ROOT)} into {there}", file=sys.stderr)
        self._cache.mkdir(parents=True, exist_ok=True)
        try:
            install()
        except Unavailable as exc:
            self._failed[there.name] = str(exc)
            raise
        mark.write_text(text)


def _imrelay() -> list[str]:
    return [sys.executable, "-m", "imrelay", "serve"]


def _web_stomp(broker: Broker, url: str) -> list[str]:
    """Declare the exchange, which STOMP itself can't; there is no command, since the broker does it all."""
    if broker.no_stomp:
        raise Unavailable(broker.no_stomp)
    connection = pika.BlockingConnection(pika.URLParameters(url))
    connection.channel().exchange_declare(EXCHANGE, "direct", durable=True)
    connection.close()
    return []


def _settings(folder: Path) -> Path:
    """Write imrelay's settings: the defaults, a free port, and room for the idle sockets and the busy ones."""
    path = folder / "imrelay.ini"
    path.write_text("[server]\nport = 0\nmax_connections = 20000\ndrain_timeout = 2\n")
    return path


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
    return {key: value for key, value in os.environ.items() if not key.startswith("IMRELAY_")}


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_INSTALL
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(f"{' '.join(command[:2])} failed: {exc}") from exc
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["(nothing printed)"]
        raise Unavailable(f"'{' '.join(command)}' failed: {last[0]}")


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout.strip()
