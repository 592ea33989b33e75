"""The fixtures of all tests: one RabbitMQ for the run, a virtual host and a WebSocket server for each module."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import hypothesis
import pytest

from imrelay.broker.connection import Connection
from imrelay.errors import SetupError
from tests.support.gate import Gate
from tests.support.harness import Node, RelayProcess, VirtualHost, plain_environment, restore_signals_for_children
from tests.support.websocket_peer import Peer, PeerServer, running_server

#: The settings of a relay under test, unless the test gives others.
_DEFAULTS = {"server_host": "127.0.0.1", "server_port": "0", "server_drain_timeout": "5"}

# The time that hypothesis takes to generate examples depends on the machine alone.
hypothesis.settings.register_profile(
    "imrelay", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("imrelay")

# Tests send SIGINT and SIGHUP to what they start; a run in the background of a shell ignores SIGINT.
restore_signals_for_children()

#: Seconds after which a wait fails; no measure of speed.
_PATIENCE = 20.0

RelayFactory = Callable[..., RelayProcess]


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A private RabbitMQ, once for the whole run. Without RabbitMQ: skipped here, a failure where CI is set."""
    try:
        broker = Node(tmp_path_factory.mktemp("node") / "data")
    except (RuntimeError, SetupError) as exc:
        if os.environ.get("CI") or "not installed" not in str(exc):
            pytest.fail(f"the tests need RabbitMQ: {exc}", pytrace=False)
        pytest.skip(f"needs RabbitMQ: {exc}")
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def broker(node: Node, request: pytest.FixtureRequest) -> Iterator[VirtualHost]:
    """A virtual host of the module's own; `url`, `queues`, `channels` and so on are of it alone."""
    module = re.sub(r"\W+", "-", request.module.__name__.rpartition(".")[2])
    vhost = VirtualHost(node, f"{module}-{secrets.token_hex(3)}")
    vhost.create()
    try:
        yield vhost
    finally:
        vhost.delete()


@pytest.fixture(scope="module")
def broker_url(broker: VirtualHost) -> str:
    """The AMQP URL of the module's virtual host."""
    return broker.url


@pytest.fixture
def gate(broker_url: str) -> Iterator[Gate]:
    """A proxy to the module's virtual host that can hold up the broker's answers."""
    with Gate(broker_url) as made:
        yield made


@pytest.fixture
def connection(gate: Gate) -> Iterator[Connection]:
    """A connection of this process's own, through the gate."""
    made = Connection(lambda: [gate.url], name="test", heartbeat=60)
    made.start()
    with gevent.Timeout(3 * _PATIENCE):
        assert made.wait_open(_PATIENCE)
        yield made
    made.close()


@pytest.fixture
def relay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RelayFactory]:
    """Start relays: `relay(websocket_ping_interval=1)`; each is stopped at the end and has to end well.

    Keyword arguments are settings, `<section>_<key>`; `broker_url` defaults to the module's virtual host.
    `clean=False`: its end is the test's own business, it is only killed. `wait=False`: do not wait until it
    listens. `command`: another one than `serve`. `environment`: more variables.
    """
    started: list[tuple[RelayProcess, bool]] = []

    def start(
        *,
        clean: bool = True,
        wait: bool = True,
        command: str = "serve",
        environment: dict[str, str] | None = None,
        **settings: object,
    ) -> RelayProcess:
        if "broker_url" not in settings:
            settings["broker_url"] = request.getfixturevalue("broker_url")
        arguments = [command]
        for key, value in ({**_DEFAULTS, **settings}).items():
            text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
            arguments.append(f"--{key.replace('_', '-')}={text}")
        process = RelayProcess(
            tmp_path / f"relay{len(started)}", arguments, plain_environment(**(environment or {}))
        )
        started.append((process, clean))
        if wait:
            process.wait_until_listening()
        return process

    try:
        yield start
        for process, clean in started:
            if clean:
                status = process.stop()
                assert status == 0, f"the relay ended with status {status}:\n{process.log}"
                assert "Traceback" not in process.log, process.log
    finally:
        for process, _ in started:
            if process.process.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[PeerServer]:
    """A WebSocket server of the module's own, with the settings that the module names in `SERVER`."""
    with running_server(**getattr(request.module, "SERVER", {})) as made:
        yield made


@pytest.fixture
def peer(server: PeerServer) -> Iterator[Peer]:
    """A socket that the module's WebSocket server echoes to."""
    with Peer(server) as made:
        yield made.open()
