"""WebSockets (RFC 6455) for gevent's pywsgi server, on gevent-websocket's handler class.

    from imrelay.websocket import Listener, WebSocketHandler

    def echo(environ, start_response):
        websocket = environ["wsgi.websocket"]
        while (message := websocket.receive()) is not None:
            websocket.send(message)
        return []

    Listener(("127.0.0.1", 8080), echo, handler_class=WebSocketHandler).serve_forever()

In place of a greenlet that receives there may be callbacks in the event loop: `websocket.on_message`, `on_close`.

`Listener` is pywsgi's `WSGIServer` and may be exchanged for it. That one waits for TLS handshakes without a
deadline, each in a greenlet of its own, unless it is given `do_handshake_on_connect=False`.

From the socket upwards: `wire` is the TCP connection with its `outbox`; `frames`, `parser` and `deflate` stand
between bytes and messages; `conversation` is what goes on in the event loop, `connection` what an application has
of it; `sweeper` keeps the deadlines of all sockets, `turns` their order. How it begins: `head`, `body`,
`answers`, `ending`, `admission`, `listener`, `request_handler` for HTTP, then `handshake`, `handler`.
"""

from imrelay.websocket.admission import CROWD, Admission, RefusalLog
from imrelay.websocket.connection import WebSocket
from imrelay.websocket.errors import ConcurrentReceive, ConnectionClosed, FrameError, WebSocketError
from imrelay.websocket.handler import WebSocketHandler
from imrelay.websocket.handshake import Refusal, is_loopback, names_loopback, origin_allowed
from imrelay.websocket.listener import Listener

__all__ = [
    "CROWD",
    "Admission",
    "ConcurrentReceive",
    "ConnectionClosed",
    "FrameError",
    "Listener",
    "Refusal",
    "RefusalLog",
    "WebSocket",
    "WebSocketError",
    "WebSocketHandler",
    "is_loopback",
    "names_loopback",
    "origin_allowed",
]
