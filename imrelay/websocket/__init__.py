"""WebSockets (RFC 6455) for gevent's pywsgi server, on gevent-websocket's handler class.

    from gevent.pywsgi import WSGIServer
    from imrelay.websocket import WebSocketHandler

    def echo(environ, start_response):
        websocket = environ["wsgi.websocket"]
        while (message := websocket.receive()) is not None:
            websocket.send(message)
        return []

    WSGIServer(("127.0.0.1", 8080), echo, handler_class=WebSocketHandler).serve_forever()

From the socket upwards: `wire` is the TCP connection with its `outbox`; `frames`, `parser` and `deflate` stand
between bytes and messages; `conversation` is what goes on in the hub, `connection` what an application has of it;
`sweeper` keeps the deadlines of all sockets, `turns` their order. How it begins: `request_handler`, `handshake`,
`handler`.
"""

from imrelay.websocket.connection import WebSocket
from imrelay.websocket.errors import ConcurrentReceive, ConnectionClosed, FrameError, WebSocketError
from imrelay.websocket.handler import WebSocketHandler
from imrelay.websocket.handshake import Refusal, origin_allowed

__all__ = [
    "ConcurrentReceive",
    "ConnectionClosed",
    "FrameError",
    "Refusal",
    "WebSocket",
    "WebSocketError",
    "WebSocketHandler",
    "origin_allowed",
]
