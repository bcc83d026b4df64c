"""What ranks hold of a model that lies on several of them, put together once, when each piece has been reduced.

Ranks that have seen the same samples tell each other which keys they hold and where a key is split. What all of them
have moves nowhere; a piece, or a key of some of them alone, moves once, from the first rank that has it to all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distcache import codec
from distcache.comm import Communicator, Poll, Transfer
from distcache.errors import SchemaMismatch
from distcache.mesh import REPLICATED, Mesh, Placement, put_together, sources
from distcache.plan import ALIGNMENT, Block, buckets
from distcache.protocol import tell_all
from distcache.schema import FieldSchema, KeySchema, digest_of, natural_order
from distcache.segments import Arena
from distcache.strategies import Columns, Fieldwise, Piece, State, Strategy, Value


@dataclass(slots=True)
class Arrived:
    """What came from the ranks that reduce together, by key, in their order; `states` of keys with one holder."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    lists: dict[str, list[list[Value]]] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """One rank's own of a key, as it tells of it: the schema, the shapes of its fields or of its pieces' rows, and a
    digest of which samples rows are of.
    """

    schema: KeySchema
    shapes: tuple[tuple[int, ...], ...]
    samples: int = 0

    def plain(self) -> list[Any]:
        return [self.schema.plain(), [list(shape) for shape in self.shapes], self.samples]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Kept:
        facts, shapes, samples = plain
        return cls(KeySchema.from_facts(facts), tuple(tuple(shape) for shape in shapes), samples)


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A key that moves: who has which of its pieces, by coordinate, and what each rank holds of it."""

    key: str
    placement: Placement
    sources: Mapping[tuple[int, ...], int]
    kept: Mapping[int, Kept]

    @property
    def schema(self) -> KeySchema:
        return self.kept[next(iter(self.sources.values()))].schema


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
    """What all ranks of a model know of each other's keys: `here`, that every rank holds alike, and those that move."""

    here: frozenset[str]
    items: tuple[Item, ...]


def tell(schemas: Mapping[str, KeySchema], scratch: Arena, arrived: Arrived) -> dict[str, Kept]:
    """What this rank holds, by key."""
    found = {}
    digests: dict[tuple[int, ...], int] = {}  # once for all keys that share their columns
    for key, schema in schemas.items():
        samples = 0
        if key in scratch:
            shapes: Iterable[Sequence[int]] = scratch.capacities(key).values()
        elif key in arrived.states:
            shapes = [arrived.states[key][f.name].shape for f in schema.fields]
        elif key in arrived.pieces:
            shapes = [piece.value_n.shape for piece in arrived.pieces[key]]
            known = [piece.columns for piece in arrived.pieces[key] if piece.columns is not None]
            identity = tuple(map(id, known))
            if identity not in digests:
                digests[identity] = digest_of(*(columns.by_name["sample"].tolist() for columns in known))
            samples = digests[identity]
        elif key in arrived.lists:
            shapes = []
        else:
            continue
        found[key] = Kept(schema, tuple(tuple(shape) for shape in shapes), samples)
    return found


def plan_assembly(told: Sequence[Mapping[str, Kept]], mesh: Mesh, ranks: Sequence[int]) -> Assembly:
    """Who sends what: pure, alike on every rank. `told`: by rank of the model, `ranks`: their places in the group.

    `SchemaMismatch` where ranks say different things of a key, or a piece isn't there.
    """
    coordinates = {place: mesh.coordinate(rank) for place, rank in enumerate(ranks)}
    here, items = set(), []
    for key in sorted({key for one in told for key in one}, key=natural_order):
        kept = {place: one[key] for place, one in enumerate(told) if key in one}
        first = next(iter(kept.values()))
        placement = Placement.named(first.schema.placement)
        for place, other in kept.items():
            _check_alike(key, placement, first, other, ranks[next(iter(kept))], ranks[place])
        found = sources(key, placement, list(kept), coordinates, mesh)
        if not placement.dims and len(kept) == len(told):
            here.add(key)
            continue
        if placement.dims and first.schema.kind == "list":
            raise SchemaMismatch(f"{key!r} is {placement}, and its values are no tensors that could be put together.")
        items.append(Item(key, placement, found, kept))
    return Assembly(frozenset(here), tuple(items))


