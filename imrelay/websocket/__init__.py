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
stand between bytes and messages; `conversation` is what goes on in the event loop, `websocket` what an application
has of it; `sweeper` keeps the deadlines of all sockets, `fairness` their order. How it begins: `head`, `body`,
`responses`, `ending`, `http_connections`, `listener`, `request_handler` for HTTP, then `handshake`, `upgrade`,
`handler`.
"""

from imrelay.websocket.exceptions import ConcurrentReceive, ConnectionClosed, FrameError, WebSocketError
from imrelay.websocket.handler import WebSocketHandler
from imrelay.websocket.handshake import is_loopback, is_upgrade, names_loopback, origin_allowed
from imrelay.websocket.http_connections import CROWD, Admission, RefusalLog
from imrelay.websocket.listener import Listener
from imrelay.websocket.upgrade import UPGRADE, Endpoint, Upgrade
from imrelay.websocket.websocket import WebSocket

__all__ = [
    "CROWD",
    "UPGRADE",
    "Admission",
    "ConcurrentReceive",
    "ConnectionClosed",
    "Endpoint",
    "FrameError",
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
