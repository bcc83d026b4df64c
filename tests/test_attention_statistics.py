"""Statistics and parts of attention patterns equal those counted by hand in eager attention, text by text.

The oracle is transformers: eager mode, `output_attentions=True`, one unpadded text at a time, and plain loops over
queries and keys in float64. Texts have different lengths, and tokens that come again.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distcache.attention import AttentionCall, blockwise, reference, tap_attention
from distcache.attention.statistics import (
    ByClass,
    Distance,
    Pooled,
    as_statistics,
    pattern_statistics,
    scratch_bytes,
    state_bytes,
)
from distcache.errors import SiteError
from distcache.strategies import Columns, Grouped, Mean
from distcache.strategies.positions import counts_at, positions

pytest.importorskip("transformers")

# float32 against float64, of probabilities and of entropies up to ln 8. Seen: 4e-7.
TOLERANCE = dict(atol=2e-6, rtol=0.0)

TEXTS = [[5, 9, 5, 9, 9, 7, 5, 8], [3, 4, 6], [8], [7, 7, 7, 2, 7]]
CLASSES = [[0, 1, 0, 1, 1, -1, 0, 2], [2, 2, 1], [0], [1, 1, 1, -1, 1]]
PAD = 7  # a token of the texts too, which must not be taken for an earlier one of them
EDGES = (-2, 0, 1, 2, 5)
STATS = (
    *("entropy", "first", "previous", "self", "duplicate", "induction"),
    *(Distance(EDGES), Pooled(3), ByClass("kind", 3)),
)
NAMES = [stat.name for stat in as_statistics(STATS)]

# Of causal attention, of a window in it, and of attention to both sides.
ATTENDING = {"llama": "LlamaAttention", "mistral": "MistralAttention", "bert": "BertSelfAttention"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attending(model, family):
    return [module for module in model.modules() if type(module).__name__ == ATTENDING[family]]


def batch(side, texts=TEXTS):
    """(a model's inputs, spans, columns of tokens) of texts padded on one side."""
    size = max(map(len, texts))
    ids, mask = torch.full((len(texts), size), PAD), torch.zeros(len(texts), size, dtype=torch.long)
    kinds, spans = torch.full((len(texts), size), 99), []  # what padding's class is doesn't matter
    for b, text in enumerate(texts):
        start = 0 if side == "right" else size - len(text)
        spans.append((start, start + len(text)))
        at = slice(*spans[b])
        ids[b, at], mask[b, at], kinds[b, at] = torch.tensor(text), 1, torch.tensor(CLASSES[TEXTS.index(text)])
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    return inputs, spans, dict(token_id=ids, kind=kinds)


def captured(family, side, take):
    """What `take(call, spans, columns)` makes of each layer's attention, of all texts in one padded batch."""
    model, found = tiny.build(family, head=False, attn_implementation="sdpa"), []
    inputs, spans, columns = batch(side)
    on_call = lambda call: found.append(take(call, spans, columns))  # noqa: E731
    with tap_attention(attending(model, family), on_call), torch.no_grad():
        model(**inputs)
    return found


def eager_patterns(family):
    """Per layer and text, the pattern [H, L, L] that eager attention gives to that text alone: the oracle."""
    model = tiny.build(family, head=False, attn_implementation="eager")
    with torch.no_grad():
        texts = [model(input_ids=torch.tensor([text]), output_attentions=True).attentions for text in TEXTS]
    return [[text[layer][0].double() for text in texts] for layer in range(len(texts[0]))]


def by_hand(name, p, ids, kinds, asked=None):
    """(total [H, …], count […]) of one text's pattern p [H, L, L]: loops over heads, queries and keys."""
    num_heads, length, _ = p.shape
    shape = {"distance": (4,), "pooled": (3, 3), "class": (3, 3)}.get(name, ())
    total = torch.zeros(num_heads, *shape, dtype=torch.float64)
    count = torch.zeros(shape, dtype=torch.float64)
    for q in range(length) if asked is None else asked:
        before = [k for k in range(q) if ids[k] == ids[q]]
        after = [k + 1 for k in before]
        if name == "entropy":
            for k in range(length):
                total -= torch.where(p[:, q, k] > 0, p[:, q, k] * p[:, q, k].log(), 0.0)
            count += 1
        elif name == "first":
            total, count = total + p[:, q, 0], count + 1
        elif name == "previous" and q > 0:
            total, count = total + p[:, q, q - 1], count + 1
        elif name == "self":
            total, count = total + p[:, q, q], count + 1
        elif name in ("duplicate", "induction") and before:
            for k in before if name == "duplicate" else after:
                total = total + p[:, q, k]
            count = count + 1
        elif name == "distance":
            for k in range(length):
                for c, (low, high) in enumerate(itertools.pairwise(EDGES)):
                    if low <= q - k < high:
                        total[:, c] += p[:, q, k]
                        count[c] += 1
        elif name == "pooled":
            # Cut each token into 3 pieces: then every third of a text has as many pieces as the text has tokens.
            for i in range(3 * q, 3 * q + 3):
                for j in range(3 * length):
                    total[:, i // length, j // length] += p[:, q, j // 3] / 9
                count[i // length] += 1 / 3
        elif name == "class" and kinds[q] >= 0:
            for k in range(length):
                if kinds[k] >= 0:
                    total[:, kinds[q], kinds[k]] += p[:, q, k]
            count[kinds[q]] += 1
    return total, count


def averages_by_hand(name, patterns, asked=lambda length: range(length)):
    """The mean over the texts' queries, [H, …]: all totals over all counts."""
    parts = [
        by_hand(name, p, text, kinds, asked(len(text))) for p, text, kinds in zip(patterns, TEXTS, CLASSES, strict=True)
    ]
    return sum(total for total, _ in parts) / sum(count for _, count in parts)


def average(value):
    """The mean over samples of what the code under test gives, by weight."""
    weight = value.weight.reshape(
        len(value.data), *value.weight.shape[1:], *[1] * (value.data.dim() - value.weight.dim())
    )
    return (value.data.double() * weight).sum(0) / weight.sum(0)


# -- what the statistics are -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ATTENDING)
def test_statistics_of_a_padded_batch_equal_those_counted_in_single_texts(family, side):
    layers = captured(
        family, side, lambda call, spans, columns: pattern_statistics(call, spans, STATS, columns=columns, block=3)
    )
    for found, patterns in zip(layers, eager_patterns(family), strict=True):
        assert list(found) == NAMES
        for name, value in found.items():
            assert value.data.dtype == torch.float32 and value.rows
            expected = averages_by_hand(name, patterns)
            torch.testing.assert_close(average(value), expected, **TOLERANCE, equal_nan=True)
            assert not expected.isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_has_its_own_mean_and_the_number_of_its_queries(name):
    [_, found] = captured(
        "llama", "left", lambda call, spans, columns: pattern_statistics(call, spans, STATS, columns=columns)
    )
    value, patterns = found[name], eager_patterns("llama")[1]
    for b, (p, text, kinds) in enumerate(zip(patterns, TEXTS, CLASSES, strict=True)):
        total, count = by_hand(name, p, text, kinds)
        torch.testing.assert_close(value.data[b].double(), total / count.clamp(min=1e-9), **TOLERANCE)
        torch.testing.assert_close(value.weight[b], count.expand(value.weight[b].shape))


@pytest.mark.parametrize(
    ("queries", "align", "asked"),
    [
        (slice(-1, None), "end", lambda length: [length - 1]),
        (slice(1, None, 2), "start", lambda length: range(1, length, 2)),
        (range(2, 6), "start", lambda length: [q for q in (2, 3, 4, 5) if q < length]),
        # Not every second of what a text has, whose first would be another one in each.
        (range(-6, 0, 2), "end", lambda length: [length + q for q in (-6, -4, -2) if q >= -length]),
    ],
    ids=["the last", "every second", "a range", "a range from the end"],
)
def test_only_the_queries_that_are_asked_for_count(queries, align, asked):
    layers = captured(
        "bert",
        "left",
        lambda call, spans, columns: pattern_statistics(
            call, spans, STATS, columns=columns, queries=queries, align=align, block=2
        ),
    )
    for found, patterns in zip(layers, eager_patterns("bert"), strict=True):
        for name, value in found.items():
            expected = averages_by_hand(name, patterns, asked)
            torch.testing.assert_close(average(value), expected, **TOLERANCE, equal_nan=True)


def test_rows_of_maps_sum_to_one_where_every_token_has_a_class():
    [_, found] = captured(
        "bert", "left", lambda call, spans, columns: pattern_statistics(call, spans, [Pooled(5)], columns=columns)
    )
    rows = found["pooled"].data.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), **TOLERANCE)


def test_a_sequence_that_repeats_has_the_prefix_matching_score_of_its_second_half():
    # Olsson et al. 2022: from a token of the second repeat to the one that followed it in the first.
    text = [5, 9, 3, 8] * 2
    model = tiny.build("llama", head=False, attn_implementation="eager")
    patterns = model(input_ids=torch.tensor([text]), output_attentions=True).attentions
    found = []
    with tap_attention(attending(model, "llama"), lambda call: found.append(
        pattern_statistics(call, [(0, 8)], ["induction"], columns={"token_id": torch.tensor([text])})
    )):  # fmt: skip
        model(input_ids=torch.tensor([text]))
    for layer, one in zip(patterns, found, strict=True):
        expected = layer[0].diagonal(-3, 1, 2)[:, 1:].mean(-1)  # queries 4 to 7, keys 1 to 4
        torch.testing.assert_close(one["induction"].data[0], expected.detach(), **TOLERANCE)
        assert one["induction"].weight.tolist() == [4]


@pytest.mark.parametrize(
    "mistake",
    [
        "the entropy of the average",
        "padding counts",
        "the key after for the key before",
        "a mean of the texts' means",
        "the first query counts",
        "padding is an earlier token",
    ],
)
def test_the_oracle_fails_on_a_planted_mistake(mistake):
    patterns = eager_patterns("bert")[1]
    name = {"padding is an earlier token": "duplicate", "the entropy of the average": "entropy"}.get(
        mistake, "previous"
    )

    def take(call, spans, columns):
        if mistake in ("padding counts", "padding is an earlier token"):
            spans = [(0, 8)] * len(spans)
        return pattern_statistics(call, spans, STATS, columns=columns | {"kind": torch.zeros(4, 8).long()})

    value = captured("bert", "left", take)[1][name]
    if mistake == "the entropy of the average":
        total = reference_average(patterns)
        wrong = -torch.xlogy(total, total).sum(-1).mean(-1)
    elif mistake == "the key after for the key before":
        total = [p.diagonal(1, 1, 2).sum(-1) for p in patterns]
        wrong = sum(total) / sum(len(text) - 1 for text in TEXTS)
    elif mistake == "a mean of the texts' means":
        wrong = value.data.double().sum(0) / (value.weight > 0).sum()
    elif mistake == "the first query counts":
        wrong = (value.data.double() * value.weight[:, None]).sum(0) / sum(map(len, TEXTS))
    else:
        wrong = average(value)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, averages_by_hand(name, patterns), **TOLERANCE)


