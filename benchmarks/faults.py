"""python -m benchmarks.faults: ranks are killed, stopped and delayed amid a merge, and what is left is judged.

Every trial follows from its seed: the ranks, what they hold, the fault, its moment. This process has imported torch,
has no thread, and forks: a trial costs little but its time limits. After each one

- survivors agree: all raised, or all hold the exactly right result of plain torch; `MergeInDoubt` only where the store
  was lost, and then neither content nor delta has changed and the result that was kept is right;
- who raised has its delta and content as they were, byte for byte;
- nobody waited longer than twice `TIMEOUT_S`, the planted delay, and `SLACK_S` for a loaded machine;
- where the store lives, survivors go on in a group of their own, count nothing twice and lose nothing of theirs;
- a rank that was stopped learns, once it goes on, the same as the others; all processes end by themselves.

Exits with 1 where a trial was bad, and prints its seed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import distcache as dc
from distcache import codec, comm
from distcache import merge as merging

TIMEOUT_S = 2.0  # what each cache is given
SLACK_S = 6.0  # beyond the promised limits, because the machine may be loaded
SETUP_S = 60.0  # until all ranks stand before the merge
MOMENTS = ("arrive", "here", "agree", "move", "move", "rows", "rows", "built", "voted", "decided")
BY_THE_CLOCK = ("flight", "flight", "any")
FORK = multiprocessing.get_context("fork")


# -- a trial, from its seed ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What is done in one trial.

    `fault`: "kill", "stop" (until all is judged), "pause" (stop for `delay_s`), "sleep" (of the main thread alone), or
    "kill store", "stop store". `moment`: of the victim's merge. `count`: before which transfer of "move"; after how
    many half milliseconds of "flight", while transfers are in flight, or of "any", the whole merge. `store`: kept by a
    process of its own, as torchrun's agent does, or by rank 0. `blocks`: by block and rank the numbers of the samples;
    the fault is in the last but one.
    """

    seed: int
    world_size: int
    dst: int | Literal["shard"] | None
    bucket_bytes: int
    store: str
    fault: str
    victim: int
    moment: str
    count: int
    delay_s: float
    indexed: bool
    width: int
    odd: tuple[int, ...]  # ranks with a key of their own
    blocks: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def limit_s(self) -> float:
        """What nobody may wait longer than."""
        return 2 * TIMEOUT_S + self.delay_s + SLACK_S

    def says(self) -> str:
        """In a line, for a bad one."""
        counts = ("agree", "move", "flight", "any")
        where = f"{self.moment} {self.count}" if self.moment in counts else self.moment
        delay = f" for {self.delay_s:g} s" if self.delay_s else ""
        return (
            f"seed {self.seed}: {self.world_size} ranks, dst={self.dst!r}, store kept by {self.store}: {self.fault} "
            f"{'at' if 'store' in self.fault else 'of'} rank {self.victim}{delay}, {where}"
        )


def trial_of(seed: int, world_sizes: Sequence[int] = (2, 3, 4)) -> Trial:
    """The trial of a seed: nothing else decides what happens in it."""
    rng = random.Random(seed)
    world_size = rng.choice(world_sizes)
    fault = rng.choices(
        ["kill", "stop", "pause", "sleep", "kill store", "stop store"], weights=[35, 20, 10, 20, 10, 5]
    )[0]
    moment = rng.choice(MOMENTS if fault == "sleep" else (*MOMENTS, *BY_THE_CLOCK))  # a timer can't put others to sleep
    delay_s = TIMEOUT_S * rng.choice([0.2, 2.2]) if fault in ("pause", "sleep") else 0.0
    numbers = list(range(1000))
    rng.shuffle(numbers)
    blocks = []
    for _ in range(rng.randrange(3) + 2):
        blocks.append(
            tuple(tuple(numbers.pop() for _ in range(rng.choice([0, 1, 2, 3, 3]))) for _ in range(world_size))
        )
    trial = Trial(
        seed,
        world_size,
        rng.choice([None, rng.randrange(world_size)]),
        rng.choice([256, 1 << 20]),
        "rank 0" if "store" not in fault and rng.random() < 0.35 else "a process",
        fault,
        rng.randrange(world_size),
        moment,
        rng.randrange(40 if moment in BY_THE_CLOCK else 4),
        delay_s,
        rng.random() < 0.6,
        rng.choice([3, 200]),
        tuple(rank for rank in range(world_size) if rng.random() < 0.3),
        tuple(blocks),
    )
    return replace(trial, dst="shard") if rng.random() < 0.25 else trial


