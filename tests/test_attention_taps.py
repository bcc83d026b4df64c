"""What taps show of flex attention, of packed rows and of cached generations gives the patterns of single texts.

The oracle is transformers: eager mode, `output_attentions=True`, one unpadded text at a time and no cache.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from tiny import build, padded, texts
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import distcache as dc
from distcache.attention import AttentionCall, blockwise, reference, tap_attention, tap_functions
from distcache.attention.steps import Steps, shared_copy
from distcache.errors import SiteError

transformers = pytest.importorskip("transformers")
flex = pytest.importorskip("torch.nn.attention.flex_attention")

# float32 on both sides, of probabilities, so of at most 1. Seen: 3e-7.
TOLERANCE = dict(atol=2e-6, rtol=0.0)
TEXTS = texts((9, 4, 1, 6))
SOURCE = torch.tensor([[5, 6, 7]])  # what an encoder is given, the same for all texts
OPTIONS = {"gemma2": {"attn_logit_softcapping": 2.0}}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def uncompiled():
    """Flex attention as a formula, as record() has it: on a CPU compiling it takes longer than all of these tests."""
    return torch.compiler.set_stance("force_eager")


def model_of(family, implementation):
    return build(family, attn_implementation=implementation, **OPTIONS.get(family, {}))


def attending(model):
    """The modules that attend to the texts, by layer."""
    return [module for module in model.modules() if getattr(module, "is_causal", False)]


@functools.cache
def eager_model(family):
    return model_of(family, "eager")


def eager_patterns(family, text):
    """[layers, H, L, L] of one text: the oracle."""
    given = dict(output_attentions=True, use_cache=False)
    with torch.no_grad():
        if family == "t5":
            found = eager_model(family)(input_ids=SOURCE, decoder_input_ids=text[None], **given).decoder_attentions
        else:
            found = eager_model(family)(input_ids=text[None], **given).attentions
    return torch.cat(found)


def tapped(model, run, tap=tap_attention):
    """The calls that `run` makes, by layer."""
    calls = []
    with tap(attending(model), calls.append), torch.no_grad():
        run()
    assert [id(call.module) for call in calls] == [id(module) for module in attending(model)]
    return calls


def spans_of(mask):
    return [(int(row.argmax()), int(row.argmax() + row.sum())) for row in mask]


def assert_patterns(calls, mask, family, some=TEXTS):
    """Each text's pattern, in a batch of this padding, is that of the text alone: by the reference and by blocks."""
    spans = spans_of(mask)
    for b, text in enumerate(some):
        expected = eager_patterns(family, text)
        found = torch.stack([reference.text_pattern(call, b, spans[b]) for call in calls])
        torch.testing.assert_close(found.float(), expected, **TOLERANCE)
        found = torch.stack([blockwise.pattern(call, spans, b) for call in calls])
        torch.testing.assert_close(found, expected, **TOLERANCE)


# -- flex attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_flex_attention_of_a_padded_batch_gives_the_patterns_of_single_texts(family, side):
    model, inputs = model_of(family, "flex_attention"), padded(TEXTS, side)
    with uncompiled():
        calls = tapped(model, lambda: model(**inputs))
    assert_patterns(calls, inputs["attention_mask"], family)


def test_a_flex_model_stays_compiled_under_record_and_gives_the_same_bits():
    from transformers.integrations.flex_attention import WrappedFlexAttention

    before = vars(WrappedFlexAttention)["__call__"]
    model, inputs = model_of("llama", "flex_attention"), padded(TEXTS)
    with torch.no_grad():
        expected = model(**inputs).logits
        with dc.record(model, ["resid_out"]), dc.record(model, ["avg_attn_pattern"]):
            assert torch.equal(model(**inputs).logits, expected)
        with torch.compiler.set_stance("force_eager"):  # which is what record has for all else
            assert not torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)
    assert vars(WrappedFlexAttention)["__call__"] is before


def test_recorded_averages_of_a_flex_model_are_those_of_single_texts():
    model, total, count = model_of("llama", "flex_attention"), torch.zeros(2, 4, 9, 9), torch.zeros(9, 1)
    with dc.record(model, ["avg_attn_pattern"]) as found, torch.no_grad():
        model(**padded(TEXTS, "left"))
    for text in TEXTS:
        total[..., : len(text), : len(text)] += eager_patterns("llama", text)
        count[: len(text)] += 1
    expected = total / count
    for layer in range(2):
        torch.testing.assert_close(found["avg_attn_pattern", layer], expected[layer], **TOLERANCE)


