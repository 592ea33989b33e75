"""permessage-deflate (RFC 7692), by the extension that the websockets library maintains.

Neither side keeps its context from message to message, so that an idle socket holds no zlib state.
"""

from __future__ import annotations

from websockets.exceptions import InvalidHeader, NegotiationError, PayloadTooBig, ProtocolError
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.headers import build_extension, parse_extension
from websockets.typing import ExtensionName

from imrelay.websocket.exceptions import FrameError

__all__ = ["Deflate", "negotiate_deflate"]

#: Shorter messages are sent as they are: their deflated form is hardly smaller.
MIN_SIZE = 64

_FACTORY = ServerPerMessageDeflateFactory(
    server_no_context_takeover=True,
    client_no_context_takeover=True,
    server_max_window_bits=12,
    client_max_window_bits=12,
    compress_settings={"memLevel": 5},
)


def negotiate_deflate(offers: str) -> tuple[str, Deflate] | None:
    """Return the answer to a Sec-WebSocket-Extensions header and the codec, or None if nothing in it suits.

    Raises ValueError where the header is malformed.
    """
    try:
        extensions = parse_extension(offers)
    except InvalidHeader as error:
        raise ValueError("Sec-WebSocket-Extensions is malformed") from error
    for name, parameters in extensions:
        if name != PerMessageDeflate.name:
            continue
        try:
            agreed, codec = _FACTORY.process_request_params(parameters, [])
        except NegotiationError:
            continue  # the client's next offer may suit
        if codec.local_max_window_bits < 9:
            continue  # zlib cannot, though older releases of the library agree to it
        return build_extension([(ExtensionName(PerMessageDeflate.name), agreed)]), Deflate(codec)
    return None


class Deflate:
    """Deflates and inflates the messages of one socket."""

    __slots__ = ("_codec",)

    def __init__(self, codec: PerMessageDeflate) -> None:
        self._codec = codec

    def inflate(self, frame: bytes, begins: bool, ends: bool, allowed: int) -> bytes:
        """Inflate one frame of a message to `allowed` bytes at most.

        Raises FrameError 1009 beyond that, 1002 for bytes that are not deflated data.
        """
        opcode = Opcode.BINARY if begins else Opcode.CONT
        # One byte more is asked for: the library takes 0 for "no limit", and a message of exactly the limit
        # can leave the end of its last block unread.
        try:
            data = self._codec.decode(Frame(opcode, frame, ends, begins), max_size=allowed + 1).data
        except PayloadTooBig:
            raise FrameError(1009, "message is too big when inflated") from None
        except ProtocolError:
            raise FrameError(1002, "compressed data is malformed") from None
        return bytes(data)

    def deflate(self, payload: bytes) -> bytes | None:
        """Return the deflated payload, or None where it is not smaller."""
        if len(payload) < MIN_SIZE:
            return None
        data = self._codec.encode(Frame(Opcode.BINARY, payload)).data
        return bytes(data) if len(data) < len(payload) else None
