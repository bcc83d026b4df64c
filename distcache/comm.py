"""The one seam to other ranks: collectives with a time limit on buffers of ours, and a store that decides.

Alone in the package this module calls torch.distributed. A `Communicator` owns private process groups over
the ranks it was given, so that a merge that fails never puts the model's own collectives out of step, and
`LocalComm` is the same thing for one process. Nothing here waits longer than it was told to.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("distcache")

ProcessGroup = dist.ProcessGroup
Store = dist.Store

Poll = Callable[[], None]
"""Called while a rank waits; raises to stop the waiting."""

IN_FLIGHT = 4  # collectives at a time; gloo runs two at once and queues the rest


class StoreLost(RuntimeError):
    """The store no longer answers within the time limit."""


class CommFailed(RuntimeError):
    """A collective failed or made no progress; the private groups are spent and must be made anew."""


# -- the store -------------------------------------------------------------------------------------------------


class DecisionStore(abc.ABC):
    """Small keys and values that all ranks see. Every call returns or raises `StoreLost` within the limit."""

    @abc.abstractmethod
    def set(self, key: str, value: bytes) -> None: ...

    @abc.abstractmethod
    def get(self, key: str) -> bytes | None:
        """The value, or None if the key was never set."""

    @abc.abstractmethod
    def add(self, key: str, amount: int) -> int:
        """The counter's value after adding."""

    @abc.abstractmethod
    def decide(self, key: str, value: bytes) -> bytes:
        """Set the key if nobody has; the value that stands: the one compare-and-set that everybody obeys."""

    @abc.abstractmethod
    def delete(self, key: str) -> None: ...


