"""The entry point for WSGI hosting: `imrelay.wsgi:application`.

    gunicorn -k geventwebsocket.gunicorn.workers.GeventWebSocketWorker -w 2 imrelay.wsgi:application

Settings come from the file that IMRELAY_CONFIG names, or from config.ini in the current folder, and from
IMRELAY_<SECTION>_<KEY>. Importing this reads them and does nothing else; each process connects to the broker with
its first request. With `[broker] url = private` the node is that of a running `imrelay broker`.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import os
import sys

from imrelay.hosting import HostedRelay

__all__ = ["application"]

application = HostedRelay(os.environ)
application.take_over(sys.modules)