STRATEGIES: tuple[tuple[str, Any], ...] = (
    ("total", "sum"),
    ("average", "mean"),
    ("spread", "moments"),
    ("top", dc.TopK(2)),
    ("only_", "mean"),
)


# -- what ranks hold, and what plain torch says of it ----------------------------------------------------------


def sample(i: int, width: int) -> torch.Tensor:
    """Whole numbers, whose sums are exact."""
    return torch.arange(width, dtype=torch.float32) % 5 + i


def fold(cache: dc.DistributedCache, trial: Trial, rank: int, samples: Sequence[int]) -> None:
    for i in samples:
        x, local = sample(i, trial.width), dc.ActivationCache()
        local["total"], local["average"], local["spread"], local["rows"] = x, x, x, x[None]
        if trial.indexed:
            local["top"] = x
        local["names"] = [f"sample {i}"]
        if rank in trial.odd:
            local[f"only_{rank}"] = x
        cache.cat(local, index=[i] if trial.indexed else None)


Merges = Sequence[Sequence[tuple[int, Sequence[int]]]]  # of each, ranks in the group's order and their samples


def expected(trial: Trial, merges: Merges, shard_of: int | None = None) -> dict[str, Any]:
    """The values after these merges.

    `shard_of`: with the rows of this rank alone, as where dst="shard".
    """
    seen = [(rank, i) for merge in merges for rank, samples in merge for i in samples]
    if not seen:
        return {}
    order = sorted(i for _, i in seen) if trial.indexed else [i for _, i in seen]
    x_nd = torch.stack([sample(i, trial.width) for i in order])
    here = [i for i in order if shard_of is None or (shard_of, i) in seen]
    values: dict[str, Any] = {
        "total": x_nd.double().sum(0).float(),
        "average": x_nd.double().mean(0).float(),
        "spread": {"mean": x_nd.double().mean(0).float(), "count": torch.tensor(len(order))},
        "rows": torch.stack([x_nd[:0].sum(0), *(sample(i, trial.width) for i in here)])[1:],
        "names": [f"sample {i}" for i in order],
    }
    if len(order) > 1:
        values["spread"]["variance"] = x_nd.double().var(0).float()
    if trial.indexed:  # every element of a later sample is larger
        last, none = order[:-3:-1], 2 - len(order[:2])
        found = [*(sample(i, trial.width) for i in last), *[torch.full((trial.width,), torch.nan)] * none]
        names = torch.tensor([*last, *[-1] * none])
        values["top"] = {
            "values": torch.stack(found),
            "sample": names[:, None].expand(2, trial.width),
            "position": names.clamp(max=0)[:, None].expand(2, trial.width),
        }
    for rank in trial.odd:
        mine = [sample(i, trial.width) for r, i in seen if r == rank]
        if mine:
            values[f"only_{rank}"] = torch.stack(mine).double().mean(0).float()
    return values


REDUCED = ("total", "average", "spread", "top", "only_")


def unlike(found: dict[str, Any], right: dict[str, Any], shard: bool = False) -> list[str]:
    """In what values differ from what is right; moments alone have a tolerance, the promised 1e-6.

    `shard`: reductions may be held by another rank.
    """
    scale = float(right["average"].mean()) ** 2 + 1 if right else 1.0  # of what is positive
    if shard:
        right = {key: value for key, value in right.items() if key in found or not key.startswith(REDUCED)}
    if found.keys() != right.keys():
        return [f"keys {sorted(found)} for {sorted(right)}"]
    wrong = []
    for key, value in right.items():
        if isinstance(value, dict):
            same = all(
                torch.allclose(found[key][n].float(), x.float(), rtol=0, atol=1e-6 * scale, equal_nan=True)
                for n, x in value.items()
            )
        else:
            same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        if not same:
            wrong.append(f"{key}: {found[key]} for {value}"[:200])
    return wrong


