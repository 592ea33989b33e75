"""The bytes of one client, in any pieces, made into whole messages and control frames; no I/O.

The parser's state between two calls:

    head      fewer bytes than a frame's head (or than a whole control frame): kept as they are
    payload   inside a data frame: every piece is unmasked and checked when it arrives
    done      a close frame came, or the peer broke a rule (`failure` says which): nothing is parsed any more

An unfinished message takes memory of its size, an eighth more for the growing buffer, and its size again at the
moment when it is handed over. A text stays UTF-8, which is checked a piece at a time: its str would take 1, 2 or 4
bytes for each character, as the widest of them needs.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

try:
    from websockets.speedups import apply_mask
except ImportError:  # no C compiler when it was installed: slower, the same result
    from websockets.utils import apply_mask

from imrelay.websocket.exceptions import FrameError
from imrelay.websocket.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    FIN,
    MASKED,
    MAX_CONTROL,
    PING,
    PONG,
    RSV1,
    TEXT,
    read_close,
)

__all__ = ["FrameParser", "Inflate", "Parsed"]

#: A whole message or control frame: opcode and unmasked payload; that of a text is UTF-8.
Parsed = tuple[int, bytes]

#: Inflates one compressed frame: (payload, first frame of the message, last frame, bytes allowed) -> data.
Inflate = Callable[[bytes, bool, bool, int], bytes]

#: Inflated bytes that count as one frame against the budget, see `FrameParser.parse`.
INFLATED_PER_FRAME = 512

_KNOWN_OPCODES = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))

#: Bytes of a text that are checked at once: Python makes a str of them, of up to four times the size.
_CHECK_SIZE = 4096

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


def _check_text(decoder: codecs.IncrementalDecoder, piece: bytes, ends: bool) -> None:
    """Check a piece of a text; `ends`: it is the last. Raises `FrameError` 1007, as early as the bytes allow."""
    cut = decoder.getstate()[0]
    if piece.isascii() and not cut:
        return
    try:
        for at in range(0, len(piece), _CHECK_SIZE):
            decoder.decode(piece[at : at + _CHECK_SIZE])
        if ends:
            decoder.decode(b"", True)
    except UnicodeDecodeError:
        raise FrameError(1007, "text is not UTF-8") from None
    cut = decoder.getstate()[0]
    if cut[:1] == b"\xed" and cut[1:] >= b"\xa0":  # a surrogate; Python waits for its third byte
        raise FrameError(1007, "text is not UTF-8")


class FrameParser:
    """Takes the bytes of one client in any pieces and gives out whole messages and control frames.

    `max_size` bounds a message in bytes, all its fragments together; `max_fragments` their number.
    `inflate` is given when permessage-deflate was agreed on; else a set RSV1 bit is an error.
    """

    __slots__ = (
        "_compressed",
        "_decoder",
        "_done",
        "_fin",
        "_fragments",
        "_frame",
        "_inflate",
        "_inflated",
        "_left",
        "_mask",
        "_max_fragments",
        "_max_size",
        "_max_wire",
        "_message",
        "_opcode",
        "_tail",
        "_wire",
        "failure",
        "has_more",
    )

    def __init__(self, *, max_size: int, inflate: Inflate | None = None) -> None:
        self.failure: FrameError | None = None
        #: The budget of the last call ran out before its bytes did; `parse(b"")` goes on with them.
        self.has_more = False
        self._done = False
        self._max_size = max_size
        self._max_fragments = max(1024, max_size // 16)
        # Stored deflate blocks are a little larger than what they hold: a message at the limit must pass.
        self._max_wire = max_size if inflate is None else max_size + (max_size >> 8) + 1024
        self._inflate = inflate
        self._tail = b""
        self._opcode = 0  # of the message in work; 0: none
        self._compressed = False
        self._fragments = 0
        self._wire = 0  # payload bytes of the message in work, as announced by its frames so far
        self._message: bytearray | None = None
        self._frame: bytearray | None = None  # a compressed frame is inflated when it is whole
        self._decoder: codecs.IncrementalDecoder | None = None
        self._inflated = 0  # bytes, since the budget was last charged for them
        self._left = 0  # payload bytes of the data frame in work that are still to come
        self._mask = b""
        self._fin = False

    def parse(self, data: bytes, budget: int = 1 << 30) -> list[Parsed]:
        """Take `data` and return what is complete, in order; look at `budget` frames at most.

        A frame that is inflated counts as more, so that few bytes cannot make much work in one call. What comes
        before a violation is returned; the violation itself is then in `failure`.
        """
        events: list[Parsed] = []
        if self._done:
            return events
        if self._tail:
            data = self._tail + data if data else self._tail
            self._tail = b""
        self.has_more = False
        try:
            if not self._left:
                position = self._parse(data, 0, budget, events)
            else:
                position = self._take_piece(data, 0, events)
                if not self._left and not self._done:
                    position = self._parse(data, position, budget - self._price(), events)
        except FrameError as error:
            self.failure = error
            self._stop()
        else:
            if position < len(data) and not self._done:
                self._tail = data[position:]
        return events

    def _stop(self) -> None:
        self._done = True
        self.has_more = False
        self._message = self._frame = self._decoder = None
        self._left = 0

    def _parse(self, data: bytes, position: int, budget: int, events: list[Parsed]) -> int:
        """Parse what begins with the head of a frame; return the position after what was parsed."""
        # One long loop: a call takes as long as all checks of a small message, so only rare cases are functions.
        end = len(data)
        while budget > 0:
            if (start := position + 2) > end:
                if position < end:
                    self._check_first(data[position])
                break
            first, second = data[position], data[position + 1]
            opcode, size = first & 0x0F, second & 0x7F
            if first != 0x81 or self._opcode:
                self._check_first(first)
            if not second & MASKED:
                raise FrameError(1002, "frame is not masked")
            if size > MAX_CONTROL:  # it is no size, but says how wide that is
                if opcode >= CLOSE:
                    raise FrameError(1002, "control frame is over 125 bytes")
                width = 2 if size == 126 else 8
                if start + width > end:
                    break
                size = int.from_bytes(data[start : start + width], "big")
                if size < 126 or (width == 8 and (size < 0x10000 or size >> 63)):
                    self._refuse_size(size)
                start += width
            body = start + 4
            if opcode < CLOSE and self._wire + size > self._max_wire:
                raise FrameError(1009, f"message is over {self._max_size} bytes")
            if (after := body + size) <= end:
                payload = apply_mask(data[body:after], data[start:body]) if size else b""
                position = after
                if opcode >= CLOSE:
                    budget = self._take_control(opcode, payload, budget, events)
                elif first & FIN and not self._opcode and not first & RSV1:
                    if opcode == TEXT and not payload.isascii():
                        _check_text(_Utf8Decoder(), payload, True)
                    events.append((opcode, payload))
                else:
                    self._begin_frame(first, size)
                    self._take_payload(payload, True, events)
                    budget -= self._price() - 1
                budget -= 1
            elif opcode >= CLOSE or body > end:
                break
            else:
                self._begin_frame(first, size)
                self._left, self._mask = size, data[start:body]
                return self._take_piece(data, body, events)
        self.has_more = budget <= 0 and position < end and not self._done
        return position

    @staticmethod
    def _refuse_size(size: int) -> None:
        if size >> 63:
            raise FrameError(1002, "frame length has its highest bit set")
        raise FrameError(1002, "frame length is not in its shortest form")

    def _take_control(self, opcode: int, payload: bytes, budget: int, events: list[Parsed]) -> int:
        """Give out a control frame; return the budget, which a close frame ends: what follows is not looked at."""
        if opcode == CLOSE:
            read_close(payload)
            self._stop()
            budget = 0
        events.append((opcode, payload))
        return budget

    def _price(self) -> int:
        """Return how much of the budget the last data frame has used: more than 1 if it was inflated."""
        inflated, self._inflated = self._inflated, 0
        return 1 + inflated // INFLATED_PER_FRAME

    def _check_first(self, first: int) -> None:
        opcode = first & 0x0F
        if first & 0x70 and (first & 0x30 or self._inflate is None or opcode not in (TEXT, BINARY)):
            raise FrameError(1002, "reserved bit is set")
        if opcode not in _KNOWN_OPCODES:
            raise FrameError(1002, f"opcode {opcode} is reserved")
        if opcode >= CLOSE:
            if not first & FIN:
                raise FrameError(1002, "control frame is fragmented")
        elif opcode == CONTINUATION:
            if not self._opcode:
                raise FrameError(1002, "continuation without a message")
            if self._fragments >= self._max_fragments:
                raise FrameError(1009, f"message has over {self._max_fragments} fragments")
        elif self._opcode:
            raise FrameError(1002, "new message inside a fragmented one")

    def _begin_frame(self, first: int, size: int) -> None:
        """Note the head of a data frame whose payload goes through `_take_payload`."""
        if not self._opcode:
            self._opcode = first & 0x0F
            self._compressed = bool(first & RSV1)
            self._fragments = self._wire = 0
            self._message = bytearray()
        self._fin = bool(first & FIN)
        self._fragments += 1
        self._wire += size

    def _take_piece(self, data: bytes, position: int, events: list[Parsed]) -> int:
        """Unmask what `data` has of the frame in work; return the position after it."""
        after = min(len(data), position + self._left)
        size = after - position
        if size:
            piece = apply_mask(data[position:after] if size != len(data) else data, self._mask)
            self._left -= size
            turn = size & 3
            if turn and self._left:
                self._mask = self._mask[turn:] + self._mask[:turn]
            self._take_payload(piece, not self._left, events)
        return after

    def _take_payload(self, piece: bytes, frame_ends: bool, events: list[Parsed]) -> None:
        """Add unmasked payload to the message in work, and give the message out if this ends it."""
        assert self._message is not None  # begun by _begin_frame
        ends = frame_ends and self._fin
        if self._compressed:
            if not frame_ends or self._frame is not None:
                if self._frame is None:
                    self._frame = bytearray()
                self._frame += piece
                if not frame_ends:
                    return
                piece = bytes(self._frame)
                self._frame = None
            piece = self._inflate_frame(piece, ends)
        if self._opcode == TEXT:
            if self._decoder is None:
                self._decoder = _Utf8Decoder()
            _check_text(self._decoder, piece, ends)
        self._message += piece
        if ends:
            opcode, message = self._opcode, bytes(self._message)
            self._message = self._decoder = None
            self._opcode = self._wire = 0
            events.append((opcode, message))

    def _inflate_frame(self, frame: bytes, ends: bool) -> bytes:
        assert self._inflate is not None  # RSV1 is refused otherwise
        assert self._message is not None  # begun by _begin_frame
        allowed = self._max_size - len(self._message)
        data = self._inflate(frame, self._fragments == 1, ends, allowed)
        if len(data) > allowed:
            raise FrameError(1009, f"message is over {self._max_size} bytes when inflated")
        self._inflated += len(data)
        return data
