"""The settings: their sources, their errors, and the file that explains them."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from imrelay.errors import ConfigError
from imrelay.settings.reading import Setting, find_file, hide_password, load, settings
from imrelay.settings.values import Config
from tests.support.harness import plain_environment

ROWS = {f"{row.section}.{row.key}": row for row in settings()}
SAMPLE = Path(__file__).parents[3] / "config.ini"

_DRIVER = """
import contextlib, io, json, os, sys
from imrelay.cli import main
answers = []
for arguments, environment in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    os.environ.update(environment)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as exc:
            status = exc.code
    for name in environment:
        del os.environ[name]
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class CommandResult:
    """What the command line did: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def run_commands(directory: Path, *calls: tuple[list[str], dict[str, str]]) -> list[CommandResult]:
    """Call the command line once for each (arguments, environment), in one process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        cwd=directory,
        env=plain_environment(),
        input=json.dumps(calls),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [CommandResult(*answer) for answer in json.loads(done.stdout)]


def run_command(directory: Path, *arguments: str, **environment: str) -> CommandResult:
    """Call the command line once."""
    return run_commands(directory, (list(arguments), environment))[0]


def write(directory: Path, text: str | bytes, name: str = "relay.ini") -> Path:
    """Write a settings file."""
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def value_of(config: Config, name: str) -> Any:
    """Return the value of `section.key`."""
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


# -- where values come from ----------------------------------------------------------------------------------


def test_without_anything_the_defaults_hold() -> None:
    """No file, no variable, no option: the table's defaults, and the private broker."""
    config = load(None, {})
    for name, row in ROWS.items():
        assert value_of(config, name) == row.default
    assert config.is_private


def test_a_file_overrides_defaults_a_variable_the_file_and_an_option_the_variable(tmp_path: Path) -> None:
    """Later sources win: default, file, environment, command line; what they do not name stays."""
    path = write(tmp_path, "[server]\nport = 1001\nhost = 127.0.0.2\n[broker]\nprefetch = 11\n")
    environ = {"IMRELAY_SERVER_PORT": "1002", "IMRELAY_BROKER_PREFETCH": "12"}
    options = {("server", "port"): "1003"}
    assert load(path, {}).server.port == 1001
    assert load(path, environ).server.port == 1002
    config = load(path, environ, options)
    assert (config.server.port, config.server.host, config.broker.prefetch) == (1003, "127.0.0.2", 12)
    assert config.broker.heartbeat == ROWS["broker.heartbeat"].default


@pytest.mark.parametrize("name", ROWS)
def test_every_key_can_be_set_from_everywhere(name: str, tmp_path: Path) -> None:
    """Each key of the table has its place in a file, its variable and its option."""
    row = ROWS[name]
    other = _another_value(row)
    text = row.write(other)
    path = write(tmp_path, f"[{row.section}]\n{row.key} = {text}\n")
    assert value_of(load(path, {}), name) == other
    assert value_of(load(None, {row.env: text}), name) == other
    assert value_of(load(None, {}, {(row.section, row.key): text}), name) == other
    assert row.env == f"IMRELAY_{row.section}_{row.key}".upper()


def _another_value(row: Setting) -> Any:
    """Return a good value of a setting that is not its default."""
    if row.type is bool:
        return not row.default
    if row.type in (int, float):
        assert row.low is not None
        assert row.high is not None
        return row.type(row.low if row.default != row.low else row.high)
    if row.choices:
        return next(choice for choice in row.choices if choice != row.default)
    if row.check == "url":
        return ("amqp://guest:guest@localhost:5672/", "amqps://other.example/chat")
    if row.check == "origin":
        return ("https://chat.example.org", "http://localhost:8080")
    return "another"


def test_a_file_is_found_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option's file, else that of IMRELAY_CONFIG, else config.ini of the current folder, else none."""
    monkeypatch.chdir(tmp_path)
    assert find_file({}) is None
    assert find_file({"IMRELAY_CONFIG": "b.ini"}, "a.ini") == Path("a.ini")
    assert find_file({"IMRELAY_CONFIG": "b.ini"}) == Path("b.ini")
    write(tmp_path, "", "config.ini")
    assert find_file({}) == Path("config.ini")
    assert find_file({"IMRELAY_CONFIG": "b.ini"}) == Path("b.ini")


