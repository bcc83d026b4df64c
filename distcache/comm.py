"""The one seam to other ranks: collectives with a time limit on buffers of ours, and a store that decides.

Alone in the package this module calls torch.distributed. A `Communicator` owns private process groups over
the ranks it was given, so that a merge that fails never puts the model's own collectives out of step, and
`LocalComm` is the same thing for one process. Nothing here waits longer than it was told to.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import hashlib
import logging
import os
import queue
import socket
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

from distcache.errors import PeerFailed
from distcache.interrupts import held_interrupts

log = logging.getLogger("distcache")

ProcessGroup = dist.ProcessGroup
Store = dist.Store

Poll = Callable[[], None]
"""Called while a rank waits; raises to stop the waiting."""

LOOK_S = 0.02  # between looks at signals and decisions while operations are awaited
IN_FLIGHT = 4  # collectives at a time; gloo runs two at once and queues the rest
FAREWELL_S = 2.0  # what leaving may take at the end of a process whose store doesn't answer any more


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
    def delete(self, key: str) -> None:
        """Forget a key, soon: before this rank's next call is made, not before this one returns."""


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
    """A torch store, under a prefix. A thread of its own makes the calls, because a call to a stopped server would
    not come back; on a connection of its own, because a connection serves one call at a time and somebody else's
    may wait for minutes (a new group's does).
    """

    _ABSENT = "?"  # nobody's value

    def __init__(self, store: dist.Store, limit_s: float, prefix: str = "") -> None:
        self.prefix = prefix
        self._limit_s = limit_s
        self._original = store  # the server may live in it
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None] = queue.SimpleQueue()
        self._lost: str | None = None
        threading.Thread(target=_serve, args=(self._calls,), name="distcache-store", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)
        self._store: Any = self._call(lambda: _own_connection(store))

    def _begin(self, call: Callable[[], Any]) -> _Answer:
        if self._lost is not None:
            raise StoreLost(self._lost)
        answer = _Answer()
        self._calls.put((call, answer))
        return answer

    def _call(self, call: Callable[[], Any]) -> Any:
        answer = self._begin(call)
        if not answer.ready.wait(self._limit_s):
            self._lost = f"the store did not answer within {self._limit_s:g} s"
            raise StoreLost(self._lost)
        if answer.error is not None:
            self._lost = f"the store failed: {_one_line(answer.error)}"
            raise StoreLost(self._lost) from answer.error
        return answer.value

    def set(self, key: str, value: bytes) -> None:
        self._call(lambda: self._store.set(self.prefix + key, value))

    def get(self, key: str) -> bytes | None:
        # Not check and get: get waits for minutes where the key is deleted in between. A compare-and-set that
        # would change nothing reads in one round trip.
        found = bytes(self._call(lambda: self._store.compare_set(self.prefix + key, self._ABSENT, self._ABSENT)))
        return None if found == self._ABSENT.encode() else found

    def add(self, key: str, amount: int) -> int:
        return int(self._call(lambda: self._store.add(self.prefix + key, amount)))

    def decide(self, key: str, value: bytes) -> bytes:
        # torch's compare_set returns the value that stands, ours or an earlier one.
        return bytes(self._call(lambda: self._store.compare_set(self.prefix + key, "", value.decode())))

    def delete(self, key: str) -> None:
        self._begin(lambda: self._store.delete_key(self.prefix + key))


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
        del item, call, answer  # not kept until the next call comes


