"""A raw WebSocket client for the tests, and the server that they talk to.

Run as a program it is that server: pywsgi with our handler class in a process of its own, on a free port of
127.0.0.1, which it prints. What happened inside it is asked for over HTTP, and awaited there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


# -- the client ----------------------------------------------------------------------------------------------


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x11\x22\x33\x44",
    width: int | None = None,
    announced: int | None = None,
) -> bytes:
    """Return one frame as a client sends it, or as it must not: `width` forces a length of 2 or 8 bytes."""
    size = len(payload) if announced is None else announced
    if width is None:
        width = 0 if size < 126 else 2 if size < 65536 else 8
    bit = 0 if mask is None else 0x80
    head = bytes(((0x80 if fin else 0) | rsv << 4 | opcode, bit | {0: size, 2: 126, 8: 127}[width]))
    head += size.to_bytes(width, "big") if width else b""
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[index & 3] for index, byte in enumerate(payload))


def close_frame(code: int | None = None, reason: bytes = b"") -> bytes:
    """Return a client's close frame."""
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def handshake(path: str = "/echo", **changes: str | None) -> bytes:
    """Return a handshake; `changes` are headers by their names with `_` for `-`, None leaves one out."""
    headers: dict[str, str | None] = {
        "Host": "127.0.0.1",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
    }
    line = changes.pop("line", f"GET {path} HTTP/1.1")
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None), "", ""]
    return "\r\n".join(str(line) for line in lines).encode("latin-1")


