"""The plan of a merge: a pure function of what all ranks know, tested without a process group."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcache import codec
from distcache.errors import SchemaMismatch
from distcache.plan import ALIGNMENT, Holdings, MergePlan, Offer, Table, buckets, make_plan, needed_bytes
from distcache.schema import FieldSchema, KeySchema


def reduced(key: str, device: str = "cpu") -> KeySchema:
    fields = (FieldSchema("total", (None,), "float64", "sum", 0), FieldSchema("count", (), "int64", "sum", 0))
    return KeySchema(key, "fields", '{"name": "mean"}', fields, result="float32", device=device)


def rows(key: str, width: int = 5, device: str = "cpu") -> KeySchema:
    return KeySchema(key, "rows", '{"name": "cat"}', row_shape=(width,), dtype="float32", device=device)


def listed(key: str) -> KeySchema:
    return KeySchema(key, "list", '{"name": "extend"}')


def by_key(*schemas: KeySchema) -> dict[str, KeySchema]:
    return {schema.key: schema for schema in sorted(schemas, key=lambda schema: schema.key)}


def offer(rows=(), tables=(), lists=()) -> Offer:
    """`rows`: (number, table) of each key in order; `lists`: (bytes, whether with an index)."""
    num_rows, table_of = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    nbytes, indexed = np.array(lists, dtype=np.int64).reshape(-1, 2).T
    return Offer(num_rows, table_of, tables, nbytes, indexed)


def holding(*keys_by_rank: str, rooms: tuple[int, ...] | None = None) -> Holdings:
    """Who holds which keys, each named by a letter."""
    keys = tuple(sorted(set("".join(keys_by_rank))))
    held = np.array([[key in theirs for key in keys] for theirs in keys_by_rank]).reshape(len(keys_by_rank), -1)
    return Holdings(keys, held, None if rooms is None else np.array(rooms))


TABLE = Table((("sample", "int64"), ("label", "int8")), 3, True)
OFFERS = [
    offer([(3, 0), (0, -1)], (TABLE,), [(11, True)]),  # r, s; l
    offer([(2, 0)], (dataclasses.replace(TABLE, num_rows=2),)),  # r
    Offer(),
]
HOLDINGS = holding("abrsl", "ar", "", rooms=(256, 128))
ALL = by_key(reduced("a"), reduced("b"), rows("r"), rows("s"), listed("l"))


def plan() -> MergePlan:
    return make_plan(ALL, HOLDINGS, OFFERS, {})


def told(found: MergePlan) -> list:
    """All that a plan says, as plain values."""
    sent = [(p.rank, p.device, p.nbytes, p.blocks) for p in found.payloads]
    return [found.schemas, found.relaid, found.capacities, found.sole, found.kept, found.indexed, sent, found.tables]


def test_every_rank_makes_the_same_plan_of_the_same_facts():
    """Offers travel as bytes: what arrives gives the plan that what was sent gives, on every rank."""
    arrived = [Offer.from_plain(codec.decode(codec.encode(offer.to_plain()))) for offer in OFFERS]
    assert told(make_plan(ALL, HOLDINGS, arrived, {})) == told(plan())
    fewer = [*OFFERS[:1], offer([(1, 0)], (dataclasses.replace(TABLE, num_rows=1),)), Offer()]
    assert told(make_plan(ALL, HOLDINGS, fewer, {})) != told(plan())


def test_a_state_with_one_holder_is_sent_and_one_with_several_is_reduced():
    found = plan()
    assert found.relaid == ("a",)
    sent = [(p.rank, block.key, block.name) for p in found.payloads for block in p.blocks if block.kind == "field"]
    assert sent == [(0, "b", "total"), (0, "b", "count")] and found.sole == {"b": 0}


def test_ragged_dims_get_the_room_that_was_agreed_on():
    assert plan().capacities == {"a": {"total": (256,), "count": ()}, "b": {"total": (128,), "count": ()}}


def test_where_layouts_agree_segments_go_as_they_are():
    found = make_plan(by_key(reduced("a")), holding("", ""), [Offer(), Offer()], {})
    assert found.relaid is None and found.payloads == ()
    assert found.explain() == "merge of 1 keys: reduce segments as they are; send nothing"


def test_a_group_of_one_sends_no_state():
    found = make_plan(by_key(reduced("a")), holding("a", rooms=(128,)), [Offer()], {})
    assert found.relaid == ("a",) and found.payloads == ()


def test_blocks_of_a_payload_are_aligned_exact_and_side_by_side():
    for payload in plan().payloads:
        end = 0
        for block in payload.blocks:
            itemsize = codec.dtype_named(block.dtype).itemsize
            assert block.offset % ALIGNMENT == 0
            assert end <= block.offset < end + ALIGNMENT
            assert block.nbytes == torch.Size(block.shape).numel() * itemsize
            end = block.offset + block.nbytes
        assert payload.nbytes == end
    first = plan().payloads[0]
    assert [(block.kind, block.key or block.name, block.nbytes) for block in first.blocks] == [
        ("rows", "r", 60),
        ("rows", "s", 0),
        ("column", "sample", 24),
        ("column", "label", 3),
        ("list", "l", 11),
        ("field", "b", 1024),
        ("field", "b", 8),
    ]


def test_each_type_of_device_has_a_payload_of_its_own():
    schemas = by_key(rows("c"), rows("g", device="cuda"))
    found = make_plan(schemas, holding("cg"), [offer([(1, -1), (2, -1)])], {})
    assert [(p.device, p.nbytes) for p in found.payloads] == [("cpu", 20), ("cuda", 40)]


@pytest.mark.parametrize(
    ("held", "offers", "content", "words"),
    [
        (("rsl", "r"), [OFFERS[0], offer([(1, -1)])], {}, "'r': rank 0 has values with an index, rank 1 without"),
        (("l", "rsl"), [offer(lists=[(1, False)]), OFFERS[0]], {}, "'l': rank 1 has values with an index, rank 0 with"),
        (("", "r"), [Offer(), OFFERS[1]], {"r": False}, "'r': rank 1 has values with an index, the content without"),
    ],
)
def test_values_with_an_index_and_without_do_not_mix_on_one_key(held, offers, content, words):
    with pytest.raises(SchemaMismatch, match=words):
        make_plan(ALL, holding(*held), offers, content)


def test_a_rank_without_rows_has_no_say_about_the_index():
    found = make_plan(ALL, holding("rsl", "r"), [OFFERS[0], offer([(0, -1)])], {"r": True, "elsewhere": False})
    assert found.indexed == {"r": True, "l": True, "elsewhere": False}


def test_the_bytes_a_merge_takes_are_known_to_all_before_it_takes_them():
    found = plan()
    sent = [sum(p.nbytes for p in found.payloads if p.rank == rank) for rank in range(3)]
    scratch = 256 * 8 + 8  # "a", laid out anew
    state = 128 * 8 + 8  # "b", which joins it where the content is held
    assert [needed_bytes(found, rank, "cpu", None, 0, 100) for rank in range(3)] == [
        sum(sent) + scratch + state + 100
    ] * 3
    onto_1 = [needed_bytes(found, rank, "cpu", 1, 0, 100) for rank in range(3)]
    assert onto_1 == [sent[0] + scratch, sum(sent) + scratch + state + 100, scratch]
    as_it_is = make_plan(by_key(reduced("a")), holding("", ""), [Offer(), Offer()], {})
    assert needed_bytes(as_it_is, 0, "cpu", None, 4096, 0) == 4096
    assert needed_bytes(found, 0, "cuda", None, 0, 0) == 0


@given(st.integers(0, 300), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 200))
def test_buckets_cover_every_element_once_in_parts_no_larger_than_asked(numel, itemsize, bucket_bytes):
    parts = buckets(numel, itemsize, bucket_bytes)
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(numel))
    assert all(0 < (stop - start) * itemsize <= max(bucket_bytes, itemsize) for start, stop in parts)
