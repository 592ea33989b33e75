"""scripts/start and scripts/test: from a bare machine to running, and one sentence where that cannot be.

Each test has a copy of the scripts and a machine of its own making: a PATH whose programs it writes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.harness import eventually, plain_environment

ROOT = Path(__file__).parents[2]
#: What the scripts take from every Debian; all else of a test's machine is made by the test.
TOOLS = """
bash basename cat chmod cut dirname env flock grep head id kill mkdir mktemp readlink rm sed sha256sum sleep
tail tee
"""
#: A Python that is as wanted but for the virtual environment, which it makes of a file.
FAKE_PYTHON = """\
case "$*" in
    -VV) echo "Python 3.11.0 (made up)" ;;
    *version_info*' < '*) exit 0 ;;
    *%d.%d-venv*) echo python3.11-venv ;;
    *"import ensurepip"*) exit ${NO_VENV_MODULE:-0} ;;
    *"import pip"*) exit 0 ;;
    "-m venv "*) mkdir -p "$3/bin"; cat "$0" > "$3/bin/python"; chmod 755 "$3/bin/python" ;;
    "-m pip "*) echo "$*" >> "$CALLS"; [ -z "$PIP_FAILS" ] || { echo "ERROR: $PIP_FAILS"; exit 1; } ;;
