"""HTTP answers that the handler gives without the application, and an answer as an access log takes it."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from imrelay.websocket.handshake import Refusal

__all__ = ["Logged", "body_of", "phrase_of", "whole_answer"]


class Logged:
    """The answer as gunicorn's access log takes it."""

    def __init__(self, handler: Any) -> None:
        status = handler.status
        self.status = status.decode("latin-1") if isinstance(status, bytes) else status or "000"
        self.headers = handler.response_headers or []
        self.sent = handler.response_length


def whole_answer(refusal: Refusal) -> tuple[bytes, bytes]:
    """Return head and body of a refusal that ends its connection."""
    body = body_of(refusal)
    head = (
        f"HTTP/1.1 {refusal.status} {phrase_of(refusal.status)}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode(), body


def body_of(refusal: Refusal) -> bytes:
    return json.dumps({"error": {"code": refusal.code, "message": refusal.message}}).encode()


def phrase_of(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Refused"
