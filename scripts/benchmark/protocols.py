"""How each server is spoken to: the upgrade request, the login, what surrounds a message, and its answer."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence

from benchmark.client_frames import BINARY, TEXT

__all__ = ["MqttProtocol", "PlainProtocol", "SocketIoProtocol", "StompProtocol", "message"]

_ANSWER = re.compile(rb'\{"ack":\{"id":"(\d{8})"[,}]')

#: What is sent after the upgrade (None: nothing) and how the answer to it may begin.
Login = list[tuple[bytes | None, tuple[bytes, ...]]]


class PlainProtocol:
    """The article's protocol, `echo-protocol`: a WebSocket message is the message, and the answer another one."""

    #: A message comes back in a frame that is known to the last byte before it is sent.
    is_fixed = True
    #: Opcode of what the browser sends.
    opcode = TEXT
    offers = "Sec-WebSocket-Protocol: echo-protocol\r\n"

    def __init__(self, *, answers: bool = False) -> None:
        """Begin; `answers`: the server tells the sender of each message when it is kept."""
        self.answers = answers

    def path(self, user: str) -> str:
        """Return the target of the upgrade request."""
        return f"/{user}"

    def request(self, user: str, host: str) -> bytes:
        """Return the upgrade request."""
        return (
            f"GET {self.path(user)} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            f"{self.offers}Origin: http://{host}\r\n\r\n"
        ).encode()

    def login(self, user: str) -> Login:
        """Return what to send after the upgrade, and how the answer to each begins."""
        return []

    def wrap(self, message: bytes, to: str, number: int | None = None) -> bytes:
        """Return the payload that carries a message to the server; a probe has no number."""
        return message

    def wrap_back(self, message: bytes) -> bytes:
        """Return the payload that carries it from the server; only where `is_fixed`."""
        return message

    def packets(self, payload: bytes) -> Sequence[bytes]:
        """Return the packets in the payload of one WebSocket message."""
        return (payload,)

    def unwrap(self, packet: bytes) -> bytes | None:
        """Return the message in a packet; None for one that is the protocol's own business."""
        return packet

    def answered(self, packet: bytes) -> int | None:
        """Return the number of the message that a packet says is kept; None for another packet."""
        if not self.answers or (found := _ANSWER.match(packet)) is None:
            return None
        return int(found[1])

    def reply(self, packet: bytes) -> bytes | None:
        """Return what the client has to send for a packet that it got, if anything."""
        return None


class SocketIoProtocol(PlainProtocol):
    """Socket.IO 5 over Engine.IO 4: an event named `message` with the message as its object."""

    offers = ""

    def path(self, user: str) -> str:
        return f"/socket.io/?EIO=4&transport=websocket&id={user}"

    def login(self, user: str) -> Login:
        return [(None, (b"0",)), (b"40", (b"40",))]

    def wrap(self, message: bytes, to: str, number: int | None = None) -> bytes:
        return b'42["message",%b]' % message

    def wrap_back(self, message: bytes) -> bytes:
        return b'42["message",%b]' % message

    def unwrap(self, packet: bytes) -> bytes | None:
        return packet[13:-1] if packet.startswith(b'42["message",') else None

    def reply(self, packet: bytes) -> bytes | None:
        return b"3" if packet == b"2" else None


class StompProtocol(PlainProtocol):
    """STOMP 1.2 over WebSocket, as RabbitMQ speaks it; a message comes with a running number in its head."""

    is_fixed = False
    offers = "Sec-WebSocket-Protocol: v12.stomp\r\n"

    def __init__(self, exchange: str, vhost: str, user: str, password: str) -> None:
        super().__init__()
        self._exchange = exchange
        self._connect = (
            f"CONNECT\naccept-version:1.2\nhost:{vhost}\nlogin:{user}\npasscode:{password}\nheart-beat:0,0\n\n\0"
        ).encode()

    def path(self, user: str) -> str:
        return "/ws"

    def login(self, user: str) -> Login:
        subscribe = (
            f"SUBSCRIBE\nid:0\ndestination:/exchange/{self._exchange}/{user}\nack:auto\nreceipt:ready\n\n\0"
        ).encode()
        return [(self._connect, (b"CONNECTED",)), (subscribe, (b"RECEIPT",))]

    def wrap(self, message: bytes, to: str, number: int | None = None) -> bytes:
        return b"SEND\ndestination:/exchange/%b/%b\ncontent-length:%d\n\n%b\0" % (
            self._exchange.encode(),
            to.encode(),
            len(message),
            message,
        )

    def unwrap(self, packet: bytes) -> bytes | None:
        if not packet.startswith(b"MESSAGE"):
            return packet if packet.startswith(b"ERROR") else None
        return packet[packet.index(b"\n\n") + 2 : packet.rindex(b"\0")]


