"""ActivationCache: every call of the documented class, what came with states, and that nothing is half done."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segments import Operations

from distcache.cache import ActivationCache
from distcache.entries import Noted, Shown, Slab
from distcache.errors import DuplicateSamples, SchemaMismatch
from distcache.strategies import (
    Cat,
    Columns,
    Extend,
    Grouped,
    Histogram,
    Max,
    Mean,
    Moments,
    Stack,
    Sum,
    Value,
    Weighted,
    registered_strategies,
)


def holding(**values):
    cache = ActivationCache()
    cache.update(values)
    return cache


def x(*values, dtype=None):
    return torch.tensor(values, dtype=dtype)


def registered(**strategies):
    cache = ActivationCache()
    for pattern, strategy in strategies.items():
        cache.register_aggregation(pattern, strategy)
    return cache


def stack(values):
    """A function that can be imported, as pickling asks for."""
    return torch.stack(values, dim=0)


def rows(*samples, value=None, positions=None, indexed=True, **beside):
    """A recorded value: one row per entry of `samples`."""
    sample = torch.tensor(samples)
    position = torch.tensor(positions) if positions else torch.zeros_like(sample)
    data = sample.float().unsqueeze(1) if value is None else value
    return Value(data, rows=True, columns=Columns({"sample": sample, "position": position, **beside}, indexed))


def take(cache, *shown, num_samples=0, samples=None, raw=True, slabs=()):
    keys = [key for slab in slabs for key in slab.keys] + [one.key for one in shown]
    cache._take_pass(slabs, shown, keys, num_samples, samples, raw)


# -- a dict of values ----------------------------------------------------------------------------------------------


def test_it_is_a_dict_of_values():
    cache, value = ActivationCache(), x(1, 2)
    cache["b"] = value
    cache["a"] = {"any": [object]}
    assert cache["b"] is value and "b" in cache and "c" not in cache and len(cache) == 2
    assert list(cache) == list(cache.keys()) == ["b", "a"]
    assert list(cache.values()) == [value, {"any": [object]}] and dict(cache.items())["b"] is value
    assert cache.get("b") is value and cache.get("c") is None and cache.get("c", 3) == 3
    del cache["b"]
    assert list(cache) == ["a"] and bool(cache) and not ActivationCache()


def test_a_key_that_is_set_again_keeps_its_place():
    cache = holding(a=1, b=2)
    cache["a"] = 3
    assert list(cache.items()) == [("a", 3), ("b", 2)]


def test_a_missing_key_is_named_with_what_is_there():
    with pytest.raises(KeyError, match="no key 'c': the cache has 2 keys"):
        holding(a=1, b=2)["c"]
    with pytest.raises(KeyError, match="no key 'c'"):
        del holding(a=1)["c"]
    with pytest.raises(TypeError, match=r"keys are str, got 3 \(int\)"):
        ActivationCache()[3] = 1


def test_repr_shows_the_keys_and_str_the_values():
    cache = holding(resid_out_0=x(1, 2), resid_in_0=[3])
    assert repr(cache) == "ActivationCache(resid_out_0, resid_in_0)"
    assert str(cache) == "ActivationCache(resid_out_0: tensor([1, 2]), resid_in_0: [3])"


def test_the_sum_of_two_holds_both_and_the_right_one_wins():
    left, right = holding(a=1, b=2), holding(b=3, c=4)
    left.register_aggregation("a", "mean")
    right.register_aggregation("a", "sum")
    right.register_aggregation("c", "sum")
    both = left + right
    assert dict(both.items()) == {"a": 1, "b": 3, "c": 4} and dict((left + {"b": 5}).items()) == {"a": 1, "b": 5}
    assert dict(left.items()) == {"a": 1, "b": 2}
    assert both._registry == {"a": Mean(), "c": Sum()}
    with pytest.raises(TypeError):
        left + 3


def test_update_takes_a_dict_or_a_cache_and_nothing_else():
    cache = holding(a=1, b=2)
    cache.update({"b": 3})
    cache.update(holding(a=4, c=5))
    assert list(cache.items()) == [("a", 4), ("b", 3), ("c", 5)]
    cache.update(cache)
    assert list(cache.items()) == [("a", 4), ("b", 3), ("c", 5)]
    for wrong in ([("a", 1)], None):
        with pytest.raises(TypeError, match="update expects a dict or an ActivationCache"):
            cache.update(wrong)
    with pytest.raises(TypeError, match="keys are str"):
        cache.update({"d": 1, 2: 3})
    assert "d" not in cache


def test_update_replaces_states_by_states():
    mine, theirs = merged(x=Mean()), merged(x=Sum(), y=Max(), z=Cat())
    mine.update(theirs)
    assert mine["x"].tolist() == [4, 6] and mine["y"].tolist() == [3, 4] and mine["z"].tolist() == [1, 2, 3, 4]
    add_to(theirs)
    assert mine["x"].tolist() == [4, 6] and mine["z"].tolist() == [1, 2, 3, 4]


def merged(**strategies):
    """A cache that holds states of [1, 2] and [3, 4]."""
    cache = registered(**strategies)
    for value in (x(1.0, 2.0), x(3.0, 4.0)):
        cache.cat(holding(**dict.fromkeys(strategies, value)))
    return cache


def add_to(cache):
    cache.cat(holding(**dict.fromkeys(cache.keys(), x(5.0, 6.0))))


# -- the documented class's own behaviours -------------------------------------------------------------------------


def test_without_a_registration_tensors_are_concatenated_and_the_mapping_index_is_the_first():
    cache, other = holding(values_0=x(1, 2), mapping_index=[0, 1]), holding(values_0=x(3, 4), mapping_index=[2, 3])
    cache.cat(other)
    assert cache["values_0"].tolist() == [1, 2, 3, 4] and cache["mapping_index"] == [0, 1]


def test_the_mapping_index_is_kept_whatever_it_is_unless_it_is_registered():
    for first, second in ((x(0, 1), x(2, 3)), ({"last": [0]}, {"last": [1]})):
        cache = holding(mapping_index=first)
        cache.cat(holding(mapping_index=second))
        assert cache["mapping_index"] is first
    cache = registered(mapping_index="extend")
    cache.cat(holding(mapping_index=[0]))
    cache.cat(holding(mapping_index=[1]))
    assert cache["mapping_index"] == [0, 1]


@pytest.mark.parametrize("deferred", [False, True])
def test_a_function_of_a_list_aggregates(deferred):
    cache = holding(values_0=x(1, 2))
    cache.register_aggregation("values_", lambda values: torch.stack(values, dim=0))
    if deferred:
        with cache.deferred_mode():
            cache.cat(holding(values_0=x(3, 4)))
    else:
        cache.cat(holding(values_0=x(3, 4)))
    assert cache["values_0"].tolist() == [[1, 2], [3, 4]]


def test_other_keys_are_an_error_that_names_what_each_side_lacks():
    cache = holding(a=x(1), b=x(2))
    with pytest.raises(ValueError, match=r"the external one lacks \['a'\], this one lacks \['c'\]"):
        cache.cat(holding(b=x(1), c=x(2)))
    assert dict(cache.items()) == {"a": x(1), "b": x(2)}
    with cache.deferred_mode(), pytest.raises(ValueError, match="cannot cat caches with other keys"):
        cache.cat(holding(b=x(1)))


def test_an_empty_cache_takes_over_a_copy_of_the_mapping():
    value, other, cache = x(1, 2), ActivationCache(), ActivationCache()
    other["a"] = value
    cache.cat(other)
    assert cache["a"] is value
    other["a"], other["b"] = x(9), x(8)
    cache["c"] = x(7)
    assert cache["a"] is value and list(cache) == ["a", "c"] and list(other) == ["a", "b"]


def test_an_empty_external_changes_nothing_and_what_is_no_cache_is_refused():
    cache = holding(a=x(1))
    cache.cat(ActivationCache())
    assert cache["a"].tolist() == [1]
    with pytest.raises(TypeError, match=r"cat expects an ActivationCache, got dict\. Put values into one first"):
        cache.cat({"a": x(1)})


@pytest.mark.parametrize("deferred", [False, True])
def test_a_single_cat_into_an_empty_cache_leaves_the_value_as_it_is(deferred):
    for strategy in ("stack", "mean", lambda values: torch.stack(values)):
        cache, value = registered(a=strategy), x(1, 2)
        if deferred:
            with cache.deferred_mode():
                cache.cat(holding(a=value))
        else:
            cache.cat(holding(a=value))
        assert cache["a"] is value


# -- deferred mode -------------------------------------------------------------------------------------------------


class Spy:
    def __init__(self):
        self.calls = []

    def __call__(self, values):
        self.calls.append([value.tolist() for value in values])
        return torch.cat(values)


def test_deferred_a_function_sees_the_whole_list_once_and_one_by_one_it_folds_pairwise():
    values = [x(i) for i in range(5)]
    deferred, pairwise = Spy(), Spy()
    cache, other = registered(a=deferred), registered(a=pairwise)
    cache["a"] = other["a"] = values[0]
    with cache.deferred_mode():
        for value in values[1:]:
            cache.cat(holding(a=value))
        assert cache["a"].tolist() == [0] and deferred.calls == []
    for value in values[1:]:
        other.cat(holding(a=value))
    assert deferred.calls == [[[0], [1], [2], [3], [4]]]
    assert pairwise.calls == [[[0], [1]], [[0, 1], [2]], [[0, 1, 2], [3]], [[0, 1, 2, 3], [4]]]
    assert cache["a"].tolist() == other["a"].tolist() == [0, 1, 2, 3, 4]


def test_two_blocks_add_their_own_each():
    cache = registered(a="mean", b=Spy())
    for start in (0, 2):
        with cache.deferred_mode():
            for i in range(start, start + 2):
                cache.cat(holding(a=x(float(i)), b=x(i)))
    assert cache["a"].tolist() == [1.5] and cache["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name",
    sorted(n for n, cls in registered_strategies().items() if not cls.needs_index and cls is not Grouped),  # by columns
)
@settings(max_examples=8, deadline=None)
@given(num=st.integers(0, 5), there=st.booleans())
def test_deferred_mode_gives_what_cats_one_by_one_give(name, num, there):
    def value(i):
        return [i] if name == "extend" else torch.full((2,) if name == "covariance" else (2, 2), float(i))

    strategy = Histogram(3, 0, 9) if name == "histogram" else name
    said = []
    for deferred in (False, True):
        cache = registered(a=strategy)
        if there:
            cache["a"] = value(9)
        with cache.deferred_mode() if deferred else contextless():
            for i in range(num):
                cache.cat(holding(a=value(i)))
        said.append(cache.get("a"))
    one_by_one, whole = said
    torch.testing.assert_close(whole, one_by_one, rtol=1e-6, atol=0)


class contextless:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None


def test_if_the_block_raises_nothing_is_merged_and_the_error_passes_through():
    cache = registered(a="mean", c=Spy())
    cache.update({"a": x(1.0), "b": x(2), "c": x(1)})
    before = fingerprint(cache)

    def block():
        with cache.deferred_mode():
            cache.cat(holding(a=x(3.0), b=x(4), c=x(2)))
            cache.add("d", x(1))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()
    assert fingerprint(cache) == before and "d" not in cache
    cache.cat(holding(a=x(3.0), b=x(4), c=x(2)))
    assert cache["a"].tolist() == [2]


def test_if_a_function_raises_at_the_end_nothing_is_merged():
    class Odd(Exception):
        pass

    def fails(values):
        raise Odd("from the user's function")

    for there in (False, True):
        cache = registered(b=fails)
        if there:
            cache.update({"a": x(1), "b": x(2)})
        before = fingerprint(cache)
        block = cache.deferred_mode()
        block.__enter__()
        cache.cat(holding(a=x(1), b=x(2)))
        cache.cat(holding(a=x(1), b=x(2)))
        with pytest.raises(Odd, match="from the user's function"):
            block.__exit__(None, None, None)
        assert fingerprint(cache) == before


def test_nested_blocks_raise_and_the_outer_one_goes_on():
    cache = ActivationCache()
    with cache.deferred_mode():
        cache.cat(holding(a=x(1)))
        with pytest.raises(RuntimeError, match="deferred_mode is open already"), cache.deferred_mode():
            pass
        cache.cat(holding(a=x(2)))
    assert cache["a"].tolist() == [1, 2]
    with cache.deferred_mode():
        cache.cat(holding(a=x(3)))
    assert cache["a"].tolist() == [1, 2, 3]


def test_a_registration_within_the_block_counts():
    cache = ActivationCache()
    with cache.deferred_mode():
        cache.register_aggregation("a", "sum")
        cache.cat(holding(a=x(1.0)))
        cache.cat(holding(a=x(2.0)))
        with pytest.raises(ValueError, match="'a' already holds a state of Sum"):
            cache.register_aggregation("a", "mean")
    assert cache["a"].tolist() == [3]


# -- registrations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "key", "chosen"),
    [
        (["resid_out_1"], "resid_out_1", "resid_out_1"),
        (["resid_out_1"], "resid_out_10", None),
        (["values_L1", "values_L10"], "values_L10H3", "values_L10"),
        (["values_L1", "values_L10"], "values_L1H3", "values_L1"),
        (["values_L1"], "values_L10H3", None),
        (["resid_", "resid_out_", "r"], "resid_out_3", "resid_out_"),
        (["resid_", "resid_out_"], "resid_in_3", "resid_"),
        (["resid_out_", "resid_out_3"], "resid_out_3", "resid_out_3"),
        (["resid_out_", "resid_out_3"], "resid_out_33", "resid_out_"),
        (["", "x"], "resid_out_3", ""),
        (["resid_out_3x"], "resid_out_3", None),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_an_exact_match_wins_then_the_longest_prefix_and_numbers_end_where_they_end(patterns, key, chosen, backwards):
    cache = ActivationCache()
    for pattern in patterns[::-1] if backwards else patterns:
        cache.register_aggregation(pattern, lambda values, pattern=pattern: pattern)
    cache.cat(holding(**{key: x(1)}))
    cache.cat(holding(**{key: x(2)}))
    found = cache[key]
    assert (found.tolist() == [1, 2]) if chosen is None else (found == chosen)


def test_another_strategy_over_a_state_raises_and_the_registration_stays():
    cache = merged(a_=Mean())
    with pytest.raises(ValueError, match=r"cannot register Sum\(.*\) for 'a_': 'a_' already holds a state of Mean"):
        cache.register_aggregation("a_", "sum")
    cache.register_aggregation("a_", "mean")
    cache.register_aggregation("b_", "sum")
    cache.register_aggregation("a", "sum")  # `a_` is nearer
    add_to(cache)
    assert cache["a_"].tolist() == [3, 4]
    del cache["a_"]
    cache.register_aggregation("a_", "sum")


def test_what_is_no_strategy_is_refused():
    for wrong, error in (("men", ValueError), (3, TypeError)):
        with pytest.raises(error):
            ActivationCache().register_aggregation("a", wrong)


def test_a_value_that_does_not_suit_its_strategy_names_the_key():
    for strategy, value, words in (
        ("mean", "text", "cannot merge 'a': Mean reduces tensors and numbers, got str"),
        ("cat", [1], "cannot merge 'a': Cat expects tensors, got list"),
        (Cat(dim=3), x(1), r"cannot merge 'a': Cat\(dim=3\) expects tensors with that dim"),
        ("extend", x(1), "cannot merge 'a': Extend expects lists"),
        ("first", object(), "'a': cannot send a builtins.object"),
        (Mean(dim=0), x(1.0)[0], "cannot merge 'a': Mean"),
    ):
        cache = registered(a=strategy)
        cache["a"] = value
        with pytest.raises((TypeError, ValueError), match=words):
            cache.cat(holding(a=value))


def test_a_state_meets_its_like_or_raw_values_that_nothing_else_is_registered_for():
    mean = merged(a=Mean())
    cache = holding(a=x(5.0, 6.0))
    cache.cat(mean)
    assert cache["a"].tolist() == [3, 4]
    for there in (registered(a="sum"), registered(a="cat")):
        there["a"] = x(5.0, 6.0)
        with pytest.raises(SchemaMismatch, match=r"it holds values to be merged by .*, got a state of Mean"):
            there.cat(mean)
    for there in (merged(a=Sum()), merged(a=Cat()), merged(a=Mean(dim=0))):
        with pytest.raises(SchemaMismatch, match="'a'"):
            there.cat(mean)
        with pytest.raises(SchemaMismatch, match="'a'"):
            mean.cat(there)
    assert mean["a"].tolist() == [2, 3]


# -- all or nothing ------------------------------------------------------------------------------------------------


def fingerprint(cache):
    """Everything a cache knows, byte for byte."""
    arena = {key: {n: t.tolist() for n, t in cache._arena.state(key).items()} for key in cache._arena.entries}
    bare = copy.copy(cache)
    bare._registry = {}
    return (
        pickle.dumps(bare),
        list(cache._entries),
        {key: type(entry).__name__ for key, entry in cache._entries.items()},
        str(arena),
        cache._content_digest,
        cache._arena.layout_digest,
        cache._ledger.to_plain(),
        dict(cache._notes),
        cache._num_samples,
    )


GOOD = {
    "mean": x(1.0),
    "sum": x(2.0),
    "cat": x(3.0),
    "stack": x(4.0),
    "extend": [5],
    "first": 6,
    "max": x(7.0),
    "f": x(8),
}
BAD = {
    "mean": x(1.0, 2.0),
    "sum": x(2.0, dtype=torch.float64),
    "cat": x([3.0]),
    "stack": x(4),
    "extend": 5,
    "first": object(),
    "max": x(1j),
    "f": None,
}


@pytest.mark.parametrize("there", ["values", "states", "indexed"])
@pytest.mark.parametrize("bad", BAD)
def test_when_one_key_of_many_fails_nothing_has_changed(bad, there):
    cache = registered(**{name: torch.cat if name == "f" else name for name in GOOD})
    if there == "values":
        cache.update(GOOD)
    for sample in () if there == "values" else (0, 1):
        cache._absorb(holding(**GOOD), index=[sample] if there == "indexed" else None)
    cache._notes["mean"] = "a note"
    before = fingerprint(cache)
    index = [2] if there == "indexed" else None
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        cache._absorb(holding(**{**GOOD, bad: BAD[bad], "zz_new": x(1.0)}), index=index)
    assert fingerprint(cache) == before
    cache._absorb(holding(**GOOD, zz_new=x(1.0)), index=index)
    assert fingerprint(cache) != before and cache.count("max") == (2 if there == "values" else 3)


def test_when_memory_runs_out_new_keys_leave_no_trace(monkeypatch):
    cache = merged(a=Mean())
    cache.register_aggregation("b", "sum")
    cache.register_aggregation("c", "max")
    before = fingerprint(cache)
    place, calls = cache._arena._place, []

    def full(schemas, *rest):
        calls.append(schemas[0].key)
        if schemas[0].key == "c":
            raise MemoryError("no room")
        place(schemas, *rest)

    monkeypatch.setattr(cache._arena, "_place", full)
    with pytest.raises(MemoryError):
        cache._absorb(holding(a=x(9.0, 9.0), b=x(1.0), c=x(1.0)))
    assert calls == ["b", "c"] and fingerprint(cache) == before


# -- aliasing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "moments", "cat", "stack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("inference", [False, True])
def test_what_was_put_in_or_read_and_what_is_held_do_not_change_each_other(name, dtype, inference):
    cache = registered(a=name)
    given = [torch.full((3,), i, dtype=dtype) for i in (1, 2, 3)]
    with torch.inference_mode(inference):
        cache.cat(holding(a=given[0]))
        cache.cat(holding(a=given[1]))
        read = copy.deepcopy(cache)["a"]
        shown = cache["a"]
        shown = shown["mean"] if name == "moments" else shown
        expected = shown.clone()
        cache.cat(holding(a=given[2]))
        assert torch.equal(shown, expected)  # a later fold changes nothing that was handed out
        for value in given:
            value.fill_(100)
        if name not in ("cat", "stack"):
            shown.fill_(200)
    assert all((value == 100).all() for value in given)
    fresh = registered(a=name)
    for i in (1, 2, 3):
        fresh.cat(holding(a=torch.full((3,), i, dtype=dtype)))
    torch.testing.assert_close(cache["a"], fresh["a"])
    assert read is not None


def test_no_graph_is_kept_alive_by_what_was_merged():
    for name in ("mean", "cat", "stack", "max"):
        cache = registered(a=name)
        for _ in range(2):
            cache.cat(holding(a=torch.ones(2, requires_grad=True) * 2))
        found = cache["a"]
        assert not found.requires_grad and found.grad_fn is None


def test_states_made_in_inference_mode_can_be_merged_outside_and_back():
    cache = registered(a="mean", b="cat", c="moments")
    for inference in (True, False, True, False):
        with torch.inference_mode(inference):
            cache.cat(holding(a=x(1.0), b=x(1.0), c=x(1.0)))
    assert cache["a"].tolist() == [1] and len(cache["b"]) == 4 and int(cache["c"]["count"]) == 4
    assert not cache["b"].is_inference()


@pytest.mark.parametrize(
    "value", [torch.arange(12.0).reshape(3, 4).T, torch.arange(6.0)[::2], torch.tensor(2.5), torch.zeros(0, 3)], ids=str
)
@pytest.mark.parametrize("name", ["mean", "sum", "max", "stack", "moments"])
def test_views_single_numbers_and_empty_tensors_merge(value, name):
    cache = registered(a=name)
    cache.cat(holding(a=value))
    cache.cat(holding(a=value))
    pair = torch.stack([value, value])
    found = cache["a"]["mean"] if name == "moments" else cache["a"]
    expected = {"sum": pair.sum(0), "stack": pair}.get(name, value)
    torch.testing.assert_close(found, expected)


# -- devices -------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


def everything():
    cache = registered(mean="mean", cat="cat", first="first", extend="extend")
    for _ in range(2):
        cache.cat(holding(mean=x(1.0), cat=x(2.0), first={"in": [x(3.0)]}, extend=[(x(4.0), "text")]))
    cache.update(
        {
            "raw": x(5.0),
            "nested": {"a": [x(6.0), (x(7.0), Pair(x(8.0), "text"))]},
            "plain": [1, {"b": None}],
            "weighted": Weighted(x(1.0), x(2.0)),
        }
    )
    return cache


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Weighted):
        yield from (value.value, value.weight)
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def test_every_tensor_moves_in_nested_values_and_states_too():
    """The meta device stands in for a GPU: where a tensor is, is all that is asked."""
    cache = everything()
    there = cache.to("meta")
    assert there is cache and len(list(tensors(dict(cache.items())))) == 11
    assert all(t.is_meta for t in tensors(dict(cache.items())))
    assert all(t.is_meta for key in cache._arena.entries for t in cache._arena.state(key).values())
    assert type(cache["nested"]["a"][1][1]) is Pair and cache["plain"] == [1, {"b": None}]
    assert {schema.device for schema in cache._schemas().values() if schema.kind != "list"} == {"meta"}
    fresh = everything()
    assert fresh._content_digest != cache._content_digest


def test_a_cache_that_is_there_already_stays_as_it_is():
    cache = everything()
    del cache["nested"]  # a named tuple, which has no bytes
    before, value = fingerprint(cache), cache["raw"]
    assert cache.cpu() is cache and fingerprint(cache) == before and cache["raw"] is value
    add = holding(**{key: cache[key] for key in ("mean", "cat")})
    cache._absorb(add)
    assert cache["mean"].tolist() == [1]


def test_cuda_moves_there_or_says_that_it_cannot_and_moves_nothing():
    cache = everything()
    if torch.cuda.is_available():
        cache.cuda(0)
        where = {torch.device("cuda", 0)}
    else:
        with pytest.raises((RuntimeError, AssertionError)):
            cache.cuda()
        where = {torch.device("cpu")}
    assert {t.device for t in tensors(dict(cache.items()))} == where


def test_rows_on_another_device_are_refused():
    cache = merged(a=Cat())
    with pytest.raises(SchemaMismatch, match=r"cannot concatenate 'a': .* on cpu, got .* on meta"):
        cache.cat(holding(a=torch.ones(2, device="meta")))


# -- notes ---------------------------------------------------------------------------------------------------------


def noted():
    cache = registered(a="mean")
    cache.add_with_info("a", x(1.0, 2.0), "rows are layers")
    cache["b"] = x(1.0)
    return cache


def test_a_value_with_a_note_behaves_like_the_value():
    value = noted()["a"]
    assert value.info() == "rows are layers" and value.value().tolist() == [1, 2]
    assert value.shape == (2,) and value[1] == 2 and len(value) == 2 and torch.stack([value, value]).shape == (2, 2)
    assert repr(value) == "Noted(tensor([1., 2.]), info='rows are layers')"
    for twin in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert type(twin) is Noted and twin.info() == "rows are layers" and twin.value().tolist() == [1, 2]


def by_cat():
    cache = noted()
    cache.cat(holding(a=x(3.0, 4.0), b=x(1.0)))
    return cache


def by_cat_of_it():
    cache = holding(a=x(3.0, 4.0), b=x(1.0))
    cache.cat(noted())
    return cache


def by_update():
    cache = holding(a=x(0.0))
    cache.update(noted())
    return cache


def by_deferred():
    cache = ActivationCache()
    with cache.deferred_mode():
        cache.cat(noted())
        cache.cat(holding(a=x(1.0, 2.0), b=x(1.0)))
    return cache


def by_hand():
    cache = ActivationCache()
    cache["a"] = noted()["a"]
    return cache


WAYS = [
    noted,
    by_cat,
    by_cat_of_it,
    by_update,
    by_deferred,
    by_hand,
    lambda: noted() + {"c": 1},
    lambda: holding(c=1) + noted(),
    lambda: copy.copy(noted()),
    lambda: copy.deepcopy(by_cat()),
    lambda: pickle.loads(pickle.dumps(by_cat())),
    lambda: noted().to("cpu"),
]


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_note_stays_with_its_value(way):
    cache = WAYS[way]()
    assert cache["a"].info() == "rows are layers" and type(cache["a"].value()) is torch.Tensor


def test_a_note_goes_with_its_value():
    cache = noted()
    cache["a"] = x(1.0)
    assert type(cache["a"]) is torch.Tensor
    cache = noted()
    del cache["a"]
    cache["a"] = x(1.0)
    assert type(cache["a"]) is torch.Tensor


# -- by site and layer ---------------------------------------------------------------------------------------------


def layered():
    cache = ActivationCache()
    for layer in (10, 2, 0):
        cache[f"resid_out_{layer}"] = torch.full((2,), float(layer))
        for head in (1, 0, 10, 2):
            cache[f"avg_attn_pattern_L{layer}H{head}"] = torch.full((3, 3), float(100 * layer + head))
        cache[f"values_L{layer}"] = torch.full((1,), float(layer))
    cache["resid_out_mean"] = x(1.0)
    return cache


def test_a_layer_of_a_site_is_its_value_or_all_its_heads_in_order():
    cache = layered()
    assert cache["resid_out", 2] is cache["resid_out_2"] and cache["values", 10].tolist() == [10]
    heads = cache["avg_attn_pattern", 2]
    assert heads.shape == (4, 3, 3) and heads[:, 0, 0].tolist() == [200, 201, 202, 210]


def test_all_layers_of_a_site_are_stacked_in_layer_order():
    cache = layered()
    assert cache["resid_out", :].tolist() == [[0, 0], [2, 2], [10, 10]]
    assert cache["resid_out", 1:].tolist() == [[2, 2], [10, 10]] and cache["resid_out", :3].tolist() == [[0, 0], [2, 2]]
    assert cache["resid_out", ::-1][:, 0].tolist() == [10, 2, 0]
    assert cache["avg_attn_pattern", :].shape == (3, 4, 3, 3)


def test_layers_of_states_are_stacked_by_field():
    cache = registered(resid_="moments", attn_="mean")
    for value in (x(1.0), x(3.0)):
        cache.cat(holding(resid_0=value, resid_1=value + 1, attn_0=value, attn_1=value + 1))
    assert cache["attn", :].tolist() == [[2], [3]] and cache["resid", :]["mean"].tolist() == [[2], [3]]
    assert cache["resid", 1]["variance"].tolist() == [2]


def test_a_site_or_layer_that_is_not_there_is_named():
    cache = layered()
    for place, words in (
        (("resid_out", 3), r"no layer 3 of site 'resid_out': the cache has its layers \[0, 2, 10\]"),
        (("mlp_out", slice(None)), r"no layer .* of site 'mlp_out': the cache has its layers \[\]"),
        (("resid_out", 1, 2), r"give a key, \(site, layer\) or \(site, :\)"),
        (("resid_out", "3"), r"give a key, \(site, layer\)"),
    ):
        with pytest.raises(KeyError, match=words):
            cache[place]
    cache["resid_out_3"] = torch.ones(5)
    with pytest.raises(ValueError, match="cannot stack the values of site 'resid_out': expected tensors of one shape"):
        cache["resid_out", :]


# -- counts, rows, adding ------------------------------------------------------------------------------------------


def test_counts_are_the_samples_behind_a_value_and_broadcast_to_it():
    cache = registered(
        mean="mean", ragged=Mean(ragged=True), sized=Mean(ragged=True, size=5), moments="moments", cat="cat"
    )
    for n in (1, 3):
        cache.cat(
            holding(
                **dict.fromkeys(("mean", "moments"), x(1.0)),
                ragged=torch.ones(n),
                sized=torch.ones(n),
                cat=torch.ones(n),
            )
        )
    assert cache.count("mean") == cache.count("moments") == 2 and cache.count("cat") == 4
    assert cache.count("ragged").tolist() == [2, 1, 1] and cache.count("sized").tolist() == [2, 1, 1, 0, 0]
    assert cache.count("mean").dtype == torch.int64
    for key in ("mean", "ragged", "sized"):
        torch.broadcast_to(cache.count(key), cache[key].shape)
    cache.count("ragged").fill_(9)
    assert cache.count("ragged").tolist() == [2, 1, 1]
    with pytest.raises(ValueError, match="'raw' is not a reduced value"):
        (cache + {"raw": x(1)}).count("raw")


def test_values_of_different_sizes_are_aligned_at_0_and_a_size_fixes_the_extent():
    cache = registered(ragged=Mean(ragged=True), sized=Mean(ragged=True, size=5))
    for value in (x(1.0), x(3.0, 4.0), x(8.0, 2.0, 7.0)):
        cache.cat(holding(ragged=value, sized=value))
    assert cache["ragged"].tolist() == [4, 3, 7]
    torch.testing.assert_close(cache["sized"], x(4.0, 3.0, 7.0, math.nan, math.nan), equal_nan=True)
    with pytest.raises(SchemaMismatch, match=r"a value of shape \(6,\) exceeds size=5"):
        cache.cat(holding(ragged=torch.ones(6), sized=torch.ones(6)))


def test_rows_are_aligned_to_the_values_in_the_samples_order():
    cache = ActivationCache()
    take(cache, Shown("a", rows(5, 2, label=x(50, 20))), samples=x(5, 2))
    take(cache, Shown("a", rows(3, 5, label=x(30, 50))), samples=x(3, 5))
    assert cache["a"].flatten().tolist() == [2, 3, 5]
    assert {name: column.tolist() for name, column in cache.rows("a").items()} == {
        "sample": [2, 3, 5],
        "position": [0, 0, 0],
        "label": [20, 30, 50],
    }
    assert cache.count("a") == 3
    with pytest.raises(ValueError, match="'b' is not a concatenation: it has no rows"):
        holding(b=3).rows("b")


def test_one_recorded_pass_comes_in_the_samples_order_too():
    cache = ActivationCache()
    take(cache, Shown("a", rows(5, 2)), samples=x(5, 2))
    assert cache["a"].flatten().tolist() == [2, 5] == cache.rows("a")["sample"].tolist()


def test_rows_without_an_index_are_numbered_as_they_came():
    cache = ActivationCache()
    for _ in range(2):
        local = ActivationCache()
        for first in (0, 2):
            take(local, Shown("a", rows(first, first + 1, indexed=False)), num_samples=2)
        cache._absorb(local)
    assert cache.rows("a")["sample"].tolist() == list(range(8)) and cache._num_samples == 8
    assert cache["a"].flatten().tolist() == [0, 1, 2, 3] * 2


def test_an_index_given_at_the_cat_goes_by_sample_to_every_row():
    local = ActivationCache()
    take(local, Shown("a", rows(0, 0, 1, positions=[0, 1, 0], indexed=False)), num_samples=2)
    cache = ActivationCache()
    cache._absorb(local, index=[7, 4])
    assert cache.rows("a")["sample"].tolist() == [4, 7, 7] and cache["a"].flatten().tolist() == [1, 0, 0]
    assert cache._num_samples == 0
    with pytest.raises(ValueError, match="index has 3 entries, the cache holds 2 samples"):
        cache._absorb(local, index=[1, 2, 3])
    with pytest.raises(ValueError, match="its rows carry an index already"):
        ActivationCache()._absorb(cache, index=[1, 2])


def test_columns_that_keys_share_stay_shared():
    local, shared = ActivationCache(), rows(0, 1, indexed=False).columns
    take(local, *(Shown(key, Value(torch.ones(2, 1), rows=True, columns=shared)) for key in "ab"), num_samples=2)
    for index in (None, [4, 3]):
        cache = ActivationCache()
        cache._num_samples = 3
        cache._absorb(local, index=index)
        a, b = (cache._entries[key].state.pieces[0].columns for key in "ab")
        assert a is b and a is not shared


def test_add_folds_one_value_by_its_strategy():
    cache = registered(mean="mean", list="extend")
    for i in range(3):
        cache.add("mean", x(float(i)), weight=float(i))
        cache.add("list", [i])
        cache.add("cat", x([i]))
    assert cache["mean"].item() == pytest.approx(5 / 3) and cache["list"] == [0, 1, 2]
    assert cache["cat"].tolist() == [[0], [1], [2]]
    per_sample = registered(mean=Mean(dim=0))
    per_sample.add("mean", x(1.0, 5.0), weight=[1, 3])
    assert per_sample["mean"] == 4


def test_add_keeps_columns_beside_rows():
    cache = ActivationCache()
    cache.add("a", x(10, 11), index=[4, 2], label=x(1, 0))
    cache.add("a", x(12), index=3, label=[7])
    assert cache["a"].tolist() == [11, 12, 10] and cache.rows("a")["label"].tolist() == [0, 7, 1]
    for _ in range(2):
        cache.add("b", x(1, 2), label=x(8, 9))
    assert cache.rows("b")["sample"].tolist() == [0, 1, 2, 3] and cache.rows("b")["label"].tolist() == [8, 9] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"label": x(1), "more": x(1, 2)}, r"columns of 'a' differ in length: \{'label': 1, 'more': 2\}"),
        ({"index": [1], "label": x(1, 2)}, "index has 1 entries, the cache holds 2 samples"),
        ({"index": [1, 2, 3]}, "cannot order 'a': index has 3 entries for 2 rows"),
        ({"sample": x(1, 2)}, "given as index="),
        ({"weight": 2.0}, "cannot merge 'a': Cat keeps values as they are"),
        ({"index": [0.5]}, "expected one integer index per sample"),
    ],
)
def test_an_add_that_does_not_fit_is_refused_and_changes_nothing(arguments, words):
    cache = ActivationCache()
    with pytest.raises((TypeError, ValueError), match=words):
        cache.add("a", x(1, 2), **arguments)
    assert not cache


def test_in_a_deferred_block_add_only_notes():
    cache = registered(a=Spy())
    with cache.deferred_mode():
        for i in range(3):
            cache.add("a", x(i))
        assert not cache
    assert cache["a"].tolist() == [0, 1, 2] and cache._registry["a"].function.calls == [[[0], [1], [2]]]


# -- nothing is counted twice --------------------------------------------------------------------------------------


def test_a_sample_that_comes_twice_counts_once_in_rows_and_is_refused_in_a_reduction():
    cache = registered(mean="mean")
    cache._absorb(holding(cat=x(1.0)), index=[3])
    cache._absorb(holding(cat=x(1.0)), index=[3])
    assert cache["cat"].tolist() == [1]
    cache._absorb(holding(mean=x(1.0)), index=[3])
    before = fingerprint(cache)
    with pytest.raises(
        DuplicateSamples, match=r"1 sample\(s\) would count twice .* such as 'mean'.* has seen 3 already"
    ):
        cache._absorb(holding(mean=x(1.0)), index=[3])
    with pytest.raises(DuplicateSamples, match="index has 2 entries, of which 1 differ"):
        cache._absorb(holding(mean=x(1.0)), index=[4, 4])
    with pytest.raises(DuplicateSamples):
        cache.add("mean", x(1.0), index=3, label=x(1))
    assert fingerprint(cache) == before


def test_ledgers_meet_when_caches_do_and_a_key_that_is_gone_has_seen_nothing():
    a, b, cache = registered(m="mean"), registered(m="mean"), registered(m="mean")
    a._absorb(holding(m=x(1.0)), index=[1])
    b._absorb(holding(m=x(1.0)), index=[1])
    cache.cat(a)
    for again in (a, b, cache):
        with pytest.raises(DuplicateSamples):
            cache.cat(again)
    cache["m"] = x(2.0)
    cache.cat(b)
    assert cache["m"].tolist() == [1.5]
    del cache["m"]
    cache._absorb(holding(m=x(1.0)), index=[1])
    cache.update(b)
    cache._absorb(holding(m=x(1.0)), index=[2])
    with pytest.raises(DuplicateSamples):
        cache._absorb(holding(m=x(1.0)), index=[1])


def test_a_cache_without_an_index_can_be_merged_with_itself():
    cache = registered(mean="mean", cat="cat", max="max", f=torch.cat, moments="moments")
    for value in (x(1.0), x(3.0)):
        cache.cat(holding(**dict.fromkeys(("mean", "cat", "max", "f", "moments"), value)))
    cache.cat(cache)
    assert cache["mean"].tolist() == [2] and cache.count("mean") == 4 and cache["max"].tolist() == [3]
    assert cache["cat"].tolist() == cache["f"].tolist() == [1, 3, 1, 3]
    assert cache["moments"]["variance"].item() == pytest.approx(4 / 3)


def test_rows_with_and_without_an_index_do_not_mix():
    cache = ActivationCache()
    cache._absorb(holding(a=x(1.0), b=[1]), index=[0])
    for other in (holding(a=x(1.0)), holding(b=[1])):
        with pytest.raises(SchemaMismatch, match="either every cat has index= or none has"):
            cache._absorb(other)


# -- a forward pass ------------------------------------------------------------------------------------------------


def test_a_pass_is_taken_whole_or_not_at_all():
    cache = registered(kept_="cat")
    state = {"total": torch.ones(2, 3, dtype=torch.float64), "count": torch.ones(2, dtype=torch.int64)}
    slab = Slab(("m0", "m1"), Mean(), state, torch.float32)
    take(cache, Shown("kept_0", rows(0, 1)), Shown("raw", rows(0, 1)), slabs=[slab], samples=x(0, 1))
    assert list(cache) == ["m0", "m1", "kept_0", "raw"] and cache.count("m1") == 1
    before = fingerprint(cache)
    wrong = Slab(("m0", "m1"), Mean(), {**state, "total": torch.ones(2, 4, dtype=torch.float64)}, torch.float32)
    for slabs, shown, samples, error in (
        ([wrong], [Shown("raw", rows(2, 3))], x(2, 3), SchemaMismatch),
        (
            [slab],
            [Shown("kept_0", rows(2, value=torch.ones(1, 9)), Cat()), Shown("kept_0", rows(2), Mean())],
            x(2),
            ValueError,
        ),
        ([slab], [Shown("raw", rows(1))], x(1), DuplicateSamples),
        ([slab], [Shown("raw", rows(2))], x(2, 2), DuplicateSamples),
    ):
        with pytest.raises(error):
            take(cache, *shown, slabs=slabs, samples=samples)
        assert fingerprint(cache) == before
    take(cache, Shown("kept_0", rows(2)), Shown("raw", rows(2)), slabs=[slab], samples=x(2))
    assert cache.count("m0") == 2 and cache["raw"].flatten().tolist() == [0, 1, 2]


def test_a_pass_into_a_cache_goes_by_the_caches_strategies_and_the_sites_own_win():
    cache = registered(a_="mean")
    for _ in range(2):
        take(cache, Shown("a_0", rows(0, 1)), Shown("b", rows(0, 1), Max()), raw=False, num_samples=2)
    assert cache["a_0"].tolist() == [0.5] and cache.count("a_0") == 4 and cache["b"].tolist() == [1]


def test_lists_recorded_in_several_passes_are_one_list():
    cache = ActivationCache()
    for sample in (1, 0):
        columns = rows(sample).columns
        take(cache, Shown("p", Value([f"of {sample}"], columns=columns), Extend()), samples=x(sample))
    assert cache["p"] == ["of 0", "of 1"]


# -- copies and bytes ----------------------------------------------------------------------------------------------


def full():
    """A cache with every kind of entry, notes, an index and registrations."""
    cache = registered(mean="mean", ragged=Mean(ragged=True), moments=Moments(correction=0), max="max", cat="cat")
    cache.register_aggregation("stack", Stack(dim=1))
    cache.register_aggregation("f", stack)
    for i in range(3):
        local = holding(
            mean=x(float(i)),
            ragged=torch.ones(i + 1),
            moments=x(float(i), 1.0),
            max=x(i),
            cat=x([i]),
            stack=x(i, i),
            extend=[f"{i}"],
        )
        cache._absorb(local, index=[5 - i])
    cache.add_with_info("raw", Weighted(x(1.0), 2.0), "a note")
    cache.update({"plain": [1, (2.5, None), {"a": b"bytes"}], "tensor": x(1.0, dtype=torch.bfloat16), "f": x(1)})
    return cache


def through_torch(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": through_torch,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_says_the_same_and_goes_its_own_way(way):
    cache = full()
    twin = COPIES[way](cache)
    assert (
        type(twin) is ActivationCache and fingerprint(twin) == fingerprint(cache) and twin._registry == cache._registry
    )
    before = fingerprint(cache)
    more = holding(
        mean=x(9.0), ragged=torch.ones(200), moments=x(9.0, 9.0), max=x(9), cat=x([9]), stack=x(9, 9), extend=["9"]
    )
    twin._absorb(more, index=[0])
    twin._absorb(holding(f=x(2)))
    assert twin["cat"].flatten().tolist() == [9, 2, 1, 0] and twin["extend"] == ["9", "2", "1", "0"]
    assert twin["mean"].item() == 3 and twin["max"].item() == 9 and twin["stack"].tolist() == [[9, 2, 1, 0]] * 2
    assert len(twin["ragged"]) == 200 and int(twin["moments"]["count"]) == 4 and twin["f"].tolist() == [[1], [2]]
    twin["tensor"] = 0
    del twin["plain"]
    twin.register_aggregation("new", "sum")
    assert fingerprint(cache) == before and "new" not in cache._registry


def test_a_deep_copy_shares_no_memory():
    cache = full()
    twin = copy.deepcopy(cache)
    for key in ("tensor", "cat"):
        twin[key].zero_()
    assert cache["tensor"].item() == 1 and cache["cat"].sum() == 3
    twin["plain"].append(3)
    assert len(cache["plain"]) == 3


def test_a_function_that_cannot_be_imported_is_refused_with_the_fix():
    def inner(values):
        return values[0]

    for function in (lambda values: values[0], inner, Spy()):
        with pytest.raises(ValueError, match=r"cannot pickle the aggregation .*top level, or use a strategy by name"):
            pickle.dumps(registered(a=function))


def test_a_value_that_is_not_plain_is_refused_by_its_key():
    with pytest.raises(TypeError, match=r"'a'\['b'\]: cannot send a builtins.object"):
        pickle.dumps(holding(a={"b": object()}))


# -- explain -------------------------------------------------------------------------------------------------------


def test_explain_says_how_every_key_is_held():
    cache = full()
    found = cache.explain()
    assert list(found) == list(cache)
    assert found["mean"].strategy.startswith("Mean(") and found["mean"].collective == "all_reduce"
    assert found["mean"].fields == ("total sum", "count sum") and found["mean"].dtype == "float64"
    assert found["mean"].nbytes == 16 and found["ragged"].nbytes == 128 * 16
    assert (
        found["cat"].fields == ("rows",)
        and found["cat"].nbytes == 3 * 8
        and found["cat"].collective == "broadcast of rows"
    )
    assert found["extend"].collective == "broadcast of encoded values"
    assert found["tensor"].collective is None and (found["tensor"].dtype, found["tensor"].nbytes) == ("bfloat16", 2)
    assert found["plain"].dtype == "list" and found["plain"].strategy.startswith("Extend")


# -- what it costs -------------------------------------------------------------------------------------------------


def reduced(num_keys):
    """A recorded cache: one slab of two heads a layer, and moments."""
    cache = ActivationCache()
    for layer in range(num_keys):
        state = {"total": torch.ones(2, 3, dtype=torch.float64), "count": torch.ones(2, dtype=torch.int64)}
        one = {name: tensor.unsqueeze(0) for name, tensor in Moments().take(Value(x(1.0, 2.0))).items()}
        heads = Slab((f"a_L{layer}H0", f"a_L{layer}H1"), Mean(), state, torch.float32)
        take(cache, slabs=[heads, Slab((f"m_{layer}",), Moments(), one, torch.float32)])
    return cache


@pytest.mark.parametrize("deferred", [False, True])
def test_a_cat_of_the_same_layout_costs_the_same_for_3_layers_and_for_100(deferred):
    counts = []
    for num_keys in (3, 100):
        cache, other = reduced(num_keys), reduced(num_keys)
        with cache.deferred_mode() if deferred else contextless():
            cache.cat(other)  # in deferred mode, the first is one copy a chunk
            with Operations() as operations:
                cache.cat(other)
        counts.append(len(operations.names))
        assert cache.count("a_L2H1") == 3 and int(cache["m_2"]["count"]) == 3
    assert counts[0] == counts[1] < 40


def test_a_cat_of_many_keys_costs_in_proportion(monkeypatch):
    """Counted in calls of Python: twice the keys are twice the calls."""
    import sys

    def calls(num_keys):
        cache = registered(mean_="mean")
        cats = [
            holding(**{f"{kind}_{i}": x(1.0) for i in range(num_keys) for kind in ("mean", "cat")}) for _ in range(3)
        ]
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        for local in cats:
            sys.setprofile(profile)
            try:
                cache.cat(local)
            finally:
                sys.setprofile(None)
        return count

    few, many = calls(20), calls(80)
    assert many < 4.4 * few


def test_rows_of_many_cats_are_not_copied_at_every_cat():
    cache = merged(a=Cat())
    state = cache._entries["a"].state
    for i in range(5):
        cache.cat(holding(a=x(float(i))))
    assert cache._entries["a"].state is state and len(state.pieces) == 7
    assert cache["a"].tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 4]
