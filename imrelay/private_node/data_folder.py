"""The private node's folder: its lock, the node's name and ports, and the configuration files.

Everything of the node is in this one folder, the data directory (mode 0700):

    relay.lock        held by the relay that owns the folder; its pid
    node.json         the node's name, ports and password, chosen at the first start (mode 0600)
    node.pid          held by the node itself, through an inherited descriptor; its pid
    epmd.pid          the same for the node's own Erlang port mapper
    url               the AMQP URL while the node runs, for other processes of the same user (mode 0600)
    rabbitmq.conf …   written at each start
    home/ mnesia/ log/

A lock ends with the last process that holds its descriptor. So a locked pid file names a process of ours, whatever
happened to the relay that started it; the pid in an unlocked one may be that of any other process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pwd
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from imrelay.errors import SetupError
from imrelay.private_node.installation import HOST, PORTS, free_ports, is_free_port
from imrelay.private_node.process import is_free_lock, lock_file, read_pid

__all__ = ["NodeFolder", "NodeIdentity", "running_url"]

logger = logging.getLogger(__name__)

_USER = "imrelay"
#: A persistent message is stored once, not in the index of each queue: to 200 online inboxes it costs 151 us of
#: broker CPU each instead of 1,168 (4.0.5). On 3.10 it makes a steady stream of messages dearer.
_FOR_RABBITMQ_4 = ("queue_index_embed_msgs_below = 0",)
#: More schedulers than this cost memory and bring a relay nothing.
_MOST_SCHEDULERS = 4


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """The properties of a node that survive its restarts."""

    name: str
    password: str
    amqp_port: int
    dist_port: int
    epmd_port: int

    @property
    def url(self) -> str:
        """Its AMQP URL with its password."""
        return f"amqp://{_USER}:{self.password}@{HOST}:{self.amqp_port}/"


class NodeFolder:
    """One node's data directory; between `acquire` and `release` no other process uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None
        self._identity: NodeIdentity | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this process holds the folder's lock."""
        return self._lock is not None

    @property
    def identity(self) -> NodeIdentity:
        """Name, password and ports of the node, from `choose` on."""
        if self._identity is None:
            raise RuntimeError("the private RabbitMQ has no URL before its start")
        return self._identity

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the node and of its `rabbitmqctl`; few are inherited."""
        chosen, here = self.identity, self.path
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

    def acquire(self) -> None:
        """Create or check the folder, set mode 0700 and take its lock. Raises `SetupError`."""
        here = self.path
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
            self.make_folders()
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

    def make_folders(self) -> None:
        """Create the folders that the node uses, where they are missing; raises `OSError`."""
        for name in ("home", "log", "mnesia", "conf.d"):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)

    def release(self) -> None:
        """Release the lock of the folder. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def choose(self) -> None:
        """Take name, password and ports of the earlier starts; choose what is missing or taken meanwhile.

        Raises `SetupError` when what was chosen cannot be read, or there is no free port.
        """
        path = self.path / "node.json"
        try:
            known = NodeIdentity(**json.loads(path.read_text()))
        except FileNotFoundError:
            known = NodeIdentity(f"imrelay-{secrets.token_hex(4)}@localhost", secrets.token_urlsafe(24), 0, 0, 0)
        except (ValueError, TypeError) as exc:
            raise SetupError(
                f"{path} is damaged: restore it, or remove {self.path} with all its messages"
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
        if known.amqp_port and known.amqp_port != self.identity.amqp_port:
            logger.warning(
                "port %d is taken by another program: the private RabbitMQ moves to %d",
                known.amqp_port,
                self.identity.amqp_port,
            )
        if self.identity != known:
            _write_private(path, json.dumps(asdict(self.identity), indent=1) + "\n")

    def write_files(self, version: tuple[int, ...]) -> None:
        """Write what a node of this version of RabbitMQ reads at its start."""
        here, chosen = self.path, self.identity
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
                    *_FOR_RABBITMQ_4[: version >= (4,)],
                    # Silent users leave garbage in thousands of processes: 22 of 75 MB for 1,000 (3.10.8).
                    "background_gc_enabled = true",
                    "log.console = false",
                    "log.file = node.log",
                    "log.file.level = info",
                    "log.file.rotation.size = 10485760",
                    "log.file.rotation.count = 3",
                )
            ),
        )

    def announce(self) -> None:
        """Write the node's URL for other processes of this user: see `running_url`."""
        _write_private(self.path / "url", self.identity.url + "\n")

    def withdraw(self) -> None:
        """Remove the URL that `announce` wrote. Idempotent."""
        with contextlib.suppress(OSError):
            (self.path / "url").unlink()


def running_url(data_dir: Path) -> str | None:
    """Return the URL of the node that a relay of the same user runs on `data_dir`, None where none does."""
    try:
        if is_free_lock(data_dir / "relay.lock"):
            return None
        return (data_dir / "url").read_text().strip() or None
    except OSError:
        return None


def _write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 atomically."""
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
