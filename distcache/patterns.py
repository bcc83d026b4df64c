"""From an attention call to what sites keep of it: sums of patterns, statistics, each sample's pattern.

Legend of names: b samples, h heads, q queries, k keys, g cells, l a sample's tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distcache.attention import (
    AttentionCall,
    check,
    pattern,
    pattern_statistics,
    pattern_sum,
    scratch_bytes,
    shared_copy,
    state_bytes,
    sum_scratch_bytes,
)
from distcache.entries import Shown, Slab
from distcache.errors import SchemaMismatch, SiteError
from distcache.segments import Arena, capacity, fits
from distcache.sites import AttentionTarget
from distcache.strategies import AveragePattern, Extend, Fieldwise, Grouped, State, Value
from distcache.strategies.positions import positions
from distcache.tokens import Batch


class Waiting:
    """Calls that wait for the end of a pass. The memory of their Q and K is the next pass's too: on a CPU, to touch
    fresh pages for them slowed the model down by 2 in 100.
    """

    def __init__(self) -> None:
        self._room: dict[tuple[int, str], Tensor] = {}
        self._beside: set[int] = set()  # masks and biases that were copied, by id: one copy for all layers

    def begin(self) -> None:
        """Nothing waits any more."""
        self._beside.clear()

    def nbytes(self, call: AttentionCall, heads: Sequence[int] | None) -> int:
        """What this call would take while it waits, beside what waits already."""
        qk_bytes = call.query_bhqd.nbytes + call.key_bhkd.nbytes
        if heads is not None and _are_picked(call, heads):
            of_head = call.query_bhqd.nbytes // call.query_bhqd.shape[1]
            qk_bytes = len(heads) * (of_head + call.key_bhkd.nbytes // call.key_bhkd.shape[1])
        beside = [x for x in _beside(call) if id(x) not in self._beside]
        return qk_bytes + sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in beside)  # some are expanded

    def copied(self, target: AttentionTarget, call: AttentionCall) -> tuple[AttentionCall, tuple[int, ...] | None]:
        """A call that holds when the model has gone on, and may have written to what it showed; and which of its heads
        are meant.
        """
        q_bhqd, k_bhkd, sinks, heads = call.query_bhqd, call.key_bhkd, call.sinks, target.heads
        if heads is not None and _are_picked(call, heads):
            shared = q_bhqd.shape[1] // k_bhkd.shape[1]
            q_bhqd = torch.stack([q_bhqd[:, head] for head in heads], 1)
            k_bhkd = torch.stack([k_bhkd[:, head // shared] for head in heads], 1)
            sinks = None if sinks is None else torch.stack([sinks[head] for head in heads])
            heads = None
        else:
            q_bhqd, k_bhkd = self._copy(target, "q", q_bhqd), self._copy(target, "k", k_bhkd)
        mask, bias = (None if x is None else shared_copy(x) for x in (call.mask, call.position_bias))
        self._beside.update(map(id, _beside(call)))
        later = dataclasses.replace(
            call, query_bhqd=q_bhqd, key_bhkd=k_bhkd, mask=mask, position_bias=bias, sinks=sinks
        )
        return later, heads

    def _copy(self, target: AttentionTarget, name: str, x: Tensor) -> Tensor:
        held = self._room.get((id(target), name))
        if held is None or held.shape != x.shape or held.dtype != x.dtype or held.device != x.device:
            held = None  # before there is more
            self._room.pop((id(target), name), None)
            with torch.inference_mode(False):
                self._room[id(target), name] = held = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return held.copy_(x)


def shown_patterns(
    target: AttentionTarget, call: AttentionCall, batch: Batch, waiting: Waiting
) -> Iterator[Slab | Shown]:
    """What one attention call gives a site, before the model goes on."""
    spans, strategy, site = batch.spans, target.strategy, target.site
    if target.stats:
        assert isinstance(strategy, Fieldwise)
        found = pattern_statistics(
            call, spans, target.stats, columns=batch.columns, heads=target.heads, queries=site.queries, align=site.align
        )
        for key, value in zip(target.keys, found.values(), strict=True):
            # A sample's value weighs as much as the queries that it is of: never a mean of means.
            value = dataclasses.replace(value, columns=batch.per_sample)
            state = {name: tensor.unsqueeze(0) for name, tensor in strategy.take(value).items()}
            yield Slab((key,), strategy, state, strategy.result_dtype(value.data.dtype))
    elif isinstance(strategy, Fieldwise):
        yield _averaged(target, strategy, call, batch, waiting)
    else:
        patterns = [
            pattern(call, spans, b, heads=target.heads, queries=site.queries, keys=site.keys, align=site.align)
            for b in range(batch.num_samples)
        ]
        for k, key in enumerate(target.keys):
            one_each = [pattern_hqk[k] for pattern_hqk in patterns]
            yield Shown(key, Value(one_each, columns=batch.per_sample), Extend())


def _averaged(
    target: AttentionTarget, strategy: Fieldwise, call: AttentionCall, batch: Batch, waiting: Waiting
) -> Slab:
    """The state of an average: computed when it's added to what is held, if the call takes less room until then."""
    sums = _Sums.of(target, strategy, call, batch)
    slab = Slab(target.keys, strategy, sums.stand_in(), strategy.result_dtype(call.query_bhqd.dtype), sums.add_to)
    if waiting.nbytes(call, target.heads) >= slab.state["total"].nbytes:
        return slab.computed()
    later, heads = waiting.copied(target, call)
    return dataclasses.replace(slab, adds=dataclasses.replace(sums, call=later, heads=heads).add_to)


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """The sums of the patterns of a call's samples, all in one or by cell.

    `spans_of`: by cell, or by None for all in one, the spans, empty for samples that aren't in it. `whole`: one key has
    all heads.
    """

    strategy: Fieldwise
    call: AttentionCall
    spans_of: Mapping[int | None, Sequence[tuple[int, int]]]
    heads: tuple[int, ...] | None
    size: int
    whole: bool

    @classmethod
    def of(cls, target: AttentionTarget, strategy: Fieldwise, call: AttentionCall, batch: Batch) -> _Sums:
        check(call, batch.spans, batch.longest, target.heads)
        spans_of: dict[int | None, Sequence[tuple[int, int]]] = {None: batch.spans}
        if isinstance(strategy, Grouped):
            try:
                of_b = strategy.cells(batch.per_sample, batch.num_samples).tolist()
            except (TypeError, ValueError) as error:
                raise SiteError(f"site {target.where}: {error}") from error
            spans_of = {
                cell: [span if of_b[b] == cell else (0, 0) for b, span in enumerate(batch.spans)]
                for cell in sorted(set(of_b) - {-1})
            }
        return cls(strategy, call, spans_of, target.heads, batch.longest, target.whole)

    @property
    def average(self) -> AveragePattern:
        return averaging(self.strategy)

    def stand_in(self) -> State:
        """Shapes and dtypes of the state, in tensors that take no memory."""
        num_heads = self.call.query_bhqd.shape[1] if self.heads is None else len(self.heads)
        device, found = self.call.query_bhqd.device, {}
        total = torch.promote_types(self.call.query_bhqd.dtype, torch.float32)
        for name, shape in _shapes(self.strategy, num_heads, self.size, self.whole).items():
            dtype = total if name == "total" else torch.int64
            found[name] = torch.zeros((), dtype=dtype, device=device).expand(1 if self.whole else num_heads, *shape)
        return found

    def add_to(self, state: State) -> None:
        """Adds them to a state of at least these extents, wherever it lies."""
        average, device = self.average, self.call.query_bhqd.device
        for cell, spans in self.spans_of.items():
            mine = state if cell is None else {name: x[:, cell] for name, x in state.items()}
            mine = {name: x[0] if self.whole else x for name, x in mine.items()}
            q, k = (len(positions(which, self.size, average.align)) for which in (average.queries, average.keys))
            total_hqk = mine["total"][:, :q, :k]
            found_hqk = pattern_sum(
                self.call,
                spans,
                self.size,
                heads=self.heads,
                queries=average.queries,
                keys=average.keys,
                align=average.align,
                into_hqk=total_hqk if total_hqk.device == device else None,
            )
            if total_hqk.device != device:
                total_hqk += found_hqk.to(total_hqk.device)
            counts = average.counted([stop - start for start, stop in spans], self.size, total_hqk.device)
            for name, count in counts.items():
                room = mine[name][:, : count.shape[0], : count.shape[1]]
                room += count


