"""The command `imrelay`: serve, broker, inbox, check-config."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse
import logging
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Protocol

import gevent
from gevent.event import Event

from imrelay import __version__
from imrelay.errors import ConfigError, ImrelayError, SetupError
from imrelay.messages.submission import check_id
from imrelay.private_node.node import PrivateBroker
from imrelay.runtime import log
from imrelay.runtime.log_stream import LogStream
from imrelay.server import Server, inbox_inspector
from imrelay.settings.reading import CONFIG_VARIABLE, Setting, find_file, load, settings
from imrelay.settings.table import settings_table
from imrelay.settings.values import Config

__all__ = ["main"]

logger = logging.getLogger("imrelay")

#: Exit statuses: a wrong setting or option; something of this machine is missing or taken.
_EXIT_USAGE, _EXIT_FAILED = 2, 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Seconds for the log to be written when the process is ended at once.
_LOG_TIMEOUT = 0.5
#: What `imrelay check-config --help` says about its table.
_NAMES = (
    "The table has all settings, by the section of the file that each may stand in. [server] http_timeout is also "
    "the variable IMRELAY_SERVER_HTTP_TIMEOUT and the option --server-http-timeout; the later of these three wins."
)


class _Service(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = _load(options)
        if options.command == "check-config":
            _print_config(config)
            return 0
        if options.command == "inbox":
            return _inbox(config, options)
        service = Server(config) if options.command == "serve" else _BrokerService(config)
        return _run(service, log.configure(config.log))
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED
    except ImrelayError as exc:
        print(f"imrelay: {exc}", file=sys.stderr)
        return _EXIT_USAGE if isinstance(exc, ConfigError) else _EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imrelay",
        description="Carries instant messages between plain browsers and RabbitMQ.",
        epilog="Every setting may stand in the file, in an environment variable (IMRELAY_<SECTION>_<KEY>) and on "
        "the command line; the later of these three wins.",
    )
    parser.add_argument("--version", action="version", version=f"imrelay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in (
        ("serve", "run the relay, with a RabbitMQ of its own where [broker] url is 'private'"),
        ("broker", "run the private RabbitMQ alone, for relays that are hosted elsewhere"),
        ("inbox", "show how many messages wait for a user, or throw them away; a look renews the inbox"),
        ("check-config", "read the settings, say what is wrong with them or print them as they will be used"),
    ):
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == "inbox":
            command.add_argument("user", metavar="ID", help="the user's id")
            action = command.add_mutually_exclusive_group()
            action.add_argument("--purge", action="store_true", help="throw away the messages that wait")
            action.add_argument(
                "--drop", metavar="N", type=_positive, help="throw away the first N messages that wait"
            )
            action.add_argument("--delete", action="store_true", help="delete the inbox and what is in it")
            command.add_argument("--yes", action="store_true", help="do not ask")
        command.add_argument(
            "--config",
            metavar="FILE",
            help=f"settings file (default: ${CONFIG_VARIABLE}, or config.ini here if there is one)",
        )
        _add_settings(command, as_table=name == "check-config")
    return parser


def _add_settings(command: argparse.ArgumentParser, *, as_table: bool) -> None:
    """Give a command an option for each setting; its `--help` lists the options, or has the table of settings."""
    if as_table:
        width = shutil.get_terminal_size().columns or 80  # Python 3.10 says 0 of a terminal that has no size
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.usage = "imrelay check-config [-h] [--config FILE] [--SECTION-SETTING VALUE ...]"
        command.description = textwrap.fill(f"{command.description} {_NAMES}", width)
        command.epilog = settings_table(width)
    groups = {}
    for row in settings():
        if row.section not in groups:
            groups[row.section] = command.add_argument_group(f"[{row.section}]")
        groups[row.section].add_argument(
            row.option,
            dest=f"{row.section}.{row.key}",
            metavar=_metavar(row),
            help=argparse.SUPPRESS if as_table else _help(row),
        )


def _metavar(row: Setting) -> str:
    if row.type is bool:
        return "YES|NO"
    return "|".join(row.choices) or (row.unit or row.key).upper()


def _help(row: Setting) -> str:
    return f"{row.doc} (default: {row.default_text or 'empty'})".replace("%", "%%")


def _load(options: argparse.Namespace) -> Config:
    given = {
        (row.section, row.key): text
        for row in settings()
        if (text := getattr(options, f"{row.section}.{row.key}")) is not None
    }
    return load(find_file(os.environ, options.config), os.environ, given)


def _print_config(config: Config) -> None:
    section = ""
    for row in settings():
        if row.section != section:
            print(f"[{row.section}]" if not section else f"\n[{row.section}]")
            section = row.section
        print(f"{row.key} = {row.show(getattr(getattr(config, section), row.key))}".rstrip())
    sys.stdout.flush()


def _inbox(config: Config, options: argparse.Namespace) -> int:
    user = check_id(options.user)
    logging.disable()  # what goes wrong is said once, at the end
    with inbox_inspector(config) as inspector:
        state = inspector.look(user)
        if state is None:
            print(f"{user} has no inbox: nobody with this id was ever here, or not for long")
            return _EXIT_FAILED
        print(f"{user}: {state.messages} messages wait, {state.consumers} sockets are here")
        if not state.consumers:
            print("RabbitMQ takes this look for a use of the inbox: its time to expire has begun anew")
        if options.purge and _agrees(options, f"Throw away {state.messages} messages to {user}"):
            print(f"{inspector.purge(user)} messages thrown away")
        elif options.drop:
            if state.consumers:
                raise SetupError(f"{user} is here and has the first messages: --drop works while nobody is")
            count = min(options.drop, state.messages)
            if count and _agrees(options, f"Throw away the first {count} messages to {user}"):
                print(f"{inspector.drop(user, count)} messages thrown away")
        elif options.delete and _agrees(options, f"Delete the inbox of {user} with {state.messages} messages"):
            print(f"inbox deleted, with {inspector.delete(user)} messages")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _agrees(options: argparse.Namespace, question: str) -> bool:
    """Ask; raises `SetupError` where there is no terminal."""
    if options.yes:
        return True
    if not sys.stdin.isatty():
        raise SetupError("there is no terminal to ask at; say --yes if you mean it")
    return input(f"{question}, for ever? [y/N] ").strip().lower() in ("y", "yes")


class _BrokerService:
    """The private node as `imrelay broker` runs it."""

    def __init__(self, config: Config) -> None:
        if not config.is_private:
            raise ConfigError("[broker] url", "is not 'private': there is no RabbitMQ for imrelay to run")
        self._broker = PrivateBroker(config.data_dir)

    def start(self) -> None:
        self._broker.start()

    def stop(self) -> None:
        self._broker.stop()


def _run(service: _Service, stream: LogStream) -> int:
    """Run a service until a signal ends it, unless that was ignored at the start; a second ends it at once."""
    stopping = Event()

    def on_signal(number: int) -> None:
        name = signal.Signals(number).name
        if stopping.is_set():
            logger.warning("%s again: ending at once", name)
            stream.finish(_LOG_TIMEOUT)
            os._exit(128 + number)
        logger.info("%s: stopping", name)
        stopping.set()

    for number in _SIGNALS:
        # The parent may have us ignore some: `nohup` SIGHUP, a shell that starts us in the background SIGINT.
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            gevent.signal_handler(number, on_signal, number)
    starting = gevent.spawn(_attempt, service.start)
    gevent.wait([starting, stopping], count=1)
    if not starting.dead:
        starting.kill()
    elif starting.value is not None:
        service.stop()
        raise starting.value
    stopping.wait()
    service.stop()
    logger.info("stopped")
    return 0


def _attempt(start: Callable[[], None]) -> Exception | None:
    try:
        start()
    except Exception as exc:
        return exc
    return None