class LocalStore(DecisionStore):
    """A dict, for one process."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._held[key] = value

    def get(self, key: str) -> bytes | None:
        return self._held.get(key)

    def add(self, key: str, amount: int) -> int:
        total = int(self._held.get(key, b"0")) + amount
        self._held[key] = str(total).encode()
        return total

    def decide(self, key: str, value: bytes) -> bytes:
        return self._held.setdefault(key, value)

    def delete(self, key: str) -> None:
        self._held.pop(key, None)


class TorchStore(DecisionStore):
    """A torch store under a prefix. A thread of its own makes the calls, because a call to a stopped server
    would not come back.
    """

    def __init__(self, store: dist.Store, limit_s: float) -> None:
        self._store = store
        self._limit_s = limit_s
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None] = queue.SimpleQueue()
        self._lost: str | None = None
        thread = threading.Thread(target=_serve, args=(self._calls,), name="distcache-store", daemon=True)
        thread.start()
        weakref.finalize(self, self._calls.put, None)

    def _call(self, call: Callable[[], Any]) -> Any:
        if self._lost is not None:
            raise StoreLost(self._lost)
        answer = _Answer()
        self._calls.put((call, answer))
        if not answer.ready.wait(self._limit_s):
            self._lost = f"the store did not answer within {self._limit_s:g} s"
            raise StoreLost(self._lost)
        if answer.error is not None:
            self._lost = f"the store failed: {_one_line(answer.error)}"
            raise StoreLost(self._lost) from answer.error
        return answer.value

    def set(self, key: str, value: bytes) -> None:
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes | None:
        return self._call(lambda: self._store.get(key) if self._store.check([key]) else None)

    def add(self, key: str, amount: int) -> int:
        return int(self._call(lambda: self._store.add(key, amount)))

    def decide(self, key: str, value: bytes) -> bytes:
        # torch's compare_set returns the value that stands, ours or an earlier one.
        found = self._call(lambda: self._store.compare_set(key, "", value.decode()))
        return bytes(found)

    def delete(self, key: str) -> None:
        self._call(lambda: self._store.delete_key(key))


class _Answer:
    __slots__ = ("error", "ready", "value")

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.value: Any = None
        self.error: Exception | None = None


def _serve(calls: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None]) -> None:
    while (item := calls.get()) is not None:
        call, answer = item
        try:
            answer.value = call()
        except Exception as error:
            answer.error = error
        answer.ready.set()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


# -- signs of life ---------------------------------------------------------------------------------------------


class Heart:
    """Beats in the store so that peers can tell a slow rank from a dead one, and watches for a decision.

    A daemon thread: it beats while the main thread computes, and stops with the process.
    """

    def __init__(self, store: DecisionStore, rank: int, world_size: int, timeout_s: float) -> None:
        self.interval_s = min(1.0, timeout_s / 10)
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._watched: str | None = None
        self.decision: bytes | None = None
        self._stop = threading.Event()
        self._peers: dict[int, tuple[bytes | None, float]] = {}
        self._thread = threading.Thread(target=self._beat, name="distcache-heart", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beats = 0
        while not self._stop.is_set():
            try:
                beats += 1
                self._store.set(f"heart/{self.rank}", str(beats).encode())
                watched = self._watched
                if watched is not None and self.decision is None:
                    found = self._store.get(watched)
                    if found is not None and watched == self._watched:
                        self.decision = found
            except StoreLost:
                return  # whoever needs the store next finds out by itself
            self._stop.wait(self.interval_s)

    def watch(self, key: str | None) -> None:
        """Look for this decision from now on; `decision` holds it once somebody made it."""
        self._watched, self.decision = key, None

    def silent_s(self, peer: int) -> float:
        """Seconds since this rank last saw the peer's heart move; the first look counts as a sign of life."""
        now = time.monotonic()
        beat = self._store.get(f"heart/{peer}")
        if beat == b"left":
            return float("inf")
        known = self._peers.get(peer)
        if known is None or known[0] != beat:
            self._peers[peer] = (beat, now)
            return 0.0
        return now - known[1]

    def stop(self) -> None:
        """Stop, and say that this rank has left, so that nobody waits for it."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(5 * self.interval_s)
        with contextlib.suppress(StoreLost):
            self._store.set(f"heart/{self.rank}", b"left")


# -- communicators ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective on one contiguous buffer.

    `op`: `"sum" | "max" | "min"` reduce it over ranks, onto `root` only where that is a rank;
    `"copy"` gives every rank (or `to` alone) what `root` has in it.
    """

    buffer: Tensor
    op: str
    root: int | None = None
    to: int | None = None


class Communicator(abc.ABC):
    """What the merge needs of other ranks. Every method but `close` is a collective over the group."""

    rank: int
    world_size: int
    timeout_s: float
    store: DecisionStore
    heart: Heart | None = None
    broken: bool = False

    @abc.abstractmethod
    def gather(self, row: Sequence[int], poll: Poll) -> list[list[int]]:
        """Every rank's row of int64, all of one length, by rank."""

    @abc.abstractmethod
    def gather_bytes(self, blob: bytes, sizes: Sequence[int], poll: Poll) -> list[bytes]:
        """Every rank's bytes, by rank; `sizes` is what all ranks know of their lengths."""

    @abc.abstractmethod
    def run(self, transfers: Sequence[Transfer], poll: Poll) -> None:
        """Make all transfers, several in flight. `CommFailed` where one fails or `timeout_s` passes without progress.

        The buffers are contiguous and stay untouched by others until this returns; after an error they are
        parked until their operations have ended.
        """

    @abc.abstractmethod
    def rebuild(self, generation: str) -> None:
        """Fresh private groups, after the old ones were spent."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave: not a collective. Peers that still wait for this rank are told."""


class LocalComm(Communicator):
    """One process: every collective is the identity."""

    def __init__(self, timeout_s: float = 120) -> None:
        self.rank, self.world_size, self.timeout_s = 0, 1, timeout_s
        self.store = LocalStore()

    def gather(self, row: Sequence[int], poll: Poll) -> list[list[int]]:
        return [list(row)]

    def gather_bytes(self, blob: bytes, sizes: Sequence[int], poll: Poll) -> list[bytes]:
        return [blob]

    def run(self, transfers: Sequence[Transfer], poll: Poll) -> None:
        for transfer in transfers:
            assert transfer.buffer.is_contiguous()

    def rebuild(self, generation: str) -> None:
        return

    def close(self) -> None:
        return


