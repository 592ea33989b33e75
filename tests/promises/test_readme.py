"""README is short and true: its commands run, its links lead somewhere, and what it names is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from imrelay.settings.reading import CONFIG_VARIABLE, settings
from tests.conftest import RelayFactory
from tests.support.browser import wait_until_ready
from tests.support.harness import eventually, plain_environment

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "imrelay/**/*.md", "scripts/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = Path(sys.executable).parent
#: What is indented in README, block by block, without the indentation.
BLOCKS = [
    re.sub(r"^    ", "", block, flags=re.M).strip("\n")
    for block in re.findall(r"(?:^    .*\n)+", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), flags=re.M)
]


def block(beginning: str) -> str:
    """Return the one indented block of README that begins so."""
    (found,) = (text for text in BLOCKS if text.startswith(beginning))
    return found


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this virtual environment to its end, as README does by `.venv/bin/`."""
    return subprocess.run(
        [PROGRAMS / program, *arguments], env=plain_environment(), capture_output=True, text=True, timeout=60
    )


def converse(port: int) -> None:
    """Run README's Python program against a relay on this port; it prints what README says."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)
    assert program.count("127.0.0.1:8080/") == 2
    done = subprocess.run(
        [sys.executable, "-c", program.replace("127.0.0.1:8080/", f"127.0.0.1:{port}/")],
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed, promised = (
        re.sub(r'"mid":"[0-9A-Z]{26}","time":\d{13}}', '"mid":…,"time":…}', text)
        for text in (done.stdout.rstrip("\n"), block("anna:"))
    )
    assert "…" in promised
    assert printed == promised


def test_readme_has_at_most_900_words() -> None:
    """Words as `wc -w` counts them; what is longer stands beside what it describes."""
    assert len(README.split()) <= 900


def test_warning_about_authentication_comes_first() -> None:
    """The top of README says that ids are not checked."""
    assert "\n> **Nobody checks yet that you are who you say you are.**" in README.partition("\n## ")[0]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    """A link of a document in the repository leads to a file there, or is a relay's address on this machine."""
    folder = (ROOT / name).parent
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in (*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r"<(https?://[^>]+)>", text)):
        assert (folder / target).is_file() or target.startswith("http://127.0.0.1:8080/"), target


@pytest.mark.parametrize("page", ["PROTOCOL.md", "ARCHITECTURE.md", "OPERATING.md", "CHANGES.md"])
def test_readme_links_to_each_page(page: str) -> None:
    """What README has no place for is one click away."""
    assert f"](imrelay/{page})" in README


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_settings_exist(name: str) -> None:
    """A `[section] key`, a variable and an option that a document names are those of a setting."""
    text = (ROOT / name).read_text(encoding="utf-8")
    rows = list(settings())
    assert set(re.findall(r"`(\[\w+\] \w+)", text)) <= {f"[{row.section}] {row.key}" for row in rows}
    assert set(re.findall(r"\bIMRELAY_\w+", text)) <= {row.env for row in rows} | {CONFIG_VARIABLE}
    sections = "|".join(sorted({row.section for row in rows}))
    assert set(re.findall(rf"--(?:{sections})-[a-z-]+", text)) <= {row.option for row in rows}


def test_readme_says_where_settings_are_described() -> None:
    """tests/unit/settings/test_settings.py holds that both places describe every setting, and no other."""
    assert "`config.ini` holds every setting" in README
    assert "`.venv/bin/imrelay check-config --help`" in README


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_scripts_exist(name: str) -> None:
    """A script that a document names can be run."""
    for script in re.findall(r"(?<![\w./])scripts/[\w-]+(?![\w/])", (ROOT / name).read_text(encoding="utf-8")):
        assert os.access(ROOT / script, os.X_OK), script


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_commands_exist(name: str) -> None:
    """`imrelay` has the commands that a document names, and they have the options that stand behind them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for command, rest in sorted(set(re.findall(r"`(?:[^` ]* |\.venv/bin/)?imrelay ([a-z-]+)([^`]*)`", text))):
        done = run("imrelay", command, "--help")
        assert done.returncode == 0, (command, done.stderr)
        assert set(re.findall(r"--[a-z-]+", rest)) <= set(re.findall(r"--[a-z-]+", done.stdout)), (command, rest)


def test_each_command_of_readme_is_run() -> None:
    """Of what is indented in README the first two are run by test_scripts.py, the others are below."""
    assert [text.split()[0].partition("=")[0] for text in BLOCKS] == [
        *("scripts/start", "scripts/test"),
        *("anna:", "browser", "$", "IMRELAY_BROKER_URL"),
    ]


def test_first_conversation(relay: RelayFactory) -> None:
    """README's Python program meets a relay and prints what README says."""
    host = relay()
    wait_until_ready(host)
    converse(host.port)


def test_wrong_setting_is_named() -> None:
    """The command that README shows for it answers with that line and status 2."""
    command, line = block("$ ").split("\n")
    program, *arguments = command.removeprefix("$ .venv/bin/").split()
    done = run(program, *arguments)
    assert "exit status 2" in README
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")


def test_hosting_under_gunicorn(broker_url: str, tmp_path: Path) -> None:
    """README's command line, at the tests' broker and another port, serves README's Python program."""
    variable, program, *arguments = shlex.split(block("IMRELAY_BROKER_URL=").replace("\\\n", " "))
    assert variable == "IMRELAY_BROKER_URL=amqp://guest:guest@127.0.0.1:5672/"
    assert program == ".venv/bin/gunicorn"
    log_path = tmp_path / "gunicorn.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [PROGRAMS / "gunicorn", *arguments, "-b", "127.0.0.1:0"],
            cwd=tmp_path,
            env=plain_environment(IMRELAY_BROKER_URL=broker_url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        found = eventually(lambda: re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", log_path.read_text()), 60)
        converse(int(found[1]))
        process.terminate()
        assert process.wait(60) == 0, log_path.read_text()
    finally:
        process.kill()
        process.wait()


def test_hosting_is_described_where_the_relay_says() -> None:
    """A host that cannot upgrade answers with a sentence that names this section."""
    assert "see Hosting in imrelay's README" in (ROOT / "imrelay" / "app.py").read_text(encoding="utf-8")
    assert "\n## Hosting " in README


@pytest.mark.parametrize("command", ["scripts/start", "scripts/test"])
def test_the_two_commands_are_named(command: str) -> None:
    """README names what starts and what tests the project."""
    assert f"    {command}\n" in README


def test_readme_names_the_python_that_is_required() -> None:
    """README and the package's description agree on the oldest Python."""
    (oldest,) = re.findall(r"^python_requires = >=(.+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.M)
    assert re.search(rf"Python\s{re.escape(oldest)}\sor\snewer", README)
