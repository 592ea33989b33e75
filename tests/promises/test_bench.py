"""The load generator of scripts/bench sees what a server does wrong, and the table says it."""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websocket import create_connection

from tests.support.harness import eventually, plain_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmark.broker_memory import parse as parse_memory
from benchmark.client_frames import PING, parse_frame, server_frame
from benchmark.clients import Loop
from benchmark.generator import closed_loop, connect, probe
from benchmark.measurements import MEASUREMENTS
from benchmark.pairs import Meter, Pair
from benchmark.protocols import MqttProtocol, PlainProtocol, SocketIoProtocol, StompProtocol
from benchmark.relay_profile import parse as parse_profile
from benchmark.relay_profile import table as profile_table
from benchmark.report import TARGETS, Results, table, verdicts
from benchmark.run import parse
from benchmark.systems import TITLES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
#: Changes the list of payloads that are due to the receiver; called for each message, probes left out.
Fault = Callable[[int, bytes], list[bytes]]
#: Changes the list of answers that are due to the sender of a message that asked for one.
AnswerFault = Callable[[int, bytes], list[bytes]]


def faithful(number: int, payload: bytes) -> list[bytes]:
    """Hand on what came."""
    return [payload]


class FakeServer:
    """A relay of one sender and one receiver, in a thread: what the sender says goes to the receiver."""

    def __init__(
        self,
        protocol: PlainProtocol,
        fault: Fault = faithful,
        *,
        ping_every: int = 0,
        answer_fault: AnswerFault = faithful,
    ) -> None:
        self._protocol = protocol
        self._fault = fault
        self._ping_every = ping_every
        self._answer_fault = answer_fault
        #: What the receiver sent back.
        self.acknowledged: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._listener.getsockname()

    def close(self) -> None:
        """Close everything and wait for its thread."""
        self._listener.close()
        for one in self._sockets:
            one.close()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            for _ in range(2):
                one, _address = self._listener.accept()
                self._sockets.append(one)
                self._greet(one)
            self._relay(*self._sockets)
        except OSError:
            return

    def _greet(self, one: socket.socket) -> None:
        while not one.recv(65_536).endswith(b"\r\n\r\n"):
            pass
        one.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        for sent, answers in self._protocol.login("any"):
            if sent is not None:
                one.recv(65_536)
            one.sendall(self._opcode(answers[0]))

    def _relay(self, sender: socket.socket, receiver: socket.socket) -> None:
        data, back, number = b"", b"", 0
        while True:
            ready, _, _ = select.select([sender, receiver], [], [])
            if receiver in ready:
                if not (chunk := receiver.recv(65_536)):
                    return
                back += chunk
                while (found := self._next(back)) is not None:
                    payload, back = found
                    self.acknowledged.append(payload)
            if sender not in ready:
                continue
            if not (chunk := sender.recv(65_536)):
                return
            data += chunk
            out = answers = b""
            while (found := self._next(data)) is not None:
                payload, data = found
                if payload == b"\x03\xe8":
                    return  # a close frame
                if b"probe" in payload:
                    out += self._framed(payload)
                    continue
                out += b"".join(self._framed(one) for one in self._fault(number, payload))
                if self._protocol.answers:
                    answer = self._answer(payload)
                    answers += b"".join(self._opcode(one) for one in self._answer_fault(number, answer))
                number += 1
                if self._ping_every and number % self._ping_every == 0:
                    out += server_frame(b"there?", PING)
            receiver.sendall(out)
            sender.sendall(answers)

    def _framed(self, payload: bytes) -> bytes:
        """Say it as the server of that protocol does; STOMP has its own head, with a running number."""
        if isinstance(self._protocol, StompProtocol):
            body = payload.partition(b"\n\n")[2]
            payload = b"MESSAGE\nmessage-id:%d\n\n%b\n" % (len(payload), body)
        return self._opcode(payload)

    def _opcode(self, payload: bytes) -> bytes:
        return server_frame(payload, self._protocol.opcode)

    def _answer(self, payload: bytes) -> bytes:
        """Return what tells the sender that its message is kept."""
        if isinstance(self._protocol, MqttProtocol):
            return b"\x40\x02" + packet_identifier(payload)
        return b'{"ack":{"id":"%b","mid":"x","time":1}}' % json.loads(payload)["id"].encode()

    @staticmethod
    def _next(data: bytes) -> tuple[bytes, bytes] | None:
        """Return the payload of the first frame, unmasked, and what follows it."""
        unmasked = bytes((data[0], data[1] & 127)) + data[2:] if len(data) > 2 else b""
        found = parse_frame(unmasked, 0)
        if found is None or len(data) < found[2] + 4:
            return None
        _, begin, end = found
        mask = data[begin : begin + 4]
        size = end - begin
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        payload = (int.from_bytes(data[begin + 4 : end + 4], "big") ^ key).to_bytes(size, "big")
        return payload, data[end + 4 :]


