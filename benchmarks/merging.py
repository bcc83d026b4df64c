"""What a merge costs: ours, the hand-made limit, a collective per key, pickled objects, and metric libraries.

Each workload gives every rank the same keys. All candidates end with the merged result on every rank; ours is all
of it: arrival, agreement, moving, vote, commit.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import distcache as dc
from benchmarks.harness import Candidate, time_on_rank, torchrun_environment
from distcache import comm
from distcache.plan import buckets

MIB = 2**20


def workload(name: str, rank: int, world_size: int, device: torch.device) -> list[Candidate]:
    """The candidates of a workload, on this rank."""
    kind, *rest = name.split()
    dtype = torch.float32 if "float32" in rest else torch.float64
    if kind == "means":
        return list(reductions(rank, world_size, device, [("mean", 512, (9, 64, 64))], dtype))
    if kind == "tiny":
        return list(reductions(rank, world_size, device, [("mean", 4000, (64,))], dtype))
    if kind == "patterns":
        return list(reductions(rank, world_size, device, [("mean", 1024, (128, 128))], dtype))
    if kind == "buckets":
        return list(buckets_and_flights(rank, world_size, device))
    if kind == "ragged":
        return list(concatenations(rank, world_size, device, 256, 256, 576))
    raise ValueError(f"unknown workload {name!r}")


WORKLOADS = (
    "means float32",
    "means float64",
    "tiny float32",
    "tiny float64",
    "ragged",
    "patterns float32",
    "patterns float64",
    "buckets",
)


def on_rank(
    rank: int, world_size: int, name: str, rounds: int, device: str
) -> tuple[list[str], list[list[float]], list[float | None]]:
    """Names of the candidates, milliseconds by candidate and time, and peaks."""
    warnings.simplefilter("ignore")
    torchrun_environment(rank, world_size)
    with contextlib.redirect_stderr(io.StringIO()):
        candidates = workload(name, rank, world_size, torch.device(device))
        return [c.name for c in candidates], *time_on_rank(candidates, rounds, torch.device(device))


def reductions(
    rank: int, world_size: int, device: torch.device, kinds: list[tuple[str, int, tuple[int, ...]]], dtype: torch.dtype
) -> Iterator[Candidate]:
    (_, num_keys, shape), *_ = kinds
    repeats = 10 if num_keys * math.prod(shape) < 10**6 else 1
    of_rank = [torch.randn((num_keys, *shape), generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    # Peers are given what accumulates, in the accumulators' dtype: equal bytes for all.
    values = {f"key{i:05d}": value.to(device, dtype, copy=True) for i, value in enumerate(of_rank[rank])}
    numel = sum(value.numel() for value in values.values())
    expected = torch.stack([values_r[num_keys // 2] for values_r in of_rank]).double().mean(0)
    del of_rank
    probe = f"key{num_keys // 2:05d}"

    def check(found: Any) -> None:
        torch.testing.assert_close(found[probe].cpu().double(), expected, rtol=0, atol=1e-6)

    # The limit: bytes that lie ready in one flat buffer, reused; then one memcpy and one add, as a merge that keeps
    # its delta and adds content cannot do without.
    ready = torch.zeros(numel, dtype=dtype, device=device)
    content, scratch = torch.zeros_like(ready), torch.zeros_like(ready)

    def limit() -> None:
        scratch.copy_(ready)
        _all_reduce(scratch)
        scratch.add_(content)

    def limit_fresh() -> None:
        fresh = ready.clone()
        _all_reduce(fresh)

    def raw() -> None:
        _all_reduce(ready)

    small = torch.zeros(6, dtype=torch.int64, device=device)

    def raw_and_vote() -> None:
        _all_reduce(ready)
        _all_reduce(small)

    yield Candidate("limit: copy, all_reduce, add", limit, lambda: ready.fill_(1), repeats=repeats)
    yield Candidate("limit: all_reduce of ready bytes", raw, lambda: ready.fill_(1), repeats=repeats)
    yield Candidate("limit: that and one of 48 bytes", raw_and_vote, lambda: ready.fill_(1), repeats=repeats)
    yield Candidate("limit: into a fresh buffer", limit_fresh, lambda: ready.fill_(1), repeats=repeats)

    cache = dc.DistributedCache()
    cache.register_aggregation("key", dc.Mean(accumulate=dtype))
    local = dc.ActivationCache()
    local.register_aggregation("key", dc.Mean(accumulate=dtype))
    for key, value in values.items():
        local.add(key, value)

    def fold() -> None:
        _fold(cache, local)

    def merge() -> dc.DistributedCache:
        cache.merge()
        return cache

    yield Candidate("distcache", merge, fold, check, repeats=repeats)

    first = dc.DistributedCache()

    def fold_into_new() -> None:
        nonlocal first
        first.close()
        first = dc.DistributedCache()
        first.register_aggregation("key", dc.Mean(accumulate=dtype))
        _fold(first, local)

    def merge_first() -> dc.DistributedCache:
        first.merge()
        return first

    yield Candidate("distcache, a cache's first merge", merge_first, fold_into_new, check)

    def per_key() -> dict[str, Tensor]:
        merged = {}
        for key, value in values.items():
            total = value.clone()
            _all_reduce(total)
            merged[key] = total / world_size
        return merged

    yield Candidate("a collective per key", per_key, check=check, rounds=2)

    def objects() -> dict[str, Tensor]:
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, values)
        return {key: torch.stack([theirs[key] for theirs in found]).mean(0) for key in values}

    if world_size > 1:
        yield Candidate("all_gather_object", objects, check=check, rounds=2)
        yield from _peers_reduce(values, dtype, check)


def _fold(cache: dc.DistributedCache, local: dc.ActivationCache) -> None:
    """Into the delta, and the block is left open, so that a merge can be timed alone."""
    deferred = cache.deferred_mode()
    deferred.__enter__()
    cache.cat(local)
    cache._deferred = False


def _all_reduce(tensor: Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)


def _peers_reduce(values: dict[str, Tensor], dtype: torch.dtype, check: Any) -> Iterator[Candidate]:
    import torcheval.metrics as te
    import torchmetrics
    from torcheval.metrics.toolkit import sync_and_compute

    class Means(torchmetrics.Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            for key, value in values.items():
                self.add_state(key, torch.zeros(value.shape, dtype=dtype), dist_reduce_fx="sum")
            self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

        def update(self) -> None:
            for key, value in values.items():
                getattr(self, key).add_(value)
            self.count += 1

        def compute(self) -> dict[str, Tensor]:
            return {key: getattr(self, key) / self.count for key in values}

    class TorchevalMeans(te.Metric[Any]):
        def __init__(self, *, device: torch.device | None = None) -> None:
            super().__init__(device=device)
            for key, value in values.items():
                self._add_state(key, torch.zeros(value.shape, dtype=dtype))
            self._add_state("count", torch.zeros((), dtype=torch.int64))

        def update(self) -> TorchevalMeans:
            for key, value in values.items():
                getattr(self, key).add_(value)
            self.count += 1
            return self

        def compute(self) -> dict[str, Tensor]:
            return {key: getattr(self, key) / self.count for key in values}

        def merge_state(self, metrics: Any) -> TorchevalMeans:
            for other in metrics:
                for key in (*values, "count"):
                    getattr(self, key).add_(getattr(other, key))
            return self

    metric: Any = None

    def fresh(kind: Any) -> None:
        nonlocal metric
        metric = kind()
        metric.update()

    yield Candidate("torchmetrics", lambda: metric.compute(), lambda: fresh(Means), check, rounds=2)
    yield Candidate("torcheval", lambda: sync_and_compute(metric), lambda: fresh(TorchevalMeans), check, rounds=2)

    from accelerate import PartialState
    from accelerate.utils import reduce

    assert PartialState(cpu=True).num_processes == dist.get_world_size()

    def accelerated() -> dict[str, Tensor]:
        return reduce({key: value.clone() for key, value in values.items()}, reduction="mean")

    yield Candidate("accelerate.reduce", accelerated, check=check, rounds=2)


def concatenations(
    rank: int, world_size: int, device: torch.device, num_keys: int, mean_rows: int, width: int
) -> Iterator[Candidate]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean_rows // 2, mean_rows * 3 // 2, (world_size, num_keys), generator=generator)
    keys = [f"key{i:05d}" for i in range(num_keys)]
    values = {
        key: torch.full((int(lengths[rank, i]), width), float(rank * num_keys + i)).to(device)
        for i, key in enumerate(keys)
    }
    probe = num_keys // 2

    def check(found: Any) -> None:
        wanted = torch.cat([torch.full((int(lengths[r, probe]), width), float(r * num_keys + probe))
                            for r in range(world_size)])  # fmt: skip
        assert torch.equal(found[keys[probe]].cpu(), wanted)

    def check_some_order(found: Any) -> None:  # torcheval puts a rank's own rows first, so that no two ranks agree
        wanted = lengths[:, probe].tolist()
        counted = found[keys[probe]][:, 0].unique(return_counts=True)[1].tolist()
        assert counted == wanted, f"{counted} rows of each rank, expected {wanted}"

    # The limit: every rank's bytes lie ready, are broadcast through two reused staging buffers, and are copied to
    # their place in the result. With a result that is reused too, no page is touched for the first time: that no
    # merge can have, whose result is kept. So there are two.
    sizes = [int(lengths[r].sum()) * width for r in range(world_size)]
    mine = torch.cat([value.flatten() for value in values.values()])
    reused = torch.empty(sum(sizes), device=device)
    step = 4 * MIB // 4
    staging = [torch.empty(step, device=device) for _ in range(2)]

    def limit(result: Tensor) -> None:
        flying: list[Any] = []

        def land() -> None:
            work, buffer, place = flying.pop(0)
            work.wait()
            result[place : place + len(buffer)].copy_(buffer)

        offset, number = 0, 0
        for source, size in enumerate(sizes):
            for start in range(0, size, step):
                if len(flying) == 2:
                    land()
                buffer = staging[number % 2][: min(step, size - start)]
                if source == rank:
                    buffer.copy_(mine[start : start + len(buffer)])
                flying.append((dist.broadcast(buffer, source, async_op=True), buffer, offset + start))
                number += 1
            offset += size
        while flying:
            land()

    if world_size > 1:
        yield Candidate("limit: broadcasts through staging, memcpy", lambda: limit(torch.empty_like(reused)))
        yield Candidate("limit: that into a result that is reused", lambda: limit(reused))

    cache = dc.DistributedCache()
    local = dc.ActivationCache()
    local.update(values)

    def fold() -> None:
        nonlocal cache
        cache.close()
        cache = dc.DistributedCache()
        _fold(cache, local)

    def merge() -> dc.DistributedCache:
        cache.merge()
        return cache

    yield Candidate("distcache", merge, fold, check)
    if world_size == 1:
        return

    def padded_per_key() -> dict[str, Tensor]:
        merged = {}
        for key, value in values.items():
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
            dist.all_gather(counts, torch.tensor([len(value)]))
            longest = max(int(count) for count in counts)
            padded = torch.zeros(longest, width)
            padded[: len(value)] = value
            everyone = [torch.empty_like(padded) for _ in range(world_size)]
            dist.all_gather(everyone, padded)
            merged[key] = torch.cat([part[: int(count)] for part, count in zip(everyone, counts, strict=True)])
        return merged

    yield Candidate("a padded all_gather per key", padded_per_key, check=check, rounds=2)

    def objects() -> dict[str, Tensor]:
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, values)
        return {key: torch.cat([theirs[key] for theirs in found]) for key in values}

    yield Candidate("all_gather_object", objects, check=check, rounds=2)

    import torcheval.metrics as te
    from accelerate import PartialState
    from accelerate.utils import gather, pad_across_processes
    from torcheval.metrics.toolkit import sync_and_compute_collection
    from torchmetrics.aggregation import CatMetric

    assert PartialState(cpu=True).num_processes == dist.get_world_size()
    metrics: dict[str, Any] = {}

    def fresh(kind: Any) -> None:
        metrics.clear()
        for key, value in values.items():
            metrics[key] = kind()
            metrics[key].update(value)

    yield Candidate(
        "torchmetrics CatMetric",
        lambda: {key: metric.compute() for key, metric in metrics.items()},
        lambda: fresh(CatMetric),
        check,
        rounds=2,
    )
    yield Candidate(
        "torcheval Cat",
        lambda: sync_and_compute_collection(metrics),
        lambda: fresh(te.Cat),
        check_some_order,
        rounds=2,
    )

    def accelerated() -> dict[str, Tensor]:
        counts = gather({key: torch.tensor([len(value)]) for key, value in values.items()})
        everyone = gather(pad_across_processes(values))
        merged = {}
        for key in keys:
            parts = everyone[key].chunk(world_size)
            merged[key] = torch.cat([part[: int(n)] for part, n in zip(parts, counts[key], strict=True)])
        return merged

    yield Candidate("accelerate.gather", accelerated, check=check, rounds=2)


def buckets_and_flights(rank: int, world_size: int, device: torch.device) -> Iterator[Candidate]:
    """75 MB reduced, and as much broadcast, in pieces of several sizes with several in flight: what the defaults of
    `DistributedCache(bucket_bytes=…)` and `comm.IN_FLIGHT` were chosen by.
    """
    buffer = torch.ones(75 * 10**6 // 4, device=device)
    seam = comm.open_comm()

    def run(op: str, bucket_bytes: int, in_flight: int) -> None:
        comm.IN_FLIGHT = in_flight
        cuts = buckets(len(buffer), 4, bucket_bytes)
        root = 0 if op == "copy" else None
        seam.run([comm.Transfer(buffer[start:stop], op, root=root) for start, stop in cuts], lambda: None)

    for op in ("sum", "copy"):
        for mib in (1, 4, 25, 100):
            for in_flight in (1, 2, 4, 8):
                name = f"{op}, {mib} MiB, {in_flight} in flight"
                yield Candidate(name, functools.partial(run, op, mib * MIB, in_flight), lambda: buffer.fill_(1))
