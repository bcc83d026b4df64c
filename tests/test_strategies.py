"""The laws of strategies, over every registered one; what each says, against plain torch."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, texts
from torch.utils._python_dispatch import TorchDispatchMode

import distcache as dc
import distcache.strategies
from distcache import merge as merging
from distcache.errors import SchemaMismatch
from distcache.segments import Arena
from distcache.strategies import (
    MAX,
    MIN,
    SUM,
    AveragePattern,
    Cat,
    Columns,
    Covariance,
    Extend,
    Field,
    Fieldwise,
    First,
    Function,
    Gathered,
    Grouped,
    Histogram,
    Listwise,
    Max,
    Mean,
    Min,
    Moments,
    Rows,
    Stack,
    Sum,
    TopK,
    Value,
    Weighted,
    as_strategy,
    default_aggregation,
    describe,
    described,
    register_strategy,
    registered_strategies,
)
from distcache.strategies.covariance import full_float32
from distcache.testing import check_strategy_laws, kill_self, splits

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@dataclass(frozen=True, slots=True)
class Range(Fieldwise):
    """A user's strategy: the distance of the largest value to the smallest."""

    dim: int | str = "auto"
    ragged: bool = False
    size: int | None = None
    accumulate: torch.dtype | None = None

    fields = (Field("low", MIN), Field("high", MAX), Field("count", SUM))

    def lift(self, value_n, weight_n=None):
        x = value_n.double()
        low, high = (x.amin(0), x.amax(0)) if len(x) else (x.new_full(x.shape[1:], s * math.inf) for s in (1, -1))
        return {"low": low, "high": high, "count": torch.tensor(len(x))}

    def finalize(self, state):
        return state["high"] - state["low"]


register_strategy("range", Range)


@dataclass(frozen=True, slots=True)
class Longest(Gathered):
    """A user's strategy that combines as a whole, in dtypes that no collective reduces: the longest vector of all."""

    dim: int | str = "auto"

    fields = (Field("length", MAX), Field("vector", MAX), Field("count", SUM))
    ragged, size, accumulate = False, None, None

    def lift(self, value_n, weight_n=None):
        lengths = torch.cat([value_n.float().unsqueeze(-1).flatten(1).norm(dim=1), torch.tensor([-math.inf])])
        padded = torch.cat([value_n.half(), torch.full((1, *value_n.shape[1:]), -math.inf, dtype=torch.half)])
        length = lengths.max()
        vector = padded[lengths == length].amax(0)  # of equal ones, so that order means nothing
        return {"length": length, "vector": vector, "count": torch.tensor(len(value_n), dtype=torch.int16)}

    def fold_(self, into, other):
        wide = (*into["length"].shape, *[1] * (into["vector"].dim() - into["length"].dim()))
        mine, theirs = into["length"].reshape(wide), other["length"].reshape(wide)
        either = torch.maximum(into["vector"], other["vector"])
        longer = torch.where(theirs > mine, other["vector"], into["vector"])
        into["vector"].copy_(torch.where(theirs == mine, either, longer))
        into["length"].copy_(torch.maximum(into["length"], other["length"]))
        into["count"].add_(other["count"])

    def finalize(self, state):
        return state["vector"]


register_strategy("longest", Longest)


def seeded(*shape, seed=0, dtype=torch.float32):
    """Values of a dtype: normal floats, or integers over the dtype's range."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


def samples_for(name: str, num_samples: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int):
    """What samples a strategy is tried with: vectors, if it doesn't ask for something else."""
    if name == "average_pattern":
        return list(seeded(num_samples, 3, 3, seed=seed, dtype=dtype))
    if name == "extend":
        return [[x] for x in seeded(num_samples, *shape, seed=seed, dtype=dtype)]
    if name == "covariance":
        shape = (math.prod(shape),)
    return list(seeded(num_samples, *shape, seed=seed, dtype=dtype))


NEEDING_PARAMETERS = {
    "histogram": Histogram(5, -1.5, 1.5),
    "topk": TopK(3),
    "grouped": Grouped(Mean(), 3, by="label"),
}

CASES = {
    "num_samples": st.integers(2, 9),
    "shape": st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    "dtype": st.sampled_from([*FLOATS, *INTS]),
    "seed": st.integers(0, 2**16),
}


@pytest.mark.parametrize("name", sorted(registered_strategies()))
@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_every_registered_strategy_keeps_the_laws(name, num_samples, shape, dtype, seed):
    strategy = NEEDING_PARAMETERS[name] if name in NEEDING_PARAMETERS else registered_strategies()[name]()
    check_strategy_laws(strategy, samples_for(name, num_samples, shape, dtype, seed))


CONFIGURED = [
    Covariance(center=False),
    Covariance(correction=0, dim=0),
    Histogram(4, -1, 1, per_element=True),
    Histogram(3, -50, 50, dim=1),
    TopK(1),
    TopK(2, largest=False),
    TopK(3, dim=0),
    Cat(dim="auto"),
    Stack(dim=1),
    Stack(dim=-1),
    Sum(dim=0),
    Mean(dim=-1),
    Mean(accumulate=torch.float64),
    Mean(size=4, ragged=True),
    Moments(correction=0),
    Moments(dim=1),
    Max(ragged=(0,)),
    Function(torch.stack),
    Range(dim=0),
    Grouped(Sum(), 2, by="label"),
    Grouped(Mean(dim=-1), 3, by="label"),
    Grouped(Mean(accumulate=torch.float64), 1, by="label"),
    Grouped(Moments(), 3, by="label"),
    Grouped(Max(), 20, by="label"),
    Grouped(Min(), 2, by="label"),
    Grouped(Covariance(), 3, by="label"),
    Grouped(Covariance(center=False), 2, by="label"),
    Grouped(Histogram(4, -1, 1), 3, by="label"),
    Grouped(Histogram(3, -50, 50, per_element=True), 3, by="label"),
]


@pytest.mark.parametrize("strategy", CONFIGURED, ids=str)
@settings(max_examples=8, deadline=None)
@given(num_samples=CASES["num_samples"], dtype=CASES["dtype"], seed=CASES["seed"])
def test_strategies_with_parameters_keep_the_laws(strategy, num_samples, dtype, seed):
    check_strategy_laws(strategy, list(seeded(num_samples, 3, seed=seed, dtype=dtype)))


@pytest.mark.parametrize(
    "strategy",
    [Sum(ragged=True), Mean(ragged=True), Moments(ragged=True), Max(ragged=True), Min(ragged=(0, 1))],
    ids=str,
)
@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=2, max_size=6), seed=CASES["seed"])
def test_samples_of_different_sizes_keep_the_laws(strategy, sizes, seed):
    check_strategy_laws(strategy, [seeded(*size, seed=seed + i) for i, size in enumerate(sizes)])


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5), seed=CASES["seed"])
def test_patterns_of_different_lengths_keep_the_laws(sizes, seed):
    check_strategy_laws(AveragePattern(), [seeded(n, n, seed=seed).abs() for n in sizes])
    check_strategy_laws(AveragePattern(), [seeded(2, n, n, seed=seed).abs() for n in sizes])  # two heads as one value


WEIGHING = [Sum(), Mean(), Moments(), Mean(ragged=True), Mean(dim=0), Covariance(), Covariance(center=False)]