esac
"""


class FakeMachine:
    """A checkout and a PATH."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "a checkout"
        self.bin = directory / "bin"
        self.calls_path = directory / "calls"
        self.policy = directory / "policy-rc.d"
        #: A file for each service that is started at boot.
        self.enabled = directory / "enabled"
        self.enabled.mkdir(parents=True)
        self.bin.mkdir()
        for name in ("scripts", ".ci"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("setup.cfg", "pyproject.toml", "config.ini"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/missing/{tool}")
        self.has(rabbitmq=True, browser=True)

    def program(self, name: str, body: str) -> None:
        """Put a shell script on the machine's PATH."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def has_services(self) -> None:
        """Give it a systemd and an init that know what is started at boot, and note what is asked of them."""
        look = f'case "$*" in *is-enabled*) eval "name=\\${{$#}}"; [ -e "{self.enabled}/$name" ]; exit; esac\n'
        self.program("systemctl", look + 'echo "systemctl $*" >> "$CALLS"')
        self.program("update-rc.d", 'echo "update-rc.d $*" >> "$CALLS"')

    def enable(self, *names: str) -> str:
        """Return what an installation does that has services started at boot."""
        links = "".join(f': > "{self.enabled}/{name}"\n' for name in names)
        return f'case "$*" in *install*) {links};; esac'

    def has(self, *, rabbitmq: bool, browser: bool) -> None:
        """Say what is installed, in place of the scripts' own look at the real machine."""
        library = (ROOT / "scripts" / "lib.sh").read_text()
        library += f"has_rabbitmq() {{ {str(rabbitmq).lower()}; }}\nhas_browser() {{ {str(browser).lower()}; }}\n"
        library += f'policy="{self.policy}"\nboot_links="{self.enabled}/S[0-9][0-9]rabbitmq-server"\n'
        (self.root / "scripts" / "lib.sh").write_text(library)

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a run: the PATH and what is asked for."""
        return {"PATH": str(self.bin), "HOME": str(self.root), "CALLS": str(self.calls_path), **more}

    def run(self, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts without anything on standard input."""
        return subprocess.run(
            [str(self.bin / "bash"), str(self.root / script), *arguments],
            env=self.environment(more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        """What the fake programs wrote down."""
        return self.calls_path.read_text().splitlines() if self.calls_path.exists() else []

    def contents(self) -> set[str]:
        """Return every path of the checkout."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}

    def set_up(self, purpose: str = "start") -> Path:
        """Make a .venv that counts as complete; return its folder of programs."""
        folder = self.root / ".venv" / "bin"
        folder.mkdir(parents=True)
        (folder / "python").write_text(f"#!/bin/sh\n{FAKE_PYTHON}")
        (folder / "python").chmod(0o755)
        self.stamp(purpose)
        return folder

    def stamp(self, purpose: str) -> None:
        """Write the mark of a finished installation, as the scripts compute it."""
        code = 'set -- scripts/start; . scripts/lib.sh; python="$venv/bin/python"; venv_key'
        key = subprocess.run(
            [str(self.bin / "bash"), "-c", code, "scripts/start"],
            cwd=self.root,
            env=self.environment({}),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (self.root / ".venv" / f".imrelay-{purpose}").write_text(key)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def assert_one_sentence(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert a failure whose last line is the one complaint, and that it has these parts."""
    assert result.returncode not in (0, 126, 127), result.stderr
    lines = result.stderr.splitlines()
    assert lines, result
    for part in parts:
        assert part in lines[-1]
    for line in lines:
        assert re.match(r"scripts/(start|test): ", line), f"not in the scripts' own words: {line}"


def test_a_python_that_is_too_old_is_named(machine: FakeMachine) -> None:
    """The sentence has the version that is there and the one that is needed; nothing is made."""
    machine.program("python3", 'case "$*" in *print*) echo 3.9.2 ;; *) exit 1 ;; esac')
    before = machine.contents()
    result = machine.run("scripts/start")
    assert_one_sentence(result, "Python 3.10 or newer", "3.9.2", str(machine.bin / "python3"))
    assert len(result.stderr.splitlines()) == 1
    assert machine.contents() == before


def test_a_newer_python_beside_an_old_one_is_taken(machine: FakeMachine) -> None:
    """Where python3 is too old but python3.11 is there, that one is used."""
    machine.program("python3", "exit 1")
    machine.program("python3.11", FAKE_PYTHON)
    assert "making" in machine.run("scripts/start").stderr


def test_the_first_run_installs_and_the_next_does_not(machine: FakeMachine) -> None:
    """One .venv serves both scripts: the packages for the tests are added to it, and nothing is done twice."""
    machine.program("python3", FAKE_PYTHON)
    for _ in range(2):
        machine.run("scripts/start")
        assert (machine.root / ".venv" / "bin" / "python").exists()
        assert [call.split(" -e ")[1] for call in machine.calls] == ["."]
    for _ in range(2):
        machine.run("scripts/test")
        machine.run("scripts/start")
        assert [call.split(" -e ")[1] for call in machine.calls] == [".", ".[test]"]


def test_no_python_at_all(machine: FakeMachine) -> None:
    """The sentence says how to get one."""
    assert_one_sentence(machine.run("scripts/test"), "apt-get install python3")


def test_nothing_to_install_with(machine: FakeMachine) -> None:
    """Not root and no sudo: one sentence with the command that an administrator can run; nothing is made."""
    machine.has(rabbitmq=False, browser=True)
    machine.program("python3", FAKE_PYTHON)
    machine.program("id", "echo 1000")
    machine.program("apt-get", 'echo "$*" >> "$CALLS"')
    before = machine.contents()
    for sudo in (None, "exit 1"):
        if sudo:
            machine.program("sudo", sudo)
        result = machine.run("scripts/start")
        assert_one_sentence(result, "RabbitMQ", "apt-get install rabbitmq-server' as root")
        assert len(result.stderr.splitlines()) == 1
    assert machine.contents() == before
    assert machine.calls == []


def test_another_system_without_apt(machine: FakeMachine) -> None:
    """No apt-get: the sentence names what is missing, under the name that Debian gives it."""
    machine.has(rabbitmq=False, browser=True)
    machine.program("python3", FAKE_PYTHON)
    assert_one_sentence(machine.run("scripts/start"), "RabbitMQ", "no apt-get", "rabbitmq-server")


def test_no_rabbitmq_is_installed_for_a_given_url(machine: FakeMachine) -> None:
    """With an AMQP URL in the settings, the environment or the options there is nothing to install."""
    machine.has(rabbitmq=False, browser=True)
    (machine.set_up() / "imrelay").symlink_to("/bin/true")
    assert machine.run("scripts/start", "--broker-url", "amqp://elsewhere").returncode == 0
    assert machine.run("scripts/start", IMRELAY_BROKER_URL="amqps://elsewhere").returncode == 0
    config = machine.root / "config.ini"
    config.write_text(re.sub(r"(?m)^url\s*=.*", "url = amqp://elsewhere", config.read_text()))
    assert machine.run("scripts/start").returncode == 0
    config.write_text(config.read_text().replace("amqp://elsewhere", "private"))
    assert_one_sentence(machine.run("scripts/start"), "RabbitMQ")


def test_apt_that_fails_is_quoted(machine: FakeMachine) -> None:
    """No network: the sentence has apt's own reason; neither a .venv nor the held services are left behind."""
    machine.has(rabbitmq=False, browser=True)
    machine.program("python3", FAKE_PYTHON)
    machine.program("id", "echo 0")
    machine.program(
        "apt-get", 'echo "E: Failed to fetch it: Temporary failure resolving"; echo "E: Giving up"; exit 100'
    )
    before = machine.contents()
    result = machine.run("scripts/start")
    assert_one_sentence(result, "RabbitMQ", "Temporary failure resolving", "apt-get install rabbitmq-server")
    assert machine.contents() == before
    assert not machine.policy.exists()


def test_installing_starts_no_system_rabbitmq(machine: FakeMachine) -> None:
    """While apt runs, RabbitMQ's service may not start and others may; later it is off, and all may again."""
    machine.has(rabbitmq=False, browser=True)
    machine.program("python3", FAKE_PYTHON)
    machine.program("id", "echo 0")
    machine.has_services()
    ask = f'"{machine.policy}" --quiet %s start; echo "%s $?" >> "$CALLS"\n'
    machine.program(
        "apt-get",
        'echo "apt-get $DEBIAN_FRONTEND $*" >> "$CALLS"\n'
        + "".join(ask % (name, name) for name in ("rabbitmq-server.service", "epmd.socket", "postgresql"))
        + machine.enable("rabbitmq-server.service", "epmd.service", "epmd.socket", "S01rabbitmq-server"),
    )
    machine.run("scripts/start")
    text = "\n".join(machine.calls)
    assert re.search(r"^apt-get noninteractive .* update$", text, re.MULTILINE)
    assert re.search(
        r"^apt-get noninteractive .*--no-install-recommends install rabbitmq-server$", text, re.MULTILINE
    )
    for answer in ("rabbitmq-server.service 101", "epmd.socket 101", "postgresql 0"):
        assert machine.calls.count(answer) == 2, answer
    for unit in ("rabbitmq-server.service", "epmd.service", "epmd.socket"):
        assert f"systemctl --quiet disable {unit}" in machine.calls
    assert "update-rc.d rabbitmq-server disable" in machine.calls
    assert not machine.policy.exists()


def test_services_that_were_enabled_before_stay_so(machine: FakeMachine) -> None:
    """Another package may have Erlang's port mapper started at boot: only what came with ours is disabled."""
    machine.has(rabbitmq=False, browser=True)
    machine.program("python3", FAKE_PYTHON)
    machine.program("id", "echo 0")
    machine.has_services()
    for name in ("epmd.socket", "S01rabbitmq-server"):
        (machine.enabled / name).touch()
    machine.program("apt-get", machine.enable("rabbitmq-server.service", "epmd.service", "epmd.socket"))
    machine.run("scripts/start")
    disabled = [call for call in machine.calls if call.startswith(("systemctl", "update-rc.d"))]
    assert disabled == [f"systemctl --quiet disable {unit}.service" for unit in ("rabbitmq-server", "epmd")]


def test_a_policy_of_the_administrator_stays(machine: FakeMachine) -> None:
    """Where the machine has a policy for services already, it is neither replaced nor removed."""
    machine.has(rabbitmq=False, browser=True)
    machine.program("python3", FAKE_PYTHON)
    machine.program("id", "echo 0")
    machine.program("apt-get", "exit 0")
    machine.policy.write_text("#!/bin/sh\nexit 101\n")
    machine.run("scripts/start")
    assert machine.policy.read_text() == "#!/bin/sh\nexit 101\n"


def test_tests_go_on_without_a_browser(machine: FakeMachine) -> None:
    """A browser that cannot be installed costs the test of the page and one line, not the others."""
    machine.has(rabbitmq=True, browser=False)
    machine.program("id", "echo 1000")
    machine.set_up("test")
    result = machine.run("scripts/test")
    assert result.returncode == 0
    assert "the test of the page will be skipped" in result.stderr


def test_no_network_leaves_no_half_environment(machine: FakeMachine) -> None:
    """A real .venv whose packages cannot be had is removed again; the sentence has pip's reason."""
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}"
    (machine.bin / "python3").symlink_to(python if python.exists() else sys.executable)
    before = machine.contents()
    result = machine.run("scripts/start", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null")
    assert_one_sentence(result, "pip could not install", "No matching distribution", "PIP_INDEX_URL")
    assert machine.contents() == before


def test_an_interrupt_leaves_no_half_environment(machine: FakeMachine) -> None:
    """Ctrl-C while .venv is being made removes what is there of it."""
    machine.program("python3", FAKE_PYTHON.replace('"-m venv "*)', '"-m venv "*) mkdir "$3"; sleep 30;'))
    run = subprocess.Popen(
        [str(machine.bin / "bash"), str(machine.root / "scripts/start")],
        env=machine.environment({}),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        eventually((machine.root / ".venv").exists)
        os.killpg(run.pid, signal.SIGINT)
        run.communicate(timeout=10)
        assert run.returncode != 0
        assert not (machine.root / ".venv").exists()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


def test_a_failed_renewal_keeps_the_environment_that_works(machine: FakeMachine) -> None:
    """When packages for a changed setup.cfg cannot be had, the .venv stays and the next run tries again."""
    folder = machine.set_up()
    (folder / "imrelay").symlink_to("/bin/true")
    with (machine.root / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    result = machine.run("scripts/start", PIP_FAILS="no route")
    assert_one_sentence(result, "no route")
    assert (folder / "python").exists()
    assert machine.run("scripts/start").returncode == 0
    assert len(machine.calls) == 2
    assert machine.run("scripts/start").returncode == 0
    assert len(machine.calls) == 2


def test_a_second_run_does_nothing_again(machine: FakeMachine) -> None:
    """With everything there it goes straight to `imrelay serve`, with the options as given, within 2 seconds."""
    folder = machine.set_up()
    (folder / "imrelay").write_text('#!/bin/sh\necho "$PWD"\nprintf "<%s>" "$@"\nexit 7\n')
    (folder / "imrelay").chmod(0o755)
    began = time.monotonic()
    result = machine.run("scripts/start", "--server-port", "8081", "--log-level=debug level")
    assert time.monotonic() - began < 2
    assert result.stdout == (
        f"{machine.root}\n<serve><--config><config.ini><--server-port><8081><--log-level=debug level>"
    )
    assert result.stderr == ""
    assert result.returncode == 7
    assert machine.calls == []


def test_a_port_that_is_taken_is_named(machine: FakeMachine) -> None:
    """`scripts/start` then ends with status 1 and one line that has the port, before it starts a RabbitMQ."""
    folder = machine.set_up()
    (folder / "imrelay").write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m imrelay "$@"\n')
    (folder / "imrelay").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = machine.run("scripts/start", "--server-port", str(port), PATH=plain_environment()["PATH"])
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(port) in result.stderr
    assert not (machine.root / "var").exists()


@pytest.mark.parametrize("broken", ["", "ruff", "mypy", "pytest"])
def test_the_status_of_the_tests_is_that_of_all_checks(machine: FakeMachine, broken: str) -> None:
    """Each of ruff, mypy and pytest runs, whatever the others found; any of them fails the whole."""
    folder = machine.set_up("test")
    (folder / "python").write_text(
        f'#!/bin/sh\ncase "$*" in -m*) echo "$(printf "<%s>" "$@")" >> "$CALLS" ;; esac\n'
        f'case "$2" in pytest) echo "=== 3 passed ===" ;; esac\n[ "$2" != "{broken}" ] || exit 1\n{FAKE_PYTHON}'
    )
    machine.stamp("test")
    result = machine.run("scripts/test", "-k", "one or two")
    assert [call[1:-1].split("><")[1] for call in machine.calls] == ["ruff", "mypy", "pytest"]
    assert machine.calls[-1] == "<-m><pytest><-k><one or two>"
    assert result.stdout.splitlines()[-1] == "=== 3 passed ==="
    assert (result.returncode != 0) == bool(broken)


def test_continuous_integration_runs_the_tests(machine: FakeMachine) -> None:
    """`bash .ci/run` from the checkout is `scripts/test`."""
    folder = machine.set_up("test")
    (folder / "python").write_text(f'#!/bin/sh\ncase "$2" in pytest) echo ran; exit 5 ;; esac\n{FAKE_PYTHON}')
    machine.stamp("test")
    result = subprocess.run(
        [str(machine.bin / "bash"), ".ci/run"],
        cwd=machine.root,
        env=machine.environment({"CI": "true"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "ran\n"
    assert result.returncode == 5
