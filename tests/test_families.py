"""Named sites are what hooks written by hand on the same module see, and what their names promise of each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import CONFIGS, ENCODERS, LLAMA_LIKE, WIDTH, WORDS, build, padded, texts
from torch import nn

import distcache as dc
from distcache import families

transformers = pytest.importorskip("transformers")

# Where a hook by hand goes: module from the base model, side of it, and what of its value (the whole, if nothing is
# said). Written from the model files, not from the table under test. `{l}`: a layer. The models have 4 heads of 8, and
# 2 of keys and values where they may.
LLAMA = {
    "embed": ("embed_tokens", "output"),
    "resid_in": ("layers.{l}", "input"),
    "attn_in": ("layers.{l}.self_attn", "input"),
    "queries": ("layers.{l}.self_attn.q_proj", "output"),
    "keys": ("layers.{l}.self_attn.k_proj", "output"),
    "values": ("layers.{l}.self_attn.v_proj", "output"),
    "attn_z": ("layers.{l}.self_attn.o_proj", "input"),
    "attn_out": ("layers.{l}.self_attn.o_proj", "output"),
    "resid_mid": ("layers.{l}.post_attention_layernorm", "input"),
    "mlp_act": ("layers.{l}.mlp.down_proj", "input"),
    "mlp_out": ("layers.{l}.mlp.down_proj", "output"),
    "resid_out": ("layers.{l}", "output"),
    "final_norm_out": ("norm", "output"),
}
GRANITE = {
    **LLAMA,
    "embed": ("embed_tokens", "output", lambda x: x * 12.0),
    "attn_out": ("layers.{l}.self_attn.o_proj", "output", lambda x: x * 0.22),
    "mlp_out": ("layers.{l}.mlp.down_proj", "output", lambda x: x * 0.22),
}
PHI3 = {
    **LLAMA,
    "queries": ("layers.{l}.self_attn.qkv_proj", "output", lambda x: x[..., :32]),
    "keys": ("layers.{l}.self_attn.qkv_proj", "output", lambda x: x[..., 32:48]),
    "values": ("layers.{l}.self_attn.qkv_proj", "output", lambda x: x[..., 48:]),
}
GEMMA2 = {
    **LLAMA,
    "attn_out": ("layers.{l}.post_attention_layernorm", "output"),
    "resid_mid": ("layers.{l}.pre_feedforward_layernorm", "input"),
    "mlp_out": ("layers.{l}.post_feedforward_layernorm", "output"),
}
OLMO2 = {**GEMMA2, "attn_in": ("layers.{l}", "input"), "resid_mid": ("layers.{l}.mlp.gate_proj", "input")}
COHERE = {**LLAMA, "attn_in": ("layers.{l}.mlp", "input")}
del COHERE["resid_mid"]
MIXTRAL = {
    **LLAMA,
    "mlp_out": ("layers.{l}.mlp", "output"),
    "router_logits": ("layers.{l}.mlp.gate", "output", lambda x: x.view(4, 6, 3)),
}
del MIXTRAL["mlp_act"]
GPT_OSS = {**MIXTRAL, "router_logits": ("layers.{l}.mlp.router", "output", lambda x: x.view(4, 6, 3))}
DEEPSEEK = {
    **{site: place for site, place in MIXTRAL.items() if site not in ("keys", "values", "router_logits")},
    "queries": ("layers.{l}.self_attn.q_b_proj", "output"),
}
QWEN_NEXT = {
    **{site: place for site, place in MIXTRAL.items() if site != "router_logits"},
    "queries": ("layers.{l}.self_attn.q_proj", "output", lambda x: x.view(4, 6, 4, 16)[..., :8].flatten(-2)),
}
GPT2 = {
    "embed": ("drop", "output"),
    "resid_in": ("h.{l}.ln_1", "input"),
    "attn_in": ("h.{l}.attn.c_attn", "input"),
    "queries": ("h.{l}.attn.c_attn", "output", lambda x: x[..., :32]),
    "keys": ("h.{l}.attn.c_attn", "output", lambda x: x[..., 32:64]),
    "values": ("h.{l}.attn.c_attn", "output", lambda x: x[..., 64:]),
    "attn_z": ("h.{l}.attn.c_proj", "input"),
    "attn_out": ("h.{l}.attn.resid_dropout", "output"),
    "resid_mid": ("h.{l}.ln_2", "input"),
    "mlp_act": ("h.{l}.mlp.act", "output"),
    "mlp_out": ("h.{l}.mlp.dropout", "output"),
    "resid_out": ("h.{l}", "output"),
    "final_norm_out": ("ln_f", "output"),
}


def of_every_head(number, start, stop):
    """Columns start to stop of each of so many heads that lie side by side."""
    return lambda x: x.unflatten(-1, (number, -1))[..., start:stop].flatten(-2)


NEOX_IN_TURN = {
    "embed": ("embed_in", "output"),
    "resid_in": ("layers.{l}.input_layernorm", "input"),
    "attn_in": ("layers.{l}.attention", "input"),
    "queries": ("layers.{l}.attention.query_key_value", "output", of_every_head(4, 0, 8)),
    "keys": ("layers.{l}.attention.query_key_value", "output", of_every_head(4, 8, 16)),
    "values": ("layers.{l}.attention.query_key_value", "output", of_every_head(4, 16, 24)),
    "attn_z": ("layers.{l}.attention.dense", "input"),
    "attn_out": ("layers.{l}.attention.dense", "output"),
    "resid_mid": ("layers.{l}.post_attention_layernorm", "input"),
    "mlp_act": ("layers.{l}.mlp.act", "output"),
    "mlp_out": ("layers.{l}.mlp", "output"),
    "resid_out": ("layers.{l}", "output"),
    "final_norm_out": ("final_layer_norm", "output"),
}
NEOX = {site: place for site, place in NEOX_IN_TURN.items() if site != "resid_mid"}


def falcon(queries, keys, values):
    fused = "h.{l}.self_attention.query_key_value"
    return {
        "embed": ("word_embeddings", "output"),
        "resid_in": ("h.{l}", "input"),
        "attn_in": ("h.{l}.self_attention", "input"),
        "queries": (fused, "output", queries),
        "keys": (fused, "output", keys),
        "values": (fused, "output", values),
        "attn_z": ("h.{l}.self_attention.dense", "input"),
        "attn_out": ("h.{l}.self_attention.dense", "output"),
        "mlp_act": ("h.{l}.mlp.act", "output"),
        "mlp_out": ("h.{l}.mlp.dense_4h_to_h", "output"),
        "resid_out": ("h.{l}", "output"),
        "final_norm_out": ("ln_f", "output"),
    }


ONE_KEY_HEAD = falcon(lambda x: x[..., :32], lambda x: x[..., 32:40], lambda x: x[..., 40:])
TWO_KEY_HEADS = falcon(of_every_head(2, 0, 16), of_every_head(2, 16, 24), of_every_head(2, 24, 32))
EVERY_KEY_HEAD = {
    **falcon(of_every_head(4, 0, 8), of_every_head(4, 8, 16), of_every_head(4, 16, 24)),
    "resid_mid": ("h.{l}.post_attention_layernorm", "input"),
}
BERT = {
    "embed": ("embeddings.dropout", "output"),
    "resid_in": ("encoder.layer.{l}", "input"),
    "attn_in": ("encoder.layer.{l}.attention", "input"),
    "queries": ("encoder.layer.{l}.attention.self.query", "output"),
    "keys": ("encoder.layer.{l}.attention.self.key", "output"),
    "values": ("encoder.layer.{l}.attention.self.value", "output"),
    "attn_z": ("encoder.layer.{l}.attention.output", "input"),
    "attn_out": ("encoder.layer.{l}.attention.output.dense", "output"),
    "mlp_act": ("encoder.layer.{l}.intermediate", "output"),
    "mlp_out": ("encoder.layer.{l}.output.dense", "output"),
    "resid_out": ("encoder.layer.{l}.output", "output"),
}
VIT = {
    "embed": ("embeddings.dropout", "output"),
    "resid_in": ("layers.{l}.layernorm_before", "input"),
    "attn_in": ("layers.{l}.attention", "input"),
    "queries": ("layers.{l}.attention.q_proj", "output"),
    "keys": ("layers.{l}.attention.k_proj", "output"),
    "values": ("layers.{l}.attention.v_proj", "output"),
    "attn_z": ("layers.{l}.attention.o_proj", "input"),
    "attn_out": ("layers.{l}.attention.o_proj", "output"),
    "resid_mid": ("layers.{l}.layernorm_after", "input"),
    "mlp_act": ("layers.{l}.mlp.activation_fn", "output"),
    "mlp_out": ("layers.{l}.mlp.fc2", "output"),
    "resid_out": ("layers.{l}", "output"),
    "final_norm_out": ("layernorm", "output"),
}


def t5(stack, mlp):
    block = f"{stack}.block.{{l}}"
    return {
        f"{stack}_{site}": place
        for site, place in {
            "embed": (f"{stack}.embed_tokens", "output"),
            "resid_in": (f"{block}.layer.0.layer_norm", "input"),
            "attn_in": (f"{block}.layer.0.SelfAttention", "input"),
            "queries": (f"{block}.layer.0.SelfAttention.q", "output"),
            "keys": (f"{block}.layer.0.SelfAttention.k", "output"),
            "values": (f"{block}.layer.0.SelfAttention.v", "output"),
            "attn_z": (f"{block}.layer.0.SelfAttention.o", "input"),
            "attn_out": (f"{block}.layer.0.SelfAttention.o", "output"),
            "mlp_act": (f"{block}.layer.{mlp}.DenseReluDense.dropout", "output"),
            "mlp_out": (f"{block}.layer.{mlp}.DenseReluDense", "output"),
            "resid_out": (f"{block}.layer.{mlp}", "output"),
            "final_norm_out": (f"{stack}.final_layer_norm", "output"),
        }.items()
    }


T5 = {
    **t5("encoder", mlp=1),
    "encoder_resid_mid": ("encoder.block.{l}.layer.0", "output"),
    **t5("decoder", mlp=2),
    "decoder_cross_resid_in": ("decoder.block.{l}.layer.0", "output"),
    "decoder_cross_attn_in": ("decoder.block.{l}.layer.1.EncDecAttention", "input"),
    "decoder_cross_queries": ("decoder.block.{l}.layer.1.EncDecAttention.q", "output"),
    "decoder_cross_attn_z": ("decoder.block.{l}.layer.1.EncDecAttention.o", "input"),
    "decoder_cross_attn_out": ("decoder.block.{l}.layer.1.EncDecAttention.o", "output"),
    "decoder_cross_resid_out": ("decoder.block.{l}.layer.1", "output"),
}
BY_HAND = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "gemma"), LLAMA),
    "granite": GRANITE,
    "phi3": PHI3,
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA2),
    "olmo2": OLMO2,
    "cohere": COHERE,
    "mixtral": MIXTRAL,
    "gpt_oss": GPT_OSS,
    "deepseek_v3": DEEPSEEK,
    "qwen3_next": QWEN_NEXT,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "gpt_neox, one after the other": NEOX_IN_TURN,
    "falcon 7b": ONE_KEY_HEAD,
    **dict.fromkeys(("falcon 11b", "falcon 40b"), TWO_KEY_HEADS),
    "falcon rw": EVERY_KEY_HEAD,
    **dict.fromkeys(ENCODERS, BERT),
    "vit": VIT,
    "t5": T5,
}
NUM_KV_HEADS = {
    "falcon 7b": 1,
    "falcon rw": 4,
    **dict.fromkeys(("gpt2", "gpt_neox", "gpt_neox, one after the other", *ENCODERS, "vit", "t5"), 4),
}
SPLIT = ("queries", "keys", "values", "attn_z")


def inputs_of(name):
    """A batch for a model: texts of different lengths, pictures, or texts for an encoder and others for a decoder."""
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))}
    inputs = padded(texts())
    if name == "t5":
        answers = padded(texts((2, 4, 3, 1)))
        del inputs["position_ids"]
        inputs |= {"decoder_input_ids": answers["input_ids"], "decoder_attention_mask": answers["attention_mask"]}
    return inputs


def heads_of(name, site):
    """How many heads a site has side by side; None for those that have none."""
    site = site.removeprefix("encoder_").removeprefix("decoder_").removeprefix("cross_")
    if site not in SPLIT:
        return None
    return NUM_KV_HEADS.get(name, 2) if site in ("keys", "values") else 4


def head_site(site):
    stream = next((stream for stream in ("encoder_", "decoder_") if site.startswith(stream)), "")
    return f"{stream}head_{site.removeprefix(stream)}"


def seen_by_hand(name, model, inputs):
    """Key -> the valid tokens' rows, from hooks as anyone would write them."""
    base, found, handles = model.base_model, {}, []
    for site, (path, side, *take) in BY_HAND[name].items():
        mask = inputs.get("decoder_attention_mask" if site.startswith("decoder_") else "attention_mask")
        for layer in range(2) if "{l}" in path else [None]:
            module = base.get_submodule(path.format(l=layer))

            def see(x, site=site, take=take, mask=mask, layer=layer):
                x = x[0] if isinstance(x, tuple) else x
                x = take[0](x) if take else x
                rows = (x.flatten(0, 1) if mask is None else x[mask.bool()]).clone()
                found[site if layer is None else f"{site}_{layer}"] = rows
                if heads_of(name, site):
                    for head, part in enumerate(rows.unflatten(-1, (heads_of(name, site), -1)).unbind(1)):
                        found[f"{head_site(site)}_L{layer}H{head}"] = part

            if side == "output":
                handles.append(module.register_forward_hook(lambda m, args, out, see=see: see(out)))
            else:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, see=see: see(args[0] if args else kwargs["hidden_states"]),
                        with_kwargs=True,
                    )
                )
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def recorded(name, model, inputs):
    sites = [*BY_HAND[name], *(head_site(site) for site in BY_HAND[name] if heads_of(name, site))]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**inputs)
    return dict(rec.items())


