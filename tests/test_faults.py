"""What survivors see when a rank raises, disagrees, stalls or dies: the promised error, in seconds, nothing changed.

After every failure the deltas are compared byte for byte with what they were, ledger and notes included, and the
survivors go on: all together where the failure was a passing one, in a group of their own where a rank is lost.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import distcache as dc
from distcache import comm, memory
from distcache import merge as merging
from distcache.testing import kill_self

TIMEOUT_S = 3  # of silence, so that a lost rank is found out in seconds
IN_SECONDS = 25  # what no survivor may wait longer than, on a loaded machine


def local_of(*samples: int) -> dc.ActivationCache:
    """One cat's worth: a reduction, a centred one, rows and a list, so that every way of moving is taken."""
    x = torch.tensor([[float(i), 1.0, -2.0 * i] for i in samples])
    local = dc.ActivationCache()
    local["total"], local["spread"], local["rows"] = x.sum(0), x.mean(0), x
    local.add_with_info("names", [f"sample {i}" for i in samples], "as they were read")
    return local


def new_cache(**limits) -> dc.DistributedCache:
    cache = dc.DistributedCache(**{"timeout_s": TIMEOUT_S, **limits})
    cache.register_aggregation("total", "sum")
    cache.register_aggregation("spread", "moments")
    return cache


def merged_value(samples: list[int]) -> dict:
    """What plain torch says of a cache into which each of these samples was folded by a cat of its own."""
    x = torch.tensor([[float(i), 1.0, -2.0 * i] for i in samples])
    return {"total": x.sum(0).tolist(), "rows": x.tolist(), "names": [f"sample {i}" for i in samples]}


def shown(cache) -> dict:
    spread = cache["spread"]
    assert int(spread["count"]) == len(cache["rows"])
    torch.testing.assert_close(spread["mean"], cache["rows"].mean(0))
    names = cache["names"]
    assert names.info() == "as they were read"
    return {"total": cache["total"].tolist(), "rows": cache["rows"].tolist(), "names": names.value()}


def frozen(cache) -> bytes:
    """All of a rank's delta, to the byte: states, rows, columns, registrations, notes, ledger."""
    return pickle.dumps(cache._held.delta)


def attempted(cache, what: Callable[[], None]) -> str:
    """How a collective failed: within seconds, the delta as it was, the content too."""
    before, content, started = frozen(cache), cache._held.content, time.monotonic()
    try:
        what()
    except Exception as error:
        assert time.monotonic() - started < IN_SECONDS
        assert frozen(cache) == before
        assert cache._held.content is content
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def fold(cache, rank: int) -> None:
    """A block that fails at its end, leaving this rank's samples in the delta: 10·rank, and the next on odd ranks."""
    for i in range(10 * rank, 10 * rank + 1 + rank % 2):
        cache._held.delta._absorb(local_of(i), index=[i])


def samples_of(*ranks: int) -> list[int]:
    return [i for rank in ranks for i in range(10 * rank, 10 * rank + 1 + rank % 2)]


# -- a rank raises ---------------------------------------------------------------------------------------------


def raise_in_block(rank, world_size, bad, times):
    cache = new_cache()
    seen = []
    for n in range(times):
        try:
            with cache.deferred_mode():
                if n == 0:
                    for i in samples_of(rank):
                        cache.cat(local_of(i), index=[i])
                before = frozen(cache)
                dist.barrier()  # a cat that comes later may learn of the failure, and folds nothing then
                if rank == bad:
                    raise ZeroDivisionError(f"in block {n}, {{braces}} and é")
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
        assert frozen(cache) == before
    cache.merge()
    return seen, shown(cache)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_raises_in_the_block_keeps_its_error_and_the_others_learn_it(ranks, bad):
    for rank, (seen, found) in enumerate(ranks.run(3, raise_in_block, bad, 3)):
        for n, error in enumerate(seen):
            words = f"in block {n}, {{braces}} and é"
            if rank == bad:
                assert error == f"ZeroDivisionError: {words}"
            else:
                assert error.startswith(f"PeerFailed: rank {bad} raised ZeroDivisionError: {words}. Content and delta")
        assert len(seen) == 3
        assert found == merged_value(samples_of(0, 1, 2))  # nothing lost, nothing twice


