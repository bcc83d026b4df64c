"""The merge: arrive, agree, plan, move, commit; it ends alike for every rank, within the limits.

Everything is prepared beside what is there: scratch is reduced, new content is built, and only when every
rank has voted yes does one compare-and-set in the store decide that pointers swap. Before that moment any
rank can fail in any way, and content and delta are what they were.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distcache import codec
from distcache.cache import REDUCED, ActivationCache, KeptEntry, _registered
from distcache.comm import CommFailed, Communicator, StoreLost, Transfer
from distcache.errors import (
    DistcacheError,
    DuplicateSamples,
    MergeAborted,
    MergeInDoubt,
    PeerFailed,
    SchemaMismatch,
    TooLarge,
)
from distcache.ledger import Ledger
from distcache.memory import available_bytes, human
from distcache.plan import MergePlan, Offer, Payload, Table, buckets, make_plan
from distcache.schema import DIGEST_MODULUS, KeySchema, union
from distcache.segments import Arena
from distcache.strategies import Columns, Fieldwise, Function, Piece, Rows, Strategy, Value, described

log = logging.getLogger("distcache")

VERSION = 1  # of the records that ranks exchange
COMMIT = b'{"commit":true}'


@dataclass(slots=True)
class Facts:
    """What every rank knows of the content, also those that don't hold it."""

    schemas: dict[str, KeySchema] = field(default_factory=dict)
    indexed: dict[str, bool] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    digest: int = 0
    epoch: int = 0  # merges that were committed


@dataclass(slots=True)
class Party:
    """One rank's part in a merge: what it holds and the limits it was given."""

    comm: Communicator
    attempt: int
    delta: ActivationCache
    content: ActivationCache
    facts: Facts
    dst: int | None
    wait_s: float
    bucket_bytes: int

    @property
    def holds_content(self) -> bool:
        return self.dst is None or self.dst == self.comm.rank


@dataclass(slots=True)
class Merged:
    """What the merge made, not yet anybody's content.

    `interrupted`: what stopped this rank's waiting after its yes, where the cluster committed all the same; to
    be raised once pointers have swapped.
    """

    content: ActivationCache
    facts: Facts
    interrupted: BaseException | None = None


class _Decided(Exception):
    """Another rank has ended this attempt."""

    def __init__(self, decision: bytes) -> None:
        self.decision = decision


def merge(party: Party) -> Merged:
    """Merge every rank's delta into new content: a collective. Raises the same kind of error on every survivor.

    `PeerFailed`, `SchemaMismatch`, `DuplicateSamples`, `MergeAborted`, `TooLarge`: nothing has changed anywhere.
    `MergeInDoubt`: the store was lost after this rank's yes; its `merged` holds what would have been content.
    """
    with attempt(party.comm, party.attempt):
        arrive(party.comm, party.attempt, party.wait_s)
        plan, offers = agree(party)
        log.debug("rank %d: %s", party.comm.rank, plan.explain())
        merged = move(party, plan, offers)
        merged.interrupted = commit(party.comm, party.attempt, merged)
    return merged


# -- an attempt and its end ------------------------------------------------------------------------------------


def decision_key(attempt_number: int) -> str:
    return f"{attempt_number}/decision"


def abort_record(rank: int, message: str) -> bytes:
    return json.dumps({"abort": {"rank": rank, "message": message[:2000]}}, separators=(",", ":")).encode()