def wrong_keys(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in found if not torch.equal(found[key], expected[key])]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_site_is_what_a_hook_by_hand_sees_bit_for_bit(name):
    model, inputs = build(name), inputs_of(name)
    assert wrong_keys(recorded(name, model, inputs), seen_by_hand(name, model, inputs)) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_point_of_a_family_is_compared_with_a_hook_by_hand(name):
    model = build(name)
    found = families.find_families(model)
    prefixes = [f"{family.stream}_" if family.stream else "" for family in found]
    points = {prefix + point for prefix, family in zip(prefixes, found, strict=True) for point in family.layout.points}
    assert points == BY_HAND[name].keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon 40b", "bert", "roberta", "vit", "t5"])
def test_a_model_without_its_head_has_the_same_sites(name):
    model, inputs = build(name, head=False), inputs_of(name)
    assert wrong_keys(recorded(name, model, inputs), seen_by_hand(name, model, inputs)) == []


def planted(monkeypatch, name, **points):
    """The table with points of one family moved to where they don't belong."""
    layouts = [
        dataclasses.replace(layout, points={**layout.points, **points}) if layout.name == name else layout
        for layout in families.LAYOUTS
    ]
    monkeypatch.setattr(families, "LAYOUTS", tuple(layouts))


def test_hooks_by_hand_find_a_point_that_was_put_in_the_wrong_place(monkeypatch):
    model, inputs = build("llama"), inputs_of("llama")
    planted(monkeypatch, "llama", values=families.Point("{block}.self_attn.k_proj", heads="key"))
    wrong = wrong_keys(recorded("llama", model, inputs), seen_by_hand("llama", model, inputs))
    values = [f"values_{layer}" for layer in range(2)]
    assert wrong == values + [f"head_values_L{layer}H{head}" for layer in range(2) for head in range(2)]


