"""Every dtype, through folding, a merge of ranks, and a folder on the disk: bit for bit where values are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import distcache as dc
import distcache.strategies
from distcache.segments import Arena
from distcache.strategies import MAX, MIN, SUM, Field, Fieldwise, Gathered, Value, Weighted

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
EVERY = [*FLOATS, *INTS, torch.complex64, torch.complex128, torch.bool]


def anything(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype, NaN of every kind among them; truth values are 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).view(torch.bool)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def bits(x: torch.Tensor) -> tuple:
    """All that a tensor is: equal NaNs are equal only where every bit of them is."""
    flat = torch.empty(x.numel(), dtype=x.dtype).copy_(x.flatten())
    return x.dtype, tuple(x.shape), flat.view(torch.uint8).tolist()


def test_bits_tell_apart_what_comparison_does_not():
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))
    quiet, other = (torch.tensor([n], dtype=torch.int32).view(torch.float32) for n in (0x7FC00000, 0x7FC00001))
    assert bits(quiet) != bits(other) and quiet.isnan().all() and other.isnan().all()
    assert bits(torch.zeros(2, dtype=torch.int16)) != bits(torch.zeros(2, dtype=torch.uint16))


# -- rows that are kept ----------------------------------------------------------------------------------------

# key -> (strategy, value of a rank, how plain torch joins them). Unlike numbers of rows; one rank with none at all.
KEPT = {
    "cat": ("cat", lambda dtype, r: anything(dtype, 3 * r, 5, seed=r), torch.cat),
    "one_row": ("cat", lambda dtype, r: anything(dtype, 1, 7, seed=r), torch.cat),
    "no_rows": ("cat", lambda dtype, r: anything(dtype, 0, 2, seed=r), torch.cat),
    "no_elements": ("cat", lambda dtype, r: anything(dtype, 2, 0, seed=r), torch.cat),
    "transposed": ("cat", lambda dtype, r: anything(dtype, 4, 3, seed=r).T, torch.cat),
    "every_other": ("cat", lambda dtype, r: anything(dtype, 8, 6, seed=r)[::2, ::3], torch.cat),
    "expanded": ("cat", lambda dtype, r: anything(dtype, 1, 3, seed=r).expand(4, 3), torch.cat),
    "last_dim": (dc.Cat(dim=-1), lambda dtype, r: anything(dtype, 2, r + 1, seed=r), lambda v: torch.cat(v, -1)),
    "stack": ("stack", lambda dtype, r: anything(dtype, 2, 3, seed=r), torch.stack),
    "stack_0d": ("stack", lambda dtype, r: anything(dtype, seed=r), torch.stack),
    "stack_empty": ("stack", lambda dtype, r: anything(dtype, 0, seed=r), torch.stack),
    "extend": ("extend", lambda dtype, r: [anything(dtype, 2, seed=r), anything(dtype, seed=r)], None),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def merge_kept(rank, world_size, folder, bucket_bytes):
    cache = dc.DistributedCache(timeout_s=20, bucket_bytes=bucket_bytes)
    local = dc.ActivationCache()
    for dtype in EVERY:
        for kind, (strategy, fill, _) in KEPT.items():
            key = f"{kind}/{name_of(dtype)}"
            cache.register_aggregation(key, strategy)
            local[key] = fill(dtype, rank)
    cache.cat(local)
    cache.save(folder)
    return {key: [bits(t) for t in v] if isinstance(v := cache[key], list) else bits(v) for key in cache}


@pytest.mark.parametrize(("world_size", "bucket_bytes"), [(1, 64), (2, 64), (2, 2**20), (3, 10)])
def test_rows_of_every_dtype_merge_and_are_saved_bit_for_bit(ranks, tmp_path, world_size, bucket_bytes):
    """Buckets smaller than a row stand in for tensors of more than 2^31 elements: every cut is tried."""
    folder = tmp_path / "cache"
    results = ranks.run(world_size, merge_kept, str(folder), bucket_bytes)
    assert all(found == results[0] for found in results)
    saved = dc.load(folder)
    for dtype in EVERY:
        for kind, (_, fill, join) in KEPT.items():
            key = f"{kind}/{name_of(dtype)}"
            values = [fill(dtype, rank) for rank in range(world_size)]
            if join is None:
                expected = [bits(x) for one in values for x in one]
                assert results[0][key] == expected == [bits(x) for x in saved[key]], key
            else:
                expected = bits(join(values))
                assert results[0][key] == expected == bits(saved[key]), key
    assert len(saved) == len(EVERY) * len(KEPT)


def merge_in_order(rank, world_size, bucket_bytes):
    """Rows with an index, dealt so that ranks' samples alternate."""
    cache = dc.DistributedCache(timeout_s=20, bucket_bytes=bucket_bytes)
    with cache.deferred_mode():
        for dtype in EVERY:
            x = anything(dtype, 6, 3, seed=9)[rank::world_size]
            cache.add(name_of(dtype), x, index=range(rank, 6, world_size))
    return {key: bits(cache[key]) for key in cache}


