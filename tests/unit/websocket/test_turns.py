"""Turns: a socket with more to do than one turn allows waits until the event loop has polled all sockets."""

from __future__ import annotations

import os

import gevent

from imrelay.websocket.fairness import turns_of


def test_the_event_loop_polls_between_two_rounds():
    """Callbacks that go on for ever keep no ready descriptor waiting for more than two of them."""
    hub = gevent.get_hub()
    turns = turns_of(hub)
    calls = []
    done = False

    def go_on():
        calls.append(None)
        begun = hub.loop.now()
        while hub.loop.now() < begun + 0.003:  # longer than a round
            hub.loop.update_now()
        if not done and len(calls) < 200:
            turns.add(go_on)

    read, write = os.pipe()
    watcher = hub.loop.io(read, 1)
    seen = []
    try:
        watcher.start(lambda: (seen.append(len(calls)), watcher.stop()))
        os.write(write, b"x")
        for _ in range(10):
            turns.add(go_on)
        while not seen:
            gevent.sleep(0.001)
    finally:
        done = True
        watcher.stop()
        watcher.close()
        os.close(read)
        os.close(write)
    assert seen[0] <= 2


def test_turns_are_taken_in_order():
    """What is added is called once, in the order of adding, in the event loop."""
    turns = turns_of(gevent.get_hub())
    seen = []
    for number in range(5):
        turns.add(lambda number=number: seen.append((number, gevent.getcurrent() is gevent.get_hub())))
    while len(seen) < 5:
        gevent.sleep(0)
    gevent.sleep(0.001)
    assert seen == [(number, True) for number in range(5)]


def test_there_is_one_for_each_hub():
    """All sockets of a hub share the turns."""
    assert turns_of(gevent.get_hub()) is turns_of(gevent.get_hub())
