"""Schemas as plain data: digests, differences in words, the union over ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcache.errors import SchemaMismatch
from distcache.schema import (
    DIGEST_MODULUS,
    FieldSchema,
    KeySchema,
    digest_of,
    natural_order,
    strategy_facts,
    strategy_words,
    union,
)
from distcache.strategies import Cat, Mean, Moments, Sum


def mean_schema(key="x", **changes):
    schema = KeySchema(
        key,
        "fields",
        strategy_facts(Mean()),
        (FieldSchema("total", (3, None), "float64", "sum", 0), FieldSchema("count", (), "int64", "sum", 0)),
        result="float32",
    )
    return replace(schema, **changes)


CHANGES = [
    {"key": "y"},
    {"strategy": strategy_facts(Sum())},
    {"strategy": strategy_facts(Mean(dim=0))},
    {"fields": ()},
    {"fields": (FieldSchema("total", (3, 4), "float64", "sum", 0), FieldSchema("count", (), "int64", "sum", 0))},
    {"result": "float64"},
    {"device": "cuda"},
    {"placement": "shard(0)"},
    {"row_shape": ()},
    {"dtype": "float32"},
    {"kind": "rows"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_fact_counts_in_the_comparison_and_the_digest(change):
    a, b = mean_schema(), mean_schema(**change)
    assert a != b and a.digest != b.digest
    assert mean_schema() == mean_schema() and mean_schema().digest == mean_schema().digest


@pytest.mark.parametrize("change", [{}, *CHANGES], ids=str)
def test_facts_survive_a_journey(change):
    schema = mean_schema(**change)
    again = KeySchema.from_facts(msgspec.msgpack.decode(msgspec.msgpack.encode(schema.facts())))
    assert again == schema and again.digest == schema.digest


def test_digests_are_the_same_in_another_process_and_fit_62_bits():
    code = "from distcache.schema import digest_of; print(digest_of('a', 1, (None, 2.5)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == digest_of("a", 1, (None, 2.5)) < DIGEST_MODULUS == 2**62
    assert digest_of("a", "b") != digest_of("ab") != digest_of("b", "a")


def test_a_difference_is_told_in_words():
    changed = mean_schema(strategy=strategy_facts(Sum(dim=0)), device="cuda", fields=mean_schema().fields[:1])
    assert mean_schema().explain_difference(changed) == [
        "strategy mean() against sum(dim=0)",
        "fields total float64[3, *], count int64[] against total float64[3, *]",
        "device cpu against cuda",
    ]
    assert mean_schema().explain_difference(mean_schema()) == []


def test_strategies_in_words_show_what_is_set_and_0_is_something():
    assert strategy_words(strategy_facts(Mean())) == "mean()"
    assert strategy_words(strategy_facts(Mean(dim=0, accumulate=torch.float32))) == "mean(accumulate=float32, dim=0)"
    assert strategy_words(strategy_facts(Moments(ragged=True, correction=0))) == "moments(correction=0, ragged=True)"
    assert strategy_facts(Mean(ragged=(0, 1))) == strategy_facts(Mean(ragged=(0, 1))) != strategy_facts(Mean())


def joined(by_rank, content):
    """The union of what ranks hold, given by rank and key."""
    variants = list(dict.fromkeys(schema for schemas in by_rank for schema in schemas.values()))
    held = [[schemas.get(schema.key) == schema for schema in variants] for schemas in by_rank]
    return union(variants, np.array(held, dtype=bool).reshape(len(by_rank), -1), content)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcde")), min_size=1, max_size=4), st.sets(st.sampled_from("abcde")))
def test_the_union_holds_every_key_of_a_rank_in_key_order(keys_by_rank, content):
    by_rank = [{key: mean_schema(key) for key in sorted(keys, reverse=True)} for keys in keys_by_rank]
    merged = joined(by_rank, {key: mean_schema(key) for key in content})
    assert list(merged) == sorted(set().union(*keys_by_rank))
    assert all(merged[key] == mean_schema(key) for key in merged)


def test_a_conflict_names_key_ranks_both_sides_and_the_fix():
    odd = KeySchema("x", "rows", strategy_facts(Cat()), row_shape=(3,), dtype="float32")
    with pytest.raises(SchemaMismatch) as raised:
        joined([{}, {"x": mean_schema()}, {"x": odd}], {})
    text = str(raised.value)
    assert "'x': rank 1 against rank 2: strategy mean() against cat(dim=0); kind fields against rows" in text
    assert "cannot merge 1 key(s)" in text and "register_aggregation" in text
    with pytest.raises(SchemaMismatch, match="'x': the content against rank 0: strategy mean"):
        joined([{"x": odd}], {"x": mean_schema()})


def test_many_conflicts_are_counted_and_the_text_is_the_same_in_any_order_of_keys():
    keys = [f"k{i:02}" for i in range(20)]
    a = {key: mean_schema(key) for key in keys}
    b = {key: mean_schema(key, result="float64") for key in keys}

    def told(first, second):
        with pytest.raises(SchemaMismatch) as raised:
            joined([first, second], {})
        return str(raised.value)

    assert told(a, b) == told(dict(reversed(a.items())), dict(reversed(b.items())))
    assert "cannot merge 20 key(s)" in told(a, b) and "and 12 more" in told(a, b)


def test_keys_that_count_alike_have_one_order_all_the_same():
    assert sorted(["a1", "a01", "a10", "a2"], key=natural_order) == ["a01", "a1", "a2", "a10"]
    assert sorted(["a01", "a10", "a1", "a2"], key=natural_order) == ["a01", "a1", "a2", "a10"]
