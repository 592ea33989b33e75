"""Installs what the peers need from the registries that pip and npm are set up for: at the first run, and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmark.broker import Broker

__all__ = ["PEERS", "ROOT", "Installer", "Unavailable", "versions"]

PEERS = Path(__file__).resolve().parent / "peers"
ROOT = PEERS.parent.parent.parent
#: Seconds that an installation may take.
_INSTALL = 300.0


class Unavailable(Exception):
    """A system cannot be had on this machine; says why in one sentence."""


class Installer:
    """Installs packages into `cache`, once; a failure is not tried again in this run."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._failed: dict[str, str] = {}

    @property
    def node_modules(self) -> Path:
        """Where the packages of the Node.js servers are."""
        return self._cache / "node" / "node_modules"

    def node(self, program: str) -> list[str]:
        """Return the command of one of the Node.js servers."""
        for tool in ("node", "npm"):
            if not shutil.which(tool):
                raise Unavailable(f"{tool} is not on PATH: install nodejs and npm")
        there = self._cache / "node"
        package = PEERS / "node" / "package.json"

        def install() -> None:
            shutil.rmtree(there, ignore_errors=True)
            there.mkdir(parents=True)
            shutil.copy(package, there)
            _run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], there)

        self._once(there, package, install)
        return ["node", str(PEERS / "node" / program)]

    def python(self, program: list[str]) -> list[str]:
        """Return the command of one of the Python servers."""
        there = self._cache / "venv"
        packages = ROOT / "setup.cfg"

        def install() -> None:
            shutil.rmtree(there, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(there)], self._cache)
            pip = [str(there / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, "--editable", f"{ROOT}[bench]"], self._cache)

        self._once(there, packages, install)
        return [str(there / "bin" / "python"), *program]

    def _once(self, there: Path, wanted: Path, install: Callable[[], None]) -> None:
        """Install unless a mark says that exactly this is installed already."""
        if there.name in self._failed:
            raise Unavailable(self._failed[there.name])
        mark = there / "installed"
        text = hashlib.sha256(wanted.read_bytes()).hexdigest()
        if mark.exists() and mark.read_text() == text:
            return
        print(f"bench: installing the packages of {wanted.relative_to(ROOT)} into {there}", file=sys.stderr)
        self._cache.mkdir(parents=True, exist_ok=True)
        try:
            install()
        except Unavailable as exc:
            self._failed[there.name] = str(exc)
            raise
        mark.write_text(text)


def versions(broker: Broker, cache: Path) -> dict[str, str]:
    """Return what was measured: versions of the interpreters, the broker and the peers' packages."""
    found = {"python": sys.version.split()[0], "rabbitmq": broker.control("version")}
    with suppress(OSError, subprocess.SubprocessError):
        found["node"] = _output(["node", "--version"]).lstrip("v")
    for package in ("amqplib", "bufferutil", "websocket", "ws"):
        with suppress(OSError, ValueError):
            described = json.loads((cache / "node" / "node_modules" / package / "package.json").read_text())
            found[f"{package} (npm)"] = described["version"]
    with suppress(OSError, subprocess.SubprocessError):
        for line in _output([str(cache / "venv" / "bin" / "pip"), "freeze", "-q"]).splitlines():
            package, _, version = line.partition("==")
            if version:
                found[package.lower()] = version
    return found


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_INSTALL
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(f"{' '.join(command[:2])} failed: {exc}") from exc
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["(nothing printed)"]
        raise Unavailable(f"'{' '.join(command)}' failed: {last[0]}")


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout.strip()
