"""Stopping on purpose: no new sockets, every ack true, every browser told 1012, and an end in time."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import websocket

from tests.conftest import RelayFactory
from tests.support.browser import Browser, in_background
from tests.support.harness import Node, RelayProcess, VirtualHost, eventually, is_alive, plain_environment
from tests.support.proxy import Proxy
from tests.support.websocket_peer import CLOSE, PING, TEXT, Peer, close_frame, handshake

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
#: Longer than any test lasts: what waits for it would never end.
FOR_EVER = 600
V1 = ["imrelay.v1"]


class Speaker:
    """A browser that sends numbered messages to some users in turn, as fast as it can, until its socket ends."""

    def __init__(self, relay: RelayProcess, user: str, to: list[str]) -> None:
        self.browser = Browser(relay, user)
        self.to = to
        self.sent = 0
        #: Numbers in the order in which their acks came, by the recipient.
        self.acked: dict[str, list[int]] = {recipient: [] for recipient in to}
        #: Codes of error frames.
        self.errors: list[str] = []
        self.close_code: int | None = None
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run_sender, self._run_reader)]
        for thread in self._threads:
            thread.start()

    def wait_acked(self) -> None:
        """Block until some hundred have been acknowledged, and more are under way."""
        assert self._enough.wait(60)

    def join(self) -> None:
        """Block until the relay has ended the socket."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _run_sender(self) -> None:
        with contextlib.suppress(OSError, websocket.WebSocketException):
            while True:
                self.browser.say(self.to[self.sent % len(self.to)], self.sent, id=self.sent)
                self.sent += 1

    def _run_reader(self) -> None:
        for opcode, data in frames(self.browser):
            if opcode == CLOSE:
                self.close_code = int.from_bytes(data[:2], "big")
            elif opcode == TEXT:
                answer = json.loads(data)
                if "ack" in answer:
                    number = answer["ack"]["id"]
                    self.acked[self.to[number % len(self.to)]].append(number)
                    if number >= 300:
                        self._enough.set()
                else:
                    self.errors.append(answer["error"]["code"])


def frames(browser: Browser) -> Iterator[tuple[int, bytes]]:
    """Yield what comes up to the close frame, which is answered."""
    while True:
        found = browser.socket.recv_frame()
        if found.opcode == CLOSE:
            with contextlib.suppress(OSError, websocket.WebSocketException):
                browser.socket.send_close(1000)
            browser.socket.shutdown()
        yield found.opcode, found.data
        if found.opcode == CLOSE:
            return


def read_until_closed(browser: Browser) -> tuple[int, list[tuple[str, int]]]:
    """Return the close code, and (sender, number) of what came before; imrelay.v1 messages are acknowledged."""
    found: list[tuple[str, int]] = []
    for opcode, data in frames(browser):
        if opcode == CLOSE:
            return int.from_bytes(data[:2], "big"), found
        message = json.loads(data) if opcode == TEXT else {}
        if "seq" in message:
            with contextlib.suppress(OSError, websocket.WebSocketException):
                browser.send(json.dumps({"ack": message["seq"]}))
            message = message["message"]
        if "content" in message:
            found.append((message["from"]["id"], message["content"]))
    raise AssertionError


class Unreader:
    """A plain browser that does not read. It holds the stop of its relay, which waits for it to take the rest."""

    def __init__(self, relay: RelayProcess, user: str) -> None:
        self.peer = Peer(SimpleNamespace(port=relay.port, certificate=""), receive_buffer=4096).open(f"/{user}")
        #: Messages that were sent to it: far more than the kernel takes.
        self.sent = 120
        with Browser(relay, f"writer to {user}") as sender:
            for number in range(self.sent):
                sender.say(user, number, id=number, filling="x" * 60_000)
                sender.ack()

    def __enter__(self) -> Unreader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.peer.sock.close()

    def read(self) -> list[int]:
        """Read now, to the end: return the numbers of the messages that came whole, and see a 1012."""
        numbers: list[int] = []
        while True:
            opcode, payload, _ = self.peer.read_frame()
            if opcode == CLOSE:
                assert int.from_bytes(payload[:2], "big") == 1012
                self.peer.send(close_frame(1012))
                self.peer.read_end()
                return numbers
            if opcode == TEXT:
                numbers.append(json.loads(payload)["content"])


