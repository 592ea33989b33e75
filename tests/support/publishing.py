"""A publisher of this process's own, and what became of the messages that it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gevent
from gevent.event import Event

from imrelay.broker.connection import Connection
from imrelay.broker.publication import Publication
from imrelay.broker.publisher import Publisher
from imrelay.broker.topology import Topology
from imrelay.errors import AnswerableError
from imrelay.settings.values import InboxConfig
from tests.support.harness import eventually

__all__ = ["PATIENCE", "Clock", "MessageSender", "running_publisher"]

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


class Clock:
    """A clock that goes only when it is told to, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class MessageSender:
    """Gives messages to a publisher and keeps its answers, by message id."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.answers: dict[str, AnswerableError | None] = {}
        self.publications: list[Publication] = []

    def send(self, user: str, mid: str, body: bytes = b"{}", message_id: str | None = "c1") -> Publication:
        """Publish a message; blocks while the publisher has no room."""
        publication = Publication(user, body, False, mid, 0, message_id, self._on_done)
        room = Event()
        if not self.publisher.publish(publication, room.set):
            room.wait()
        self.publications.append(publication)
        return publication

    def _on_done(self, publication: Publication, error: AnswerableError | None) -> None:
        assert publication.mid not in self.answers, "answered twice"
        self.answers[publication.mid] = error

    def wait(self, count: int | None = None) -> dict[str, AnswerableError | None]:
        """Wait until so many, or all, have been answered."""
        wanted = len(self.publications) if count is None else count
        eventually(lambda: len(self.answers) >= wanted, PATIENCE, sleep=gevent.sleep)
        return self.answers


@contextmanager
def running_publisher(
    url: str,
    *,
    inbox: InboxConfig | None = None,
    queue_size: int = 1000,
    timeout: float = PATIENCE,
    create_unknown: bool = True,
    clock: Callable[[], float] | None = None,
    kind: type[Publisher] = Publisher,
    heartbeat: int = 60,
) -> Iterator[MessageSender]:
    """A publisher on the broker of an AMQP URL, ready to publish, and stopped at the end."""
    inbox = inbox or InboxConfig()
    more = {} if clock is None else {"clock": clock}
    publisher = kind(
        lambda name, on_state: Connection(lambda: [url], name=name, heartbeat=heartbeat, on_state=on_state),
        Topology("direct_message", inbox),
        queue_size=queue_size,
        timeout=timeout,
        persistent=False,
        create_unknown=create_unknown,
        inbox_expires=inbox.expires,
        **more,
    )
    with gevent.Timeout(6 * PATIENCE):
        publisher.start()
        try:
            eventually(lambda: publisher.is_ready, PATIENCE, sleep=gevent.sleep)
            yield MessageSender(publisher)
        finally:
            publisher.stop()