def _check_alike(key: str, placement: Placement, first: Kept, other: Kept, one: int, another: int) -> None:
    """`SchemaMismatch` unless two ranks hold pieces of one thing."""
    mine, theirs = first.schema, other.schema
    if placement.dims:  # sizes may differ along dims that are split, which `put_together` looks at
        mine, theirs = _unsized(mine), _unsized(theirs)
    if mine != theirs or len(first.shapes) != len(other.shapes):
        words = "; ".join(mine.explain_difference(theirs)) or f"{len(first.shapes)} against {len(other.shapes)} pieces"
        raise SchemaMismatch(f"cannot put {key!r} together: rank {one} against rank {another}: {words}.")
    if mine.kind != "rows":
        return
    here, there = ([shape[0] for shape in kept.shapes] for kept in (first, other))
    if here != there or first.samples != other.samples:
        raise SchemaMismatch(
            f"ranks {one} and {another} have seen other samples in {key!r} ({sum(here)} and {sum(there)} rows), where "
            "they should have parts of one model: is an axis of data missing in data_axes?"
        )


def _unsized(schema: KeySchema) -> KeySchema:
    fields = tuple(replace(f, shape=(None,) * len(f.shape)) for f in schema.fields)
    row_shape = None if schema.row_shape is None else (-1,) * len(schema.row_shape)
    return replace(schema, fields=fields, row_shape=row_shape)


