"""What of pika is private and used all the same: nine names, in one module, each with what breaks without it."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pika
import pika.heartbeat
import pytest
from gevent.event import Event
from pika.connection import Connection as PikaConnection

import imrelay
from imrelay.broker.adapter import Adapter
from imrelay.broker.connection import Connection
from tests.support.fake_broker import BrokerSide, FakeBroker
from tests.support.harness import eventually

#: Seconds after which a wait fails; no measure of speed.
PATIENCE = 20.0

#: What pika calls: its parameters beside self -> what breaks where pika calls it by another name.
CALLED_BY_PIKA = {
    "_adapter_connect_stream": ([], "a connection raises NotImplementedError when it is made"),
    "_adapter_disconnect_stream": ([], "a connection that pika gives up (heartbeat, close) stays open for ever"),
    "_adapter_emit_data": (["data"], "nothing that pika says reaches the broker: no handshake, no heartbeat"),
    "_adapter_call_later": (["delay", "callback"], "no heartbeat is sent or checked: a frozen broker stays"),
    "_adapter_remove_timeout": (["timeout_id"], "heartbeats of a connection that has ended go on and raise"),
    "_adapter_add_callback_threadsafe": (["callback"], "the class is abstract and no connection can be made"),
}
#: What pika is told by -> what breaks without it.
TELLS_PIKA = {
    "_on_stream_connected": ([], "pika does not begin the AMQP handshake, and the opening times out"),
    "_on_data_available": (["data_in"], "pika sees no frame of channel 0: no handshake, no alarm, no close"),
    "_on_stream_terminated": (["error"], "nobody is told of a loss, and the keeper does not connect again"),
}
NAMES = CALLED_BY_PIKA.keys() | TELLS_PIKA.keys()

ROOT = Path(imrelay.__file__).parent
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")
}
ADAPTER = "broker/adapter.py"


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """End a test that hangs."""
    with gevent.Timeout(3 * PATIENCE):
        yield


def is_private(name: str) -> bool:
    """Tell whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def names_of(kind: type, *arguments: Any) -> set[str]:
    """Return all attributes of pika's class and of its objects."""
    return set(dir(kind)) | set(vars(kind(*arguments)))


class _Bare(PikaConnection):  # type: ignore[misc]
    """pika's connection with nothing of ours but that it can be made."""

    locals().update({name: lambda self, *arguments: None for name in CALLED_BY_PIKA})


# -- which names they are --------------------------------------------------------------------------------------


def test_the_adapter_defines_what_pika_calls_and_shadows_nothing_else() -> None:
    """Of all that our class and its objects have, pika has the six methods alone."""
    from imrelay.broker.stream import Addresses

    ours = set(vars(Adapter)) | (
        set(vars(Adapter(pika.ConnectionParameters(), Addresses(), on_open=lambda: None))) - set(vars(_Bare()))
    )
    shared = {name for name in ours & names_of(_Bare) if not name.startswith("__")}
    assert shared - {"_abc_impl"} == set(CALLED_BY_PIKA)


def test_the_adapter_calls_three_private_methods_of_pikas_and_no_other() -> None:
    """Of all attributes that its source names, pika has the nine, and public ones."""
    used = {node.attr for node in ast.walk(SOURCES[ADAPTER]) if isinstance(node, ast.Attribute)}
    theirs = names_of(_Bare)
    assert {name for name in used & theirs if is_private(name)} - set(CALLED_BY_PIKA) == set(TELLS_PIKA)


def test_no_other_module_has_to_do_with_anything_private_of_pikas() -> None:
    """Only the adapter inherits from pika; nobody reaches into another object, or imports a private name."""
    for module, source in SOURCES.items():
        if not module.startswith(("broker/", "private_node/")):
            continue  # may not import pika at all: see test_layers
        imported = {"pika"}
        for node in ast.walk(source):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                parts = [*(getattr(node, "module", None) or "").split("."), *(alias.name for alias in node.names)]
                if any(part.split(".")[0] == "pika" for part in parts):
                    assert not [name for part in parts for name in part.split(".") if is_private(name)], module
                    imported |= {alias.asname or alias.name for alias in node.names}
        for node in ast.walk(source):
            if isinstance(node, ast.ClassDef) and module != ADAPTER:
                bases = {ast.unparse(base).split(".")[0] for base in node.bases}
                assert not bases & imported, f"{module}: {node.name}"
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                assert ast.unparse(node.value) in ("self", "cls", "super()"), f"{module}: {ast.unparse(node)}"