def test_the_oracle_fails_for_the_padding_of_other_texts():
    model, inputs = model_of("llama", "flex_attention"), padded(TEXTS, "left")
    with uncompiled():
        calls = tapped(model, lambda: model(**inputs))
    calls = [replace(call, mask=call.mask.roll(1, 0)) for call in calls]
    with pytest.raises(AssertionError):
        assert_patterns(calls, inputs["attention_mask"], "llama")


def test_all_layers_share_what_is_written_out_of_one_block_mask_and_it_goes_with_it():
    model, calls = build("gemma2", attn_implementation="flex_attention", num_hidden_layers=4), []
    with uncompiled(), tap_attention(attending(model), calls.append), torch.no_grad():
        model(**padded(TEXTS, "left"))
    windowed, full, *again = (id(call.mask) for call in calls)
    assert windowed != full and again == [windowed, full]
    left = [weakref.ref(call.mask) for call in calls]
    calls.clear()
    assert [mask() for mask in left] == [None] * 4


def run_flex(calls, mask, q, k, **options):
    """The pattern that transformers' flex attention computes; what a tap sees of it goes to `calls`."""
    module = nn.Identity().eval()
    values = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)  # with which the output is the pattern
    with tap_attention([module], calls.append), uncompiled():
        out_bqhk, _ = transformers.AttentionInterface()["flex_attention"](module, q, k, values, mask, **options)
    return out_bqhk.transpose(1, 2)


def some_q_and_k(num_samples=2, num_queries=6, num_keys=6):
    generator = torch.Generator().manual_seed(3)
    shape = (num_samples, 4, num_queries, 16), (num_samples, 2, num_keys, 16)
    return tuple(torch.randn(size, generator=generator) for size in shape)


def test_what_transformers_adds_to_scores_in_flex_attention_is_added_in_its_order():
    q, k = some_q_and_k()
    bias, score_mask = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 8)
    causal = flex.create_block_mask(lambda b, h, q, k: q >= k, 2, None, 6, 6, "cpu")
    for mask in (None, score_mask, score_mask > 0, causal):
        calls = []
        expected = run_flex(calls, mask, q, k, softcap=0.7, position_bias=bias, scaling=0.9)
        torch.testing.assert_close(reference.pattern(calls[0]).float(), expected, **TOLERANCE)


def test_sinks_of_flex_attention_take_their_share():
    q, k = some_q_and_k()
    mask = flex.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 4), None, None, 6, 6, "cpu")
    sinks, calls = torch.randn(4), []
    with pytest.raises(ValueError, match="sinks cannot be run on CPU"):  # by transformers; a tap comes before
        run_flex(calls, mask, q, k, s_aux=sinks)
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    bars = torch.ones(6, 6).tril().triu(-3).bool()
    with_sinks = torch.cat([scores.masked_fill(~bars, -torch.inf), sinks[None, :, None, None].expand(2, 4, 6, 1)], -1)
    torch.testing.assert_close(reference.pattern(calls[0]).float(), with_sinks.softmax(-1)[..., :-1], **TOLERANCE)


