"""Grouped: every cell says what plain torch says of the rows that a mask picks, however they came."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from tiny import build, padded, texts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distcache as dc
from distcache import segments
from distcache.errors import BadCache, SchemaMismatch, SiteError
from distcache.schema import strategy_facts, strategy_words
from distcache.strategies import (
    MAX,
    SUM,
    Columns,
    Field,
    Fieldwise,
    Value,
    describe,
    described,
    register_strategy,
)
from distcache.testing import check_strategy_laws, splits

X = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
LABEL = torch.tensor([0, 2, -1, 2, 0, 4, 2, 0, -1, 4, 0])
SIZE = 6  # cells 1, 3 and 5 stay empty
COUNT = [4, 0, 3, 0, 2, 0]
WEIGHT = torch.tensor([1.0, 2, 9, 0.5, 0, 3, 1, 1, 9, 1, 2], dtype=torch.float64)


# -- the specification: what plain torch says of the rows of one cell, [n, d] in float64 ---------------------------


def ratio(total, n):
    return total / torch.tensor(float(max(n, 0)))  # 0 / 0 is NaN


def moments(x):
    variance = ratio(((x - x.mean(0)) ** 2).sum(0), len(x) - 1)
    return {"count": torch.tensor(len(x)), "mean": x.mean(0), "variance": variance, "std": variance.sqrt()}


def covariance(x):
    off = x - x.mean(0)
    return {"count": torch.tensor(len(x)), "mean": x.mean(0), "covariance": ratio(off.T @ off, len(x) - 1)}


def histogram(x):
    counts = torch.histogram(x.flatten(), 4, range=(-1, 1)).hist.long()
    return {"counts": counts, "below": (x < -1).sum(), "above": (x > 1).sum()}


def extreme(reduce):
    return lambda x: reduce(x, 0) if len(x) else torch.full(x.shape[1:], torch.nan)


SPEC = {
    "sum": (dc.Sum(dim=0), lambda x: x.sum(0)),
    "mean": (dc.Mean(dim=0), lambda x: x.mean(0)),
    "moments": (dc.Moments(dim=0), moments),
    "max": (dc.Max(dim=0), extreme(torch.amax)),
    "min": (dc.Min(dim=0), extreme(torch.amin)),
    "covariance": (dc.Covariance(dim=0), covariance),
    "second_moment": (
        dc.Covariance(dim=0, center=False),
        lambda x: {"count": torch.tensor(len(x)), "second_moment": ratio(x.T @ x, len(x))},
    ),
    "histogram": (dc.Histogram(4, -1, 1, dim=0), histogram),
}


def by_mask(oracle, x, label, size=SIZE):
    """What an oracle says of each cell's rows, side by side [size, …]."""
    cells = [oracle(x.double()[label == cell]) for cell in range(size)]
    if isinstance(cells[0], dict):
        return {name: torch.stack([cell[name] for cell in cells]) for name in cells[0]}
    return torch.stack(cells)


def close(found, expected) -> bool:
    """Within 1e-6 of the mean of |x|, NaN in the same places; of a dict what the oracle speaks of."""
    if isinstance(expected, dict):
        return all(close(found[name], expected[name]) for name in expected)
    limit = 1e-6 * max(1.0, float(X.abs().mean()))
    return found.shape == expected.shape and torch.allclose(found.double(), expected.double(), 0, limit, True)


