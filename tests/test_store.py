"""What is saved comes back, merges on, and is never half there; what a stranger wrote is checked before it's used."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import pickle
import resource
import shutil
import string
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import distcache as dc
from distcache import codec, store
from distcache.errors import BadCache, DuplicateSamples, HeldElsewhere
from distcache.store import load, read_manifest, save
from distcache.strategies import (
    Cat,
    Columns,
    Function,
    Grouped,
    Histogram,
    Mean,
    TopK,
    Value,
    Weighted,
    registered_strategies,
)
from distcache.testing import kill_self

quick = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def same(a: Any, b: Any) -> bool:
    """Equal, of the same type, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(codec.as_bytes(a), codec.as_bytes(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    return bool(a == b or (a != a and b != b))


def holding(**values: Any) -> dc.ActivationCache:
    cache = dc.ActivationCache()
    cache.update(values)
    return cache


def again(cache: dc.ActivationCache, folder: Path, **info: str) -> dc.ActivationCache:
    """Saved and loaded."""
    path = folder / f"saved{len(list(folder.iterdir()))}"
    save(cache, path, info=info)
    return load(path)


def test_the_comparison_tells_alike_from_equal():
    one = torch.ones(2)
    assert same([1, (2.0, {"a": one})], [1, (2.0, {"a": one.clone()})]) and same(float("nan"), float("nan"))
    for a, b in [(1, True), ((1,), [1]), (one, one.half()), (one, one[None]), (0.0, None), ("a", b"a")]:
        assert not same(a, b)
    assert not same(torch.tensor(0.0), torch.tensor(-0.0))


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", codec.DTYPES.values(), ids=str)
def test_tensors_of_every_dtype_and_shape_come_back(tmp_path, dtype):
    x = torch.arange(24 * dtype.itemsize, dtype=torch.uint8)
    x = (x % 2 if dtype == torch.bool else x).view(dtype).reshape(-1, 4)
    cache = holding(whole=x, none=x[:0], scalar=x[0, 0], strided=x[:, ::2].t(), again=x, deep=x[None, :0, None])
    loaded = again(cache, tmp_path)
    assert list(loaded) == list(cache)
    for key in cache:
        assert same(loaded[key], cache[key]), key


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(max_size=20),
    st.builds(torch.full, st.lists(st.integers(0, 3), max_size=3), st.integers(-5, 5), dtype=st.just(torch.int16)),
)
plain = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(string.printable, max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_what_is_mapped_is_aligned(tmp_path):
    cache = holding(
        byte=torch.ones(3, dtype=torch.int8), float=torch.ones(3), wide=torch.ones(1, dtype=torch.complex128)
    )
    loaded = again(cache, tmp_path)
    assert [loaded[key].data_ptr() % loaded[key].element_size() for key in cache] == [0, 0, 0]


@quick
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), plain, max_size=4))
def test_any_plain_value_under_any_name_comes_back_with_its_type_and_place(tmp_path, values):
    loaded = again(holding(**values), tmp_path)
    assert list(loaded) == list(values)
    assert all(same(loaded[key], value) for key, value in values.items())


@pytest.mark.parametrize("key", ["", "a/b", "../../etc/passwd", ".", "__metadata__", "0", "ключ 🔑", "a\x00b", '"\\\n'])
def test_no_name_is_special(tmp_path, key):
    cache = holding(**{key: torch.tensor([1.0, 3.0]), key + "x": 5})
    cache.register_aggregation(key, Cat() if key else Mean())
    assert same(dict(again(cache, tmp_path).items()), dict(cache.items()))


