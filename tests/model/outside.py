"""What another AMQP program and the administrator do and see in the model: foreign messages, audits, lists."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pika
from pika.exceptions import AMQPConnectionError, AMQPError, NackError, UnroutableError

from tests.support.harness import TICK, VirtualHost

__all__ = ["FOREIGN", "Outside"]

#: Seconds that the administrator waits for a node that is coming back.
_PATIENCE = 60.0
#: How the names of the queues begin that outlive a user's connections here.
_KEPT = ("inbox.", "audit.")
#: Kind -> (body of message number {n}, properties) of another program's message; none has `app_id`.
FOREIGN: dict[str, tuple[str | bytes, dict[str, Any]]] = {
    "own id": ('{"content":%d}', {"message_id": "foreign-%d"}),
    "no id": ('{"content":%d}', {}),
    "equal ids": ('{"content":%d}', {"message_id": "the-same"}),
    "equal ids, binary": ("binary %d", {"message_id": "the-same", "type": "binary"}),
    "equal ids of ours": ('{"content":%d}', {"message_id": "01M86CPHEC42MXP89J1P897A00"}),
    "not UTF-8": (b"\xff\xfe %d", {}),
    "no JSON": ("text %d", {}),
    "empty": ("", {}),
    "odd": (
        "odd %d",
        {"headers": {"x": [1, {"y": b"\xff"}]}, "priority": 4, "type": "letter", "correlation_id": "\u00fc"},
    ),
}


class Outside:
    """A program of somebody else's, with publisher confirms, and the administrator's view of a virtual host."""

    def __init__(self, vhost: VirtualHost) -> None:
        self._vhost = vhost
        self._channel: Any = None

    def publish(self, to: str, body: bytes, properties: dict[str, Any]) -> bool:
        """Publish as any program may; tell whether the broker has taken it and found somebody to give it to."""
        made = pika.BasicProperties(delivery_mode=2, **properties)  # it outlives the broker
        try:
            self._open().basic_publish("direct_message", to, body, made, mandatory=True)
        except (UnroutableError, NackError):
            return False
        return True

    def bind_audit(self, user: str) -> None:
        """Bind a queue of another program's to the exchange, which gets a user's messages too."""
        channel = self._open()
        channel.exchange_declare("direct_message", "direct", durable=True)
        channel.queue_declare(f"audit.{user}", durable=True)
        channel.queue_bind(f"audit.{user}", "direct_message", routing_key=user)

    def delete_inbox(self, user: str) -> None:
        """Delete a user's inbox, as an administrator may."""
        self._open().queue_delete(f"inbox.{user}")

    def consumers(self, user: str) -> int:
        """Return how many consumers a user's inbox has, those that stand by as well."""
        return int(self._look(user, "length(rabbit_amqqueue:consumers(Q))", "0"))

    def waiting(self, user: str) -> int:
        """Return how many messages are in a user's inbox, unacknowledged ones as well."""
        return int(self._look(user, "proplists:get_value(messages, rabbit_amqqueue:info(Q, [messages]))", "0"))

    def peek(self, user: str) -> list[str]:
        """Return what is ready in a user's inbox, each with whether it was delivered before; it stays there."""
        channel = self._connect().channel()
        found = []
        while (got := channel.basic_get(f"inbox.{user}"))[0] is not None:
            found.append(f"{got[2]!r}{' redelivered' if got[0].redelivered else ''}")
        channel.connection.close()
        return found

    def reached_by(self, user: str) -> list[str]:
        """Return the names of what is bound to a user's exchange."""
        expression = (
            "[element(4, element(4, B)) || B <- rabbit_binding:list_for_source(rabbit_misc:r("
            f"<<{json.dumps(self._vhost.name)}>>, exchange, <<{json.dumps('user.' + user)}>>))]"
        )
        return sorted(self._vhost.evaluate(expression))

    def forget(self, users: Sequence[str]) -> None:
        """Delete what stands on the broker for users that do not come again."""
        self._delete([f"{kind}{user}" for user in users for kind in _KEPT])

    def forget_all(self) -> None:
        """Delete it for all users, also what was made again since: by a message that was under way at the end."""
        self._delete([name for name in self._vhost.queues() if name.startswith(_KEPT)])

    def _delete(self, queues: Sequence[str]) -> None:
        channel = self._open()
        for name in queues:
            channel.queue_delete(name)

    def close(self) -> None:
        """Close its connection."""
        if self._channel is not None:
            with suppress(AMQPError):
                self._channel.connection.close()
            self._channel = None

    def _look(self, user: str, expression: str, otherwise: str) -> Any:
        queue = f"rabbit_misc:r(<<{json.dumps(self._vhost.name)}>>, queue, <<{json.dumps('inbox.' + user)}>>)"
        asked = f"case rabbit_amqqueue:lookup({queue}) of {{ok, Q}} -> {expression}; _ -> {otherwise} end"
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return self._vhost.evaluate(asked)
            except RuntimeError:  # the node is just coming back
                if time.monotonic() > deadline:
                    raise
                time.sleep(TICK)

    def _open(self) -> Any:
        if self._channel is None or not self._channel.is_open:
            self.close()
            connection = self._connect()
            self._channel = connection.channel()
            self._channel.confirm_delivery()
        return self._channel

    def _connect(self) -> pika.BlockingConnection:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return pika.BlockingConnection(pika.URLParameters(f"{self._vhost.url}?heartbeat=0"))
            except AMQPConnectionError:  # the node is just coming back
                if time.monotonic() > deadline:
                    raise
                time.sleep(TICK)
