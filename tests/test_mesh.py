"""Caches of models that lie on several ranks: reduced over data axes, put together over the model's, once."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import distcache as dc
from distcache import merge as merging
from distcache import mesh as meshes
from distcache import pieces
from distcache.comm import TorchComm
from distcache.schema import KeySchema, strategy_facts
from distcache.testing import kill_self

N, D = 12, 8
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
STRATEGIES = {
    "cat": dc.Cat(),
    "mean": dc.Mean(),
    "sum": dc.Sum(),
    "moments": dc.Moments(),
    "max": dc.Max(),
    "topk": dc.TopK(2),
    "histogram": dc.Histogram(4, -2, 2, per_element=True),
    "grouped": dc.Grouped(dc.Mean(), 3, by="label"),
}
LABEL = torch.arange(N) % 3


def expected():
    """What one process that has all of the model says of all samples."""
    cache = dc.ActivationCache()
    for name, strategy in STRATEGIES.items():
        for split in ("whole", "split"):
            cache.register_aggregation(f"{split}_{name}", strategy)
            for i in range(N):
                cache.add(f"{split}_{name}", X[i : i + 1], index=[i], label=LABEL[i : i + 1])
    return {key: cache[key] for key in cache}


def rows_of(data_rank, data_size):
    """Uneven shares of the samples."""
    return [i for i in range(N) if (i * i) % data_size == data_rank] if data_size > 1 else list(range(N))


def collect(rank, world_size, shape, axes, data_axes, dst=None, blocks=1, check=None):
    """Every rank's content: samples dealt over data axes, every "split" key over "tp", in its order."""
    device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
    cache = dc.DistributedCache(mesh=device_mesh, data_axes=data_axes, dst=dst, timeout_s=20, check=check)
    mesh = cache._mesh
    for name, strategy in STRATEGIES.items():
        cache.register_aggregation(f"whole_{name}", strategy)
        cache.register_aggregation(f"split_{name}", strategy)
    parts = mesh.size("tp") if "tp" in axes else 1
    if "tp" in mesh.model_axes:
        cache.register_sharding("split_", dim=-1, axis="tp")
    mine = rows_of(cache.data_rank, cache.data_world_size)
    place = mesh.coordinate(rank).get("tp", 0) if "tp" in mesh.model_axes else 0
    for block in range(blocks):
        with cache.deferred_mode():
            for i in mine[block::blocks]:
                for name in STRATEGIES:
                    x = X[i : i + 1]
                    cache.add(f"whole_{name}", x, index=[i], label=LABEL[i : i + 1])
                    piece = x.tensor_split(parts if "tp" in mesh.model_axes else 1, -1)[place]
                    cache.add(f"split_{name}", piece, index=[i], label=LABEL[i : i + 1])
    if dst not in (None, rank):
        return list(cache)
    return {key: cache[key] for key in cache}


MESHES = {
    "tensor 2": ((2,), ("tp",), []),
    "tensor 3": ((3,), ("tp",), []),
    "data 2 × tensor 2": ((2, 2), ("dp", "tp"), ["dp"]),
    "tensor 2 × data 2": ((2, 2), ("tp", "dp"), ["dp"]),
    "data 2": ((2,), ("dp",), ["dp"]),
    "replicate 2 × shard 2": ((2, 2), ("dp_replicate", "dp_shard"), None),
}


def assert_same(found, one):
    assert list(found) == list(one)
    for key, value in one.items():
        pairs = [(found[key], value)] if isinstance(value, torch.Tensor) else [(found[key][n], value[n]) for n in value]
        for mine, theirs in pairs:
            exact = "cat" in key or not theirs.is_floating_point()
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if exact else 1e-6, equal_nan=True)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", MESHES)
def test_ranks_of_a_mesh_say_what_one_process_says(ranks, name, blocks):
    shape, axes, data_axes = MESHES[name]
    one = expected()
    for found in ranks.run(int(torch.tensor(shape).prod()), collect, shape, axes, data_axes, None, blocks):
        assert_same(dict(sorted(found.items())), dict(sorted(one.items())))