def test_weights_and_notes_stay_with_their_values(tmp_path):
    cache = dc.ActivationCache()
    cache.register_aggregation("m", "mean")
    cache["m"] = Weighted(torch.tensor([1.0, 5.0]), 3.0)
    cache.add_with_info("n", 7, "from rank 3")
    loaded = again(cache, tmp_path)
    assert same(loaded["m"].weight, 3.0) and loaded["n"].info() == "from rank 3" and loaded["n"].value() == 7
    loaded.cat(holding(m=Weighted(torch.tensor([5.0, 5.0]), 1.0), n=7))
    assert loaded["m"].tolist() == [2.0, 5.0]  # (3·1 + 5) / 4


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, torch.ones(2).to_sparse(), {"a": [set()]}], ids=["object", "int key", "sparse", "set"]
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="cannot save 'bad'"):
        save(holding(good=torch.ones(1), bad=value), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_text_that_is_no_utf8_is_named(tmp_path):
    for cache in (holding(**{"\ud800": 1}), holding(k="\ud800")):
        with pytest.raises(TypeError, match=r"cannot save .*: cannot send a str that is no valid text"):
            save(cache, tmp_path / "out")


def test_info_and_versions_stand_in_the_manifest(tmp_path):
    save(holding(a=1), tmp_path / "out", info={"model": "tiny"}, world_size=3)
    found = read_manifest(tmp_path / "out")
    assert found.info == {"model": "tiny"} and found.world_size == 3
    assert found.versions["torch"] == torch.__version__ and {"python", "safetensors"} <= found.versions.keys()
    holding(a=1).save(tmp_path / "other", model="tiny")
    assert read_manifest(tmp_path / "other").info == {"model": "tiny"}
    with pytest.raises(TypeError, match="step='3'"):
        save(holding(a=1), tmp_path / "third", info={"step": 3})  # type: ignore[dict-item]


def test_a_cache_may_lie_in_several_files(tmp_path):
    save(holding(a=torch.ones(2), b=torch.zeros(2)), tmp_path / "out")
    shutil.copy(tmp_path / "out" / "data.safetensors", tmp_path / "out" / "rank-1.safetensors")

    def spread(manifest):
        manifest["files"].append({**manifest["files"][0], "name": "rank-1.safetensors"})
        manifest["entries"][1]["values"][0]["data"]["file"] = 1

    forge(tmp_path / "out", spread)
    loaded = load(tmp_path / "out")
    assert loaded["b"].tolist() == [0, 0]
    (tmp_path / "out" / "rank-1.safetensors").unlink()
    assert loaded["a"].tolist() == [1, 1]
    with pytest.raises(BadCache, match=r"rank-1\.safetensors can't be read"):
        load(tmp_path / "out")


def test_other_tools_can_read_the_file(tmp_path):
    cache = holding(a=torch.arange(3.0), b=torch.arange(3.0))
    cache.register_aggregation("b", "mean")
    cache.cat(holding(a=torch.ones(1), b=torch.arange(3.0)))
    save(cache, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "data.safetensors")
    assert sorted(map(tuple, (t.shape for t in tensors.values()))) == [(1,), (1, 3), (4,)]
    assert os.system(f"cd {tmp_path / 'out'} && sha256sum --quiet -c SHA256SUMS") == 0


# -- states --------------------------------------------------------------------------------------------------------


NEEDING_PARAMETERS = {"histogram": Histogram(4, -1, 1), "topk": TopK(2), "grouped": Grouped(Mean(), 3, by="label")}


def contribution(name: str, i: int) -> Any:
    if name in ("extend", "first"):
        return [f"s{i}"]
    if name == "average_pattern":
        return torch.rand(i + 2, i + 2, generator=torch.Generator().manual_seed(i))
    shape = (3,) if name == "covariance" else (1, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(i))


def merged(name: str, samples: range, indexed: bool) -> dc.ActivationCache:
    cache = dc.ActivationCache()
    cache.register_aggregation("k", NEEDING_PARAMETERS.get(name, name))
    for i in samples:
        columns = {"label": torch.tensor([i % 3])} if name == "grouped" else {}
        cache.add("k", contribution(name, i), index=[100 - i] if indexed else None, **columns)
    return cache


KINDS = [(name, indexed) for name, cls in registered_strategies().items() for indexed in {True, cls.needs_index}]


@pytest.mark.parametrize(("name", "indexed"), KINDS)
def test_a_state_of_every_strategy_merges_on_as_if_it_had_not_been_saved(tmp_path, name, indexed):
    first, second = (again(merged(name, part, indexed), tmp_path) for part in (range(3), range(3, 5)))
    assert same(first["k"], merged(name, range(3), indexed)["k"])
    first.cat(second)
    whole = merged(name, range(3), indexed)
    whole.cat(merged(name, range(3, 5), indexed))
    assert same(first["k"], whole["k"])
    assert first.explain() == whole.explain()
    twice = again(first, tmp_path)
    assert same(twice["k"], whole["k"])


def test_means_of_loaded_caches_weigh_by_their_counts(tmp_path):
    first, second = (again(part(xs), tmp_path) for xs in ([1.0, 2.0, 3.0], [10.0]))
    assert (first["m"] + second["m"]) / 2 == 6.0  # what saving means instead of states would give
    first.cat(second)
    assert first["m"] == torch.tensor([1.0, 2.0, 3.0, 10.0]).mean() == 4.0
    assert first.count("m") == 4


def test_samples_behind_a_loaded_reduction_do_not_count_twice(tmp_path):
    cache = dc.ActivationCache()
    cache.register_aggregation("m", "mean")
    cache.add("m", torch.ones(2), index=[4])
    cache.add("m", torch.ones(2), index=[9])
    loaded = again(cache, tmp_path)
    with pytest.raises(DuplicateSamples, match="has seen 9"):
        loaded.add("m", torch.ones(2), index=[9])
    loaded.add("m", torch.ones(2), index=[5])
    assert loaded.count("m") == 3


def test_registrations_are_kept(tmp_path):
    cache = holding(a_1=torch.ones(1))
    cache.register_aggregation("a_", Mean(ragged=(0,), size=8, accumulate=torch.float32))
    cache.register_aggregation("a_1", Cat(dim=1))
    loaded = again(cache, tmp_path)
    assert loaded._registry == cache._registry and list(loaded._registry) == ["a_", "a_1"]


def test_rows_are_saved_in_sample_order_and_their_columns_once(tmp_path):
    cluster = dc.DistributedCache()
    with cluster.deferred_mode():
        for sample in (3, 1, 2):
            row = torch.tensor([[10.0 * sample]])
            cluster.cat(holding(resid_0=row, resid_1=-row), index=[sample])
    cluster.save(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "data.safetensors")
    assert len(tensors) == 4  # two keys, sample and position
    assert any(tensor.flatten().tolist() == [10.0, 20.0, 30.0] for tensor in tensors.values())
    loaded = load(tmp_path / "out")
    assert loaded["resid_0"].tolist() == [[10.0], [20.0], [30.0]] and loaded["resid_1"].tolist() == [
        [-10],
        [-20],
        [-30],
    ]
    assert loaded.rows("resid_0")["sample"].tolist() == [1, 2, 3]
    loaded.add("resid_1", torch.tensor([[0.0]]), index=[0])
    assert loaded["resid_1"].flatten().tolist() == [0, -10, -20, -30]
    assert loaded.rows("resid_1")["sample"].tolist() == [0, 1, 2, 3]


def test_other_columns_come_along(tmp_path):
    cache = dc.ActivationCache()
    cache.register_aggregation("k", "cat")
    cache.add("k", torch.tensor([[1.0], [2.0]]), index=[7, 5], label=torch.tensor([1.5, 0.5]))
    loaded = again(cache, tmp_path)
    assert loaded["k"].tolist() == [[2.0], [1.0]]
    assert loaded.rows("k")["label"].tolist() == [0.5, 1.5] and loaded.rows("k")["sample"].tolist() == [5, 7]


def test_a_large_concatenation_is_put_in_order_a_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 40)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    cache = dc.ActivationCache()
    cache.register_aggregation("k", "cat")
    cache.add("k", order[:, None] * torch.ones(3), index=order)
    cache.add("k", order[:4, None] * torch.ones(3), index=order[:4])  # seen twice, kept once
    assert torch.equal(again(cache, tmp_path)["k"], torch.arange(50.0)[:, None].expand(50, 3))


