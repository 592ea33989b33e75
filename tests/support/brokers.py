"""What the damage tests do to a broker: stop it, kill it, freeze it, alarm it; and a cluster of three nodes."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pika

from tests.support.harness import Node, RelayProcess, eventually

__all__ = [
    "Cluster",
    "amqp",
    "free_ports",
    "frozen",
    "kill_node",
    "memory_alarm",
    "node_pid",
    "open_files",
    "publish_first",
    "readiness",
    "resident_kib",
    "start_application",
    "stop_application",
    "wait_not_ready",
    "wait_ready",
]


@contextmanager
def amqp(url: str) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    """Open a channel with publisher confirms, as another AMQP program would."""
    with closing(pika.BlockingConnection(pika.URLParameters(f"{url}?socket_timeout=10"))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def publish_first(url: str, user: str, body: bytes, *, sleep: Callable[[float], object] = time.sleep) -> None:
    """Publish the first message to a user as another program, over fresh channels until it is taken.

    A quorum queue whose leader is just being elected refuses, and RabbitMQ goes on to refuse on that channel.
    """

    def is_taken() -> bool:
        with amqp(url) as channel:
            try:
                channel.basic_publish("direct_message", user, body, mandatory=True)
            except pika.exceptions.NackError:
                return False
        return True

    eventually(is_taken, 20, sleep=sleep)


def readiness(relay: RelayProcess) -> tuple[int, str]:
    """Return the status of `/readyz` and the reason that it gives."""
    try:
        with urllib.request.urlopen(f"{relay.url}/readyz", timeout=30) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)["error"]["message"]


def wait_ready(relay: RelayProcess) -> None:
    """Wait until the relay can accept messages."""
    eventually(lambda: readiness(relay)[0] == 200, 60)


def wait_not_ready(relay: RelayProcess) -> str:
    """Wait until the relay says that it cannot accept messages, and return why."""
    eventually(lambda: readiness(relay)[0] == 503, 60)
    return readiness(relay)[1]


def stop_application(node: Node) -> None:
    """Do what `rabbitmqctl stop_app` does: everybody is disconnected and nobody let in; the node lives."""
    node.control.evaluate("rabbit:stop(), ok")


def start_application(node: Node) -> None:
    """Do what `rabbitmqctl start_app` does."""
    node.control.evaluate("rabbit:start(), ok")


def node_pid(node: Node) -> int:
    """Return the process id of the node as it runs now; the file is empty for a moment while it starts."""
    return int(eventually((node.data_dir / "node.pid").read_text, 60))


def kill_node(node: Node) -> None:
    """Kill it with -9; its supervisor starts it again."""
    os.kill(node_pid(node), signal.SIGKILL)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Pause a process (SIGSTOP), and let it go on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def memory_alarm(node: Node) -> Iterator[None]:
    """Make the node raise a memory alarm: it reads nothing more from publishers."""

    def set_limit(limit: object) -> None:
        node.control.evaluate(f"vm_memory_monitor:set_vm_memory_high_watermark({limit})")

    before = node.control.evaluate("vm_memory_monitor:get_vm_memory_high_watermark()")
    set_limit("0.0000001")
    try:
        eventually(lambda: node.control.evaluate("rabbit_alarm:get_alarms()"))
        yield
    finally:
        set_limit(before)


class Cluster:
    """Three nodes of one cluster: a `Node` that has been started, and two more that join it."""

    def __init__(self, first: Node, folder: Path) -> None:
        self.first = first
        self._members: list[_ClusterNode] = []
        try:
            for number in (2, 3):
                self._members.append(_ClusterNode(first, folder / f"node{number}"))
            running = "[N || N <- [node() | nodes()], rpc:call(N, rabbit, is_running, []) =:= true]"
            eventually(lambda: len(first.control.evaluate(running)) == 3, 90)
            eventually(lambda: all(member.accepts() for member in self._members), 30)
        except BaseException:
            self.stop()
            raise

    @property
    def urls(self) -> list[str]:
        """The URL of each node; the first is of the `Node`."""
        return [self.first.url, *(member.url for member in self._members)]

    def kill(self, number: int) -> None:
        """Kill a node with -9, by its place in `urls`; not the first, which would be started again."""
        self._members[number - 1].kill()

    def stop(self) -> None:
        """End the two further nodes; the first is its owner's."""
        for member in self._members:
            member.kill()


class _ClusterNode:
    def __init__(self, first: Node, folder: Path) -> None:
        (folder / "log").mkdir(parents=True)
        amqp_port, dist_port = free_ports(2)
        parts = urlsplit(first.url)
        credentials = parts.netloc.rpartition("@")[0]
        self.url = urlunsplit(parts._replace(netloc=f"{credentials}@127.0.0.1:{amqp_port}"))
        self._address = ("127.0.0.1", amqp_port)
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.local = 127.0.0.1:{amqp_port}\n"
            f"cluster_formation.classic_config.nodes.1 = {first.environment['RABBITMQ_NODENAME']}\n"
            "log.console = false\n"
        )
        environment = first.environment | {
            "RABBITMQ_NODENAME": f"member-{secrets.token_hex(4)}@localhost",
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
        }
        with (folder / "log" / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [str(first.scripts / "rabbitmq-server")],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def accepts(self) -> bool:
        assert self._process.poll() is None, f"the node ended with status {self._process.returncode}"
        with suppress(OSError):
            socket.create_connection(self._address, timeout=5).close()
            return True
        return False

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _end_with_parent() -> None:
    """Have Linux kill this process when the one that started it is gone, however that ended (`prctl`)."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)


def free_ports(count: int) -> list[int]:
    """Return so many ports of loopback on which nobody listens."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def open_files(pid: int) -> int:
    """Return how many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_kib(pid: int) -> int:
    """Return the memory of a process that is in use, in KiB."""
    line: Any = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in row)
    return int(line.split()[1])