@pytest.mark.parametrize("dst", [0, 3])
def test_one_rank_alone_may_hold_what_was_put_together_and_all_know_its_keys(ranks, dst):
    one = expected()
    found = ranks.run(4, collect, *MESHES["data 2 × tensor 2"], dst)
    assert_same(dict(sorted(found[dst].items())), dict(sorted(one.items())))
    for rank in range(4):
        assert sorted(found[rank]) == sorted(one)


def test_the_oracle_fails_where_replicas_are_added_to_each_other(ranks):
    one = expected()
    [found, _] = ranks.run(2, counted_twice)
    assert not torch.allclose(found, one["whole_sum"])
    torch.testing.assert_close(found, 2 * one["whole_sum"])


def counted_twice(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    cache.register_aggregation("whole_sum", dc.Sum())
    with cache.deferred_mode():
        for i in range(N):
            cache.add("whole_sum", X[i : i + 1])
    return cache["whole_sum"]


# -- what is where ---------------------------------------------------------------------------------------------


def tensor_mesh(world_size):
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))


def uneven(rank, world_size):
    cache = dc.DistributedCache(mesh=tensor_mesh(world_size), timeout_s=20)
    cache.register_sharding("q", dim=-1, axis="tp")
    cache.register_sharding("w", dim=-2, axis="tp")
    cache.register_aggregation("q", dc.Mean(dim=0))
    cache.register_aggregation("w", dc.Sum())
    part = X.split([5, 2, 1], -1)[rank]
    local = dc.ActivationCache()
    local["q"] = part
    local["w"] = part.T.contiguous()
    cache.cat(local)
    return cache["q"], cache["w"]


def test_pieces_may_differ_in_size_and_lie_along_any_dim(ranks):
    for q, w in ranks.run(3, uneven):
        torch.testing.assert_close(q, X.mean(0))
        torch.testing.assert_close(w, X.T)


def stages(rank, world_size):
    """Two stages of a pipeline, each with two ranks of data: every stage has its own keys, and one that both have."""
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    cache = dc.DistributedCache(mesh=device_mesh, timeout_s=20)
    stage, mine = cache._mesh.coordinate(rank)["pp"], rows_of(cache.data_rank, cache.data_world_size)
    cache.register_aggregation("mean_", dc.Mean())
    cache.register_aggregation("rows_", dc.Cat())
    cache.register_aggregation("first_", dc.First())
    cache.register_aggregation("words_", dc.Extend())
    cache.register_aggregation("norms_", torch.stack)
    for block in range(2):
        with cache.deferred_mode():
            for i in mine:
                cache.add(f"mean_{stage}", X[i] + stage, index=[i])
                cache.add(f"rows_{stage}", X[i : i + 1] + stage, index=[i])
                cache.add("mean_both", X[i], index=[i])
            if stage == 1 and cache.data_rank == 0 and block == 0:
                local = dc.ActivationCache()
                local.register_aggregation("words_", dc.Extend())
                local["words_1"] = ["a", "b"]
                local["first_1"] = {"layer": 3}
                cache.cat(local)
        mine = []  # a further block brings nothing of its own for what was there
    label = {key: cache.rows(key)["sample"].tolist() for key in cache if key.startswith("rows_")}
    return {key: cache[key] for key in cache}, label, cache._held.content._ledger.to_plain()


def test_keys_of_some_ranks_alone_are_had_by_all(ranks):
    for found, samples, ledger in ranks.run(4, stages):
        for stage in (0, 1):
            torch.testing.assert_close(found[f"mean_{stage}"], X.mean(0) + stage)
            assert torch.equal(found[f"rows_{stage}"], X + stage)
            assert samples[f"rows_{stage}"] == list(range(N))
        torch.testing.assert_close(found["mean_both"], X.mean(0))
        assert found["words_1"] == ["a", "b"] and found["first_1"] == {"layer": 3}
        seen = {key for keys, _ in ledger for key in keys}
        assert {"mean_0", "mean_1", "mean_both"} <= seen


