"""The merge: arrive, agree, plan, move, commit; it ends alike for every rank, within the limits.

Everything is prepared beside what is there: scratch is reduced, new content is built, and only when every
rank has voted yes does one compare-and-set in the store decide that pointers swap. Before that moment any
rank can fail in any way, and content and delta are what they were.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distcache import codec
from distcache.cache import ActivationCache
from distcache.comm import Communicator, StoreLost, Transfer
from distcache.entries import REDUCED, KeptEntry, copied, registered
from distcache.errors import DuplicateSamples, MergeInDoubt, SchemaMismatch, TooLarge
from distcache.interrupts import held_interrupts
from distcache.join import Renumber
from distcache.ledger import Ledger
from distcache.memory import available_bytes, human
from distcache.mesh import Mesh
from distcache.pieces import Arrived, Assembly, Kept, assemble, decode_list, encode_list, plan_assembly, tell
from distcache.plan import (
    Holdings,
    MergePlan,
    Offer,
    Payload,
    Shards,
    Table,
    buckets,
    make_plan,
    needed_bytes,
    num_ragged,
)
from distcache.protocol import (
    COMMIT,
    Decided,
    arrive,
    attempt,
    describe_error,
    end_attempt,
    moving,
    poll_decision,
    tell_all,
    vote,
)
from distcache.schema import DIGEST_MODULUS, KeySchema, digest_of, natural_order, strategy_facts, union
from distcache.segments import Arena, Cut
from distcache.strategies import Columns, Fieldwise, Function, Piece, Rows, Strategy, Value, described

log = logging.getLogger("distcache")

VERSION = 1  # of the records that ranks exchange


@dataclass(slots=True)
class Facts:
    """What every rank knows of the content, also those that don't hold it."""

    schemas: dict[str, KeySchema] = field(default_factory=dict)
    indexed: Mapping[str, bool] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    num_samples: int = 0  # those without an index
    digest: int = 0
    epoch: int = 0  # merges that were committed
    usual_digest: int = 0  # of what all deltas brought to the last merge in which they agreed
    usual_kept: tuple[str, ...] = ()  # those of its keys whose values are kept, sorted
    usual_reduced: frozenset[str] = frozenset()  # the others
    shards: Shards | None = None  # with dst="shard", once something was merged
    keys: tuple[str, ...] | None = None  # of a model on several ranks, those of all of them

    @property
    def all_keys(self) -> Mapping[str, Any] | tuple[str, ...]:
        """The keys of the content, in its order."""
        return self.schemas if self.keys is None else self.keys


@dataclass(slots=True)
class Merged:
    """What a merge made, not yet anybody's content.

    `layout`: what ranks were brought to where they differed. `spare`: states whose memory will not be needed.
    """

    content: ActivationCache
    facts: Facts
    layout: Arena | None
    spare: Arena


@dataclass(slots=True)
class Held:
    """What one rank holds: committed content, what is known of it, and the delta that isn't merged yet.

    `spare`: memory for the next merge's scratch. `doubt`: what this rank voted for and never learned the decision on.
    `cut`: with dst="shard", of the layout that was merged last.
    """

    content: ActivationCache
    facts: Facts
    delta: ActivationCache
    spare: Arena | None = None
    doubt: Merged | None = None
    cut: Cut | None = None

    def adopt(self, merged: Merged) -> None:
        """Swap pointers, empty the delta. Its room is kept, so that the same keys cost nothing the next time."""
        room = self.delta._arena if merged.layout is None else merged.layout
        self.content, self.facts, self.spare = merged.content, merged.facts, merged.spare
        self.delta, self.doubt = new_delta(self.content), None
        try:
            room.sleep()
        except (RuntimeError, MemoryError):  # no room is no harm: the next merge lays out anew
            return
        self.delta._arena = room


def new_delta(content: ActivationCache) -> ActivationCache:
    """An empty delta beside that content."""
    delta = ActivationCache()
    delta._registry = content._registry
    delta._keeps_lists = True
    return delta


@dataclass(frozen=True, slots=True)
class Model:
    """Of a model that lies on several ranks: these, `comm`, which have seen the same samples; `to`: the one that holds
    the content, None for all. `check`: whether what all of them hold is compared.
    """

    whole: Communicator
    comm: Communicator
    mesh: Mesh
    to: int | None
    check: bool


@dataclass(slots=True)
class Party:
    """One rank's part in a merge: what it holds and the limits it was given. `comm`: the ranks that reduce together.

    `shard`: rows stay where they are, and each reduction goes to its owner; `dst` is None then.
    """

    comm: Communicator
    number: int  # of the attempt, the same on every rank
    held: Held
    dst: int | None
    wait_s: float
    bucket_bytes: int
    dealt: int
    shard: bool = False
    model: Model | None = None

    @property
    def whole(self) -> Communicator:
        """All ranks, which begin and end together; of them those of `comm` reduce."""
        return self.comm if self.model is None else self.model.whole

    @property
    def holds_content(self) -> bool:
        if self.model is not None and self.model.to not in (None, self.model.comm.rank):
            return False
        return self.dst is None or self.dst == self.comm.rank


