"""What the WebSocket layer raises.

ImrelayError
└── WebSocketError
    ├── ConnectionClosed     nothing can be sent any more
    ├── ConcurrentReceive    a second greenlet asked for the next message
    └── FrameError           the peer broke RFC 6455 or a limit; names the close code
"""

from __future__ import annotations

from imrelay.errors import ImrelayError

__all__ = ["ConcurrentReceive", "ConnectionClosed", "FrameError", "WebSocketError"]


class WebSocketError(ImrelayError):
    """The base of the layer's errors."""


class ConnectionClosed(WebSocketError):
    """The socket is closed, or was closed before these bytes had left.

    `code` and `reason` are those of `WebSocket.close_code` and `WebSocket.close_reason`.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the WebSocket is closed ({code}{' ' if reason else ''}{reason})")
        self.code = code
        self.reason = reason


class ConcurrentReceive(WebSocketError):
    """Two greenlets called `receive` on one socket; the order of messages would be lost."""

    def __init__(self) -> None:
        super().__init__("another greenlet is already waiting for this socket's next message")


class FrameError(WebSocketError):
    """The peer's bytes cannot be accepted; the socket closes with `code` (RFC 6455 section 7.4.1)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code
        self.reason = reason
