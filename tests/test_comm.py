"""The seam to other ranks: stores, hearts, meetings and collectives, each with its time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distcache.comm import (
    CommFailed,
    Heart,
    LocalComm,
    LocalStore,
    StoreLost,
    TorchStore,
    Transfer,
    init,
    meet,
    open_comm,
)
from distcache.errors import PeerFailed
from distcache.interrupts import held_interrupts


def tcp_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


STORES = {
    "local": LocalStore,
    "tcp": lambda: TorchStore(tcp_store(), 5),
    "prefixed tcp": lambda: TorchStore(dist.PrefixStore("a", tcp_store()), 5, "b/"),
    "hash": lambda: TorchStore(dist.HashStore(), 5, "b/"),
    "prefixed hash": lambda: TorchStore(dist.PrefixStore("a", dist.HashStore()), 5),
}


# -- stores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORES)
def test_every_store_keeps_counts_and_decides_alike(name):
    store = STORES[name]()
    assert store.get("absent") is None
    store.set("key", b"\x00\xff")
    assert store.get("key") == b"\x00\xff"
    assert [store.add("n", 1), store.add("n", 1 << 40), store.add("n", 0)] == [1, (1 << 40) + 1, (1 << 40) + 1]
    first = b'{"abort":{"rank":0,"message":"{braces} \\u00e9 \\"quoted\\""}}'
    assert store.decide("d", first) == first
    assert store.decide("d", b'{"commit":true}') == first  # what stands, not what was wished
    assert store.get("d") == first
    store.delete("d")
    store.delete("never there")
    assert store.get("d") is None
    assert store.decide("d", b"again") == b"again"


def test_one_of_many_deciders_wins_and_all_learn_which():
    store = tcp_store()
    with ThreadPoolExecutor(8) as pool:
        views = [TorchStore(store, 5) for _ in range(8)]
        found = list(pool.map(lambda i: views[i].decide("d", f"from {i}".encode()), range(8)))
    assert len(set(found)) == 1 and found[0].startswith(b"from ")


class Stuck(dist.Store):
    """A store whose server has stopped: calls don't come back."""

    def set(self, key, value):
        time.sleep(30)


def test_a_store_that_does_not_answer_is_lost_within_the_limit_and_stays_so():
    store = TorchStore(Stuck(), 0.2)
    for _ in range(2):
        with pytest.raises(StoreLost, match=r"did not answer within 0\.2 s"):
            store.set("key", b"")


def test_a_server_that_is_gone_is_a_lost_store():
    server = tcp_store()
    store = TorchStore(dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False), 5)
    store.set("key", b"here")
    del server
    with pytest.raises(StoreLost, match="the store failed: Dist"):
        store.get("key")


def test_a_call_of_somebody_else_that_waits_does_not_hold_up_ours():
    """A new process group waits in the store for its peers, with the connection to itself."""
    shared = tcp_store()
    store = TorchStore(shared, 2)
    waiting = threading.Thread(target=lambda: shared.get("late"))
    waiting.start()
    time.sleep(0.2)
    assert store.add("n", 1) == 1
    store.set("late", b"now")
    waiting.join(5)
    assert not waiting.is_alive()


# -- hearts ----------------------------------------------------------------------------------------------------


def test_a_heart_shows_life_silence_and_leaving():
    store = LocalStore()
    mine, peer = Heart(store, 0, 1.0), Heart(store, 1, 1.0)
    for _ in range(5):
        assert mine.silent_s(1) < 0.5
        time.sleep(0.1)
    peer._stop.set()  # as a kill would: but a stopped heart says that it leaves
    peer.join(2)
    assert mine.silent_s(1) == float("inf")
    assert mine.silent_s(2) == 0.0  # the first look at a rank that never beat
    time.sleep(0.3)
    assert mine.silent_s(2) >= 0.3
    mine.stop()


def test_a_heart_tells_the_watched_decision_and_no_other():
    store = LocalStore()
    heart = Heart(store, 0, 0.2)
    store.decide("0/decision", b"ended")
    heart.watch("0/decision")
    deadline = time.monotonic() + 10
    while heart.decision is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert heart.decision == b"ended"
    heart.watch("1/decision")
    assert heart.decision is None
    heart.stop()


# -- meetings --------------------------------------------------------------------------------------------------


def test_ranks_meet_under_one_number_time_after_time():
    store = LocalStore()
    with ThreadPoolExecutor(3) as pool:
        for turn in (1, 2, 3):
            assert list(pool.map(lambda me: meet(store, (0, 1, 2), me, 10), range(3))) == [turn] * 3
    assert len(store._held) <= 3 + 1  # a counter for each rank, and the last meeting


def test_a_meeting_that_was_given_up_is_passed_over_by_who_comes_late():
    store = LocalStore()
    for _ in range(2):
        with pytest.raises(PeerFailed, match=r"rank\(s\) \[7\] of the job did not come within 0\.1 s"):
            meet(store, (3, 7), 0, 0.1)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda me: meet(store, (3, 7), me, 10), range(2))) == [3, 3]


# -- interrupts ------------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_the_call_that_lets_it_through():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as let_through:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append("still here")
        let_through()
        done.append("not reached")
    assert done == ["still here"]