class HttpAnswer:
    """An HTTP answer."""

    def __init__(self, head: bytes, body: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        self.body = body

    @property
    def error(self) -> str:
        """The code in the JSON body."""
        return str(json.loads(self.body)["error"]["code"])


class Peer:
    """One TCP connection to the server, with a buffer; every read is bounded by `PATIENCE`."""

    def __init__(self, server: PeerServer, *, receive_buffer: int | None = None) -> None:
        self.sock: Any = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        try:
            self.sock.connect(("127.0.0.1", server.port))
        except OSError:
            self.sock.close()
            raise
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.certificate:
            context = ssl.create_default_context(cafile=server.certificate)
            context.check_hostname = False
            self.sock = context.wrap_socket(self.sock)
        self.buffer = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def open(self, path: str = "/echo", **changes: str | None) -> Peer:
        """Do the handshake and expect 101."""
        self.send(handshake(path, **changes))
        answer = self.read_answer()
        assert answer.status == 101, (answer.status, answer.body)
        self.answer = answer
        return self

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def send_until_refused(self, data: bytes) -> None:
        """Send the same again and again, until the kernel says that the other side is gone."""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while True:
                self.send(data)

    def fill(self) -> bool:
        """Read more; False at the end of the stream."""
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def take(self, size: int) -> bytes:
        """Read `size` bytes."""
        if len(self.buffer) < size:
            pieces, have = [self.buffer], len(self.buffer)
            self.buffer = b""
            while have < size:
                assert self.fill(), f"end of stream after {have} bytes, {b''.join(pieces)[-50:]!r}"
                pieces.append(self.buffer)
                have += len(self.buffer)
                self.buffer = b""
            self.buffer = b"".join(pieces)
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read_answer(self) -> HttpAnswer:
        """Read one whole HTTP answer."""
        while b"\r\n\r\n" not in self.buffer:
            assert self.fill(), f"end of stream after {self.buffer!r}"
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        answer = HttpAnswer(head, b"")
        if answer.status != 101:
            answer.body = self.take(int(answer.headers["content-length"]))
        return answer

    def read_frame(self) -> tuple[int, bytes, int]:
        """Read one frame: opcode, payload, first byte's upper half."""
        first, second = self.take(2)
        assert not second & 0x80, "a server does not mask"
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
        return first & 0x0F, self.take(size), first >> 4

    def read_message(self) -> bytes | str:
        """Read one unfragmented message."""
        opcode, payload, bits = self.read_frame()
        assert bits == 8, f"bits {bits:x}"
        assert opcode in (TEXT, BINARY), f"opcode {opcode}, {payload!r}"
        return payload.decode() if opcode == TEXT else payload

    def read_close(self) -> tuple[int | None, str]:
        """Read a close frame: code (None if empty) and reason."""
        opcode, payload, _ = self.read_frame()
        assert opcode == CLOSE, f"opcode {opcode}, {payload[:50]!r}"
        return (int.from_bytes(payload[:2], "big") if payload else None), payload[2:].decode()

    def read_end(self) -> None:
        """Expect the end of the stream, not a reset, and nothing before it."""
        assert not self.fill(), f"more came: {self.buffer[:50]!r}"

    def read_to_end(self) -> bytes:
        """Read whatever comes until the end of the stream or a reset."""
        with contextlib.suppress(ConnectionResetError):
            while self.fill():
                pass
        data, self.buffer = self.buffer, b""
        return data

    def expect_closed(self, code: int | None) -> str:
        """Expect a close frame of this code and then the end of the stream, without a reset."""
        seen, reason = self.read_close()
        assert seen == code, (seen, reason)
        self.read_end()
        return reason

    def answer_close(self) -> tuple[int | None, str]:
        """Read a close frame, answer it with its code, expect the end of the stream; return code and reason."""
        code, reason = self.read_close()
        self.send(close_frame(code))
        self.read_end()
        return code, reason

    def assert_alive(self, text: str = "still here") -> None:
        """Expect an echo."""
        self.send(frame(TEXT, text.encode()))
        assert self.read_message() == text


class PeerServer:
    """The server process."""

    def __init__(self, process: subprocess.Popen[str], port: int, certificate: str) -> None:
        self.process = process
        self.port = port
        self.certificate = certificate

    def get(self, path: str) -> Any:
        """GET a path, and return what its JSON says."""
        with Peer(self) as peer:
            peer.send(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            answer = peer.read_answer()
            assert answer.status == 200, (answer.status, answer.body)
            return json.loads(answer.body)

    def await_report(self, name: str) -> Any:
        """Wait until the application has reported something under `name`, and return it."""
        return self.get("/report?" + quote(name))

    def log(self) -> str:
        """End the server, and return what it wrote to its standard error."""
        self.process.terminate()
        return self.process.communicate(timeout=PATIENCE)[1]


@contextlib.contextmanager
def running_server(*, certificate: str = "", key: str = "", **settings: Any) -> Iterator[PeerServer]:
    """Start a server process whose handler class has these attributes; end it afterwards."""
    arguments = json.dumps({"settings": settings, "certificate": certificate, "key": key})
    process = subprocess.Popen(
        [sys.executable, __file__, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if settings.get("keep_log") else subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    try:
        assert process.stdout is not None
        yield PeerServer(process, int(process.stdout.readline()), certificate)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


# -- the server ----------------------------------------------------------------------------------------------


def serve(settings: dict[str, Any], certificate: str, key: str) -> None:
    """Serve the applications below until killed."""
    import gevent
    from gevent.event import AsyncResult

    from imrelay.websocket import (
        UPGRADE,
        ConnectionClosed,
        HttpConnections,
        Listener,
        WebSocketHandler,
        origin_allowed,
    )

    reports: dict[str, AsyncResult] = {}

    def report(name: str) -> AsyncResult:
        return reports.setdefault(name, AsyncResult())

    class Handler(WebSocketHandler):
        def get_environ(self) -> dict[str, Any]:
            environ = super().get_environ()
            environ["test.no_delay"] = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            return environ

    class Accepted:
        """What runs on a socket where the application decides: it calls the application with the socket."""

        def __init__(self, environ: dict[str, Any]) -> None:
            self.environ = environ
            held.add(self)

        def attach(self) -> None:
            if self.environ["PATH_INFO"] == "/broken-attach":
                raise RuntimeError("it cannot attach")
            if self.environ["PATH_INFO"] == "/slow-attach":
                report("attach:begun").set(True)
                report("attach:go").get(timeout=PATIENCE)

        def run(self, websocket: Any) -> None:
            application({**self.environ, "wsgi.websocket": websocket}, None)

        def close(self) -> None:
            held.discard(self)
            report("closed:" + self.environ["PATH_INFO"]).set(True)

    held: set[Accepted] = set()

    def decide(environ: dict[str, Any], start_response: Any) -> Any:
        """Answer a handshake."""
        path, upgrade = environ["PATH_INFO"], environ[UPGRADE]
        body, headers = b"", []
        if path == "/refused":
            status, headers = "503 Service Unavailable", [("Retry-After", "7")]
            body = json.dumps({"error": {"code": "overloaded", "message": "come back later"}}).encode()
        elif path == "/same-origin" and not origin_allowed(environ, ()):
            status, body = "403 Forbidden", b'{"error": {"code": "bad_origin", "message": "not you"}}'
        elif path == "/plain-answer":
            status = "200 OK"
        elif path == "/raises":
            raise RuntimeError("the application is broken")
        else:
            status = "101 Switching Protocols"
        if path != "/nothing-accepted":
            upgrade.accept(Accepted(environ))
        if path == "/accepts-twice":
            upgrade.accept(Accepted({**environ, "PATH_INFO": "/echo"}))
        if path == "/raises-behind":
            raise RuntimeError("the application is broken")
        if status.startswith("101"):
            headers = [("X-More", "yes"), ("Upgrade", "h2c"), ("Content-Type", "text/html")]
        else:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if path == "/lazy":
            return lazily(start_response, status, headers)
        start_response(status, headers)
        if path == "/with-a-body":
            return [b"a 101 has none"]
        if path == "/close-raises":
            return BrokenClose()
        if path == "/replaced":
            start_response("200 OK", [("Content-Length", "0")])
        return [body]

    def lazily(start_response: Any, status: str, headers: Any) -> Iterator[bytes]:
        """Call `start_response` when the iterable is asked for its first piece, as PEP 3333 allows."""
        start_response(status, headers)
        yield b""

    class BrokenClose(list[bytes]):
        def close(self) -> None:
            raise RuntimeError("the iterable cannot be closed")

    def echo(websocket: Any, query: dict[str, str]) -> None:
        while (message := websocket.receive()) is not None:
            websocket.send(message)

    def busy(websocket: Any, query: dict[str, str]) -> None:
        websocket.receive()
        report("go:" + query["name"]).get(timeout=PATIENCE)
        echo(websocket, query)

    def close(websocket: Any, query: dict[str, str]) -> None:
        websocket.receive()
        websocket.close(int(query["code"]), query.get("reason", ""))

    def close_at_once(websocket: Any, query: dict[str, str]) -> None:
        websocket.close(1000)

    def close_unasked(websocket: Any, query: dict[str, str]) -> None:
        gevent.spawn(
            lambda: (report("go:" + query["name"]).get(timeout=PATIENCE), websocket.close(4000, "unasked"))
        )
        report("received:" + query["name"]).set(websocket.receive())

    def send_in_parts(websocket: Any, query: dict[str, str]) -> None:
        """Many greenlets send, so that frames would mix if they could."""
        size, count, greenlets = int(query["size"]), int(query["count"]), int(query["greenlets"])

        def send(number: int) -> None:
            for index in range(count):
                websocket.send(f"{number}:{index}:" + chr(97 + number) * size)

        senders = [gevent.spawn(send, number) for number in range(greenlets)]
        gevent.joinall(senders)
        echo(websocket, query)

    def send_batches(websocket: Any, query: dict[str, str]) -> None:
        websocket.send_messages([(b"one", False), (b"\x00two", True), ("drei €".encode(), False)])
        websocket.send_messages([])
        echo(websocket, query)

    def send_big(websocket: Any, query: dict[str, str]) -> None:
        """Send until the socket ends; say how it ended for those who were blocked."""
        name, count = query["name"], int(query.get("greenlets", 1))
        endless = count > 0 and "once" not in query
        payload = b"x" * int(query["size"])

        def send() -> str:
            try:
                while True:
                    websocket.send(payload)
                    if not endless:
                        return "sent"
            except ConnectionClosed as error:
                return f"{error.code} {error.reason}"

        senders = [gevent.spawn(send) for _ in range(count)]
        received = websocket.receive()
        gevent.joinall(senders)
        report("senders:" + name).set([received, *(sender.value for sender in senders)])

    def receive_raw(websocket: Any, query: dict[str, str]) -> None:
        while messages := websocket.receive_messages():
            for payload, binary in messages:
                websocket.send(json.dumps([payload.hex(), binary]))

    def receive_twice(websocket: Any, query: dict[str, str]) -> None:
        other = gevent.spawn(websocket.receive)
        gevent.sleep(0)
        try:
            websocket.receive()
        except Exception as error:
            websocket.send(type(error).__name__)
        other.join()

    def receive_briefly(websocket: Any, query: dict[str, str]) -> None:
        """A receive that is given up must not lose the message that comes after it."""
        with gevent.Timeout(0.01, False):
            websocket.receive()
        websocket.send("waited")
        echo(websocket, query)

    def bad_calls(websocket: Any, query: dict[str, str]) -> None:
        said = []
        for call in (
            lambda: websocket.close(1005),
            lambda: websocket.close(999),
            lambda: websocket.send(7),
            lambda: websocket.send("\ud800"),
        ):
            try:
                call()
                said.append("nothing")
            except Exception as error:
                said.append(type(error).__name__)
        websocket.send(json.dumps(said))
        websocket.close(4000, "ü" * 100)
        websocket.close(4001, "another")
        try:
            websocket.send("too late")
        except ConnectionClosed as error:
            report("late:" + query["name"]).set([error.code, error.reason])

    def fail(websocket: Any, query: dict[str, str]) -> None:
        websocket.receive()
        raise RuntimeError("the application is broken")

    def go_away(websocket: Any, query: dict[str, str]) -> None:
        websocket.receive()

    def peak(websocket: Any, query: dict[str, str]) -> None:
        """Echo the size of each message, and the most memory that was in use meanwhile."""
        import tracemalloc

        tracemalloc.start()
        websocket.send("ready")
        while True:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            message: Any = websocket.receive_messages() if "raw" in query else websocket.receive()
            if not message:
                break
            used = tracemalloc.get_traced_memory()[1] - before
            websocket.send(json.dumps([len(message[0][0]) if "raw" in query else len(message), used]))
            del message

    def environ_goes(websocket: Any, query: dict[str, str]) -> None:
        """Tell whether anything but the application still holds its environ."""
        import gc

        held = [
            found
            for found in gc.get_objects()
            if type(found) is dict and found.get("test.marker") == query["name"]
        ]
        websocket.send(str(len(held)))
        echo(websocket, query)

    def no_delay(websocket: Any, query: dict[str, str]) -> None:
        websocket.send(query["no_delay"])

    def send_after_the_end(websocket: Any, query: dict[str, str]) -> None:
        while websocket.receive() is not None:
            pass
        websocket.send("nobody is there")

    applications = {
        f"/{function.__name__.replace('_', '-')}": function
        for function in (
            echo, busy, close, close_at_once, close_unasked, send_in_parts, send_batches, send_big, receive_raw,
            receive_twice, receive_briefly, bad_calls, fail, go_away, peak, environ_goes, no_delay,
            send_after_the_end,
        )
    }  # fmt: skip
    for path in ("/slow-attach", "/same-origin", "/lazy", "/accepts-twice"):
        applications[path] = echo

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        path = environ["PATH_INFO"]
        query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"], True).items()}
        websocket = environ.get("wsgi.websocket")
        if websocket is None and UPGRADE in environ:
            return decide(environ, start_response)  # type: ignore[no-any-return]
        if websocket is not None:
            environ["test.marker"] = query.get("name")
            query["no_delay"] = str(environ["test.no_delay"])
            del environ
            try:
                applications[path](websocket, query)
            finally:
                if "name" in query:
                    report("end:" + query["name"]).set([websocket.close_code, websocket.close_reason])
            return []
        if path == "/report":
            answer: Any = report(environ["QUERY_STRING"].replace("%3A", ":")).get(timeout=PATIENCE)
        elif path == "/go":
            report(environ["QUERY_STRING"]).set(True)
            answer = True
        elif path == "/held":
            answer = len(held)
        elif path == "/census":
            import gc

            from imrelay.websocket import WebSocket

            gc.collect()
            answer = {
                "descriptors": len(os.listdir("/proc/self/fd")),
                "sockets": sum(isinstance(found, WebSocket) for found in gc.get_objects()),
                "greenlets": sum(isinstance(found, gevent.Greenlet) for found in gc.get_objects()),
            }
        elif path == "/body":
            answer = environ["wsgi.input"].read().decode()
        elif path == "/lines":
            answer = [line.decode() for line in environ["wsgi.input"]]
        elif path == "/bytes":
            answer = "".join(byte.decode() for byte in iter(lambda: environ["wsgi.input"].read(1), b""))
        elif path == "/swallow":
            answer = sum(len(piece) for piece in iter(lambda: environ["wsgi.input"].read(65_536), b""))
        elif path == "/body-raises":
            try:
                environ["wsgi.input"].read()
            except OSError as error:
                raise RuntimeError("the application did not like the body") from error
        elif path == "/body-or-500":
            with contextlib.suppress(OSError):
                environ["wsgi.input"].read()
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        elif path == "/body-later":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return iter(lambda: environ["wsgi.input"].read(10), b"")  # type: ignore[return-value]
        elif path == "/big":
            answer = "x" * int(environ["QUERY_STRING"])
        elif path == "/slow-answer":
            start_response("200 OK", [("Connection", "close")])
            return (gevent.sleep(0.1) or b"part" for _ in range(5))  # type: ignore[return-value]
        else:
            answer = {"method": environ["REQUEST_METHOD"], "path": path}
        body = json.dumps(answer).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    if not settings.pop("keep_log", False):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    settings["subprotocols"] = tuple(settings.get("subprotocols", ()))
    tls = {"certfile": certificate, "keyfile": key} if certificate else {}
    if "max_http_connections" in settings:
        settings["http_connections"] = HttpConnections(settings.pop("max_http_connections"))
    settings["served_when_full"] = frozenset(("/health",))
    handler_class = type("TestedHandler", (Handler,), settings)
    server = Listener(("127.0.0.1", 0), application, handler_class=handler_class, **tls)
    server.start()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