def same(a, b) -> bool:
    """Equal in every bit that counts, NaN in the same places."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def grouped(name, size=SIZE):
    return dc.Grouped(SPEC[name][0], size, by="label")


def holding(strategy, *batches, **more):
    """A cache that was given batches of (values [n, …], labels [n]) one after the other."""
    cache = dc.ActivationCache()
    cache.register_aggregation("k", strategy)
    for x, label in batches:
        cache.add("k", x, label=label, **more)
    return cache


HALVES = ((X[:4], LABEL[:4]), (X[4:], LABEL[4:]))


@pytest.mark.parametrize("name", SPEC)
def test_every_cell_reads_as_plain_torch_says_of_the_rows_that_a_mask_picks(name):
    cache = holding(grouped(name), *HALVES)
    assert close(cache["k"], by_mask(SPEC[name][1], X, LABEL))
    count = cache.count("k")
    assert count.dtype == torch.int64 and count.tolist() == COUNT


def test_the_oracle_fails_on_a_skipped_row_that_wraps_around_and_on_a_mean_of_means():
    oracle = SPEC["mean"][1]
    truth, means = by_mask(oracle, X, LABEL), [by_mask(oracle, x, label) for x, label in HALVES]
    assert not close(by_mask(oracle, X, LABEL % SIZE), truth)
    assert not close(torch.stack(means).nanmean(0), truth)


def test_empty_cells_read_as_nan_or_a_sum_of_0_and_have_a_count_of_0():
    for name in ("mean", "max", "min"):
        assert holding(grouped(name), *HALVES)["k"][[1, 3, 5]].isnan().all()
    assert holding(grouped("sum"), *HALVES)["k"][[1, 3, 5]].tolist() == [[0.0] * 3] * 3
    nobody = holding(grouped("mean"), (X[:2], torch.tensor([-1, -1])))
    assert nobody["k"].shape == (SIZE, 3) and nobody["k"].isnan().all() and nobody.count("k").tolist() == [0] * SIZE


def test_integers_keep_their_results_dtypes_in_every_cell():
    x, label = torch.tensor([[2**40 + 1], [5], [-7]]), torch.tensor([1, 1, 0])
    said = {name: holding(grouped(name, 3), (x, label))["k"] for name in ("sum", "max", "mean")}
    assert said["sum"].tolist() == [[-7], [2**40 + 6], [0]] and said["sum"].dtype == torch.int64
    assert said["max"][:2].tolist() == [[-7], [2**40 + 1]] and said["max"].dtype == torch.int64
    assert said["mean"].dtype == torch.float32


@pytest.mark.parametrize("per", ["sample", "element"])
def test_weights_weigh_within_each_cell(per):
    weight = WEIGHT if per == "sample" else torch.stack([WEIGHT, WEIGHT + 1, WEIGHT.flip(0)], 1)
    w = weight.double().reshape(11, -1).expand(11, 3)
    x = X.double()
    total = torch.stack([(x * w)[c == LABEL].sum(0) for c in range(SIZE)])
    mass = torch.stack([w[c == LABEL].sum(0) for c in range(SIZE)])
    for name, expected in (("sum", total), ("mean", total / mass)):
        cache = dc.ActivationCache()
        cache.register_aggregation("k", grouped(name))
        for rows in (slice(0, 4), slice(4, 11)):
            cache.add("k", X[rows], weight=weight[rows], label=LABEL[rows])
        assert close(cache["k"], expected)
        assert torch.equal(cache.count("k"), torch.stack([(weight != 0)[c == LABEL].sum(0) for c in range(SIZE)]))
    cache = holding(grouped("moments"), (X, LABEL), weight=weight)
    second = torch.stack([(w * (x - (total / mass)[c]) ** 2)[c == LABEL].sum(0) for c in range(SIZE)])
    assert close(cache["k"]["variance"], second / (mass - 1).clamp_min(0))


def test_nan_and_infinity_stay_in_their_own_cells():
    x = torch.tensor([[1.0], [torch.nan], [2.0], [-torch.inf], [torch.nan], [3.0]])
    label = torch.tensor([0, 1, 1, 2, 1, 0])
    for reversed_ in (False, True):  # NaN first and NaN last
        batch = (x.flip(0), label.flip(0)) if reversed_ else (x, label)
        assert same(
            holding(grouped("max", 4), batch)["k"], torch.tensor([[3.0], [torch.nan], [-torch.inf], [torch.nan]])
        )
        assert same(
            holding(grouped("min", 4), batch)["k"], torch.tensor([[1.0], [torch.nan], [-torch.inf], [torch.nan]])
        )
        one_by_one = [(row[None], at[None]) for row, at in zip(*batch, strict=True)]
        assert holding(grouped("max", 4), *one_by_one)["k"][:, 0].isnan().tolist() == [False, True, False, True]
        assert holding(grouped("mean", 4), batch)["k"][0].tolist() == [2.0]


def test_a_mean_of_many_rows_of_one_cell_is_right_to_1e_6():
    """Half of 40,000 rows: one after the other in float32 they would be off by more."""
    x = torch.full((40_000, 1), 0.1)
    found = holding(grouped("mean", 2), (x, torch.arange(40_000) % 2))["k"]
    tenth = float(x[0].double())
    assert (found - tenth).abs().max() < 1e-6 * tenth
    total = torch.zeros(1)
    for row in x[:20_000]:
        total += row
    assert (total / 20_000 - tenth).abs() > 1e-6 * tenth


def test_variances_of_values_far_from_zero_do_not_cancel():
    x = (1e4 + X.double().repeat(50, 1)).float()
    label = LABEL.repeat(50)
    cache = holding(grouped("moments"), (x[:200], label[:200]), (x[200:], label[200:]))
    truth = by_mask(moments, x, label)["variance"]
    torch.testing.assert_close(cache["k"]["variance"].double(), truth, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SPEC)
def test_a_cell_has_the_same_bits_whatever_other_cells_came_with_it(name):
    together = holding(grouped(name), *HALVES)["k"]
    for cell in (0, 2, 4):
        own = [(x[label == cell], label[label == cell]) for x, label in HALVES]
        alone = holding(grouped(name), *own)["k"]
        pick = (
            {n: t[cell] for n, t in together.items() if n != "edges"} if isinstance(together, dict) else together[cell]
        )
        assert same(pick, {n: alone[n][cell] for n in pick} if isinstance(alone, dict) else alone[cell])


# -- the laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sum", "mean", "moments", "covariance"])
def test_weighted_samples_keep_the_laws_in_cells(name):
    inner = type(SPEC[name][0])()
    check_strategy_laws(dc.Grouped(inner, 3, by="label"), list(X), WEIGHT + 0.5)


@dataclass(frozen=True, slots=True)
class Middle(Fieldwise):
    """A user's strategy: the middle between 0 and the mean; `finalize` is right for one key at a time alone."""

    dim: int | str = "auto"

    groupable = True
    ragged, size, accumulate = False, None, None
    fields = (Field("total", SUM), Field("count", SUM))

    def lift(self, value_n, weight_n=None):
        return {"total": value_n.double().sum(0), "count": torch.tensor(len(value_n))}

    def finalize(self, state):
        return state["total"] / state["count"] / 2