def test_hooks_by_hand_find_projections_that_are_fused_otherwise(monkeypatch):
    model, inputs = build("gpt_neox"), inputs_of("gpt_neox")
    fused = families.LAYOUTS[[layout.name for layout in families.LAYOUTS].index("phi3")].points["keys"].part
    planted(monkeypatch, "gpt_neox", keys=families.Point("{block}.attention.query_key_value", heads="key", part=fused))
    wrong = wrong_keys(recorded("gpt_neox", model, inputs), seen_by_hand("gpt_neox", model, inputs))
    assert {key.rpartition("_")[0] for key in wrong} == {"keys", "head_keys"}


def test_what_a_model_overwrites_is_kept_as_it_was():
    """Falcon adds attn_out to the very tensor that its MLP returned."""
    model, inputs = build("falcon 7b"), {"input_ids": texts((6,))[0][None]}
    overwritten = []
    handle = model.base_model.h[1].mlp.register_forward_hook(
        lambda m, args, out: overwritten.append((out, out.clone()))
    )
    with dc.record(model, dc.Site("mlp_out", layers=[1])) as rec, torch.no_grad():
        model(**inputs)
    handle.remove()
    ((after, before),) = overwritten
    assert torch.equal(rec["mlp_out_1"], before[0]) and not torch.equal(after, before)