@pytest.mark.parametrize("bucket_bytes", [7, 2**20])
def test_rows_of_every_dtype_come_in_the_samples_order(ranks, bucket_bytes):
    for found in ranks.run(2, merge_in_order, bucket_bytes):
        assert found == {name_of(dtype): bits(anything(dtype, 6, 3, seed=9)) for dtype in EVERY}


# -- reductions ------------------------------------------------------------------------------------------------

REDUCED = [dtype for dtype in [*FLOATS, *INTS, torch.bool] if dtype != torch.uint64]


def number(dtype: torch.dtype, i: int) -> torch.Tensor:
    """A sample [4] of a dtype: small, but near its limits in two places, where sums in the dtype itself would wrap."""
    x = torch.randint(-60, 60, (4,), generator=torch.Generator().manual_seed(i))
    if dtype.is_floating_point:
        return (x / 8).to(dtype)
    if dtype == torch.bool:
        return x > 0
    info = torch.iinfo(dtype)
    x = x.abs() if info.min == 0 else x
    x[2], x[3] = min(info.max, 2**31) - i, max(info.min, -(2**31)) + i
    return x.to(dtype)


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.dtype.is_floating_point else x.to(torch.int64)


def merge_reduced(rank, world_size, split, bucket_bytes):
    cache = dc.DistributedCache(timeout_s=20, bucket_bytes=bucket_bytes)
    start = sum(split[:rank])
    for name in ("sum", "mean", "max", "min", "moments"):
        cache.register_aggregation(name, name)
    cache.register_aggregation("hist", dc.Histogram(5, -7, 7))
    cache.register_aggregation("cov", dc.Covariance())
    cache.register_aggregation("top", dc.TopK(2))
    with cache.deferred_mode():
        for i in range(start, start + split[rank]):
            local = dc.ActivationCache()
            for dtype in REDUCED:
                for name in ("sum", "mean", "max", "min", "moments", "hist", "cov", "top"):
                    local[f"{name}/{name_of(dtype)}"] = number(dtype, i)
            cache.cat(local, index=[i])
    return {key: cache[key] for key in cache}


