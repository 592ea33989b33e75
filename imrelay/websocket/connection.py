"""What an application has of a WebSocket: calls that wait, on top of the conversation in the hub."""

from __future__ import annotations

from collections.abc import Sequence

from gevent import getcurrent

from imrelay.websocket.conversation import Conversation, State
from imrelay.websocket.errors import ConcurrentReceive, ConnectionClosed
from imrelay.websocket.frames import BINARY, TEXT, encode_close, encode_frame, is_valid_close_code
from imrelay.websocket.parser import decode_text

__all__ = ["WebSocket"]

_OPEN, _CLOSING, _CLOSED = State.OPEN, State.CLOSING, State.CLOSED


class WebSocket(Conversation):
    """What an application finds in `environ["wsgi.websocket"]`.

    One greenlet receives; any greenlet may send and close. `close_code` and `close_reason` say what ended the
    socket, as seen from here: 1005 if the peer gave no code, 1006 if the TCP connection was lost, 4408 if the
    peer was too slow to take what was sent. The code is None while the socket is open.
    """

    __slots__ = ()

    @property
    def closed(self) -> bool:
        """Tell whether nothing can be sent any more."""
        return self._state is not _OPEN

    def receive(self) -> str | bytes | None:
        """Wait for the next message and return it: text as str, binary as bytes; None after a close.

        Raises ConcurrentReceive if another greenlet is waiting here already.
        """
        message = self.receive_message()
        if message is None:
            return None
        payload, text = message
        return payload if text is None else text

    def receive_message(self) -> tuple[bytes, str | None] | None:
        """As `receive`, but return payload bytes and, for a text message alone, its text."""
        messages = self._messages
        while not messages:
            if self._ending is not None:
                self._end_now()
            if self._state is not _OPEN:
                return None
            if self._receiver is not None:
                raise ConcurrentReceive()
            self._receiver = getcurrent()
            try:
                self._hub.switch()
            finally:
                self._receiver = None
        opcode, payload, text = messages.pop(0)
        self._queued -= len(payload)
        if not self._reading and not messages and self._state is _OPEN and self._ending is None:
            self._schedule()
        if text is None and opcode == TEXT:
            text = decode_text(payload)
        return payload, text

    def send(self, data: str | bytes) -> None:
        """Send one message: str as text, bytes as binary.

        Blocks the caller until the kernel has taken all of it (never in the hub, where it is queued). Raises
        ConnectionClosed if the socket is closed, or gets closed before that.
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
        if len(messages) == 1:
            self._send(self._encode(*messages[0]))
        elif messages:
            self._send(b"".join([self._encode(payload, binary) for payload, binary in messages]))

    def close(self, code: int = 1000, reason: str = "", *, wait: bool = True) -> None:
        """Close the socket, once; from any greenlet, and without `wait` from the hub too.

        Waits until the peer has answered the close frame, for `close_timeout` seconds at most. Messages that
        were not received yet are thrown away. If the peer has begun to close, its code is the one that counts.
        Raises ValueError for a code that may not be sent; a reason is cut to 123 bytes.
        """
        if not is_valid_close_code(code):
            raise ValueError(f"close code {code} may not be sent")
        if self._state is _OPEN:
            self._messages.clear()
            self._queued = 0
            if self._ending is not None:
                self._end_now()
            else:
                self._end(code, reason, encode_close(code, reason), _CLOSING)
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
