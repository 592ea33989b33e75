"""HTTP requests on gevent-websocket's handler class: time and size limits, refusals with a JSON body, the log.

The names of pywsgi that are not public and are used here: `Input._discard`, `WSGIHandler._sendall`,
`_handle_client_error`, `_connection_upgrade_requested`, `_orig_status`.
"""

from __future__ import annotations

import errno
import io
import logging
import socket
from datetime import timedelta
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler
from geventwebsocket.handler import WebSocketHandler

from imrelay.websocket.body import NO_BODY, Allowance, RequestBody, SocketReader
from imrelay.websocket.ending import linger, reset, turn_away
from imrelay.websocket.fairness import yield_turn
from imrelay.websocket.handshake import Refusal
from imrelay.websocket.head import (
    Fields,
    Malformed,
    check_request_line,
    check_target,
    framing_of,
    read_fields,
)
from imrelay.websocket.http_connections import EXTRA_SECONDS, HttpConnections, Place
from imrelay.websocket.http_state import HttpState
from imrelay.websocket.responses import Logged, body_of, phrase_of, whole_answer

__all__ = ["RequestHandler"]

logger = logging.getLogger(__name__)

#: Bytes of a body that are read after the answer, so that the connection can be kept; with more it is closed.
DRAIN_BYTES = 65_536
#: What the access log says of bytes that were no request.
_NO_REQUEST = {"RAW_URI": "-", "REQUEST_METHOD": "-", "SERVER_PROTOCOL": "-"}
_FULL = Refusal(503, "too_many_connections", "this server has as many HTTP connections as it may; try again later")


