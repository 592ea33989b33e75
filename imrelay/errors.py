"""The errors that imrelay raises on purpose; those of the WebSocket layer are in `imrelay.websocket.exceptions`.

ImrelayError
├── ConfigError            a setting is unknown, malformed or out of range
├── SetupError             something of this machine is missing or taken (port, directory, program)
├── AnswerableError        the client is told in an error frame; the session goes on
│   ├── BadJson            bad_json
│   ├── BadMessage         bad_message
│   ├── FromMismatch       from_mismatch
│   ├── RecipientUnknown   recipient_unknown
│   ├── InboxFull          inbox_full            (temporary)
│   ├── TooLarge           too_large
│   └── BrokerUnavailable  broker_unavailable    (temporary; perhaps uncertain)
├── BadId                  a user's id is against the rules
└── ChannelLost            an AMQP channel ended while it was in use
"""

from __future__ import annotations

__all__ = [
    "AnswerableError",
    "BadId",
    "BadJson",
    "BadMessage",
    "BrokerUnavailable",
    "ChannelLost",
    "ConfigError",
    "FromMismatch",
    "ImrelayError",
    "InboxFull",
    "RecipientUnknown",
    "SetupError",
    "TooLarge",
]


class ImrelayError(Exception):
    """The base class; `str()` is one sentence for a person."""


class ConfigError(ImrelayError):
    """A setting cannot be used.

    `where` names the place as the person wrote it (file, section and key; environment variable; option).
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


class SetupError(ImrelayError):
    """Something of this machine is missing, or in use by another program; the sentence says what to do."""


class BadId(ImrelayError):
    """A user's id breaks the rules of PROTOCOL section 1; the sentence says which."""


class AnswerableError(ImrelayError):
    """A message was refused; its sender gets an error frame with `code` and the session goes on.

    `message_id` is the `id` that the client gave the message, where it gave one that could be read.
    """

    #: The protocol's name of the error (PROTOCOL section 4).
    code = "error"
    #: Whether the same message may be accepted later.
    temporary = False
    #: Whether the message may arrive all the same.
    uncertain = False

    def __init__(self, sentence: str, message_id: str | int | None = None) -> None:
        super().__init__(sentence)
        self.message_id = message_id


class BadJson(AnswerableError):
    """The frame is not a JSON object of at most 32 levels."""

    code = "bad_json"


class BadMessage(AnswerableError):
    """`to`, `from` or `id` is missing, of a wrong type or against the rules for ids."""

    code = "bad_message"


class FromMismatch(AnswerableError):
    """`from.id` is not the id of the session's user."""

    code = "from_mismatch"


class RecipientUnknown(AnswerableError):
    """Nobody of that id was ever here, and the configuration says to refuse such messages."""

    code = "recipient_unknown"


class InboxFull(AnswerableError):
    """The broker refused the message (`basic.nack`): the recipient's inbox is at its limit.

    It is not kept; but sockets that stood by have queues of their own, which may have taken it.
    """

    code = "inbox_full"
    temporary = True


class TooLarge(AnswerableError):
    """The message is larger than what the broker takes (`max_message_size` in rabbitmq.conf)."""

    code = "too_large"


class BrokerUnavailable(AnswerableError):
    """The broker did not confirm the message in time; `uncertain` where it may have left this process."""

    code = "broker_unavailable"
    temporary = True

    def __init__(self, sentence: str, message_id: str | int | None = None, *, uncertain: bool = False) -> None:
        super().__init__(sentence, message_id)
        self.uncertain = uncertain


class ChannelLost(ImrelayError):
    """An AMQP channel, or the connection below it, ended before what was asked for was done.

    `reply_code` is the one of `channel.close` or `connection.close` (404, 406, …), 0 where none came.
    """

    def __init__(self, reason: str, reply_code: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply_code = reply_code