def raise_while_others_work(rank, world_size):
    cache = new_cache()
    started = time.monotonic()
    with cache.deferred_mode():
        if rank == 0:
            raise ZeroDivisionError("early")
        while time.monotonic() - started < IN_SECONDS:
            time.sleep(0.05)
            cache.cat(dc.ActivationCache())


def test_the_others_learn_at_their_next_cat_not_only_at_the_end(ranks):
    mine, other = ranks.outcomes(2, raise_while_others_work)
    assert mine.error == "ZeroDivisionError: early"
    assert other.error.startswith("PeerFailed: rank 0 raised ZeroDivisionError: early")
    assert "cache.cat(dc.ActivationCache())" in other.traceback


def raise_in_cat(rank, world_size):
    cache = new_cache()
    cache.cat(local_of(rank), index=[rank])
    try:
        cache.cat({} if rank == 1 else local_of(10 + rank), index=[10 + rank])
    except (TypeError, dc.PeerFailed) as error:
        seen = f"{type(error).__name__}: {error}"
    cache.merge()
    return seen, shown(cache)


def test_outside_a_block_a_cat_that_raises_on_one_rank_ends_it_for_all(ranks):
    (zero, found), (one, same) = ranks.run(2, raise_in_cat)
    assert one.startswith("TypeError: cat expects an ActivationCache, got dict")
    assert zero.startswith("PeerFailed: rank 1 raised TypeError: cat expects an ActivationCache, got dict")
    assert found == same == merged_value([0, 1, 10])  # rank 0's value was folded, and waited in its delta


def explode_on_one(values):
    if os.environ.get("DISTCACHE_TEST_EXPLODE"):
        raise ZeroDivisionError("inside the aggregation")
    return torch.stack(values)


def raise_in_function(rank, world_size, bad):
    cache = new_cache()
    cache.register_aggregation("f", explode_on_one)
    for n in range(2):
        cache._held.delta.add("f", torch.tensor([rank, n]), index=[2 * rank + n])
    fold(cache, rank)
    with mock.patch.dict(os.environ, {"DISTCACHE_TEST_EXPLODE": "yes"} if rank in bad else {}):
        error = attempted(cache, cache.merge)
    cache.merge()
    return error, cache["f"].tolist(), shown(cache)


def test_an_exception_in_an_aggregation_is_an_unhealthy_vote(ranks):
    for bad in ([1], [0, 1]):
        for rank, (error, f, found) in enumerate(ranks.run(2, raise_in_function, bad)):
            own = "ZeroDivisionError: inside the aggregation"
            assert error == own if rank in bad else error.startswith(f"PeerFailed: rank 1 raised {own}")
            assert f == [[0, 0], [0, 1], [1, 0], [1, 1]]
            assert found == merged_value(samples_of(0, 1))


def write_into_values(values):
    for value in values[1:]:
        values[0] += value
    if os.environ.get("DISTCACHE_TEST_EXPLODE"):
        raise ZeroDivisionError("after it has written into its values")
    return values[0]


def spoil_content(rank, world_size):
    cache = new_cache()
    cache.register_aggregation("f", write_into_values)
    local = dc.ActivationCache()
    local["f"] = torch.tensor([1.0])
    cache.cat(local)
    cache._held.delta.add("f", torch.tensor([10.0]))
    with mock.patch.dict(os.environ, {"DISTCACHE_TEST_EXPLODE": "yes"}):
        attempted(cache, cache.merge)
    between = cache["f"].tolist()
    cache.merge()
    return between, cache["f"].tolist(), local["f"].tolist()


