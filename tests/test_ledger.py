"""Interval sets and the ledger, against plain Python sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcache.errors import BadCache, DuplicateSamples
from distcache.ledger import IntervalSet, Ledger, samples_of

SAMPLES = st.lists(st.integers(-20, 20), max_size=25)
KEYS = st.sets(st.sampled_from("abcd"), min_size=1, max_size=3).map(frozenset)


def members(intervals: IntervalSet) -> set[int]:
    """Its members; its bounds must rise, with gaps between intervals."""
    flat = intervals.bounds.reshape(-1)
    assert (np.diff(flat) > 0).all()
    return {n for low, high in intervals.bounds.tolist() for n in range(low, high)}


@settings(max_examples=150, deadline=None)
@given(SAMPLES, SAMPLES)
def test_interval_sets_do_what_sets_do(a, b):
    mine, other = IntervalSet.of(a), IntervalSet.of(torch.tensor(b, dtype=torch.int64))
    assert members(mine) == set(a) and len(mine) == len(set(a))
    assert members(mine | other) == set(a) | set(b)
    assert members(mine & other) == set(a) & set(b)
    assert (mine == other) == (set(a) == set(b))
    assert all((n in mine) == (n in set(a)) for n in range(-22, 23))


def test_neighbours_become_one_interval():
    assert (IntervalSet.of([0, 1]) | IntervalSet.of([2, 5])).bounds.tolist() == [[0, 3], [5, 6]]
    assert IntervalSet.of(range(1000)).bounds.tolist() == [[0, 1000]]


def test_intervals_in_words():
    assert IntervalSet.of([3, 7, 8, 9]).words() == "3, 7..9"
    assert IntervalSet.of(range(0, 20, 2)).words(2) == "0, 2, …"


class Ledgers:
    """The same account kept with plain sets."""

    def __init__(self):
        self.ledger = Ledger()
        self.plain: dict[str, set[int]] = {}

    def add(self, keys, samples):
        expected = {n for key in keys for n in self.plain.get(key, set()) & set(samples)}
        if expected:
            with pytest.raises(DuplicateSamples):
                self.ledger.check(keys, IntervalSet.of(samples))
            return
        self.ledger.check(keys, IntervalSet.of(samples))
        self.ledger.add(keys, IntervalSet.of(samples))
        for key in keys:
            self.plain.setdefault(key, set()).update(samples)

    def agree(self, ledger=None):
        for key in "abcd":
            assert members((ledger or self.ledger).seen(key)) == self.plain.get(key, set())


def test_a_union_that_loses_samples_does_not_go_unnoticed(monkeypatch):
    monkeypatch.setattr(IntervalSet, "__or__", lambda self, other: self)
    both = Ledgers()
    both.add(frozenset("a"), [1])
    both.add(frozenset("a"), [2])
    with pytest.raises(AssertionError):
        both.agree()


STEPS = st.lists(st.tuples(st.sampled_from(["add", "add", "add", "forget"]), KEYS, SAMPLES), max_size=12)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_a_ledger_says_what_plain_sets_say(steps):
    both = Ledgers()
    for what, keys, samples in steps:
        if what == "add":
            both.add(keys, samples)
        else:
            key = min(keys)
            both.ledger.forget(key)
            both.plain.pop(key, None)
        both.agree()
    both.agree(both.ledger.copy())
    both.agree(Ledger.from_plain(both.ledger.to_plain()))
    assert bool(both.ledger) == any(both.plain.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(KEYS, SAMPLES), max_size=6), st.lists(st.tuples(KEYS, SAMPLES), max_size=6))
def test_two_ledgers_merge_if_no_key_saw_a_sample_in_both(mine, theirs):
    a, b = Ledgers(), Ledgers()
    for ledgers, steps in ((a, mine), (b, theirs)):
        for keys, samples in steps:
            ledgers.add(keys, samples)
    if any(a.plain.get(key, set()) & seen for key, seen in b.plain.items()):
        with pytest.raises(DuplicateSamples):
            a.ledger.check_all(b.ledger)
        a.agree()
        return
    a.ledger.check_all(b.ledger)
    a.ledger.add_all(b.ledger)
    for key, seen in b.plain.items():
        a.plain.setdefault(key, set()).update(seen)
    a.agree()


def test_the_error_names_who_the_samples_a_key_and_the_fix():
    ledger = Ledger()
    ledger.add(frozenset("ab"), IntervalSet.of([1, 2, 3, 9]))
    with pytest.raises(
        DuplicateSamples,
        match=r"3 sample\(s\) .* in 1 reduction\(s\) such as 'b': rank 3 has seen 2\.\.3, 9 already.*Cat",
    ):
        ledger.check(frozenset("bc"), IntervalSet.of([2, 3, 4, 9]), "rank 3")
    ledger.check(frozenset("c"), IntervalSet.of([2, 3]))


def test_shuffled_samples_are_not_written_anew_at_every_batch(monkeypatch):
    """Single samples, none next to another: the worst case, where every union copies intervals."""
    written = 0
    union = IntervalSet.__or__

    def counting(self, other):
        nonlocal written
        written += len(self.bounds) + len(other.bounds)
        return union(self, other)

    monkeypatch.setattr(IntervalSet, "__or__", counting)
    ledger, num_batches, keys = Ledger(), 1024, frozenset("a")
    order = torch.randperm(num_batches * 2, generator=torch.Generator().manual_seed(0)) * 2
    for batch in order.split(2):
        ledger.check(keys, IntervalSet.of(batch))
        ledger.add(keys, IntervalSet.of(batch))
    unions = written
    assert members(ledger.seen("a")) == set(order.tolist())
    assert unions < 4 * len(order) * 11  # n log n; one set that grows would take n² / 4 ≈ 1,000,000


@pytest.mark.parametrize(
    "plain",
    [
        [["a"]],
        [[["a"], [1]]],
        [[["a"], [3, 1]]],
        [[["a"], [1, 3, 2, 5]]],
        [[["a"], ["x", "y"]]],
        [[[3], [1, 2]]],
        [[["a"], [1, 2**70]]],
        [[None, [1, 2]]],
        3,
    ],
)
def test_a_forged_account_is_a_bad_cache(plain):
    with pytest.raises(BadCache, match="cannot read which samples were seen"):
        Ledger.from_plain(plain)


@pytest.mark.parametrize(
    "index", [[3, 1], (3, 1), torch.tensor([3, 1], dtype=torch.int32), np.array([3, 1]), iter([3, 1])]
)
def test_an_index_is_any_sequence_of_integers(index):
    found = samples_of(index)
    assert found.dtype == torch.int64 and found.tolist() == [3, 1]


def test_an_index_of_one_sample_is_a_number_and_of_none_empty():
    assert samples_of(3).tolist() == samples_of(torch.tensor(3)).tolist() == [3]
    assert samples_of([]).dtype == torch.int64 and len(samples_of([])) == 0


@pytest.mark.parametrize(
    "index", [[0.5], [True], torch.zeros(2, 2, dtype=torch.int64), torch.ones(1, dtype=torch.complex64)]
)
def test_an_index_of_anything_else_is_refused(index):
    with pytest.raises(TypeError, match=r"expected one integer index per sample, \[n\], got"):
        samples_of(index)
