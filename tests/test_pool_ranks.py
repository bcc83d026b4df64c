"""Actors that are ranks: a group says what one process says, and lives and dies as one."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from rayhosts import SLOT
from torch import nn

import distcache as dc
from distcache.comm import StoreLost
from distcache.pool.actors import options, own, the_ray
from distcache.pool.ranks import THREADS, ActorStore, Group, Part
from distcache.pool.work import Job
from distcache.strategies import Function

# Nine samples are two items of 4, and one in which a rank has nothing to do.
DATA = [{"input_ids": [(5 * i + j) % 16 for j in range(1 + i % 4)], "label": i % 3} for i in range(9)]
BATCH = 4
LIMIT_S = 60  # for what must not hang
MEAN, TOP, GROUPS = dc.Moments(), dc.TopK(2), dc.Grouped(dc.Mean(), 3, by="label")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(16, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask):
        return self.layer(self.embed(input_ids))


def tiny():
    torch.manual_seed(0)
    return Tiny().eval()


def joined(values):
    return torch.cat(values)


def job(forward=None):
    sites = [
        dc.Site("layer", key="rows", tokens="last"),
        dc.Site("layer", key="h", reduce={"moments": MEAN, "top": TOP, "by_label": GROUPS}),
        dc.Site("embed", key="joined", tokens="last"),
    ]
    return Job(sites, BATCH, forward=forward, columns=("label",), registry=(("joined", Function(joined)),))


def by_hand(data):
    """What plain torch says, text by text."""
    model = tiny()
    with torch.no_grad():
        embedded = [model.embed(torch.tensor(sample["input_ids"])) for sample in data]
        h = [model.layer(x) for x in embedded]
    tokens = torch.cat(h)
    labels = torch.cat([torch.full((len(x),), sample["label"]) for x, sample in zip(h, data, strict=True)])
    return {
        "rows": torch.stack([x[-1] for x in h]),
        "joined": torch.stack([x[-1] for x in embedded]),
        "mean": tokens.mean(0),
        "variance": tokens.var(0),
        "top": tokens.topk(2, dim=0).values,
        "by_label": torch.stack([tokens[labels == label].mean(0) for label in range(3)]),
        "count": torch.tensor(len(tokens)),
    }


def check(cache, data, planted=None):
    found = {
        "rows": cache["rows"],
        "joined": cache["joined"],
        "mean": cache["h_moments"]["mean"],
        "variance": cache["h_moments"]["variance"],
        "top": cache["h_top"]["values"],
        "by_label": cache["h_by_label"],
        "count": cache.count("h_moments").squeeze(),
    }
    assert len(cache) == 5
    for name, value in {**by_hand(data), **(planted or {})}.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda words, name=name: name + words)


# -- a pool of one group, in a few lines -------------------------------------------------------------------------------


def get(ref):
    return the_ray().get(ref, timeout=LIMIT_S)


def begin(group, begun):
    assert get(group.begin.remote(begun, DATA)) == len(DATA)


def work(group, item):
    return get(group.work.remote(item))


def hand_over(group):
    handed, packed = group.hand_over.options(num_returns=2).remote()
    handed, cache = get(handed), own(get(packed))
    cache._call_functions()
    return handed, cache


def pids(group):
    """Of the ranks."""
    return get(group.__ray_call__.remote(lambda self: [get(rank.__ray_call__.remote(_pid)) for rank in self._ranks]))


def _pid(_):
    return os.getpid()


def wait_until(true, limit_s=LIMIT_S):
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def dead(actor):
    try:
        get(actor.end.remote())
    except the_ray().exceptions.RayActorError:
        return True
    return False


class Groups:
    """Groups of two ranks, which take seconds to start: one that a test has left alive serves the next."""

    def __init__(self):
        self.alive, self.all = [], []

    def take(self):
        if self.alive:
            return self.alive.pop()
        leader = the_ray().remote(concurrency_groups=THREADS)(Group).options(**options({}))
        self.all.append(leader.remote(tiny, 2, SLOT, LIMIT_S))
        assert get(self.all[-1].start.remote()) is None
        return self.all[-1]


@pytest.fixture(scope="module")
def groups(hosts):
    groups = Groups()
    yield groups
    for group in groups.all:
        the_ray().kill(group)


@pytest.fixture
def group(groups):
    """One that the test leaves alive."""
    group = groups.take()
    yield group
    groups.alive.append(group)


def sleeper():
    """An actor that ends when it's asked for a key. Its class goes by value, so that its process imports nothing."""

    class Sleeper:
        def end(self):
            pass

        def work(self, _):
            time.sleep(1000)

        def keep(self, *_):
            os._exit(1)

    return the_ray().remote(num_cpus=0, concurrency_groups=THREADS)(Sleeper).remote()


