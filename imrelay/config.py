"""The settings: one table that feeds the file, the environment, the command line and the error texts.

Each section is a frozen dataclass, each of its fields one key. The field's metadata holds its unit, its bounds
and the line that explains it. Later sources win: default, file, environment (`IMRELAY_<SECTION>_<KEY>`),
command line (`--<section>-<key>`).
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote, urlsplit

from imrelay.errors import ConfigError

__all__ = ["CONFIG_VARIABLE", "Config", "Setting", "find_file", "hide_password", "load", "settings"]

#: What `[broker] url` says when imrelay is to run a RabbitMQ node of its own.
PRIVATE = "private"
#: The environment variable that names the file where no option does.
CONFIG_VARIABLE = "IMRELAY_CONFIG"

#: What Kubernetes puts into the environment for a Service that is named imrelay or imrelay-something.
_SERVICE_LINK = re.compile(r"IMRELAY_(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)$")

_TRUE = {"yes", "true", "on", "1"}
_FALSE = {"no", "false", "off", "0"}


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
    """Declare one key; `check` names one of the checks in `_CHECKS` that its text has to pass."""
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
        "empty: the host that the request itself names",
        check="origin",
    )
    max_connections: int = _setting(
        10_000, "browser sockets at the same time; one more is refused with 503", low=1, high=1_000_000
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
        25.0, "a socket that was silent for so long is asked for a pong", unit="seconds", low=0.1, high=3600
    )
    ping_timeout: float = _setting(
        20.0, "and is given up when none came within this time", unit="seconds", low=0.1, high=3600
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
        "var/broker", "where the private node keeps its data; relative to the folder of this file"
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
        "heartbeat agreed with the broker; when silent, it is given up after 5 s more than this, to twice as much",
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

    level: str = _setting("info", "least severe line to write", choices=("debug", "info", "warning", "error"))
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


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: a key, its type, default, unit, bounds and reason."""

    section: str
    key: str
    type: type
    default: Any
    doc: str
    unit: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    check: str

    @property
    def env(self) -> str:
        """The environment variable that overrides it."""
        return f"IMRELAY_{self.section}_{self.key}".upper()

    @property
    def option(self) -> str:
        """The command-line option that overrides it."""
        return f"--{self.section}-{self.key}".replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default, as one would write it in the file."""
        return self.write(self.default)

    def write(self, value: Any) -> str:
        """Turn a value into the text that `read` takes."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple):
            return " ".join(value)
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    def show(self, value: Any) -> str:
        """Write a value as `write` does, without passwords."""
        return " ".join(map(hide_password, value)) if self.check == "url" else self.write(value)

    def read(self, text: str, where: str) -> Any:
        """Turn text into the value; raise `ConfigError` that names `where` when it is none."""
        text = text.strip()
        if self.type is bool:
            if text.lower() in _TRUE | _FALSE:
                return text.lower() in _TRUE
            raise ConfigError(where, f"{text!r} is neither yes nor no")
        if self.type in (int, float):
            return self._read_number(text, where)
        if self.choices and text not in self.choices:
            raise ConfigError(where, f"{text!r} is none of: {', '.join(self.choices)}")
        words = tuple(text.split())
        if self.type is str:
            if (not text and self.check != "optional") or any(ord(c) < 32 for c in text):
                raise ConfigError(where, "needs one line of text")
            words = (text,)
        if self.check:
            for word in words:
                _CHECKS[self.check](word, words, where)
            if self.check == "url" and not words:
                raise ConfigError(where, "needs 'private' or the URL of a RabbitMQ")
        return text if self.type is str else words

    def _read_number(self, text: str, where: str) -> int | float:
        kind = "a whole number" if self.type is int else "a number"
        if len(text) > 30:
            raise ConfigError(where, f"is not {kind}: {len(text)} characters")
        try:
            number: int | float = self.type(text)
        except ValueError:
            raise ConfigError(where, f"{text!r} is not {kind}") from None
        low, high = self.low or 0, self.high if self.high is not None else float("inf")
        if not low <= number <= high:  # also refuses NaN
            unit = f" {self.unit}" if self.unit else ""
            raise ConfigError(where, f"{text} is out of range, {low:.12g} to {high:.12g}{unit}")
        return number


def _check_origin(word: str, words: tuple[str, ...], where: str) -> None:
    try:
        parts = urlsplit(word)
        parts.port  # noqa: B018 (raises where it is no number)
        wrong = (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or bool(parts.path or parts.query or parts.fragment or "@" in parts.netloc)
        )
    except ValueError:
        wrong = True
    if wrong:
        raise ConfigError(
            where, f"{word!r} is no origin; write it as https://chat.example.org or http://localhost:8080"
        )