def reference_average(patterns):
    """The averaged pattern [H, S, S], whose rows are over the texts that have them."""
    size = max(map(len, TEXTS))
    total = sum(nn.functional.pad(p, (0, size - p.shape[1]) * 2) for p in patterns)
    return total / torch.tensor([sum(len(text) > q for text in TEXTS) for q in range(size)])[:, None]


# -- they merge as any mean does ---------------------------------------------------------------------------


def values_of(call_spans_columns, stats=STATS):
    call, spans, columns = call_spans_columns
    return pattern_statistics(call, spans, stats, columns=columns)


def some_batch(family="llama", side="left"):
    return captured(family, side, lambda *args: args)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_mean_of_two_batches_is_that_of_all_queries(name):
    call, spans, columns = some_batch()
    states = []
    for part in (slice(0, 1), slice(1, 4)):
        cut = dataclasses.replace(
            call,
            query_bhqd=call.query_bhqd[part],
            key_bhkd=call.key_bhkd[part],
            mask=None if call.mask is None else call.mask[part],
        )
        value = values_of((cut, spans[part], {key: column[part] for key, column in columns.items()}))[name]
        states.append(Mean().take(value))
    merged = Mean().finalize(Mean().combine(*states))
    expected = averages_by_hand(name, eager_patterns("llama")[1])
    torch.testing.assert_close(merged, expected, **TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_grouped_by_label_gives_each_labels_mean(name):
    label = torch.tensor([1, 0, -1, 1])
    rows = Columns({"sample": torch.arange(4), "label": label})
    strategy = Grouped(Mean(), 3, by="label")
    found = strategy.finalize(strategy.take(dataclasses.replace(values_of(some_batch())[name], columns=rows)))
    patterns = eager_patterns("llama")[1]
    for group in range(3):
        parts = [by_hand(name, patterns[b], TEXTS[b], CLASSES[b]) for b in range(4) if label[b] == group]
        total = sum((total for total, _ in parts), torch.zeros(found[group].shape, dtype=torch.float64))
        expected = total / sum((count for _, count in parts), torch.zeros(()))
        torch.testing.assert_close(found[group], expected, **TOLERANCE, equal_nan=True)


# -- blocks equal the specification ------------------------------------------------------------------------

S = 11
RNG = torch.Generator().manual_seed(0)
CAUSAL = torch.ones(S, S).tril().bool()
KINDS = {
    "causal": dict(mask=None, is_causal=True),
    "full": dict(mask=None, is_causal=False),
    "causal window": dict(mask=None, is_causal=True, sliding_window=3),
    "full window": dict(mask=None, is_causal=False, sliding_window=3),
    "bool mask of heads": dict(mask=torch.rand(3, 4, S, S, generator=RNG) < 0.7, is_causal=True),
    "prefix mask": dict(mask=(CAUSAL | (torch.arange(S) < 4))[None, None], is_causal=True),
    "softcap": dict(mask=None, is_causal=True, softcap=0.7),
    "sinks": dict(mask=None, is_causal=True, sinks=torch.randn(4, generator=RNG)),
    "rows that see nothing": dict(mask=CAUSAL[None, None] & (torch.arange(S) > 4), is_causal=True),
}
SPANS = {
    "one span": [(0, S)] * 3,
    "left and right padding": [(4, S), (0, S), (0, 9)],
    "an empty one": [(5, 5), (0, 1), (3, 8)],
}
IDS = torch.randint(0, 4, (3, S), generator=RNG)
KIND = torch.randint(-1, 3, (3, S), generator=RNG)


def some_call(kind="causal", dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 4, S, 8, generator=generator).to(dtype)
    k = torch.randn(3, 2, S, 8, generator=generator).to(dtype)
    return AttentionCall(nn.Identity(), q, k, scaling=0.6, **KINDS[kind])


def specified(call, spans, asked=None):
    """Per sample, what the specification says: name -> (total, count)."""
    return [
        reference.statistics(
            reference.text_pattern(call, b, (start, stop)),
            queries=asked,
            token_id_l=IDS[b, start:stop],
            class_l=KIND[b, start:stop],
            num_classes=3,
            edges=EDGES,
            parts=3,
        )
        for b, (start, stop) in enumerate(spans)
    ]


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_the_specification(kind, spans):
    call, columns = some_call(kind, torch.float64), dict(token_id=IDS, kind=KIND)
    for block, heads, queries in ((1, None, None), (4, [3, 0], range(1, 9, 3)), (128, None, None)):
        found = pattern_statistics(call, spans, STATS, columns=columns, block=block, heads=heads, queries=queries)
        for b, expected in enumerate(specified(call, spans, queries)):
            for name, value in found.items():
                total, count = expected[name]
                total = total if heads is None else total[heads]
                assert value.data.dtype == torch.float64
                torch.testing.assert_close(value.data[b] * value.weight[b], total, atol=1e-12, rtol=0)
                torch.testing.assert_close(value.weight[b], count.expand(value.weight[b].shape), atol=1e-12, rtol=0)


def test_the_specification_equals_what_is_counted_by_hand():
    p = eager_patterns("bert")[1]
    for pattern, text, kinds in zip(p, TEXTS, CLASSES, strict=True):
        found = reference.statistics(
            pattern,
            token_id_l=torch.tensor(text),
            class_l=torch.tensor(kinds),
            num_classes=3,
            edges=EDGES,
            parts=3,
        )
        assert list(found) == NAMES
        for name, (total, count) in found.items():
            expected_total, expected_count = by_hand(name, pattern, text, kinds)
            torch.testing.assert_close(total, expected_total)
            torch.testing.assert_close(count.double().expand(expected_count.shape), expected_count)


@pytest.mark.parametrize("edges", [range(-9, 1300), range(-5, 1300, 2), (0, 700, 701, 5000), (1280, 1290), (-9, -3)])
def test_many_distances_are_binned_in_parts_and_few_are_all_that_is_looked_at(edges):
    q, k = torch.randn(1, 2, 1200, 2).double(), torch.randn(1, 1, 1200, 2).double()
    call = AttentionCall(nn.Identity(), q, k, None, 1.0, is_causal=False)
    asked = range(100, 1200, 7)
    [found] = pattern_statistics(call, [(0, 1200)], [Distance(edges)], queries=asked).values()
    p_hqk = reference.pattern(call)[0, :, asked]
    distance = torch.tensor(asked)[:, None] - torch.arange(1200)
    for c, (low, high) in enumerate(itertools.pairwise(edges)):
        at = (distance >= low) & (distance < high)
        assert found.weight[0, 0, c] == at.sum()
        torch.testing.assert_close(found.data[0, :, c], p_hqk[:, at].sum(-1) / at.sum().clamp(min=1))


def test_a_number_of_distances_is_each_of_them_alone():
    assert Distance(3) == Distance((0, 1, 2, 3)) and Distance([0, 1, 2, 3]) == Distance(3)
    [each] = pattern_statistics(some_call(), SPANS["one span"], [Distance(2)]).values()
    both = pattern_statistics(some_call(), SPANS["one span"], ["self", "previous"])
    torch.testing.assert_close(each.data[..., 0], both["self"].data)
    torch.testing.assert_close(each.data[..., 1], both["previous"].data)


def test_nan_in_q_is_not_hidden():
    call = some_call()
    call.query_bhqd[1, 2, 6] = torch.nan
    for name, value in pattern_statistics(
        call, [(0, S)] * 3, STATS, columns=dict(token_id=torch.zeros_like(IDS), kind=torch.zeros_like(KIND))
    ).items():
        assert value.data[1, 2].isnan().any(), name
        assert not value.data[0].isnan().any() and not value.data[1, [0, 1, 3]].isnan().any(), name


def test_under_autocast_and_inference_mode_the_same_bits_come_that_can_be_written_to():
    call, columns = some_call(), dict(token_id=IDS, kind=KIND)
    call.query_bhqd.requires_grad_()
    expected = pattern_statistics(call, [(0, S)] * 3, STATS, columns=columns)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = pattern_statistics(call, [(0, S)] * 3, STATS, columns=columns)
    for name, value in found.items():
        assert torch.equal(value.data, expected[name].data) and torch.equal(value.weight, expected[name].weight)
        assert not value.data.is_inference() and not value.data.requires_grad


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (["entropie"], "no statistic of attention is called 'entropie': there are entropy, first, .* ByClass"),
        ([], "one or more, each name once"),
        (["entropy", "entropy"], "one or more, each name once"),
        ([3], "a name or a Statistic, got int"),
    ],
    ids=["unknown", "none", "twice", "a number"],
)
def test_statistics_that_are_none_are_named(stats, message):
    with pytest.raises(SiteError, match=message):
        as_statistics(stats)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distance(0), "two or more ascending edges"),
        (lambda: Distance((0, 2, 2)), "two or more ascending edges"),
        (lambda: Distance((0, 1.5)), "two or more ascending edges"),
        (lambda: Pooled(0), "parts=1 or more"),
        (lambda: ByClass("kind", 0), "size=1 or more"),
        (lambda: ByClass("", 2), "by='pos'"),
    ],
    ids=["no distance", "twice", "a fraction", "no part", "no class", "no column"],
)
def test_parameters_that_mean_nothing_are_refused(make, message):
    with pytest.raises(SiteError, match=message):
        make()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"'class' needs the column 'kind', and there are: none\. .* kind=kind_bs"),
        ({"kind": KIND.float()}, r"goes by integers, one per token, \[3, 11\]: the column 'kind' is torch.float32"),
        ({"kind": KIND[:, 0]}, r"the column 'kind' is torch.int64 \[3\]"),
        ({"kind": KIND + 1}, r"'kind' holds 3, and \d+ token\(s\) are outside of the classes 0 to 2"),
    ],
    ids=["none", "floats", "one a sample", "too many classes"],
)
def test_columns_that_lack_or_do_not_fit_are_named(columns, message):
    with pytest.raises(SiteError, match=message):
        pattern_statistics(some_call(), [(0, S)] * 3, [ByClass("kind", 3)], columns=columns)


