"""From a handshake to the application: the checks, the hook, the upgrade, and the end."""

from __future__ import annotations

import io
from typing import Any

import gevent

from imrelay.websocket.connection import WebSocket
from imrelay.websocket.errors import ConnectionClosed
from imrelay.websocket.handshake import Handshake, Refusal, check_handshake, is_upgrade
from imrelay.websocket.request_handler import NO_HTTP, RequestHandler
from imrelay.websocket.wire import READ_SIZE, WOULD_BLOCK

__all__ = ["WebSocketHandler"]


class WebSocketHandler(RequestHandler):
    """Give this class to `gevent.pywsgi.WSGIServer`, or to gunicorn's gevent worker as its `wsgi_handler`.

    The class attributes are the settings; set them in a subclass. Times are in seconds, sizes in bytes.
    """

    #: Of one incoming message, all its fragments together, and inflated.
    max_message_size = 65_536
    #: Between two pings; 0 sends none.
    ping_interval = 25.0
    #: For the pong; then the connection counts as lost.
    ping_timeout = 20.0
    #: In which the kernel must take what was sent; `outbox` has the rule for messages over `max_send_buffer`.
    send_timeout = 10.0
    #: That wait behind the write that is under way.
    max_send_buffer = 1_048_576
    #: For the peer's answer to a close frame, and again for the end of its TCP connection.
    close_timeout = 5.0
    #: What the server speaks, the one that it likes best first.
    subprotocols: tuple[str, ...] = ()
    #: Whether RFC 7692 is agreed on with clients that offer it.
    permessage_deflate = False
    #: What of a request's environ stays until its WebSocket has ended, for the access log.
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

    def refuse(self, environ: dict[str, Any]) -> Refusal | None:
        """Return why this WebSocket is not wanted; a hook.

        Called in the connection's greenlet when the handshake is in order, before it is answered. It may
        block, and may leave something in `environ` for the application.
        """
        return None

    def abandoned(self, environ: dict[str, Any]) -> None:
        """Release what `refuse` took: the client left before the application was called; a hook."""

    def run_application(self) -> None:
        """Upgrade, refuse, or serve plain HTTP."""
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
        self._leave_http()  # the hook counts it in its own way
        websocket = None
        try:
            refusal = self.refuse(environ)
            if refusal is None:
                try:
                    websocket = self._upgrade(handshake)
                finally:
                    if websocket is None:
                        self.abandoned(environ)
        finally:
            if websocket is None:
                self.close_connection = True
                self._come_back()
        if refusal is not None:
            self._answer(refusal)
        if websocket is not None:
            del environ
            self._run_websocket(websocket)

    def _upgrade(self, handshake: Handshake) -> WebSocket | None:
        """Answer 101 and let go of what only HTTP needs; None if the client is gone."""
        environ = self.environ
        headers = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
        headers.append(("Sec-WebSocket-Accept", handshake.accept))
        if handshake.subprotocol is not None:
            headers.append(("Sec-WebSocket-Protocol", handshake.subprotocol))
        if handshake.extensions is not None:
            headers.append(("Sec-WebSocket-Extensions", handshake.extensions))
        self.close_connection = True
        try:
            self.socket.settimeout(0.0)
            data = self._read_ahead()
            if data is None:
                return None
            self.socket.settimeout(self.send_timeout)
            self._start_101(headers)
        except OSError:
            return None
        self.rfile.detach().close()
        self.rfile = environ["wsgi.input"] = io.BytesIO()
        self._http = NO_HTTP
        self.headers = type(self).headers
        self.response_headers = []
        websocket = WebSocket(
            self.socket,
            gevent.get_hub(),
            type(self),
            subprotocol=handshake.subprotocol,
            deflate=handshake.deflate,
        )
        environ["wsgi.websocket"] = websocket
        environ["wsgi.websocket_version"] = "13"
        websocket.start(data)
        return websocket

    def _read_ahead(self) -> bytes | None:
        """Return what the client sent without waiting for our answer, None if it is gone; does not block."""
        try:
            data: bytes = self.rfile.peek()  # what pywsgi has buffered, else one read
            return data or self.socket.recv(READ_SIZE) or None
        except WOULD_BLOCK:
            return b""

    def _start_101(self, headers: list[tuple[str, str]]) -> None:
        self.start_response("101 Switching Protocols", headers)
        self.provided_content_length = False  # so that none is added
        self.response_use_chunked = False
        self.provided_date = True
        self.write(b"")

    def _run_websocket(self, websocket: WebSocket) -> None:
        """Call the application, and see the socket to its end whatever becomes of that."""
        arguments = [self.environ]
        self.environ = {key: self.environ[key] for key in self.logged if key in self.environ}
        try:
            # The application holds the only reference to its environ (from Python 3.11 on), and may let go of it.
            result = self.application(arguments.pop(), _ignore_response)
            try:
                for _ in result or ():
                    pass
            finally:
                close = getattr(result, "close", None)
                if close is not None:
                    close()
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


def _ignore_response(status: str, headers: Any, exc_info: Any = None) -> Any:
    """Stand in for start_response: the answer was 101 already."""
    return lambda data: None