# -- what names promise of each other --------------------------------------------------------------------------

USUAL = {
    "resid_in + attn_out = resid_mid": lambda at: (at("resid_in") + at("attn_out"), at("resid_mid")),
    "resid_mid + mlp_out = resid_out": lambda at: (at("resid_mid") + at("mlp_out"), at("resid_out")),
}


def at_once(add):
    """The equation of parallel blocks, in the order in which a model file adds."""
    return {
        "resid_in + attn_out + mlp_out = resid_out": lambda at: (
            add(at("resid_in"), at("attn_out"), at("mlp_out")),
            at("resid_out"),
        )
    }


ACROSS = {
    "resid_in + attn_out = cross_resid_in": lambda at: (at("resid_in") + at("attn_out"), at("cross_resid_in")),
    "cross_resid_in + cross_attn_out = cross_resid_out": lambda at: (
        at("cross_resid_in") + at("cross_attn_out"),
        at("cross_resid_out"),
    ),
    "cross_resid_out + mlp_out = resid_out": lambda at: (at("cross_resid_out") + at("mlp_out"), at("resid_out")),
}
EQUATIONS = {
    **dict.fromkeys((name for name in CONFIGS if name not in ENCODERS), USUAL),
    "cohere": at_once(lambda resid, attn, mlp: resid + attn + mlp),
    "gpt_neox": at_once(lambda resid, attn, mlp: mlp + attn + resid),
    **dict.fromkeys(("falcon 7b", "falcon 11b", "falcon 40b"), at_once(lambda resid, attn, mlp: resid + (mlp + attn))),
}


