"""Flat storage of states: digests, slabs, growth, room given back, and folds that cost an operation a chunk."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from distcache import segments
from distcache.errors import SchemaMismatch
from distcache.segments import Arena, capacity, fits
from distcache.strategies import AveragePattern, Max, Mean, Moments, Sum, Value

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
    states = [strategy.take(Value(value)) for value in values.values()]
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