class RequestHandler(WebSocketHandler):  # type: ignore[misc]  # the base has no types
    """Adds to pywsgi's handler the limits that a server on the open Internet needs."""

    #: Seconds for the head of each request, from the end of the request before: an idle connection is closed, too.
    handshake_timeout = 10.0
    #: Seconds that a request may wait for its body, all reads together.
    body_timeout = 60.0
    #: Seconds that an answer may wait for the client to take it, all writes together.
    answer_timeout = 60.0
    #: Bytes of the largest request body; None: the application decides how much it reads.
    max_body_size: int | None = None
    #: Bounds the connections of this process that are no WebSockets; None: the server has its own bound or none.
    http_connections: HttpConnections | None = None
    #: Paths that are served although `http_connections` is full: those of health checks.
    served_when_full: frozenset[str] = frozenset()

    _deadline: gevent.Timeout | None = None
    _http: HttpState
    _orig_status: str | None
    close_connection: bool
    code: int | None
    environ: dict[str, Any]
    headers: Any
    path: str
    requestline: str | None
    response_headers: list[Any] | None
    rfile: Any
    status: Any
    wsgi_input: RequestBody

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        reader = SocketReader(sock)
        super().__init__(sock, address, server, io.BufferedReader(reader))
        self._http = HttpState(reader)
        self._http.taking = Allowance(self.answer_timeout)

    def handle(self) -> None:
        """Serve one connection, as pywsgi asks for."""
        if getattr(self.socket, "family", None) in (socket.AF_INET, socket.AF_INET6):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        place = Place.FREE if self.http_connections is None else self.http_connections.enter()
        if place is Place.NONE:
            self._turn_away()
            return
        self._http.is_counted, self._http.is_extra = self.http_connections is not None, place is Place.EXTRA
        try:
            super().handle()
        finally:
            self._leave_http()

    def handle_one_request(self) -> Any:
        """Serve one request, whose head has to be there in time; answer malformed ones with a JSON body."""
        if self.requestline is not None:
            yield_turn()  # pipelined requests take turns with those of other connections
        self.requestline = None
        self.environ = {}
        self._begun = False
        self._http.taking = Allowance(self.answer_timeout)
        seconds = self.handshake_timeout
        if self._http.is_extra and self.http_connections is not None:
            seconds = min(seconds, EXTRA_SECONDS)
            self._http.undecided = gevent.getcurrent()
            self.http_connections.await_request(self._end_head)
        deadline = self._deadline = gevent.Timeout.start_new(seconds)
        try:
            result = super().handle_one_request()
        except gevent.Timeout as timeout:
            if timeout is not deadline:
                raise
            if self._http.is_extra:
                self._turn_away()
            elif self._begun:
                self._answer_malformed(Refusal(408, "request_timeout", "the request took too long"))
            return None  # else nothing was asked for
        finally:
            self._end_deadline()
        if isinstance(result, tuple):
            status, refusal = result
            if not isinstance(refusal, Refusal):
                refusal = Refusal(int(status.split()[0]), "bad_request", "the request is malformed")
            self._answer_malformed(refusal)
            return None
        return result if self._end_body(result is True) else None

    def _end_body(self, is_kept: bool) -> bool:
        """Read what is left of the body after the answer; tell whether the connection can be kept."""
        body, self.wsgi_input = self.wsgi_input or NO_BODY, NO_BODY
        if not body.is_complete and not (is_kept and body.drain(DRAIN_BYTES)):
            is_kept = False
            self._linger()
        if self._http.reader is not None:
            self._http.reader.allowance = None
        return is_kept

    def read_requestline(self) -> str:
        """Read the first line, and note that something came."""
        self._begun = bool(self.rfile.peek(1))
        line: str = super().read_requestline()
        return line

    def read_request(self, raw_requestline: str) -> Any:
        """Read the headers; the deadline is for them."""
        check_request_line(raw_requestline)
        result = super().read_request(raw_requestline)
        self._end_deadline()
        expected = self.headers.get("expect", "100-continue")
        if expected.lower() != "100-continue":
            raise Malformed("the only Expect that is understood is 100-continue", 417, "expectation_failed")
        return result

    def _end_deadline(self) -> None:
        """Forget the deadline: a WebSocket may stay for days."""
        deadline, self._deadline = self._deadline, None
        if deadline is not None:
            deadline.close()
        if self._http.is_extra and self.http_connections is not None:
            self.http_connections.note_request(self._end_head)

    def _end_head(self) -> None:
        """Let the deadline of the head pass at once; called by `http_connections` in another greenlet."""
        gevent.get_hub().loop.run_callback(self._throw_deadline)

    def _throw_deadline(self) -> None:
        if self._deadline is not None and self._http.undecided is not None:
            self._http.undecided.throw(self._deadline)

    def MessageClass(self, *_: Any) -> Fields:  # noqa: N802 - the name is pywsgi's
        """Read the headers, and check them before pywsgi makes anything of them."""
        self.path, host = check_target(self.path, self.command)
        fields = read_fields(self.rfile)
        if host is not None and len(fields.get_all("host")) < 2:
            fields.remove("host")
            fields.add("Host", host)
        self._http.framing = framing_of(fields, self.request_version)
        return fields

    def _handle_client_error(self, error: Exception) -> tuple[str, Refusal | None]:
        """Called by pywsgi for a request that cannot be read; return status and refusal for the answer."""
        if not isinstance(error, ValueError | OSError):
            logger.exception("reading a request failed")
        logger.debug("from %s: %s", self.client_address, ascii(str(error)))
        return ("400", error.refusal if isinstance(error, Malformed) else None)

    def _connection_upgrade_requested(self) -> bool:
        """Keep pywsgi from giving the application the bare stream: it reads the body of its request alone."""
        return False

    def get_environ(self) -> dict[str, Any]:
        """Return the environ of one request; RAW_URI is what gunicorn's access log asks for."""
        environ: dict[str, Any] = super().get_environ()
        environ["RAW_URI"] = self.path
        environ["wsgi.input"] = self.wsgi_input = self._make_body(environ)
        return environ

    def _make_body(self, environ: dict[str, Any]) -> RequestBody:
        framing = self._http.framing
        if not framing.length and not framing.chunked:
            return NO_BODY
        if self._http.reader is not None:
            self._http.reader.allowance = Allowance(self.body_timeout)
        expects = "HTTP_EXPECT" in environ and self.request_version == "HTTP/1.1"
        return RequestBody(
            self.rfile,
            length=framing.length,
            chunked=framing.chunked,
            max_size=self.max_body_size,
            before=self._proceed if expects else None,
        )

    def _proceed(self) -> None:
        """Tell a client that waits for it to send its body."""
        if not self.headers_sent:
            with self._http.taking:
                self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- answers ---------------------------------------------------------------------------------------------

    def run_plain(self) -> None:
        """Call the application, unless the request is refused; refuse it also if its body cannot be read."""
        failure = self.wsgi_input.failure
        if self._http.is_extra:
            self.close_connection = True
            if self.environ["PATH_INFO"] not in self.served_when_full:
                self._answer(_FULL)
                return
        try:
            if failure is not None:
                raise failure
            WSGIHandler.run_application(self)
        except Exception:
            failure = self.wsgi_input.failure
            if failure is None:
                raise
            self.close_connection = True
            if not self.headers_sent:
                self._answer(failure.refusal)

    def process_result(self) -> None:
        """Send the application's answer, or a refusal where the request's body could not be read."""
        failure = self.wsgi_input.failure
        if failure is not None and not self.headers_sent:
            self._answer(failure.refusal)
        else:
            super().process_result()

    def finalize_headers(self) -> None:
        """Add `Connection: close` where the connection will be closed after this answer."""
        if self.wsgi_input.unread > DRAIN_BYTES:
            self.close_connection = True
        if self.close_connection and self.code != 101:
            assert self.response_headers is not None
            if not any(name.lower() == b"connection" for name, _ in self.response_headers):
                self.response_headers.append((b"Connection", b"close"))
        super().finalize_headers()

    def _sendall(self, data: bytes) -> None:
        """Called by pywsgi with each part of an answer; resets the connection of a client that does not read."""
        try:
            with self._http.taking:
                super()._sendall(data)
        except TimeoutError:
            reset(self.socket)
            self.status = "socket error: the client did not take the answer in time"
            raise ConnectionResetError(errno.ECONNRESET, "the client did not take the answer in time") from None

    def _answer(self, refusal: Refusal) -> None:
        """Refuse a request, and end the connection so that the answer arrives."""
        body = body_of(refusal)
        self.wsgi_input = NO_BODY  # nothing of it is waited for
        self.start_response(
            f"{refusal.status} {phrase_of(refusal.status)}",
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
        """Refuse a request that pywsgi could not read, without its `start_response`."""
        head, body = whole_answer(refusal)
        self.status = self._orig_status = f"{refusal.status} {phrase_of(refusal.status)}"
        self.response_headers = []
        self.response_length = len(body)
        self.time_finish = self.time_start
        try:
            with self._http.taking:
                self.socket.sendall(head + body)
            self._linger()
        except TimeoutError:
            reset(self.socket)
        except OSError:
            pass  # the peer did not wait for it
        self.log_request()

    def _take_back_answer(self) -> None:
        """Undo the status of the application's 101, so that the access log has the final one."""
        self.status = self._orig_status = None

    def log_request(self) -> None:
        """Write the access log where the server keeps it: pywsgi's, or gunicorn's."""
        access = getattr(self.server.log, "access", None)
        if access is None:
            WSGIHandler.log_request(self)
        else:
            took = timedelta(seconds=max(0.0, self.time_finish - self.time_start))
            access(Logged(self), list(self.headers.items()), {**_NO_REQUEST, **self.environ}, took)

    # -- the connection --------------------------------------------------------------------------------------

    def _leave_http(self) -> None:
        """No longer count the connection as one of plain HTTP. Idempotent."""
        if self._http.is_counted and self.http_connections is not None:
            self._http.is_counted = False
            self.http_connections.leave()

    def _come_back(self) -> None:
        """Count it again: it became no WebSocket."""
        if self.http_connections is not None:
            self._http.is_counted = True
            self.http_connections.come_back()

    def _turn_away(self) -> None:
        """Refuse a connection without reading its request; does not block."""
        turn_away(self.socket, b"".join(whole_answer(_FULL)))

    def _linger(self) -> None:
        """End the connection so that the answer arrives although the client may still be sending."""
        if not self._http.is_extra:  # its place is needed for others
            linger(self.socket)
