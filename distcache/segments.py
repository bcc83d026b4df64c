"""Flat storage of states: fields of one reduction and dtype side by side, in chunks that never move.

A hook adds into a view of a chunk, and a merge reduces chunks as they are: the cost of a merge follows the
bytes, not the number of keys. Keys that are allocated together (the heads of a layer) form a slab, one view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from distcache.codec import dtype_name, dtype_named
from distcache.errors import SchemaMismatch
from distcache.schema import DIGEST_MODULUS, FieldSchema, KeySchema, digest_of, strategy_facts
from distcache.strategies import Fieldwise, Reduction, State

RAGGED_STEP = 128  # capacities of ragged dims are multiples of it, so that ranks seldom differ
FIRST_CHUNK_BYTES = 256 * 1024
LARGEST_CHUNK_BYTES = 64 * 1024 * 1024


class SegmentId(NamedTuple):
    """What fields must share to lie in one segment.

    `centred` names the strategy whose states don't combine field by field (`Moments`): they stay apart, so
    that every other segment is combined by one operation.
    """

    reduction: str
    dtype: str
    round: int
    device: str
    centred: str


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one field of one key's state lies."""

    segment: SegmentId
    chunk: int
    offset: int  # elements from the chunk's start
    shape: tuple[int, ...]  # capacity: what a ragged field may hold without moving

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's strategy, schema and slots by field name."""

    strategy: Fieldwise
    schema: KeySchema
    slots: Mapping[str, Slot]
    slab: tuple[str, ...]  # the keys that were allocated together, this one among them

    def layout_digest(self) -> int:
        return digest_of(self.schema.key, *((name, tuple(slot.segment), slot.chunk, slot.offset, slot.shape)
                                            for name, slot in self.slots.items()))  # fmt: skip