# -- a rank ----------------------------------------------------------------------------------------------------


def begin() -> None:
    """Whatever becomes of whoever forked this process, it doesn't stay behind, not even stopped; and torch's words
    about lost connections, which are what is tried here, are left out."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    logging.getLogger("distcache").setLevel(logging.ERROR)
    sys.stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def keep_store(pipe: Connection) -> None:
    """A process that keeps the store, as torchrun's agent does."""
    begin()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    pipe.send(store.port)
    with contextlib.suppress(EOFError):
        pipe.recv()


def naive_commit(party_comm: Any, number: int, held: Any, merged: Any) -> None:
    """The mistake that the trials must find: whoever has finished its reductions takes the result."""
    held.adopt(merged)


PLANTED = {"naive": ("commit", naive_commit)}


class Fault:
    """The trial's fault, armed on the victim: it happens at one moment of the merge, once."""

    def __init__(self, trial: Trial, pipe: Connection, store_pid: int | None) -> None:
        self._trial, self._pipe, self._store_pid = trial, pipe, store_pid
        self._armed, self._over = threading.Lock(), threading.Event()
        self._timer: threading.Timer | None = None

    def strike(self) -> None:
        if not self._armed.acquire(blocking=False):  # once
            return
        self._pipe.send(("struck",))
        if self._trial.fault.endswith("store"):
            assert self._store_pid is not None
            os.kill(self._store_pid, signal.SIGKILL if self._trial.fault == "kill store" else signal.SIGSTOP)
        elif self._trial.fault == "sleep":
            time.sleep(self._trial.delay_s)
        else:
            os.kill(os.getpid(), signal.SIGKILL if self._trial.fault == "kill" else signal.SIGSTOP)
        self._over.set()

    def disarm(self) -> None:
        """The merge is over: what has not happened will not; what is happening ends first."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._armed.acquire(blocking=False):
            self._over.wait()

    def arm(self) -> None:
        """Wrap what the merge calls, in this process alone."""
        moment, count = self._trial.moment, self._trial.count
        if moment == "any":
            self._start_timer()
        elif moment == "flight":
            self._before(merging, "move", self._start_timer)
        elif moment == "arrive":
            self._before(merging, "arrive")
        elif moment == "here":
            self._after_adding("/count", 1)
        elif moment == "agree":
            self._before(comm.TorchComm, "gather" if count < 2 else "gather_bytes")
        elif moment == "move":
            left = itertools.count(-count)
            self._before(merging, "move", lambda: self._before_transfer(lambda transfer: next(left) == 0))
        elif moment == "rows":  # reductions are done, and this rank's rows aren't sent
            self._before(merging, "move", lambda: self._before_transfer(lambda transfer: transfer.op == "copy"))
        elif moment == "built":
            self._before(merging, "commit")
        elif moment == "voted":
            self._after_adding("/votes", 1)
        else:
            self._after(merging, "vote")

    def _start_timer(self) -> None:
        self._timer = threading.Timer(self._trial.count / 2e3, self.strike)
        self._timer.daemon = True
        self._timer.start()

    def _before(self, owner: Any, name: str, act: Callable[[], None] | None = None) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            (act or self.strike)()
            return real(*args)

        setattr(owner, name, wrapped)

    def _after(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            result = real(*args)
            self.strike()
            return result

        setattr(owner, name, wrapped)

    def _after_adding(self, what: str, least: int) -> None:
        real = comm.TorchStore.add

        def add(store: Any, key: str, amount: int) -> int:
            total = real(store, key, amount)
            if key.endswith(what) and amount >= least:
                self.strike()
            return total

        comm.TorchStore.add = add  # type: ignore

    def _before_transfer(self, which: Callable[[comm.Transfer], bool]) -> None:
        real = comm.TorchComm.run

        def run(self_: Any, transfers: Sequence[comm.Transfer], poll: Any) -> None:
            place = next((i for i, transfer in enumerate(transfers) if which(transfer)), len(transfers))
            real(self_, transfers[:place], poll)
            if place < len(transfers):
                self.strike()
                real(self_, transfers[place:], poll)

        comm.TorchComm.run = run  # type: ignore


def as_bytes(cache: dc.ActivationCache) -> bytes:
    """All of a cache, to the byte: states, rows, columns, registrations, notes, ledger."""
    return pickle.dumps(cache)


def _held(cache: dc.DistributedCache) -> Iterator[tuple[str, Any]]:
    """The content, as far as it lies here."""
    for key in cache:
        with contextlib.suppress(dc.HeldElsewhere):
            yield key, cache[key]


def run_rank(pipe: Connection, trial: Trial, rank: int, planted: str | None) -> None:
    """A rank from its first merge to the last; it is told by `pipe` when to go on, and tells what it has seen."""
    begin()
    keeps_store = trial.store == "rank 0" and rank == 0
    if keeps_store:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        pipe.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", pipe.recv(), None, False, timedelta(seconds=30), wait_for_workers=False)
    if planted is not None:
        setattr(merging, *PLANTED[planted])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=trial.world_size, timeout=timedelta(seconds=30))
    cache = dc.DistributedCache(dst=trial.dst, timeout_s=TIMEOUT_S, bucket_bytes=trial.bucket_bytes)
    for pattern, strategy in STRATEGIES:
        cache.register_aggregation(pattern, strategy)
    *before, last, extra = trial.blocks
    for block in before:
        with cache.deferred_mode():
            fold(cache, trial, rank, block[rank])

    fault, started, ended, kept = None, 0.0, "committed", None
    try:
        with cache.deferred_mode():
            fold(cache, trial, rank, last[rank])
            delta, content = as_bytes(cache._held.delta), as_bytes(cache._held.content)
            pipe.send(("ready",))
            store_pid = pipe.recv()
            if rank == trial.victim:
                fault = Fault(trial, pipe, store_pid)
                fault.arm()
            started = time.monotonic()
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
        kept = getattr(error, "merged", None)
    waited_s = time.monotonic() - started
    if fault is not None:
        fault.disarm()
    unchanged = as_bytes(cache._held.delta) == delta and as_bytes(cache._held.content) == content
    holds = trial.dst in (None, rank, "shard")
    values = dict(_held(cache)) if holds else None
    in_doubt = dict(kept.content.items()) if kept is not None and holds else None
    pipe.send(("ended", ended, waited_s, unchanged, len(cache.delta), codec.encode([values, in_doubt])))

    while (order := pipe.recv()) is not None:
        survivors, anew = order
        try:
            if len(survivors) < trial.world_size:
                cache.merge(dist.new_group(survivors, use_local_synchronization=True))
            else:
                if anew:
                    cache.rejoin()
                cache.merge()
            with cache.deferred_mode():
                fold(cache, trial, rank, extra[rank])
            values = dict(_held(cache)) if cache.dst in (None, cache.rank, "shard") else None
            pipe.send(("went on", "", codec.encode(values)))
        except Exception as error:
            pipe.send(("went on", f"{type(error).__name__}: {error}", codec.encode(None)))
    cache.close()


# -- judging ---------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one rank told."""

    ended: str
    waited_s: float
    unchanged: bool
    delta_keys: int
    values: dict[str, Any] | None
    in_doubt: dict[str, Any] | None

    @property
    def committed(self) -> bool:
        return self.ended == "committed"