def _own_connection(store: dist.Store) -> dist.Store:
    try:
        return store.clone()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # an older torch, or a store written in Python
        return store


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def meet(store: DecisionStore, ranks: Sequence[int], me: int, timeout_s: float) -> int:
    """The number of this meeting of `ranks`, the same on each of them: a collective in the store.

    A meeting that a rank gave up is passed over by all, so that a repeated constructor finds its peers again.
    `PeerFailed` naming the ranks that have not come within `timeout_s`.
    """
    while True:
        # As a rank's calls are collectives, all count alike, but for meetings that were given up.
        number = store.add(f"met/{me}", 1)
        if store.get(f"{number}/meeting") != b"given up":
            break
    if store.add(f"{number}/came", 1) == len(ranks):
        store.decide(f"{number}/meeting", b"complete")
    deadline = time.monotonic() + timeout_s
    nap_s = 0.0002
    while (outcome := store.get(f"{number}/meeting")) is None:
        if time.monotonic() > deadline:
            outcome = store.decide(f"{number}/meeting", b"given up")
            break
        time.sleep(nap_s)
        nap_s = min(nap_s * 1.3, 0.02)
    if outcome != b"complete":
        absent = [rank for i, rank in enumerate(ranks) if int(store.get(f"met/{i}") or 0) < number]
        who = f"rank(s) {absent} of the job did not come" if absent else "a rank came too late for another that waited"
        raise PeerFailed(
            f"{who} within {timeout_s:g} s: making a DistributedCache and rejoining are collectives over ranks "
            f"{list(ranks)}. Call it on all of them, or give it a longer timeout_s."
        )
    if me == 0:
        for key in (f"{number}/came", f"{number - 1}/came", f"{number - 1}/meeting"):
            store.delete(key)
    return number


# -- signs of life ---------------------------------------------------------------------------------------------


class Heart:
    """Beats in the store so that peers can tell a slow rank from a dead one, and watches for a decision.

    A daemon thread: it beats while the main thread computes. Stopped, or at the end of the process, its last
    beat says that the rank has left, so that nobody waits for it.
    """

    def __init__(self, store: DecisionStore, rank: int, timeout_s: float) -> None:
        self.interval_s = min(1.0, timeout_s / 10)
        self.rank = rank
        self._store = store
        self._watched: str | None = None
        self._found: tuple[str, bytes] | None = None
        self._stop = threading.Event()
        self._peers: dict[int, tuple[bytes | None, float]] = {}
        self._thread = threading.Thread(target=self._beat, name="distcache-heart", daemon=True)
        self._thread.start()
        _hearts.add(self)

    def _beat(self) -> None:
        beats = 0
        with contextlib.suppress(StoreLost):  # whoever needs the store next finds out by itself
            while not self._stop.is_set():
                beats += 1
                self._store.set(f"heart/{self.rank}", str(beats).encode())
                watched = self._watched
                if watched is not None and self.decision is None:
                    found = self._store.get(watched)
                    if found is not None:
                        self._found = (watched, found)
                self._stop.wait(self.interval_s)
            self._store.set(f"heart/{self.rank}", b"left")

    def watch(self, key: str) -> None:
        """Look for this decision from now on; `decision` holds it once somebody made it."""
        self._watched = key

    @property
    def decision(self) -> bytes | None:
        """The decision under the watched key, as far as this rank's heart has seen it."""
        found = self._found
        return found[1] if found is not None and found[0] == self._watched else None

    def silent_s(self, peer: int) -> float:
        """Seconds since this rank last saw the peer's heart move; the first look counts as a sign of life.

        Infinite where the peer has left.
        """
        beat = self._store.get(f"heart/{peer}")
        now = time.monotonic()
        if beat == b"left":
            return float("inf")
        known = self._peers.get(peer)
        if known is None or known[0] != beat:
            self._peers[peer] = (beat, now)
            return 0.0
        return now - known[1]

    def stop(self) -> None:
        """Leave with the next beat. Doesn't wait: it may be called from anywhere, by the garbage collector too."""
        self._stop.set()

    def join(self, limit_s: float) -> None:
        """Wait until this rank's last beat is in the store."""
        self._thread.join(limit_s)