@dataclass(frozen=True, slots=True)
class Reach(Fieldwise):
    """A user's strategy that reads many keys at once: the largest |x|."""

    dim: int | str = "auto"

    groupable = True
    ragged, size, accumulate = False, None, None
    fields = (Field("reach", MAX), Field("count", SUM))

    def lift(self, value_n, weight_n=None):
        reach = value_n.double().abs()
        best = reach.amax(0) if len(reach) else reach.new_full(reach.shape[1:], -torch.inf)
        return {"reach": best, "count": torch.tensor(len(value_n))}

    def finalize(self, state):
        return state["reach"]


register_strategy("middle", Middle)
register_strategy("reach", Reach)


def test_a_users_strategy_is_grouped_if_it_says_that_it_can_be_and_the_laws_say_whether_it_is_right():
    check_strategy_laws(dc.Grouped(Reach(), 3, by="label"), list(X))
    check_strategy_laws(Middle(), list(X))
    with pytest.raises(AssertionError, match="breaks the law of cells: cell 0, of samples"):
        check_strategy_laws(dc.Grouped(Middle(), 3, by="label"), list(X))  # [3, 3] / [3] divides by other cells' counts


# -- what a contribution holds -------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """The most bytes that one operation took anew."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("name", ["mean", "moments", "max"])
def test_a_pass_over_a_few_tokens_takes_no_memory_of_the_vocabularys_size(name):
    vocabulary, width = 49_152, 64
    strategy = dc.Grouped(SPEC[name][0], vocabulary, by="label")
    x = torch.randn(100, width, generator=torch.Generator().manual_seed(0))
    token = torch.randint(0, vocabulary, (100,), generator=torch.Generator().manual_seed(1))
    state = strategy.take(Value(x, rows=True, columns=Columns({"label": token})))
    m = len(token.unique())
    assert m < 101 and all(len(tensor) == m for tensor in state.values())
    assert state["cells"].tolist() == sorted(set(token.tolist()))
    cache = holding(strategy, (x, token))
    with Allocated() as taken:
        cache.add("k", x, label=token)
    assert 0 < taken.nbytes <= 8 * x.nbytes
    with Allocated() as taken:
        strategy.finalize(state)  # which needs every cell, and shows that this would be seen
    assert taken.nbytes >= vocabulary * width * 4


