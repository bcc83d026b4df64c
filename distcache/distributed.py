"""DistributedCache: an activation cache of the whole cluster; ranks fold locally and merge once."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from os import PathLike
from typing import Any, NoReturn

from torch import Tensor

from distcache.cache import ActivationCache, Explained
from distcache.comm import Communicator, ProcessGroup, Store, open_comm
from distcache.errors import HeldElsewhere
from distcache.merge import (
    Facts,
    Party,
    arrive,
    as_error,
    attempt,
    commit,
    decision_key,
    describe_error,
    merge,
    post_abort,
)
from distcache.strategies import Strategy

_READ_ONLY = (
    "is read-only: a rank's own write would make replicas differ. Put values into an ActivationCache and cat that: "
    "local = ActivationCache(); local[key] = value; cache.cat(local)."
)


class _Reading(abc.ABC):
    """The reading half of an ActivationCache, shown and not changed."""

    @abc.abstractmethod
    def _shown(self) -> ActivationCache:
        """The cache whose values are read."""

    def __getitem__(self, key: str | tuple[Any, ...]) -> Any:
        return self._shown()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._shown()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown())

    def __len__(self) -> int:
        return len(self._shown())

    def keys(self) -> KeysView[str]:
        return KeysView(self)  # type: ignore[arg-type]

    def values(self) -> ValuesView[Any]:
        return ValuesView(self)  # type: ignore[arg-type]

    def items(self) -> ItemsView[str, Any]:
        return ItemsView(self)  # type: ignore[arg-type]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def count(self, key: str) -> Tensor:
        """See `ActivationCache.count`."""
        return self._shown().count(key)

    def rows(self, key: str) -> dict[str, Tensor]:
        """See `ActivationCache.rows`."""
        return self._shown().rows(key)

    def explain(self) -> dict[str, Explained]:
        """See `ActivationCache.explain`."""
        return self._shown().explain()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}: {value}' for key, value in self.items())})"

    def __setitem__(self, key: str, value: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} {_READ_ONLY}")

    def __delitem__(self, key: str) -> NoReturn:
        raise TypeError(f"{type(self).__name__} {_READ_ONLY}")

    def update(self, other: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} {_READ_ONLY}")


class Delta(_Reading):
    """What a rank has that the cluster has not merged yet."""

    def __init__(self, cache: ActivationCache) -> None:
        self._cache = cache

    def _shown(self) -> ActivationCache:
        return self._cache


class DistributedCache(_Reading):
    """An `ActivationCache` of the cluster: each rank folds into its own delta, and all merge at once.

    Reads show committed content, also inside `deferred_mode()`; what is pending is `delta`. The constructor is
    a collective over the group: it makes private process groups.

    Args:
        group: the ranks that merge; None for all, or for this process alone without torch.distributed.
        dst: None: every rank holds the content; r: rank r (of the group) alone, and reading raises
            `HeldElsewhere` on the others.
        timeout_s: limit of a peer's silence, and, once all ranks are there, of time without progress.
        wait_s: limit of waiting for a peer that is alive but busy.
        bucket_bytes: the largest piece that one collective moves.
        store: a torch store that outlives the ranks and can compare and set; by default the job's.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        dst: int | None = None,
        timeout_s: float = 120,
        wait_s: float = 86400,
        bucket_bytes: int = 25 * 2**20,
        store: Store | None = None,
    ) -> None:
        if timeout_s <= 0 or wait_s <= 0 or bucket_bytes < 1:
            raise ValueError(f"limits are positive, got {timeout_s=}, {wait_s=}, {bucket_bytes=}.")
        comm = open_comm(group, store, timeout_s)
        if dst is not None and not (isinstance(dst, int) and 0 <= dst < comm.world_size):
            comm.close()
            raise ValueError(f"dst is a rank below {comm.world_size} or None, got {dst!r}.")
        self._comm: Communicator = comm
        self._store = store
        self._dst = dst
        self._wait_s = wait_s
        self._bucket_bytes = bucket_bytes
        self._content = ActivationCache()
        self._facts = Facts()
        self._delta = ActivationCache()
        self._delta._registry = self._content._registry
        self._attempt = 0
        self._deferred = False

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._comm.rank

    @property
    def world_size(self) -> int:
        return self._comm.world_size

    @property
    def dst(self) -> int | None:
        """The rank that holds the content; None where all do."""
        return self._dst

    @property
    def delta(self) -> Delta:
        """What this rank has that the cluster has not merged yet, read-only."""
        return Delta(self._delta)

    # -- reading -----------------------------------------------------------------------------------------------

    def _shown(self) -> ActivationCache:
        if self._dst is not None and self._dst != self.rank:
            raise HeldElsewhere(
                f"the content is held by rank {self._dst} (dst={self._dst}), this is rank {self.rank}: read it there, or "
                "make the cache with dst=None."
            )
        return self._content

    def __contains__(self, key: object) -> bool:
        return key in self._facts.schemas

    def __iter__(self) -> Iterator[str]:
        if self._dst is None or self._dst == self.rank:
            return iter(self._content)
        return iter(sorted(self._facts.schemas))

    def __len__(self) -> int:
        return len(self._facts.schemas)

    # -- writing -----------------------------------------------------------------------------------------------

    def register_aggregation(self, key_pattern: str, strategy: Strategy | str | Callable[[list[Any]], Any]) -> None:
        """As `ActivationCache.register_aggregation`; not a collective, but every rank must register alike."""
        for held in (self._content, self._delta):
            held.register_aggregation(key_pattern, strategy)
        self._delta._registry = self._content._registry

    def cat(self, local: ActivationCache, index: Iterable[int] | Tensor | None = None) -> None:
        """Fold a rank's cache into its delta; outside deferred mode a collective that merges at once.

        `index`: one entry per sample, its place in the data set; concatenations come out in that order. Keys are
        a union: every rank brings its own, or an empty cache. TypeError for anything but an ActivationCache.
        `PeerFailed` if another rank has given up this block or merge.
        """
        if self._deferred:
            self._check_peers()
            self._fold(local, index)
            return
        with self._ending():
            self._fold(local, index)
        self._merge()

    def add(
        self,
        key: str,
        value: Any,
        index: int | Iterable[int] | Tensor | None = None,
        weight: float | Tensor | None = None,
        **columns: Tensor,
    ) -> None:
        """Fold one value into the delta, in deferred mode; see `ActivationCache.add`. RuntimeError outside."""
        self._need_deferred("add").add(key, value, index, weight, **columns)

    def _fold(self, local: ActivationCache, index: Iterable[int] | Tensor | None) -> None:
        if isinstance(local, (DistributedCache, Delta)):
            raise TypeError(
                "cat expects this rank's own ActivationCache, got a DistributedCache: every rank has its content, which "
                f"would count {self.world_size} times."
            )
        if not isinstance(local, ActivationCache):
            raise TypeError(f"cat expects an ActivationCache, got {type(local).__name__}.")
        self._check_content(local)
        self._delta._absorb(local, index=index, whole_lists=True)

    def _check_content(self, local: ActivationCache) -> None:
        """States must be of the strategies that the content was made with; raised here, not in the merge."""
        for key in local:
            mine, theirs = self._content._state_strategy(key), local._state_strategy(key)
            if mine is not None and theirs is not None and mine != theirs:
                raise ValueError(f"cannot cat {key!r}: the content holds a state of {mine}, got one of {theirs}.")

    @contextlib.contextmanager
    def deferred_mode(self) -> Iterator[DistributedCache]:
        """Within the block `cat` stays on this rank; at its end the cluster merges once: a collective.

        If the block raises on a rank, that rank raises its own error at once and the others `PeerFailed` at
        their next `cat` or at the end; every delta is kept, and `merge()` or a further block takes it along.
        RuntimeError when nested.
        """
        if self._deferred:
            raise RuntimeError("deferred_mode is open already: end the outer block first.")
        if self._comm.heart is not None:
            self._comm.heart.watch(decision_key(self._attempt))
        self._deferred = True
        try:
            with self._ending():
                yield self
        finally:
            self._deferred = False
        self._merge()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """What raises here ends the attempt for every rank."""
        try:
            yield
        except BaseException as error:
            post_abort(self._comm, self._attempt, self.rank, describe_error(error))
            self._attempt += 1
            raise

    def _check_peers(self) -> None:
        heart = self._comm.heart
        if heart is not None and heart.decision is not None:
            raise as_error(heart.decision, self.rank)

    def _need_deferred(self, what: str) -> ActivationCache:
        """The delta, for what accumulates straight into it."""
        if not self._deferred:
            raise RuntimeError(f"{what} goes into the delta: open `with cache.deferred_mode():` first.")
        self._check_peers()
        return self._delta

    # -- collectives -------------------------------------------------------------------------------------------

    def merge(self, group: ProcessGroup | None = None) -> None:
        """Merge what the deltas hold: a collective, to try again after a failure; `group`: see `rejoin`."""
        if group is not None:
            self.rejoin(group)
        self._merge()

    def _merge(self) -> None:
        party = Party(
            self._comm,
            self._attempt,
            self._delta,
            self._content,
            self._facts,
            self._dst,
            self._wait_s,
            self._bucket_bytes,
        )
        try:
            merged = merge(party)
        finally:
            self._attempt += 1
        self._content, self._facts = merged.content, merged.facts
        self._delta = ActivationCache()
        self._delta._registry = self._content._registry
        if merged.interrupted is not None:
            raise merged.interrupted

    def rejoin(self, group: ProcessGroup | None = None) -> None:
        """Take content and delta to a new group, as after a rank was lost: a collective over the new group.

        ValueError if `dst` is no rank of it.
        """
        comm = open_comm(group, self._store, self._comm.timeout_s)
        if self._dst is not None and self._dst >= comm.world_size:
            comm.close()
            raise ValueError(f"dst={self._dst} is no rank of the new group of {comm.world_size}.")
        self._comm.close()
        self._comm = comm
        self._attempt = 0

    def save(self, path: str | PathLike[str], **info: str) -> None:
        """Write the content to a new folder: a collective. A holder writes, one rename publishes, all learn of it.

        `info`: words for the manifest, such as `model="…"`. FileExistsError if the folder is there.
        """
        from distcache import store  # above this module in the import order, so only when asked

        number = self._attempt
        try:
            with attempt(self._comm, number):
                arrive(self._comm, number, self._wait_s)
                if self.rank == (self._dst or 0):
                    store.save(self._content, path, info=info, world_size=self.world_size)
                interrupted = commit(self._comm, number)
        finally:
            self._attempt += 1
        if interrupted is not None:
            raise interrupted

    def share(self, loader: Any) -> Iterator[tuple[Tensor, Any]]:
        """This rank's (index, batch) of a loader, without padding or duplicates: see `distcache.collect.share`."""
        from distcache.collect import share  # above this module in the import order, so only when asked

        return share(loader, self.rank, self.world_size)

    def close(self) -> None:
        """Leave the group; peers that still wait for this rank are told. Not a collective; content can be read on."""
        self._comm.close()
