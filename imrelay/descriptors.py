"""File descriptors: how many this process may open, and how many sockets that allows."""

from __future__ import annotations

import logging
import os
import resource
from dataclasses import dataclass

from imrelay.settings.values import Config, ServerConfig
from imrelay.websocket import EXTRA_CONNECTIONS, Listener

__all__ = ["Capacity", "allot"]

logger = logging.getLogger(__name__)

#: The soft limit that is requested where the settings need less. Not the hard one, which may be a thousand
#: million: the private node's processes inherit it, and Erlang allocates a table of that size.
_USUAL = 65_536
#: Descriptors for other uses: files that are read, names that are resolved, processes that are started.
_SUNDRY = 16
#: AMQP connections beside those that consumers share: the publisher's, and those that replace lost ones.
_PUBLISHING = 3


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many connections the relay takes: the settings' bounds, or what the descriptors allow."""

    sockets: int
    http: int


def allot(config: Config, *, places: int | None = None) -> Capacity:
    """Raise the soft limit of open files as far as is needed and allowed; share it out, and say so in the log.

    `places` is how many connections the hosting server takes at the same time, where it has a bound of its own.
    """
    server = config.server
    share = config.broker.channels_per_connection
    reserve = _open_now() + Listener.max_accept + _SUNDRY + _PUBLISHING + 2 * EXTRA_CONNECTIONS
    limit = _raise_limit(_needed(server, share) + reserve)
    free = max(2, limit - reserve)
    capacity, missing = _fit(server, free, share), _needed(server, share) - free
    short_of = f"the limit of {limit} open files (ulimit -n; LimitNOFILE= of a systemd unit)"
    if places is not None:
        free = max(2, places - 2 * EXTRA_CONNECTIONS)
        by_places = _fit(server, free, None)
        if by_places.sockets < capacity.sockets or by_places.http < capacity.http:
            capacity, missing = by_places, _needed(server, None) - free
            short_of = f"the {places} connections that the hosting server takes (gunicorn: --worker-connections)"
    logger.info(
        "%d open files allow %d browser sockets and %d HTTP connections", limit, capacity.sockets, capacity.http
    )
    if capacity.sockets < server.max_connections or capacity.http < server.max_http_connections:
        logger.warning(
            "[server] max_connections = %d and max_http_connections = %d are more than %s allows: raise it by %d",
            server.max_connections,
            server.max_http_connections,
            short_of,
            missing,
        )
    return capacity


def _needed(server: ServerConfig, share: int | None) -> int:
    """Return how much both settings need; HTTP gets a quarter of it at most.

    `share` is how many sockets share one AMQP connection; None where those do not count.
    """
    connections = -(-server.max_connections // share) if share else 0
    return max(server.max_connections + connections + server.max_http_connections, 4 * server.max_http_connections)


def _fit(server: ServerConfig, free: int, share: int | None) -> Capacity:
    """Share out `free` descriptors or places; `share` as above, since AMQP connections grow with the sockets."""
    http = max(1, min(server.max_http_connections, free // 4))
    sockets = (free - http) * share // (share + 1) if share else free - http
    return Capacity(max(1, min(server.max_connections, sockets)), http)


def _raise_limit(needed: int) -> int:
    """Raise the soft limit to what is needed, as far as the hard one allows; return the limit that holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max(needed, _USUAL)
    wanted = max(soft, needed, _USUAL)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as exc:  # above the kernel's own limit, or forbidden by a sandbox
            logger.warning("the limit of open files stays at %d: %s", soft, exc)
            return soft
    return wanted


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 32  # a system without /proc
