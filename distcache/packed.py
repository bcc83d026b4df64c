"""An `ActivationCache` as a small header and flat numpy buffers: what travels between processes.

    header     msgpack: keys in order, where states lie, strategies by name, registrations, notes, ledger
    buffers    the chunks of the cache's arena as they are; then its rows and values, small ones together by dtype

Packing copies no state and unpacking none that is only folded from: caches whose states lie alike are folded with one
operation a chunk. There is no pickle in either part. numpy knows fewer dtypes than torch: bool, bfloat16 and float8 lie
in buffers as integers of their size. Whatever device states lived on, which the header names, they unpack on the CPU.

Nothing that comes in is believed: what `pack` didn't make ends in `BadCache`. Only functions of a list are named by the
path that they are imported from, so unpack what your own processes have packed; a stranger's cache is `load`ed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor

from distcache import codec
from distcache.cache import ActivationCache
from distcache.entries import REDUCED, KeptEntry, RawEntry
from distcache.errors import BadCache, TooLarge
from distcache.ledger import Ledger
from distcache.memory import available_bytes, human
from distcache.schema import FieldSchema, KeySchema, strategy_facts
from distcache.segments import LARGEST_CHUNK_BYTES, Arena, Entry, Segment, SegmentId, Slot, capacity, check_reducible
from distcache.store import Int64, Size, StrategyText, _strategy
from distcache.strategies import (
    Columns,
    Fieldwise,
    Function,
    Gathered,
    Grouped,
    Listwise,
    Piece,
    Reduction,
    Rows,
    Rowwise,
    State,
    Strategy,
    Value,
    Weighted,
    describe,
)

VERSION = 1  # of the header; raised when an older distcache could misread one
OWN_BUFFER_BYTES = 2**20  # rows and values of less share buffers, so that thousands of keys don't make thousands

FEW = 4  # layouts that are remembered: caches to be folded lie alike as a rule, and thousands of keys take a while

_CPU = torch.device("cpu")
_NATIVE = {name for name in codec.DTYPES if name not in ("bool", "uint16", "uint32", "uint64") and hasattr(np, name)}
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


@dataclass(frozen=True, slots=True)
class Packed:
    """A cache ready to be sent: `buffers` are flat and contiguous, and may be views of the cache that was packed."""

    header: bytes
    buffers: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(buffer.nbytes for buffer in self.buffers)


# -- the header ------------------------------------------------------------------------------------------------


class _Part(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A part of the header. What it refers to it names by number."""


class _Kind(_Part, frozen=True):
    """States that are alike: a strategy, the dtype of results, a type of device, how they lie over a mesh, and of each
    field its dtype and room.
    """

    strategy: Size
    result: str
    device: str
    placement: str
    fields: dict[str, tuple[str, tuple[Size, ...]]]


class _Chunks(_Part, frozen=True):
    """A segment, and how many elements each of its chunks has in use."""

    segment: tuple[str, str, int, str, str, bool]  # a SegmentId
    sizes: list[Size]


class _Layout(_Part, frozen=True):
    """What lies where in the arena: by key its kind, and for each of its fields chunk and offset, one after the other.

    `slabs`: keys that lie side by side and are folded as one.
    """

    strategies: list[StrategyText]
    kinds: list[_Kind]
    keys: list[str]
    kind_of: list[Size]
    places: list[Size]
    slabs: list[list[Size]]
    segments: list[_Chunks]


class _Stored(_Part, frozen=True):
    """A tensor: the buffer in which it lies behind those before it, and its shape."""

    buffer: Size
    shape: tuple[Size, ...]


class _Table(_Part, frozen=True):
    """Columns that rows share, each a tensor."""

    indexed: bool
    columns: dict[str, Size]


class _PackedRows(_Part, frozen=True, tag=0):
    """Pieces of rows, joined to one tensor, with their lengths and tables; without a strategy as they were recorded."""

    key: str
    strategy: Size | None
    placement: str | None
    data: Size
    lengths: Annotated[list[Size], Meta(min_length=1)]
    tables: list[Size | None]


class _PackedValue(_Part, frozen=True):
    """One `Value`: a tensor, or the codec's bytes of anything else (of a `Weighted`, of the pair of its parts)."""

    data: Size | bytes
    weighted: bool
    rows: bool
    table: Size | None
    weight: Size | None


class _PackedValues(_Part, frozen=True, tag=1):
    """Whole values; without a strategy they are as they were set or recorded."""

    key: str
    strategy: Size | None
    values: Annotated[list[_PackedValue], Meta(min_length=1)]


