"""The handler class under pywsgi, with and without TLS, and under gunicorn, with clients of other authors."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import websocket as websocket_client
from websockets.sync.client import connect

from tests.support.harness import eventually
from tests.support.websocket_peer import (
    BINARY,
    PATIENCE,
    PING,
    PONG,
    TEXT,
    Peer,
    PeerServer,
    close_frame,
    frame,
    running_server,
)

ROOT = Path(__file__).resolve().parents[2]


#: Settings of the server.
SERVER = {"permessage_deflate": True, "max_message_size": 4 << 20, "subprotocols": ["a", "b"]}


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = str(directory / "certificate.pem"), str(directory / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def tls_server(tls_files):
    certificate, key = tls_files
    settings = {"max_message_size": 4 << 20, "close_timeout": 1.0}
    with running_server(certificate=certificate, key=key, **settings) as server:
        yield server


MESSAGES = ["hello", "", "ü" * 70_000, b"\x00\xff" * 500_000, "x" * 126, "y" * 65_536]


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_the_websockets_library_talks_to_it(server, compression):
    """Its client exchanges messages, fragments, pings and a close with the echo application."""
    url = f"ws://127.0.0.1:{server.port}/echo?name=lib{compression}"
    with connect(url, compression=compression, max_size=None, subprotocols=["b", "a"]) as client:
        assert client.subprotocol == "a"
        for message in MESSAGES:
            client.send(message)
            assert client.recv(timeout=PATIENCE) == message
        client.send(["in ", "three ", "parts"])
        assert client.recv(timeout=PATIENCE) == "in three parts"
        assert client.ping().wait(PATIENCE)
        client.close(4001, "bye")
        assert client.close_code == 4001
    assert server.await_report(f"end:lib{compression}") == [4001, "bye"]


def test_the_websocket_client_library_talks_to_it(server):
    """So does another library's client."""
    client = websocket_client.create_connection(f"ws://127.0.0.1:{server.port}/echo", timeout=PATIENCE)
    for message in MESSAGES:
        if isinstance(message, str):
            client.send(message)
            assert client.recv() == message
        else:
            client.send_binary(message)
            assert client.recv() == message
    client.close()


def test_tls(tls_server):
    """Over TLS messages of all sizes, pings, back-pressure and the close handshake work."""
    with Peer(tls_server, receive_buffer=16384) as peer:
        peer.open()
        for size in (5, 20_000, 3_000_000):
            peer.send(frame(TEXT, b"x" * size, mask=b"\0\0\0\0"))
            assert len(peer.read_message()) == size
        peer.send(frame(PING, b"now") + frame(TEXT, b"a") * 300 + close_frame(1000))
        assert peer.read_frame() == (PONG, b"now", 8)
        for _ in range(300):
            assert peer.read_message() == "a"
        peer.expect_closed(1000)


def test_tls_with_a_message_that_the_kernel_takes_in_large_parts(tls_server):
    """A message of several MiB arrives over TLS, though the kernel took a lot of it before it had enough."""
    with Peer(tls_server) as peer:
        peer.open().send(frame(BINARY, b"x" * (4 << 20), mask=b"\0\0\0\0"))
        waiting = [-1, -2]  # bytes in the kernel, looked at until they are no longer more

        def has_had_enough() -> bool:
            octets = fcntl.ioctl(peer.sock.fileno(), termios.FIONREAD, bytes(4))
            waiting.append(int.from_bytes(octets, sys.byteorder))
            return 0 < waiting[-3] == waiting[-2] == waiting[-1]

        eventually(has_had_enough)
        assert len(peer.read_message()) == 4 << 20


def test_tls_refusals_and_violations(tls_server):
    """Over TLS, too, answers and close frames arrive whole before the connection ends."""
    with Peer(tls_server) as peer:
        peer.send(b"GET /refused HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n")
        assert peer.read_answer().status == 400
        peer.read_end()
    with Peer(tls_server) as peer:
        peer.open().send(frame(11) + b"x" * 100_000)
        peer.expect_closed(1002)


def test_tls_with_the_websockets_library(tls_server):
    """A client of another author is content with the TLS end of the connection."""
    import ssl

    context = ssl.create_default_context(cafile=tls_server.certificate)
    with connect(f"wss://127.0.0.1:{tls_server.port}/echo", ssl=context, max_size=None) as client:
        for message in MESSAGES:
            client.send(message)
            assert client.recv(timeout=PATIENCE) == message


def test_early_frames_over_tls(tls_server):
    """Frames that a client sends right behind its handshake are not lost inside the TLS layer."""
    from tests.support.websocket_peer import handshake

    with Peer(tls_server) as peer:
        peer.send(handshake() + frame(TEXT, b"early") + frame(TEXT, b"y" * 30_000))
        assert peer.read_answer().status == 101
        assert peer.read_message() == "early"
        assert len(peer.read_message()) == 30_000


def test_a_tls_handshake_that_never_ends(tls_files):
    """It falls under `handshake_timeout`, and keeps nobody waiting meanwhile."""
    certificate, key = tls_files
    with (
        running_server(certificate=certificate, key=key, handshake_timeout=0.5) as server,
        Peer(server) as other,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as silent,
    ):
        other.open().assert_alive()
        silent.send(b"\x16\x03\x01")
        other.assert_alive()
        assert silent.recv(100) == b""
        other.assert_alive()


