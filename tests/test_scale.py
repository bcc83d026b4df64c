"""Many ranks in one process: right values at 256, and what planning, waiting and merging cost at 1,024, counted.

Torch's threaded process group moves real values between threads; its fake one, which moves none, is for counting.
"""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg, multi_threaded_pg

import distcache as dc
from distcache import codec, protocol
from distcache import distributed as distributing
from distcache import merge as merging
from distcache.comm import Communicator, Heart, LocalStore
from distcache.plan import Holdings, Offer, Table, make_plan
from distcache.protocol import Decided, arrive
from distcache.schema import FieldSchema, KeySchema

WORLD_SIZE = 1024


class SharedStore(LocalStore):
    """One dict for all threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self.calls = 0

    def get(self, key):
        self.calls += 1
        return super().get(key)

    def add(self, key, amount):
        self.calls += 1
        with self._lock:
            return super().add(key, amount)

    def decide(self, key, value):
        with self._lock:
            return super().decide(key, value)


class Alive:
    """A heart whose peers are well."""

    interval_s = 1.0

    def __init__(self, store):
        self._store = store

    def watch(self, key):
        self._watched = key

    @property
    def decision(self):
        return self._store.get(self._watched)

    def silent_s(self, peer):
        return 0.0


class GroupComm(Communicator):
    """Torch's default process group, whichever it is; `moved`: (collective, bytes) of all that it was given."""

    def __init__(self, store=None, heart=None):
        self.rank, self.ranks, self.timeout_s = dist.get_rank(), tuple(range(dist.get_world_size())), 60
        self.colocated, self.store, self.heart = (self.rank,), store, heart
        self.moved: list[tuple[str, int]] = []

    def gather(self, row, poll):
        self.moved.append(("gather", 8 * len(row)))
        everyone = [torch.empty(len(row), dtype=torch.int64) for _ in self.ranks]
        self.together(dist.all_gather, everyone, torch.tensor(row, dtype=torch.int64))
        return [theirs.tolist() for theirs in everyone]

    def gather_bytes(self, blob, sizes, poll):
        assert len(blob) == sizes[self.rank]
        self.moved.append(("gather_bytes", sum(sizes)))
        nothing = torch.empty(0, dtype=torch.uint8)
        everyone = [torch.empty(size, dtype=torch.uint8) if size else nothing for size in sizes]
        mine = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else nothing
        self.together(dist.all_gather, everyone, mine)
        return [theirs.numpy().tobytes() if len(theirs) else b"" for theirs in everyone]

    def run(self, transfers, poll):
        for transfer in transfers:
            buffer = transfer.buffer() if isinstance(transfer.buffer, Callable) else transfer.buffer
            assert buffer.is_contiguous()
            self.moved.append((transfer.op, buffer.nbytes))
            if transfer.op == "copy":
                self.together(dist.broadcast, buffer, transfer.root)
            else:
                self.together(dist.all_reduce, buffer, getattr(dist.ReduceOp, transfer.op.upper()))

    def together(self, collective: Callable, *arguments: object) -> None:
        collective(*arguments)

    def rebuild(self, generation):
        raise AssertionError("nothing was spent")

    def close(self):
        self.closed = True


# -- 256 ranks, right values -----------------------------------------------------------------------------------

_BATON = threading.Lock()  # whoever has it runs: threads that take turns by themselves need a multiple of the time


@contextlib.contextmanager
def others_run() -> Iterator[None]:
    _BATON.release()
    try:
        yield
    finally:
        _BATON.acquire()


class Turns:
    """Time as the protocol sees it: whoever sleeps lets others run."""

    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        with others_run():
            time.sleep(max(seconds, 0.01))


class ThreadComm(GroupComm):
    """The threaded group."""

    def together(self, collective, *arguments):
        with others_run():
            collective(*arguments)


