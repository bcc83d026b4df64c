"""Averaged attention patterns equal those that the model's eager attention gives, text by text.

The oracle is transformers: eager mode, `output_attentions=True`, one unpadded text at a time, averaged here
by hand. Texts have different lengths, because an average that counts padding passes on equal ones.
"""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack, suppress

import pytest
import torch
from tiny import LATENT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distcache.attention import AttentionCall, blockwise, reference, tap_attention
from distcache.errors import SiteError

transformers = pytest.importorskip("transformers")

# float32 on both sides, where an average is of probabilities, so of at most 1. Seen: 3e-7.
TOLERANCE = dict(atol=2e-6, rtol=0.0)

RNG = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 64, (length,), generator=RNG) for length in (12, 7, 5, 1)]
SIZE = 12

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(**SHAPE, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0)
# Per family: config class, config, class of the modules that attend.
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED, "LlamaAttention"),
    "qwen2": ("Qwen2Config", GROUPED, "Qwen2Attention"),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}, "MistralAttention"),
    "gemma2": (
        "Gemma2Config",
        {**GROUPED, "sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        "Gemma2Attention",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**GROUPED, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        "GptOssAttention",
    ),
    "deepseek_v3": ("DeepseekV3Config", {**SHAPE, **LATENT}, "DeepseekV3Attention"),
    "gpt_neox": ("GPTNeoXConfig", {**SHAPE, "max_position_embeddings": 64}, "GPTNeoXAttention"),
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, scale_attn_by_inverse_layer_idx=True),
        "GPT2Attention",
    ),
    "bert": ("BertConfig", {**SHAPE, "max_position_embeddings": 64}, "BertSelfAttention"),
    "t5": (
        "T5Config",
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "T5Attention",
    ),
}
# sdpa refuses a softcap (gemma2) and knows no sinks (gpt_oss).
CASES = [(f, "eager") for f in FAMILIES] + [(f, "sdpa") for f in FAMILIES if f not in ("gemma2", "gpt_oss")]
SINKS = {"gpt_oss"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _the_class_is_left_as_it_was():
    before = dict(vars(transformers.AttentionInterface))
    yield
    assert dict(vars(transformers.AttentionInterface)) == before


def build(family, implementation, dtype=torch.float32):
    """A tiny model with random weights, the same for every implementation, in evaluation mode."""
    config_class, options, _ = FAMILIES[family]
    config = getattr(transformers, config_class)(**options)
    auto = transformers.T5EncoderModel._from_config if family == "t5" else transformers.AutoModel.from_config
    model = auto(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that patterns are far from uniform, where any mistake would look right.
            parameter.normal_(0.0, 0.2, generator=generator)
    return model.to(dtype)


def attending(model, family):
    return [module for module in model.modules() if type(module).__name__ == FAMILIES[family][2]]


def batch(texts, side):
    """(model inputs, spans) of texts padded on one side."""
    size = max(map(len, texts))
    input_ids = torch.zeros(len(texts), size, dtype=torch.long)
    mask = torch.zeros(len(texts), size, dtype=torch.long)
    spans = []
    for b, text in enumerate(texts):
        start = 0 if side == "right" else size - len(text)
        spans.append((start, start + len(text)))
        input_ids[b, slice(*spans[b])] = text
        mask[b, slice(*spans[b])] = 1
    return dict(input_ids=input_ids, attention_mask=mask), spans


def run(model, family, inputs):
    """Hidden states. Positions count from each text's first token, as in `generate`."""
    if family != "t5":  # relative positions, and no such argument
        inputs = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def averages(model, family, inputs, spans, counts=None):
    """Per layer, what the code under test says: the sum of patterns over how many texts have each query."""
    layers = {id(module): layer for layer, module in enumerate(attending(model, family))}
    sums = {}

    def add(call):
        sums[layers[id(call.module)]] = blockwise.pattern_sum(call, spans, SIZE, block=5)

    with tap_attention(attending(model, family), add):
        run(model, family, inputs)
    if counts is None:
        counts = sum((torch.arange(SIZE) < stop - start).long() for start, stop in spans)
    return torch.stack([sums[layer] for layer in range(len(layers))]) / counts.clamp(min=1)[:, None]


def averages_by_hand(family, texts=TEXTS):
    """Per layer, from eager attention on one unpadded text at a time: the oracle."""
    model = build(family, "eager")
    totals, counts = 0.0, torch.zeros(SIZE)
    for text in texts:
        with torch.no_grad():
            patterns = model(input_ids=text[None], output_attentions=True).attentions
        padding = (0, SIZE - len(text), 0, SIZE - len(text))
        totals = totals + torch.stack([nn.functional.pad(p[0].double(), padding) for p in patterns])
        counts[: len(text)] += 1
    return totals / counts[:, None].double()


# -- what the averages are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_averages_of_a_padded_batch_equal_eager_attention_on_single_texts(family, implementation, side):
    inputs, spans = batch(TEXTS, side)
    found = averages(build(family, implementation), family, inputs, spans)
    torch.testing.assert_close(found, averages_by_hand(family).float(), **TOLERANCE)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_averages_of_texts_of_one_length_without_a_mask_equal_eager_attention(family, implementation):
    texts = [text[:5] for text in TEXTS[:3]]
    inputs, spans = batch(texts, "right")
    found = averages(build(family, implementation), family, inputs, spans)[..., :5, :5]
    torch.testing.assert_close(found, averages_by_hand(family, texts)[..., :5, :5].float(), **TOLERANCE)


@pytest.mark.parametrize("mistake", ["padding counts", "the batch is the count"])
def test_the_oracle_fails_on_a_planted_mistake(mistake):
    inputs, spans = batch(TEXTS, "right")
    if mistake == "padding counts":
        spans = [(0, SIZE)] * len(TEXTS)
    counts = torch.full((SIZE,), len(TEXTS))
    found = averages(build("llama", "sdpa"), "llama", inputs, spans, counts=counts)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, averages_by_hand("llama").float(), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_an_average_sums_to_one_unless_a_sink_takes_its_share(family):
    inputs, spans = batch(TEXTS, "left")
    rows = averages(build(family, "eager"), family, inputs, spans).sum(-1)
    if family in SINKS:
        assert (rows < 1).all()
    else:
        torch.testing.assert_close(rows, torch.ones_like(rows), **TOLERANCE)


def test_the_pattern_of_one_sample_is_that_of_its_text_alone():
    model, patterns = build("llama", "sdpa"), []
    inputs, spans = batch(TEXTS, "left")
    with tap_attention(attending(model, "llama"), lambda call: patterns.append(blockwise.pattern(call, spans, 1))):
        run(model, "llama", inputs)
    expected = build("llama", "eager")(input_ids=TEXTS[1][None], output_attentions=True).attentions
    torch.testing.assert_close(torch.stack(patterns), torch.cat(expected).detach(), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_patterns_of_their_q_and_k_without_rounding_again(dtype):
    model, calls = build("llama", "sdpa", dtype), []
    with tap_attention(attending(model, "llama"), calls.append):
        run(model, "llama", batch(TEXTS[:1], "right")[0])
    for call in calls:
        assert call.query_bhqd.dtype == dtype
        scores = call.query_bhqd.double() @ call.key_bhkd.double().repeat_interleave(2, 1).mT / 8**0.5
        expected = scores.masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf).softmax(-1).sum(0)
        found = blockwise.pattern_sum(call, [(0, 12)], 12)
        torch.testing.assert_close(found, expected.float(), **TOLERANCE)


# -- the model is left alone -------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_outputs_are_the_same_bits_with_and_without_a_tap(family, implementation):
    model = build(family, implementation)
    inputs, spans = batch(TEXTS, "left")
    config = model.config.to_json_string()
    without = run(model, family, inputs)
    with tap_attention(attending(model, family), lambda call: blockwise.pattern_sum(call, spans, SIZE)):
        assert torch.equal(run(model, family, inputs), without)
    assert torch.equal(run(model, family, inputs), without)
    assert model.config.to_json_string() == config


@pytest.mark.parametrize("who", ["the block", "the callback"])
def test_the_interface_is_restored_after_an_exception(who):
    model, before = build("llama", "sdpa"), dict(vars(transformers.AttentionInterface))

    def on_call(call):
        if who == "the callback":
            raise RuntimeError("boom")

    def body():
        run(model, "llama", batch(TEXTS, "right")[0])
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), tap_attention(attending(model, "llama"), on_call):
        body()
    assert dict(vars(transformers.AttentionInterface)) == before


def test_overlapping_taps_see_their_own_modules_whichever_closes_first():
    one, two = build("llama", "sdpa"), build("gpt2", "sdpa")
    inputs, seen = batch(TEXTS, "right")[0], {"one": 0, "two": 0}

    def count(name):
        return lambda call: seen.__setitem__(name, seen[name] + 1)

    first, second = ExitStack(), ExitStack()
    first.enter_context(tap_attention(attending(one, "llama"), count("one")))
    second.enter_context(tap_attention(attending(two, "gpt2"), count("two")))
    run(one, "llama", inputs)
    first.close()
    run(one, "llama", inputs)
    run(two, "gpt2", inputs)
    second.close()
    run(two, "gpt2", inputs)
    assert seen == {"one": 2, "two": 2}


def test_two_taps_on_one_module_each_see_each_call_once():
    model, outer, inner = build("llama", "sdpa"), [], []
    with tap_attention(attending(model, "llama"), outer.append):
        with tap_attention(attending(model, "llama")[:1], inner.append):
            run(model, "llama", batch(TEXTS, "right")[0])
        run(model, "llama", batch(TEXTS, "right")[0])
    assert (len(outer), len(inner)) == (4, 1)


def test_taps_in_several_threads_do_not_mix():
    families = ["llama", "gpt2", "bert", "qwen2"]
    models = [build(family, "sdpa") for family in families]
    inputs = batch(TEXTS, "right")[0]
    seen = {family: [] for family in families}
    ready = threading.Barrier(len(families))

    def work(family, model):
        ready.wait()
        for _ in range(3):
            with tap_attention(attending(model, family), lambda call: seen[family].append(call.module)):
                run(model, family, inputs)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(families, models, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for family, model in zip(families, models, strict=True):
        assert seen[family] == attending(model, family) * 3


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_recomputation_in_backward_is_not_a_call():
    model, calls = build("llama", "sdpa").train(), []
    model.gradient_checkpointing_enable()
    with tap_attention(attending(model, "llama"), calls.append):
        model(**batch(TEXTS, "right")[0]).last_hidden_state.sum().backward()
    assert len(calls) == 2
    assert model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_function_taken_while_a_tap_was_open_equals_the_real_one_and_passes_through_later():
    interface, calls = transformers.AttentionInterface(), []
    real, module = interface["sdpa"], nn.Identity()
    with tap_attention([module], calls.append):
        taken = interface["sdpa"]
        assert taken == real == taken and {taken: 1}[real] == 1
        assert interface.get_interface("sdpa", None) == real
    x = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(taken(module, x, x, x, None)[0], real(module, x, x, x, None)[0])
    assert calls == []


def test_functions_taken_by_index_are_tapped_once_and_see_keyword_arguments():
    interface, calls, module = transformers.AttentionInterface(), [], nn.Identity()
    x = torch.randn(1, 2, 3, 4)
    with tap_attention([module], calls.append):
        interface["sdpa"](module, query=x, key=x, value=x, attention_mask=None, is_causal=False)
        interface.get_interface("sdpa", None)(module, x, x, x, None)
    assert [call.is_causal for call in calls] == [False, True]
    assert [call.scaling for call in calls] == [0.5, 0.5]


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"distcache\[hf\]"), tap_attention([], print):
        pass


def test_what_sdpa_ignores_is_ignored():
    interface, calls, module = transformers.AttentionInterface(), [], nn.Identity()
    q, k, values = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.eye(6).expand(2, 4, 6, 6)
    with tap_attention([module], calls.append):
        # With the identity for values, what attention gives is its pattern.
        out_bqhk, _ = interface["sdpa"](module, q, k, values, None, sliding_window=2, s_aux=torch.ones(4))
    found = blockwise.pattern_sum(calls[0], [(0, 6)] * 2, 6)
    torch.testing.assert_close(found, out_bqhk.transpose(1, 2).sum(0), **TOLERANCE)


def test_eager_attention_without_a_mask_sees_all_keys_even_in_a_causal_module():
    model, calls = build("llama", "eager"), []
    attention, x_bsd = model.layers[0].self_attn, torch.randn(1, 6, 32)
    rotary = model.rotary_emb(x_bsd, torch.arange(6)[None])
    with tap_attention([attention], calls.append), torch.no_grad():
        _, expected = attention(x_bsd, rotary, None)
    assert attention.is_causal
    torch.testing.assert_close(blockwise.pattern(calls[0], [(0, 6)], 0), expected[0], **TOLERANCE)


# -- what a tap cannot say is an error ---------------------------------------------------------------------


def test_cached_decoding_is_refused():
    model = build("llama", "sdpa")
    with torch.no_grad():
        past = model(TEXTS[0][None], use_cache=True).past_key_values
        with (
            tap_attention(attending(model, "llama"), print),
            pytest.raises(SiteError, match="nor of passes that go on with a cache"),
        ):
            model(torch.tensor([[3]]), past_key_values=past)


def test_a_prefill_into_an_empty_static_cache_leaves_its_unwritten_keys_out():
    interface, calls, module = transformers.AttentionInterface(), [], nn.Identity()
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 8, 4)
    with tap_attention([module], calls.append):
        interface["sdpa"](module, q, k, k, None)
    assert torch.equal(calls[0].key_bhkd, k[:, :, :3])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sdpa", dict(cache=object()), "paged attention"),
        ("flash_attention_2", dict(cu_seq_lens_q=torch.tensor([0, 3])), "cu_seq_lens_q"),
        ("flash_attention_2", dict(position_ids=torch.tensor([[0, 1, 0]])), "pack"),
        ("flash_attention_2", dict(s_aux=torch.zeros(3)), "sink"),
    ],
)
def test_arguments_that_change_the_scores_in_unknown_ways_are_refused(name, options, message):
    interface, module, x = transformers.AttentionInterface(), nn.Identity(), torch.randn(1, 2, 3, 4)
    with tap_attention([module], print), pytest.raises(SiteError, match=message):
        interface[name](module, x, x, x, None, **options)


