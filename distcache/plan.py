"""What all ranks know -> who moves which bytes where; pure functions, the same on every rank.

Row counts, and who holds what, are vectors and matrices over keys, never an object per rank and key: 1,024 ranks with
10,000 keys each have ten million.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from distcache.codec import dtype_named
from distcache.errors import SchemaMismatch
from distcache.schema import KeySchema

ALIGNMENT = 16  # bytes; every block can be viewed as its dtype


def _no_keys() -> np.ndarray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Table:
    """Columns that the rows of several keys share: (name, dtype) each, of `num_rows`."""

    columns: tuple[tuple[str, str], ...]
    num_rows: int
    indexed: bool


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What one rank tells the others about what it will send, beyond the schema.

    Its vectors, int64, have an entry for each of the rank's keys of that kind, in the order of `sorted`: names don't
    travel. `num_rows`, `table_of` [R]: of its rows, and the number of their table or -1. `list_nbytes`, `list_indexed`
    [L]: of its lists, encoded, and whether (0 or 1) their values carry the samples' indices. `ledger`: see
    `Ledger.to_plain`; its keys are None where they are all that the rank reduces.
    """

    num_rows: np.ndarray = field(default_factory=_no_keys)
    table_of: np.ndarray = field(default_factory=_no_keys)
    tables: tuple[Table, ...] = ()
    list_nbytes: np.ndarray = field(default_factory=_no_keys)
    list_indexed: np.ndarray = field(default_factory=_no_keys)
    ledger: tuple[Any, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(len(self.num_rows) or len(self.list_nbytes) or self.ledger or self.notes)

    def naming(self, reduced: frozenset[str]) -> Offer:
        """With the keys that this rank reduces, now that they are known, in its ledger."""
        if not self.ledger:
            return self
        return replace(self, ledger=tuple([reduced if keys is None else keys, seen] for keys, seen in self.ledger))

    def to_plain(self) -> list[Any]:
        return [
            torch.from_numpy(self.num_rows),
            torch.from_numpy(self.table_of),
            [[[list(column) for column in t.columns], t.num_rows, t.indexed] for t in self.tables],
            torch.from_numpy(self.list_nbytes),
            torch.from_numpy(self.list_indexed),
            list(self.ledger),
            dict(self.notes),
        ]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Offer:
        num_rows, table_of, tables, list_nbytes, list_indexed, ledger, notes = plain
        named = tuple(Table(tuple((c[0], c[1]) for c in columns), n, indexed) for columns, n, indexed in tables)
        lists = (list_nbytes.numpy(), list_indexed.numpy())
        return cls(num_rows.numpy(), table_of.numpy(), named, *lists, tuple(ledger), notes)


@dataclass(frozen=True, slots=True, eq=False)
class Holdings:
    """Who brings what. `keys` [K], in the order of `sorted`; `held`: bool [W, K], by rank.

    `rooms`: int64 [E], the largest room that any rank has in each ragged dim of these keys' fields, key by key; None
    where layouts agree, so that segments go as they are: then `keys` are those alone whose values are kept.
    """

    keys: tuple[str, ...]
    held: np.ndarray
    rooms: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Where one piece lies in a payload.

    `kind`: "rows" of a key, "column" of a table, an encoded "list", or a "field" of a state with one holder.
    """

    kind: str
    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    table: int = -1

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The piece as the tensor that it is: a view of the payload."""
        return buffer[self.offset : self.offset + self.nbytes].view(dtype_named(self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class _Item:
    """What the blocks of all ranks have in common; `shape` of one row, or of a whole field."""

    device: str
    kind: str
    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype_named(self.dtype).itemsize


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Blocks of one kind and device, [n]: which of `items`, rows (of a field: 1), bytes, number of the table or -1."""

    items: Sequence[_Item]
    which: np.ndarray
    num_rows: np.ndarray
    nbytes: np.ndarray
    table_of: np.ndarray

    @classmethod
    def of(cls, items: Sequence[_Item], num_rows: Sequence[int], table_of: Sequence[int]) -> _Part:
        """All of some items."""
        rows = np.array(num_rows)
        nbytes = rows * np.array([item.nbytes for item in items])
        return cls(items, np.arange(len(items)), rows, nbytes, np.array(table_of))


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """The bytes that one rank sends from one type of device: blocks side by side in one buffer.

    `to`: the one rank that takes them; None: whoever holds the content.
    """

    rank: int
    device: str
    nbytes: int
    parts: tuple[_Part, ...]
    to: int | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """In the order of their offsets; made when asked for."""
        found, offset = [], 0
        for part in self.parts:
            vectors = (part.which, part.num_rows, part.nbytes, part.table_of)
            for which, num_rows, nbytes, table in zip(*(vector.tolist() for vector in vectors), strict=True):
                item = part.items[which]
                shape = item.shape if item.kind == "field" else (num_rows, *item.shape)
                found.append(Block(item.kind, item.key, item.name, item.dtype, shape, offset, nbytes, table))
                offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """Which rank has what of a content that lies in shards.

    `owners`: the rank that holds each reduction; `nbytes`: by rank, what its reductions took when it came to own them.
    `num_rows`: int64 [W], by rank, the rows of each concatenation.
    """

    owners: Mapping[str, int]
    nbytes: tuple[int, ...]
    num_rows: Mapping[str, np.ndarray]

    @classmethod
    def none(cls, world_size: int) -> Shards:
        return cls({}, (0,) * world_size, {})

    def owning(self, sizes: Mapping[str, int]) -> Shards:
        """With owners for keys of these bytes, in stretches of this order: who owns least gets most.

        Who owns a key keeps it. In integers: every rank must find the same, whatever its processor.
        """
        new = {key: max(1, nbytes) for key, nbytes in sizes.items() if key not in self.owners}
        if not new:
            return self
        num_ranks, size = len(self.nbytes), sum(new.values())
        rooms = [max(0, sum(self.nbytes) + size - num_ranks * held) for held in self.nbytes]
        owners, owned = dict(self.owners), list(self.nbytes)
        all_room = sum(rooms)
        rank, start, room = 0, 0, rooms[0]
        for key, nbytes in new.items():
            # A key goes to the rank in whose stretch of all rooms its middle lies, were these stretched to `size`.
            while rank + 1 < num_ranks and (2 * start + nbytes) * all_room > 2 * room * size:
                rank += 1
                room += rooms[rank]
            start += nbytes
            owners[key] = rank
            owned[rank] += nbytes
        return Shards(owners, tuple(owned), self.num_rows)

    def counting(self, keys: Sequence[str], num_rows: np.ndarray) -> Shards:
        """With that many rows more, int64 [K, W]."""
        if not keys:
            return self
        none = np.zeros(len(self.nbytes), dtype=np.int64)
        more = {key: self.num_rows.get(key, none) + row for key, row in zip(keys, num_rows, strict=True)}
        return Shards(self.owners, self.nbytes, {**self.num_rows, **more})


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """Who reduces and who sends what.

    `relaid`: the keys to reduce, in this order, where layouts differ; None where segments go as they are. `sole`: the
    one holder of each key whose state is sent. `kept`: the keys whose values are sent. `indexed`: of all keys that have
    any values in the content or here, whether these carry the samples' indices. `shards`: who will have what; None
    where the content lies whole.
    """

    schemas: Mapping[str, KeySchema]
    relaid: tuple[str, ...] | None
    capacities: Mapping[str, Mapping[str, tuple[int, ...]]]
    sole: Mapping[str, int]
    kept: tuple[str, ...]
    indexed: Mapping[str, bool]
    payloads: tuple[Payload, ...]
    tables: tuple[tuple[Table, ...], ...]  # by rank
    shards: Shards | None = None

    def explain(self) -> str:
        """The plan in a few lines, for logs."""
        reduced = "segments as they are" if self.relaid is None else f"{len(self.relaid)} keys laid out anew"
        sent = [f"rank {p.rank} {p.nbytes} B ({p.device})" for p in self.payloads[:8]]
        more = [f"and {len(self.payloads) - 8} more"] if len(self.payloads) > 8 else []
        return f"merge of {len(self.schemas)} keys: reduce {reduced}; send {', '.join([*sent, *more]) or 'nothing'}"


def make_plan(
    schemas: Mapping[str, KeySchema],
    holdings: Holdings,
    offers: Sequence[Offer],
    content_indexed: Mapping[str, bool],
    shards: Shards | None = None,
    sizes: Mapping[str, int] | None = None,
) -> MergePlan:
    """The plan of a merge; `schemas`, whose order is the plan's, has every key of `holdings` and maybe more.

    A state with one holder is sent, one with several is reduced, the others bringing identities.
    `SchemaMismatch` where some rows carry the samples' indices and some don't.

    `shards`: of the content, where it lies in shards: then rows stay where they are, and each state goes to its owner.
    `sizes`: with them, the bytes of each state in the order in which they lie, where layouts agree.
    """
    if not holdings.keys:  # the usual merge of reductions; at 64 values a key this would be a tenth of its time
        relaid = None if holdings.rooms is None else ()
        owned = None if shards is None else shards.owning(sizes or {})
        return MergePlan(schemas, relaid, {}, {}, (), content_indexed, (), tuple(o.tables for o in offers), owned)
    rows, lists = (_Kept(kind, schemas, holdings, content_indexed) for kind in ("rows", "list"))
    capacities, reduced, sole = _fields(schemas, holdings)
    if shards is not None:
        if holdings.rooms is not None:
            sizes = {key: _state_nbytes(schemas[key], room) for key, room in capacities.items()}
        shards = shards.owning(sizes or {}).counting(rows.keys, rows.counted(offers))
    fields: dict[int, dict[int | None, list[_Item]]] = {}  # by who sends them, to whom
    for key, rank in sole.items():
        device, room = schemas[key].device, capacities[key]
        items = [_Item(device, "field", key, f.name, f.dtype, room[f.name]) for f in schemas[key].fields]
        to = shards.owners[key] if shards is not None else None
        fields.setdefault(rank, {}).setdefault(to, []).extend(items)
    payloads: list[Payload] = []
    for rank, offer in enumerate(offers):
        table_indexed = np.array([*(table.indexed for table in offer.tables), False])  # of table -1: the last
        rows.check_indexed(rank, offer.num_rows > 0, table_indexed[offer.table_of])
        lists.check_indexed(rank, offer.list_nbytes >= 0, offer.list_indexed > 0)
        states = fields.get(rank, {})
        parts = (
            []
            if shards is not None
            else [
                *rows.parts(rank, offer.num_rows, offer.table_of),
                *_columns(offer.tables),
            ]
        )
        parts += [
            *lists.parts(rank, offer.list_nbytes, np.full_like(offer.list_nbytes, -1)),
            *_states(states.pop(None, ())),
        ]
        payloads.extend(_payloads(rank, parts))
        for to, items in states.items():
            payloads.extend(_payloads(rank, list(_states(items)), to))
    return MergePlan(
        schemas,
        None if holdings.rooms is None else tuple(reduced),
        capacities,
        sole,
        (*rows.keys, *lists.keys),
        {**content_indexed, **rows.indexed(), **lists.indexed()} if rows.keys or lists.keys else content_indexed,
        tuple(payloads),
        tuple(offer.tables for offer in offers),
        shards,
    )


def num_ragged(schema: KeySchema) -> int:
    """The number of ragged dims of a key's fields: so many of `Holdings.rooms` are its own."""
    return sum(n is None for f in schema.fields for n in f.shape)


def _fields(
    schemas: Mapping[str, KeySchema], holdings: Holdings
) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str], dict[str, int]]:
    """Where layouts differ: the room of every field by key, the keys to reduce, and the holder of those to send."""
    capacities: dict[str, dict[str, tuple[int, ...]]] = {}
    relaid: list[str] = []
    sole: dict[str, int] = {}
    if holdings.rooms is None:
        return capacities, relaid, sole
    rooms = iter(holdings.rooms.tolist())
    by_key = {}
    for key in holdings.keys:
        by_key[key] = {f.name: tuple(next(rooms) if n is None else n for n in f.shape) for f in schemas[key].fields}
    alone = len(holdings.held) == 1
    holders = dict(zip(holdings.keys, holdings.held.sum(0).tolist(), strict=True))
    first = dict(zip(holdings.keys, holdings.held.argmax(0).tolist(), strict=True))
    for key, schema in schemas.items():
        if schema.kind == "fields" and key in by_key:
            capacities[key] = by_key[key]
            if holders[key] == 1 and not alone:
                sole[key] = first[key]
            else:
                relaid.append(key)
    return capacities, relaid, sole


class _Kept:
    """The keys of one kind whose values are kept, [K], and who brings them."""

    def __init__(
        self, kind: str, schemas: Mapping[str, KeySchema], holdings: Holdings, content_indexed: Mapping[str, bool]
    ) -> None:
        places = [i for i, key in enumerate(holdings.keys) if schemas[key].kind == kind]
        self.keys = [holdings.keys[i] for i in places]
        found = [schemas[key] for key in self.keys]
        self._items = [_Item(s.device, kind, s.key, "", s.dtype or "uint8", s.row_shape or ()) for s in found]
        self._nbytes = np.array([item.nbytes for item in self._items], dtype=np.int64)
        devices = np.array([item.device for item in self._items])
        self._on = {device: devices == device for device in np.unique(devices).tolist()}
        self._places = [held.nonzero()[0] for held in holdings.held[:, places]]  # by rank
        # Whether values carry the samples' indices, -1 where there are none yet; who brought the first, -1 the content.
        self._flags = np.array([content_indexed.get(key, -1) for key in self.keys], dtype=np.int64)
        self._who = np.full_like(self._flags, -1)

    def parts(self, rank: int, num_rows: np.ndarray, table_of: np.ndarray) -> Iterator[_Part]:
        """What a rank sends of these keys, by type of device."""
        which = self._places[rank]
        assert len(which) == len(num_rows) == len(table_of)
        nbytes = num_rows * self._nbytes[which]
        for there in self._on.values():
            some = there[which] if len(self._on) > 1 else slice(None)
            yield _Part(self._items, which[some], num_rows[some], nbytes[some], table_of[some])

    def counted(self, offers: Sequence[Offer]) -> np.ndarray:
        """The rows that ranks bring, int64 [K, W]."""
        found = np.zeros((len(self.keys), len(offers)), dtype=np.int64)
        for rank, offer in enumerate(offers):
            found[self._places[rank], rank] = offer.num_rows
        return found

    def check_indexed(self, rank: int, some: np.ndarray, indexed: np.ndarray) -> None:
        """`SchemaMismatch` unless this rank's values, of keys of which it has `some`, are as those that came before."""
        places, flags = self._places[rank], indexed.astype(np.int64)
        known = self._flags[places]
        odd = (some & (known >= 0) & (known != flags)).nonzero()[0]
        if len(odd):
            place = int(places[odd[0]])
            first = int(self._who[place])
            before, now = "the content" if first < 0 else f"rank {first}", f"rank {rank}"
            yes, no = (before, now) if self._flags[place] else (now, before)
            raise SchemaMismatch(
                f"cannot order {self.keys[place]!r}: {yes} has values with an index, {no} without. "
                "On one key either every non-empty cat has index= or none has."
            )
        new = some & (known < 0)
        self._flags[places[new]], self._who[places[new]] = flags[new], rank

    def indexed(self) -> dict[str, bool]:
        """What has been found out, by key."""
        return {key: bool(flag) for key, flag in zip(self.keys, self._flags.tolist(), strict=True) if flag >= 0}


def _columns(tables: Sequence[Table]) -> Iterator[_Part]:
    columns = [(number, table.num_rows, *column) for number, table in enumerate(tables) for column in table.columns]
    if columns:
        items = [_Item("cpu", "column", "", name, dtype, ()) for _, _, name, dtype in columns]
        yield _Part.of(items, [num_rows for _, num_rows, _, _ in columns], [number for number, _, _, _ in columns])


def _states(items: Sequence[_Item]) -> Iterator[_Part]:
    for device in sorted({item.device for item in items}):
        there = [item for item in items if item.device == device]
        yield _Part.of(there, [1] * len(there), [-1] * len(there))


def _payloads(rank: int, parts: Sequence[_Part], to: int | None = None) -> Iterator[Payload]:
    by_device: dict[str, list[_Part]] = {}
    for part in parts:
        if len(part.which):
            by_device.setdefault(part.items[int(part.which[0])].device, []).append(part)
    for device, found in sorted(by_device.items()):
        nbytes = np.concatenate([part.nbytes for part in found])
        padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
        yield Payload(rank, device, int(padded[:-1].sum() + nbytes[-1]), tuple(found), to)


def needed_bytes(
    plan: MergePlan, rank: int, device: str, dst: int | None, delta_nbytes: int, content_nbytes: int
) -> int:
    """Bytes that a rank's merge takes on one type of device, beside its content and delta.

    `delta_nbytes`: of this rank's segments, which are every rank's where layouts agree. `content_nbytes`: of the
    content's segments that are copied, where the content is held, and of what is copied out of scratch where layouts
    agree.
    """
    holds = dst in (None, rank)
    sent = sum(
        p.nbytes for p in plan.payloads if p.device == device and (p.rank == rank or (holds and p.to in (None, rank)))
    )
    scratch = delta_nbytes if plan.relaid is None else _fields_nbytes(plan, plan.relaid, device)
    if plan.shards is not None:  # what a rank owns is copied out of scratch, or sent to it
        owned = (key for key in (*(plan.relaid or ()), *plan.sole) if plan.shards.owners[key] == rank)
        return sent + scratch + _fields_nbytes(plan, owned, device) + content_nbytes
    if holds:  # a state that was sent joins the others in scratch
        scratch += _fields_nbytes(plan, plan.sole, device) + content_nbytes
    return sent + scratch


def _fields_nbytes(plan: MergePlan, keys: Iterable[str], device: str) -> int:
    found = [key for key in keys if plan.schemas[key].device == device]
    return sum(_state_nbytes(plan.schemas[key], plan.capacities[key]) for key in found)


def _state_nbytes(schema: KeySchema, room: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(room[f.name]) * dtype_named(f.dtype).itemsize for f in schema.fields)


def buckets(numel: int, itemsize: int, bucket_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive parts of at most `bucket_bytes`, in elements."""
    step = max(1, bucket_bytes // itemsize)
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]