def packet_identifier(publish: bytes) -> bytes:
    """Return the packet identifier of an MQTT PUBLISH of less than 16 KiB."""
    begin = 2 if publish[1] < 128 else 3
    topic = int.from_bytes(publish[begin : begin + 2], "big")
    return publish[begin + 2 + topic : begin + 4 + topic]


@pytest.fixture
def relay() -> Iterator[Callable[..., Meter]]:
    """Send messages through a fake server and return what the generator says about them."""

    def send(protocol: PlainProtocol, fault: Fault = faithful, *, size: int = 100, **options: Any) -> Meter:
        server, loop, meter = FakeServer(protocol, fault, **options), Loop(), Meter()
        try:
            sender, receiver = connect(loop, protocol, server.address, ["s00000", "r00000"], at_once=1)
            probe(loop, [(sender, receiver)])
            pair = Pair(meter, sender, receiver, size=size, window=8, count=64)
            closed_loop(loop, [pair], warm=0.05, seconds=0.3, mark=lambda: None, drain=0.2)
            assert pair.sent > 64  # once round at least
            if isinstance(protocol, MqttProtocol):
                eventually(lambda: len(server.acknowledged) >= pair.came + 1, 5)
                assert all(one[:2] == b"\x40\x02" and len(one) == 4 for one in server.acknowledged)
        finally:
            loop.close()
            server.close()
        return meter

    return send


def swap_once(number: int, payload: bytes, kept: list[bytes] = []) -> list[bytes]:  # noqa: B006 - a place to keep
    """Hand on the eleventh message after the twelfth."""
    if number == 10:
        kept.append(payload)
        return []
    return [payload, kept.pop()] if number == 11 else [payload]


PROTOCOLS = {
    "plain": PlainProtocol(),
    "answering": PlainProtocol(answers=True),
    "socketio": SocketIoProtocol(),
    "stomp": StompProtocol("direct_message", "vhost", "user", "password"),
    "mqtt": MqttProtocol("vhost", "user", "password"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_faithful_server_has_no_faults(relay: Callable[..., Meter], protocol: str) -> None:
    """All messages of a server that does right are counted, each with its latency, and nothing is wrong."""
    meter = relay(PROTOCOLS[protocol])
    assert not meter.faults
    assert 0 < len(meter.latencies) < meter.count
    assert all(0 <= latency < 5 for latency in meter.latencies)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda number, payload: [] if number == 10 else [payload], {"lost": 1}),
        (lambda number, payload: [payload] * (2 if number == 10 else 1), {"doubled": 1}),
        (swap_once, {"swapped": 1}),
        (
            lambda number, payload: [payload.replace(b"...", b"..!") if number == 10 else payload],
            {"damaged": 1, "lost": 1},
        ),
    ],
    ids=["lost", "doubled", "swapped", "damaged"],
)
def test_a_fault_is_seen(relay: Callable[..., Meter], protocol: str, fault: Fault, seen: dict[str, int]) -> None:
    """One message that is lost, doubled, swapped with the next, or damaged is reported as what it is."""
    assert dict(relay(PROTOCOLS[protocol], fault).faults) == seen


@pytest.mark.parametrize("protocol", ["answering", "mqtt"])
@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda number, answer: [] if number == 10 else [answer], {"unanswered": 1}),
        (lambda number, answer: [answer] * (2 if number == 10 else 1), {"answered twice": 1}),
    ],
    ids=["unanswered", "answered twice"],
)
def test_a_wrong_answer_is_seen(
    relay: Callable[..., Meter], protocol: str, fault: AnswerFault, seen: dict[str, int]
) -> None:
    """A message whose sender gets no answer, or two, is reported although it arrived."""
    assert dict(relay(PROTOCOLS[protocol], answer_fault=fault).faults) == seen


