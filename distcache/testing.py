"""Run a function on ranks, in warm worker processes: the harness of our tests, shipped for those who write strategies.

    with RankPool() as pool:
        outcomes = pool.run(world_size, function, *args)   # function(rank, world_size, *args) on every rank

The caller keeps the store, as torchrun's agent does, so that it outlives every rank, and every wait has a limit.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rank ended: with `value`, with `error` ("PeerFailed: …") and its traceback, or dead (both None)."""

    rank: int
    value: Any = None
    error: str | None = None
    traceback: str | None = None
    died: bool = False


class RankFailed(AssertionError):
    """A rank raised, died or took too long; the message holds its traceback."""


class RankPool:
    """Worker processes that have imported torch once and are used for one job after the other."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["distcache", "distcache.testing"])
        self._idle: list[tuple[Any, Connection]] = []
        self._jobs = itertools.count()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        for process, pipe in self._idle:
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._idle.clear()

    def _worker(self) -> tuple[Any, Connection]:
        if self._idle:
            return self._idle.pop()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._store.port), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def outcomes(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60
    ) -> list[Outcome]:
        """Run `function(rank, world_size, *args)` on ranks with a gloo process group; how each of them ended.

        A rank that is still at it after `timeout_s` is killed, and `RankFailed` raised.
        """
        job = next(self._jobs)
        workers = [self._worker() for _ in range(world_size)]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((job, rank, world_size, function, args))
        found: dict[int, Outcome] = {}
        by_pipe = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
        deadline = time.monotonic() + timeout_s
        while len(found) < world_size and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([p for p, rank in by_pipe.items() if rank not in found], left):
                assert isinstance(pipe, Connection)
                rank = by_pipe[pipe]
                try:
                    value, error, trace = pipe.recv()
                    found[rank] = Outcome(rank, value, error, trace)
                except (EOFError, ConnectionResetError):
                    found[rank] = Outcome(rank, died=True)
        late = [rank for rank in range(world_size) if rank not in found]
        for rank, (process, pipe) in enumerate(workers):
            # A rank that raised may have left its groups in pieces: a fresh worker is cheap.
            if rank in found and not found[rank].died and found[rank].error is None:
                self._idle.append((process, pipe))
            else:
                process.kill()
                process.join(10)
                pipe.close()
        if late:
            ended = "\n".join(f"rank {o.rank}: {o.traceback or o.value or 'died'}" for o in found.values())
            raise RankFailed(f"rank(s) {late} of {world_size} did not end within {timeout_s:g} s.\n{ended}")
        return [found[rank] for rank in range(world_size)]

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
        """As `outcomes`, for functions that must succeed: their values, by rank. `RankFailed` with every traceback."""
        ended = self.outcomes(world_size, function, *args, timeout_s=timeout_s)
        failed = [o for o in ended if o.error is not None or o.died]
        if failed:
            raise RankFailed("\n".join(f"rank {o.rank} of {world_size}: {o.traceback or 'died'}" for o in failed))
        return [o.value for o in ended]


def _work(pipe: Connection, port: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), wait_for_workers=False)
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):
            return
        if item is None:
            return
        job, rank, world_size, function, args = item
        try:
            with joined(dist.PrefixStore(f"job{job}", store), rank, world_size):
                answer = (function(rank, world_size, *args), None, None)
        except BaseException as error:
            answer = (None, f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return
        except Exception as error:  # a value that can't be sent
            pipe.send((None, f"{type(error).__name__}: {error}", traceback.format_exc()))


@contextlib.contextmanager
def joined(store: dist.Store, rank: int, world_size: int, timeout_s: float = 30) -> Iterator[None]:
    """A gloo process group over `store`, always destroyed."""
    if world_size == 1:
        yield
        return
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def kill_self(how: int = signal.SIGKILL) -> None:
    """End this process as an out-of-memory killer would, or stop it with SIGSTOP."""
    os.kill(os.getpid(), how)


def splits(num_samples: int, world_size: int) -> Sequence[tuple[int, ...]]:
    """Ways to deal samples to ranks that tell averages of averages from averages: even, uneven, with idle ranks."""
    if world_size == 1:
        return [(num_samples,)]
    even = [num_samples // world_size] * world_size
    even[0] += num_samples - sum(even)
    one_each = [1] * (world_size - 1)
    return [tuple(even), (num_samples - len(one_each), *one_each), (*[0] * (world_size - 1), num_samples)]