_hearts: weakref.WeakSet[Heart] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    """Peers are told that this process ends, and no thread of ours runs into the interpreter's end."""
    deadline = time.monotonic() + FAREWELL_S
    for heart in list(_hearts):
        heart.stop()
    for heart in list(_hearts):
        heart.join(max(0.0, deadline - time.monotonic()))


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
    """What the merge needs of other ranks. Every method but `close` is a collective over the group.

    Attributes:
        ranks: the group's ranks as the job numbers them; `rank` is this one's place among them.
        colocated: the places of the ranks that share this host's memory, this one among them.
        broken: the private groups are spent: `rebuild` before anything else moves.
    """

    rank: int
    ranks: tuple[int, ...]
    colocated: tuple[int, ...]
    timeout_s: float
    store: DecisionStore
    heart: Heart | None = None
    broken: bool = False
    closed: bool = False

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def name(self, rank: int) -> str:
        """`rank 1`, and what the job calls it where that differs."""
        known = self.ranks[rank]
        return f"rank {rank}" if known == rank else f"rank {rank} of the group (rank {known} of the job)"

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
        """Fresh private groups, after the old ones were spent; those of parts too."""

    def part(self, ranks: Sequence[int]) -> Communicator:
        """A communicator over some of the ranks, this one among them, with the store, the heart and the limits of the
        whole: a collective over these. What fails in a part is decided, and its groups made anew, by the whole.
        """
        if tuple(ranks) == tuple(range(self.world_size)):
            return self
        raise NotImplementedError(f"{type(self).__name__} has no parts.")

    @abc.abstractmethod
    def close(self) -> None:
        """Leave: not a collective. Peers that still wait for this rank are told."""


class LocalComm(Communicator):
    """One process: every collective is the identity."""

    def __init__(self, timeout_s: float = 120) -> None:
        self.rank, self.ranks, self.colocated = 0, (0,), (0,)
        self.timeout_s = timeout_s
        self.store = LocalStore()

    def gather(self, row: Sequence[int], poll: Poll) -> list[list[int]]:
        return [list(row)]

    def gather_bytes(self, blob: bytes, sizes: Sequence[int], poll: Poll) -> list[bytes]:
        return [blob]

    def run(self, transfers: Sequence[Transfer], poll: Poll) -> None:
        for transfer in transfers:
            assert transfer.buffer.is_contiguous()

    def rebuild(self, generation: str) -> None:
        self.broken = False

    def close(self) -> None:
        self.closed = True