def saved(rank, world_size, path):
    cache = dc.DistributedCache(mesh=tensor_mesh(world_size), timeout_s=20)
    cache.register_sharding("q", dim=-1, axis="tp")
    cache.register_aggregation("q", dc.Mean())
    with cache.deferred_mode():
        for i in range(N):
            cache.add("q", X[i].tensor_split(world_size)[rank], index=[i])
    cache.save(path)


def test_what_was_put_together_is_saved_as_one_cache_that_knows_its_samples(ranks, tmp_path):
    ranks.run(2, saved, tmp_path / "saved")
    again = dc.load(tmp_path / "saved")
    torch.testing.assert_close(again["q"], X.mean(0))
    more = dc.ActivationCache()
    more.register_aggregation("q", dc.Mean())
    more.add("q", X[0], index=[0])
    with pytest.raises(dc.DuplicateSamples):
        again.cat(more)


# -- bytes -----------------------------------------------------------------------------------------------------


def moved(rank, world_size, split):
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cache = dc.DistributedCache(mesh=device_mesh, timeout_s=20)
    reduced, copied, run = [0], [0], TorchComm.run

    def counting(self, transfers, poll):
        for transfer in transfers:
            if transfer.op == "copy":
                copied[0] += transfer.buffer.nbytes if transfer.buffer.nbytes > 50_000 else 0
            else:
                reduced[0] += transfer.buffer.nbytes
        return run(self, transfers, poll)

    TorchComm.run = counting
    try:
        if split:
            cache.register_sharding("q", dim=-1, axis="tp")
        value = torch.arange(40_000.0)
        piece = value.tensor_split(2)[rank % 2] if split else value
        with cache.deferred_mode():
            for key in ("q0", "q1"):
                cache.register_aggregation(key, dc.Mean())
                cache.add(key, piece)
    finally:
        TorchComm.run = run
    assert torch.equal(cache["q1"], value)
    return reduced[0], copied[0]


def test_what_is_split_is_reduced_in_pieces_and_each_piece_moves_once(ranks):
    for (pieces_reduced, pieces_copied), (reduced, copied) in zip(
        ranks.run(4, moved, True), ranks.run(4, moved, False), strict=True
    ):
        assert pieces_reduced <= reduced / 2 + 1000
        assert pieces_copied <= 2 * 40_000 * 8 + 1000 and copied == 0  # both halves of both keys, in float64


# -- what doesn't fit ------------------------------------------------------------------------------------------


def wrong(rank, world_size, kind):
    axes, data_axes = ("dp", "tp"), ["dp"]
    if kind == "data axis for a model's":
        data_axes = ["dp", "tp"]
    if kind == "model axis for data's":
        data_axes = []
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
    check = "replicas" if kind == "replicas" else None
    cache = dc.DistributedCache(mesh=device_mesh, data_axes=data_axes, timeout_s=20, check=check)
    cache.register_aggregation("", dc.Mean())
    if (kind == "one rank thinks otherwise" and rank != 2) or kind in ("a piece is missing", "covariance", "sizes"):
        cache.register_sharding("q", dim=-1, axis="tp")
    if kind == "covariance":
        cache.register_aggregation("q", dc.Covariance())
    if kind == "one rank thinks otherwise":
        rank_piece = X[:, :4]
    index = range(6) if rank < 2 else range(6, N)
    with cache.deferred_mode():
        for i in index:
            x = X[i, : 3 if kind == "sizes" and rank > 1 else 4]
            if kind == "replicas":
                x = x + (rank == 3)
            if kind != "a piece is missing" or rank % 2 == 0:
                cache.add("q", rank_piece[i] if kind == "one rank thinks otherwise" else x, index=[i])
            cache.add("r", X[i], index=[i])


