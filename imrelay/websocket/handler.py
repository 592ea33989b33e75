"""From a handshake to the end of its socket: the checks, the application's decision, the upgrade, the endpoint."""

from __future__ import annotations

import io
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler

from imrelay.websocket.exceptions import ConnectionClosed
from imrelay.websocket.handshake import Handshake, Refusal, check_handshake, is_upgrade
from imrelay.websocket.http_state import NO_HTTP
from imrelay.websocket.request_handler import RequestHandler
from imrelay.websocket.transport import READ_SIZE, WOULD_BLOCK
from imrelay.websocket.upgrade import UPGRADE, Endpoint, Upgrade
from imrelay.websocket.websocket import WebSocket

__all__ = ["WebSocketHandler"]

#: Headers of a 101 that the handler sets; those of the application are dropped, all its others are sent.
_OWN_HEADERS = frozenset(
    (
        b"connection",
        b"content-length",
        b"content-type",
        b"sec-websocket-accept",
        b"sec-websocket-extensions",
        b"sec-websocket-protocol",
        b"transfer-encoding",
        b"upgrade",
    )
)


class WebSocketHandler(RequestHandler):
    """Give this class to `gevent.pywsgi.WSGIServer`, or to gunicorn's gevent worker as its `wsgi_handler`.

    The class attributes are the settings; set them in a subclass.
    """

    #: Bytes of the largest incoming message: all its fragments together, after decompression.
    max_message_size = 65_536
    #: Seconds between two pings; 0 sends none.
    ping_interval = 25.0
    #: Seconds for the pong to arrive; after that the connection counts as lost.
    ping_timeout = 20.0
    #: Seconds for the kernel to accept a write; `outbox` has the rule for messages over `max_send_buffer`.
    send_timeout = 10.0
    #: Bytes that may wait behind the write in progress.
    max_send_buffer = 1_048_576
    #: Seconds for the peer to answer a close frame, and again for it to end its TCP connection.
    close_timeout = 5.0
    #: The subprotocols of the server, in its order of preference.
    subprotocols: tuple[str, ...] = ()
    #: Whether compression (RFC 7692) is agreed on with clients that offer it.
    permessage_deflate = False
    #: Whether the application decides about handshakes: it finds an `Upgrade` in its environ, its answer counts.
    #: Otherwise every handshake that is in order is upgraded, and the application called with the open socket.
    application_decides = False
    #: Keys of the environ that are kept until the WebSocket has ended, for the access log; empty: no access log.
    logged: tuple[str, ...] = (
        "HTTP_REFERER",
        "HTTP_USER_AGENT",
        "PATH_INFO",
        "QUERY_STRING",
        "RAW_URI",
        "REMOTE_ADDR",
        "REMOTE_PORT",
        "REQUEST_METHOD",
        "SERVER_PROTOCOL",
    )

    #: Whether the application is deciding about a handshake.
    _is_asking = False

    def run_application(self) -> None:
        """Serve plain HTTP, refuse a handshake that is not in order, or upgrade."""
        environ = self.environ
        if not is_upgrade(environ):
            self.run_plain()
            return
        handshake = check_handshake(
            environ, subprotocols=self.subprotocols, permessage_deflate=self.permessage_deflate
        )
        if isinstance(handshake, Refusal):
            self._answer(handshake)
            return
        self.close_connection = True  # whatever the answer is
        if self.application_decides:
            endpoint = self._ask()
        else:
            self.response_headers = []
            endpoint = WholeApplication(self.application, environ)
        if endpoint is not None:
            del environ
            self._switch(handshake, endpoint)

    def log_request(self) -> None:
        """Write a line into the access log, where there is one."""
        if self.logged:
            super().log_request()

    def _ask(self) -> Endpoint | None:
        """Have the application answer; return what is to run on the socket, None where it answered otherwise."""
        upgrade = self.environ[UPGRADE] = Upgrade(self.socket.getsockname())
        endpoint = None
        self._is_asking = True
        try:
            WSGIHandler.run_application(self)
            if self.status is None or self.headers_sent:
                self._linger()
            else:  # `write` kept back the 101
                endpoint = upgrade.settle()
                headers = [pair for pair in self.response_headers or () if pair[0].lower() not in _OWN_HEADERS]
                self._take_back_answer()
                self.response_headers = headers
                if endpoint is None:
                    raise RuntimeError("the application answered 101, but has accepted no endpoint")
        finally:
            self._is_asking = False
            refused = upgrade.settle()
            if refused is not None:
                refused.close()
        return endpoint

    def write(self, data: bytes) -> None:
        """Send a part of an answer; the 101 of an application that decides is sent when its endpoint is ready."""
        if self._is_asking and self.code == 101 and self.status is not None:
            if data:
                raise self.ApplicationError("a 101 has no body")
        else:
            super().write(data)

    def _switch(self, handshake: Handshake, endpoint: Endpoint) -> None:
        """Let the endpoint attach, answer 101 and run it; it is closed whatever happens."""
        self._leave_http()  # the application counts its sockets itself
        try:
            websocket = None
            try:
                endpoint.attach()
                websocket = self._upgrade(handshake)
            finally:
                if websocket is None:
                    self._come_back()
            if websocket is not None:
                self._run_websocket(websocket, endpoint)
        finally:
            endpoint.close()

    def _upgrade(self, handshake: Handshake) -> WebSocket | None:
        """Answer 101 and drop what only HTTP needs; return None if the client is gone."""
        environ = self.environ
        headers = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
        headers.append(("Sec-WebSocket-Accept", handshake.accept))
        if handshake.subprotocol is not None:
            headers.append(("Sec-WebSocket-Protocol", handshake.subprotocol))
        if handshake.extensions is not None:
            headers.append(("Sec-WebSocket-Extensions", handshake.extensions))
        try:
            self.socket.settimeout(0.0)
            data = self._read_ahead()
            if data is None:
                return None
            self.socket.settimeout(self.send_timeout)
            self._start_101(headers)
        except OSError:
            return None
        websocket = WebSocket(
            self.socket,
            gevent.get_hub(),
            type(self),
            subprotocol=handshake.subprotocol,
            deflate=handshake.deflate,
        )
        websocket.start(data)
        self.rfile.detach().close()
        self.rfile = environ["wsgi.input"] = io.BytesIO()
        self._http = NO_HTTP
        self.headers = type(self).headers
        self.response_headers = []
        return websocket

    def _read_ahead(self) -> bytes | None:
        """Return what the client sent without waiting for our answer, None if it is gone; does not block."""
        try:
            data: bytes = self.rfile.peek()  # what pywsgi has buffered, else one read
            return data or self.socket.recv(READ_SIZE) or None
        except WOULD_BLOCK:
            return b""

    def _start_101(self, headers: list[tuple[str, str]]) -> None:
        more = self.response_headers
        self.start_response("101 Switching Protocols", headers)
        assert self.response_headers is not None
        self.response_headers += more or ()
        self.provided_content_length = False  # so that none is added
        self.response_use_chunked = False
        self.provided_date = True
        self.write(b"")

    def _run_websocket(self, websocket: WebSocket, endpoint: Endpoint) -> None:
        """Run the endpoint; whatever it does, close the socket and wait for the end of its TCP connection."""
        self.environ = {key: self.environ[key] for key in self.logged if key in self.environ}
        try:
            endpoint.run(websocket)
            websocket.close(1000)
        except ConnectionClosed:
            pass  # the usual end of an application that was sending
        except gevent.GreenletExit:
            websocket.close(1001, "going away", wait=False)
            raise
        except BaseException:
            websocket.close(1011, "internal error", wait=False)
            raise
        finally:
            if not websocket.closed:
                websocket.close(1000, wait=False)
            try:
                websocket.wait_closed()
            finally:
                websocket.abort()  # killed while waiting: pywsgi closes the descriptor now


class WholeApplication:
    """Calls a WSGI application that finds its socket, already open, in `environ["wsgi.websocket"]`."""

    def __init__(self, application: Any, environ: dict[str, Any]) -> None:
        self._application = application
        self._arguments = [environ]

    def attach(self) -> None:
        """Do nothing: such an application is called when the socket is open."""

    def run(self, websocket: WebSocket) -> None:
        """Call the application, and iterate over what it returns, as a server does."""
        self._arguments[0] |= {"wsgi.websocket": websocket, "wsgi.websocket_version": "13"}
        # The application holds the only reference to its environ (from Python 3.11 on), and may drop it.
        result = self._application(self._arguments.pop(), _ignore_response)
        try:
            for _ in result or ():
                pass
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def close(self) -> None:
        """Drop the environ where the application was never called."""
        self._arguments.clear()


def _ignore_response(status: str, headers: Any, exc_info: Any = None) -> Any:
    """Stand in for start_response: the answer was 101 already."""
    return lambda data: None
