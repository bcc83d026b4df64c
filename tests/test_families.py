"""Named sites are what hooks written by hand on the same module see, and what their names promise of each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import CONFIGS, ENCODERS, WIDTH, WORDS, build, padded, texts
from torch import nn

import distcache as dc
from distcache import families

transformers = pytest.importorskip("transformers")

# Where a hook by hand goes: (module from the base model, side of it, which third of its last dim). Written from the
# model files, not from the table under test. `{l}`: a layer.
LLAMA = {
    "embed": ("embed_tokens", "output", None),
    "resid_in": ("layers.{l}", "input", None),
    "attn_in": ("layers.{l}.self_attn", "input", None),
    "queries": ("layers.{l}.self_attn.q_proj", "output", None),
    "keys": ("layers.{l}.self_attn.k_proj", "output", None),
    "values": ("layers.{l}.self_attn.v_proj", "output", None),
    "attn_z": ("layers.{l}.self_attn.o_proj", "input", None),
    "attn_out": ("layers.{l}.self_attn.o_proj", "output", None),
    "resid_mid": ("layers.{l}.post_attention_layernorm", "input", None),
    "mlp_act": ("layers.{l}.mlp.down_proj", "input", None),
    "mlp_out": ("layers.{l}.mlp.down_proj", "output", None),
    "resid_out": ("layers.{l}", "output", None),
    "final_norm_out": ("norm", "output", None),
}
GPT2 = {
    "embed": ("drop", "output", None),
    "resid_in": ("h.{l}.ln_1", "input", None),
    "attn_in": ("h.{l}.attn.c_attn", "input", None),
    "queries": ("h.{l}.attn.c_attn", "output", 0),
    "keys": ("h.{l}.attn.c_attn", "output", 1),
    "values": ("h.{l}.attn.c_attn", "output", 2),
    "attn_z": ("h.{l}.attn.c_proj", "input", None),
    "attn_out": ("h.{l}.attn.resid_dropout", "output", None),
    "resid_mid": ("h.{l}.ln_2", "input", None),
    "mlp_act": ("h.{l}.mlp.act", "output", None),
    "mlp_out": ("h.{l}.mlp.dropout", "output", None),
    "resid_out": ("h.{l}", "output", None),
    "final_norm_out": ("ln_f", "output", None),
}
BERT = {
    "embed": ("embeddings.dropout", "output", None),
    "resid_in": ("encoder.layer.{l}", "input", None),
    "attn_in": ("encoder.layer.{l}.attention", "input", None),
    "queries": ("encoder.layer.{l}.attention.self.query", "output", None),
    "keys": ("encoder.layer.{l}.attention.self.key", "output", None),
    "values": ("encoder.layer.{l}.attention.self.value", "output", None),
    "attn_z": ("encoder.layer.{l}.attention.output", "input", None),
    "attn_out": ("encoder.layer.{l}.attention.output.dense", "output", None),
    "mlp_act": ("encoder.layer.{l}.intermediate", "output", None),
    "mlp_out": ("encoder.layer.{l}.output.dense", "output", None),
    "resid_out": ("encoder.layer.{l}.output", "output", None),
}
BY_HAND = {**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA), "gpt2": GPT2} | dict.fromkeys(ENCODERS, BERT)
NUM_HEADS = {name: 4 for name in CONFIGS}
NUM_KV_HEADS = {name: 2 if BY_HAND[name] is LLAMA else 4 for name in CONFIGS}
HEADS = {"queries": NUM_HEADS, "keys": NUM_KV_HEADS, "values": NUM_KV_HEADS, "attn_z": NUM_HEADS}


def seen_by_hand(name, model, inputs):
    """Key -> the valid tokens' rows, from hooks as anyone would write them."""
    base, mask, found, handles = model.base_model, inputs["attention_mask"].bool(), {}, []
    for site, (path, side, third) in BY_HAND[name].items():
        for layer in range(2) if "{l}" in path else [None]:
            key = site if layer is None else f"{site}_{layer}"
            module = base.get_submodule(path.format(l=layer))

            def see(x, key=key, third=third, site=site, layer=layer):
                x = x[0] if isinstance(x, tuple) else x
                x = x if third is None else x[..., 32 * third : 32 * (third + 1)]
                found[key] = x[mask].clone()
                if site in HEADS:
                    heads = HEADS[site][name]
                    for head, part in enumerate(found[key].reshape(int(mask.sum()), heads, -1).unbind(1)):
                        found[f"head_{site}_L{layer}H{head}"] = part

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
    sites = [*BY_HAND[name], *(f"head_{site}" for site in HEADS)]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**inputs)
    return dict(rec.items())


