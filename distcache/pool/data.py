"""Ray Data: batches of a data set become states in `map_batches`, and the states one cache in a tree of folds.

What a call of `map_batches` gives is one row: `state`, all that its samples have shown, as bytes, and `key`, which says
what they were. Ray repeats what was lost and may give it twice, so whoever folds looks at the keys first: a state whose
key is known is left out, and one that shares only some samples with another is an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from distcache import codec
from distcache.cache import ActivationCache
from distcache.collect import pad_and_stack, run_batch, run_samples
from distcache.errors import BadCache, DuplicateSamples, PeerFailed
from distcache.hooks import record
from distcache.ledger import IntervalSet, Ledger
from distcache.packed import Packed, pack
from distcache.pool.actors import ModelFactory, Worker, fold_all, on_cpu, own, the_ray
from distcache.pool.crew import why_of
from distcache.pool.driver import as_error
from distcache.pool.work import Failure, State
from distcache.sites import Sites

FAN_IN = 8  # states that one task folds
IN_FLIGHT = 2  # tasks of a kind for each node, each a process; blocks beyond wait with Ray Data, which slows down
ALIGNMENT = 64  # bytes, of a buffer in a row


def collect_batches(
    model_factory: ModelFactory,
    sites: Sites,
    *,
    batch_size: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    columns: Sequence[str] = (),
    index: str = "index",
) -> type:
    """A class for `ds.map_batches`, whose actors make the model once and then run it over rows of the data set:

        data = ray.data.from_items([{"index": i, **sample} for i, sample in enumerate(samples)])
        states = data.map_batches(dc.collect_batches(factory, sites, batch_size=8), batch_size=512, concurrency=4)
        cache = dc.fold(states)

    Each call gives one row, with the state of all its samples. A state of reductions is as large after one sample as
    after a thousand (an averaged pattern of 30 layers and 9 heads over 256 tokens takes 142 MB), and is written, moved
    and folded once a call. So give `map_batches` large batches, and the model small ones, by `batch_size` here; or use
    a `CachePool`, whose actors keep their states.

    A sample is a row as a dict: numbers and words as they are, arrays and lists of numbers as tensors. Leave out what
    the model doesn't take (`ds.drop_columns`), unless `collate` or `forward` does.

    Args:
        model_factory: called in each actor: gives the model, or (model, collate).
        sites: see `distcache.record`. What each keeps or reduces is the site's own (`Site(…, reduce=…)`).
        batch_size: samples in a forward pass; by default all of a call's.
        collate, forward, columns: see `distcache.collect`.
        index: the column that numbers the samples of the data set. It isn't given to the model.

    A call raises ValueError where that column isn't there, TypeError for batches that aren't dicts of arrays and for
    numbers that aren't integers, `DuplicateSamples` for a number that comes twice in it, and what `record` raises.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}.")
    settings = _Settings(model_factory, sites, batch_size, collate, forward, tuple(columns), index, uuid.uuid4().hex)

    class CollectBatches(_Collector):
        def __init__(self) -> None:
            super().__init__(settings)

    return CollectBatches


@dataclass(frozen=True, slots=True)
class _Settings:
    """What `collect_batches` was given; `run` tells its rows from those of another call."""

    factory: ModelFactory
    sites: Sites
    batch_size: int | None
    collate: Callable[[list[Any]], Any] | None
    forward: Callable[[nn.Module, Any], Any] | None
    columns: tuple[str, ...]
    index: str
    run: str


