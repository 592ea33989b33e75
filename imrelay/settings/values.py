"""The settings: the values of one relay, and the one table of all keys.

Each section is a frozen dataclass, each of its fields one key. The field's metadata holds its unit, its bounds
and the line that explains it; `imrelay.settings.reading` makes the rows of the table from it, and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "PRIVATE",
    "BrokerConfig",
    "Config",
    "InboxConfig",
    "LogConfig",
    "ServerConfig",
    "WebSocketConfig",
]

#: What `[broker] url` says when imrelay is to run a RabbitMQ node of its own.
PRIVATE = "private"


def _setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    check: str = "",
) -> Any:
    """Declare one key; `check` names one of the checks of `imrelay.settings.reading` that its text has to pass."""
    metadata = {"doc": doc, "unit": unit, "low": low, "high": high, "choices": choices, "check": check}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """[server]: the listening socket and who may connect."""

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 is every IPv4 interface of this machine")
    port: int = _setting(8080, "TCP port to listen on; 0 lets the system choose", low=0, high=65535)
    allowed_origins: tuple[str, ...] = _setting(
        (),
        "origins (scheme://host[:port], separated by blanks) whose pages may connect; "
        "empty: the host that the request itself names, and on loopback only localhost, 127.0.0.0/8 and [::1]; "
        "behind a proxy on the same machine it has to be set",
        check="origin",
    )
    max_connections: int = _setting(
        10_000, "browser sockets at the same time; one more is refused with 503", low=1, high=1_000_000
    )
    max_http_connections: int = _setting(
        1_000, "other HTTP connections at the same time; one more is refused with 503", low=1, high=1_000_000
    )
    max_body_size: int = _setting(
        1_048_576,
        "largest body of an HTTP request; a larger one is refused with 413",
        unit="bytes",
        low=0,
        high=1 << 30,
    )
    http_timeout: float = _setting(
        30.0,
        "time for a client to send the body of a request, and again to take the answer; then its connection ends",
        unit="seconds",
        low=0.1,
        high=3600,
    )
    drain_timeout: float = _setting(
        30.0,
        "time for a graceful stop: what is under way is finished, then all is closed",
        unit="seconds",
        low=0,
        high=3600,
    )


@dataclass(frozen=True, slots=True)
class WebSocketConfig:
    """[websocket]: limits and liveness of one browser socket."""

    max_message_size: int = _setting(
        65_536,
        "largest message that a browser may send; a larger one closes its socket with 1009",
        unit="bytes",
        low=126,
        high=64 << 20,
    )
    ping_interval: float = _setting(
        25.0, "time between two pings to each browser", unit="seconds", low=0.1, high=3600
    )
    ping_timeout: float = _setting(
        20.0,
        "time for a browser to answer a ping; then its connection counts as lost",
        unit="seconds",
        low=0.1,
        high=3600,
    )
    send_timeout: float = _setting(
        10.0,
        "bytes that a slow browser did not take for so long close its socket with 4408",
        unit="seconds",
        low=0.1,
        high=3600,
    )
    max_send_buffer: int = _setting(
        1_048_576,
        "bytes that may wait for a slow browser; more close its socket with 4408",
        unit="bytes",
        low=4096,
        high=1 << 30,
    )
    ack_timeout: float = _setting(
        60.0,
        "imrelay.v1: a message that its browser did not acknowledge for so long closes the socket with 4408",
        unit="seconds",
        low=1,
        high=1500,
    )
    handshake_timeout: float = _setting(
        10.0, "time for a browser to send its whole request", unit="seconds", low=0.1, high=3600
    )
    permessage_deflate: bool = _setting(
        False, "offer compression (RFC 7692): less traffic for more CPU and memory"
    )


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """[broker]: the RabbitMQ and how it is used."""

    url: tuple[str, ...] = _setting(
        (PRIVATE,),
        "private: imrelay runs a RabbitMQ node of its own, on loopback; otherwise "
        "amqp://user:password@host:port/vhost or amqps://…, several for a cluster separated by blanks",
        check="url",
    )
    tls_ca_file: str = _setting(
        "",
        "for amqps: certificates (PEM) of the authorities to trust, relative to the folder of this file; "
        "empty: those that the system trusts",
        check="optional",
    )
    tls_cert_file: str = _setting(
        "", "for amqps: certificate (PEM) to show to the broker; empty: none", check="optional"
    )
    tls_key_file: str = _setting(
        "", "for amqps: the key of tls_cert_file (PEM); empty: it stands in the same file", check="optional"
    )
    data_dir: str = _setting(
        "var/broker", "folder of the private node's data; relative to the folder of this file"
    )
    exchange: str = _setting(
        "direct_message", "the exchange that messages to users are published to", check="exchange"
    )
    envelope: str = _setting(
        "raw",
        "raw: a body is the message itself; node: as the article's Node.js server writes it",
        choices=("raw", "node"),
    )
    persistent: bool = _setting(True, "write messages to the broker's disk, so that they survive its restart")
    prefetch: int = _setting(
        100, "messages under way to one browser that it has not yet taken", unit="messages", low=1, high=65_535
    )
    heartbeat: int = _setting(
        20,
        "heartbeat of a broker connection; a silent broker counts as lost after 5 s more, at most twice this",
        unit="seconds",
        low=1,
        high=3600,
    )
    publish_queue: int = _setting(
        1_000,
        "messages waiting for the broker's confirmation; then reading from browsers pauses",
        unit="messages",
        low=1,
        high=1_000_000,
    )
    publish_queue_bytes: int = _setting(
        67_108_864,
        "bytes of the messages that wait for the confirmation; a message larger than that waits alone",
        unit="bytes",
        low=65_536,
        high=1 << 40,
    )
    publish_timeout: float = _setting(
        10.0,
        "a message that is not confirmed for so long is answered with broker_unavailable",
        unit="seconds",
        low=0.1,
        high=3600,
    )
    channels_per_connection: int = _setting(
        1_000, "browser sockets that share one AMQP connection", unit="channels", low=1, high=2_047
    )


@dataclass(frozen=True, slots=True)
class InboxConfig:
    """[inbox]: the queue that keeps a user's messages. It holds for inboxes made from now on."""

    ttl: float = _setting(
        0.0, "messages older than this are dropped; 0: never", unit="seconds", low=0, high=4_294_967
    )
    expires: float = _setting(
        2_592_000.0,
        "an inbox that nobody opened for so long is deleted with what is in it; 0: never",
        unit="seconds",
        low=0,
        high=4_294_967,
    )
    max_length: int = _setting(
        100_000,
        "messages that one inbox may hold; then senders get inbox_full; 0: no limit",
        unit="messages",
        low=0,
        high=100_000_000,
    )
    max_bytes: int = _setting(
        0,
        "bytes that one inbox may hold; then senders get inbox_full; 0: no limit",
        unit="bytes",
        low=0,
        high=1 << 40,
    )
    queue_type: str = _setting(
        "classic", "classic: on one node; quorum: on several nodes of a cluster", choices=("classic", "quorum")
    )
    unknown_recipient: str = _setting(
        "create",
        "for an id that was never here, create: open an inbox; refuse: answer recipient_unknown",
        choices=("create", "refuse"),
    )


@dataclass(frozen=True, slots=True)
class LogConfig:
    """[log]: what is written to standard error."""

    level: str = _setting(
        "info",
        "least severe line to write; one of debug, info, warning, error",
        choices=("debug", "info", "warning", "error"),
    )
    format: str = _setting("text", "text: for people; json: one object a line", choices=("text", "json"))


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one relay; `directory` is what relative paths in them start from."""

    server: ServerConfig = field(default_factory=ServerConfig)
    websocket: WebSocketConfig = field(default_factory=WebSocketConfig)
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    inbox: InboxConfig = field(default_factory=InboxConfig)
    log: LogConfig = field(default_factory=LogConfig)
    directory: Path = field(default_factory=Path.cwd)

    @property
    def data_dir(self) -> Path:
        """The private node's folder, absolute."""
        return (self.directory / self.broker.data_dir).absolute()

    @property
    def is_private(self) -> bool:
        """Whether imrelay is to run the RabbitMQ itself."""
        return self.broker.url == (PRIVATE,)
