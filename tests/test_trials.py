"""Ranks are killed, stopped and delayed in a merge: six trials of `benchmarks.faults`, and how strict the judge is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults import TIMEOUT_S, Seen, _judge, _judge_going_on, expected, sample, trial_of, unlike
from distcache import codec

ROOT = Path(__file__).parent.parent


def trials(*arguments: str) -> tuple[int, list[dict]]:
    """The exit code and the verdicts of trials, which a process without threads forks."""
    command = [sys.executable, "-m", "benchmarks.faults", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, done.stderr
    return done.returncode, found


# What each seed stands for: the test says so if seeds come to mean other trials.
SEEDS = {
    1090: ("kill", 0, "a process", "rows"),
    602: ("kill", 0, "rank 0", "voted"),  # and the store with it
    208: ("stop", 1, "a process", "move"),
    320: ("stop", 0, "rank 0", "here"),  # and the store with it
    650: ("sleep", 1, "a process", "agree"),
    1340: ("kill store", 2, "a process", "voted"),
}


def test_survivors_of_six_trials_agree_in_time_and_lose_nothing():
    code, verdicts = trials("--at-once", "3", "--seeds", *map(str, SEEDS))
    assert [(v["trial"]["seed"], v["wrong"]) for v in verdicts if v["wrong"]] == []
    assert code == 0 and len(verdicts) == 6
    for verdict in verdicts:
        trial = verdict["trial"]
        what = (trial["fault"], trial["victim"], trial["store"], trial["moment"])
        assert what == SEEDS[trial["seed"]] and verdict["struck"], verdict
        assert trial["fault"] != "sleep" or trial["delay_s"] > 2 * TIMEOUT_S
    ended = {verdict["trial"]["seed"]: verdict["ended"] for verdict in verdicts}
    assert ended[1090] == ended[208] == ended[650] == "aborted"
    assert ended[1340] == "in doubt"  # its store died when all had voted but nobody knew


def test_ranks_that_adopt_whatever_they_have_finished_are_found_out():
    code, verdicts = trials("--planted", "naive", "--seeds", "5153", "5232")
    assert code == 1
    for verdict in verdicts:
        assert any(what.startswith("ranks [0] have committed, rank ") for what in verdict["wrong"]), verdict


# -- the judge -------------------------------------------------------------------------------------------------

TRIAL = replace(
    trial_of(0),
    world_size=2,
    dst=None,
    fault="kill",
    delay_s=0.0,
    indexed=False,
    odd=(1,),
    blocks=(((2, 3), (1,)),) * 2,
)
BLOCK = list(enumerate(TRIAL.blocks[0]))
RIGHT = expected(TRIAL, [BLOCK])
DONE = Seen("committed", 0.1, False, 0, RIGHT, None)
RAISED = Seen("PeerFailed: rank 1 was lost", 2.1, True, 7, {}, None)
DOUBTFUL = Seen("MergeInDoubt: the store was lost", 2.1, True, 7, {}, RIGHT)


def test_a_trial_follows_from_its_seed():
    assert trial_of(7) == trial_of(7) != trial_of(8)
    assert {trial_of(seed, [3]).world_size for seed in range(20)} == {3}


def test_the_oracle_is_what_one_process_would_say():
    assert RIGHT["names"] == ["sample 2", "sample 3", "sample 1"]
    assert (
        RIGHT["total"].tolist() == (sample(2, TRIAL.width) + sample(3, TRIAL.width) + sample(1, TRIAL.width)).tolist()
    )
    assert RIGHT["only_1"].tolist() == sample(1, TRIAL.width).tolist()
    by_index = expected(replace(TRIAL, indexed=True), [BLOCK])
    assert by_index["names"] == ["sample 1", "sample 2", "sample 3"] and unlike(RIGHT, RIGHT) == []


@pytest.mark.parametrize(
    "mistaken",
    [
        expected(TRIAL, [BLOCK, BLOCK]),  # counted twice
        expected(TRIAL, [BLOCK[:1]]),  # a rank's part is lost
        expected(TRIAL, [BLOCK[::-1]]),  # another order
        {**RIGHT, "average": (RIGHT["only_1"] + (sample(2, TRIAL.width) + sample(3, TRIAL.width)) / 2) / 2},
        {**RIGHT, "spread": {**RIGHT["spread"], "variance": RIGHT["spread"]["variance"] * (1 + 1e-4)}},
    ],
    ids=["twice", "lost", "order", "mean of means", "variance"],
)
def test_the_oracle_knows_a_result_that_is_wrong(mistaken):
    assert unlike(mistaken, RIGHT)


@pytest.mark.parametrize(
    ("seen", "store_lost"),
    [([DONE, DONE], False), ([RAISED, RAISED], False), ([DONE, DOUBTFUL], True), ([RAISED, DOUBTFUL], True)],
)
def test_ranks_that_agree_are_let_pass(seen, store_lost):
    assert _judge(TRIAL, dict(enumerate(seen)), store_lost, [BLOCK]) == []


@pytest.mark.parametrize(
    ("seen", "store_lost", "words"),
    [
        ([DONE, RAISED], False, "ranks [0] have committed, rank 1 has not"),
        ([DONE, RAISED], True, "ranks [0] have committed, rank 1 has not"),
        ([DOUBTFUL, DOUBTFUL], False, "is in doubt, and the store lives"),
        ([RAISED, replace(DOUBTFUL, in_doubt=expected(TRIAL, [BLOCK[:1]]))], True, "rank 1 kept "),
        ([replace(DONE, values=expected(TRIAL, [BLOCK[:1]])), DONE], False, "rank 0 holds "),
        ([replace(DONE, delta_keys=3), DONE], False, "keeps a delta of 3 keys"),
        ([RAISED, replace(RAISED, unchanged=False)], False, "its delta or content has changed"),
        ([RAISED, replace(RAISED, ended="StoreLost: gone")], False, "rank 1 raised StoreLost"),
        ([RAISED, replace(RAISED, waited_s=11.0)], False, "rank 1 waited 11.0 s, beyond 10 s"),
    ],
)
def test_what_must_not_be_is_told(seen, store_lost, words):
    wrong = _judge(TRIAL, dict(enumerate(seen)), store_lost, [BLOCK])
    assert len(wrong) >= 1 and all(words in what for what in wrong[:1]), wrong


def test_survivors_that_lose_something_later_are_told():
    right = ("", codec.encode(RIGHT))
    assert _judge_going_on(TRIAL, [0, 1], {0: right, 1: right}, [BLOCK], True) == []
    less = ("", codec.encode(expected(TRIAL, [BLOCK[:1]])))
    (told, *_) = _judge_going_on(TRIAL, [0, 1], {0: right, 1: less}, [BLOCK], True)
    assert told.startswith("rank 1, later, holds ")
    assert _judge_going_on(TRIAL, [0, 1], {0: right}, [BLOCK], True) == ["rank 1 did not merge again, or died"]
    failed = ("PeerFailed: no", codec.encode(None))
    (told,) = _judge_going_on(TRIAL, [0], {0: failed}, [BLOCK], True)
    assert told == "rank 0 could not merge again: PeerFailed: no"


def test_shards_that_lose_a_row_or_own_a_sum_twice_or_never_are_told():
    shards = replace(TRIAL, dst="shard")
    parts = [expected(shards, [BLOCK], rank) for rank in range(2)]
    assert [len(part["rows"]) for part in parts] == [2, 1] and len(RIGHT["rows"]) == 3
    whole = {key: value for key, value in parts[1].items() if key in ("rows", "names")}
    there = {0: replace(DONE, values=parts[0]), 1: replace(DONE, values=whole)}
    assert _judge(shards, there, False, [BLOCK]) == []
    twice = _judge(shards, {**there, 1: replace(DONE, values={**whole, "total": RIGHT["total"]})}, False, [BLOCK])
    assert twice == ["total is held by 2 ranks"]
    less = {key: value for key, value in parts[0].items() if key != "average"}
    assert _judge(shards, {**there, 0: replace(DONE, values=less)}, False, [BLOCK]) == ["average is held by no rank"]
    (told,) = _judge(shards, {**there, 1: replace(DONE, values={**whole, "rows": RIGHT["rows"]})}, False, [BLOCK])
    assert told.startswith("rank 1 holds rows: ")


def test_content_that_died_with_its_rank_must_be_said_to_be_lost():
    lost = ("ValueError: the content was held by rank 1 (dst=1), which is not in the new group", codec.encode(None))
    onto_1 = replace(TRIAL, dst=1)
    assert _judge_going_on(onto_1, [0], {0: lost}, [BLOCK], True) == []
    assert _judge_going_on(onto_1, [0], {0: ("", codec.encode({}))}, [BLOCK], True) != []
