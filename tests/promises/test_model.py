"""The whole against its model: whatever happens, each browser sees what it must and nothing that it must not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model.fleet import PROFILES, Fleet
from tests.model.machine import SEED, SUITE, Stage, run, staged
from tests.model.outside import Outside
from tests.support.harness import Node, VirtualHost

pytestmark = pytest.mark.slow


@pytest.fixture
def stage(node: Node, broker: VirtualHost, tmp_path: Path) -> Iterator[Stage]:
    """All relays of all profiles, on the module's virtual host."""
    fleet = Fleet(node, broker, tmp_path)
    outside = Outside(broker)
    try:
        fleet.start(tuple(dict.fromkeys(name for profile in PROFILES.values() for name in profile.relays)))
        yield Stage(fleet, outside)
    finally:
        outside.close()
        fleet.close()


def test_every_promise_holds(stage: Stage) -> None:
    """Senders, relays, broker, sockets and time, in steps that hypothesis chooses."""
    failure = run(staged(stage), SUITE)
    told = f"seed {SEED}: {stage.examples} examples, {stage.steps} steps"
    assert not failure, f"{failure}\n{told}"
    print(told)