@pytest.mark.parametrize("split", [(5,), (3, 2), (0, 5), (1, 0, 4)], ids=str)
def test_reductions_of_every_dtype_say_what_exact_arithmetic_says(ranks, split):
    results = ranks.run(len(split), merge_reduced, split, 20)
    for found in results:
        for dtype in REDUCED:
            x = exact(torch.stack([number(dtype, i) for i in range(5)]))
            floats, name = dtype.is_floating_point, name_of(dtype)
            result = torch.float64 if dtype == torch.float64 else torch.float32
            for kind, expected, wanted in (
                ("sum", x.sum(0), result if floats else torch.int64),
                ("max", x.amax(0), result if floats else dtype),
                ("min", x.amin(0), result if floats else dtype),
                ("mean", x.double().mean(0), result),
            ):
                value = found[f"{kind}/{name}"]
                assert value.dtype == wanted, (kind, dtype)
                if kind == "mean":
                    torch.testing.assert_close(value, expected.to(wanted), rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(exact(value), expected.to(wanted) if floats else expected), (kind, dtype)
            moments, cov = found[f"moments/{name}"], found[f"cov/{name}"]
            torch.testing.assert_close(moments["variance"].double(), x.double().var(0), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(cov["covariance"].double(), torch.cov(x.double().T), rtol=1e-5, atol=1e-5)
            inside = x[(x >= -7) & (x <= 7)].double()
            assert found[f"hist/{name}"]["counts"].tolist() == torch.histogram(inside, 5, range=(-7.0, 7.0))[0].tolist()
            top = found[f"top/{name}"]
            assert torch.equal(exact(top["values"]), torch.topk(x, 2, dim=0).values)
            assert torch.equal(x.gather(0, top["sample"]), exact(top["values"]))


def test_sums_in_the_dtype_itself_would_have_wrapped():
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float16):
        largest = 60000 if dtype == torch.float16 else torch.iinfo(dtype).max
        x = torch.full((3,), largest).to(dtype)
        assert float(x.sum(dtype=dtype)) != 3 * largest
        assert float(dc.Sum().finalize(dc.Sum().take(Value(x, rows=True)))) == 3 * largest


@pytest.mark.parametrize("strategy", [dc.Sum(), dc.Mean(), dc.Moments(), dc.Max(), dc.Min(), dc.Covariance()], ids=str)
def test_what_has_no_arithmetic_is_refused_by_name_of_key_and_fix(strategy):
    cache = dc.ActivationCache()
    cache.register_aggregation("x", strategy)
    for dtype, fix in ((torch.complex64, "use torch.view_as_real first"), (torch.uint64, "convert first")):
        with pytest.raises(TypeError, match=f"cannot merge 'x': .*{fix}"):
            cache.add("x", anything(dtype, 2))


# -- what states are kept in -----------------------------------------------------------------------------------


class InAnyDtype(Fieldwise):
    dim = "auto"
    ragged, size, accumulate = False, None, None

    def lift(self, value_n, weight_n=None):
        return {"held": value_n[0]}

    def finalize(self, state):
        return state["held"]


@dataclass(frozen=True)
class KeepsSum(InAnyDtype):
    fields = (Field("held", SUM),)


@dataclass(frozen=True)
class KeepsMax(InAnyDtype):
    fields = (Field("held", MAX),)


@dataclass(frozen=True)
class KeepsMin(InAnyDtype):
    fields = (Field("held", MIN),)


@dataclass(frozen=True)
class KeepsLatest(InAnyDtype, Gathered):
    fields = (Field("held", SUM),)

    def fold_(self, into, other):
        into["held"].copy_(other["held"])


def room_for(strategy, dtype):
    arena = Arena()
    state = {"held": torch.zeros(1, 2, dtype=dtype)}
    arena.make_room(("x",), strategy, state, torch.float32)
    arena.fold(("x",), state)
    return arena


EVERYWHERE = {torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64}


@pytest.mark.parametrize(
    ("strategy", "taken"),
    [
        (KeepsSum(), EVERYWHERE | {torch.float16, torch.bfloat16}),
        (KeepsMax(), EVERYWHERE | {torch.bool}),
        (KeepsMin(), EVERYWHERE | {torch.bool}),
        (KeepsLatest(), set(EVERY)),  # travels as bytes
    ],
    ids=["sum", "max", "min", "gathered"],
)
def test_states_are_kept_in_dtypes_that_every_backend_reduces(strategy, taken, monkeypatch):
    monkeypatch.setitem(distcache.strategies._BY_NAME, "keeps", type(strategy))
    for dtype in EVERY:
        if dtype in taken:
            assert len(room_for(strategy, dtype)) == 1
            continue
        words = rf"cannot reduce 'x': {type(strategy).__name__} keeps its field 'held' as {name_of(dtype)}, of which"
        with pytest.raises(TypeError, match=words):
            room_for(strategy, dtype)


def test_an_accumulator_that_cannot_be_reduced_is_refused_before_anything_is_folded():
    cache = dc.ActivationCache()
    cache.register_aggregation("x", dc.Sum(accumulate=torch.int16))
    with pytest.raises(TypeError, match="cannot reduce 'x': Sum keeps its field 'total' as int16"):
        cache.add("x", torch.ones(2))
    assert "x" not in cache and not cache._arena.segments


def merge_accumulated(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20, bucket_bytes=6)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    with cache.deferred_mode():
        for dtype in dtypes:
            cache.register_aggregation(name_of(dtype), dc.Mean(accumulate=dtype))
            cache.add(name_of(dtype), torch.full((5,), 2.0 + rank))
    return [cache[name_of(dtype)].tolist() for dtype in dtypes]


def test_totals_in_half_precision_merge_where_they_are_asked_for(ranks):
    assert ranks.run(2, merge_accumulated) == [[[2.5] * 5] * 4] * 2


def test_a_weight_is_exact_whatever_dtype_it_comes_in():
    for dtype in (torch.float16, torch.int8, torch.bool):
        value = Weighted(torch.tensor([2.0, 4.0]), torch.ones(2).to(dtype))
        assert dc.Mean(dim=0).finalize(dc.Mean(dim=0).take(Value(value))) == 3
