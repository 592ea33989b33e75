"""The relay inside gunicorn: conversations across its workers, refusals, and a stop with close code 1012."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from gevent.event import Event

from imrelay.hosting import HostedRelay
from imrelay.server import Relay
from tests.conftest import RelayFactory
from tests.support.browser import Browser
from tests.support.flood import hold
from tests.support.harness import VirtualHost, eventually, plain_environment
from tests.support.websocket_peer import Peer, handshake

WORKERS = 2
_numbers = count(1)


class Gunicorn:
    """gunicorn with the gevent-websocket worker, as the documentation starts it."""

    certificate = ""

    def __init__(self, directory: Path, environment: dict[str, str], *arguments: str) -> None:
        self.log_path = directory / "gunicorn.log"
        worker = "geventwebsocket.gunicorn.workers.GeventWebSocketWorker"
        program = Path(sys.executable).with_name("gunicorn")
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(str(program), "-k", worker, "-w", str(WORKERS), "-b", "127.0.0.1:0"),
                    *("--graceful-timeout", "60", *arguments, "imrelay.wsgi:application"),
                ],
                cwd=directory,
                env=plain_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        found = eventually(lambda: re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", self.log), 30)
        self.port = int(found[1])
        eventually(lambda: len(self.workers) == WORKERS, 30)

    @property
    def log(self) -> str:
        """All that it has written so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def workers(self) -> list[int]:
        """The process ids of its workers."""
        return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", self.log)]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def socket_url(self, user: str) -> str:
        """Return the WebSocket URL of a user."""
        return f"ws://127.0.0.1:{self.port}/{quote(user, safe='')}"

    def worker_of(self, port: int) -> int:
        """Return the process id of the worker that has the other end of the connection from a port."""
        ours, theirs = (f"0100007F:{number:04X}" for number in (self.port, port))

        def look() -> int | None:
            rows = (row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:])
            inode = next(row[9] for row in rows if (row[1], row[2]) == (ours, theirs))
            for worker in self.workers:
                for entry in Path(f"/proc/{worker}/fd").iterdir():
                    with suppress(FileNotFoundError):  # closed in this moment
                        if os.readlink(entry) == f"socket:[{inode}]":
                            return worker
            return None  # nobody has accepted it yet

        return int(eventually(look))

    def wait_until_ready(self) -> None:
        """Wait until each worker, which begins with its first request, has found its broker."""
        ready: set[int] = set()

        def look() -> bool:
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
                connection.request("GET", "/readyz")
                worker = self.worker_of(connection.sock.getsockname()[1])
                if connection.getresponse().status == 200:
                    ready.add(worker)
            return len(ready) == WORKERS

        eventually(look, 30)

    def connect_to_each_worker(self, user: str) -> list[Browser]:
        """Open sockets of one user until every worker has one; return one of each."""
        found: dict[int, Browser] = {}
        for _ in range(200):
            browser = Browser(self, user)
            if found.setdefault(self.worker_of(browser.port), browser) is not browser:
                browser.close()
            if len(found) == WORKERS:
                return list(found.values())
        raise AssertionError("one worker takes all sockets")

    def stop(self) -> int:
        """Ask it to stop, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """Kill it and its workers, whatever state they are in."""
        for pid in (self.process.pid, *self.workers) if self.process.poll() is None else ():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


GunicornFactory = Callable[..., Gunicorn]


@pytest.fixture
def gunicorn(broker: VirtualHost, tmp_path: Path) -> Iterator[GunicornFactory]:
    """Start gunicorn with settings as variables; it has to stop well at the end."""
    started: list[Gunicorn] = []

    def start(*arguments: str, **environment: str) -> Gunicorn:
        environment = {"IMRELAY_BROKER_URL": broker.url, **environment}
        started.append(Gunicorn(tmp_path, environment, *arguments))
        return started[-1]

    try:
        yield start
        for server in started:
            assert server.stop() == 0, server.log
            assert "Traceback" not in server.log, server.log
            assert "SIGKILL" not in server.log, server.log
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def user() -> str:
    """An id that no other test has used."""
    return f"hosted-{next(_numbers)}"


def talk_across_workers(server: Any, user: str) -> None:
    """Check that sockets on both workers, of one user and of two, get all that they are to get, in order."""
    server.wait_until_ready()
    ours, theirs = server.connect_to_each_worker(user), server.connect_to_each_worker(f"{user}'s friend")
    for number in range(20):
        for sender in ours:
            text = sender.say(theirs[0].user, number)
            for recipient in theirs:
                assert recipient.receive() == text
    for sender in theirs:
        text = sender.say(user, id="c1")
        assert sender.ack()["id"] == "c1"
        for recipient in ours:
            assert recipient.receive() == text
    for browser in (*ours, *theirs):
        browser.close()


@pytest.mark.parametrize("arguments", [(), ("--preload",)], ids=["plain", "preload"])
def test_conversations_across_workers(gunicorn: GunicornFactory, user: str, arguments: tuple[str, ...]) -> None:
    """Two workers carry one conversation, whether they import the application or their parent does."""
    talk_across_workers(gunicorn(*arguments), user)


def test_conversations_with_a_running_private_broker(
    gunicorn: GunicornFactory, relay: RelayFactory, user: str, tmp_path: Path
) -> None:
    """With `url = private` the workers find the node of `imrelay broker`, also one that comes after them."""
    data = str(tmp_path / "data")
    server = gunicorn(IMRELAY_BROKER_URL="private", IMRELAY_BROKER_DATA_DIR=data)
    relay(command="broker", wait=False, broker_url="private", broker_data_dir=data)
    talk_across_workers(server, user)


def test_settings_come_from_a_file(
    gunicorn: GunicornFactory, user: str, broker: VirtualHost, tmp_path: Path
) -> None:
    """IMRELAY_CONFIG names the file; its limits hold for the sockets of gunicorn, too."""
    path = tmp_path / "hosted.ini"
    path.write_text(f"[broker]\nurl = {broker.url}\n[websocket]\nmax_message_size = 200\n")
    server = gunicorn(IMRELAY_CONFIG=str(path), IMRELAY_BROKER_URL=broker.url)
    with Browser(server, user) as browser:
        text = browser.say(user)
        assert browser.receive() == text
        browser.say(user, "x" * 200)
        assert browser.close_code() == 1009


def test_refusals(gunicorn: GunicornFactory, user: str) -> None:
    """What the relay itself refuses before the upgrade is refused by gunicorn's worker, and answered in JSON."""
    server: Any = gunicorn(IMRELAY_SERVER_MAX_CONNECTIONS="1")
    ours = f"127.0.0.1:{server.port}"
    for request, status, code in (
        (handshake(f"/{user}", Sec_WebSocket_Key=None), 400, "bad_handshake"),
        (handshake(f"/{user}", Sec_WebSocket_Key="short"), 400, "bad_handshake"),
        (handshake(f"/{user}", Connection="close"), 400, "bad_handshake"),
        (handshake(f"/{user}", line=f"POST /{user} HTTP/1.1"), 400, "bad_handshake"),
        (handshake(f"/{user}", Sec_WebSocket_Version="8"), 426, "bad_version"),
        (handshake("/a%2Fb"), 400, "bad_id"),
        (handshake("/%FF"), 400, "bad_id"),
        (handshake("/"), 400, "bad_id"),
        (handshake(f"/{user}", Host=ours, Origin="http://evil.example"), 403, "origin_not_allowed"),
        (handshake(f"/{user}", Host="evil.example", Origin="http://evil.example"), 403, "host_not_allowed"),
    ):
        with Peer(server) as peer:
            peer.send(request)
            answer = peer.read_answer()
            assert (answer.status, answer.error) == (status, code), request
    with Peer(server) as peer:
        peer.open(f"/{user}", Host=ours, Origin=f"http://{ours}", Sec_WebSocket_Protocol="echo-protocol")
        assert peer.answer.headers["sec-websocket-protocol"] == "echo-protocol"
    with Peer(server) as peer:
        peer.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = peer.read_answer()
        assert (answer.status, json.loads(answer.body)) == (200, {"status": "ok"})