def on_threads(world_size: int, function: Callable[[int, GroupComm], object]) -> list:
    """What `function(rank, comm)` returns on each rank, a thread each; the first error of any."""
    store, joining, by_thread = SharedStore(), dist.HashStore(), threading.local()
    found: list = [None] * world_size
    errors: list[BaseException] = []

    def mine(*_):
        return by_thread.comm

    def work(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=joining)
            with _BATON:
                by_thread.comm = ThreadComm(store, Alive(store))
                found[rank] = function(rank, by_thread.comm)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException as error:
            errors.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # or the others would wait

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        with (
            mock.patch.object(distributing, "open_comm", mine),
            mock.patch.object(protocol, "time", Turns),
        ):
            threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world_size)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 100
            while any(thread.is_alive() for thread in threads) and not errors and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return found


def sample(i: int) -> torch.Tensor:
    return torch.tensor([float(i % 7), 1.0, -0.5 * i])


def samples_of(rank: int) -> list[int]:
    """None to three samples a rank, dealt by turns, so that their order isn't the ranks'."""
    return [rank + 256 * n for n in range(rank % 4)]


def record(rank: int, samples: list[int]) -> dc.ActivationCache:
    """A mean, moments and rows on all ranks; a mean and rows that a few know, and the same that one does."""
    x_nd, local = torch.stack([sample(i) for i in samples]), dc.ActivationCache()
    local.register_aggregation("", dc.Mean(dim=0))
    local.register_aggregation("spread", dc.Moments(dim=0))
    local.register_aggregation("rows", "cat")
    few, one = ["mean_few", "rows_few"] if rank < 8 else [], ["mean_one", "rows_one"] if rank == 7 else []
    for key in ("mean", "spread", "rows", *few, *one):
        local[key] = x_nd
    return local


def merge_many(rank, comm):
    cache = dc.DistributedCache()
    for key, strategy in (("mean", dc.Mean(dim=0)), ("spread", dc.Moments(dim=0)), ("rows", "cat")):
        cache.register_aggregation(key, strategy)
    with cache.deferred_mode():
        if samples_of(rank):
            cache.cat(record(rank, samples_of(rank)), index=samples_of(rank))
    values = {key: cache[key] for key in cache}
    return values, cache.rows("rows_few")["sample"], [int(cache.count(f"mean_{who}")) for who in ("few", "one")]


def expected_values() -> dict:
    """The same of plain torch, which saw all samples at once, in order."""
    by_sample = sorted((i, rank) for rank in range(256) for i in samples_of(rank))
    x_nd, ranks = torch.stack([sample(i) for i, _ in by_sample]), torch.tensor([rank for _, rank in by_sample])
    values = {"mean": x_nd.mean(0), "rows": x_nd}
    for who, theirs in (("few", ranks < 8), ("one", ranks == 7)):
        values[f"rows_{who}"], values[f"mean_{who}"] = x_nd[theirs], x_nd[theirs].mean(0)
    return values


def test_256_ranks_say_what_one_rank_says():
    expected = expected_values()
    indices = sorted(i for rank in range(256) for i in samples_of(rank))
    for values, samples, counts in on_threads(256, merge_many):
        spread = values.pop("spread")
        assert values.keys() == expected.keys()
        for key, value in values.items():
            if key.startswith("rows"):
                assert torch.equal(value, expected[key])
            else:
                torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6 * 200)
        torch.testing.assert_close(spread["mean"], expected["rows"].mean(0), rtol=0, atol=1e-6 * 200)
        torch.testing.assert_close(spread["variance"], expected["rows"].var(0), rtol=1e-6, atol=1e-6)
        assert samples.tolist() == [i for i in indices if i % 256 < 8]
        assert counts == [len(samples), 3]


def test_the_oracle_of_256_ranks_knows_a_mean_of_means():
    means = torch.stack([torch.stack([sample(i) for i in samples_of(r)]).mean(0) for r in range(256) if samples_of(r)])
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(means.mean(0), expected_values()["mean"], rtol=0, atol=1e-6 * 200)


# -- ranks that differ -----------------------------------------------------------------------------------------


def long_schema(keys: range) -> dc.ActivationCache:
    local = dc.ActivationCache()
    for i in keys:
        local[f"model.layers.{i}.residual"] = torch.ones(2)
    return local