def _payloads(assembly: Assembly) -> dict[tuple[int, str], list[Block]]:
    """By (rank, type of device), what a rank sends: fields of states and pieces of rows, by number."""
    found: dict[tuple[int, str], list[Block]] = {}
    ends: dict[tuple[int, str], int] = {}
    for item in assembly.items:
        for rank in item.sources.values():
            kept = item.kept[rank]
            where = (rank, kept.schema.device)
            for number, shape in enumerate(kept.shapes):
                name = kept.schema.fields[number].dtype if kept.schema.kind == "fields" else kept.schema.dtype
                assert name is not None
                offset = -(-ends.get(where, 0) // ALIGNMENT) * ALIGNMENT
                nbytes = math.prod(shape) * codec.dtype_named(name).itemsize
                block = Block(kept.schema.kind, item.key, str(number), name, shape, offset, nbytes)
                found.setdefault(where, []).append(block)
                ends[where] = offset + nbytes
    return found


def assemble(
    comm: Communicator,
    assembly: Assembly,
    scratch: Arena,
    arrived: Arrived,
    strategy_of: Callable[[str, KeySchema], Strategy],
    device_of: Callable[[str], torch.device],
    bucket_bytes: int,
    to: int | None,
    poll: Poll,
) -> tuple[Arena, Arrived] | None:
    """Move what moves and put pieces together, states and what else came: a collective over the ranks of a model. None
    where `to` isn't this rank.

    `scratch` and `arrived` are this rank's own, reduced; they are only read.
    """
    if not assembly.items:
        return (scratch, arrived) if to in (None, comm.rank) else None
    beside = _beside(comm, assembly, arrived)
    payloads, buffers, transfers = _payloads(assembly), {}, []
    for where in sorted(payloads):
        rank, kind = where
        if comm.rank not in (rank, *([comm.rank] if to is None else [to])):
            continue
        blocks = payloads[where]
        with torch.inference_mode(False):
            end = blocks[-1].offset + blocks[-1].nbytes
            buffers[where] = buffer = torch.empty(end, dtype=torch.uint8, device=device_of(kind))
        if rank == comm.rank:
            for block in blocks:
                block.of(buffer).copy_(_own(block, scratch, arrived))
        if rank != to:
            transfers += [Transfer(buffer[a:b], "copy", root=rank, to=to) for a, b in buckets(end, 1, bucket_bytes)]
    comm.run(transfers, poll)
    if to not in (None, comm.rank):
        return None
    views = {
        (where[0], block.key, int(block.name)): block.of(buffers[where])
        for where in buffers
        for block in payloads[where]
    }
    return _built(assembly, scratch, arrived, views, beside, strategy_of, device_of)


def _own(block: Block, scratch: Arena, arrived: Arrived) -> Tensor:
    number = int(block.name)
    if block.key in scratch:
        return list(scratch.state(block.key).values())[number]
    if block.key in arrived.states:
        return list(arrived.states[block.key].values())[number]
    return arrived.pieces[block.key][number].value_n


def _beside(comm: Communicator, assembly: Assembly, arrived: Arrived) -> dict[str, Any]:
    """By key that not all ranks hold: the columns of its pieces, or its encoded lists. A collective, if any is."""
    lacking = [i for i in assembly.items if i.schema.kind != "fields" and len(i.kept) < comm.world_size]
    if not lacking:
        return {}
    tables: dict[int, int] = {}
    columns: list[Any] = []
    entries: list[Any] = []
    for item in lacking:
        if item.key in arrived.pieces and comm.rank == next(iter(item.sources.values())):
            numbers: list[int | None] = []
            for piece in arrived.pieces[item.key]:
                if piece.columns is not None and id(piece.columns) not in tables:
                    tables[id(piece.columns)] = len(columns)
                    columns.append([dict(piece.columns.by_name), piece.columns.indexed])
                numbers.append(None if piece.columns is None else tables[id(piece.columns)])
            entries.append([item.key, numbers])
        elif item.key in arrived.lists and comm.rank == next(iter(item.sources.values())):
            entries.append([item.key, [encode_list(values) for values in arrived.lists[item.key]]])
    found: dict[str, Any] = {}
    for told in tell_all(comm, codec.encode([columns, entries])):
        theirs, named = codec.decode(told)
        known = [Columns(by_name, indexed) for by_name, indexed in theirs]
        for key, values in named:
            lists = bool(values) and isinstance(values[0], bytes)
            found[key] = values if lists else [None if n is None else known[n] for n in values]
    return found


def _built(
    assembly: Assembly,
    scratch: Arena,
    arrived: Arrived,
    views: Mapping[tuple[int, str, int], Tensor],
    beside: Mapping[str, Any],
    strategy_of: Callable[[str, KeySchema], Strategy],
    device_of: Callable[[str], torch.device],
) -> tuple[Arena, Arrived]:
    states = Arena()
    found = Arrived(
        {key: pieces for key, pieces in arrived.pieces.items() if key in assembly.here},
        {key: lists for key, lists in arrived.lists.items() if key in assembly.here},
        {key: state for key, state in arrived.states.items() if key in assembly.here},
    )
    for keys in scratch.slabs():
        if all(key in assembly.here for key in keys):
            states.take_slab(scratch, keys)
        else:
            for key in (key for key in keys if key in assembly.here):
                states.take_slab(scratch, (key,))
    for item in assembly.items:
        dims = [dim for _, dim in item.placement.dims]
        strategy, schema = strategy_of(item.key, item.schema), replace(item.schema, placement=REPLICATED)
        if schema.kind == "list":
            lists = arrived.lists.get(item.key)
            found.lists[item.key] = lists or [decode_list(data) for data in beside[item.key]]
        elif schema.kind == "rows":
            pieces, columns = [], beside.get(item.key, ())
            for number in range(len(next(iter(item.kept.values())).shapes)):
                value_n = _joined(item, number, dims, views)
                known = arrived.pieces[item.key][number].columns if item.key in arrived.pieces else columns[number]
                pieces.append(Piece(value_n, known))
            found.pieces[item.key] = pieces
        else:
            assert isinstance(strategy, Fieldwise)
            state, fields = {}, []
            for number, spec in enumerate(schema.fields):
                along = [strategy.split_dim(spec.name, len(spec.shape), dim) for dim in dims]
                state[spec.name] = whole = _joined(item, number, along, views)
                shape = tuple(None if n is None else whole.shape[d] for d, n in enumerate(spec.shape))
                fields.append(FieldSchema(spec.name, shape, spec.dtype, spec.reduction, spec.round))
            states.put(replace(schema, fields=tuple(fields)), strategy, state, device_of(schema.device))
    return states, found


def _joined(
    item: Item, number: int, dims: Sequence[int | None], views: Mapping[tuple[int, str, int], Tensor]
) -> Tensor:
    """A field, or a piece of rows, of the whole key; `dims`: along which it's split over each axis, None: it isn't."""
    views_of = {place: views[rank, item.key, number] for place, rank in item.sources.items()}
    first = next(iter(views_of.values()))
    split = {n: dim for n, dim in enumerate(dims) if dim is not None}
    if not split:
        return first
    by_place = {tuple(place[n] for n in split): x for place, x in reversed(list(views_of.items()))}
    shapes = {place: tuple(x.shape) for place, x in by_place.items()}
    shape, where = put_together(shapes, list(split.values()), item.key)
    with torch.inference_mode(False):
        whole = torch.empty(shape, dtype=first.dtype, device=first.device)
    for place, x in by_place.items():
        whole[where[place]] = x
    return whole


# -- lists -----------------------------------------------------------------------------------------------------


def encode_list(values: Sequence[Value]) -> bytes:
    """Whole values as bytes, each with its samples' indices if it has them."""
    plain = []
    for value in values:
        indexed = value.columns is not None and value.columns.indexed
        plain.append([value.data, value.columns.by_name["sample"] if indexed and value.columns else None])
    return codec.encode(plain)


def decode_list(data: bytes) -> list[Value]:
    values = []
    for item, sample in codec.decode(data):
        columns = None if sample is None else Columns({"sample": sample, "position": torch.zeros_like(sample)}, True)
        values.append(Value(item, columns=columns))
    return values
