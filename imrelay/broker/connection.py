"""One AMQP connection, and the keeper: the greenlet that opens it, reads it, and opens it again after a loss.

The states of a connection:

    CONNECTING --> OPEN <--> BLOCKED        BLOCKED: the broker has raised an alarm (connection.blocked)
        |  ^         |          |           and reads nothing that is published
        v  |         v          v
      WAITING <-------- lost --------       WAITING: a pause of random length before the next attempt

    any of them --> CLOSED                  for good, by `close`
"""

from __future__ import annotations

import enum
import logging
import random
import ssl
from collections.abc import Callable, Sequence

import gevent
import pika
from gevent.event import Event
from pika.exceptions import ChannelClosed, ConnectionClosed

from imrelay.broker.adapter import Adapter
from imrelay.broker.inbound import Receiver
from imrelay.broker.stream import Addresses
from imrelay.errors import ChannelLost, SetupError
from imrelay.runtime.loops import run_for_ever
from imrelay.settings.reading import hide_password

__all__ = ["Connection", "ConnectionState", "describe"]

logger = logging.getLogger(__name__)

#: Longest pause before an attempt to connect, in seconds; the first is at most `_FIRST_PAUSE`.
_LONGEST_PAUSE = 15.0
_FIRST_PAUSE = 0.25
#: Seconds for a connection that has ended to change its state.
_MOMENT = 0.02
#: Seconds for TCP, TLS and the AMQP handshake together; TCP and TLS have half of it each.
_CONNECT_TIMEOUT = 15.0


class ConnectionState(enum.Enum):
    """Where the life of a broker connection stands."""

    CONNECTING = "connecting"
    OPEN = "open"
    BLOCKED = "blocked"
    WAITING = "waiting"
    CLOSED = "closed"


