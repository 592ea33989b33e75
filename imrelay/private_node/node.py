"""The private node: a RabbitMQ of imrelay's own, on loopback alone, that runs as long as the relay.

    STOPPED ─start─> STARTING ─ready─> RUNNING ─died─> WAITING ─back-off over─> STARTING
    any ─stop─> STOPPING ─> STOPPED

`imrelay.private_node.data_folder` describes its files.
"""

from __future__ import annotations

import enum
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pika
import pika.exceptions

from imrelay.errors import SetupError
from imrelay.private_node.data_folder import NodeFolder
from imrelay.private_node.installation import HOST, accepts, find_epmd, find_scripts, find_version
from imrelay.private_node.process import Child, end_holder, is_free_lock, read_pid, until

__all__ = ["NodeState", "PrivateBroker"]

logger = logging.getLogger(__name__)

#: Seconds before the first restart of a node that died, and the most there may be between two.
_BACKOFF_FIRST, _BACKOFF_MOST = 0.5, 30.0
#: A node that ran for so many seconds before it died is restarted without the earlier back-off.
_BACKOFF_FORGET = 60.0


class NodeState(enum.Enum):
    """The state of the private node; `PrivateBroker.state` is set in one place, which logs."""

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
        self._folder = NodeFolder(data_dir)
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._state = NodeState.STOPPED
        self._scripts = Path()
        self._node: Child | None = None
        self._epmd: Child | None = None
        self._watchers: list[threading.Thread] = []
        self._halt = threading.Event()

    @property
    def data_dir(self) -> Path:
        """The node's folder, absolute."""
        return self._folder.path

    @property
    def state(self) -> NodeState:
        """The state of the node."""
        return self._state

    @property
    def url(self) -> str:
        """The node's AMQP URL with its password: the same until `stop`, and over restarts if its port is free."""
        return self._folder.identity.url

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
        """The environment of the node, where `rabbitmqctl` of `scripts` finds it."""
        return self._folder.environment

    def start(self) -> None:
        """Start the node and return when it accepts AMQP logins; `SetupError` says what is missing or taken.

        A node that an earlier relay has left running on the same folder is stopped first.
        """
        if self._folder.is_ours:
            raise RuntimeError("the private RabbitMQ is started already")
        self._scripts = find_scripts()
        epmd = find_epmd()
        try:
            self._folder.acquire()
            self._end_leftovers()
            self._folder.choose()
            self._folder.write_files(find_version(self._scripts))
            self._halt.clear()
            self._boot_epmd(epmd)
            self._boot_node()
            self._folder.announce()
        except OSError as exc:
            self.stop()
            raise SetupError(
                f"the private RabbitMQ on {self.data_dir} could not be started: {exc}; "
                "see to that, or set [broker] data_dir to another folder"
            ) from exc
        except BaseException:
            self.stop()
            raise
        self._watch("node", lambda: self._node, self._boot_node)
        self._watch("epmd", lambda: self._epmd, lambda: self._boot_epmd(epmd))

    def stop(self) -> None:
        """Stop the node cleanly, then its epmd, and release the folder; may be called at any time, and twice."""
        if not self._folder.is_ours:
            return
        self._halt.set()
        self._set_state(NodeState.STOPPING)
        self._folder.withdraw()
        for child in (self._node, self._epmd):
            self._end(child)
        for watcher in self._watchers:
            watcher.join()
        self._watchers.clear()
        self._node = self._epmd = None
        self._set_state(NodeState.STOPPED)
        self._folder.release()

    def _set_state(self, state: NodeState) -> None:
        if self._halt.is_set() and state not in (NodeState.STOPPING, NodeState.STOPPED):
            return  # `stop` has begun while a watcher was booting
        if state is not self._state:
            logger.debug("private RabbitMQ: %s -> %s", self._state.value, state.value)
            self._state = state

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

    def _boot_epmd(self, epmd: str) -> None:
        port = self._folder.identity.epmd_port
        command = [epmd, "-port", str(port), "-address", HOST]
        self._epmd = child = Child("epmd", command, self.data_dir, self.environment)
        is_over = until(lambda: self._halt.is_set() or not child.alive or accepts(port), 10.0)
        if self._halt.is_set():
            raise SetupError("the private RabbitMQ was stopped during its start")
        if not is_over or not child.alive:
            child.stop(1.0)
            raise SetupError(f"epmd did not start on {HOST}:{port}; its output is in {child.output}")

    def _boot_node(self) -> None:
        self._set_state(NodeState.STARTING)
        began = time.monotonic()
        command = [str(self._scripts / "rabbitmq-server")]
        self._node = child = Child("node", command, self.data_dir, self.environment)
        logs = f"its log is {self.data_dir / 'log' / 'node.log'}, what it printed is in {child.output}"

        def ready() -> bool:
            return self._halt.is_set() or not child.alive or accepts(self._folder.identity.amqp_port)

        if not until(ready, self._start_timeout):
            child.stop(self._stop_timeout)
            raise SetupError(f"RabbitMQ was not ready within {self._start_timeout:g} seconds: {logs}")
        if self._halt.is_set():
            raise SetupError("the private RabbitMQ was stopped during its start")
        if not child.alive:
            raise SetupError(
                f"RabbitMQ ended during its start with status {child.wait()}: {logs}{child.last_output()}"
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
            self._folder.identity.amqp_port,
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
        """Boot a child again whenever it has ended by itself, and after each failure once more, until `stop`."""
        delay = _BACKOFF_FIRST
        while not self._halt.is_set():
            began = time.monotonic()
            child = current()
            status = child.wait() if child is not None else None
            problem = f"ended by itself with status {status}"
            if time.monotonic() - began > _BACKOFF_FORGET:
                delay = _BACKOFF_FIRST
            while problem and not self._halt.is_set():
                if name == "node":
                    self._set_state(NodeState.WAITING)
                logger.error("private RabbitMQ: its %s %s: starting it again in %.1f s", name, problem, delay)
                self._halt.wait(delay)
                delay = min(delay * 2, _BACKOFF_MOST)
                problem = self._boot_again(current, boot)
        self._end(current())  # `stop` may have run before this child was started

    def _boot_again(self, current: Callable[[], Child | None], boot: Callable[[], None]) -> str:
        """Boot a child; say what prevented it, as the rest of a sentence, or nothing. Raises no `Exception`."""
        if self._halt.is_set():
            return ""
        try:
            self._folder.make_folders()
            boot()
            return ""
        except (SetupError, OSError) as exc:  # the latter: no descriptor left, the log's folder away or full
            problem = f"could not be started ({exc})"
        except Exception:
            logger.exception("private RabbitMQ: an unexpected exception during a start")
            problem = "could not be started (a fault of imrelay's, see above)"
        self._end(current())
        return problem

    def _end(self, child: Child | None) -> None:
        """Stop a child if it runs."""
        try:
            if child is not None:
                child.stop(self._stop_timeout)
        except Exception:
            logger.exception("private RabbitMQ: process %d could not be stopped", child.pid if child else 0)