def test_relative_paths_start_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data_dir` does not depend on where the relay is started."""
    folder = tmp_path / "etc"
    folder.mkdir()
    path = write(folder, "[broker]\ndata_dir = data\n")
    monkeypatch.chdir(tmp_path)
    assert load(path, {}).data_dir == folder / "data"
    assert load(Path("etc/relay.ini"), {}).data_dir == folder / "data"
    assert load(None, {"IMRELAY_BROKER_DATA_DIR": "/srv/data"}).data_dir == Path("/srv/data")


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("TRUE", True), ("On", True), ("1", True), ("no", False), ("off", False)]
)
def test_yes_and_no_have_their_usual_spellings(text: str, value: bool) -> None:
    """yes, true, on, 1 and their opposites, in any case."""
    assert load(None, {"IMRELAY_BROKER_PERSISTENT": text}).broker.persistent is value


def test_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    """A percent sign in a URL is no interpolation; blanks and line ends part several URLs."""
    path = write(tmp_path, "[broker]\nurl = amqp://a:%2Fp@h/%2F\n    amqp://b:100%25@h/\n")
    assert load(path, {}).broker.url == ("amqp://a:%2Fp@h/%2F", "amqp://b:100%25@h/")


# -- what is wrong with them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """A setting that cannot be used: what is written where, and what the line about it has to name."""

    text: str | bytes = ""
    names: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def _key(section: str, key: str, value: str, *names: str) -> Wrong:
    return Wrong(f"[{section}]\n{key} = {value}\n", ("relay.ini", f"[{section}] {key}", *names))


def _url(url: str, *names: str) -> Wrong:
    return _key("broker", "url", url, *names)


WRONG = {
    "an unknown section": Wrong("[serve]\nport = 1\n", ("relay.ini", "[serve]", "server")),
    "DEFAULT is a section like any other": Wrong("[DEFAULT]\nport = 1\n", ("relay.ini", "[DEFAULT]")),
    "an unknown key": Wrong("[server]\nprot = 1\n", ("relay.ini", "[server] prot", "port")),
    "a key in another's section": Wrong("[broker]\nport = 1\n", ("relay.ini", "[broker] port")),
    "a key twice": Wrong("[server]\nport = 1\nport = 2\n", ("relay.ini", "server", "port", "already exists")),
    "a section twice": Wrong("[server]\nport = 1\n[server]\nhost = a\n", ("relay.ini", "server", "already")),
    "a key without a section": Wrong("port = 1\n", ("relay.ini", "port = 1")),
    "a line without a value": Wrong("[server]\nport\n", ("relay.ini", "port")),
    "a file that is not UTF-8": Wrong(b"[server]\nhost = \xff\n", ("relay.ini", "UTF-8")),
    "no number": _key("server", "port", "many", "'many'", "whole number"),
    "a fraction for an integer": _key("server", "port", "80.5", "80.5", "whole number"),
    "a number with a unit": _key("server", "drain_timeout", "30s", "30s", "number"),
    "an empty number": _key("server", "port", "", "whole number"),
    "too small": _key("server", "port", "-1", "-1", "0", "65535"),
    "too large": _key("server", "port", "65536", "65536", "0", "65535"),
    "too small, with its unit": _key("websocket", "max_message_size", "125", "126", "bytes"),
    "not a number at all": _key("server", "drain_timeout", "nan", "nan"),
    "infinite": _key("inbox", "ttl", "inf", "inf", "seconds"),
    "1e400": _key("inbox", "ttl", "1e400", "seconds"),
    "an integer of 5,000 digits": _key("inbox", "max_length", "7" * 5000, "5000"),
    "neither yes nor no": _key("broker", "persistent", "maybe", "'maybe'", "yes", "no"),
    "none of the choices": _key("inbox", "unknown_recipient", "ask", "'ask'", "create", "refuse"),
    "a choice in capitals": _key("log", "level", "INFO", "'INFO'", "info"),
    "an empty choice": _key("log", "format", "", "text", "json"),
    "an empty host": _key("server", "host", "", "text"),
    "a host of two lines": Wrong("[server]\nhost = a\n    b\n", ("relay.ini", "[server] host", "one line")),
    "an origin without a scheme": _key("server", "allowed_origins", "example.org", "'example.org'", "https://"),
    "an origin with a path": _key("server", "allowed_origins", "http://a.org http://b.org/x", "'http://b.org/x'"),
    "an origin with a wrong port": _key("server", "allowed_origins", "http://a.org:x", "'http://a.org:x'"),
    "any origin": _key("server", "allowed_origins", "*", "'*'"),
    "a reserved exchange": _key("broker", "exchange", "amq.direct", "amq."),
    "an exchange of 256 bytes": _key("broker", "exchange", "e" * 256, "255"),
    "no URL": _url("", "private"),
    "another scheme": _url("http://localhost/", "http://localhost/", "amqp://"),
    "a word": _url("localhost", "'localhost'", "amqp://"),
    "private in capitals": _url("PRIVATE", "'PRIVATE'", "private"),
    "private among others": _url("private amqp://localhost/", "private"),
    "a URL without a host": _url("amqp://", "host"),
    "a port of 0": _url("amqp://localhost:0/", "port"),
    "a port over 65535": _url("amqp://localhost:65536/", "port"),
    "a port that is no number": _url("amqp://localhost:amqp/", "port"),
    "options behind the URL": _url("amqp://localhost/?heartbeat=5", "?"),
    "a virtual host with a slash": _url("amqp://localhost/a/b", "%2F"),
    "a virtual host of 256 bytes": _url(f"amqp://localhost/{'v' * 256}", "255"),
    "an unknown variable": Wrong(names=("IMRELAY_SERVER_PROT",), environ={"IMRELAY_SERVER_PROT": "1"}),
    "a variable without a section": Wrong(names=("IMRELAY_PROT",), environ={"IMRELAY_PROT": "1"}),
    "a wrong variable": Wrong(
        names=("IMRELAY_SERVER_PORT", "'x'", "whole number"), environ={"IMRELAY_SERVER_PORT": "x"}
    ),
    "an empty variable": Wrong(names=("IMRELAY_SERVER_PORT",), environ={"IMRELAY_SERVER_PORT": ""}),
    "a wrong option": Wrong(names=("--server-port", "'x'", "whole number"), options=("--server-port=x",)),
}


@pytest.mark.parametrize("wrong", [w for w in WRONG.values() if not w.options], ids=lambda wrong: wrong.names[-1])
def test_a_wrong_setting_is_named(wrong: Wrong, tmp_path: Path) -> None:
    """What cannot be used is said in one line that names file, section and key, or the variable."""
    path = write(tmp_path, wrong.text)
    with pytest.raises(ConfigError) as caught:
        load(path, wrong.environ)
    line = str(caught.value)
    assert "\n" not in line
    for name in wrong.names:
        assert name in line


def test_the_command_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    """Whatever is wrong: nothing on standard output, one line on standard error, status 2; for every command."""
    calls, expected = [], []
    for number, (what, wrong) in enumerate(WRONG.items()):
        path = write(tmp_path, wrong.text, f"{number}-relay.ini")
        command = ("check-config", "serve", "broker")[number % 3]
        calls.append(([command, "--config", str(path), *wrong.options], wrong.environ))
        expected.append((what, wrong.names))
    for (what, names), answer in zip(expected, run_commands(tmp_path, *calls), strict=True):
        assert answer.status == 2, what
        assert answer.out == "", what
        assert answer.err.startswith("imrelay: "), what
        assert answer.err.count("\n") == 1, (what, answer.err)
        assert answer.err.endswith("\n"), what
        for name in names:
            assert name in answer.err, (what, answer.err)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that was asked for has to be there; config.ini of the current folder need not."""
    folder = tmp_path / "folder"
    folder.mkdir()
    by_option, by_variable, by_nobody, is_folder = run_commands(
        tmp_path,
        (["check-config", "--config", "gone.ini"], {}),
        (["check-config"], {"IMRELAY_CONFIG": "gone.ini"}),
        (["check-config"], {}),
        (["check-config", "--config", "folder"], {}),
    )
    for answer in (by_option, by_variable):
        assert (answer.status, answer.err) == (2, "imrelay: gone.ini: cannot be read: No such file or directory\n")
    assert by_nobody.status == 0
    assert (is_folder.status, is_folder.err) == (2, "imrelay: folder: cannot be read: Is a directory\n")


def test_an_unknown_option_exits_with_2(tmp_path: Path) -> None:
    """An option, a command or a value that is not there is an error of use."""
    calls = [["check-config", "--server-prot=1"], ["servce"], [], ["check-config", "--server-port"]]
    for answer in run_commands(tmp_path, *((arguments, {}) for arguments in calls)):
        assert answer.status == 2
        assert answer.out == ""
        assert "usage: imrelay" in answer.err


def test_a_broker_to_run_has_to_be_private(tmp_path: Path) -> None:
    """`imrelay broker` with the URL of another RabbitMQ has nothing to run, and says so."""
    answer = run_command(tmp_path, "broker", "--broker-url=amqp://localhost/")
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    assert "[broker] url" in answer.err


# -- check-config --------------------------------------------------------------------------------------------


def test_check_config_shows_what_will_be_used(tmp_path: Path) -> None:
    """It prints every key, with the values of all sources; read again, they give the same settings."""
    path = write(tmp_path, "[server]\nport = 1001\nallowed_origins = http://a.org http://b.org\n")
    answer = run_command(
        tmp_path, "check-config", "--config", str(path), "--inbox-ttl=1.5", IMRELAY_BROKER_PERSISTENT="off"
    )
    assert (answer.status, answer.err) == (0, "")
    printed = configparser.ConfigParser(interpolation=None)
    printed.read_string(answer.out)
    assert {f"{s}.{k}" for s in printed.sections() for k in printed[s]} == set(ROWS)
    again = load(write(tmp_path, answer.out, "again.ini"), {})
    assert again == load(path, {"IMRELAY_BROKER_PERSISTENT": "off"}, {("inbox", "ttl"): "1.5"})
    assert (again.server.port, again.broker.persistent, again.inbox.ttl) == (1001, False, 1.5)


def test_check_config_hides_passwords(tmp_path: Path) -> None:
    """A URL is shown without its password, wherever it comes from."""
    urls = "amqp://ann:se-cret@one:5672/v amqps://bob@two amqp://:se-cret@three"
    answer = run_command(tmp_path, "check-config", f"--broker-url={urls}")
    assert answer.status == 0
    assert "url = amqp://ann:***@one:5672/v amqps://bob@two amqp://:***@three\n" in answer.out
    assert "se-cret" not in answer.out + answer.err


@pytest.mark.parametrize(
    "url",
    [
        "amqp://ann:se-cret@host:port/",
        "amqp://ann:se-cret@host:0/",
        "amqp://ann:se-cret@/",
        "amqp://ann:se-cret@host/a/b",
        "amqp://ann:se-cret@host/?x=1",
        "amqp://ann:se-cr#et@host/",
        "amqp://ann:se-cr/et@host/",
        "amqp://ann:se-cr@et@host/a/b",
        "http://ann:se-cret@host/",
        "private amqp://ann:se-cret@host/",
        "ann:se-cret@host",
        "amqp:ann:se-cret@host",
        "amqp:/ann:se-cret@host",
        "amqp://ann:se-cr et@host/",
    ],
)
def test_a_wrong_url_does_not_show_its_password(url: str) -> None:
    """The line about a URL that cannot be used hides the password, however the URL is broken."""
    with pytest.raises(ConfigError) as caught:
        load(None, {"IMRELAY_BROKER_URL": url})
    assert "se-cr" not in str(caught.value)


def test_hide_password_leaves_the_rest() -> None:
    """Only the password goes; a URL without one stays as it is."""
    assert hide_password("amqp://ann:pw@host:5672/v") == "amqp://ann:***@host:5672/v"
    assert hide_password("amqp://ann@host:5672/v") == "amqp://ann@host:5672/v"
    assert hide_password("amqp://host:5672/v") == "amqp://host:5672/v"
    assert hide_password("private") == "private"


# -- the file and the help that explain them -----------------------------------------------------------------


def _explained(path: Path) -> dict[str, tuple[str, str]]:
    """Return `section.key` -> (value, the comment above it), in the order of the file."""
    found: dict[str, tuple[str, str]] = {}
    section, comment = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section, comment = line.strip("[]"), []
        elif line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif line:
            key, _, value = line.partition("=")
            found[f"{section}.{key.strip()}"] = (value.strip(), " ".join(comment))
            comment = []
    return found


EXPLAINED = _explained(SAMPLE)


def test_the_sample_file_has_every_key_in_the_order_of_the_table() -> None:
    """config.ini shows every key there is, and no other."""
    assert list(EXPLAINED) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_sample_file_explains_each_key(name: str) -> None:
    """Above each key stands its own comment, with its unit, its choices and its default, which is its value."""
    row = ROWS[name]
    value, comment = EXPLAINED[name]
    assert value == row.default_text
    assert comment.endswith(f"default: {row.default_text or 'empty'}")
    assert len(comment) > len(f"default: {row.default_text}") + 10
    assert row.doc in comment
    assert row.unit in comment
    for choice in row.choices:
        assert re.search(rf"\b{choice}\b", comment)


def test_the_sample_file_changes_nothing() -> None:
    """A relay with config.ini as it is delivered is one with the defaults."""
    sample, plain = load(SAMPLE, {}), load(None, {})
    for name in ROWS:
        assert value_of(sample, name) == value_of(plain, name)


def test_help_explains_each_option(tmp_path: Path) -> None:
    """`--help` of each command names every option, with its default, and says what it does."""
    for answer in run_commands(tmp_path, *(([command, "--help"], {}) for command in ("serve", "broker"))):
        assert answer.status == 0
        words = "".join(answer.out.split())
        for row in ROWS.values():
            assert f"{row.option}" in words
            assert "".join(f"{row.doc} (default: {row.default_text or 'empty'})".split()) in words


def _tabulated(text: str) -> dict[str, tuple[str, str]]:
    """Return `section.key` -> (default with its unit, meaning) of the table in a help text, in its order."""
    heading, *table = text[text.index("  setting ") :].splitlines()
    second, third = heading.index("default, unit"), heading.index("meaning")
    found: dict[str, tuple[str, str]] = {}
    section, name = "", ""
    for line in table:
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            key, default, meaning = line[:second].strip(), line[second:third].strip(), line[third:]
            if key:
                name = f"{section}.{key}"
                assert name not in found
                found[name] = (default, meaning)
            else:
                assert not default, line
                found[name] = (found[name][0], f"{found[name][1]} {meaning}")
    return found


@pytest.mark.parametrize("columns", [20, 80, 250])
def test_check_config_help_has_the_table_of_settings(columns: int, tmp_path: Path) -> None:
    """`check-config --help` tells the section, name, default, unit and meaning of each setting."""
    answer = run_command(tmp_path, "check-config", "--help", COLUMNS=str(columns))
    assert (answer.status, answer.err) == (0, "")
    found = _tabulated(answer.out)
    assert list(found) == list(ROWS)
    for name, row in ROWS.items():
        assert found[name] == (f"{row.default_text or 'empty'} {row.unit}".strip(), row.doc)
        assert all(choice in row.doc for choice in row.choices)
    assert max(map(len, answer.out.splitlines())) <= max(columns, 80)


def test_check_config_help_says_how_a_setting_is_overridden(tmp_path: Path) -> None:
    """The variable and the option that it names as an example are those of a setting."""
    words = run_command(tmp_path, "check-config", "--help").out.split()
    assert any(row.env in words and f"{row.option};" in words for row in ROWS.values())


def test_commands_and_version(tmp_path: Path) -> None:
    """`imrelay --help` names the commands; `--version` says which version this is."""
    help_, version = run_commands(tmp_path, (["--help"], {}), (["--version"], {}))
    for command in ("serve", "broker", "check-config"):
        assert command in help_.out
    assert re.fullmatch(r"imrelay \d+\.\d+\.\d+\S*\n", version.out)


@pytest.mark.parametrize("name", ["IMRELAY_PORT", "IMRELAY_SERVICE_HOST", "IMRELAY_CHAT_PORT_8080_TCP_ADDR"])
def test_what_kubernetes_puts_into_the_environment_is_no_setting(name: str) -> None:
    """A Service that is called imrelay, or imrelay-something, keeps no relay from starting."""
    assert load(None, {name: "tcp://10.0.0.1:8080"}) == load(None, {})