@pytest.mark.parametrize("strategy", WEIGHING, ids=str)
@settings(max_examples=8, deadline=None)
@given(num_samples=CASES["num_samples"], dtype=CASES["dtype"], seed=CASES["seed"])
def test_weighted_samples_keep_the_laws(strategy, num_samples, dtype, seed):
    weights = seeded(num_samples, seed=seed + 1).abs() + 0.1
    check_strategy_laws(strategy, list(seeded(num_samples, 3, seed=seed, dtype=dtype)), weights)


# -- the laws can fail ---------------------------------------------------------------------------------------------


class _Planted(Mean):
    """A mean that a mistake is planted in."""


@dataclass(frozen=True)
class MeanOfMeans(_Planted):
    def lift(self, value_n, weight_n=None):
        mean = value_n.double().mean(0) if len(value_n) else torch.zeros(value_n.shape[1:], dtype=torch.float64)
        return {"total": mean, "count": torch.tensor(int(len(value_n) > 0))}


@dataclass(frozen=True)
class CountsIdleRanks(_Planted):
    def lift(self, value_n, weight_n=None):
        state = Mean.lift(self, value_n, weight_n)
        return {**state, "count": state["count"] + (len(value_n) == 0)}


@dataclass(frozen=True)
class FoldsIntoWhatItWasGiven(_Planted):
    def combine(self, a, b):
        self.fold_(a, b)
        return a


@dataclass(frozen=True)
class FirstOfSlab(_Planted):
    def fold_(self, into, other):
        for name in into:  # in a slab, every key gets what the first one should
            into[name].add_(other[name][:1] if into["total"].dim() > 1 else other[name])


@dataclass(frozen=True)
class SumsSquaresApart(Moments):
    def recentre_(self, local, merged):
        pass


@dataclass(frozen=True)
class CovariancesOfEachRank(Covariance):
    def recentre_(self, local, merged):
        pass


@dataclass(frozen=True)
class CountsTheTopBinTwice(Histogram):
    def lift(self, value_n, weight_n=None):
        state = Histogram.lift(self, value_n, weight_n)
        state["binned"][-3] += 1
        return state


@dataclass(frozen=True)
class TiesToTheFirstToCome(TopK):
    def fold_(self, into, other):
        both = torch.cat([into["values"], other["values"]], into["count"].dim())
        order = torch.sort(both, dim=into["count"].dim(), descending=True, stable=True).indices
        order = order.narrow(into["count"].dim(), 0, self.k)
        for name in ("values", "sample", "position"):
            into[name].copy_(torch.cat([into[name], other[name]], into["count"].dim()).gather(-1, order))
        into["count"].add_(other["count"])


@dataclass(frozen=True)
class LastToCome(Listwise):
    def finalize(self, state):
        return state[-1].data


@dataclass(frozen=True)
class Forgets(Listwise):
    def take(self, value):
        return [Value([value.data, value.data.new_ones(2)[:1].expand(3)], columns=value.columns)]

    def finalize(self, state):
        return state[0].data[0] * (1 if state[0].data[1].stride() == (0,) else 2)


PLANTED = {
    MeanOfMeans: "splits",
    CountsIdleRanks: "idle ranks",
    FoldsIntoWhatItWasGiven: "purity",
    FirstOfSlab: "slabs",
    SumsSquaresApart: "rounds",
    CovariancesOfEachRank: "rounds",
    CountsTheTopBinTwice: "splits",
    TiesToTheFirstToCome: "order",
    LastToCome: "order",
    Forgets: "bytes",
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda cls: cls.__name__)
def test_a_planted_mistake_breaks_its_law(planted, monkeypatch):
    monkeypatch.setitem(distcache.strategies._BY_NAME, "planted", planted)
    x = list(seeded(6, 3))
    if planted is TiesToTheFirstToCome:
        x = [torch.tensor(float(i > 2)) for i in range(6)]
    parameters = {CountsTheTopBinTwice: (4, -1, 1), TiesToTheFirstToCome: (2,)}.get(planted, ())
    with pytest.raises(AssertionError, match=f"breaks the law of {PLANTED[planted]}"):
        check_strategy_laws(planted(*parameters), x[:1] * 6 if planted is Forgets else x)


def test_a_mean_of_means_passes_on_even_shares_alone():
    x = seeded(6, 3)
    planted, even, uneven = MeanOfMeans(), (3, 3), (5, 1)
    said = {}
    for split in (even, uneven):
        a, b = (planted.take(Value(part, rows=True)) for part in x.split(split))
        said[split] = planted.finalize(planted.combine(a, b))
    torch.testing.assert_close(said[even], x.double().mean(0))
    assert not torch.allclose(said[uneven], x.double().mean(0), atol=1e-3)


def test_splits_hold_an_uneven_share_and_an_idle_rank():
    assert splits(6, 2) == [(3, 3), (5, 1), (0, 6)]


# -- reductions ----------------------------------------------------------------------------------------------------


def merged(strategy, *parts):
    """What ranks say together that saw these batches [n, …]."""
    states = [strategy.take(Value(part, rows=True)) for part in parts]
    state = states[0]
    for other in states[1:]:
        state = strategy.combine(state, other)
    return strategy.finalize(state)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mean_over_ranks_with_1_7_and_0_samples_is_that_of_all_8(dtype):
    x = seeded(8, 5, dtype=dtype)
    truth = [math.fsum(column) / 8 for column in x.double().T.tolist()]
    found = merged(Mean(), x[:1], x[1:], x[8:])
    assert (found - torch.tensor(truth).double()).abs().max() < 1e-6 * x.double().abs().mean()


def test_a_bf16_sum_over_many_samples_does_not_stick_at_256():
    ones = torch.ones(1000, 2, dtype=torch.bfloat16)
    assert merged(Sum(), ones, ones).tolist() == [2000, 2000]
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        total += 1
    assert total == 256


def fold_a_million(strategy: Mean) -> float:
    """A million single samples of 0.1, each folded in place as a hook does."""
    arena, one = Arena(), {name: t.unsqueeze(0) for name, t in strategy.take(Value(torch.tensor(0.1))).items()}
    arena.make_room(("x",), strategy, one, torch.float32)
    state, update = arena.state("x"), {name: tensor[0] for name, tensor in one.items()}
    for _ in range(1_000_000):
        strategy.fold_(state, update)
    assert int(state["count"]) == 1_000_000
    return float(strategy.finalize(arena.state("x")))


def test_a_million_updates_of_a_tenth_are_right_to_1e_6():
    tenth = float(torch.tensor(0.1))
    truth = math.fsum([tenth] * 1_000_000) / 1_000_000
    assert abs(fold_a_million(Mean()) - truth) < 1e-6 * truth


def test_float32_totals_drift_over_a_hundred_thousand_updates_which_float64_totals_do_not():
    total, exact = torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)
    tenth = torch.tensor(0.1)
    for _ in range(100_000):
        SUM.fold_(total, tenth)
        SUM.fold_(exact, tenth)
    truth = float(Fraction(float(tenth)) * 100_000)
    assert abs(float(total) - truth) > 1e-6 * truth > 1e3 * abs(float(exact) - truth)