def describe_error(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {str(error) or repr(error)}"


def as_error(decision: bytes, me: int) -> Exception:
    """The exception that a decision to abort means for this rank."""
    found = json.loads(decision)["abort"]
    rank, message = found["rank"], found["message"]
    if rank == me:
        return MergeAborted(f"the merge was aborted: {message}. The delta is intact: cache.merge() tries again.")
    return PeerFailed(
        f"rank {rank} {message}. Nothing was merged; this rank's delta is intact: cache.merge() tries again."
    )


@contextmanager
def attempt(comm: Communicator, number: int) -> Iterator[None]:
    """One attempt at something collective: whatever ends it here is decided for everybody."""
    try:
        yield
    except _Decided as ended:
        raise as_error(ended.decision, comm.rank) from None
    except StoreLost as error:
        raise MergeAborted(f"the merge ended before this rank's vote, nothing has changed: {error}.") from error
    except MergeInDoubt:
        raise
    except CommFailed as error:
        suspects = _suspects(comm)
        who = f"rank {suspects[0]}" if suspects else "a peer"
        message = f"was lost in the middle of the merge ({who} fell silent; rank {comm.rank} saw: {error})"
        decision = post_abort(comm, number, suspects[0] if suspects else comm.rank, message)
        raise as_error(decision, comm.rank) from error
    except BaseException as error:
        decision = post_abort(comm, number, comm.rank, describe_error(error))
        mine = json.loads(decision).get("abort", {}).get("rank") == comm.rank
        shared = isinstance(error, (SchemaMismatch, DuplicateSamples))  # every rank finds it by itself
        if mine or shared or not isinstance(error, DistcacheError):
            raise
        raise as_error(decision, comm.rank) from error


def post_abort(comm: Communicator, number: int, rank: int, message: str) -> bytes:
    """End an attempt for everybody; the decision that stands. `rank`: whose fault it is."""
    record = abort_record(rank, message)
    try:
        return comm.store.decide(decision_key(number), record)
    except StoreLost:
        return record


def _suspects(comm: Communicator) -> list[int]:
    """Peers whose hearts have stopped; asks for a few beats' time."""
    heart = comm.heart
    if heart is None:
        return []
    peers = [rank for rank in range(comm.world_size) if rank != comm.rank]
    deadline = time.monotonic() + 5 * heart.interval_s
    while True:
        try:
            silent = [rank for rank in peers if heart.silent_s(rank) > 3.5 * heart.interval_s]
        except StoreLost:
            return []
        if silent or time.monotonic() > deadline:
            return silent
        time.sleep(heart.interval_s / 4)


# -- arrive ----------------------------------------------------------------------------------------------------


def arrive(comm: Communicator, number: int, wait_s: float) -> None:
    """Wait in the store, never in a collective, until every rank has come; then no rank waits for work.

    A peer that is alive is waited for up to `wait_s`; one that is silent for `comm.timeout_s` is given up.
    """
    store, everyone = comm.store, comm.world_size
    if everyone == 1:
        return
    if comm.heart is not None:
        comm.heart.watch(decision_key(number))
    store.set(f"{number}/here/{comm.rank}", b"1")
    # The upper half counts ranks whose groups are spent: all learn it with the count, at no further cost.
    count = store.add(f"{number}/count", 1 + (1 << 32 if comm.broken else 0))
    started = looked = time.monotonic()
    nap_s, named = 0.0002, set[int]()
    while count & 0xFFFFFFFF < everyone:
        time.sleep(nap_s)
        nap_s = min(nap_s * 1.3, 0.05)
        count = store.add(f"{number}/count", 0)
        now = time.monotonic()
        if comm.heart is None or now - looked < comm.heart.interval_s / 2 or count & 0xFFFFFFFF >= everyone:
            continue
        looked = now
        check_decision(comm, number)
        missing = [r for r in range(everyone) if store.get(f"{number}/here/{r}") is None]
        for rank in missing:
            silent_s = comm.heart.silent_s(rank)
            if silent_s > comm.timeout_s:
                gone = "left without merging" if silent_s == float("inf") else f"was silent for {comm.timeout_s:g} s"
                raise _Decided(post_abort(comm, number, rank, f"{gone} while others waited to merge"))
            if silent_s > comm.timeout_s / 2 and rank not in named:
                named.add(rank)
                log.warning("rank %d waits for rank %d, silent for %.0f s", comm.rank, rank, silent_s)
        if missing and now - started > wait_s:
            raise _Decided(
                post_abort(comm, number, missing[0], f"is alive but did not come within wait_s={wait_s:g} s")
            )
    check_decision(comm, number)
    if count >> 32:
        comm.rebuild(str(number))
    if comm.rank == 0 and number > 0:
        # Everybody has come here, so nobody looks at the last attempt any more.
        for key in ("count", "votes", "decision", *(f"here/{rank}" for rank in range(everyone))):
            store.delete(f"{number - 1}/{key}")


def check_decision(comm: Communicator, number: int) -> None:
    found = comm.store.get(decision_key(number))
    if found is not None and found != COMMIT:
        raise _Decided(found)


def poll_decision(comm: Communicator) -> Callable[[], None]:
    """A look at what the heart has seen: no call to the store."""

    def poll() -> None:
        if comm.heart is not None and comm.heart.decision not in (None, COMMIT):
            assert comm.heart.decision is not None
            raise _Decided(comm.heart.decision)

    return poll


# -- agree -----------------------------------------------------------------------------------------------------


def agree(party: Party) -> tuple[MergePlan, list[Offer]]:
    """Find out what everybody has: one small record a rank, and more only where records say that it's needed."""
    comm, delta, facts = party.comm, party.delta, party.facts
    poll = poll_decision(comm)
    kept = delta._kept()
    offer = make_offer(delta, kept)
    blob = codec.encode(offer.to_plain()) if kept or offer.ledger or offer.notes else b""
    record = [
        VERSION,
        delta._content_digest,
        delta._arena.layout_digest,
        (facts.digest + facts.epoch) % DIGEST_MODULUS,
        len(blob),
        -1 if party.dst is None else party.dst,
    ]
    records = comm.gather(record, poll)
    _check_records(records)
    if any(row[4] for row in records):
        blobs = comm.gather_bytes(blob, [row[4] for row in records], poll)
        offers = [Offer.from_plain(codec.decode(b)) if b else Offer() for b in blobs]
    else:
        offers = [Offer()] * comm.world_size
    schemas = delta._schemas()
    if all(row[1:3] == records[0][1:3] for row in records):
        ordered = union([schemas], facts.schemas)
        holds = None
    else:
        holds, offers = _exchange_schemas(party, schemas, offers)
        ordered = union(holds, facts.schemas)
    _check_ledgers(offers, facts.ledger)
    return make_plan(ordered, holds, offers, facts.indexed), offers


def _check_records(records: Sequence[Sequence[int]]) -> None:
    for what, at in (("version of the merge's records", 0), ("content digest", 3), ("dst", 5)):
        found = [row[at] for row in records]
        if len(set(found)) > 1:
            raise SchemaMismatch(
                f"ranks differ in {what}, by rank: {found}. They must run one version of distcache, make caches with "
                "the same arguments and take part in the same merges."
            )


def _exchange_schemas(
    party: Party, schemas: Mapping[str, KeySchema], offers: Sequence[Offer]
) -> tuple[list[dict[str, KeySchema]], list[Offer]]:
    comm, arena = party.comm, party.delta._arena
    poll = poll_decision(comm)
    rooms = [[key, [[name, list(shape)] for name, shape in arena.capacities(key).items()]] for key in arena.entries]
    blob = codec.encode([[_listed(schema.facts()) for schema in schemas.values()], rooms])
    sizes = [row[0] for row in comm.gather([len(blob)], poll)]
    holds, full = [], []
    for theirs, offer in zip(comm.gather_bytes(blob, sizes, poll), offers, strict=True):
        facts, rooms = codec.decode(theirs)
        held = [KeySchema.from_facts(fact) for fact in facts]
        holds.append({schema.key: schema for schema in held})
        capacities = {key: {name: tuple(shape) for name, shape in fields} for key, fields in rooms}
        full.append(Offer(offer.rows, offer.tables, offer.lists, capacities, offer.ledger, offer.notes))
    return holds, full


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _check_ledgers(offers: Sequence[Offer], content: Ledger) -> None:
    everything = [("the content", content)]
    for rank, offer in enumerate(offers):
        ledger = Ledger.from_plain(offer.ledger)
        for who, earlier in everything:
            earlier.check_all(ledger, f"{who} and rank {rank} both:" if who != "the content" else who)
        if ledger:
            everything.append((f"rank {rank}", ledger))


def make_offer(delta: ActivationCache, kept: Mapping[str, KeptEntry]) -> Offer:
    """What a delta's kept values come to in rows and bytes."""
    rows: dict[str, tuple[int, int]] = {}
    lists: dict[str, int] = {}
    tables: list[Table] = []
    numbers: dict[tuple[int, ...], int] = {}
    for key, entry in kept.items():
        if isinstance(entry.state, Rows):
            pieces = [piece for piece in entry.state.pieces if len(piece.value_n)]
            number = -1
            if pieces and all(piece.columns is not None for piece in pieces):
                identity = tuple(id(piece.columns) for piece in pieces)
                if identity not in numbers:
                    numbers[identity] = len(tables)
                    tables.append(_table_of(pieces))
                number = numbers[identity]
            rows[key] = (sum(len(piece.value_n) for piece in pieces), number)
        else:
            lists[key] = len(encode_list(entry.state))
    return Offer(rows, tuple(tables), lists, {}, tuple(delta._ledger.to_plain()), dict(delta._notes))


def _table_of(pieces: Sequence[Piece]) -> Table:
    known = [piece.columns for piece in pieces if piece.columns is not None]
    names = [name for name in known[0].by_name if all(name in columns.by_name for columns in known)]
    dtypes = [codec.dtype_name(known[0].by_name[name].dtype) for name in names]
    return Table(tuple(zip(names, dtypes, strict=True)), sum(map(len, known)), known[0].indexed)


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


# -- move ------------------------------------------------------------------------------------------------------


def move(party: Party, plan: MergePlan, offers: Sequence[Offer]) -> Merged:
    """Reduce scratch, send what is sent, and build the new content beside the old."""
    strategies = _strategies(party, plan)
    _check_memory(party, plan)
    scratch = _scratch(party, plan, strategies)
    _reduce(party, plan, scratch)
    buffers = _send(party, plan)
    facts = _new_facts(party, plan, offers)
    content = ActivationCache()
    content._registry = party.content._registry
    content._ledger = facts.ledger
    if party.holds_content:
        _build(party, plan, content, scratch, strategies, buffers)
        for notes in (party.content._notes, *(offer.notes for offer in offers)):
            for key, note in notes.items():
                content._notes.setdefault(key, note)
    return Merged(content, facts)


def _strategies(party: Party, plan: MergePlan) -> dict[str, Strategy]:
    found: dict[str, Strategy] = {}
    by_facts: dict[str, Strategy] = {}
    for key, schema in plan.schemas.items():
        if '"name": "function"' in schema.strategy:
            known = party.delta._state_strategy(key) or party.content._state_strategy(key)
            known = known or _registered(party.delta._registry, key)
            if not isinstance(known, Function):
                raise SchemaMismatch(
                    f"{key!r} merges by {json.loads(schema.strategy)['parameters']['function']} on other ranks, but this "
                    "rank has no such registration: call register_aggregation alike on every rank."
                )
            found[key] = known
        else:
            if schema.strategy not in by_facts:
                by_facts[schema.strategy] = described(json.loads(schema.strategy))
            found[key] = by_facts[schema.strategy]
    return found


def _check_memory(party: Party, plan: MergePlan) -> None:
    """`TooLarge` before the scratch and the payloads are taken."""
    need: dict[str, int] = {}
    for payload in plan.payloads:
        if party.holds_content or payload.rank == party.comm.rank:
            need[payload.device] = need.get(payload.device, 0) + payload.nbytes
    for segment_id, segment in party.delta._arena.segments.items():
        need[segment_id.device] = need.get(segment_id.device, 0) + sum(part.nbytes for part in segment.filled())
    for device, nbytes in need.items():
        free = available_bytes(device)
        if nbytes > free:
            raise TooLarge(
                f"the merge needs {human(nbytes)} beside content and delta on rank {party.comm.rank} ({device}), "
                f"{human(free)} are free. Merge more often, keep fewer rows, or hold the result on one rank: dst=0."
            )


def _scratch(party: Party, plan: MergePlan, strategies: Mapping[str, Strategy]) -> Arena:
    """A copy of the delta's states in the layout that all ranks share."""
    arena = party.delta._arena
    if plan.relaid is None:
        return arena.copy()
    twin = Arena()
    fieldwise = {key: s for key, s in strategies.items() if isinstance(s, Fieldwise)}
    by_device: dict[str, list[KeySchema]] = {}
    for key in plan.relaid:
        by_device.setdefault(plan.schemas[key].device, []).append(plan.schemas[key])
    for device, schemas in sorted(by_device.items()):
        where = _device(device)
        part = arena.relaid(schemas, fieldwise, plan.capacities, where)
        twin.fold_arena(part) if len(twin) else twin.__dict__.update(part.__dict__)
    return twin


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _reduce(party: Party, plan: MergePlan, scratch: Arena) -> None:
    """Reduce every segment of scratch over ranks, in rounds: totals, then what is centred on them."""
    comm = party.comm
    centred = [key for key, entry in scratch.entries.items() if any(f.round for f in entry.schema.fields)]
    own = {key: {name: tensor.clone() for name, tensor in scratch.state(key).items()} for key in centred}
    for number in sorted({segment_id.round for segment_id in scratch.segments}):
        if number:
            for key in centred:
                state = scratch.state(key)
                moved = scratch.entries[key].strategy.recentre(own[key], state)
                for name, tensor in moved.items():
                    state[name].copy_(tensor)
        transfers = []
        flipped = []
        for segment_id in sorted(s for s in scratch.segments if s.round == number):
            for part in scratch.segments[segment_id].filled():
                wire = part
                if segment_id.reduction != "sum" and part.is_floating_point():
                    wire = as_sortable(part, largest=segment_id.reduction == "max")
                    flipped.append(wire)
                for start, stop in buckets(part.numel(), part.element_size(), party.bucket_bytes):
                    transfers.append(Transfer(wire[start:stop], segment_id.reduction, root=party.dst))
        comm.run(transfers, poll_decision(comm))
        for wire in flipped:
            _flip(wire)


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


def _send(party: Party, plan: MergePlan) -> dict[int, dict[str, Tensor]]:
    """Every rank's payload, by rank and device, where content is held; elsewhere this rank's own at most."""
    comm = party.comm
    buffers: dict[int, dict[str, Tensor]] = {}
    transfers = []
    for payload in plan.payloads:
        mine = payload.rank == comm.rank
        if not mine and not party.holds_content:
            if party.dst is None:
                raise AssertionError
            continue
        device = _device(payload.device)
        with torch.inference_mode(False):
            buffer = torch.empty(payload.nbytes, dtype=torch.uint8, device=device)
        if mine:
            pack(party.delta, payload, buffer)
        buffers.setdefault(payload.rank, {})[payload.device] = buffer
        if party.dst == payload.rank:
            continue
        for start, stop in buckets(payload.nbytes, 1, party.bucket_bytes):
            transfers.append(Transfer(buffer[start:stop], "copy", root=payload.rank, to=party.dst))
    comm.run(transfers, poll_decision(comm))
    return buffers


def pack(delta: ActivationCache, payload: Payload, buffer: Tensor) -> None:
    """Copy a rank's own pieces to their places in its payload."""
    kept = delta._kept()
    tables: dict[int, list[Columns]] = {}
    for block in payload.blocks:
        into = buffer[block.offset : block.offset + block.nbytes]
        if block.kind == "rows":
            pieces = [piece for piece in kept[block.key].state.pieces if len(piece.value_n)]
            if block.table >= 0 and block.table not in tables:
                tables[block.table] = [piece.columns for piece in pieces]
            rows = codec.from_bytes(into, codec.dtype_named(block.dtype), block.shape)
            start = 0
            for piece in pieces:
                rows[start : start + len(piece.value_n)].copy_(piece.value_n)
                start += len(piece.value_n)
        elif block.kind == "field":
            codec.from_bytes(into, codec.dtype_named(block.dtype), block.shape).copy_(
                delta._arena.state(block.key)[block.name]
            )
        elif block.kind == "list":
            into.copy_(torch.frombuffer(bytearray(encode_list(kept[block.key].state)), dtype=torch.uint8))
    for payload_block in payload.blocks:
        if payload_block.kind == "column":
            into = buffer[payload_block.offset : payload_block.offset + payload_block.nbytes]
            joined = torch.cat([columns.by_name[payload_block.name] for columns in tables[payload_block.table]])
            into.copy_(codec.as_bytes(joined))


def _build(
    party: Party,
    plan: MergePlan,
    content: ActivationCache,
    scratch: Arena,
    strategies: Mapping[str, Strategy],
    buffers: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Content first, then rank 0's values, then rank 1's."""
    old = party.content
    content._arena = scratch
    tables: dict[tuple[int, int], Columns] = {}
    columns: dict[tuple[int, int], dict[str, Tensor]] = {}
    found: dict[str, Any] = {}
    for payload in plan.payloads:
        for block in payload.blocks:
            if block.kind == "column":
                raw = buffers[payload.rank][payload.device][block.offset : block.offset + block.nbytes]
                by_name = columns.setdefault((payload.rank, block.table), {})
                by_name[block.name] = codec.from_bytes(raw, codec.dtype_named(block.dtype), block.shape)
    for (rank, number), by_name in columns.items():
        tables[rank, number] = Columns(by_name, plan.tables[rank][number].indexed)
    sole: dict[str, dict[str, Tensor]] = {}
    for payload in plan.payloads:
        for block in payload.blocks:
            raw = buffers[payload.rank][payload.device][block.offset : block.offset + block.nbytes]
            if block.kind == "rows":
                value_n = codec.from_bytes(raw, codec.dtype_named(block.dtype), block.shape)
                piece = Piece(value_n, tables.get((payload.rank, block.table)))
                found.setdefault(block.key, []).append(piece)
            elif block.kind == "list":
                found.setdefault(block.key, []).extend(decode_list(raw.cpu().numpy().tobytes()))
            elif block.kind == "field":
                sole.setdefault(block.key, {})[block.name] = codec.from_bytes(
                    raw, codec.dtype_named(block.dtype), block.shape
                )
    for key, state in sole.items():
        strategy = strategies[key]
        assert isinstance(strategy, Fieldwise)
        content._put_state((key,), strategy, state, codec.dtype_named(plan.schemas[key].result or ""), leading=False)
    scratch.fold_arena(old._arena)
    for key, entry in old._kept().items():
        if key not in found:
            content._set_kept(key, entry.strategy, entry.state)
    for key, values in found.items():
        strategy = strategies[key]
        before = old._entries.get(key)
        earlier = before.state if isinstance(before, KeptEntry) else None
        state: Any
        if plan.schemas[key].kind == "rows":
            pieces = [piece for piece in values if len(piece.value_n)] or values[:1]
            state = Rows([*(earlier.pieces if earlier is not None else ()), *pieces])
        else:
            state = list(earlier or ())
            for value in values:
                state = strategy.combine(state, [value]) if state else [value]
            if isinstance(strategy, Function):
                state = [Value(strategy.finalize(state))]
                codec.check_plain(state[0].data, key)
        content._set_kept(key, strategy, state)
    for key in scratch.entries:
        content._entries[key] = REDUCED
    # Keys stand in one order on every rank: the content's, then new ones by name.
    order = [
        *(key for key in old._entries),
        *sorted(key for key in content._entries if key not in old._entries),
    ]
    content._entries = {key: content._entries[key] for key in order}


def _new_facts(party: Party, plan: MergePlan, offers: Sequence[Offer]) -> Facts:
    facts = party.facts
    indexed = dict(facts.indexed)
    ledger = facts.ledger.copy()
    for offer in offers:
        for key, (num_rows, table) in offer.rows.items():
            if num_rows:
                indexed[key] = table >= 0 and offer.tables[table].indexed
        ledger.add_all(Ledger.from_plain(offer.ledger))
    schemas = {**facts.schemas, **plan.schemas}
    digest = sum(schema.digest for schema in schemas.values()) % DIGEST_MODULUS
    return Facts(schemas, indexed, ledger, digest, facts.epoch + 1)


# -- commit ----------------------------------------------------------------------------------------------------


def commit(comm: Communicator, number: int, merged: Any = None) -> BaseException | None:
    """Vote yes and wait for the one decision; returns if it is to commit. `MergeInDoubt` if the store is lost.

    Returns the interruption (Ctrl-C) that came too late to stop it, for the caller to raise after committing.
    """
    store, key = comm.store, decision_key(number)
    if comm.world_size == 1:
        return None
    interrupted: BaseException | None = None
    check_decision(comm, number)
    votes = store.add(f"{number}/votes", 1)
    try:
        if votes == comm.world_size:
            decision = store.decide(key, COMMIT)
        else:
            decision = _await_decision(comm, number, votes)
    except StoreLost as error:
        doubt = MergeInDoubt(
            f"the store was lost after this rank voted yes: the cluster may or may not have committed ({error}). Content "
            "and delta are as they were before; the result is kept as `merged` of this error."
        )
        doubt.merged = merged  # type: ignore[attr-defined]
        raise doubt from error
    except BaseException as error:
        decision = post_abort(comm, number, comm.rank, describe_error(error))
        if decision != COMMIT:
            raise
        interrupted = error
    if decision != COMMIT:
        raise _Decided(decision)
    return interrupted


def _await_decision(comm: Communicator, number: int, votes: int) -> bytes:
    store, heart = comm.store, comm.heart
    assert heart is not None
    progress = looked = time.monotonic()
    nap_s = 0.0002
    while True:
        found = store.get(decision_key(number))
        if found is not None:
            return found
        time.sleep(nap_s)
        nap_s = min(nap_s * 1.3, 0.02)
        now = time.monotonic()
        if now - looked < heart.interval_s / 2:
            continue
        looked = now
        seen = store.add(f"{number}/votes", 0)
        if seen > votes:
            votes, progress = seen, now
        silent = [r for r in range(comm.world_size) if r != comm.rank and heart.silent_s(r) > comm.timeout_s]
        if silent:
            return post_abort(comm, number, silent[0], f"was silent for {comm.timeout_s:g} s before it had voted")
        if now - progress > comm.timeout_s:
            return post_abort(comm, number, comm.rank, f"saw no vote for {comm.timeout_s:g} s after its own")
