"""The private node: a RabbitMQ of imrelay's own, on loopback alone, that lives and ends with the relay.

    STOPPED ─start─> STARTING ─ready─> RUNNING ─died─> WAITING ─back-off over─> STARTING
    any ─stop─> STOPPING ─> STOPPED

Everything of the node is in one folder, the data directory (mode 0700):

    relay.lock        held by the relay that owns the folder; its pid
    node.json         the node's name, ports and password, chosen at the first start (mode 0600)
    node.pid          held by the node itself, through an inherited descriptor; its pid
    epmd.pid          the same for the node's own Erlang port mapper
    url               the AMQP URL while the node runs, for other processes of the same user (mode 0600)
    rabbitmq.conf …   written anew at each start
    home/ mnesia/ log/

A lock goes with the last process that holds its descriptor, so a pid file that is locked names a process that
is certainly ours, whatever happened to the relay that started it: no pid is trusted for its number alone.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import pwd
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pika
import pika.exceptions

from imrelay.broker.child import Child, end_holder, is_free_lock, lock_file, read_pid, until
from imrelay.broker.installed import HOST, PORTS, accepts, find_epmd, find_scripts, free_ports, is_free_port
from imrelay.errors import SetupError

__all__ = ["NodeState", "PrivateBroker", "find_scripts", "running_url"]

logger = logging.getLogger(__name__)

_USER = "imrelay"
#: Seconds before the first restart of a node that died, and the most there may be between two.
_BACKOFF_FIRST, _BACKOFF_MOST = 0.5, 30.0
#: A node that ran for so many seconds before it died is restarted without the earlier back-off.
_BACKOFF_FORGET = 60.0
#: More schedulers than this cost memory and bring a relay nothing.
_MOST_SCHEDULERS = 4


class NodeState(enum.Enum):
    """Where the private node is in its life; `PrivateBroker.state` is set in one place, which logs."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    STOPPING = "stopping"


