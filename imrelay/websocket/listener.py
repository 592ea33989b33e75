"""pywsgi's server, changed so that it survives a shortage of descriptors and that TLS handshakes have a deadline.

The names of gevent that are not public and are used here: `BaseServer._timer`, `_start_accepting_if_started`.
"""

from __future__ import annotations

import errno
import logging
from typing import Any

from gevent.pywsgi import WSGIServer

from imrelay.websocket.http_connections import RefusalLog

__all__ = ["Listener"]

#: What accept says when this process, or this machine, has no descriptor or no memory left for one more.
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
#: Seconds until the next attempt to accept; clients that connect meanwhile wait in the kernel's queue.
_PAUSE = 0.1


class Listener(WSGIServer):  # type: ignore[misc]  # the base has no types
    """Takes the arguments of `gevent.pywsgi.WSGIServer`."""

    #: Connections that are accepted before the first of them is looked at.
    max_accept = 16

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shortages = RefusalLog(logging.getLogger(__name__))
        if self.ssl_args is not None:
            # It then happens with the first read, under the handler's `handshake_timeout`.
            self.ssl_args.setdefault("do_handshake_on_connect", False)

    def do_read(self) -> Any:
        """Accept one connection; called by gevent in the event loop."""
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in _SHORTAGES:
                raise
            self._shortages.note(f"no connection can be accepted: {error.strerror}")
        self.stop_accepting()
        self._timer = self.loop.timer(_PAUSE)
        self._timer.start(self._start_accepting_if_started)
        return None
