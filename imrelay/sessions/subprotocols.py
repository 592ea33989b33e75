"""The two subprotocols: how deliveries are written to a browser, and when they count as taken.

`Plain` (no subprotocol, or `echo-protocol`, as in the article): the message itself, taken when it is written.
`V1` is `imrelay.v1` (PROTOCOL section 5): numbered, taken when the browser has acknowledged it.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Sequence

from imrelay import __version__
from imrelay.broker.codec import Delivery
from imrelay.broker.consumer import Consumer
from imrelay.errors import BadMessage
from imrelay.messages.message_ids import mid_time_ms
from imrelay.messages.outgoing import from_node, is_json, pong_frame, v1_frame
from imrelay.messages.submission import ClientAck, ClientPing, is_utf8

__all__ = ["SUBPROTOCOLS", "V1", "Outgoing", "Plain", "choose", "remembered", "resumed_session"]

#: A message to be written to a WebSocket: payload, and whether it is binary.
Outgoing = tuple[bytes, bool]

_V1_NAME = "imrelay.v1"
#: The subprotocols of the relay, in its order of preference.
SUBPROTOCOLS = (_V1_NAME, "echo-protocol")

#: A session of `imrelay.v1`: the ULID that its welcome names.
_SESSION_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
#: A browser that comes back offers this, followed by the session of its last welcome, beside `imrelay.v1`.
_RESUME = "imrelay.resume."

#: Bounds of the number of messages that a socket remembers, to recognise repeats.
_FEWEST_REMEMBERED, _MOST_REMEMBERED = 1_024, 20_000
#: The least for a socket that has stood by: when it is promoted, the inbox may repeat what its live queue has
#: delivered, after all that the former active consumer did not acknowledge.
_REMEMBERED_STANDING_BY = 10_000
#: Seconds for which a message is remembered, at least, unless more than those numbers follow it.
_REMEMBERED_TIME = 3_600.0
#: Length of a relay's own message ids, and of the time at their beginning; the rest identifies the message.
_SIZE_OF_MID, _SIZE_OF_TIME = 26, 10


def remembered(publish_queue: int) -> int:
    """Return how many messages a socket remembers, by how many a relay may publish again after a lost connection.

    Twice as many: a second relay that lost its connection at the same moment may publish as many in between.
    """
    return max(_FEWEST_REMEMBERED, min(2 * publish_queue, _MOST_REMEMBERED))


def resumed_session(offered: str) -> str | None:
    """Return the session that a handshake resumes, by the subprotocols that it offers; None where it resumes none.

    Only beside `imrelay.v1`, and the first of several; malformed is none.
    """
    if _RESUME not in offered:
        return None
    names = [name.strip(" \t") for name in offered.split(",")]
    session = next((name.removeprefix(_RESUME) for name in names if name.startswith(_RESUME)), "")
    return session if _V1_NAME in names and _SESSION_ID.fullmatch(session) else None


class _Memory:
    """The messages of relays that were sent last, in two generations: one dictionary look-up per message.

    One generation is `size` messages, or those of `_REMEMBERED_TIME`: a socket that lives for days with a message
    now and then remembers few.
    """

    __slots__ = ("_began", "_older", "_recent")

    def __init__(self, now: float) -> None:
        self._recent: dict[str, None] = {}
        self._older: dict[str, None] = {}
        self._began = now

    def knows(self, key: str, size: int, consumer: Consumer, now: float) -> bool:
        """Tell whether a message is among the last, and remember it.

        `now` is by a monotonic clock, in seconds.
        """
        recent = self._recent
        if key in recent or key in self._older:
            return True
        recent[key] = None
        # Only after a new message: after a pause, what is delivered again comes first.
        if len(recent) < size and now - self._began < _REMEMBERED_TIME:
            return False
        if not consumer.has_stood_by or len(recent) >= max(size, _REMEMBERED_STANDING_BY):
            self._older, self._recent, self._began = recent, {}, now
        return False


class Plain:
    """Writes messages as they are; what is written to the TCP connection is taken."""

    __slots__ = ("_clock", "_consumer", "_memory", "_node_envelope", "_remembered")

    def __init__(
        self,
        consumer: Consumer,
        *,
        node_envelope: bool,
        remembered: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._consumer = consumer
        self._node_envelope = node_envelope
        self._remembered = remembered
        self._memory: _Memory | None = None  # until the first message, to save memory

    def encode(self, delivery: Delivery) -> Outgoing | None:
        """Return what is to be written for a delivery; None for a repeat of one that this socket has got."""
        if self._is_repeat(_key_of(delivery)):
            return None
        if self._node_envelope or not delivery.body.isascii():
            return self._unpack(delivery)
        return delivery.body, delivery.binary

    def written(self, deliveries: Sequence[Delivery]) -> None:
        """Note that these have been written to the browser's connection."""
        self._consumer.ack(deliveries)

    def control(self, control: ClientAck | ClientPing) -> bytes | None:
        """Act on a frame that is no message, and return the answer if there is one. Raises `BadMessage`."""
        raise BadMessage("to.id is missing")

    def is_overdue(self, timeout: float) -> bool:
        """Tell whether the browser has failed to acknowledge something for `timeout` seconds."""
        return False

    def _is_repeat(self, key: str | None) -> bool:
        if key is None:
            return False
        now = self._clock()
        if self._memory is None:
            self._memory = _Memory(now)
        return self._memory.knows(key, self._remembered, self._consumer, now)

    def _unpack(self, delivery: Delivery) -> Outgoing:
        """Return the message in an AMQP body (PROTOCOL section 6)."""
        body = delivery.body
        if self._node_envelope:
            unwrapped = from_node(body)
            if unwrapped is not None:
                return unwrapped
        return body, delivery.binary or not is_utf8(body)


