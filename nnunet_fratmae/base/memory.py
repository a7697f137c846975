"""How much memory there is, and how many processes of a known need fit into it."""

from __future__ import annotations

from pathlib import Path

# What is left to the system and to the process that starts the others.
SPARE_BYTES = 1 << 30
_CGROUPS = (  # limit, use and what of the use is a cache of files: version 2, version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be used without swapping: of the machine, or of the container if that has less; None if unknown
    (not Linux)."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in proc.read_text(encoding="utf-8").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    for limit, used, stat, cache in _CGROUPS:
        try:
            most = int((cgroup / limit).read_text(encoding="utf-8"))  # "max" where there is no limit
            caches = dict(line.split() for line in (cgroup / stat).read_text(encoding="utf-8").splitlines())
            found.append(max(0, most - int((cgroup / used).read_text(encoding="utf-8")) + int(caches.get(cache, 0))))
        except (OSError, ValueError):
            continue
    return min(found, default=None)


def fitting(processes: int, need: int) -> tuple[int, str]:
    """How many of `processes` that need up to `need` bytes each can run at once, at least 1, and a line on it where it
    is fewer, or "". With an unknown need (0), or where the free memory is unknown, all."""
    free = free_memory()
    if not need or free is None:
        return processes, ""
    fit = max(1, min(processes, (free - SPARE_BYTES) // need))
    if fit == processes and need <= free:
        return fit, ""
    little = "; that may be too little" if need > free else ""
    return fit, (f"-np {processes}: {fit} at once, for a study needs up to {need / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                 f"of memory are free{little}")  # fmt: skip