def test_a_function_that_writes_into_its_values_does_not_reach_the_content(ranks):
    for world_size in (1, 2):
        expected = [1.0 * world_size], [11.0 * world_size], [1.0]
        assert ranks.run(world_size, spoil_content) == [expected] * world_size


# -- ranks disagree --------------------------------------------------------------------------------------------


def disagree(rank, world_size, how):
    cache = new_cache()
    if how == "strategy":
        cache.register_aggregation("x", "mean" if rank == 1 else "sum")
    local = dc.ActivationCache()
    shape = (4,) if how == "shape" and rank == 2 else (3,)
    dtype = torch.float64 if how == "dtype" and rank == 0 else torch.float32
    local["x"] = torch.zeros((1, *shape), dtype=dtype)
    with_index = how == "index" and rank != 1
    cache._held.delta._absorb(local, index=[rank] if with_index else None)
    fold(cache, rank)
    errors = [attempted(cache, cache.merge) for _ in range(2)]
    assert errors[0] == errors[1]
    return errors[0]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shape", "'x': rank 0 against rank 2: row shape (3,) against (4,)"),
        ("dtype", "'x': rank 0 against rank 1: dtype float64 against float32"),
        ("strategy", "'x': rank 0 against rank 1: strategy sum() against mean()"),
        ("index", "cannot order 'x': rank 0 has values with an index, rank 1 without"),
    ],
)
def test_ranks_that_disagree_raise_the_same_text_everywhere(ranks, how, words):
    errors = ranks.run(3, disagree, how)
    assert len(set(errors)) == 1
    assert errors[0].startswith("SchemaMismatch: ") and words in errors[0], errors[0]


def count_twice(rank, world_size, where):
    cache = new_cache()
    if where == "content":
        cache.cat(local_of(7) if rank == 0 else dc.ActivationCache(), index=[7] if rank == 0 else None)
    local = dc.ActivationCache()
    local["total"] = torch.zeros(3)
    if where == "keys":  # another key on every rank: the same sample may be in both
        local = dc.ActivationCache()
        local[f"total_{rank}"] = torch.zeros(3)
    if rank or where != "content":
        cache._held.delta._absorb(local, index=[7])
    if where == "keys":
        cache.merge()
        return sorted(cache)
    with mock.patch.object(merging, "_reduce", side_effect=AssertionError("something moved")):
        return attempted(cache, cache.merge)


def test_a_sample_that_would_count_twice_in_a_reduction_is_an_error_before_anything_moves(ranks):
    for where, who in (("ranks", "rank 1 brings them, rank 0"), ("content", "rank 1 brings them, the content")):
        errors = ranks.run(2, count_twice, where)
        assert len(set(errors)) == 1
        assert (
            errors[0].startswith("DuplicateSamples: 1 sample(s) would count twice") and f"{who} has seen 7" in errors[0]
        )
    assert ranks.run(2, count_twice, "keys") == [["total_0", "total_1"]] * 2


def differ_in_arguments(rank, world_size, arguments):
    cache = new_cache(**arguments[rank])
    fold(cache, rank)
    return attempted(cache, cache.merge)


def test_caches_made_with_other_arguments_do_not_merge(ranks):
    for name, values in (("dst", (0, 1)), ("bucket_bytes", (1 << 20, 1 << 10))):
        errors = ranks.run(2, differ_in_arguments, [{name: value} for value in values])
        assert errors[0] == errors[1]
        assert errors[0].startswith(f"SchemaMismatch: ranks differ in {name}, by rank: {list(values)}")


def come_for_something_else(rank, world_size, folder):
    cache = new_cache()
    fold(cache, rank)
    error = attempted(cache, cache.merge if rank == 0 else lambda: cache.save(f"{folder}/it"))
    cache.merge()
    return error, shown(cache)


