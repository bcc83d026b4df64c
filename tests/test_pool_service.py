"""Pools with a name keep what was pooled: once, whoever contributes it, and also when their keeper dies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rayhosts import SLOT
from torch import nn

import distcache as dc
from distcache.packed import pack
from distcache.pool import folder, service
from distcache.pool.actors import own
from distcache.pool.service import Keeper

X_ND = torch.tensor([[1.0, -2.0], [3.0, 0.5], [4.0, 8.0], [-7.0, 1.0], [2.0, 2.0], [9.0, -1.0]])


def part(samples, keys=("rows", "mean"), indexed=True):
    """A cache of these samples: their rows, and their mean."""
    cache = dc.ActivationCache()
    cache.register_aggregation("mean", dc.Mean(dim=0))
    for key in keys:
        cache.add(key, X_ND[samples], index=samples if indexed else None)
    return cache


def same_as_one_process(cache):
    """Whether a cache is of every sample once, in order, by plain torch."""
    return torch.equal(cache["rows"], X_ND) and torch.allclose(cache["mean"], X_ND.mean(0), rtol=1e-6, atol=1e-6)


def keeper(path=None, name="attn", born="one"):
    """A keeper that has begun, without Ray; what is to be saved is saved by hand."""
    made = Keeper(name, born, {}, None if path is None else str(path), 3600.0)
    made.open()
    return made


def dies(one):
    """The keeper's process is gone, without a good-bye: its lock is free, and what it had in memory is nobody's."""
    one._closed.set()
    one._folder.close()


def give(one, id, cache, who="job 1"):
    return one.contribute(id, who, pack(cache))


def content(one):
    return own(one.content()[1])


@pytest.fixture
def actors(monkeypatch):
    """The names of actors that are alive, where there is no Ray."""
    alive = set()
    monkeypatch.setattr(service, "named", lambda prefix: sorted(name for name in alive if name.startswith(prefix)))
    monkeypatch.setattr(service, "end_actor", alive.discard)
    return alive


# -- what counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[4, 1, 5, 0, 3], [2]], [[5], [], [3, 4], [0, 1, 2]]], ids=str)
def test_contributions_say_what_one_process_says(parts):
    one = keeper()
    for number, samples in enumerate(parts):
        give(one, f"part {number}", part(samples))
    assert same_as_one_process(content(one))


def test_the_oracle_finds_a_mean_of_means_and_another_order():
    means = part([0, 1, 2, 3, 4, 5])
    means["mean"] = torch.stack([X_ND[:5].mean(0), X_ND[5]]).mean(0)
    order = part([0, 1, 2, 3, 4, 5])
    order["rows"] = X_ND[[1, 0, 2, 3, 4, 5]]
    assert not same_as_one_process(means) and not same_as_one_process(order)


@pytest.mark.parametrize(("second", "count"), [("shard 0", 3), ("shard 1", 6)], ids=["retried", "another"])
def test_a_contribution_that_is_retried_with_its_id_counts_once(second, count):
    one = keeper()
    for id in ("shard 0", second):  # without an index nothing but the id knows that they are the same
        give(one, id, part([0, 1, 2], indexed=False))
    assert int(content(one).count("mean")) == count == len(content(one)["rows"])
    assert one.has("shard 0") and one.has("shard 1") == (second == "shard 1")


@pytest.mark.parametrize("other", [part([0, 1]), part([0, 1, 2], keys=["mean"]), part([0, 1, 2], indexed=False)])
def test_an_id_that_is_anothers_is_refused(other):
    one = keeper()
    give(one, "shard 0", part([0, 1, 2]), who="job 7")
    with pytest.raises(ValueError, match=r"the id 'shard 0' is that of another contribution, of job 7 at 20"):
        give(one, "shard 0", other)
    assert int(content(one).count("mean")) == 3


@pytest.mark.parametrize("key", ["rows", "mean"])
def test_a_sample_that_comes_again_names_who_brought_it_and_changes_nothing(key):
    one = keeper()
    give(one, "first", part([4, 5], keys=[key]), who="job 7")
    give(one, "second", part([0, 1, 2], keys=[key]), who="job 8 on that machine")
    before = one.content()[1]
    with pytest.raises(
        dc.DuplicateSamples, match=rf"1 sample\(s\) of 'third' .* '{key}': 2 came .*'second' of job 8 on"
    ):
        give(one, "third", part([3, 2], keys=[key]))
    after = one.content()[1]
    assert after.header == before.header
    assert all((a == b).all() for a, b in zip(after.buffers, before.buffers, strict=True))
    assert not one.has("third")
    give(one, "third", part([3], keys=[key]))
    assert int(content(one).count(key)) == 6


def test_the_same_samples_may_bring_other_keys():
    one = keeper()
    give(one, "rows", part([0, 1, 2, 3, 4, 5], keys=["rows"]))
    give(one, "means", part([0, 1, 2, 3, 4, 5], keys=["mean"]))
    assert same_as_one_process(content(one))


def test_what_does_not_fit_is_refused_and_may_come_again_mended():
    one = keeper()
    give(one, "first", part([0, 1, 2]))
    wrong = dc.ActivationCache()
    wrong.add("rows", torch.ones(3, 7), index=[3, 4, 5])
    with pytest.raises(dc.SchemaMismatch, match="rows"):
        give(one, "second", wrong)
    give(one, "second", part([3, 4, 5]))
    assert same_as_one_process(content(one))


def number_of(values):
    return torch.tensor(len(values))


def test_a_function_sees_the_values_of_all_contributions():
    one = keeper()
    for number in range(3):
        cache = dc.ActivationCache()
        cache.register_aggregation("x", number_of)
        part = cache._collecting()
        part.add("x", torch.tensor(7))
        give(one, f"{number}", part)
    assert content(one)["x"] == 3  # folded pairwise it would be 2


# -- what is saved ---------------------------------------------------------------------------------------------


def test_what_was_saved_is_taken_up_and_goes_on(tmp_path, actors):
    one = keeper(tmp_path)
    give(one, "first", part([4, 1, 5, 0]), who="job 7")
    one.save()
    dies(one)
    two = keeper(tmp_path, born="two")
    assert two.has("first") and two._told().lost == ()
    status = two.status()
    assert status.saved_to == str(tmp_path / "00000001") and status.saved.startswith("20")
    assert (status.contributions, status.unsaved, status.keys, status.nbytes) == (1, 0, 2, one.status().nbytes)
    give(two, "first", part([4, 1, 5, 0]))  # a retry, of before
    with pytest.raises(dc.DuplicateSamples, match=r"0, 4 came with the contribution 'first' of job 7"):
        give(two, "again", part([0, 4], keys=["rows"]))
    give(two, "second", part([2, 3]))
    assert same_as_one_process(content(two))


def test_a_save_is_a_cache_that_loads_and_the_one_before_it_goes(tmp_path):
    one = keeper(tmp_path)
    give(one, "first", part([0, 1, 2]))
    first = one.save()
    assert one.save() == first  # nothing new
    give(one, "second", part([3, 4, 5]))
    second = one.save()
    assert same_as_one_process(dc.load(second, verify=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "journal.jsonl"]
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".jsonl", ".json", ".safetensors"}


def test_what_came_after_the_last_save_is_told_until_it_comes_again(tmp_path):
    one = keeper(tmp_path)
    give(one, "saved", part([0, 1, 2]))
    one.save()
    give(one, "late", part([3, 4]), who="job 8")
    give(one, "later", part([5]), who="job 9")
    assert one.has("late")
    dies(one)
    two = keeper(tmp_path, born="two")
    (late, later), error = two._told().lost, two._told().error
    assert late.startswith("'late' of job 8 at 20") and later.startswith("'later' of job 9 at 20") and error is None
    assert two.has("saved") and not two.has("late")
    told = give(two, "later", part([5]))
    assert told.lost == (late,)
    two.save()
    dies(two)
    three = keeper(tmp_path, born="three")  # nobody has looked, and it isn't forgotten
    assert three._told().lost == (late,)
    assert give(three, "late", part([3, 4])).lost == ()
    assert same_as_one_process(content(three))


def test_a_save_that_was_killed_half_way_is_never_taken(tmp_path, monkeypatch):
    one = keeper(tmp_path)
    give(one, "first", part([0, 1, 2]))
    one.save()
    give(one, "second", part([3, 4, 5]))

    def killed(draft, *_, **__):
        assert (draft / "data.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("distcache.store.publish", killed)
    monkeypatch.setattr(folder.shutil, "rmtree", lambda *_, **__: None)  # nobody cleans up behind a kill
    with pytest.raises(KeyboardInterrupt):
        one.save()
    monkeypatch.undo()
    assert any(path.name.startswith(".00000002.") for path in tmp_path.iterdir())
    dies(one)
    two = keeper(tmp_path, born="two")
    assert two.has("first") and not two.has("second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "journal.jsonl"]


def test_of_two_saves_the_newer_counts(tmp_path, monkeypatch):
    one = keeper(tmp_path)
    give(one, "first", part([0, 1, 2]))
    one.save()
    give(one, "second", part([3, 4, 5]))
    monkeypatch.setattr(folder.Folder, "_remove", lambda *_: None)  # killed between the rename and the removal
    one.save()
    monkeypatch.undo()
    dies(one)
    assert {"00000001", "00000002"} < {path.name for path in tmp_path.iterdir()}
    two = keeper(tmp_path, born="two")
    assert same_as_one_process(content(two)) and not (tmp_path / "00000001").exists()


def test_a_full_disk_is_told_and_the_save_before_it_stays(tmp_path, monkeypatch, actors):
    one = keeper(tmp_path)
    give(one, "first", part([0, 1, 2]))
    one.save()
    give(one, "second", part([3, 4, 5]))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distcache.store._write", full)
    with pytest.raises(OSError, match="No space left"):
        one.save()
    with pytest.raises(OSError, match="No space left"):  # it doesn't end with something unsaved
        one.shut_down()
    assert "cannot save: OSError: [Errno 28]" in one.status().error and one.status().unsaved == 1
    assert dc.load(tmp_path / "00000001", verify=True)["rows"].shape == (3, 2)
    monkeypatch.undo()
    one.save()
    assert one._error is None and same_as_one_process(dc.load(tmp_path / "00000002"))


def test_a_journal_that_cannot_be_written_is_told_and_stays_whole(tmp_path, monkeypatch):
    one = keeper(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda number, text: write(number, text[:9]))  # the disk is full
    told = give(one, "first", part([0, 1, 2]))
    assert "'first' is counted and not in the journal" in told.error and one.has("first")
    monkeypatch.undo()
    give(one, "second", part([3, 4, 5]))
    dies(one)
    (lost,) = keeper(tmp_path, born="two")._told().lost
    assert lost.startswith("'second'")


def test_damage_is_found_when_a_folder_is_taken_up(tmp_path):
    one = keeper(tmp_path)
    give(one, "first", part([0, 1, 2]))
    saved = one.save()
    dies(one)
    with open(tmp_path / "journal.jsonl", "ab") as journal:
        journal.write(b'{"what":"accep')  # the process was killed amid its last line, and told nobody
    dies(keeper(tmp_path, born="two"))
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole.replace(b'"first"', b"first"))
    with pytest.raises(dc.BadCache, match=r"journal.jsonl is damaged"):
        keeper(tmp_path, born="three")
    (tmp_path / "journal.jsonl").write_bytes(whole)
    data = f"{saved}/data.safetensors"
    with open(data, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(dc.BadCache, match=r"data\.safetensors"):
        keeper(tmp_path, born="three")


def test_a_ledger_of_contributions_that_was_altered_is_no_ledger(tmp_path):
    one = keeper(tmp_path)
    give(one, "first", part([0, 1, 2]))
    saved = one.save()
    dies(one)
    manifest = json.loads(Path(saved, "manifest.json").read_text())
    book = json.loads(manifest["info"]["contributions"])
    book["contributions"][0]["seen"][0][0] = 99  # a set of keys that isn't there
    with pytest.raises(dc.BadCache, match="cannot read which contributions are in"):
        folder._from_text(json.dumps(book), tmp_path)
    assert folder._from_text(manifest["info"]["contributions"], tmp_path).keys() == {"first"}


def test_a_folder_is_one_pools_and_one_keepers(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_WAIT_S", 0.2)
    one = keeper(tmp_path)
    with pytest.raises(dc.DistcacheError, match=r"is in use: the keeper of another pool writes there"):
        keeper(tmp_path, born="two")
    dies(one)
    with pytest.raises(ValueError, match=r"is the folder of the pool 'attn', not of 'mlp'"):
        keeper(tmp_path, name="mlp", born="two")
    keeper(tmp_path, born="two")


def test_a_keeper_that_ray_restarts_takes_up_its_folder_by_itself(tmp_path, actors, monkeypatch):
    one = keeper(tmp_path / "here")
    give(one, "first", part([0, 1, 2, 3, 4, 5]))
    one.save()
    dies(one)
    again = Keeper("attn", "one", {}, str(tmp_path / "here"), 3600.0)
    assert same_as_one_process(content(again))
    monkeypatch.setattr(folder, "LOCK_WAIT_S", 0.2)
    third = Keeper("attn", "one", {}, str(tmp_path / "here"), 3600.0)
    with pytest.raises(dc.DistcacheError, match="is in use"):  # the one before lives on, out of Ray's reach
        third.keys()
    dies(again)
    assert third.keys() == ["rows", "mean"]
    dies(third)
    new = Keeper("attn", "two", {}, str(tmp_path / "here"), 3600.0)
    with pytest.raises(dc.PeerFailed, match=r"the keeper of the pool 'attn' has not begun"):  # its maker says when
        new.keys()
    elsewhere = Keeper("attn", "one", {}, str(tmp_path / "on another node"), 3600.0)
    with pytest.raises(dc.PeerFailed, match=r"was restarted on .*, where its folder .* isn't"):
        give(elsewhere, "second", part([0]))
    shutil.copytree(tmp_path / "here", tmp_path / "damaged")
    next((tmp_path / "damaged").glob("0*/manifest.json")).write_text("{}")
    damaged = Keeper("attn", "one", {}, str(tmp_path / "damaged"), 3600.0)
    with pytest.raises(dc.BadCache, match=r"manifest.json"):
        damaged.status()
    damaged.shut_down()  # it has nothing that could get lost
    with pytest.raises(dc.PeerFailed, match=r"the pool 'attn' was shut down at 20"):
        damaged.status()


def test_it_saves_by_itself_what_is_new(tmp_path):
    one = Keeper("attn", "one", {}, str(tmp_path), 0.01)
    one.open()
    give(one, "first", part([0, 1, 2, 3, 4, 5]))
    end_s = time.monotonic() + 30
    while one._unsaved and time.monotonic() < end_s:
        time.sleep(0.01)
    assert one._unsaved == 0 and same_as_one_process(dc.load(one._folder.newest))
    dies(one)


# -- who waits for whom ----------------------------------------------------------------------------------------


def test_neither_a_fold_nor_a_save_holds_up_a_question(tmp_path, monkeypatch, actors):
    one = keeper(tmp_path)
    give(one, "first", part([0, 1]))
    go_on, under_way = threading.Event(), threading.Semaphore(0)

    def slow(of):
        def waits(*args, **kwargs):
            under_way.release()
            assert go_on.wait(30)
            return of(*args, **kwargs)

        return waits

    monkeypatch.setattr(one._folder, "save", slow(one._folder.save))
    monkeypatch.setattr(one._content, "_absorb", slow(one._content._absorb))
    saving, folding = (
        threading.Thread(target=one.save),
        threading.Thread(target=give, args=(one, "2", part([2, 3, 4, 5]))),
    )
    for thread in (saving, folding):
        thread.start()
        assert under_way.acquire(timeout=30)
    status = one.status()
    assert (status.contributions, status.unsaved, status.saved) == (1, 1, None)
    assert one.keys() == ["rows", "mean"] and not one.has("2")
    go_on.set()
    saving.join()
    folding.join()
    assert (one.status().contributions, one.status().unsaved) == (2, 1)  # what came amid the save isn't in it
    assert same_as_one_process(content(one)) and dc.load(one._folder.newest)["rows"].shape == (2, 2)


def test_workers_are_lent_to_one_collection_and_ended_with_a_silent_one(actors, monkeypatch):
    one = keeper()
    actors |= {"attn/worker/a", "attn/worker/b", "attn2/worker/c"}
    assert one.borrow("loan 1", "job 7") == []  # nobody knows what these are at
    assert actors == {"attn2/worker/c"}
    actors |= {"attn/worker/d", "attn/worker/e"}
    assert one.beat("loan 1", "job 7", 3, 8)
    assert one.borrow("loan 2", "job 8") == "job 7"
    assert (one.status().collecting, one.status().items_done, one.status().items_under_way) == ("job 7", 3, 5)
    for _ in range(2):  # as if the first answer had been lost
        one.give_back("loan 1", ["attn/worker/d", "attn/worker/e"])
    assert actors >= {"attn/worker/d", "attn/worker/e"}
    assert one.borrow("loan 2", "job 8") == ["attn/worker/d", "attn/worker/e"] == one.borrow("loan 2", "job 8")
    monkeypatch.setattr(service, "LOAN_S", -1.0)
    one.beat("loan 2", "job 8", 1, 2)
    one._idle = []  # they are with job 8, which falls silent
    actors.add("attn/worker/f")
    assert one.borrow("loan 3", "job 9") == []
    assert actors == {"attn2/worker/c"}  # so that nothing that job 8 does yet can mix with job 9's
    actors.add("attn/worker/g")
    assert not one.beat("loan 2", "job 8", 2, 2)
    one.give_back("loan 2", ["attn/worker/g"])
    assert actors == {"attn2/worker/c"} and one.status().collecting == "job 9"


# -- with Ray --------------------------------------------------------------------------------------------------

DATA = [torch.tensor([float(i), 1.0 - i]) for i in range(11)]
SITES = [dc.Site("0", key="rows"), dc.Site("0", key="mean", reduce=dc.Mean())]


def factory():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh()).eval()


def values():
    """What the site shows, [samples, 3], by plain torch."""
    with torch.no_grad():
        return torch.cat([factory()[0](torch.stack(DATA[i : i + 2])) for i in range(0, len(DATA), 2)])


def is_of_all(cache):
    x_nd = values()
    return torch.equal(cache["rows"], x_nd) and torch.allclose(cache["mean"], x_nd.mean(0), rtol=1e-6, atol=1e-6)


def share(samples):
    """What a job has found of these samples by itself, without Ray."""
    cache = dc.ActivationCache()
    cache.register_aggregation("mean", dc.Mean(dim=0))
    for key in ("rows", "mean"):
        cache.add(key, values()[samples], index=samples)
    return cache


def waits_for(path, _keeper):
    """What holds up a thread of the keeper until there is a file."""
    end_s = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end_s:
        time.sleep(0.01)


def job(code, hosts, *args):
    """Another job: a process that joins the cluster by its address."""
    lines = [
        "import sys, ray, distcache as dc, test_pool_service as t",
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')",
        code,
    ]
    command = [sys.executable, "-c", "\n".join(lines), hosts.cluster.address, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )


def done(process):
    """What a job has printed."""
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return printed


def kill_keeper(name):
    """SIGKILL for the keeper's process."""
    import ray

    handle = ray.get_actor(f"{name}/keeper", namespace=service.NAMESPACE)
    os.kill(ray.get(handle.__ray_call__.remote(lambda self: os.getpid())), 9)


