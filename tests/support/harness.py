"""What the tests share: private nodes, virtual hosts, and relays as processes of their own."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = [
    "BrokerControl",
    "Node",
    "RelayProcess",
    "VirtualHost",
    "eventually",
    "is_alive",
    "plain_environment",
    "restore_signals_for_children",
]

#: Seconds between two looks at something that gives no event: a broker's lists, a log file.
TICK = 0.02

_NODE = """\
import json, logging, sys
from pathlib import Path
from imrelay.private_node.node import PrivateBroker
from imrelay.errors import SetupError
logging.basicConfig(level="INFO", stream=sys.stderr)
logging.getLogger("pika").setLevel("CRITICAL")
broker = PrivateBroker(Path(sys.argv[1]), stop_timeout=float(sys.argv[2]))
try:
    broker.start()
except SetupError as exc:
    print(json.dumps({"error": str(exc)}), flush=True)
    sys.exit(1)
print(json.dumps({"url": broker.url, "pid": broker.pid, "scripts": str(broker.scripts),
                  "environment": broker.environment}), flush=True)
sys.stdin.read()
broker.stop()
"""

#: Evaluates each line of its input on the node and answers with one line of JSON.
_CONTROL = r"""
Node = list_to_atom(os:getenv("RABBITMQ_NODENAME")),
Escape = fun(B) -> [case C of $" -> "\\\""; $\\ -> "\\\\"; _ when C < 32 -> io_lib:format("\\u~4.16.0b", [C]);
                    _ -> C end || <<C>> <= B] end,
Json = fun Json(null) -> "null"; Json(undefined) -> "null"; Json('') -> "null";
    Json(true) -> "true"; Json(false) -> "false";
    Json(T) when is_integer(T) -> integer_to_list(T);
    Json(T) when is_float(T) -> io_lib:format("~p", [T]);
    Json(T) when is_atom(T) -> Json(atom_to_binary(T));
    Json(T) when is_pid(T) -> Json(list_to_binary(pid_to_list(T)));
    Json(T) when is_binary(T) -> [$", Escape(T), $"];
    Json({resource, _, _, Name}) -> Json(Name);
    Json(T) when is_map(T) -> Json(maps:to_list(T));
    Json([]) -> "[]";
    Json([{K, _} | _] = L) when is_atom(K); is_binary(K) ->
        ["{", lists:join(",", [[Json(N), ":", Json(V)] || {N, V} <- L]), "}"];
    Json([{K, T, _} | _] = L) when is_binary(K), is_atom(T) ->
        ["{", lists:join(",", [[Json(N), ":", Json(V)] || {N, _, V} <- L]), "}"];
    Json(T) when is_list(T) -> ["[", lists:join(",", [Json(E) || E <- T]), "]"];
    Json(T) when is_tuple(T) -> Json(tuple_to_list(T));
    Json(T) -> Json(iolist_to_binary(io_lib:format("~p", [T]))) end,
Answer = fun(Line) ->
    try {ok, Tokens, _} = erl_scan:string(Line),
        {ok, Parsed} = erl_parse:parse_exprs(Tokens),
        case rpc:call(Node, erl_eval, exprs, [Parsed, []], 30000) of
            {value, Value, _} -> ["{\"value\":", Json(Value), "}"];
            Failed -> ["{\"error\":", Json(iolist_to_binary(io_lib:format("~0p", [Failed]))), "}"]
        end
    catch _:Reason -> ["{\"error\":", Json(iolist_to_binary(io_lib:format("~0p", [Reason]))), "}"] end end,
Loop = fun Loop() -> case io:get_line("") of
    eof -> halt(0);
    Line -> io:put_chars([Answer(Line), "\n"]), Loop() end end,
ok = io:setopts([{encoding, latin1}]),
Loop().
"""


def eventually(
    look: Callable[[], Any], seconds: float = 10.0, *, sleep: Callable[[float], object] = time.sleep
) -> Any:
    """Look until the answer is true, and return it; fail after so many seconds with the last answer.

    For what gives no event to wait for. An `AssertionError` of `look` counts as "not yet". Where greenlets of this
    process have to get on with it, `sleep` is gevent's.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := look():
                return answer
        except AssertionError as exc:
            answer = exc
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s; the last answer was {answer!r}")
        sleep(TICK)


