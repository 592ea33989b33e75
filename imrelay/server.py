"""Builds a relay from its settings, starts it and stops it."""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence

import gevent

from imrelay.app import create_app
from imrelay.broker.connection import Connection
from imrelay.broker.inbox_inspection import InboxInspector
from imrelay.broker.pool import ConsumerPool
from imrelay.broker.publisher import Publisher
from imrelay.broker.reconnection import Connections
from imrelay.broker.relay_queue import RelayQueue
from imrelay.broker.topology import Topology
from imrelay.descriptors import allot
from imrelay.errors import ConfigError, SetupError
from imrelay.messages.message_ids import MessageIds
from imrelay.private_node.data_folder import running_url
from imrelay.private_node.node import PrivateBroker
from imrelay.sessions.registry import Registry
from imrelay.sessions.services import Services
from imrelay.sessions.subprotocols import SUBPROTOCOLS, remembered
from imrelay.settings.values import Config
from imrelay.websocket import HttpConnections, Listener, WebSocketHandler

__all__ = ["Relay", "Server", "broker_urls", "handler_class", "inbox_inspector"]

logger = logging.getLogger(__name__)

#: Seconds of a graceful stop that are reserved for closing sockets and connections; a quarter of it at most.
_CLOSING = 5.0


class Relay:
    """Everything of one process but the listening socket: connections, publisher, sessions, WSGI application.

    `urls` is asked for the broker's URLs before each attempt to connect; `places` is how many connections the
    hosting server takes at the same time, where it has a bound.
    """

    def __init__(self, config: Config, urls: Callable[[], Sequence[str]], *, places: int | None = None) -> None:
        # Each greenlet would keep, for debuggers, who spawned it and from where: 2 KiB for each socket.
        gevent.config.track_greenlet_tree = False
        broker = config.broker
        connections = Connections(urls, heartbeat=broker.heartbeat, tls=make_tls(config))
        topology = Topology(broker.exchange, config.inbox)
        self._consumers = ConsumerPool(
            connections.new,
            topology,
            prefetch=broker.prefetch,
            channels_per_connection=broker.channels_per_connection,
        )
        self._publisher = Publisher(
            connections.new,
            topology,
            queue_size=broker.publish_queue,
            timeout=broker.publish_timeout,
            persistent=broker.persistent,
            create_unknown=config.inbox.unknown_recipient == "create",
            other_server=broker.envelope == "node",
            queue_bytes=broker.publish_queue_bytes,
            inbox_expires=config.inbox.expires,
            on_exchange_lost=self._consumers.rebind,
        )
        capacity = allot(config, places=places)
        self._registry = Registry(capacity.sockets)
        mids = MessageIds(time.time)
        self._relays = RelayQueue(
            mids.incarnation,
            wait_for_connection=self._consumers.wait_for_connection,
            publishing=self._publisher.connection,
            end_here=self._registry.end,
            wait_given_back=self._consumers.wait_given_back,
        )
        #: The bound on connections that are no browser sockets; for the WebSocket handler.
        self.http_connections = HttpConnections(capacity.http)
        services = Services(
            self._registry,
            self._consumers,
            self._publisher,
            mids,
            self._relays,
            limits=config.websocket,
            node_envelope=broker.envelope == "node",
            remembered=remembered(broker.publish_queue),
        )
        #: The WSGI application.
        self.app = create_app(services, config.server.allowed_origins)

    def start(self) -> None:
        """Begin to connect to the broker; returns at once. Sockets may come at any time."""
        self._registry.start()
        self._publisher.start()
        self._consumers.start()
        self._relays.start()

    def stop(self, timeout: float) -> None:
        """Stop gracefully within about `timeout` seconds: answer what was accepted, close every socket (1012)."""
        until = time.monotonic() + timeout - min(_CLOSING, timeout / 4)
        self._registry.is_draining = True
        lost = self._publisher.flush(until - time.monotonic())
        if lost:
            logger.error("%d messages were not confirmed by the broker; their senders are told", lost)
        self._relays.stop()  # a browser that resumes elsewhere does not wait for sessions that end now anyway
        publisher = gevent.spawn(self._publisher.stop)
        gevent.sleep(0)  # it answers those senders at once, while their sockets are open
        late = self._registry.drain(
            1012, "the relay is stopping", max(min(1.0, timeout / 8), until - time.monotonic())
        )
        if late:
            logger.warning("%d sockets had not taken what was under way to them; it stays in their inboxes", late)
        self._consumers.stop()
        publisher.join()
        self._registry.stop()