# -- what a group says -------------------------------------------------------------------------------------------------


def test_a_group_says_key_by_key_what_plain_torch_says(group):
    begin(group, job())
    assert all(work(group, item).counted for item in (2, 0, 1))
    handed, cache = hand_over(group)
    assert sorted(handed.items) == [0, 1, 2]
    check(cache, DATA)
    twice = {"count": by_hand([*DATA, DATA[4]])["count"]}  # as if both ranks had counted a sample
    with pytest.raises(AssertionError, match="count"):
        check(cache, DATA, twice)


def test_rows_of_a_group_are_bit_for_bit_those_of_one_process_with_batches_of_a_rank(group):
    begin(group, job())
    for item in range(3):
        work(group, item)
    _, cache = hand_over(group)
    alone = dc.collect(tiny(), DATA, job().sites, batch_size=BATCH // 2, columns=["label"], progress=False)
    assert torch.equal(cache["rows"], alone["rows"])
    a_bit_more = alone["rows"].nextafter(torch.tensor(100.0))
    assert not torch.equal(cache["rows"], a_bit_more)


def test_what_a_group_hands_over_it_has_no_more_and_takes_back_as_a_worker_does(group):
    begin(group, job())
    work(group, 0)
    handed, packed = get(group.hand_over.remote())
    empty, _ = get(group.hand_over.remote())
    assert (handed.items, empty.items) == ((0,), ())
    work(group, 1)
    assert get(group.absorb.remote(handed.items, packed)) is None
    work(group, 2)
    handed, cache = hand_over(group)
    assert sorted(handed.items) == [0, 1, 2]
    check(cache, DATA)


def test_parts_of_an_item_are_the_whole_item_each_sample_once():
    for num_ranks in (1, 2, 3, 5):
        parts = [Part.of(job(), rank, num_ranks) for rank in range(num_ranks)]
        for item in range(3):
            dealt = [i for part in parts for i in part.samples(item, len(DATA))]
            assert dealt == list(job().samples(item, len(DATA)))


# -- the store ---------------------------------------------------------------------------------------------------------


def test_the_store_answers_as_torchs_own_do(group):
    calls = [
        ("set", "a", "1"), ("get", "a"), ("add", "n", 3), ("add", "n", -5), ("get", "n"),
        ("check", ["a", "n"]), ("check", ["a", "absent"]),
        ("compare_set", "b", "", "first"), ("compare_set", "b", "", "second"), ("compare_set", "b", "first", "third"),
        ("compare_set", "b", "first", "fourth"), ("compare_set", "absent", "?", "?!"), ("check", ["absent"]),
        ("delete_key", "a"), ("delete_key", "a"), ("check", ["a"]), ("wait", ["b"]),
    ]  # fmt: skip

    def answers(store):
        return [getattr(store, name)(*args) for name, *args in calls]

    ours = ActorStore(group, LIMIT_S)
    assert answers(ours) == answers(torch.distributed.HashStore())
    assert answers(ours) != answers(torch.distributed.HashStore())  # which is where ours holds something already


def test_a_key_that_nobody_sets_and_an_actor_that_is_gone_are_a_lost_store(group):
    with pytest.raises(StoreLost, match=r"nobody has set never within 0\.1 s"):
        ActorStore(group, 0.1).get("never")
    with pytest.raises(StoreLost, match="gone or silent"):
        ActorStore(sleeper(), LIMIT_S).set("a", "1")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def _raises_once(folder, model, batch):
    if batch["input_ids"][0, 0] == DATA[6]["input_ids"][0] and not (folder / "raised").exists():
        (folder / "raised").touch()
        raise KeyError("a part of item 1")
    model(**batch)


def test_where_one_ranks_part_raises_the_whole_state_is_to_do_again(group, tmp_path):
    begin(group, job(partial(_raises_once, tmp_path)))
    assert work(group, 0).counted
    receipt = work(group, 1)
    assert (receipt.counted, receipt.failure.kind, sorted(receipt.spoiled)) == (False, "KeyError", [0, 1])
    for item in (2, 1, 0):
        assert work(group, item).counted
    _, cache = hand_over(group)
    check(cache, DATA)


def test_ranks_whose_states_do_not_fit_are_a_failure_that_names_the_key(group):
    begin(group, Job([dc.Site("layer", key="wide", transform=_as_wide_as_long)], BATCH, forward=_without_label))
    assert work(group, 0).counted
    failure, packed = get(group.hand_over.remote())
    assert packed is None and failure.kind == "SchemaMismatch" and "'wide'" in failure.message


def _as_wide_as_long(x_n, _):
    return x_n.new_zeros(len(x_n), len(x_n))


def _without_label(model, batch):
    model(batch["input_ids"], batch["attention_mask"])


def _hangs_once(folder, model, batch):
    """Rank 1's part of item 1 never ends, the first time."""
    if batch["input_ids"][0, 0] == DATA[6]["input_ids"][0] and not (folder / "pid").exists():
        (folder / "told").write_text(str(os.getpid()))
        (folder / "told").rename(folder / "pid")
        time.sleep(10 * LIMIT_S)
    model(**batch)


@pytest.fixture(scope="module")
def pool(hosts):
    with dc.CachePool(tiny, num_actors=1, num_ranks=2, resources=SLOT, timeout_s=LIMIT_S) as pool:
        yield pool


def in_pool(pool, forward=None):
    cache = dc.ActivationCache()
    cache.register_aggregation("joined", joined)
    asked = {"batch_size": BATCH // 2, "columns": ["label"], "forward": forward, "cache": cache, "progress": False}
    return pool.collect(DATA, job().sites, **asked)


def test_a_rank_that_is_killed_at_an_item_ends_its_group_and_another_counts_every_sample_once(pool, tmp_path, caplog):
    processes = pids(pool._crew.members[0].handle)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(in_pool, pool, partial(_hangs_once, tmp_path))
        wait_until((tmp_path / "pid").exists)
        assert int((tmp_path / "pid").read_text()) == processes[1]
        os.kill(processes[1], signal.SIGKILL)
        check(found.result(LIMIT_S), DATA)
    assert "lost rank 1" in caplog.text
    assert all(map(gone, processes))


def test_ranks_end_with_the_actor_that_keeps_their_store(pool):
    group = pool._crew.members[0].handle
    processes = pids(group)
    os.kill(get(group.__ray_call__.remote(_pid)), signal.SIGKILL)
    with pytest.raises(the_ray().exceptions.RayActorError):
        get(group.work.remote(0))
    wait_until(lambda: all(map(gone, processes)))


def test_a_rank_that_is_killed_while_another_waits_in_the_merge_ends_its_group(groups):
    group = groups.take()
    processes = pids(group)
    begin(group, job())
    work(group, 0)
    os.kill(processes[0], signal.SIGSTOP)
    asked = group.hand_over.remote()
    assert the_ray().wait([asked], timeout=0.5)[0] == []
    os.kill(processes[0], signal.SIGKILL)
    with pytest.raises(dc.PeerFailed, match="lost rank 0"):
        get(asked)
    with pytest.raises(dc.PeerFailed, match="lost rank 0"):  # it takes up nothing any more
        work(group, 1)
    wait_until(lambda: all(map(gone, processes)))


def test_a_rank_that_says_nothing_is_given_up_after_the_limit_and_the_group_with_it(hosts):
    group = Group(tiny, 2, {}, timeout_s=0.5)
    group._ranks = [sleeper() for _ in range(2)]
    get([rank.end.remote() for rank in group._ranks])
    with pytest.raises(dc.PeerFailed, match=r"waited 0\.5 s for rank\(s\) \[1\]"):
        group._answers({0: group._ask(0, "end"), 1: group._ask(1, "work", 0)})
    wait_until(lambda: dead(group._ranks[0]))