def differ(rank, comm, odd, how):
    cache = dc.DistributedCache()
    cache.register_aggregation("model", "max" if rank in odd and how == "strategy" else "sum")
    keys = range(10, 310) if rank in odd and how == "keys" else range(300)
    cache._held.delta._absorb(long_schema(keys))
    blob = codec.encode([list(schema.facts()) for schema in cache._held.delta._schemas().values()])
    try:
        cache.merge()
    except dc.SchemaMismatch as error:
        return comm.moved, len(blob), str(error)
    return comm.moved, len(blob), {key: int(cache[key][0]) for key in cache}


def test_where_2_of_64_ranks_hold_other_keys_two_schemas_travel_and_not_64():
    for moved, schema_nbytes, values in on_threads(64, lambda rank, comm: differ(rank, comm, (7, 40), "keys")):
        assert 0.5 * schema_nbytes < sum(n for what, n in moved if what == "gather_bytes") <= 2 * schema_nbytes
        assert sum(n for what, n in moved if what == "gather") <= 64 + 2 * 8  # a rank's record and two sizes
        assert len(values) == 310
        assert {values[f"model.layers.{i}.residual"] for i in range(10)} == {62}
        assert {values[f"model.layers.{i}.residual"] for i in range(10, 300)} == {64}
        assert {values[f"model.layers.{i}.residual"] for i in range(300, 310)} == {2}


def test_where_ranks_hold_the_same_no_schema_travels():
    for moved, _, values in on_threads(16, lambda rank, comm: differ(rank, comm, (), "")):
        assert [n for what, n in moved if what.startswith("gather")] == [64]
        assert set(values.values()) == {16}


def test_where_every_rank_differs_from_most_the_error_is_short_and_the_same_for_all():
    errors = {error for _, _, error in on_threads(64, lambda rank, comm: differ(rank, comm, (7, 40), "strategy"))}
    assert len(errors) == 1
    text = errors.pop()
    assert "'model.layers.0.residual': rank 0 against rank 7: strategy sum() against max()" in text
    assert "cannot merge 300 key(s)" in text and "and 292 more" in text and len(text) < 2000


# -- 1,024 ranks, counted --------------------------------------------------------------------------------------


class Alike(GroupComm):
    """A fake group of ranks that all do what this one does."""

    def gather(self, row, poll):
        super().gather(row, poll)
        return [list(row) for _ in self.ranks]

    def gather_bytes(self, blob, sizes, poll):
        super().gather_bytes(blob, sizes, poll)
        return [blob for _ in self.ranks]


@pytest.fixture
def fake_group() -> Iterator[Alike]:
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=fake_pg.FakeStore())
    try:
        comm = Alike(LocalStore())
        with mock.patch.object(distributing, "open_comm", return_value=comm):
            yield comm
    finally:
        dist.destroy_process_group()


def merges(comm: Alike, fill: Callable[[dc.DistributedCache], None], bucket_bytes: int) -> list[collections.Counter]:
    """Two merges: how often each collective was called, and the bytes that each was handed, by `(name, "bytes")`."""
    cache = dc.DistributedCache(bucket_bytes=bucket_bytes)
    found = []
    for _ in range(2):
        with cache.deferred_mode():
            fill(cache)
            comm.moved.clear()
        counts = collections.Counter(what for what, _ in comm.moved)
        for what, nbytes in comm.moved:
            counts[what, "bytes"] += nbytes
        found.append(counts)
    return found


@pytest.mark.parametrize("num_keys", [4000, 40])
def test_merging_means_at_1024_ranks_costs_what_the_bytes_cost_not_the_keys(fake_group, num_keys):
    """The same 256,000 elements by 4,000 keys or by 40."""
    numel = 256_000 // num_keys

    def fill(cache):
        cache.register_aggregation("m", "mean")
        local = dc.ActivationCache()
        for i in range(num_keys):
            local[f"m{i}"] = torch.ones(numel)
        cache.cat(local)

    first, second = merges(fake_group, fill, bucket_bytes=1 << 20)
    nbytes = 256_000 * 8 + num_keys * 8  # totals in float64, counts in int64
    for counts in (first, second):
        assert counts["sum", "bytes"] == nbytes
        assert 2 <= counts["sum"] <= math.ceil(nbytes / (1 << 20)) + 4
        assert counts["gather"] == 1 and counts["gather", "bytes"] == 64
        assert counts.keys() <= {"sum", "gather", ("sum", "bytes"), ("gather", "bytes")}