@dataclass
class Verdict:
    """How a trial ended ("committed", "aborted" or "in doubt"), the longest wait, and what was wrong."""

    trial: Trial
    ended: str = "not begun"
    struck: bool = False  # the moment came
    waited_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Ranks:
    """A trial's processes and what they say. Leaving the context ends them by their ids, come what may."""

    def __init__(self, trial: Trial, planted: str | None) -> None:
        self.trial = trial
        self.struck = False
        self.silent: set[int] = set()  # ranks that will say no more, or not before they go on
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._wake_at = float("inf")
        self.store: Any = None
        try:
            if trial.store == "a process":
                self.store, self._store_pipe = self._fork(keep_store)
                port = self._store_pipe.recv()
            for rank in range(trial.world_size):
                process, pipe = self._fork(run_rank, trial, rank, planted)
                self.processes.append(process)
                self._pipes.append(pipe)
                if self.store is None and rank == 0:
                    port = pipe.recv()
                else:
                    pipe.send(port)
        except BaseException:
            self.__exit__()
            raise

    @staticmethod
    def _fork(function: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=function, args=(theirs, *args))
        process.start()
        theirs.close()
        return process, ours

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.processes, *([] if self.store is None else [self.store])]:
            if process.is_alive():  # a stopped one is
                os.kill(process.pid, signal.SIGCONT)
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def tell(self, ranks: Sequence[int], what: Any) -> None:
        for rank in ranks:
            with contextlib.suppress(OSError):
                self._pipes[rank].send(what)

    def hear(self, ranks: Sequence[int], what: str, limit_s: float) -> dict[int, tuple[Any, ...]]:
        """What ranks say under the heading `what`, by rank: of all that are not silent, within the limit."""
        found: dict[int, tuple[Any, ...]] = {}
        deadline = time.monotonic() + limit_s
        while (awaited := set(ranks) - found.keys() - self.silent) and (now := time.monotonic()) < deadline:
            if now >= self._wake_at:
                os.kill(self.processes[self.trial.victim].pid, signal.SIGCONT)
                self._wake_at = float("inf")
            by_pipe = {self._pipes[rank]: rank for rank in awaited}
            for pipe in wait(list(by_pipe), min(deadline, self._wake_at) - now):
                assert isinstance(pipe, Connection)
                rank = by_pipe[pipe]
                try:
                    heading, *said = pipe.recv()
                except (EOFError, OSError):
                    self.silent.add(rank)
                    continue
                if heading == what:
                    found[rank] = tuple(said)
                elif heading == "struck":
                    self._note_strike()
        return found

    def _note_strike(self) -> None:
        self.struck = True
        if self.trial.fault in ("kill", "stop"):
            self.silent.add(self.trial.victim)
        elif self.trial.fault == "pause":
            self._wake_at = time.monotonic() + self.trial.delay_s

    def wake(self) -> None:
        """Let the victim, or the store, go on."""
        process = self.store if "store" in self.trial.fault else self.processes[self.trial.victim]
        os.kill(process.pid, signal.SIGCONT)
        self.silent.discard(self.trial.victim)