def test_ranks_that_come_for_different_collectives_are_told_so(ranks, tmp_path):
    for error, found in ranks.run(2, come_for_something_else, str(tmp_path)):
        assert error.startswith("SchemaMismatch: 1 of 2 ranks came to save, the others to merge")
        assert found == merged_value(samples_of(0, 1))
    assert not (tmp_path / "it").exists()


def lack_registration(rank, world_size):
    cache = new_cache()
    if rank == 0:
        cache.register_aggregation("f", explode_on_one)
        for i in range(2):
            cache._held.delta.add("f", torch.tensor([i]))
    else:
        cache.register_aggregation("f", write_into_values)  # an idle rank with another function
    fold(cache, rank)
    return attempted(cache, cache.merge)


def test_a_rank_without_the_function_of_the_others_says_so(ranks):
    zero, one = ranks.run(2, lack_registration)
    words = "SchemaMismatch: 'f' merges by test_faults:explode_on_one, but rank 1 has Function("
    assert zero == one and one.startswith(words)


# -- memory ----------------------------------------------------------------------------------------------------


def short_of_memory(rank, world_size, bad, dst):
    cache = new_cache(dst=dst)
    fold(cache, rank)
    free = 64 if rank == bad else memory.available_bytes()
    with mock.patch.object(merging, "available_bytes", return_value=free):
        error = attempted(cache, cache.merge)
    cache.merge()
    return error, shown(cache) if dst in (None, rank) else None


@pytest.mark.parametrize("dst", [None, 0])
def test_a_rank_without_room_raises_before_it_takes_any_and_ends_the_merge_for_all(ranks, dst):
    """With `dst` the others have sent all they had by then: what lies unread on the wire must not be read later."""
    for rank, (error, found) in enumerate(ranks.run(3, short_of_memory, 0, dst)):
        words = "TooLarge: the merge needs "
        assert error.startswith(words if rank == 0 else f"PeerFailed: rank 0 raised {words}"), error
        assert "64 B are free" in error and "on rank 0 and 2 more on its host" in error
        assert found is None or found == merged_value(samples_of(0, 1, 2))


# -- late, interrupted -----------------------------------------------------------------------------------------


def late(rank, world_size, late_s, timeout_s):
    cache = new_cache(timeout_s=timeout_s)
    with cache.deferred_mode():
        for i in samples_of(rank):
            cache.cat(local_of(i), index=[i])
        if rank == 1:
            time.sleep(late_s)  # busy: its heart beats
    return shown(cache)


def test_a_rank_that_is_alive_is_waited_for_beyond_timeout_s(ranks):
    assert ranks.run(2, late, 4, 1.5) == [merged_value(samples_of(0, 1))] * 2


@pytest.mark.slow
def test_a_rank_that_comes_thirty_seconds_late_is_waited_for(ranks):
    assert ranks.run(2, late, 30, 5) == [merged_value(samples_of(0, 1))] * 2


def never_come(rank, world_size):
    cache = new_cache(wait_s=1.5)
    fold(cache, rank)
    if rank == 0:
        dist.barrier()
    error = attempted(cache, cache.merge) if rank else None
    if rank == 1:
        dist.barrier()
    else:
        error = attempted(cache, cache.merge)
    cache.merge()
    return error, shown(cache)


def test_a_rank_that_is_alive_but_does_not_come_is_given_up_after_wait_s(ranks):
    (mine, found), (other, same) = ranks.run(2, never_come)
    assert other.startswith("PeerFailed: rank 0 is alive but did not come within wait_s=1.5.")
    assert mine.startswith("MergeAborted: given up by the cluster, because this rank is alive but did not come")
    assert found == same == merged_value(samples_of(0, 1))


def leave(rank, world_size):
    cache = new_cache(timeout_s=60)
    if rank == 1:
        cache.close()
        return None
    fold(cache, rank)
    return attempted(cache, cache.merge)