def test_ctrl_c_comes_through_at_the_end_at_the_latest():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append("still here")
    assert done == ["still here"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- one process -----------------------------------------------------------------------------------------------


def test_alone_every_collective_is_the_identity():
    alone = open_comm()
    assert isinstance(alone, LocalComm) and (alone.rank, alone.world_size, alone.name(0)) == (0, 1, "rank 0")
    x = torch.arange(3.0)
    alone.run([Transfer(x, "sum"), Transfer(x, "copy", root=0)], lambda: None)
    assert x.tolist() == [0.0, 1.0, 2.0]
    assert alone.gather([1, 2], lambda: None) == [[1, 2]]
    assert alone.gather_bytes(b"ab", [2], lambda: None) == [b"ab"]


def test_init_without_a_launcher_runs_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with init() as job:
        assert (job.rank, job.world_size) == (0, 1)
        assert not dist.is_initialized()


# -- collectives on ranks --------------------------------------------------------------------------------------


def every_transfer(rank, world_size):
    seam = open_comm(timeout_s=20)
    x = torch.arange(4) + 10 * rank
    found = {}
    for name, transfer in {
        "sum": Transfer(x.clone(), "sum"),
        "max": Transfer(x.clone(), "max"),
        "min": Transfer(x.clone(), "min"),
        "sum onto 1": Transfer(x.clone(), "sum", root=1),
        "copy of 2": Transfer(x.clone(), "copy", root=2),
        "copy of 2 to 0": Transfer(x.clone(), "copy", root=2, to=0),
        "nothing": Transfer(x[:0].clone(), "sum"),
    }.items():
        seam.run([transfer], lambda: None)
        found[name] = transfer.buffer.tolist()
    many = [Transfer(torch.full((1000,), float(rank + n)), "sum") for n in range(20)]
    seam.run(many, lambda: None)
    found["many"] = [float(transfer.buffer[0]) for transfer in many]
    found["gather"] = seam.gather([rank, -rank], lambda: None)
    blob = b"x" * rank
    found["bytes"] = seam.gather_bytes(blob, [0, 1, 2], lambda: None)
    return found, seam.colocated


def test_every_transfer_does_what_it_says(ranks):
    zero, one, _ = results = [found for found, _ in ranks.run(3, every_transfer)]
    for found in results:
        assert found["sum"] == [30, 33, 36, 39]
        assert found["max"] == [20, 21, 22, 23] and found["min"] == [0, 1, 2, 3]
        assert found["copy of 2"] == [20, 21, 22, 23]
        assert found["nothing"] == []
        assert found["many"] == [3.0 + 3 * n for n in range(20)]
        assert found["gather"] == [[0, 0], [1, -1], [2, -2]]
        assert found["bytes"] == [b"", b"x", b"xx"]
    assert one["sum onto 1"] == [30, 33, 36, 39]
    assert zero["copy of 2 to 0"] == [20, 21, 22, 23]
    assert one["copy of 2 to 0"] == [10, 11, 12, 13]  # it takes no part
    assert [where for _, where in ranks.run(3, every_transfer)] == [(0, 1, 2)] * 3


class Stop(Exception):
    pass


def stop_waiting(rank, world_size):
    seam = open_comm(timeout_s=20)

    def poll():
        raise Stop

    if rank == 0:
        with pytest.raises(Stop):
            seam.run([Transfer(torch.ones(1000), "sum")], poll)
        assert seam.broken
    dist.barrier()
    seam.rebuild("next")
    x = torch.full((3,), float(rank))
    seam.run([Transfer(x, "sum")], lambda: None)
    return x.tolist(), seam.broken


def test_a_poll_that_raises_ends_the_waiting_and_new_groups_work(ranks):
    assert ranks.run(2, stop_waiting) == [([1.0, 1.0, 1.0], False)] * 2


def no_progress(rank, world_size, transfer):
    seam = open_comm(timeout_s=1)
    started = time.monotonic()
    if rank == 0:
        with pytest.raises(CommFailed):
            seam.run([Transfer(torch.ones(1000), *transfer)], lambda: None)
    dist.barrier()
    return time.monotonic() - started


def test_a_collective_that_a_peer_does_not_join_fails_within_the_limit(ranks):
    for transfer in (("sum",), ("copy", 1, 0)):
        assert max(ranks.run(2, no_progress, transfer)) < 15


def outside_the_group(rank, world_size):
    group = dist.new_group([1])
    if rank == 0:
        open_comm(group)
    return open_comm(group).world_size


def test_a_rank_outside_of_the_group_is_told_so(ranks):
    outside, inside = ranks.outcomes(2, outside_the_group)
    assert outside.error == "ValueError: rank 0 is not in the group: make the cache on its ranks only."
    assert inside.value == 1


def in_a_group(rank, world_size):
    group = dist.new_group([1, 2])
    return open_comm(group, timeout_s=20).name(0) if rank else None


def test_a_rank_of_a_group_is_named_by_both_its_numbers(ranks):
    assert ranks.run(3, in_a_group)[1:] == ["rank 0 of the group (rank 1 of the job)"] * 2


# -- the end of a process --------------------------------------------------------------------------------------

GIVES_UP = """
import signal, sys, threading, torch, torch.distributed as dist
from distcache.comm import Transfer, open_comm
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False, wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2)
seam = open_comm(timeout_s=600)
if seam.rank == 1:
    print("waits", flush=True)
    signal.pause()
threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
try:
    seam.run([Transfer(torch.ones(1000), *eval(sys.argv[3]))], lambda: None)
except KeyboardInterrupt:
    print("gave up")
"""


@pytest.mark.parametrize("transfer", ["('sum',)", "('copy', 1, 0)"])
def test_a_process_ends_at_once_though_its_operations_would_wait_for_minutes(transfer):
    """gloo's destructors wait for their operations; and a rank that ends without close() says nothing alarming."""
    store = tcp_store()
    command = [sys.executable, "-c", GIVES_UP, str(store.port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    peer = subprocess.Popen([*command, "1", transfer], **pipes)
    try:
        ended = subprocess.run([*command, "0", transfer], timeout=60, check=False, **pipes)
    finally:
        peer.kill()
        peer.communicate()
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "gave up\n", "")
