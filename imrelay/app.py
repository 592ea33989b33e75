"""The Flask app: the chat page, health, and the admission of WebSockets (PROTOCOL section 1).

`GET /<id>` is one view. It answers the page; or, for a handshake that the server can upgrade, it decides who may
connect and answers with an error or an `UpgradeResponse`. That response carries the admission: who it is, and a
place among `max_connections`. When the request is over, the WebSocket handler runs the session (see
`imrelay.websocket.upgrade`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

from flask import Flask, Request, Response, request
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.routing import BaseConverter, MapAdapter, Rule, WebsocketMismatch

from imrelay.errors import BadId
from imrelay.messages.submission import check_id
from imrelay.sessions.services import Services
from imrelay.sessions.session import Session
from imrelay.sessions.subprotocols import resumed_session
from imrelay.websocket import (
    UPGRADE,
    RefusalLog,
    Upgrade,
    WebSocket,
    is_loopback,
    is_upgrade,
    names_loopback,
    origin_allowed,
)

__all__ = ["AdmittedSocket", "UpgradeResponse", "create_app", "page_policy"]

logger = logging.getLogger(__name__)

#: Seconds for which a handshake waits for the broker while no consumer of this process is being attached.
_STALLED_TIMEOUT = 5.0
#: Seconds for which it waits at most. Firefox gives up after 20, and would have to wait again after all others.
_ATTACH_TIMEOUT = 15.0

_CANNOT_UPGRADE = "this server cannot upgrade to WebSocket; see Hosting in imrelay's README for one that can"
_FOREIGN_HOST = (
    "a relay on loopback answers to localhost, 127.0.0.1 and [::1] alone; for another name, or behind a proxy on "
    "this machine, set [server] allowed_origins"
)
_FOREIGN_ORIGIN = "this page's origin may not connect here; see allowed_origins"


class AdmittedSocket:
    """A user's session between its admission and its end; an `Endpoint` for the WebSocket handler.

    It has a place among `max_connections` from the moment it is made, which `close` gives back.
    """

    __slots__ = ("_resumed", "_services", "_session")

    def __init__(self, user: str, resumed: str | None, services: Services) -> None:
        """`resumed` is the id of the session that this browser had before, if it names one."""
        self._session = Session(user, services)
        self._resumed = resumed
        self._services = services

    @property
    def user(self) -> str:
        """Who was admitted."""
        return self._session.user

    def attach(self) -> None:
        """Begin to consume, so that messages sent to the user after the browser's `onopen` reach it.

        Blocks while consumers are being attached, for `_ATTACH_TIMEOUT` seconds at most. Where the broker is away,
        or attaches no consumer for `_STALLED_TIMEOUT`, the socket opens and gets its messages later.
        """
        until = time.monotonic() + _ATTACH_TIMEOUT
        if self._resumed is not None:
            self._end_predecessor(self._resumed)
        self._session.consume()
        consumers = self._services.consumers
        if not consumers.may_open_soon:
            return
        seen = -1
        while consumers.attached != seen and (left := until - time.monotonic()) > 0:
            seen = consumers.attached
            if self._session.wait_attached(min(_STALLED_TIMEOUT, left)):
                return

    def _end_predecessor(self, resumed: str) -> None:
        """End the session that a browser resumes, so that what that one has not taken comes before newer messages.

        Blocks for two seconds at most. The handshake goes on in any case.
        """
        try:
            self._services.relays.end_session(self.user, resumed)
        except Exception:
            logger.exception("a session that is resumed could not be ended")

    def run(self, websocket: WebSocket) -> None:
        """Carry messages until the socket ends."""
        self._session.run(websocket)

    def close(self) -> None:
        """Give the place back and end the session. Idempotent."""
        self._session.close()


class UpgradeResponse(Response):
    """The answer to a handshake that was accepted: 101 without a body, and the admission as `socket`.

    The handler that made `upgrade` closes `socket`, even if this object is lost.
    """

    default_status = 101
    default_mimetype = None

    def __init__(self, upgrade: Upgrade, socket: AdmittedSocket) -> None:
        upgrade.accept(socket)
        super().__init__()
        self.socket = socket


class _AnyPath(BaseConverter):
    """Matches any path: that of a handshake is an id, valid or not, and never a page that is not found."""

    regex = "(?s:.*)"
    part_isolating = False


class _App(Flask):
    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Let the WebSocket layer decide what a handshake is when a request is routed."""
        adapter = super().create_url_adapter(request)
        if adapter is not None and request is not None:
            adapter.websocket = is_upgrade(request.environ)
        return adapter