def handler_class(config: Config) -> type[WebSocketHandler]:
    """Make a handler class with the limits of the settings; its owner sets `http_connections`."""
    server, limits = config.server, config.websocket

    class RelayHandler(WebSocketHandler):
        """Serves the Flask app, which decides about WebSockets."""

        application_decides = True
        max_message_size = limits.max_message_size
        ping_interval = limits.ping_interval
        ping_timeout = limits.ping_timeout
        send_timeout = limits.send_timeout
        max_send_buffer = limits.max_send_buffer
        handshake_timeout = limits.handshake_timeout
        body_timeout = server.http_timeout
        answer_timeout = server.http_timeout
        max_body_size = server.max_body_size
        served_when_full = frozenset(("/healthz", "/readyz"))
        permessage_deflate = limits.permessage_deflate
        subprotocols = SUBPROTOCOLS

    return RelayHandler


def make_tls(config: Config) -> ssl.SSLContext:
    """Make the TLS context for `amqps` URLs; raises `ConfigError` for files that cannot be used."""
    broker = config.broker
    context = ssl.create_default_context()
    try:
        if broker.tls_ca_file:
            context.load_verify_locations(config.directory / broker.tls_ca_file)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError("[broker] tls_ca_file", f"{broker.tls_ca_file}: {exc.strerror or exc}") from exc
    try:
        if broker.tls_cert_file:
            key = config.directory / broker.tls_key_file if broker.tls_key_file else None
            context.load_cert_chain(config.directory / broker.tls_cert_file, key)
    except OSError as exc:
        where = "[broker] tls_cert_file and tls_key_file"
        raise ConfigError(where, f"{broker.tls_cert_file}, {broker.tls_key_file}: {exc.strerror or exc}") from exc
    return context


def broker_urls(config: Config) -> Callable[[], Sequence[str]]:
    """Return a function that finds the broker's URLs: those of the settings, or that of a private node."""
    if not config.is_private:
        return lambda: config.broker.url

    def find() -> Sequence[str]:
        url = running_url(config.data_dir)
        if url is None:
            raise SetupError(
                f"no private RabbitMQ runs on {config.data_dir}; start `imrelay broker`, or give [broker] url"
            )
        return (url,)

    return find


def inbox_inspector(config: Config) -> InboxInspector:
    """Make the inspector of inboxes on the configured broker."""
    connection = Connection(
        broker_urls(config), name="inbox", heartbeat=config.broker.heartbeat, tls=make_tls(config)
    )
    return InboxInspector(
        connection, Topology(config.broker.exchange, config.inbox), timeout=config.broker.publish_timeout
    )


class Server:
    """A relay with a listening socket, and with a private RabbitMQ where the settings ask for one."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._broker = PrivateBroker(config.data_dir) if config.is_private else None
        self._relay: Relay | None = None
        self._wsgi: Listener | None = None

    @property
    def url(self) -> str:
        """Where the relay listens; valid after `start`."""
        assert self._wsgi is not None
        host, port = self._wsgi.address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Listen, then start RabbitMQ and the relay; raises `SetupError`, and leaves nothing behind then."""
        broker = self._broker
        listener = _listen(self._config.server.host, self._config.server.port)
        try:
            relay = Relay(self._config, broker_urls(self._config) if broker is None else lambda: (broker.url,))
            if broker is not None:
                broker.start()
        except BaseException:
            listener.close()
            raise
        self._relay = relay
        relay.start()
        handler = handler_class(self._config)
        handler.http_connections = relay.http_connections
        handler.logged = ()  # there is no access log
        self._wsgi = Listener(
            listener,
            relay.app,
            handler_class=handler,
            log=None,
            error_log=logging.getLogger("imrelay.wsgi"),
        )
        self._wsgi.start()
        logger.info("listening on %s", self.url)

    def stop(self) -> None:
        """Take no new sockets, finish what is under way within `drain_timeout`, stop the private node."""
        if self._wsgi is not None:
            self._wsgi.close()
        if self._relay is not None:
            self._relay.stop(self._config.server.drain_timeout)
        if self._wsgi is not None:
            self._wsgi.stop(timeout=1)
        if self._broker is not None:
            self._broker.stop()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = gevent.socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, UnicodeError) as exc:  # the latter for what is no host name
        raise SetupError(
            f"cannot listen on {host} port {port}: {getattr(exc, 'strerror', None) or exc}; choose another with "
            "[server] host and port, or end the program that has it"
        ) from exc
    return listener  # type: ignore[no-any-return]