class Segment:
    """A list of flat chunks of one dtype, filled from the front. What lies behind `used` was never touched."""

    __slots__ = ("chunks", "device", "dtype", "identity", "used")

    def __init__(self, segment_id: SegmentId, device: torch.device) -> None:
        self.dtype = dtype_named(segment_id.dtype)
        self.identity = Reduction(segment_id.reduction).identity(self.dtype)
        self.device = device
        self.chunks: list[Tensor] = []
        self.used: list[int] = []

    def allocate(self, numel: int) -> tuple[int, int]:
        """(chunk, offset) of `numel` elements that hold the identity."""
        last = len(self.chunks) - 1
        if last < 0 or self.used[last] + numel > len(self.chunks[last]):
            previous = len(self.chunks[last]) * 2 if self.chunks else FIRST_CHUNK_BYTES // self.dtype.itemsize
            size = max(numel, min(previous, LARGEST_CHUNK_BYTES // self.dtype.itemsize))
            with torch.inference_mode(False):  # an inference tensor could not be added to outside
                self.chunks.append(torch.empty(size, dtype=self.dtype, device=self.device))
            self.used.append(0)
            last += 1
        offset = self.used[last]
        self.used[last] += numel
        self.chunks[last][offset : offset + numel].fill_(self.identity)
        return last, offset

    def filled(self) -> list[Tensor]:
        """The used part of every chunk: contiguous, and all that a collective needs to move."""
        return [chunk[:used] for chunk, used in zip(self.chunks, self.used, strict=True)]

    def copy(self, device: torch.device | None = None) -> Segment:
        twin = object.__new__(Segment)
        twin.dtype, twin.identity, twin.device = self.dtype, self.identity, device or self.device
        with torch.inference_mode(False):
            twin.chunks = [part.to(twin.device, copy=True) for part in self.filled()]
        twin.used = list(self.used)
        return twin


class Arena:
    """The states of field-wise strategies of one cache, by key, in segments.

    `content_digest` and `layout_digest` are sums over keys, kept up as keys are added, so that asking whether
    two ranks agree costs nothing per key.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.segments: dict[SegmentId, Segment] = {}
        self.content_digest = 0
        self.layout_digest = 0

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for segment in self.segments.values() for part in segment.filled())

    def reserve(
        self,
        keys: Sequence[str],
        strategy: Fieldwise,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        result: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make room, filled with identities, for keys of one strategy and shape; a slab if there are several."""
        fields = strategy.layout(shapes)
        facts = strategy_facts(strategy)
        specs = tuple(
            FieldSchema(
                f.name,
                tuple(None if ragged else n for n, ragged in zip(
                    shapes[f.name], strategy.ragged_dims(f.name, len(shapes[f.name])), strict=True)),
                dtype_name(dtypes[f.name]),
                f.reduction.value,
                f.round,
            )
            for f in fields
        )  # fmt: skip
        schemas = [
            KeySchema(key, "fields", facts, specs, result=dtype_name(result), device=device.type) for key in keys
        ]
        self._place(schemas, strategy, {f.name: capacity(strategy, f.name, shapes[f.name]) for f in fields}, device)

    def _place(
        self,
        schemas: Sequence[KeySchema],
        strategy: Fieldwise,
        capacities: Mapping[str, tuple[int, ...]],
        device: torch.device,
    ) -> None:
        slots: list[dict[str, Slot]] = [{} for _ in schemas]
        centred = type(strategy).__name__ if any(f.round for f in schemas[0].fields) else ""
        for field in schemas[0].fields:
            segment_id = SegmentId(field.reduction, field.dtype, field.round, device.type, centred)
            shape = capacities[field.name]
            numel = math.prod(shape)
            segment = self.segments.get(segment_id)
            if segment is None:
                segment = self.segments[segment_id] = Segment(segment_id, device)
            chunk, offset = segment.allocate(numel * len(schemas))
            for i, held in enumerate(slots):
                held[field.name] = Slot(segment_id, chunk, offset + i * numel, shape)
        slab = tuple(schema.key for schema in schemas)
        for schema, held in zip(schemas, slots, strict=True):
            self._enter(Entry(strategy, schema, held, slab))

    def _enter(self, entry: Entry) -> None:
        key = entry.schema.key
        old = self.entries.get(key)
        if old is not None:
            self._count(old, -1)
        self.entries[key] = entry  # a key that grows keeps its place in the order
        self._count(entry, 1)

    def _count(self, entry: Entry, sign: int) -> None:
        self.content_digest = (self.content_digest + sign * entry.schema.digest) % DIGEST_MODULUS
        self.layout_digest = (self.layout_digest + sign * entry.layout_digest()) % DIGEST_MODULUS

    def drop(self, key: str) -> None:
        """Forget a key; its room stays, filled with identities."""
        entry = self.entries.pop(key)
        self._count(entry, -1)
        for slot in entry.slots.values():
            self._view(slot).fill_(self.segments[slot.segment].identity)

    def _view(self, slot: Slot) -> Tensor:
        return self.segments[slot.segment].chunks[slot.chunk][slot.offset : slot.offset + slot.numel].view(slot.shape)

    def state(self, key: str) -> State:
        """The key's state: views into chunks, at full capacity."""
        return {name: self._view(slot) for name, slot in self.entries[key].slots.items()}

    def slab(self, keys: Sequence[str]) -> State | None:
        """The states of several keys as views [K, …]; None where their slots don't lie one after the other."""
        entries = [self.entries[key] for key in keys]
        views = {}
        for name, first in entries[0].slots.items():
            for i, entry in enumerate(entries):
                if entry.slots.get(name) != replace(first, offset=first.offset + i * first.numel):
                    return None
            chunk = self.segments[first.segment].chunks[first.chunk]
            views[name] = chunk[first.offset : first.offset + first.numel * len(keys)].view(len(keys), *first.shape)
        return views

    def fold(self, keys: Sequence[str], state: State, result: torch.dtype) -> None:
        """Fold a state whose fields are [K, …] into K keys that already have room: one operation a field.

        `SchemaMismatch` if it doesn't fit, before anything has changed.
        """
        entry = self.entries[keys[0]]
        self.check(keys[0], entry.strategy, {n: (tuple(t.shape[1:]), t.dtype) for n, t in state.items()}, result)
        wanted = {name: tuple(tensor.shape[1:]) for name, tensor in state.items()}
        if any(not fits(wanted[name], slot.shape) for name, slot in entry.slots.items()):
            self.grow(entry.slab, wanted)
        together = self.slab(keys)
        if together is not None:
            entry.strategy.fold_(together, {n: t.to(together[n].device) for n, t in state.items()})
            return
        for i, key in enumerate(keys):
            mine = self.state(key)
            self.entries[key].strategy.fold_(mine, {n: t[i].to(mine[n].device) for n, t in state.items()})

    def check(
        self,
        key: str,
        strategy: Fieldwise,
        fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        result: torch.dtype,
    ) -> None:
        """`SchemaMismatch` naming what differs, if a state of these fields can't join this key's."""
        entry = self.entries[key]
        if entry.strategy != strategy:
            raise SchemaMismatch(f"cannot fold into {key!r}: it holds a state of {entry.strategy}, got {strategy}.")
        held = {f.name: f for f in entry.schema.fields}
        if set(held) != set(fields):
            raise SchemaMismatch(
                f"cannot fold into {key!r}: its state has {sorted(held)}, the new value brings {sorted(fields)}. "
                "Give every value of a key a weight, or none."
            )
        dtypes = strategy.accumulators({name: dtype for name, (_, dtype) in fields.items()})
        for name, (shape, _) in fields.items():
            spec = held[name]
            same = len(shape) == len(spec.shape) and all(
                m is None or m == n for m, n in zip(spec.shape, shape, strict=True)
            )
            if not same or dtype_name(dtypes[name]) != spec.dtype:
                hint = (
                    ""
                    if entry.strategy.ragged
                    else f" For different sizes register {type(strategy).__name__}(ragged=True)."
                )
                raise SchemaMismatch(
                    f"cannot fold into {key!r}: expected {name} of {spec.dtype} "
                    f"{tuple('*' if n is None else n for n in spec.shape)}, got {dtype_name(dtypes[name])} {shape}.{hint}"
                )
            capacity(strategy, name, shape)  # raises where `size` is exceeded
        if entry.schema.result != dtype_name(result):
            raise SchemaMismatch(
                f"cannot fold into {key!r}: its values were such that results are {entry.schema.result}, "
                f"the new one asks for {dtype_name(result)}. Give all values of a key one dtype."
            )

    def grow(self, keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give keys of one slab room for larger ragged fields; their old room is filled with identities."""
        entries = [self.entries[key] for key in keys]
        strategy = entries[0].strategy
        old = [self.state(key) for key in keys]
        capacities = {
            name: tuple(map(max, slot.shape, capacity(strategy, name, shapes[name])))
            for name, slot in entries[0].slots.items()
        }
        device = next(iter(old[0].values())).device
        self._place([entry.schema for entry in entries], strategy, capacities, device)
        for key, state in zip(keys, old, strict=True):
            strategy.fold_(self.state(key), state)
            for name, tensor in state.items():
                tensor.fill_(self.segments[entries[0].slots[name].segment].identity)

    def copy(self, device: torch.device | None = None) -> Arena:
        """A twin with the same layout: one memcpy a chunk."""
        if device is not None and any(segment.device != device for segment in self.segments.values()):
            return self._moved(device)
        twin = Arena()
        twin.entries = dict(self.entries)
        twin.content_digest, twin.layout_digest = self.content_digest, self.layout_digest
        twin.segments = {segment_id: segment.copy() for segment_id, segment in self.segments.items()}
        return twin

    def _moved(self, device: torch.device) -> Arena:
        """A copy on another device: segments are named by their device, so every key is entered anew."""
        twin = Arena()
        for slab in self.slabs():
            entry = self.entries[slab[0]]
            schemas = [replace(self.entries[key].schema, device=device.type) for key in slab]
            twin._place(schemas, entry.strategy, {n: s.shape for n, s in entry.slots.items()}, device)
            for key in slab:
                for name, tensor in self.state(key).items():
                    twin._view(twin.entries[key].slots[name]).copy_(tensor)
        return twin

    def slabs(self) -> Iterator[tuple[str, ...]]:
        """The keys as they were allocated together, in order."""
        done: set[str] = set()
        for key, entry in self.entries.items():
            if key not in done:
                slab = tuple(k for k in entry.slab if k in self.entries and self.entries[k].slab == entry.slab)
                done.update(slab)
                yield slab

    def capacities(self, key: str) -> dict[str, tuple[int, ...]]:
        """Field shapes with their room, by field."""
        return {name: slot.shape for name, slot in self.entries[key].slots.items()}

    def relaid(
        self,
        schemas: Sequence[KeySchema],
        strategies: Mapping[str, Fieldwise],
        capacities: Mapping[str, Mapping[str, tuple[int, ...]]],
        device: torch.device,
    ) -> Arena:
        """A copy in the layout that this order of keys and these capacities give; absent keys hold identities."""
        twin = Arena()
        for schema in schemas:
            key = schema.key
            twin._place([schema], strategies[key], capacities[key], device)
            if key in self.entries:
                twin.entries[key].strategy.fold_(twin.state(key), self.state(key))
        return twin

    def fold_arena(self, other: Arena) -> None:
        """Fold another arena into this one: an operation a chunk where layouts agree, a key at a time where not."""
        if self.layout_digest == other.layout_digest and self.content_digest == other.content_digest:
            for segment_id, segment in self.segments.items():
                if not segment_id.centred:
                    for mine, theirs in zip(segment.filled(), other.segments[segment_id].filled(), strict=True):
                        Reduction(segment_id.reduction).fold_(mine, theirs)
            for key, entry in self.entries.items():
                if any(f.round for f in entry.schema.fields):
                    entry.strategy.fold_(self.state(key), other.state(key))
            return
        for slab in other.slabs():
            new = [key for key in slab if key not in self.entries]
            entry = other.entries[slab[0]]
            if new:
                device = other.segments[next(iter(entry.slots.values())).segment].device
                self._place(
                    [other.entries[key].schema for key in new],
                    entry.strategy,
                    other.capacities(slab[0]),
                    device,
                )
            for key in slab:
                self._fold_key(other, key)

    def _fold_key(self, other: Arena, key: str) -> None:
        theirs = other.state(key)
        if any(not fits(t.shape, self.entries[key].slots[name].shape) for name, t in theirs.items()):
            self.grow(self.entries[key].slab, {name: tuple(t.shape) for name, t in theirs.items()})
        mine = self.state(key)
        self.entries[key].strategy.fold_(mine, {n: t.to(mine[n].device) for n, t in theirs.items()})


def fits(shape: Sequence[int], room: Sequence[int]) -> bool:
    """Whether a block of this shape lies within that room."""
    return len(shape) == len(room) and all(n <= m for n, m in zip(shape, room, strict=True))


def capacity(strategy: Fieldwise, field: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The room a field of this shape is given: ragged dims in steps of 128, or the strategy's `size`.

    ValueError where `size` is exceeded.
    """
    ragged = strategy.ragged_dims(field, len(shape))
    size = strategy.size
    room = []
    for d, (n, grows) in enumerate(zip(shape, ragged, strict=True)):
        limit = size[d] if isinstance(size, tuple) else size
        if not grows:
            room.append(n)
        elif limit is None:
            room.append(-(-n // RAGGED_STEP) * RAGGED_STEP)
        elif n > limit:
            raise SchemaMismatch(
                f"a value of shape {shape} exceeds size={size} of {type(strategy).__name__} in dim {d}."
            )
        else:
            room.append(limit)
    return tuple(room)