# -- ranges of queries and keys ----------------------------------------------------------------------------

RANGES = {
    "rows": dict(queries=range(2, 5)),
    "columns": dict(keys=range(0, 2)),
    "both, with steps": dict(queries=range(1, 8, 3), keys=range(0, 8, 2)),
    "beyond all texts": dict(queries=range(6, 12), keys=slice(1, 30)),
    "an open slice": dict(queries=slice(3, None), keys=slice(None, 4)),
    "all, from the end": dict(align="end"),
    "the last query": dict(queries=range(-1, 0), align="end"),
    "the last three and what they see of the last four": dict(queries=slice(-3, None), keys=range(-4, 0), align="end"),
    "every second from the end": dict(queries=range(-8, 0, 2), keys=slice(None, -2), align="end"),
    "longer than all texts": dict(queries=range(-12, 0), align="end"),
}


def sums_by_hand(patterns, rows, columns, align):
    """(sum [H, rows, columns], texts that have each query): one entry after the other, from the aligned end on."""
    if align == "end":
        rows, columns = list(rows)[::-1], list(columns)[::-1]
    total, counts = torch.zeros(4, len(rows), len(columns), dtype=torch.float64), [0] * len(rows)
    for p in patterns:
        length = p.shape[1]
        for i, q in enumerate(rows):
            q = q + length if align == "end" else q
            if not 0 <= q < length:
                continue
            counts[i] += 1
            for j, k in enumerate(columns):
                k = k + length if align == "end" else k
                if 0 <= k < length:
                    total[:, i, j] += p[:, q, k]
    return total, counts


