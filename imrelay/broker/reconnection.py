"""The connections of one process to its broker: when one has opened, those that pause try again at once."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence

from imrelay.broker.connection import Connection, ConnectionState

__all__ = ["Connections"]


class Connections:
    """Makes connections to one broker, and tells each of them when another one has opened.

    Otherwise the publisher might be back and acknowledge messages while the consumers still wait for the end of
    their own pause. The arguments are those of `Connection`.
    """

    def __init__(
        self, urls: Callable[[], Sequence[str]], *, heartbeat: int, tls: ssl.SSLContext | None = None
    ) -> None:
        self._urls = urls
        self._heartbeat = heartbeat
        self._tls = tls
        self._made: list[Connection] = []

    def new(self, name: str, on_state: Callable[[ConnectionState], None]) -> Connection:
        """Make a connection, which its user starts and closes."""

        def on_change(state: ConnectionState) -> None:
            if state is ConnectionState.OPEN:
                self._hurry(made)
            on_state(state)

        made = Connection(self._urls, name=name, heartbeat=self._heartbeat, tls=self._tls, on_state=on_change)
        self._made.append(made)
        return made

    def _hurry(self, opened: Connection) -> None:
        self._made = [connection for connection in self._made if not connection.is_closed]
        for connection in self._made:
            if connection is not opened:
                connection.hurry()