class TorchComm(Communicator):
    """Private process groups over a torch store: gloo for CPU tensors, NCCL for CUDA ones where it's there.

    The constructor is a collective over `ranks`, within `timeout_s`. `RuntimeError` where the store can't
    compare and set (torch's FileStore can't).
    """

    def __init__(
        self, store: dist.Store, ranks: Sequence[int], rank: int, timeout_s: float, nccl: bool = False
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, len(ranks), timeout_s
        # Each rank counts its own constructor calls over these ranks; as they are collectives, all count alike.
        name = f"distcache/{'.'.join(map(str, ranks))}"
        number = store.add(f"{name}/made/{rank}", 1)
        self._base = dist.PrefixStore(f"{name}/{number}", store)
        self._nccl = nccl
        self._parked: list[tuple[Any, list[Any], list[Any]]] = []
        self.store = TorchStore(dist.PrefixStore("decide", self._base), timeout_s)
        try:
            self.store.decide("able", b"yes")
        except StoreLost as error:
            raise RuntimeError(
                f"the store of this job ({type(store).__name__}) cannot be used: {error}. Pass one that can compare "
                "and set, such as torch's TCPStore, or run under torchrun, whose agent keeps one."
            ) from error
        self._open("0")
        self.heart = Heart(self.store, rank, self.world_size, timeout_s)
        self._leave = weakref.finalize(self, Heart.stop, self.heart)

    def _open(self, generation: str) -> None:
        limit = timedelta(seconds=self.timeout_s)
        store = dist.PrefixStore(f"group/{generation}", self._base)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self.rank, self.world_size, limit)
        self._device_group: Any = None
        if self._nccl:
            # The default is to end the process when a collective times out; a merge wants an error instead.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._device_group = dist.ProcessGroupNCCL(
                dist.PrefixStore("nccl", store), self.rank, self.world_size, options
            )
        self.broken = False

    def rebuild(self, generation: str) -> None:
        self._parked.append(((self._gloo, self._device_group), [], []))  # its destructor would wait for its operations
        try:
            self._open(generation)
        except RuntimeError as error:
            self.broken = True
            raise CommFailed(f"could not connect to all ranks again: {_one_line(error)}") from error

    def close(self) -> None:
        self._leave()

    def gather(self, row: Sequence[int], poll: Poll) -> list[list[int]]:
        mine = torch.tensor(row, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._await(deque([lambda: self._gloo.allgather([everyone], [mine])]), [mine, everyone], poll)
        return [theirs.tolist() for theirs in everyone]

    def gather_bytes(self, blob: bytes, sizes: Sequence[int], poll: Poll) -> list[bytes]:
        buffers = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        if blob:
            buffers[self.rank].copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8))
        self.run([Transfer(b, "copy", root=r) for r, b in enumerate(buffers) if len(b)], poll)
        return [buffer.numpy().tobytes() for buffer in buffers]

    def run(self, transfers: Sequence[Transfer], poll: Poll) -> None:
        starts: deque[Callable[[], Any]] = deque()
        kept: list[Any] = []
        staged: list[tuple[Tensor, Tensor]] = []
        for transfer in transfers:
            buffer = transfer.buffer
            assert buffer.is_contiguous()
            if not buffer.numel() or (transfer.to is not None and self.rank not in (transfer.root, transfer.to)):
                continue
            if buffer.is_cuda and self._device_group is None:  # CUDA states in a gloo job
                on_cpu = buffer.cpu()
                staged.append((buffer, on_cpu))
                buffer = on_cpu
            kept.append(buffer)
            starts.append(self._start(transfer, buffer))
        self._await(starts, kept, poll)
        for buffer, on_cpu in staged:
            buffer.copy_(on_cpu)

    def _start(self, transfer: Transfer, buffer: Tensor) -> Callable[[], Any]:
        group = self._device_group if buffer.is_cuda else self._gloo
        if transfer.op == "copy" and transfer.to is not None:
            if self.rank == transfer.root:
                return lambda: group.send([buffer], transfer.to, 0)
            return lambda: group.recv([buffer], transfer.root, 0)
        if transfer.op == "copy":
            spread = dist.BroadcastOptions()
            spread.rootRank, spread.rootTensor = transfer.root or 0, 0
            return lambda: group.broadcast([buffer], spread)
        reduction = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[transfer.op]
        if transfer.root is not None:
            onto = dist.ReduceOptions()
            onto.reduceOp, onto.rootRank, onto.rootTensor = reduction, transfer.root, 0
            return lambda: group.reduce([buffer], onto)
        everywhere = dist.AllreduceOptions()
        everywhere.reduceOp = reduction
        return lambda: group.allreduce([buffer], everywhere)

    def _await(self, starts: deque[Callable[[], Any]], kept: list[Any], poll: Poll) -> None:
        flying: deque[Any] = deque()
        progress = time.monotonic()
        nap_s, polled = 0.0, progress
        try:
            while starts or flying:
                while starts and len(flying) < IN_FLIGHT:
                    flying.append(starts.popleft()())
                    progress = time.monotonic()
                if flying[0].is_completed():
                    flying.popleft().wait()  # raises what went wrong
                    progress, nap_s = time.monotonic(), 0.0
                    continue
                now = time.monotonic()
                if now - progress > self.timeout_s:
                    raise CommFailed(f"no progress for {self.timeout_s:g} s with all ranks there")
                if now - polled > 0.02:
                    polled = now
                    poll()
                time.sleep(nap_s)
                nap_s = min(0.002, nap_s + 0.00002)
        except BaseException as error:
            # Operations may still write: buffers and group are parked until the process forgets them.
            self.broken = True
            self._parked.append((self._gloo, list(flying), kept))
            if isinstance(error, RuntimeError) and not isinstance(error, CommFailed) and type(error) in _COMM_ERRORS:
                raise CommFailed(_one_line(error)) from error
            raise