def test_unknown_keywords_of_a_users_own_attention_function_are_refused_and_known_ones_used():
    interface, module, x = transformers.AttentionInterface(), nn.Identity(), torch.randn(1, 2, 3, 4)
    interface["own"] = lambda module, query, key, value, attention_mask, **kwargs: (value, None)
    calls = []
    with tap_attention([module], calls.append):
        interface["own"](module, x, x, x, None, softcap=3.0, sliding_window=2, dropout=0.1, tilt=None)
        with pytest.raises(SiteError, match="'tilt'"):
            interface["own"](module, x, x, x, None, tilt=0.5)
    assert (calls[0].softcap, calls[0].sliding_window) == (3.0, 2)


def test_flash_attentions_two_dim_padding_mask_is_kept_and_means_what_a_full_mask_means():
    interface, calls, module = transformers.AttentionInterface(), [], nn.Identity()
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with tap_attention([module], calls.append), suppress(Exception):  # it is not installed; we come before
        interface["flash_attention_2"](module, q, k, k, padding, is_causal=True, sliding_window=3)
    spans = [(2, 6), (0, 6)]
    window = torch.ones(6, 6).tril().triu(-2).bool()
    full = AttentionCall(module, q, k, padding[:, None, None, :].bool() & window, 8**-0.5, True)
    assert calls[0].mask is padding
    found = blockwise.pattern_sum(calls[0], spans, 6)
    torch.testing.assert_close(found, reference.pattern_sum(full, spans, 6).float(), **TOLERANCE)