WRONG = {
    "data axis for a model's": (dc.DuplicateSamples, "would count twice"),
    "model axis for data's": (dc.SchemaMismatch, "have seen other samples, where they should have parts of one model"),
    "one rank thinks otherwise": (dc.SchemaMismatch, r"placement .*split\(dim -1 over tp\)"),
    "a piece is missing": (dc.SchemaMismatch, r"nobody holds its piece at \{'tp': 1\} \(1 of 2 are there\)"),
    "replicas": (dc.SchemaMismatch, "'q' should be the same on ranks .*, and isn't"),
    "covariance": (dc.SchemaMismatch, "covariances between dims on different ranks can't be known"),
    "sizes": (dc.SchemaMismatch, "expected|against"),
}


def rows_alone(rank, world_size, indexed, check):
    """Ranks that have samples of their own along an axis that is said to be the model's, and nothing that reduces."""
    cache = dc.DistributedCache(mesh=tensor_mesh(world_size), timeout_s=20, check=check)
    cache.register_aggregation("", dc.Cat())
    mine = range(3) if rank == 0 else range(3, 3 + (3 if indexed else 5))
    try:
        with cache.deferred_mode():
            for i in mine:
                cache.add("rows", X[i : i + 1], index=[i] if indexed else None)
    except dc.SchemaMismatch as error:
        return str(error)
    return f"nothing was raised: {cache['rows'].shape}"


@pytest.mark.parametrize("check", [None, "replicas"])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "without an index"])
def test_rows_of_other_samples_are_not_taken_for_replicas(ranks, indexed, check):
    found = ranks.run(2, rows_alone, indexed, check)
    assert found[0] == found[1] and "have seen other samples" in found[0], found


def caught(rank, world_size, kind):
    try:
        wrong(rank, world_size, kind)
    except dc.DistcacheError as error:
        return type(error).__name__, str(error)
    return None, "nothing was raised"


@pytest.mark.parametrize("kind", WRONG)
def test_a_mesh_that_ranks_think_of_differently_is_caught_by_the_agreement_on_every_rank(ranks, kind):
    cls, words = WRONG[kind]
    found = ranks.run(4, caught, kind)
    for name, message in found:
        assert name == cls.__name__ and re.search(words, message), message
    assert len({message for _, message in found}) == 1


