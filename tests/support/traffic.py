"""Steady numbered traffic over real WebSockets, and the verdict on it, message by message.

    with Traffic([relay], {"ann": ["bob"], "bob": []}) as traffic:
        traffic.flow()            # at least some messages of each sender made it, sent from now on
        ...                       # the damage
        traffic.flow()            # and again
    traffic.verdict()             # nothing lost, in order, answered once

Each user of the mapping is one browser with one socket and sends to the users named, in turn, every `every`
seconds, whatever happens meanwhile; `add` brings more, also further sockets of a user. Leaving the block ends the
sending and waits for what is still to come.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from socket import SHUT_RDWR
from typing import Any, Protocol

import websocket

from tests.support.harness import eventually

__all__ = ["Client", "Summary", "Traffic"]

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 60.0
#: Longest time that a browser waits for a handshake, in seconds.
_HANDSHAKE = 10.0
#: Longest pause of a browser before it connects again, in seconds; the pauses are jittered.
_PAUSE = 0.3


class Host(Protocol):
    """What a browser needs to know of a relay."""

    def socket_url(self, user: str) -> str: ...


@dataclass(eq=False)
class _SentMessage:
    """A message that was sent, and every answer to it."""

    sender: str
    to: str
    number: int
    #: Whether its socket ended before an answer came: it may have arrived or not.
    orphaned: bool = False
    #: It was on its way when it was declared that it may be lost.
    excused: bool = False
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.sender}:{self.number}"

    @property
    def acked(self) -> dict[str, Any] | None:
        return next((answer["ack"] for answer in self.answers if "ack" in answer), None)


@dataclass(frozen=True)
class _Received:
    sender: str
    number: int
    #: Which of the recipient's sockets got it, counted from 1.
    generation: int
    #: Only imrelay.v1 tells it.
    mid: str | None


@dataclass(frozen=True)
class Summary:
    """What became of the messages, as counts; `codes` counts the error frames by their code."""

    sent: int
    acked: int
    orphaned: int
    repeated: int
    reconnects: int
    codes: Counter[str]


class Client:
    """One browser: a socket, a thread that reads it, and one that sends where it has somebody to write to."""

    def __init__(
        self, traffic: Traffic, user: str, to: Sequence[str], *, every: float, hosts: Sequence[Host] | None
    ) -> None:
        self.user = user
        #: The relays that it tries in turn; the list may be changed.
        self.hosts = traffic.hosts if hosts is None else hosts
        #: How many sockets it has had.
        self.generation = 0
        #: The close code of each socket that ended before `close`; None where there was none.
        self.ends: list[int | None] = []
        self.arrivals: list[_Received] = []
        #: The ids of the messages in `arrivals`.
        self.arrived: set[str] = set()
        #: What came that is neither a numbered message nor an answer to one.
        self.strays: list[Any] = []
        #: Cleared while it does not send; see `pause` and `resume`.
        self.may_send = threading.Event()
        self.may_send.set()
        self._traffic = traffic
        self.to = to
        self._every = every
        self._socket: websocket.WebSocket | None = None
        self._silent = threading.Event()
        self._closing = threading.Event()
        self._connected = threading.Event()
        self._seq = 0
        self._threads = [threading.Thread(target=self._run_reader, name=f"reader {user}", daemon=True)]
        if to:
            self._threads.append(threading.Thread(target=self._run_sender, name=f"sender {user}", daemon=True))

    def start(self) -> None:
        """Connect, and begin to send once that is done."""
        for thread in self._threads:
            thread.start()
        eventually(lambda: self._connected.is_set() or not self._threads[0].is_alive(), PATIENCE)
        assert self._connected.is_set(), f"{self.user} could not connect"

    def pause(self) -> None:
        """Send nothing until `resume`."""
        self.may_send.clear()

    def resume(self) -> None:
        """Send again."""
        self.may_send.set()

    def cut(self) -> None:
        """End its TCP connection without a close frame, as a browser that loses its network."""
        if (socket := self._socket) is not None and socket.sock is not None:
            with suppress(OSError):
                socket.sock.shutdown(SHUT_RDWR)

    def quiet(self) -> None:
        """Send nothing more, for good; what is being sent may still be under way."""
        self._silent.set()
        self.may_send.set()

    def wait_quiet(self) -> None:
        """Block until the last message has been sent."""
        for thread in self._threads[1:]:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{thread.name} hangs"

    def close(self) -> None:
        """End it with a close frame, and its threads."""
        self.quiet()
        self._closing.set()
        socket = self._socket
        if socket is not None:
            with suppress(OSError, websocket.WebSocketException):
                socket.send_close()
        self._threads[0].join(5)
        self.cut()
        self._threads[0].join(PATIENCE)
        assert not self._threads[0].is_alive(), f"{self._threads[0].name} hangs"
        self.wait_quiet()

    def _run_reader(self) -> None:
        turns = itertools.count(random.randrange(len(self.hosts)))
        while not self._closing.is_set():
            try:
                self._connect(next(turns))
                self._read()
                code = None
            except _Closed as closed:
                code = closed.code
            except (OSError, websocket.WebSocketException):
                code = None
            self._connected.clear()
            with self._traffic.lock:
                socket, self._socket = self._socket, None
                if socket is not None:
                    socket.shutdown()
                if self._closing.is_set():
                    return
                if socket is not None:
                    self.ends.append(code)
                self._traffic.orphan(self)
            if not self._traffic.reconnect:
                return
            self._closing.wait(random.uniform(0, _PAUSE))

    def _connect(self, turn: int) -> None:
        url = self.hosts[turn % len(self.hosts)].socket_url(self.user)
        socket = websocket.create_connection(url, timeout=_HANDSHAKE, subprotocols=self._traffic.subprotocols)
        socket.settimeout(None)
        with self._traffic.lock:
            self.generation += 1
            self._seq = 0
            self._socket = socket
            if self._closing.is_set():
                raise _Closed(None)
        self._connected.set()

    def _read(self) -> None:
        socket = self._socket
        assert socket is not None
        while True:
            opcode, data = socket.recv_data(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise _Closed(int.from_bytes(data[:2], "big") if data else None)
            if opcode == websocket.ABNF.OPCODE_TEXT:
                self._take(json.loads(data), socket)

    def _take(self, frame: dict[str, Any], socket: websocket.WebSocket) -> None:
        with self._traffic.lock:
            if "seq" in frame:
                self._seq += 1
                if frame["seq"] != self._seq:
                    self.strays.append(frame)
                self._arrived(frame["message"], frame["mid"])
            elif "content" in frame:
                self._arrived(frame, None)
            elif "welcome" not in frame and not self._traffic.answer(frame):
                self.strays.append(frame)
        if "seq" in frame:
            with suppress(OSError, websocket.WebSocketException):
                socket.send(json.dumps({"ack": frame["seq"]}))

    def _arrived(self, message: dict[str, Any], mid: str | None) -> None:
        self.arrivals.append(_Received(message["from"]["id"], message["content"], self.generation, mid))
        self.arrived.add(message["id"])

    def _run_sender(self) -> None:
        numbers = itertools.count(1)
        recipients = itertools.cycle(self.to)
        while not self._silent.wait(self._every):
            self.may_send.wait()
            socket = self._socket
            if self._silent.is_set() or socket is None:
                continue
            sent = self._traffic.note(self, next(recipients), next(numbers))
            message = {"id": sent.id, "from": {"id": self.user}, "to": {"id": sent.to}, "content": sent.number}
            with suppress(OSError, websocket.WebSocketException):
                socket.send(json.dumps(message | {"filling": self._traffic.filling}))
            if self._socket is not socket and not sent.answers:
                sent.orphaned = True


class _Closed(Exception):
    def __init__(self, code: int | None) -> None:
        self.code = code


class Traffic:
    """The browsers of one test; `talk` maps each user to those that it writes to.

    `hosts` are relays; a browser that comes back tries them in turn, and reads the list each time, so that it may
    be changed. `reconnect`: browsers come back when their socket ends, as the page does; else an ended socket is
    a failure. `v1`: they speak imrelay.v1 and acknowledge all they get. `filling` makes messages longer.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        talk: Mapping[str, Sequence[str]],
        *,
        every: float = 0.02,
        reconnect: bool = False,
        v1: bool = False,
        filling: str = "",
    ) -> None:
        self.hosts = hosts
        self.reconnect = reconnect
        self.subprotocols = ["imrelay.v1"] if v1 else None
        self.filling = filling
        #: Guards all that is recorded.
        self.lock = threading.RLock()
        self.sent: dict[str, _SentMessage] = {}
        #: By the user, and further sockets by their names.
        self.clients: dict[str, Client] = {}
        self._sockets: dict[str, list[Client]] = defaultdict(list)
        self._every = every
        self._talk = talk

    def __enter__(self) -> Traffic:
        try:
            for user, to in self._talk.items():
                self.add(user, to, sends=False)
            for client in self.clients.values():  # nobody writes to somebody who is not there yet
                client.resume()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def add(
        self,
        user: str,
        to: Sequence[str] = (),
        *,
        name: str = "",
        hosts: Sequence[Host] | None = None,
        sends: bool = True,
    ) -> Client:
        """Let one more browser come, at any time; to relays of its own if it has `hosts`.

        `sends=False`: it sends nothing before its `resume`.
        `name` is for a further socket of a user, which only listens: a message is there when one of them has it.
        """
        assert not (name and to), "one socket of a user sends"
        client = Client(self, user, to, every=self._every, hosts=hosts)
        self.clients[name or user] = client
        self._sockets[user].append(client)
        if not sends:
            client.pause()
        client.start()
        return client

    def wait(self, look: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
        """Block until `look` is true. Fails after so many seconds, and says `what` it waited for.

        It looks every now and then: to look after every message of many browsers would be most of the load.
        """

        def locked() -> Any:
            with self.lock:
                return look()

        try:
            eventually(locked, seconds)
        except AssertionError:
            raise AssertionError(f"not within {seconds:g} s: {what}; {self.summary()}") from None

    def flow(self, count: int = 10) -> None:
        """Block until so many messages of each sender, sent from now on, are acked and have arrived."""
        before = len(self.sent)

        def enough() -> bool:
            good = Counter(
                sent.sender
                for sent in itertools.islice(self.sent.values(), before, None)
                if sent.acked and not self._is_missing(sent)
            )
            return all(good[client.user] >= count for client in self.clients.values() if client.to)

        self.wait(enough, f"{count} messages of each sender acked and there")

    def wait_for_errors(self, count: int = 1) -> None:
        """Block until so many more error frames have come."""
        before = self.summary().codes.total()
        self.wait(lambda: self.summary().codes.total() >= before + count, f"{count} error frames")

    def finish(self) -> None:
        """Send no more; wait for the answers, and for what was acked."""
        for client in self.clients.values():
            client.quiet()
        for client in self.clients.values():
            client.wait_quiet()
        self.wait(
            lambda: all(sent.answers or sent.orphaned for sent in self.sent.values()),
            "an answer to every message",
        )
        self.wait(lambda: not self._missing(), "every acked message there")

    def close(self) -> None:
        """End all browsers."""
        for client in self.clients.values():
            client.close()

    def verdict(self, *, errors: Collection[str] = (), repeats: bool = False) -> Summary:
        """Assert what the relay promises, and return the counts.

        `errors`: the codes of the error frames that the damage allows. `repeats`: whether it allows that a
        message arrives more than once; in imrelay.v1 each has the `mid` of its ack even then.
        """
        strays = {name: client.strays[:3] for name, client in self.clients.items() if client.strays}
        assert not strays, f"neither a message nor an answer: {strays}"
        if not self.reconnect:
            ended = {name: client.ends for name, client in self.clients.items() if client.ends}
            assert not ended, f"sockets that ended: {ended}"
        for sent in self.sent.values():
            assert len(sent.answers) < 2, f"answered more than once: {sent}"
            assert sent.answers or sent.orphaned, f"never answered: {sent}"
        summary = self.summary()
        assert set(summary.codes) <= set(errors), f"refused: {summary.codes}"
        missing = self._missing()
        assert not missing, f"acked and never there: {len(missing)}, {missing[:3]}"
        for client in self.clients.values():
            self._judge_arrivals(client, repeats)
        return summary

    def summary(self) -> Summary:
        """Count what has happened so far."""
        with self.lock:
            codes = [a["error"]["code"] for sent in self.sent.values() for a in sent.answers if "error" in a]
            return Summary(
                sent=len(self.sent),
                acked=sum(sent.acked is not None for sent in self.sent.values()),
                orphaned=sum(sent.orphaned and not sent.answers for sent in self.sent.values()),
                repeated=sum(len(client.arrivals) - len(client.arrived) for client in self.clients.values()),
                reconnects=sum(max(0, client.generation - 1) for client in self.clients.values()),
                codes=Counter(codes),
            )

    def note(self, client: Client, to: str, number: int) -> _SentMessage:
        """Record a message that is about to be sent; called by its sender."""
        with self.lock:
            sent = _SentMessage(client.user, to, number)
            self.sent[sent.id] = sent
            return sent

    def answer(self, frame: dict[str, Any]) -> bool:
        """Record an answer; tell whether it is one to a message that was sent. Called under the lock."""
        body = frame.get("ack") or frame.get("error") or {}
        sent = self.sent.get(body.get("id", ""))
        if sent is not None:
            sent.answers.append(frame)
        return sent is not None

    def orphan(self, client: Client) -> None:
        """Note that a client's socket has ended; called under the lock."""
        for sent in self.sent.values():
            if client.to and sent.sender == client.user and not sent.answers:
                sent.orphaned = True

    def excuse(self, user: str) -> int:
        """Do not miss what is on its way to a user now; return how many messages that is."""
        with self.lock:
            under_way = [sent for sent in self.sent.values() if sent.to == user and self._is_missing(sent)]
            for sent in under_way:
                sent.excused = True
            return len(under_way)

    def _missing(self) -> list[_SentMessage]:
        return [sent for sent in self.sent.values() if sent.acked and not sent.excused and self._is_missing(sent)]

    def _is_missing(self, sent: _SentMessage) -> bool:
        """Tell whether none of its recipient's sockets has it, where there are any."""
        here = self._sockets.get(sent.to, ())
        return bool(here) and all(sent.id not in client.arrived for client in here)

    def _judge_arrivals(self, client: Client, repeats: bool) -> None:
        seen: dict[str, dict[int, _Received]] = defaultdict(dict)
        for arrival in client.arrivals:
            key = f"{arrival.sender}:{arrival.number}"
            sent = self.sent.get(key)
            assert sent is not None, f"{client.user} got what nobody sent: {arrival}"
            assert sent.to == client.user, f"{client.user} got what was for {sent.to}: {arrival}"
            if arrival.mid is not None and sent.acked:
                assert arrival.mid == sent.acked["mid"], f"another mid than its ack has: {arrival}, {sent}"
            known = seen[arrival.sender]
            if arrival.number in known:
                assert repeats, f"{client.user} got twice: {arrival}, {known[arrival.number]}"
                assert known[arrival.number].mid == arrival.mid, f"a repeat with another mid: {arrival}"
            known[arrival.number] = arrival
        for sender, known in seen.items():
            # one whose socket ended before the answer may come late: its sender went on over another relay
            numbers = [number for number in known if not self.sent[f"{sender}:{number}"].orphaned]
            assert numbers == sorted(numbers), f"{client.user} got out of order from {sender}: {numbers}"