class MqttProtocol(PlainProtocol):
    """MQTT 3.1.1 over WebSocket, quality of service 1, with a session that the broker keeps.

    A user is subscribed to the topic `im/<id>` and acknowledges each message (PUBACK); a sender gets a PUBACK for
    each of its own, whose packet identifier is the number of the message and one.
    """

    is_fixed = False
    opcode = BINARY
    offers = "Sec-WebSocket-Protocol: mqtt\r\n"

    #: First bytes: the type of packet, and for PUBLISH its flags (MQTT 3.1.1, section 2.2).
    _CONNECT, _CONNACK, _PUBLISH, _PUBACK, _SUBSCRIBE, _SUBACK = 0x10, 0x20, 0x32, 0x40, 0x82, 0x90
    #: Packet identifier of a probe.
    _PROBE = 65_535

    def __init__(self, vhost: str, user: str, password: str) -> None:
        super().__init__(answers=True)
        self._credentials = _text(f"{vhost}:{user}") + _text(password)

    def path(self, user: str) -> str:
        return "/ws"

    def login(self, user: str) -> Login:
        # 0xC0: user name and password, and a session that is not clean; no keepalive.
        connect = _text("MQTT") + b"\x04\xc0\x00\x00" + _text(user) + self._credentials
        subscribe = b"\x00\x01" + _text(f"im/{user}") + b"\x01"
        accepted = tuple(bytes((self._CONNACK, 2, is_known, 0)) for is_known in (0, 1))
        subscribed = (bytes((self._SUBACK, 3, 0, 1, 1)),)
        return [(_packet(self._CONNECT, connect), accepted), (_packet(self._SUBSCRIBE, subscribe), subscribed)]

    def wrap(self, message: bytes, to: str, number: int | None = None) -> bytes:
        identifier = self._PROBE if number is None else number + 1
        return _packet(self._PUBLISH, _text(f"im/{to}") + struct.pack("!H", identifier) + message)

    def packets(self, payload: bytes) -> Sequence[bytes]:
        found, at = [], 0
        while at < len(payload):
            _, begin, end = _measure(payload, at)
            if end > len(payload) or begin == 0:
                raise ValueError("an MQTT packet that does not end with its WebSocket message")
            found.append(payload[at:end])
            at = end
        return found

    def unwrap(self, packet: bytes) -> bytes | None:
        if packet[0] & 0xF0 != 0x30:
            return None
        _, begin, _ = _measure(packet, 0)
        return packet[begin + 2 + int.from_bytes(packet[begin : begin + 2], "big") + 2 :]

    def answered(self, packet: bytes) -> int | None:
        if packet[0] != self._PUBACK:
            return None
        identifier = int.from_bytes(packet[2:4], "big")
        return None if identifier == self._PROBE else identifier - 1

    def reply(self, packet: bytes) -> bytes | None:
        # Quality of service 1, sent again or not.
        if packet[0] & 0xF6 != self._PUBLISH:
            return None
        _, begin, _ = _measure(packet, 0)
        topic = begin + 2 + int.from_bytes(packet[begin : begin + 2], "big")
        return b"\x40\x02" + packet[topic : topic + 2]


def message(sender: str, to: str, content: str, size: int = 0, number: int | None = None) -> bytes:
    """Return a message of the article's shape, filled up to `size` bytes; one with a number asks for an answer."""
    asks = {} if number is None else {"id": f"{number:08d}"}
    whole = asks | {"from": {"id": sender}, "to": {"id": to}, "content": content}
    text = json.dumps(whole, separators=(",", ":"))
    return (text[:-2] + "." * max(0, size - len(text)) + text[-2:]).encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("!H", len(data)) + data


def _packet(first: int, rest: bytes) -> bytes:
    size, length = len(rest), b""
    while True:
        size, digit = divmod(size, 128)
        length += bytes((digit | (128 if size else 0),))
        if not size:
            return bytes((first,)) + length + rest


def _measure(data: bytes, at: int) -> tuple[int, int, int]:
    """Return the first byte of the packet at `at`, where its rest begins (0: not here), and where it ends."""
    size = 0
    for place in range(4):
        if at + 1 + place >= len(data):
            break
        digit = data[at + 1 + place]
        size |= (digit & 127) << 7 * place
        if digit < 128:
            return data[at], at + 2 + place, at + 2 + place + size
    return data[at], 0, 0
