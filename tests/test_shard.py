"""`dst="shard"`: rows stay on their ranks, reductions have owners, and what is saved is one cache.

The oracle is plain torch on the list of all samples, and a cache that every rank holds whole, to which a shard is saved
as its equal, bit for bit where there is no rounding.
"""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist

import distcache as dc
from distcache import merge as merging
from distcache import segments, sharded
from distcache.plan import Holdings, Offer, Shards, make_plan, needed_bytes
from distcache.schema import FieldSchema, KeySchema
from distcache.store import Writer, read_manifest

STRATEGIES = {
    "mean": "mean",
    "largest": "max",
    "moments": "moments",
    "top": dc.TopK(3),
    "ragged": dc.Mean(ragged=True),
    "nothing": "sum",
    "joined": "cat",
    "halves": "cat",
    "stacked": dc.Stack(dim=1),
    "words": "extend",
    "first": "first",
    "function": len,
}
ROWS = ("joined", "halves", "stacked")


def new_cache(dst="shard", **limits):
    cache = dc.DistributedCache(dst=dst, **{"timeout_s": 20, "bucket_bytes": 64, **limits})
    for key, strategy in STRATEGIES.items():
        cache.register_aggregation(key, strategy)
    return cache


def local_of(i: int, rank: int, keys=None) -> dc.ActivationCache:
    """Sample i as a rank sees it: its rows say which rank that was."""
    x = torch.randn(4, generator=torch.Generator().manual_seed(i))
    local = dc.ActivationCache()
    local["mean"], local["largest"], local["moments"], local["top"] = x, x, x[None], x
    local["ragged"], local["nothing"] = torch.ones(1 + 70 * (i % 3)), torch.empty(0)
    local["joined"] = torch.tensor([[i, rank, -i]])
    local["halves"] = torch.tensor([[i + rank / 8]], dtype=torch.bfloat16)
    local["stacked"] = torch.tensor([float(i), float(rank)])
    local["words"], local["first"], local["function"] = [f"{i}"], f"{i}", i
    local[f"mean_of_{rank}"], local[f"joined_of_{rank}"] = x, torch.tensor([i])
    for key in set(local) - set(keys or local):
        del local[key]
    return local


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    return type(a) is type(b) and a == b


# -- what is saved ---------------------------------------------------------------------------------------------

# By merge and rank, the samples that come.
DEALS = {
    1: [[[2, 0, 1]], [[4], [3]]],
    2: [[[3, 0], [2]], [[], [5, 4]]],
    3: [[[7, 1, 3], [], [2]], [[0], [6, 4], []], [[], [], []]],
}


def save_both(rank, world_size, folder, deals, indexed, keys):
    """One cache that all hold and one in shards, saved after the same merges; what this rank reads of the second."""
    for dst, name in ((None, "whole"), ("shard", "shards")):
        cache = new_cache(dst)
        for n, by_rank in enumerate(deals):
            with cache.deferred_mode():
                if rank == 0:
                    cache.add("empty", torch.empty(0, 3), [] if indexed else None)
                for i in by_rank[rank]:
                    index = [i] if indexed else None
                    local = local_of(i, rank, keys)
                    if not indexed and "top" in local:
                        del local["top"]  # names samples
                    cache.cat(local, index)
                    seen = torch.tensor([10 * i + rank])
                    cache.add("noted", torch.tensor([[i]]), None if index is None else [i], seen=seen)
            if n == 0 and dst == "shard":  # reading changes nothing
                read_here(cache)
        cache.save(f"{folder}/{name}", model="tiny")
    assert list(cache) == list(dc.load(f"{folder}/whole"))
    return read_here(cache)


def read_here(cache):
    found = {}
    for key in cache:
        try:
            found[key] = cache[key]
        except dc.HeldElsewhere as error:
            found[key] = str(error)
    return found