def wrong_keys(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in found if not torch.equal(found[key], expected[key])]


@pytest.mark.parametrize("head", [True, False], ids=["with LM head", "without"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_site_is_what_a_hook_by_hand_sees_bit_for_bit(name, head):
    model, inputs = build(name, head=head), padded(texts())
    assert wrong_keys(recorded(name, model, inputs), seen_by_hand(name, model, inputs)) == []


def planted(monkeypatch, name, **points):
    """The table with points of one family moved to where they don't belong."""
    layouts = [
        dataclasses.replace(layout, points={**layout.points, **points}) if layout.name == name else layout
        for layout in families.LAYOUTS
    ]
    monkeypatch.setattr(families, "LAYOUTS", tuple(layouts))


def test_hooks_by_hand_find_a_point_that_was_put_in_the_wrong_place(monkeypatch):
    model, inputs = build("llama"), padded(texts())
    planted(monkeypatch, "llama", values=families.Point("{block}.self_attn.k_proj", heads="key"))
    wrong = wrong_keys(recorded("llama", model, inputs), seen_by_hand("llama", model, inputs))
    values = [f"values_{layer}" for layer in range(2)]
    assert wrong == values + [f"head_values_L{layer}H{head}" for layer in range(2) for head in range(2)]


def broken_equations(model, inputs):
    """Which of the promised equations don't hold to the last bit, in words."""
    sites = ["embed", "resid_in", "attn_out", "resid_mid", "mlp_out", "resid_out"]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**inputs)
    equations = {"embed = resid_in_0": (rec["embed"], rec["resid_in_0"])}
    for n in range(2):
        equations[f"resid_in_{n} + attn_out_{n} = resid_mid_{n}"] = (
            rec[f"resid_in_{n}"] + rec[f"attn_out_{n}"],
            rec[f"resid_mid_{n}"],
        )
        equations[f"resid_mid_{n} + mlp_out_{n} = resid_out_{n}"] = (
            rec[f"resid_mid_{n}"] + rec[f"mlp_out_{n}"],
            rec[f"resid_out_{n}"],
        )
    equations["resid_out_0 = resid_in_1"] = (rec["resid_out_0"], rec["resid_in_1"])
    return [equation for equation, (left, right) in equations.items() if not torch.equal(left, right)]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ENCODERS])
def test_the_residual_stream_adds_up(name):
    assert broken_equations(build(name), padded(texts())) == []


def test_the_equations_find_a_point_that_was_put_in_the_wrong_place(monkeypatch):
    planted(monkeypatch, "llama", attn_out=families.Point("{block}.input_layernorm"))
    assert broken_equations(build("llama"), padded(texts())) == [
        f"resid_in_{n} + attn_out_{n} = resid_mid_{n}" for n in range(2)
    ]