def test_recorded_passes_are_joined_and_merge_on_as_rows(tmp_path):
    cache, values = dc.ActivationCache(), []
    for x, samples in ((torch.tensor([[5.0], [6.0]]), [2, 1]), (torch.tensor([[7.0]]), [0])):
        columns = {"sample": torch.tensor(samples), "position": torch.zeros(len(samples), dtype=torch.int64)}
        values.append(Value(x, rows=True, columns=Columns(columns, indexed=True)))
    cache._entries["k"] = store.RawEntry(values)
    loaded = again(cache, tmp_path)
    assert loaded["k"].tolist() == [[7.0], [6.0], [5.0]] == cache["k"].tolist()
    cluster = dc.DistributedCache()
    cluster.register_aggregation("k", "mean")
    cluster.cat(loaded)
    assert cluster["k"].tolist() == [6.0] and cluster.count("k") == 3  # rows, each counted once


def test_thousands_of_reductions_are_two_tensors(tmp_path):
    cluster = dc.DistributedCache()
    cluster.register_aggregation("m", "mean")
    cluster.cat(holding(**{f"m{i}": torch.full((4,), float(i)) for i in range(1000)}))
    cluster.save(tmp_path / "out")
    shapes = sorted(tuple(t.shape) for t in load_file(tmp_path / "out" / "data.safetensors").values())
    assert shapes == [(1000,), (1000, 4)]
    loaded = load(tmp_path / "out")
    assert all(loaded[f"m{i}"].tolist() == [float(i)] * 4 for i in range(1000))


# -- functions -----------------------------------------------------------------------------------------------------


def test_a_function_is_text_until_it_is_registered_again(tmp_path):
    cache = holding(k=torch.tensor([1, 2]))
    cache.register_aggregation("k", lambda values: torch.stack(values))
    loaded = again(again(cache, tmp_path), tmp_path)
    assert loaded["k"].tolist() == [1, 2]
    with pytest.raises(
        ValueError, match=r"test_store:.*<lambda>, and loading never imports.*register_aggregation\('k'"
    ):
        loaded.cat(holding(k=torch.tensor([3, 4])))
    assert loaded["k"].tolist() == [1, 2]
    loaded.register_aggregation("k", lambda values: torch.stack(values))
    loaded.cat(holding(k=torch.tensor([3, 4])))
    assert loaded["k"].tolist() == [[1, 2], [3, 4]]


def test_nothing_that_a_manifest_names_is_imported(tmp_path, monkeypatch):
    (tmp_path / "spring_the_trap.py").write_text("f = print")
    monkeypatch.syspath_prepend(tmp_path)
    cache = holding(k=torch.tensor([1, 2]))
    cache.register_aggregation("k", print)
    save(cache, tmp_path / "out")
    forge(tmp_path / "out", lambda m: m["registry"][0].update(function="spring_the_trap:f"))
    loaded = load(tmp_path / "out")
    assert loaded["k"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="spring_the_trap"):
        loaded.cat(holding(k=torch.tensor([3, 4])))
    with pytest.raises(ValueError, match="pickle"):
        pickle.dumps(loaded)
    assert "spring_the_trap" not in sys.modules
    importlib.import_module("spring_the_trap")  # it could have been
    assert "spring_the_trap" in sys.modules


