"""The merge's parts that need no other rank: what is agreed on, what travels, how an end is told."""

from __future__ import annotations

import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distcache as dc
from distcache import merge as merging
from distcache.comm import LocalComm
from distcache.ledger import IntervalSet, Ledger
from distcache.merge import (
    VERSION,
    Record,
    Settings,
    agreed,
    as_sortable,
    check_records,
    check_settings,
    decode_list,
    encode_list,
    joined_ledger,
    make_offer,
    new_delta,
)
from distcache.plan import Holdings, Offer, make_plan
from distcache.protocol import as_error, end_attempt, leave_attempt
from distcache.strategies import Columns, Value

RECORD = Record(0, 11, 22, 33, 2 * 4, 0, 0, 0)
SETTINGS = Settings(VERSION, -1, 1 << 20)


def ranks_with(**changes: tuple) -> list[Record]:
    """Three records that differ in what is given by rank."""
    return [RECORD._replace(**{name: values[rank] for name, values in changes.items()}) for rank in range(3)]


# -- agreement -------------------------------------------------------------------------------------------------


def test_a_record_is_64_bytes():
    assert 8 * len(RECORD) == 64


def test_ranks_agree_when_both_digests_do():
    assert agreed(ranks_with(), 0) == 11
    assert agreed(ranks_with(content_digest=(11, 12, 11)), 11) is None
    assert agreed(ranks_with(layout_digest=(22, 22, 23)), 11) is None


def test_an_idle_rank_agrees_with_what_all_brought_the_last_time_if_it_has_room_for_it():
    idle = {"content_digest": (11, 0, 11)}
    assert agreed(ranks_with(**idle), 11) == 11
    assert agreed(ranks_with(**idle), 12) is None
    assert agreed(ranks_with(**idle, layout_digest=(22, 23, 22)), 11) is None
    assert agreed(ranks_with(content_digest=(0, 0, 0)), 11) is None  # nothing to move is not that again
    assert agreed(ranks_with(content_digest=(0, 0, 0)), 0) == 0


@pytest.mark.parametrize("name", ["version", "dst", "bucket_bytes"])
def test_ranks_that_were_set_up_otherwise_are_told_in_what(name):
    with pytest.raises(dc.SchemaMismatch, match=rf"ranks differ in {name}, by rank: \[1, 1, 2\]"):
        check_settings([SETTINGS._replace(**{name: value}) for value in (1, 1, 2)])


def test_a_rank_in_doubt_about_one_merge_can_be_settled_and_no_other():
    assert check_records(ranks_with())
    assert check_records(ranks_with(epoch=(9, 9, 9)))  # all in doubt at one epoch: nobody has committed
    assert not check_records(ranks_with(epoch=(9, 10, 11)))  # 4 and in doubt; 5; 5 and in doubt about a sixth
    for epochs, numbers in (((8, 10, 10), "[4, 5, 5]"), ((9, 12, 12), "[4, 6, 6]")):
        with pytest.raises(dc.SchemaMismatch, match="number of merges that they have committed") as raised:
            check_records(ranks_with(epoch=epochs))
        assert numbers in str(raised.value)


def test_loaders_that_were_dealt_in_other_orders_do_not_merge():
    with pytest.raises(dc.SchemaMismatch, match="dealt twice or never"):
        check_records(ranks_with(dealt=(5, 5, 6)))


def test_contents_that_differ_at_one_epoch_do_not_merge():
    with pytest.raises(dc.SchemaMismatch, match="differ in what their content is"):
        check_records(ranks_with(facts_digest=(33, 33, 34)))


def test_of_many_ranks_only_those_that_differ_are_named_and_not_all_of_them():
    with pytest.raises(dc.SchemaMismatch, match=r"by rank: 1 on most, 2 on rank 500, 3 on rank 1000\. They"):
        check_settings([SETTINGS._replace(version={500: 2, 1000: 3}.get(rank, 1)) for rank in range(1024)])
    with pytest.raises(dc.SchemaMismatch, match=r"33 on most, 0 on rank 0, .* 7 on rank 7 and 999 more\.") as raised:
        check_records([RECORD._replace(facts_digest=rank if rank < 1008 else 33) for rank in range(1024)])
    assert len(str(raised.value)) < 300