def test_a_worker_that_takes_few_connections(gunicorn: GunicornFactory, user: str) -> None:
    """Of what a worker takes at once a part is kept: whatever fills it leaves health checks their place."""
    server: Any = gunicorn("--worker-connections", "64")
    server.wait_until_ready()
    with ExitStack() as stack:
        hold(stack, server, 100)
        with Peer(server) as peer:
            peer.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert peer.read_answer().status == 200
        with Browser(server, user) as browser:
            text = browser.say(user)
            assert browser.receive() == text
    answers = []
    with ExitStack() as stack:
        for number in range(100):
            peer = stack.enter_context(Peer(server))
            peer.send(handshake(f"/{user}-{number}"))
            answers.append(peer.read_answer())
        with Peer(server) as peer:
            peer.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert peer.read_answer().status == 200
    refused = [answer for answer in answers if answer.status != 101]
    assert 0 < len(refused) < 100
    assert {(answer.status, answer.error) for answer in refused} == {(503, "too_many_connections")}
    assert re.search(r"more than the 64 connections .*--worker-connections\) allows: raise it by \d+", server.log)


def test_on_a_unix_socket(broker: VirtualHost, tmp_path: Path, user: str) -> None:
    """Behind a proxy that reaches it by a Unix socket, the public name counts: no browser comes there alone."""
    path = tmp_path / "relay.sock"
    server = Gunicorn(tmp_path, {"IMRELAY_BROKER_URL": broker.url}, "-b", f"unix:{path}")
    try:
        eventually(path.exists, 30)
        for host, origin, status in (
            ("chat.example", "http://chat.example", b"101"),
            ("chat.example", "http://evil.example", b"403"),
        ):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(30)
                sock.connect(str(path))
                sock.sendall(handshake(f"/{user}", Host=host, Origin=origin))
                assert sock.recv(1000).split()[1] == status
        assert server.stop() == 0
        assert "Traceback" not in server.log, server.log
    finally:
        server.kill()


