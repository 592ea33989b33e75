"""HTTP up to the application, on gevent-websocket's handler class: heads in time, whole refusals, the log."""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from http import HTTPStatus
from http.client import HTTPException
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler
from geventwebsocket.handler import WebSocketHandler

from imrelay.websocket.handshake import Refusal

__all__ = ["RequestHandler"]

#: Bytes of request headers, all together.
MAX_HEAD = 32_768
#: Seconds and bytes for which input is drained behind a refusal, so that the answer arrives.
LINGER_SECONDS, LINGER_BYTES = 1.0, 262_144
#: What the access log says of bytes that were no request.
_NO_REQUEST = {"RAW_URI": "-", "REQUEST_METHOD": "-", "SERVER_PROTOCOL": "-"}


class RequestHandler(WebSocketHandler):  # type: ignore[misc]  # the base has no types
    """What pywsgi's handler lacks on the open Internet, for plain requests and handshakes alike."""

    #: For each request's head in seconds, from the end of the request before: an idle connection is closed, too.
    handshake_timeout = 10.0

    _deadline: gevent.Timeout | None = None
    environ: dict[str, Any]
    headers: Any
    requestline: str | None
    response_headers: list[Any] | None
    rfile: Any

    def handle(self) -> None:
        """Serve one connection, as pywsgi asks for."""
        if getattr(self.socket, "family", None) in (socket.AF_INET, socket.AF_INET6):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().handle()

    def handle_one_request(self) -> Any:
        """Serve one request, whose head has to be there in time; answer malformed ones with a JSON body."""
        if self.requestline is not None:
            gevent.sleep(0)  # pipelined requests take turns with everybody else's
        self.requestline = None
        self.environ = {}
        self._begun = False
        deadline = self._deadline = gevent.Timeout.start_new(self.handshake_timeout)
        try:
            result = super().handle_one_request()
        except gevent.Timeout as timeout:
            if timeout is not deadline:
                raise
            if not self._begun:
                return None  # nothing was asked for
            self._answer_malformed(Refusal(408, "request_timeout", "the request took too long"))
            return None
        finally:
            self._end_deadline()
        if isinstance(result, tuple):
            status = int(result[0].split()[0])
            self._answer_malformed(Refusal(status, "bad_request", "the request is malformed"))
            return None
        return result

    def read_requestline(self) -> str:
        """Read the first line, and note that something came."""
        self._begun = bool(self.rfile.peek(1))
        line: str = super().read_requestline()
        return line

    def read_request(self, raw_requestline: str) -> Any:
        """Read the headers; the deadline is for them."""
        result = super().read_request(raw_requestline)
        self._end_deadline()
        return result

    def _end_deadline(self) -> None:
        """Forget the deadline: a WebSocket may stay for days."""
        deadline, self._deadline = self._deadline, None
        if deadline is not None:
            deadline.close()

    def MessageClass(self, *args: Any) -> Any:  # noqa: N802 - the name is pywsgi's
        """Read the headers from a stream that ends with an error at `MAX_HEAD` bytes."""
        try:
            return super().MessageClass(_Head(self.rfile), *args[1:])
        except HTTPException as error:
            raise ValueError(f"malformed headers: {error}") from error

    def _connection_upgrade_requested(self) -> bool:
        """Keep pywsgi from handing out the bare stream: an application reads its request's body alone."""
        return False

    def log_request(self) -> None:
        """Write the access log where the server keeps it: pywsgi's, or gunicorn's."""
        access = getattr(self.server.log, "access", None)
        if access is None:
            WSGIHandler.log_request(self)
        else:
            took = timedelta(seconds=max(0.0, self.time_finish - self.time_start))
            access(_Logged(self), list(self.headers.items()), {**_NO_REQUEST, **self.environ}, took)

    def get_environ(self) -> dict[str, Any]:
        """Return the environ of one request; RAW_URI is what gunicorn's access log asks for."""
        environ: dict[str, Any] = super().get_environ()
        environ["RAW_URI"] = self.path
        return environ

    def _answer(self, refusal: Refusal) -> None:
        """Refuse the upgrade, and see that the answer arrives."""
        body = _body(refusal)
        self.wsgi_input.content_length = 0  # nothing of a body is waited for
        self.wsgi_input.chunked_input = False
        self.start_response(
            f"{refusal.status} {_phrase(refusal.status)}",
            [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
                *refusal.headers,
            ],
        )
        self.close_connection = True
        self.write(body)
        self._linger()

    def _answer_malformed(self, refusal: Refusal) -> None:
        """Refuse what is no request, as far as pywsgi is concerned."""
        body = _body(refusal)
        self.status = f"{refusal.status} {_phrase(refusal.status)}"
        head = (
            f"HTTP/1.1 {self.status}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._orig_status = self.status
        self.response_headers = []
        self.response_length = len(body)
        self.time_finish = self.time_start
        try:
            self.socket.sendall(head.encode() + body)
            self._linger()
        except OSError:
            pass  # the peer did not wait for it
        self.log_request()

    def _linger(self) -> None:
        """Send FIN and drain what still comes: a close with unread input would reset the connection."""
        self.socket.settimeout(LINGER_SECONDS)
        deadline = gevent.Timeout.start_new(LINGER_SECONDS)
        try:
            self.socket.shutdown(socket.SHUT_WR)
            left = LINGER_BYTES
            while left > 0:
                data = self.socket.recv(16_384)
                if not data:
                    break
                left -= len(data)
                gevent.sleep(0)
        except OSError:
            pass  # the peer is gone, or slow
        except gevent.Timeout as timeout:
            if timeout is not deadline:
                raise
        finally:
            deadline.close()


class _Head:
    """Lines of a request's head, `MAX_HEAD` bytes together at most."""

    __slots__ = ("_left", "_stream")

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = MAX_HEAD

    def readline(self, size: int = -1) -> bytes:
        line: bytes = self._stream.readline(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(line)
        if self._left <= 0:
            raise ValueError(f"request head is over {MAX_HEAD} bytes")
        return line


class _Logged:
    """The answer as gunicorn's access log takes it."""

    def __init__(self, handler: RequestHandler) -> None:
        status = handler.status
        self.status = status.decode("latin-1") if isinstance(status, bytes) else status or "000"
        self.headers = handler.response_headers or []
        self.sent = handler.response_length


def _body(refusal: Refusal) -> bytes:
    return json.dumps({"error": {"code": refusal.code, "message": refusal.message}}).encode()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Refused"
