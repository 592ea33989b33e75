"""Deliberate breakages of the product, one promise each, which the model has to find.

    python -m tests.model.breakages                     all of them, one after the other
    python -m tests.model.breakages ack-before-write    these
    python -m tests.model.breakages --list              what there is

Each is applied to a copy of the package, whose relays then meet the model with the examples and steps of the
suite. A line tells at which example and after how many seconds a promise was found broken; the exit status is 1
where one was not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BREAKAGES", "Breakage", "main"]

#: The folder of the package, and its files that are broken: to be changed here when a file is renamed.
PACKAGE = "imrelay"
_ACKNOWLEDGEMENTS = "broker/acknowledgements.py"
_BATCHES = "broker/batch_writer.py"
_CONSUMER = "broker/consumer.py"
_REGISTRY = "sessions/registry.py"
_INTAKE = "sessions/intake.py"
_LEDGER = "broker/ledger.py"
_LIVE = "broker/live_queue.py"
_MAILBOX = "broker/mailbox.py"
_MID = "messages/message_ids.py"
_PROTOCOL = "sessions/subprotocols.py"
_PUBLISHER = "broker/publisher.py"
_ROUTES = "broker/routes.py"
_SERVER = "server.py"
_SESSION = "sessions/session.py"
_SUBSCRIPTION = "broker/subscription.py"
_TOPOLOGY = "broker/topology.py"
_UNCONFIRMED = "broker/unconfirmed.py"


@dataclass(frozen=True, slots=True)
class Breakage:
    """`old` stands exactly once in a file of the package, and is replaced by `new`."""

    name: str
    file: str
    old: str
    new: str

    def apply(self, package: Path) -> None:
        """Break a copy of the package; raises `ValueError` where the text does not stand there exactly once."""
        path = package / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: this stands {text.count(self.old)} times in {path}:\n{self.old}")
        path.write_text(text.replace(self.old, self.new))


BREAKAGES: tuple[Breakage, ...] = (
    # -- when a message is taken, and what the broker hears of it --
    Breakage(
        "ack-before-write",
        _SESSION,
        "        if frames:\n            websocket.send_messages(frames)\n",
        "        if taken:\n            self._protocol.written(taken)\n            taken = []\n"
        "        if frames:\n            websocket.send_messages(frames)\n",
    ),
    Breakage(
        "ack-skipped",
        _SESSION,
        "        if taken:\n            self._protocol.written(taken)\n",
        "        if len(taken) > 1:\n            self._protocol.written(taken)\n",
    ),
    Breakage(
        "no-ack-consume",
        _TOPOLOGY,
        "spec.Basic.Consume(queue=self.inbox(user), consumer_tag=INBOX_TAG)",
        "spec.Basic.Consume(queue=self.inbox(user), consumer_tag=INBOX_TAG, no_ack=True)",
    ),
    Breakage(
        "v1-taken-by-writing",
        _PROTOCOL,
        '        """Nothing is taken by being written."""\n',
        "        self._consumer.ack_each(deliveries)\n",
    ),
    Breakage(
        "v1-ack-takes-one-more",
        _PROTOCOL,
        "self._unacknowledged[0].seq <= control.seq:",
        "self._unacknowledged[0].seq <= control.seq + 1:",
    ),
    Breakage(
        "ack-at-close",
        _SUBSCRIPTION,
        "        self._ack_copies()\n        self.acks.stop()\n",
        "        if self._channel is not None and self._newest:\n"
        "            self._channel.ack(self._newest, multiple=True, at_once=True)\n"
        "        self.acks.stop()\n",
    ),
    Breakage(
        "ack-multiple",
        _ACKNOWLEDGEMENTS,
        "channel.ack(delivery.tag, multiple=False, at_once=at_once)",
        "channel.ack(delivery.tag, multiple=True, at_once=at_once)",
    ),
    # -- the inbox, live queues, and the change from one to the other --
    Breakage(
        "inbox-not-bound",
        _TOPOLOGY,
        "            spec.Queue.Bind(queue=inbox, exchange=exchange, routing_key=_EVERY_MESSAGE, nowait=True),\n",
        "",
    ),
    Breakage(
        "exchange-not-bound",
        _TOPOLOGY,
        "            spec.Exchange.Bind("
        "destination=exchange, source=self.exchange, routing_key=user, nowait=True),\n",
        "",
    ),
    Breakage(
        "live-queue-skipped",
        _SUBSCRIPTION,
        "        if not self._newest and not (is_counted and after.consumer_count <= 1):\n",
        "        if False:\n",
    ),
    Breakage(
        "live-queue-not-bound",
        _LIVE,
        'channel.call(declare, topology.consume_live(""), bind, ask)[0].queue',
        'channel.call(declare, topology.consume_live(""), ask)[0].queue',
    ),
    Breakage(
        "not-promoted",
        _SUBSCRIPTION,
        "        else:\n            self._start_promotion(channel, live)\n",
        "        else:\n            self._enter(_PROMOTING)\n",
    ),
    Breakage(
        "held-dropped",
        _LIVE,
        "        return self.settle() + self.held\n",
        "        return self.settle()\n",
    ),
    Breakage(
        "overflow-not-sent-back",
        _SUBSCRIPTION,
        "            channel.send_back(overflow.send_back(self._mailbox.budget))\n",
        "            overflow.send_back(self._mailbox.budget)\n",
    ),
    Breakage(
        "not-attached-again",
        _CONSUMER,
        "            self._leave()\n            self._keeper.enqueue(self, lost if lost.reply_code else None)\n",
        "            self._leave()\n",
    ),
    Breakage(
        "consumer-stays",
        _SESSION,
        "                self._consumer.close()\n            finally:\n",
        "                pass\n            finally:\n",
    ),
    Breakage(
        "predecessor-not-ended",
        _REGISTRY,
        '            member.close(RESUMED, "resumed by another connection")\n'
        "            member.wait_detached(timeout)\n",
        "            pass\n",
    ),
    # -- repeats and order --
    Breakage(
        "repeats-shown",
        _PROTOCOL,
        "        if self._is_repeat(_key_of(delivery)):\n            return None\n",
        "",
    ),
    Breakage("repeats-shown-v1", _PROTOCOL, "        if self._is_repeat(key):\n", "        if False:\n"),
    Breakage(
        "foreign-taken-for-repeat",
        _PROTOCOL,
        "    if mid is None or not delivery.is_own or len(mid) != _SIZE_OF_MID:\n",
        "    if mid is None:\n",
    ),
    Breakage("redelivered-not-said", _PROTOCOL, "own, delivery.redelivered)", "own, False)"),
    Breakage(
        "order-of-batch",
        _BATCHES,
        "            frames += (method, content)\n",
        "            frames[0:0] = (method, content)\n",
    ),
    Breakage(
        "order-of-mailbox",
        _MAILBOX,
        "        items, self._items = self._items, []\n",
        "        items, self._items = self._items, []\n"
        "        items = items[::-1] if len(items) == 2 else items\n",
    ),
    Breakage(
        "order-after-route",
        _PUBLISHER,
        "        self._queue.extendleft(reversed(publications))\n",
        "        self._queue.extendleft(publications)\n",
    ),
    Breakage(
        "mids-follow-the-clock", _MID, "        if now > self._time_ms:\n", "        if now != self._time_ms:\n"
    ),
    # -- what senders are told --
    Breakage(
        "acked-unconfirmed",
        _BATCHES,
        "            tag = unconfirmed.add(publication)\n",
        "            tag = unconfirmed.add(publication)\n            self._ledger.answer(publication, None)\n",
    ),
    Breakage(
        "confirm-dropped",
        _UNCONFIRMED,
        "            return [] if publication is None else [publication]\n",
        "            return [] if publication is None or tag % 7 == 0 else [publication]\n",
    ),
    Breakage(
        "multiple-confirm-dropped",
        _UNCONFIRMED,
        "            if each > tag:\n",
        "            if each >= tag:\n",
    ),
    Breakage(
        "nack-is-ack",
        _ROUTES,
        "        if not accepted:\n            self._refuse(publication)\n        elif",
        "        if not accepted:\n            self._ledger.answer(publication, None)\n        elif",
    ),
    Breakage(
        "returned-is-ack",
        _UNCONFIRMED,
        "                publication.returned = True\n",
        "",
    ),
    Breakage(
        "again-after-nack",
        _ROUTES,
        "        if not accepted:\n            self._refuse(publication)\n        elif",
        "        if not accepted:\n"
        "            p = publication\n"
        "            again = Publication(p.user, p.body, p.binary, p.mid, p.time_ms, None, lambda *told: None)\n"
        "            again.deadline = p.deadline\n"
        "            self._ledger._pending[again] = None\n"
        "            gevent.spawn_later(0.3, self._requeue, [again])\n"
        "            self._refuse(publication)\n        elif",
    ),
    Breakage(
        "not-published-again",
        _PUBLISHER,
        "        self._queue.extend(self._ledger)\n",
        "        self._queue.extend(each for each in self._ledger if not each.handed_over)\n",
    ),
    Breakage(
        "no-answers-after-an-error",
        _INTAKE,
        "            self._mailbox.put(ack_frame(publication.message_id, publication.mid, publication.time_ms))\n",
        "            if self._resends is None:\n"
        "                self._mailbox.put(\n"
        "                    ack_frame(publication.message_id, publication.mid, publication.time_ms))\n",
    ),
    Breakage("uncertain-not-said", _LEDGER, "uncertain=publication.handed_over)", "uncertain=False)"),
    Breakage(
        "sent-again-under-a-new-id",
        _INTAKE,
        "            again = self._resends.find(submission.message_id, sent, submission.binary)\n",
        "            again = None\n",
    ),
    Breakage(
        "binary-lost",
        _BATCHES,
        "encode(publication.mid, publication.binary, publication.body)",
        "encode(publication.mid, False, publication.body)",
    ),
    Breakage("closed-with-another-code", _SERVER, '            1012, "the relay', '            1001, "the relay'),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    from tests.model.trial import try_all

    parser = argparse.ArgumentParser(prog="python -m tests.model.breakages")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; by default all")
    parser.add_argument("--seed", type=int, default=None, help="by default that of the suite")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args(arguments)
    known = {breakage.name: breakage for breakage in BREAKAGES}
    if options.list:
        print("\n".join(known))
        return 0
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no such breakage: {', '.join(unknown)}; --list prints what there is")
    return try_all([known[name] for name in options.names or known], options.seed)


if __name__ == "__main__":
    sys.exit(main())