def is_refused(relay: RelayProcess, user: str) -> bool:
    """Tell whether a new socket gets nowhere: its connection is refused, or its handshake is, with 503."""
    try:
        with Peer(SimpleNamespace(port=relay.port, certificate="")) as peer:
            peer.send(handshake(f"/{user}"))
            return peer.read_answer().status == 503
    except ConnectionError:
        return True


def ask(connection: http.client.HTTPConnection, path: str) -> tuple[int, Any]:
    """GET a path over a connection that is kept; return status and JSON."""
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def waiting_for(relay: RelayProcess, user: str) -> list[tuple[str, int]]:
    """Return (sender, number) of all that waits for a user, and take it."""
    with Browser(relay, user) as browser:
        messages = [json.loads(text) for text in browser.rest()]
        return [(message["from"]["id"], message["content"]) for message in messages]


@pytest.mark.slow
@pytest.mark.parametrize("v1", [False, True], ids=["plain", "v1"])
@SIGNALS
def test_a_stop_under_load_loses_nothing(relay: RelayFactory, number: signal.Signals, v1: bool) -> None:
    """Any signal in a flood: status 0 within drain_timeout, 1012 to everybody, and every ack that came is true.

    What was acknowledged has arrived or waits for the next relay, in order, and with plain browsers exactly once.
    """
    drain_timeout = 20
    process = relay(server_drain_timeout=drain_timeout)
    mark = f"{number.name}{v1}"
    here = f"here{mark}"
    browser = Browser(process, here, subprotocols=V1 if v1 else None)
    listening = in_background(read_until_closed, browser)
    speakers = [Speaker(process, f"speaker{i}{mark}", [here, f"away{i}{mark}"]) for i in range(3)]
    for speaker in speakers:
        speaker.wait_acked()
    begun = time.monotonic()
    assert process.stop(number) == 0
    took = time.monotonic() - begun
    code, got = listening.result(60)
    for speaker in speakers:
        speaker.join()
    assert [code, *(speaker.close_code for speaker in speakers)] == [1012] * 4
    assert took < drain_timeout, "it waited for the flood to end"
    assert {error for speaker in speakers for error in speaker.errors} <= {"broker_unavailable"}

    successor = relay()
    got += waiting_for(successor, here)
    for speaker in speakers:
        away = speaker.to[1]
        for recipient, messages in ((here, got), (away, waiting_for(successor, away))):
            numbers = [content for sender, content in messages if sender == speaker.browser.user]
            if v1:
                numbers = list(dict.fromkeys(numbers))
            assert numbers == sorted(set(numbers)), f"{recipient}: repeated, or out of order"
            assert set(speaker.acked[recipient]) <= set(numbers), f"{recipient}: acknowledged and lost"
            assert speaker.acked[recipient]


@SIGNALS
def test_while_it_drains_nobody_new_comes_in(relay: RelayFactory, number: signal.Signals) -> None:
    """While it stops, /readyz says 503 and why, new sockets are refused, and what is under way is still finished.

    When the last browser has taken its messages, it ends: long before drain_timeout.
    """
    process = relay(server_drain_timeout=FOR_EVER, websocket_send_timeout=FOR_EVER, websocket_handshake_timeout=60)
    kept = http.client.HTTPConnection(process.host, process.port, timeout=30)
    eventually(lambda: ask(kept, "/readyz")[0] == 200)
    user = f"unreader{number.name}"
    with (
        Unreader(process, user) as unreader,
        Peer(SimpleNamespace(port=process.port, certificate="")) as open_before,
        Browser(process, f"idle{number.name}") as idle,
    ):
        open_before.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert open_before.read_answer().status == 200
        process.process.send_signal(number)
        assert idle.close_code() == 1012
        status, body = ask(kept, "/readyz")
        assert (status, body["error"]) == (503, {"code": "not_ready", "message": "the relay is stopping"})
        assert ask(kept, "/healthz")[0] == 200
        open_before.send(handshake("/late"))
        refusal = open_before.read_answer()
        assert (refusal.status, refusal.error) == (503, "stopping")
        assert is_refused(process, "late")
        assert process.process.poll() is None
        begun = unreader.read()
    kept.close()
    assert process.process.wait(60) == 0
    # what was not under way yet when the stop began waits for the next relay; nothing is in both
    assert begun + [n for _, n in waiting_for(relay(), user)] == list(range(unreader.sent))