def test_a_refusal_is_no_answer(relay: Callable[..., Meter]) -> None:
    """An error in the place of an answer is reported, with its text, and its message has no answer."""
    error = b'{"error":{"code":"inbox_full","message":"no","id":"00000010"}}'
    meter = relay(PROTOCOLS["answering"], answer_fault=lambda number, answer: [error if number == 10 else answer])
    assert dict(meter.faults) == {"refused": 1, "unanswered": 1}
    assert meter.stranger == error


def test_a_message_is_in_flight_until_its_sender_is_answered(relay: Callable[..., Meter]) -> None:
    """Where a server answers, no more than the window is sent without an answer."""
    server = FakeServer(PROTOCOLS["answering"], answer_fault=lambda number, answer: [])
    loop, meter = Loop(), Meter()
    try:
        sender, receiver = connect(loop, PROTOCOLS["answering"], server.address, ["s00000", "r00000"], at_once=1)
        probe(loop, [(sender, receiver)])
        pair = Pair(meter, sender, receiver, size=100, window=8, count=64)
        closed_loop(loop, [pair], warm=0.0, seconds=0.1, mark=lambda: None, drain=0.1)
    finally:
        loop.close()
        server.close()
    assert (pair.sent, pair.came) == (8, 8)
    assert dict(meter.faults) == {"unanswered": 8}


@pytest.mark.parametrize("size", [100, 1024, 16_384])
def test_control_frames_between_messages_are_no_fault(relay: Callable[..., Meter], size: int) -> None:
    """Pings between the messages, whatever the size of these, are stepped over."""
    assert not relay(PlainProtocol(), size=size, ping_every=7).faults


def test_the_table_prints_medians_ratios_and_verdicts() -> None:
    """The table has the median of the turns, the median of the ratios of the same turn, faults and verdicts."""
    results = Results()
    for turn, (mine, other) in enumerate([(10.0, 20.0), (30.0, 40.0), (11.0, 44.0)]):
        results.add("window64", "imrelay", turn, {"relay_us": mine, "both_us": 2 * mine, "load_cpu": 0.1})
        results.add("window64", "imrelay-before", turn, {"relay_us": 2 * mine, "both_us": 2 * mine})
        results.add("window64", "guaranteed", turn, {"relay_us": other, "both_us": 2 * other, "error": "1 lost"})
    results.add("memory", "imrelay", 0, {"relay_kib": 30.0, "connects": 1500.0})
    results.add("memory", "imrelay-before", 0, {"relay_kib": 30.0, "connects": 1000.0})
    text = table(results, {"webstomp": "no plugin"})
    rows = [line.split() for line in text.splitlines()]
    assert ["imrelay", "-", "11.0", "-", "22.0", "-", "-", "-", "0.10"] in rows
    assert ["imrelay,", "before", "-", "x0.50", "-", "x1.00", "-", "-"] in rows
    assert ["Node.js:", "ws,", "imrelay's", "guarantees", "-", "x0.50", "-", "x0.50", "-", "-"] in rows
    assert "WRONG: 1 lost" in text
    assert "left out: RabbitMQ Web STOMP: no plugin" in text
    reached = {(one["measurement"], one["key"], one["base"]): one["reached"] for one in verdicts(results)}
    assert reached["window64", "relay_us", "guaranteed"] is False
    assert reached["window64", "both_us", "guaranteed"] is True
    assert reached["memory", "relay_kib", ""] is False
    assert reached["memory", "connects", "imrelay-before"] is True
    assert reached["memory", "both_kib", ""] is None
    assert "NOT REACHED      30.00 <= 17" in text
    assert results.as_json()["window64"]["imrelay"]["ratios"]["guaranteed"]["relay_us"] == 0.5


def test_each_target_is_of_a_measurement() -> None:
    """No figure to reach names a measurement that there is not."""
    assert {target.measurement for target in TARGETS} <= set(MEASUREMENTS)
    assert {target.system for target in TARGETS} | {target.base for target in TARGETS} - {""} <= set(TITLES)