@pytest.fixture
def ended(hosts):
    """Ends the pools of a test, whatever becomes of it."""
    yield
    for name in ("attn", "mlp"):
        service.end_actor(f"{name}/keeper")
        service.end_workers(name, keep=())


MAKES = """
pool = dc.CachePool(t.factory, t.SITES, num_actors=1, resources=t.SLOT, timeout_s=60,
                    name="attn", detached=True, save_to=sys.argv[2], save_every_s=3600)
print(*sorted(n for n in t.service.named("attn/")))
"""

CONTRIBUTES = """
pool = dc.CachePool.connect("attn")
share = t.share([9, 1, 6, 3])
for attempt in range(2):  # as if the first answer had been lost
    pool.contribute(share, id="job B")
try:
    pool.contribute(t.share([6]))
except dc.DuplicateSamples as error:
    print(error)
"""


def test_a_pool_outlives_its_maker_and_two_jobs_contribute_at_once(hosts, tmp_path, ended, caplog):
    before = done(job(MAKES, hosts, tmp_path)).split()
    assert before == service.named("attn/") and len(before) == 2  # the maker is gone, and they are there
    other = job(CONTRIBUTES, hosts)
    pool = dc.CachePool.connect("attn", timeout_s=60)
    for samples in ([0, 2], [4, 5, 7], [8, 10]):
        pool.contribute(share(samples))
    assert "6 came with the contribution 'job B' of job " in done(other)
    assert is_of_all(pool.cache())
    assert not is_of_all(share([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]))  # the oracle misses the last

    # Its keeper is killed, with something that isn't saved: the save comes back by itself, and what is lost is told.
    assert is_of_all(dc.load(pool.save()))
    late = dc.ActivationCache()
    late.add("late", torch.ones(1, 2), index=[0])
    pool.contribute(late, id="too late")
    assert pool.status().lost == () and pool.has("too late")
    kill_keeper("attn")
    assert is_of_all(pool.cache()) and not pool.has("too late") and pool.keys() == ["rows", "mean"]
    status = pool.status()
    assert len(status.lost) == 1 and status.lost[0].startswith("'too late' of job ")
    assert "1 contribution(s) to the pool 'attn' were accepted and are lost" in caplog.text
    pool.contribute(late, id="too late")
    assert pool.has("too late") and pool.status().lost == ()

    # Ended, and taken up by name and folder.
    pool.shutdown()
    assert service.named("attn/") == []
    with pytest.raises(dc.PeerFailed, match=r"keeper of the pool 'attn' is dead.*CachePool\(…, name='attn', save_to="):
        pool.status()
    with dc.CachePool(
        factory, SITES, num_actors=1, resources=SLOT, timeout_s=60, name="attn", save_to=tmp_path
    ) as again:
        assert is_of_all(again.cache()) and again.has("job B") and again.keys() == ["rows", "mean", "late"]
        assert (again.status().workers, again.status().contributions) == (1, 5)
    assert service.named("attn/") == []