@pytest.mark.parametrize("split", [(4000,), (1, 3999), (1000,) * 4, (1,) * 40 + (3960,), (0, 4000)], ids=str)
def test_moments_of_values_far_from_zero_do_not_cancel(split):
    x = (1e4 + seeded(4000, 3, dtype=torch.float64)).float()
    found = merged(Moments(), *x.split(split))
    truth = x.double()
    torch.testing.assert_close(found["variance"], truth.var(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["std"], truth.std(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["mean"], truth.mean(0), rtol=1e-9, atol=0)
    assert int(found["count"]) == 4000


def test_sums_of_squares_would_have_cancelled():
    x = (1e4 + seeded(4000, 3, dtype=torch.float64)).float()
    naive = (x * x).mean(0) - x.mean(0) ** 2
    assert not torch.allclose(naive.double(), x.double().var(0), rtol=1e-2)


def test_moments_of_one_sample_have_no_variance_and_of_none_no_mean():
    one, none = merged(Moments(), torch.ones(1, 2)), merged(Moments(), torch.ones(0, 2))
    assert one["mean"].tolist() == [1, 1] and one["variance"].isnan().all()
    assert none["mean"].isnan().all() and int(none["count"]) == 0
    assert merged(Moments(correction=0), torch.ones(1, 2))["variance"].tolist() == [0, 0]


def test_weighted_moments_are_those_of_repeated_samples():
    x = seeded(4, 3, dtype=torch.float64)
    times = torch.tensor([3, 1, 2, 5])
    strategy = Moments()
    found = strategy.finalize(strategy.take(Value(x, rows=True, weight=times)))
    torch.testing.assert_close(found["mean"], x.repeat_interleave(times, 0).mean(0))
    torch.testing.assert_close(found["variance"], x.repeat_interleave(times, 0).var(0))


def test_a_weight_is_per_sample_or_per_element():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    strategy = Mean(dim=0)
    per_sample = strategy.take(Value(Weighted(x, torch.tensor([1.0, 3.0]))))
    assert strategy.finalize(per_sample).tolist() == [2.5, 3.5] and int(per_sample["count"]) == 2
    per_element = strategy.take(Value(Weighted(x, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))))
    assert strategy.finalize(per_element)[0] == 2 and strategy.finalize(per_element)[1].isnan()
    assert per_element["count"].tolist() == [2, 0]
    scalar = Mean().take(Value(Weighted(x, 3.0)))
    assert torch.equal(Mean().finalize(scalar), x.double()) and float(scalar["weight"]) == 3
    with pytest.raises(ValueError, match=r"a weight for 2 sample\(s\) of shape \(2,\) .* got \(3,\)"):
        strategy.take(Value(Weighted(x, torch.ones(3))))
    with pytest.raises(TypeError, match="Max takes no weights"):
        Max().take(Value(Weighted(x, 1.0)))
    with pytest.raises(TypeError, match="Cat keeps values as they are and takes no weights"):
        Cat().take(Value(Weighted(x, 1.0)))


def test_integer_means_do_not_wrap_and_integer_sums_wrap_as_torch_does():
    big = torch.full((4,), 2**61 + 2**40)
    assert merged(Mean(), big).item() == float(2**61 + 2**40)
    assert merged(Sum(), big).item() == big.sum().item() != 4 * (2**61 + 2**40)
    small = torch.full((4,), 100, dtype=torch.int8)
    assert merged(Sum(), small, small).item() == 800


@pytest.mark.parametrize(("strategy", "identity"), [(Max(), -(2**63)), (Min(), 2**63 - 1)], ids=str)
def test_extremes_of_nothing_are_nan_and_of_no_integers_the_identity(strategy, identity):
    assert merged(strategy, torch.ones(0)).isnan()
    assert merged(strategy, torch.ones(0, dtype=torch.int64)).item() == identity


@pytest.mark.parametrize("strategy", [Max(), Min()], ids=str)
def test_a_nan_wins_wherever_it_comes(strategy):
    x, nan = torch.tensor([[1.0]]), torch.tensor([[math.nan]])
    for parts in ([x, nan], [nan, x], [torch.cat([x, nan])], [torch.cat([nan, x])]):
        assert merged(strategy, *parts).isnan().all()


def test_truth_values_are_counted_averaged_and_compared():
    x = torch.tensor([[True, False], [True, True]])
    assert merged(Sum(), x).tolist() == [2, 1] and merged(Mean(), x).tolist() == [1, 0.5]
    assert merged(Max(), x).tolist() == [1, 1] and merged(Min(), x).tolist() == [1, 0]
    assert Max().result_dtype(torch.bool) == torch.bool


def test_results_are_float32_unless_float64_went_in_or_was_asked_for():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        assert Mean().result_dtype(dtype) == Moments().result_dtype(dtype) == torch.float32
    assert (
        Mean().result_dtype(torch.float64) == Mean(accumulate=torch.float64).result_dtype(torch.int8) == torch.float64
    )
    assert Sum().result_dtype(torch.int8) == torch.int64 and Max().result_dtype(torch.int8) == torch.int8
    assert Sum(accumulate=torch.float64).result_dtype(torch.int8) == torch.float64


@pytest.mark.parametrize("strategy", [Sum(), Mean(), Moments(), Max(), Range(), Histogram(2, 0, 1), TopK(1)], ids=str)
def test_what_is_no_real_number_is_refused(strategy):
    with pytest.raises(TypeError, match=r"reduces real numbers, got torch\.complex64"):
        strategy.take(Value(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(TypeError, match="which uint64 can exceed"):
        strategy.take(Value(torch.ones(2).to(torch.uint64)))
    with pytest.raises(TypeError, match="reduces tensors and numbers, got str"):
        strategy.take(Value("x"))


@pytest.mark.parametrize(("dim", "shape"), [(0, ()), (2, (3, 3)), (-3, (3, 3))])
def test_a_dim_that_a_value_lacks_is_named(dim, shape):
    with pytest.raises(ValueError, match=rf"Mean\(dim={dim}\) expects samples along that dim, got a tensor"):
        Mean(dim=dim).take(Value(torch.ones(shape)))


# -- covariance ----------------------------------------------------------------------------------------------------


def far_from_zero(n: int, d: int, dtype=torch.float32):
    """Correlated values around 1e4: where sums of squares would cancel."""
    mixing = torch.eye(d, dtype=torch.float64) + 0.5 * seeded(d, d, seed=1, dtype=torch.float64)
    return (1e4 + seeded(n, d, dtype=torch.float64) @ mixing).to(dtype)


def off_by(found, truth):
    """The largest error, measured by the standard deviations that an entry joins."""
    scale = truth.diagonal().sqrt()
    return float(((found - truth).abs() / (scale[:, None] * scale)).max())


@pytest.mark.parametrize("split", [(5000,), (1, 4999), (1250,) * 4, (0, 3000, 0, 2000)], ids=str)
def test_a_covariance_far_from_zero_is_right_to_1e_6(split):
    x = far_from_zero(5000, 8)
    found = merged(Covariance(), *x.split(split))
    assert off_by(found["covariance"], torch.cov(x.double().T)) < 1e-6
    torch.testing.assert_close(found["mean"], x.double().mean(0), rtol=1e-9, atol=0)
    assert int(found["count"]) == 5000 and list(found) == ["count", "mean", "covariance"]
    about_zero = merged(Covariance(center=False), *x.split(split))
    torch.testing.assert_close(about_zero["second_moment"], x.double().T @ x.double() / 5000, rtol=1e-6, atol=0)
    assert list(about_zero) == ["count", "second_moment"]


def test_a_covariance_from_float32_sums_of_squares_would_have_cancelled():
    x = far_from_zero(5000, 8)
    naive = x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
    assert off_by(naive.double(), torch.cov(x.double().T)) > 1


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("correction", [0, 1])
def test_a_covariance_of_any_dtype_is_torchs_in_float64(dtype, correction):
    x = seeded(300, 5, dtype=torch.float32).to(dtype) if dtype.itemsize == 1 else seeded(300, 5, dtype=dtype)
    found = merged(Covariance(correction=correction), x[:7], x[7:])
    assert off_by(found["covariance"], torch.cov(x.double().T, correction=correction)) < 1e-6


def test_a_weighted_covariance_is_that_of_repeated_samples():
    x, times = far_from_zero(6, 3), torch.tensor([3, 1, 2, 0, 5, 1])
    repeated = x.repeat_interleave(times, 0).double()
    strategy = Covariance()
    states = [strategy.take(Value(x[part], rows=True, weight=times[part])) for part in (slice(2), slice(2, 6))]
    found = strategy.finalize(strategy.combine(*states))
    assert off_by(found["covariance"], torch.cov(repeated.T)) < 1e-6 and int(found["count"]) == 5
    torch.testing.assert_close(found["mean"], repeated.mean(0))


def test_a_covariance_of_few_samples_is_nan_where_torch_divides_by_0():
    one, none = merged(Covariance(), torch.ones(1, 2)), merged(Covariance(), torch.ones(0, 2))
    assert one["covariance"].isnan().all() and one["mean"].tolist() == [1, 1]
    assert none["mean"].isnan().all() and int(none["count"]) == 0
    assert merged(Covariance(correction=0), torch.ones(1, 2))["covariance"].eq(0).all()


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64], ids=str)
def test_a_covariance_is_kept_in_the_dtype_that_was_asked_for(accumulate):
    x, strategy = far_from_zero(400, 4), Covariance(accumulate=accumulate)
    a, b = (strategy.take(Value(part, rows=True)) for part in (x[:100], x[100:]))
    both = strategy.combine(a, b)
    assert {both[name].dtype for name in ("total", "m2")} == {accumulate}
    assert off_by(strategy.finalize(both)["covariance"].double(), torch.cov(x.double().T)) < 1e-3


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that anything made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_a_covariance_never_holds_a_matrix_for_each_sample():
    x, strategy = seeded(3000, 64), Covariance()
    with Largest() as largest:
        strategy.fold_(strategy.take(Value(x, rows=True)), strategy.take(Value(x, rows=True)))
    assert largest.numel == x.numel()
    with Largest() as largest:
        torch.einsum("nd,ne->nde", x[:100], x[:100])
    assert largest.numel > x.numel()  # the count can tell


def test_a_covariance_is_exact_where_a_model_multiplies_in_less():
    x = far_from_zero(500, 16)
    expected, before = merged(Covariance(), x)["covariance"], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (x.T @ x).dtype == torch.bfloat16
            assert torch.equal(merged(Covariance(), x)["covariance"], expected)
        with full_float32(torch.device("cpu")):
            inside = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
            assert inside == "ieee" if inside else torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_has_no_covariance_is_refused():
    for shape in ((), (2, 3)):
        with pytest.raises(ValueError, match=r"expects samples that are vectors, \[D\] each, got \[.*flatten them"):
            Covariance().take(Value(torch.ones(shape)))
    with pytest.raises(ValueError, match=r"got \[\]"):
        Covariance().take_slab(Value(torch.ones(5, 3), rows=True))
    with pytest.raises(TypeError, match="takes one weight per sample"):
        Covariance(dim=0).take(Value(Weighted(torch.ones(2, 3), torch.ones(2, 3))))
    with pytest.raises(SchemaMismatch, match=r"total has shape \(2,\) in one state and \(3,\) in the other"):
        Covariance().combine(*(Covariance().take(Value(torch.ones(d))) for d in (2, 3)))


# -- histograms ----------------------------------------------------------------------------------------------------

GRID = st.integers(-30, 30).map(lambda i: i / 10)  # on edges and between them
VALUES = st.one_of(GRID, st.floats(-4, 4, width=32), st.sampled_from([math.inf, -math.inf, math.nan, 1e30, -0.0]))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(VALUES, min_size=1, max_size=20),
    bins=st.sampled_from([1, 2, 3, 7, 10, 40, 1000]),
    ends=st.sampled_from([(-1.0, 1.0), (0.0, 0.3), (-3.0, -0.1), (0.1, 2.3), (-2.7, 2.1)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_histogram_has_torchs_bins_and_counts_all_else_apart(values, bins, ends, dtype):
    x, (low, high) = torch.tensor(values, dtype=dtype), ends
    exact = x if dtype == torch.float64 else x.float()
    low_x, high_x = torch.tensor(ends, dtype=exact.dtype)
    inside = exact[(exact >= low_x) & (exact <= high_x)]
    counts, edges = torch.histogram(inside, bins, range=ends)
    found = merged(Histogram(bins, low, high), x[:3], x[3:])
    assert found["counts"].tolist() == counts.tolist() and found["counts"].dtype == torch.int64
    assert int(found["below"]) == int((exact < low_x).sum()) and int(found["above"]) == int((exact > high_x).sum())
    assert int(found["nan"]) == int(exact.isnan().sum())
    torch.testing.assert_close(found["edges"], edges.double(), rtol=0, atol=3 * torch.finfo(exact.dtype).eps)


def test_bins_that_own_their_right_edges_would_be_told_apart():
    x = torch.tensor([0.0, 0.5, 0.5, 1.0])
    assert merged(Histogram(2, 0, 1), x)["counts"].tolist() == torch.histc(x, 2, 0, 1).tolist() == [1, 3]
    assert (torch.bucketize(x, torch.tensor([0.0, 0.5, 1.0])) - 1).clamp(min=0).bincount().tolist() == [3, 1]


def test_a_histogram_for_each_element_or_key_is_that_of_its_values():
    x_nkd = seeded(40, 3, 2)
    each = merged(Histogram(6, -1, 1, per_element=True), x_nkd[:9], x_nkd[9:])
    assert each["counts"].shape == (3, 2, 6) and each["below"].shape == (3, 2) and each["edges"].shape == (7,)
    for k in range(3):
        for d in range(2):
            assert each["counts"][k, d].tolist() == torch.histc(x_nkd[:, k, d], 6, -1, 1).tolist()
    for strategy in (Histogram(6, -1, 1), Histogram(6, -1, 1, per_element=True)):
        slab = strategy.take_slab(Value(x_nkd, rows=True))
        for k in range(3):
            alone = strategy.finalize(strategy.take(Value(x_nkd[:, k], rows=True)))
            found = strategy.finalize({name: tensor[k] for name, tensor in slab.items()})
            assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_histogram_of_integers_is_exact_beyond_what_float32_can_tell_apart():
    x = torch.tensor([2**24, 2**24 + 1, 2**24 + 2])
    assert merged(Histogram(2, 2**24, 2**24 + 2), x)["counts"].tolist() == [1, 2]
    ones = torch.ones(3, dtype=torch.bool)
    assert merged(Histogram(2, 0, 1), ones, ~ones)["counts"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ((0, 0, 1), "bins=1 or more of them, got 0"),
        ((2.0, 0, 1), "bins=1 or more of them, got 2.0"),
        ((True, 0, 1), "bins=1 or more of them, got True"),
        ((3, 1, 1), "from low to a larger high, got low=1.0, high=1.0"),
        ((3, 2, 1), "from low to a larger high"),
        ((3, 0, math.inf), "from low to a larger high"),
        ((3, math.nan, 1), "from low to a larger high"),
        ((3, "a", 1), "low is a number, got 'a'"),
        ((3, 0, None), "high is a number, got None"),
        ((3, 1e17, 1e17 + 64), "too narrow for torch.float64"),
    ],
)
def test_a_histogram_that_cannot_be_is_refused_when_it_is_made(parameters, words):
    with pytest.raises(ValueError, match=words):
        Histogram(*parameters)


def test_bins_too_narrow_for_float32_are_refused_where_such_values_come():
    narrow = Histogram(1000, 1e4, 1e4 + 1)
    assert merged(narrow, torch.tensor([1e4], dtype=torch.float64))["counts"].sum() == 1
    with pytest.raises(ValueError, match=r"bins narrower than 1\.9e-02, too narrow for torch\.float32: take fewer"):
        narrow.take(Value(torch.tensor([1e4])))
    with pytest.raises(TypeError, match="takes no weights"):
        narrow.take(Value(torch.ones(1), weight=torch.ones(())))


def test_the_same_bins_are_the_same_strategy_however_they_are_written():
    assert Histogram(3, 0, 1) == Histogram(3, 0.0, 1.0)
    assert describe(Histogram(3, 0, 1)) == describe(Histogram(3, 0.0, 1.0))
    assert [type(p) for p in describe(Histogram(3, 0, True))["parameters"].values()] == [int, float, float, bool, str]


# -- the k best ----------------------------------------------------------------------------------------------------


def bits(x):
    return x.shape, torch.empty(x.numel(), dtype=x.dtype).copy_(x.flatten()).view(torch.uint8).tolist()


def best(x, sample, position, k, largest=True):
    """The specification, for values [n]: [(value, sample, position)], by plain sorting."""

    def rank(row):
        value, s, p = row
        return (not math.isnan(value), 0 if math.isnan(value) else -value if largest else value, s, p)

    return sorted(zip(x.tolist(), sample.tolist(), position.tolist(), strict=True), key=rank)[:k]


TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan])


