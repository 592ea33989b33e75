"""The operating system's account of processes: CPU time and memory, children included (Linux, /proc)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["cpu_seconds", "family", "machine_cpu_seconds", "raise_descriptor_limit", "resident_kib"]


def family(*roots: int) -> list[int]:
    """Return the processes `roots` and all their descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                stat = Path("/proc", entry, "stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found = list(roots)
    for pid in found:
        found += children.get(pid, ())
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time, user and system, that these processes have had, in seconds.

    The scheduler's own count of each thread, in nanoseconds; where the kernel keeps none, the clock ticks of
    /proc/<pid>/stat (1/100 s).
    """
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            total += _of_threads(pid) or _of_ticks(pid)
    return total


def machine_cpu_seconds() -> float:
    """Return the CPU time that everything on this machine together has had, in seconds."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, soft_irq, stolen = map(int, fields[1:9])
    return (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")


def resident_kib(pids: list[int]) -> float:
    """Return the memory of these processes, what they share counted once (PSS), in KiB."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return float(total)


def raise_descriptor_limit() -> int:
    """Let this process and its children open as many files as the system allows; return how many that are."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _of_threads(pid: int) -> float:
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def _of_ticks(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
