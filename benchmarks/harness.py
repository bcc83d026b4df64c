"""Candidates that do the same work, in turn, on ranks: the slowest rank's time, the median of all that were taken."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

WARM_UPS = 2  # a merge has its room and its scratch from the third time on

Prepare = Callable[[], None]
Run = Callable[[], Any]


@dataclass
class Candidate:
    """One way to do a workload.

    `prepare` is called before each timed `run` and isn't timed. `check` is given what `run` returned, once.
    """

    name: str
    run: Run
    prepare: Prepare = lambda: None
    check: Callable[[Any], None] | None = None
    rounds: int | None = None  # fewer for what takes seconds
    repeats: int = 1  # in each round: more for what takes milliseconds, in which a machine's moods count


@dataclass
class Timings:
    """Milliseconds of one candidate, of the slowest rank, after the warm-ups.

    `first`: of its first run. `peak_mib`: what its second took at most beyond what the process held, on the rank that
    took most.
    """

    name: str
    milliseconds: list[float] = field(default_factory=list)
    first: float | None = None
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def best(self) -> float:
        return min(self.milliseconds)


def time_on_rank(
    candidates: list[Candidate], rounds: int, device: torch.device
) -> tuple[list[list[float]], list[float | None]]:
    """Milliseconds of this rank, by candidate and time, the first two of which warm up; and by candidate the MiB that
    its second run took at most beyond what the process held before it.
    """
    found: list[list[float]] = [[] for _ in candidates]
    peaks: list[float | None] = [None] * len(candidates)
    for number in range(rounds + WARM_UPS):
        for place, (candidate, times) in enumerate(zip(candidates, found, strict=True)):
            if number >= (candidate.rounds or rounds) + WARM_UPS:
                continue
            for _ in range(candidate.repeats if number >= WARM_UPS else 1):
                result, peak = _timed(candidate, device, times)
                peaks[place] = peak if len(times) == 2 else peaks[place]
                if len(times) == 1 and candidate.check is not None:
                    try:
                        candidate.check(result)
                    except AssertionError as error:
                        raise AssertionError(f"{candidate.name} is wrong: {error}") from error
                del result
    return found, peaks


def _timed(candidate: Candidate, device: torch.device, times: list[float]) -> tuple[Any, float | None]:
    gc.collect()
    candidate.prepare()
    before = _forget_peak(device)
    barrier(device)
    start = time.perf_counter()
    result = candidate.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    times.append((time.perf_counter() - start) * 1e3)
    peak = _peak_mib(device)
    return result, None if peak is None or before is None else peak - before


def _forget_peak(device: torch.device) -> float | None:
    """MiB that this process, or the device, holds now; the highest so far is forgotten. None where that isn't known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _status_mib("VmRSS")


def _peak_mib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status_mib("VmHWM")


def _status_mib(name: str) -> float | None:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return None


def barrier(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def slowest(by_rank: list[list[list[float]]]) -> list[list[float]]:
    """By candidate and time the slowest rank's."""
    return [[max(times) for times in zip(*ranks, strict=True)] for ranks in zip(*by_rank, strict=True)]


def torchrun_environment(rank: int, world_size: int) -> None:
    """What torchrun would have set: some peers look for it, and one gives every rank all cores where it isn't there."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
