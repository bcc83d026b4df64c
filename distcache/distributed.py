"""DistributedCache: an activation cache of the whole cluster; ranks fold locally and merge once."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from os import PathLike
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from distcache.cache import ActivationCache, Explained, site_keys
from distcache.comm import CommFailed, Communicator, ProcessGroup, Store, open_comm
from distcache.dealing import share
from distcache.entries import matches
from distcache.errors import HeldElsewhere, MergeInDoubt, PeerFailed, SchemaMismatch
from distcache.merge import Facts, Held, Model, Party, merge, new_delta
from distcache.mesh import Placement, mesh_of
from distcache.protocol import (
    COMMIT,
    announce,
    arrive,
    as_error,
    attempt,
    decision_key,
    describe_error,
    learn,
    leave_attempt,
)
from distcache.schema import DIGEST_MODULUS
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
        if key not in self:
            return default
        return self[key]

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
    a collective over the group: it makes private process groups, and raises `PeerFailed` where a rank doesn't come.
    Ranks, here and in messages, are places in the group.

    Args:
        group: the ranks that merge; None for all, or for this process alone without torch.distributed.
        dst: None: every rank holds the content; r: rank r (of the group) alone, and reading raises
            `HeldElsewhere` on the others. `"shard"`: each rank holds its part. Rows stay on the rank that brought them:
            reading a concatenation, and its `count` and `rows`, gives this rank's own, `offsets` where they lie among
            all. A reduction lies whole on one rank, which keeps it; reading it elsewhere raises `HeldElsewhere`. Lists,
            first values and what plain functions return are held by all. `save` writes one cache of all parts, as
            with None; the ranks must share the file system.
        timeout_s: limit of a peer's silence, and, once all ranks are there, of time without progress. The
            constructor waits for its peers as long.
        wait_s: limit of waiting for a peer that is alive but busy.
        bucket_bytes: the largest piece that one collective moves.
        store: a torch store that outlives the ranks and can compare and set; by default the job's.
        mesh: a torch DeviceMesh of named axes over the group's ranks, for a model that lies on several of them. What
            ranks hold is reduced over data axes alone, where it is; what others have seen of the same samples counts
            once, and is put together: split keys (`register_sharding`) along their dim, and keys of some ranks alone,
            such as a pipeline's stages, as a union.
        data_axes: the mesh's axes along which ranks have samples of their own; None for those that are called so
            (`distcache.mesh.DATA_AXES`).
        check: "replicas": compare a sample of what all ranks of a model hold, and raise `SchemaMismatch` where it isn't
            the same.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        dst: int | Literal["shard"] | None = None,
        timeout_s: float = 120,
        wait_s: float = 86400,
        bucket_bytes: int = 25 * 2**20,
        store: Store | None = None,
        mesh: Any = None,
        data_axes: Iterable[str] | None = None,
        check: Literal["replicas"] | None = None,
    ) -> None:
        if check not in (None, "replicas") or (mesh is None and (data_axes is not None or check is not None)):
            raise ValueError(f"check is 'replicas' or None, and with data_axes of a mesh: got {check=}, {mesh=}.")
        if mesh is not None and dst == "shard":
            raise ValueError('with a mesh dst is a rank or None: dst="shard" leaves rows where they are, in pieces.')
        if timeout_s <= 0 or wait_s <= 0 or bucket_bytes < 1:
            raise ValueError(f"limits are positive, got {timeout_s=}, {wait_s=}, {bucket_bytes=}.")
        comm = open_comm(group, store, timeout_s)
        if dst not in (None, "shard") and not (type(dst) is int and 0 <= dst < comm.world_size):
            comm.close()
            raise ValueError(f"dst is a rank below {comm.world_size}, 'shard' or None, got {dst!r}.")
        self._comm: Communicator = comm
        self._placements: dict[str, Placement] = {}  # by pattern
        self._placed: dict[str, str] = {}  # by key
        try:
            self._mesh = None if mesh is None else mesh_of(mesh, data_axes, comm.ranks, comm.rank)
            self._part: Communicator | None = None if self._mesh is None else comm.part(self._mesh.data_ranks)
            self._model = self._model_of(dst, check) if self._mesh is not None else None
        except BaseException:
            comm.close()
            raise
        self._store = store
        self._dst: int | Literal["shard"] | None = dst
        self._wait_s = wait_s
        self._bucket_bytes = bucket_bytes
        content = ActivationCache()
        self._held = Held(content, Facts(), new_delta(content))
        self._attempt = 0
        self._deferred = False
        self._dealt = 0  # a digest of the orders that `share` has dealt since the last merge

    def _model_of(self, dst: int | Literal["shard"] | None, check: str | None) -> Model | None:
        """The ranks that have parts of the same model as this one; None where it has all of it. A collective."""
        mesh = self._mesh
        assert mesh is not None
        if len(mesh.model_ranks) == 1:
            return None
        to = None
        if isinstance(dst, int):
            holder = mesh.coordinate(dst)
            to = next(place for place, rank in enumerate(mesh.model_ranks)
                      if all(mesh.coordinate(rank)[axis] == holder[axis] for axis in mesh.model_axes))  # fmt: skip
        return Model(self._comm, self._comm.part(mesh.model_ranks), mesh, to, check is not None)

    def _data_dst(self) -> int | None:
        """Of the ranks that reduce together, the one that the content, or its piece of it, goes to."""
        mesh, dst = self._mesh, self._dst
        if mesh is None or not isinstance(dst, int):
            return dst if isinstance(dst, int) else None
        holder = mesh.coordinate(dst)
        return next(place for place, rank in enumerate(mesh.data_ranks)
                    if all(mesh.coordinate(rank)[axis] == holder[axis] for axis in mesh.data_axes))  # fmt: skip

    @property
    def _data(self) -> Communicator:
        """The ranks that reduce together."""
        return self._comm if self._part is None else self._part

    @property
    def data_rank(self) -> int:
        """This process's place among the ranks that have samples of their own: all, but for a mesh's others."""
        return self._data.rank

    @property
    def data_world_size(self) -> int:
        return self._data.world_size

    @property
    def speaks(self) -> bool:
        """Whether this is the first of the ranks that see the same samples."""
        return self._model is None or self._model.comm.rank == 0

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._comm.rank

    @property
    def world_size(self) -> int:
        return self._comm.world_size

    @property
    def dst(self) -> int | Literal["shard"] | None:
        """The rank that holds the content; None where all do, "shard" where each holds its part."""
        return self._dst

    @property
    def delta(self) -> Delta:
        """What this rank has that the cluster has not merged yet, read-only."""
        return Delta(self._held.delta)

    # -- reading -----------------------------------------------------------------------------------------------

    def _shown(self) -> ActivationCache:
        if self._dst not in (None, "shard", self.rank):
            raise HeldElsewhere(
                f"the content is held by rank {self._dst} (dst={self._dst}), this is rank {self.rank}: read it there, "
                "or make the cache with dst=None."
            )
        return self._held.content

    def _check_here(self, key: str | tuple[Any, ...]) -> None:
        """`HeldElsewhere`, naming the owner, for a reduction of another rank's shard."""
        shards = self._held.facts.shards
        if shards is None:
            return
        keys = [k for layer in site_keys(self, key) for _, k in layer] if isinstance(key, tuple) else [key]
        for one in keys:
            owner = shards.owners.get(one, self.rank)
            if owner != self.rank:
                raise HeldElsewhere(
                    f'{one!r} is held by rank {owner} (dst="shard"), this is rank {self.rank}: read it there, or load '
                    "what cache.save() writes."
                )

    def __getitem__(self, key: str | tuple[Any, ...]) -> Any:
        """See `ActivationCache`; with dst="shard", of a concatenation this rank's rows."""
        self._check_here(key)
        return super().__getitem__(key)

    def count(self, key: str) -> Tensor:
        """See `ActivationCache.count`; with dst="shard", of a concatenation the number of this rank's rows."""
        self._check_here(key)
        return super().count(key)

    def rows(self, key: str) -> dict[str, Tensor]:
        """See `ActivationCache.rows`; with dst="shard", of this rank's rows."""
        self._check_here(key)
        return super().rows(key)

    def offsets(self, key: str) -> Tensor:
        """Where each rank's rows of a concatenation begin when ranks' are put one after the other, and their end: int64
        [W + 1], on every rank. With dst="shard".

        A sample that two ranks hold counts on both. ValueError for what doesn't lie in shards, KeyError.
        """
        if key not in self:
            raise KeyError(f"no key {key!r}: the cache has {len(self)} keys.")
        shards = self._held.facts.shards
        if shards is None or key not in shards.num_rows:
            raise ValueError(f"{key!r} has no rows in shards (dst={self._dst!r}): offsets are of concatenations there.")
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(shards.num_rows[key]).cumsum(0)])

    def __contains__(self, key: object) -> bool:
        return key in self._held.facts.all_keys

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held.facts.all_keys))

    def __len__(self) -> int:
        return len(self._held.facts.all_keys)

    def __str__(self) -> str:
        return repr(self) if self._dst not in (None, self.rank) else super().__str__()

    # -- writing -----------------------------------------------------------------------------------------------

    def register_aggregation(self, key_pattern: str, strategy: Strategy | str | Callable[[list[Any]], Any]) -> None:
        """As `ActivationCache.register_aggregation`; not a collective, but every rank must register alike."""
        content, delta = self._held.content, self._held.delta
        before = content._registry
        content.register_aggregation(key_pattern, strategy)
        try:
            delta.register_aggregation(key_pattern, strategy)
        except ValueError:
            content._registry = before
            raise
        delta._registry = content._registry

    def register_sharding(self, key_pattern: str, dim: int, axis: str) -> None:
        """Say that keys, as `register_aggregation` matches them, are split over an axis of the mesh that isn't data's.

        `dim`: of a value, or of a row, from its end, −1 the last: pieces lie along it in the order of the axis's
        coordinates, and may differ in size. Say it again for a further axis. Every rank must say alike, before values
        of such keys come: `SchemaMismatch` at the merge where ranks differ. ValueError for an axis that can't be.
        """
        mesh = self._mesh
        if mesh is None:
            raise ValueError("register_sharding is of a mesh's axes: DistributedCache(mesh=…, data_axes=[…]).")
        if axis not in mesh.model_axes:
            raise ValueError(f"axis is one of {mesh.model_axes}, along which ranks see the same samples, got {axis!r}.")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim >= 0:
            raise ValueError(f"dim counts from the end of a value's dims, −1 is the last, got {dim!r}.")
        if key_pattern and any(matches(key_pattern, key) for key in (*self._held.delta, *self)):
            raise ValueError(f"there are values of {key_pattern!r} already: register where they are split before.")
        before = [pair for pair in self._placements.get(key_pattern, Placement()).dims if pair[0] != axis]
        self._placements[key_pattern] = Placement((*before, (axis, dim)))
        self._placed.clear()

    def _place(self, cache: ActivationCache) -> None:
        """Note in a cache's schemas how its keys lie over the mesh. `SchemaMismatch` for what can't be split."""
        if not self._placements:
            return
        for key in cache:
            if key not in self._placed:
                found = [pattern for pattern in self._placements if matches(pattern, key)]
                exact = key if key in self._placements else max(found, key=len, default="")
                self._placed[key] = str(self._placements.get(exact, Placement()))
            cache._set_placement(key, self._placed[key])

    def cat(self, local: ActivationCache, index: Iterable[int] | Tensor | None = None) -> None:
        """Fold a rank's cache into its delta; outside deferred mode a collective that merges at once.

        `index`: one entry per sample, its place in the data set; concatenations come out in that order. Keys are
        a union: every rank brings its own, or an empty cache. TypeError for anything but an ActivationCache,
        `SchemaMismatch` for what can't join this rank's delta or the content, `PeerFailed` in deferred mode if another
        rank has given up the block: nothing of `local` is folded then. Outside, it stays in the delta where the merge
        fails.
        """
        if self._deferred:
            self._check_peers()
            self._fold(local, index)
            return
        self._check_open()
        with self._ending():
            self._fold(local, index)
        self._merge()

    def add(
        self,
        key: str,
        value: Any,
        index: int | Iterable[int] | Tensor | None = None,
        weight: float | Tensor | None = None,
        **columns: Tensor | float,
    ) -> None:
        """Fold one value into the delta, in deferred mode; see `ActivationCache.add`. RuntimeError outside."""
        self._need_deferred("add").add(key, value, index, weight, **columns)

    def _fold(self, local: ActivationCache, index: Iterable[int] | Tensor | None) -> None:
        if isinstance(local, (DistributedCache, Delta)):
            raise TypeError(
                "cat expects this rank's own ActivationCache, got a DistributedCache: every rank has its content, "
                f"which would count {self.world_size} times."
            )
        if not isinstance(local, ActivationCache):
            raise TypeError(f"cat expects an ActivationCache, got {type(local).__name__}.")
        self._check_settled()
        held = self._held
        # What the content holds already is checked against it where a key first comes back, so that a value that
        # could never be merged is refused here, and not kept in the delta.
        if any(key in held.facts.schemas and key not in held.delta for key in local):
            part = new_delta(held.content)
            part._absorb(local, index=index)
            self._place(part)
            for key, schema in part._schemas().items():
                known = held.facts.schemas.get(key, schema)
                if known != schema:
                    words = "; ".join(known.explain_difference(schema))
                    raise SchemaMismatch(f"cannot cat {key!r}: the content against this value: {words}.")
            local, index = part, None
        held.delta._absorb(local, index=index)

    def _check_settled(self) -> None:
        if self._held.doubt is not None:
            raise MergeInDoubt(
                "the last merge may have been committed by the others: a value folded now could count twice, a shard "
                "saved now be that of another merge. Call cache.merge() on every rank first, which finds out (after "
                "cache.rejoin(), if the store was lost)."
            )

    @contextlib.contextmanager
    def deferred_mode(self) -> Iterator[DistributedCache]:
        """Within the block `cat` stays on this rank; at its end the cluster merges once: a collective.

        If the block raises on a rank, that rank raises its own error at once and the others `PeerFailed` at
        their next `cat` or at the end; every delta is kept, and `merge()` or a further block takes it along.
        RuntimeError when nested.
        """
        self._check_open()
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
            leave_attempt(self._comm, self._attempt, self.rank, describe_error(error))
            self._attempt, self._dealt = self._attempt + 1, 0
            raise

    def _check_peers(self) -> None:
        heart = self._comm.heart
        if heart is not None and heart.decision not in (None, COMMIT):
            raise as_error(heart.decision, self._comm)

    def _check_open(self) -> None:
        """What all ranks call together is called outside of a block, on a cache that hasn't been closed."""
        if self._deferred:
            raise RuntimeError("deferred_mode is open already: end the outer block first.")
        if self._comm.closed:
            raise RuntimeError("this cache has been closed: its content can be read, but no longer merged.")

    def _need_deferred(self, what: str) -> ActivationCache:
        """The delta, for what accumulates straight into it."""
        if not self._deferred:
            raise RuntimeError(f"{what} goes into the delta: open `with cache.deferred_mode():` first.")
        self._check_peers()
        self._check_settled()
        return self._held.delta

    # -- collectives -------------------------------------------------------------------------------------------

    def merge(self, group: ProcessGroup | None = None) -> None:
        """Merge what the deltas hold: a collective, to try again after a failure; `group`: see `rejoin`."""
        if group is not None:
            self.rejoin(group)
        self._check_open()
        self._merge()

    def _merge(self) -> None:
        limits = (self._data_dst(), self._wait_s, self._bucket_bytes)
        shard = self._dst == "shard"
        try:
            with attempt(self._comm, self._attempt):
                self._place(self._held.delta)
            merge(Party(self._data, self._attempt, self._held, *limits, self._dealt, shard, self._model))
        finally:
            self._attempt, self._dealt = self._attempt + 1, 0

    def rejoin(self, group: ProcessGroup | None = None) -> None:
        """Take content and delta to a new group, as after a rank was lost: a collective over the new group.

        With `dst` the content stays with the process that has it, whatever its rank is now. ValueError on every rank
        if that process isn't there (its content is lost: make a new cache), or, where nothing was merged yet, if
        the group has no rank `dst`. With dst="shard" and something merged, ValueError unless the new group has the same
        ranks in the same order. `PeerFailed` if a rank doesn't come; the cache keeps its old group then.

        The survivors of a lost rank make their group by themselves:
        `torch.distributed.new_group(ranks, use_local_synchronization=True)`.
        """
        if self._deferred:
            raise RuntimeError("deferred_mode is open: end the block first.")
        if self._mesh is not None:
            raise ValueError("a cache of a mesh can't go to another group, whose mesh is another: make a new one.")
        comm = open_comm(group, self._store, self._comm.timeout_s)
        try:
            dst = self._dst if self._dst is None else self._find_content(comm)
        except BaseException:
            comm.close()
            raise
        self._comm.close()
        self._comm, self._dst, self._attempt = comm, dst, 0

    def _find_content(self, comm: Communicator) -> int | Literal["shard"]:
        """The rank of a new group that holds the content, or "shard" where all hold their parts: a collective."""
        facts = self._held.facts
        try:
            rows = comm.gather([int(self._dst == self.rank), facts.epoch, self.rank, self.world_size], lambda: None)
        except CommFailed as error:
            raise PeerFailed(f"a rank was lost while all rejoined: {error}.") from error
        if self._dst == "shard":
            before = [rank for _, _, rank, _ in rows]
            whole = all(known == len(rows) for _, _, _, known in rows) and before == list(range(len(rows)))
            if any(epoch for _, epoch, _, _ in rows) and not whole:
                raise ValueError(
                    f'the content lies in shards (dst="shard") of a group of {max(known for *_, known in rows)}, and '
                    f"the new one has its ranks {before}: shards of ranks that are gone are lost, and those that are "
                    "there keep their places. Read what this rank holds, then make a new DistributedCache."
                )
            return "shard"
        for rank, (holds, *_) in enumerate(rows):
            if holds:
                return rank
        if any(epoch for _, epoch, _, _ in rows):
            raise ValueError(
                f"the content was held by rank {self._dst} (dst={self._dst}), which is not in the new group: it is "
                "lost. Make a new DistributedCache, with dst=None if every rank should hold the content."
            )
        assert self._dst is not None
        if self._dst >= comm.world_size:
            raise ValueError(f"dst={self._dst} is no rank of the new group of {comm.world_size}.")
        return self._dst

    def save(self, path: str | PathLike[str], **info: str) -> None:
        """Write the content to a new folder: a collective. A holder writes, one rename publishes, all learn of it.

        `info`: words for the manifest, such as `model="…"`. FileExistsError if the folder is there: on the rank that
        writes, `PeerFailed` with its words on the others. They wait for as long as it's alive. With dst="shard" every
        rank writes its part, and rank 0 publishes.
        """
        from distcache import sharded, store  # above this module in the import order, so only when asked

        self._check_open()
        writer = self._dst if type(self._dst) is int else 0
        if self._dst == "shard":
            with self._ending():
                self._check_settled()
        try:
            if self._dst == "shard":
                sharded.save(self._comm, self._attempt, self._wait_s, self._held, path, info)
                return
            with attempt(self._comm, self._attempt, "save"):
                arrive(self._comm, self._attempt, self._wait_s, "save")
                if self.rank == writer:
                    store.save(self._held.content, path, info=info, world_size=self.world_size)
                    announce(self._comm, self._attempt)
                else:
                    learn(self._comm, self._attempt, writer)
        finally:
            self._attempt += 1

    def share(self, loader: Any) -> Iterator[tuple[Tensor, Any]]:
        """This rank's (index, batch) of a loader, without padding or duplicates: see `distcache.dealing.share`.

        Not a collective, but every rank must call it with the same loader: the next merge finds out if it didn't.
        """
        order, batches = share(loader, self.data_rank, self.data_world_size)
        self._dealt = (self._dealt + order) % DIGEST_MODULUS
        return batches

    def close(self) -> None:
        """Leave the group; peers that still wait for this rank are told. Not a collective; content can be read on."""
        self._comm.close()