def run_trial(trial: Trial, planted: str | None = None) -> Verdict:
    """Do what a trial says, and judge what comes of it."""
    verdict = Verdict(trial)
    everyone = range(trial.world_size)
    limit_s = trial.limit_s
    *before, last, extra = [list(enumerate(block)) for block in trial.blocks]
    with Ranks(trial, planted) as ranks:
        if len(ranks.hear(everyone, "ready", SETUP_S)) < trial.world_size:
            verdict.wrong.append("not all ranks came as far as the merge")
            return verdict
        ranks.tell(everyone, None if ranks.store is None else ranks.store.pid)
        seen = _seen(ranks.hear(everyone, "ended", limit_s))
        lost = {trial.victim} if ranks.struck and trial.fault in ("kill", "stop") else set()
        survivors = sorted(set(everyone) - lost)
        at_store = ranks.struck and (
            "store" in trial.fault or (trial.store == "rank 0" and trial.victim == 0 and trial.fault != "sleep")
        )
        verdict.struck = ranks.struck
        verdict.wrong += [f"rank {r} did not end within {limit_s:g} s, or died" for r in survivors if r not in seen]
        verdict.wrong += _judge(trial, seen, at_store, [*before, last])
        verdict.ended = _ending(seen)
        verdict.waited_s = max((one.waited_s for one in seen.values()), default=0.0)
        if not verdict.wrong and not (at_store and trial.fault in ("kill", "stop", "kill store")):
            if trial.fault == "stop store" and at_store:
                ranks.wake()
            ranks.tell(survivors, (survivors, at_store))
            committed = any(one.committed for one in seen.values())
            merges = [*before, last if committed else [last[r] for r in survivors], [extra[r] for r in survivors]]
            went_on = ranks.hear(survivors, "went on", SETUP_S)
            verdict.wrong += _judge_going_on(trial, survivors, went_on, merges, committed)
        if trial.fault == "stop" and lost:
            ranks.wake()
            woken = _seen(ranks.hear([trial.victim], "ended", limit_s))
            if not woken:
                verdict.wrong.append(f"rank {trial.victim} did not end within {limit_s:g} s after it went on, or died")
            verdict.wrong += _judge(trial, {**seen, **woken}, at_store, [*before, last])
        ranks.tell(everyone, None)
        for rank, process in enumerate(ranks.processes):
            process.join(SLACK_S)
            if process.exitcode != 0 and not (rank in lost and trial.fault == "kill"):
                verdict.wrong.append(f"rank {rank} did not end by itself: exit code {process.exitcode}")
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        verdict.wrong.append("a process was left behind")
    return verdict


