"""How much memory is free, so that a run that asks for more is told before it is killed."""

from __future__ import annotations

from pathlib import Path

import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 1 << 62
# Per version of control groups: their folder, and its files of the limit, of the use, and of the part of the use that
# the kernel gives back when it is needed.
_VERSIONS = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


def available_bytes(device: str | torch.device = "cpu") -> int:
    """Bytes that can be taken on a device now: on a CPU the least of the machine's and the control groups'.

    Where the system doesn't tell, a number so large that nothing is refused.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return _UNKNOWN
    return min(_machine(), _control_groups())


def _machine() -> int:
    try:
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _UNKNOWN


def _control_groups() -> int:
    """What the process's control group and those around it leave: a batch system's limit is seldom the innermost."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return _UNKNOWN
    free = _UNKNOWN
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, *files = _VERSIONS[1 if controllers else 2]
        root = _CGROUP / folder
        group = root / path.lstrip("/")  # in a container it may not be there, but the root is the container's own
        for around in (group, *group.parents):
            if around.is_relative_to(root):
                free = min(free, _left(around, *files))
    return free


def _left(group: Path, limit: str, use: str, inactive: str) -> int:
    try:
        most = int((group / limit).read_text())  # "max" is no number
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - int((group / use).read_text()) + int(stat.get(inactive, 0)))
    except (OSError, ValueError):
        return _UNKNOWN


def human(nbytes: float) -> str:
    """`1.5 GB`: decimal units, as memory sizes are quoted."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