class _Header(_Part, frozen=True):
    """All of a cache but its tensors. `layout` is apart, so that one which came before needn't be read again."""

    version: int
    layout: bytes
    order: list[str]
    strategies: list[StrategyText | str]  # a function of a list is its path
    buffers: list[tuple[str, Size]]  # behind the arena's: dtype and number of elements
    tensors: list[_Stored]
    tables: list[_Table]
    entries: list[_PackedRows | _PackedValues]
    registry: list[tuple[str, Size]]
    notes: bytes
    ledger: list[tuple[list[str] | None, list[Int64]]]
    num_samples: Size


_T = TypeVar("_T")


def _named(text: StrategyText, whose: str) -> Strategy:
    """The strategy of a description; `BadCache`."""
    try:
        return _strategy_of(msgspec.msgpack.encode(text))
    except BadCache as error:
        raise BadCache(f"{whose}: {error}") from error


@functools.lru_cache(maxsize=64)
def _strategy_of(text: bytes) -> Strategy:
    return _strategy(msgspec.msgpack.decode(text, type=StrategyText), "a packed cache")


def _decoded(data: bytes, kind: type[_T], what: str) -> _T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadCache(f"cannot read {what} of a packed cache ({len(data)} bytes): {error}.") from error


def _carrier(dtype: torch.dtype) -> np.dtype:
    """The dtype in which numpy holds elements of this one."""
    name = codec.dtype_name(dtype)
    return np.dtype(name if name in _NATIVE else _INTEGERS[dtype.itemsize])


# -- packing ---------------------------------------------------------------------------------------------------