def _seen(told: dict[int, tuple[Any, ...]]) -> dict[int, Seen]:
    return {rank: Seen(*said[:-1], *codec.decode(said[-1])) for rank, said in told.items()}


def _ending(seen: dict[int, Seen]) -> str:
    if any(one.ended.startswith("MergeInDoubt") for one in seen.values()):
        return "in doubt"
    return "committed" if any(one.committed for one in seen.values()) else "aborted"


def _judge(trial: Trial, seen: dict[int, Seen], at_store: bool, merges: Merges) -> list[str]:
    """What is wrong with how ranks ended the merge; `merges`: all that there were if it was committed."""
    wrong = []
    committed = [rank for rank, one in seen.items() if one.committed]
    for rank, one in seen.items():
        holds = trial.dst in (None, rank, "shard")
        kind = one.ended.split(":")[0]
        if one.committed:
            wrong += [
                f"rank {rank} holds {what}" for what in (_amiss(trial, rank, one.values, merges) if holds else [])
            ]
            if one.delta_keys:
                wrong.append(f"rank {rank} has committed and keeps a delta of {one.delta_keys} keys")
            continue
        if not one.unchanged:
            wrong.append(f"rank {rank} raised, and its delta or content has changed: {one.ended}")
        if kind == "MergeInDoubt":
            if not at_store:
                wrong.append(f"rank {rank} is in doubt, and the store lives")
            kept = _amiss(trial, rank, one.in_doubt, merges) if holds else []
            wrong += [f"rank {rank} kept {what}" for what in kept]
        elif kind not in ("PeerFailed", "MergeAborted"):
            wrong.append(f"rank {rank} raised {one.ended[:300]}")
        elif committed:
            wrong.append(f"ranks {committed} have committed, rank {rank} has not: {one.ended[:300]}")
    for rank, one in seen.items():
        stood_still = trial.fault == "stop" and rank == trial.victim
        if one.waited_s > trial.limit_s and not stood_still:
            wrong.append(f"rank {rank} waited {one.waited_s:.1f} s, beyond {trial.limit_s:g} s")
    return wrong + _owned(trial, {rank: seen[rank].values for rank in committed}, merges)


def _amiss(trial: Trial, rank: int, found: dict[str, Any] | None, merges: Merges) -> list[str]:
    """What is wrong with what one rank holds."""
    shard = trial.dst == "shard"
    return unlike(found or {}, expected(trial, merges, rank if shard else None), shard)


def _owned(trial: Trial, held: dict[int, dict[str, Any] | None], merges: Merges) -> list[str]:
    """What is wrong with who holds what, where reductions lie in shards: each on one rank, or on one that is lost."""
    if trial.dst != "shard" or not held:
        return []
    owners = Counter(key for values in held.values() for key in values or {} if key.startswith(REDUCED))
    wrong = [f"{key} is held by {count} ranks" for key, count in owners.items() if count > 1]
    lost = expected(trial, merges).keys() - owners.keys() if len(held) == trial.world_size else set()
    return wrong + [f"{key} is held by no rank" for key in sorted(lost) if key.startswith(REDUCED)]