def refused(rank, world_size):
    found = []
    device_mesh = tensor_mesh(world_size)
    for options in (
        dict(mesh=device_mesh, dst="shard"),
        dict(data_axes=["dp"]),
        dict(mesh=device_mesh, check="all"),
        dict(mesh=device_mesh, data_axes=["dp"]),
        dict(mesh=init_device_mesh("cpu", (world_size,))),
        dict(mesh=init_device_mesh("cpu", (world_size,), mesh_dim_names=("rows",))),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            dc.DistributedCache(timeout_s=20, **options)
        found.append(str(error.value))
    cache = dc.DistributedCache(mesh=device_mesh, timeout_s=20)
    for arguments in (("q", -1, "dp"), ("q", 0, "tp"), ("q", -1, "rows")):
        with pytest.raises(ValueError, match=r".") as error:
            cache.register_sharding(*arguments)
        found.append(str(error.value))
    with pytest.raises(ValueError, match="is of a mesh's axes") as error:
        dc.DistributedCache(timeout_s=20).register_sharding("q", -1, "tp")
    return found


def test_meshes_and_axes_that_mean_nothing_are_refused(ranks):
    for found in ranks.run(2, refused):
        words = ["leaves rows where they are", "check is", "check is", "are no axes of the mesh", "have no names",
                 "is 'rows' of the axes", "axis is one of", "dim counts from the end", "axis is one of"]  # fmt: skip
        for message, expected_words in zip(found, words, strict=True):
            assert expected_words in message


# -- planning, without ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [((2, 2), (1, 3)), ((4,), (1, 1, 2))], ids=str)
def test_pieces_over_two_axes_are_put_where_they_belong(sizes):
    rows, columns = sizes
    whole = torch.arange(sum(rows) * sum(columns)).view(sum(rows), sum(columns))
    parts = {(i, j): part for i, band in enumerate(whole.split(rows)) for j, part in enumerate(band.split(columns, 1))}
    shape, where = meshes.put_together({place: tuple(x.shape) for place, x in parts.items()}, [-2, -1], "q")
    found = torch.zeros(shape, dtype=torch.int64)
    for place, x in parts.items():
        found[where[place]] = x
    assert torch.equal(found, whole)


def test_pieces_that_overlap_or_leave_gaps_are_refused():
    with pytest.raises(dc.SchemaMismatch, match="don't fit"):
        meshes.put_together({(0,): (2, 3), (1,): (3, 3)}, [-1], "q")
    with pytest.raises(dc.SchemaMismatch, match="its pieces have shape"):
        meshes.put_together({(0,): (3,), (1,): (3,)}, [-2], "q")


def test_each_rank_knows_its_place_and_whom_it_reduces_with():
    mesh = [meshes.Mesh(("pp", "dp", "tp"), (2, 3, 2), tuple(range(12)), frozenset({"dp"}), rank) for rank in range(12)]
    for rank, (pp, dp, tp) in enumerate(itertools.product(range(2), range(3), range(2))):
        assert mesh[rank].coordinate(rank) == {"pp": pp, "dp": dp, "tp": tp}
        assert mesh[rank].data_ranks == tuple(pp * 6 + d * 2 + tp for d in range(3))
        assert mesh[rank].model_ranks == tuple(p * 6 + dp * 2 + t for p in range(2) for t in range(2))


def test_placements_are_told_in_words_that_are_read_again():
    for placement in (meshes.Placement(), meshes.Placement((("tp", -1), ("ep", -3)))):
        assert meshes.Placement.named(str(placement)) == placement


def test_lists_are_never_split():
    schema = KeySchema("words", "list", strategy_facts(dc.Extend()), placement="split(dim -1 over tp)")
    told, mesh = [{"words": pieces.Kept(schema, ())}] * 2, meshes.Mesh(("tp",), (2,), (0, 1), frozenset(), 0)
    with pytest.raises(dc.SchemaMismatch, match="no tensors that could be put together"):
        pieces.plan_assembly(told, mesh, (0, 1))


# -- faults ----------------------------------------------------------------------------------------------------


def lose_a_rank(rank, world_size, bad, where):
    """Three of four ranks go on after one is killed: as it arrives, or while pieces are put together."""
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cache = dc.DistributedCache(mesh=device_mesh, timeout_s=5)
    cache.register_sharding("q", dim=-1, axis="tp")
    cache.register_aggregation("q", dc.Mean())
    if rank == bad:
        replaced = {"arrive": "arrive", "assemble": "assemble"}[where]
        setattr(merging, replaced, lambda *args: kill_self())
    try:
        with cache.deferred_mode():
            cache.add("q", X[rank].tensor_split(2)[rank % 2])
    except dc.PeerFailed as error:
        state = cache.delta._cache._arena.state("q")
        return str(error), state["total"].tolist(), list(cache)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("where", ["arrive", "assemble"])
@pytest.mark.parametrize("bad", [0, 3])
def test_when_a_rank_of_a_mesh_is_killed_the_others_raise_and_keep_their_deltas(ranks, bad, where):
    outcomes = ranks.outcomes(4, lose_a_rank, bad, where)
    for rank, outcome in enumerate(outcomes):
        if rank != bad:
            message, total, keys = outcome.value
            assert f"rank {bad}" in message and keys == []
            torch.testing.assert_close(
                torch.tensor(total, dtype=torch.float64), X[rank].tensor_split(2)[rank % 2].double()
            )