def _check_url(word: str, words: tuple[str, ...], where: str) -> None:
    if word == PRIVATE:
        if len(words) > 1:
            raise ConfigError(where, "'private' stands alone; it cannot be mixed with URLs")
        return
    shown = hide_password(word)
    try:
        parts = urlsplit(word)
        port = parts.port
    except ValueError:
        raise ConfigError(where, f"the port of {shown!r} is no number from 1 to 65535") from None
    if parts.scheme not in ("amqp", "amqps"):
        raise ConfigError(where, f"{shown!r} does not start with amqp:// or amqps:// (and is not 'private')")
    if not parts.hostname:
        raise ConfigError(where, f"{shown!r} names no host")
    if port == 0:
        raise ConfigError(where, f"the port of {shown!r} is no number from 1 to 65535")
    if parts.query or parts.fragment:
        raise ConfigError(where, f"{shown!r} has a part behind '?' or '#' that imrelay does not know")
    if parts.path.count("/") > 1:
        raise ConfigError(
            where, f"{shown!r} has more than one '/' in its virtual host; write %2F for one in a name"
        )
    if len(unquote(parts.path[1:]).encode(errors="replace")) > 255:
        raise ConfigError(where, f"the virtual host of {shown!r} is over 255 bytes")


def _check_exchange(word: str, words: tuple[str, ...], where: str) -> None:
    if len(word.encode(errors="replace")) > 255 or word.startswith("amq."):
        raise ConfigError(where, "an exchange's name has at most 255 bytes and does not start with 'amq.'")


def _check_optional(word: str, words: tuple[str, ...], where: str) -> None:
    """Any line of text will do, or none."""


_CHECKS = {"optional": _check_optional, "origin": _check_origin, "url": _check_url, "exchange": _check_exchange}


def hide_password(url: str) -> str:
    """Return the URL with `***` in place of its password, for logs and error texts."""
    found = _PASSWORD.fullmatch(url)
    if found is not None:
        return f"{found['before']}:***{found['tail']}"
    return _NO_PORT.sub(":***", url)


#: Also of what is no URL, such as one without its '//'.
_PASSWORD = re.compile(r"(?P<before>(?:[A-Za-z]+:/+|amqps?:|(?!\w+:/))[^:@/]*):.*(?P<tail>@[^@]*)", re.S)
#: What stands where a port should and is none: the first half of a password with a blank in it.
_NO_PORT = re.compile(r"(?<=[^:/]):(?!/|\d+(?:/|$)).*", re.S)


def _sections() -> dict[str, type]:
    hints = get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if f.name != "directory"}


def _default(column: Field[Any]) -> Any:
    return column.default if column.default_factory is MISSING else column.default_factory()


def settings() -> Iterator[Setting]:
    """Yield the table, row by row, in the order of `config.ini`."""
    for section, cls in _sections().items():
        hints = get_type_hints(cls)
        for column in fields(cls):
            hint = hints[column.name]
            kind = tuple if getattr(hint, "__origin__", None) is tuple else hint
            yield Setting(section, column.name, kind, _default(column), **column.metadata)


def find_file(environ: Mapping[str, str], given: str | None = None) -> Path | None:
    """Return the settings file: the given one, `$IMRELAY_CONFIG`, or config.ini here; None where there is none."""
    name = given or environ.get(CONFIG_VARIABLE)
    path = Path(name or "config.ini")
    return path if name or path.exists() else None


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    options: Mapping[tuple[str, str], str] | None = None,
) -> Config:
    """Read the settings from the file, then the environment, then the command line.

    `path` None means no file. `options` maps (section, key) to the text of an option. Raises `ConfigError` with
    one line that names the place, for an unknown section, key or variable, a wrong type or a value out of range.
    """
    table = {(row.section, row.key): row for row in settings()}
    values: dict[tuple[str, str], Any] = {}
    for (section, key), (text, where) in _read_file(path, table).items():
        values[section, key] = table[section, key].read(text, where)
    by_env = {row.env: row for row in table.values()}
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name in by_env:
            row = by_env[name]
            values[row.section, row.key] = row.read(text, f"environment variable {name}")
        elif name.startswith("IMRELAY_") and name != CONFIG_VARIABLE and not _SERVICE_LINK.match(name):
            raise ConfigError(f"environment variable {name}", "there is no such setting")
    for at, text in (options or {}).items():
        values[at] = table[at].read(text, f"option {table[at].option}")
    made = {
        section: cls(**{key: value for (s, key), value in values.items() if s == section})
        for section, cls in _sections().items()
    }
    return Config(**made, directory=path.absolute().parent if path else Path.cwd())


def _read_file(
    path: Path | None, table: Mapping[tuple[str, str], Setting]
) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (section, key) -> (text, where it stands)."""
    if path is None:
        return {}
    parser = configparser.ConfigParser(interpolation=None, default_section="\0", strict=True)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except OSError as exc:
        raise ConfigError(str(path), f"cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(str(path), f"is not UTF-8 (byte {exc.start})") from exc
    except configparser.Error as exc:
        raise ConfigError(str(path), " ".join(str(exc).split())) from exc
    found = {}
    known = sorted({section for section, _ in table})
    for section in parser.sections():
        if section not in known:
            raise ConfigError(f"{path}: [{section}]", f"there is no such section; there are: {', '.join(known)}")
        for key, text in parser.items(section):
            where = f"{path}: [{section}] {key}"
            if (section, key) not in table:
                keys = ", ".join(k for s, k in table if s == section)
                raise ConfigError(where, f"there is no such key; there are: {keys}")
            found[section, key] = (text, where)
    return found