def test_a_block_mask_says_what_its_function_and_its_tiles_let_through_per_head_too():
    q, k = some_q_and_k(1, 260, 260)
    tiles = torch.tensor([[[[1, 0, 1], [1, 1, 0], [0, 1, 0]]] * 4], dtype=torch.int32)
    mask = flex.BlockMask.from_kv_blocks(
        tiles.sum(-1, dtype=torch.int32),
        tiles.argsort(dim=-1, descending=True, stable=True).to(torch.int32),
        mask_mod=lambda b, h, q, k: (q + k) % 4 <= h,
        seq_lengths=(260, 260),
    )
    calls = []
    run_flex(calls, mask, q, k)
    row, column = torch.arange(260)[:, None], torch.arange(260)
    expected = torch.stack(
        [((row + column) % 4 <= h) & (tiles[0, h][row // 128, column // 128] == 1) for h in range(4)]
    )
    assert torch.equal(calls[0].mask[0], expected)


def test_a_block_mask_of_fewer_tokens_than_the_pass_has_is_refused():
    q, k = some_q_and_k()
    mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 5, 6, "cpu")
    with pytest.raises(SiteError, match="at least 6 queries and 6 keys, got one of 5 and 6"):
        run_flex([], mask, q, k)


# -- packed rows -------------------------------------------------------------------------------------------

PACKED = dict(
    input_ids=torch.cat(TEXTS)[None], position_ids=torch.cat([torch.arange(len(text)) for text in TEXTS])[None]
)


def block_diagonal():
    owner = torch.repeat_interleave(torch.arange(len(TEXTS)), torch.tensor([len(text) for text in TEXTS]))
    return (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()


def patterns_of_packed_texts(family):
    """[layers, H, S, S], each text's pattern in its place and zeros elsewhere, from single texts: the oracle."""
    start, expected = 0, torch.zeros(2, 4, 20, 20)
    for text in TEXTS:
        own = slice(start, start := start + len(text))
        expected[:, :, own, own] = eager_patterns(family, text)
    return expected


def recorded(model, inputs):
    with dc.record(model, ["pattern", "avg_attn_pattern"]) as found, torch.no_grad():
        model(**inputs, use_cache=False)
    patterns = torch.stack([torch.stack([found[f"pattern_L{i}H{h}"][0] for h in range(4)]) for i in range(2)])
    return patterns, torch.stack([found["avg_attn_pattern", i] for i in range(2)])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_patterns_of_texts_packed_into_one_row_are_those_of_the_texts_alone_and_zero_between_them(
    family, implementation
):
    expected = patterns_of_packed_texts(family)
    for found in recorded(model_of(family, implementation), PACKED):
        torch.testing.assert_close(found, expected, **TOLERANCE)
        assert (found[expected == 0] == 0).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_block_diagonal_mask_of_ones_own_keeps_packed_texts_apart(implementation):
    mask = block_diagonal()[None, None]
    if implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    model, expected = model_of("llama", implementation), patterns_of_packed_texts("llama")
    calls = tapped(model, lambda: model(**PACKED, attention_mask=mask))
    found = torch.stack([blockwise.pattern(call, [(0, 20)], 0) for call in calls])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found[expected == 0] == 0).all()


def test_the_oracle_of_packed_texts_fails_where_transformers_lets_them_see_each_other():
    model = model_of("llama", "sdpa")
    calls = tapped(model, lambda: model(**PACKED, use_cache=True))  # with a cache it doesn't look at positions
    found = torch.stack([blockwise.pattern(call, [(0, 20)], 0) for call in calls])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, patterns_of_packed_texts("llama"), **TOLERANCE)


def test_flash_attention_packs_by_positions_only_without_a_padding_mask():
    q, k = some_q_and_k(1)
    positions, padding = torch.tensor([[0, 0, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    calls, module = [], nn.Identity()
    interface = transformers.AttentionInterface()
    with tap_attention([module], calls.append):
        with pytest.raises(SiteError, match="keeps them apart without a mask"):
            interface["flash_attention_2"](module, q, k, k, None, position_ids=positions, is_causal=True)
        with suppress(Exception):  # it isn't installed; we come before
            interface["flash_attention_2"](module, q, k, k, padding, position_ids=positions, is_causal=True)
    assert calls[0].mask is padding


# -- generations with a cache ------------------------------------------------------------------------------

PROMPTS = (5, 3, 1)  # tokens of each prompt
NEW = (1, 1, 2, 1, 1, 3)  # of each later pass
FINAL = texts(tuple(prompt + sum(NEW) for prompt in PROMPTS))
CACHES = ["dynamic", "static"]


def cache_of(model, kind, num_tokens):
    dynamic = functools.partial(transformers.DynamicCache, config=model.config)
    static = functools.partial(transformers.StaticCache, config=model.config, max_cache_len=num_tokens)
    own = static() if kind == "static" else dynamic()
    if model.config.is_encoder_decoder:
        return transformers.EncoderDecoderCache(own, transformers.DynamicCache())
    return own


def drive(model, ids, mask, sizes, cache):
    """Feed a batch's tokens pass by pass; yields before each what the pass is."""
    first = 0
    for step, size in enumerate(sizes):
        last = first + size
        yield step
        seen = mask[:, :last]
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                model(
                    input_ids=SOURCE.expand(len(ids), -1), decoder_input_ids=ids[:, first:last],
                    decoder_attention_mask=seen, past_key_values=cache, use_cache=True,
                )  # fmt: skip
            else:
                position_ids = (seen.cumsum(1) - 1).clamp(min=0)[:, first:last]
                model(
                    input_ids=ids[:, first:last], attention_mask=seen, position_ids=position_ids,
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
        first = last


def whole_calls(model, ids, mask, sizes, cache):
    """By layer, what the passes say together."""
    steps, now = {id(module): Steps() for module in attending(model)}, [0]
    with tap_attention(attending(model), lambda call: steps[id(call.module)].add(call), steps=lambda: now[0] > 0):
        for step in drive(model, ids, mask, sizes, cache):
            now[0] = step
    return [steps[id(module)].whole() for module in attending(model)]


CASES = [
    (family, implementation, kind)
    for family, implementations in {
        "llama": ("sdpa", "eager"),
        "mistral": ("sdpa", "eager"),
        "gpt2": ("sdpa", "eager"),
        "t5": ("sdpa", "eager"),
        "gpt_oss": ("eager",),  # the only one that has sinks on a CPU
    }.items()
    for implementation in implementations
    for kind in ("dynamic", "static")
] + [("llama", "flex_attention", "dynamic"), ("mistral", "flex_attention", "dynamic")]


@pytest.mark.parametrize(("family", "implementation", "kind"), CASES)
def test_steps_of_a_padded_batch_put_together_are_one_pass_over_the_final_texts(family, implementation, kind):
    inputs = padded(FINAL, "left")
    model, (ids, mask) = model_of(family, implementation), (inputs["input_ids"], inputs["attention_mask"])
    with uncompiled():
        calls = whole_calls(model, ids, mask, (max(PROMPTS), *NEW), cache_of(model, kind, ids.shape[1] + 3))
    assert_patterns(calls, mask, family, FINAL)


@pytest.mark.parametrize("mistake", ["the first key is the new one", "two steps swapped", "padding counts"])
def test_the_oracle_of_steps_fails_on_a_planted_mistake(mistake, monkeypatch):
    inputs = padded(FINAL, "left")
    model, (ids, mask) = model_of("llama", "sdpa"), (inputs["input_ids"], inputs["attention_mask"])
    add = Steps.add
    if mistake == "the first key is the new one":
        monkeypatch.setattr(Steps, "add", lambda self, call: add(self, replace(call, key_bhkd=call.key_bhkd.flip(2))))
    calls = whole_calls(model, ids, mask, (max(PROMPTS), *NEW), cache_of(model, "dynamic", 0))
    if mistake == "two steps swapped":
        order = [*range(8), 9, 8, *range(10, 14)]
        calls = [replace(call, query_bhqd=call.query_bhqd[:, :, order]) for call in calls]
    if mistake == "padding counts":
        mask = mask.roll(1, 0)
    with pytest.raises(AssertionError):
        assert_patterns(calls, mask, "llama", FINAL)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_prompts_of_one_token_without_padding_are_gone_on_with_from_there(family, kind):
    some = texts((8, 8))
    model, ids = model_of(family, "sdpa"), torch.stack(some)
    calls = whole_calls(model, ids, torch.ones_like(ids), [1] * 8, cache_of(model, kind, 10))
    assert_patterns(calls, torch.ones_like(ids), family, some)
    if (family, kind) == ("llama", "dynamic"):  # nothing but causality, so nothing is written out
        assert all(call.mask is None and call.is_causal for call in calls)


@pytest.mark.parametrize("use_cache", [True, False], ids=["with a cache", "whole texts again"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_generate_feeds_is_one_pass_over_the_texts_that_it_gives(use_cache, mode):
    model, prompts = model_of("mistral", "sdpa"), padded(texts((5, 2)), "left")
    steps, passes = {id(module): Steps() for module in attending(model)}, Counter()

    def add(call):
        steps[id(call.module)].add(call)
        passes[id(call.module)] += 1

    def later():
        return len(passes) == len(steps) and min(passes.values()) > 0

    with tap_attention(attending(model), add, steps=later), mode():
        out = model.generate(
            prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            use_cache=use_cache,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )[:, :-1]  # the last isn't fed again
    mask = functional.pad(prompts["attention_mask"], (0, 5), value=1)
    some = [row[keep.bool()] for row, keep in zip(out, mask, strict=True)]
    assert_patterns([one.whole() for one in steps.values()], mask, "mistral", some)


class Cached(nn.Module):
    """Attention of one's own over torch's function, which keeps its keys in a buffer and writes to it."""

    is_causal = True

    def __init__(self, room):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("keys", torch.full((2, 4, room, 4), torch.nan))
        self.num_tokens = 0

    def forward(self, x_bsd, mask=None):
        q, k, _ = self.qkv(x_bsd).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        start, self.num_tokens = self.num_tokens, self.num_tokens + x_bsd.shape[1]
        self.keys[:, :, start : self.num_tokens] = k
        keys, is_causal = self.keys[:, :, : self.num_tokens], mask is None and start == 0
        return functional.scaled_dot_product_attention(q, keys, torch.zeros_like(keys), mask, is_causal=is_causal)


@torch.no_grad()
def test_steps_of_torchs_own_function_are_put_together_and_survive_what_is_written_to_the_cache():
    model, steps, x_bsd = Cached(7), Steps(), torch.randn(2, 7, 16)
    whole = tapped(model, lambda: model(x_bsd), tap_functions)[0]
    expected = reference.pattern(whole)
    model.num_tokens = 0
    rows = torch.ones(7, 7).tril().bool()
    with tap_functions([model], steps.add, steps=lambda: model.num_tokens > 3):
        model(x_bsd[:, :3])
        model(x_bsd[:, 3:4])
        model(x_bsd[:, 4:6], rows[4:6, :6])
        model(x_bsd[:, 6:])
    model.keys.zero_()
    torch.testing.assert_close(reference.pattern(steps.whole()), expected, **TOLERANCE)


@torch.no_grad()
def test_torch_aligns_causality_with_the_first_key_and_so_do_steps():
    model, calls, q, k = Cached(0), [], torch.randn(1, 2, 2, 4), torch.randn(1, 2, 5, 4)
    model.forward = lambda: functional.scaled_dot_product_attention(
        q, k, torch.eye(5).expand(1, 2, 5, 5), is_causal=True
    )
    with tap_functions([model], calls.append, steps=lambda: True):
        expected = model()
    torch.testing.assert_close(reference.pattern(calls[0]).float(), expected, **TOLERANCE)


# What a whole call of 9 tokens, of which the prompt has 4, is made of.
N = 9
RNG = torch.Generator().manual_seed(4)
CAUSAL = torch.ones(N, N).tril().bool()
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
LOW = torch.finfo(torch.float32).min
KINDS = {
    "causal": dict(mask=None),
    "softcap and sinks": dict(mask=None, softcap=0.5, sinks=torch.randn(4, generator=RNG)),
    "position bias": dict(mask=None, position_bias=torch.randn(1, 4, N, N, generator=RNG)),
    "bool mask": dict(mask=CAUSAL & PADDING[:, None, None].bool()),
    "bool mask of heads": dict(mask=CAUSAL & (torch.rand(1, 4, N, N, generator=RNG) < 0.8) | torch.eye(N).bool()),
    "additive mask": dict(mask=torch.zeros(2, 1, N, N).masked_fill(~CAUSAL, LOW)),
    "padding": dict(mask=PADDING),
    "window": dict(mask=None, sliding_window=3),
    "padding and window": dict(mask=PADDING.bool(), sliding_window=3),
    "wide window": dict(mask=None, sliding_window=5),
}
SIZES = (4, 1, 2, 1, 1)


def whole_call(kind):
    q, k = some_q_and_k(2, N, N)
    return AttentionCall(nn.Identity(), q, k, scaling=0.6, is_causal=True, **KINDS[kind])


def cut(call, first, start, stop, room=0):
    """Of a whole call the pass that is fed start..stop, with a cache from the key `first` on, and places to spare."""
    rows, columns = slice(start, stop), slice(first, stop)
    mask, bias = call.mask, call.position_bias
    if mask is not None:
        mask = mask[:, columns] if mask.dim() == 2 else functional.pad(mask[:, :, rows, columns], (0, room), value=0)
        if room and mask.is_floating_point():
            mask[..., -room:] = LOW
    return replace(
        call,
        query_bhqd=call.query_bhqd[:, :, rows],
        key_bhkd=functional.pad(call.key_bhkd[:, :, columns], (0, 0, 0, room), value=torch.nan),
        mask=mask,
        position_bias=None if bias is None else functional.pad(bias[:, :, rows, columns], (0, room), value=torch.nan),
    )


def put_together(passes):
    steps = Steps()
    for call in passes:
        steps.add(call)
    return steps.whole()


def in_steps(call, first=lambda start: 0, room=0):
    start, passes = 0, []
    for size in SIZES:
        passes.append(cut(call, first(start), start, start + size, room if start else 0))
        start += size
    return passes


def assert_same_pattern(found, expected):
    torch.testing.assert_close(reference.pattern(found), reference.pattern(expected), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_cut_into_steps_is_put_together_again(kind):
    call = whole_call(kind)
    whole = put_together(in_steps(call))
    assert_same_pattern(whole, call)
    if call.mask is None or call.mask.dim() == 2:
        assert whole.mask is None or torch.equal(whole.mask, call.mask != 0)


@pytest.mark.parametrize("kind", [kind for kind, given in KINDS.items() if given["mask"] is not None])
def test_empty_places_of_a_cache_are_left_out(kind):
    call = whole_call(kind)
    assert_same_pattern(put_together(in_steps(call, room=5)), call)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_a_cache_has_dropped_are_barred(kind):
    """A cache of the last two keys before a pass's own: those of a window of three."""
    call = whole_call(kind)
    passes = in_steps(call, first=lambda start: max(start - 2, 0))
    if kind == "padding":
        with pytest.raises(SiteError, match="up to themselves, of the padding mask"):
            put_together(passes)
        return
    start_q = torch.repeat_interleave(torch.tensor([0, 4, 5, 7, 8]), torch.tensor(SIZES))
    kept = torch.arange(N) >= start_q[:, None] - 2
    if call.mask is None or call.mask.dim() == 2:
        bars = (CAUSAL & kept).triu(1 - (call.sliding_window or N))[None, None]
        bars = bars if call.mask is None else bars & call.mask[:, None, None]
        expected = replace(call, mask=bars, sliding_window=None)
    else:
        expected = replace(call, mask=call.mask.masked_fill(~kept, LOW if call.mask.is_floating_point() else False))
    assert_same_pattern(put_together(passes), expected)


@pytest.mark.parametrize("kind", ["bool mask", "additive mask", "of two dtypes"])
def test_passes_with_and_without_masks_make_one(kind):
    """As sdpa's, which has none until the texts are as long as the window."""
    call = whole_call("additive mask" if kind == "of two dtypes" else kind)
    call = replace(call, mask=call.mask[1:], query_bhqd=call.query_bhqd[1:], key_bhkd=call.key_bhkd[1:])  # no padding
    passes = in_steps(call)
    passes[0], passes[3] = (replace(passes[i], mask=None) for i in (0, 3))
    if kind == "of two dtypes":
        passes[2] = in_steps(replace(call, mask=CAUSAL[None, None]))[2]
    assert_same_pattern(put_together(passes), call)


def test_a_window_holds_for_passes_without_a_mask_among_others_with_one():
    call = whole_call("window")
    passes = in_steps(call)
    passes[1] = in_steps(replace(call, mask=CAUSAL[None, None], sliding_window=3))[1]  # four dims say it all
    bars = CAUSAL.triu(-2)
    bars[4] = CAUSAL[4]
    assert_same_pattern(put_together(passes), replace(call, mask=bars[None, None], sliding_window=None))


def test_passes_without_a_padding_mask_among_others_with_one_have_no_padding():
    call = whole_call("padding")
    passes = in_steps(call)
    passes[2] = replace(passes[2], mask=None)
    assert_same_pattern(put_together(passes), call)


def test_a_prompt_that_sees_all_of_itself_is_kept_as_it_is():
    call = whole_call("causal")
    first, *later = in_steps(call)
    bars = CAUSAL.clone()
    bars[:4, :4] = True
    assert_same_pattern(put_together([replace(first, is_causal=False), *later]), replace(call, mask=bars[None, None]))


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation has written."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:  # no view
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("room", [0, 30], ids=["a cache that grows", "a static cache"])
def test_a_step_keeps_what_is_new_whatever_came_before(room):
    q, k = some_q_and_k(1, 300, 300)
    mask = torch.ones(300, 300).tril().bool()[None, None] if room else None
    call, steps = AttentionCall(nn.Identity(), q, k, mask, 0.6, True), Steps()
    steps.add(cut(call, 0, 0, 299))
    last = cut(call, 0, 299, 300, room)
    with Largest() as largest:
        steps.add(last)
    assert largest.numel <= (300 if room else q[:, :, :1].numel())  # a row of the mask; or the query


def test_layers_that_are_given_one_mask_share_its_copy_unless_it_was_written_to_meanwhile():
    call = whole_call("bool mask")
    call = replace(call, mask=call.mask.clone(), query_bhqd=call.query_bhqd[..., :1], key_bhkd=call.key_bhkd[..., :1])
    layers, written = [], []
    for layer in range(3):
        if layer == 2:
            call.mask.fill_(True)
        layers.append(Steps())
        with Largest() as largest:
            layers[layer].add(call)
        written.append(largest.numel)
    assert written == [2 * N * N, 2 * 4 * N, 2 * N * N]  # the mask's copy, a query's, the mask's
    first, second, third = (steps.whole().mask for steps in layers)
    assert torch.equal(first, second) and third.all() and not first.all()


def test_a_mask_that_does_not_tell_whether_it_was_written_to_is_compared_with_its_copy():
    call, before, same, after = whole_call("bool mask"), Steps(), Steps(), Steps()
    with torch.inference_mode():
        call = replace(call, mask=call.mask.clone())
        before.add(call)
        same.add(call)
        assert same._steps[0].mask is before._steps[0].mask
        call.mask.fill_(True)
        after.add(call)
        assert after.whole().mask.all() and not before.whole().mask.all()


def test_padding_of_two_dims_is_copied_whole():
    mask_bk = torch.ones(1, 5, dtype=torch.bool).expand(3, 5)
    assert shared_copy(mask_bk).shape == (3, 5) and shared_copy(mask_bk) is shared_copy(mask_bk)
    assert shared_copy(mask_bk[:, None, None]).shape == (1, 1, 1, 5)


# -- what steps cannot say is an error ---------------------------------------------------------------------


def test_flex_attention_with_a_static_cache_is_refused_because_it_sees_empty_places():
    model, ids = model_of("llama", "flex_attention"), texts((6,))[0][None]
    with uncompiled(), pytest.raises(SiteError, match="places of the cache that no token had been written to"):
        whole_calls(model, ids, torch.ones_like(ids), (3, 1, 1, 1), cache_of(model, "static", 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query_bhqd=torch.zeros(1, 4, 1, 16)), r"\(2, 4, 16, 0.6, None, None\), got \(1, 4, 16"),
        (dict(softcap=2.0), r"got \(2, 4, 16, 0.6, 2.0, None\)"),
        (dict(key_bhkd=torch.zeros(2, 2, 8, 16)), "got 8 keys, of which 3 are of no token"),
    ],
    ids=["other samples", "other scores", "keys from nowhere"],
)
def test_a_pass_that_does_not_go_on_with_the_texts_is_refused(change, message):
    steps = Steps()
    steps.add(cut(whole_call("causal"), 0, 0, 4))
    with pytest.raises(SiteError, match=message):
        steps.add(replace(cut(whole_call("causal"), 0, 4, 5), **change))


def test_a_generation_that_begins_amid_a_text_is_refused():
    with pytest.raises(SiteError, match="as many queries as keys, got 1 queries and 5 keys"):
        Steps().add(cut(whole_call("causal"), 0, 4, 5))


def test_torchs_own_function_with_more_keys_than_queries_is_refused_where_no_steps_are_asked_for():
    model, x_bsd = Cached(7), torch.randn(2, 7, 16)
    with tap_functions([model], print), torch.no_grad():
        model(x_bsd[:, :3])
        with pytest.raises(SiteError, match="got 1 queries and 4 keys"):
            model(x_bsd[:, 3:4])


def test_a_window_that_looks_ahead_is_refused():
    call = replace(cut(whole_call("window"), 0, 0, 4), is_causal=False)
    with pytest.raises(SiteError, match="see each token up to themselves"):
        Steps().add(call)


def test_masks_of_two_dims_and_of_four_do_not_mix():
    padded_call, masked = whole_call("padding"), whole_call("bool mask")
    with pytest.raises(SiteError, match="two dims in some passes and of four in others"):
        put_together([cut(padded_call, 0, 0, 4), cut(masked, 0, 4, 5)])