_COMM_ERRORS = {
    RuntimeError,
    dist.DistError,
    dist.DistBackendError,
    dist.DistNetworkError,
    dist.DistStoreError,
}


def open_comm(
    group: dist.ProcessGroup | None = None, store: dist.Store | None = None, timeout_s: float = 120
) -> Communicator:
    """A communicator over a group, over all ranks, or for this process alone. A collective over the group."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("a group was given, but torch.distributed is not initialised: enter dc.init() first.")
        return LocalComm(timeout_s)
    ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
    if dist.get_rank() not in ranks:
        raise ValueError(f"rank {dist.get_rank()} is not in the group {ranks}: make the cache on its ranks only.")
    if len(ranks) == 1:
        return LocalComm(timeout_s)
    nccl = "nccl" in dist.get_backend_config(group)
    store = store if store is not None else dist.distributed_c10d._get_default_store()
    return TorchComm(store, ranks, ranks.index(dist.get_rank()), timeout_s, nccl)


@dataclass(frozen=True, slots=True)
class Job:
    """Where this process stands: `rank` of `world_size`, and the device its model belongs on."""

    rank: int
    world_size: int
    device: torch.device


@contextlib.contextmanager
def init(timeout_s: float = 600) -> Iterator[Job]:
    """Join the job that torchrun started (`cpu:gloo,cuda:nccl` on GPUs, the device set; gloo on CPUs), or run alone.

    A collective over all ranks. What is initialised already is used and left as it is.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if dist.is_available() and dist.is_initialized():
        yield Job(dist.get_rank(), dist.get_world_size(), device)
        return
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        yield Job(0, 1, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield Job(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