def test_what_a_function_made_in_the_cluster_is_a_value(tmp_path):
    cache = dc.DistributedCache()
    cache.register_aggregation("k", lambda values: sum(values))
    with cache.deferred_mode():
        for n in (1, 2, 4):
            cache.cat(holding(k=n))
    cache.save(tmp_path / "out", model="tiny")
    loaded = load(tmp_path / "out")
    assert loaded["k"] == 7 and isinstance(loaded._registry["k"], Function)


# -- lazily --------------------------------------------------------------------------------------------------------


def test_a_key_is_read_when_it_is_asked_for_and_no_other(tmp_path):
    cache = holding(a=torch.ones(2), b=torch.ones(2), c=[1])
    cache.register_aggregation("a", "mean")
    cache.cat(holding(a=torch.ones(2), b=torch.ones(2), c=[1]))
    loaded = again(cache, tmp_path)
    assert all(isinstance(entry, store.LazyEntry) for entry in loaded._entries.values())
    assert "a" in loaded and len(loaded) == 3 and repr(loaded) == repr(cache)
    assert loaded["b"].tolist() == [1, 1, 1, 1]
    assert [isinstance(entry, store.LazyEntry) for entry in loaded._entries.values()] == [True, False, True]


def test_what_is_done_to_a_loaded_cache_never_touches_the_file(tmp_path):
    cache = holding(raw=torch.zeros(4), cat=torch.zeros(4), mean=torch.zeros(4))
    cache.register_aggregation("mean", "mean")
    cache.cat(cache)
    save(cache, tmp_path / "out")
    before = (tmp_path / "out" / "data.safetensors").read_bytes()
    loaded = load(tmp_path / "out")
    for key in loaded:
        loaded[key].add_(1)
    loaded.add("mean", torch.ones(4))
    del loaded["raw"]
    loaded["raw"] = 3
    assert (tmp_path / "out" / "data.safetensors").read_bytes() == before
    assert all(load(tmp_path / "out")[key].sum() == 0 for key in loaded)


def test_a_folder_that_went_away_or_was_changed_is_told(tmp_path):
    save(holding(a=torch.ones(2), b=torch.ones(2)), tmp_path / "out")
    moved, changed = load(tmp_path / "out"), load(tmp_path / "out")
    assert moved["a"].tolist() == [1, 1]
    data = tmp_path / "out" / "data.safetensors"
    data.write_bytes(data.read_bytes()[:-4])  # cut short in place: mapped memory would end the process
    with pytest.raises(BadCache, match="changed since it was loaded"):
        changed["a"]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(BadCache, match=r"can't be read any more: No such file"):
        moved["b"]
    assert moved["a"].tolist() == [1, 1]
    with pytest.raises(FileNotFoundError, match="no saved cache"):
        load(tmp_path / "out")