def restore_signals_for_children() -> None:
    """Have the processes that this one starts begin with SIGINT and SIGHUP as they are by default.

    In the background of a non-interactive shell a process ignores SIGINT, under `nohup` SIGHUP, and so do all that
    it starts: a program that respects this, or a shell that cannot trap it, would not see the test's signal. This
    process goes on as it was: a handler that does nothing is, unlike "ignored", not inherited by `exec`.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def plain_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without settings of imrelay, RabbitMQ and Erlang, and with `more`."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("IMRELAY_", "RABBITMQ_", "ERL_"))
    }
    return inherited | more


def is_alive(pid: int) -> bool:
    """Tell whether a process is there that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Node:
    """A private RabbitMQ node, run by a helper process, so that nothing of this process can disturb it."""

    def __init__(self, data_dir: Path, *, stop_timeout: float = 30.0) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _NODE, str(data_dir), str(stop_timeout)],
                env=plain_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or '{"error": "the helper process ended"}')
        if "error" in answer:
            self._process.wait()
            raise RuntimeError(f"{answer['error']} (log: {self.log_path})")
        #: The URL of its default virtual host.
        self.url: str = answer["url"]
        #: Of RabbitMQ at the start; another one after it died and was restarted.
        self.pid: int = answer["pid"]
        self.relay_pid = self._process.pid
        self.scripts = Path(answer["scripts"])
        self.environment: dict[str, str] = answer["environment"]
        self._control: BrokerControl | None = None

    @property
    def control(self) -> BrokerControl:
        """The administrator's view of the node."""
        if self._control is None:
            self._control = BrokerControl(self.scripts, self.environment)
        return self._control

    @property
    def log(self) -> str:
        """All that its helper process has logged so far."""
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        """Stop it cleanly; may be called twice."""
        if self._control is not None:
            self._control.close()
            self._control = None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._close_pipes()

    def kill(self) -> None:
        """Kill the helper process with -9, as a relay that ran this node might be."""
        if self._control is not None:
            self._control.close()
            self._control = None
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()