@settings(max_examples=120, deadline=None)
@given(
    values=st.lists(st.tuples(TIED, TIED), min_size=1, max_size=14),
    k=st.integers(1, 6),
    largest=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64]),
    data=st.data(),
)
def test_the_k_best_are_those_of_plain_sorting_however_rows_are_dealt(values, k, largest, dtype, data):
    x = torch.tensor(values, dtype=torch.float64)
    x = (x if dtype.is_floating_point else x.nan_to_num(3, 100, -100)).to(dtype)
    n, strategy = len(x), TopK(k, largest)
    sample, position = torch.arange(n) // 3, torch.arange(n) % 3
    shuffled = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    states = []
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        rows = shuffled[start:stop]
        columns = Columns({"sample": sample[rows], "position": position[rows]}, True)
        states.append(strategy.take(Value(x[rows], rows=True, columns=columns)))
    state = states[0]
    for other in states[1:]:
        state = strategy.combine(state, other)
    found = strategy.finalize(state)
    for d in range(2):
        expected = best(x[:, d].double(), sample, position, k, largest)
        assert found["sample"][:, d].tolist() == [s for _, s, _ in expected] + [-1] * (k - len(expected))
        assert found["position"][:, d].tolist() == [p for _, _, p in expected] + [-1] * (k - len(expected))
        rows = [3 * s + p for _, s, p in expected]
        given = x[rows, d].to(found["values"].dtype)
        assert bits(found["values"][: len(rows), d]) == bits(given)  # -0.0 too
        assert not dtype.is_floating_point or found["values"][len(rows) :, d].isnan().all()
    assert int(state["count"]) == n


