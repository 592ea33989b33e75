"""WebSockets (RFC 6455) for gevent's pywsgi server, on gevent-websocket's handler class.

    from imrelay.websocket import Listener, WebSocketHandler

    def echo(environ, start_response):
        websocket = environ["wsgi.websocket"]
        while (message := websocket.receive()) is not None:
            websocket.send(message)
        return []

    Listener(("127.0.0.1", 8080), echo, handler_class=WebSocketHandler).serve_forever()

In place of a greenlet that receives there may be callbacks in the event loop: `websocket.on_message`, `on_close`.

A socket is open when such an application is called. An application that decides about handshakes itself, as a
Flask app does, is served by a handler class with `application_decides = True`. It hands over what is to run on the
socket, and its request is over before that runs (`upgrade` has the rules and the reasons):

    class Echo:
        def attach(self): ...            # get ready; then the client gets 101
        def run(self, websocket):
            while (message := websocket.receive()) is not None:
                websocket.send(message)
        def close(self): ...             # give back what was taken; called whatever happened

    @app.get("/echo", websocket=True)
    def echo():
        upgrade = request.environ.get("imrelay.upgrade")
        if upgrade is None:
            return "this server cannot upgrade", 501
        upgrade.accept(Echo())
        return "", 101

`Listener` is pywsgi's `WSGIServer` and may be exchanged for it. That one waits for TLS handshakes without a
deadline, each in a greenlet of its own, unless it is given `do_handshake_on_connect=False`.

From the socket upwards: `transport` is the TCP connection with its `outbox`; `frames`, `parser` and `deflate`
convert between bytes and messages; `closing` has the states of a socket, `conversation` what it does in the event
loop, `websocket` what an application calls; `sweeper` enforces the deadlines of all sockets, `fairness` gives them
turns. HTTP is in `head`, `body`, `responses`, `ending`, `http_connections`, `http_state`, `listener` and
`request_handler`; `handshake`, `upgrade` and `handler` lead from a request to a WebSocket.
"""

from imrelay.websocket.exceptions import ConcurrentReceive, ConnectionClosed, FrameError, WebSocketError
from imrelay.websocket.handler import WebSocketHandler
from imrelay.websocket.handshake import is_loopback, is_upgrade, names_loopback, origin_allowed
from imrelay.websocket.http_connections import EXTRA_CONNECTIONS, HttpConnections, RefusalLog
from imrelay.websocket.listener import Listener
from imrelay.websocket.upgrade import UPGRADE, Endpoint, Upgrade
from imrelay.websocket.websocket import WebSocket

__all__ = [
    "EXTRA_CONNECTIONS",
    "UPGRADE",
    "ConcurrentReceive",
    "ConnectionClosed",
    "Endpoint",
    "FrameError",
    "HttpConnections",
    "Listener",
    "RefusalLog",
    "Upgrade",
    "WebSocket",
    "WebSocketError",
    "WebSocketHandler",
    "is_loopback",
    "is_upgrade",
    "names_loopback",
    "origin_allowed",
]