# -- ledgers ---------------------------------------------------------------------------------------------------


def seen(**samples: list[int]) -> Ledger:
    ledger = Ledger()
    for key, numbers in samples.items():
        ledger.add(frozenset([key]), IntervalSet.of(numbers))
    return ledger


def offering(**samples: list[int]) -> Offer:
    return Offer(ledger=tuple(seen(**samples).to_plain()))


def test_ledgers_join_where_no_sample_comes_twice():
    joined = joined_ledger(seen(a=[0]), [offering(a=[1, 2], b=[0]), Offer(), offering(a=[5])])
    assert sorted(joined.to_plain()) == [[["a"], [0, 3, 5, 6]], [["b"], [0, 1]]]


@pytest.mark.parametrize(
    ("offers", "who"),
    [
        ([offering(a=[7])], "rank 0 brings them, the content has seen 7"),
        ([offering(a=[1, 2, 3]), Offer(), offering(a=[3, 4])], "rank 2 brings them, rank 0 has seen 3"),
    ],
)
def test_a_sample_that_comes_twice_is_named_with_both_who_brought_it(offers, who):
    with pytest.raises(dc.DuplicateSamples, match=who):
        joined_ledger(seen(a=[7]), offers)


# -- what travels ----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), min_size=1), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_floats_travel_as_integers_of_the_same_order_with_nan_beyond_all(values, dtype, largest):
    x = torch.tensor(values, dtype=dtype)
    wire = as_sortable(x.clone(), largest)
    winner = wire.max() if largest else wire.min()
    back = torch.stack([winner])
    merging._flip(back)
    found = float(back.view(dtype)[0])
    expected = float(x.max() if largest else x.min())  # torch's own let NaN win
    assert found == expected or (math.isnan(found) and math.isnan(expected))


@given(st.lists(st.floats(width=32), min_size=1))
def test_what_travelled_as_integers_comes_back_as_it_was(values):
    x = torch.tensor(values)
    back = as_sortable(x.clone(), largest=True)
    merging._flip(back)
    torch.testing.assert_close(back.view(torch.float32), x, rtol=0, atol=0, equal_nan=True)


def test_listed_values_travel_with_their_samples():
    samples = torch.tensor([4, 2])
    columns = Columns({"sample": samples, "position": torch.zeros(2, dtype=torch.int64)}, True)
    plain = Columns({"sample": samples, "position": samples}, False)
    sent = [Value([None, "é", (1, b"x")], columns=columns), Value({"t": torch.ones(2)}), Value(True, columns=plain)]
    found = decode_list(encode_list(sent))
    assert [type(value.data) for value in found] == [list, dict, bool]
    assert found[0].data == sent[0].data and torch.equal(found[1].data["t"], torch.ones(2))
    assert found[0].columns.indexed and found[0].columns.by_name["sample"].tolist() == [4, 2]
    assert found[1].columns is None and found[2].columns is None  # without an index there is nothing to order by


def folded(*indices: int) -> dc.ActivationCache:
    delta = new_delta(dc.ActivationCache())
    delta._registry = {"mean": dc.Mean()}
    for i in indices:
        local = dc.ActivationCache()
        local["rows"], local["more"] = torch.tensor([[float(i)]]), torch.tensor([i], dtype=torch.int8)
        local["mean"], local["list"] = torch.tensor([float(i)]), [f"{i}"]
        delta._absorb(local, index=[i])
    return delta


def test_a_payload_unpacks_to_what_was_packed():
    delta = folded(3, 1)
    offer = make_offer(delta)
    assert offer.num_rows.tolist() == [2, 2] and offer.table_of.tolist() == [0, 0]
    assert len(offer.tables) == 1  # one for both keys
    schemas = delta._schemas()
    held = np.array([[True] * len(schemas), [False] * len(schemas)])
    holdings = Holdings(tuple(sorted(schemas)), held, np.empty(0, dtype=np.int64))
    plan = make_plan(schemas, holdings, [offer, Offer()], {})
    (payload,) = plan.payloads
    buffer = torch.zeros(payload.nbytes, dtype=torch.uint8)
    merging.pack(delta, payload, buffer)
    arrived = merging._unpack(plan, [buffer], [0, 0])
    assert arrived.pieces["rows"][0].value_n.tolist() == [[3.0], [1.0]]
    assert arrived.pieces["more"][0].value_n.tolist() == [3, 1]
    assert arrived.pieces["more"][0].columns is arrived.pieces["rows"][0].columns
    assert arrived.pieces["rows"][0].columns.by_name["sample"].tolist() == [3, 1]
    assert [value.data for value in arrived.lists["list"][0]] == [["3"], ["1"]]
    assert {name: tensor.tolist() for name, tensor in arrived.states["mean"].items()} == {"total": [4.0], "count": 2}