def averaging(strategy: Fieldwise) -> AveragePattern:
    """The average that a site makes, of each cell or of all."""
    inner = strategy.strategy if isinstance(strategy, Grouped) else strategy
    assert isinstance(inner, AveragePattern)
    return inner


def _shapes(strategy: Fieldwise, num_heads: int, size: int, whole: bool) -> dict[str, tuple[int, ...]]:
    """The shape of one key's fields, of texts of at most `size` tokens."""
    average = averaging(strategy)
    q, k = (len(positions(which, size, average.align)) for which in (average.queries, average.keys))
    before = (*([strategy.size] if isinstance(strategy, Grouped) else []), *([num_heads] if whole else []))
    shapes = {"total": (*before, q, k), "count": (*before, q, 1), "keys": (*before, 1, k)}
    return {name: shape for name, shape in shapes.items() if name != "keys" or not average.is_whole}


def _beside(call: AttentionCall) -> list[Tensor]:
    """What a call has beside Q and K that may be large, and that layers may share."""
    return [x for x in (call.mask, call.position_bias) if x is not None]


def _are_picked(call: AttentionCall, heads: Sequence[int] | None) -> bool:
    """Whether these heads alone are kept: fewer than key heads, where nothing else goes by heads."""
    if heads is None or len(heads) >= call.key_bhkd.shape[1]:
        return False
    return all(x.dim() < 4 or x.shape[1] == 1 for x in _beside(call))


