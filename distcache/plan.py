"""What all ranks know -> who moves which bytes where; pure functions, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distcache.codec import dtype_named
from distcache.errors import SchemaMismatch
from distcache.schema import KeySchema

ALIGNMENT = 16  # bytes; every block can be viewed as its dtype


@dataclass(frozen=True, slots=True)
class Table:
    """Columns that the rows of several keys share: (name, dtype) each, of `num_rows`."""

    columns: tuple[tuple[str, str], ...]
    num_rows: int
    indexed: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """What one rank tells the others about what it will send, beyond the schema.

    `rows`: key -> (number of rows, number of its table or -1). `lists`: key -> (encoded bytes, whether its values
    carry the samples' indices). `capacities`: key -> field -> shape, for field-wise states; only exchanged where
    layouts differ.
    """

    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    lists: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    capacities: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    ledger: tuple[Any, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def indexed(self) -> dict[str, bool]:
        """Whether a key's values carry the samples' indices, for keys that have any."""
        found = {key: table >= 0 and self.tables[table].indexed for key, (n, table) in self.rows.items() if n}
        return {**found, **{key: indexed for key, (_, indexed) in self.lists.items()}}

    def to_plain(self) -> list[Any]:
        return [
            {key: list(counts) for key, counts in self.rows.items()},
            [[[list(column) for column in t.columns], t.num_rows, t.indexed] for t in self.tables],
            {key: list(facts) for key, facts in self.lists.items()},
            {key: {name: list(s) for name, s in fields.items()} for key, fields in self.capacities.items()},
            list(self.ledger),
            dict(self.notes),
        ]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Offer:
        rows, tables, lists, capacities, ledger, notes = plain
        return cls(
            {key: (counts[0], counts[1]) for key, counts in rows.items()},
            tuple(Table(tuple((c[0], c[1]) for c in columns), n, indexed) for columns, n, indexed in tables),
            {key: (facts[0], facts[1]) for key, facts in lists.items()},
            {key: {name: tuple(s) for name, s in fields.items()} for key, fields in capacities.items()},
            tuple(ledger),
            notes,
        )


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


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes that one rank sends from one type of device: blocks side by side in one buffer."""

    rank: int
    device: str
    blocks: tuple[Block, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Who reduces and who sends what.

    `relaid`: the keys to reduce, in this order, where layouts differ; None where segments go as they are.
    """

    schemas: Mapping[str, KeySchema]
    relaid: tuple[str, ...] | None
    capacities: Mapping[str, Mapping[str, tuple[int, ...]]]
    payloads: tuple[Payload, ...]
    tables: tuple[tuple[Table, ...], ...]  # by rank

    def explain(self) -> str:
        """The plan in a few lines, for logs."""
        reduced = "segments as they are" if self.relaid is None else f"{len(self.relaid)} keys laid out anew"
        sent = ", ".join(f"rank {p.rank} {p.nbytes} B ({p.device})" for p in self.payloads) or "nothing"
        return f"merge of {len(self.schemas)} keys: reduce {reduced}; send {sent}"


def make_plan(
    schemas: Mapping[str, KeySchema],
    holds: Sequence[Mapping[str, KeySchema]] | None,
    offers: Sequence[Offer],
    content_indexed: Mapping[str, bool],
) -> MergePlan:
    """The plan of a merge; `holds` is every rank's schemas where layouts differ, None where they agree.

    A state with one holder is sent, one with several is reduced, the others bringing identities.
    `SchemaMismatch` where some rows carry the samples' indices and some don't.
    """
    _check_indexed(offers, content_indexed)
    relaid: list[str] = []
    capacities: dict[str, dict[str, tuple[int, ...]]] = {}
    sole: dict[int, list[str]] = {}
    if holds is not None:
        for key, schema in schemas.items():
            if schema.kind != "fields":
                continue
            holders = [rank for rank, held in enumerate(holds) if key in held]
            if not holders:
                continue
            rooms = [offers[rank].capacities[key] for rank in holders]
            capacities[key] = {f.name: tuple(map(max, *(room[f.name] for room in rooms))) if len(rooms) > 1
                               else rooms[0][f.name] for f in schema.fields}  # fmt: skip
            if len(holders) == 1 and len(holds) > 1:
                sole.setdefault(holders[0], []).append(key)
            else:
                relaid.append(key)
    payloads = []
    for rank, offer in enumerate(offers):
        payloads.extend(_payloads(rank, offer, schemas, sole.get(rank, ()), capacities))
    return MergePlan(
        schemas,
        tuple(relaid) if holds is not None else None,
        capacities,
        tuple(payloads),
        tuple(offer.tables for offer in offers),
    )


def _check_indexed(offers: Sequence[Offer], content_indexed: Mapping[str, bool]) -> None:
    indexed = {key: (flag, "the content") for key, flag in content_indexed.items()}
    for rank, offer in enumerate(offers):
        for key, flag in offer.indexed().items():
            first, who = indexed.setdefault(key, (flag, f"rank {rank}"))
            if first != flag:
                yes, no = (who, f"rank {rank}") if first else (f"rank {rank}", who)
                raise SchemaMismatch(
                    f"cannot order {key!r}: {yes} has values with an index, {no} without. "
                    "On one key either every non-empty cat has index= or none has."
                )


def _payloads(
    rank: int,
    offer: Offer,
    schemas: Mapping[str, KeySchema],
    sole: Sequence[str],
    capacities: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> list[Payload]:
    blocks: dict[str, list[Block]] = {}
    ends: dict[str, int] = {}

    def put(device: str, kind: str, key: str, name: str, dtype: str, shape: tuple[int, ...], table: int = -1) -> None:
        nbytes = math.prod(shape) * dtype_named(dtype).itemsize
        offset = -(-ends.get(device, 0) // ALIGNMENT) * ALIGNMENT
        blocks.setdefault(device, []).append(Block(kind, key, name, dtype, shape, offset, nbytes, table))
        ends[device] = offset + nbytes

    for key in sorted(offer.rows):
        num_rows, table = offer.rows[key]
        schema = schemas[key]
        put(schema.device, "rows", key, "", schema.dtype or "", (num_rows, *(schema.row_shape or ())), table)
    for number, table_ in enumerate(offer.tables):
        for name, dtype in table_.columns:
            put("cpu", "column", "", name, dtype, (table_.num_rows,), number)
    for key in sorted(offer.lists):
        put("cpu", "list", key, "", "uint8", (offer.lists[key][0],))
    for key in sole:
        for spec in schemas[key].fields:
            put(schemas[key].device, "field", key, spec.name, spec.dtype, capacities[key][spec.name])
    return [Payload(rank, device, tuple(found), ends[device]) for device, found in sorted(blocks.items())]


def needed_bytes(
    plan: MergePlan, rank: int, device: str, dst: int | None, delta_nbytes: int, content_nbytes: int
) -> int:
    """Bytes that a rank's merge takes on one type of device, beside its content and delta.

    `delta_nbytes`: of this rank's segments, which are every rank's where layouts agree. `content_nbytes`: of the
    content's segments that are copied, where the content is held.
    """
    holds = dst in (None, rank)
    payloads = [p for p in plan.payloads if p.device == device and (holds or p.rank == rank)]
    sent = sum(payload.nbytes for payload in payloads)
    if plan.relaid is None:
        scratch = delta_nbytes
    else:
        fields = [
            (key, f) for key in plan.relaid for f in plan.schemas[key].fields if plan.schemas[key].device == device
        ]
        scratch = sum(math.prod(plan.capacities[key][f.name]) * dtype_named(f.dtype).itemsize for key, f in fields)
    if holds:  # a state that was sent joins the others in scratch
        states = [block.nbytes for payload in payloads for block in payload.blocks if block.kind == "field"]
        scratch += sum(states) + content_nbytes
    return sent + scratch


def buckets(numel: int, itemsize: int, bucket_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive parts of at most `bucket_bytes`, in elements."""
    step = max(1, bucket_bytes // itemsize)
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]
