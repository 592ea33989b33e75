"""Finds what a private node needs on this machine: RabbitMQ's scripts, Erlang's port mapper, free ports."""

from __future__ import annotations

import errno
import glob
import os
import random
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from imrelay.errors import SetupError

__all__ = ["HOST", "PORTS", "accepts", "find_epmd", "find_scripts", "find_version", "free_ports", "is_free_port"]

#: The only address on which a private node listens.
HOST = "127.0.0.1"
#: Below the range of ports for outgoing connections, and apart from RabbitMQ's default ports.
PORTS = range(21_000, 25_000)

#: Where RabbitMQ's own scripts lie. Debian's /usr/sbin/rabbitmq-server is none of them: it changes the user.
_PLACES = (
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
    "/usr/lib64/rabbitmq/lib/rabbitmq_server-*/sbin",
    "/opt/rabbitmq*/sbin",
    "/usr/local/opt/rabbitmq/sbin",
    "/opt/homebrew/opt/rabbitmq/sbin",
    "/usr/local/lib/rabbitmq/bin",
    "/usr/local/sbin",
)


def find_scripts() -> Path:
    """Return the folder of RabbitMQ's scripts, which run as any user."""
    folders = [Path(found) for place in _PLACES for found in sorted(glob.glob(place), reverse=True)]
    if on_path := shutil.which("rabbitmq-server"):
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        script = folder / "rabbitmq-server"
        if os.access(script, os.X_OK) and script.resolve().name != "rabbitmq-script-wrapper":
            return folder
    raise SetupError(
        "RabbitMQ is not installed: run 'apt-get install rabbitmq-server' as root, "
        "or set [broker] url to the amqp:// URL of one that runs elsewhere"
    )


def find_version(scripts: Path) -> tuple[int, ...]:
    """Return the version of the RabbitMQ to which these scripts belong, by the names of its files; () if unknown.

    Nothing is run for that: a `rabbitmq-server --version` of some packages starts the system's node.
    """
    for place in (scripts.parent, *sorted(scripts.parent.glob("lib/rabbitmq_server-*"), reverse=True)):
        for found in sorted(place.glob("plugins/rabbit-*"), reverse=True):
            numbers = re.fullmatch(r"rabbit-(\d+)\.(\d+)\.(\d+).*", found.name)
            if numbers is not None:
                return tuple(int(number) for number in numbers.groups())
    return ()


def find_epmd() -> str:
    """Return the path of Erlang's port mapper, which Erlang does not always put on PATH."""
    if found := shutil.which("epmd"):
        return found
    if erl := shutil.which("erl"):
        root = Path(erl).resolve().parent.parent
        if places := sorted(root.glob("**/erts-*/bin/epmd")) + sorted(root.glob("bin/epmd")):
            return str(places[-1])
    raise SetupError("Erlang's epmd is not on PATH: install Erlang (Debian: 'apt-get install erlang-base')")


def free_ports() -> Iterator[int]:
    for port in random.sample(PORTS, len(PORTS)):
        if is_free_port(port):
            yield port


def is_free_port(port: int) -> bool:
    """Whether no program listens on the port, on loopback or every address, by IPv4 or IPv6 (epmd uses both)."""
    for family, host in ((socket.AF_INET, HOST), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
    return True


def accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
        return True
    except OSError:
        return False