def test_a_slow_reader_does_not_hold_the_stop_beyond_drain_timeout(relay: RelayFactory) -> None:
    """A browser that never reads is left when drain_timeout is over; the others were told long before.

    What it had not taken goes to its user's next socket, up to the last message.
    """
    process = relay(server_drain_timeout=1, websocket_send_timeout=FOR_EVER)
    with Unreader(process, "sleeper") as unreader, Browser(process, "awake") as awake:
        begun = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert awake.close_code() == 1012
        awake.close()
        assert process.process.wait(60) == 0
        assert time.monotonic() - begun < 30  # generous: what is wrong here is FOR_EVER
    assert "1 sockets had not taken" in process.log
    rest = [number for _, number in waiting_for(relay(), "sleeper")]
    assert rest
    assert rest == list(range(rest[0], unreader.sent))


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGTERM)],
    ids=lambda number: number.name,
)
def test_a_second_signal_ends_it_at_once(
    relay: RelayFactory, first: signal.Signals, second: signal.Signals
) -> None:
    """A second signal ends the process, with a status that says that the stop was not graceful."""
    process = relay(clean=False, server_drain_timeout=FOR_EVER, websocket_send_timeout=FOR_EVER)
    with Unreader(process, f"unreader{first.name}"):
        process.process.send_signal(first)
        process.wait_for_log(f"{first.name}: stopping")
        assert process.process.poll() is None
        process.process.send_signal(second)
        assert process.process.wait(30) == 128 + second
    assert f"{second.name} again: ending at once" in process.log


def ignore_both() -> None:
    """Have a new process ignore what `nohup` and a shell's background have it ignore."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_a_signal_that_was_ignored_at_the_start_stays_so(broker_url: str, tmp_path: Path) -> None:
    """`nohup imrelay serve &` outlives the logout and a Ctrl-C that is meant for others; SIGTERM ends it."""
    arguments = ["serve", "--server-host=127.0.0.1", "--server-port=0", f"--broker-url={broker_url}"]
    process = RelayProcess(tmp_path / "relay", arguments, plain_environment(), preexec=ignore_both)
    try:
        process.wait_until_listening()
        ignored = int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
        for number in (signal.SIGHUP, signal.SIGINT):
            assert ignored & 1 << number - 1
            process.process.send_signal(number)
        with Browser(process, "ann") as ann:
            ann.say("ann", "still here")
            assert ann.contents_until("still here")
        assert "stopping" not in process.log
        assert process.stop(signal.SIGTERM) == 0
    finally:
        process.kill()


def test_a_stop_while_the_broker_is_away(relay: RelayFactory, broker_url: str) -> None:
    """Without a broker it ends with status 0 all the same; senders get an error for each message before 1012."""
    with Proxy(broker_url) as proxy:
        process = relay(broker_url=proxy.url, server_drain_timeout=4, broker_publish_timeout=FOR_EVER)
        with Browser(process, "ann") as ann, Browser(process, "bob") as bob:
            ann.say("bob", "there", id="before")
            assert {ann.ack()["id"], bob.read()["id"]} == {"before"}
            proxy.cut()
            for number in range(10):
                ann.say("bob", number, id=number)
            begun = time.monotonic()
            process.process.send_signal(signal.SIGTERM)
            found = [(opcode, data) for opcode, data in frames(ann) if opcode != PING]
            assert bob.close_code() == 1012
            assert process.process.wait(60) == 0
            assert time.monotonic() - begun < 40  # generous: what is wrong here is FOR_EVER
    assert int.from_bytes(found.pop()[1][:2], "big") == 1012
    errors = [json.loads(data)["error"] for _, data in found]
    assert [(error["code"], error["temporary"]) for error in errors] == [("broker_unavailable", True)] * 10
    assert [error["id"] for error in errors] == list(range(10))


@pytest.mark.parametrize("is_there", [False, True], ids=["nobody", "silent"])
def test_a_stop_before_the_broker_is_found(relay: RelayFactory, is_there: bool) -> None:
    """A relay that never reached its broker stops as any other: nothing listens there, or nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        url = f"amqp://127.0.0.1:{somebody.getsockname()[1]}"
        if not is_there:
            somebody.close()
        process = relay(broker_url=url)
        with Browser(process, "early") as browser:
            process.process.send_signal(signal.SIGTERM)
            assert browser.close_code() == 1012
        assert process.process.wait(60) == 0