WANTED = {  # what the ranges above mean of texts of up to 8 tokens
    "rows": (range(2, 5), range(8)),
    "columns": (range(8), range(2)),
    "both, with steps": ([1, 4, 7], [0, 2, 4, 6]),
    "beyond all texts": (range(6, 8), range(1, 8)),
    "an open slice": (range(3, 8), range(4)),
    "all, from the end": (range(-8, 0), range(-8, 0)),
    "the last query": ([-1], range(-8, 0)),
    "the last three and what they see of the last four": ([-3, -2, -1], [-4, -3, -2, -1]),
    "every second from the end": ([-8, -6, -4, -2], range(-8, -2)),
    "longer than all texts": (range(-8, 0), range(-8, 0)),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_sums_of_parts_of_patterns_equal_eager_attention_on_single_texts(family, name, side):
    asked, align = RANGES[name], RANGES[name].get("align", "start")
    layers = captured(
        family, side, lambda call, spans, _: (call, spans, blockwise.pattern_sum(call, spans, 8, block=3, **asked))
    )
    for (call, spans, found), patterns in zip(layers, eager_patterns(family), strict=True):
        rows, columns = WANTED[name]
        expected, counts = sums_by_hand(patterns, rows, columns, align)
        torch.testing.assert_close(found, expected.float(), **TOLERANCE)
        asked_rows = positions(asked.get("queries"), 8, align)
        assert counts_at([stop - start for start, stop in spans], asked_rows, align).tolist() == counts
        specified = reference.pattern_sum(call, spans, 8, queries=rows, keys=columns, align=align)
        specified = specified if align == "start" else specified.flip(-2, -1)
        torch.testing.assert_close(found, specified.float(), **TOLERANCE)


def test_the_last_token_is_another_one_than_that_of_the_padded_batch():
    patterns = eager_patterns("bert")[1]
    [_, found] = captured(
        "bert",
        "right",
        lambda call, spans, _: blockwise.pattern_sum(call, spans, 8, queries=range(-1, 0), align="end"),
    )
    wrong = sum(nn.functional.pad(p[:, -1:], (0, 8 - p.shape[1])) for p in patterns)  # keys from the start
    right = sum(nn.functional.pad(p[:, -1:], (8 - p.shape[1], 0)) for p in patterns)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, wrong.float(), **TOLERANCE)
    torch.testing.assert_close(found, right.flip(-1).float())  # from the last key on


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_patterns_equal_the_specification_under_every_mask(kind):
    call, spans = some_call(kind), SPANS["left and right padding"]
    for asked in (dict(queries=range(1, 10, 3), keys=range(2, 9, 2)), dict(queries=range(-7, 0, 2), align="end")):
        found = blockwise.pattern_sum(call, spans, S, block=2, heads=[2, 1], **asked)
        expected = reference.pattern_sum(call, spans, S, **asked)[[2, 1]].float()
        torch.testing.assert_close(found, expected if "align" not in asked else expected.flip(-2, -1), **TOLERANCE)
    one = blockwise.pattern(call, spans, 2, queries=slice(-2, None), keys=range(-4, 0), align="end")
    torch.testing.assert_close(one, reference.text_pattern(call, 2, spans[2])[:, -2:, -4:].float(), **TOLERANCE)