def test_a_comparison_takes_each_line_of_imrelay_twice(tmp_path: Path) -> None:
    """`--against` adds the same lines of the other tree, each beside its own, and nothing to the peers."""
    (tmp_path / "imrelay").mkdir()
    options = parse([f"--against={tmp_path}", "--systems=node,imrelay,transient"])
    assert options.systems == ["imrelay", "imrelay-before", "transient", "transient-before", "node"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only=window2"], "window2 is not one of"),
        (["--systems=imrelay-before"], "imrelay-before is not one of"),
        (["--against=/nowhere"], "/nowhere has no imrelay/"),
        ([f"--against={SCRIPTS.parent}", "--systems=node"], "--systems names none of them"),
    ],
)
def test_a_run_of_nothing_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be measured is said in one line, with exit status 2."""
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--count=0"], ["--environment=NAME"]])
def test_a_memory_of_nothing_is_refused(arguments: list[str]) -> None:
    """What scripts/broker-memory cannot do is said with exit status 2."""
    with pytest.raises(SystemExit) as ended:
        parse_memory(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_ends_the_bench_unless_it_was_ignored(ignored: bool) -> None:
    """Started with `nohup` it goes on when the terminal is closed; otherwise it ends, as SIGTERM ends it."""
    program = (
        "import signal, sys; from benchmark.child_process import end_on_signals\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'}); end_on_signals()\n"
        "signal.raise_signal(signal.SIGHUP); print('went on', flush=True)\n"
        "signal.raise_signal(signal.SIGTERM); print('never')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=plain_environment(PYTHONPATH=str(SCRIPTS)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ("went on\n" if ignored else "")


def test_the_scripts_of_the_bench_run() -> None:
    """Each script finds its module, and says what it takes."""
    for name in ("bench", "relay-profile", "broker-memory"):
        done = subprocess.run(
            [str(SCRIPTS / name), "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
        )
        assert f"scripts/{name}" in done.stdout
        if (SCRIPTS.parent / ".venv").exists():
            assert done.returncode == 0
        else:
            assert done.returncode == 1
            assert "run scripts/start or scripts/test once" in done.stdout


def test_a_profile_says_which_module_takes_how_much() -> None:
    """Modules in descending order, in percent and microseconds, the small ones together; or functions."""
    samples = {"imrelay.a": 600, "imrelay.a:f": 350, "imrelay.a:g": 250, "gevent": 397, "gevent:h": 397, "pika": 3}
    assert profile_table("5 pairs", {"relay_us": 50.0}, samples, False).splitlines() == [
        "5 pairs: 50.0 us of CPU per message, 1000 samples",
        "   60.0%   30.0 us  imrelay.a",
        "   39.7%   19.9 us  gevent",
        "    0.3%    0.1 us  all others",
    ]
    assert "35.0%   17.5 us  imrelay.a:f" in profile_table("5 pairs", {"relay_us": 50.0}, samples, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only=window2"], "window2 is not one of"), (["--tree=/nowhere"], "/nowhere has no")],
)
def test_a_profile_of_nothing_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be profiled is said in one line, with exit status 2."""
    with pytest.raises(SystemExit) as ended:
        parse_profile(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_relay_samples_itself(broker_url: str, tmp_path: Path) -> None:
    """At its end the relay of a profile has written where its CPU time went, and has ended as it always does."""
    found = tmp_path / "samples"
    program = SCRIPTS / "benchmark" / "sampled_relay.py"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(program), "serve", f"--broker-url={broker_url}", "--server-port=0"],
            env=plain_environment(SAMPLES=str(found)),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        port = eventually(lambda: re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text()), 30)[1]
        process.send_signal(signal.SIGUSR1)
        client = create_connection(f"ws://127.0.0.1:{port}/me", timeout=30)
        message = '{"to":{"id":"me"}}'
        for _ in range(2000):
            client.send(message)
            client.recv()
        client.close()
    finally:
        process.terminate()
        assert process.wait(30) == 0
    samples = json.loads(found.read_text())
    assert any(name.startswith("imrelay.websocket.") for name in samples)
    assert any(name.startswith("imrelay.broker.") for name in samples)
