"""Flat storage of states: fields of one reduction and dtype side by side, in chunks that never move.

A hook adds into a view of a chunk, and a merge reduces chunks as they are: the cost of a merge follows the
bytes, not the number of keys. Keys that are allocated together (the heads of a layer) form a slab, one view.
Only a key that grows or goes leaves its place; the hole holds identities, so that it can be reduced with the
rest, until somebody else moves in.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from distcache.codec import dtype_name, dtype_named
from distcache.errors import SchemaMismatch, TooLarge
from distcache.memory import available_bytes, human
from distcache.mesh import Placement
from distcache.schema import DIGEST_MODULUS, FieldSchema, KeySchema, digest_of, strategy_facts
from distcache.strategies import Field, Fieldwise, Gathered, Reduction, State

RAGGED_STEP = 128  # capacities of ragged dims are multiples of it, so that ranks seldom differ
FIRST_CHUNK_BYTES = 4 * 1024 * 1024  # a collective each chunk: small caches should have one; untouched pages are free
LARGEST_CHUNK_BYTES = 64 * 1024 * 1024

# What collectives reduce on every backend. gloo refuses int16, uint16, uint32 and float8; NCCL takes a sum of bool for
# a maximum; extremes of floats travel as integers of their size, which for 2 bytes gloo refuses.
_REDUCIBLE = (torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64)
_SUMS_TOO, _EXTREMES_TOO = (torch.float16, torch.bfloat16), (torch.bool,)


class SegmentId(NamedTuple):
    """What fields must share to lie in one segment.

    `apart` names strategy and field where states don't combine field by field (`Moments`, `TopK`): they stay apart, so
    that every other segment is combined by one operation, and field from field, so that those of many keys lie side by
    side. `gathered`: they don't even reduce field by field, in rounds.
    """

    reduction: str
    dtype: str
    round: int
    device: str
    apart: str
    gathered: bool


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

    def precedes(self, other: Slot) -> bool:
        """Whether `other` lies right behind and is as large."""
        beside = other.offset == self.offset + self.numel and other.shape == self.shape
        return beside and other.chunk == self.chunk and other.segment == self.segment


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's strategy, schema and slots by field name."""

    strategy: Fieldwise
    schema: KeySchema
    slots: Mapping[str, Slot]
    slab: tuple[str, ...]  # the keys that lie side by side, one after the other, this one among them
    digest: int = field(init=False, compare=False, repr=False)  # of where it lies

    def __post_init__(self) -> None:
        places = [(name, tuple(slot.segment), slot.chunk, slot.offset, slot.shape) for name, slot in self.slots.items()]
        object.__setattr__(self, "digest", digest_of(self.schema.key, places))

    def precedes(self, other: Entry) -> bool:
        """Whether `other` lies right behind, with a state of the same kind."""
        return (
            self.strategy == other.strategy
            and self.slots.keys() == other.slots.keys()
            and all(slot.precedes(other.slots[name]) for name, slot in self.slots.items())
        )


class Span(NamedTuple):
    """A stretch of a chunk, in elements, whose states one rank owns."""

    chunk: int
    start: int
    stop: int
    owner: int


