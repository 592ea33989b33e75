"""One example: does to the real thing what the steps say, and judges what came of it."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

from tests.model.client import ModelClient
from tests.model.driver import Driver, ModelTab
from tests.model.history import Message, Violation
from tests.model.outside import FOREIGN
from tests.model.verdict import complaints
from tests.support.brokers import frozen, kill_node, node_pid, start_application, stop_application
from tests.support.harness import eventually

__all__ = ["World"]

#: Bad input, each answered with an error that carries no id.
_GARBAGE = (
    b"not JSON",
    b'{"content":1}',
    b'{"to":{"id":"a/b"}}',
    b'{"to":{"id":"x"},"from":{"id":"somebody else"}}',
    b'{"ack":1000000}',
    b"[]",
)
#: Bytes of a large message: more than what the kernel takes for a browser that does not read.
_LARGE = 20_000


class World(Driver):
    """The steps of one example, and its end."""

    def connect(self, user: str, relay: str, *, v1: bool, at_once: bool = False, resume: bool = False) -> ModelTab:
        """Open a socket; not `at_once`: when the broker knows that those which ended before are gone."""
        self.calm(relay)
        former = next((tab for tab in self.abandoned if tab.session.user == user and tab.token), None)
        resumed = former if resume and v1 else None
        if resumed is not None:
            self.calm(resumed.session.relay)
        if not at_once:
            self.await_gone(user)
        protocols = ["imrelay.v1"] if v1 else []
        if resumed is not None:
            protocols.append(f"imrelay.resume.{resumed.token}")
        client = ModelClient(self.fleet.get(relay).port, user, protocols)
        tab = ModelTab(self.history.open(user, relay, v1=v1), client)
        self.tell(
            f"{tab.session.name} connects to {relay}" + (", v1" if v1 else "") + (", resumes" if resumed else "")
        )
        if resumed is not None:
            tab.session.resumes = resumed.session
            self._end(resumed, lossy=True)  # by the relay; its browser does not know
            self._ghosts.append(resumed.client)
        self.tabs.append(tab)
        self._read(tab)  # the welcome may have come with the answer to the handshake
        if v1:
            self.wait(lambda: bool(tab.token), f"the welcome of {tab.session.name}")
        return tab

    def send(
        self,
        tab: ModelTab,
        to: str,
        count: int = 1,
        *,
        ask: bool = True,
        binary: bool = False,
        bare: bool = False,
        large: bool = False,
        wait: bool = True,
    ) -> list[Message]:
        """Send messages; `ask` gives them an id, `bare` leaves `from` out, `wait` waits for the answers."""
        messages = []
        for _ in range(count):
            number = len(self.history.messages) + 1
            fields: dict[str, Any] = {"to": {"id": to}, "content": number}
            if not bare:
                fields["from"] = {"id": tab.session.user}
            if ask:
                fields["id"] = number if number % 3 == 0 else f"c{number}"
            if large:
                fields["padding"] = "x" * _LARGE
            payload = body = json.dumps(fields).encode()
            if bare:
                body = b'{"from":{"id":"%s"},' % tab.session.user.encode() + payload[1:]
            messages.append(self.history.send(tab.session, to, body, binary=binary, id=fields.get("id")))
            self._payloads[messages[-1]] = payload
            tab.client.send(payload, binary=binary)
        shape = "".join(
            word for flag, word in ((not ask, ", no id"), (binary, ", binary"), (large, ", large")) if flag
        )
        numbers = f"{messages[0].number}" + (f" to {messages[-1].number}" if count > 1 else "")
        self.tell(f"{tab.session.name} sends {numbers} to {to}{shape}")
        relay = tab.session.relay
        is_answering = relay not in self._troubled or (relay in self.profile.hasty and relay in self._stalled)
        if wait and is_answering and not tab.is_slow:
            self.wait(lambda: not any(m in messages for m in self.history.unanswered()), f"answers to {numbers}")
        self.pump()
        return messages

    def send_again(self, tab: ModelTab) -> None:
        """Send once more, in the same session, what was answered `uncertain`."""
        for message in self.history.messages:
            if message.sender is not tab.session or len(message.answers) != message.attempts:
                continue
            if message.answers[-1].uncertain:
                self.calm(tab.session.relay)
                self.history.send_again(message)
                self.tell(f"{tab.session.name} sends {message.number} again")
                tab.client.send(self._payloads[message], binary=message.binary)
                return

    def send_garbage(self, tab: ModelTab, kind: int) -> None:
        """Send what is no message."""
        tab.session.bad_inputs += 1
        self.tell(f"{tab.session.name} sends {_GARBAGE[kind].decode()}")
        tab.client.send(_GARBAGE[kind])

    def publish(self, to: str, kind: str, count: int) -> None:
        """Publish as another program."""
        self.tell(f"another program publishes {count} to {to}: {kind}")
        pattern, properties = FOREIGN[kind]
        for _ in range(count):
            number = len(self.history.messages) + 1
            body = pattern if isinstance(pattern, bytes) else pattern.encode()
            body = body.replace(b"%d", b"%d" % number)
            given = {key: text.replace("%d", str(number)) if isinstance(text, str) else text
                     for key, text in properties.items()}  # fmt: skip
            binary = given.get("type") == "binary" or kind == "not UTF-8"
            message = self.history.send(None, to, body, binary=binary)
            message.foreign_mid = given.get("message_id")
            had_inbox = self.history.had_inbox(message)
            message.is_returned = not self.outside.publish(to, body, given)
            if had_inbox and not message.is_returned:
                message.confirmed_at = self.history.tick()
        self.pump()

    def audit(self, user: str) -> None:
        """Let another program have a copy of what a user is sent."""
        self.tell(f"an audit queue is bound for {user}")
        self._audits.add(user)
        self.outside.bind_audit(user)

    def delete_inbox(self, user: str) -> bool:
        """Delete an inbox in which nothing is, of a user who is not there; tell whether that was so.

        Not where another program's queue gets the user's messages too: the relay notices it later then. And a
        quorum queue counts with delay.
        """
        is_here = any(tab.session.user == user for tab in [*self.tabs, *self.abandoned])
        if is_here or self.profile.begins_live or user in self._audits:
            return False
        for name in self.profile.relays:  # nothing of theirs is under way
            self.calm(name)
        self.await_gone(user)
        try:
            eventually(lambda: not self.outside.waiting(user), 0.5)
        except AssertionError:
            return False
        self.tell(f"the inbox of {user} is deleted")
        self.outside.delete_inbox(user)
        self.history.lose_inbox(user)
        return True

    def take(self, tab: ModelTab, share: float = 1.0) -> None:
        """Acknowledge so much of what a v1 socket got, and wait until the relay has processed it."""
        self.calm(tab.session.relay)
        tab.is_slow = False
        self.pump()
        seq = max(tab.acked, int(len(tab.session.arrivals) * share))
        self.tell(f"{tab.session.name} acknowledges up to {seq}")
        self._ack(tab, seq)
        self.wait(lambda: tab.pongs == tab.pings or tab.client.is_over, f"a pong for {tab.session.name}")
        self.history.ack(tab.session, seq)

    def _ack(self, tab: ModelTab, seq: int) -> None:
        tab.acked = seq
        tab.pings += 1
        tab.client.send(b'{"ack":%d}' % seq)
        tab.client.send(b'{"ping":%d}' % seq)

    def slow(self, tab: ModelTab) -> None:
        """Read no more, until something needs it."""
        self.tell(f"{tab.session.name} does not read")
        tab.is_slow = True

    def close(self, tab: ModelTab, how: str) -> None:
        """End a socket: `clean`, with a `reset`, or `abandon` it half-open."""
        self.tell(f"{tab.session.name} ends: {how}")
        if how == "reset":
            tab.client.reset()
            self._end(tab, lossy=True)
        elif how == "abandon":
            self.tabs.remove(tab)
            self.abandoned.append(tab)
            tab.session.is_abandoned = True
        else:
            self._close_cleanly([tab])

    def _close_cleanly(self, tabs: list[ModelTab]) -> None:
        for tab in tabs:
            self.wake(tab.session.relay)
            tab.is_slow, tab.is_ending = False, True
            tab.session.closing_at = self.history.tick()
            tab.client.close()
        self.wait(lambda: all(tab not in self.tabs for tab in tabs), "the end of the closing handshake")
        for tab in tabs:
            if tab.client.close_code != 1000:
                raise Violation(f"{tab.session.name} closed with 1000 and was answered {tab.client.close_code}")

    def stall(self, relay: str) -> None:
        """Hold up what the broker says to a relay."""
        self.tell(f"the broker's answers to {relay} are held up")
        if relay not in self._troubled:
            self._stalled.add(relay)
        self._troubled.add(relay)
        self.fleet.get(relay).link.stall()

    def lose_link(self, relay: str) -> None:
        """Reset a relay's connections to the broker; what is held up is lost."""
        self.tell(f"{relay} loses its connections to the broker")
        process = self.fleet.get(relay)
        self.history.disturb(relay)
        self._taken[relay] = process.link.taken
        process.link.reset()
        process.link.heal()
        self._troubled.add(relay)
        self._cut.add(relay)
        self._stalled.discard(relay)

    def await_arrived(self, user: str, count: int) -> None:
        """Wait until the broker has messages in a user's inbox, or for a moment: they may find it full."""
        deadline = time.monotonic() + 0.3
        while self.outside.waiting(user) < count and time.monotonic() < deadline:
            self.pump(0.01)

    def pause(self, relay: str) -> None:
        """Stop a relay's process for a while (SIGSTOP)."""
        self.tell(f"{relay} is paused")
        self._troubled.add(relay)
        self._stalled.discard(relay)
        self.fleet.get(relay).pause()

    def step_clock(self, relay: str, seconds: int) -> None:
        """Set a relay's wall clock."""
        self.wake(relay)
        self.tell(f"the clock of {relay} is off by {seconds} s")
        self.fleet.get(relay).set_clock(seconds)

    def kill(self, relay: str) -> None:
        """Kill a relay with -9 and start another one in its place."""
        self.tell(f"{relay} is killed")
        process = self.fleet.get(relay)
        self.history.disturb(relay)
        process.process.kill()
        process.process.wait()
        self._lose_tabs(relay)
        self._taken.pop(relay, None)
        self._troubled.discard(relay)
        self._stalled.discard(relay)
        self._cut.add(relay)  # the broker may not have noticed yet
        self.fleet.replace(relay)

    def stop(self, relay: str) -> None:
        """Stop a relay (SIGTERM) and start another one in its place."""
        self.calm(relay)
        self.tell(f"{relay} is stopped")
        for tab in [tab for tab in self.abandoned if tab.session.relay == relay]:
            self._drop(tab)
        tabs = [tab for tab in self.tabs if tab.session.relay == relay]
        for tab in tabs:
            tab.is_slow = False
            if tab.session.v1:
                self._ack(tab, tab.acked)
        self.wait(lambda: all(tab.pongs == tab.pings for tab in tabs), f"pongs before {relay} is stopped")
        accepted = [
            m for m in self.history.messages if m.sender in [tab.session for tab in tabs if tab.session.v1]
        ]
        for tab in tabs:
            tab.is_ending = True
        self.history.excused.add(relay)
        process = self.fleet.get(relay)
        process.process.send_signal(signal.SIGTERM)
        self.wait(lambda: process.process.poll() is not None, f"the end of {relay}")
        self._lose_tabs(relay)
        if process.process.returncode:
            raise Violation(f"{relay} ended with status {process.process.returncode}")
        for tab in tabs:
            if tab.client.close_code != 1012:
                raise Violation(f"{relay} stopped and closed {tab.session.name} with {tab.client.close_code}")
        for message in accepted:
            if message.id is not None and len(message.answers) < message.attempts:
                raise Violation(f"{relay} had read {message}, stopped, and did not answer it")
        self.check_log(process)
        self.fleet.replace(relay)

    def break_broker(self, how: str) -> None:
        """Kill the node with -9 (its supervisor starts it again), restart RabbitMQ on it, or freeze it."""
        self.tell(f"the broker: {how}")
        node = self.fleet.node
        for name in self.profile.relays:
            self.wake(name)
            self.fleet.get(name).link.heal()
            self.history.excused.add(name)
            if how != "freeze":
                self.history.disturb(name)
                self._cut.add(name)
            self._troubled.add(name)
        if how == "freeze":
            with frozen(node_pid(node)):
                self.pump(1.0)
            return
        self.outside.close()
        if how == "kill":
            # RabbitMQ confirms a queue before its name is on the disk, and what a quorum queue needs to find
            # itself again: one that was declared a moment before kill -9 answers nobody any more (3.10.8)
            node.control.evaluate("begin mnesia:sync_log(), [dets:sync(T) || T <- dets:all()], ok end")
            former = node_pid(node)
            kill_node(node)
            eventually(lambda: node_pid(node) != former, 60)
        else:
            stop_application(node)
            start_application(node)

    def _lose_tabs(self, relay: str) -> None:
        """Read the sockets of a relay that has ended to their ends."""
        for tab in [tab for tab in self.abandoned if tab.session.relay == relay]:
            self._drop(tab)
        gone = [tab for tab in self.tabs if tab.session.relay == relay]
        for tab in gone:
            tab.is_slow, tab.is_ending = False, True
        self.wait(lambda: all(tab not in self.tabs for tab in gone), f"the end of the sockets of {relay}")

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let all come that is to come, empty each inbox by one more session, and look what is left."""
        for name in self.profile.relays:
            self.calm(name)
        for tab in list(self.abandoned):
            self._drop(tab)
        self.settle()
        self._close_cleanly(list(self.tabs))
        users = [user for user in self.users if self._is_touched(user)]
        heirs = [self.connect(user, self.profile.relays[0], v1=True) for user in users]
        self._is_acking = True
        for heir in heirs:
            self._empty(heir)
        self._is_acking = False
        self.settle()
        self._close_cleanly(heirs)
        for user in users:
            self.await_gone(user)
            self._check_left(user)
        found = complaints(self.history)
        if found:
            raise Violation("; ".join(found))
        for name in self.profile.relays:
            self.check_log(self.fleet.get(name))

    def _is_late(self, user: str) -> bool:
        """Tell whether what is left was published after its sender had gone, and the last session too.

        A message whose sender has gone waits for the broker as long as any other.
        """
        late = [
            repr(message.body)
            for message in self.history.messages
            if message.to == user
            and message.sender is not None
            and not message.sender.is_open
            and len(message.answers) < message.attempts
            and self.history.disturbances[message.sender.relay]
        ]
        left = self.outside.peek(user)
        return bool(left) and all(any(one.startswith(body) for body in late) for one in left)

    def _check_left(self, user: str) -> None:
        """Raise `Violation` where anything but an empty inbox is left of a user's sockets."""

        def look() -> tuple[int, list[str]]:
            return self.outside.waiting(user), self.outside.reached_by(user)

        wanted = (0, [f"inbox.{user}"])
        try:
            eventually(lambda: look() == wanted, self._guard)  # a quorum queue counts with delay
        except AssertionError:
            left, bound = look()
            if bound == wanted[1] and self._is_late(user):
                return
            raise Violation(
                f"of {user} there is left: {left} messages, and bound to its exchange {bound}: "
                f"{', '.join(self.outside.peek(user)) if left else 'empty'}"
            ) from None

    def _empty(self, heir: ModelTab) -> None:
        """Read an inbox to its end, which is where a message to oneself stands; while it is full, try again."""
        while True:
            (mark,) = self.send(heir, heir.session.user, wait=False)
            self.wait(lambda mark=mark: bool(mark.answers), f"the answer to {mark}")
            if mark.ack is not None:
                self.wait(lambda mark=mark: heir.session.has_seen(mark), f"{mark} at {heir.session.name}")
                return
            self.pump(0.05)

    def _is_touched(self, user: str) -> bool:
        history = self.history
        return any(s.user == user for s in history.sessions) or any(m.to == user for m in history.messages)

    def clean_up(self, *, is_broken: bool) -> None:
        """Leave nothing behind for the next example; no relay that has broken a promise, either."""
        for client in [*self._ghosts, *(tab.client for tab in [*self.tabs, *self.abandoned])]:
            client.reset()
        for name in self.profile.relays:
            if is_broken:
                self.fleet.replace(name)
        self.outside.forget([user for user in self.users if self._is_touched(user) or user in self._audits])