def test_a_pool_that_is_connected_to_collects_with_the_workers_that_are_there_and_answers_as_it_folds(
    hosts, tmp_path, ended
):
    import ray

    made = dc.CachePool(factory, SITES, num_actors=2, resources=SLOT, timeout_s=60, name="mlp", detached=True)
    with pytest.raises(ValueError, match=r"there is a pool 'mlp' on this cluster already"):
        dc.CachePool(factory, SITES, num_actors=1, resources=SLOT, timeout_s=60, name="mlp")
    with pytest.raises(LookupError, match=r"there is no pool 'mpl' on this cluster; the pools are: 'mlp'\."):
        dc.CachePool.connect("mpl")
    workers = service.named("mlp/worker/")
    with dc.CachePool.connect("mlp", timeout_s=60) as pool:
        assert is_of_all(pool.collect(DATA, batch_size=2, progress=False))
    assert service.named("mlp/worker/") == workers and len(workers) == 2
    assert is_of_all(made.cache())
    status = made.status()
    assert (status.workers, status.items_done, status.items_under_way, status.collecting) == (2, 6, 0, None)
    assert (status.keys, status.contributions, status.saved_to, status.error) == (2, 1, None, None)

    # Who has the workers keeps others from them, who are told so.
    pool._link.timeout_s = 0.5
    with made._staffed(), pytest.raises(TimeoutError, match=r"the workers of the pool 'mlp' have been with job "):
        pool.collect(DATA, batch_size=2, progress=False)

    # A question is answered while contributions wait.
    handle, flag = made._link._handle, tmp_path / "go on"
    waiting = [handle.__ray_call__.remote(partial(waits_for, flag))]
    waiting.append(handle.contribute.remote("another", "me", pack(part([0], keys=["other"]))))
    assert made.status().contributions == 1 and made.keys() == ["rows", "mean"]
    flag.touch()
    ray.get(waiting)
    assert made.status().contributions == 2 and made.has("another")

    # Without a folder a keeper's death is the end of what it had; its name is free, and its workers are ended.
    kill_keeper("mlp")
    with pytest.raises(dc.PeerFailed, match=r"pool 'mlp' is dead.* It saved nothing \(save_to=None\)"):
        made.contribute(share([1]), id="mine")
    made = dc.CachePool(factory, SITES, num_actors=1, resources=SLOT, timeout_s=60, name="mlp")
    assert made.keys() == [] and not set(service.named("mlp/worker/")) & set(workers)
    made.close()
    assert service.named("mlp/") == []


def test_what_is_of_pools_with_a_name_says_so():
    with pytest.raises(ValueError, match=r"detached= and save_to= are of pools with a name"):
        dc.CachePool(factory, SITES, detached=True)
    pool = dc.CachePool.__new__(dc.CachePool)
    pool._link = None
    for ask in (pool.status, pool.cache, pool.keys, pool.save, pool.shutdown):
        with pytest.raises(RuntimeError, match=rf"{ask.__name__}\(\) is of pools with a name"):
            ask()