def check_saved(folder, rounded=("mean", "moments", "ragged", "mean_of_0", "mean_of_1", "mean_of_2")):
    whole, shards = dc.load(f"{folder}/whole"), dc.load(f"{folder}/shards", verify=True)
    assert list(whole) == list(shards)
    for key in whole:
        if key in rounded:  # reduced in another order
            torch.testing.assert_close(shards[key], whole[key], rtol=0, atol=1e-6, equal_nan=True)
        else:
            assert same(shards[key], whole[key]), (key, shards[key], whole[key])
        if key in (*ROWS, "noted", "empty") or key.startswith("joined"):
            assert same(shards.rows(key), whole.rows(key)), key
            assert int(shards.count(key)) == int(whole.count(key))
    assert (shards._ledger.to_plain(), shards._num_samples) == (whole._ledger.to_plain(), whole._num_samples)
    return shards


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_shards_save_is_what_a_cache_that_all_hold_saves(ranks, tmp_path, world_size, indexed):
    deals = [by_rank[:world_size] for by_rank in DEALS[world_size]] if world_size > 1 else [[[2, 0, 1]], [[4, 3]]]
    read = ranks.run(world_size, save_both, str(tmp_path), deals, indexed, None)
    loaded = check_saved(tmp_path)
    came = [(i, rank) for by_rank in deals for rank, numbers in enumerate(by_rank) for i in numbers]
    if indexed:
        came.sort()
    assert torch.equal(loaded["joined"], torch.tensor([[i, rank, -i] for i, rank in came]))
    assert torch.equal(loaded.rows("noted")["seen"], torch.tensor([10 * i + rank for i, rank in came]))
    assert loaded["empty"].shape == (0, 3)
    for rank, found in enumerate(read):  # each rank reads its own rows, which lie where they came
        own = [(i, r) for i, r in came if r == rank]
        assert torch.equal(found["joined"], torch.tensor([[i, r, -i] for i, r in own]).reshape(-1, 3).long())
        assert found["joined_of_0"].tolist() == [i for i, r in own if rank == 0]
        assert found["words"] == read[0]["words"] and found["function"] == read[0]["function"]


def test_a_sample_that_came_twice_is_saved_once_as_the_cluster_first_saw_it(ranks, tmp_path):
    deals = [[[5, 1], [1, 1, 3]], [[3, 0], [5, 5]], [[3, 1], []]]
    read = ranks.run(2, save_both, str(tmp_path), deals, True, ROWS)
    loaded = check_saved(tmp_path)
    assert loaded["joined"].tolist() == [[0, 0, 0], [1, 0, -1], [3, 1, -3], [5, 0, -5]]
    assert [found["joined"][:, 0].tolist() for found in read] == [[0, 1, 3, 5], [1, 3, 5]]


def test_a_saved_shard_merges_on_as_the_cache_that_it_is(ranks, tmp_path):
    ranks.run(2, save_both, str(tmp_path), DEALS[2], True, None)
    loaded, again = (dc.load(tmp_path / name) for name in ("shards", "whole"))
    more = local_of(9, 0)
    for cache in (loaded, again):
        part = dc.ActivationCache()
        for key, strategy in STRATEGIES.items():
            part.register_aggregation(key, strategy)
            cache.register_aggregation(key, strategy)
        part["mean"] = more["mean"]
        cache._absorb(part, index=[9])
    torch.testing.assert_close(loaded["mean"], again["mean"])
    assert int(loaded.count("mean")) == 6


