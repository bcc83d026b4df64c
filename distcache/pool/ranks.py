"""Actors that are ranks: a group of them works at each item together, and looks to a pool like one `Worker`.

An item's samples are dealt over the ranks, which have the whole model each. Their states stay where they are until the
group hands over; then they merge onto rank 0, as those of a `DistributedCache` do, over a process group of their own.
Its store is a dict in the actor that leads the group, so it needs no port, and outlives the ranks.

A group lives and dies as one. When a rank is lost, at an item or in a merge, the others are ended, and what the group
had not handed over is done again by another group, with ranks and a store of its own. When the leader is lost, Ray ends
its ranks.
"""

from __future__ import annotations

import dataclasses
import logging
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

from distcache.cache import ActivationCache
from distcache.collect import Samples
from distcache.comm import Store, StoreLost, TorchComm
from distcache.entries import KeptEntry
from distcache.errors import MergeAborted, MergeInDoubt, PeerFailed
from distcache.merge import Facts, Held, Party, merge
from distcache.packed import Packed
from distcache.pool.actors import Handed, ModelFactory, Worker, on_cpu, options, the_ray
from distcache.pool.work import Failure, Job, Receipt, State
from distcache.strategies import Function

log = logging.getLogger("distcache")

STORE = "store"
THREADS = {STORE: 1}  # of a `Group`, as Ray's concurrency_groups: one serves its store while another waits for ranks
BUCKET_BYTES = 25 * 2**20  # the largest piece that one collective moves, as in `DistributedCache`
_OF_PEERS = {kind.__name__ for kind in (PeerFailed, MergeAborted, MergeInDoubt)}  # what a rank raises for another


# -- the store ---------------------------------------------------------------------------------------------------------


class Kept:
    """The keys and values of a store, changed one call at a time, whichever thread makes it."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def call(self, what: str, *args: Any) -> Any:
        with self._lock:
            return getattr(self, what)(*args)

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(total).encode()
        return total

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """As torch's stores: an absent key is set where b"" was expected. What stands, or else what was expected."""
        if self._values.get(key, b"") == expected:
            self._values[key] = desired
        return self._values.get(key, expected)

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None


class ActorStore(Store):
    """A torch store whose keys and values an actor keeps: `keeper.keep(what, *args)` calls its `Kept`.

    Every call returns, or raises `StoreLost`, within the limit. Who waits for a key asks for it again and again, so
    that nobody holds up the actor.
    """

    def __init__(self, keeper: Any, limit_s: float) -> None:
        super().__init__()
        self._keep = keeper.keep.options(concurrency_group=STORE)
        self._ray, self._limit_s = the_ray(), limit_s

    def _call(self, what: str, *args: Any) -> Any:
        try:
            return self._ray.get(self._keep.remote(what, *args), timeout=self._limit_s)
        except Exception as error:  # Ray's own are no RuntimeErrors, which is what torch's stores raise
            raise StoreLost(f"the actor that keeps the store is gone or silent: {_in_a_line(error)}") from error

    def set(self, key: str, value: str | bytes) -> None:
        self._call("set", key, _bytes(value))

    def get(self, key: str) -> bytes:
        return self._until(lambda: self._call("get", key), self._limit_s, [key])

    def add(self, key: str, amount: int) -> int:
        return self._call("add", key, amount)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._call("compare_set", key, _bytes(expected), _bytes(desired))

    def check(self, keys: Sequence[str]) -> bool:
        return self._call("check", list(keys))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        limit_s = self._limit_s if timeout is None else timeout.total_seconds()
        self._until(lambda: self.check(keys) or None, limit_s, keys)

    def delete_key(self, key: str) -> bool:
        return self._call("delete_key", key)

    def _until(self, look: Callable[[], Any], limit_s: float, keys: Sequence[str]) -> Any:
        deadline, nap_s = time.monotonic() + limit_s, 0.001
        while (found := look()) is None:
            if time.monotonic() > deadline:
                raise StoreLost(f"nobody has set {', '.join(keys)} within {limit_s:g} s")
            time.sleep(nap_s)
            nap_s = min(nap_s * 1.3, 0.02)
        return found


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


