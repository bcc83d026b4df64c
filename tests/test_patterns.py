"""Attention sites of a recording: averages whole or by head, statistics, and attention outside of transformers."""

from __future__ import annotations

import pytest
import torch
from tiny import build, padded, texts
from torch import nn
from torch.nn import functional

import distcache as dc

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