@pytest.mark.parametrize("align", ["start", "end"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_added_to_what_is_there(dtype, align):
    call, spans = some_call(), SPANS["left and right padding"]
    held_hss = torch.rand(4, S + 3, S + 3, generator=RNG).to(dtype)
    expected = held_hss.clone()
    specified = reference.pattern_sum(call, spans, S, align=align)
    expected[:, :S, :S] += specified if align == "start" else specified.flip(-2, -1)
    blockwise.pattern_sum(call, spans, S, block=2, align=align, into_hqk=held_hss[:, :S, :S])
    torch.testing.assert_close(held_hss, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(queries=slice(-3, None)), r"queries=slice\(-3, None, None\) count from texts' last .* align='end'"),
        (dict(keys=range(-3, 0)), r"keys=range\(-3, 0\) count from texts' last tokens"),
        (dict(keys=range(3), align="end"), r"keys=range\(0, 3\) count from texts' first .* −1 is the last token"),
        (dict(queries=slice(None, 3), align="end"), "count from texts' first tokens"),
        (dict(queries=range(5, 0, -1)), r"ascending positions, or None for all, got range\(5, 0, -1\)"),
        (dict(queries=[1, 2]), r"a slice or a range .* got \[1, 2\]"),
        (dict(align="left"), "align is 'start' .* got 'left'"),
        (dict(queries=slice(None, None, 2), align="end"), r"another token in texts of another length: say where"),
        (dict(queries=range(3, 3)), "are no positions at all"),
    ],
    ids=["slice", "range", "range from the end", "slice from the end", "backwards", "a list", "align", "step", "none"],
)
def test_positions_that_count_from_the_other_end_are_refused(asked, message):
    with pytest.raises(SiteError, match=message):
        blockwise.pattern_sum(some_call(), [(0, S)] * 3, S, **asked)