def merge(party: Party) -> None:
    """Merge every rank's delta into new content: a collective. Raises the same kind of error on every survivor.

    `SchemaMismatch`, `DuplicateSamples`: with the same text everywhere. `PeerFailed`, `MergeAborted`, `TooLarge`, or
    what an aggregation raised here. After all of these nothing has changed anywhere.
    `MergeInDoubt`: the store was lost after this rank's yes; the next merge finds out what became of it.
    """
    comm, held = party.whole, party.held
    with attempt(comm, party.number):
        arrive(comm, party.number, party.wait_s, "merge")
        with moving(comm):
            plan, offers, records = agree(party)
            log.debug("rank %d: %s", comm.rank, plan.explain())
            merged = move(party, plan, offers, records)
            commit(comm, party.number, held, merged)


# -- agree -----------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What every rank tells of itself first: a row of int64, 64 bytes."""

    settings_digest: int
    content_digest: int  # of the delta: which keys, with which strategies, shapes and dtypes
    layout_digest: int
    facts_digest: int  # of the content
    epoch: int  # twice the merges that were committed, plus 1 where this rank is in doubt about one more
    blob_nbytes: int
    num_samples: int  # of the delta, those without an index
    dealt: int  # a digest of the orders in which loaders were dealt


class Settings(NamedTuple):
    """What ranks must have been set up with alike: a row of int64."""

    version: int  # of what ranks exchange
    dst: int  # -1: all ranks hold the content; -2: in shards
    bucket_bytes: int


def agree(party: Party) -> tuple[MergePlan, list[Offer], list[Record]]:
    """Find out what everybody has: one small record a rank, and more only where records say that it's needed."""
    comm, held, delta = party.comm, party.held, party.held.delta
    facts, poll = held.facts, poll_decision(comm)
    if delta:
        delta._arena.compact()  # room of keys that did not come back would be moved
    shards = (facts.shards or Shards.none(comm.world_size)) if party.shard else None
    offer = make_offer(delta, held.content if party.shard else None)
    blob = codec.encode(offer.to_plain()) if offer else b""
    everywhere = -2 if party.shard else -1
    settings = Settings(VERSION, everywhere if party.dst is None else party.dst, party.bucket_bytes)
    mine = Record(
        digest_of(*settings),
        delta._content_digest,
        delta._arena.layout_digest if delta else delta._arena.dormant_layout_digest,
        facts.digest,
        2 * facts.epoch + (held.doubt is not None),
        len(blob),
        delta._num_samples,
        party.dealt,
    )
    records = [Record(*row) for row in comm.gather(mine, poll)]
    if len({record.settings_digest for record in records}) > 1:
        check_settings([Settings(*row) for row in comm.gather(settings, poll)])
    if not check_records(records):
        _settle(party, records)
        return agree(party)
    offers = [Offer()] * comm.world_size
    if any(record.blob_nbytes for record in records):
        blobs = comm.gather_bytes(blob, [record.blob_nbytes for record in records], poll)
        offers = [Offer.from_plain(codec.decode(theirs)) if theirs else Offer() for theirs in blobs]
    brought = agreed(records, facts.usual_digest)
    sizes = None
    if brought is None:
        own = delta._schemas()
        assert len(own) == len(delta)  # whatever else it held would be lost
        variants, who, rooms = _exchange_schemas(party, own, records)
        reduced = [frozenset(v.key for v, has in zip(variants, row, strict=True) if has and v.kind == "fields")
                   if offer.ledger else frozenset() for offer, row in zip(offers, who, strict=True)]  # fmt: skip
        schemas: Mapping[str, KeySchema] = union(variants, who, facts.schemas)
        holdings = Holdings(tuple(schema.key for schema in variants), who, rooms)
    else:
        schemas, kept, reduces = facts.schemas, facts.usual_kept, facts.usual_reduced
        busy = np.array([[record.content_digest != 0] for record in records])
        if brought != facts.usual_digest:
            own = delta._schemas()
            assert len(own) == len(delta)
            schemas = union(list(own.values()), busy.repeat(len(own), 1), facts.schemas)
            kept, reduces = tuple(sorted(delta._kept())), _reduced(own)
            sizes = delta._arena.sizes() if party.shard else None
        holdings, reduced = Holdings(kept, busy.repeat(len(kept), 1)), [reduces] * comm.world_size
    offers = [offer.naming(keys) for offer, keys in zip(offers, reduced, strict=True)]
    return make_plan(schemas, holdings, offers, facts.indexed, shards, sizes), offers, records


def _reduced(schemas: Mapping[str, KeySchema]) -> frozenset[str]:
    return frozenset(key for key, schema in schemas.items() if schema.kind == "fields")


def check_settings(settings: Sequence[Settings]) -> None:
    """`SchemaMismatch` where ranks were set up differently. Pure: alike on every rank."""
    for name in Settings._fields:
        found = [getattr(theirs, name) for theirs in settings]
        if len(set(found)) > 1:
            raise SchemaMismatch(
                f"ranks differ in {name}, by rank: {_by_rank(found)}. They must run one version of distcache and make "
                "their caches with the same arguments."
            )