@pytest.mark.parametrize(
    ("spans", "size", "heads", "message"),
    [
        ([(0, 6)], 6, None, "for each of 2 samples, got 1"),
        ([(0, 6), (2, 7)], 8, None, r"within 6 tokens, got \(2, 7\) for sample 1"),
        ([(0, 6), (2, 4)], 5, None, "at most 5 valid tokens, got 6 for sample 0"),
        ([(0, 6), (2, 4)], 6, [4], r"heads within 0\.\.3, got \[4\]"),
    ],
)
def test_spans_and_heads_that_do_not_fit_the_call_are_named(spans, size, heads, message):
    call = AttentionCall(nn.Identity(), torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), None, 1.0, True)
    with pytest.raises(SiteError, match=message):
        blockwise.pattern_sum(call, spans, size, heads=heads)


# -- blocks equal the specification ------------------------------------------------------------------------

S = 11
CAUSAL = torch.ones(S, S).tril().bool()
PADDED = torch.ones(3, S).bool()
PADDED[0, :4], PADDED[2, 9:] = False, False
ADDITIVE = torch.zeros(S, S).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)
PREFIX = CAUSAL | (torch.arange(S) < 4)  # a prefix that all may see, as in PaliGemma
HALF = ADDITIVE.to(torch.float16).clamp(min=torch.finfo(torch.float16).min)
KINDS = {
    "causal": dict(mask=None, is_causal=True),
    "full": dict(mask=None, is_causal=False),
    "causal window": dict(mask=None, is_causal=True, sliding_window=3),
    "full window": dict(mask=None, is_causal=False, sliding_window=3),
    "padding": dict(mask=PADDED, is_causal=False),
    "causal padding window": dict(mask=PADDED.long(), is_causal=True, sliding_window=4),
    "bool mask": dict(mask=CAUSAL & PADDED[:, None, None], is_causal=True),
    "bool mask of heads": dict(mask=torch.rand(3, 4, S, S, generator=RNG) < 0.7, is_causal=True),
    "prefix mask": dict(mask=PREFIX[None, None], is_causal=True),
    "additive mask": dict(mask=ADDITIVE[None, None], is_causal=True),
    "additive half mask": dict(mask=HALF[None, None], is_causal=True),
    "additive bias": dict(mask=torch.randn(3, 1, 1, S, generator=RNG), is_causal=False),
    "position bias": dict(mask=None, is_causal=True, position_bias=torch.randn(1, 4, S, S, generator=RNG)),
    "softcap": dict(mask=ADDITIVE[None, None], is_causal=True, softcap=0.7),
    "sinks": dict(mask=CAUSAL[None, None], is_causal=True, sinks=torch.randn(4, generator=RNG)),
    "sinks without a mask": dict(mask=None, is_causal=True, sinks=torch.randn(4, generator=RNG)),
    "additive rows that see nothing": dict(
        mask=ADDITIVE.where(torch.arange(S) > 4, torch.finfo(torch.float32).min)[None, None], is_causal=True
    ),
    "rows that see nothing": dict(mask=CAUSAL[None, None] & (torch.arange(S) > 4), is_causal=True),
}
SPANS = {
    "one span": [(0, S)] * 3,
    "one inner span": [(2, 9)] * 3,
    "left and right padding": [(4, S), (0, S), (0, 9)],
    "an empty one": [(5, 5), (0, 1), (3, 8)],
}