class Connection:
    """One AMQP connection, which is opened again after each loss until it is closed.

    `urls` is asked before each attempt, so that a broker may move; the URLs it returns are tried in turn. It may
    raise `SetupError` to say why there are none.
    `heartbeat` is in seconds. `tls` is for `amqps` URLs; without it pika verifies the broker's certificate
    against the authorities that the system trusts. `on_state` is called in the keeper or by `close` after each
    change; it may not block.
    """

    def __init__(
        self,
        urls: Callable[[], Sequence[str]],
        *,
        name: str,
        heartbeat: int,
        tls: ssl.SSLContext | None = None,
        on_state: Callable[[ConnectionState], None] | None = None,
    ) -> None:
        self.name = name
        #: Why it is not open: as clients may see it, and for the operator, with the URL but without its password.
        self.reason = self.problem = "not connected yet"
        self._shown = ""
        self.state = ConnectionState.WAITING
        self._urls = urls
        self._heartbeat = heartbeat
        self._tls = tls
        self._on_state = on_state
        self._adapter: Adapter | None = None
        self._addresses = Addresses()
        self._open = Event()
        self._ended = Event()
        self._pause = Event()
        self._number = 0
        self._told: set[str] = set()
        self._tries = 0
        self._is_backing_off = False
        self._keeper: gevent.Greenlet | None = None

    def start(self) -> None:
        """Begin to connect; returns at once."""
        if self._keeper is None and self.state is not ConnectionState.CLOSED:
            self._keeper = run_for_ever(self._run_keeper, name=f"keeper:{self.name}")

    def close(self, timeout: float = 2.0) -> None:
        """Close it for good, with the AMQP handshake if the broker answers within `timeout` seconds."""
        if self.is_closed:
            return
        self._set_state(ConnectionState.CLOSED, "closed")
        self._pause.set()
        adapter = self._adapter
        keeper = self._keeper
        if adapter is None or not adapter.is_open:
            if keeper is not None and keeper is not gevent.getcurrent():
                keeper.kill(block=False)
        else:
            adapter.shut_down()
            if not self._ended.wait(timeout):
                adapter.abort(ChannelLost("the broker did not answer connection.close in time"))
                self._ended.wait(timeout)

    def hurry(self) -> None:
        """End the pause after a failed attempt: the broker was reached by another connection. Returns at once.

        The short random pause after a loss stays: a broker that accepts and closes is not called in a tight loop.
        """
        if self._is_backing_off:
            self._tries = 0
            self._pause.set()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.state is ConnectionState.CLOSED

    @property
    def is_open(self) -> bool:
        """Whether channels can be opened now. The channels of a lost connection end before `state` says so."""
        adapter = self._adapter
        return (
            self.state in (ConnectionState.OPEN, ConnectionState.BLOCKED)
            and adapter is not None
            and adapter.is_open
        )

    @property
    def channel_max(self) -> int:
        """Channels that the broker allows on this connection; what pika asks for while there is none."""
        adapter = self._adapter
        if adapter is None or not adapter.is_open:
            return int(pika.channel.MAX_CHANNELS)
        return int(adapter.params.channel_max)

    @property
    def channels(self) -> int:
        """How many channels are open or on their way to be, or to be closed, whoever owns them."""
        return 0 if self._adapter is None else len(self._adapter.channels)

    def wait_open(self, timeout: float | None = None) -> bool:
        """Block until it is open, or for `timeout` seconds; tell whether it is."""
        if self._open.is_set() and not self.is_open:
            gevent.sleep(_MOMENT)
        else:
            self._open.wait(timeout)
        return self.is_open

    def add_channel(self, channel: Receiver) -> tuple[Adapter, int]:
        """Take a channel; return what it sends over, and its number.

        Numbers are used in rotation, not the lowest free one first: late frames of a channel that has just been
        closed would reach its successor. Raises `ChannelLost` when there is no connection or no free number.
        """
        adapter = self._adapter
        if adapter is None or not self.is_open:
            raise ChannelLost(f"no connection to the broker: {self.problem}")
        limit = adapter.params.channel_max
        for _ in range(limit):
            self._number = self._number % limit + 1
            if self._number not in adapter.channels:
                adapter.channels[self._number] = channel
                return adapter, self._number
        raise ChannelLost(f"all {limit} channels of the connection are in use")

    def _set_state(self, state: ConnectionState, problem: str = "") -> None:
        if self.is_closed or (state is self.state and problem == self.reason):
            return
        self._tell(state, problem)
        self.state = state
        if state is not ConnectionState.CONNECTING:  # whose result is not known yet: the former reason stays
            self.reason = problem
            self.problem = f"{self._shown}: {problem}" if self._shown and problem else problem
        if state in (ConnectionState.OPEN, ConnectionState.BLOCKED):
            self._open.set()
        else:
            self._open.clear()
        if self._on_state is not None:
            try:
                self._on_state(state)
            except Exception:
                logger.exception("broker connection %s: the callback for its state failed", self.name)

    def _tell(self, state: ConnectionState, problem: str) -> None:
        """Log a change of state; further failures for the same reason are logged as debug."""
        told = f"{self._shown}: {problem}" if self._shown else problem
        level = logging.WARNING if problem and state is not ConnectionState.CLOSED else logging.INFO
        if state is ConnectionState.CONNECTING or told in self._told:
            level = logging.DEBUG
        if state is ConnectionState.OPEN:
            self._told.clear()
        elif problem:
            self._told.add(told)
        about = f" ({told})" if problem and state is not ConnectionState.CLOSED else ""
        lasting = (
            "; trying again until it is back"
            if level == logging.WARNING and state is ConnectionState.WAITING
            else ""
        )
        old, new = self.state.value, state.value
        logger.log(level, "broker connection %s: %s -> %s%s%s", self.name, old, new, about, lasting)

    def _run_keeper(self) -> None:
        try:
            while not self.is_closed:
                self._attempt()
        except Exception:
            self._give_up("a fault of the relay's; its log says which")
            raise

    def _attempt(self) -> None:
        """Try each URL until one has opened a connection and that has ended; pause where none has."""
        try:
            urls, problem = self._urls(), "no URL of a broker is known"
        except SetupError as exc:
            urls, problem, self._shown = (), str(exc), ""
        for url in urls:
            self._set_state(ConnectionState.CONNECTING)
            problem = self._connect(url)
            if self.is_closed or not problem:
                return
        self._set_state(ConnectionState.WAITING, problem)
        pause = _pause(self._tries)
        self._tries += 1
        self._is_backing_off = True
        self._pause.wait(pause)
        self._is_backing_off = False
        if not self.is_closed:
            self._pause.clear()  # which `hurry` may have set

    def _give_up(self, problem: str) -> None:
        """Wait for the next attempt after an exception that was not expected, without what it left open."""
        self._adapter = None
        self._set_state(ConnectionState.WAITING, problem)

    def _connect(self, url: str) -> str:
        """Run one connection, from the attempt to its end; return why it was not opened, or an empty string."""
        opened: list[bool] = []
        self._ended.clear()

        def on_open() -> None:
            opened.append(True)
            if self.is_closed:
                adapter.shut_down()
                return
            adapter.add_on_connection_blocked_callback(self._on_blocked)
            adapter.add_on_connection_unblocked_callback(self._on_unblocked)
            self._tries = 0
            self._set_state(ConnectionState.OPEN)

        self._shown = hide_password(url)
        try:
            adapter = self._adapter = Adapter(self._parameters(url), self._addresses, on_open=on_open)
        except Exception as exc:  # pika's parsing of the URL raises various types
            return str(exc)
        try:
            reason = describe(adapter.run())
        finally:
            self._adapter = None
            self._ended.set()
        if not opened:
            return reason
        self._set_state(ConnectionState.WAITING, reason)
        # many relays lost it at the same moment: do not all come back at the same moment
        self._pause.wait(random.uniform(0, _FIRST_PAUSE))
        return ""

    def _parameters(self, url: str) -> pika.URLParameters:
        parameters = pika.URLParameters(url)
        if parameters.ssl_options is not None and self._tls is not None:
            parameters.ssl_options = pika.SSLOptions(self._tls, parameters.host)
        parameters.heartbeat = self._heartbeat
        parameters.socket_timeout = _CONNECT_TIMEOUT / 2
        parameters.stack_timeout = _CONNECT_TIMEOUT
        parameters.client_properties = {"connection_name": f"imrelay {self.name}"}
        return parameters

    def _on_blocked(self, adapter: Adapter, frame: pika.frame.Method) -> None:
        why = getattr(frame.method, "reason", "") or "no reason given"
        self._set_state(ConnectionState.BLOCKED, f"the broker has raised an alarm: {why}")

    def _on_unblocked(self, adapter: Adapter, frame: pika.frame.Method) -> None:
        self._set_state(ConnectionState.OPEN)


def _pause(tries: int) -> float:
    """Return the pause before the next attempt, in seconds: full jitter under a bound that doubles."""
    return random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(tries, 10)))


def describe(reason: BaseException) -> str:
    """Say in a few words why pika has ended a connection or a channel."""
    if isinstance(reason, (ConnectionClosed, ChannelClosed)):
        return f"{reason.reply_code} {reason.reply_text}"
    exceptions = getattr(reason, "exceptions", None)
    if exceptions:
        return describe(exceptions[-1])
    inner = getattr(reason, "exception", None) or (reason.args[0] if reason.args else None)
    if isinstance(inner, BaseException):
        return describe(inner)
    return " ".join(str(reason).split()) or type(reason).__name__