def test_a_stop_closes_with_1012(gunicorn: GunicornFactory, user: str) -> None:
    """SIGTERM: each browser, on each worker, is told to come back, and the workers end by themselves."""
    server = gunicorn()
    browsers = server.connect_to_each_worker(user)
    server.process.send_signal(signal.SIGTERM)
    for browser in browsers:
        assert browser.close_code() == 1012
        browser.close()
    assert server.process.wait(60) == 0
    assert "SIGKILL" not in server.log


def test_a_worker_that_is_replaced(gunicorn: GunicornFactory, user: str) -> None:
    """SIGHUP: new workers take over; a browser that comes back finds what was sent meanwhile."""
    server = gunicorn()
    with Browser(server, f"{user}'s friend") as friend:
        Browser(server, user).close()
        before = server.workers
        server.process.send_signal(signal.SIGHUP)
        assert friend.close_code() == 1012
    eventually(lambda: len(server.workers) == 2 * WORKERS, 30)
    eventually(lambda: not [pid for pid in before if Path(f"/proc/{pid}").exists()], 60)
    with Browser(server, f"{user}'s friend") as friend:
        text = friend.say(user, id="c1")
        friend.ack()
        with Browser(server, user) as browser:
            assert browser.receive() == text


_IMPORT = """
import gc, json, os, sys, threading
from greenlet import greenlet
before = len(os.listdir("/proc/self/fd"))
import imrelay.wsgi
after = len(os.listdir("/proc/self/fd"))
sockets = [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")
           and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")]
print(json.dumps({
    "descriptors": after - before,
    "sockets": len(sockets),
    "threads": len(os.listdir("/proc/self/task")),
    "greenlets": sum(isinstance(item, greenlet) and not item.dead for item in gc.get_objects()),
    "callable": callable(imrelay.wsgi.application),
}))
"""


def test_the_import_has_no_side_effects(tmp_path: Path) -> None:
    """Importing the application opens no descriptor and starts no thread or greenlet, with a broker or without."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT],
        cwd=tmp_path,
        env=plain_environment(IMRELAY_BROKER_URL="amqp://ann:pw@127.0.0.1:1/"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    main = 1
    assert found == {"descriptors": 0, "sockets": 0, "threads": main, "greenlets": main, "callable": True}
    assert os.listdir(tmp_path) == []


def test_wrong_settings_are_said_at_the_import(tmp_path: Path) -> None:
    """A setting that cannot be used ends the import with one clear line, not the first request."""
    done = subprocess.run(
        [sys.executable, "-c", "import imrelay.wsgi"],
        cwd=tmp_path,
        env=plain_environment(IMRELAY_BROKER_URL="http://127.0.0.1/"),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "IMRELAY_BROKER_URL" in last
    assert "amqp://" in last


def test_the_watch_outlives_a_fault() -> None:
    """A look at the server that fails is followed by others, and the end of a worker is still seen."""
    stopped = Event()

    class FailingServer:
        looks = 0

        @property
        def closed(self) -> bool:
            self.looks += 1
            if self.looks == 1:
                raise RuntimeError("odd")
            return self.looks > 2

    class FakeRelay:
        def stop(self, timeout: float) -> None:
            stopped.set()

    hosted = HostedRelay({"IMRELAY_BROKER_URL": "amqp://nowhere.invalid/"})
    hosted._relay = cast(Relay, FakeRelay())
    hosted._pid = os.getpid()
    hosted._watch(FailingServer())
    assert stopped.wait(30)


def test_readme_installs_what_the_worker_imports() -> None:
    """The tests have other packages beside gunicorn, which would hide one that a user's .venv lacks."""
    root = Path(__file__).parents[2]
    assert ".venv/bin/pip install 'gunicorn[gevent]'" in (root / "README.md").read_text(encoding="utf-8")
    assert "gunicorn[gevent]" in (root / "setup.cfg").read_text(encoding="utf-8")
