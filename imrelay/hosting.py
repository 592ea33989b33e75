"""A relay inside another WSGI server: one in each process, started by its first request."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import gevent

from imrelay.runtime.loops import run_for_ever
from imrelay.server import Relay, broker_urls, handler_class
from imrelay.settings.reading import find_file, load
from imrelay.websocket import Listener, WebSocketHandler

__all__ = ["HostedRelay"]

logger = logging.getLogger(__name__)

#: Seconds between two checks of whether the server has stopped listening.
_WATCH_INTERVAL = 0.25
_GUNICORN_WORKERS = "geventwebsocket.gunicorn.workers"


class HostedRelay:
    """The WSGI application. Raises `ConfigError` when made with settings that cannot be used."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._config = load(find_file(environ), environ)
        self._relay: Relay | None = None
        self._pid = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request (PEP 3333)."""
        return self._serving().app(environ, start_response)

    def take_over(self, modules: Mapping[str, ModuleType]) -> None:
        """Have gunicorn's gevent-websocket worker use our handler, which checks handshakes and enforces limits.

        Does nothing where that worker has not been loaded (`modules` is `sys.modules`).
        """
        workers = modules.get(_GUNICORN_WORKERS)
        if workers is not None:
            worker = workers.GeventWebSocketWorker
            if not issubclass(worker.wsgi_handler, WebSocketHandler):
                worker.wsgi_handler = self._handler_class()
                worker.server_class = _listener_class(worker.server_class)

    def _handler_class(self) -> type[WebSocketHandler]:
        hosted = self

        class HostedHandler(handler_class(self._config)):  # type: ignore[misc]
            """Our handler, which starts the relay of its process and watches the server."""

            def handle(self) -> None:
                """Serve one connection."""
                self.http_connections = hosted._serving(self.server).http_connections
                hosted._watch(self.server)
                super().handle()

        return HostedHandler

    def _serving(self, server: Any = None) -> Relay:
        """Return this process's relay; it is made by the first request, and again after a fork.

        `server` is the hosting one, whose pool may bound the number of connections.
        """
        if self._relay is None or self._pid != os.getpid():
            self._pid = os.getpid()
            places = getattr(getattr(server, "pool", None), "size", None)
            self._relay = Relay(self._config, broker_urls(self._config), places=places)
            self._relay.start()
        return self._relay

    def _watch(self, server: Any) -> None:
        """Notice the end of this worker: gunicorn gives no notice, but closes the listening socket first."""
        if getattr(server, "_imrelay_watched", False):
            return
        server._imrelay_watched = True
        run_for_ever(lambda: self._run_watch(server), name="watch")

    def _run_watch(self, server: Any) -> None:
        while not server.closed:
            gevent.sleep(_WATCH_INTERVAL)
        relay = self._relay
        if relay is not None:
            logger.info("the server has closed its listening socket: stopping")
            relay.stop(self._config.server.drain_timeout)


def _listener_class(base: type) -> type:
    """Return a server class of gunicorn's that is also a `Listener`, which survives a shortage of descriptors."""

    class HostedListener(Listener, base):  # type: ignore[misc]
        """gunicorn's server."""

    return HostedListener