def test_ties_that_go_to_the_first_to_come_are_told_apart_by_that_oracle():
    x, numbers = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.arange(4)
    expected = [s for _, s, _ in best(x, numbers, numbers * 0, 2)]
    for cls, right in ((TopK, True), (TiesToTheFirstToCome, False)):
        late, early = (cls(2).take(Value(x[rows], rows=True, columns=indexed(*rows))) for rows in ([2, 3], [0, 1]))
        assert (cls(2).combine(late, early)["sample"].tolist() == expected) is right


def test_the_best_of_rectified_values_are_the_lowest_samples_of_the_many_that_are_0():
    x = seeded(2000, 4).sub(3).relu()  # a handful is above 0
    columns = Columns({"sample": torch.arange(2000).flip(0), "position": torch.zeros(2000, dtype=torch.int64)}, True)
    found = TopK(8).finalize(TopK(8).take(Value(x, rows=True, columns=columns)))
    for d in range(4):
        expected = best(x[:, d], columns.by_name["sample"], columns.by_name["position"], 8)
        assert found["sample"][:, d].tolist() == [s for _, s, _ in expected]


def test_the_best_of_several_keys_at_once_are_those_of_each():
    x_nkd, strategy = seeded(9, 3, 2), TopK(4)
    columns = Columns({"sample": torch.arange(9) // 2, "position": torch.arange(9) % 2}, True)
    slab = strategy.take_slab(Value(x_nkd, rows=True, columns=columns))
    twice = {name: tensor.contiguous().clone() for name, tensor in slab.items()}
    strategy.fold_(twice, {name: tensor.contiguous() for name, tensor in slab.items()})
    for k in range(3):
        alone = strategy.take(Value(x_nkd[:, k], rows=True, columns=columns))
        for name in alone:
            assert torch.equal(slab[name][k], alone[name])
        both = strategy.combine(alone, alone)
        assert all(torch.equal(twice[name][k], both[name]) for name in both)


def test_values_whose_sample_nobody_knows_have_no_place_among_the_best():
    plain = Columns({"sample": torch.arange(2), "position": torch.zeros(2, dtype=torch.int64)}, False)
    for columns in (None, plain):
        with pytest.raises(TypeError, match=r"need an index: dc\.record\(model, sites, index=index\), or"):
            TopK(2).take(Value(torch.ones(2), rows=True, columns=columns))
    with pytest.raises(ValueError, match="expects one index per sample, got 2 for 3 samples"):
        TopK(2, dim=0).take(Value(torch.ones(3), columns=indexed(0, 1)))
    with pytest.raises(TypeError, match="TopK takes no weights"):
        TopK(2).take(Value(Weighted(torch.ones(1), 2.0), columns=indexed(0)))
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"TopK keeps k=1 or more values, got {k}"):
            TopK(k)


# -- ragged --------------------------------------------------------------------------------------------------------


def test_ragged_values_are_aligned_at_0_and_counted_per_element():
    strategy = Mean(ragged=True)
    state = strategy.combine(strategy.take(Value(torch.tensor([1.0, 2, 3]))), strategy.take(Value(torch.tensor([5.0]))))
    assert strategy.finalize(state).tolist() == [3, 2, 3] and state["count"].tolist() == [2, 1, 1]


def test_elements_that_no_sample_reached_read_nan_and_of_a_sum_0():
    tall, wide = torch.ones(2, 1), torch.ones(1, 2)
    for strategy, hole in ((Mean(ragged=True), math.nan), (Max(ragged=True), math.nan), (Sum(ragged=True), 0.0)):
        found = strategy.finalize(strategy.combine(strategy.take(Value(tall)), strategy.take(Value(wide))))
        torch.testing.assert_close(found[1, 1].item(), hole, equal_nan=True)
        assert found[0, 1] == found[1, 0] == 1


def test_only_the_named_dims_may_differ():
    strategy = Mean(ragged=(0,))
    state = strategy.combine(strategy.take(Value(torch.ones(2, 3))), strategy.take(Value(torch.ones(4, 3))))
    assert strategy.finalize(state).shape == (4, 3)
    with pytest.raises(SchemaMismatch, match=r"total has shape \(2, 3\) in one state and \(2, 4\) in the other"):
        strategy.combine(strategy.take(Value(torch.ones(2, 3))), strategy.take(Value(torch.ones(2, 4))))


@pytest.mark.parametrize("strategy", [Mean(), Sum(), Moments(), Max()], ids=str)
def test_samples_of_unlike_shapes_are_refused_and_the_fix_is_named(strategy):
    a, b = strategy.take(Value(torch.ones(2))), strategy.take(Value(torch.ones(1)))
    with pytest.raises(SchemaMismatch, match=rf"use {type(strategy).__name__}\(ragged=True\)"):
        strategy.combine(a, b)


def test_patterns_average_over_the_sequences_that_have_a_query():
    short, long = torch.tensor([[1.0]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    strategy = AveragePattern()
    state = strategy.combine(strategy.take(Value(short)), strategy.take(Value(long)))
    assert strategy.finalize(state).tolist() == [[0.75, 0.25], [0.25, 0.75]] and state["count"].tolist() == [[2], [1]]
    both = strategy.combine(*(strategy.take(Value(torch.stack([x, 2 * x]))) for x in (short, long)))  # of two heads
    found = strategy.finalize(both)
    assert torch.equal(found[0], strategy.finalize(state)) and torch.equal(found[1], 2 * found[0])
    with pytest.raises(ValueError, match=r"expects square patterns, \[S, S\] each, got \(2, 3\)"):
        strategy.take(Value(torch.ones(2, 3)))


# -- rows and lists ------------------------------------------------------------------------------------------------


def indexed(*samples, positions=None):
    sample = torch.tensor(samples)
    return Columns(
        {"sample": sample, "position": torch.tensor(positions) if positions else torch.zeros_like(sample)}, True
    )


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, torch.complex64, torch.uint64, torch.float8_e4m3fn], ids=str)
def test_rows_keep_every_bit_in_any_dtype(dtype):
    x = (
        torch.arange(4 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        if dtype != torch.bool
        else torch.ones(4, dtype=dtype)
    )
    found = merged(Cat(), x[:1], x[1:1], x[1:])
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), x.view(torch.uint8))