def pack(cache: ActivationCache) -> Packed:
    """A cache as a header and buffers, which on a CPU are views of its states: send them before it changes.

    Rows of several pieces, and small tensors, are copied to lie together. `TooLarge` before memory is taken that isn't
    there; TypeError, naming the key, for a value that is neither plain nor a tensor; ValueError for a function that
    can't be imported, or a strategy that its name and parameters don't give again.
    """
    if not isinstance(cache, ActivationCache):
        raise TypeError(f"pack expects an ActivationCache, got {type(cache).__name__}.")
    cache._resolve_all()
    writer = _Writer()
    arena = cache._arena._rebuilt(None) if cache._arena.dormant else cache._arena  # room that nobody uses stays here
    chunks = [_flat([_bytes(part)], part.dtype) for segment in arena.segments.values() for part in segment.filled()]
    for key, entry in cache._entries.items():
        if entry is not REDUCED:
            writer.entry(key, entry)
    registry = [
        (pattern, writer.strategy(strategy, strategy_facts(strategy))) for pattern, strategy in cache._registry.items()
    ]
    try:
        header = msgspec.msgpack.encode(
            _Header(
                VERSION, _layout_of(arena), list(cache._entries), writer.strategies,
                [(codec.dtype_name(dtype), sum(map(len, parts)) // dtype.itemsize) for dtype, parts in writer.buffers],
                writer.tensors, writer.tables, writer.entries, registry, codec.encode(dict(cache._notes)),
                [(keys, bounds) for keys, bounds in cache._ledger.to_plain(arena.entries.keys())], cache._num_samples,
            )
        )  # fmt: skip
    except UnicodeEncodeError as error:
        raise TypeError(f"cannot pack a name that is no valid text: {error}.") from error
    return Packed(header, [*chunks, *writer.joined()])


_layouts: dict[tuple[int, int], tuple[list[str], bytes]] = {}  # the last few; replaced, for threads that read it


def _layout_of(arena: Arena) -> bytes:
    global _layouts
    alike, keys = (arena.content_digest, arena.layout_digest), list(arena.entries)
    known, layout = _layouts.get(alike, (None, b""))
    if known != keys:
        layout = _described(arena)
        _layouts = dict([*_layouts.items(), (alike, (keys, layout))][-FEW:])
    return layout


def _described(arena: Arena) -> bytes:
    kinds: dict[Any, int] = {}
    strategies: dict[str, tuple[int, Strategy]] = {}
    numbers = {key: number for number, key in enumerate(arena.entries)}
    kind_of: list[int] = []
    places: list[int] = []
    slabs: list[list[int]] = []
    seen: set[str] = set()
    for key, entry in arena.entries.items():
        slots, schema = entry.slots, entry.schema
        fields = tuple([(name, slot.segment.dtype, slot.shape) for name, slot in slots.items()])
        strategy, _ = strategies.setdefault(schema.strategy, (len(strategies), entry.strategy))
        kind = (strategy, schema.result, schema.device, schema.placement, fields)
        kind_of.append(kinds.setdefault(kind, len(kinds)))
        for slot in slots.values():
            places += (slot.chunk, slot.offset)
        if len(entry.slab) > 1 and key not in seen:
            seen.update(entry.slab)
            slabs.append([numbers[other] for other in entry.slab])
    return msgspec.msgpack.encode(
        _Layout(
            [_text(strategy) for _, strategy in strategies.values()],
            [
                _Kind(strategy, result, device, placement, {name: (dtype, shape) for name, dtype, shape in fields})
                for strategy, result, device, placement, fields in kinds
            ],
            list(numbers), kind_of, places, slabs,
            [_Chunks((*segment_id,), segment.used) for segment_id, segment in arena.segments.items()],
        )
    )  # fmt: skip


def _text(strategy: Strategy) -> StrategyText:
    """A strategy's description, if it gives the strategy again; ValueError if it doesn't."""
    text = StrategyText(**describe(strategy))
    again = _named(text, "the cache to pack")
    if again != strategy:
        raise ValueError(f"cannot pack {strategy}: from its description it would come back as {again}.")
    return text


class _Writer:
    """Gives numbers to what a cache keeps, and collects its tensors; none is copied before `joined`."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.dtype, list[Tensor]]] = []  # parts as bytes
        self.tensors: list[_Stored] = []
        self.tables: list[_Table] = []
        self.entries: list[_PackedRows | _PackedValues] = []
        self.strategies: list[StrategyText | str] = []
        self._shared: dict[torch.dtype, int] = {}
        self._strategies: dict[str, int] = {}
        self._tables: dict[int, tuple[int, Columns]] = {}  # columns are kept, so that ids stay theirs

    def tensor(self, parts: Sequence[Tensor], shape: Sequence[int]) -> int:
        """Parts of one tensor, along its first dim, which lies in a buffer of its own unless it is small."""
        dtype = parts[0].dtype
        flat = [_bytes(part) for part in parts]
        if sum(map(len, flat)) >= OWN_BUFFER_BYTES:
            buffer = len(self.buffers)
            self.buffers.append((dtype, flat))
        else:
            buffer = self._shared.setdefault(dtype, len(self.buffers))
            if buffer == len(self.buffers):
                self.buffers.append((dtype, []))
            self.buffers[buffer][1].extend(flat)
        self.tensors.append(_Stored(buffer, tuple(shape)))
        return len(self.tensors) - 1

    def whole(self, tensor: Tensor) -> int:
        return self.tensor([tensor], tensor.shape)

    def joined(self) -> list[np.ndarray]:
        """The buffers. `TooLarge` before those are made that several tensors share."""
        copied = sum(sum(map(len, parts)) for _, parts in self.buffers if len(parts) > 1)
        _check_room(copied, "to join the rows and values of a cache that is packed")
        return [_flat(parts, dtype) for dtype, parts in self.buffers]

    def strategy(self, strategy: Strategy, facts: str) -> int:
        if isinstance(strategy, Function):
            strategy.check_importable()
        if facts not in self._strategies:
            self._strategies[facts] = len(self.strategies)
            self.strategies.append(strategy.path if isinstance(strategy, Function) else _text(strategy))
        return self._strategies[facts]

    def table(self, columns: Columns | None) -> int | None:
        if columns is None:
            return None
        if id(columns) not in self._tables:
            self._tables[id(columns)] = (len(self.tables), columns)
            by_name = {name: self.whole(column) for name, column in columns.by_name.items()}
            self.tables.append(_Table(columns.indexed, by_name))
        return self._tables[id(columns)][0]

    def entry(self, key: str, entry: Any) -> None:
        state = entry.state if isinstance(entry, KeptEntry) else _as_rows(entry.values) or entry.values
        strategy = self.strategy(entry.strategy, entry.schema.strategy) if isinstance(entry, KeptEntry) else None
        if not isinstance(state, Rows):
            self.entries.append(_PackedValues(key, strategy, [self.value(key, value) for value in state]))
            return
        parts = [piece.value_n for piece in state.pieces]
        for part in parts:
            codec.check_plain(part, repr(key))
        placement = entry.schema.placement if isinstance(entry, KeptEntry) else None
        data = self.tensor(parts, (state.num_rows, *state.head.value_n.shape[1:]))
        tables = [self.table(piece.columns) for piece in state.pieces]
        self.entries.append(_PackedRows(key, strategy, placement, data, list(map(len, parts)), tables))

    def value(self, key: str, value: Value) -> _PackedValue:
        data, weighted = value.data, isinstance(value.data, Weighted)
        if isinstance(data, Weighted):
            data = (data.value, data.weight)
        codec.check_plain(data, repr(key))
        packed = self.whole(data) if isinstance(data, Tensor) else codec.encode(data)
        weight = None if value.weight is None else self.whole(value.weight)
        return _PackedValue(packed, weighted, value.rows, self.table(value.columns), weight)


def _as_rows(values: Sequence[Value]) -> Rows | None:
    """Recorded values whose rows can lie joined; None if they can't."""
    kinds = set()
    for value in values:
        if not value.rows or value.weight is not None or not isinstance(value.data, Tensor) or not value.data.dim():
            return None
        if value.columns is not None and len(value.columns) != len(value.data):
            return None
        kinds.add((value.data.dtype, value.data.shape[1:]))
    return Rows(Piece(value.data, value.columns) for value in values) if len(kinds) == 1 else None


def _bytes(tensor: Tensor) -> Tensor:
    """The elements as a flat uint8 tensor on the CPU; a view of what is contiguous there."""
    return codec.as_bytes(tensor).cpu()


def _flat(parts_u8: Sequence[Tensor], dtype: torch.dtype) -> np.ndarray:
    """Elements of a dtype, given as bytes, one after the other as a buffer; a view, if it's one part."""
    whole = parts_u8[0] if len(parts_u8) == 1 else torch.cat(list(parts_u8))
    return whole.numpy().view(_carrier(dtype))


def _check_room(nbytes: int, what: str) -> None:
    """`TooLarge` before memory is taken that isn't there; of less than a chunk it isn't worth asking."""
    free = available_bytes() if nbytes > LARGEST_CHUNK_BYTES else nbytes
    if nbytes > free:
        raise TooLarge(f"{human(nbytes)} are needed {what}, {human(free)} are free. Pack less at a time.")


# -- unpacking -------------------------------------------------------------------------------------------------


def unpack(packed: Packed, *, own: bool) -> ActivationCache:
    """The cache that was packed, on the CPU; bit for bit, with its states in the places that they had.

    Args:
        own: everything lies in memory of the cache's own, to be done with as one likes. False: states stay in the
            given buffers, which may be read-only and others' too, and live as long as the cache: it's there to be read
            and folded from, and copies its states the first time that something would write into them. What whoever
            folds it keeps, rows and values, is copied at once.

    Raises:
        BadCache: header or buffers aren't what `pack` gives: cut short, altered, forged, or of another version. So are
            a strategy that isn't registered here and a function that can't be imported. Sizes, dtypes and places are
            checked before memory is taken.
        TooLarge: what is copied doesn't fit, before it is.
    """
    with torch.inference_mode(False):  # an inference tensor could not be added to outside
        return _unpack(packed.header, packed.buffers, own)


def owned(packed: Packed) -> ActivationCache:
    """What unpickling gives. Buffers of a pickle that came out of band may be read-only, or be those that the pickled
    cache goes on to fold into: so it's always memory of its own.
    """
    return unpack(packed, own=True)


def _unpack(header: bytes, buffers: Sequence[np.ndarray], own: bool) -> ActivationCache:
    head = _decoded(header, _Header, "the header")
    if head.version != VERSION:
        raise BadCache(f"a packed cache of version {head.version}, this distcache reads {VERSION}: use one version.")
    template, chunks, _ = _laid_out(head.layout)
    kinds = [(codec.dtype_named(name), size) for name, size in head.buffers]
    _check_buffers(buffers, [*((codec.dtype_named(one.dtype), size) for one, size in chunks), *kinds])
    _check_reads(head.layout)
    reader = _Reader(head, kinds, buffers[len(chunks) :])
    names = template.entries.keys() | {entry.key for entry in head.entries}
    if len(head.order) != len(template) + len(head.entries) or names != set(head.order):
        raise BadCache(f"a packed cache names {len(head.order)} keys, and holds others, or some of them twice.")
    cache, everything = ActivationCache(), frozenset(template.entries)
    cache._notes = _tried("notes", _notes, codec.decode(head.notes), names)
    cache._ledger = Ledger.from_plain((everything if keys is None else keys, bounds) for keys, bounds in head.ledger)
    cache._num_samples = head.num_samples
    cache._registry = {pattern: reader.strategy(number, f"{pattern!r}") for pattern, number in head.registry}
    copied = buffers if own else buffers[len(chunks) :]
    _check_room(sum(buffer.nbytes for buffer in copied), "to unpack a cache")

    cache._arena = _arena(template, chunks, buffers, own)
    cache._entries = dict.fromkeys(head.order, REDUCED)
    for packed in head.entries:
        cache._entries[packed.key] = RawEntry([])
        cache._put(packed.key, reader.entry(packed))
        if isinstance(packed, _PackedRows) and packed.placement is not None:
            _tried(repr(packed.key), cache._set_placement, packed.key, packed.placement)
    return cache


def _notes(notes: Any, names: Set[str]) -> dict[str, Any]:
    if not isinstance(notes, dict) or not notes.keys() <= names:
        raise ValueError("they aren't of its keys")
    return notes


def _check_buffers(buffers: Sequence[np.ndarray], expected: Sequence[tuple[torch.dtype, int]]) -> None:
    if len(buffers) != len(expected):
        raise BadCache(f"a packed cache has {len(buffers)} buffers, its header names {len(expected)}.")
    for number, (buffer, (dtype, size)) in enumerate(zip(buffers, expected, strict=True)):
        wanted = _carrier(dtype)
        if not isinstance(buffer, np.ndarray) or buffer.ndim != 1 or not buffer.flags.c_contiguous:
            raise BadCache(f"buffer {number} of a packed cache is no flat numpy array: {type(buffer).__name__}.")
        if buffer.dtype != wanted or len(buffer) != size:
            raise BadCache(
                f"buffer {number} of a packed cache is cut short or altered: expected {size} elements of {wanted} "
                f"({dtype}), got {len(buffer)} of {buffer.dtype}."
            )
        if dtype == torch.bool and bool((buffer > 1).any()):
            raise BadCache(f"buffer {number} of a packed cache is of bool, and has bytes that are neither 0 nor 1.")


class _Lent:
    """A buffer as numpy's protocol shows it, without its mark that it is read-only, of which torch would warn."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer  # alive as long as what is made of it
        facts = buffer.__array_interface__
        self.__array_interface__ = {**facts, "data": (facts["data"][0], False)}


def _tensor_on(buffer: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A flat tensor on top of a buffer; a copy, where the buffer's address isn't fit for the dtype."""
    flat_u8 = torch.from_numpy(np.asarray(_Lent(buffer.view(np.uint8))))
    return codec.from_bytes(flat_u8, dtype, (len(buffer),))


def _arena(template: Arena, chunks: Sequence[tuple[SegmentId, int]], buffers: Sequence[np.ndarray], own: bool) -> Arena:
    """The states of a layout, whose chunks the first buffers are. Holes are left alone: nobody vouches for them."""
    arena = Arena() if own else _Borrowed()
    arena.__dict__.update(template.copy().__dict__)
    for (segment_id, size), buffer in zip(chunks, buffers, strict=False):
        if segment_id not in arena.segments:
            arena.segments[segment_id] = Segment(segment_id, _CPU)
        segment = arena.segments[segment_id]
        chunk = _tensor_on(buffer, segment.dtype)
        segment.chunks.append(chunk.clone() if own else chunk)
        segment.used.append(size)
    return arena


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _owning(write: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R]:
    """A method of `Arena` that writes, on memory of the arena's own."""

    @functools.wraps(write)
    def writing(arena: _Borrowed, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if arena.borrowed:
            arena.__dict__.update(arena.copy().__dict__)
            arena.borrowed = False
        return write(arena, *args, **kwargs)

    return writing


class _Borrowed(Arena):
    """States in memory that others read too, copied before the first of them is written."""

    borrowed = True

    sleep = _owning(Arena.sleep)
    reserve = _owning(Arena.reserve)
    drop = _owning(Arena.drop)
    make_room = _owning(Arena.make_room)
    fold = _owning(Arena.fold)
    add = _owning(Arena.add)
    fold_arena = _owning(Arena.fold_arena)
    fold_alike = _owning(Arena.fold_alike)
    put = _owning(Arena.put)
    take_slab = _owning(Arena.take_slab)
    spoil = _owning(Arena.spoil)


# -- where states lie ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Alike:
    """A kind of states, checked: what its keys' schemas share, and by field its segment there, and its room."""

    strategy: Fieldwise
    facts: str
    result: str
    specs: tuple[FieldSchema, ...]
    fields: tuple[tuple[str, SegmentId, tuple[int, ...]], ...]

    @classmethod
    def of(cls, kind: _Kind, strategies: Sequence[Strategy]) -> _Alike:
        if kind.strategy >= len(strategies):
            raise BadCache(f"there is no strategy {kind.strategy} for states of a packed cache.")
        strategy = strategies[kind.strategy]
        codec.dtype_named(kind.result)
        kinds = {name: (shape, codec.dtype_named(dtype)) for name, (dtype, shape) in kind.fields.items()}
        if not isinstance(strategy, Fieldwise):
            raise BadCache(f"{strategy} has no state of fields.")
        layout = strategy.layout(kinds)
        if not layout or [f.name for f in layout] != list(kinds):
            raise BadCache(f"{strategy} has fields {[f.name for f in layout]} of {list(kinds)}.")
        gathered = isinstance(strategy, Gathered)
        whole = gathered or any(f.round for f in layout)
        specs, fields = [], []
        for f in layout:
            shape, dtype = kinds[f.name]
            try:
                check_reducible("states", strategy, f, dtype)
                fits = capacity(strategy, f.name, shape) == shape
                may_grow = strategy.ragged_dims(f.name, len(shape))
            except Exception as error:
                raise BadCache(f"field {f.name!r} of {list(shape)} doesn't fit {strategy}: {error}") from error
            if not fits:
                raise BadCache(f"field {f.name!r} of {list(shape)} doesn't fit {strategy}.")
            fixed = tuple(None if grows else n for n, grows in zip(shape, may_grow, strict=True))
            apart = f"{type(strategy).__name__}.{f.name}" if whole else ""
            name = codec.dtype_name(dtype)
            specs.append(FieldSchema(f.name, fixed, name, f.reduction.value, f.round))
            fields.append((f.name, SegmentId(f.reduction.value, name, f.round, kind.device, apart, gathered), shape))
        _check_together(strategy, [shape for shape, _ in kinds.values()])
        return cls(strategy, strategy_facts(strategy), kind.result, tuple(specs), tuple(fields))

    def idle(self) -> State:
        """The state of an idle rank: identities, each field of one element's memory."""
        state = {}
        for name, segment_id, shape in self.fields:
            dtype = codec.dtype_named(segment_id.dtype)
            state[name] = torch.full((), Reduction(segment_id.reduction).identity(dtype), dtype=dtype).expand(shape)
        return state


def _check_together(strategy: Fieldwise, shapes: Sequence[tuple[int, ...]]) -> None:
    """`BadCache` for fields that would blow each other up: [n, 1] and [1, n] make n × n when they meet."""
    numel = sum(map(math.prod, shapes))
    if isinstance(strategy, Grouped):
        if any(shape[:1] != (strategy.size,) for shape in shapes):
            raise BadCache(f"states of {strategy} can't have fields of {list(shapes)}.")
        shapes = [shape[1:] for shape in shapes]  # cells meet cell by cell
    together = math.prod(map(max, itertools.zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)))
    if together > max(2**24, 100 * numel):
        raise BadCache(f"states of {strategy} with fields {list(shapes)} would take {together} elements to read.")


@functools.lru_cache(maxsize=FEW)
def _laid_out(layout: bytes) -> tuple[Arena, tuple[tuple[SegmentId, int], ...], tuple[_Alike, ...]]:
    """An arena without memory, which nobody changes; segment and size of every chunk, in their order; its kinds."""
    plan = _decoded(layout, _Layout, "the layout")
    strategies = [_named(text, "states of a packed cache") for text in plan.strategies]
    kinds = [_Alike.of(kind, strategies) for kind in plan.kinds]
    chunks: list[tuple[SegmentId, int]] = []
    sizes: dict[SegmentId, list[int]] = {}
    of_segment: dict[SegmentId, range] = {}  # which of its segment's chunks on the CPU a segment's chunks become
    for one in plan.segments:
        here = SegmentId(*one.segment)._replace(device="cpu")
        _tried(f"segment {one.segment}", Segment, here, _CPU)
        held = sizes.setdefault(here, [])
        if SegmentId(*one.segment) in of_segment:
            raise BadCache(f"segment {one.segment} of a packed cache comes twice.")
        of_segment[SegmentId(*one.segment)] = range(len(held), len(held) + len(one.sizes))
        held += one.sizes
        chunks += [(here, size) for size in one.sizes]
    num_places = sum(2 * len(kinds[k].fields) for k in plan.kind_of if k < len(kinds))
    if not len(plan.keys) == len(set(plan.keys)) == len(plan.kind_of) or num_places != len(plan.places):
        raise BadCache(f"{len(plan.keys)} keys of a packed cache have {len(plan.kind_of)} kinds and "
                       f"{len(plan.places)} places.")  # fmt: skip
    if set(plan.kind_of) != set(range(len(kinds))):
        raise BadCache(f"keys of a packed cache have kinds {sorted(set(plan.kind_of))[:8]}…, of {len(kinds)}.")
    slab_of: dict[int, tuple[str, ...]] = {}
    for slab in plan.slabs:
        if len(set(slab)) < len(slab) or any(n >= len(plan.keys) or n in slab_of for n in slab):
            raise BadCache(f"the slab {slab} of a packed cache is none of its keys'.")
        slab_of.update(dict.fromkeys(slab, tuple(plan.keys[n] for n in slab)))
    arena, places = Arena(), iter(plan.places)
    taken: dict[tuple[SegmentId, int], list[tuple[int, int]]] = {}
    for number, (key, k) in enumerate(zip(plan.keys, plan.kind_of, strict=True)):
        kind, slots = kinds[k], {}
        for name, there, shape in kind.fields:
            here = there._replace(device="cpu")
            chunk, offset = next(places), next(places)
            if chunk >= len(of_segment.get(there, ())):
                raise BadCache(f"field {name!r} of {key!r} lies in chunk {chunk}, which a packed cache hasn't.")
            slots[name] = Slot(here, of_segment[there][chunk], offset, shape)
            taken.setdefault((here, slots[name].chunk), []).append((offset, slots[name].numel))
        schema = KeySchema(key, "fields", kind.facts, kind.specs, result=kind.result)
        arena._enter(Entry(kind.strategy, schema, slots, slab_of.get(number, (key,))))
        _tried(repr(key), arena.set_placement, key, plan.kinds[k].placement)
    for (here, chunk), spans in taken.items():
        _check_spans(here, spans, sizes[here][chunk])
    for slab in plan.slabs:
        entries = [arena.entries[plan.keys[n]] for n in slab]
        if not all(before.precedes(after) for before, after in itertools.pairwise(entries)):
            raise BadCache(f"the slab {slab} of a packed cache doesn't lie side by side.")
    return arena, tuple(chunks), tuple(kinds)


@functools.lru_cache(maxsize=FEW)
def _check_reads(layout: bytes) -> None:
    """`BadCache` where states of a layout can't be read: one of each kind is. Not on torch's meta device, whose first
    operation took 0.9 s.
    """
    for kind in _laid_out(layout)[2]:
        _tried(f"states of {kind.strategy}", kind.strategy.finalize, kind.idle())


def _check_spans(segment_id: SegmentId, spans: Iterable[tuple[int, int]], size: int) -> None:
    """`BadCache` for fields, each (offset, number of elements), that share elements or lie outside of their chunk."""
    end = 0
    for offset, numel in sorted(spans):
        if offset < end or offset + numel > size:
            raise BadCache(f"a field of {numel} elements at {offset} doesn't fit into its chunk of {size} "
                           f"({segment_id.reduction} of {segment_id.dtype}) of a packed cache.")  # fmt: skip
        end = offset + numel


# -- rows and values -------------------------------------------------------------------------------------------


class _Reader:
    """The rows and values of a header: what it says of them is checked first, and copied as it's asked for."""

    def __init__(self, head: _Header, kinds: Sequence[tuple[torch.dtype, int]], buffers: Sequence[np.ndarray]) -> None:
        self._head = head
        self._dtypes = [dtype for dtype, _ in kinds]
        self._buffers = [_tensor_on(buffer, dtype) for buffer, (dtype, _) in zip(buffers, kinds, strict=True)]
        self._offsets: list[int] = []
        filled = [0] * len(kinds)
        for stored in head.tensors:
            if stored.buffer >= len(kinds):
                raise BadCache(f"a tensor {list(stored.shape)} of a packed cache lies in no buffer of it.")
            self._offsets.append(filled[stored.buffer])
            filled[stored.buffer] += math.prod(stored.shape)
        if filled != [size for _, size in kinds]:
            raise BadCache("the tensors of a packed cache don't fill its buffers.")
        self._strategies: dict[int, Strategy] = {}
        self._tensors: dict[int, Tensor] = {}  # each is copied once, whoever names it, or a header could ask for any
        self._columns: dict[int, Columns] = {}  # amount of memory
        for number, table in enumerate(head.tables):
            self._check_table(number, table)
        for entry in head.entries:
            self._check_entry(entry)
        for pattern, number in head.registry:
            self.strategy(number, f"the registration of {pattern!r}")
        if len({pattern for pattern, _ in head.registry}) < len(head.registry):
            raise BadCache("registrations of a packed cache come twice.")

    # -- checks

    def _kind(self, number: int, whose: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if number >= len(self._head.tensors):
            raise BadCache(f"the data of {whose} is missing: there is no tensor {number} in a packed cache.")
        stored = self._head.tensors[number]
        return self._dtypes[stored.buffer], stored.shape

    def _check_table(self, number: int, table: _Table) -> None:
        kinds = {name: self._kind(column, f"table {number}") for name, column in table.columns.items()}
        needed = {"sample", "position"} if table.indexed else {"sample"}
        if not needed <= kinds.keys():
            raise BadCache(f"table {number} lacks columns: expected {sorted(needed)}, got {sorted(kinds)}.")
        for name, (dtype, shape) in kinds.items():
            fits = dtype == torch.int64 and len(shape) == 1 if name in needed else len(shape) > 0
            if not fits or shape[0] != kinds["sample"][1][0]:
                raise BadCache(f"column {name!r} of table {number} doesn't fit: {dtype} {list(shape)}.")

    def _check_columns(self, table: int | None, num_rows: int | None, whose: str) -> None:
        if table is None:
            return
        if table >= len(self._head.tables):
            raise BadCache(f"the columns of {whose} are missing: there is no table {table}.")
        if num_rows is not None and self._kind(self._head.tables[table].columns["sample"], whose)[1] != (num_rows,):
            raise BadCache(f"table {table} doesn't have one entry for each row of {whose}.")

    def _check_entry(self, entry: _PackedRows | _PackedValues) -> None:
        whose = repr(entry.key)
        strategy = None if entry.strategy is None else self.strategy(entry.strategy, whose)
        if isinstance(entry, _PackedRows):
            dtype, shape = self._kind(entry.data, whose)
            if not shape or sum(entry.lengths) != shape[0] or len(entry.lengths) != len(entry.tables):
                raise BadCache(f"{whose} has pieces of {entry.lengths[:8]}… rows, which don't make {list(shape)}.")
            if not isinstance(strategy, (Rowwise, type(None))):
                raise BadCache(f"{whose} has rows, which doesn't fit {strategy}.")
            if strategy is not None:
                _tried(whose, strategy.finalize, Rows([Piece(torch.zeros((), dtype=dtype).expand(shape), None)]))
            for length, table in zip(entry.lengths, entry.tables, strict=True):
                self._check_columns(table, length, whose)
            return
        if not isinstance(strategy, (Listwise, type(None))):
            raise BadCache(f"{whose} has whole values, which doesn't fit {strategy}.")
        for value in entry.values:
            shape = () if isinstance(value.data, bytes) else self._kind(value.data, whose)[1]
            if value.rows and (value.weighted or (not shape and not isinstance(value.data, bytes))):
                raise BadCache(f"{whose} has a number or a weighted value where it should have rows.")
            self._check_columns(value.table, shape[0] if value.rows and shape else None, whose)
            if value.weight is not None:
                self._kind(value.weight, whose)

    # -- reading

    def strategy(self, number: int, whose: str) -> Strategy:
        if number not in self._strategies:
            if number >= len(self._head.strategies):
                raise BadCache(f"the strategy of {whose} is missing: there is no strategy {number}.")
            text = self._head.strategies[number]
            self._strategies[number] = _function(text) if isinstance(text, str) else _named(text, whose)
        return self._strategies[number]

    def tensor(self, number: int) -> Tensor:
        """A tensor in memory of its own."""
        if number not in self._tensors:
            stored, offset = self._head.tensors[number], self._offsets[number]
            flat = self._buffers[stored.buffer][offset : offset + math.prod(stored.shape)]
            self._tensors[number] = _tried("a tensor", flat.view, stored.shape).clone()
        return self._tensors[number]

    def columns(self, number: int | None) -> Columns | None:
        if number is None:
            return None
        if number not in self._columns:
            table = self._head.tables[number]
            by_name = {name: self.tensor(column) for name, column in table.columns.items()}
            self._columns[number] = Columns(by_name, table.indexed)
        return self._columns[number]

    def entry(self, entry: _PackedRows | _PackedValues) -> RawEntry | KeptEntry:
        strategy = None if entry.strategy is None else self._strategies[entry.strategy]
        if isinstance(entry, _PackedRows):
            parts = self.tensor(entry.data).split(entry.lengths)
            pieces = [Piece(part, self.columns(table)) for part, table in zip(parts, entry.tables, strict=True)]
            if strategy is None:
                return RawEntry([Value(piece.value_n, rows=True, columns=piece.columns) for piece in pieces])
            return KeptEntry.of(entry.key, strategy, Rows(pieces))
        values = [self._value(repr(entry.key), value) for value in entry.values]
        if strategy is None:
            return RawEntry(values)
        if not isinstance(strategy, Function):
            _tried(repr(entry.key), strategy.finalize, values)
        return KeptEntry.of(entry.key, strategy, values)

    def _value(self, whose: str, packed: _PackedValue) -> Value:
        data: Any = codec.decode(packed.data) if isinstance(packed.data, bytes) else self.tensor(packed.data)
        if packed.weighted:
            data = _tried(whose, _weighted, data)
        weight = None if packed.weight is None else self.tensor(packed.weight)
        return Value(data, packed.rows, self.columns(packed.table), weight)


def _tried(whose: str, use: Callable[..., _T], *what: Any) -> _T:
    """What `use` makes of it; `BadCache` where it raises, because what was packed isn't what it says it is."""
    try:
        return use(*what)
    except Exception as error:
        raise BadCache(
            f"what a packed cache has of {whose} is no such state: {type(error).__name__}: {error}"
        ) from error


def _weighted(pair: Any) -> Weighted:
    value, weight = pair
    if not isinstance(weight, (int, float, Tensor)):
        raise TypeError(f"a weight is a number or a tensor, got {type(weight).__name__}")
    return Weighted(value, weight)


def _function(path: str) -> Function:
    function = _tried(f"the function {path}", Function.at, path)
    if not callable(function.function):
        raise BadCache(f"{path}, which a packed cache names, is no function.")
    return function
