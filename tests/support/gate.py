"""A proxy to the broker that can hold up its answers, while greenlets of this process go on."""

from __future__ import annotations

import threading

import gevent

from tests.support.proxy import Proxy
from tests.support.tap import Method, MethodTap

__all__ = ["Gate"]


class Gate(MethodTap):
    """A proxy to the broker that can hold up its answers, from a certain method on; use it as a context."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._proxy = Proxy(url, tap=self)
        #: The URL of the broker through here.
        self.url = self._proxy.url
        #: Set as soon as it holds something up.
        self.holds = threading.Event()
        self._may_pass = threading.Event()
        self._method: Method | None = None
        self._left = 0

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exception: object) -> None:
        self.let_pass()
        self._proxy.close()

    def hold(self, method: Method, number: int = 1) -> None:
        """Hold up the next such method (or the one after so many), and what comes with it or behind it."""
        self.holds.clear()
        self._may_pass.clear()
        self._left = number
        self._method = method

    def wait_held(self, timeout: float) -> bool:
        """Let the greenlets of this process run until something is held up, or for `timeout` seconds."""
        return bool(gevent.get_hub().threadpool.apply(self.holds.wait, (timeout,)))

    def let_pass(self) -> None:
        """Let pass what is held up, and all that comes."""
        self._method = None
        self._may_pass.set()

    def reset(self) -> None:
        """End every connection; new ones are taken."""
        self._proxy.reset()

    def __call__(self, data: bytes, to_broker: bool, connection: int) -> None:
        super().__call__(data, to_broker, connection)
        if not to_broker and self.holds.is_set():
            self._may_pass.wait()

    def on_method(self, connection: int, channel: int, method: Method, to_broker: bool) -> None:
        """Close the gate at the method that is waited for."""
        if not to_broker and method == self._method:
            self._left -= 1
            if not self._left:
                self.holds.set()
