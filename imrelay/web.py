"""The desk: what the relay answers over HTTP, and whom it lets in by WebSocket (PROTOCOL section 1).

Pages and health are a Flask app. A socket that has been upgraded goes past Flask straight into its session: a
request context would live as long as the socket, in every one of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from imrelay.errors import BadId
from imrelay.protocol import resumed_session
from imrelay.session import Services, Session
from imrelay.submission import check_id
from imrelay.websocket import (
    Admission,
    Refusal,
    RefusalLog,
    WebSocket,
    is_loopback,
    names_loopback,
    origin_allowed,
)

__all__ = ["Desk", "page_policy"]

logger = logging.getLogger(__name__)

#: Where a session waits in the WSGI environ between the handshake and the upgrade.
_SESSION = "imrelay.session"
#: Longest time that a handshake waits for the broker, in seconds; after it the socket is opened all the same.
_ATTACH_TIMEOUT = 5.0

_CANNOT_UPGRADE = "this server cannot upgrade to WebSocket; see Hosting in imrelay's README for one that can"

_FOREIGN_HOST = (
    "a relay on loopback answers to localhost, 127.0.0.1 and [::1] alone; for another name, or behind a proxy on "
    "this machine, set [server] allowed_origins"
)

Environ = dict[str, Any]


class Desk:
    """The WSGI application, and the two hooks that the WebSocket handler calls around an upgrade."""

    def __init__(self, services: Services, allowed_origins: Sequence[str], admission: Admission) -> None:
        self._services = services
        self._allowed_origins = allowed_origins
        #: Bounds the connections that are no browser sockets; for the WebSocket handler.
        self.admission = admission
        self._refusals = RefusalLog(logger)
        self._flask = _make_flask(self.problem)

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request (WSGI, PEP 3333), or run the session of an upgraded one until it ends."""
        websocket: WebSocket | None = environ.get("wsgi.websocket")
        if websocket is None:
            if (
                environ.get("HTTP_UPGRADE", "").lower() == "websocket"
            ):  # our handler would have upgraded or refused
                return _error(501, "cannot_upgrade", _CANNOT_UPGRADE)(environ, start_response)
            return self._flask(environ, start_response)
        session: Session = environ.pop(_SESSION)
        environ.clear()  # the handler keeps it as long as the socket lives
        session.run(websocket)
        return []

    def problem(self) -> str:
        """Say why no message can be accepted now; empty when they can."""
        services = self._services
        if services.hub.is_draining:
            return "the relay is stopping"
        if not services.publisher.is_ready:
            return f"no broker to publish to: {services.publisher.problem}"
        if not services.consumers.is_open:
            return f"no broker to consume from: {services.consumers.problem}"
        return ""

    def refuse(self, environ: Environ, address: object) -> Refusal | None:
        """Refuse a handshake, or open its session and leave it in the environ; the 101 follows.

        `address` is that of the accepted socket (`getsockname`).

        The session consumes before the browser sees its socket open: whatever is sent to this user from then on
        reaches it. Where the broker is away, or slow, the socket opens without, and gets its messages later.
        """
        if not self._allowed_origins and is_loopback(address) and not names_loopback(environ["HTTP_HOST"]):
            return Refusal(403, "host_not_allowed", _FOREIGN_HOST)
        if not origin_allowed(environ, self._allowed_origins):
            return Refusal(
                403, "origin_not_allowed", "this page's origin may not connect here; see allowed_origins"
            )
        try:
            user = check_id(_path(environ))
        except BadId as exc:
            return Refusal(400, "bad_id", f"the path is / and the id of a user: {exc}")
        if self._services.hub.is_draining:
            return Refusal(503, "stopping", "the relay is stopping; connect again")
        if self._services.hub.is_full:
            self._refusals.note(
                f"max_connections ({len(self._services.hub)}) are here, one more socket was refused"
            )
            return Refusal(
                503, "too_many_connections", "this relay has as many sockets as it may; try again later"
            )
        session = environ[_SESSION] = Session(user, self._services)
        try:
            self._end_predecessor(user, environ)
            session.consume()
            if self._services.consumers.may_open_soon:
                session.wait_attached(_ATTACH_TIMEOUT)
        except BaseException:  # the server kills its greenlets when it stops
            self.abandoned(environ)
            raise
        return None

    def _end_predecessor(self, user: str, environ: Environ) -> None:
        """End the session that a browser resumes, lest newer messages reach it before what that one has not taken.

        Blocks for two seconds at most. Whatever is in the way, the handshake goes on.
        """
        resumed = resumed_session(environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", ""))
        if resumed is not None:
            try:
                self._services.relays.end_session(user, resumed)
            except Exception:
                logger.exception("a session that is resumed could not be ended")

    def abandoned(self, environ: Environ) -> None:
        """Release a session whose browser was gone before the upgrade."""
        session: Session | None = environ.pop(_SESSION, None)
        if session is not None:
            session.close()


def _path(environ: Environ) -> str:
    """Return the path behind its '/', decoded; WSGI hands bytes over as latin-1 (PEP 3333)."""
    raw: bytes = environ.get("PATH_INFO", "")[1:].encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadId("an id is valid UTF-8") from None


def _make_flask(problem: Callable[[], str]) -> Flask:
    app = Flask("imrelay", static_folder=None)
    page = resources.files("imrelay").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": page_policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/")
    @app.get("/<user>")
    def chat(user: str = "") -> Response:
        """The chat page; it reads from its own address which user it is."""
        if user:
            check_id(_path(request.environ))
        return Response(page, content_type="text/html; charset=utf-8", headers=headers)

    @app.get("/healthz")
    def healthz() -> Response:
        """200 while the process turns."""
        return _json(200, {"status": "ok"})

    @app.get("/readyz")
    def readyz() -> Response:
        """200 when messages can be accepted, else 503 with the reason."""
        reason = problem()
        return _error(503, "not_ready", reason) if reason else _json(200, {"status": "ready"})

    @app.errorhandler(BadId)
    def bad_id(exc: BadId) -> Response:
        return _error(400, "bad_id", str(exc))

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

    return app


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
