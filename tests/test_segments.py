"""Flat storage of states: digests, slabs, growth, room given back, and folds that cost an operation a chunk."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from distcache import segments
from distcache.errors import SchemaMismatch
from distcache.segments import Arena, capacity, fits
from distcache.strategies import AveragePattern, Columns, Covariance, Max, Mean, Moments, Sum, TopK, Value

ONE = Columns({"sample": torch.zeros(1, dtype=torch.int64), "position": torch.zeros(1, dtype=torch.int64)}, True)

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """Counts the operations that change memory or compute; views cost nothing."""

    VIEWS = ("slice", "view", "detach", "select", "unsqueeze", "expand", "alias", "_unsafe_view", "split")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def add(arena, strategy, result=torch.float32, **values):
    """Fold one sample for each key, all of one strategy; keys that are new together become a slab."""
    keys = tuple(values)
    states = [strategy.take(Value(value, columns=ONE)) for value in values.values()]
    state = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    arena.make_room(keys, strategy, state, result)
    arena.fold(keys, state)


def x(*values):
    return torch.tensor(values)


def means(*keys):
    arena = Arena()
    for i, key in enumerate(keys):
        add(arena, Mean(), **{key: x(float(i), 1.0)})
    return arena


def finalized(arena, key):
    return arena.entries[key].strategy.finalize(arena.state(key)).tolist()


# -- digests -------------------------------------------------------------------------------------------------------


def test_the_content_digest_knows_no_order_and_the_layout_digest_does():
    ab, ba = means("a", "b"), means("b", "a")
    assert ab.content_digest == ba.content_digest and ab.layout_digest != ba.layout_digest
    assert ab.lies_like(means("a", "b")) and not ab.lies_like(ba)


def test_folding_a_b_into_b_a_adds_like_to_like():
    ab, ba = means("a", "b"), means("b", "a")
    ab.fold_arena(ba)
    assert finalized(ab, "a") == [0.5, 1] and finalized(ab, "b") == [0.5, 1]
    flat, other = (next(iter(means(*keys).segments.values())).filled()[0] for keys in ("ab", "ba"))
    assert torch.equal(flat, other)  # as they lie, `a` would have been added to `b` without a word


def test_digests_tell_strategies_shapes_and_dtypes_apart():
    kinds = [Mean(), Mean(dim=0), Sum(), Max(), Moments(), Mean(ragged=True), Mean(accumulate=torch.float32)]
    arenas = []
    for strategy in kinds:
        arena = Arena()
        add(arena, strategy, a=torch.ones(2, 2) if strategy.dim == 0 else torch.ones(2))
        arenas.append(arena)
    wide, exact = Arena(), Arena()
    add(wide, Mean(), a=torch.ones(3))
    add(exact, Mean(), torch.float64, a=torch.ones(2, dtype=torch.float64))
    digests = [arena.content_digest for arena in (*arenas, wide, exact)]
    assert len(set(digests)) == len(digests)


def test_a_ragged_size_changes_the_layout_and_not_the_content():
    small, large = Arena(), Arena()
    add(small, Mean(ragged=True), a=torch.ones(3))
    add(large, Mean(ragged=True), a=torch.ones(200))
    assert small.content_digest == large.content_digest and not small.lies_like(large)
    assert small.capacities("a") == {"total": (128,), "count": (128,)}
    small.fold_arena(large)
    assert small.capacities("a")["total"] == (256,) and int(small.state("a")["count"].sum()) == 203


ACTIONS = st.lists(st.tuples(st.sampled_from(["add", "add", "grow", "drop"]), st.sampled_from("abcd")), max_size=14)


@settings(max_examples=80, deadline=None)
@given(ACTIONS)
def test_digests_and_states_are_what_a_fresh_arena_has_whatever_came_before(actions):
    arena, plain = Arena(), {}
    for what, key in actions:
        if what == "drop":
            if key in plain:
                arena.drop(key)
                del plain[key]
            continue
        value = torch.full((150 if what == "grow" else 3,), float(ord(key)))
        add(arena, Sum(ragged=True), **{key: value})
        plain.setdefault(key, []).append(value)
    fresh = Arena()
    for key in arena.entries:
        for value in plain[key]:
            add(fresh, Sum(ragged=True), **{key: value})
    assert list(arena.entries) == list(fresh.entries) and set(arena.entries) == set(plain)
    assert arena.content_digest == fresh.content_digest
    for key, values in plain.items():
        longest = max(map(len, values))
        expected = sum(torch.nn.functional.pad(value, (0, longest - len(value))) for value in values)
        assert finalized(arena, key) == expected.tolist()
    outside = sum(segment.identity == 0 for segment in arena.segments.values())
    assert outside == len(arena.segments)
    for name in ("total", "count"):  # what no key owns holds identities, so that it can be reduced with the rest
        held = sum(float(arena.state(key)[name].sum()) for key in plain)
        dtype = "float64" if name == "total" else "int64"
        assert held == sum(float(p.sum()) for i, s in arena.segments.items() if i.dtype == dtype for p in s.filled())


def test_an_arena_of_dropped_keys_is_an_empty_one_again():
    arena = means("a", "b")
    for key in ("b", "a"):
        arena.drop(key)
    assert arena.lies_like(Arena()) and arena.nbytes == 0 and not arena.segments


def test_the_same_keys_in_chunks_of_other_length_are_another_layout():
    plain, longer = means("a"), means("a", "b", "c")
    longer.drop("b")  # leaves a hole, behind which `c` lies
    with_c = means("a", "c")
    assert longer.content_digest == with_c.content_digest and not longer.lies_like(with_c)
    longer.drop("c")
    assert longer.lies_like(plain)  # what lay last is room no more


def test_dropping_and_adding_again_takes_no_more_room():
    arena = means("a", "b", "c")
    before = arena.nbytes
    for _ in range(50):
        arena.drop("b")
        add(arena, Mean(), b=x(1.0, 1.0))
    assert arena.nbytes == before and finalized(arena, "b") == [1, 1]


def test_keys_that_grow_together_give_their_room_to_each_other():
    arena = Arena()
    for size in range(64, 1100, 128):
        for key in "abcdefgh":
            add(arena, AveragePattern(), **{key: torch.eye(size)})
    held = sum(t.nbytes for key in arena.entries for t in arena.state(key).values())
    assert arena.nbytes < 1.5 * held  # the rooms of all sizes together would be 3 times that
    assert arena.capacities("a")["total"] == (1152, 1152)
    assert float(arena.state("h")["total"].diagonal().sum()) == sum(range(64, 1100, 128))


# -- slabs ---------------------------------------------------------------------------------------------------------


def heads():
    arena = Arena()
    add(arena, Mean(), h0=x(1.0), h1=x(2.0), h2=x(3.0))
    return arena


def test_keys_that_are_new_together_are_folded_by_one_operation_a_field():
    arena = heads()
    state = {"total": torch.ones(3, 1, dtype=torch.float64), "count": torch.ones(3, dtype=torch.int64)}
    with Operations() as operations:
        arena.fold(("h0", "h1", "h2"), state)
    assert operations.names == ["add_", "add_"]
    assert [finalized(arena, key) for key in arena.entries] == [[1.0], [1.5], [2.0]]


def test_a_slab_that_lost_a_key_folds_grows_and_copies_on():
    arena = heads()
    arena.drop("h1")
    assert arena.slab(("h0", "h1", "h2")) is None and arena.slab(("h0", "h2")) is None
    add(arena, Mean(), h0=x(3.0), h2=x(5.0))
    assert finalized(arena, "h0") == [2] and finalized(arena, "h2") == [4]
    add(arena, Mean(), h1=x(7.0))
    assert list(arena.entries) == ["h0", "h2", "h1"] and finalized(arena, "h1") == [7]
    twin = arena.copy()
    twin.fold_arena(arena)
    assert int(twin.state("h2")["count"]) == 4 and int(arena.state("h2")["count"]) == 2


def test_a_ragged_slab_that_lost_a_key_can_grow():
    arena = Arena()
    add(arena, Mean(ragged=True), a=torch.ones(2), b=torch.ones(2), c=torch.ones(2))
    arena.drop("b")
    add(arena, Mean(ragged=True), a=torch.ones(300), c=torch.full((300,), 3.0))
    assert finalized(arena, "c")[:3] == [2, 2, 3] and len(finalized(arena, "a")) == 300


def test_values_without_elements_have_a_place_too():
    arena = Arena()
    add(arena, Mean(), empty=torch.ones(0), scalar=torch.ones(0))
    add(arena, Mean(), b=x(1.0))
    arena.drop("b")
    add(arena, Mean(), empty=torch.ones(0), scalar=torch.ones(0))
    assert finalized(arena, "empty") == [] and int(arena.state("scalar")["count"]) == 2


# -- what folding costs --------------------------------------------------------------------------------------------


def many(num_keys, strategy=None):
    arena = Arena()
    for i in range(num_keys):
        add(arena, strategy or (Mean(), Max(), Sum())[i % 3], **{f"k{i}": torch.full((4,), float(i))})
    return arena


def cost_of_folding(num_keys, strategy=None):
    into, other = many(num_keys, strategy), many(num_keys, strategy)
    with Operations() as operations:
        into.fold_arena(other)
    assert int(into.state(f"k{num_keys - 1}")["count"]) == 2
    return len(operations.names)


def test_folding_the_same_layout_costs_an_operation_a_chunk_however_many_keys():
    assert cost_of_folding(3) == cost_of_folding(300) == 3  # totals, counts and extremes: one segment each


def test_moments_of_the_same_layout_are_folded_as_one_however_many_keys():
    assert cost_of_folding(2, Moments()) == cost_of_folding(100, Moments()) < 30


def test_folding_another_layout_costs_operations_by_key():
    into, other = many(20), many(21)
    with Operations() as operations:
        into.fold_arena(other)
    assert len(operations.names) > 40


def test_moments_folded_as_one_are_what_each_gives():
    values = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    arenas = []
    for one in values:
        arena = Arena()
        for k in range(5):
            add(arena, Moments(correction=0), **{f"k{k}": one[k]})
        add(arena, Moments(correction=0), wide=torch.ones(7))
        arenas.append(arena)
    arenas[0].fold_arena(arenas[1])
    for k in range(5):
        found = Moments(correction=0).finalize(arenas[0].state(f"k{k}"))
        torch.testing.assert_close(found["variance"].float(), values[:, k].var(0, correction=0))


def test_segments_of_many_chunks_fold_and_copy(monkeypatch):
    monkeypatch.setattr(segments, "FIRST_CHUNK_BYTES", 64)
    monkeypatch.setattr(segments, "LARGEST_CHUNK_BYTES", 128)
    into, other = many(30, Mean()), many(30, Mean())
    (totals,) = [s for i, s in into.segments.items() if i.dtype == "float64"]
    assert len(totals.chunks) > 5 and into.lies_like(other)
    into.copy().fold_arena(other)
    into.fold_arena(other)
    assert all(finalized(into, f"k{i}") == [float(i)] * 4 for i in range(30))
    for i in (3, 4, 5, 6, 20):
        into.drop(f"k{i}")
    add(into, Mean(), wide=torch.full((100,), 2.0))
    assert finalized(into, "wide") == [2.0] * 100 and finalized(into, "k7") == [7.0] * 4


# -- copies and devices --------------------------------------------------------------------------------------------


def test_a_copy_lies_alike_and_shares_nothing():
    arena = many(9)
    twin = arena.copy()
    add(arena, Mean(), k0=torch.full((4,), 8.0))
    assert twin.lies_like(arena) and finalized(twin, "k0") == [0] * 4 and finalized(arena, "k0") == [4] * 4


def test_a_copy_on_another_device_holds_the_same_keys_there():
    arena = heads()
    add(arena, Moments(), m=torch.ones(2))
    there = arena.copy(torch.device("meta"))
    assert list(there.entries) == list(arena.entries) and there.slab(("h0", "h1", "h2")) is not None
    assert all(t.is_meta for key in there.entries for t in there.state(key).values())
    assert all(there.entries[key].schema.device == "meta" for key in there.entries)
    assert there.content_digest != arena.content_digest
    assert arena.copy(CPU).lies_like(arena)


def test_room_taken_in_inference_mode_can_be_added_to_outside():
    with torch.inference_mode():
        arena = means("a")
    add(arena, Mean(), a=x(2.0, 3.0))
    with torch.inference_mode():
        add(arena, Mean(), a=x(4.0, 5.0))
        twin = arena.copy()
    add(twin, Mean(), a=x(2.0, 3.0))
    assert finalized(arena, "a") == [2, 3] and finalized(twin, "a") == [2, 3]


def test_a_state_that_is_part_of_a_graph_leaves_the_chunk_out_of_it():
    arena = means("a")
    total = torch.ones(1, 2, dtype=torch.float64, requires_grad=True) * 2
    arena.fold(("a",), {"total": total, "count": torch.ones(1, dtype=torch.int64)})
    assert not arena.state("a")["total"].requires_grad and finalized(arena, "a") == [1, 1.5]


# -- what doesn't fit ----------------------------------------------------------------------------------------------


TOTAL, COUNT = {"total": ((2,), torch.float64)}, {"count": ((), torch.int64)}


@pytest.mark.parametrize(
    ("strategy", "fields", "result", "words"),
    [
        (Sum(), TOTAL | COUNT, torch.float32, r"it holds a state of Mean\(.*\), got Sum"),
        (Mean(), TOTAL, torch.float32, r"has \['count', 'total'\], the new value brings \['total'\].*or none"),
        (Mean(), {"total": ((3,), torch.float64)} | COUNT, torch.float32, r"\(2,\), got float64 \(3,\).*ragged=True"),
        (Mean(), {"total": ((2,), torch.float32)} | COUNT, torch.float32, r"of float64 \(2,\), got float32 \(2,\)"),
        (Mean(), TOTAL | COUNT, torch.float64, "results are float32, the new one asks for float64"),
    ],
)
def test_a_state_that_does_not_fit_is_told_apart(strategy, fields, result, words):
    with pytest.raises(SchemaMismatch, match=words):
        means("a").check("a", strategy, fields, result)


def test_capacities_are_steps_of_128_or_the_size():
    assert capacity(Mean(ragged=True), "total", (1, 129)) == (128, 256)
    assert capacity(Mean(ragged=(0,)), "total", (1, 129)) == (128, 129)
    assert capacity(Mean(ragged=True, size=(7, 200)), "total", (1, 129)) == (7, 200)
    assert capacity(Mean(), "total", (1, 129)) == (1, 129)
    with pytest.raises(SchemaMismatch, match=r"a value of shape \(3,\) exceeds size=2 of Mean in dim 0"):
        capacity(Mean(ragged=True, size=2), "total", (3,))
    assert fits((1, 2), (1, 3)) and not fits((1, 4), (1, 3)) and not fits((1,), (1, 3))


def test_a_relaid_copy_has_the_given_order_and_identities_for_what_is_absent():
    arena = means("a", "b")
    schemas = [means("c").entries["c"].schema, arena.entries["b"].schema]
    rooms = {key: arena.capacities("a") for key in "cb"}
    twin = arena.relaid(schemas, {"c": Mean(), "b": Mean()}, rooms, {"cpu": CPU})
    assert list(twin.entries) == ["c", "b"] and finalized(twin, "b") == [1, 1]
    assert all(math.isnan(v) for v in finalized(twin, "c")) and int(twin.state("c")["count"]) == 0


# -- keys that are expected back -----------------------------------------------------------------------------------


@contextlib.contextmanager
def counted():
    """How often room is taken and a digest made: `.empty`, `.digests`."""
    with (
        mock.patch.object(torch, "empty", side_effect=torch.empty) as empty,
        mock.patch.object(segments, "digest_of", side_effect=segments.digest_of) as digest_of,
    ):
        count = SimpleNamespace(empty=0, digests=0)
        yield count
        count.empty, count.digests = empty.call_count, digest_of.call_count


def mixed():
    """A slab, single keys, one that is centred and one that combines as a whole."""
    arena = heads()
    add(arena, Mean(), a=x(1.0, 2.0))
    add(arena, Moments(), m=x(1.0, 3.0))
    add(arena, TopK(2), t=x(5.0))
    return arena


def test_keys_that_sleep_are_held_no_more_and_all_they_had_is_identities():
    arena, before = mixed(), mixed().nbytes
    layout = arena.layout_digest
    arena.sleep()
    assert len(arena) == arena.content_digest == 0 and "a" not in arena and list(arena.slabs()) == []
    assert arena.dormant_layout_digest == layout != arena.layout_digest and arena.nbytes == before
    for segment in arena.segments.values():
        assert all(bool((part == segment.identity).all()) for part in segment.filled())


def test_the_same_keys_come_back_without_room_taken_or_anything_hashed():
    arena, expected = mixed(), mixed()
    states = [arena.slab(keys) for keys in arena.slabs()]
    states = [{name: tensor.clone() for name, tensor in state.items()} for state in states if state is not None]
    slabs = [(keys, arena.entries[keys[0]].strategy) for keys in arena.slabs()]
    arena.sleep()
    with counted() as count, Operations() as operations:
        for (keys, strategy), state in zip(slabs, states, strict=True):
            assert arena.make_room(keys, strategy, state, torch.float32) == keys
    assert (count.empty, count.digests, operations.names) == (0, 0, [])
    for (keys, _), state in zip(slabs, states, strict=True):
        arena.fold(keys, state)
    assert arena.lies_like(expected) and not arena.dormant
    assert all(torch.equal(arena.state(key)[n], t) for key in expected.entries for n, t in expected.state(key).items())
    with counted() as count:
        mixed()
    assert count.empty > 3 and count.digests > 5  # what the first time costs is seen


def test_an_arena_of_the_same_layout_is_folded_into_a_sleeping_one_by_an_operation_a_chunk():
    costs = []
    for num_keys in (3, 300):
        into, other = many(num_keys), many(num_keys)
        into.sleep()
        with counted() as count, Operations() as operations:
            into.fold_arena(other)
        assert count.empty == 0 and count.digests <= 4 * len(into.segments)  # how far each is filled
        assert into.lies_like(other) and not into.dormant and finalized(into, "k2") == finalized(other, "k2")
        costs.append(len(operations.names))
    assert costs == [3, 3]


def test_a_centred_state_is_folded_into_a_sleeping_one_as_any_other():
    for strategy in (Moments(), Covariance(), TopK(2)):
        arena, other = Arena(), Arena()
        for i, target in enumerate((arena, other)):
            add(target, strategy, k=x(1.0 + i, 4.0))
        arena.sleep()
        list(arena.centred())
        arena.fold_arena(other)
        arena.fold_arena(other)
        assert int(arena.state("k")["count"]) == 2
        twice = other.copy()
        twice.fold_arena(other)
        assert all(torch.equal(t, twice.state("k")[name]) for name, t in arena.state("k").items())


def test_an_arena_of_another_layout_takes_the_place_of_a_sleeping_one():
    arena, other = means("a", "b"), means("b", "a", "c")
    arena.sleep()
    arena.fold_arena(other)
    assert arena.lies_like(other) and not arena.dormant and finalized(arena, "c") == [2, 1]


@pytest.mark.parametrize(
    ("strategy", "value", "result"),
    [
        (Sum(), x(7.0, 8.0), torch.float32),
        (Mean(accumulate=torch.float32), x(7.0, 8.0), torch.float32),
        (Mean(), x(7.0, 8.0, 9.0), torch.float32),
        (Mean(), x(7.0, 8.0).double(), torch.float64),
    ],
    ids=["strategy", "parameters", "shape", "result"],
)
def test_a_key_that_comes_back_as_another_gives_its_room_back(strategy, value, result):
    arena = means("a", "b")
    arena.sleep()
    add(arena, strategy, result, b=value)
    assert finalized(arena, "b") == value.tolist() and list(arena.dormant) == ["a"]
    add(arena, Mean(), a=x(5.0, 6.0))
    assert finalized(arena, "a") == [5, 6] and not arena.dormant
    fresh = Arena()
    add(fresh, strategy, result, b=value)
    add(fresh, Mean(), a=x(5.0, 6.0))
    assert arena.content_digest == fresh.content_digest
    held = sum(t.nbytes for key in arena.entries for t in arena.state(key).values())
    assert arena.nbytes <= held + 16 + 8  # but for the hole, where nobody fits


def test_keys_that_do_not_come_back_keep_their_room_until_it_is_given_up():
    arena = means("a", "b", "c")
    arena.sleep()
    add(arena, Mean(), c=x(1.0, 2.0))
    add(arena, Mean(), a=x(3.0, 4.0))
    assert list(arena.entries) == ["c", "a"] and list(arena.dormant) == ["b"]
    full = arena.nbytes
    assert full == means("a", "b", "c").nbytes and not arena.lies_like(means("c", "a"))
    arena.compact()
    assert not arena.dormant and arena.nbytes == full * 2 // 3
    assert finalized(arena, "c") == [1, 2] and finalized(arena, "a") == [3, 4]
    fresh = Arena()
    for key in "ca":
        add(fresh, Mean(), **{key: x(0.0, 0.0)})
    assert arena.lies_like(fresh)  # as if `b` had never been


def test_a_compact_arena_that_has_nothing_dormant_stays_where_it_is():
    arena = mixed()
    with counted() as count:
        arena.compact()
    assert count.empty == count.digests == 0


def test_a_slab_of_which_some_keys_come_back_is_laid_out_anew():
    arena = heads()
    arena.sleep()
    add(arena, Mean(), h0=x(7.0), h2=x(9.0))
    assert arena.is_slab(("h0", "h2")) and finalized(arena, "h0") == [7] and finalized(arena, "h2") == [9]
    add(arena, Mean(), h1=x(8.0))
    assert finalized(arena, "h1") == [8] and not arena.dormant
    assert arena.nbytes <= heads().nbytes + 16  # the room of the slab was given back before, but for a hole


def test_a_slab_comes_back_as_one():
    arena = heads()
    arena.sleep()
    add(arena, Mean(), h0=x(7.0), h1=x(8.0), h2=x(9.0))
    assert arena.is_slab(("h0", "h1", "h2")) and arena.lies_like(heads())


def test_a_ragged_key_grows_after_it_has_come_back():
    arena = Arena()
    add(arena, Mean(ragged=True), a=torch.ones(100), b=torch.ones(100))
    arena.sleep()
    add(arena, Mean(ragged=True), a=torch.full((300,), 4.0), b=torch.full((300,), 5.0))
    assert arena.capacities("a")["total"] == (384,) == arena.capacities("b")["total"]
    assert finalized(arena, "a") == [4.0] * 300 and finalized(arena, "b") == [5.0] * 300
    arena.sleep()
    add(arena, Mean(ragged=True), a=torch.ones(300), b=torch.ones(300))
    assert int(arena.state("b")["count"].sum()) == 300 and arena.capacities("a")["total"] == (384,)


def test_all_keys_can_be_held_again_with_identities_as_an_idle_rank_does():
    arena = mixed()
    arena.sleep()
    add(arena, Mean(), a=x(1.0, 2.0))
    with counted() as count:
        arena.wake()
    assert (count.empty, count.digests) == (0, 0) and arena.lies_like(mixed())
    assert finalized(arena, "a") == [1, 2] and int(arena.state("h1")["count"]) == 0
    other = mixed()
    other.fold_arena(arena)
    assert int(other.state("m")["count"]) == 1 and finalized(other, "h2") == [3]


def test_a_blank_twin_has_the_layout_and_takes_no_memory_before_it_sleeps():
    arena = mixed()
    with counted() as count:
        blank = arena.blank()
    assert (
        (count.empty, count.digests) == (0, 0)
        and len(blank) == 0
        and not any(s.chunks for s in blank.segments.values())
    )
    blank.sleep()
    assert blank.nbytes == arena.nbytes and blank.dormant_layout_digest == arena.layout_digest
    with counted() as count:
        blank.fold_arena(arena)
    assert count.empty == 0 and blank.lies_like(arena) and finalized(blank, "h2") == [3]
    add(blank, Mean(), a=x(3.0, 4.0))
    assert finalized(arena, "a") == [1, 2] and finalized(blank, "a") == [2, 3]


def pointers(arena):
    return {chunk.data_ptr() for segment in arena.segments.values() for chunk in segment.filled()}


def test_a_copy_takes_the_memory_of_a_spare_arena_of_the_same_layout():
    arena, spare = mixed(), mixed()
    add(arena, Mean(), a=x(5.0, 8.0))
    given = pointers(spare)
    with counted() as count:
        twin = arena.copy(spare=spare)
    assert pointers(twin) == given and count.empty == count.digests == 0
    assert twin.lies_like(arena) and finalized(twin, "a") == [3, 5] and not given & pointers(arena)


def test_a_spare_arena_of_another_layout_is_left_alone():
    arena, spare = means("a", "b"), means("a")
    twin = arena.copy(spare=spare)
    assert not pointers(twin) & pointers(spare) and finalized(twin, "b") == [1, 1]
    on_meta = means("a", "b").copy(torch.device("meta"))
    assert finalized(arena.copy(spare=on_meta), "b") == [1, 1]


def test_a_copy_of_a_sleeping_arena_sleeps_too():
    arena = mixed()
    arena.sleep()
    twin = arena.copy()
    assert twin.dormant_layout_digest == arena.dormant_layout_digest and len(twin) == 0
    add(twin, Mean(), a=x(1.0, 2.0))
    assert "a" not in arena and list(arena.dormant) == list(mixed().entries)


PROGRAM = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "grow", "drop", "sleep", "compact", "wake"]), st.sampled_from("abcd")
    ),
    max_size=20,
)


@settings(max_examples=120, deadline=None)
@given(PROGRAM)
def test_states_are_what_was_folded_since_the_last_sleep_whatever_came_between(program):
    arena, plain = Arena(), {}
    for what, key in program:
        if what == "sleep":
            arena.sleep()
            plain = {}
        elif what == "compact":
            arena.compact()
        elif what == "wake":
            arena.wake()
            plain = {key: plain.get(key, []) for key in arena.entries}
        elif what == "drop":
            if plain.pop(key, None) is not None:
                arena.drop(key)
        else:
            value = torch.full((200 if what == "grow" else 3,), float(ord(key)))
            add(arena, Sum(ragged=True), **{key: value})
            plain.setdefault(key, []).append(value)
    assert set(arena.entries) == set(plain)
    for key, values in plain.items():
        longest = max(map(len, values), default=0)
        padded = [torch.nn.functional.pad(value, (0, longest - len(value))) for value in values]
        assert finalized(arena, key) == (sum(padded).tolist() if padded else [])
    for name, dtype in (("total", "float64"), ("count", "int64")):  # all else is identities
        held = sum(float(arena.state(key)[name].sum()) for key in plain)
        assert held == sum(float(p.sum()) for i, s in arena.segments.items() if i.dtype == dtype for p in s.filled())
    whole = arena.copy()
    whole.compact()
    assert whole.content_digest == arena.content_digest and whole.nbytes <= arena.nbytes
    if arena.dormant:  # what was given up is gone without a trace
        rooms = [math.prod(shape) for key in plain for shape in whole.capacities(key).values()]
        assert whole.nbytes == 8 * sum(rooms)


# -- states that combine as a whole --------------------------------------------------------------------------------


def test_states_that_combine_as_a_whole_lie_apart_and_can_be_had_alone():
    arena = mixed()
    add(arena, TopK(2), u=x(7.0))
    part = arena.gathered()
    assert list(part.entries) == ["t", "u"] and all(segment_id.gathered for segment_id in part.segments)
    assert part.state("t")["values"].data_ptr() == arena.state("t")["values"].data_ptr()
    theirs = part.copy()
    theirs.state("u")["values"].fill_(9.0)
    theirs.state("u")["sample"].fill_(1)
    part.fold_alike(theirs)
    assert arena.state("u")["values"].tolist() == [[9], [9]] and int(arena.state("t")["count"]) == 2
    assert not means("a").gathered().segments


def test_the_best_of_keys_side_by_side_are_folded_as_one_however_many_keys():
    assert cost_of_folding(2, TopK(2)) == cost_of_folding(60, TopK(2)) < 60
    assert cost_of_folding(2, Covariance()) == cost_of_folding(60, Covariance()) < 30