class _Sent:
    """A message that was sent and not yet acknowledged by the browser; its body stays with the broker."""

    __slots__ = ("delivery", "key", "seq", "since")

    def __init__(self, seq: int, delivery: Delivery, key: str | None, since: float) -> None:
        self.seq = seq
        self.delivery = delivery
        #: The key by which a repeat is recognised; None where there is no repeat detection.
        self.key = key
        self.since = since


class V1(Plain):
    """Numbers the messages; what the browser has acknowledged is taken.

    After the broker was away, it delivers again what was not acknowledged to it. What this socket has already is
    not sent again: the new delivery replaces the void one, or is acknowledged at once. A message of another
    program is sent again, with a number of its own, and the void delivery is forgotten.
    """

    __slots__ = ("_by_key", "_seq", "_source", "_unacknowledged")

    def __init__(
        self,
        consumer: Consumer,
        *,
        node_envelope: bool,
        remembered: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(consumer, node_envelope=node_envelope, remembered=remembered, clock=clock)
        self._seq = 0
        self._unacknowledged: deque[_Sent] = deque()
        self._by_key: dict[str, _Sent] = {}
        #: The channel of the last delivery.
        self._source: object = None

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

    def encode(self, delivery: Delivery) -> Outgoing | None:
        """Return the numbered frame for a delivery; None for a repeat. Drops the delivery's body."""
        if delivery.channel is not self._source:
            self._source = delivery.channel
            self._forget_void(delivery.channel)
        key = _key_of(delivery)
        if self._is_repeat(key):
            self._take_repeat(key, delivery)
            return None
        payload, binary = self._unpack(delivery)
        time_ms = delivery.time_ms if delivery.time_ms is not None else mid_time_ms(delivery.mid)
        own = delivery.is_own or is_json(payload)
        frame = v1_frame(self._seq + 1, delivery.mid, time_ms, payload, own, delivery.redelivered)
        delivery.body = b""  # what is not acknowledged comes again from the broker
        self._seq += 1  # not before it is certain that it can be written
        sent = _Sent(self._seq, delivery, key, self._clock())
        self._unacknowledged.append(sent)
        if key is not None:
            self._by_key[key] = sent
        return frame, binary

    def _take_repeat(self, key: str | None, delivery: Delivery) -> None:
        """Let a delivery take the place of the one that was sent, unless that was acknowledged already."""
        sent = self._by_key.get(key or "")
        delivery.body = b""
        if sent is not None:
            stale, sent.delivery = sent.delivery, delivery
            self._consumer.ack_each([stale])  # if it is of this channel, it takes one place of the prefetch
        else:
            self._consumer.ack_each([delivery])

    def _forget_void(self, channel: object) -> None:
        """Forget other programs' messages of a channel that has ended: the broker delivers them again."""
        if self._unacknowledged:
            self._unacknowledged = deque(
                sent for sent in self._unacknowledged if sent.key is not None or sent.delivery.channel is channel
            )

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
            sent = self._unacknowledged.popleft()
            taken.append(sent.delivery)
            if sent.key is not None:
                self._by_key.pop(sent.key, None)
        self._consumer.ack_each(taken)
        return None

    def is_overdue(self, timeout: float) -> bool:
        """Tell whether the oldest unacknowledged message was sent over `timeout` seconds ago."""
        return bool(self._unacknowledged) and self._clock() - self._unacknowledged[0].since > timeout


def choose(subprotocol: str | None, consumer: Consumer, *, node_envelope: bool, remembered: int) -> Plain:
    """Return the protocol of a socket by the name that the handshake agreed on."""
    kind = V1 if subprotocol == _V1_NAME else Plain
    return kind(consumer, node_envelope=node_envelope, remembered=remembered)


def _key_of(delivery: Delivery) -> str | None:
    """Return the key by which a repeat of a message is recognised; None where there is no repeat detection.

    Only the ids of relays count, which `app_id` tells: another program may give many messages one id.
    """
    mid = delivery.mid
    if mid is None or not delivery.is_own or len(mid) != _SIZE_OF_MID:
        return None
    return mid[_SIZE_OF_TIME:]