def some_call(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 4, S, 8, generator=generator).to(dtype)
    k = torch.randn(3, 2, S, 8, generator=generator).to(dtype)
    return AttentionCall(nn.Identity(), q, k, scaling=0.6, **KINDS[kind])


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_the_specification(kind, spans):
    call = some_call(kind)
    expected = reference.pattern_sum(call, spans, 12)
    for block in (1, 4, 128):
        found = blockwise.pattern_sum(call, spans, 12, block=block)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), **TOLERANCE)
    torch.testing.assert_close(
        blockwise.pattern_sum(call, spans, 12, block=4, heads=[3, 0]), expected[[3, 0]].float(), **TOLERANCE
    )


@pytest.mark.parametrize("kind", KINDS)
def test_whole_texts_sum_to_the_sum_of_the_specified_patterns(kind):
    call = some_call(kind)
    expected = reference.pattern(call).sum(0).float()
    torch.testing.assert_close(blockwise.pattern_sum(call, [(0, S)] * 3, S), expected, **TOLERANCE)
    for b in range(3):
        one = blockwise.pattern(call, [(0, S)] * 3, b, heads=[2])
        torch.testing.assert_close(one, reference.pattern(call)[b, [2]].float(), **TOLERANCE)


def test_a_row_that_sees_nothing_is_zeros_and_never_nan():
    found = blockwise.pattern_sum(some_call("rows that see nothing"), [(0, S)] * 3, S)
    assert (found[:, :5] == 0).all() and (found[:, 5:].sum(-1) - 3).abs().max() < 1e-5


