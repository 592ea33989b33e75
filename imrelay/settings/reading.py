"""Reads, writes and checks settings as text, by the rows of the table of settings.

Later sources win: default, file, environment (`IMRELAY_<SECTION>_<KEY>`), command line (`--<section>-<key>`).
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote, urlsplit

from imrelay.errors import ConfigError
from imrelay.settings.values import PRIVATE, Config

__all__ = ["CONFIG_VARIABLE", "Setting", "find_file", "hide_password", "load", "settings"]

#: The environment variable that names the file where no option does.
CONFIG_VARIABLE = "IMRELAY_CONFIG"

#: What Kubernetes puts into the environment for a Service that is named imrelay or imrelay-something.
_SERVICE_LINK = re.compile(r"IMRELAY_(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)$")

_TRUE = {"yes", "true", "on", "1"}
_FALSE = {"no", "false", "off", "0"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: a key, its type, default, unit, bounds and description."""

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
        """Turn text into the value; raise `ConfigError`, which names `where`, if that is not possible."""
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
    """Accept any line of text, or none."""


_CHECKS = {"optional": _check_optional, "origin": _check_origin, "url": _check_url, "exchange": _check_exchange}


def hide_password(url: str) -> str:
    """Return the URL with `***` in place of its password, for logs and error texts."""
    found = _PASSWORD.fullmatch(url)
    if found is not None:
        return f"{found['before']}:***{found['tail']}"
    return _NO_PORT.sub(":***", url)


#: Matches malformed URLs too, such as one without its '//'.
_PASSWORD = re.compile(r"(?P<before>(?:[A-Za-z]+:/+|amqps?:|(?!\w+:/))[^:@/]*):.*(?P<tail>@[^@]*)", re.S)
#: Matches what is in the place of a port and is none: the first half of a password with a blank in it.
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