class PrivateBroker:
    """Runs one RabbitMQ node on `data_dir` and keeps it running between `start` and `stop`.

    Works the same in a process patched by gevent (the waiting is cooperative then) and in an ordinary one.
    Call `start` from the main thread: Linux ends the node when the thread that started it is gone.
    Times are in seconds.
    """

    def __init__(self, data_dir: Path, *, start_timeout: float = 90.0, stop_timeout: float = 30.0) -> None:
        self.data_dir = data_dir.absolute()
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._state = NodeState.STOPPED
        self._identity: _Identity | None = None
        self._scripts = Path()
        self._lock: int | None = None
        self._node: Child | None = None
        self._epmd: Child | None = None
        self._watchers: list[threading.Thread] = []
        self._halt = threading.Event()

    @property
    def state(self) -> NodeState:
        """Where the node is in its life."""
        return self._state

    @property
    def url(self) -> str:
        """The node's AMQP URL with its password: the same until `stop`, and over restarts if its port is free."""
        return self._chosen.url

    @property
    def pid(self) -> int | None:
        """The process id of the node, None while there is none."""
        node = self._node
        return node.pid if node is not None and node.alive else None

    @property
    def scripts(self) -> Path:
        """The folder of RabbitMQ's command-line tools; they take `environment`."""
        return self._scripts

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the node, where `rabbitmqctl` of `scripts` finds it; next to nothing is inherited."""
        chosen, here = self._chosen, self.data_dir
        schedulers = max(1, min(os.cpu_count() or 1, _MOST_SCHEDULERS))
        loopback = "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false"
        env = {key: os.environ[key] for key in ("PATH", "TZ", "TMPDIR") if key in os.environ}
        return env | {
            "HOME": str(here / "home"),
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(chosen.epmd_port),
            "ERL_CRASH_DUMP": str(here / "log" / "erl_crash.dump"),
            "ERL_CRASH_DUMP_SECONDS": "10",
            # The start script then becomes the node instead of waiting for it as its parent.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_NODENAME": chosen.name,
            "RABBITMQ_DIST_PORT": str(chosen.dist_port),
            "RABBITMQ_MNESIA_BASE": str(here / "mnesia"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(here / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(here / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(here / "rabbitmq-env.conf"),
            # No busy waiting and no pinning to a core: the relay and others share this machine.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"{loopback} +S {schedulers}:{schedulers} +stbt u +sbwt none +sbwtdcpu none +sbwtdio none"
            ),
            "RABBITMQ_CTL_ERL_ARGS": loopback,
        }

    def start(self) -> None:
        """Start the node and return when it takes AMQP logins; `SetupError` says what is missing or taken.

        A node that an earlier relay left behind on the same folder is stopped first.
        """
        if self._lock is not None:
            raise RuntimeError("the private RabbitMQ is started already")
        self._scripts = find_scripts()
        epmd = find_epmd()
        self._open_data_dir()
        try:
            self._end_leftovers()
            self._choose()
            self._write_files()
            self._halt.clear()
            self._boot_epmd(epmd)
            self._boot_node()
            _write_private(self.data_dir / "url", self.url + "\n")
        except BaseException:
            self.stop()
            raise
        self._watch("node", lambda: self._node, self._boot_node)
        self._watch("epmd", lambda: self._epmd, lambda: self._boot_epmd(epmd))

    def stop(self) -> None:
        """Stop the node cleanly, then its epmd, and give the folder free; may be called at any time, and twice."""
        if self._lock is None:
            return
        self._halt.set()
        self._set_state(NodeState.STOPPING)
        with contextlib.suppress(OSError):
            (self.data_dir / "url").unlink()
        for child in (self._node, self._epmd):
            if child is not None:
                child.stop(self._stop_timeout)
        for watcher in self._watchers:
            watcher.join()
        self._watchers.clear()
        self._node = self._epmd = None
        self._set_state(NodeState.STOPPED)
        os.close(self._lock)
        self._lock = None

    @property
    def _chosen(self) -> _Identity:
        if self._identity is None:
            raise RuntimeError("the private RabbitMQ has no URL before its start")
        return self._identity

    def _set_state(self, state: NodeState) -> None:
        if state is not self._state:
            logger.debug("private RabbitMQ: %s -> %s", self._state.value, state.value)
            self._state = state

    def _open_data_dir(self) -> None:
        """Make the folder ours: create or check it, close it to others, take its lock."""
        here = self.data_dir
        try:
            here.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = here.stat().st_uid
            if owner != os.geteuid():
                raise SetupError(
                    f"the broker's folder {here} belongs to {_user_name(owner)} and imrelay runs as "
                    f"{_user_name(os.geteuid())}: run it as {_user_name(owner)}, "
                    "or set [broker] data_dir to another folder"
                )
            names = set(os.listdir(here)) - {"lost+found"}
            if names and not names & {"node.json", "relay.lock"}:
                raise SetupError(
                    f"{here} holds other things than a broker's data: "
                    "set [broker] data_dir to an empty folder or to a new one"
                )
            here.chmod(0o700)
            self._lock = lock_file(here / "relay.lock")
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)
            for name in ("home", "log", "mnesia", "conf.d"):
                (here / name).mkdir(mode=0o700, exist_ok=True)
        except BlockingIOError as exc:
            raise SetupError(
                f"the broker's folder {here} is in use by another imrelay "
                f"(process {read_pid(here / 'relay.lock') or 'unknown'}): "
                "stop that one, or set [broker] data_dir to another folder"
            ) from exc
        except OSError as exc:
            raise SetupError(
                f"the broker's folder {here} cannot be used ({exc.strerror}): "
                "set [broker] data_dir to a folder that this user may write to"
            ) from exc

    def _end_leftovers(self) -> None:
        """Stop what a relay that was killed left running on this folder."""
        for name in ("node", "epmd"):
            path = self.data_dir / f"{name}.pid"
            if is_free_lock(path):
                continue
            what = f"the {name} of an earlier imrelay on {self.data_dir} (process {read_pid(path) or 'unknown'})"
            logger.warning("%s still runs: stopping it", what)
            if not end_holder(path, signal.SIGTERM, self._stop_timeout) and not end_holder(
                path, signal.SIGKILL, 5.0
            ):
                raise SetupError(f"{what} still runs and cannot be stopped: end it by hand")

    def _choose(self) -> None:
        """Take name, password and ports of the earlier starts; choose what is missing or taken meanwhile."""
        path = self.data_dir / "node.json"
        try:
            known = _Identity(**json.loads(path.read_text()))
        except FileNotFoundError:
            known = _Identity(f"imrelay-{secrets.token_hex(4)}@localhost", secrets.token_urlsafe(24), 0, 0, 0)
        except (ValueError, TypeError) as exc:
            raise SetupError(
                f"{path} is damaged: restore it, or remove {self.data_dir} with all its messages"
            ) from exc
        fresh = free_ports()
        try:
            amqp, dist, epmd = (
                port if port and is_free_port(port) else next(fresh)
                for port in (known.amqp_port, known.dist_port, known.epmd_port)
            )
        except (StopIteration, RuntimeError):  # the latter is what a generator makes of the former
            raise SetupError(
                f"the private RabbitMQ needs 3 ports of {HOST} from {PORTS.start} to {PORTS.stop - 1} "
                "and all are taken: stop what takes them"
            ) from None
        self._identity = replace(known, amqp_port=amqp, dist_port=dist, epmd_port=epmd)
        if known.amqp_port and known.amqp_port != self._chosen.amqp_port:
            logger.warning(
                "port %d is taken by another program: the private RabbitMQ moves to %d",
                known.amqp_port,
                self._chosen.amqp_port,
            )
        if self._chosen != known:
            _write_private(path, json.dumps(asdict(self._chosen), indent=1) + "\n")

    def _write_files(self) -> None:
        here, chosen = self.data_dir, self._chosen
        cookie = here / "home" / ".erlang.cookie"
        if not cookie.exists():
            _write_private(cookie, secrets.token_hex(20))
        _write_private(here / "enabled_plugins", "[].\n")
        # Both keep the node from reading what /etc/rabbitmq says about another one.
        _write_private(here / "rabbitmq-env.conf", "")
        _write_private(here / "advanced.config", "[].\n")
        _write_private(
            here / "rabbitmq.conf",
            "".join(
                f"{line}\n"
                for line in (
                    "# written by imrelay at each start",
                    f"listeners.tcp.local = {HOST}:{chosen.amqp_port}",
                    f"default_user = {_USER}",
                    f"default_pass = {chosen.password}",
                    "log.console = false",
                    "log.file = node.log",
                    "log.file.level = info",
                    "log.file.rotation.size = 10485760",
                    "log.file.rotation.count = 3",
                )
            ),
        )

    def _boot_epmd(self, epmd: str) -> None:
        port = self._chosen.epmd_port
        command = [epmd, "-port", str(port), "-address", HOST]
        self._epmd = child = Child("epmd", command, self.data_dir, self.environment)
        if not until(lambda: not child.alive or accepts(port), 10.0) or not child.alive:
            child.stop(1.0)
            raise SetupError(f"epmd did not start on {HOST}:{port}; its output is in {child.output}")

    def _boot_node(self) -> None:
        self._set_state(NodeState.STARTING)
        began = time.monotonic()
        command = [str(self._scripts / "rabbitmq-server")]
        self._node = child = Child("node", command, self.data_dir, self.environment)
        logs = f"its log is {self.data_dir / 'log' / 'node.log'}, what it printed is in {child.output}"

        def ready() -> bool:
            return self._halt.is_set() or not child.alive or accepts(self._chosen.amqp_port)

        if not until(ready, self._start_timeout):
            child.stop(self._stop_timeout)
            raise SetupError(f"RabbitMQ was not ready within {self._start_timeout:g} seconds: {logs}")
        if self._halt.is_set():
            raise SetupError("the private RabbitMQ was stopped during its start")
        if not child.alive:
            raise SetupError(
                f"RabbitMQ ended during its start with status {child.wait()}: {logs}{child.last_words()}"
            )
        try:
            pika.BlockingConnection(pika.URLParameters(f"{self.url}?socket_timeout=10")).close()
        except (pika.exceptions.AMQPError, OSError) as exc:
            child.stop(self._stop_timeout)
            raise SetupError(f"RabbitMQ started but refuses its own user ({exc!r}): {logs}") from exc
        self._set_state(NodeState.RUNNING)
        logger.info(
            "private RabbitMQ ready at %s:%d after %.1f s (process %d, data in %s)",
            HOST,
            self._chosen.amqp_port,
            time.monotonic() - began,
            child.pid,
            self.data_dir,
        )

    def _watch(self, name: str, current: Callable[[], Child | None], boot: Callable[[], None]) -> None:
        """Begin to wait for the end of a child, and to boot it again when it ends by itself."""
        watcher = threading.Thread(target=self._run_watcher, args=(name, current, boot), name=f"watcher:{name}")
        watcher.daemon = True
        self._watchers.append(watcher)
        watcher.start()

    def _run_watcher(self, name: str, current: Callable[[], Child | None], boot: Callable[[], None]) -> None:
        delay = _BACKOFF_FIRST
        while True:
            began = time.monotonic()
            child = current()
            status = child.wait() if child is not None else None
            if self._halt.is_set():
                return
            if time.monotonic() - began > _BACKOFF_FORGET:
                delay = _BACKOFF_FIRST
            logger.error(
                "private RabbitMQ: its %s ended by itself with status %s: starting it again in %.1f s",
                name,
                status,
                delay,
            )
            if name == "node":
                self._set_state(NodeState.WAITING)
            if self._halt.wait(delay):
                return
            delay = min(delay * 2, _BACKOFF_MOST)
            try:
                boot()
            except SetupError as exc:
                if not self._halt.is_set():
                    logger.error("%s", exc)
            if self._halt.is_set():  # stop() may have looked before the new child was there
                if (child := current()) is not None:
                    child.stop(self._stop_timeout)
                return


def running_url(data_dir: Path) -> str | None:
    """Return the URL of the node that a relay of the same user runs on `data_dir`, None where none does."""
    try:
        if is_free_lock(data_dir / "relay.lock"):
            return None
        return (data_dir / "url").read_text().strip() or None
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a node keeps over its restarts."""

    name: str
    password: str
    amqp_port: int
    dist_port: int
    epmd_port: int

    @property
    def url(self) -> str:
        return f"amqp://{_USER}:{self.password}@{HOST}:{self.amqp_port}/"


def _write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".new")
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.replace(partial, path)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