def _judge_going_on(
    trial: Trial, survivors: list[int], went_on: dict[int, tuple[Any, ...]], merges: Merges, committed: bool
) -> list[str]:
    """What is wrong with how the survivors merged again, and once more."""
    dst = trial.dst
    refused = ""
    if dst == "shard":
        if len(survivors) < trial.world_size and (len(trial.blocks) > 2 or committed):
            refused = "ValueError: the content lies in shards"
    elif dst is not None and dst in survivors:
        dst = survivors.index(dst)
    elif dst is not None:
        if len(trial.blocks) > 2 or committed:
            refused = "ValueError: the content was held by"
        elif dst >= len(survivors):
            refused = "ValueError: dst="
    wrong = [f"rank {rank} did not merge again, or died" for rank in survivors if rank not in went_on]
    held = {}
    for place, rank in enumerate(survivors):
        error, found = went_on.get(rank, (refused, codec.encode({})))
        if refused or error:
            if not refused or not error.startswith(refused):
                wrong.append(f"rank {rank} could not merge again: {error[:500] or 'it did'}")
        elif dst in (None, place, "shard") and rank in went_on:
            held[rank] = codec.decode(found)
            wrong += [f"rank {rank}, later, holds {what}" for what in _amiss(trial, rank, held[rank], merges)]
    return wrong + _owned(trial, held, merges)


# -- many trials -----------------------------------------------------------------------------------------------


def run_trials(trials: Sequence[Trial], at_once: int, planted: str | None = None) -> Iterator[Verdict]:
    """Verdicts, as trials end; each is a process of its own, `at_once` at a time."""
    waiting, running = list(reversed(trials)), dict[Connection, tuple[Any, Trial]]()

    def judge(pipe: Connection, trial: Trial) -> None:
        begin()
        pipe.send(run_trial(trial, planted))

    while waiting or running:
        while waiting and len(running) < at_once:
            trial = waiting.pop()
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=judge, args=(theirs, trial))
            process.start()
            theirs.close()
            running[ours] = (process, trial)
        for pipe in wait(list(running)):
            assert isinstance(pipe, Connection)
            process, trial = running.pop(pipe)
            try:
                yield pipe.recv()
            except EOFError:
                yield Verdict(trial, wrong=["the trial itself failed: see above"])
            process.join()


def show(verdicts: Sequence[Verdict]) -> None:
    """A table by fault."""
    table = Table(title=f"{len(verdicts)} trials, limits of {TIMEOUT_S:g} s")
    for column in ("fault", "trials", "struck", "committed", "aborted", "in doubt", "longest wait s", "bad"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for fault in [*sorted({v.trial.fault for v in verdicts}), "all"]:
        some = [v for v in verdicts if fault in (v.trial.fault, "all")]
        ended = Counter(v.ended for v in some)
        numbers = [len(some), sum(v.struck for v in some), *(ended[e] for e in ("committed", "aborted", "in doubt"))]
        waited_s = max((v.waited_s for v in some), default=0.0)
        bad = sum(bool(v.wrong) for v in some)
        table.add_row(fault, *map(str, numbers), f"{waited_s:.1f}", str(bad), end_section=fault != "all")
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next has the next")
    parser.add_argument("--seeds", type=int, nargs="+", help="these trials alone")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--at-once", type=int, default=2, help="trials at a time: they mostly wait")
    parser.add_argument("--planted", choices=list(PLANTED), help="a mistake that the trials should find")
    parser.add_argument("--json", action="store_true", help="one line for each trial, for programs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Torch's store asks the resolver for the name of whoever connects, and answers nobody meanwhile: five seconds
    # where a name server is slow.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    seeds = args.seeds or range(args.seed, args.seed + args.trials)
    verdicts = []
    for verdict in run_trials([trial_of(seed, args.ranks) for seed in seeds], args.at_once, args.planted):
        verdicts.append(verdict)
        if args.json:
            print(json.dumps(asdict(verdict)), flush=True)
        elif verdict.wrong:
            print("\n  ".join([verdict.trial.says(), *verdict.wrong]), flush=True)
    if not args.json:
        show(verdicts)
    return int(any(verdict.wrong for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