def test_rows_come_in_the_samples_order_each_once_by_position():
    strategy = Cat()
    a = strategy.take(Value(torch.tensor([3, 10, 11]), rows=True, columns=indexed(3, 1, 1, positions=[0, 0, 1])))
    b = strategy.take(Value(torch.tensor([3, 2]), rows=True, columns=indexed(3, 2)))
    both = strategy.combine(a, b)
    assert strategy.finalize(both).tolist() == [10, 11, 2, 3]
    assert both.columns()["sample"].tolist() == [1, 1, 2, 3] and both.columns()["position"].tolist() == [0, 1, 0, 0]
    assert strategy.finalize(both.together()).tolist() == [10, 11, 2, 3]


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_cat_and_stack_join_along_any_dim_as_torch_does(dim):
    parts = [seeded(2, 3, seed=i) for i in range(3)]
    for strategy, join in ((Cat(dim=dim), torch.cat), (Stack(dim=dim), torch.stack)):
        states = [strategy.take(Value(part)) for part in parts]
        state = strategy.combine(strategy.combine(states[0], states[1]), states[2])
        assert torch.equal(strategy.finalize(state), join(parts, dim=dim))


def test_a_dim_that_rows_cannot_have_is_named():
    with pytest.raises(ValueError, match=r"Cat\(dim=0\) expects tensors with that dim, got \(\): use Stack"):
        Cat().take(Value(torch.tensor(1.0)))
    with pytest.raises(ValueError, match=r"Cat\(dim=1\) cannot join recorded rows"):
        Cat(dim=1).take(Value(torch.ones(2, 2), rows=True))
    with pytest.raises(ValueError, match=r"Stack\(dim=3\) cannot place values of shape \(2,\)"):
        Stack(dim=3).take(Value(torch.ones(2)))


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(2, 4),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(0, 4),
        torch.ones(0),
        torch.ones(2, 3, device="meta"),
    ],
)
def test_rows_of_another_shape_dtype_or_device_are_refused_even_if_there_are_none(odd):
    a, b = Cat().take(Value(torch.ones(2, 3))), Cat().take(Value(odd))
    with pytest.raises(SchemaMismatch, match=r"expected rows of \(3,\) torch.float32 on cpu, got .*Give every value"):
        Cat().combine(a, b)


def test_rows_with_and_without_an_index_are_refused():
    for strategy, value in ((Cat(), torch.ones(1)), (Extend(), [1]), (First(), 1)):
        a, b = strategy.take(Value(value, columns=indexed(0))), strategy.take(Value(value))
        with pytest.raises(SchemaMismatch, match="either every cat has index= or none has"):
            strategy.combine(a, b)


def test_a_value_that_is_set_by_hand_is_copied_and_no_graph_is_kept():
    x = torch.ones(2, requires_grad=True)
    for strategy in (Cat(), Stack()):
        state = strategy.take(Value(x * 2))
        assert not state.pieces[0].value_n.requires_grad
    big = torch.zeros(1000)
    state = Cat().take(Value(big[:2]))
    big.fill_(7)
    assert Cat().finalize(state).tolist() == [0, 0]
    assert state.pieces[0].value_n.untyped_storage().nbytes() == 8


def test_rows_taken_in_inference_mode_can_be_trained_on_outside():
    with torch.inference_mode():
        state = Cat().combine(Cat().take(Value(torch.ones(1))), Cat().take(Value(torch.ones(1))))
        found = Cat().finalize(state)
    (found * torch.ones(2, requires_grad=True)).sum().backward()


def test_lists_are_chained_in_the_samples_order_and_not_shared_with_the_user():
    mine = ["b", "c"]
    a, b = Extend().take(Value(mine, columns=indexed(1, 2))), Extend().take(Value(["c", "a"], columns=indexed(2, 0)))
    mine.append("later")
    assert Extend().finalize(Extend().combine(a, b)) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="expects one entry per sample: got 1 entries for 2 samples"):
        Extend().take(Value(["x"], columns=indexed(1, 2)))
    with pytest.raises(TypeError, match="Extend expects lists, got int"):
        Extend().take(Value(3))


def test_first_is_the_lowest_index_or_the_first_to_come():
    a, b = First().take(Value("a", columns=indexed(5))), First().take(Value("b", columns=indexed(2)))
    assert First().finalize(First().combine(a, b)) == "b"
    assert First().finalize(First().combine(First().take(Value("a")), First().take(Value("b")))) == "a"


# -- the default ---------------------------------------------------------------------------------------------------