def test_cells_that_there_is_no_room_for_are_refused_before_the_memory_is_taken(monkeypatch):
    strategy = dc.Grouped(dc.Mean(dim=0), 50_000, by="label")
    x, label = torch.ones(2, 200), torch.tensor([0, 49_999])
    cache = holding(strategy)
    monkeypatch.setattr(segments, "available_bytes", lambda device: 80_000_000)
    with pytest.raises(dc.TooLarge, match=r"the state of 'k', Grouped\(.*needs 80\.4 MB on cpu, 80\.0 MB are free"):
        cache.add("k", x, label=label)
    assert "k" not in cache
    monkeypatch.setattr(segments, "available_bytes", lambda device: 80_400_000)
    cache.add("k", x, label=label)
    assert int(cache.count("k").sum()) == 2


def test_a_contribution_that_brings_every_cell_names_none():
    strategy = grouped("covariance", 2)
    state = strategy.take(Value(X[:2], rows=True, columns=Columns({"label": torch.tensor([1, 0])})))
    assert "cells" not in state and state["m2"].shape == (2, 3, 3)


def test_several_keys_side_by_side_are_grouped_as_each_alone():
    x = torch.randn(11, 4, 3, generator=torch.Generator().manual_seed(3))
    for name, label in itertools.product(SPEC, (LABEL, torch.arange(11) % SIZE, torch.full((11,), -1))):
        strategy, columns = grouped(name), Columns({"label": label})
        slab = strategy.take_slab(Value(x, rows=True, columns=columns))
        for k in range(4):
            alone = strategy.take(Value(x[:, k], rows=True, columns=columns))
            assert slab.keys() == alone.keys()
            assert close(strategy.finalize({n: t[k] for n, t in slab.items()}), strategy.finalize(alone))


# -- merging -------------------------------------------------------------------------------------------------------


def test_cats_of_one_deferred_block_fold_whichever_cells_they_bring():
    cache = dc.ActivationCache()
    for name in SPEC:
        cache.register_aggregation(name, grouped(name))
    with cache.deferred_mode():
        for rows in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 11)):
            local = dc.ActivationCache()
            for name in SPEC:
                local.register_aggregation(name, grouped(name))
                local.add(name, X[rows], label=LABEL[rows])
            cache.cat(local)
    for name, (_, oracle) in SPEC.items():
        assert close(cache[name], by_mask(oracle, X, LABEL)) and cache.count(name).tolist() == COUNT


def test_recorded_rows_that_nobody_has_reduced_yet_are_grouped_when_they_are_merged():
    """Several values of one key in one `cat`: some cells, none, all of them, and some again."""
    size, net = 3, torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    torch.nn.init.ones_(net[0].weight)
    batches = [([2.0, 3.0], [1, 1]), ([8.0], [-1]), ([1.0, 2.0, 6.0], [0, 2, 1]), ([4.0], [2])]
    with dc.record(net, ["0"]) as rec, torch.no_grad():
        for x, label in batches:
            rec.next(label=torch.tensor(label))
            net(torch.tensor(x)[:, None])
    cache = dc.ActivationCache()
    cache.register_aggregation("0", dc.Grouped(dc.Mean(), size, by="label"))
    cache.cat(rec)  # an empty cache takes values over as they are
    cache.cat(rec)
    x = torch.tensor([value for values, _ in batches for value in values])[:, None]
    label = torch.tensor([cell for _, labels in batches for cell in labels])
    assert close(cache["0"], by_mask(SPEC["mean"][1], x, label, size))
    assert cache.count("0").tolist() == [2, 6, 4]


def test_other_sizes_columns_and_strategies_do_not_merge():
    cache = holding(grouped("mean"), *HALVES)
    for other in (grouped("mean", SIZE + 1), dc.Grouped(dc.Mean(dim=0), SIZE, by="kind"), grouped("sum")):
        local = dc.ActivationCache()
        local.register_aggregation("k", other)
        local.add("k", X, label=LABEL, kind=LABEL)
        with pytest.raises(SchemaMismatch, match=r"'k'.*Grouped"):
            cache.cat(local)
    with pytest.raises(
        SchemaMismatch, match=r"total has shape|expected total of float64 \(6, 3\), got float64 \(6, 2\)"
    ):
        cache.add("k", X[:, :2], label=LABEL)
    assert close(cache["k"], by_mask(SPEC["mean"][1], X, LABEL))