class TorchComm(Communicator):
    """Private process groups over a torch store: gloo for CPU tensors, NCCL for CUDA ones where it's there.

    The constructor is a collective over `ranks`, within `timeout_s`: `PeerFailed` where a rank doesn't come,
    ValueError where the store can't compare and set (torch's FileStore once couldn't).
    """

    def __init__(
        self, store: dist.Store, ranks: Sequence[int], rank: int, timeout_s: float, nccl: bool = False
    ) -> None:
        self.rank, self.ranks, self.timeout_s = rank, tuple(ranks), timeout_s
        name = f"distcache/{hashlib.blake2b(repr(self.ranks).encode(), digest_size=8).hexdigest()}"
        try:
            self.store = TorchStore(store, timeout_s, f"{name}/")
            self.store.decide("able", b"yes")
            number = meet(self.store, self.ranks, rank, timeout_s)
        except StoreLost as error:
            if error.__cause__ is None:
                raise PeerFailed(
                    f"{error}: is the process that keeps it alive, and can it be reached? Where it's only slow, give a "
                    "longer timeout_s."
                ) from error
            raise ValueError(
                f"the store of this job ({type(store).__name__}) cannot be used: {error}. Pass one that can compare "
                "and set, such as torch's TCPStore, or run under torchrun, whose agent keeps one."
            ) from error
        self.store.prefix = f"{name}/{number}/"
        self._base = dist.PrefixStore(f"{name}/{number}", store)
        self._nccl = nccl
        self._parts: list[TorchComm] = []
        try:
            self._open("0")
            host = int.from_bytes(hashlib.blake2b(socket.gethostname().encode(), digest_size=7).digest(), "little")
            hosts = self.gather([host], lambda: None)
        except (CommFailed, *_COMM_ERRORS) as error:
            raise PeerFailed(
                f"all ranks of {list(ranks)} came, but not all could connect: {_one_line(error)}"
            ) from error
        self.colocated = tuple(peer for peer, theirs in enumerate(hosts) if theirs == [host])
        self.heart = Heart(self.store, rank, timeout_s)
        weakref.finalize(self, self.heart.stop).atexit = False  # _leave_all does it then

    def _open(self, generation: str) -> None:
        limit = timedelta(seconds=self.timeout_s)
        store = dist.PrefixStore(f"group/{generation}", self._base)
        self._gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self.rank, self.world_size, limit)
        self._device_group: Any = None
        if self._nccl:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            with _errors_not_exits():
                self._device_group = dist.ProcessGroupNCCL(
                    dist.PrefixStore("nccl", store), self.rank, self.world_size, options
                )
        self.broken = False

    def part(self, ranks: Sequence[int]) -> Communicator:
        if tuple(ranks) == tuple(range(self.world_size)):
            return self
        twin = object.__new__(TorchComm)
        twin.rank, twin.ranks = list(ranks).index(self.rank), tuple(self.ranks[rank] for rank in ranks)
        twin.timeout_s, twin.store, twin.heart, twin._nccl, twin._parts = (
            self.timeout_s, self.store, self.heart, self._nccl, [],
        )  # fmt: skip
        twin.colocated = tuple(place for place, rank in enumerate(ranks) if rank in self.colocated)
        twin._base = dist.PrefixStore(f"part/{','.join(map(str, ranks))}", self._base)
        try:
            twin._open("0")
        except _COMM_ERRORS as error:
            raise PeerFailed(f"not all ranks of {list(ranks)} could connect: {_one_line(error)}") from error
        self._parts.append(twin)
        return twin

    def rebuild(self, generation: str) -> None:
        try:
            for comm in (self, *self._parts):
                comm._open(generation)
        except _COMM_ERRORS as error:
            self.broken = True
            raise CommFailed(f"could not connect to all ranks again: {_one_line(error)}") from error

    def close(self) -> None:
        if not self.closed and self.heart is not None:
            self.closed = True
            self.heart.stop()
            self.heart.join(FAREWELL_S)

    def gather(self, row: Sequence[int], poll: Poll) -> list[list[int]]:
        mine = torch.tensor(row, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._await(deque([lambda: _Collective(self._gloo.allgather([everyone], [mine]))]), [mine, everyone], poll)
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
        group, as_work = (self._device_group, _OnDevice) if buffer.is_cuda else (self._gloo, _Collective)
        if transfer.op == "copy" and transfer.to is not None:
            call, peer = (group.send, transfer.to) if self.rank == transfer.root else (group.recv, transfer.root)
            as_passed = _Passed if group is self._gloo else as_work
            return lambda: as_passed(call([buffer], peer, 0))
        if transfer.op == "copy":
            spread = dist.BroadcastOptions()
            spread.rootRank, spread.rootTensor = transfer.root or 0, 0
            return lambda: as_work(group.broadcast([buffer], spread))
        reduction: Any = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[transfer.op]
        if transfer.root is not None:
            onto = dist.ReduceOptions()
            onto.reduceOp, onto.rootRank, onto.rootTensor = reduction, transfer.root, 0
            return lambda: as_work(group.reduce([buffer], onto))
        everywhere = dist.AllreduceOptions()
        everywhere.reduceOp = reduction
        return lambda: as_work(group.allreduce([buffer], everywhere))

    def _await(self, starts: deque[Callable[[], Any]], kept: list[Any], poll: Poll) -> None:
        flying: deque[Any] = deque()
        with held_interrupts() as let_through:
            try:
                self._drive(starts, flying, let_through, poll)
            except BaseException as error:
                self.broken = True
                # Operations may still write to their buffers, and gloo's group waits for them in its destructor,
                # which would hold up a process that wants to end: a thread of their own outlives both.
                arguments = (list(flying), (self._gloo, self._device_group), kept)
                threading.Thread(target=_outlive, args=arguments, name="distcache-outlive", daemon=True).start()
                if type(error) in _COMM_ERRORS:
                    raise CommFailed(_one_line(error)) from error
                raise

    def _drive(self, starts: deque[Callable[[], Any]], flying: deque[Any], let_through: Poll, poll: Poll) -> None:
        progress = polled = time.monotonic()
        while starts or flying:
            while starts and len(flying) < IN_FLIGHT:
                flying.append(starts.popleft()())
                progress = time.monotonic()
            if flying[0].completes_within(LOOK_S):
                flying.popleft().wait()  # raises what went wrong
                progress = time.monotonic()
                continue
            now = time.monotonic()
            if now - progress > self.timeout_s:
                raise CommFailed(f"no progress for {self.timeout_s:g} s with all ranks there")
            if now - polled > LOOK_S:
                polled = now
                let_through()
                poll()


_COMM_ERRORS = (RuntimeError, dist.DistError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class _Collective:
    """A collective on gloo. To wait costs less than to look again and again: on as many cores as ranks, whoever looks
    takes the core from the thread that moves the bytes (1 MB over 2 ranks took 0.5 ms, and 0.74 with looks).
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def completes_within(self, limit_s: float) -> bool:
        with contextlib.suppress(RuntimeError):  # a wait that is over harms nothing; a failure is raised by `wait`
            self._work.wait(timedelta(seconds=limit_s))
        return self.is_completed()

    def wait(self) -> None:
        self._work.wait()


class _Passed:
    """A send or receive on gloo, which says that it's complete to nobody but who waits for it: a thread does."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._wait, name="distcache-passed", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._work.wait()
        except Exception as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def completes_within(self, limit_s: float) -> bool:
        self._thread.join(limit_s)
        return self.is_completed()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


class _OnDevice:
    """An operation on a GPU: to wait for it would hold up the stream, and nobody could give it up."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._nap_s = 0.0

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def completes_within(self, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while not self.is_completed() and time.monotonic() < deadline:
            time.sleep(self._nap_s)
            self._nap_s = min(0.002, self._nap_s + 0.00002)
        return self.is_completed()

    def wait(self) -> None:
        self._work.wait()


def _outlive(works: list[Any], groups: tuple[Any, Any], kept: list[Any]) -> None:
    """Keep what operations use until they have ended."""
    _, device_group = groups
    if device_group is not None:
        with contextlib.suppress(Exception):
            device_group.abort()  # a kernel that waits for a lost peer would keep its GPU busy for ever
    while not all(work.is_completed() for work in works):
        time.sleep(0.05)


@contextlib.contextmanager
def _errors_not_exits() -> Iterator[None]:
    """NCCL's default is to end the process when a collective times out; a merge wants an error instead.

    The group reads it when it's made; the model's own groups are none of our business.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = before or "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def open_comm(
    group: dist.ProcessGroup | None = None, store: dist.Store | None = None, timeout_s: float = 120
) -> Communicator:
    """A communicator over a group, over all ranks, or for this process alone. A collective over the group.

    ValueError for a process that isn't in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("a group was given, but torch.distributed is not initialised: enter dc.init() first.")
        return LocalComm(timeout_s)
    if group is not None and not isinstance(group, ProcessGroup):  # what new_group gives to ranks it leaves out
        raise ValueError(f"rank {dist.get_rank()} is not in the group: make the cache on its ranks only.")
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
        _see_off()
        dist.destroy_process_group()


def _see_off() -> None:
    """Where rank 0 keeps the store (no torchrun, whose agent does), it stays until the others have left, for seconds
    at most: they have read the last decision by then. A store that is gone would leave them in doubt.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + FAREWELL_S
    with contextlib.suppress(RuntimeError):
        gone = store.add("distcache/gone", 1)
        while dist.get_rank() == 0 and gone < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.01)
            gone = store.add("distcache/gone", 0)
