"""The WebSocket as an application uses it: blocking calls and callbacks, on top of the conversation."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from gevent import getcurrent

from imrelay.websocket.closing import SocketState
from imrelay.websocket.conversation import Conversation, OnMessage
from imrelay.websocket.exceptions import ConcurrentReceive, ConnectionClosed
from imrelay.websocket.frames import (
    BINARY,
    SHORT_BINARY,
    SHORT_TEXT,
    TEXT,
    encode_close,
    encode_frame,
    is_valid_close_code,
)

__all__ = ["WebSocket"]

#: Bytes of a long text that are decoded at once: Python reserves several times that meanwhile.
_DECODE_SIZE = 65_536

_OPEN, _CLOSING, _CLOSED = SocketState.OPEN, SocketState.CLOSING, SocketState.CLOSED


class WebSocket(Conversation):
    """What an application finds in `environ["wsgi.websocket"]`.

    One greenlet receives, or `on_message` does; any greenlet may send and close. `close_code` and `close_reason`
    say what ended the socket, as seen from here: 1005 if the peer gave no code, 1006 if the TCP connection was
    lost, 4408 if the peer was too slow to take what was sent. The code is None while the socket is open.
    """

    __slots__ = ()

    @property
    def closed(self) -> bool:
        """Tell whether nothing can be sent any more."""
        return self._state is not _OPEN

    @property
    def on_message(self) -> OnMessage | None:
        """The callback for each message, called in the event loop; it replaces a greenlet that calls `receive`.

        It gets (payload, is binary), a text being UTF-8, and must not block. After `pause` it is not called before
        `resume`; meanwhile a bounded amount is read ahead, and then nothing. Messages that came before it was set
        are passed to it in a later turn of the loop. An exception in it is logged and closes the socket with 1011.
        """
        return self._on_message

    @on_message.setter
    def on_message(self, callback: OnMessage | None) -> None:
        self._on_message = callback
        if callback is not None:
            self._schedule()

    @property
    def on_close(self) -> Callable[[], None] | None:
        """The callback for the end: called once, in the event loop, when nothing can be sent; it must not block.

        It is called after all messages that came before the end; `pause` delays it. No message follows it.
        """
        return self._on_close

    @on_close.setter
    def on_close(self, callback: Callable[[], None] | None) -> None:
        self._on_close = callback
        if callback is not None:
            self._schedule()

    def pause(self) -> None:
        """Stop calling `on_message` until `resume`."""
        self._is_paused = True

    def resume(self) -> None:
        """Call `on_message` again, first with the messages that wait; never before this has returned."""
        if self._is_paused:
            self._is_paused = False
            self._schedule()

    def receive(self) -> str | bytes | None:
        """Wait for the next message and return it: text as str, binary as bytes; None after a close.

        Python keeps a str in 1, 2 or 4 bytes a character, for the widest of them: a text with one emoji takes four
        times its size. `receive_messages` leaves it as it came. Raises ConcurrentReceive if another greenlet is
        waiting here already.
        """
        if not self._wait_for_messages():
            return None
        payload, binary = self._messages.pop(0)
        self._took(len(payload))
        return payload if binary else _decode(payload)

    def receive_messages(self) -> list[tuple[bytes, bool]]:
        """As `receive`, but return all that has come, each as (payload, is binary); nothing after a close.

        The payload of a text is UTF-8.
        """
        if not self._messages and not self._wait_for_messages():
            return []
        messages, self._messages = self._messages, []
        self._queued = 0
        if not self._reading:
            self._took(0)
        return messages

    def _wait_for_messages(self) -> bool:
        """Wait until there are messages; tell whether there are."""
        while not self._messages:
            if self._ending is not None:
                self._end_now()
            if self._state is not _OPEN:
                return False
            if self._receiver is not None:
                raise ConcurrentReceive()
            self._receiver = getcurrent()
            try:
                self._hub.switch()
            finally:
                self._receiver = None
        return True

    def _took(self, size: int) -> None:
        """Go on reading when there is nothing left to take."""
        self._queued -= size
        if not self._reading and not self._messages and self._state is _OPEN and self._ending is None:
            self._schedule()

    def send(self, data: str | bytes) -> None:
        """Send one message: str as text, bytes as binary.

        Blocks the caller until the kernel has taken all of it (never in the event loop, where it is queued).
        Raises ConnectionClosed if the socket is closed, or gets closed before that.
        """
        if isinstance(data, str):
            frame = self._encode(data.encode(), False)
        elif isinstance(data, (bytes, bytearray, memoryview)):
            frame = self._encode(bytes(data), True)
        else:
            raise TypeError(f"a message is str or bytes, not {type(data).__name__}")
        self._send(frame)

    def send_messages(self, messages: Sequence[tuple[bytes, bool]]) -> None:
        """Send several messages by one write; each is (payload, is binary), a text being UTF-8 already.

        Blocks and raises as `send` does.
        """
        pieces: list[bytes] = []
        for payload, binary in messages:
            size = len(payload)
            if size < 126 and self._deflate is None:
                pieces += ((SHORT_BINARY if binary else SHORT_TEXT)[size], payload)
            else:
                pieces.append(self._encode(payload, binary))
        if pieces:
            self._send(b"".join(pieces))

    def close(self, code: int = 1000, reason: str = "", *, wait: bool = True) -> None:
        """Close the socket, once; from any greenlet, and without `wait` from the event loop too.

        Waits until the peer has answered the close frame, for `close_timeout` seconds at most. Messages that
        were not received yet are thrown away. If the peer has begun to close, its code is the one that counts.
        Raises ValueError for a code that may not be sent; a reason is cut to 123 bytes.
        """
        if not is_valid_close_code(code):
            raise ValueError(f"close code {code} may not be sent")
        self._drop_messages()
        if self._state is _OPEN:
            if self._ending is not None:
                self._end_now()
            else:
                self._end(code, reason, encode_close(code, reason), _CLOSING)
        elif self._on_close is not None:
            self._schedule()
        if wait and getcurrent() is not self._hub:
            while self._state is _CLOSING:
                self._await_change()

    def wait_closed(self) -> None:
        """Wait until the TCP connection is gone: after a close, for `close_timeout` seconds twice at most."""
        while self._state is not _CLOSED:
            self._await_change()

    def _encode(self, payload: bytes, binary: bool) -> bytes:
        opcode = BINARY if binary else TEXT
        if self._deflate is not None:
            deflated = self._deflate.deflate(payload)
            if deflated is not None:
                return encode_frame(opcode, deflated, rsv1=True)
        return encode_frame(opcode, payload)

    def _send(self, frames: bytes) -> None:
        if self._state is _OPEN:
            write = self._write_frames(frames)
            if write is None:
                if self._state is _OPEN:
                    return
            else:
                current = getcurrent()
                if current is self._hub:
                    return
                write.sender = current
                try:
                    self._hub.switch()
                finally:
                    write.sender = None
                if write.taken:
                    return
        raise ConnectionClosed(self.close_code or 1006, self.close_reason)

    def _await_change(self) -> None:
        current = getcurrent()
        if self._closers is None:
            self._closers = []
        self._closers.append(current)
        try:
            self._hub.switch()
        finally:
            if self._closers is not None and current in self._closers:
                self._closers.remove(current)


def _decode(text: bytes) -> str:
    """Decode text that has been checked; a long one in pieces, so that it costs little beyond the str itself."""
    if len(text) <= 2 * _DECODE_SIZE or text.isascii():
        return text.decode()
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(text)
    return "".join([decoder.decode(view[at : at + _DECODE_SIZE]) for at in range(0, len(view), _DECODE_SIZE)])
