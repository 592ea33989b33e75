"""What of gevent, pywsgi and websockets is private and used all the same: in one module each, bounded in version.

pika's are in test_pika_interface.
"""

from __future__ import annotations

import ast
import configparser
import importlib
from pathlib import Path

import pytest
from gevent import pywsgi
from gevent import socket as gevent_socket
from websockets.utils import apply_mask

import imrelay

ROOT = Path(imrelay.__file__).parent
#: Module -> name -> what breaks without it.
REQUEST_HANDLER = {
    "_sendall": "who does not take an answer is waited for without a deadline",
    "_handle_client_error": "bytes that are no request are answered by pywsgi, in its own words",
    "_connection_upgrade_requested": "pywsgi hands out the bare stream where a request asks for an upgrade",
    "_orig_status": "the access log has no status",
}
BODY = {"_discard": "pywsgi calls a method that is not there behind each answer"}
LISTENER = {
    "_timer": "gevent's own pause after a failed accept goes on beside ours",
    "_start_accepting_if_started": "a shortage of descriptors ends the listener for good",
}
PRIVATE = {
    "websocket/request_handler.py": REQUEST_HANDLER,
    "websocket/body.py": BODY,
    "websocket/listener.py": LISTENER,
}


def names_in(path: Path) -> set[str]:
    """Return all attributes that a source names and all methods that it defines."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in PRIVATE.items() for name in names]
)
def test_each_private_name_is_used_in_one_module(module: str, name: str) -> None:
    """Another library, or another version of it, needs a change in one place."""
    users = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if name in names_in(path)}
    assert users == {module}


def test_each_private_name_is_there() -> None:
    """The versions that are installed have them."""
    server = pywsgi.WSGIServer(("127.0.0.1", 0))
    for owner, names in ((pywsgi.WSGIHandler, REQUEST_HANDLER), (pywsgi.Input, BODY), (server, LISTENER)):
        for name, breaks in names.items():
            assert hasattr(owner, name), f"{name} is not there any more: {breaks}"


def test_the_socket_below_gevents_is_asked_for_in_one_module() -> None:
    """Without it gevent's own is used: all works the same, and each call costs half a microsecond more."""
    with gevent_socket.socket() as sock:
        assert sock._sock.fileno() == sock.fileno()
    asked = {
        path.relative_to(ROOT).as_posix(): ast.unparse(node)
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and "'_sock'" in ast.unparse(node)
    }
    assert asked == {"websocket/transport.py": "getattr(sock, '_sock', sock)"}


def test_masking_in_c_is_there_and_says_the_same() -> None:
    """Without `websockets.speedups` the library's masking in Python is taken: slower, the same result."""
    speedups = importlib.import_module("websockets.speedups")
    data, mask = bytes(range(256)) * 5 + b"xyz", b"\x01\x80\xff\x00"
    assert speedups.apply_mask(data, mask) == apply_mask(data, mask)
    users = [path.name for path in ROOT.rglob("*.py") if "websockets.speedups" in path.read_text()]
    assert users == ["parser.py"]


@pytest.mark.parametrize("package", ["gevent", "gevent-websocket", "websockets"])
def test_a_package_with_private_names_is_bounded(package: str) -> None:
    """The next major version is not installed before it has been tested."""
    settings = configparser.ConfigParser()
    settings.read(ROOT.parent / "setup.cfg")
    wanted = [line.partition(">=") for line in settings["options"]["install_requires"].splitlines()]
    (versions,) = [versions for name, _, versions in wanted if name == package]
    assert "," in versions
    assert "<" in versions