# -- memory ------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in the block held at once, by storage; and the largest of them."""

    def __init__(self):
        super().__init__()
        self.owners, self.nbytes, self.now, self.most, self.largest = {}, {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self._see(x, given)
        return out

    def _see(self, x, given):
        place = x.untyped_storage().data_ptr()
        if place not in self.owners:
            if place in given:
                return  # a view of what was there before
            self.owners[place], self.nbytes[place] = 0, x.untyped_storage().nbytes()
            self.now += self.nbytes[place]
            self.most, self.largest = max(self.most, self.now), max(self.largest, self.nbytes[place])
        self.owners[place] += 1
        weakref.finalize(x, self._gone, place)

    def _gone(self, place):
        self.owners[place] -= 1
        if not self.owners[place]:
            self.now -= self.nbytes[place]
            del self.owners[place], self.nbytes[place]


LONG, CPU = 192, torch.device("cpu")


def long_call(dtype=torch.float32, causal=True):
    q, k = torch.randn(5, 4, LONG, 8, dtype=dtype), torch.randn(5, 2, LONG, 8, dtype=dtype)
    return AttentionCall(nn.Identity(), q, k, None, 1.0, causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("limit", "heads", "queries"),
    [
        (100, None, None),
        (2 * 4 * 16 * LONG, None, None),
        (2 * 4 * 16 * LONG, None, slice(None, None, 9)),
        (100, [2], slice(None, None, 9)),
        (2 * 4 * 16 * LONG, [3, 0, 1], None),
    ],
    ids=["one sample", "two samples", "every ninth query", "one head", "three heads"],
)
@pytest.mark.parametrize("name", ["all", *NAMES])
def test_statistics_hold_no_more_scores_than_a_block_and_no_more_bytes_than_said(
    monkeypatch, name, limit, heads, queries, causal
):
    monkeypatch.setattr(blockwise, "_SCORES_CPU", limit)
    monkeypatch.setattr(blockwise, "_room", threading.local())  # nothing is there from calls before
    stats = [stat for stat in as_statistics(STATS) if name in ("all", stat.name)]
    columns = dict(token_id=torch.randint(0, 9, (5, LONG)), kind=torch.randint(-1, 3, (5, LONG)))
    call, num_heads = long_call(causal=causal), 4 if heads is None else len(heads)
    with Peak() as peak:
        pattern_statistics(call, [(0, LONG)] * 5, stats, columns=columns, block=16, heads=heads, queries=queries)
    assert peak.largest <= max(limit, max(num_heads, 2) * 16 * LONG) * 4
    num_queries = len(range(LONG)[queries or slice(None)])
    said = scratch_bytes(stats, 5, num_heads, LONG, 8, torch.device("cpu"), block=16, num_queries=num_queries)
    assert said / 5 < peak.most <= said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [None, slice(-4, None)], ids=["all", "last four"])