def test_names_of_keys_do_not_travel_with_what_all_reductions_of_a_rank_have_seen():
    delta = folded(3, 1)
    (account,) = make_offer(delta).ledger
    assert account == [None, [1, 2, 3, 4]]
    (account,) = make_offer(delta).naming(frozenset({"mean"})).ledger
    assert account == [{"mean"}, [1, 2, 3, 4]]
    delta.add("mean 2", torch.ones(1))  # without an index: the account isn't of all reductions any more
    assert make_offer(delta).ledger == ([["mean"], [1, 2, 3, 4]],)


# -- how an end is told ----------------------------------------------------------------------------------------


def test_an_abort_names_its_rank_to_the_others_and_itself_to_that_rank():
    alone = LocalComm()
    alone.ranks = (4, 5)
    decision = end_attempt(alone, 0, 1, "raised ValueError: {no} é.")
    assert end_attempt(alone, 0, 0, "came later") == decision
    error = as_error(decision, alone)
    assert isinstance(error, dc.PeerFailed)
    assert str(error).startswith("rank 1 of the group (rank 5 of the job) raised ValueError: {no} é. Content and delta")
    assert "cache.save() tries again" in str(as_error(decision, alone, "save"))
    alone.rank = 1
    mine = as_error(decision, alone)
    assert isinstance(mine, dc.MergeAborted) and "because this rank raised ValueError" in str(mine)


def test_a_disagreement_is_told_in_the_same_words_everywhere():
    alone = LocalComm()
    decision = leave_attempt(alone, 0, 0, "cannot merge 'x': …", "SchemaMismatch")
    for alone.rank in (0, 1):
        error = as_error(decision, alone)
        assert type(error) is dc.SchemaMismatch and str(error) == "cannot merge 'x': …"
    assert json.loads(decision)["abort"]["kind"] == "SchemaMismatch"


# -- one process -----------------------------------------------------------------------------------------------


def test_content_shares_no_memory_with_what_was_folded():
    cache = dc.DistributedCache()
    cache.register_aggregation("mean", "mean")
    local = dc.ActivationCache()
    local["mean"], local["rows"] = torch.ones(2), torch.ones(2, 2)
    kept = local["rows"]
    cache.cat(local)
    kept.zero_()
    local["mean"].zero_()
    assert cache["mean"].tolist() == [1.0, 1.0] and cache["rows"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_keys_stand_in_the_order_of_their_first_merge_then_by_name():
    cache = dc.DistributedCache()
    cache.register_aggregation("sum", "sum")
    for keys in (("sum_z", "m"), ("sum_b", "a", "m"), ("sum_a",)):
        local = dc.ActivationCache()
        for key in keys:
            local[key] = torch.ones(1)
        cache.cat(local)
    assert list(cache) == ["m", "sum_z", "a", "sum_b", "sum_a"]
    assert list(cache._held.content) == list(cache)


def test_nothing_of_a_merge_that_fails_at_its_last_step_reaches_the_content():
    cache = dc.DistributedCache()
    cache.register_aggregation("mean", "mean")
    local = dc.ActivationCache()
    local["mean"], local["rows"] = torch.ones(2), torch.ones(1, 2)
    cache.cat(local)
    with mock.patch.object(merging, "vote", side_effect=OSError("planted")), pytest.raises(OSError, match="planted"):
        cache.cat(local)
    assert cache["rows"].shape == (1, 2) and int(cache.count("mean")) == 1
    assert int(cache.delta.count("mean")) == 1
    cache.merge()
    assert cache["rows"].shape == (2, 2) and int(cache.count("mean")) == 2