def test_a_rank_that_has_left_is_not_waited_for(ranks):
    error, _ = ranks.run(2, leave)
    assert error.startswith("PeerFailed: rank 1 has left while others waited to merge")


def interrupt(rank, world_size, where):
    """Ctrl-C on rank 0 while it waits: for arrivals, in a collective, or for the votes."""
    cache = new_cache(timeout_s=20)
    fold(cache, rank)
    before = frozen(cache)
    slow = {
        "arrive": mock.patch.object(merging, "arrive", wraps=merging.arrive),
        "move": mock.patch.object(merging, "_scratch", wraps=merging._scratch),
        "vote": mock.patch.object(merging, "vote", wraps=merging.vote),
    }[where]
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    error = None
    try:
        with slow as patched:
            if rank == 1:
                real = patched._mock_wraps
                patched.side_effect = lambda *args: (time.sleep(3), real(*args))[1]
            else:
                import threading

                threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
            cache.merge()
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        signal.signal(signal.SIGINT, previous)
    assert frozen(cache) == before
    cache.merge()
    return error, shown(cache)


@pytest.mark.parametrize("where", ["arrive", "move", "vote"])
def test_ctrl_c_ends_a_waiting_merge_for_all(ranks, where):
    (mine, found), (other, same) = ranks.run(2, interrupt, where)
    assert mine == "KeyboardInterrupt: "
    assert other.startswith("PeerFailed: rank 0 raised KeyboardInterrupt")
    assert found == same == merged_value(samples_of(0, 1))


def interrupt_too_late(rank, world_size):
    """Ctrl-C comes between the decision to commit and the swap of pointers."""
    cache = new_cache(timeout_s=20)
    fold(cache, rank)
    real = merging.vote

    def vote(*args):
        decision = real(*args)
        if rank == 0:
            signal.raise_signal(signal.SIGINT)
        return decision

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    error = None
    try:
        with mock.patch.object(merging, "vote", vote):
            cache.merge()
    except KeyboardInterrupt as raised:
        error = type(raised).__name__
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(cache.delta) == 0
    before = shown(cache)
    cache.cat(dc.ActivationCache())
    return error, before, shown(cache)


def test_ctrl_c_after_the_decision_is_raised_once_the_content_is_there(ranks):
    results = ranks.run(2, interrupt_too_late)
    everything = merged_value(samples_of(0, 1))
    assert results == [("KeyboardInterrupt", everything, everything), (None, everything, everything)]


# -- killed and stopped ----------------------------------------------------------------------------------------


def ended_by(rank: int, bad: int, where: str, how: int):
    """Patches that end the rank `bad` at one moment of its merge."""
    if rank != bad:
        return mock.MagicMock()
    if where == "door":  # it has said that it's there, and no more

        def arrive(party_comm, number, wait_s, what):
            party_comm.store.add(f"{number}/here/0", 1 << rank)
            party_comm.store.add(f"{number}/count", 1)
            kill_self(how)

        return mock.patch.object(merging, "arrive", arrive)
    if where == "before":
        return mock.patch.object(merging, "arrive", side_effect=lambda *args: kill_self(how))
    if where == "move":
        real = comm.TorchComm._start
        starts = []

        def start(self, transfer, buffer):
            starts.append(1)
            begin = real(self, transfer, buffer)
            return begin if len(starts) < 4 else lambda: (begin(), kill_self(how))[0]

        return mock.patch.object(comm.TorchComm, "_start", start)
    assert where == "voted"
    real_add = comm.TorchStore.add

    def add(self, key, amount):
        total = real_add(self, key, amount)
        if key.endswith("/votes") and amount:
            kill_self(how)
        return total

    return mock.patch.object(comm.TorchStore, "add", add)