def test_the_default_concatenates_stacks_chains_or_keeps_the_first():
    assert default_aggregation([torch.tensor([1, 2]), torch.tensor([3, 4])]).tolist() == [1, 2, 3, 4]
    assert default_aggregation([torch.tensor(1), torch.tensor(2)]).tolist() == [1, 2]
    assert default_aggregation([[1], [2, 3]]) == [1, 2, 3]
    assert default_aggregation([(1,), (2,)]) == (1,) and default_aggregation([None, 3]) is None
    with pytest.raises(ValueError, match=r"cannot concatenate or stack tensors of shapes \[\(2, 3\), \(2, 4\)\]"):
        default_aggregation([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(TypeError, match="values of different kinds: Tensor, list"):
        default_aggregation([torch.ones(2), [1]])


SHAPES = st.lists(st.integers(0, 2), max_size=2).map(tuple)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, other=st.one_of(st.none(), SHAPES), num=st.integers(2, 4))
def test_the_default_strategy_says_what_the_default_function_says(shape, other, num):
    """Concatenation fails where stacking doesn't only for tensors without dims, so the first value decides."""
    values = [seeded(*shape, seed=i) for i in range(num - 1)] + [seeded(*(shape if other is None else other), seed=9)]
    cache = dc.ActivationCache()
    try:
        expected = default_aggregation(values)
    except ValueError:
        expected = None
    legacy = any(v.shape == (0,) for v in values) and len({v.dim() for v in values}) > 1
    try:
        for value in values:
            one = dc.ActivationCache()
            one["x"] = value
            cache.cat(one)
    except ValueError:
        # torch.cat lets an empty vector pass beside anything; rows without a shape would differ between ranks.
        assert expected is None or legacy
    else:
        assert torch.equal(cache["x"], expected)


# -- names ---------------------------------------------------------------------------------------------------------


NAMED = [*(strategy for strategy in CONFIGURED if not isinstance(strategy, Function)), Mean(ragged=(0, 2), size=(3, 4))]


@pytest.mark.parametrize("strategy", NAMED, ids=str)
def test_a_description_and_a_pickle_give_the_same_strategy_again(strategy):
    assert described(describe(strategy)) == strategy == pickle.loads(pickle.dumps(strategy))


def test_strategies_are_given_by_object_name_class_or_function():
    assert as_strategy("mean") == as_strategy(Mean) == as_strategy(Mean()) == Mean()
    assert as_strategy(torch.stack) == Function(torch.stack)
    with pytest.raises(ValueError, match="unknown strategy 'men': expected one of average_pattern, cat"):
        as_strategy("men")
    for strategy, call in (("topk", r"TopK\(k\)"), (Histogram, r"Histogram\(bins, low, high\)")):
        with pytest.raises(ValueError, match=f"needs its parameters: {call}"):
            as_strategy(strategy)
    with pytest.raises(TypeError, match="expected a strategy, its name or a function of a list, got int"):
        as_strategy(3)


def test_a_name_is_given_once_and_to_a_dataclass_of_one_of_the_three_kinds():
    register_strategy("range", Range)
    for name in ("mean", "function"):
        with pytest.raises(ValueError, match=f"the strategy name '{name}' is taken"):
            register_strategy(name, Range)
    with pytest.raises(TypeError, match="expected a subclass of Fieldwise, Rowwise or Listwise"):
        register_strategy("dict", dict)
    with pytest.raises(TypeError, match="must be a dataclass"):
        register_strategy("bare", type("Bare", (Listwise,), {}))
    with pytest.raises(ValueError, match=r"MeanOfMeans has no name: call dc\.register_strategy"):
        describe(MeanOfMeans())


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"name": "nope", "parameters": {}}, "unknown strategy 'nope'"),
        ({"name": "mean", "parameters": {"dims": 3}}, "the strategy 'mean' cannot be made of"),
        ({"name": "mean", "parameters": {"accumulate": {"dtype": "float31"}}}, "unknown dtype 'float31'"),
    ],
)
def test_a_description_of_what_is_not_there_is_refused(description, words):
    with pytest.raises(ValueError, match=words):
        described(description)


def test_states_of_several_keys_are_made_by_one_lift():
    x_nkd = seeded(5, 3, 2)
    for strategy in (Mean(), Moments(), Max(ragged=True), Range(), Covariance(), Covariance(center=False)):
        slab = strategy.take_slab(Value(x_nkd, rows=True))
        for k in range(3):
            alone = strategy.finalize(strategy.take(Value(x_nkd[:, k], rows=True)))
            found = strategy.finalize({name: tensor[k] for name, tensor in slab.items()})
            torch.testing.assert_close(found, alone)


def test_rows_of_no_piece_are_still_of_some_shape():
    state = Rows([*Cat().take(Value(torch.ones(0, 3))).pieces, *Cat().take(Value(torch.ones(0, 3))).pieces])
    assert Cat().finalize(state).shape == (0, 3) and state.indexed is None and state.num_rows == 0


# -- on ranks ------------------------------------------------------------------------------------------------------

REDUCE = {
    "best": TopK(4),
    "least": TopK(2, largest=False),
    "cov": Covariance(),
    "second": Covariance(center=False),
    "hist": Histogram(8, -2, 2),
    "each": Histogram(4, -2, 2, per_element=True),
    "rows": Cat(),
}


def record_texts(rank, world_size, deal, dst=None):
    """Texts by rank, each in a pass of its own, so that activations are the same in every bit however they're dealt."""
    model = build("llama", head=False)
    cache = dc.DistributedCache(timeout_s=20, dst=dst, bucket_bytes=1000)
    sites = [dc.Site("resid_out", reduce=REDUCE), dc.Site("head_keys", layers=[1], reduce=REDUCE)]
    for block in (deal[rank][::2], deal[rank][1::2]):
        with cache.deferred_mode(), torch.no_grad():
            for i in block:
                with dc.record(model, sites, into=cache, index=[10 - i]):
                    model(input_ids=texts((6, 3, 1, 5, 4, 2))[i][None])
    if dst not in (None, rank):
        with pytest.raises(dc.HeldElsewhere):
            cache["resid_out_0_best"]
        return None
    return {key: (cache.rows(key), cache[key]) if key.endswith("_rows") else cache[key] for key in cache}


def check_alike(found, expected):
    """In every bit, but for sums of floats, which are right to 1e-6."""
    assert found.keys() == expected.keys() and len(found) == len(REDUCE) * (2 + 2)
    for key, value in expected.items():
        for name, x in value.items() if isinstance(value, dict) else ():
            if name in ("mean", "covariance", "second_moment"):
                torch.testing.assert_close(found[key][name], x, rtol=0, atol=1e-6 * float(x.abs().max()))
            else:
                assert bits(found[key][name]) == bits(x), (key, name)


@pytest.fixture(scope="module")
def recorded_alone(ranks):
    (alone,) = ranks.run(1, record_texts, [list(range(6))])
    return alone


def test_recorded_rows_are_reduced_as_plain_torch_reduces_all_of_them(recorded_alone):
    for key in [key for key in recorded_alone if key.endswith("_rows")]:
        site, (columns, x) = key.removesuffix("_rows"), recorded_alone[key]
        for name, k, largest in (("best", 4, True), ("least", 2, False)):
            found = recorded_alone[f"{site}_{name}"]
            for d in range(x.shape[1]):
                expected = best(x[:, d], columns["sample"], columns["position"], k, largest)
                rows = zip(*(found[part][:, d].tolist() for part in ("values", "sample", "position")), strict=True)
                assert list(rows) == expected
        assert off_by(recorded_alone[f"{site}_cov"]["covariance"].double(), torch.cov(x.double().T)) < 1e-6
        assert recorded_alone[f"{site}_hist"]["counts"].tolist() == torch.histc(x, 8, -2, 2).tolist()
        assert recorded_alone[f"{site}_each"]["counts"].sum(0).tolist() == torch.histc(x, 4, -2, 2).tolist()


@pytest.mark.parametrize("deal", [[[0, 1, 2, 3, 4], [5]], [[5, 2], [], [4, 0, 3, 1]]], ids=len)
def test_recorded_rows_are_reduced_over_ranks_as_on_one(ranks, recorded_alone, deal):
    results = ranks.run(len(deal), record_texts, deal)
    for found in results:
        check_alike(found, recorded_alone)
        for key in (key for key in found if key.endswith("_cov")):
            assert bits(found[key]["covariance"]) == bits(results[0][key]["covariance"])


