"""What a cluster of ranks says, against what plain torch says of all samples in one process.

Every test runs on real gloo ranks and asks two things: that replicas are identical on every rank, key order
included, and that they are what one process that saw every sample gets.
"""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

import distcache as dc
from distcache import merge as merging
from distcache.strategies import Weighted
from distcache.testing import RankFailed, splits

# -- the specification: per key, how sample i looks and what plain torch makes of all samples -------------------


def noise(i: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(i))


def stack_all(values):
    return torch.stack(values)


def mean_of_all(values):
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values]).mean(0)


def ragged(i: int) -> torch.Tensor:
    return noise(i, 3 + 70 * (i % 4))  # 3 to 213: ranks give it rooms of 128 and of 256


def ragged_mean(values):
    total = pad_sequence([value.double() for value in values], batch_first=True).sum(0)
    return (total / pad_sequence([torch.ones(len(value)) for value in values], batch_first=True).sum(0)).float()


def weighted_mean(values):
    weights = torch.tensor([value.weight for value in values], dtype=torch.float64)
    x = torch.stack([value.value for value in values]).double()
    return ((x * weights[:, None]).sum(0) / weights.sum()).float()


def moments(values):
    x = torch.stack(values).double()
    variance = ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1)  # NaN of one sample, as 0 / 0 is
    return {"count": torch.tensor(len(x)), "mean": x.mean(0), "variance": variance, "std": variance.sqrt()}


# key -> (strategy, sample i, oracle of the list of samples in order, whether it's exact)
SPEC = {
    "sum": ("sum", lambda i: noise(i, 5), lambda v: torch.stack(v).sum(0), False),
    "sum_int": ("sum", lambda i: torch.tensor([i, 2**40 + i]), lambda v: torch.stack(v).sum(0), True),
    "mean": ("mean", lambda i: noise(i, 2, 3), lambda v: torch.stack(v).double().mean(0).float(), False),
    "mean_bf16": ("mean", lambda i: noise(i, 4).bfloat16(), lambda v: torch.stack(v).double().mean(0).float(), False),
    "mean_fp64": ("mean", lambda i: noise(i, 4).double(), lambda v: torch.stack(v).mean(0), False),
    "mean_number": ("mean", lambda i: i / 7, lambda v: torch.tensor(v, dtype=torch.float64).mean(), False),
    "mean_ragged": (dc.Mean(ragged=True), ragged, ragged_mean, False),
    "mean_weighted": ("mean", lambda i: Weighted(noise(i, 4), 1.0 + i), weighted_mean, False),
    "max": ("max", lambda i: noise(i, 5), lambda v: torch.stack(v).amax(0), True),
    "max_int": ("max", lambda i: torch.tensor([-i, i]), lambda v: torch.stack(v).amax(0), True),
    "min": ("min", lambda i: noise(i, 5), lambda v: torch.stack(v).amin(0), True),
    "moments": ("moments", lambda i: noise(i, 5), moments, False),
    "cat": ("cat", lambda i: noise(i, 1, 5), torch.cat, True),
    "cat_bf16": ("cat", lambda i: noise(i, 1, 3).bfloat16(), torch.cat, True),
    "cat_bool": ("cat", lambda i: noise(i, 1, 3) > 0, torch.cat, True),
    "cat_int8": ("cat", lambda i: torch.tensor([[i, -i, 100]], dtype=torch.int8), torch.cat, True),
    "cat_default": (None, lambda i: noise(i, 1, 2), torch.cat, True),
    "stack": ("stack", lambda i: noise(i, 2, 2), torch.stack, True),
    "stack_0d": ("stack", lambda i: torch.tensor(float(i)), torch.stack, True),
    "extend": ("extend", lambda i: [f"sample {i} é"], lambda v: [item for one in v for item in one], True),
    "first": ("first", lambda i: {"name": f"{i}", "x": noise(i, 2), "t": (i, None, 2**70)}, lambda v: v[0], True),
    "first_none": (None, lambda i: None, lambda v: None, True),
    "function": (stack_all, lambda i: noise(i, 3), torch.stack, True),
    "function_float": (mean_of_all, lambda i: float(i), lambda v: torch.tensor(v, dtype=torch.float64).mean(), False),
}