class _Collector:
    """From rows to a row of key and state, with one model."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        worker = Worker(settings.factory)
        failure = worker.start()
        if failure is not None:
            raise as_error(failure, "the model factory raised: ")
        self._model, self._collate = worker._model, settings.collate or worker._collate or pad_and_stack

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        given, state = self._settings, State()
        numbers = _numbers(batch, given.index)
        names = [name for name in batch if name != given.index]
        samples = {n: {name: _field(batch[name][i]) for name in names} for i, n in enumerate(numbers)}
        size = given.batch_size or max(1, len(numbers))
        with record(self._model, given.sites, into=state) as rec, torch.no_grad():
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                run_samples(rec, self._model, samples, part, self._collate, given.forward or run_batch, given.columns)
        key = Key(given.run, _digest(batch), IntervalSet.of(numbers))
        return {"key": [key.as_text()], "state": to_row(pack(on_cpu(state)))[np.newaxis]}


def _numbers(batch: Any, index: str) -> list[int]:
    """The samples' numbers. ValueError, TypeError, `DuplicateSamples`."""
    if not isinstance(batch, Mapping) or not all(isinstance(column, np.ndarray) for column in batch.values()):
        raise TypeError(
            f"expected a batch as a dict of numpy arrays, got {type(batch).__name__}: leave out batch_format= of "
            "map_batches, or set it to 'numpy'."
        )
    if index not in batch:
        raise ValueError(
            f"rows have no column {index!r} that says which sample of the data set they are: their columns are "
            f"{sorted(batch)}. Number the samples where the data set is made, ray.data.from_items([{{{index!r}: i, "
            "**sample} for i, sample in enumerate(samples)]), or name the column that has numbers: "
            "collect_batches(…, index='id')."
        )
    column = batch[index]
    if column.dtype.kind not in "iu" or column.ndim != 1:
        raise TypeError(f"column {index!r}: expected an integer per row, got {column.dtype} {column.shape}.")
    numbers = column.tolist()
    if len(set(numbers)) < len(numbers):
        raise DuplicateSamples(
            f"column {index!r}: {len(numbers)} rows have {len(set(numbers))} numbers, so that samples would count "
            "twice. Number the samples of the whole data set, not those of each file."
        )
    return numbers


def _field(value: Any) -> Any:
    """A field of a sample, of a numpy column."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.tensor(value)  # a copy: Ray's memory is read-only
    return value.tolist() if isinstance(value, np.ndarray) else value


def _digest(batch: Mapping[str, np.ndarray]) -> str:
    """Of everything in a batch: by numbers alone, samples of another file would be taken for those of this one."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if not isinstance(value, np.ndarray):
            digest.update(repr(value).encode(errors="backslashreplace"))
        elif value.dtype == object:
            for part in value.flat:
                add(part)
        else:
            digest.update(f"{value.dtype.str}{value.shape}".encode())
            digest.update(value.tobytes())

    for name in sorted(batch):
        digest.update(repr(name).encode())
        add(batch[name])
    return digest.hexdigest()


# -- rows --------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What is behind a state: of which call of `collect_batches`, what was in its batch, and the samples' numbers."""

    run: str
    digest: str
    samples: IntervalSet

    def as_text(self) -> str:
        return json.dumps([self.run, self.digest, self.samples.bounds.reshape(-1).tolist()])

    @classmethod
    def of(cls, text: str) -> Key:
        """`BadCache` for what `as_text` didn't make."""
        try:
            run, digest, bounds = json.loads(text)
            return cls(str(run), str(digest), IntervalSet(bounds))
        except (TypeError, ValueError) as error:
            raise BadCache(f"a key of a row that collect_batches didn't make: {str(text)[:80]!r}.") from error


def to_row(packed: Packed) -> np.ndarray:
    """A packed cache as bytes, uint8 [n]: the number of bytes of a head, the head, then the buffers, each aligned."""
    head = codec.encode([packed.header, [[buffer.dtype.str, buffer.nbytes] for buffer in packed.buffers]])
    parts = [np.array([len(head)], "<u8"), np.frombuffer(head, np.uint8), *packed.buffers]
    offsets = _offsets([part.nbytes for part in parts])
    row = np.empty(offsets[-1], np.uint8)
    for part, start, stop in zip(parts, offsets, offsets[1:], strict=False):
        row[start : start + part.nbytes] = part.view(np.uint8)
        row[start + part.nbytes : stop] = 0
    return row


