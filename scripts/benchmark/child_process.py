"""What each program of the bench does with its own process: how it ends, its folder, its ports."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["add_node_options", "end_on_signals", "free_ports", "node_environment", "say", "work_folder"]


def end_on_signals() -> None:
    """Have SIGINT raise `KeyboardInterrupt`, and SIGTERM and SIGHUP end this process with all that it started.

    SIGINT also where a shell started this process in the background, which ignores it there. SIGHUP only where it
    was not ignored: who starts this with `nohup` wants it to go on when the terminal is closed.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(1))


def add_node_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the settings of the RabbitMQ node."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="LINE", help="a line for the node's rabbitmq.conf; several"
    )
    parser.add_argument(
        "--environment",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="a variable for the node's process; several",
    )


def node_environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the variables that `--environment` gives."""
    return dict(one.split("=", 1) for one in options.environment)


def _assignment(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return text


def free_ports(count: int) -> list[int]:
    """Return as many different ports of 127.0.0.1 that are free now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def work_folder(cache: Path) -> Iterator[Path]:
    """Make a folder for this run below `cache`, locked while it lives; remove it at the end.

    Those of runs that were killed, whose locks are free, are removed too.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob("run-*"):
        with contextlib.suppress(OSError):
            held = os.open(old / "lock", os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(held)
    folder = cache / f"run-{secrets.token_hex(4)}"
    folder.mkdir()
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def say(text: str) -> None:
    """Tell whoever watches."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