def lose_a_rank(rank, world_size, bad, where, how, dst):
    cache = new_cache(bucket_bytes=16, dst=dst)
    fold(cache, rank)
    before, started = frozen(cache), time.monotonic()
    error = None
    with ended_by(rank, bad, where, how):
        try:
            cache.merge()
        except dc.DistcacheError as raised:
            error = f"{type(raised).__name__}: {raised}"
    took_s = time.monotonic() - started
    if error is None:
        return error, took_s, shown(cache) if dst in (None, rank) else None
    assert frozen(cache) == before
    survivors = [r for r in range(world_size) if r != bad]
    cache.merge(dist.new_group(survivors, use_local_synchronization=True))
    assert len(cache.delta) == 0
    return error, took_s, shown(cache) if cache.dst in (None, cache.rank) else None


def check_survivors(outcomes, bad, committed_allowed):
    survivors = [rank for rank in range(len(outcomes)) if rank != bad]
    assert outcomes[bad].died
    for outcome in outcomes:
        assert outcome.rank == bad or outcome.error is None, outcome.traceback
    values = [outcomes[rank].value for rank in survivors]
    assert all(took_s < IN_SECONDS for _, took_s, _ in values)
    if committed_allowed and all(error is None for error, _, _ in values):
        expected = merged_value(samples_of(*range(len(outcomes))))
    else:
        assert all(error is not None for error, _, _ in values)
        for error, _, _ in values:
            assert error.startswith(f"PeerFailed: rank {bad} was "), error
        expected = merged_value(samples_of(*survivors))
    assert [found for _, _, found in values if found is not None] == [expected] * sum(
        found is not None for _, _, found in values
    )
    assert any(found is not None for _, _, found in values)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("where", ["before", "door", "move", "voted"])
def test_when_a_rank_is_killed_the_others_raise_in_seconds_and_go_on_without_it(ranks, where, bad):
    """Killed between its vote and the decision, the merge is committed on all survivors or on none."""
    outcomes = ranks.outcomes(3, lose_a_rank, bad, where, signal.SIGKILL, None)
    check_survivors(outcomes, bad, committed_allowed=where == "voted")


@pytest.mark.parametrize(("where", "bad"), [("before", 1), ("move", 0), ("voted", 1)])
def test_when_a_rank_is_stopped_the_others_raise_in_seconds_and_go_on_without_it(ranks, where, bad):
    outcomes = ranks.outcomes(3, lose_a_rank, bad, where, signal.SIGSTOP, None, lost=bad)
    check_survivors(outcomes, bad, committed_allowed=where == "voted")


@pytest.mark.parametrize("bad", [0, 1])
def test_with_dst_survivors_of_a_first_merge_go_on_too(ranks, bad):
    """The content had not been made yet, so its place among the survivors is free."""
    outcomes = ranks.outcomes(3, lose_a_rank, bad, "move", signal.SIGKILL, 1)
    check_survivors(outcomes, bad, committed_allowed=False)


def lose_a_rank_later(rank, world_size, bad):
    cache = new_cache(dst=2)
    fold(cache, rank)
    cache.merge()
    cache._held.delta._absorb(local_of(100 + rank), index=[100 + rank])
    before = frozen(cache)
    if rank == bad:
        kill_self()
    errors = []
    try:
        cache.merge()
    except dc.PeerFailed as error:
        errors.append(str(error))
    try:
        cache.merge(dist.new_group([r for r in range(3) if r != bad], use_local_synchronization=True))
    except ValueError as error:
        assert frozen(cache) == before
        return [*errors, str(error)], None, None
    cache.cat(dc.ActivationCache())
    return errors, cache.dst, shown(cache) if cache.dst == cache.rank else None


def test_with_dst_the_content_stays_with_its_process_whatever_its_rank_becomes(ranks):
    outcomes = ranks.outcomes(3, lose_a_rank_later, 0)
    samples = [*samples_of(0, 1, 2), 101, 102]
    assert [outcome.value[1] for outcome in outcomes[1:]] == [1, 1]
    assert outcomes[1].value[2] is None and outcomes[2].value[2]["rows"] == merged_value(samples)["rows"]