@pytest.mark.parametrize("num_keys", [4000, 40])
def test_what_ranks_tell_of_indices_at_1024_ranks_does_not_grow_with_the_keys(fake_group, num_keys):
    samples = iter(range(2))

    def fill(cache):
        cache.register_aggregation("m", "mean")
        local = dc.ActivationCache()
        for i in range(num_keys):
            local[f"m{i}"] = torch.ones(2)
        cache.cat(local, index=[next(samples)])

    with mock.patch.object(merging, "joined_ledger", lambda content, offers: content):  # alike: all bring one sample
        for counts in merges(fake_group, fill, bucket_bytes=1 << 20):
            assert counts["gather_bytes", "bytes"] / WORLD_SIZE < 150


@pytest.mark.parametrize("num_keys", [256, 16])
def test_merging_rows_at_1024_ranks_costs_what_the_bytes_cost_not_the_keys(fake_group, num_keys):
    """About 512 rows of 8 floats a rank, by 256 ragged keys or by 16."""
    rows = 512 // num_keys

    def fill(cache):
        local = dc.ActivationCache()
        for i in range(num_keys):
            local[f"r{i}"] = torch.ones(rows + (i % 2) - (i % 2 == 0), 8)
        cache.cat(local)

    for counts in merges(fake_group, fill, bucket_bytes=1 << 20):
        moved = counts["copy", "bytes"] / WORLD_SIZE
        assert 512 * 32 <= moved <= 512 * 32 + 16 * num_keys  # what is between blocks aligns them
        assert counts["copy"] == WORLD_SIZE  # each rank's rows are less than a bucket
        assert counts["gather"] == 1 and counts["gather_bytes"] == 1
        assert counts["gather_bytes", "bytes"] / WORLD_SIZE <= 16 * num_keys + 200


# -- planning --------------------------------------------------------------------------------------------------


