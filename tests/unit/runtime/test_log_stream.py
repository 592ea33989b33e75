"""The log never blocks its writers: it keeps the order, and says how many lines it had to drop."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from imrelay.runtime import log_stream
from imrelay.runtime.log_stream import LogStream

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0


def notice(lines: int) -> str:
    """Return the line that tells of dropped ones."""
    return f"{lines} dropped\n"


def counted(text: str) -> int:
    """Return how many lines a text has, with those that it counts as dropped."""
    notices = re.findall(r"(\d+) dropped\n", text)
    return text.count("\n") - len(notices) + sum(map(int, notices))


class Pipe:
    """A pipe that takes little, and its reader, which begins when the test says so."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read_until(self, text: str) -> str:
        """Read until such a text has come; return all that came."""
        data = b""
        while text.encode() not in data:
            data += os.read(self.reader, 65_536)
        return data.decode()

    def read_lines(self, lines: int, text: str = "") -> str:
        """Read, after `text`, until so many lines have come or were counted as dropped; return all of it."""
        while not text.endswith("\n") or counted(text) < lines:
            text += os.read(self.reader, 65_536).decode()
        return text

    def close(self) -> None:
        """Close what is open."""
        for descriptor in (self.reader, self.writer):
            with suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe that nobody reads."""
    made = Pipe()
    yield made
    made.close()


def test_lines_come_out_as_they_came_in(pipe: Pipe) -> None:
    """Text of every kind is written in its order; what UTF-8 lacks is escaped."""
    stream = LogStream(pipe.writer, notice)
    for number in range(1000):
        stream.write(f"line {number} \u00e4\udc80\n")
    stream.write("no end of line")
    assert stream.finish(PATIENCE)
    text = pipe.read_until("no end of line")
    assert text.splitlines() == [*(f"line {number} \u00e4\\udc80" for number in range(1000)), "no end of line"]


@pytest.mark.parametrize("limits", [{"max_pieces": 100}, {"max_bytes": 10_000}])
def test_what_does_not_fit_is_dropped_and_counted(pipe: Pipe, limits: dict[str, int]) -> None:
    """Nobody reads, many lines are written, none waits: each is written later, or counted where it is missing."""
    stream = LogStream(pipe.writer, notice, **limits)
    for number in range(50_000):  # far more than a pipe and the queue take
        stream.write(f"{number}\n")
    assert_complete(pipe.read_lines(50_000), 50_000)
    stream.write("50000\n")
    assert stream.finish(PATIENCE)
    assert pipe.read_until("50000\n") == "50000\n"


def assert_complete(text: str, lines: int) -> None:
    """Assert that so many numbered lines are there in order, or counted in their place."""
    expected = 0
    for line in text.splitlines():
        if found := re.fullmatch(r"(\d+) dropped", line):
            expected += int(found[1])
        else:
            assert line == str(expected)
            expected += 1
    assert expected == lines


def test_after_a_drop_lines_pass_in_runs(pipe: Pipe) -> None:
    """A reader that is always too slow gets runs of lines between the notices, not a notice for each line."""
    stream = LogStream(pipe.writer, notice, max_pieces=1000)
    text = ""
    for number in range(200_000):
        stream.write(f"{number}\n")
        if not number % 1000:
            text += os.read(pipe.reader, 4096).decode()
    text = pipe.read_lines(200_000, text)
    assert_complete(text, 200_000)
    assert text.count("\n") > 100 * text.count("dropped")


def test_the_end_waits_no_longer_than_it_is_told(pipe: Pipe) -> None:
    """`finish` gives up on a pipe that nobody reads, says so, and takes nothing more."""
    stream = LogStream(pipe.writer, notice)
    stream.write("x" * 200_000)
    assert not stream.finish(0.05)
    stream.write("late\n")
    assert not stream.finish(0.05)
    text = ""
    while len(text) < 200_000:
        text += os.read(pipe.reader, 65_536).decode()
    assert stream.finish(PATIENCE)
    assert text == "x" * 200_000


def test_a_reader_that_has_gone_costs_nothing(pipe: Pipe) -> None:
    """Text for a pipe without a reader is thrown away, and the end does not wait for it."""
    stream = LogStream(pipe.writer, notice)
    os.close(pipe.reader)
    for _ in range(100):
        stream.write("nobody\n" * 1000)
    assert stream.finish(PATIENCE)


def test_what_the_system_refuses_is_counted(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk drops lines, and the count is told when there is room again."""
    is_full = threading.Event()
    refused = threading.Event()
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if descriptor == pipe.writer and is_full.is_set():
            refused.set()
            raise OSError(errno.ENOSPC, "no space left")
        return real(descriptor, data)

    monkeypatch.setattr(log_stream.os, "write", write)
    monkeypatch.setattr(log_stream, "_REFUSED_PAUSE", 0.01)
    stream = LogStream(pipe.writer, notice)
    is_full.set()
    stream.write("0\n1\n")
    assert refused.wait(PATIENCE)
    refused.clear()
    stream.write("2\n")
    assert refused.wait(PATIENCE)
    is_full.clear()
    text = pipe.read_lines(3)
    assert stream.finish(PATIENCE)
    assert_complete(text, 3)


def test_a_descriptor_that_somebody_made_non_blocking_is_waited_for(pipe: Pipe) -> None:
    """Another process that shares standard error may have set O_NONBLOCK: nothing is lost."""
    os.set_blocking(pipe.writer, False)
    stream = LogStream(pipe.writer, notice)
    stream.write("x" * 200_000 + "\n")
    assert len(pipe.read_until("\n")) == 200_001
    assert stream.finish(PATIENCE)