def test_pikas_own_adapters_are_not_used() -> None:
    """Neither its selector loop nor its connection workflow, whose private parts were needed once."""
    for module, source in SOURCES.items():
        assert "pika.adapters" not in ast.unparse(source), module


# -- what breaks without them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_pika_has_it_with_these_parameters(name: str) -> None:
    """Another signature would be called wrongly, or called by us wrongly."""
    parameters, breaks = {**CALLED_BY_PIKA, **TELLS_PIKA}[name]
    assert hasattr(PikaConnection, name), f"{name} is not there any more: {breaks}"
    assert list(inspect.signature(getattr(PikaConnection, name)).parameters)[1:] == parameters, breaks


def test_pika_asks_for_these_six_and_no_others() -> None:
    """A seventh that an adapter has to have would be missing when it is called."""
    assert PikaConnection.__abstractmethods__ == set(CALLED_BY_PIKA)


class _Recording(Adapter):
    """An adapter that remembers which of the names were used."""

    used: set[str]


def _record(name: str) -> Any:
    def call(self: Any, *arguments: Any) -> Any:
        _Recording.used.add(name)
        return getattr(Adapter, name)(self, *arguments)

    return call


for _name in NAMES:
    setattr(_Recording, _name, _record(_name))


def test_each_is_used_in_the_life_of_a_connection(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening, heartbeats, closing: eight of the nine; pika itself leaves the ninth to applications."""
    _Recording.used = set()
    monkeypatch.setattr("imrelay.broker.connection.Adapter", _Recording)
    connection = Connection(lambda: [broker_url], name="test", heartbeat=60)
    connection.start()
    assert connection.wait_open(PATIENCE)
    connection.close()
    eventually(lambda: "_on_stream_terminated" in _Recording.used, PATIENCE, sleep=gevent.sleep)
    assert _Recording.used == NAMES - {"_adapter_add_callback_threadsafe"}


@pytest.fixture
def adapter() -> Iterator[Adapter]:
    """An adapter that is open, to a broker that says nothing more."""

    def wait(peer: BrokerSide) -> None:
        peer.open()
        peer.read_frame()

    with FakeBroker(wait) as broker:
        connection = Connection(lambda: [broker.url], name="test", heartbeat=60)
        connection.start()
        assert connection.wait_open(PATIENCE)
        made = connection._adapter
        assert made is not None
        yield made
        connection.close(0.05)


def test_a_callback_from_another_thread_runs_in_the_event_loop(adapter: Adapter) -> None:
    """It is safe to be called by a native thread, while the event loop has nothing else to do."""
    ran: list[Any] = []
    done = Event()

    def callback() -> None:
        ran.append((threading.get_ident(), gevent.getcurrent()))
        done.set()

    thread = threading.Thread(target=adapter._adapter_add_callback_threadsafe, args=(callback,))
    thread.start()
    assert done.wait(PATIENCE)
    thread.join(PATIENCE)
    assert ran == [(threading.get_ident(), gevent.get_hub())]


def test_a_timer_fires_once_unless_it_is_removed(adapter: Adapter) -> None:
    """What was removed is not called, also when it is removed twice or after it has fired."""
    fired: list[str] = []
    done = Event()
    removed = adapter._adapter_call_later(0.0, lambda: fired.append("removed"))
    first = adapter._adapter_call_later(0.0, lambda: fired.append("first"))
    adapter._adapter_remove_timeout(removed)
    adapter._adapter_call_later(0.02, done.set)
    assert done.wait(PATIENCE)
    assert fired == ["first"]
    adapter._adapter_remove_timeout(removed)
    adapter._adapter_remove_timeout(first)


def test_a_callback_that_fails_ends_its_connection(adapter: Adapter, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in one of pika's timers is logged; the connection ends instead of going on without it."""

    def fail() -> None:
        raise RuntimeError("odd")

    adapter._adapter_call_later(0.0, fail)
    eventually(lambda: adapter.is_closed, PATIENCE, sleep=gevent.sleep)
    assert "a callback of pika's failed" in caplog.text


# -- which pika that holds for ---------------------------------------------------------------------------------


def test_pika_is_bounded_to_what_is_tested() -> None:
    """The next minor version may rename what is private; it is not installed before it has been tested."""
    settings = configparser.ConfigParser()
    settings.read(ROOT.parent / "setup.cfg")
    (wanted,) = [line for line in settings["options"]["install_requires"].splitlines() if line.startswith("pika")]
    assert wanted == "pika>=1.4.4,<1.5"
    version = tuple(map(int, importlib.metadata.version("pika").split(".")[:3]))
    assert (1, 4, 4) <= version < (1, 5)
