"""What all sessions of a process share."""

from __future__ import annotations

from dataclasses import dataclass

from imrelay.broker.pool import ConsumerPool
from imrelay.broker.publisher import Publisher
from imrelay.broker.relay_queue import RelayQueue
from imrelay.messages.message_ids import MessageIds
from imrelay.sessions.registry import Registry
from imrelay.settings.values import WebSocketConfig

__all__ = ["Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """What all sessions of a process share."""

    registry: Registry
    consumers: ConsumerPool
    publisher: Publisher
    mids: MessageIds
    relays: RelayQueue
    limits: WebSocketConfig
    #: Whether bodies are wrapped as the article's Node.js server does (`envelope = node`).
    node_envelope: bool
    #: How many messages a socket remembers, to recognise repeats.
    remembered: int