@pytest.mark.parametrize("dst", [0, 1, 2])
def test_one_rank_alone_can_hold_them(ranks, recorded_alone, dst):
    check_alike(ranks.run(3, record_texts, [[5, 2], [], [4, 0, 3, 1]], dst)[dst], recorded_alone)


def hand_value(rank, turn):
    return seeded(5, seed=rank + 10 * turn)


def merge_hand_values(rank, world_size, keys_by_rank):
    cache = dc.DistributedCache(timeout_s=20)
    for pattern, strategy in (("top", TopK(3)), ("far", "longest"), ("cov", Covariance()), ("mean", "mean")):
        cache.register_aggregation(pattern, strategy)
    for turn in range(2):
        local = dc.ActivationCache()
        for key in keys_by_rank[rank]:
            local[key] = hand_value(rank, turn)
        cache.cat(local, index=[2 * rank + turn])
    return {key: cache[key] for key in cache}, {key: int(cache.count(key)) for key in cache}


ORDERS = [["top", "far", "cov", "mean", "top_1"], ["mean", "cov", "top", "far"], ["far", "top", "top_2"]]


@pytest.mark.parametrize("keys_by_rank", [ORDERS[:2], ORDERS, [*ORDERS[:2], [], ORDERS[2], ORDERS[0]]], ids=len)
def test_states_that_combine_as_a_whole_merge_whoever_holds_them_in_whatever_order(ranks, keys_by_rank):
    results = ranks.run(len(keys_by_rank), merge_hand_values, keys_by_rank)
    found, counts = results[0]
    for key in {key for keys in keys_by_rank for key in keys}:
        holders = [rank for rank, keys in enumerate(keys_by_rank) if key in keys]
        by_sample = {2 * rank + turn: hand_value(rank, turn) for rank in holders for turn in range(2)}
        x, sample = torch.stack(list(by_sample.values())), torch.tensor(list(by_sample))
        assert counts[key] == len(x)
        if key.startswith("top"):
            for d in range(5):
                expected = best(x[:, d], sample, sample * 0, 3)
                assert found[key]["sample"][: len(expected), d].tolist() == [s for _, s, _ in expected]
                assert found[key]["values"][: len(expected), d].tolist() == [v for v, _, _ in expected]
                assert found[key]["sample"][len(expected) :, d].eq(-1).all()
        elif key == "far":
            assert torch.equal(found[key], x[x.norm(dim=1).argmax()].half().float())
        elif key == "cov":
            assert off_by(found[key]["covariance"].double(), torch.cov(x.double().T)) < 1e-6
    for other, _ in results[1:]:
        for key in found:
            mine, theirs = (v if isinstance(v, dict) else {"": v} for v in (found[key], other[key]))
            assert all(bits(theirs[name]) == bits(mine[name]) for name in mine)


def count_transfers(rank, world_size, num_keys):
    """How many collectives a merge of that many keys takes on this rank."""
    cache = dc.DistributedCache(timeout_s=20)
    cache.register_aggregation("top", TopK(2))
    counted, run = [], cache._comm.run

    def counting(transfers, poll):
        counted.extend(t for t in transfers if t.to is None or rank in (t.root, t.to))
        run(transfers, poll)

    local = dc.ActivationCache()
    local.update({f"top_{i}": torch.full((3,), float(i)) for i in range(num_keys)})
    with cache.deferred_mode():
        cache.cat(local, index=[rank])
    with mock.patch.object(cache._comm, "run", counting), cache.deferred_mode():  # nobody needs a schema any more
        cache.cat(local, index=[world_size + rank])
    assert cache[f"top_{num_keys - 1}"]["sample"].tolist() == [[0] * 3, [1] * 3]
    return sum(t.op == "copy" and t.buffer.numel() > 0 for t in counted)


@pytest.mark.parametrize(("world_size", "received"), [(2, [1, 0]), (3, [2, 0, 0]), (4, [2, 0, 1, 0])])
def test_merging_the_best_takes_a_tree_of_sends_however_many_keys_there_are(ranks, world_size, received):
    few, many = (ranks.run(world_size, count_transfers, num_keys) for num_keys in (1, 150))
    blobs = few[0] - 4 * (received[0] + 1)  # which tell of the ledger, from each rank
    assert 0 <= blobs <= world_size
    segments = 4  # values, samples, positions, counts
    assert few == many == [segments * (n + (rank > 0) + 1) + blobs for rank, n in enumerate(received)]


def test_a_saved_cache_goes_on_with_the_new_strategies(tmp_path):
    x, strategies = seeded(6, 4), {"top": TopK(2), "cov": Covariance(), "hist": Histogram(4, -1, 1), "far": Longest()}
    whole, part = dc.ActivationCache(), dc.ActivationCache()
    for cache in (whole, part):
        for key, strategy in strategies.items():
            cache.register_aggregation(key, strategy)
            for i in range(6 if cache is whole else 3):
                cache.add(key, x[i], index=[i])
    part.save(tmp_path / "part")
    again = dc.load(tmp_path / "part")
    for key in strategies:
        for i in range(3, 6):
            again.add(key, x[i], index=[i])
    for found in (again, pickle.loads(pickle.dumps(again)), again.to("cpu")):
        for key in strategies:
            torch.testing.assert_close(found[key], whole[key], rtol=0, atol=1e-6, equal_nan=True)
    explained = {key: one.collective for key, one in again.explain().items()}
    assert explained == {
        "top": "sends along a tree", "cov": "all_reduce", "hist": "all_reduce", "far": "sends along a tree"
    }  # fmt: skip


def test_rows_recorded_without_an_index_get_it_where_they_are_merged_and_else_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    x = seeded(4, 3)
    refused = pytest.raises(dc.SiteError, match=r"site '0': TopK names the samples .* dc\.record\(")
    with refused, torch.no_grad(), dc.record(model, dc.Site("0", reduce=TopK(2))):
        model(x)
    found = []
    for cache in (dc.DistributedCache(), dc.DistributedCache()):
        cache.register_aggregation("0", TopK(2))
        with torch.no_grad(), dc.record(model, ["0"]) as local:
            model(x)
        if found:
            with pytest.raises(TypeError, match="cannot merge '0': TopK names the samples of its values"):
                cache.cat(local)
        cache.cat(local, index=[7, 5, 6, 4])
        found.append(cache["0"])
    columns = indexed(7, 5, 6, 4)
    for d in range(2):
        expected = best(model(x)[:, d].detach(), columns.by_name["sample"], columns.by_name["position"], 2)
        assert found[0]["sample"][:, d].tolist() == found[1]["sample"][:, d].tolist() == [s for _, s, _ in expected]


def lose_a_rank_in_the_tree(rank, world_size):
    cache = dc.DistributedCache(timeout_s=3)
    cache.register_aggregation("top", TopK(2))
    if rank == 1:
        mock.patch.object(merging, "_copies", side_effect=lambda *_, **__: kill_self()).start()
    frozen = []

    def add_and_merge():
        with cache.deferred_mode():
            cache.add("top", torch.ones(3), index=[rank])
            frozen.append(pickle.dumps(cache._held.delta))

    with pytest.raises(dc.PeerFailed):
        add_and_merge()
    assert len(cache) == 0
    return pickle.dumps(cache._held.delta) == frozen[0]


def test_a_rank_that_is_lost_in_the_tree_costs_no_other_its_delta(ranks):
    outcomes = ranks.outcomes(4, lose_a_rank_in_the_tree)
    assert [outcome.died for outcome in outcomes] == [False, True, False, False]
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert [outcome.value for outcome in outcomes] == [True, None, True, True]