def room_nbytes(target: AttentionTarget, held: Arena, device: torch.device, batch: Batch | None) -> tuple[int, int]:
    """(bytes that a site's accumulators still have to take and what it keeps until a pass returns; bytes that it needs
    while it computes, which sites need one after the other), for a batch, or before any.

    `SiteError` for texts beyond the size that was said.
    """
    strategy, num_heads, site = target.strategy, target.num_heads, target.site
    if not isinstance(strategy, Fieldwise):
        return 0, 0
    dtype = next((parameter.dtype for parameter in target.module.parameters()), torch.float32)
    itemsize = 8 if dtype == torch.float64 else 4
    room = held.entries.get(target.keys[0]) or held.dormant.get(target.keys[0])
    head_dim = int(getattr(target.module, "head_dim", 128))
    if target.stats:
        if batch is None:
            return 0, 0
        rows = len(positions(site.queries, batch.longest, site.align))
        computing = scratch_bytes(
            target.stats,
            batch.num_samples,
            num_heads,
            batch.longest,
            head_dim,
            device,
            num_queries=rows,
            itemsize=itemsize,
        )
        return state_bytes(target.stats, num_heads) * (2 if room is None else 1), computing
    average = averaging(strategy)
    if batch is None and not average.groupable:
        return 0, 0
    longest = (average.size or 2**31) if batch is None else batch.longest
    shapes = _shapes(strategy, num_heads, longest, target.whole)
    try:
        rooms = {name: capacity(strategy, name, shape) for name, shape in shapes.items()}
    except SchemaMismatch as error:
        raise SiteError(f"site {target.where}: {error} Cut the texts, or give a larger size.") from error
    accumulator = average.accumulate or torch.float64
    sizes = {name: math.prod(shape) * (accumulator.itemsize if name == "total" else 8) for name, shape in rooms.items()}
    grown = len(target.keys) * sum(sizes.values())
    if room is not None and "total" in room.slots and fits(rooms["total"], room.slots["total"].shape):
        grown = 0
    if batch is None or batch.num_tokens is None:
        return grown, 0
    computing = sum_scratch_bytes(
        batch.num_samples,
        num_heads,
        batch.longest,
        head_dim,
        device,
        queries=average.queries,
        keys=average.keys,
        align=average.align,
        itemsize=itemsize,
    )
    # Q and K of all heads wait where they are less than sums, and where keys lie such that these can be added to them;
    # with them one mask, of bytes, for all layers.
    all_heads = target.family_heads or num_heads
    waiting = batch.num_samples * batch.num_tokens * 2 * all_heads * head_dim * itemsize
    summed = len(target.keys) * math.prod(shapes["total"]) * itemsize
    if waiting >= summed or (target.keys[0] in held and not held.is_slab(target.keys)):
        return grown + summed, computing
    return grown + waiting, computing + batch.num_samples * batch.num_tokens**2