def test_a_forged_order_is_refused_before_it_is_used(ranks, tmp_path):
    ranks.run(2, save_both, str(tmp_path), DEALS[2], True, ["joined"])
    text = (tmp_path / "shards/manifest.json").read_bytes()
    manifest = msgspec.json.decode(text)
    entry = next(entry for entry in manifest["entries"] if entry["key"] == "joined")
    entry["parts"] = entry["parts"][:1]  # the order now names rows behind the end
    (tmp_path / "shards/manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(dc.BadCache, match="the order of the rows of 'joined' names rows that aren't there"):
        dc.load(tmp_path / "shards")["joined"]
    entry["order"] = entry["parts"][0]
    (tmp_path / "shards/manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(dc.BadCache, match="the order of the rows of 'joined' is int64"):
        dc.load(tmp_path / "shards")


# -- what is read ----------------------------------------------------------------------------------------------


def read_shards(rank, world_size):
    cache = new_cache()
    assert cache.dst == "shard"
    for n in range(2):
        with cache.deferred_mode():
            for i in range(rank * (n + 1)):
                cache.cat(local_of(10 * i + rank, rank, ROWS), index=[100 - 10 * i - rank])
    offsets = cache.offsets("joined")
    with pytest.raises(KeyError, match="no key 'words'"):
        cache.offsets("words")
    cache.cat(local_of(rank, rank, ("mean", "words")), index=[rank])
    with pytest.raises(ValueError, match="'mean' has no rows in shards"):
        cache.offsets("mean")
    return offsets, cache["joined"], cache.rows("joined"), int(cache.count("joined")), len(cache), list(cache)


def test_offsets_say_where_each_ranks_rows_lie_when_put_one_after_the_other(ranks):
    """In the second merge a rank brings samples that it holds already, and as many new ones."""
    found = ranks.run(3, read_shards)
    for rank, (offsets, joined, rows, count, size, keys) in enumerate(found):
        assert offsets.tolist() == [0, 0, 2, 6] and offsets.dtype == torch.int64
        samples = rows["sample"].tolist() if rank else []
        assert len(joined) == count == len(samples) == offsets[rank + 1] - offsets[rank]
        assert samples == sorted(100 - 10 * i - rank for i in range(2 * rank))
        assert joined[:, 0].tolist() == [100 - sample for sample in samples]
        assert (size, keys) == (5, ["halves", "joined", "stacked", "mean", "words"])


def own_reductions(rank, world_size, num_merges):
    """Layers of four heads side by side, as hooks lay them out; then a few keys more, of which rank 1 alone has one."""
    cache = new_cache()
    cache.register_aggregation("p", "mean")
    owned = []
    for n in range(num_merges):
        local = dc.ActivationCache()
        for layer in range(8):
            for head in range(4):
                local[f"p_L{layer}H{head}"] = torch.full((16,), float(10 * layer + head + rank))
        if n == 1:
            local["p_late"] = torch.ones(64)
        if n == 1 and rank == 1:
            local["p_alone"] = torch.full((64,), 7.0)
        cache.cat(local)
        owned.append([key for key in cache if not isinstance(read_here(cache)[key], str)])
        for key in owned[-1]:
            if "L" in key:
                layer, head = int(key[3]), int(key[-1])
                expected = sum(10 * layer + head + r for r in range(world_size)) / world_size
                torch.testing.assert_close(cache[key], torch.full((16,), expected))
                assert int(cache.count(key)) == (n + 1) * world_size
    if "p_alone" in owned[-1]:
        assert cache["p_alone"].tolist() == [7.0] * 64
    elsewhere = next(key for key in cache if key not in owned[-1]) if world_size > 1 else None
    if elsewhere is not None:
        owner = cache._held.facts.shards.owners[elsewhere]
        for read in (cache.__getitem__, cache.count, cache.rows, cache.get):
            with pytest.raises(dc.HeldElsewhere, match=rf"'{elsewhere}' is held by rank {owner} \(dst=\"shard\"\)"):
                read(elsewhere)
    layers = []
    for layer in range(8):
        try:
            layers.append(cache["p", layer].shape[0])
        except dc.HeldElsewhere:
            layers.append(None)
    return owned, layers, cache._held.content._arena.nbytes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_reduction_lies_whole_on_one_rank_which_keeps_it(ranks, world_size):
    found = ranks.run(world_size, own_reductions, 3)
    keys = {f"p_L{layer}H{head}" for layer in range(8) for head in range(4)}
    for n, expected in ((0, keys), (1, keys | {"p_late", "p_alone"} - ({"p_alone"} if world_size == 1 else set()))):
        owned = [set(by_merge[n]) for by_merge, _, _ in found]
        assert set.union(*owned) == expected and sum(map(len, owned)) == len(expected)
    for by_merge, layers, _ in found:
        assert set(by_merge[0]) <= set(by_merge[1]) and by_merge[1] == by_merge[2]
        for layer, heads in enumerate(layers):  # a layer is read where all of its heads lie, never in part
            assert heads == (4 if all(f"p_L{layer}H{head}" in by_merge[2] for head in range(4)) else None)
    sizes = [nbytes for _, _, nbytes in found]
    assert max(sizes) - min(sizes) <= 2 * 65 * 8  # two of the largest states


def test_owners_are_balanced_by_bytes_and_get_neighbours():
    sizes = {f"k{i}": 8 * (1 + i % 97) for i in range(10_000)}
    shards = Shards.none(1024).owning(sizes)
    by_rank = list(shards.owners.values())
    assert by_rank == sorted(by_rank)  # stretches, so that a segment is cut into few
    assert sum(shards.nbytes) == sum(sizes.values())
    assert max(shards.nbytes) - min(shards.nbytes) <= 2 * max(sizes.values())
    assert shards.owning(sizes) is shards
    one_by_one = Shards.none(64)
    for i in range(640):
        one_by_one = one_by_one.owning({f"k{i}": 800})
    assert one_by_one.nbytes == (8000,) * 64
    assert max(Shards.none(4).owning({"one": 0}).owners.values()) < 4


# -- what moves and what it takes --------------------------------------------------------------------------------


def bytes_moved(rank, world_size):
    moved = []
    transfers = merging.Transfer

    def noted(buffer, op, root=None, to=None):
        moved.append((op, root, buffer.nbytes))
        return transfers(buffer, op, root, to)

    cache = new_cache(bucket_bytes=2**20)
    for i in range(2):  # the second merge is of a layout that is known
        del moved[:]
        cuts = mock.patch.object(merging, "Cut", wraps=segments.Cut)
        with mock.patch.object(merging, "Transfer", noted), cuts as cut:
            cache.cat(local_of(i, rank, ("joined", "mean", "largest", "moments")), index=[world_size * i + rank])
        if i == 1:
            found = sorted(moved, key=str), cut.call_count
    return found


def test_rows_stay_and_states_go_to_their_owners_in_few_collectives(ranks):
    (moved, cuts), other = ranks.run(2, bytes_moved)
    assert (moved, cuts) == other and cuts == 0  # what was worked out for a layout is kept
    # mean: 4 float64, an int64; largest: 4 float32, an int64; moments: count and total to all, then the centred sum.
    assert not any(op == "copy" for op, _, _ in moved)
    assert sum(nbytes for _, _, nbytes in moved) == (4 * 8 + 8) + (4 * 4 + 8) + (8 + 4 * 8 + 4 * 8)
    assert {root for _, root, _ in moved} == {0, 1, None} and len(moved) <= 7


def test_a_merge_of_shards_is_told_to_take_no_rows():
    rows = KeySchema("r", "rows", "{}", row_shape=(1024,), dtype="float32")
    mean = KeySchema("m", "fields", "{}", (FieldSchema("total", (64,), "float64", "sum", 0),), result="float32")
    offers = [Offer(np.array([100]), np.array([-1])), Offer()]
    holdings = Holdings(("m", "r"), np.array([[True, True], [True, False]]), np.empty(0, dtype=np.int64))
    schemas = {"m": mean, "r": rows}
    whole = make_plan(schemas, holdings, offers, {})
    assert needed_bytes(whole, 1, "cpu", None, 0, 0) == 100 * 1024 * 4 + 64 * 8
    shards = make_plan(schemas, holdings, offers, {}, Shards.none(2))
    assert shards.payloads == () and shards.shards.num_rows["r"].tolist() == [100, 0]
    owner = shards.shards.owners["m"]
    assert [needed_bytes(shards, rank, "cpu", None, 0, 0) for rank in (owner, 1 - owner)] == [2 * 512, 512]
    alone = Holdings(("m", "r"), np.array([[True, True], [False, False]]), np.empty(0, dtype=np.int64))
    (sent,) = make_plan(schemas, alone, offers, {}, Shards({"m": 1}, (0, 512), {})).payloads
    assert (sent.rank, sent.to, sent.nbytes) == (0, 1, 512)


# -- failures --------------------------------------------------------------------------------------------------


def state_of(cache):
    """What can be read here, and the delta, as plain values."""
    words = {key: str(value) for key, value in read_here(cache).items()}
    return words, {key: str(cache.delta[key]) for key in cache.delta}, cache._held.facts.epoch


def fail_and_go_on(rank, world_size):
    cache = new_cache()
    cache.cat(local_of(rank, rank), index=[rank])
    cache._held.delta._absorb(local_of(10 + rank, rank), index=[10 + rank])
    before = state_of(cache)
    broken = mock.patch.object(merging, "_build", side_effect=RuntimeError("no build")) if rank == 1 else nullcontext()
    for _ in range(2):
        with broken, pytest.raises((dc.PeerFailed, RuntimeError), match="no build"):
            cache.merge()
        assert state_of(cache) == before
    cache.merge()
    once = new_cache()
    for base in (0, 10):
        once.cat(local_of(base + rank, rank), index=[base + rank])
    assert state_of(cache)[0] == state_of(once)[0]
    return cache.offsets("joined").tolist()


def test_a_merge_that_fails_changes_nothing_and_the_next_takes_it_along(ranks):
    assert ranks.run(2, fail_and_go_on) == [[0, 2, 4]] * 2


def fail_to_save(rank, world_size, folder, bad, how):
    cache = new_cache(timeout_s=3 if how == "killed" else 20)
    cache.cat(local_of(rank, rank), index=[rank])
    write, target = Writer.write, Path(folder) / "out"

    def written(writer, path, poll):
        if rank != bad:
            return write(writer, path, poll)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device", str(path))

    with mock.patch.object(Writer, "write", written):
        try:
            cache.save(target if how != "apart" or rank != bad else Path(folder) / "apart" / "out")
            raise AssertionError("it was saved")
        except (dc.PeerFailed, OSError) as error:
            failed = f"{type(error).__name__}: {error}"
    if how != "killed":
        dist.barrier()
        assert os.listdir(folder) == []
        cache.save(target)
    elif rank == 0:
        assert os.listdir(folder) == []
    return failed


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_for_all_and_nothing_is_left(ranks, tmp_path, bad):
    found = ranks.run(3, fail_to_save, str(tmp_path), bad, "full")
    assert found[bad].startswith("OSError: [Errno 28] cannot save")
    for rank in {0, 1, 2} - {bad}:
        assert found[rank].startswith(f"PeerFailed: rank {bad} raised OSError: [Errno 28] cannot save")
    assert len(dc.load(tmp_path / "out", verify=True)["joined"]) == 3
    names = [file.name for file in read_manifest(tmp_path / "out").files]
    assert names == [f"data-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted([*names, "SHA256SUMS", "manifest.json"]) == sorted(os.listdir(tmp_path / "out"))


def test_a_rank_that_does_not_see_the_folder_is_named_with_what_to_do(ranks, tmp_path):
    found = ranks.run(2, fail_to_save, str(tmp_path), 1, "apart")
    assert found[1].startswith("FileNotFoundError: cannot save to") and "a file system that they share" in found[1]
    assert found[0].startswith("PeerFailed: rank 1 raised FileNotFoundError")


def test_a_rank_that_is_killed_while_it_writes_ends_the_save_in_seconds(ranks, tmp_path):
    first, killed, third = ranks.outcomes(3, fail_to_save, str(tmp_path), 1, "killed", timeout_s=30)
    assert killed.died
    for outcome in (first, third):
        assert outcome.value is not None, outcome.traceback
        assert outcome.value.startswith("PeerFailed: rank 1 was silent for 3 s while others waited to save")


def lose_the_last_vote(rank, world_size, folder):
    """Rank 1 gives up when rank 0 has renamed the folder, and before all are told."""
    cache = new_cache()
    cache.cat(local_of(rank, rank), index=[rank])
    publish = sharded.publish

    def then_end(*args, **parts):
        publish(*args, **parts)
        merging.end_attempt(cache._comm, cache._attempt, 1, "gave up")

    with mock.patch.object(sharded, "publish", then_end), pytest.raises(dc.DistcacheError, match="gave up"):
        cache.save(f"{folder}/out")
    dist.barrier()
    return os.listdir(folder)


def test_a_folder_that_was_published_in_vain_is_taken_back(ranks, tmp_path):
    assert ranks.run(2, lose_the_last_vote, str(tmp_path)) == [[], []]


def save_in_doubt(rank, world_size, folder):
    cache = new_cache()
    cache.cat(local_of(rank, rank), index=[rank])
    if rank == 1:
        cache._held.doubt = merging.Merged(cache._held.content, cache._held.facts, None, segments.Arena())
    with pytest.raises(dc.MergeInDoubt if rank == 1 else dc.PeerFailed, match="may have been committed by the others"):
        cache.save(f"{folder}/out")
    cache.merge()
    cache.save(f"{folder}/out")


def test_a_rank_that_does_not_know_whether_it_merged_saves_nothing(ranks, tmp_path):
    ranks.run(2, save_in_doubt, str(tmp_path))
    assert os.listdir(tmp_path) == ["out"]


def rejoin_all_and_some(rank, world_size):
    cache = new_cache()
    some = dist.new_group([0, 1])
    cache.rejoin()
    cache.cat(local_of(rank, rank), index=[rank])
    cache.rejoin()
    cache.cat(local_of(10 + rank, rank), index=[10 + rank])
    before = state_of(cache)
    if rank < 2:
        with pytest.raises(
            ValueError, match=r'lies in shards \(dst="shard"\) of a group of 3, and the new one has its'
        ):
            cache.rejoin(some)
    assert state_of(cache) == before
    fresh = new_cache()
    if rank < 2:
        fresh.merge(some)
        fresh.cat(local_of(rank, rank), index=[rank])
        assert fresh.offsets("joined").tolist() == [0, 1, 2]
    return cache.offsets("joined").tolist()


def test_shards_rejoin_as_long_as_no_rank_is_lost(ranks):
    assert ranks.run(3, rejoin_all_and_some) == [[0, 2, 4, 6]] * 3


def test_one_setting_for_all_and_none_but_these(ranks):
    with pytest.raises(ValueError, match="dst is a rank below 1, 'shard' or None, got 'shards'"):
        dc.DistributedCache(dst="shards")
    for found in ranks.run(2, settings_differ):
        assert found.startswith("ranks differ in dst, by rank: [-1, -2].")


def settings_differ(rank, world_size):
    cache = new_cache("shard" if rank else None)
    with pytest.raises(dc.SchemaMismatch) as caught:
        cache.merge()
    return str(caught.value)


# -- the oracle ------------------------------------------------------------------------------------------------


def test_an_order_that_forgot_the_merges_would_be_found_out():
    """Rank 0's rows of two merges, then rank 1's of one: put rank by rank they are in no one's order."""
    columns = [{"sample": torch.tensor([n]), "position": torch.tensor([0])} for n in range(3)]
    by_rank = [[[0, 1, columns[0], False], [1, 1, columns[2], False]], [[0, 1, columns[1], False]]]
    order, known = sharded.in_order(by_rank)
    assert order.tolist() == [0, 2, 1] and known.by_name["sample"].tolist() == [0, 1, 2]
    planted = [[[0, 1, columns[0], False], [0, 1, columns[2], False]], [[0, 1, columns[1], False]]]
    assert sharded.in_order(planted)[0] is None


@pytest.mark.parametrize("owners", [(0, 0, 1, 1), (1, 0, 1, 0), (1, 1, 1, 1)], ids=str)
def test_a_cut_gives_each_owner_its_keys_wherever_they_lay(owners):
    """Slabs of four keys, one of states without elements, and a hole where a key was dropped: views stay views."""
    arena = segments.Arena()
    device = torch.device("cpu")
    for site, shape in (("a", (3,)), ("none", (0,)), ("b", (2, 2))):
        keys = [f"{site}{i}" for i in range(4)]
        dtypes = {"total": torch.float64, "count": torch.int64}
        arena.reserve(keys, dc.Mean(), {"total": shape, "count": ()}, dtypes, torch.float32, device)
        for i, key in enumerate(keys):
            arena.state(key)["total"].fill_(i)
            arena.state(key)["count"].fill_(10 + i)
    arena.drop("a1")
    by_key = {key: owners[int(key[-1])] for key in arena.entries}
    cuts = [segments.Cut(arena, by_key, rank) for rank in range(2)]
    for segment_id, spans in cuts[0].spans.items():
        assert spans == cuts[1].spans[segment_id] == sorted(spans)
        assert not any(a.owner == b.owner and a.stop == b.start for a, b in itertools.pairwise(spans))
    for rank, cut in enumerate(cuts):
        part = cut.part(arena)
        assert list(part.entries) == [key for key, owner in by_key.items() if owner == rank]
        for key in part.entries:
            assert all(torch.equal(mine, arena.state(key)[name]) for name, mine in part.state(key).items())
        part.fold_arena(cut.part(arena))  # a second merge's: segments as they are
        assert all(torch.equal(part.state(key)["count"], 2 * arena.state(key)["count"]) for key in part.entries)
        assert cut.fits(arena, by_key) and not cut.fits(arena, dict(by_key))