class Segment:
    """A list of flat chunks of one dtype, filled from the front. What lies behind `used` was never touched.

    `holes` are (chunk, offset, numel) of room before `used` that was given back: they hold identities.
    """

    __slots__ = ("chunks", "device", "dtype", "holes", "identity", "used")

    def __init__(self, segment_id: SegmentId, device: torch.device) -> None:
        self.dtype = dtype_named(segment_id.dtype)
        self.identity = Reduction(segment_id.reduction).identity(self.dtype)
        self.device = device
        self.chunks: list[Tensor] = []
        self.used: list[int] = []
        self.holes: list[tuple[int, int, int]] = []

    def allocate(self, numel: int) -> tuple[int, int]:
        """(chunk, offset) of `numel` elements that hold the identity."""
        for i, (chunk, offset, room) in enumerate(self.holes):
            if room >= numel:
                self.holes[i : i + 1] = [(chunk, offset + numel, room - numel)] if room > numel else []
                return chunk, offset
        for chunk, used in enumerate(self.used):
            if used + numel <= len(self.chunks[chunk]):
                break
        else:
            chunk = self._new_chunk(numel)
        offset = self.used[chunk]
        self.used[chunk] += numel
        self.chunks[chunk][offset : offset + numel].fill_(self.identity)
        return chunk, offset

    def _new_chunk(self, numel: int) -> int:
        twice = len(self.chunks[-1]) * 2 if self.chunks else 0
        size = max(FIRST_CHUNK_BYTES // self.dtype.itemsize, twice)
        size = max(numel, min(size, LARGEST_CHUNK_BYTES // self.dtype.itemsize))
        with torch.inference_mode(False):  # an inference tensor could not be added to outside
            tensor = torch.empty(size, dtype=self.dtype, device=self.device)
        for chunk, used in enumerate(self.used):
            if not used:  # one that was emptied
                self.chunks[chunk] = tensor
                return chunk
        self.chunks.append(tensor)
        self.used.append(0)
        return len(self.chunks) - 1

    def release(self, chunk: int, offset: int, numel: int) -> None:
        """Give room back; what lies last shortens its chunk, and an empty chunk's memory goes."""
        if not numel:
            return
        self.chunks[chunk][offset : offset + numel].fill_(self.identity)
        holes: list[tuple[int, int, int]] = []
        for hole in sorted([*self.holes, (chunk, offset, numel)]):
            if holes and holes[-1][0] == hole[0] and sum(holes[-1][1:]) == hole[1]:
                hole = (hole[0], holes[-1][1], holes.pop()[2] + hole[2])
            holes.append(hole)
        self.holes = [hole for hole in holes if hole[0] != chunk or hole[1] + hole[2] < self.used[chunk]]
        if len(self.holes) < len(holes):
            self.used[chunk] = next(start for c, start, n in holes if c == chunk and start + n == self.used[chunk])
        if not self.used[chunk]:
            self.chunks[chunk] = self.chunks[chunk].new_empty(0)
        while self.used and not self.used[-1]:
            self.used.pop()
            self.chunks.pop()

    def filled(self) -> list[Tensor]:
        """The used part of every chunk: contiguous, and all that a collective needs to move."""
        return [chunk[:used] for chunk, used in zip(self.chunks, self.used, strict=True)]

    def copy(self, spare: Segment | None = None) -> Segment:
        """A twin: into the chunks of `spare`, which is given up, where they are as large; else into new ones."""
        twin = object.__new__(Segment)
        twin.dtype, twin.identity, twin.device = self.dtype, self.identity, self.device
        twin.used, twin.holes = list(self.used), list(self.holes)
        with torch.inference_mode(False):
            if spare is not None and self.fits(spare):
                twin.chunks = [chunk[:used].copy_(part) for chunk, used, part in zip(
                    spare.chunks, self.used, self.filled(), strict=True)]  # fmt: skip
            else:
                twin.chunks = [part.clone() for part in self.filled()]
        return twin

    def part(self, stretches: Sequence[Span]) -> Segment:
        """A copy of some stretches, each a chunk of its own."""
        twin = object.__new__(Segment)
        twin.dtype, twin.identity, twin.device = self.dtype, self.identity, self.device
        with torch.inference_mode(False):
            twin.chunks = [self.chunks[span.chunk][span.start : span.stop].clone() for span in stretches]
        twin.used, twin.holes = [len(chunk) for chunk in twin.chunks], []
        return twin

    def fits(self, spare: Segment | None) -> bool:
        """Whether a copy may have the memory of `spare`."""
        return spare is not None and spare.used == self.used and spare.device == self.device

    def blank(self) -> Segment:
        """A twin with the same room, which takes no memory before `clear`."""
        twin = object.__new__(Segment)
        twin.dtype, twin.identity, twin.device = self.dtype, self.identity, self.device
        twin.used, twin.holes = list(self.used), list(self.holes)
        twin.chunks = []
        return twin

    def clear(self) -> None:
        """Fill all room with identities."""
        with torch.inference_mode(False):
            if not self.chunks:
                self.chunks = [torch.empty(used, dtype=self.dtype, device=self.device) for used in self.used]
            for part in self.filled():
                part.fill_(self.identity)


class Arena:
    """The states of field-wise strategies of one cache, by key, in segments.

    `content_digest` and `layout_digest` are sums over keys and segments, kept up as keys are added, so that asking
    whether two ranks agree costs nothing per key. After `sleep` keys are `dormant`: they are held no more, but their
    room is kept, and folding them again allocates and hashes nothing.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.dormant: dict[str, Entry] = {}
        self.segments: dict[SegmentId, Segment] = {}
        self.content_digest = 0
        self._slots_digest = 0
        self._apart_runs: list[tuple[str, int]] | None = None

    @property
    def layout_digest(self) -> int:
        """Where every slot lies, and how far chunks are filled: room that was left behind is moved too."""
        return self._layout_digest(self._slots_digest)

    def sleep(self) -> None:
        """Empty all keys, and keep their room for the next time: one operation a chunk."""
        for segment in self.segments.values():
            segment.clear()
        self.dormant = {**self.dormant, **self.entries} if self.dormant else self.entries
        self.entries = {}
        self.content_digest = self._slots_digest = 0
        self._apart_runs = None

    def wake(self) -> None:
        """Hold all dormant keys again, with the identities that they have."""
        for entry in self.dormant.values():
            self._enter(entry)
        self.dormant = {}

    def compact(self) -> None:
        """Give up the room of dormant keys."""
        if self.dormant:
            self.__dict__.update(self._rebuilt(None).__dict__)

    def blank(self) -> Arena:
        """A twin with the same layout, in which all keys are dormant; it takes no memory before `sleep`."""
        twin = Arena()
        twin.dormant = dict(self.entries)
        twin.segments = {segment_id: segment.blank() for segment_id, segment in self.segments.items()}
        return twin

    @property
    def dormant_layout_digest(self) -> int:
        """What `layout_digest` will be when all dormant keys have been folded again."""
        return self._layout_digest(self._slots_digest + sum(entry.digest for entry in self.dormant.values()))

    def _layout_digest(self, slots_digest: int) -> int:
        fills = (digest_of(tuple(segment_id), held.used) for segment_id, held in self.segments.items())
        return (slots_digest + sum(fills)) % DIGEST_MODULUS

    def lies_like(self, other: Arena) -> bool:
        """Whether both hold the same keys at the same places: what lets segments be folded as they are."""
        return self.content_digest == other.content_digest and self.layout_digest == other.layout_digest

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
        """Make room, filled with identities, for new keys of one strategy and shape; a slab if there are several.

        `TooLarge` before memory is taken that isn't there.
        """
        facts = strategy_facts(strategy)
        specs = []
        for f in strategy.layout(shapes):
            check_reducible(keys[0], strategy, f, dtypes[f.name])
            shape = shapes[f.name]
            may_grow = strategy.ragged_dims(f.name, len(shape))
            fixed = tuple(None if grows else n for n, grows in zip(shape, may_grow, strict=True))
            specs.append(FieldSchema(f.name, fixed, dtype_name(dtypes[f.name]), f.reduction.value, f.round))
        schemas = [
            KeySchema(key, "fields", facts, tuple(specs), result=dtype_name(result), device=device.type) for key in keys
        ]
        rooms = {spec.name: capacity(strategy, spec.name, shapes[spec.name]) for spec in specs}
        nbytes = len(keys) * sum(math.prod(rooms[spec.name]) * dtypes[spec.name].itemsize for spec in specs)
        if nbytes > LARGEST_CHUNK_BYTES:  # of less it isn't worth asking
            free = available_bytes(device)
            if nbytes > free:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise TooLarge(
                    f"the state of {keys[0]!r}{more}, {strategy}, needs {human(nbytes)} on {device}, {human(free)} are "
                    "free. Reduce fewer keys, smaller values, or in float32 (accumulate=torch.float32)."
                )
        self._place(schemas, strategy, rooms, device)

    def _place(
        self,
        schemas: Sequence[KeySchema],
        strategy: Fieldwise,
        capacities: Mapping[str, tuple[int, ...]],
        device: torch.device,
    ) -> None:
        slots: list[dict[str, Slot]] = [{} for _ in schemas]
        gathered = isinstance(strategy, Gathered)
        whole = gathered or any(f.round for f in schemas[0].fields)
        for f in schemas[0].fields:
            apart = f"{type(strategy).__name__}.{f.name}" if whole else ""
            segment_id = SegmentId(f.reduction, f.dtype, f.round, device.type, apart, gathered)
            shape = capacities[f.name]
            numel = math.prod(shape)
            segment = self.segments.get(segment_id)
            if segment is None:
                segment = self.segments[segment_id] = Segment(segment_id, device)
            chunk, offset = segment.allocate(max(1, numel * len(schemas)))  # a place even for no elements
            for i, held in enumerate(slots):
                held[f.name] = Slot(segment_id, chunk, offset + i * numel, shape)
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
        self._apart_runs = None

    def _count(self, entry: Entry, sign: int) -> None:
        self.content_digest = (self.content_digest + sign * entry.schema.digest) % DIGEST_MODULUS
        self._slots_digest = (self._slots_digest + sign * entry.digest) % DIGEST_MODULUS

    def drop(self, key: str) -> None:
        """Forget a key and give its room back."""
        entry = self.entries.pop(key)
        self._count(entry, -1)
        self._release(entry)
        for other in entry.slab:
            if other != key:  # the slab has a hole now
                self.entries[other] = replace(self.entries[other], slab=(other,))
        self._apart_runs = None

    def _release(self, entry: Entry) -> None:
        for slot in entry.slots.values():
            segment = self.segments[slot.segment]
            segment.release(slot.chunk, slot.offset, slot.numel)
            if not segment.chunks:
                del self.segments[slot.segment]

    def _views(self, key: str, count: int) -> State:
        """The states of `count` keys that lie side by side from this one on: views [count, …], at full capacity."""
        views = {}
        for name, slot in self.entries[key].slots.items():
            chunk = self.segments[slot.segment].chunks[slot.chunk]
            views[name] = chunk[slot.offset : slot.offset + count * slot.numel].view(count, *slot.shape)
        return views

    def state(self, key: str) -> State:
        """The key's state: views into chunks, at full capacity, good until the key grows or goes."""
        return {name: tensor[0] for name, tensor in self._views(key, 1).items()}

    def slab(self, keys: Sequence[str]) -> State | None:
        """The states of several keys as views [K, …]; None if they aren't a slab."""
        return self._views(keys[0], len(keys)) if self.is_slab(keys) else None

    def is_slab(self, keys: Sequence[str]) -> bool:
        """Whether these keys, in this order, lie side by side and are folded as one."""
        entry = self.entries.get(keys[0])
        return entry is not None and (len(keys) == 1 or entry.slab == tuple(keys))

    def make_room(self, keys: Sequence[str], strategy: Fieldwise, state: State, result: torch.dtype) -> tuple[str, ...]:
        """Make room for a state [K, …] of K keys, all new or none; the new ones. What is held stays as it is."""
        kinds = strategy.kinds(state, 1)
        wanted = {name: shape for name, (shape, _) in kinds.items()}
        made: tuple[str, ...] = ()
        if keys[0] not in self.entries:
            made = tuple(keys)
            device = next(iter(state.values())).device

            def fits_in(entry: Entry) -> bool:
                return entry.schema.device == device.type and not self._misfit(entry, strategy, kinds, result)

            if not self._wake(keys, fits_in):
                dtypes = strategy.accumulators({name: dtype for name, (_, dtype) in kinds.items()})
                self.reserve(keys, strategy, wanted, dtypes, result, device)
                return made
        for key in keys:
            if any(not fits(wanted[name], slot.shape) for name, slot in self.entries[key].slots.items()):
                self._grow(self.entries[key].slab, wanted)
        return made

    def _wake(self, keys: Sequence[str], fits_in: Callable[[Entry], bool]) -> bool:
        """Hold dormant keys again, if their room is what is needed; else that room is given back."""
        entries = [self.dormant.pop(key, None) for key in keys]
        first = entries[0]
        if first is not None and first.slab == tuple(keys) and None not in entries and fits_in(first):
            for entry in entries:
                assert entry is not None
                self._enter(entry)
            return True
        for entry in entries:
            if entry is not None:
                self._release(entry)
                for other in entry.slab:
                    if other in self.dormant:
                        self.dormant[other] = replace(self.dormant[other], slab=(other,))
        return False

    def fold(self, keys: Sequence[str], state: State) -> None:
        """Fold a state [K, …] into K keys that have room and are known to fit: an operation a field for a slab."""
        together = self.slab(keys)
        if together is not None:
            self.entries[keys[0]].strategy.fold_(together, _on(state, together))
            return
        for i, key in enumerate(keys):
            mine = self.state(key)
            self.entries[key].strategy.fold_(mine, _on({name: tensor[i] for name, tensor in state.items()}, mine))

    def set_placement(self, key: str, placement: str) -> None:
        """Note how a key lies over a mesh. `SchemaMismatch` where pieces' states aren't pieces of one."""
        entry = self.entries[key]
        if entry.schema.placement == placement:
            return
        try:
            for _, dim in Placement.named(placement).dims:
                for spec in entry.schema.fields:
                    entry.strategy.split_dim(spec.name, len(spec.shape), dim)
        except ValueError as error:
            raise SchemaMismatch(f"{key!r} is {placement}: {error}") from error
        self._enter(replace(entry, schema=replace(entry.schema, placement=placement)))

    def put(self, schema: KeySchema, strategy: Fieldwise, state: State, device: torch.device) -> None:
        """Hold a copy of a new key's state, with as much room as it has."""
        self._place([schema], strategy, {name: tuple(tensor.shape) for name, tensor in state.items()}, device)
        for name, mine in self.state(schema.key).items():
            mine.copy_(state[name])

    def take_slab(self, other: Arena, keys: tuple[str, ...]) -> None:
        """Hold a copy of new keys' states that lie side by side in another arena."""
        entry = other.entries[keys[0]]
        theirs = other._views(keys[0], len(keys))
        schemas = [other.entries[key].schema for key in keys]
        self._place(schemas, entry.strategy, other.capacities(keys[0]), next(iter(theirs.values())).device)
        for name, mine in self._views(keys[0], len(keys)).items():
            mine.copy_(theirs[name])

    def add(self, keys: Sequence[str], adds: Callable[[State], None]) -> None:
        """Have a state that isn't computed yet added to a slab that has room for it."""
        together = self.slab(keys)
        assert together is not None
        adds(together)

    def spoil(self, keys: Sequence[str]) -> None:
        """NaN in sums that something was added to in part, so that they are never taken for whole."""
        for key in keys:
            for tensor in self.state(key).values():
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def check(
        self,
        key: str,
        strategy: Fieldwise,
        fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        result: torch.dtype,
    ) -> None:
        """`SchemaMismatch` naming what differs, if a state of these fields can't join this key's."""
        misfit = self._misfit(self.entries[key], strategy, fields, result)
        if misfit:
            raise SchemaMismatch(f"cannot fold into {key!r}: {misfit}")
        for name, (shape, _) in fields.items():
            capacity(strategy, name, shape)  # raises where `size` is exceeded

    @staticmethod
    def _misfit(
        entry: Entry,
        strategy: Fieldwise,
        fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        result: torch.dtype,
    ) -> str:
        """Why a state of these fields can't join an entry's, in words; empty where it can."""
        if entry.strategy != strategy:
            return f"it holds a state of {entry.strategy}, got {strategy}."
        held = {f.name: f for f in entry.schema.fields}
        if set(held) != set(fields):
            return (
                f"its state has {sorted(held)}, the new value brings {sorted(fields)}. "
                "Give every value of a key a weight, or none."
            )
        dtypes = strategy.accumulators({name: dtype for name, (_, dtype) in fields.items()})
        for name, (shape, _) in fields.items():
            spec = held[name]
            same = len(shape) == len(spec.shape) and all(
                m is None or m == n for m, n in zip(spec.shape, shape, strict=True)
            )
            if not same or dtype_name(dtypes[name]) != spec.dtype:
                expected = tuple("*" if n is None else n for n in spec.shape)
                return (
                    f"expected {name} of {spec.dtype} {expected}, got {dtype_name(dtypes[name])} {shape}. Give every "
                    f"value of a key one shape{strategy.ragged_advice}."
                )
        if entry.schema.result != dtype_name(result):
            return (
                f"its values were such that results are {entry.schema.result}, the new one asks for "
                f"{dtype_name(result)}. Give all values of a key one dtype."
            )
        return ""

    def _grow(self, keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give the keys of one slab room for larger ragged fields, and their old room back."""
        entries = [self.entries[key] for key in keys]
        first = entries[0]
        old = self._views(keys[0], len(keys))
        rooms = {
            name: tuple(map(max, slot.shape, capacity(first.strategy, name, shapes[name])))
            for name, slot in first.slots.items()
        }
        device = self.segments[next(iter(first.slots.values())).segment].device
        self._place([entry.schema for entry in entries], first.strategy, rooms, device)
        first.strategy.fold_(self._views(keys[0], len(keys)), old)
        for entry in entries:
            self._release(entry)

    def copy(self, device: torch.device | None = None, spare: Arena | None = None) -> Arena:
        """A twin: with the same layout, one memcpy a chunk; or on another device. `spare` gives up its memory."""
        if device is not None and any(segment.device != device for segment in self.segments.values()):
            return self._rebuilt(device)
        twin = Arena()
        twin.entries, twin.dormant = dict(self.entries), dict(self.dormant)
        twin.content_digest, twin._slots_digest = self.content_digest, self._slots_digest
        twin._apart_runs = self._apart_runs
        old = {} if spare is None else spare.segments
        twin.segments = {segment_id: segment.copy(old.get(segment_id)) for segment_id, segment in self.segments.items()}
        return twin

    def _rebuilt(self, device: torch.device | None) -> Arena:
        """A copy laid out anew, without dormant keys; on another device, whose type is in the names of segments."""
        twin = Arena()
        for keys in self.slabs():
            schemas = [self.entries[key].schema for key in keys]
            theirs = self._views(keys[0], len(keys))
            where = next(iter(theirs.values())).device
            if device is not None:
                schemas, where = [replace(schema, device=device.type) for schema in schemas], device
            twin._place(schemas, self.entries[keys[0]].strategy, self.capacities(keys[0]), where)
            for name, mine in twin._views(keys[0], len(keys)).items():
                mine.copy_(theirs[name])
        return twin

    def slabs(self) -> Iterator[tuple[str, ...]]:
        """The keys by slab, in order."""
        done: set[str] = set()
        for key, entry in self.entries.items():
            if key not in done:
                done.update(entry.slab)
                yield entry.slab

    def sizes(self) -> dict[str, int]:
        """The bytes of each key's state, in the order in which they lie: the same wherever layouts agree."""
        first = {key: next(iter(entry.slots.values())) for key, entry in self.entries.items()}
        ordered = sorted(first, key=lambda key: (first[key].segment, first[key].chunk, first[key].offset, key))
        return {
            key: sum(s.numel * dtype_named(s.segment.dtype).itemsize for s in self.entries[key].slots.values())
            for key in ordered
        }

    def capacities(self, key: str) -> dict[str, tuple[int, ...]]:
        """Field shapes with their room, by field."""
        return {name: slot.shape for name, slot in self.entries[key].slots.items()}

    def relaid(
        self,
        schemas: Sequence[KeySchema],
        strategies: Mapping[str, Fieldwise],
        capacities: Mapping[str, Mapping[str, tuple[int, ...]]],
        devices: Mapping[str, torch.device],
    ) -> Arena:
        """A copy in the layout that this order of keys and these capacities give; absent keys hold identities.

        `devices`: by the types that the schemas name.
        """
        twin = Arena()
        for schema in schemas:
            key = schema.key
            twin._place([schema], strategies[key], capacities[key], devices[schema.device])
            if key in self.entries:
                twin.entries[key].strategy.fold_(twin.state(key), self.state(key))
        return twin

    def fold_arena(self, other: Arena) -> None:
        """Fold another arena into this one: an operation a chunk where layouts agree, a slab at a time where not.

        An empty arena becomes a copy. What both hold is known to fit.
        """
        if not self.entries and self.dormant and self.dormant_layout_digest == other.layout_digest:
            self.entries, self.dormant = {key: self.dormant[key] for key in other.entries}, {}
            self.content_digest, self._slots_digest = other.content_digest, other._slots_digest
            self._apart_runs = None
        if not self.entries:
            self.__dict__.update(other.copy().__dict__)
            self.compact()
        elif self.lies_like(other):
            self.fold_alike(other)
        else:
            for keys in other.slabs():
                self._fold_slab(other, keys)

    def fold_alike(self, other: Arena) -> None:
        """Fold an arena of the same layout, as a copy has it."""
        for segment_id, segment in self.segments.items():
            if not segment_id.apart:
                for mine, theirs in zip(segment.filled(), other.segments[segment_id].filled(), strict=True):
                    Reduction(segment_id.reduction).fold_(mine, theirs)
        for key, count in self._runs():
            self.entries[key].strategy.fold_(self._views(key, count), other._views(key, count))

    def centred(self) -> Iterator[tuple[Fieldwise, State]]:
        """Strategies with states [K, …] that are reduced in rounds: views, as many together as lie side by side."""
        for key, count in self._runs():
            if not isinstance(self.entries[key].strategy, Gathered):
                yield self.entries[key].strategy, self._views(key, count)

    def gathered(self) -> Arena:
        """The states that combine as a whole, alone: an arena in this one's memory, whose copies it can fold."""
        part = Arena()
        part.segments = {segment_id: held for segment_id, held in self.segments.items() if segment_id.gathered}
        if part.segments:
            part.entries = {key: entry for key, entry in self.entries.items() if isinstance(entry.strategy, Gathered)}
        return part

    def _runs(self) -> list[tuple[str, int]]:
        """(first key, number of keys) of states of that kind that lie side by side, however they were allocated."""
        if not any(segment_id.apart for segment_id in self.segments):
            return []
        if self._apart_runs is None:
            runs: list[tuple[str, int]] = []
            before: Entry | None = None
            for key, entry in self.entries.items():
                if not next(iter(entry.slots.values())).segment.apart:
                    continue
                if before is not None and before.precedes(entry):
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((key, 1))
                before = entry
            self._apart_runs = runs
        return self._apart_runs

    def _fold_slab(self, other: Arena, keys: tuple[str, ...]) -> None:
        new = [key for key in keys if key not in self.entries]
        entry = other.entries[keys[0]]
        if new and not self._wake(new, lambda mine: mine.schema == other.entries[mine.schema.key].schema):
            device = other.segments[next(iter(entry.slots.values())).segment].device
            schemas = [other.entries[key].schema for key in new]
            self._place(schemas, entry.strategy, other.capacities(keys[0]), device)
        parts = [keys] if self.is_slab(keys) else [(key,) for key in keys]
        for part in parts:
            theirs = other._views(part[0], len(part))
            self.make_room(part, entry.strategy, theirs, dtype_named(entry.schema.result or "float32"))
            self.fold(part, theirs)


class Cut:
    """An arena's layout cut among ranks: each key's state lies whole with its owner, neighbours of one owner together.

    `spans`: by segment, in order. Made once a layout, so that later merges of it do no work per key.
    """

    def __init__(self, arena: Arena, owners: Mapping[str, int], rank: int) -> None:
        self._owners, self._digests = owners, (arena.content_digest, arena.layout_digest)
        places: dict[SegmentId, list[Span]] = {}
        for key, entry in arena.entries.items():
            for slot in entry.slots.values():
                end = slot.offset + max(1, slot.numel)  # a place even for no elements
                places.setdefault(slot.segment, []).append(Span(slot.chunk, slot.offset, end, owners[key]))
        self.spans = {segment_id: _joined(found) for segment_id, found in places.items()}
        self._mine = {
            segment_id: [span for span in spans if span.owner == rank] for segment_id, spans in self.spans.items()
        }
        self._part = Arena()  # without memory: what lies where
        for key, entry in arena.entries.items():
            if owners[key] == rank:
                slots = {name: self._moved(slot) for name, slot in entry.slots.items()}
                self._part._enter(Entry(entry.strategy, entry.schema, slots, (key,)))

    def _moved(self, slot: Slot) -> Slot:
        mine = self._mine[slot.segment]
        number = bisect.bisect_right(mine, (slot.chunk, slot.offset), key=lambda span: (span.chunk, span.start)) - 1
        return replace(slot, chunk=number, offset=slot.offset - mine[number].start)

    def fits(self, arena: Arena, owners: Mapping[str, int]) -> bool:
        """Whether it's this arena's layout that was cut, among these owners."""
        return self._owners is owners and self._digests == (arena.content_digest, arena.layout_digest)

    def part(self, arena: Arena) -> Arena:
        """A copy of what this rank owns of an arena of that layout."""
        twin = self._part.copy()
        twin.segments = {
            segment_id: arena.segments[segment_id].part(spans) for segment_id, spans in self._mine.items() if spans
        }
        return twin


def _joined(places: Sequence[Span]) -> list[Span]:
    """Places in order, neighbours of one owner as one."""
    found: list[Span] = []
    for place in sorted(places):
        last = found[-1] if found else None
        if last is not None and (last.chunk, last.owner) == (place.chunk, place.owner) and place.start <= last.stop:
            found[-1] = last._replace(stop=max(last.stop, place.stop))
        else:
            found.append(place)
    return found


def _on(state: State, where: State) -> State:
    """A state where another is; detached, or adding it would make the chunk a part of its graph."""
    device = next(iter(where.values())).device
    return {name: tensor.detach().to(device) for name, tensor in state.items()}


def check_reducible(key: str, strategy: Fieldwise, field: Field, dtype: torch.dtype) -> None:
    """TypeError, naming key and field, for a dtype whose reduction some backend refuses or gets wrong."""
    too = _SUMS_TOO if field.reduction is Reduction.SUM else _EXTREMES_TOO
    if isinstance(strategy, Gathered) or dtype in (*_REDUCIBLE, *too):
        return
    raise TypeError(
        f"cannot reduce {key!r}: {type(strategy).__name__} keeps its field {field.name!r} as {dtype_name(dtype)}, of "
        f"which backends take no {field.reduction.value}. Keep it as float32, float64, int32 or int64."
    )


def fits(shape: Sequence[int], room: Sequence[int]) -> bool:
    """Whether a block of this shape lies within that room."""
    return len(shape) == len(room) and all(n <= m for n, m in zip(shape, room, strict=True))


def capacity(strategy: Fieldwise, field: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The room a field of this shape is given: ragged dims in steps of 128, or the strategy's `size`.

    `SchemaMismatch` where `size` is exceeded.
    """
    may_grow, limits = strategy.ragged_dims(field, len(shape)), strategy.limits(field, len(shape))
    room = list(shape)
    for dim, (n, grows) in enumerate(zip(shape, may_grow, strict=True)):
        if not grows:
            continue
        limit = limits[dim]
        if limit is None:
            room[dim] = -(-n // RAGGED_STEP) * RAGGED_STEP
        elif n > limit:
            raise SchemaMismatch(
                f"a value of shape {shape} exceeds size={strategy.size} of {type(strategy).__name__} in dim {dim}."
            )
        else:
            room[dim] = limit
    return tuple(room)
