"""A relay whose Flask app has hooks that break requests, by the id that is asked for, and which tells its places.

Each line of standard input is answered with one line of JSON: `places` says how many sessions and HTTP connections
are counted now, and how many sessions were at most; `go` lets the requests of `/held` go on.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import gevent
from flask import Flask, Response, request
from gevent.event import Event
from gevent.fileobject import FileObject

from imrelay import server
from imrelay.app import create_app
from imrelay.cli import main
from imrelay.sessions.registry import Member, Registry
from imrelay.websocket import HttpConnections

_go = Event()
_most = 0
_join = Registry.join


def _join_and_count(self: Registry, member: Member) -> None:
    global _most
    _join(self, member)
    _most = max(_most, len(self))


def _create_hooked_app(*arguments: Any) -> Flask:
    """Make the app of a relay, with hooks."""
    app = create_app(*arguments)

    @app.before_request
    def before() -> None:
        if request.path == "/before-raises":
            raise RuntimeError("before_request")

    @app.after_request
    def after(response: Response) -> Response:
        if request.path == "/after-raises":
            raise RuntimeError("after_request")
        if request.path == "/after-kills":
            raise gevent.GreenletExit
        if request.path == "/after-replaces":
            return Response("something else", 202)
        if request.path == "/after-refuses":
            response.status_code = 403
        if request.path == "/close-raises":
            response.call_on_close(_raise)
        if request.path == "/bad-header":
            response.headers["X-Name"] = "\u4e2d"
        if request.path.startswith("/held"):
            _go.wait()
        return response

    @app.teardown_request
    def teardown(error: BaseException | None) -> None:
        if request.path == "/teardown-raises":
            raise RuntimeError("teardown_request")

    return app


def _raise() -> None:
    raise RuntimeError("close")


def _places() -> dict[str, int]:
    everything = gc.get_objects()
    return {
        "sessions": sum(len(item) for item in everything if isinstance(item, Registry)),
        "http": sum(len(item) for item in everything if isinstance(item, HttpConnections)),
        "most": _most,
    }


def _answer() -> None:
    for line in FileObject(sys.stdin.fileno(), "r"):
        if line.strip() == "go":
            _go.set()
            gevent.sleep(0)
            _go.clear()
        print(json.dumps(_places()), flush=True)


if __name__ == "__main__":
    Registry.join = _join_and_count  # type: ignore[method-assign]
    server.create_app = _create_hooked_app
    gevent.spawn(_answer).name = "answer"
    sys.exit(main())