@pytest.mark.parametrize(
    ("name", "norm"),
    [("llama", "layers.1.input_layernorm"), ("qwen3", "layers.1.input_layernorm"), ("gpt2", "h.1.ln_1")],
)
def test_attn_in_is_the_norm_of_resid_in_and_final_norm_out_that_of_the_last_resid_out(name, norm):
    model = build(name)
    with dc.record(model, ["resid_in", "attn_in", "resid_out", "final_norm_out"]) as rec, torch.no_grad():
        model(**padded(texts()))
    base = model.base_model
    with torch.no_grad():
        expected = base.get_submodule(norm)(rec["resid_in_1"])
        last = (base.ln_f if name == "gpt2" else base.norm)(rec["resid_out_1"])
    torch.testing.assert_close(rec["attn_in_1"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rec["final_norm_out"], last, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(rec["attn_in_1"], rec["resid_in_1"])


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


@pytest.mark.parametrize("site", ["resid_mid", "final_norm_out"])
def test_a_family_without_a_point_says_why(site):
    with pytest.raises(dc.SiteError, match=rf"site '{site}': the family bert has no such point: its blocks"):
        dc.record(build("bert"), [site]).__enter__()


# -- what is no family of the table ----------------------------------------------------------------------------

LLAMA_LIKE = {**WIDTH, **WORDS, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
# Each keeps blocks of the same names as a family of the table, or nearly, and computes something else.
STRANGERS = {
    "Granite, which scales what is added": ("GraniteConfig", {**LLAMA_LIKE, "residual_multiplier": 0.5}),
    "Granite, which scales embeddings": ("GraniteConfig", {**LLAMA_LIKE, "embedding_multiplier": 12.0}),
    "Gemma 2, with extra norms": ("Gemma2Config", {**LLAMA_LIKE, "head_dim": 8}),
    "OLMo 2, which normalises outputs": ("Olmo2Config", LLAMA_LIKE),
    "Phi-3, with fused projections": ("Phi3Config", LLAMA_LIKE),
    "Cohere, with parallel blocks": ("CohereConfig", LLAMA_LIKE),
    "Mixtral, with routed experts": ("MixtralConfig", {**LLAMA_LIKE, "num_local_experts": 2}),
    "Qwen 3, with experts in one layer": ("Qwen3MoeConfig", {**LLAMA_LIKE, **EXPERTS, "mlp_only_layers": [0]}),
    "Doge, which weighs the residual stream": ("DogeConfig", LLAMA_LIKE),
    "GPT-BigCode, with one key head": ("GPTBigCodeConfig", CONFIGS["gpt2"][1]),
    "ELECTRA, which projects embeddings": ("ElectraConfig", {**WIDTH, **WORDS, "embedding_size": 16}),
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


def test_granite_without_multipliers_is_a_llama():
    model = on_meta("GraniteConfig", LLAMA_LIKE)
    assert families.find_family(model, families.named_modules(model), "resid_out").name == "llama"


def test_two_stacks_of_blocks_are_told_apart_by_the_user():
    two = nn.ModuleDict({"query": build("bert", head=False), "passage": build("bert", head=False)})
    with pytest.raises(
        dc.SiteError, match=r"several stacks of blocks \(bert at 'query.encoder.layer.0', bert at 'passa"
    ):
        dc.record(two, ["resid_out"]).__enter__()
    with dc.record(two["query"], ["resid_out"]) as rec, torch.no_grad():
        two["query"](**padded(texts()))
    assert list(rec) == ["resid_out_0", "resid_out_1"]


def test_an_encoder_decoder_is_recorded_one_part_at_a_time():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    )
    model = transformers.AutoModel.from_config(config).eval()
    with pytest.raises(dc.SiteError, match=r"each with a mask of its own: record one of them"):
        dc.record(model, {"out_{layer}": "encoder.block.{layer}"}).__enter__()
    inputs = padded(texts())
    del inputs["position_ids"]
    with dc.record(model.get_encoder(), {"out_{layer}": "block.{layer}"}) as rec, torch.no_grad():
        model(**inputs, decoder_input_ids=inputs["input_ids"])
    assert rec["out_1"].shape == (15, 32)


@pytest.mark.parametrize("name", ["resid_outt", "head_mlp_out", "head_resid_out"])
def test_an_unknown_name_is_answered_with_those_that_are_known(name):
    with pytest.raises(dc.SiteError, match=rf"site '{name}' is no module of the model and no named site") as caught:
        dc.record(build("llama"), [name]).__enter__()
    for known in ("resid_mid", "head_values", "avg_attn_pattern"):
        assert known in str(caught.value)