def fill(key: str, i: int) -> object:
    return SPEC[key][1](i)


def register(cache) -> None:
    for key, (strategy, *_) in SPEC.items():
        if strategy is not None:
            cache.register_aggregation(key, strategy)


def local_of(i: int, keys=tuple(SPEC)) -> dc.ActivationCache:
    local = dc.ActivationCache()
    for key in keys:
        local[key] = fill(key, i)
    return local


def same(a, b) -> bool:
    """Equal to the last bit, NaN in the same places, nested values too."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def close(found, expected, limit: float) -> bool:
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(close(found[name], expected[name], limit) for name in expected)
    return same(found.shape, expected.shape) and torch.allclose(
        found.double(), expected.double(), rtol=0, atol=limit, equal_nan=True
    )


def size_of(value) -> float:
    """The mean of |x| of one sample."""
    value = value.value * value.weight if isinstance(value, Weighted) else value
    return float(torch.as_tensor(value, dtype=torch.float64).abs().mean())


def check(found: dict, order: dict[str, list[int]]) -> None:
    """What was read of a cache against the oracle: `order` says which samples each key saw, in which order.

    Concatenations and what has no rounding to the last bit, reductions to 1e-6 of the mean of |x|.
    """
    assert found.keys() == order.keys()
    for key, numbers in order.items():
        _, _, oracle, exact = SPEC[key]
        values = [fill(key, i) for i in numbers]
        expected = oracle(values) if len(values) > 1 or not key.startswith("function") else values[0]
        if exact or not isinstance(expected, (torch.Tensor, dict)):
            assert same(found[key], expected), (key, found[key], expected)
        else:
            limit = 1e-6 * sum(map(size_of, values)) / (1 if key.startswith("sum") else len(values))
            assert close(found[key], expected, limit), (key, found[key], expected)


def read(cache) -> dict:
    return {key: cache[key] for key in cache}


def all_same(results: list) -> bool:
    return all(same(results[0], result) for result in results)


# -- any way to deal samples to ranks --------------------------------------------------------------------------


def merge_split(rank, world_size, split, indexed):
    """Samples dealt in blocks of these sizes; with an index, in the reverse of their order."""
    cache = dc.DistributedCache(timeout_s=20)
    register(cache)
    start = sum(split[:rank])
    with cache.deferred_mode():
        for i in range(start, start + split[rank]):
            cache.cat(local_of(i), index=[100 - i] if indexed else None)
        assert len(cache) == 0  # reads show what is committed
    return read(cache)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_merged_ranks_say_what_one_process_says_of_all_samples(ranks, world_size, indexed):
    for split in splits(7, world_size):
        results = ranks.run(world_size, merge_split, split, indexed)
        assert all_same(results)
        numbers = list(range(7))
        check(results[0], {key: numbers[::-1] if indexed else numbers for key in sorted(SPEC)})


def merge_program(rank, world_size, steps, blocks):
    """`steps`: (rank, sample, keys); `blocks`: into how many deferred blocks they are divided."""
    cache = dc.DistributedCache(timeout_s=20)
    register(cache)
    for block in range(blocks):
        with cache.deferred_mode():
            for owner, i, keys in steps[block::blocks]:
                if owner == rank:
                    cache.cat(local_of(i, keys), index=[i])
    return read(cache)


@pytest.mark.parametrize("seed", range(8))
def test_any_keys_on_any_ranks_in_any_order_come_out_as_their_union(ranks, seed):
    """Keys that one rank has, keys that stand in another order, idle ranks, several blocks."""
    rng = random.Random(seed)
    world_size, blocks = rng.choice([2, 3, 4]), rng.choice([1, 2, 3])
    names = [key for key in SPEC if "function" not in key]  # a function folds its own result over blocks
    steps = [(rng.randrange(world_size), i, tuple(rng.sample(names, rng.randint(1, 6)))) for i in range(12)]
    results = ranks.run(world_size, merge_program, steps, blocks)
    assert all_same(results)
    check(results[0], {key: [i for _, i, keys in steps if key in keys] for key in results[0]})
    assert set(results[0]) == {key for _, _, keys in steps for key in keys}


def merge_at_once(rank, world_size, split):
    """Outside deferred mode: every round is a collective, and who has nothing left brings an empty cache."""
    cache = dc.DistributedCache(timeout_s=20)
    register(cache)
    start = sum(split[:rank])
    keys = [key for key in SPEC if "function" not in key]
    for turn in range(max(split)):
        cache.cat(local_of(start + turn, keys) if turn < split[rank] else dc.ActivationCache())
    return read(cache)


@pytest.mark.parametrize("split", [(3,), (2, 1), (0, 3), (1, 0, 2)], ids=str)
def test_outside_deferred_mode_every_cat_merges_at_once(ranks, split):
    results = ranks.run(len(split), merge_at_once, split)
    assert all_same(results)
    starts = [sum(split[:rank]) for rank in range(len(split))]
    in_turns = [starts[r] + turn for turn in range(max(split)) for r in range(len(split)) if turn < split[r]]
    check(results[0], {key: in_turns for key in sorted(SPEC) if "function" not in key})


def merge_two_blocks(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    register(cache)
    seen = []
    for block in range(3):
        with cache.deferred_mode():
            local = local_of(10 * block + rank, ("cat", "mean", "sum_int"))
            if rank == 0:
                local.add_with_info("note", [f"block {block}"], f"said in block {block}")
            if (block, rank) != (1, 0):  # rank 0 has nothing in the second block
                cache.cat(local)
        seen.append(read(cache))
    return [{k: v.value() if k == "note" else v for k, v in one.items()} for one in seen], cache["note"].info()


def test_a_further_block_adds_its_own_delta_and_nothing_twice(ranks):
    results = ranks.run(2, merge_two_blocks)
    assert all_same(results)
    (first, second, third), info = results[0]
    for found, numbers, notes in (
        (first, [0, 1], ["block 0"]),
        (second, [0, 1, 11], ["block 0"]),
        (third, [0, 1, 11, 20, 21], ["block 0", "block 2"]),
    ):
        assert found.pop("note") == notes
        check(found, {key: numbers for key in ("cat", "mean", "sum_int")})
    assert info == "said in block 0"  # the first note stays


# -- what must not be mixed up ---------------------------------------------------------------------------------


def other_order(rank, world_size, agree):
    """Rank 0 has a, b; rank 1 has b, a: laid out alike in their segments, but for the names."""
    cache = dc.DistributedCache(timeout_s=20)
    cache.register_aggregation("", "sum")
    blind = mock.patch.object(merging, "agreed", return_value=True)
    with blind if not agree else mock.MagicMock(), cache.deferred_mode():
        local = dc.ActivationCache()
        for key in ("a", "b") if rank == 0 else ("b", "a"):
            local[key] = torch.tensor([1.0 if key == "a" else 10.0])
        cache.cat(local)
    return float(cache["a"]), float(cache["b"])


def test_the_same_keys_in_another_order_are_told_apart(ranks):
    assert ranks.run(2, other_order, True) == [(2.0, 20.0)] * 2


def test_without_agreement_another_order_adds_unlike_keys(ranks):
    """The test above can fail: this is what it guards against."""
    assert ranks.run(2, other_order, False)[0] == (11.0, 11.0)


def test_a_mean_of_means_fails_the_oracle():
    """The oracle can fail: ranks that average their averages are found out by an uneven split."""
    values = [fill("mean", i) for i in range(7)]
    mean_of_means = (torch.stack(values[:6]).mean(0) + values[6]) / 2
    with pytest.raises(AssertionError, match="mean"):
        check({"mean": mean_of_means}, {"mean": list(range(7))})
    check({"mean": torch.stack(values).mean(0)}, {"mean": list(range(7))})


def uneven_rooms(rank, world_size):
    """Rank 0 grows step by step and leaves room behind, rank 1 takes the largest at once: digests of keys agree."""
    cache = dc.DistributedCache(timeout_s=20)
    cache.register_aggregation("m", dc.Mean(ragged=True))
    with cache.deferred_mode():
        for n in (100, 200, 40_000) if rank == 0 else (100, 40_000):
            local = dc.ActivationCache()
            local["m"] = torch.full((n,), float(rank))
            cache.cat(local)
    return cache["m"]


def test_room_that_growing_left_behind_does_not_put_ranks_out_of_step(ranks):
    found, other = ranks.run(2, uneven_rooms)
    assert same(found, other)
    assert found[:100].unique().tolist() == [pytest.approx(2 / 5)]
    assert found[100:200].unique().tolist() == [pytest.approx(1 / 3)]
    assert found[200:].unique().tolist() == [0.5]


def with_nan(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    for key in ("max", "min"):
        cache.register_aggregation(key, key)
    with cache.deferred_mode():
        local = dc.ActivationCache()
        x = torch.tensor([float("nan") if rank == 1 else 1.0, float("inf") if rank == 0 else -0.5, -float(rank)])
        local["max"], local["min"] = x, x
        cache.cat(local)
    return cache["max"], cache["min"]


def test_nan_wins_a_max_and_a_min_on_every_rank(ranks):
    for largest, smallest in ranks.run(3, with_nan):
        torch.testing.assert_close(largest, torch.tensor([float("nan"), float("inf"), 0.0]), equal_nan=True)
        torch.testing.assert_close(smallest, torch.tensor([float("nan"), -0.5, -2.0]), equal_nan=True)


def seen_twice(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    with cache.deferred_mode():
        for i in (0, 1, 2) if rank == 0 else (2, 1, 4):
            cache.cat(local_of(i, ("cat", "extend")), index=[i])
    return read(cache), cache.rows("cat")["sample"].tolist(), int(cache.count("cat"))


def test_a_row_that_two_ranks_saw_counts_once(ranks):
    for found, samples, count in ranks.run(2, seen_twice):
        check(found, {key: [0, 1, 2, 4] for key in ("cat", "extend")})
        assert samples == [0, 1, 2, 4] and count == 4


def rows_with_columns(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    with cache.deferred_mode():
        if rank:
            cache.add("x", noise(rank, 2, 3), index=[9 - rank, 20 + rank], label=torch.tensor([rank, 10 * rank]))
    return cache.rows("x"), cache["x"]


def test_columns_stay_with_their_rows(ranks):
    for rows, x in ranks.run(3, rows_with_columns):
        assert rows["sample"].tolist() == [7, 8, 21, 22]
        assert rows["label"].tolist() == [2, 1, 10, 20]
        assert torch.equal(x, torch.stack([noise(2, 2, 3)[0], noise(1, 2, 3)[0], noise(1, 2, 3)[1], noise(2, 2, 3)[1]]))


def add_to_functions(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    cache.register_aggregation("f", stack_all)
    with cache.deferred_mode():
        for i in range(2):
            cache.add("f", torch.tensor([rank, i]), index=[10 * i + rank])
    return cache["f"].tolist()


def test_a_function_sees_every_added_value_once_in_the_samples_order(ranks):
    for world_size in (1, 2):
        expected = [[rank, i] for i in range(2) for rank in range(world_size)]
        assert ranks.run(world_size, add_to_functions) == [expected] * world_size


# -- one rank holds the result ---------------------------------------------------------------------------------

ON_ONE = ("mean", "moments", "max", "cat", "extend", "first", "mean_ragged", "cat_bf16")


def merge_onto(rank, world_size, dst):
    cache = dc.DistributedCache(dst=dst, timeout_s=20)
    register(cache)
    for block in range(3):
        with cache.deferred_mode():
            for i in range(rank + 1):
                cache.cat(local_of(100 * block + 10 * rank + i, ON_ONE[rank:]), index=[100 * block + 10 * rank + i])
    if rank == dst:
        return list(cache), read(cache)
    with pytest.raises(dc.HeldElsewhere, match=f"held by rank {dst} .*this is rank {rank}"):
        cache["cat"]
    with pytest.raises(dc.HeldElsewhere):
        cache.count("cat")
    assert "cat" in cache and "nothing" not in cache and len(cache) == len(ON_ONE)
    assert str(cache) == repr(cache) == f"DistributedCache({', '.join(cache)})"  # names are known everywhere
    assert len(cache._held.content) == 0
    return list(cache), None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_with_dst_one_rank_holds_all_and_further_merges_add_to_it(ranks, world_size):
    for dst in range(world_size):
        results = ranks.run(world_size, merge_onto, dst)
        saw = {key: range(min(n, world_size - 1) + 1) for n, key in enumerate(ON_ONE)}
        numbers = {
            key: [100 * block + 10 * rank + i for block in range(3) for rank in held for i in range(rank + 1)]
            for key, held in saw.items()
        }
        assert all(list(order) == list(results[dst][1]) for order, _ in results)
        check(results[dst][1], {key: numbers[key] for key in results[dst][1]})


def bytes_received(rank, world_size, dst):
    received = []
    transfers = merging.Transfer

    def noted(buffer, op, root=None, to=None):
        if op == "copy":
            received.append((root, to, buffer.numel()))
        return transfers(buffer, op, root, to)

    with mock.patch.object(merging, "Transfer", noted):
        cache = dc.DistributedCache(dst=dst, timeout_s=20)
        with cache.deferred_mode():
            cache.cat(local_of(rank, ("cat",)))
    return received


def test_with_dst_rows_are_sent_to_that_rank_only(ranks):
    sent = ranks.run(3, bytes_received, 1)
    assert sent[0] == [(0, 1, 20)] and sent[2] == [(2, 1, 20)]
    assert sorted(sent[1]) == [(0, 1, 20), (2, 1, 20)]


# -- refusals --------------------------------------------------------------------------------------------------


def refused(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    register(cache)
    local = local_of(rank, ("cat", "mean"))
    cache.cat(local)
    for write in (
        lambda: cache.__setitem__("cat", 1),
        lambda: cache.update({}),
        lambda: cache.__delitem__("cat"),
        lambda: cache.delta.__setitem__("cat", 1),
    ):
        with pytest.raises(TypeError, match=r"read-only.*cache\.cat\(local\)"):
            write()
    with pytest.raises(RuntimeError, match="deferred_mode"):
        cache.add("cat", torch.ones(1))
    with pytest.raises(ValueError, match="already holds a state of"):
        cache.register_aggregation("mean", "max")
    assert cache._held.delta._registry["mean"] == dc.Mean()
    with cache.deferred_mode():
        for wrong in (cache, cache.delta):
            with pytest.raises(TypeError, match="count 2 times"):
                cache.cat(wrong)
        with pytest.raises(TypeError, match="ActivationCache, got dict"):
            cache.cat({"cat": torch.ones(1)})
        # Neither key of this one is folded: the second can't be.
        bad = dc.ActivationCache()
        bad["cat"], bad["odd"] = noise(0, 1, 5), {1: "keys are str"}
        with pytest.raises(TypeError, match=r"odd.*str keys"):
            cache.cat(bad)
        bad = dc.ActivationCache()
        bad["new"], bad["cat"] = torch.ones(1), noise(0, 1, 6)
        with pytest.raises(dc.SchemaMismatch, match=r"'cat'.*content.*\(5,\) against \(6,\)"):
            cache.cat(bad)
        assert len(cache.delta) == 0
        for call in (cache.deferred_mode().__enter__, cache.merge, cache.rejoin, lambda: cache.save("nowhere")):
            with pytest.raises(RuntimeError, match="deferred_mode is open"):
                call()
    assert cache.get("nothing", 7) == 7 and len(cache.get("cat")) == 2
    cache.close()
    with pytest.raises(RuntimeError, match="closed"):
        cache.cat(local)
    return read(cache)


def test_a_cluster_refuses_what_would_make_replicas_differ_and_stays_whole(ranks):
    for found in ranks.run(2, refused):
        check(found, {"cat": [0, 1], "mean": [0, 1]})


@pytest.mark.parametrize(
    "arguments", [{"dst": 2}, {"dst": True}, {"timeout_s": 0}, {"wait_s": -1}, {"bucket_bytes": 0}]
)
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=r"dst is a rank|limits are positive"):
        dc.DistributedCache(**arguments)


# -- groups ----------------------------------------------------------------------------------------------------


def several_caches(rank, world_size):
    odd, even = dist.new_group([1, 3]), dist.new_group([0, 2])
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    mine = odd if rank % 2 else even
    with pytest.raises(ValueError, match=f"rank {rank} is not in the group"):
        dc.DistributedCache(even if rank % 2 else odd)
    caches = [dc.DistributedCache(group, timeout_s=20) for group in (None, mine, alone, None, mine)]
    for cache in caches:
        cache.register_aggregation("m", "sum")
        with cache.deferred_mode():
            local = dc.ActivationCache()
            local["m"] = torch.tensor(rank)
            cache.cat(local)
    # The model's own collectives go on beside.
    total = torch.tensor(rank)
    dist.all_reduce(total)
    return [(cache.rank, cache.world_size, int(cache["m"])) for cache in caches], int(total)


def test_caches_over_all_ranks_some_and_one_do_not_disturb_each_other(ranks):
    for rank, (found, total) in enumerate(ranks.run(4, several_caches)):
        pair = (rank // 2, 2, 4 if rank % 2 else 2)
        assert found == [(rank, 4, 6), pair, (0, 1, rank), (rank, 4, 6), pair]
        assert total == 6


# -- the store stays small, and saving is a collective ---------------------------------------------------------


def many_merges(rank, world_size, merges):
    cache = dc.DistributedCache(timeout_s=20)
    counts = []
    for n in range(merges):
        cache.cat(local_of(n, ("mean",)))
        dist.barrier()
        if n in (4, merges - 1):
            counts.append(dist.distributed_c10d._get_default_store().num_keys())
        dist.barrier()
    return counts


def test_the_store_does_not_grow_with_merges(ranks):
    for early, late in ranks.run(2, many_merges, 50):
        assert late == early


def save_between(rank, world_size, folder, dst):
    cache = dc.DistributedCache(dst=dst, timeout_s=20)
    register(cache)
    cache.cat(local_of(rank, ("cat", "mean")))
    cache.save(f"{folder}/one", model="tiny")
    cache.cat(local_of(10 + rank, ("cat", "mean")))
    cache.save(f"{folder}/two")
    try:
        cache.save(f"{folder}/two")
    except (FileExistsError, dc.PeerFailed) as error:
        refusal = f"{type(error).__name__}: {error}"
    cache.cat(local_of(20 + rank, ("cat",)))
    cache.save(f"{folder}/three")
    return refusal


@pytest.mark.parametrize("dst", [None, 1])
def test_saves_go_between_merges_and_all_learn_how_they_ended(ranks, tmp_path, dst):
    refusals = ranks.run(2, save_between, str(tmp_path), dst)
    writer = dst or 0
    assert refusals[writer].startswith("FileExistsError")
    assert refusals[1 - writer].startswith(f"PeerFailed: rank {writer} raised FileExistsError")
    for name, numbers in (("one", [0, 1]), ("two", [0, 1, 10, 11])):
        check(read(dc.load(tmp_path / name)), {key: numbers for key in ("cat", "mean")})
    assert len(dc.load(tmp_path / "three")["cat"]) == 6


# -- the harness itself ----------------------------------------------------------------------------------------


def fail_on(rank, world_size, bad):
    if rank == bad:
        raise ValueError(f"planted on rank {rank}")
    return rank


def test_the_report_of_a_failing_rank_holds_its_traceback(ranks):
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2: .*fail_on.*planted on rank 1"):
        ranks.run(2, fail_on, 1)
    assert ranks.run(2, fail_on, None) == [0, 1]


def sleep_on(rank, world_size):
    import time

    time.sleep(60 if rank else 0)


def test_a_rank_that_takes_too_long_is_ended_and_named(ranks):
    with pytest.raises(RankFailed, match=r"rank\(s\) \[1\] of 2 did not end within 2 s"):
        ranks.run(2, sleep_on, timeout_s=2)


# -- samples without an index ----------------------------------------------------------------------------------


def number_samples(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    for _ in range(2):
        with cache.deferred_mode():
            for _ in range(rank + 1):  # cats of two samples, of two tokens each
                model = torch.nn.Linear(3, 3)
                with dc.record(model, {"x": ""}) as local:
                    model(torch.randn(2, 2, 3))
                cache.cat(local)
    return cache.rows("x")


def test_samples_without_an_index_are_numbered_through_over_ranks_and_merges(ranks):
    for rows in ranks.run(2, number_samples):
        assert rows["sample"].tolist() == [i // 2 for i in range(2 * 2 * (1 + 2) * 2)]
        assert rows["position"].tolist() == [0, 1] * 12