class _Admissions:
    """Decides who may open a WebSocket."""

    def __init__(self, services: Services, allowed_origins: Sequence[str]) -> None:
        self._services = services
        self._allowed_origins = allowed_origins
        self._refusals = RefusalLog(logger)

    def admit(self, upgrade: Upgrade) -> Response:
        """Answer a handshake that is in order: 101 with a place among `max_connections`, or an error."""
        environ, registry = request.environ, self._services.registry
        if (
            not self._allowed_origins
            and is_loopback(upgrade.local_address)
            and not names_loopback(environ["HTTP_HOST"])
        ):
            return _error(403, "host_not_allowed", _FOREIGN_HOST)
        if not origin_allowed(environ, self._allowed_origins):
            return _error(403, "origin_not_allowed", _FOREIGN_ORIGIN)
        try:
            user = check_id(_path())
        except BadId as exc:
            return _error(400, "bad_id", f"the path is / and the id of a user: {exc}")
        if registry.is_draining:
            return _error(503, "stopping", "the relay is stopping; connect again")
        if registry.is_full:
            self._refusals.note(f"max_connections ({len(registry)}) are here, one more socket was refused")
            return _error(503, "too_many_connections", "this relay has as many sockets as it may; try again later")
        resumed = resumed_session(environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", ""))
        return UpgradeResponse(upgrade, AdmittedSocket(user, resumed, self._services))


def create_app(services: Services, allowed_origins: Sequence[str]) -> Flask:
    """Make the Flask app of a relay, to be served by a WebSocket handler with `application_decides`.

    On another server it answers handshakes with 501.
    """
    app = _App("imrelay", static_folder=None)
    app.url_map.converters["any_path"] = _AnyPath
    _add_chat(app, _Admissions(services, allowed_origins))
    _add_health(app, services)
    _add_errors(app)
    return app


def _add_chat(app: Flask, admissions: _Admissions) -> None:
    page = resources.files("imrelay").joinpath("static/chat.html").read_text(encoding="utf-8")
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": page_policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    app.url_map.add(Rule("/<any_path:user>", endpoint="chat", websocket=True))

    @app.get("/")
    @app.get("/<user>")
    def chat(user: str = "") -> Response:
        """The chat page, which reads the user's id from its address; or that user's WebSocket."""
        upgrade: Upgrade | None = request.environ.get(UPGRADE)
        if upgrade is not None:
            return admissions.admit(upgrade)
        if is_upgrade(request.environ):
            return _error(501, "cannot_upgrade", _CANNOT_UPGRADE)
        if user:
            check_id(_path())
        return Response(page, content_type="text/html; charset=utf-8", headers=headers)


def _add_health(app: Flask, services: Services) -> None:
    @app.get("/healthz")
    def healthz() -> Response:
        """200 while the process runs."""
        return _json(200, {"status": "ok"})

    @app.get("/readyz")
    def readyz() -> Response:
        """200 when messages can be accepted, else 503 with the reason."""
        reason = _problem(services)
        return _error(503, "not_ready", reason) if reason else _json(200, {"status": "ready"})


def _add_errors(app: Flask) -> None:
    @app.errorhandler(BadId)
    def bad_id(exc: BadId) -> Response:
        return _error(400, "bad_id", str(exc))

    @app.errorhandler(WebsocketMismatch)
    def no_page(exc: WebsocketMismatch) -> Response:
        return http_error(NotFound())

    @app.errorhandler(HTTPException)
    def http_error(exc: HTTPException) -> Response:
        code = exc.name.lower().replace(" ", "_").replace("'", "")
        answer = _error(exc.code or 500, code, " ".join((exc.description or exc.name).split()))
        if exc.code == 405:
            answer.headers["Allow"] = "GET, HEAD, OPTIONS"
        return answer

    @app.errorhandler(Exception)
    def fault(exc: Exception) -> Response:
        logger.exception("a request met a fault of the relay's")
        return _error(500, "internal_error", "a fault of the relay's; its log says more")


def _problem(services: Services) -> str:
    """Say why no message can be accepted now; empty when they can."""
    if services.registry.is_draining:
        return "the relay is stopping"
    if not services.publisher.is_ready:
        return f"no broker to publish to: {services.publisher.problem}"
    if not services.consumers.is_open:
        return f"no broker to consume from: {services.consumers.problem}"
    return ""


def _path() -> str:
    """Return the request's path after its '/', decoded; WSGI hands bytes over as latin-1 (PEP 3333)."""
    raw: bytes = request.environ.get("PATH_INFO", "")[1:].encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadId("an id is valid UTF-8") from None


def page_policy(page: str) -> str:
    """Return the Content-Security-Policy of the page: its own script and style, its own socket, nothing else."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _json(status: int, body: dict[str, Any]) -> Response:
    return Response(json.dumps(body, ensure_ascii=False) + "\n", status, content_type="application/json")


def _error(status: int, code: str, message: str) -> Response:
    return _json(status, {"error": {"code": code, "message": message}})