def test_nan_in_q_is_not_hidden():
    call = some_call("bool mask")
    call.query_bhqd[1, 2, 6] = torch.nan
    found = blockwise.pattern_sum(call, [(0, S)] * 3, S)
    assert found[2, 6].isnan().any() and not found[0].isnan().any()


def test_float64_inputs_are_computed_in_float64():
    call = some_call("causal", torch.float64)
    found = blockwise.pattern(call, [(0, S)] * 3, 0)
    assert torch.equal(found, reference.pattern(call)[0].float()) or (  # the last bit may round either way
        (found.double() - reference.pattern(call)[0]).abs().max() < 6.1e-8
    )


def test_autocast_does_not_round_the_scores():
    call, spans = some_call("causal"), SPANS["left and right padding"]
    expected = blockwise.pattern_sum(call, spans, S)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blockwise.pattern_sum(call, spans, S), expected)


class Precision(TorchDispatchMode):
    """Notes how products of float32 are to be computed, at each of them."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "bmm" in func.__name__:
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_products_are_whole_whatever_precision_the_model_has():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Precision() as plain:
            torch.ones(1, 2, 2) @ torch.ones(1, 2, 2)
        with Precision() as ours:
            blockwise.pattern_sum(some_call("bool mask"), SPANS["one span"], S)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert plain.seen == {"bf16"} and ours.seen == {"ieee"}


def test_products_stay_whole_where_blocks_of_several_threads_overlap():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    cpu, matmul, seen = torch.device("cpu"), torch.backends.mkldnn.matmul, []
    begun, ended = threading.Event(), threading.Event()

    def other():
        with blockwise._plain_arithmetic(cpu):
            begun.set()
            ended.wait(60)
            seen.append(matmul.fp32_precision)

    thread = threading.Thread(target=other)
    try:
        with blockwise._plain_arithmetic(cpu):
            thread.start()
            assert begun.wait(60)
        ended.set()
        thread.join(60)
        assert seen == ["ieee"] and matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_sums_made_under_inference_mode_can_be_added_to_outside():
    model, sums = build("llama", "sdpa"), []
    inputs, spans = batch(TEXTS, "left")
    with (
        tap_attention(attending(model, "llama"), lambda call: sums.append(blockwise.pattern_sum(call, spans, SIZE))),
        torch.inference_mode(),
    ):
        model(**inputs)
    for total_hss in sums:
        assert not total_hss.is_inference() and not total_hss.requires_grad
        total_hss += 1


def test_sums_carry_no_gradient():
    call = some_call("causal")
    call.query_bhqd.requires_grad_()
    assert not blockwise.pattern_sum(call, [(0, S)] * 3, S).requires_grad


def test_the_same_call_gives_the_same_bits():
    call = some_call("bool mask")
    first = blockwise.pattern_sum(call, SPANS["one span"], S, block=4)
    assert torch.equal(first, blockwise.pattern_sum(call, SPANS["one span"], S, block=4))


class Largest(TorchDispatchMode):
    """Notes the most elements that a result of any operation had, the sum itself and its views apart."""

    def __init__(self):
        super().__init__()
        self.numel, self.sums = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                place = x.untyped_storage().data_ptr()
                if func is torch.ops.aten.zeros.default:
                    self.sums.add(place)
                if place not in self.sums:
                    self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("spans", [[(0, 64)] * 6, [(b, 64) for b in range(6)]], ids=["one span", "many"])
@pytest.mark.parametrize("mask", [None, torch.ones(6, 1, 64, 64).tril().bool()], ids=["causal", "mask"])
@pytest.mark.parametrize("limit", [100, 3 * 4 * 16 * 64])
def test_no_more_scores_exist_at_once_than_the_limit_or_a_block_of_one_sample(monkeypatch, spans, mask, limit):
    monkeypatch.setattr(blockwise, "_SCORES_CPU", limit)
    monkeypatch.setattr(blockwise, "_room", threading.local())  # nothing is there from calls before
    q, k = torch.randn(6, 4, 64, 8), torch.randn(6, 2, 64, 8)
    with Largest() as largest:
        blockwise.pattern_sum(AttentionCall(nn.Identity(), q, k, mask, 1.0, True), spans, 64, block=16)
    assert largest.numel <= max(limit, 4 * 16 * 64)
