"""From an attention call to what sites keep of it: sums of patterns, statistics, each sample's pattern.

Legend of names: b samples, h heads, s aligned positions, l a sample's tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from distcache.attention import AttentionCall, pattern, pattern_statistics, pattern_sum, state_bytes
from distcache.entries import Shown, Slab
from distcache.errors import SchemaMismatch, SiteError
from distcache.segments import Arena, capacity, fits
from distcache.sites import AttentionTarget
from distcache.strategies import AveragePattern, Extend, Fieldwise, Value
from distcache.tokens import Batch


def shown_patterns(target: AttentionTarget, call: AttentionCall, batch: Batch) -> Iterator[Slab | Shown]:
    """What one attention call gives a site, before the model goes on."""
    spans, strategy = batch.spans, target.strategy
    if target.stats:
        assert isinstance(strategy, Fieldwise)
        found = pattern_statistics(call, spans, target.stats, columns=batch.columns, heads=target.heads)
        for key, value in zip(target.keys, found.values(), strict=True):
            # A sample's value weighs as much as the queries that it is of: never a mean of means.
            value = dataclasses.replace(value, columns=batch.per_sample)
            state = {name: tensor.unsqueeze(0) for name, tensor in strategy.take(value).items()}
            yield Slab((key,), strategy, state, strategy.result_dtype(value.data.dtype))
    elif isinstance(strategy, AveragePattern):
        lengths = torch.tensor([stop - start for start, stop in spans])
        size = max(lengths.tolist(), default=0)
        total_hss = pattern_sum(call, spans, size, heads=target.heads)
        count_s1 = (lengths[:, None] > torch.arange(size)).sum(0)[:, None].to(total_hss.device)
        state = {"total": total_hss, "count": count_s1.expand(len(total_hss), size, 1)}
        if target.whole:
            state = {name: tensor.unsqueeze(0) for name, tensor in state.items()}
        yield Slab(target.keys, strategy, state, strategy.result_dtype(call.query_bhqd.dtype))
    else:
        patterns = [pattern(call, spans, b, heads=target.heads) for b in range(batch.num_samples)]
        for k, key in enumerate(target.keys):
            one_each = [pattern_hll[k] for pattern_hll in patterns]
            yield Shown(key, Value(one_each, columns=batch.per_sample), Extend())


def room_nbytes(target: AttentionTarget, held: Arena, longest: int | None) -> int:
    """Bytes that a site's accumulators still have to take, and its sums of a pass, for texts this long.

    `longest`: None before any pass, when only sums of a fixed size are known. `SiteError` for texts beyond that size.
    """
    strategy, num_heads = target.strategy, target.num_heads
    if target.stats:
        return 0 if longest is None else state_bytes(target.stats, num_heads) * (1 if target.keys[0] in held else 2)
    if not isinstance(strategy, AveragePattern) or (longest is None and strategy.size is None):
        return 0
    size = longest or 0
    try:
        total, count = capacity(strategy, "total", (size, size)), capacity(strategy, "count", (size, 1))
    except SchemaMismatch as error:
        raise SiteError(f"site {target.where}: {error} Cut the texts, or give a larger size.") from error
    grown = math.prod(total) * (strategy.accumulate or torch.float64).itemsize + math.prod(count) * 8
    if target.keys[0] in held and fits(total, held.capacities(target.keys[0])["total"][-2:]):
        grown = 0
    return num_heads * (grown + size * size * 4)  # float32 until the pass returns