GUNICORN_APPLICATION = """
import fcntl
import json
from geventwebsocket.gunicorn import workers
from imrelay.websocket import WebSocketHandler

workers.GeventWebSocketWorker.wsgi_handler = WebSocketHandler

def application(environ, start_response):
    websocket = environ.get("wsgi.websocket")
    if websocket is None:
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "4")])
        return [b"true"]
    while (message := websocket.receive()) is not None:
        websocket.send(message)
    return []
"""


def test_gunicorn(tmp_path):
    """In place of the handler of gunicorn's worker it serves plain requests, refusals and WebSockets alike."""
    (tmp_path / "hosted.py").write_text(GUNICORN_APPLICATION)
    listener = socket.create_server(("127.0.0.1", 0))
    worker = "geventwebsocket.gunicorn.workers.GeventWebSocketWorker"
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-k",
        worker,
        "-w",
        "2",
        "--access-logfile",
        "-",
        "hosted:application",
    ]
    process = subprocess.Popen(
        [*command, "--bind", f"fd://{listener.fileno()}", "--graceful-timeout", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        pass_fds=[listener.fileno()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    hosted = PeerServer(process, listener.getsockname()[1], "")
    try:
        assert hosted.get("/page") is True
        with Peer(hosted) as peer:
            peer.send(b"GET /refused HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n")
            assert peer.read_answer().status == 400
        with Peer(hosted) as peer:
            peer.send(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert peer.read_answer().status == 400
        peers = [Peer(hosted).open() for _ in range(4)]
        for peer in peers:
            peer.assert_alive()
            peer.send(close_frame(4000))
            peer.expect_closed(4000)
            peer.sock.close()
    finally:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=PATIENCE)[0]
        listener.close()
    assert '"GET /page HTTP/1.1" 200' in output
    assert '"GET /echo HTTP/1.1" 101' in output
    assert '"GET /refused HTTP/1.1" 400' in output
    assert "Traceback" not in output


def test_importing_creates_nothing():
    """The import starts no hub, so that a server may fork afterwards."""
    program = (
        "import imrelay.websocket, threading\n"
        "from gevent._hub_local import get_hub_if_exists\n"
        "assert get_hub_if_exists() is None\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=PATIENCE)


def test_nagle_is_off(server):
    """Small frames are not held back by the kernel: accepted sockets have TCP_NODELAY."""
    with Peer(server) as peer:
        peer.open("/no-delay")
        assert peer.read_message() == "1"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before 3.11 a caller keeps the arguments of its call")
def test_the_environ_may_be_let_go(server):
    """Nothing but the application keeps the request's environ for the life of the socket."""
    with Peer(server) as peer:
        peer.open("/environ-goes?name=held", Cookie="c" * 4000)
        assert peer.read_message() == "0"


def test_nothing_is_left_of_closed_sockets(server):
    """After many sockets, closed in many ways, there are as few objects and descriptors as before."""
    before = server.get("/census")
    names = []
    for number in range(60):
        names.append(f"left{number}")
        with Peer(server) as peer:
            peer.open(f"/echo?name=left{number}", Sec_WebSocket_Extensions="permessage-deflate")
            peer.assert_alive()
            if number % 3 == 0:
                peer.send(close_frame(1000))
            elif number % 3 == 1:
                peer.send(frame(11))
    for name in names:
        server.await_report("end:" + name)
    for _ in range(200):
        after = server.get("/census")
        if after["sockets"] <= before["sockets"] and after["descriptors"] <= before["descriptors"]:
            break
    assert after["sockets"] <= before["sockets"]
    assert after["descriptors"] <= before["descriptors"]
    assert after["greenlets"] <= before["greenlets"] + 1


def test_an_application_that_sends_to_nobody_is_no_error():
    """ConnectionClosed that leaves the application is the usual end; another exception is in the log."""
    with running_server(keep_log=True) as server:
        for path in ("/send-after-the-end", "/fail"):
            with Peer(server) as peer:
                peer.open(f"{path}?name={path}")
                peer.send(frame(TEXT, b"go"))
                if path == "/fail":
                    assert peer.answer_close() == (1011, "internal error")
            server.await_report(f"end:{path}")
        server.get("/page")  # by then the end of the other connection is written down
        output = server.log()
    assert output.count("Traceback") == 1
    assert "the application is broken" in output
    assert output.count('HTTP/1.1" 101') >= 1


def test_a_stopped_server_says_1001():
    """When the server is stopped under its sockets, peers get a close frame that says so."""
    program = (
        "import gevent, sys\n"
        "from gevent.pywsgi import WSGIServer\n"
        "from imrelay.websocket import WebSocketHandler\n"
        "def application(environ, start_response):\n"
        "    environ['wsgi.websocket'].receive()\n"
        "    stop.set()\n"
        "    environ['wsgi.websocket'].receive()\n"
        "from gevent.event import Event\n"
        "from gevent.pool import Pool\n"
        "stop = Event()\n"
        "server = WSGIServer(\n"
        "    ('127.0.0.1', 0), application, handler_class=WebSocketHandler, log=None, spawn=Pool(10)\n"
        ")\n"
        "server.start()\n"
        "print(server.server_port, flush=True)\n"
        "stop.wait()\n"
        "server.stop(timeout=0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        with Peer(PeerServer(process, int(process.stdout.readline()), "")) as peer:
            peer.open()
            peer.send(frame(TEXT, b"stop"))
            assert peer.answer_close() == (1001, "going away")
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
