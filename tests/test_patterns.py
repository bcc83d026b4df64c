"""Attention sites of a recording: averages whole or by head, statistics, and attention outside of transformers."""

from __future__ import annotations

import contextlib
import re
import signal
import threading

import pytest
import torch
from test_attention_statistics import Peak
from tiny import build, padded, texts
from torch import nn
from torch.nn import functional

import distcache as dc
from distcache import hooks, patterns, segments
from distcache.attention import AttentionCall, blockwise, reference, tap_attention
from distcache.sites import resolve_sites
from distcache.tokens import Batch

transformers = pytest.importorskip("transformers")

TEXTS = texts((6, 3, 1, 5))


def eager(model, text):
    """[layers, heads, S, S]: what eager attention gives for one unpadded text."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(text[None], output_attentions=True).attentions
    return torch.cat(found).double()


def averaged(patterns):
    """The mean over texts that have a query, [layers, heads, S, S]."""
    size = max(p.shape[-1] for p in patterns)
    total, count = torch.zeros(*patterns[0].shape[:2], size, size, dtype=torch.float64), torch.zeros(size, 1)
    for p in patterns:
        n = p.shape[-1]
        total[..., :n, :n] += p
        count[:n] += 1
    return total / count


def recorded(model, sites, side="right", **given):
    model.set_attn_implementation("sdpa")
    with dc.record(model, sites, **given) as local, torch.no_grad():
        model(**padded(TEXTS, side))
    return local


def test_a_key_without_heads_holds_all_of_them_and_some_may_be_chosen():
    model = build("llama")
    expected = averaged([eager(model, text) for text in TEXTS]).float()
    whole = recorded(model, {"attn_{layer}": "avg_attn_pattern"})
    assert list(whole) == ["attn_0", "attn_1"]
    torch.testing.assert_close(whole["attn", :], expected, rtol=0, atol=2e-6)
    some = recorded(model, [dc.Site("avg_attn_pattern", heads=[3, 0], layers=[1])])
    assert list(some) == ["avg_attn_pattern_L1H3", "avg_attn_pattern_L1H0"]
    torch.testing.assert_close(some["avg_attn_pattern_L1H3"], expected[1, 3], rtol=0, atol=2e-6)
    both = recorded(model, {"attn_{layer}": dc.Site("avg_attn_pattern", heads=[3, 0])})
    torch.testing.assert_close(both["attn_0"], expected[0, [3, 0]], rtol=0, atol=2e-6)
    each = recorded(model, [dc.Site("pattern", heads=[2])])
    assert list(each) == ["pattern_L0H2", "pattern_L1H2"]
    torch.testing.assert_close(each["pattern_L0H2"][1], eager(model, TEXTS[1])[0, 2].float(), rtol=0, atol=2e-6)
    with pytest.raises(dc.SiteError, match=r"heads=\[4\]: expected some of 0\.\.3"):
        recorded(model, [dc.Site("avg_attn_pattern", heads=[4])])


def entropy(p):
    return -(p * p.clamp_min(1e-300).log()).sum(-1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_statistics_are_means_over_all_queries_of_all_texts(side):
    model = build("llama")
    by_text = [eager(model, text) for text in TEXTS]
    num_queries = sum(map(len, TEXTS))
    wanted = sum(entropy(p).sum(-1) for p in by_text) / num_queries
    previous = sum(p.diagonal(-1, -2, -1).sum(-1) for p in by_text) / sum(len(text) - 1 for text in TEXTS)
    found = recorded(model, [dc.Site("attn_stats", stats=("entropy", "previous", dc.Pooled(2)))], side)
    assert list(found)[:3] == [f"attn_stats_{name}_0" for name in ("entropy", "previous", "pooled")]
    torch.testing.assert_close(found["attn_stats_entropy", :].double(), wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(found["attn_stats_previous", :].double(), previous, rtol=0, atol=2e-6)
    torch.testing.assert_close(found["attn_stats_pooled_0"].sum(-1), torch.ones(4, 2), rtol=0, atol=1e-5)
    # A mean of the texts' means, and the entropy of the averaged pattern, are other numbers.
    assert (torch.stack([entropy(p).mean(-1) for p in by_text]).mean(0) - wanted).abs().max() > 1e-3
    assert (entropy(averaged(by_text)).mean(-1) - wanted).abs().max() > 1e-3


def test_statistics_know_tokens_and_go_by_label():
    model = build("llama")
    twice = [torch.cat([text, text]) for text in texts((3, 4, 2))]
    batch = padded(twice)
    site = dc.Site("attn_stats", stats=("induction", "first"), reduce=dc.Grouped(dc.Mean(), 2, by="label"), layers=[1])
    with dc.record(model, [site], label=torch.tensor([1, 0, 1])) as local, torch.no_grad():
        model(**batch)
    of = {1: [0, 2], 0: [1]}
    for label, members in of.items():
        by_text = [eager(model, twice[b])[1] for b in members]
        first = sum(p[..., 0].sum(-1) for p in by_text) / sum(len(twice[b]) for b in members)
        torch.testing.assert_close(local["attn_stats_first_1"][label].double(), first, rtol=0, atol=2e-6)
        total, count = 0, 0
        for p, b in zip(by_text, members, strict=True):
            ids = twice[b].tolist()
            for q in range(len(ids)):
                keys = [k + 1 for k in range(q) if ids[k] == ids[q]]
                if keys:
                    total, count = total + p[:, q, keys].sum(-1), count + 1
        torch.testing.assert_close(local["attn_stats_induction_1"][label].double(), total / count, rtol=0, atol=2e-6)


def test_statistics_of_ranks_are_those_of_one_process(ranks):
    one = torch.cat([x.flatten() for x in ranks.run(1, on_ranks, [[0, 1, 2, 3]])[0]])
    for split in ([[0], [1, 2, 3]], [[0, 1, 2, 3], []]):
        for found in ranks.run(2, on_ranks, split):
            torch.testing.assert_close(torch.cat([x.flatten() for x in found]), one, rtol=0, atol=1e-6)


def on_ranks(rank, world_size, split):
    model, cache = build("llama"), dc.DistributedCache()
    sites = [dc.Site("attn_stats", stats=("entropy", dc.Distance(4))), "avg_attn_pattern"]
    with cache.deferred_mode():
        if split[rank]:
            with dc.record(model, sites, into=cache, index=split[rank]), torch.no_grad():
                model(**padded([TEXTS[i] for i in split[rank]]))
    return [cache[key] for key in sorted(cache)]


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (dict(stats=("entropy",), reduce="max"), "averages over queries"),
        (dict(), r"statistics of attention are one or more, each name once, got \[\]"),
        (dict(stats=("surprise",)), "no statistic of attention is called 'surprise'"),
        (dict(stats=("entropy",), tokens="last"), "is of whole patterns: only .*stats mean something to it"),
    ],
    ids=["max", "none", "unknown", "tokens"],
)
def test_statistics_that_mean_nothing_are_refused(site, words):
    with pytest.raises(dc.SiteError, match=words), dc.record(build("llama"), [dc.Site("attn_stats", **site)]):
        pass


def test_statistics_are_refused_before_the_model_runs_where_they_would_not_fit(monkeypatch):
    from distcache import hooks

    monkeypatch.setattr(hooks, "available_bytes", lambda device: 100)
    model, ran = build("llama"), []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(dc.TooLarge, match=r"attention of 2 layers × 4 heads needs .* fewer queries or keys"):
        recorded(model, [dc.Site("attn_stats", stats=(dc.Pooled(8),))])
    assert ran == []


# -- outside of transformers -----------------------------------------------------------------------------------


class Attends(nn.Module):
    """Somebody's own attention, by torch's function; `imported`: under the name that it had before any tap."""

    def __init__(self, imported):
        super().__init__()
        self.qkv, self.num_heads, self.imported = nn.Linear(16, 48), 4, imported

    def forward(self, x_bsd, mask_bs):
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in self.qkv(x_bsd).chunk(3, -1))
        attend = SDPA if self.imported else functional.scaled_dot_product_attention
        causal = torch.ones(x_bsd.shape[1], x_bsd.shape[1]).tril().bool() & mask_bs[:, None, None].bool()
        return attend(q, k, v, attn_mask=causal, scale=0.7).transpose(1, 2).flatten(2)


SDPA = functional.scaled_dot_product_attention


class Reader(nn.Module):
    def __init__(self, imported=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(64, 16), nn.ModuleList(Attends(imported) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x, attention_mask)
        return x


def pattern_by_hand(block, x_sd):
    q, k, _ = (x.unflatten(-1, (4, 4)).transpose(0, 1) for x in block.qkv(x_sd).chunk(3, -1))
    scores = (q @ k.mT) * 0.7
    return scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf).softmax(-1).detach().double()


@pytest.mark.parametrize("imported", [False, True], ids=["looked up", "imported before"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_torchs_own_function_is_seen_by_whichever_name(side, imported):
    model, batch = Reader(imported), padded(TEXTS, side)
    del batch["position_ids"]
    site = dc.Site("blocks.{layer}", reduce=dc.AveragePattern(), key="attn_{layer}")
    with dc.record(model, [site]) as local:
        model(**batch)
    assert functional.scaled_dot_product_attention is SDPA
    shown = []
    handle = model.blocks[1].register_forward_pre_hook(lambda m, args: shown.append(args[0]))
    by_text = []
    for text in TEXTS:
        model(text[None], torch.ones(1, len(text)))
        by_text.append(pattern_by_hand(model.blocks[1], shown[-1][0])[None])
    handle.remove()
    torch.testing.assert_close(local["attn_1"].double(), averaged(by_text)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_torchs_encoder_layers_are_captured_though_they_would_compute_in_one_go(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    mask = padded(TEXTS)["attention_mask"]
    with (
        dc.record(
            model, [dc.Site("layers.{layer}.self_attn", reduce=dc.AveragePattern(), key="attn_{layer}")]
        ) as local,
        torch.no_grad(),
    ):
        model(x, src_key_padding_mask=mask == 0)
    first = model.layers[0]
    by_text = []
    for b, text in enumerate(TEXTS):
        h = x[b : b + 1, : len(text)]
        h = first.norm1(h) if norm_first else h
        by_text.append(first.self_attn(h, h, h, average_attn_weights=False)[1].detach().double())
    torch.testing.assert_close(local["attn_0"].double(), averaged(by_text)[0], rtol=0, atol=2e-6)


def test_attention_that_goes_another_way_is_an_error():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attn = nn.Embedding(64, 16), nn.Identity()

        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.attn((x @ x.mT).softmax(-1) @ x)

    model = ByHand()
    site = dc.Site("attn", reduce=dc.AveragePattern())
    with pytest.raises(dc.SiteError, match="1 of 1 sites reported nothing"), dc.record(model, [site]):
        model(TEXTS[0][None])
    folded = nn.Sequential(Folded())
    refused = pytest.raises(dc.SiteError, match=r"expected queries and keys \[B, H, S, D\], got \(2, 3, 4\)")
    with refused, dc.record(folded, [dc.Site("0", reduce=dc.AveragePattern())]):
        folded(torch.ones(2, 3, 4))


class Folded(nn.Module):
    """Heads folded into the batch."""

    def forward(self, x):
        return SDPA(x, x, x)


# -- some positions, counted from either end -------------------------------------------------------------------

# Short texts are summed at once; of long ones Q and K, which are less than the sum, wait for the pass to return.
LENGTHS = {"at once": (6, 3, 1, 5), "when the pass returns": (60, 23, 41)}
SOME = {  # what a site asks for, and the positions that are meant in texts of up to 60 tokens
    "all": (dict(), range(60), range(60)),
    "the first queries": (dict(queries=slice(0, 4)), range(4), range(60)),
    "the first keys": (dict(keys=range(2)), range(60), range(2)),
    "every third query": (dict(queries=slice(1, None, 3), keys=slice(2, 50)), range(1, 60, 3), range(2, 50)),
    "all, from the end": (dict(align="end"), range(-60, 0), range(-60, 0)),
    "the last query": (dict(queries=slice(-1, None), align="end"), [-1], range(-60, 0)),
    "the last queries and keys": (
        dict(queries=range(-5, 0, 2), keys=slice(-4, -1), align="end"),
        [-5, -3, -1],
        [-4, -3, -2],
    ),
}


def some_averaged(patterns, queries, keys, align):
    """The same as `averaged`, of these positions alone, as many of them as any text has."""
    longest = max(p.shape[-1] for p in patterns)
    there = range(longest) if align == "start" else range(-longest, 0)
    queries, keys = ([n for n in wanted if n in there] for wanted in (queries, keys))
    total = torch.zeros(*patterns[0].shape[:2], len(queries), len(keys), dtype=torch.float64)
    count = torch.zeros(len(queries), 1)
    for p in patterns:
        n = p.shape[-1]
        shift = 0 if align == "start" else n
        rows = [(i, q + shift) for i, q in enumerate(queries) if 0 <= q + shift < n]
        columns = [(j, k + shift) for j, k in enumerate(keys) if 0 <= k + shift < n]
        for i, q in rows:
            count[i] += 1
            for j, k in columns:
                total[..., i, j] += p[..., q, k]
    return total / count


def batch_recorded(model, some, sites, side="right", **given):
    model.set_attn_implementation("sdpa")
    with dc.record(model, sites, **given) as local, torch.no_grad():
        model(**padded(some, side))
    return local


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("when", LENGTHS)
def test_averages_of_some_positions_are_those_of_the_texts_that_have_them(when, name, side):
    (asked, queries, keys), model, some = SOME[name], build("llama", max_position_embeddings=64), texts(LENGTHS[when])
    patterns = [eager(model, text) for text in some]
    align = asked.get("align", "start")
    few = dc.Site("avg_attn_pattern", heads=[2], key="few_{layer}", **asked)
    local = batch_recorded(model, some, [dc.Site("avg_attn_pattern", **asked), few], side)
    expected = some_averaged(patterns, queries, keys, align)
    for layer in range(2):
        torch.testing.assert_close(local["avg_attn_pattern", layer].double(), expected[layer], rtol=0, atol=2e-6)
        torch.testing.assert_close(local[f"few_{layer}"][0].double(), expected[layer, 2], rtol=0, atol=2e-6)
    other_end = some_averaged(patterns, range(60), range(60), "start" if align == "end" else "end")
    assert expected.shape != other_end.shape or (expected - other_end).abs().max() > 1e-2
    each = batch_recorded(model, some, [dc.Site("pattern", layers=[1], **asked)], side)["pattern_L1H3"]
    one = some_averaged(patterns[1:2], queries, keys, align)[1, 3]
    torch.testing.assert_close(each[1].double(), one, rtol=0, atol=2e-6)


def test_counts_of_some_positions_are_of_texts_in_the_order_of_the_average():
    model, some = build("llama"), texts((6, 3, 1, 5))
    local = batch_recorded(model, some, [dc.Site("avg_attn_pattern", queries=slice(-4, None), align="end")])
    assert local.count("avg_attn_pattern_L0H0")[:, 0].tolist() == [2, 3, 3, 4]


@pytest.mark.parametrize("when", LENGTHS)
def test_averages_by_label_are_those_of_each_labels_texts(when):
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS[when])
    label = torch.tensor([2, 0, 2, -1][: len(some)])
    by_label = dc.Grouped(dc.AveragePattern(size=64), 3, by="label")
    last = dc.Site("avg_attn_pattern", queries=slice(-2, None), align="end", reduce=by_label, key="last_{layer}")
    local = batch_recorded(model, some, [dc.Site("avg_attn_pattern", reduce=by_label), last], label=label)
    found, last_found = local["avg_attn_pattern_L1H2"], local["last_0"]
    assert found[1].isnan().all() and len(found) == 3
    for number in (0, 2):
        patterns = [eager(model, text) for text, own in zip(some, label, strict=True) if own == number]
        n = max(p.shape[-1] for p in patterns)
        torch.testing.assert_close(found[number, :n, :n].double(), averaged(patterns)[1, 2], rtol=0, atol=2e-6)
        assert not found[number, :n, n:].any()
        expected = some_averaged(patterns, [-2, -1], range(-60, 0), "end")[0]
        torch.testing.assert_close(
            last_found[number, :, :, -expected.shape[-1] :].double(), expected, rtol=0, atol=2e-6
        )


def test_the_state_of_some_positions_takes_room_for_these_alone_and_comes_back_from_disk(tmp_path):
    model, some = build("llama"), texts((6, 3, 1, 5))
    site = dc.Site("avg_attn_pattern", queries=slice(-2, None), keys=range(-3, 0), align="end")
    local = batch_recorded(model, some, [site])
    assert {name: tuple(x.shape) for name, x in local._arena.state("avg_attn_pattern_L0H0").items()} == {
        "total": (2, 3),
        "count": (2, 1),
        "keys": (1, 3),
    }
    local.save(tmp_path / "saved")
    again = dc.load(tmp_path / "saved")
    assert torch.equal(again["avg_attn_pattern", 1], local["avg_attn_pattern", 1])
    again.cat(local)  # of one strategy, with its positions
    assert torch.equal(again["avg_attn_pattern", 1], local["avg_attn_pattern", 1])
    other = batch_recorded(model, some, [dc.Site("avg_attn_pattern", queries=slice(-2, None), align="end")])
    with pytest.raises(dc.SchemaMismatch, match="holds a state of"):
        again.cat(other)


def some_on_ranks(rank, world_size, split):
    model, cache = build("llama", max_position_embeddings=64), dc.DistributedCache()
    some, label = texts((60, 23, 41, 5)), torch.tensor([1, 0, 1, 1])
    by_label = dc.Grouped(dc.AveragePattern(size=64), 2, by="label")
    sites = [
        dc.Site("avg_attn_pattern", align="end"),
        dc.Site("avg_attn_pattern", queries=slice(3, None), key="some_{layer}"),
        dc.Site("avg_attn_pattern", reduce=by_label, key="by_label_{layer}"),
    ]
    mine = split[rank]
    with cache.deferred_mode():
        if mine:
            with dc.record(model, sites, into=cache, index=mine, label=label[mine]), torch.no_grad():
                model(**padded([some[i] for i in mine]))
    return {key: cache[key] for key in sorted(cache)}


def test_averages_of_some_positions_and_by_label_are_the_same_on_any_number_of_ranks(ranks):
    [one] = ranks.run(1, some_on_ranks, [[0, 1, 2, 3]])
    for split in ([[1, 3], [0, 2]], [[3], [], [0, 1, 2]]):
        for found in ranks.run(len(split), some_on_ranks, split):
            for key, value in one.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, equal_nan=True)


def test_what_a_model_writes_to_its_queries_later_changes_no_average(monkeypatch):
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS["when the pass returns"])
    expected = averaged([eager(model, text) for text in some])
    attend = functional.scaled_dot_product_attention

    def attend_and_overwrite(query, key, value, **options):
        found = attend(query, key, value, **options)
        query.zero_()
        key.zero_()
        return found

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend_and_overwrite)
    local = batch_recorded(model, some, ["avg_attn_pattern"])
    torch.testing.assert_close(local["avg_attn_pattern", :].double(), expected, rtol=0, atol=2e-6)


def test_a_pass_that_raised_leaves_no_pattern_behind():
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS["when the pass returns"])
    expected = averaged([eager(model, text) for text in some])
    model.set_attn_implementation("sdpa")
    with dc.record(model, ["avg_attn_pattern"]) as local, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**padded(some))
        handle.remove()
        assert len(local) == 0
        model(**padded(some[:2]))
        model(**padded(some[2:]))
    torch.testing.assert_close(local["avg_attn_pattern", :].double(), expected, rtol=0, atol=2e-6)


class Window(nn.Module):
    """Attends to so many tokens, by a mask that it writes into a tensor of all layers; notes what it saw."""

    def __init__(self, size):
        super().__init__()
        self.qk, self.num_heads, self.size = nn.Linear(16, 32), 4, size

    def forward(self, x_bsd, mask_ss):
        behind = torch.arange(x_bsd.shape[1])[:, None] - torch.arange(x_bsd.shape[1])
        mask_ss.copy_((behind >= 0) & (behind < self.size))
        q, k = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in self.qk(x_bsd).chunk(2, -1))
        self.seen = (q.double() @ k.double().mT * 0.5).masked_fill(~mask_ss, -torch.inf).softmax(-1).mean(0)
        return x_bsd + functional.scaled_dot_product_attention(q, k, k, attn_mask=mask_ss).transpose(1, 2).flatten(2)


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(map(Window, (2, 5, 3)))

    def forward(self, x_bsd):
        mask_ss = torch.empty(x_bsd.shape[1], x_bsd.shape[1], dtype=torch.bool)
        for block in self.blocks:
            x_bsd = block(x_bsd, mask_ss)
        return x_bsd


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_a_model_writes_to_its_masks_later_changes_no_average(mode):
    model, site = Windows(), dc.Site("blocks.{layer}", reduce=dc.AveragePattern(), key="attn_{layer}")
    with dc.record(model, [site]) as local, mode():
        model(torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(2)))
    for layer, block in enumerate(model.blocks):
        torch.testing.assert_close(local[f"attn_{layer}"].double(), block.seen.double(), rtol=0, atol=2e-6)
    assert (model.blocks[0].seen - model.blocks[2].seen).abs().max() > 0.1  # as the last mask would have it


@pytest.mark.parametrize("when", LENGTHS)
def test_averages_of_a_float64_model_have_the_digits_of_float64(when):
    model, some, calls = build("llama", dtype=torch.float64, max_position_embeddings=64), texts(LENGTHS[when]), []
    model.set_attn_implementation("sdpa")
    with tap_attention([layer.self_attn for layer in model.model.layers], calls.append), torch.no_grad():
        model(**padded(some))
    size = max(map(len, some))
    count = torch.tensor([[sum(len(text) > q for text in some)] for q in range(size)])
    local = batch_recorded(model, some, ["avg_attn_pattern"])
    for layer, call in enumerate(calls):
        expected = reference.pattern_sum(call, [(0, len(text)) for text in some], size) / count
        torch.testing.assert_close(local["avg_attn_pattern", layer], expected, rtol=0, atol=1e-14)
        assert (expected.float().double() - expected).abs().max() > 1e-9  # as float32 would have it


def failing_at(number, monkeypatch):
    """From now on sums of patterns raise once, at the call of this number."""
    real, calls = patterns.pattern_sum, []

    def pattern_sum(*args, **given):
        calls.append(1)
        if len(calls) == number:
            given["into_hqk"].add_(1)  # it had begun
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **given)

    monkeypatch.setattr(patterns, "pattern_sum", pattern_sum)


def test_a_sum_that_fails_in_the_first_pass_leaves_nothing_and_the_pass_may_be_repeated(monkeypatch):
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS["when the pass returns"])
    expected = averaged([eager(model, text) for text in some])
    model.set_attn_implementation("sdpa")
    failing_at(2, monkeypatch)
    cache = dc.ActivationCache()
    with (
        dc.record(model, ["avg_attn_pattern", dc.Site("resid_out", reduce="mean")], into=cache) as rec,
        torch.no_grad(),
    ):
        rec.next(index=range(3))
        with pytest.raises(torch.OutOfMemoryError):
            model(**padded(some))
        assert len(cache) == 0
        for i, text in enumerate(some):
            rec.next(index=[i])
            model(**padded([text]))
    torch.testing.assert_close(cache["avg_attn_pattern", :].double(), expected, rtol=0, atol=2e-6)
    assert int(cache.count("resid_out_0")) == sum(map(len, some))


def test_a_sum_that_fails_later_is_an_error_and_what_was_added_in_part_reads_as_nan(monkeypatch):
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS["when the pass returns"])
    expected = averaged([eager(model, text) for text in some])
    model.set_attn_implementation("sdpa")
    failing_at(3, monkeypatch)
    cache = dc.ActivationCache()
    sites = ["avg_attn_pattern", dc.Site("resid_out", reduce="mean")]
    with dc.record(model, sites, into=cache) as rec, torch.no_grad():
        rec.next(index=[0])
        model(**padded(some[:1]))
        for raises in (True, False):
            rec.next(index=[1, 2])
            words = r"'avg_attn_pattern_L0H0' was added in part \(OutOfMemoryError: no memory\), .* 4 keys are NaN"
            with pytest.raises(dc.DistcacheError, match=words) if raises else contextlib.nullcontext():
                model(**padded(some[1:]))
    assert cache["avg_attn_pattern", 0].isnan().all(-1).all()
    torch.testing.assert_close(cache["avg_attn_pattern", 1].double(), expected[1], rtol=0, atol=2e-6)
    assert int(cache.count("resid_out_0")) == sum(map(len, some))


def test_a_pass_that_ctrl_c_comes_amid_the_sums_of_counts_with_its_samples(monkeypatch):
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS["when the pass returns"])
    expected = averaged([eager(model, text) for text in some])
    model.set_attn_implementation("sdpa")
    real = patterns.pattern_sum
    cache = dc.ActivationCache()
    with dc.record(model, ["avg_attn_pattern"], into=cache) as rec, torch.no_grad():
        rec.next(index=[0, 1])
        with monkeypatch.context() as patched:
            patched.setattr(
                patterns, "pattern_sum", lambda *a, **b: (signal.raise_signal(signal.SIGINT), real(*a, **b))[1]
            )
            with pytest.raises(KeyboardInterrupt):
                model(**padded(some[:2]))
        rec.next(index=[0, 1])
        with pytest.raises(dc.DuplicateSamples):
            model(**padded(some[:2]))
        rec.next(index=[2])
        model(**padded(some[2:]))
    torch.testing.assert_close(cache["avg_attn_pattern", :].double(), expected, rtol=0, atol=2e-6)


def test_sums_go_where_a_cache_lies_and_are_computed_where_the_model_is(monkeypatch):
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS["when the pass returns"])
    cache = batch_recorded(model, some, ["avg_attn_pattern"]).to("meta")  # the only other device that is always there
    real, computed = patterns.pattern_sum, []

    def pattern_sum(call, *args, into_hqk, **given):
        computed.append(into_hqk is None or into_hqk.device == call.query_bhqd.device)
        return real(call, *args, into_hqk=into_hqk, **given)

    monkeypatch.setattr(patterns, "pattern_sum", pattern_sum)
    with dc.record(model, ["avg_attn_pattern"], into=cache), torch.no_grad():
        model(**padded(some))
    assert computed == [True, True] and cache._arena.state("avg_attn_pattern_L1H2")["total"].device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 96, 96).tril().bool()], ids=["causal", "mask"])
@pytest.mark.parametrize(
    "site",
    [
        dict(),
        dict(align="end", heads=[2]),
        dict(align="end", queries=slice(-4, None), heads=[3, 0, 1]),
        dict(reduce=dc.Grouped(dc.AveragePattern(size=96), 2, by="label")),
    ],
    ids=["all", "one head, from the end", "some", "by label"],
)
def test_passes_take_no_more_memory_than_is_asked_for_before_them(site, mask, dtype, monkeypatch):
    monkeypatch.setattr(blockwise, "_room", threading.local())
    monkeypatch.setattr(segments, "FIRST_CHUNK_BYTES", 0)  # what takes no memory before it's used isn't asked for
    monkeypatch.setattr(segments, "LARGEST_CHUNK_BYTES", 0)
    model = build("llama", dtype=dtype)
    _, targets = resolve_sites(model, [dc.Site("avg_attn_pattern", **site)])
    batch = Batch(2, 96, None, torch.arange(2), False, dict(label=torch.tensor([1, 0])))
    shapes = ((2, 4, 96, 8), (2, 2, 96, 8))
    calls = [
        AttentionCall(target.module, *(torch.randn(shape, dtype=dtype) for shape in shapes), mask, 1.0, True)
        for target in targets
    ]
    cache, waiting = dc.ActivationCache(), patterns.Waiting()
    rooms = [patterns.room_nbytes(target, cache._arena, torch.device("cpu"), batch) for target in targets]
    asked = sum(kept for kept, _ in rooms) + max(computing for _, computing in rooms)
    with Peak() as peak, torch.no_grad():
        slabs = [
            slab
            for target, call in zip(targets, calls, strict=True)
            for slab in patterns.shown_patterns(target, call, batch, waiting)
        ]
        cache._take_pass(slabs, [], cache, 2, None, raw=True)
    assert asked / 4 < peak.most <= asked


def test_a_second_block_is_not_refused_for_room_that_the_first_has_left(monkeypatch):
    model, some = build("llama", max_position_embeddings=64), texts(LENGTHS["when the pass returns"])
    model.set_attn_implementation("sdpa")
    asked = []
    with dc.init():
        cache = dc.DistributedCache()
        for _ in range(2):
            with cache.deferred_mode(), dc.record(model, ["avg_attn_pattern"], into=cache) as rec, torch.no_grad():
                asked.append(0)
                with monkeypatch.context() as patched:
                    patched.setattr(hooks, "available_bytes", lambda _: 0)
                    with pytest.raises(dc.TooLarge) as refused:
                        model(**padded(some))
                asked[-1] = refused.value.args[0]
                rec.next()
                model(**padded(some))
    sums = 8 * (128 * 128 * 8 + 128 * 8)  # of two layers and four heads
    before, after = (float(re.search(r"needs ([\d.]+) MB", said)[1]) for said in asked)
    assert before - after == pytest.approx(sums / 1e6, abs=0.11)


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (dict(queries=slice(-2, None)), "take align='end'"),
        (dict(queries=slice(0, 2), reduce=dc.AveragePattern(align="end")), "say once which positions"),
        (dict(reduce=dc.Grouped(dc.AveragePattern(size=8), 4, by="position")), "whole texts, which have no position"),
        (dict(reduce=dc.Grouped(dc.Mean(), 4, by="label")), "brings its own state"),
    ],
    ids=["from the other end", "twice", "by position", "means by label"],
)
def test_positions_and_groups_that_mean_nothing_are_refused(site, words):
    with pytest.raises(dc.SiteError, match=words), dc.record(build("llama"), [dc.Site("avg_attn_pattern", **site)]):
        pass


def test_labels_outside_of_the_groups_are_named_with_the_site_and_nothing_changes():
    by_label = dc.Grouped(dc.AveragePattern(size=8), 2, by="label")
    with dc.record(build("llama"), [dc.Site("avg_attn_pattern", reduce=by_label)], label=torch.tensor([0, 5])) as local:
        with pytest.raises(dc.SiteError, match=r"'avg_attn_pattern' at layer 0: the column 'label' holds 5"):
            local._recorder.model(**padded(texts((3, 2))))
        assert len(local) == 0