def test_v1_messages_that_were_not_acknowledged_are_there_after_a_stop(
    relay: RelayFactory, broker: VirtualHost
) -> None:
    """A v1 browser that has not acknowledged does not hold the stop; its messages come again after it."""
    process = relay(server_drain_timeout=FOR_EVER)
    with Browser(process, "reader", subprotocols=V1) as browser:
        browser.read()
        for number in range(4):
            browser.say("reader", number)
        assert [browser.read()["seq"] for _ in range(4)] == [1, 2, 3, 4]
        browser.send('{"ack":1}')
        eventually(lambda: broker.queues()["inbox.reader"]["messages_unacknowledged"] == 3)
        process.process.send_signal(signal.SIGTERM)
        assert browser.close_code() == 1012
        browser.close()
        assert process.process.wait(60) == 0
    with Browser(relay(), "reader", subprotocols=V1) as browser:
        browser.read()
        again = [browser.read() for _ in range(3)]
        assert [(frame["message"]["content"], frame["redelivered"]) for frame in again] == [
            (1, True),
            (2, True),
            (3, True),
        ]


@pytest.mark.slow
def test_a_stop_with_a_private_broker_keeps_what_waits(node: Node, relay: RelayFactory, tmp_path: Path) -> None:
    """With a RabbitMQ of its own, the relay ends first, then the node; what was acknowledged is there afterwards.

    A second signal takes the node along as well.
    """
    settings = {"broker_url": "private", "broker_data_dir": tmp_path / "data", "server_drain_timeout": 30}
    process = relay(**settings)
    with Browser(process, "ann") as ann:
        listening = in_background(read_until_closed, bob := Browser(process, "bob"))
        for number in range(300):
            ann.say("bob" if number % 2 else "carl", number, id=number)
        acked = {ann.ack()["id"] for _ in range(100)}
        process.process.send_signal(signal.SIGTERM)
        for opcode, data in frames(ann):
            if opcode == CLOSE:
                assert int.from_bytes(data[:2], "big") == 1012
            elif opcode == TEXT and "ack" in (answer := json.loads(data)):
                acked.add(answer["ack"]["id"])
        code, got = listening.result(60)
        assert code == 1012
        bob.close()
    assert process.process.wait(60) == 0
    pid_file = tmp_path / "data" / "node.pid"
    successor = relay(clean=False, **settings)
    got += waiting_for(successor, "bob")
    numbers = [content for _, content in got]
    assert numbers == sorted(set(numbers))
    assert {number for number in acked if number % 2} <= set(numbers)
    numbers = [content for _, content in waiting_for(successor, "carl")]
    assert numbers == sorted(set(numbers))
    assert {number for number in acked if not number % 2} <= set(numbers)
    pid = int(pid_file.read_text())
    with Unreader(successor, "sleeper"):
        successor.process.send_signal(signal.SIGINT)
        successor.wait_for_log("SIGINT: stopping")
        successor.process.send_signal(signal.SIGINT)
        assert successor.process.wait(60) == 128 + signal.SIGINT
    eventually(lambda: not is_alive(pid), 60)
