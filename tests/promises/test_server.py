"""A relay with a RabbitMQ of its own listens first and stops RabbitMQ last, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from imrelay.private_node.data_folder import running_url
from tests.conftest import RelayFactory
from tests.support.brokers import amqp, free_ports
from tests.support.counted import Census, CountedRelay
from tests.support.harness import Node, eventually, is_alive
from tests.support.websocket_peer import CLOSE, Peer, close_frame, handshake


class Beginner(CountedRelay):
    """A relay with a RabbitMQ of its own, on a port that is known before it listens there."""

    def __init__(self, directory: Path, **environment: str) -> None:
        [port] = free_ports(1)
        self.data_dir = directory / "data"
        settings = {"broker-url": "private", "broker-data-dir": self.data_dir, "server-port": port}
        super().__init__(
            directory, ["serve", *(f"--{key}={value}" for key, value in settings.items())], **environment
        )
        self.port = port

    def connect(self) -> Peer:
        """Open a TCP connection, as soon as somebody listens."""

        def attempt() -> Peer | None:
            try:
                return Peer(SimpleNamespace(port=self.port, certificate=""))
            except ConnectionRefusedError:
                assert self.process.poll() is None, self.log
                return None

        peer: Peer = eventually(attempt, 60)
        return peer

    def child(self, name: str) -> int:
        """Wait until epmd or the node is begun, and return its process id."""
        path = self.data_dir / f"{name}.pid"
        return int(eventually(lambda: path.exists() and path.read_text(), 60))

    def assert_nothing_left(self, children: list[int]) -> None:
        """Wait for its end: it ended well, and of all that it began nothing was left in it or beside it."""
        census = self.last_census()
        assert self.process.wait() == 0, self.log
        assert "Traceback" not in self.log
        assert alive_in(census) == ({"MainThread": 1}, {}, 0)
        assert not any(map(is_alive, children))
        assert running_url(self.data_dir) is None


def alive_in(census: Census) -> tuple[dict[str, int], dict[str, int], int]:
    """Return the threads, the processes and the number of sockets."""
    return census["threads"], census["processes"], census["descriptors"].get("socket", 0)


@pytest.fixture
def started() -> Iterator[list[CountedRelay]]:
    """What the test puts here is killed at its end, where it still runs."""
    relays: list[CountedRelay] = []
    yield relays
    for relay in relays:
        relay.kill()


def idle_program(folder: Path, name: str) -> Path:
    """Write a program that does nothing but wait for its end, and return its folder."""
    folder.mkdir()
    (folder / name).write_text("#!/bin/sh\nexec sleep 600\n")
    (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("at", ["epmd", "node"])
def test_a_stop_during_the_start_leaves_nothing(
    node: Node, tmp_path: Path, started: list[CountedRelay], at: str
) -> None:
    """It is stopped while it waits for its RabbitMQ: no process, thread or socket of it is left, and no lock."""
    idle = idle_program(tmp_path / "idle", "epmd" if at == "epmd" else "rabbitmq-server")
    environment = {"PATH": f"{idle}:{os.environ['PATH']}"} if at == "epmd" else {"COUNTED_RABBITMQ": str(idle)}
    relay = Beginner(tmp_path / "relay", **environment)
    started.append(relay)
    with relay.connect() as early:
        children = [relay.child(name) for name in (["epmd"] if at == "epmd" else ["epmd", "node"])]
        assert all(map(is_alive, children))
        relay.process.send_signal(signal.SIGTERM)
        relay.assert_nothing_left(children)
        assert early.read_to_end() == b""


def test_a_port_that_is_taken_is_told_before_a_rabbitmq_is_begun(
    relay: RelayFactory, node: Node, tmp_path: Path
) -> None:
    """It listens first: if that fails, no folder is made and no RabbitMQ started."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        process = relay(
            clean=False, wait=False, broker_url="private", broker_data_dir=tmp_path / "data", server_port=port
        )
        assert process.process.wait(60) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in process.log
    assert not (tmp_path / "data").exists()


def test_rabbitmq_runs_from_the_first_connection_to_the_last_close(
    node: Node, tmp_path: Path, started: list[CountedRelay]
) -> None:
    """A client that connects before RabbitMQ is ready is served later; RabbitMQ stops after the last socket."""
    relay = Beginner(tmp_path / "relay")
    started.append(relay)
    with relay.connect() as early:
        early.send(handshake("/early"))
        assert "private RabbitMQ ready" not in relay.log
        assert early.read_answer().status == 101
        assert "private RabbitMQ ready" in relay.log
        children = [relay.child(name) for name in ("epmd", "node")]
        threads, processes, _ = alive_in(relay.census())
        assert threads == {"MainThread": 1, "watcher:epmd": 1, "watcher:node": 1}
        assert sum(processes.values()) == 2

        relay.process.send_signal(signal.SIGTERM)
        opcode, payload, _ = early.read_frame()
        assert (opcode, payload[:2]) == (CLOSE, (1012).to_bytes(2, "big"))
        url = running_url(relay.data_dir)
        assert url is not None, "the broker was stopped before the sockets"
        with amqp(url) as channel:
            channel.basic_publish("direct_message", "early", b"{}", mandatory=True)
        early.send(close_frame(1012))
        early.read_end()
    relay.assert_nothing_left(children)