def test_with_dst_content_that_died_with_its_rank_is_said_to_be_lost(ranks):
    outcomes = ranks.outcomes(3, lose_a_rank_later, 2)
    for outcome in outcomes[:2]:
        errors, _, _ = outcome.value
        assert errors[0].startswith("rank 2 was silent for 3 s while others waited")
        assert errors[1].startswith("the content was held by rank 2 (dst=2), which is not in the new group: it is lost")


def fall_behind(rank, world_size):
    """Rank 1 is stopped for longer than the limit and goes on: it was given up, and says so."""
    cache = new_cache(timeout_s=8)  # a busy machine's store may be silent for longer than a second or two
    fold(cache, rank)
    child = os.fork() if rank == 1 else None
    if child == 0:  # wakes its parent up
        time.sleep(15)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    if rank == 1:
        kill_self(signal.SIGSTOP)
    error = attempted(cache, cache.merge)
    dist.barrier()
    cache.merge()
    return error, shown(cache)


def test_a_rank_that_wakes_up_after_it_was_given_up_can_merge_again(ranks):
    (other, found), (mine, same) = ranks.run(2, fall_behind)
    assert other.startswith("PeerFailed: rank 1 was silent for 8 s")
    assert mine.startswith("MergeAborted: given up by the cluster, because this rank was silent for 8 s")
    assert found == same == merged_value(samples_of(0, 1))


# -- the store -------------------------------------------------------------------------------------------------


def own_store(rank, path):
    """A store that can be stopped: rank 0's child serves it. (store, the server's process id on rank 0)."""
    server = 0
    if rank == 0:
        read, write = os.pipe()
        server = os.fork()
        if server == 0:
            served = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            os.write(write, str(served.port).encode())
            time.sleep(60)
            os._exit(0)
        with open(path + ".part", "wb") as port:
            port.write(os.read(read, 10))
        os.rename(path + ".part", path)
    while not os.path.exists(path):
        time.sleep(0.05)
    return dist.TCPStore("127.0.0.1", int(open(path).read()), None, False, wait_for_workers=False), server


def stop(process_id: int) -> None:
    os.kill(process_id, signal.SIGSTOP)
    os.waitpid(process_id, os.WUNTRACED)  # until it has stopped


def lose_store(rank, world_size, path, when):
    store, server = own_store(rank, path)
    cache = new_cache(store=store, timeout_s=2)
    fold(cache, rank)
    dist.barrier()
    real = merging.vote

    def vote(party_comm, number, let_through):
        dist.barrier()
        if rank == 0:
            stop(server)
        dist.barrier()
        return real(party_comm, number, let_through)

    def committed_on_rank_1_only(party_comm, number, let_through):
        decision = real(party_comm, number, let_through)
        if rank == 0:
            raise comm.StoreLost("planted: the answer is lost")
        return decision

    if when == "before":
        if rank == 0:
            stop(server)
        dist.barrier()
        error = attempted(cache, cache.merge)
    elif when == "voted":
        with mock.patch.object(merging, "vote", vote):
            error = attempted(cache, cache.merge)
    else:
        with mock.patch.object(merging, "vote", committed_on_rank_1_only):
            error = attempted(cache, cache.merge) if rank == 0 else cache.merge()
    doubtful = cache._held.doubt is not None
    if doubtful:
        with pytest.raises(dc.MergeInDoubt, match=r"Call cache\.merge\(\) on every rank first"), cache.deferred_mode():
            cache.cat(local_of(5), index=[5])
    dist.barrier()  # the other rank too has lost it by now
    if rank == 0:
        os.kill(server, signal.SIGCONT)
    dist.barrier()
    cache.rejoin()
    cache.merge()
    result = shown(cache)
    cache.cat(local_of(50 + rank), index=[50 + rank])
    cache.close()
    dist.barrier()
    if rank == 0:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    return error, doubtful, result, len(cache["rows"])


