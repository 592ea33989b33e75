"""The private RabbitMQ: on loopback alone, in its own folder, as long as the relay, apart from any other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pika
import pika.exceptions
import pytest

from imrelay.errors import SetupError
from imrelay.private_node import installation, node, process
from imrelay.private_node.data_folder import running_url
from imrelay.private_node.node import NodeState, PrivateBroker
from tests.support.harness import Node, RelayProcess, eventually, is_alive, plain_environment

PERSISTENT = pika.BasicProperties(delivery_mode=2)


@pytest.fixture(scope="module")
def own(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node for the tests that look at a running one; `node` only says whether there is RabbitMQ at all."""
    broker = Node(tmp_path_factory.mktemp("own") / "data with ünusual name")
    yield broker
    broker.stop()


def connect(url: str) -> pika.BlockingConnection:
    return pika.BlockingConnection(pika.URLParameters(f"{url}?blocked_connection_timeout=10&socket_timeout=10"))


def keep(node: Node, queue: str, body: bytes) -> None:
    """Put a persistent message into a durable queue and return when both are on the disk.

    A confirm says so of the message; the name of a new queue RabbitMQ writes a little later.
    """
    with contextlib.closing(connect(node.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", queue, body, PERSISTENT, mandatory=True)
    node.control.evaluate("mnesia:sync_log()")


def kept(url: str, queue: str) -> bytes | None:
    """Return the first message of the queue, without taking it."""
    with contextlib.closing(connect(url)) as connection:
        body: bytes | None = connection.channel().basic_get(queue)[2]
        return body


def read_pid(data_dir: Path, name: str) -> int:
    return int((data_dir / f"{name}.pid").read_text())


def listens_at(pid: int) -> set[tuple[str, int]]:
    """Return (address as the kernel writes it, port) of each TCP socket that the process listens on."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
                inodes.add(found[1])
    found_at = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found_at.add((address, int(port, 16)))
    return found_at


def test_amqp_distribution_and_epmd_listen_on_loopback_alone(own: Node) -> None:
    """All three ports of the node are there, and none of them is on an address that others can reach."""
    found = listens_at(own.pid) | listens_at(read_pid(own.data_dir, "epmd"))
    chosen = json.loads((own.data_dir / "node.json").read_text())
    assert {port for _, port in found} == {chosen["amqp_port"], chosen["dist_port"], chosen["epmd_port"]}
    assert {address for address, _ in found} <= {"0100007F", "00000000000000000000000001000000"}


def test_what_makes_many_inboxes_cheaper_is_set(own: Node) -> None:
    """The node has taken the settings that store a message once and collect the garbage of silent users."""
    version = own.control.evaluate("iolist_to_binary(rabbit_misc:version())")
    names = "queue_index_embed_msgs_below, background_gc_enabled"
    asked = f"[element(2, application:get_env(rabbit, Name)) || Name <- [{names}]]"
    embedded, collects = own.control.evaluate(asked)
    assert (embedded == 0) == (int(version.partition(".")[0]) >= 4)
    assert collects is True
    assert ".".join(map(str, installation.find_version(own.scripts))) == version


def test_the_folder_and_its_secrets_are_closed_to_others(own: Node) -> None:
    """The data directory has mode 0700, and the files with secrets are closed even without it."""
    assert stat.S_IMODE(own.data_dir.stat().st_mode) == 0o700
    for name in ("node.json", "url", "rabbitmq.conf", "home/.erlang.cookie"):
        assert stat.S_IMODE((own.data_dir / name).stat().st_mode) & 0o077 == 0, name


def test_only_who_reads_the_folder_gets_in(own: Node, node: Node) -> None:
    """The URL works; the user guest, another password and the password of another private node do not."""
    connect(own.url).close()
    password = own.url.split(":")[2].partition("@")[0]
    other = node.url.split(":")[2].partition("@")[0]
    for wrong in (own.url.replace(f"imrelay:{password}", "guest:guest"), own.url.replace(password, other)):
        with pytest.raises(pika.exceptions.AMQPError):
            connect(wrong)


def test_name_and_cookie_are_its_own(own: Node, node: Node) -> None:
    """Two private nodes on one machine have different names and cookies, so neither can join the other."""
    names = {n.environment["RABBITMQ_NODENAME"] for n in (own, node)}
    cookies = {(n.data_dir / "home/.erlang.cookie").read_text() for n in (own, node)}
    assert len(names) == len(cookies) == 2
    assert own.control.evaluate("{node(), nodes()}")[0] == own.environment["RABBITMQ_NODENAME"]


def test_a_second_relay_on_the_same_folder_is_refused(own: Node, tmp_path: Path) -> None:
    """It ends with status 1 and one line that names the folder and the first one's pid, which runs on."""
    arguments = ["broker", f"--broker-data-dir={own.data_dir}", "--broker-url=private"]
    second = RelayProcess(tmp_path / "second", arguments, plain_environment())
    try:
        assert second.process.wait(30) == 1
    finally:
        second.kill()
    assert len(second.log.splitlines()) == 1
    assert str(own.data_dir) in second.log
    assert f"(process {own.relay_pid})" in second.log
    assert running_url(own.data_dir) == own.url
    connect(own.url).close()


def test_other_processes_find_the_running_node(own: Node, tmp_path: Path) -> None:
    """`running_url` is the node's URL while its relay runs, and None for a folder where none does."""
    assert running_url(own.data_dir) == own.url
    assert running_url(tmp_path / "nowhere") is None
    shutil.copy(own.data_dir / "url", tmp_path / "url")
    (tmp_path / "relay.lock").write_text(f"{os.getpid()}\n")
    assert running_url(tmp_path) is None


def test_a_node_that_dies_is_started_again(own: Node) -> None:
    """Killed with -9 it is back under the same URL with what was confirmed; the log has a line for each."""
    keep(own, "died", b"still here")
    os.kill(own.pid, signal.SIGKILL)
    eventually(lambda: own.log.count("ready at") == 2, 60)
    assert read_pid(own.data_dir, "node") != own.pid
    assert kept(own.url, "died") == b"still here"
    assert own.log.count("ended by itself with status -9") == 1
    own.pid = read_pid(own.data_dir, "node")


def test_epmd_that_dies_is_started_again(own: Node) -> None:
    """It is ours again, on its port, and the node registers there anew."""
    epmd = read_pid(own.data_dir, "epmd")
    os.kill(epmd, signal.SIGKILL)
    command = [shutil.which("epmd") or "epmd", "-names"]
    name = own.environment["RABBITMQ_NODENAME"].partition("@")[0]

    def registered() -> bool:
        listed = subprocess.run(command, env=own.environment, capture_output=True, text=True, check=False)
        return f"name {name} at port" in listed.stdout

    eventually(registered, 30)
    assert read_pid(own.data_dir, "epmd") != epmd
    assert is_alive(read_pid(own.data_dir, "epmd"))
    connect(own.url).close()


def test_no_descriptor_left_does_not_end_the_supervision(own: Node) -> None:
    """Killed while their relay can open no file, node and epmd are back when it can again, with what was kept."""
    keep(own, "full", b"still here")
    ready, epmd = own.log.count("ready at"), read_pid(own.data_dir, "epmd")
    _, hard = limits = resource.prlimit(own.relay_pid, resource.RLIMIT_NOFILE)
    resource.prlimit(own.relay_pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        for pid in (own.pid, epmd):
            os.kill(pid, signal.SIGKILL)
        for name in ("node", "epmd"):
            eventually(lambda name=name: re.search(f"its {name} could not be .*Too many open files", own.log), 30)
    finally:
        resource.prlimit(own.relay_pid, resource.RLIMIT_NOFILE, limits)
    eventually(lambda: own.log.count("ready at") == ready + 1, 60)
    assert kept(own.url, "full") == b"still here"
    eventually(lambda: is_alive(read_pid(own.data_dir, "epmd")), 30)
    own.pid = read_pid(own.data_dir, "node")


@pytest.fixture(scope="module")
def inside(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    """A node that this process itself runs, for the tests that look at its state."""
    broker = PrivateBroker(tmp_path_factory.mktemp("inside") / "data")
    broker.start()
    yield broker
    broker.stop()


def kill(broker: PrivateBroker) -> None:
    """Kill the node of a broker with -9."""
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGKILL)


def test_a_log_folder_that_is_away_does_not_end_the_supervision(
    inside: PrivateBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """While its output cannot be written the node waits and each attempt is told; then it is back at its URL."""
    log, url = inside.data_dir / "log", inside.url
    log.rename(inside.data_dir / "log.old")
    log.write_text("in the way")
    kill(inside)
    eventually(lambda: caplog.text.count("its node could not be started") >= 2, 30)
    assert inside.state is NodeState.WAITING
    log.unlink()  # nobody has to make it again
    eventually(lambda: inside.state is NodeState.RUNNING, 60)
    connect(url).close()
    assert "Traceback" not in caplog.text


def test_an_unexpected_exception_does_not_end_the_supervision(
    inside: PrivateBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its traceback, what had been started is stopped, and the next attempt succeeds."""
    begun: list[int | None] = []

    def connect_once_in_vain(parameters: pika.URLParameters) -> pika.BlockingConnection:
        begun.append(inside.pid)
        if len(begun) == 1:
            raise RuntimeError("odd")
        return real(parameters)

    real = pika.BlockingConnection
    monkeypatch.setattr(node.pika, "BlockingConnection", connect_once_in_vain)
    kill(inside)
    eventually(lambda: len(begun) == 2 and inside.state is NodeState.RUNNING, 90)
    assert begun[0] != begun[1]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError]
    connect(inside.url).close()


def test_a_stop_during_a_restart_leaves_nothing(inside: PrivateBroker) -> None:
    """`stop` while the node is being started again returns, the state ends with STOPPED, the folder is free."""
    kill(inside)
    eventually(lambda: inside.state is NodeState.STARTING and inside.pid is not None, 30)
    inside.stop()
    assert inside.state is NodeState.STOPPED
    assert_free(inside.data_dir)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watcher:")]


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(node: Node, tmp_path: Path) -> None:
    """An error of the file system at the first start is no traceback: it names the folder and the setting."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "relay.lock").touch()
    (data_dir / "rabbitmq.conf").mkdir()  # which no file can replace
    with pytest.raises(SetupError, match=r"could not be started.*\[broker\] data_dir") as caught:
        PrivateBroker(data_dir).start()
    assert str(data_dir) in str(caught.value)
    assert_free(data_dir)


def test_ctrl_c_stops_the_relay_first_and_the_node_cleanly(node: Node, tmp_path: Path) -> None:
    """SIGINT to the whole foreground group reaches the relay alone; it stops node and epmd and leaves no trace."""
    data_dir = tmp_path / "data"
    arguments = ["broker", f"--broker-data-dir={data_dir}", "--broker-url=private"]
    relay = RelayProcess(tmp_path / "relay", arguments, plain_environment())
    try:
        relay.wait_for_log("private RabbitMQ ready", 60)
        # the node is ready a moment before its URL is written
        connect(eventually(lambda: running_url(data_dir))).close()
        pids = read_pid(data_dir, "node"), read_pid(data_dir, "epmd")
        assert all(os.getpgid(pid) != os.getpgid(relay.pid) for pid in pids)
        began = time.monotonic()
        assert relay.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 15
    finally:
        if relay.process.poll() is None:
            relay.kill()
    assert not any(is_alive(pid) for pid in pids)
    assert running_url(data_dir) is None
    assert not (data_dir / "url").exists()
    assert "SIGTERM received - shutting down" in (data_dir / "log" / "node.log").read_text()
    assert "ended by itself" not in relay.log


def test_a_relay_killed_leaves_nothing_that_the_next_one_cannot_use(node: Node, tmp_path: Path) -> None:
    """After kill -9 the node goes too; one that does not is ended by the next relay, which has URL and data."""
    first = Node(tmp_path / "data")
    keep(first, "killed", b"confirmed")
    epmd = read_pid(first.data_dir, "epmd")
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot follow the SIGTERM which it gets from Linux
    try:
        first.kill()
        eventually(lambda: not is_alive(epmd), 10)
        assert is_alive(first.pid)
        assert running_url(first.data_dir) is None
        second = Node(first.data_dir, stop_timeout=0.2)
    finally:
        gone = not is_alive(first.pid)
        if not gone:
            os.kill(first.pid, signal.SIGKILL)
    try:
        assert gone
        assert second.url == first.url
        assert kept(second.url, "killed") == b"confirmed"
        assert f"the node of an earlier imrelay on {first.data_dir} (process {first.pid})" in second.log
        second.kill()
        eventually(lambda: not is_alive(second.pid), 30)  # this one could
    finally:
        second.kill()


class Neighbour:
    """A RabbitMQ of another owner: started by its script, with an epmd that Erlang starts, and the user guest."""

    def __init__(self, directory: Path, scripts: Path, *, amqp_port: int, dist_port: int, epmd_port: int) -> None:
        directory.mkdir()
        self.url = f"amqp://guest:guest@127.0.0.1:{amqp_port}/"
        self._port = amqp_port
        (directory / "enabled_plugins").write_text("[].\n")
        (directory / "env.conf").touch()
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "rabbit@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(amqp_port),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(directory / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +stbt u",
        }
        with (directory / "out").open("wb") as out:
            self._process = subprocess.Popen(
                [str(scripts / "rabbitmq-server")],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> pika.BlockingConnection:
        def attempt() -> pika.BlockingConnection | None:
            if self._process.poll() is not None:
                raise RuntimeError("the neighbour ended")
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return connect(self.url)
            return None

        connection: pika.BlockingConnection = eventually(attempt, 60)
        return connection

    def registered(self) -> str:
        """Return what its epmd lists."""
        command = [shutil.which("epmd") or "epmd", "-names"]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True).stdout

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        command = [shutil.which("epmd") or "epmd", "-kill"]
        subprocess.run(command, env=self._environment, stdout=subprocess.DEVNULL, check=False)


def test_a_rabbitmq_of_somebody_else_is_left_alone(node: Node, tmp_path: Path) -> None:
    """One that has taken all our ports keeps them, its connections and data; ours moves to other ports."""
    first = Node(tmp_path / "data")
    keep(first, "moved", b"with us")
    first.stop()
    before = json.loads((first.data_dir / "node.json").read_text())
    ports = {key: before[key] for key in ("amqp_port", "dist_port", "epmd_port")}
    neighbour = Neighbour(tmp_path / "neighbour", first.scripts, **ports)
    try:
        guest = neighbour.wait_until_ready()
        channel = guest.channel()
        channel.queue_declare("theirs", durable=True)
        channel.basic_publish("", "theirs", b"theirs", PERSISTENT)
        registered = neighbour.registered()
        second = Node(first.data_dir)
        try:
            after = json.loads((first.data_dir / "node.json").read_text())
            assert not {after[key] for key in ports} & set(ports.values())
            assert f"port {ports['amqp_port']} is taken by another program" in second.log
            assert kept(second.url, "moved") == b"with us"
            assert neighbour.registered() == registered
        finally:
            second.stop()
        assert neighbour.registered() == registered
        assert channel.basic_get("theirs")[2] == b"theirs"  # on the connection that was open all the time
        guest.close()
    finally:
        neighbour.stop()


def assert_free(data_dir: Path) -> None:
    """Assert that no process of ours is left on a folder and that its lock is free."""
    for name in ("node", "epmd"):
        # a child of what was killed has the lock until the kernel has ended it, too: a moment, and no more
        eventually(lambda name=name: process.is_free_lock(data_dir / f"{name}.pid"), 3)
        pid = process.read_pid(data_dir / f"{name}.pid")  # None of one that was ended before it wrote it
        assert pid is None or not is_alive(pid)
    assert running_url(data_dir) is None
    os.close(process.lock_file(data_dir / "relay.lock"))


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    """A folder that is not ours, as somebody's home set by mistake, is neither closed to others nor written to."""
    (tmp_path / "letter.txt").write_text("dear")
    tmp_path.chmod(0o755)
    with pytest.raises(SetupError, match="data_dir to an empty folder") as caught:
        PrivateBroker(tmp_path).start()
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == ["letter.txt"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """The sentence names the folder and both users."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 1, 1)
    else:
        folder = Path("/usr")
    with pytest.raises(SetupError, match="belongs to") as caught:
        PrivateBroker(folder).start()
    assert str(folder) in str(caught.value)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """The sentence names the folder and the setting."""
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"Not a directory.*\[broker\] data_dir") as caught:
        PrivateBroker(tmp_path / "file" / "data").start()
    assert str(tmp_path / "file" / "data") in str(caught.value)


def test_without_rabbitmq_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No RabbitMQ anywhere: one sentence with the command that installs it, and no folder is made."""
    monkeypatch.setattr(installation, "_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="apt-get install rabbitmq-server"):
        PrivateBroker(tmp_path / "data").start()
    assert not (tmp_path / "data").exists()


def test_debians_wrapper_is_not_taken_for_rabbitmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script on PATH that changes the user or refuses is passed over; the real one on PATH is taken."""
    monkeypatch.setattr(installation, "_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_rabbitmq(tmp_path, "exit 1", name="rabbitmq-script-wrapper")
    (tmp_path / "rabbitmq-server").symlink_to(tmp_path / "rabbitmq-script-wrapper")
    with pytest.raises(SetupError, match="not installed"):
        installation.find_scripts()
    (tmp_path / "rabbitmq-server").unlink()
    fake_rabbitmq(tmp_path, "exit 1")
    assert installation.find_scripts() == tmp_path


def fake_rabbitmq(folder: Path, body: str, *, name: str = "rabbitmq-server") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_node_that_ends_during_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """The sentence has its status, the path of its log and the end of its output; nothing is left running."""
    fake_rabbitmq(tmp_path / "bin", "echo first; echo 'boom: no luck' >&2; exit 3")
    monkeypatch.setattr(installation, "_PLACES", (str(tmp_path / "bin"),))
    broker = PrivateBroker(tmp_path / "data")
    with pytest.raises(SetupError, match="with status 3") as caught:
        broker.start()
    assert "boom: no luck" in str(caught.value)
    assert str(tmp_path / "data" / "log" / "node.log") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert broker.state is NodeState.STOPPED
    assert_free(tmp_path / "data")


def test_a_pid_that_nobody_holds_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Node
) -> None:
    """A pid file of an earlier boot may name anybody's process by now: without its lock nothing is ended."""
    fake_rabbitmq(tmp_path / "bin", "exit 3")
    monkeypatch.setattr(installation, "_PLACES", (str(tmp_path / "bin"),))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "relay.lock").touch()
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        for name in ("node", "epmd"):
            (tmp_path / "data" / f"{name}.pid").write_text(f"{stranger.pid}\n")
        with pytest.raises(SetupError, match="with status 3"):
            PrivateBroker(tmp_path / "data", stop_timeout=0.2).start()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_node_that_is_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """After the time is over the sentence says so; nothing is left running, not even what ignores SIGTERM."""
    fake_rabbitmq(tmp_path / "bin", "trap '' TERM; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1; done")
    monkeypatch.setattr(installation, "_PLACES", (str(tmp_path / "bin"),))
    broker = PrivateBroker(tmp_path / "data", start_timeout=0.5, stop_timeout=0.2)
    with pytest.raises(SetupError, match=r"not ready within 0\.5 seconds"):
        broker.start()
    assert_free(tmp_path / "data")


def test_two_relays_that_start_on_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """While one is still starting the other is refused, and its end does not free the folder of the first."""
    fake_rabbitmq(tmp_path / "bin", "exec sleep 60")
    monkeypatch.setattr(installation, "_PLACES", (str(tmp_path / "bin"),))
    code = (
        "import sys; from pathlib import Path; from imrelay.private_node import installation, node\n"
        "installation._PLACES = (sys.argv[1],); node.PrivateBroker(Path(sys.argv[2])).start()"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "bin"), str(tmp_path / "data")])
    try:
        eventually((tmp_path / "data" / "node.pid").exists)
        for _ in range(2):
            with pytest.raises(SetupError, match=rf"in use by another imrelay \(process {first.pid}\)"):
                PrivateBroker(tmp_path / "data").start()
        node_pid = eventually(lambda: read_pid(tmp_path / "data", "node"))
    finally:
        first.kill()
        first.wait()
    eventually(lambda: not is_alive(node_pid))


def test_a_damaged_node_json_is_not_overwritten(tmp_path: Path, node: Node) -> None:
    """A `node.json` that cannot be read would cost the node its name and with it its data: it is refused."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "node.json").write_text('{"name": "imrelay')
    with pytest.raises(SetupError, match="is damaged"):
        PrivateBroker(data_dir).start()
    assert (data_dir / "node.json").read_text() == '{"name": "imrelay'
    assert_free(data_dir)


def test_ports_that_others_have_are_not_chosen() -> None:
    """A port is taken whether somebody listens on loopback, on every address, or by IPv6."""
    hosts = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, ""), (socket.AF_INET6, "::1")]
    for family, host in hosts:
        with socket.socket(family, socket.SOCK_STREAM) as other:
            try:
                other.bind((host, 0))
            except OSError:  # this machine has no IPv6
                continue
            other.listen()
            assert not installation.is_free_port(other.getsockname()[1])