# -- all or nothing ------------------------------------------------------------------------------------------------


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(FileExistsError, match=r"never overwrites\. Choose another name"):
            save(holding(a=1), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_target_that_appears_in_the_meantime_is_not_overwritten(tmp_path, monkeypatch):
    def made_by_another(folder):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr(store, "_sync_folder", made_by_another)
    with pytest.raises(FileExistsError, match="never overwrites"):
        save(holding(a=1), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "theirs").exists()


def test_a_save_is_published_by_a_rename_of_what_was_written(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(store, "_sync_folder", lambda folder: synced.append((folder.stat().st_ino, folder.parent)))
    save(holding(a=1), tmp_path / "out")
    assert synced[0] == ((tmp_path / "out").stat().st_ino, tmp_path)


def test_missing_parents_are_made_and_a_file_in_the_way_is_named(tmp_path):
    save(holding(a=1), tmp_path / "x" / "y" / "out")
    assert load(f"{tmp_path}/x/y/out/")["a"] == 1
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot save 1 B to .*file/out: File exists \(.*/file\)"):
        save(holding(a=1), tmp_path / "file" / "out")


def some_cache() -> dc.ActivationCache:
    cache = holding(**{f"k{i}": torch.full((1000,), float(i)) for i in range(9)}, n=[1, "two"])
    cache.register_aggregation("k1", "mean")
    cache.cat(cache)
    return cache


def save_and_die(rank, world_size, path, at):
    syncs = iter(range(100))
    sync = os.fsync

    def count_and_die(file):
        if next(syncs) == at:
            kill_self()
        sync(file)

    os.fsync = count_and_die
    save(some_cache(), path)


@pytest.mark.parametrize("at", range(5))
def test_a_killed_save_leaves_nothing_under_the_name(ranks, tmp_path, at):
    """At the sync of the data, the manifest, the sums, the draft; then, after the rename, of the parent."""
    [outcome] = ranks.outcomes(1, save_and_die, str(tmp_path / "out"), at)
    assert outcome.died
    assert (tmp_path / "out").exists() == (at == 4)
    [left] = tmp_path.iterdir()
    if at == 0:
        with pytest.raises(BadCache, match=r"no whole cache: manifest\.json"):
            load(left)
    else:  # everything a cache needs was on the disk before the manifest said so
        assert all(same(value, some_cache()[key]) for key, value in load(left).items())


def save_onto_a_full_disk(rank, world_size, path):
    """A real refusal of the kernel to write on, in the middle of the data."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        save(some_cache(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_named_and_cleaned(ranks, tmp_path):
    [outcome] = ranks.outcomes(1, save_onto_a_full_disk, str(tmp_path / "out"))
    assert outcome.error is not None and outcome.error.startswith("OSError: [Errno 27] cannot save 72.")
    assert f"to {tmp_path}/out: File too large. Nothing was left there" in outcome.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", range(3))
def test_a_disk_that_is_full_at_the_sync_is_named_and_cleaned(tmp_path, monkeypatch, at):
    syncs = iter(range(100))

    def full(file):
        if next(syncs) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"Errno 28.*cannot save .* to .*/out: No space left on device"):
        save(some_cache(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- the cluster ---------------------------------------------------------------------------------------------------


def merge_and_save(rank, world_size, path, dst, full):
    cache = dc.DistributedCache(timeout_s=20, dst=dst)
    cache.register_aggregation("m", "mean")
    cache.register_aggregation("c", "cat")
    with cache.deferred_mode():
        local = holding(m=torch.tensor([float(rank)]), c=torch.tensor([[float(rank)]]))
        cache.cat(local, index=[world_size - rank])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full and rank == (dst or 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        cache.save(path, model="tiny")
        said = "saved"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    try:
        cache.save(path)
        after = "saved"
    except Exception as error:
        after = f"{type(error).__name__}: {error}"
    return said, after


def check_saved(path: Path, world_size: int) -> None:
    loaded = load(path)
    assert loaded["c"].flatten().tolist() == list(reversed(range(world_size)))
    assert loaded["m"].item() == sum(range(world_size)) / world_size and loaded.count("m") == world_size
    assert loaded.rows("c")["sample"].tolist() == list(range(1, world_size + 1))
    with pytest.raises(DuplicateSamples):
        loaded.add("m", torch.ones(1), index=[1])
    assert read_manifest(path).world_size == world_size


@pytest.mark.parametrize(("world_size", "dst"), [(1, None), (2, None), (3, 1)])
def test_a_holder_saves_for_the_cluster_and_a_second_save_is_refused_to_all(ranks, tmp_path, world_size, dst):
    found = ranks.run(world_size, merge_and_save, str(tmp_path / "out"), dst, False)
    check_saved(tmp_path / "out", world_size)
    for rank, (said, after) in enumerate(found):
        assert said == "saved"
        if rank == (dst or 0):
            assert after.startswith("FileExistsError: cannot save to")
        else:
            assert after.startswith(f"PeerFailed: rank {dst or 0} raised FileExistsError: cannot save to")
        assert "Choose another name" in after
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_of_one_rank_is_told_to_the_other_and_a_second_try_saves(ranks, tmp_path):
    (mine, after), (theirs, after_too) = ranks.run(2, merge_and_save, str(tmp_path / "out"), None, True)
    assert mine.startswith("OSError: [Errno 27] cannot save") and "File too large" in mine
    assert theirs.startswith("PeerFailed: rank 0 raised OSError: [Errno 27] cannot save") and "File too large" in theirs
    assert after == after_too == "saved"
    check_saved(tmp_path / "out", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def part(xs: list[float]) -> dc.ActivationCache:
    cache = dc.ActivationCache()
    cache.register_aggregation("m", "mean")
    for x in xs:
        cache.add("m", torch.tensor([x]))
        cache.add("c", torch.tensor([x]))
    return cache


def merge_one_loaded_and_one_new(rank, world_size, path):
    cache = dc.DistributedCache(timeout_s=20, dst=1)
    cache.register_aggregation("m", "mean")
    cache.cat(load(path) if rank == 0 else part([10.0]))
    try:
        return cache["m"].item(), cache["c"].flatten().tolist()
    except HeldElsewhere:
        return None


def test_a_loaded_cache_merges_in_the_cluster_with_one_that_never_was_saved(ranks, tmp_path):
    save(part([1.0, 2.0, 3.0]), tmp_path / "out")
    found = ranks.run(2, merge_one_loaded_and_one_new, str(tmp_path / "out"))
    assert found == [None, (4.0, [1.0, 2.0, 3.0, 10.0])]


# -- strangers -----------------------------------------------------------------------------------------------------


def forge(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def setting(*place, to):
    """Set one place of a manifest."""

    def change(manifest):
        for step in place[:-1]:
            manifest = manifest[step]
        manifest[place[-1]] = to

    return change


def a_bit_of_everything() -> dc.ActivationCache:
    cache = dc.ActivationCache()
    for key, strategy in {"rows": "cat", "mean": "mean", "text": "extend", "weighted": "sum", "f": print}.items():
        cache.register_aggregation(key, strategy)
    cache.add("rows", torch.arange(6.0).view(3, 2), index=[0, 2, 1])
    cache.add("mean", torch.arange(3.0), index=[5])
    cache.add("text", ["a", "b", "c"], index=[0, 2, 1])
    cache.update({"raw": torch.tensor(1 + 2j), "nested": {"a": [1, (None, b"2")]}})
    cache["weighted"] = Weighted(torch.ones(2), 2.0)
    cache.add_with_info("noted", 3, "a note")
    return cache


@pytest.fixture
def saved(tmp_path) -> Path:
    save(a_bit_of_everything(), tmp_path / "saved", info={"model": "tiny"})
    return tmp_path / "saved"


def read_all(folder: Path, **how: bool) -> dict[str, Any]:
    cache = load(folder, **how)
    values: dict[str, Any] = {}
    for key, value in cache.items():
        if isinstance(value, Weighted):
            value = (value.value, value.weight)
        values[key] = (value.value(), value.info()) if hasattr(value, "info") else value
        with contextlib.suppress(ValueError):  # only rows have them
            values[f"rows of {key}"] = cache.rows(key)
    return values


ROWS, MEAN, TEXT, RAW, NESTED, WEIGHTED = range(6)  # places in the entries

FORGERIES = {
    "another program's": (setting("format", to="other"), "no manifest"),
    "newer": (setting("version", to=2), "format version 2, this distcache reads 1: upgrade distcache"),
    "newer and otherwise different": (lambda m: (m.clear(), m.update(format="distcache", version=9)), "version 9"),
    "an older version": (setting("version", to=0), "read it with the version that wrote it"),
    "no version": (lambda m: m.pop("version"), "missing required field `version`"),
    "a wrong type": (setting("entries", to={}), r"Expected `array`, got `object` - at `\$.entries`"),
    "a wrong type deep down": (setting("entries", ROWS, "data", "shape", to=["3", 2]), "Expected `int`, got `str`"),
    "a negative dim": (setting("entries", ROWS, "data", "shape", to=[-3, 2]), "Expected `int` >= 0"),
    "an absurd dim": (setting("entries", ROWS, "data", "shape", to=[2**80, 2]), "Expected `int` <= "),
    "a dim too many": (setting("entries", ROWS, "data", "shape", to=[2**61, 2]), "not what the manifest says"),
    "another shape of as many bytes": (setting("entries", ROWS, "data", "shape", to=[2, 3]), "not what the manifest"),
    "another dtype of as many bytes": (setting("entries", ROWS, "data", "dtype", to="int32"), "not what the manifest"),
    "a dtype that isn't": (setting("entries", ROWS, "data", "dtype", to="float31"), "unknown dtype 'float31'"),
    "a result that isn't": (setting("groups", 0, "result", to="code"), "unknown dtype 'code'"),
    "an unknown field": (setting("run", to="rm -rf"), "unknown field `run`"),
    "a kind that isn't": (setting("entries", 0, "kind", to="pickle"), "Invalid value 'pickle'"),
    "keys twice": (setting("entries", MEAN, "key", to="rows"), "keys come twice, such as 'rows'"),
    "patterns twice": (lambda m: m["registry"].append(m["registry"][0]), "registrations come twice"),
    "a note of nothing": (setting("notes", to={"x": "y"}), r"notes of keys that aren't there: \['x'\]"),
    "a path upwards": (setting("files", 0, "name", to="../saved/data.safetensors"), "plain file names"),
    "an absolute path": (setting("files", 0, "name", to="/etc/passwd.safetensors"), "plain file names"),
    "another file": (setting("files", 0, "name", to="manifest.json"), "plain file names"),
    "a newline in a name": (setting("files", 0, "name", to="data.safetensors\n"), "plain file names"),
    "a missing file": (setting("files", 0, "name", to="other.safetensors"), "no whole cache: other.safetensors"),
    "another size": (setting("files", 0, "nbytes", to=7), "expected 7 bytes, got"),
    "no file": (setting("files", to=[]), "no tensor .* in file 0"),
    "an unknown strategy": (
        setting("entries", ROWS, "strategy", "name", to="mine"),
        r"the strategy mine of 'rows': unknown strategy 'mine': register it first, dc.register_strategy\('mine'",
    ),
    "a function as strategy": (
        setting("entries", ROWS, "strategy", to={"name": "function", "parameters": {"function": "os:system"}}),
        "unknown strategy 'function'",
    ),
    "a parameter of a wrong type": (
        setting("entries", ROWS, "strategy", "parameters", "dim", to="rm -rf"),
        r"cannot use cat\(dim='rm -rf'\) of 'rows'",
    ),
    "a parameter that isn't": (
        setting("entries", ROWS, "strategy", "parameters", to={"code": 1}),
        "cannot use the strategy cat",
    ),
    "a dtype parameter that isn't": (
        setting("groups", 0, "strategy", "parameters", "accumulate", to={"dtype": ["x"]}),
        "unknown dtype",
    ),
    "a registration's parameter": (
        setting("registry", 0, "strategy", "parameters", "dim", to=[1]),
        "of the registration of 'rows'",
    ),
    "a dim that rows haven't": (setting("entries", ROWS, "strategy", "parameters", "dim", to=7), "no state of Cat"),
    "rows of a reduction": (setting("entries", ROWS, "strategy", "name", to="sum"), "doesn't fit Sum"),
    "rows of a list": (setting("entries", ROWS, "strategy", "name", to="extend"), "doesn't fit Extend"),
    "values of rows": (setting("entries", TEXT, "strategy", to={"name": "cat", "parameters": {}}), "doesn't fit Cat"),
    "fields of rows": (setting("groups", 0, "strategy", to={"name": "cat", "parameters": {}}), "no state of fields"),
    "fields of another strategy": (
        setting("groups", 0, "strategy", to={"name": "moments", "parameters": {}}),
        "'mean' is no state of Moments",
    ),
    "a field too few": (lambda m: m["groups"][0]["fields"].pop("count"), "'mean' is no state of Mean"),
    "a field of another name": (
        lambda m: m["groups"][0]["fields"].update(x=m["groups"][0]["fields"].pop("count")),
        "'mean' is no state of Mean",
    ),
    "no fields": (setting("groups", 0, "fields", to={}), "no row 0 in group 0"),
    "fields larger than their size": (
        setting("groups", 0, "strategy", "parameters", to={"ragged": True, "size": 2}),
        "doesn't fit Mean",
    ),
    "a size that isn't there": (
        setting("groups", 0, "strategy", "parameters", to={"ragged": True, "size": 10**12}),
        "doesn't fit Mean",
    ),
    "a group too many": (setting("entries", MEAN, "group", to=1), "no row 0 in group 1"),
    "a row too many": (setting("entries", MEAN, "row", to=1), "no row 1 in group 0"),
    "a table too many": (setting("entries", ROWS, "table", to=5), "there is no table 5"),
    "a table without samples": (lambda m: m["tables"][0]["columns"].pop("sample"), "table 0 lacks columns"),
    "a table of another length": (
        lambda m: m["tables"][0]["columns"].update(
            sample=m["groups"][0]["fields"]["count"], position=m["groups"][0]["fields"]["count"]
        ),
        "table 0 doesn't have one entry for each row of 'rows'",
    ),
    "columns of different lengths": (
        lambda m: m["tables"][0]["columns"].update(position=m["groups"][0]["fields"]["count"]),
        "column 'position' of table 0 doesn't fit",
    ),
    "columns that are no numbers of samples": (
        lambda m: m["tables"][0]["columns"].update(sample=m["entries"][ROWS]["data"]),
        "column 'sample' of table 0 doesn't fit",
    ),
    "no values": (setting("entries", TEXT, "values", to=[]), "Expected `array` of length >= 1"),
    "another value's bytes": (
        lambda m: m["entries"][RAW]["values"][0].update(data=bytes_of(m, WEIGHTED), encoded=True, weighted=False),
        None,
    ),
    "encoded floats": (
        lambda m: m["entries"][NESTED]["values"][0].update(data=m["entries"][ROWS]["data"]),
        r"encoded bytes of 'nested' are float32",
    ),
    "a weighted value that is none": (
        setting("entries", NESTED, "values", 0, "weighted", to=True),
        "what is stored of 'nested' is no state",
    ),
    "a list of no lists": (
        lambda m: m["entries"][TEXT]["values"][0].update(data=m["entries"][RAW]["values"][0]["data"], encoded=False),
        "'text' is no state of Extend",
    ),
    "intervals that overlap": (setting("ledger", 0, "bounds", to=[0, 3, 2, 4]), "no disjoint intervals"),
    "an interval too short": (setting("ledger", 0, "bounds", to=[0, 3, 5]), "no disjoint intervals"),
    "an interval backwards": (setting("ledger", 0, "bounds", to=[3, 0]), "no disjoint intervals"),
    "an index too large": (setting("ledger", 0, "bounds", to=[0, 2**63]), "Expected `int` <= "),
    "no world": (setting("world_size", to=0), "Expected `int` >= 1"),
}


def bytes_of(manifest: dict[str, Any], entry: int) -> Any:
    return manifest["entries"][entry]["values"][0]["data"]


def test_what_is_forged_below_was_good_before(saved):
    expected = a_bit_of_everything()
    found = read_all(saved, verify=True)
    assert same(found["rows"], expected["rows"]) and same(found["mean"], expected["mean"])
    assert found["text"] == ["a", "c", "b"] and found["raw"] == 1 + 2j and found["nested"] == {"a": [1, (None, b"2")]}
    assert same(found["weighted"], (torch.ones(2), 2.0)) and found["noted"] == (3, "a note")
    assert found["rows of rows"]["sample"].tolist() == [0, 1, 2]
    names = [entry.key for entry in read_manifest(saved).entries]
    assert names[:6] == ["rows", "mean", "text", "raw", "nested", "weighted"]


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_manifest_is_refused_and_said_why(saved, what):
    change, message = FORGERIES[what]
    forge(saved, change)
    if message is None:  # a lie that harms nobody
        read_all(saved)
    else:
        with pytest.raises(BadCache, match=message):
            read_all(saved)
    with pytest.raises(BadCache):
        load(saved, verify=True)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"format": "distcache", "version": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format": "distcache", "version": ' + b"9" * 5000 + b"}",
        b"null",
    ],
    ids=["empty", "half", "no text", "deep", "deep beside", "long number", "null"],
)
def test_what_is_no_manifest_is_refused(saved, text):
    (saved / "manifest.json").write_bytes(text)
    with pytest.raises(BadCache):
        load(saved)


def test_a_missing_or_foreign_file_is_refused(saved, tmp_path):
    with pytest.raises(BadCache, match="expected a folder"):
        load(saved / "data.safetensors")
    data = saved / "data.safetensors"
    whole = data.read_bytes()
    for text, message in ((whole[:-1], "cut short"), (whole[:20], "cut short"), (b"x" * len(whole), "no safetensors")):
        data.write_bytes(text)
        with pytest.raises(BadCache, match=message):
            load(saved)
    data.unlink()
    with pytest.raises(BadCache, match=r"no whole cache: data.safetensors can't be read \(No such file"):
        load(saved)
    data.write_bytes(whole)
    (saved / "manifest.json").unlink()
    with pytest.raises(BadCache, match=r"no whole cache: manifest.json can't be read"):
        load(saved)


@pytest.mark.parametrize("name", ["data.safetensors", "manifest.json"])
def test_links_and_pipes_are_not_followed(saved, tmp_path, name):
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    with pytest.raises(BadCache, match="no plain file"):
        load(saved)
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(BadCache, match="no plain file"):
        load(saved)


def test_fields_that_would_blow_each_other_up_are_refused(tmp_path):
    """A state of [n, 1] and [1, n] has 2 n numbers and a mean of n × n."""
    cache = dc.ActivationCache()
    cache.register_aggregation("m", "mean")
    cache.add("m", torch.ones(1, 8192))
    cache.add("c", torch.ones(1, 8192, 1, dtype=torch.int64))
    save(cache, tmp_path / "out")

    def cross(manifest):
        manifest["groups"][0]["fields"]["count"] = manifest["entries"][1]["data"]

    forge(tmp_path / "out", cross)
    with pytest.raises(BadCache, match="would take 67108864 elements for the 16384 that are stored"):
        load(tmp_path / "out")


def test_a_strategy_that_would_not_come_back_is_refused_before_anything_is_written(tmp_path):
    cache = holding(a=1)
    cache.register_aggregation("a", Cat(dim="sideways"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot use cat\(dim='sideways'\) of the cache to save"):
        save(cache, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "saved"
    save(a_bit_of_everything(), path, info={"model": "tiny"})
    return path


damage = st.tuples(
    st.sampled_from(["manifest.json", "data.safetensors", "SHA256SUMS"]),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.integers(1, 255), st.none()),  # the bits to flip, or a cut
)


def damaged(good: Path, into: Path, name: str, where: float, flip: int | None) -> Path:
    shutil.copytree(good, into)
    data = bytearray((into / name).read_bytes())
    at = int(where * len(data))
    if flip is None:
        del data[at:]
    else:
        data[at] ^= flip
    (into / name).write_bytes(data)
    return into


@settings(quick, max_examples=300)
@given(damage)
def test_damage_is_refused_or_read_and_never_anything_else(good, tmp_path, how):
    bad = damaged(good, tmp_path / "bad", *how)
    try:
        found = read_all(bad)
        if how[0] == "SHA256SUMS":
            assert same(found, read_all(good))
        elif how[0] == "data.safetensors":  # a payload's bits can be any
            assert list(found) == list(read_all(good))
    except BadCache:
        pass
    try:
        assert same(read_all(bad, verify=True), read_all(good))  # no undetected damage
    except BadCache:
        pass
    finally:
        shutil.rmtree(bad)


tokens = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "rows", "cat", "mean", "float32", "../x", "function", "0", "1"]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-1, 9), max_size=3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for step, item in steps for place in [(*path, step), *places(item, (*path, step))]]


@settings(quick, max_examples=300)
@given(st.data())
def test_any_value_in_any_place_of_a_manifest_is_refused_or_read(good, tmp_path, data):
    manifest = msgspec.json.decode((good / "manifest.json").read_bytes())
    bad = shutil.copytree(good, tmp_path / "bad")
    try:
        forge(bad, setting(*data.draw(st.sampled_from(places(manifest))), to=data.draw(tokens)))
        with contextlib.suppress(BadCache):
            read_all(bad)
    finally:
        shutil.rmtree(bad)