def test_a_store_that_is_lost_before_the_vote_aborts_the_merge(ranks, tmp_path):
    for error, doubtful, found, rows in ranks.run(2, lose_store, str(tmp_path / "port"), "before"):
        assert error.startswith("MergeAborted: this rank lost the store before its vote") and "2 s" in error
        assert not doubtful
        assert found == merged_value(samples_of(0, 1)) and rows == 5


def test_a_store_that_is_lost_after_the_vote_leaves_a_doubt_that_the_next_merge_settles(ranks, tmp_path):
    for error, doubtful, found, rows in ranks.run(2, lose_store, str(tmp_path / "port"), "voted"):
        assert error.startswith("MergeInDoubt: the store was lost after this rank voted yes")
        assert doubtful
        assert found == merged_value(samples_of(0, 1)) and rows == 5


def test_a_rank_in_doubt_learns_that_the_others_committed_and_counts_nothing_twice(ranks, tmp_path):
    results = ranks.run(2, lose_store, str(tmp_path / "port"), "one")
    assert [error and error.split(":")[0] for error, *_ in results] == ["MergeInDoubt", None]
    for _, _, found, rows in results:
        assert found == merged_value(samples_of(0, 1)) and rows == 5


def miss_the_constructor(rank, world_size):
    """Rank 1 comes when rank 0 has given up, and rank 0 tries again."""
    time.sleep(3 * rank)
    errors = []
    for timeout_s in (1, 10):
        try:
            cache = new_cache(timeout_s=timeout_s)
            break
        except dc.PeerFailed as error:
            errors.append(str(error))
    cache.cat(local_of(rank), index=[rank])
    return errors, shown(cache)


def test_a_constructor_that_a_rank_missed_can_be_called_again(ranks):
    (zero, found), (one, same) = ranks.run(2, miss_the_constructor)
    assert len(zero) == 1 and not one
    assert zero[0].startswith("rank(s) [1] of the job did not come within 1 s: making a DistributedCache")
    assert found == same == merged_value([0, 1])


class CannotDecide(dist.Store):
    """A store that can only keep and count."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def set(self, key, value):
        self.kept[key] = value

    def get(self, key):
        return self.kept[key]

    def add(self, key, amount):
        self.kept[key] = str(int(self.kept.get(key, 0)) + amount).encode()
        return int(self.kept[key])


def bring_poor_store(rank, world_size):
    new_cache(store=CannotDecide())


def test_a_store_that_cannot_compare_and_set_is_refused(ranks):
    for outcome in ranks.outcomes(2, bring_poor_store):
        assert outcome.error.startswith("ValueError: the store of this job (CannotDecide) cannot be used")
        assert "torch's TCPStore" in outcome.error


# -- one process takes the same path ---------------------------------------------------------------------------


def test_alone_a_merge_that_raises_keeps_its_delta_and_merges_later():
    cache = new_cache()
    cache.register_aggregation("f", explode_on_one)
    for i in range(2):
        cache._held.delta.add("f", torch.tensor([i]))
    cache._held.delta._absorb(local_of(3), index=[3])
    with mock.patch.dict(os.environ, {"DISTCACHE_TEST_EXPLODE": "yes"}):
        assert attempted(cache, cache.merge) == "ZeroDivisionError: inside the aggregation"
    with mock.patch.object(merging, "available_bytes", return_value=8):
        assert attempted(cache, cache.merge).startswith("TooLarge: the merge needs")
    with contextlib.suppress(ZeroDivisionError), cache.deferred_mode():
        cache.cat(local_of(4), index=[4])
        raise ZeroDivisionError
    cache.merge()
    assert shown(cache) == merged_value([3, 4])
    with pytest.raises(dc.DuplicateSamples, match="the content has seen 4"):
        cache.cat(local_of(4), index=[4])