# -- a rank ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part(Job):
    """What one rank does of a job: its part of each item, a batch of `batch_size / num_ranks`, rounded up."""

    rank: int = 0
    num_ranks: int = 1

    @classmethod
    def of(cls, job: Job, rank: int, num_ranks: int) -> Part:
        same = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
        return cls(**same, rank=rank, num_ranks=num_ranks)

    def samples(self, item: int, num_samples: int) -> range:
        size = -(-self.batch_size // self.num_ranks)
        return Job.samples(self, item, num_samples)[self.rank * size : (self.rank + 1) * size]


class Merged(NamedTuple):
    """What a rank says after a merge: the items that it brought, and whether it kept values that don't merge."""

    items: tuple[int, ...]
    kept: bool


class Rank(Worker):
    """One rank of a group: `_pooled` is what has been merged onto it, and what doesn't merge."""

    def __init__(self, factory: ModelFactory, rank: int, num_ranks: int, leader: Any, timeout_s: float) -> None:
        super().__init__(factory)
        self._rank, self._num_ranks, self._leader, self._timeout_s = rank, num_ranks, leader, timeout_s
        self._merges = 0
        self._num_samples = 0

    def join(self) -> None:
        """Make the group's process group, on gloo: a collective."""
        store = ActorStore(self._leader, self._timeout_s)
        self._comm = TorchComm(store, range(self._num_ranks), self._rank, self._timeout_s)

    def begin(self, job: Job, data: Samples | Callable[[], Samples]) -> int | Failure:
        found = super().begin(Part.of(job, self._rank, self._num_ranks), data)
        self._num_samples = found if isinstance(found, int) else 0
        return found

    def work(self, item: int) -> Receipt:
        """Do this rank's part of an item: nothing, where the last item has fewer samples than ranks."""
        assert self._work is not None, "begin() comes first"
        return super().work(item) if self._work.job.samples(item, self._num_samples) else Receipt(False)

    def forget(self) -> None:
        """Throw away what hasn't been merged."""
        assert self._work is not None, "begin() comes first"
        self._work.take()

    def merge(self) -> Merged | Failure:
        """Merge the ranks' states onto rank 0: a collective.

        What plain functions collect doesn't merge, because they are called once, on everything, by who has everything.
        """
        assert self._work is not None, "begin() comes first"
        number = self._merges
        self._merges += 1
        try:
            state = on_cpu(self._work.take())
            lists = _lists_of(state)
            held = Held(ActivationCache(), Facts(), state)
            held.content._registry = state._registry
            merge(Party(self._comm, number, held, dst=0, wait_s=self._timeout_s, bucket_bytes=BUCKET_BYTES, dealt=0))
            for found in (held.content, lists):
                if len(found):
                    self._pooled = self._taken()
                    self._pooled._absorb(found)
        except Exception as error:
            return Failure.of(error)
        if self._pooled is not None:
            self._pooled.counted.update(state.counted)
        return Merged(tuple(state.counted), self._pooled is not None)

    def _taken(self) -> State:
        assert self._work is not None, "begin() comes first"
        return State(self._work.job.registry) if self._pooled is None else self._pooled


def _lists_of(state: State) -> State:
    """What plain functions have collected in a state, which has it no more."""
    lists = State(tuple(state._registry.items()))
    for key, entry in state._kept().items():
        if isinstance(entry, KeptEntry) and isinstance(entry.strategy, Function):
            lists._set_kept(key, entry.strategy, entry.state)
    for key in lists:
        del state[key]
    return lists


# -- the group ---------------------------------------------------------------------------------------------------------


class Group:
    """The leader of a group of ranks, which does as a `Worker` what they do together, and keeps their store. It needs
    nothing itself: `ray.remote(concurrency_groups=THREADS)(Group)`.

    Args:
        factory: as of a `Worker`, called on every rank.
        resources: what each rank needs.
        timeout_s: limit of a rank's silence, at each thing that it's asked: a place and its model, an item, a merge.
            Two groups that start where there is room for one may hold what the other waits for as long as that.

    `PeerFailed` from any method where a rank died, raised or fell silent: the group has ended then, every rank of it,
    and so says each method from then on.
    """

    def __init__(
        self, factory: ModelFactory, num_ranks: int, resources: Mapping[str, float] | None, timeout_s: float
    ) -> None:
        self._factory, self._num_ranks, self._timeout_s = factory, num_ranks, timeout_s
        self._needs = options(resources)
        self._kept = Kept()
        self._ranks: list[Any] = []
        self._ended: str | None = None
        self._counted: dict[int, None] = {}  # items since the last merge

    def keep(self, what: str, *args: Any) -> Any:
        """The store, for `ActorStore`: in a thread of its own."""
        return self._kept.call(what, *args)

    def start(self) -> Failure | None:
        """Have each rank make its model, then all their process group."""
        ray = the_ray()
        leader = ray.get_runtime_context().current_actor
        make = ray.remote(Rank).options(**self._needs)
        for rank in range(self._num_ranks):
            self._ranks.append(make.remote(self._factory, rank, self._num_ranks, leader, self._timeout_s))
        failure = _first_failure(self._all("start"))
        if failure is None:
            self._all("join")
        return failure

    def begin(self, job: Job, data: Samples | Callable[[], Samples]) -> int | Failure:
        """See `Worker.begin`. An item has a batch of `job.batch_size / num_ranks` samples for each rank."""
        ray = the_ray()
        self._counted.clear()
        found = self._all("begin", ray.put(job), ray.put(data))
        failure = _first_failure(found)
        if failure is None and len(set(found)) > 1:
            failure = Failure.of(ValueError(f"ranks have {found} samples: what gives the data must give the same."))
        return failure or found[0]

    def work(self, item: int) -> Receipt:
        """See `Worker.work`. Where one rank's part raised, other ranks' can't be taken out of their states again: all
        are thrown away.
        """
        receipts: list[Receipt] = self._all("work", item)
        counted = any(receipt.counted for receipt in receipts)
        failure = next((receipt.failure for receipt in receipts if receipt.failure), None)
        if failure is None:
            if counted:
                self._counted[item] = None
            return Receipt(counted, kept_nbytes=sum(receipt.kept_nbytes for receipt in receipts))
        if not counted and not any(receipt.spoiled for receipt in receipts):
            return Receipt(False, failure)
        self._all("forget")
        spoiled = tuple(self._counted | {item: None})
        self._counted.clear()
        return Receipt(False, failure, spoiled)

    def hand_over(self) -> tuple[Handed | Failure, Packed | None]:
        """See `Worker.hand_over`: merges first."""
        merged = self._all("merge")
        failures = [found for found in merged if isinstance(found, Failure)]
        if failures:
            own = [failure for failure in failures if failure.kind not in _OF_PEERS]
            if not own:
                self._end(f"could not merge: {failures[0]}")
            return own[0], None
        self._counted.clear()
        for rank in range(1, self._num_ranks):
            if merged[rank].kept:
                said, packed = self._ranks[rank].hand_over.options(num_returns=2).remote()
                (handed,) = self._answers({rank: said})
                failure = handed if isinstance(handed, Failure) else self.absorb(handed.items, packed)
                if failure is not None:
                    return failure, None
        ((handed, packed),) = self._answers({0: self._ask(0, "hand_over")})
        if isinstance(handed, Handed):
            items = dict.fromkeys([*handed.items, *(item for found in merged for item in found.items)])
            handed = Handed(tuple(items), handed.nbytes)
        return handed, packed

    def absorb(self, items: Sequence[int], packed: Packed) -> Failure | None:
        """See `Worker.absorb`: rank 0's."""
        return self._answers({0: self._ask(0, "absorb", items, packed)})[0]

    def end(self) -> None:
        """See `Worker.end`."""
        self._counted.clear()
        self._all("end")

    def _ask(self, rank: int, method: str, *args: Any) -> Any:
        if self._ended is not None:
            raise PeerFailed(self._ended)
        return getattr(self._ranks[rank], method).remote(*args)

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Every rank's answer, by rank."""
        return self._answers({rank: self._ask(rank, method, *args) for rank in range(self._num_ranks)})

    def _answers(self, asked: Mapping[int, Any]) -> list[Any]:
        """Answers by rank. Whoever dies first ends the group: the others may wait for it."""
        ray, answers = the_ray(), dict[int, Any]()
        rank_of = {ref: rank for rank, ref in asked.items()}
        end_s = time.monotonic() + self._timeout_s
        while len(answers) < len(asked):
            waiting = [ref for rank, ref in asked.items() if rank not in answers]
            ready, _ = ray.wait(waiting, num_returns=1, timeout=max(0.0, end_s - time.monotonic()))
            if not ready:
                self._end(f"waited {self._timeout_s:g} s for rank(s) {[rank_of[ref] for ref in waiting]}")
            try:
                answers[rank_of[ready[0]]] = ray.get(ready[0])
            except Exception as error:
                self._end(f"lost rank {rank_of[ready[0]]}: {_in_a_line(error)}")
        return [answers[rank] for rank in asked]

    def _end(self, why: str) -> NoReturn:
        for rank in self._ranks:
            the_ray().kill(rank, no_restart=True)
        self._ended = f"a group of {self._num_ranks} ranks {why}. It has ended; what it had not handed over is lost."
        raise PeerFailed(self._ended)


def _first_failure(found: Sequence[Any]) -> Failure | None:
    return next((one for one in found if isinstance(one, Failure)), None)


def _in_a_line(error: BaseException) -> str:
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(f"{type(error).__name__}: {words[-1] if words else ''}", 200, placeholder=" …")