def check_records(records: Sequence[Record]) -> bool:
    """Whether ranks stand at one merge; False where some are in doubt about the one that the others committed.

    `SchemaMismatch` where they differ in what can't be settled. Pure: alike on every rank.
    """
    epochs = [record.epoch // 2 for record in records]
    behind = [record for record in records if record.epoch // 2 < max(epochs)]
    if any(record.epoch != 2 * max(epochs) - 1 for record in behind):
        raise SchemaMismatch(
            f"ranks differ in the number of merges that they have committed, by rank: {_by_rank(epochs)}. Caches that "
            "merge are made at the same time and take part in the same merges."
        )
    if len({record.dealt for record in records}) > 1:
        raise SchemaMismatch(
            "cache.share() was given loaders of another order or length on other ranks, so that samples were dealt "
            "twice or never. Give every rank the same loader; a sampler of your own must give one order everywhere."
        )
    if not behind and len({record.facts_digest for record in records}) > 1:
        digests = [record.facts_digest for record in records]
        raise SchemaMismatch(f"ranks differ in what their content is, by rank: {_by_rank(digests)}.")
    return not behind


def _by_rank(values: Sequence[int]) -> str:
    """All values of a few ranks; of many, what most have, and the first who differ."""
    if len(values) <= 16:
        return str(list(values))
    usual = max(values, key=Counter(values).__getitem__)
    others = [f"{value} on rank {rank}" for rank, value in enumerate(values) if value != usual]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    return f"{usual} on most, {', '.join(others[:8])}{more}"


def agreed(records: Sequence[Record], usual_digest: int) -> int | None:
    """The content digest of what all bring, laid out alike: then segments move as they are, and no schema does.

    An idle rank, which brings nothing, agrees with what all brought the last time, `usual_digest`, if it has kept room
    that is laid out so. None where ranks differ. Pure: alike on every rank.
    """
    busy = [record for record in records if record.content_digest]
    found = {record.content_digest for record in busy or records}
    layouts = {record.layout_digest for record in records}
    if len(found) > 1 or len(layouts) > 1 or (len(busy) < len(records) and found != {usual_digest}):
        return None
    return found.pop()


def _settle(party: Party, records: Sequence[Record]) -> None:
    """A rank in doubt learns from the others' epoch that the cluster did commit: it had voted for that."""
    if party.held.facts.epoch < max(record.epoch // 2 for record in records):
        assert party.held.doubt is not None
        with held_interrupts():
            party.held.adopt(party.held.doubt)


def _exchange_schemas(
    party: Party, schemas: Mapping[str, KeySchema], records: Sequence[Record]
) -> tuple[list[KeySchema], np.ndarray, np.ndarray]:
    """Every schema that a rank has, sorted by key [N]; which ranks do, bool [W, N]; the rooms (`Holdings.rooms`).

    Ranks of one content digest hold the same, so the first of them speaks for all. What most ranks hold is sent whole;
    the other speakers tell what they lack of it, a bit a key, and what they have beyond it.
    """
    comm, mine = party.comm, [schemas[key] for key in sorted(schemas)]
    alike: dict[int, list[int]] = {}
    for rank, record in enumerate(records):
        if record.content_digest:  # an idle rank has nothing to say
            alike.setdefault(record.content_digest, []).append(rank)
    usual = max(alike.values(), key=len, default=[-1])[0]
    speaks = any(ranks[0] == comm.rank for ranks in alike.values())
    common = mine
    if len(alike.get(records[usual].content_digest, ())) < comm.world_size:
        told = tell_all(comm, codec.encode([s.plain() for s in mine]) if comm.rank == usual else b"")
        common = [KeySchema.from_facts(facts) for facts in codec.decode(told[usual])] if alike else []
    numbers = {schema: number for number, schema in enumerate(common)}
    holds = {usual: list(numbers.values())}
    if len(alike) > 1:
        has = np.array([schemas.get(schema.key) == schema for schema in common], dtype=bool)
        beyond = [schema.plain() for schema in mine if schema not in numbers]
        told = tell_all(comm, codec.encode([np.packbits(has).tobytes(), beyond]) if speaks else b"")
        for rank in sorted(ranks[0] for ranks in alike.values()):
            bits, more = codec.decode(told[rank])
            has = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=len(common))
            new = [numbers.setdefault(KeySchema.from_facts(facts), len(numbers)) for facts in more]
            holds[rank] = [*np.flatnonzero(has).tolist(), *new]
    variants = sorted(numbers, key=lambda schema: schema.key)  # stable
    held = np.zeros((comm.world_size, len(numbers)), dtype=bool)
    for ranks in alike.values():
        held[np.ix_(ranks, holds[ranks[0]])] = True
    held = held[:, [numbers[schema] for schema in variants]]
    return variants, held, _exchange_rooms(party, mine, variants, held, records)


def _exchange_rooms(
    party: Party, mine: Sequence[KeySchema], variants: Sequence[KeySchema], held: np.ndarray, records: Sequence[Record]
) -> np.ndarray:
    """The largest room that any rank has in every ragged dim, int64 [E]: where ranks lie alike, one speaks for all."""
    comm, arena = party.comm, party.held.delta._arena
    places = [i for i, schema in enumerate(variants) for _ in range(num_ragged(schema))]
    rooms = np.zeros(len(places), dtype=np.int64)
    if not places:
        return rooms
    first: dict[tuple[int, int], int] = {}
    for rank, record in enumerate(records):
        first.setdefault((record.content_digest, record.layout_digest), rank)
    theirs = {rank: held[rank, places] for rank in first.values()}
    sizes = [8 * int(theirs[rank].sum()) if rank in theirs else 0 for rank in range(comm.world_size)]
    own = [
        n
        for schema in mine
        for f in schema.fields
        for n, fixed in zip(arena.capacities(schema.key)[f.name], f.shape, strict=True)
        if fixed is None
    ]
    blob = np.array(own, dtype="<i8").tobytes() if comm.rank in theirs else b""
    for rank, told in enumerate(comm.gather_bytes(blob, sizes, poll_decision(comm))):
        if told:
            rooms[theirs[rank]] = np.maximum(rooms[theirs[rank]], np.frombuffer(told, dtype="<i8"))
    return rooms


def joined_ledger(content: Ledger, offers: Sequence[Offer]) -> Ledger:
    """The samples behind reductions after the merge. `DuplicateSamples`, alike on every rank, if some came twice."""
    joined = content.copy()
    for rank, offer in enumerate(offers):
        ledger = Ledger.from_plain(offer.ledger)
        try:
            joined.check_all(ledger)
        except DuplicateSamples:
            content.check_all(ledger, f"rank {rank} brings them, the content")
            for earlier in range(rank):
                seen = Ledger.from_plain(offers[earlier].ledger)
                seen.check_all(ledger, f"rank {rank} brings them, rank {earlier}")
            raise
        joined.add_all(ledger)
    return joined


def make_offer(delta: ActivationCache, content: ActivationCache | None = None) -> Offer:
    """What a delta's kept values come to in rows and bytes.

    `content`: where rows stay beside it on this rank: those that they add to its own, each once.
    """
    earlier = {} if content is None else content._kept()
    rows: list[tuple[int, int]] = []
    lists: list[tuple[int, bool]] = []
    tables: list[Table] = []
    numbers: dict[tuple[int, ...], int] = {}
    added: dict[tuple[int, ...], int] = {}
    for _, entry in sorted(delta._kept().items()):
        if not isinstance(entry.state, Rows):
            lists.append((len(encode_list(entry.state)), _indexed(entry.state)))
            continue
        pieces = [piece for piece in entry.state.pieces if len(piece.value_n)]
        number = -1
        if pieces and all(piece.columns is not None for piece in pieces):
            identity = tuple(id(piece.columns) for piece in pieces)
            if identity not in numbers:
                numbers[identity] = len(tables)
                tables.append(_table_of(pieces))
            number = numbers[identity]
        count = sum(len(piece.value_n) for piece in pieces)
        if content is not None and pieces and pieces[0].columns is not None and pieces[0].columns.indexed:
            before = earlier[entry.schema.key].state.pieces if entry.schema.key in earlier else []
            identity = tuple(id(piece.columns) for piece in [*before, *pieces])
            if identity not in added:  # once for all keys that share their columns
                added[identity] = Rows([*before, *pieces]).num_read - (Rows(before).num_read if before else 0)
            count = added[identity]
        rows.append((count, number))
    num_rows, table_of = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    nbytes, indexed = np.array(lists, dtype=np.int64).reshape(-1, 2).T
    ledger = delta._ledger.to_plain(delta._arena.entries.keys())
    return Offer(num_rows, table_of, tuple(tables), nbytes, indexed, tuple(ledger), dict(delta._notes))


def _table_of(pieces: Sequence[Piece]) -> Table:
    known = [piece.columns for piece in pieces if piece.columns is not None]
    names = [name for name in known[0].by_name if all(name in columns.by_name for columns in known)]
    dtypes = [codec.dtype_name(known[0].by_name[name].dtype) for name in names]
    return Table(tuple(zip(names, dtypes, strict=True)), sum(map(len, known)), known[0].indexed)


def _indexed(values: Sequence[Value]) -> bool:
    return any(value.columns is not None and value.columns.indexed for value in values)


# -- move ------------------------------------------------------------------------------------------------------


def move(party: Party, plan: MergePlan, offers: Sequence[Offer], records: Sequence[Record]) -> Merged:
    """Reduce scratch, send what is sent, and build the new content beside the old."""
    held = party.held
    first = _first_numbers(held.facts, records)
    facts = _new_facts(held.facts, plan, offers, records, first[-1])
    strategies = _strategies(party, plan)
    _check_memory(party, plan)
    spare, held.spare = held.spare, None  # if this comes to nothing, operations may still write there
    scratch = _scratch(held.delta, plan, strategies, spare)
    layout = None if plan.relaid is None else scratch.blank()
    cut = _cut(party, plan, scratch)
    _reduce(party, scratch, cut)
    buffers = _send(party, plan)
    states = scratch if cut is None else cut.part(scratch)
    arrived = _unpack(plan, buffers, first)
    ledger = facts.ledger
    if party.model is not None:
        states, arrived, ledger = _assemble(party, party.model, plan, states, arrived, strategies, facts)
    changed = bool(states.entries or arrived.states)
    content = ActivationCache()
    content._registry = held.content._registry
    content._ledger = ledger
    content._num_samples = facts.num_samples
    if not changed:
        content._arena = held.content._arena
    if party.holds_content:
        _build(content, held.content, states, plan, strategies, arrived, _rows(party, plan, arrived, first))
        for notes in (held.content._notes, *(offer.notes for offer in offers)):
            for key, note in notes.items():
                content._notes.setdefault(key, note)
    takes_scratch = changed and party.holds_content and states is scratch
    spare = held.content._arena if takes_scratch else scratch
    return Merged(content, facts, layout, spare)


def _assemble(
    party: Party,
    model: Model,
    plan: MergePlan,
    states: Arena,
    arrived: Arrived,
    strategies: dict[str, Strategy],
    facts: Facts,
) -> tuple[Arena, Arrived, Ledger]:
    """What the ranks that reduce together have made, put together with what others have of the model: (states, what
    else came, the samples behind reductions). `facts` and `strategies` learn of other ranks' keys.
    """
    comm, held, poll = model.comm, party.held, poll_decision(party.whole)
    has = party.dst is None or party.dst == party.comm.rank
    kept = tell(plan.schemas, states, arrived) if has else {key: Kept(plan.schemas[key], ()) for key in plan.schemas}
    ledger = [[sorted(keys), seen] for keys, seen in facts.ledger.to_plain()]
    blob = codec.encode([facts.num_samples, ledger, [one.plain() for one in kept.values()]])
    told, samples, ledgers = [], [], []
    for data in tell_all(comm, blob):
        num_samples, seen, theirs = codec.decode(data)
        told.append({one.schema.key: one for one in map(Kept.from_plain, theirs)})
        samples.append((num_samples, sorted({repr(intervals) for _, intervals in seen})))
        ledgers.append(seen)
    ranks = model.mesh.model_ranks
    for place, theirs in enumerate(samples):
        if theirs[0] != samples[0][0] or (theirs[1] and samples[0][1] and theirs[1] != samples[0][1]):
            raise SchemaMismatch(
                f"{party.whole.name(ranks[0])} and {party.whole.name(ranks[place])} have seen other samples, where "
                "they should have parts of one model: is an axis of data missing in "
                f"data_axes={sorted(model.mesh.data_axes)}?"
            )
    facts.keys = tuple(
        dict.fromkeys([*held.facts.all_keys, *sorted({k for one in told for k in one}, key=natural_order)])
    )
    if not has:
        return states, arrived, facts.ledger
    assembly = plan_assembly(told, model.mesh, ranks)
    if model.check:
        _check_replicas(model, assembly, states, arrived)

    def strategy_of(key: str, schema: KeySchema) -> Strategy:
        if key not in strategies:
            function = json.loads(schema.strategy)["name"] == "function"
            strategies[key] = (
                _own_function(held, key, schema.strategy, party.whole.rank)
                if function
                else described(json.loads(schema.strategy))
            )
        return strategies[key]

    whole = assemble(comm, assembly, states, arrived, strategy_of, _device, party.bucket_bytes, model.to, poll)
    if whole is None:
        return Arena(), Arrived(), facts.ledger
    joined = held.content._ledger.copy()
    joined.add_all(facts.ledger)
    for item in assembly.items:
        for keys, seen in ledgers[next(iter(item.sources.values()))]:
            if item.key in keys and item.key not in states:
                joined.add_all(Ledger.from_plain([[[item.key], seen]]))
    return *whole, joined


def _check_replicas(model: Model, assembly: Assembly, states: Arena, arrived: Arrived) -> None:
    """`SchemaMismatch`, alike on every rank, where what all ranks of a model hold isn't the same, in a sample of it."""
    few = {}
    for key in sorted(assembly.here):
        if key in states or key in arrived.pieces:
            x = next(iter(states.state(key).values())) if key in states else arrived.pieces[key][-1].value_n
            few[key] = x.flatten()[:: max(1, x.numel() // 16)][:16].double().cpu()
    first, *others = map(codec.decode, tell_all(model.comm, codec.encode(few)))
    for rank, other in zip(model.mesh.model_ranks[1:], others, strict=True):
        for key, x in first.items():
            y = other[key]
            if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise SchemaMismatch(
                    f"{key!r} should be the same on ranks {model.mesh.model_ranks[0]} and {rank}, which have parts of "
                    f"one model, and isn't: {x[:4].tolist()} against {y[:4].tolist()}. If it's split over them, say "
                    f"so: cache.register_sharding({key!r}, dim=-1, axis=…); if they have samples of their own, "
                    "data_axes=[…]."
                )


def _first_numbers(facts: Facts, records: Sequence[Record]) -> list[int]:
    """By rank, the number of its first sample without an index: the content's come first; at the end the total."""
    return list(itertools.accumulate((record.num_samples for record in records), initial=facts.num_samples))


def _new_facts(
    facts: Facts, plan: MergePlan, offers: Sequence[Offer], records: Sequence[Record], num_samples: int
) -> Facts:
    schemas, digest = facts.schemas, facts.digest
    if plan.schemas is not schemas:
        schemas = {**schemas, **plan.schemas}
        digest = sum(schema.digest for schema in schemas.values()) % DIGEST_MODULUS
    usual = agreed(records, facts.usual_digest)
    if usual is None:  # what all will bring if they bring it all
        usual = sum(schema.digest for schema in plan.schemas.values()) % DIGEST_MODULUS
    ledger = joined_ledger(facts.ledger, offers)
    kept = (tuple(sorted(plan.kept)), facts.usual_reduced if plan.schemas is facts.schemas else _reduced(plan.schemas))
    return Facts(schemas, plan.indexed, ledger, num_samples, digest, facts.epoch + 1, usual, *kept, plan.shards)


def _strategies(party: Party, plan: MergePlan) -> dict[str, Strategy]:
    """A strategy object for every key that is sent or laid out anew; functions don't travel: each rank has its own."""
    held = party.held
    sent = [*plan.kept, *plan.sole]
    found: dict[str, Strategy] = {}
    by_facts: dict[str, Strategy] = {}
    for key in dict.fromkeys([*sent, *(plan.relaid or ())]):
        facts = plan.schemas[key].strategy
        if facts not in by_facts:
            description = json.loads(facts)
            if description["name"] != "function":
                by_facts[facts] = described(description)
            else:
                found[key] = _own_function(held, key, facts, party.comm.rank)
                continue
        found[key] = by_facts[facts]
    return found


def _own_function(held: Held, key: str, facts: str, rank: int) -> Function:
    known = held.delta._state_strategy(key) or held.content._state_strategy(key)
    known = known or registered(held.delta._registry, key)
    if not isinstance(known, Function) or strategy_facts(known) != facts:
        raise SchemaMismatch(
            f"{key!r} merges by {json.loads(facts)['parameters']['function']}, but rank {rank} has "
            f"{known or 'no registration'} for it: call register_aggregation alike on every rank."
        )
    return known


def _check_memory(party: Party, plan: MergePlan) -> None:
    """`TooLarge` before anything is taken, if it would not fit beside what the ranks on this host take too."""
    comm, held = party.comm, party.held
    delta_nbytes = {kind: arena_nbytes(held.delta._arena, kind, held.spare) for kind in ("cpu", "cuda")}
    if comm.world_size > 1:  # states that combine as a whole are received into a copy
        gathered = held.delta._arena.gathered()
        delta_nbytes = {kind: nbytes + arena_nbytes(gathered, kind) for kind, nbytes in delta_nbytes.items()}
    # What the content holds beyond this merge's keys is added to scratch, if there is any.
    kept = plan.schemas is not held.facts.schemas and any(k not in plan.schemas for k in held.content._arena.entries)
    beside = {kind: kept * arena_nbytes(held.content._arena, kind) for kind in ("cpu", "cuda")}
    if party.shard and plan.relaid is None:  # each rank copies about as much out of scratch
        for kind in beside:
            beside[kind] += -(-arena_nbytes(held.delta._arena, kind) // comm.world_size)
    for kind in ("cpu", "cuda"):
        sharing = comm.colocated if kind == "cpu" else (comm.rank,)
        need = [needed_bytes(plan, rank, kind, party.dst, delta_nbytes[kind], beside[kind]) for rank in sharing]
        if not sum(need):
            continue
        free = available_bytes(_device(kind))
        log.debug("rank %d: the merge takes %s (%s), %s are free", comm.rank, human(sum(need)), kind, human(free))
        if sum(need) > free:
            others = f" and {len(sharing) - 1} more on its host" if len(sharing) > 1 else ""
            raise TooLarge(
                f"the merge needs {human(sum(need))} beside content and delta on rank {comm.rank}{others} ({kind}), "
                f"{human(free)} are free. Merge more often, keep fewer rows, or hold the result on one rank, dst=0, "
                'or in shards, dst="shard".'
            )


def arena_nbytes(arena: Arena, kind: str, spare: Arena | None = None) -> int:
    """Bytes of all segments on one type of device, but for those whose copies may have a spare one's memory."""
    old = {} if spare is None else spare.segments
    return sum(
        part.nbytes
        for segment_id, segment in arena.segments.items()
        if segment_id.device == kind and not segment.fits(old.get(segment_id))
        for part in segment.filled()
    )


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _scratch(delta: ActivationCache, plan: MergePlan, strategies: Mapping[str, Strategy], spare: Arena | None) -> Arena:
    """A copy of the delta's states in the layout that all ranks share."""
    if plan.relaid is None:
        scratch = delta._arena.copy(spare=spare)
        scratch.wake()  # an idle rank's identities
        return scratch
    schemas = [plan.schemas[key] for key in plan.relaid]
    fieldwise = {key: s for key, s in strategies.items() if isinstance(s, Fieldwise)}
    devices = {schema.device: _device(schema.device) for schema in schemas}
    return delta._arena.relaid(schemas, fieldwise, plan.capacities, devices)


def _cut(party: Party, plan: MergePlan, scratch: Arena) -> Cut | None:
    """Who owns what of scratch; None where the content lies whole."""
    held = party.held
    if plan.shards is None:
        return None
    if held.cut is None or not held.cut.fits(scratch, plan.shards.owners):
        held.cut = Cut(scratch, plan.shards.owners, party.comm.rank)
    return held.cut


def _reduce(party: Party, scratch: Arena, cut: Cut | None) -> None:
    """Reduce every segment of scratch over ranks, in rounds: totals, then what is centred on them."""
    comm = party.comm
    _fold_gathered(party, scratch)
    reduced = sorted(segment_id for segment_id in scratch.segments if not segment_id.gathered)
    rounds = sorted({segment_id.round for segment_id in reduced})
    centred = [(strategy, state, {f.name: state[f.name].clone() for f in strategy.layout(state) if not f.round})
               for strategy, state in scratch.centred()]  # fmt: skip
    for number in rounds:
        if number:
            for strategy, state, own in centred:
                strategy.recentre_({**state, **own}, state)
        transfers, flipped = [], []
        for segment_id in (s for s in reduced if s.round == number):
            # What a later round is centred on is needed everywhere; the rest only where the content is held.
            everywhere = segment_id.apart != "" and number < rounds[-1]
            for chunk, part in enumerate(scratch.segments[segment_id].filled()):
                wire = part
                if segment_id.reduction != "sum" and part.is_floating_point():
                    wire = as_sortable(part, largest=segment_id.reduction == "max")
                    flipped.append(wire)
                spans = [(0, part.numel(), None if everywhere else party.dst)]
                if cut is not None and not everywhere:
                    spans = [(s.start, s.stop, s.owner) for s in cut.spans.get(segment_id, ()) if s.chunk == chunk]
                for low, high, root in spans:
                    for start, stop in buckets(high - low, part.element_size(), party.bucket_bytes):
                        transfers.append(Transfer(wire[low + start : low + stop], segment_id.reduction, root=root))
        comm.run(transfers, poll_decision(comm))
        for wire in flipped:
            _flip(wire)


def _fold_gathered(party: Party, scratch: Arena) -> None:
    """Fold the states of scratch that combine as a whole: along a tree of ranks, neighbours first, then spread them.

    Every fold happens on one rank and in the order of ranks, so that all hold the same bits. A rank sends its segments
    once and receives them log2(world size) times, into one copy: not those of all ranks at once, nor one after the
    other.
    """
    comm, mine = party.comm, scratch.gathered()
    if not mine.segments:
        return
    theirs: Arena | None = None
    reach = 1
    while reach < comm.world_size:
        into = comm.rank - comm.rank % (2 * reach)
        root = into + reach
        if comm.rank == into and root < comm.world_size:
            theirs = mine.copy() if theirs is None else theirs
            comm.run(_copies(party, theirs, root, into), poll_decision(comm))
            mine.fold_alike(theirs)
        elif comm.rank == root:
            comm.run(_copies(party, mine, root, into), poll_decision(comm))
        reach *= 2
    if party.dst != 0:
        comm.run(_copies(party, mine, root=0, to=party.dst), poll_decision(comm))


def _copies(party: Party, arena: Arena, root: int, to: int | None) -> list[Transfer]:
    """All of an arena's segments, as the bytes that they are, from one rank to another or to all."""
    wires = [part.view(torch.uint8) for segment_id in sorted(arena.segments) for part in
             arena.segments[segment_id].filled()]  # fmt: skip
    return [
        Transfer(wire[start:stop], "copy", root=root, to=to)
        for wire in wires
        for start, stop in buckets(wire.numel(), 1, party.bucket_bytes)
    ]


def as_sortable(part: Tensor, largest: bool) -> Tensor:
    """Floats as integers of the same order, in place; NaN beyond all numbers, so that it wins on every rank.

    A collective's max of floats may drop a NaN or keep it, depending on which rank it came from.
    """
    part.masked_fill_(part.isnan(), float("nan"))
    wire = part.view(torch.int32 if part.element_size() == 4 else torch.int64)
    if not largest:
        wire.masked_fill_(part.isnan(), -1)  # a negative NaN, all bits set
    _flip(wire)
    return wire


def _flip(wire: Tensor) -> None:
    """Sign and magnitude <-> two's complement order; its own inverse."""
    bits = 8 * wire.element_size() - 1
    wire.bitwise_xor_((wire >> bits).bitwise_and_((1 << bits) - 1))


def _send(party: Party, plan: MergePlan) -> list[Tensor | None]:
    """The bytes of the plan's payloads, in its order; None for those that go to others."""
    comm = party.comm
    buffers: list[Tensor | None] = []
    transfers = []
    for payload in plan.payloads:
        mine, to = payload.rank == comm.rank, party.dst if payload.to is None else payload.to
        taken = to in (None, comm.rank)
        if not mine and not taken:
            buffers.append(None)
            continue
        with torch.inference_mode(False):
            buffer = torch.empty(payload.nbytes, dtype=torch.uint8, device=_device(payload.device))
        if mine:
            pack(party.held.delta, payload, buffer)
        buffers.append(buffer if taken else None)
        if payload.rank != to:
            for start, stop in buckets(payload.nbytes, 1, party.bucket_bytes):
                transfers.append(Transfer(buffer[start:stop], "copy", root=payload.rank, to=to))
    comm.run(transfers, poll_decision(comm))
    return buffers


def pack(delta: ActivationCache, payload: Payload, buffer: Tensor) -> None:
    """Copy a rank's own pieces to their places in its payload."""
    kept = delta._kept()
    tables: dict[int, list[Columns]] = {}
    for block in payload.blocks:
        if block.kind == "rows":
            rows, start = block.of(buffer), 0
            pieces = [piece for piece in kept[block.key].state.pieces if len(piece.value_n)]
            if block.table >= 0:
                tables.setdefault(block.table, [piece.columns for piece in pieces])
            for piece in pieces:
                rows[start : start + len(piece.value_n)].copy_(piece.value_n)
                start += len(piece.value_n)
        elif block.kind == "field":
            block.of(buffer).copy_(delta._arena.state(block.key)[block.name])
        elif block.kind == "list":
            data = bytearray(encode_list(kept[block.key].state))
            block.of(buffer).copy_(torch.frombuffer(data, dtype=torch.uint8))
    for block in payload.blocks:
        if block.kind == "column":
            torch.cat([columns.by_name[block.name] for columns in tables[block.table]], out=block.of(buffer))


def _unpack(plan: MergePlan, buffers: Sequence[Tensor | None], first: Sequence[int]) -> Arrived:
    """`first`: by rank, the number of its first sample without an index."""
    placed = [
        (payload.rank, block, block.of(buffer))
        for payload, buffer in zip(plan.payloads, buffers, strict=True)
        if buffer is not None
        for block in payload.blocks
    ]
    by_name: dict[tuple[int, int], dict[str, Tensor]] = {}
    for rank, block, tensor in placed:
        if block.kind == "column":
            by_name.setdefault((rank, block.table), {})[block.name] = tensor
    columns = {}
    for (rank, n), known in by_name.items():
        indexed = plan.tables[rank][n].indexed
        if not indexed and first[rank]:
            known["sample"] = known["sample"] + first[rank]
        columns[rank, n] = Columns(known, indexed)
    arrived = Arrived()
    for rank, block, tensor in placed:
        if block.kind == "rows":
            piece = Piece(tensor, columns.get((rank, block.table)))
            arrived.pieces.setdefault(block.key, []).append(piece)
        elif block.kind == "list":
            arrived.lists.setdefault(block.key, []).append(decode_list(tensor.numpy().tobytes()))
        elif block.kind == "field":
            arrived.states.setdefault(block.key, {})[block.name] = tensor
    return arrived


class ShardRows(Rows):
    """One rank's rows of a concatenation that lies in shards: they stay as they came, each piece with the number of the
    merge that brought it, because saving puts those of all ranks in the order in which one would have got them.

    So they are joined, in the samples' order, each time they are read.
    """

    __slots__ = ("epochs",)

    def __init__(self, pieces: Iterable[Piece], epochs: Iterable[int]) -> None:
        super().__init__(pieces)
        self.epochs = list(epochs)

    def together(self) -> ShardRows:
        return self


def _rows(party: Party, plan: MergePlan, arrived: Arrived, first: Sequence[int]) -> dict[str, Rows]:
    """The plan's concatenations: what was there first, then rank 0's rows, then rank 1's; in shards this rank's own."""
    held = party.held
    earlier = held.content._kept()
    found: dict[str, Rows] = {}
    for key, pieces in arrived.pieces.items():
        before = earlier[key].state.pieces if key in earlier else []
        found[key] = Rows([*before, *_full(pieces)])
    if not party.shard:
        return found
    own, renumber, epoch = held.delta._kept(), Renumber(first=first[party.comm.rank]), held.facts.epoch
    for key in plan.kept:
        schema = plan.schemas[key]
        if schema.kind != "rows":
            continue
        state = earlier[key].state if key in earlier else ShardRows([], [])
        new = _full(renumber.state(copied(own[key].state), key).pieces) if key in own else []
        if not (state.pieces or new):
            none = (0, *(schema.row_shape or ()))
            empty = torch.empty(none, dtype=codec.dtype_named(schema.dtype or ""), device=_device(schema.device))
            new = [Piece(empty, None)]
        found[key] = ShardRows([*state.pieces, *new], [*state.epochs, *[epoch] * len(new)])
    return found


def _full(pieces: list[Piece]) -> list[Piece]:
    """The pieces that have rows; one without where none has."""
    return [piece for piece in pieces if len(piece.value_n)] or pieces[:1]


def _build(
    content: ActivationCache,
    old: ActivationCache,
    scratch: Arena,
    plan: MergePlan,
    strategies: Mapping[str, Strategy],
    arrived: Arrived,
    rows: Mapping[str, Rows],
) -> None:
    """Fill `content`: what was there first, then rank 0's values, then rank 1's. `old` is only read."""
    if scratch.entries or arrived.states:
        content._arena = scratch
    for key, state in arrived.states.items():
        strategy, result = strategies[key], codec.dtype_named(plan.schemas[key].result or "")
        assert isinstance(strategy, Fieldwise)
        content._put_state((key,), strategy, state, result, leading=False)
    if content._arena is not old._arena:
        scratch.fold_arena(old._arena)
    if content._arena.lies_like(old._arena) and not (rows or arrived.lists):
        content._share_keys(old)
        return
    content._entries = dict.fromkeys(content._arena.entries, REDUCED)
    earlier = old._kept()
    for key, entry in earlier.items():
        content._set_kept(key, entry.strategy, entry.state)
    for key, state_of_rows in rows.items():
        content._set_kept(key, strategies[key], state_of_rows)
    for key, states in arrived.lists.items():
        content._set_kept(key, strategies[key], _joined_list(key, strategies[key], earlier.get(key), states))
    # Keys stand in one order on every rank: the content's, then new ones.
    new = sorted((key for key in content._entries if key not in old._entries), key=natural_order)
    content._entries = {key: content._entries[key] for key in [*old._entries, *new]}


def _joined_list(key: str, strategy: Strategy, before: KeptEntry | None, states: list[list[Value]]) -> list[Value]:
    """The state of all values in order; a plain function's is the one value that it makes of them."""
    state: list[Value] | None = before.state if before is not None else None
    if state is not None and isinstance(strategy, Function):
        # A function may write into what it is given, and this may yet come to nothing.
        state = [Value(codec.decode(codec.encode(value.data)), columns=value.columns) for value in state]
    for theirs in states:
        state = theirs if state is None else strategy.combine(state, theirs)
    assert state is not None
    if isinstance(strategy, Function):
        state = [Value(strategy.finalize(state))]
        codec.check_plain(state[0].data, key)
    return state


# -- commit ----------------------------------------------------------------------------------------------------


def commit(comm: Communicator, number: int, held: Held, merged: Merged) -> None:
    """Vote yes, wait for the one decision, and swap pointers if it is to commit.

    `MergeInDoubt` if the store is lost after the vote. Ctrl-C while others vote ends the merge for everybody, or
    comes too late to: then it is raised once pointers have swapped.
    """
    interrupted: BaseException | None = None
    with held_interrupts() as let_through:
        try:
            try:
                decision = vote(comm, number, let_through)
            except StoreLost:
                raise
            except BaseException as error:
                decision = end_attempt(comm, number, comm.rank, describe_error(error))
                interrupted = error
        except StoreLost as error:
            held.doubt = merged
            doubt = MergeInDoubt(
                f"the store was lost after this rank voted yes, so the others may or may not have committed ({error}). "
                "Content and delta are as they were, and the result is kept: cache.rejoin() connects anew, and the "
                "next cache.merge() finds out and goes on from there."
            )
            doubt.merged = merged  # type: ignore[attr-defined]
            raise doubt from error
        if decision == COMMIT:
            held.adopt(merged)
        if interrupted is not None:
            raise interrupted
        if decision != COMMIT:
            raise Decided(decision)