def merge_split(rank, world_size, split, dst, turned):
    """Every rank's share of the rows in two cats, by every strategy; what it then holds.

    Two keys of each, so that states lie side by side; `turned`: ranks know them in other orders.
    """
    names = [*SPEC][::-1] if turned and rank % 2 else [*SPEC]
    cluster = dc.DistributedCache(timeout_s=20, dst=dst)
    start, stop = sum(split[:rank]), sum(split[: rank + 1])
    with cluster.deferred_mode():
        for rows in (slice(start, stop - 1), slice(max(start, stop - 1), stop)):
            if rows.start >= rows.stop:
                continue
            local = dc.ActivationCache()
            for name in names:
                local.register_aggregation(name, grouped(name))
                local.add(name, X[rows], label=LABEL[rows])
                local.add(f"{name}_twice", 2 * X[rows], label=LABEL[rows])
            cluster.cat(local)
    found = {}
    for name in cluster:
        try:
            found[name] = (cluster[name], cluster.count(name))
        except dc.HeldElsewhere:
            continue
    return found


@pytest.mark.parametrize(("dst", "turned"), [(None, False), (None, True), ("shard", False)], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_say_together_what_one_says_whichever_cells_they_saw(ranks, world_size, dst, turned):
    for split in splits(11, world_size):
        results = ranks.run(world_size, merge_split, split, dst, turned)
        for name, (_, oracle) in SPEC.items():
            for key, x in ((name, X), (f"{name}_twice", 2 * X)):
                held = [found[key] for found in results if key in found]
                assert len(held) == (world_size if dst is None else 1)
                assert all(same(value, held[0][0]) for value, _ in held)
                assert close(held[0][0], by_mask(oracle, x, LABEL)) and held[0][1].tolist() == COUNT


# -- recording -----------------------------------------------------------------------------------------------------

TEXTS = texts()
INPUTS = padded(TEXTS)
MASK = INPUTS["attention_mask"].bool()


def resid_out_0(model):
    """The rows of every valid token behind the first layer, and their samples and positions."""
    with torch.no_grad():
        x_bsd = model(**INPUTS, output_hidden_states=True).hidden_states[1]
    sample, _ = MASK.nonzero(as_tuple=True)
    return x_bsd[MASK], sample, torch.cat([torch.arange(len(text)) for text in TEXTS])


def recorded(model, reduce, site="resid_out", **columns):
    with dc.record(model, [dc.Site(site, layers=[0], reduce=reduce)], **columns) as rec, torch.no_grad():
        model(**INPUTS)
    return rec


def test_class_means_are_those_of_the_tokens_of_each_classs_samples():
    model, label = build("llama"), torch.tensor([1, 0, 1, -1])
    rec = recorded(
        model,
        {"mean": dc.Grouped(dc.Mean(), 2, by="label"), "cov": dc.Grouped(dc.Covariance(), 2, by="label")},
        label=label,
    )
    x, sample, _ = resid_out_0(model)
    torch.testing.assert_close(
        rec["resid_out_0_mean"].double(), by_mask(SPEC["mean"][1], x, label[sample], 2), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        rec["resid_out_0_cov"]["covariance"].double(),
        by_mask(covariance, x, label[sample], 2)["covariance"],
        rtol=1e-5,
        atol=1e-5,
    )
    assert rec.count("resid_out_0_mean").tolist() == [3, 7]


def test_means_per_position_count_the_texts_that_are_long_enough():
    model = build("llama")
    rec = recorded(model, dc.Grouped(dc.Mean(), 8, by="position"))
    x, _, position = resid_out_0(model)
    expected = by_mask(SPEC["mean"][1], x, position, 8)
    torch.testing.assert_close(rec["resid_out_0"].double(), expected, rtol=0, atol=1e-5, equal_nan=True)
    assert rec.count("resid_out_0").tolist() == [4, 3, 3, 2, 2, 1, 0, 0]


def test_means_per_token_are_those_of_every_place_where_it_stands():
    model = build("llama")
    rec = recorded(model, dc.Grouped(dc.Mean(), 64, by="token"), token=INPUTS["input_ids"])
    x, *_ = resid_out_0(model)
    token = INPUTS["input_ids"][MASK]
    torch.testing.assert_close(
        rec["resid_out_0"].double(), by_mask(SPEC["mean"][1], x, token, 64), rtol=0, atol=1e-5, equal_nan=True
    )
    assert torch.equal(rec.count("resid_out_0"), torch.bincount(token, minlength=64))


@pytest.mark.parametrize("name", ["mean", "moments", "max", "covariance", "histogram"])
def test_heads_are_grouped_each_by_itself(name):
    model, label = build("llama"), torch.tensor([2, 0, 2, -1])
    inner, oracle = type(SPEC[name][0]), SPEC[name][1]
    inner = dc.Histogram(4, -1, 1) if name == "histogram" else inner()
    rec = recorded(model, {"kept": "cat", "": dc.Grouped(inner, 4, by="label")}, site="head_keys", label=label)
    for head in range(2):
        rows, cells = rec[f"head_keys_L0H{head}_kept"], rec.rows(f"head_keys_L0H{head}_kept")["label"]
        expected = by_mask(oracle, rows, cells, 4)
        found = rec[f"head_keys_L0H{head}"]
        for n in expected if isinstance(expected, dict) else [None]:
            mine, theirs = (found, expected) if n is None else (found[n], expected[n])
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
        assert rec.count(f"head_keys_L0H{head}").tolist() == [3, 0, 7, 0]


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_row_outside_of_the_cells_is_named_with_what_to_do_and_nothing_changes():
    cache = holding(grouped("mean"), *HALVES)
    before = cache["k"]
    for wrong, words in (
        (6, "holds 6, and 1 of 2 row"),
        (-2, "holds -2, and 1 of 2 row"),
        (2**40, f"holds {2**40}, and"),
    ):
        with pytest.raises(
            ValueError, match=rf"'k'.*column 'label' {words}.*cells 0 to 5 of size=6: give a larger size"
        ):
            cache.add("k", X[:2], label=torch.tensor([0, wrong]))
    assert same(cache["k"], before)


def test_a_missing_column_is_named_with_those_that_there_are():
    with pytest.raises(
        ValueError,
        match=r"by the column 'label', and these rows have the columns: sample, position, kind\. .*label=label",
    ):
        holding(grouped("mean")).add("k", X, kind=LABEL)
    with pytest.raises(ValueError, match=r"the column 'label', and these rows have the columns: none"):
        holding(grouped("mean")).add("k", X)
    model = build("llama")
    with pytest.raises(
        SiteError, match=r"resid_out.*by the column 'kind', and these rows have the columns: sample, position, label"
    ):
        recorded(model, dc.Grouped(dc.Mean(), 2, by="kind"), label=torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_a_column_that_is_not_of_integers_is_refused(dtype):
    with pytest.raises(
        TypeError, match=rf"goes by integers, got {dtype} in the column 'label': convert it, label\.long\(\)"
    ):
        holding(grouped("mean")).add("k", X, label=LABEL.clamp_min(0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8], ids=str)
def test_integers_of_any_size_name_cells(dtype):
    label = LABEL.clamp_min(0)
    assert same(holding(grouped("mean"), (X, label.to(dtype)))["k"], holding(grouped("mean"), (X, label))["k"])


def test_a_column_has_one_entry_for_each_row():
    with pytest.raises(ValueError, match=r"expects one 'label' per sample, got \[4\] for 11 sample"):
        holding(grouped("mean")).add("k", X, label=LABEL[:4])
    with pytest.raises(ValueError, match=r"got \[11, 1\] for 11 sample"):
        holding(grouped("mean")).add("k", X, label=LABEL[:, None])


@dataclass(frozen=True, slots=True)
class Plain(Middle):
    """A user's strategy that says nothing of many keys."""

    groupable = False


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        (dc.Cat(), ValueError, r"Cat keeps what it is given, and Grouped reduces: .*cache\.rows\(key\)"),
        (dc.Extend(), ValueError, "Extend keeps what it is given"),
        (dc.First(), ValueError, "First keeps what it is given"),
        (dc.TopK(2), ValueError, "TopK combines as a whole"),
        (dc.Mean(ragged=True), ValueError, "Mean is ragged: .*Leave out ragged="),
        (dc.AveragePattern(), ValueError, "AveragePattern is ragged"),
        (dc.Grouped(dc.Mean(), 2, by="a"), ValueError, r"make one column of two, .*both = a \* b_size \+ b"),
        (Plain(), ValueError, "Plain doesn't say that it reads many states at once: .*groupable = True"),
        (dc.Mean, TypeError, r"takes a strategy, such as dc\.Grouped\(dc\.Mean\(\), 2, by='label'\), got <class"),
        ("mean", TypeError, "takes a strategy, .* got 'mean'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_can_not_be_grouped_is_refused_with_the_reason(strategy, error, message):
    with pytest.raises(error, match=message):
        dc.Grouped(strategy, 2, by="label")


@pytest.mark.parametrize("size", [0, -1, True, 2.0, None], ids=str)
def test_a_size_is_a_number_of_cells(size):
    with pytest.raises(ValueError, match="size=1 or more cells, got"):
        dc.Grouped(dc.Mean(), size, by="label")


@pytest.mark.parametrize("by", ["", None, 3], ids=str)
def test_a_column_is_named(by):
    with pytest.raises(ValueError, match="by a column's name, such as by='label', got by="):
        dc.Grouped(dc.Mean(), 2, by=by)


# -- descriptions, pickles, files ----------------------------------------------------------------------------------

ODD = dc.Grouped(dc.Moments(accumulate=torch.float32, correction=0, dim=0), SIZE, by="label")


def test_a_description_holds_that_of_the_strategy_within():
    assert describe(ODD)["parameters"]["strategy"] == {"strategy": describe(ODD.strategy)}
    assert described(describe(ODD)) == ODD and hash(described(describe(ODD))) == hash(ODD)
    assert (
        strategy_words(strategy_facts(ODD))
        == "grouped(by=label, size=6, strategy=moments(accumulate=float32, correction=0, dim=0))"
    )


@pytest.mark.parametrize("again", ["copy", "pickle", "save"])
def test_a_cache_with_groups_is_kept_and_merges_on(tmp_path, again):
    cache = dc.ActivationCache()
    cache.register_aggregation("odd", ODD)
    for name in SPEC:
        cache.register_aggregation(name, grouped(name))
    for name in (*SPEC, "odd"):
        cache.add(name, *[HALVES[0][0]], label=HALVES[0][1])
    if again == "copy":
        twin = copy.deepcopy(cache)
    elif again == "pickle":
        twin = pickle.loads(pickle.dumps(cache))
    else:
        cache.save(tmp_path / "saved")
        twin = dc.load(tmp_path / "saved")
    assert twin._registry == cache._registry and twin.explain() == cache.explain()
    assert all(same(twin[key], cache[key]) for key in cache)
    for key in cache:
        twin.add(key, HALVES[1][0], label=HALVES[1][1])
    for name, (_, oracle) in SPEC.items():
        assert close(twin[name], by_mask(oracle, X, LABEL)) and twin.count(name).tolist() == COUNT


def test_many_cells_of_narrow_rows_are_saved_and_loaded(tmp_path):
    cache = holding(dc.Grouped(dc.Mean(dim=0), 50_000, by="label"), (X[:2], torch.tensor([7, 49_999])))
    cache.save(tmp_path / "saved")
    assert same(dc.load(tmp_path / "saved")["k"], cache["k"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"dim":0', '"dim":"no"', r"mean\(dim='no'\)"),
        ('"name":"mean"', '"name":"meen"', "unknown strategy 'meen'"),
        ('"name":"mean"', '"name":["mean"]', "cannot use the strategy grouped"),
        ('"size":6', '"size":5', "doesn't fit"),
        ('"size":6', '"size":true', "size=1 or more cells, got True"),
        ('"parameters":{"dim"', '"parametres":{"dim"', "the name and the parameters of a strategy"),
        ('"name":"mean"', '"name":"cat"', "cannot use the strategy grouped"),
    ],
    ids=str,
)
def test_a_forged_strategy_within_is_no_cache(tmp_path, old, new, message):
    holding(grouped("mean"), *HALVES).save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "manifest.json"
    text = json.dumps(json.loads(manifest.read_text()), separators=(",", ":"))
    assert old in text
    manifest.write_text(text.replace(old, new))
    with pytest.raises(BadCache, match=message):
        dc.load(tmp_path / "saved")["k"]