class BrokerControl:
    """Asks and changes a node from the side: `rabbitmqctl` (2 s a call), and a session of 1 ms a call."""

    def __init__(self, scripts: Path, environment: Mapping[str, str]) -> None:
        self._scripts = scripts
        self._environment = dict(environment)
        self._session: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str) -> str:
        """Run `rabbitmqctl` and return what it printed; raises `CalledProcessError` when it fails."""
        return subprocess.run(
            [str(self._scripts / "rabbitmqctl"), "--quiet", *arguments],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    def evaluate(self, expression: str) -> Any:
        """Evaluate Erlang expressions on the node and return the value as Python data.

        Atoms and names come as text, property lists and AMQP tables as dictionaries, `undefined` as None.
        """
        session = self._open_session()
        assert session.stdin is not None
        assert session.stdout is not None
        line = " ".join(expression.split()).rstrip(".") + ".\n"
        session.stdin.write(line.encode())
        session.stdin.flush()
        answer = json.loads(session.stdout.readline() or b'{"error": "the session ended"}')
        if "error" in answer:
            raise RuntimeError(f"{answer['error']} from {expression}")
        return answer["value"]

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session.communicate()
            self._session = None

    def _open_session(self) -> subprocess.Popen[bytes]:
        if self._session is None:
            name = f"test-{secrets.token_hex(4)}@localhost"
            command = ["erl", "-noshell", "-hidden", "-sname", name, "-start_epmd", "false"]
            command += ["-kernel", "inet_dist_use_interface", "{127,0,0,1}", "-eval", _CONTROL]
            self._session = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return self._session


class VirtualHost:
    """A virtual host of a test node; all lists are of it alone."""

    def __init__(self, node: Node, name: str) -> None:
        self.node = node
        self.name = name
        #: The AMQP URL of this virtual host.
        self.url = node.url + quote(name, safe="")
        self._vhost = f"<<{json.dumps(name)}>>"

    def create(self) -> None:
        """Create it and let the node's user do everything in it."""
        self.evaluate(
            f'rabbit_vhost:add({self._vhost}, <<"tests">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"imrelay">>, {self._vhost}, <<".*">>, <<".*">>, <<".*">>, <<"tests">>), ok'
        )

    def delete(self) -> None:
        """Delete it with all that is in it; its connections are closed by the broker."""
        self.evaluate(f'rabbit_vhost:delete({self._vhost}, <<"tests">>), ok')

    def evaluate(self, expression: str) -> Any:
        """Evaluate Erlang on the node, as `BrokerControl.evaluate`."""
        return self.node.control.evaluate(expression)

    def queues(self) -> dict[str, dict[str, Any]]:
        """Return name -> facts of each queue: arguments, messages (ready, unacknowledged), consumers, flags."""
        facts = "name, durable, auto_delete, exclusive, arguments, messages, messages_ready, "
        facts += "messages_unacknowledged, consumers, state"
        rows = self.evaluate(f"rabbit_amqqueue:info_all({self._vhost}, [{facts}])")
        return {row["name"]: row | {"arguments": row["arguments"] or {}} for row in rows if row}

    def user_queues(self) -> dict[str, dict[str, Any]]:
        """Return the same of inboxes and live queues: all but the queues of relays."""
        return {name: row for name, row in self.queues().items() if not name.startswith("relay.")}

    def exchanges(self) -> dict[str, dict[str, Any]]:
        """Return name -> facts of each exchange but the built-in ones."""
        rows = self.evaluate(
            f"rabbit_exchange:info_all({self._vhost}, [name, type, durable, auto_delete, internal, arguments])"
        )
        return {
            row["name"]: row | {"arguments": row["arguments"] or {}}
            for row in rows
            if row["name"] and not row["name"].startswith("amq.")
        }

    def bindings(self) -> list[dict[str, Any]]:
        """Return each binding but those to the default exchange: source, destination, kinds, routing_key."""
        facts = "source_name, destination_name, destination_kind, routing_key, arguments"
        rows = self.evaluate(f"rabbit_binding:info_all({self._vhost}, [{facts}])")
        return sorted((row for row in rows if row["source_name"]), key=str)

    def channels(self) -> list[dict[str, Any]]:
        """Return each channel: connection, number, consumer_count, prefetch_count, unacknowledged and so on."""
        facts = "vhost, connection, number, consumer_count, prefetch_count, messages_unacknowledged, "
        facts += "messages_unconfirmed, confirm"
        return self._rows(f"rabbit_channel:info_all([{facts}])")

    def connections(self) -> list[dict[str, Any]]:
        """Return each connection: name, peer_port, channels, state, pid (as Erlang writes it)."""
        return self._rows("rabbit_networking:connection_info_all([vhost, pid, name, peer_port, channels, state])")

    def close_connections(self, reason: str = "closed by the test") -> None:
        """Have the broker close every connection of this virtual host."""
        self.evaluate(
            f"[rabbit_networking:close_connection(P, <<{json.dumps(reason)}>>) || "
            "[{pid, P}, {vhost, V}] <- rabbit_networking:connection_info_all([pid, vhost]), "
            f"V =:= {self._vhost}], ok"
        )

    def census(self) -> dict[str, int]:
        """Return how many of each there are: what has to be the same before and after."""
        return {
            "queues": len(self.queues()),
            "exchanges": len(self.exchanges()),
            "bindings": len(self.bindings()),
            "channels": len(self.channels()),
            "connections": len(self.connections()),
        }

    def _rows(self, expression: str) -> list[dict[str, Any]]:
        rows = self.evaluate(expression)
        return sorted((row for row in rows if row and row["vhost"] == self.name), key=str)


class RelayProcess:
    """`python -m imrelay …` as a process of its own; its log goes to a file."""

    def __init__(
        self,
        directory: Path,
        arguments: list[str],
        environment: Mapping[str, str],
        *,
        preexec: Callable[[], None] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log_path = directory / "relay.log"
        self.directory = directory
        self.host = ""
        self.port = 0
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "imrelay", *arguments],
                cwd=directory,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=preexec,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """All that it has written so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def url(self) -> str:
        """Where it listens, as `http://host:port`."""
        return f"http://{self.host}:{self.port}"

    def socket_url(self, user: str) -> str:
        """Return the WebSocket URL of a user, percent-encoded."""
        return f"ws://{self.host}:{self.port}/{quote(user, safe='')}"

    def wait_for_log(self, pattern: str, seconds: float = 30.0) -> re.Match[str]:
        """Wait for a line that matches; fail when the process ends or the time is over before."""

        def look() -> re.Match[str] | None:
            over = self.process.poll()
            found = re.search(pattern, self.log)
            if found is None and over is not None:
                raise RuntimeError(f"the relay ended with status {over} before {pattern!r}:\n{self.log}")
            return found

        try:
            found: re.Match[str] = eventually(look, seconds)
        except AssertionError:
            raise AssertionError(f"no {pattern!r} within {seconds:g} s in:\n{self.log}") from None
        return found

    def wait_until_listening(self, seconds: float = 60.0) -> None:
        """Wait for the line that says where it listens, and remember it."""
        found = self.wait_for_log(r"listening on http://(\S+):(\d+)", seconds)
        self.host, self.port = found[1], int(found[2])

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Ask it to stop and return its exit status; kill it and fail when it takes longer."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the relay did not stop within {seconds:g} s:\n{self.log}") from None

    def kill(self) -> None:
        """Kill it with -9."""
        self.process.kill()
        self.process.wait()