def broken_equations(name, model, stream=""):
    """Which of the promised equations don't hold to the last bit, in words."""
    equations = ACROSS if stream == "decoder_" else EQUATIONS[name]
    parts = sorted({stream + part for words in equations for part in words.replace("=", "+").split(" + ")})
    with dc.record(model, [*parts, f"{stream}embed"]) as rec, torch.no_grad():
        model(**inputs_of(name))
    pairs = {
        "embed = resid_in_0": (rec[f"{stream}embed"], rec[f"{stream}resid_in_0"]),
        "resid_out_0 = resid_in_1": (rec[f"{stream}resid_out_0"], rec[f"{stream}resid_in_1"]),
    }
    for layer in range(2):
        for words, sides in equations.items():
            pairs[f"{words}, layer {layer}"] = sides(lambda part, layer=layer: rec[f"{stream}{part}_{layer}"])
    return [words for words, (left, right) in pairs.items() if not torch.equal(left, right)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_residual_stream_adds_up(name, dtype):
    model = build(name, dtype=dtype)
    for stream in ("encoder_", "decoder_") if name == "t5" else ("",):
        assert broken_equations(name, model, stream) == []


WRONG_PLACES = {
    "a norm's output for attention's": ("llama", {"attn_out": families.Point("{block}.input_layernorm")}, "attn_out"),
    "no multiplier": ("llama", {"attn_out": families.Point("{block}.self_attn")}, "attn_out"),
    "before the extra norm": ("gemma2", {"mlp_out": families.Point("{block}.mlp")}, "mlp_out"),
    "before the norm of outputs": ("olmo2", {"attn_out": families.Point("{block}.self_attn")}, "attn_out"),
    "attention for the MLP": ("gpt_neox", {"mlp_out": families.Point("{block}.attention")}, "mlp_out"),
}


@pytest.mark.parametrize("mistake", WRONG_PLACES)
def test_the_equations_find_a_point_that_was_put_in_the_wrong_place(mistake, monkeypatch):
    layout, points, part = WRONG_PLACES[mistake]
    name = {"no multiplier": "granite"}.get(mistake, layout)
    planted(monkeypatch, layout, **points)
    broken = [f"{words}, layer {layer}" for layer in range(2) for words in EQUATIONS[name] if part in words]
    assert broken_equations(name, build(name)) == broken != []


@pytest.mark.parametrize(
    ("name", "norm", "last"),
    [
        ("llama", "layers.1.input_layernorm", "norm"),
        ("qwen3", "layers.1.input_layernorm", "norm"),
        ("gemma2", "layers.1.input_layernorm", "norm"),
        ("gpt2", "h.1.ln_1", "ln_f"),
        ("gpt_neox", "layers.1.input_layernorm", "final_layer_norm"),
        ("falcon 40b", "h.1.ln_attn", "ln_f"),
        ("vit", "layers.1.layernorm_before", "layernorm"),
    ],
)
def test_attn_in_is_the_norm_of_resid_in_and_final_norm_out_that_of_the_last_resid_out(name, norm, last):
    model = build(name)
    with dc.record(model, ["resid_in", "attn_in", "resid_out", "final_norm_out"]) as rec, torch.no_grad():
        model(**inputs_of(name))
    base = model.base_model
    with torch.no_grad():
        expected = base.get_submodule(norm)(rec["resid_in_1"])
        final = base.get_submodule(last)(rec["resid_out_1"])
    torch.testing.assert_close(rec["attn_in_1"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rec["final_norm_out"], final, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(rec["attn_in_1"], rec["resid_in_1"])


def test_attention_of_olmo_2_takes_the_stream_as_it_is():
    model = build("olmo2")
    with dc.record(model, ["resid_in", "attn_in"]) as rec, torch.no_grad():
        model(**inputs_of("olmo2"))
    assert torch.equal(rec["attn_in_1"], rec["resid_in_1"])


@pytest.mark.parametrize("name", ENCODERS)
def test_blocks_of_bert_normalise_what_was_added(name):
    model = build(name)
    with dc.record(model, ["embed", "resid_in", "attn_out", "mlp_out", "resid_out"]) as rec, torch.no_grad():
        model(**padded(texts()))
    block = model.base_model.encoder.layer[0]
    with torch.no_grad():
        after_attention = block.attention.output.LayerNorm(rec["resid_in_0"] + rec["attn_out_0"])
        after_mlp = block.output.LayerNorm(after_attention + rec["mlp_out_0"])
    torch.testing.assert_close(rec["resid_out_0"], after_mlp, rtol=1e-6, atol=1e-6)
    assert torch.equal(rec["resid_out_0"], rec["resid_in_1"]) and torch.equal(rec["embed"], rec["resid_in_0"])


ABSENT = {
    ("bert", "resid_mid"): "the family bert has no such point: its blocks normalise after adding",
    ("bert", "final_norm_out"): "the family bert has no such point: its blocks end with their own norm",
    ("gpt_neox", "resid_mid"): "the family gpt_neox has no such point: its blocks add attn_out and mlp_out",
    ("falcon 7b", "resid_mid"): "the family falcon has no such point: its blocks add attn_out and mlp_out",
    ("falcon 7b", "avg_attn_pattern"): "the family falcon has no such point: its attention isn't one that transformers",
    ("falcon rw", "attn_stats"): "the family falcon, one after the other has no such point: .*no more than averages",
    ("deepseek_v3", "values"): "the family deepseek_v3 has no such point: one projection makes both of a latent vector",
    ("mixtral", "mlp_act"): "the family mixtral has no such point: all of its experts are one module",
    ("t5", "decoder_resid_mid"): "the family t5 decoder has no such point: between attn_out and mlp_out",
    ("t5", "decoder_cross_keys"): "the family t5 decoder has no such point: they are of the encoder's tokens",
    ("t5", "decoder_head_cross_keys"): "the family t5 decoder has no such point: they are of the encoder's tokens",
}


@pytest.mark.parametrize(("name", "site"), ABSENT)
def test_a_family_without_a_point_says_why(name, site):
    with pytest.raises(dc.SiteError, match=f"site '{site}': {ABSENT[name, site]}"):
        dc.record(build(name), [site]).__enter__()


# -- torch's own encoder ---------------------------------------------------------------------------------------


def encoder(norm_first=True, batch_first=True, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, norm_first=norm_first, batch_first=batch_first)
        # Nested tensors, where torch makes them: hooks must see padded ones.
        nested = batch_first and not norm_first
        stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32) if norm else None, enable_nested_tensor=nested)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return stack.eval()


def embedded(batch_first=True):
    """Embeddings of texts of lengths 6, 3, 1, 5 and the mask that says which are padding."""
    mask = padded(texts())["attention_mask"].bool()
    x_bsd = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(2))
    return {"src": x_bsd if batch_first else x_bsd.transpose(0, 1), "src_key_padding_mask": ~mask}