def from_row(row: np.ndarray) -> Packed:
    """The inverse: its buffers are views where the row lies at an aligned address. `BadCache` for what isn't one."""
    try:
        if row.ctypes.data % ALIGNMENT:
            row = _aligned(row)
        nbytes = int(row[:8].view("<u8")[0])
        start = _offsets([8])[-1]
        header, kinds = codec.decode(row[start : start + nbytes].tobytes())
        sizes = [size for _, size in kinds]
        offsets = _offsets([8, nbytes, *sizes])
        if offsets[-1] != len(row):
            raise ValueError(f"{offsets[-1]} bytes are expected")
        begins = offsets[2:-1]
        buffers = [row[b : b + n].view(dtype) for b, (dtype, n) in zip(begins, kinds, strict=True)]
    except (TypeError, ValueError, IndexError) as error:
        raise BadCache(f"a state of {len(row)} bytes that collect_batches didn't make: {error}.") from error
    return Packed(header, buffers)


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each of some parts begins, and the end."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return found


def _aligned(row: np.ndarray) -> np.ndarray:
    room = np.empty(len(row) + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    room[start : start + len(row)] = row
    return room[start : start + len(row)]


# -- the fold ----------------------------------------------------------------------------------------------------------


def fold(ds: Any, *, timeout_s: float = 600.0) -> ActivationCache:
    """The states of a data set's rows as one cache, on the CPU of this process. Runs the data set, if it hasn't run.

    States are folded where they lie, while others are being collected. One that comes twice, because Ray did a block
    again, counts once. Concatenations come in the samples' order; plain functions are called once, here, on all values.

    Args:
        ds: what `map_batches` with a class of `collect_batches` gives, or a union of several.
        timeout_s: how long the data set may give nothing, and a task may take.

    Raises:
        DuplicateSamples: two batches that aren't the same have a sample in common.
        SchemaMismatch: states of two batches don't fit.
        PeerFailed: nothing has come for `timeout_s`, or what folds has died again and again.
        ValueError: rows of another kind. What collecting raises comes as Ray Data's own error.
    """
    if timeout_s <= 0:
        raise ValueError(f"timeout_s is positive, got {timeout_s}.")
    tree = _Tree(timeout_s)
    with _blocks(ds, timeout_s) as blocks:
        for block in blocks:
            tree.add(block)
    return tree.result()


@contextlib.contextmanager
def _blocks(ds: Any, timeout_s: float) -> Iterator[Iterator[Any]]:
    """A data set's blocks, as refs, as they come. A thread waits for Ray Data, which knows no limit."""
    found: queue.Queue[Any] = queue.Queue(1)
    left, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                return found.put(item, timeout=0.1)

    def pull() -> None:
        try:
            for bundle in ds.iter_internal_ref_bundles():
                for ref in bundle.block_refs:
                    put(ref)
                if left.is_set():
                    return
            put(end)
        except Exception as error:
            put(error)

    def blocks() -> Iterator[Any]:
        while True:
            try:
                item = found.get(timeout=timeout_s)
            except queue.Empty:
                raise PeerFailed(
                    f"the data set has given nothing for {timeout_s:g} s: see Ray Data's messages."
                ) from None
            if item is end:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    threading.Thread(target=pull, name="distcache-blocks", daemon=True).start()
    try:
        yield blocks()
    finally:
        left.set()


class _Counted:
    """The keys of states that are folded."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._seen: dict[str, Ledger] = {}  # by run

    def add(self, text: str) -> bool:
        """Whether this state is new, and to be folded. `DuplicateSamples` where some of its samples aren't new."""
        if text in self._known:
            return False
        key = Key.of(text)
        seen = self._seen.setdefault(key.run, Ledger())
        twice = functools.reduce(operator.or_, (part & key.samples for part in seen._seen.get(_ALL, ())), IntervalSet())
        if len(twice):
            raise DuplicateSamples(
                f"{len(twice)} sample(s) come in two batches that aren't the same: {twice.words()}. Number the samples "
                "of the whole data set, each once; batches that are done again have to be cut alike."
            )
        seen.add(_ALL, key.samples)
        self._known.add(text)
        return True


class _Tree:
    """Folds as states come: of so many, a task makes one, and of so many of these another."""

    def __init__(self, timeout_s: float) -> None:
        self._ray, self._timeout_s = the_ray(), timeout_s
        self._in_flight = IN_FLIGHT * sum(node["Alive"] for node in self._ray.nodes())
        # They need memory's bandwidth rather than a core, and must not wait for one that the model's actors keep.
        self._keys, self._fold_rows, self._fold = (
            self._ray.remote(num_cpus=0, num_returns=n)(f) for f, n in ((_keys_of, 1), (_fold_rows, 2), (_fold, 2))
        )
        self._counted = _Counted()
        self._read: deque[tuple[Any, Any]] = deque()  # blocks, and their keys to be
        self._rows: list[tuple[Any, int]] = []  # states to be folded: a block, and the row there
        self._levels: list[list[Any]] = []  # folded ones
        self._asked: deque[Any] = deque()  # what tasks will say

    def add(self, block: Any) -> None:
        self._read.append((block, self._keys.remote(block)))
        if len(self._read) == self._in_flight:
            self._take()

    def result(self) -> ActivationCache:
        while self._read:
            self._take()
        if self._rows:
            self._fold_next()
        left = [packed for level in self._levels for packed in level]
        while len(left) > 1:
            said, packed = self._fold.remote(*left[:FAN_IN])
            self._hear(said)
            left = [*left[FAN_IN:], packed]
        while self._asked:
            self._answer(self._asked.popleft())
        if not left:
            return ActivationCache()
        found = own(self._answer(left[0]))
        found._call_functions()
        found._keeps_lists = False
        return found

    def _take(self) -> None:
        block, keys = self._read.popleft()
        self._rows += [(block, row) for row, text in enumerate(self._answer(keys)) if self._counted.add(text)]
        while len(self._rows) >= FAN_IN:
            self._fold_next()

    def _fold_next(self) -> None:
        part, self._rows = self._rows[:FAN_IN], self._rows[FAN_IN:]
        blocks = list(dict.fromkeys(block for block, _ in part))
        said, packed = self._fold_rows.remote([(blocks.index(block), row) for block, row in part], *blocks)
        self._push(0, said, packed)

    def _push(self, level: int, said: Any, packed: Any) -> None:
        self._hear(said)
        if level == len(self._levels):
            self._levels.append([])
        self._levels[level].append(packed)
        if len(self._levels[level]) == FAN_IN:
            full, self._levels[level] = self._levels[level], []
            self._push(level + 1, *self._fold.remote(*full))

    def _hear(self, said: Any) -> None:
        """What a task says is heard once many others have been asked."""
        self._asked.append(said)
        if len(self._asked) > self._in_flight:
            self._answer(self._asked.popleft())

    def _answer(self, ref: Any) -> Any:
        try:
            found = self._ray.get(ref, timeout=self._timeout_s)
        except self._ray.exceptions.GetTimeoutError:
            raise PeerFailed(f"a task of the fold has said nothing for {self._timeout_s:g} s.") from None
        except self._ray.exceptions.RayError as error:
            raise PeerFailed(f"the states could not be folded: {why_of(error)}.") from error
        if isinstance(found, Failure):
            raise as_error(found, "states could not be folded: ")
        return found


_ALL = frozenset({"samples"})


# -- in the tasks ------------------------------------------------------------------------------------------------------


def _keys_of(block: Any) -> list[str] | Failure:
    try:
        return [str(text) for text in _column(block, "key")]
    except Exception as error:
        return Failure.of(error)


def _fold_rows(rows: Sequence[tuple[int, int]], *blocks: Any) -> tuple[Failure | None, Packed | None]:
    """Of the blocks with these numbers these rows, as one state."""
    try:
        states = [_column(block, "state") for block in blocks]
        return None, pack(fold_all(from_row(states[block][row]) for block, row in rows))
    except Exception as error:
        return Failure.of(error), None


def _fold(*packed: Packed) -> tuple[Failure | None, Packed | None]:
    try:
        return None, pack(fold_all(packed))
    except Exception as error:
        return Failure.of(error), None


def _column(block: Any, name: str) -> np.ndarray:
    """A column of a block of Ray Data's, read where it lies."""
    from ray.data.block import BlockAccessor

    table: Any = BlockAccessor.for_block(block)
    if not table.num_rows():
        return np.empty(0, dtype=object)
    if name not in (names := table.column_names()):
        raise ValueError(
            f"expected the rows that map_batches with a class of collect_batches gives, got the columns {names}."
        )
    return table.to_numpy(name)
