"""The load generator of scripts/bench sees what a server does wrong, and the table says it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websocket import create_connection

from tests.harness import eventually, plain_environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "bench.d"))

from load import Loop, Meter, Pair, closed_loop, connect, probe
from measure import MEASUREMENTS
from report import TARGETS, Results, table, verdicts
from rooms import parse as parse_profile
from rooms import table as profile_table
from wires import PING, PlainWire, SocketIoWire, StompWire, parse_frame, server_frame

#: Changes the list of payloads that are due to the receiver; called for each message, probes left out.
Fault = Callable[[int, bytes], list[bytes]]


def faithful(number: int, payload: bytes) -> list[bytes]:
    """Hand on what came."""
    return [payload]


class FakeServer:
    """A relay of one sender and one receiver, in a thread: what the sender says goes to the receiver."""

    def __init__(self, wire: PlainWire, fault: Fault = faithful, *, ping_every: int = 0) -> None:
        self._wire = wire
        self._fault = fault
        self._ping_every = ping_every
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
        for sent, answer in self._wire.login("any"):
            if sent is not None:
                one.recv(65_536)
            one.sendall(server_frame(answer))

    def _relay(self, sender: socket.socket, receiver: socket.socket) -> None:
        data, number = b"", 0
        while chunk := sender.recv(65_536):
            data += chunk
            out = b""
            while (found := self._next(data)) is not None:
                payload, data = found
                if b"probe" in payload:
                    out += self._framed(payload)
                    continue
                out += b"".join(self._framed(one) for one in self._fault(number, payload))
                number += 1
                if self._ping_every and number % self._ping_every == 0:
                    out += server_frame(b"there?", PING)
            receiver.sendall(out)

    def _framed(self, payload: bytes) -> bytes:
        """Say it as the server of that protocol does; STOMP has its own head, with a running number."""
        if isinstance(self._wire, StompWire):
            body = payload.partition(b"\n\n")[2]
            payload = b"MESSAGE\nmessage-id:%d\n\n%b\n" % (len(payload), body)
        return server_frame(payload)

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


@pytest.fixture
def relay() -> Iterator[Callable[..., Meter]]:
    """Send messages through a fake server and return what the generator says about them."""

    def send(wire: PlainWire, fault: Fault = faithful, *, size: int = 100, ping_every: int = 0) -> Meter:
        server, loop, meter = FakeServer(wire, fault, ping_every=ping_every), Loop(), Meter()
        try:
            sender, receiver = connect(loop, wire, server.address, ["s00000", "r00000"], at_once=1)
            probe(loop, [(sender, receiver)])
            pair = Pair(meter, sender, receiver, size=size, window=8, count=64)
            closed_loop(loop, [pair], warm=0.05, seconds=0.3, mark=lambda: None, drain=0.2)
            assert pair.sent > 64  # once round at least
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


WIRES = {
    "plain": PlainWire(),
    "socketio": SocketIoWire(),
    "stomp": StompWire("direct_message", "vhost", "user", "password"),
}


@pytest.mark.parametrize("wire", WIRES)
def test_a_faithful_server_has_no_faults(relay: Callable[..., Meter], wire: str) -> None:
    """All messages of a server that does right are counted, each with its latency, and nothing is wrong."""
    meter = relay(WIRES[wire])
    assert not meter.faults
    assert 0 < len(meter.latencies) < meter.count
    assert all(0 <= latency < 5 for latency in meter.latencies)


@pytest.mark.parametrize("wire", WIRES)
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
def test_a_fault_is_seen(relay: Callable[..., Meter], wire: str, fault: Fault, seen: dict[str, int]) -> None:
    """One message that is lost, doubled, swapped with the next, or damaged is reported as what it is."""
    assert dict(relay(WIRES[wire], fault).faults) == seen


@pytest.mark.parametrize("size", [100, 1024, 16_384])
def test_control_frames_between_messages_are_no_fault(relay: Callable[..., Meter], size: int) -> None:
    """Pings between the messages, whatever the size of these, are stepped over."""
    assert not relay(PlainWire(), size=size, ping_every=7).faults


def test_the_table_prints_medians_ratios_and_verdicts() -> None:
    """The table has the median of the turns, the median of the ratios of the same turn, faults and verdicts."""
    results = Results()
    for turn, (mine, other) in enumerate([(10.0, 20.0), (30.0, 40.0), (11.0, 44.0)]):
        results.add("window64", "imrelay", turn, {"relay_us": mine, "both_us": 2 * mine, "load_cpu": 0.1})
        results.add("window64", "node", turn, {"relay_us": other, "both_us": 2 * other, "error": "1 lost"})
    results.add("memory", "imrelay", 0, {"relay_kib": 30.0, "connects": 1500.0})
    text = table(results, {"webstomp": "no plugin"})
    row = next(line for line in text.splitlines() if line.startswith("  imrelay "))
    assert "11.0 x0.50" in row
    assert "WRONG: 1 lost" in text
    assert "left out: RabbitMQ Web STOMP: no plugin" in text
    reached = {(one["measurement"], one["key"], one["base"]): one["reached"] for one in verdicts(results)}
    assert reached["window64", "relay_us", "node"] is True
    assert reached["window64", "both_us", "webstomp"] is None
    assert reached["memory", "relay_kib", ""] is False
    assert reached["memory", "connects", ""] is True
    assert "NOT REACHED      30.00 <= 24" in text


def test_each_target_is_of_a_measurement() -> None:
    """No figure to reach names a measurement that there is not."""
    assert {target.measurement for target in TARGETS} <= set(MEASUREMENTS)


def test_a_profile_says_which_room_takes_how_much() -> None:
    """Rooms in descending order, in percent and microseconds, the small ones together; or functions."""
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
    program = Path(__file__).resolve().parent.parent / "scripts" / "bench.d" / "sampled_relay.py"
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