EVERY_ENCODER = [(first, batch) for first in (True, False) for batch in (True, False)]


@pytest.mark.parametrize(("norm_first", "batch_first"), EVERY_ENCODER)
def test_blocks_of_torchs_encoder_add_up_whatever_comes_first(norm_first, batch_first):
    stack = encoder(norm_first, batch_first)
    sites = ["resid_in", "attn_in", "attn_out", "mlp_act", "mlp_out", "resid_out", "final_norm_out"]
    with dc.record(stack, sites + ["resid_mid"] * norm_first) as rec, torch.no_grad():
        stack(**embedded(batch_first))
    x = embedded()
    assert torch.equal(rec["resid_in_0"], x["src"][~x["src_key_padding_mask"]])
    assert torch.equal(rec["resid_in_1"], rec["resid_out_0"])
    for n, layer in enumerate(stack.layers):
        resid_in, attn_out, mlp_out = (rec[f"{site}_{n}"] for site in ("resid_in", "attn_out", "mlp_out"))
        with torch.no_grad():
            torch.testing.assert_close(mlp_out, layer.linear2(rec[f"mlp_act_{n}"]), rtol=1e-5, atol=1e-5)
            if norm_first:
                assert torch.equal(resid_in + attn_out, rec[f"resid_mid_{n}"])
                assert torch.equal(rec[f"resid_mid_{n}"] + mlp_out, rec[f"resid_out_{n}"])
                torch.testing.assert_close(rec[f"attn_in_{n}"], layer.norm1(resid_in), rtol=1e-5, atol=1e-5)
            else:
                resid_out = layer.norm2(layer.norm1(resid_in + attn_out) + mlp_out)
                torch.testing.assert_close(rec[f"resid_out_{n}"], resid_out, rtol=1e-5, atol=1e-5)
                assert torch.equal(rec[f"attn_in_{n}"], resid_in)
    with torch.no_grad():
        torch.testing.assert_close(rec["final_norm_out"], stack.norm(rec["resid_out_1"]), rtol=1e-5, atol=1e-5)


def test_torchs_encoder_within_a_model_is_found_and_says_what_it_lacks():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.trunk, self.out = nn.Embedding(64, 32), encoder(norm=False), nn.Linear(32, 3)

        def forward(self, input_ids, attention_mask):
            x = self.trunk(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
            return self.out(x.mean(1))

    model, inputs = Classifier().eval(), padded(texts())
    with dc.record(model, ["resid_out"]) as rec, torch.no_grad():
        model(inputs["input_ids"], inputs["attention_mask"])
    assert [tuple(rows.shape) for rows in rec.values()] == [(15, 32)] * 2
    for site, why in {
        "final_norm_out": "this model has no trunk.norm",
        "queries": "nn.MultiheadAttention computes them in one function",
        "pattern": "its attention isn't one that transformers hands out",
        "embed": "embeddings are its input: take resid_in of layer 0",
    }.items():
        with pytest.raises(dc.SiteError, match=f"site '{site}': the family nn.TransformerEncoder has no .*: {why}"):
            dc.record(model, [site]).__enter__()


def test_an_encoder_layer_of_ones_own_is_not_taken_for_torchs():
    class Scaled(nn.TransformerEncoderLayer):
        def forward(self, src, **kwargs):
            return 0.5 * super().forward(src, **kwargs)

    stack = nn.TransformerEncoder(Scaled(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False)
    with pytest.raises(dc.SiteError, match="none of the families"):
        dc.record(stack, ["resid_out"]).__enter__()


# -- patterns --------------------------------------------------------------------------------------------------


def patterns_alone(name, model):
    """Stream -> layer -> each text's attention [heads, L, L], as transformers gives it for that text alone."""
    inputs, found = inputs_of(name), {}
    for b in range(4):
        one = {key: value[b : b + 1] for key, value in inputs.items()}
        for stream in ("decoder_", "") if name == "t5" else ("",):
            if f"{stream}attention_mask" in one:
                length = int(one[f"{stream}attention_mask"].sum())
                cut = [key for key in one if key.startswith("decoder_") == (stream == "decoder_")]
                one |= {key: one[key][:, :length] for key in cut}
        with torch.no_grad():
            out = model(**one, output_attentions=True)
        streams = {"": out.attentions} if name != "t5" else {}
        if name == "t5":
            streams = {"encoder_": out.encoder_attentions, "decoder_": out.decoder_attentions}
        for stream, attentions in streams.items():
            for layer, pattern_1hll in enumerate(attentions):
                found.setdefault((stream, layer), []).append(pattern_1hll[0])
    return found


def wrong_patterns(name, model):
    alone = patterns_alone(name, model)
    sites = [f"{stream}pattern" for stream in dict.fromkeys(stream for stream, _ in alone)]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**inputs_of(name))
    assert len(rec) == 4 * len(alone)
    return [
        key
        for (stream, layer), patterns in alone.items()
        for head in range(4)
        for key in [f"{stream}pattern_L{layer}H{head}"]
        for found, expected in [(rec[key], [pattern_hll[head] for pattern_hll in patterns])]
        if any(x.shape != y.shape or not torch.allclose(x, y, atol=1e-5) for x, y in zip(found, expected, strict=True))
    ]


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("falcon")])
def test_a_text_has_the_pattern_in_a_batch_that_it_has_alone(name):
    assert wrong_patterns(name, build(name, attn_implementation="eager")) == []


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "vit", "t5"])
def test_averaged_patterns_are_those_of_texts_alone_over_the_texts_that_have_a_query(name):
    model = build(name, attn_implementation="eager")
    alone = patterns_alone(name, model)
    sites = [f"{stream}avg_attn_pattern" for stream in dict.fromkeys(stream for stream, _ in alone)]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**inputs_of(name))
    for (stream, layer), patterns in alone.items():
        size = max(pattern_hll.shape[-1] for pattern_hll in patterns)
        total_hss, num_texts_s = torch.zeros(4, size, size), torch.zeros(size)
        for pattern_hll in patterns:
            length = pattern_hll.shape[-1]
            total_hss[:, :length, :length] += pattern_hll
            num_texts_s[:length] += 1
        for head in range(4):
            found, expected = rec[f"{stream}avg_attn_pattern_L{layer}H{head}"], total_hss[head] / num_texts_s[:, None]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_patterns_of_another_model_are_told_apart(monkeypatch):
    other = build("granite", attn_implementation="eager", attention_multiplier=0.3)
    alone = patterns_alone("granite", build("granite", attn_implementation="eager"))
    monkeypatch.setitem(globals(), "patterns_alone", lambda name, model: alone)
    assert len(wrong_patterns("granite", other)) == 8


