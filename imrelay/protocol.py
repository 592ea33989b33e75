"""The two subprotocols: how deliveries are written to a browser, and when they count as taken.

`Plain` is the article's (no subprotocol, or `echo-protocol`): the message itself, taken when it is written.
`V1` is `imrelay.v1` (PROTOCOL section 5): numbered, taken when the browser has acknowledged it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence

from imrelay import __version__
from imrelay.broker.consumer import Consumer
from imrelay.broker.mailbox import Delivery
from imrelay.errors import BadMessage
from imrelay.message import from_node, is_json, pong_frame, v1_frame
from imrelay.mid import mid_time_ms
from imrelay.submission import ClientAck, ClientPing, is_utf8

__all__ = ["SUBPROTOCOLS", "V1", "Frame", "Plain", "choose"]

#: (payload, whether it is binary)
Frame = tuple[bytes, bool]

_V1_NAME = "imrelay.v1"
#: What the relay speaks by name, in its order of preference.
SUBPROTOCOLS = (_V1_NAME, "echo-protocol")

#: Messages that are remembered as sent, to know repeats; at most twice as many. The larger number is for a socket
#: that stands by: what its live queue brought, the inbox repeats when it is promoted.
_REMEMBERED, _REMEMBERED_STANDING_BY = 512, 10_000


class _Memory:
    """The ids of the messages that were sent last, in two generations: no bookkeeping per message but a set."""

    __slots__ = ("_older", "_recent")

    def __init__(self) -> None:
        self._recent: set[str] | None = None  # nothing, for the many who only listen
        self._older: set[str] | None = None

    def knows(self, mid: str, consumer: Consumer) -> bool:
        """Tell whether an id is among the last, and remember it."""
        recent = self._recent
        if recent is None:
            self._recent = {mid}
            return False
        if mid in recent or (self._older is not None and mid in self._older):
            return True
        recent.add(mid)
        if len(recent) >= _REMEMBERED and (not consumer.has_stood_by or len(recent) >= _REMEMBERED_STANDING_BY):
            self._older, self._recent = recent, set()
        return False


class Plain:
    """Writes messages as they are; what is written to the TCP connection is taken."""

    __slots__ = ("_consumer", "_memory", "_node_envelope")

    def __init__(self, consumer: Consumer, *, node_envelope: bool) -> None:
        self._consumer = consumer
        self._node_envelope = node_envelope
        self._memory = _Memory()

    def encode(self, delivery: Delivery) -> Frame | None:
        """Return what is to be written for a delivery; None for a repeat of what this socket got already."""
        mid = delivery.mid
        if mid is not None and self._memory.knows(mid, self._consumer) and delivery.may_repeat:
            return None
        if self._node_envelope or not delivery.body.isascii():
            return self._unpack(delivery)
        return delivery.body, delivery.binary

    def written(self, deliveries: Sequence[Delivery]) -> None:
        """Note that the browser's connection has taken what `encode` made of these."""
        self._consumer.ack(deliveries)

    def control(self, control: ClientAck | ClientPing) -> bytes | None:
        """Act on a frame that is no message, and return the answer if there is one. Raises `BadMessage`."""
        raise BadMessage("to.id is missing")

    def is_overdue(self, timeout: float) -> bool:
        """Tell whether the browser has failed to acknowledge something for `timeout` seconds."""
        return False

    def _unpack(self, delivery: Delivery) -> Frame:
        """Return the message in an AMQP body (PROTOCOL section 6)."""
        body = delivery.body
        if self._node_envelope:
            unwrapped = from_node(body)
            if unwrapped is not None:
                return unwrapped
        return body, delivery.binary or not is_utf8(body)


class _Sent:
    """A message that was sent and not yet acknowledged by the browser."""

    __slots__ = ("delivery", "seq", "since")

    def __init__(self, seq: int, delivery: Delivery, since: float) -> None:
        self.seq = seq
        self.delivery = delivery
        self.since = since


class V1(Plain):
    """Numbers the messages; what the browser has acknowledged is taken.

    After the broker was away, it delivers again what was not acknowledged to it. What this socket has already is
    not sent again: the new delivery takes the place of the one that is void, or is acknowledged at once.
    """

    __slots__ = ("_by_mid", "_clock", "_seq", "_unacknowledged")

    def __init__(
        self, consumer: Consumer, *, node_envelope: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(consumer, node_envelope=node_envelope)
        self._clock = clock
        self._seq = 0
        self._unacknowledged: deque[_Sent] = deque()
        self._by_mid: dict[str, _Sent] = {}

    @staticmethod
    def welcome(user: str, session: str, *, ping_interval: float, max_message_size: int) -> bytes:
        """Return the first frame of a session."""
        fields = {
            "id": user,
            "session": session,
            "ping_interval": ping_interval,
            "max_message_size": max_message_size,
            "server": f"imrelay/{__version__}",
        }
        return json.dumps({"welcome": fields}, ensure_ascii=False, separators=(",", ":")).encode()

    def encode(self, delivery: Delivery) -> Frame | None:
        """Return the numbered frame for a delivery; None for a repeat."""
        mid = delivery.mid
        if mid is not None and self._memory.knows(mid, self._consumer) and delivery.may_repeat:
            sent = self._by_mid.get(mid)
            if sent is not None:
                stale, sent.delivery = sent.delivery, delivery
                self._consumer.ack_each([stale])  # of this channel still, it takes one place of the prefetch
            else:
                self._consumer.ack_each([delivery])
            return None
        self._seq += 1
        sent = _Sent(self._seq, delivery, self._clock())
        self._unacknowledged.append(sent)
        if delivery.mid is not None:
            self._by_mid[delivery.mid] = sent
        payload, binary = self._unpack(delivery)
        time_ms = delivery.time_ms if delivery.time_ms is not None else mid_time_ms(delivery.mid)
        own = delivery.is_own or is_json(payload)
        return v1_frame(self._seq, delivery.mid, time_ms, payload, own, delivery.redelivered), binary

    def written(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing is taken by being written."""

    def control(self, control: ClientAck | ClientPing) -> bytes | None:
        """Take an acknowledgement, which is cumulative, or answer a ping. Raises `BadMessage`."""
        if isinstance(control, ClientPing):
            return pong_frame(control)
        if not 0 <= control.seq <= self._seq:
            raise BadMessage(f"ack: {control.seq} was not sent in this session, whose last seq is {self._seq}")
        taken: list[Delivery] = []
        while self._unacknowledged and self._unacknowledged[0].seq <= control.seq:
            delivery = self._unacknowledged.popleft().delivery
            taken.append(delivery)
            if delivery.mid is not None:
                self._by_mid.pop(delivery.mid, None)
        self._consumer.ack_each(taken)
        return None

    def is_overdue(self, timeout: float) -> bool:
        """Tell whether the oldest unacknowledged message was sent over `timeout` seconds ago."""
        return bool(self._unacknowledged) and self._clock() - self._unacknowledged[0].since > timeout


def choose(subprotocol: str | None, consumer: Consumer, *, node_envelope: bool) -> Plain:
    """Return the protocol of a socket by the name that the handshake agreed on."""
    return (V1 if subprotocol == _V1_NAME else Plain)(consumer, node_envelope=node_envelope)