def test_sums_of_patterns_hold_no_more_than_said(monkeypatch, dtype, queries):
    monkeypatch.setattr(blockwise, "_SCORES_CPU", 2 * 4 * 16 * LONG)
    monkeypatch.setattr(blockwise, "_room", threading.local())
    call, asked = long_call(dtype, causal=False), dict(queries=queries, align="end")
    with Peak() as peak:
        blockwise.pattern_sum(call, [(0, LONG)] * 5, LONG, block=16, **asked)
    num_queries = len(positions(queries, LONG, "end"))
    said = 4 * num_queries * LONG * 4 + blockwise.scratch_bytes(
        5, 4, LONG, 8, CPU, block=16, num_queries=num_queries, itemsize=dtype.itemsize
    )
    assert said / 4 < peak.most <= said


@pytest.mark.parametrize("align", ["start", "end"])
@pytest.mark.parametrize("heads", [[2], None], ids=["one head", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_are_added_to_others_hold_no_more_than_said_though_causal_blocks_grow(
    monkeypatch, dtype, heads, align
):
    monkeypatch.setattr(blockwise, "_SCORES_CPU", 100)  # one sample at a time
    monkeypatch.setattr(blockwise, "_room", threading.local())
    call, num_heads = long_call(dtype), 4 if heads is None else 1
    total_hqk = torch.zeros(num_heads, LONG, LONG, dtype=torch.float64)
    asked = dict(heads=heads, align=align, into_hqk=total_hqk, block=16)
    with Peak() as peak:
        blockwise.pattern_sum(call, [(0, LONG)] * 5, LONG, **asked)
    said = blockwise.scratch_bytes(5, num_heads, LONG, 8, CPU, itemsize=dtype.itemsize, summed=True, block=16)
    assert said / 4 < peak.most <= said


def test_the_bytes_of_a_state_are_those_of_a_mean():
    held = 0
    for value in values_of((some_call(), [(0, S)] * 3, dict(token_id=IDS, kind=KIND))).values():
        state = Mean().take(value)
        held += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        assert state["total"].dtype == torch.float64
    assert held <= state_bytes(STATS, 4) <= 2 * held