# -- logits ----------------------------------------------------------------------------------------------------

WITH_LOGITS = [name for name in CONFIGS if name != "vit"]


def logits_and_unembedded(name, model, layer=1):
    """The model's logits of valid tokens, and what unembed makes of the residual stream after a layer."""
    site, inputs = "decoder_resid_out" if name == "t5" else "resid_out", inputs_of(name)
    with dc.record(model, [site]) as rec, torch.no_grad():
        logits = model(**inputs).logits
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    with torch.no_grad():
        return logits[mask], dc.unembed(model)(rec[f"{site}_{layer}"])


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_the_last_residual_stream_unembeds_to_the_models_own_logits(name):
    logits, found = logits_and_unembedded(name, build(name))
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2", "bert"])
def test_an_earlier_residual_stream_has_other_logits(name):
    logits, found = logits_and_unembedded(name, build(name), layer=0)
    assert found.shape == logits.shape and not torch.allclose(found, logits, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
        ("t5", {"scale_decoder_outputs": False}),
    ],
)
def test_logits_without_what_a_model_does_to_them_are_found_out(name, extra):
    model = build(name)
    site, inputs = "decoder_resid_out" if name == "t5" else "resid_out", inputs_of(name)
    with dc.record(model, [site]) as rec, torch.no_grad():
        logits = model(**inputs).logits[inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()]
    for attribute, value in extra.items():
        setattr(model.config, attribute, value)
    with torch.no_grad():
        assert not torch.allclose(dc.unembed(model)(rec[f"{site}_1"]), logits, atol=1e-2)


def test_unembedding_takes_any_leading_dims_and_passes_gradients_on():
    model, x = build("llama", dtype=torch.bfloat16), torch.randn(2, 3, 32, requires_grad=True)
    logits = dc.unembed(model)(x)
    assert logits.shape == (2, 3, 64) and logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert x.grad.shape == x.shape and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: build("llama", head=False), "LlamaModel has no output embedding .* AutoModelForCausalLM"),
        (lambda: build("vit"), "ViTForImageClassification has no output embedding"),
        (lambda: encoder(), "TransformerEncoder has no output embedding"),
        (lambda: nn.Linear(2, 2), "Linear, whose structure is none of the families"),
    ],
    ids=["without a head", "pictures", "torch's encoder", "no family"],
)
def test_a_model_that_has_no_logits_says_so(model, text):
    with pytest.raises(dc.SiteError, match=text):
        dc.unembed(model())


# -- what is no family of the table ----------------------------------------------------------------------------

EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
# Each keeps blocks of the same names as a family of the table, or nearly, and computes something else.
STRANGERS = {
    "Qwen 3, with experts in one layer": ("Qwen3MoeConfig", {**LLAMA_LIKE, **EXPERTS, "mlp_only_layers": [0]}),
    "Doge, which weighs the residual stream": ("DogeConfig", LLAMA_LIKE),
    "GPT-BigCode, with one key head": ("GPTBigCodeConfig", CONFIGS["gpt2"][1]),
    "Beam, which scales by depth": ("BeamConfig", {**LLAMA_LIKE, "head_dim": 8}),
    "X-MOD, with adapters for languages": ("XmodConfig", {**WIDTH, **WORDS}),
    "BLOOM, whose parts return the sum": ("BloomConfig", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "Phi 2, with parallel blocks": ("PhiConfig", LLAMA_LIKE),
    "GPT-2 with cross-attention": ("GPT2Config", {**CONFIGS["gpt2"][1], "add_cross_attention": True}),
    "ELECTRA, which projects embeddings": ("ElectraConfig", {**WIDTH, **WORDS, "embedding_size": 16}),
    "MiniCPM 3, which scales what it adds": ("MiniCPM3Config", {**LLAMA_LIKE, "num_key_value_heads": 4}),
    "RoBERTa that normalises first": ("RobertaPreLayerNormConfig", {**WIDTH, **WORDS}),
}


def on_meta(config_class, options):
    with torch.device("meta"):
        return transformers.AutoModel.from_config(getattr(transformers, config_class)(**options))


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_model_that_only_looks_like_a_family_is_not_taken_for_it(stranger):
    model = on_meta(*STRANGERS[stranger])
    with pytest.raises(dc.SiteError, match=r"site 'resid_out' is no module of .* none of the families") as caught:
        dc.record(model, ["resid_out"]).__enter__()
    assert type(model).__name__ in str(caught.value)
    # Its modules can be named by their paths.
    blocks = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    with dc.record(model, {"resid_out_{layer}": f"{blocks}.{{layer}}"}) as rec:
        assert len(rec) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_of_one_family_alone(name):
    found = families.find_families(build(name))
    assert [family.stream for family in found] == (["encoder", "decoder"] if name == "t5" else [None])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon 7b", "olmo2", "vit"])
@pytest.mark.parametrize("where", ["block", "root"])
def test_one_more_child_or_a_number_of_its_own_makes_another_family(name, where):
    for change in ("child", "number"):
        model = build(name)
        (family,) = families.find_families(model)
        module = model.get_submodule(family.path("{block}", 1) if where == "block" else family.path("{root}"))
        if change == "child":
            module.adapter = nn.Linear(32, 32)
        else:
            module.layer_scale = 0.5
        assert families.find_families(model) == []


def test_an_adapter_around_a_projection_leaves_the_family():
    class Adapted(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.down, self.up = base_layer, nn.Linear(32, 2), nn.Linear(2, 96)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    model, inputs = build("gpt2"), inputs_of("gpt2")
    for block in model.transformer.h:
        block.attn.c_attn = Adapted(block.attn.c_attn)
    assert wrong_keys(recorded("gpt2", model, inputs), seen_by_hand("gpt2", model, inputs)) == []


def test_stacks_that_share_an_embedding_have_each_its_own():
    model, inputs = build("t5"), inputs_of("t5")
    model.set_input_embeddings(model.shared)
    assert model.encoder.embed_tokens is model.decoder.embed_tokens
    sites = [f"{stream}_{site}" for stream in ("encoder", "decoder") for site in ("embed", "resid_in")]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**inputs)
    for stream in ("encoder", "decoder"):
        assert torch.equal(rec[f"{stream}_embed"], rec[f"{stream}_resid_in_0"])
    assert len(rec["encoder_embed"]) == 15 and len(rec["decoder_embed"]) == 10


def test_two_stacks_of_blocks_are_told_apart_by_the_user():
    two = nn.ModuleDict({"query": build("bert", head=False), "passage": build("bert", head=False)})
    with pytest.raises(
        dc.SiteError, match=r"several stacks of blocks \(bert at 'query.encoder.layer.0', bert at 'passa"
    ):
        dc.record(two, ["resid_out"]).__enter__()
    with dc.record(two["query"], ["resid_out"]) as rec, torch.no_grad():
        two["query"](**padded(texts()))
    assert list(rec) == ["resid_out_0", "resid_out_1"]


def test_the_sides_of_an_encoder_decoder_are_named_apart():
    with pytest.raises(dc.SiteError, match=r"say which, as in 'encoder_resid_out' or 'decoder_resid_out'"):
        dc.record(build("t5"), ["resid_out"]).__enter__()
    with pytest.raises(dc.SiteError, match=r"no named site of the family t5 decoder: expected one of decoder_embed, "):
        dc.record(build("t5"), ["decoder_resid_outt"]).__enter__()


def test_an_encoder_alone_has_names_without_a_side():
    model, inputs = build("t5").get_encoder(), padded(texts())
    del inputs["position_ids"]
    with dc.record(model, ["resid_mid", "avg_attn_pattern"]) as rec, torch.no_grad():
        model(**inputs)
    assert rec["resid_mid_1"].shape == (15, 32) and rec["avg_attn_pattern_L1H3"].shape == (6, 6)


@pytest.mark.parametrize("name", ["resid_outt", "head_mlp_out", "head_resid_out"])
def test_an_unknown_name_is_answered_with_those_that_are_known(name):
    with pytest.raises(dc.SiteError, match=rf"site '{name}' is no module of the model and no named site") as caught:
        dc.record(build("llama"), [name]).__enter__()
    for known in ("resid_mid", "head_values", "avg_attn_pattern"):
        assert known in str(caught.value)
