"""The Node.js server of scripts/bench that is to promise what imrelay promises keeps its word.

What it needs is installed by the first run of `scripts/bench --systems guaranteed`; else these are skipped.
"""

from __future__ import annotations

import json
import re
import secrets
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websocket import WebSocket, create_connection

from tests.support.harness import eventually, plain_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmark.installing import PEERS, Installer
from benchmark.run import CACHE

Connect = Callable[[str], WebSocket]


@pytest.fixture
def connect(broker_url: str, tmp_path: Path) -> Iterator[Connect]:
    """Start the server and connect to it as somebody."""
    modules = Installer(CACHE).node_modules
    if not shutil.which("node") or not modules.is_dir():
        pytest.skip("run scripts/bench --systems guaranteed once: it installs what this server needs")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["node", str(PEERS / "node" / "guaranteed.js")],
            env=plain_environment(AMQP_URL=broker_url, NODE_PATH=str(modules)),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    opened: list[WebSocket] = []

    def open_socket(user: str) -> WebSocket:
        found = eventually(lambda: re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text()), 30)
        url = f"ws://127.0.0.1:{found[1]}/{user}"
        opened.append(create_connection(url, timeout=20, subprotocols=["echo-protocol"]))
        return opened[-1]

    try:
        yield open_socket
        assert process.poll() is None, log.read_text()
    finally:
        for one in opened:
            one.close(timeout=0)
        process.terminate()
        process.wait(30)


def send(socket: WebSocket, to: str, numbers: range) -> None:
    """Send numbered messages."""
    for number in numbers:
        socket.send(json.dumps({"id": f"{number}", "to": {"id": to}, "content": number}))


@pytest.fixture
def names() -> tuple[str, str]:
    """Return the names of two users of a test's own: what an inbox still has comes to the next of that name."""
    own = secrets.token_hex(3)
    return f"ann-{own}", f"bob-{own}"


def answers(socket: WebSocket, count: int) -> list[str]:
    """Return the ids of the messages that the next answers say are kept."""
    return [json.loads(socket.recv())["ack"]["id"] for _ in range(count)]


def numbers(socket: WebSocket, count: int) -> list[int]:
    """Return the numbers of the next messages."""
    return [json.loads(socket.recv())["content"] for _ in range(count)]


def test_messages_to_somebody_unknown_are_kept_in_order(connect: Connect, names: tuple[str, str]) -> None:
    """A user who connects for the first time gets all that was acknowledged, in the order of sending."""
    ann = connect(names[0])
    for user in (f"{names[1]}-{number}" for number in range(3)):
        count = 0
        while not select.select([ann.sock], [], [], 0.0005)[0]:  # as long as their inbox is being opened
            send(ann, user, range(count, count + 1))
            count += 1
        assert sorted(answers(ann, count), key=int) == [str(number) for number in range(count)]
        assert numbers(connect(user), count) == list(range(count))


def test_each_tab_gets_each_message_once_over_a_change_of_tabs(connect: Connect, names: tuple[str, str]) -> None:
    """A second tab gets what the first gets, and all that comes when the first is gone in the middle of it."""
    me, bob = names
    ann, first = connect(me), connect(bob)
    second = connect(bob)
    send(ann, bob, range(100))
    assert numbers(first, 100) == numbers(second, 100) == list(range(100))
    send(ann, bob, range(100, 400))
    first.shutdown()
    assert numbers(second, 300) == list(range(100, 400))
    send(ann, bob, range(400, 500))
    assert numbers(second, 100) == list(range(400, 500))
    answers(ann, 500)
    ann.send(json.dumps({"to": {"id": me}, "content": "last"}))
    assert json.loads(ann.recv())["content"] == "last"


def test_what_a_lost_tab_had_not_taken_comes_again(connect: Connect, names: tuple[str, str]) -> None:
    """A socket that is cut off while it reads nothing loses nothing that is acknowledged to the sender."""
    ann, bob = connect(names[0]), connect(names[1])
    content = "." * 60_000
    for number in range(300):
        ann.send(json.dumps({"id": f"{number}", "to": {"id": names[1]}, "content": content, "number": number}))
    answers(ann, 300)
    seen = json.loads(bob.recv())["number"]
    bob.shutdown()
    again = connect(names[1])
    rest = [json.loads(again.recv())["number"]]
    while rest[-1] != 299:
        rest.append(json.loads(again.recv())["number"])
    assert rest == list(range(rest[0], 300))
    assert seen == 0


def test_what_is_no_message_is_refused(connect: Connect, names: tuple[str, str]) -> None:
    """Bad input gets an error that names what is wrong, and ends nothing."""
    ann = connect(names[0])
    for sent, code in (
        ("{", "bad_json"),
        ("{}", "bad_message"),
        ('{"to":{"id":"ann"},"from":{"id":"somebody else"}}', "from_mismatch"),
    ):
        ann.send(sent)
        assert json.loads(ann.recv())["error"]["code"] == code
    send(ann, names[0], range(1))
    assert {"ack" in json.loads(ann.recv()) for _ in range(2)} == {True, False}