def calls_of(function: Callable[[], object]) -> tuple[object, int]:
    """What a function returns, and how many calls it made, Python's and C's: a measure of work that no load changes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, calls


KEYS = tuple(f"layers.{i:05}" for i in range(10_000))
MEANS = {
    key: KeySchema(
        key,
        "fields",
        '{"name": "mean"}',
        (FieldSchema("total", (None,), "float64", "sum", 0), FieldSchema("count", (), "int64", "sum", 0)),
        result="float32",
    )
    for key in KEYS
}
ROWS = {key: KeySchema(key, "rows", '{"name": "cat"}', row_shape=(5,), dtype="float32") for key in KEYS}
ENOUGH = 20 * (WORLD_SIZE + len(KEYS))  # calls; one for each rank and key would be 10,240,000


def test_a_plan_for_1024_ranks_and_10000_keys_does_nothing_for_each_rank_and_key():
    table = Table((("sample", "int64"), ("position", "int64")), 100, True)
    num_rows = np.arange(WORLD_SIZE * len(KEYS)).reshape(WORLD_SIZE, -1) % 11
    offers = [Offer(mine, np.zeros_like(mine), (table,)) for mine in num_rows]
    everywhere = np.ones((WORLD_SIZE, len(KEYS)), dtype=bool)
    nobody = np.empty((WORLD_SIZE, 0), dtype=bool)
    by_turns = np.arange(WORLD_SIZE)[:, None] == np.arange(len(KEYS)) % WORLD_SIZE
    rooms = np.full(len(KEYS), 128)

    plan, calls = calls_of(lambda: make_plan(MEANS, Holdings((), nobody), [Offer()] * WORLD_SIZE, {}))
    assert plan.payloads == () and calls < ENOUGH

    plan, calls = calls_of(lambda: make_plan(ROWS, Holdings(KEYS, everywhere), offers, {}))
    assert calls < ENOUGH and set(plan.indexed.values()) == {True}
    mine, calls_for_one = calls_of(lambda: plan.payloads[3].blocks)
    assert [block.shape[0] for block in mine[:4]] == num_rows[3, :4].tolist() and len(mine) == len(KEYS) + 2
    assert calls_for_one > len(KEYS)  # so all of them would have been noticed

    plan, calls = calls_of(lambda: make_plan(MEANS, Holdings(KEYS, by_turns, rooms), [Offer()] * WORLD_SIZE, {}))
    assert calls < 3 * ENOUGH and len(plan.sole) == len(KEYS) and not plan.relaid  # a few objects for each key

    plan, calls = calls_of(lambda: make_plan(MEANS, Holdings(KEYS, ~by_turns, rooms), [Offer()] * WORLD_SIZE, {}))
    assert calls < 3 * ENOUGH and len(plan.relaid) == len(KEYS) and not plan.sole


# -- waiting ---------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody sleeps, and what happens in it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.looks = 0
        self.happens: Callable[[float], None] = lambda now_s: None

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.looks += 1
        self.happens(self.now_s)


class Waiting(GroupComm):
    """Rank 0 of 1,024 that waits, without any group."""

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        self.rank, self.ranks, self.timeout_s = 0, tuple(range(WORLD_SIZE)), timeout_s
        self.store = SharedStore()
        self.heart = object.__new__(Heart)  # its eyes, without a thread that beats
        self.heart._store, self.heart._peers, self.heart.interval_s = self.store, {}, min(1.0, timeout_s / 10)

    def come(self, ranks: range) -> None:
        for rank in ranks:
            self.store.add(f"7/here/{rank // 62}", 1 << rank % 62)
            self.store.add("7/count", 1)

    def beat(self, ranks: range, now_s: float) -> None:
        for rank in ranks:
            self.store.set(f"heart/{rank}", str(int(now_s)).encode())


@contextlib.contextmanager
def told_time(clock: Clock) -> Iterator[None]:
    with mock.patch.object(protocol, "time", clock), mock.patch("distcache.comm.time", clock):
        yield


def test_a_rank_that_waits_among_1024_asks_the_store_a_question_or_two_at_a_look():
    clock = Clock()
    comm = Waiting(clock, timeout_s=120)
    comm.come(range(1, WORLD_SIZE - 4))

    def happens(now_s):
        comm.beat(range(WORLD_SIZE - 4, WORLD_SIZE), now_s)
        if now_s > 3600 and comm.store.add("7/count", 0) < WORLD_SIZE:
            comm.come(range(WORLD_SIZE - 4, WORLD_SIZE))

    clock.happens = happens
    before = comm.store.calls
    with told_time(clock):
        arrive(comm, 7, 86400, "merge")
    assert 3600 < clock.now_s < 3602
    looked = comm.store.calls - before
    assert looked / clock.looks < 2, (looked, clock.looks)


@pytest.mark.parametrize("missing", [4, 1000])
def test_among_1024_ranks_the_one_that_fell_silent_is_named_within_half_again_the_limit(missing):
    clock = Clock()
    comm = Waiting(clock, timeout_s=120)
    comm.come(range(1, WORLD_SIZE - missing))
    dead, died_s = WORLD_SIZE - 2, 500.0

    def happens(now_s):
        comm.beat(range(WORLD_SIZE - missing, dead), now_s)
        comm.beat(range(dead + 1, WORLD_SIZE), now_s)
        comm.beat(range(dead, dead + 1), min(now_s, died_s))

    clock.happens = happens
    with told_time(clock), pytest.raises(Decided) as raised:
        arrive(comm, 7, 86400, "merge")
    assert b"was silent for 120 s while others waited to merge" in raised.value.decision
    assert f'"rank":{dead}'.encode() in raised.value.decision
    assert died_s + 120 <= clock.now_s <= died_s + 1.5 * 120 + 2


def test_among_1024_ranks_one_that_does_not_come_is_named_when_waiting_ends():
    clock = Clock()
    comm = Waiting(clock, timeout_s=120)
    comm.come(range(1, 1000))
    comm.come(range(1001, WORLD_SIZE))
    clock.happens = lambda now_s: comm.beat(range(1000, 1001), now_s)
    with told_time(clock), pytest.raises(Decided) as raised:
        arrive(comm, 7, 900, "merge")
    assert b"is alive but did not come within wait_s=900" in raised.value.decision
    assert b'"rank":1000' in raised.value.decision and 900 < clock.now_s < 902
