"""The messages that were handed over on one channel and are not confirmed yet, by delivery tag."""

from __future__ import annotations

from imrelay.broker.publication import Publication

__all__ = ["Unconfirmed"]


class Unconfirmed:
    """The unconfirmed messages of one channel, in the order of their tags, including those answered meanwhile."""

    __slots__ = ("_last_tag", "by_tag")

    def __init__(self) -> None:
        self.by_tag: dict[int, Publication] = {}
        self._last_tag = 0

    def __len__(self) -> int:
        return len(self.by_tag)

    def clear(self) -> list[Publication]:
        """Begin with another channel; return the messages that the last one has left without an answer."""
        left = list(self.by_tag.values())
        for publication in left:
            publication.is_doubtful = publication.is_doubtful or not publication.returned
        self.by_tag = {}
        self._last_tag = 0
        return left

    def add(self, publication: Publication) -> int:
        """Note a message that is being handed over, and return its delivery tag."""
        self._last_tag = tag = self._last_tag + 1
        self.by_tag[tag] = publication
        publication.handed_over = True
        return tag

    def take(self, tag: int, multiple: bool) -> list[Publication]:
        """Remove and return the messages of one confirm; takes time in proportion to their number."""
        by_tag = self.by_tag
        if not multiple:
            publication = by_tag.pop(tag, None)
            return [] if publication is None else [publication]
        tags = []
        for each in by_tag:
            if each > tag:
                break
            tags.append(each)
        return [by_tag.pop(each) for each in tags]

    def take_back(self, mid: str) -> Publication | None:
        """Mark the message that came back (`basic.return`) and return it; its confirm is still to come.

        There may be two of one id, the first one answered already: they come back in their order.
        """
        for publication in self.by_tag.values():
            if publication.mid == mid and not publication.returned:
                publication.returned = True
                publication.handed_over = publication.is_doubtful
                publication.returns += 1
                return publication
        return None

    def count_answered(self) -> int:
        """Return how many of them were answered: the broker has not confirmed them in time, or never will."""
        return sum(publication.done for publication in self.by_tag.values())

    def count(self, user: str) -> int:
        """Return how many messages to a user are not confirmed."""
        return sum(publication.user == user for publication in self.by_tag.values())
