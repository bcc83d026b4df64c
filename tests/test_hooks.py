"""What a forward pass shows is recorded once, exactly, and the model neither notices nor remembers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
from tiny import build, num_hooks, padded, texts
from torch import nn
from torch.utils.checkpoint import checkpoint

import distcache as dc
from distcache import hooks, strategies
from distcache.attention import sum_scratch_bytes
from distcache.strategies import SUM, Field, Fieldwise, register_strategy

transformers = pytest.importorskip("transformers")

TEXTS = texts()
NUM_TOKENS = sum(map(len, TEXTS))


def by_hand(model, path, inputs, side="output", grad=False):
    """What a hook by hand sees at one module, whole: [B, S, …]."""
    found = []

    def keep(x):
        x = x[0] if isinstance(x, tuple) else x
        found.append(x.detach().clone())

    module = model.get_submodule(path)
    if side == "output":
        handle = module.register_forward_hook(lambda m, args, out: keep(out))
    else:
        handle = module.register_forward_pre_hook(lambda m, args: keep(args[0]))
    with torch.set_grad_enabled(grad):
        model(**inputs)
    handle.remove()
    (x,) = found
    return x


class Stack(nn.Module):
    """Blocks on floats: [B, D], or [B, S, D] with tokens."""

    def __init__(self, *modules):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(modules or (nn.Linear(3, 3), nn.Linear(3, 3)))

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x)
        return x


# -- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_know_their_sample_their_position_and_what_was_recorded_beside(side):
    model, inputs = build("llama"), padded(TEXTS, side)
    x_bsd = by_hand(model, "model.layers.1", inputs)
    label = torch.tensor([5, 6, 7, 8])
    sites = ["resid_out", dc.Site("resid_out", tokens="last", key="last_{layer}")]
    with dc.record(model, sites, label=label, token=inputs["input_ids"]) as rec, torch.no_grad():
        model(**inputs)
        rec.next(label=label + 10, token=inputs["input_ids"])
        model(**inputs)
    columns = rec.rows("resid_out_1")
    mask = inputs["attention_mask"].bool()
    expected = [(b, i, int(label[b]), int(t)) for b, text in enumerate(TEXTS) for i, t in enumerate(text)]
    expected += [(b + 4, i, l + 10, t) for b, i, l, t in expected]
    assert (
        list(zip(*(columns[name].tolist() for name in ("sample", "position", "label", "token")), strict=True))
        == expected
    )
    assert torch.equal(rec["resid_out_1"], torch.cat([x_bsd[mask]] * 2))
    last = rec.rows("last_1")
    assert last["sample"].tolist() == list(range(8)) and last["position"].tolist() == [5, 2, 0, 4] * 2
    assert last["token"].tolist() == [int(text[-1]) for text in TEXTS] * 2
    assert torch.equal(rec["last_1"][2], x_bsd[2][mask[2]][0])


def test_rows_come_in_the_order_of_their_index_wherever_they_are_read():
    model = build("llama")
    with dc.record(model, ["resid_out"]) as plain, torch.no_grad():
        model(**padded(TEXTS))
    cache = dc.ActivationCache()
    with dc.record(model, ["resid_out"], index=[7, 2]) as rec, torch.no_grad():
        model(**padded(TEXTS[:2]))
        rec.next(index=torch.tensor([0, 5]))
        model(**padded(TEXTS[2:]))
    cache.cat(rec)
    for held in (rec, cache):
        assert held.rows("resid_out_0")["sample"].tolist() == [0] + [2] * 3 + [5] * 5 + [7] * 6
        assert held.rows("resid_out_0")["position"].tolist() == [0, *range(3), *range(5), *range(6)]
        expected = torch.cat([plain["resid_out_0"].split([6, 3, 1, 5])[n] for n in (2, 1, 3, 0)])
        torch.testing.assert_close(held["resid_out_0"], expected, rtol=1e-5, atol=1e-5)


def test_two_passes_of_one_local_take_one_index_when_they_are_merged():
    model = build("llama")
    with (
        dc.record(model, [dc.Site("resid_out", tokens="last"), dc.Site("embed", reduce="mean")]) as rec,
        torch.no_grad(),
    ):
        model(**padded(TEXTS[:3]))
        model(**padded(TEXTS[3:]))
    cache = dc.DistributedCache()
    with pytest.raises(ValueError, match="index has 3 entries, the cache holds 4 samples"), cache.deferred_mode():
        cache.cat(rec, index=[1, 2, 3])
    with cache.deferred_mode():
        cache.cat(rec, index=[3, 1, 2, 0])
    assert cache.rows("resid_out_1")["sample"].tolist() == [0, 1, 2, 3]
    assert torch.equal(cache["resid_out_1"], rec["resid_out_1"][[3, 1, 2, 0]])
    assert int(cache.count("embed")) == NUM_TOKENS
    with pytest.raises(dc.DuplicateSamples), cache.deferred_mode():  # the mean knows whom it has seen
        cache.cat(rec, index=[9, 8, 7, 3])


@pytest.mark.parametrize(
    ("texts_", "tokens", "num_rows"),
    [(TEXTS[:1], "all", 6), (TEXTS[2:3], "all", 1), (TEXTS[2:3], "mean", 1), (TEXTS, -3, 3), (TEXTS, slice(4, 9), 3)],
    ids=["one sample", "one token", "the mean of one token", "the third from the end", "a slice beyond the end"],
)
def test_small_batches_are_batches(texts_, tokens, num_rows):
    model = build("llama")
    with dc.record(model, [dc.Site("resid_out", tokens=tokens), "avg_attn_pattern"]) as rec, torch.no_grad():
        model(**padded(texts_))
    assert rec["resid_out_0"].shape == (num_rows, 32)
    assert int(rec.count("avg_attn_pattern_L0H0")[0]) == len(texts_)


def test_a_sample_without_any_valid_token_counts_nowhere():
    model, inputs = build("llama"), padded(TEXTS)
    with_empty = {name: torch.cat([x, torch.zeros_like(x[:1])]) for name, x in inputs.items()}
    sites = ["resid_out", dc.Site("resid_out", tokens="mean", key="mean_{layer}"), dc.Site("mlp_out", reduce="mean")]
    sites += ["avg_attn_pattern", "pattern"]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**with_empty)
    with dc.record(model, sites) as plain, torch.no_grad():
        model(**inputs)
    assert rec["resid_out_1"].shape == (NUM_TOKENS, 32) and rec["mean_1"].shape == (4, 32)
    assert int(rec.count("mlp_out_1")) == NUM_TOKENS
    assert torch.equal(rec.count("avg_attn_pattern_L0H0"), plain.count("avg_attn_pattern_L0H0"))
    assert rec["pattern_L0H0"][4].shape == (0, 0)
    for key in ("resid_out_1", "mean_1", "mlp_out_1", "avg_attn_pattern_L1H2"):
        torch.testing.assert_close(rec[key], plain[key], rtol=1e-5, atol=1e-5)


def test_only_empty_samples_leave_nothing_and_a_later_pass_everything():
    model, inputs = build("llama"), padded(TEXTS)
    nothing = {name: torch.zeros_like(x) for name, x in inputs.items()}
    sites = ["resid_out", dc.Site("mlp_out", reduce="mean"), "avg_attn_pattern"]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**nothing)
        assert rec["resid_out_1"].shape == (0, 32) and rec["avg_attn_pattern_L0H0"].shape == (0, 0)
        model(**inputs)
    assert int(rec.count("mlp_out_1")) == NUM_TOKENS and not rec["mlp_out_1"].isnan().any()
    assert rec["avg_attn_pattern_L0H0"].shape == (6, 6)


def test_a_mask_with_holes_leaves_its_tokens_out_of_rows_and_is_refused_by_attention():
    model, inputs = build("bert"), padded(TEXTS)
    holes = inputs["attention_mask"].clone()
    holes[0, 2] = 0
    with dc.record(model, ["resid_out"], mask=holes) as rec, torch.no_grad():
        model(**inputs)
    expected = by_hand(model, "bert.encoder.layer.1", inputs)[holes.bool()]
    assert torch.equal(rec["resid_out_1"], expected)
    assert rec.rows("resid_out_1")["position"][:5].tolist() == [0, 1, 2, 3, 4]
    with (
        dc.record(model, ["avg_attn_pattern"], mask=holes) as rec,
        pytest.raises(dc.SiteError, match="mask with holes"),
    ):
        model(**inputs)
    assert len(rec) == 0


def test_a_mask_that_was_passed_by_position_is_found():
    model, inputs = build("llama"), padded(TEXTS)
    with dc.record(model, ["resid_out"]) as rec, torch.no_grad():
        model(inputs["input_ids"], inputs["attention_mask"])
    assert rec["resid_out_0"].shape == (NUM_TOKENS, 32)


@pytest.mark.parametrize("mask", [torch.ones(4, 6, 6), torch.ones(4, 1, 6, 6)], ids=["3-D", "4-D"])
def test_masks_of_more_dims_are_refused_and_a_padding_mask_beside_them_is_not(mask):
    model, inputs = build("bert"), padded(TEXTS)
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    with dc.record(model, ["resid_out"]) as rec, pytest.raises(dc.SiteError, match=r"expected a padding mask \[B, S\]"):
        model(**inputs)
    with dc.record(model, ["resid_out"], mask=padded(TEXTS)["attention_mask"]) as rec, torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(4, 1, 6, 6).bool())
    assert rec["resid_out_0"].shape == (NUM_TOKENS, 32)


# -- reductions ------------------------------------------------------------------------------------------------


def test_a_mean_is_of_all_valid_tokens_of_all_passes_not_of_passes_or_samples():
    model, batches = build("gpt2"), [padded(TEXTS[:1]), padded(TEXTS[1:], "left")]
    with dc.record(model, [dc.Site("mlp_out", reduce="mean")]) as rec, torch.no_grad():
        for inputs in batches:
            model(**inputs)
    parts = [by_hand(model, "transformer.h.1.mlp", i)[i["attention_mask"].bool()].double() for i in batches]
    expected = torch.cat(parts).mean(0)
    tolerance = dict(rtol=0, atol=1e-6 * float(torch.cat(parts).abs().mean()))
    torch.testing.assert_close(rec["mlp_out_1"].double(), expected, **tolerance)
    assert int(rec.count("mlp_out_1")) == NUM_TOKENS
    mean_of_means = torch.stack([part.mean(0) for part in parts]).mean(0)
    with pytest.raises(AssertionError):  # what a careless average would be is told apart
        torch.testing.assert_close(rec["mlp_out_1"].double(), mean_of_means, **tolerance)


def test_a_dict_of_strategies_gives_a_key_for_each_from_one_hook():
    model, inputs = build("llama"), padded(TEXTS)
    reduce = {"sum": "sum", "mean": dc.Mean(), "max": "max", "min": dc.Min(), "moments": "moments", "rows": "cat"}
    with dc.record(model, [dc.Site("mlp_act", reduce=reduce)]) as rec, torch.no_grad():
        assert all(len(layer.mlp.down_proj._forward_pre_hooks) == 1 for layer in model.model.layers)
        model(**inputs)
    x = by_hand(model, "model.layers.0.mlp.down_proj", inputs, "input")[inputs["attention_mask"].bool()]
    assert list(rec) == [f"mlp_act_{n}_{suffix}" for n in range(2) for suffix in reduce]
    assert torch.equal(rec["mlp_act_0_rows"], x)
    assert torch.equal(rec["mlp_act_0_max"], x.amax(0)) and torch.equal(rec["mlp_act_0_min"], x.amin(0))
    for suffix, expected in (("sum", x.double().sum(0)), ("mean", x.double().mean(0))):
        torch.testing.assert_close(rec[f"mlp_act_0_{suffix}"].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rec["mlp_act_0_moments"]["variance"].double(), x.double().var(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("strategy", ["mean", "sum", "max", "min", "moments"])
def test_a_reduction_per_head_is_that_of_each_heads_rows(name, strategy):
    model, inputs = build(name), padded(TEXTS, "left")
    site = dc.Site("head_keys", reduce={"kept": "cat", "one": strategy})
    with dc.record(model, [site]) as rec, torch.no_grad():
        model(**inputs)
    num_heads = 2 if name == "llama" else 4
    for head in range(num_heads):
        rows = rec[f"head_keys_L1H{head}_kept"].double()
        found = rec[f"head_keys_L1H{head}_one"]
        if strategy == "moments":
            assert int(found["count"]) == NUM_TOKENS
            found, expected = found["variance"], rows.var(0)
        else:
            expected = {"mean": rows.mean, "sum": rows.sum, "max": rows.amax, "min": rows.amin}[strategy](0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert len(rec) == 2 * 2 * num_heads


@dataclasses.dataclass(frozen=True)
class Nameless(Fieldwise):
    """Registered nowhere, so that no rank could tell another what its state is."""

    lift = finalize = lambda *args: {}


def test_a_strategy_without_a_name_is_refused_when_the_site_is_made():
    with pytest.raises(dc.SiteError, match=r"site 'resid_out': Nameless has no name: call dc.register_strategy"):
        dc.Site("resid_out", reduce=Nameless())


@dataclasses.dataclass(frozen=True)
class SecondMoment(Fieldwise):
    """Σ x xᵀ / n over samples: not element by element, so heads can't be taken as one."""

    dim: str = "auto"
    ragged: bool = False
    size: None = None
    accumulate: None = None
    fields = (Field("total", SUM), Field("count", SUM))

    def lift(self, value_n, weight_n=None):
        # In the values' own dtype, so that what autocast would do to it shows.
        return {"total": value_n.mT @ value_n, "count": torch.tensor(len(value_n))}

    def finalize(self, state):
        return state["total"] / state["count"]


@pytest.fixture
def _second_moment(monkeypatch):
    monkeypatch.setattr(strategies, "_BY_NAME", dict(strategies._BY_NAME))
    register_strategy("second_moment", SecondMoment)


@pytest.mark.usefixtures("_second_moment")
def test_a_users_strategy_sees_one_head_at_a_time():
    model, inputs = build("llama"), padded(TEXTS)
    sites = [
        dc.Site("head_queries", reduce={"m": SecondMoment(), "": "cat"}),
        dc.Site("resid_out", reduce=SecondMoment()),
    ]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(**inputs)
        model(**inputs)
    for head in range(4):
        rows = rec[f"head_queries_L1H{head}"].double()
        assert rows.shape == (2 * NUM_TOKENS, 8)
        expected = torch.stack([torch.outer(x, x) for x in rows]).mean(0)
        torch.testing.assert_close(rec[f"head_queries_L1H{head}_m"].double(), expected, rtol=1e-5, atol=1e-6)
    assert rec["resid_out_0"].shape == (32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_half_precision_models_are_as_good_as_float64_ones(dtype):
    model, inputs = build("llama", dtype=dtype), padded(TEXTS * 20)
    sites = [dc.Site("resid_out", reduce="mean"), dc.Site("resid_out", tokens="mean", key="token_mean_{layer}")]
    with dc.record(model, [*sites, dc.Site("resid_out", key="rows_{layer}")]) as rec, torch.no_grad():
        model(**inputs)
    x = by_hand(model, "model.layers.1", inputs)[inputs["attention_mask"].bool()]
    assert rec["rows_1"].dtype == dtype and torch.equal(rec["rows_1"], x)
    assert rec["resid_out_1"].dtype == torch.float32 and rec["token_mean_1"].dtype == torch.float32
    expected = x.double().mean(0)
    tolerance = dict(rtol=0, atol=1e-6 * float(x.double().abs().mean()))
    torch.testing.assert_close(rec["resid_out_1"].double(), expected, **tolerance)
    per_sample = torch.stack([part.double().mean(0) for part in x.split([6, 3, 1, 5] * 20)])
    torch.testing.assert_close(rec["token_mean_1"].double(), per_sample, **tolerance)
    with pytest.raises(AssertionError):  # a mean in the model's own dtype is told apart
        torch.testing.assert_close(x.mean(0).double(), expected, **tolerance)


@pytest.mark.usefixtures("_second_moment")
def test_autocast_does_not_round_what_strategies_compute():
    model, inputs = build("llama"), padded(TEXTS)
    site = dc.Site("embed", reduce={"": SecondMoment(), "rows": "cat"})
    with dc.record(model, [site]) as rec, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
        rows = rec["embed_rows"]
        rounded = (rows.mT @ rows).double() / NUM_TOKENS
    assert rows.dtype == torch.float32
    expected = rows.double().mT @ rows.double() / NUM_TOKENS
    torch.testing.assert_close(rec["embed"].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):  # what autocast makes of it is told apart
        torch.testing.assert_close(rounded, expected, rtol=1e-5, atol=1e-5)


def test_a_reduction_that_fails_names_its_site():
    model = Stack(nn.Identity())
    refused = pytest.raises(dc.SiteError, match=r"site 'blocks.0': Mean reduces real numbers, got torch.complex64")
    with dc.record(model, {"x": dc.Site("blocks.0", reduce="mean")}), refused:
        model(torch.zeros(2, 3, dtype=torch.complex64))


# -- averaged attention ----------------------------------------------------------------------------------------


def patterns_by_hand(name, texts_):
    """Per text, eager attention of the text alone, without padding: [layers, heads, L, L]."""
    model = build(name, attn_implementation="eager")
    with torch.no_grad():
        return [torch.stack(model(input_ids=text[None], output_attentions=True).attentions)[:, 0] for text in texts_]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_averaged_attention_is_the_mean_of_eager_patterns_of_unpadded_texts(name, side):
    model, alone = build(name), patterns_by_hand(name, TEXTS)
    with dc.record(model, ["avg_attn_pattern", "pattern"]) as rec, torch.no_grad():
        model(**padded(TEXTS[:3], side))
        model(**padded(TEXTS[3:], side))
    total, count = torch.zeros(2, 4, 6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    for pattern_lhss in alone:
        n = pattern_lhss.shape[-1]
        total[:, :, :n, :n] += pattern_lhss
        count[:n] += 1
    tolerance = dict(rtol=0, atol=2e-6)
    for layer in range(2):
        found = rec["avg_attn_pattern", layer]
        assert found.shape == (4, 6, 6) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), total[layer] / count[:, None], **tolerance)
        for head in range(4):
            assert torch.equal(rec.count(f"avg_attn_pattern_L{layer}H{head}"), count[:, None])
            for pattern_lhss, one in zip(alone, rec[f"pattern_L{layer}H{head}"], strict=True):
                torch.testing.assert_close(one, pattern_lhss[layer, head], **tolerance)
    with pytest.raises(AssertionError):  # dividing by the number of texts is told apart
        torch.testing.assert_close(rec["avg_attn_pattern", 1].double(), total[1] / len(TEXTS), **tolerance)


def test_attention_needs_tokens_and_an_attention_that_can_be_reached(monkeypatch):
    model = build("llama")
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    refused = pytest.raises(dc.SiteError, match=r"1 of 2 sites reported nothing .*: 'avg_attn_pattern' at layer 1")
    with dc.record(model, ["avg_attn_pattern"]) as rec, refused:
        model(**padded(TEXTS))
    assert len(rec) == 0
    with dc.record(model, [dc.Site("avg_attn_pattern", optional=True)]) as rec, torch.no_grad():
        model(**padded(TEXTS))
    assert list(rec) == [f"avg_attn_pattern_L0H{head}" for head in range(4)]


# -- memory ----------------------------------------------------------------------------------------------------


def needed(longest, room, itemsize=8, layers=2, heads=4):
    """Bytes by hand: totals of room × room, int64 counts, a pass's own float32 sums, and once what makes them."""
    sums = layers * heads * (room * room * itemsize + room * 8 + longest * longest * 4)
    return sums + (sum_scratch_bytes(len(TEXTS), heads, longest, 8, torch.device("cpu")) if longest else 0)


def counting(model, monkeypatch):
    """A list that grows with every forward pass."""
    runs, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: (runs.append(1), forward(*args, **kwargs))[1])
    return runs


def test_averages_that_do_not_fit_are_refused_before_the_model_runs(monkeypatch):
    model, inputs = build("llama"), padded(TEXTS)
    runs = counting(model, monkeypatch)
    nbytes = needed(longest=6, room=128)
    assert hooks.human(nbytes) == "1.1 MB"
    monkeypatch.setattr(hooks, "available_bytes", lambda device: nbytes - 1)
    with dc.record(model, ["avg_attn_pattern"]) as rec:
        with pytest.raises(
            dc.TooLarge, match=r"of 2 layers × 4 heads needs 1.1 MB more on cpu, 1.1 MB are free\. Take"
        ):
            model(**inputs)
        assert not runs and len(rec) == 0
        monkeypatch.setattr(hooks, "available_bytes", lambda device: nbytes)
        with torch.no_grad():
            model(**inputs)
        # The sums are there now: a further pass needs its own only.
        monkeypatch.setattr(hooks, "available_bytes", lambda device: needed(longest=6, room=0))
        with torch.no_grad():
            model(**inputs)
        monkeypatch.setattr(hooks, "available_bytes", lambda device: needed(longest=6, room=0) - 1)
        with pytest.raises(dc.TooLarge, match=r"needs [\d.]+ kB more"):
            model(**inputs)
    assert len(runs) == 2 and int(rec.count("avg_attn_pattern_L0H0")[0]) == 8


def test_averages_of_a_fixed_size_are_refused_when_recording_begins(monkeypatch):
    model = build("llama")
    site = dc.Site("avg_attn_pattern", reduce=dc.AveragePattern(size=50, accumulate=torch.float32), layers=[1])
    nbytes = needed(longest=0, room=50, itemsize=4, layers=1)
    monkeypatch.setattr(hooks, "available_bytes", lambda device: nbytes - 1)
    with pytest.raises(dc.TooLarge, match=r"of 1 layers × 4 heads needs 41.6 kB more"), dc.record(model, [site]):
        pytest.fail("the block began")
    assert num_hooks(model) == 0
    monkeypatch.setattr(hooks, "available_bytes", lambda device: nbytes + needed(longest=6, room=0, layers=1))
    with dc.record(model, [site]) as rec, torch.no_grad():
        model(**padded(TEXTS))
    assert rec["avg_attn_pattern", 1].shape == (4, 6, 6)


def test_texts_longer_than_a_fixed_size_are_refused_before_the_model_runs(monkeypatch):
    model = build("llama")
    runs = counting(model, monkeypatch)
    with dc.record(model, [dc.Site("avg_attn_pattern", reduce=dc.AveragePattern(size=5))]) as rec:
        with pytest.raises(dc.SiteError, match=r"'avg_attn_pattern' at layer 0: .*exceeds size=5.* Cut the texts"):
            model(**padded(TEXTS))
        assert not runs
        with torch.no_grad():
            model(**padded(TEXTS[1:]))
    assert rec["avg_attn_pattern", 0].shape == (4, 5, 5)


# -- the model neither notices nor remembers -------------------------------------------------------------------

EVERYTHING = ["resid_in", "resid_out", "head_values", dc.Site("mlp_out", reduce="mean"), "avg_attn_pattern", "pattern"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_model_computes_what_it_would_have_computed(name):
    model, inputs = build(name), padded(TEXTS)
    with torch.no_grad():
        before = model(**inputs).logits
        with dc.record(model, EVERYTHING):
            during = model(**inputs).logits
    assert torch.equal(before, during)
    assert num_hooks(model) == 0


@contextlib.contextmanager
def failing(module, times=1):
    """A module that runs out of memory the first times it is called."""
    forward, left = module.forward, [times]

    def fail(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("as if")
        return forward(*args, **kwargs)

    module.forward = fail
    yield
    del module.forward


def test_hooks_are_off_whatever_raised(monkeypatch):
    model, inputs = build("llama"), padded(TEXTS)
    interface = dict(vars(transformers.AttentionInterface))

    def untouched():
        return num_hooks(model) == 0 and dict(vars(transformers.AttentionInterface)) == interface

    def interrupted():
        assert not untouched()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), dc.record(model, EVERYTHING):
        interrupted()
    assert untouched()
    with failing(model.model.layers[1].mlp), pytest.raises(torch.OutOfMemoryError), dc.record(model, EVERYTHING):
        model(**inputs)
    assert untouched()
    # Half-way through hooking.
    last = model.model.layers[1]
    monkeypatch.setattr(
        last, "register_forward_hook", lambda hook: (_ for _ in ()).throw(RuntimeError("no hooks here"))
    )
    with pytest.raises(RuntimeError, match="no hooks here"), dc.record(model, EVERYTHING):
        pytest.fail("the block began")
    assert untouched()
    # And the compiler is as it was.
    compiled = torch.compile(Counting(), backend="eager")
    compiled(torch.zeros(1))
    assert compiled._orig_mod.traced


class Counting(nn.Module):
    """Notes whether a compiler looked at it."""

    traced = False

    def forward(self, x):
        self.traced = torch.compiler.is_compiling()
        return x + 1


def test_a_pass_that_raised_and_is_repeated_in_halves_counts_once():
    model, inputs = build("llama"), padded(TEXTS)
    sites = ["resid_out", dc.Site("resid_in", reduce="mean"), dc.Site("head_queries", reduce="sum"), "avg_attn_pattern"]
    sites += ["pattern"]
    with dc.record(model, sites, index=range(4)) as whole, torch.no_grad():
        model(**inputs)
    for into in (None, dc.ActivationCache()):
        with failing(model.model.layers[1].mlp), dc.record(model, sites, into, index=range(4)) as rec, torch.no_grad():
            with pytest.raises(torch.OutOfMemoryError):
                model(**inputs)
            found = rec if into is None else into
            assert len(found) == 0
            with pytest.raises(dc.SiteError, match=r"index has 4 entries for a batch of 2 samples"):
                model(**padded(TEXTS[:2]))
            rec.next(index=[0, 1])
            model(**padded(TEXTS[:2]))
            rec.next(index=[2, 3])
            model(**padded(TEXTS[2:]))
        assert list(found) == list(whole)
        for key in whole:
            if not key.startswith("pattern"):
                torch.testing.assert_close(found[key], whole[key], rtol=1e-5, atol=1e-5)
        assert len(found["pattern_L0H0"]) == 4
        for key in ("resid_in_0", "head_queries_L1H3", "avg_attn_pattern_L1H0"):
            assert torch.equal(found.count(key), whole.count(key))


def test_a_pass_whose_root_raised_at_its_end_counts_for_nothing():
    model = Stack()
    forward = model.forward
    model.forward = lambda x: (_ for _ in ()).throw(RuntimeError("late")) if forward(x) is not None else None
    with dc.record(model, {"x": dc.Site("blocks.1", reduce="mean")}) as rec:
        with pytest.raises(RuntimeError, match="late"):
            model(torch.ones(2, 3))
        assert len(rec) == 0
        del model.forward
        model(torch.ones(4, 3))
    assert int(rec.count("x")) == 4


def test_what_was_recorded_is_the_caches_own():
    model, x = (
        Stack(nn.Linear(3, 3), nn.ReLU(inplace=True)),
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    )
    sites = {
        "before": "blocks.0",
        "mean": dc.Site("blocks.0", reduce="mean"),
        "given": dc.Site("blocks.1", io="input"),
    }
    linear = model.blocks[0](x).detach()
    assert (linear < 0).any()  # or the ReLU would overwrite nothing
    with dc.record(model, sites) as rec:
        model(x)
    assert torch.equal(rec["before"], linear) and torch.equal(rec["given"], linear)
    torch.testing.assert_close(rec["mean"], linear.mean(0))


class AddsInPlace(nn.Module):
    """A residual that is added to what the part gave, as some models do."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(3, 3)

    def forward(self, x):
        out = self.part(x)
        out += x
        return out


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3)], ids=["[B, D]", "[B, S, D]"])
def test_a_residual_added_in_place_does_not_reach_what_was_recorded(shape):
    block = AddsInPlace()
    model, x = Stack(block), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = block.part(x).detach().reshape(-1, 3)
    sites = {
        "part": "blocks.0.part",
        "sum": dc.Site("blocks.0.part", reduce="sum"),
        "first": dc.Site("blocks.0.part", reduce="cat"),
    }
    with dc.record(model, sites) as rec:
        model(x)
    assert torch.equal(rec["part"], expected) and torch.equal(rec["first"], expected)
    torch.testing.assert_close(rec["sum"], expected.sum(0), rtol=1e-6, atol=1e-6)


def test_kept_rows_are_converted_once_and_only_the_part_that_was_asked_for_is_held():
    model, inputs = build("gpt2"), padded(TEXTS[:1])
    site = dc.Site("queries", dtype=torch.float64, device="cpu", layers=[0])
    with dc.record(model, [site, dc.Site("keys", layers=[0])]) as rec, torch.no_grad():
        model(**inputs)
    fused = by_hand(model, "transformer.h.0.attn.c_attn", inputs)[0]
    assert rec["queries_0"].dtype == torch.float64 and torch.equal(rec["queries_0"], fused[:, :32].double())
    assert rec["keys_0"].untyped_storage().nbytes() == 6 * 32 * 4  # not the fused projection's


def test_a_transform_sees_rows_and_columns_and_keeps_their_number():
    model, inputs = build("llama"), padded(TEXTS)
    label = torch.tensor([1.0, 2.0, 3.0, 4.0])
    seen = {}

    def scale(x_n, columns):
        seen.update(columns.by_name)
        return x_n * columns.by_name["label"][:, None]

    with (
        dc.record(model, [dc.Site("resid_out", transform=scale, tokens="last"), "embed"], label=label) as rec,
        torch.no_grad(),
    ):
        model(**inputs)
    last = by_hand(model, "model.layers.1", inputs)[range(4), [5, 2, 0, 4]]
    assert torch.equal(rec["resid_out_1"], last * label[:, None])
    assert sorted(seen) == ["label", "position", "sample"]

    bad = {
        "must keep its 15 rows, got \\(5, 32\\)": lambda x_n, columns: x_n[:5],
        "must keep its 15 rows, got NoneType": lambda x_n, columns: None,
        "expected 2 heads side by side in the last dim, got rows of \\(7,\\)": lambda x_n, columns: x_n[:, :7],
    }
    for message, transform in bad.items():
        site = dc.Site("head_keys" if "heads" in message else "resid_out", transform=transform)
        with dc.record(model, [site]), pytest.raises(dc.SiteError, match=message):
            model(**inputs)


@pytest.mark.parametrize("inference", [True, False])
def test_a_transform_that_writes_to_the_models_values_is_found_out(inference):
    model = Stack()
    site = dc.Site("blocks.0", transform=lambda x_n, columns: x_n.zero_())
    mode, error = (torch.inference_mode(), RuntimeError) if inference else (torch.no_grad(), dc.SiteError)
    with (
        dc.record(model, {"x": site}),
        mode,
        pytest.raises(error, match=r"wrote to its rows|[Ii]nference tensor"),
    ):
        model(torch.ones(2, 3))


# -- inference mode, gradients, checkpointing ------------------------------------------------------------------


def test_what_is_recorded_under_inference_mode_can_be_added_to_outside_of_it():
    model, inputs = build("llama"), padded(TEXTS)
    sites = [
        "resid_out",
        dc.Site("mlp_out", reduce="moments"),
        *EVERYTHING[-2:],
    ]
    with dc.record(model, sites, label=torch.arange(4)) as rec:
        with torch.inference_mode():
            model(**inputs)
        rec.next(label=torch.arange(4))
        with torch.no_grad():
            model(**inputs)
        rec.next(label=torch.arange(4))
        with torch.inference_mode():
            model(**inputs)
    assert int(rec["mlp_out_0"]["count"]) == 3 * NUM_TOKENS
    assert int(rec.count("avg_attn_pattern_L0H0")[0]) == 12
    rows = rec.rows("resid_out_0")
    for tensor in (rec["resid_out_0"], rec["mlp_out_0"]["mean"], rec["pattern_L0H0"][0], *rows.values()):
        assert not tensor.is_inference()
        tensor += 1


def test_columns_of_rows_per_sample_can_be_written_to_after_inference_mode():
    model = Stack()
    for index in (None, [2, 4]):
        with dc.record(model, {"x": "blocks.0"}, index=index) as rec, torch.inference_mode():
            model(torch.ones(2, 3))
        for tensor in (rec["x"], *rec.rows("x").values()):
            assert not tensor.is_inference()


def test_a_transform_may_leave_torch_while_a_model_is_trained():
    model, x = Stack(), torch.ones(2, 3)
    site = dc.Site("blocks.0", transform=lambda x_n, columns: torch.from_numpy(x_n.numpy() * 2))
    with dc.record(model, {"x": site}) as rec:
        assert model(x).requires_grad
    assert torch.equal(rec["x"], model.blocks[0](x).detach() * 2)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def train_step(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return gradients(model)


def test_gradients_flow_and_no_graph_is_held():
    model, inputs = build("llama"), padded(TEXTS)
    expected = train_step(model, inputs)
    with dc.record(model, EVERYTHING) as rec:
        found = train_step(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not rec["resid_out_0"].requires_grad and rec["resid_out_0"].grad_fn is None

    class OnGradient:  # a hook on a gradient lives as long as the graph
        def __call__(self, grad):
            return None

    def graph_dies_with_its_loss():
        hook = OnGradient()
        gone = weakref.ref(hook)
        handle = model.lm_head.register_forward_pre_hook(
            lambda m, args, hook=hook: args[0].register_hook(hook) and None
        )
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        handle.remove()
        del handle, hook
        assert gone() is not None
        del loss
        gc.collect()
        return gone() is None

    with dc.record(model, EVERYTHING):
        assert graph_dies_with_its_loss()
    leak = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: leak.append(out))
    assert not graph_dies_with_its_loss()  # a hook that keeps what it was shown is told apart
    handle.remove()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_what_checkpointing_runs_again_counts_once(reentrant):
    model, inputs = build("llama"), padded(TEXTS)
    with dc.record(model, EVERYTHING) as plain:
        expected = train_step(model, inputs)
    model.train()
    # Renamed in transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    runs = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: runs.append(1))
    with dc.record(model, EVERYTHING) as rec:
        found = train_step(model, inputs)
    handle.remove()
    assert len(runs) == 2  # forward, and again in backward
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(rec["resid_out_1"], plain["resid_out_1"])
    assert int(rec.count("mlp_out_0")) == NUM_TOKENS and len(rec["pattern_L1H0"]) == 4
    assert torch.equal(rec.count("avg_attn_pattern_L0H0"), plain.count("avg_attn_pattern_L0H0"))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_users_own_checkpoint_counts_once(reentrant):
    class Checkpointed(Stack):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    model, x = Checkpointed(), torch.ones(4, 3, requires_grad=True)
    with dc.record(model, {"x_{layer}": dc.Site("blocks.{layer}", reduce={"sum": "sum", "rows": "cat"})}) as rec:
        model(x).sum().backward()
    assert rec["x_0_rows"].shape == (4, 3) and int(rec.count("x_1_sum")) == 4
    assert x.grad is not None


# -- compilers -------------------------------------------------------------------------------------------------


def compile_whole(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_block(model):
    model.model.layers[0].compile(backend="eager")
    return model


def compile_wrapped_block(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


COMPILERS = [compile_whole, compile_in_place, compile_block, compile_wrapped_block]


@pytest.mark.parametrize("ran_before", [True, False], ids=["ran before", "didn't run before"])
@pytest.mark.parametrize("compile_", COMPILERS)
def test_hooks_of_a_compiled_model_fire(compile_, ran_before):
    model, inputs = build("llama"), padded(TEXTS)
    with dc.record(model, ["resid_out", "avg_attn_pattern"]) as plain, torch.no_grad():
        model(**inputs)
    compiled = compile_(model)
    with torch.no_grad():
        if ran_before:
            compiled(**inputs)
        with dc.record(compiled, ["resid_out", "avg_attn_pattern"]) as rec:
            compiled(**inputs)
    assert list(rec) == list(plain)
    assert torch.equal(rec["resid_out_1"], plain["resid_out_1"])
    assert torch.equal(rec["avg_attn_pattern", 1], plain["avg_attn_pattern", 1])
    assert num_hooks(compiled) == 0


@pytest.mark.parametrize("compile_", COMPILERS)
def test_hooks_fire_in_a_model_that_is_compiled_after_recording_began(compile_):
    model, inputs = build("llama"), padded(TEXTS)
    with dc.record(model, ["resid_out"]) as rec, torch.no_grad():
        compile_(model)(**inputs)
    assert rec["resid_out_1"].shape == (NUM_TOKENS, 32)


def test_hooks_fire_where_a_function_around_the_model_was_compiled():
    model = Stack()
    step = torch.compile(lambda x: model(x) * 2, backend="eager")
    step(torch.ones(4, 3))
    for root in (model, torch.compile(model, backend="eager")):
        with dc.record(model if root is model else root._orig_mod, {"x": "blocks.1"}) as rec:
            step(torch.ones(4, 3)) if root is model else root(torch.ones(4, 3))
        assert rec["x"].shape == (4, 3)


def test_a_compiled_hook_would_be_lost_and_the_compiler_works_again_afterwards():
    model = Stack(Counting())
    compiled = torch.compile(model, backend="eager")
    seen = []
    compiled(torch.ones(2))
    handle = model.blocks[0].register_forward_hook(lambda *args: seen.append(1))
    compiled(torch.ones(2))
    handle.remove()
    assert not seen  # the hazard itself
    model.blocks[0].traced = None
    with dc.record(model, {"x": "blocks.0"}) as rec:
        compiled(torch.ones(2))
        assert model.blocks[0].traced is False and rec["x"].tolist() == [2, 2]
    torch._dynamo.reset()
    compiled(torch.ones(2))
    assert model.blocks[0].traced is True


# -- what is no pass, and sites that don't fit -----------------------------------------------------------------


class Twice(nn.Module):
    """Two layers that are one module, as in ALBERT."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(3, 3)
        self.layers, self.unused, self.flag = nn.ModuleList([shared, shared]), nn.Linear(3, 3), False

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.unused(x) if self.flag else x


def test_a_module_that_runs_twice_in_a_pass_is_an_error():
    model = Twice()
    refused = pytest.raises(dc.SiteError, match=r"site 'layers.{layer}' \(layers.0\) ran twice in one forward pass")
    with dc.record(model, {"x_{layer}": "layers.{layer}"}) as rec, refused:
        model(torch.ones(2, 3))
    assert len(rec) == 0


def test_a_site_that_reports_nothing_is_an_error_unless_it_is_optional():
    model, x = Twice(), torch.ones(2, 3)
    with dc.record(model, {"x": "unused", "root": ""}) as rec:
        with pytest.raises(
            dc.SiteError, match=r"1 of 2 sites reported nothing in this forward pass: 'unused'\. .*optional"
        ):
            model(x)
        assert len(rec) == 0
        model.flag = True
        model(x)
        assert rec["x"].shape == (2, 3)
    model.flag = False
    with dc.record(model, {"x": dc.Site("unused", optional=True), "root": ""}) as rec:
        model(x)
        assert list(rec) == ["root"]
        model.flag = True
        model(x)
    assert list(rec) == ["root", "x"] and rec.rows("x")["sample"].tolist() == [2, 3]


def test_a_part_of_the_model_is_not_the_model():
    model = build("llama")
    with dc.record(model, ["resid_out"]) as rec:
        with pytest.raises(
            dc.SiteError, match=r"site 'resid_out' at model.layers.0 ran outside of .*\(LlamaForCausalLM\)"
        ):
            model.model(TEXTS[0][None])
        with torch.no_grad():
            model(TEXTS[0][None])
        with pytest.raises(dc.SiteError, match="call that model, not a part of it"):
            model.model(TEXTS[0][None])
    assert len(rec["resid_out_0"]) == 6


@pytest.mark.parametrize("where", ["before any site", "after a site"])
def test_a_part_alone_is_refused_after_a_pass_that_raised_too(where):
    """What it shows would belong to the pass that raised, and count nowhere without a word."""
    model, inputs = build("llama"), padded(TEXTS)
    part = model.model.embed_tokens if where == "before any site" else model.model.layers[1].mlp
    with dc.record(model, ["resid_out"], index=range(4)) as rec, torch.no_grad():
        with failing(part), pytest.raises(torch.OutOfMemoryError):
            model(**inputs)
        with pytest.raises(dc.SiteError, match="call that model, not a part of it"):
            model.model(**inputs)
        assert len(rec) == 0
        model(**inputs)
    assert len(rec["resid_out_1"]) == NUM_TOKENS and num_hooks(model) == 0


class Outputs(nn.Module):
    """Gives what it is told to give, from keywords."""

    def __init__(self, make):
        super().__init__()
        self.inner, self.make = nn.Identity(), make

    def forward(self, *, mask=None, x):
        return self.make(self.inner(x))


def test_values_are_found_in_tuples_dicts_and_model_outputs():
    x = torch.randn(2, 3)
    output = transformers.modeling_outputs.CausalLMOutput
    for make in (
        lambda x: x,
        lambda x: (x, x + 1),
        lambda x: [None, x],
        lambda x: {"a": 3, "logits": x},
        lambda x: output(loss=x.sum(), logits=x),
    ):
        with dc.record(Outputs(make), {"out": ""}) as rec:
            rec._recorder.model(x=x)
        assert torch.equal(rec["out"], x)
    for make in (lambda x: None, lambda x: "text", lambda x: (x.sum(),)):
        with (
            dc.record(model := Outputs(make), {"out": ""}),
            pytest.raises(dc.SiteError, match="site '': expected a tensor"),
        ):
            model(x=x)


class Keywords(nn.Module):
    """Calls its part by keywords, in an order that isn't the signature's."""

    class Part(nn.Module):
        def forward(self, x, scale=None):
            return x * scale

    def __init__(self):
        super().__init__()
        self.part = self.Part()

    def forward(self, x):
        return self.part(scale=torch.full((2, 3), 2.0), x=x)


def test_an_input_by_keyword_is_the_first_of_the_signature():
    x = torch.randn(2, 3)
    with dc.record(model := Keywords(), {"in": dc.Site("part", io="input")}) as rec:
        model(x)
    assert torch.equal(rec["in"], x)


def test_a_value_that_has_no_samples_or_tokens_is_refused():
    model = build("llama")
    refused = pytest.raises(
        dc.SiteError, match=r"'model.rotary_emb': expected a value \[B, S, …\] = \(4, 6\), or one row"
    )
    with dc.record(model, {"rotary": "model.rotary_emb"}), refused:
        model(TEXTS[0].repeat(4, 1))
    flat = Stack(nn.Flatten(0, 1))
    with (
        dc.record(flat, {"x": "blocks.0"}),
        pytest.raises(dc.SiteError, match=r"got \(10, 3\)\. Hook a module that keeps"),
    ):
        flat(torch.ones(2, 5, 3))


# -- models of other shapes ------------------------------------------------------------------------------------


def test_floats_of_two_dims_are_samples_of_three_dims_tokens():
    model = Stack()
    x_bd, x_bsd = torch.randn(4, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    sites = {"all": "blocks.0", "last": dc.Site("blocks.0", tokens="last"), "mean": dc.Site("blocks.0", reduce="mean")}
    with dc.record(model, sites) as rec, torch.no_grad():
        model(x_bd)
    assert torch.equal(rec["all"], model.blocks[0](x_bd)) and torch.equal(rec["last"], rec["all"])
    assert int(rec.count("mean")) == 4
    assert rec.rows("all")["sample"].tolist() == [0, 1, 2, 3]
    with dc.record(model, sites) as rec, torch.no_grad():
        model(x_bsd, mask)
    y = model.blocks[0](x_bsd)
    assert torch.equal(rec["all"], y[mask.bool()]) and torch.equal(rec["last"], y[[0, 1], [2, 4]])
    assert int(rec.count("mean")) == 8


def test_tokens_of_an_input_without_any_lie_along_a_dim_that_a_site_names():
    class Spread(nn.Module):
        """[B, D] to [B, T, D]."""

        def forward(self, x):
            return x.unsqueeze(1) * torch.arange(1.0, 5.0)[:, None]

    model, x = Stack(Spread()), torch.randn(2, 3)
    expected = model(x)
    with dc.record(model, {"last": dc.Site("blocks.0", tokens="last", layout="BSD"), "whole": "blocks.0"}) as rec:
        model(x)
    assert torch.equal(rec["last"], expected[:, -1]) and torch.equal(rec["whole"], expected)
    for tokens in ("last", "mean", 0):
        refused = pytest.raises(dc.SiteError, match=r"which dim of a value \(2, 4, 3\) they lie along isn't known")
        with dc.record(model, {"x": dc.Site("blocks.0", tokens=tokens)}), refused:
            model(x)


def test_what_is_pooled_stays_as_it_lies_though_tokens_come_first_elsewhere():
    class Pool(nn.Module):
        def forward(self, x):
            return x.mean(1)

    model, x = Stack(Pool()), torch.randn(3, 5, 3)  # as many samples as features: nothing but its order tells
    with dc.record(model, {"x": dc.Site("blocks.0", layout="SBD")}) as rec:
        model(x)
    assert torch.equal(rec["x"], x.mean(1)) and not torch.equal(rec["x"], x.mean(1).T)


def test_the_batch_is_what_hooks_that_were_there_before_make_of_it():
    model = Stack()
    handle = model.register_forward_pre_hook(lambda m, args: (args[0][:2], args[1][:2]))
    with dc.record(model, {"x": "blocks.0", "in": dc.Site("", io="input"), "out": ""}) as rec, torch.no_grad():
        model(x := torch.randn(4, 3, 3), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]))
    handle.remove()
    valid = x[[0, 0, 1], [0, 1, 0]]
    assert torch.equal(rec["in"], valid) and torch.equal(rec["x"], model.blocks[0](x)[[0, 0, 1], [0, 1, 0]])
    assert rec["out"].shape == (3, 3)


def test_what_a_model_pools_is_one_row_a_sample():
    model, inputs = build("bert", head=False), padded(TEXTS)
    sites = {"pooled": "pooler", "mean": dc.Site("pooler", reduce="mean")}
    with dc.record(model, sites, index=[3, 1, 2, 0]) as rec, torch.no_grad():
        pooled = model(**inputs).pooler_output
    assert torch.equal(rec["pooled"], pooled[[3, 1, 2, 0]]) and rec.rows("pooled")["sample"].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(rec["mean"], pooled.mean(0))


# -- which index, mask and columns a pass gets -----------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"index": [0, 1]}, {"mask": torch.ones(2, 5)}, {"label": torch.zeros(2)}],
    ids=["index", "mask", "columns"],
)
def test_what_was_given_to_record_belongs_to_one_pass(given):
    model, x = Stack(), torch.ones(2, 5, 3)
    with dc.record(model, {"x": "blocks.0"}, **given) as rec:
        model(x)
        with pytest.raises(dc.SiteError, match=r"belong to one forward pass, .* call rec.next\(index=…\) before it"):
            model(x)
        assert len(rec["x"]) == 10
        rec.next(**({"index": [5, 6]} if "index" in given else {}))
        model(x)
    assert len(rec["x"]) == 20
    with pytest.raises(RuntimeError, match=r"next\(\) belongs inside the block"):
        rec.next(index=[0, 1])


def test_passes_without_index_mask_and_columns_need_no_next():
    model = Stack()
    with dc.record(model, {"x": "blocks.0"}) as rec:
        for _ in range(3):
            model(torch.ones(2, 3))
    assert rec.rows("x")["sample"].tolist() == list(range(6))


@pytest.mark.parametrize("first", [[0, 1], None], ids=["then without", "then with"])
def test_passes_with_and_without_an_index_do_not_mix(first):
    model, x = Stack(), torch.ones(2, 3)
    with dc.record(model, {"x": "blocks.0"}, index=first) as rec:
        model(x)
        rec.next(index=[2, 3] if first is None else None)
        with pytest.raises(dc.SiteError, match="all have an index or none has"):
            model(x)
    assert len(rec["x"]) == 2


def test_a_pass_that_was_refused_leaves_the_index_to_the_next():
    model = Stack()
    with dc.record(model, {"x": "blocks.0"}, index=[4, 2]) as rec:
        with pytest.raises(dc.SiteError, match="index has 2 entries for a batch of 3"):
            model(torch.ones(3, 3))
        model(torch.ones(2, 3))
    assert rec.rows("x")["sample"].tolist() == [2, 4]


@pytest.mark.parametrize("name", ["sample", "position"])
def test_columns_of_names_that_are_taken_are_refused(name):
    with pytest.raises(dc.SiteError, match=rf"columns \['{name}'\] are every row's own already"):
        dc.record(Stack(), {"x": "blocks.0"}, **{name: torch.zeros(2)}).__enter__()


@pytest.mark.parametrize("name", ["into", "phase", "stop"])
def test_options_of_the_block_are_no_columns_of_a_pass(name):
    with (
        dc.record(Stack(), {"x": "blocks.0"}) as rec,
        pytest.raises(dc.SiteError, match=rf"\['{name}'\] are options of record\(\), which hold for the whole block"),
    ):
        rec.next(**{name: torch.zeros(2)})
    if name != "into":
        with pytest.raises(dc.SiteError, match=f"{name} is "):
            dc.record(Stack(), {"x": "blocks.0"}, **{name: torch.zeros(2)}).__enter__()


def test_a_sample_twice_in_a_batch_is_an_error_of_a_reduction_and_one_row_of_a_concatenation():
    model, x = Stack(), torch.arange(6.0).view(2, 3)
    with dc.record(model, {"x": dc.Site("blocks.0", reduce="mean")}, index=[3, 3]) as rec:
        with pytest.raises(dc.DuplicateSamples):
            model(x)
        rec.next(index=[3, 4])
        model(x)
        rec.next(index=[4, 5])
        with pytest.raises(dc.DuplicateSamples):
            model(x)
    assert int(rec.count("x")) == 2
    with dc.record(model, {"x": "blocks.0"}, index=[3, 3]) as rec:
        model(x)
    assert len(rec["x"]) == 1


# -- into another cache ----------------------------------------------------------------------------------------


def two_batches(model, sites, into, indexed=False):
    with dc.record(model, sites, into) as rec, torch.no_grad():
        for start in (0, 2):
            if indexed:
                rec.next(index=range(start, start + 2))
            model(**padded(TEXTS[start : start + 2]))
    return rec


SITES = ["resid_out", dc.Site("mlp_out", reduce="moments"), "head_values", "avg_attn_pattern"]


def same(found, expected):
    assert set(found) == set(expected)
    for key in expected:
        for name, x in (expected[key] if isinstance(expected[key], dict) else {"": expected[key]}).items():
            y = found[key][name] if name else found[key]
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)


def test_recording_into_a_cache_is_recording_and_merging():
    model = build("llama")
    for registered in ({}, {"resid_out_": dc.Mean(), "head_values": dc.Max(), "head_values_L0H1": dc.Min()}):
        into, apart = dc.ActivationCache(), dc.ActivationCache()
        for pattern, strategy in registered.items():
            into.register_aggregation(pattern, strategy)
            apart.register_aggregation(pattern, strategy)
        assert len(two_batches(model, SITES, into)) == 0  # the record itself stays empty
        for start in (0, 2):
            with dc.record(model, SITES) as rec, torch.no_grad():
                model(**padded(TEXTS[start : start + 2]))
            apart.cat(rec)
        same(into, apart)
        assert into["resid_out_1"].shape == ((32,) if registered else (NUM_TOKENS, 32))


def test_what_the_receiving_cache_reduces_is_not_kept_until_the_pass_ends(monkeypatch):
    model, cache = build("llama"), dc.ActivationCache()
    cache.register_aggregation("resid_out_", dc.Mean())
    kept = []
    monkeypatch.setattr(hooks, "own", lambda *args: kept.append(args))
    two_batches(model, ["resid_out"], cache)
    assert not kept and int(cache.count("resid_out_1")) == NUM_TOKENS


def test_rows_are_converted_before_the_receiving_cache_reduces_them():
    model, cache = build("llama"), dc.ActivationCache()
    cache.register_aggregation("resid_out_", dc.Mean())
    two_batches(model, [dc.Site("resid_out", dtype=torch.float64)], cache)
    assert cache["resid_out_1"].dtype == torch.float64 and int(cache.count("resid_out_1")) == NUM_TOKENS


def test_recording_into_a_cache_in_deferred_mode_is_noted_until_its_end():
    model, cache = build("llama"), dc.ActivationCache()
    cache.register_aggregation("resid_out_", dc.Mean())
    with dc.record(model, SITES) as rec, torch.no_grad():
        model(**padded(TEXTS))
    with cache.deferred_mode():
        two_batches(model, SITES, cache)
        assert len(cache) == 0
    assert int(cache.count("resid_out_1")) == NUM_TOKENS
    torch.testing.assert_close(cache["resid_out_1"], rec["resid_out_1"].mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache["avg_attn_pattern", 1], rec["avg_attn_pattern", 1], rtol=0, atol=2e-6)
    with contextlib.suppress(KeyboardInterrupt), cache.deferred_mode():
        two_batches(model, SITES, cache)
        raise KeyboardInterrupt
    assert int(cache.count("resid_out_1")) == NUM_TOKENS


def test_recording_into_a_distributed_cache_needs_deferred_mode_and_fills_the_delta():
    model, cache = build("llama"), dc.DistributedCache()
    with pytest.raises(RuntimeError, match=r"record goes into the delta: open `with cache.deferred_mode\(\):` first"):
        dc.record(model, SITES, cache).__enter__()
    assert num_hooks(model) == 0
    apart = dc.ActivationCache()
    two_batches(model, SITES, apart, indexed=True)
    with cache.deferred_mode():
        two_batches(model, SITES, cache, indexed=True)
        assert len(cache) == 0 and set(cache.delta) == set(apart)
    same(cache, apart)
    assert cache.rows("resid_out_0")["sample"].tolist() == apart.rows("resid_out_0")["sample"].tolist()
    with pytest.raises(dc.DuplicateSamples), cache.deferred_mode():
        two_batches(model, SITES, cache, indexed=True)


@pytest.mark.parametrize("into", [{}, "cache", nn.Identity()], ids=["a dict", "a str", "a module"])
def test_recording_into_what_is_no_cache_is_a_type_error(into):
    with pytest.raises(TypeError, match=r"into is an ActivationCache or a DistributedCache, got"):
        dc.record(Stack(), {"x": "blocks.0"}, into).__enter__()


def record_my_half(rank, world_size):
    torch.set_num_threads(1)
    cache = dc.DistributedCache(timeout_s=20)
    model = build("llama")
    with cache.deferred_mode(), dc.record(model, SITES, cache) as rec, torch.no_grad():
        for start in range(2 * rank, 4, 2 * world_size):
            rec.next(index=range(start, start + 2))
            model(**padded(TEXTS[start : start + 2]))
    return {key: cache[key] for key in cache}


def test_two_ranks_record_what_one_records(ranks):
    (one,) = ranks.run(1, record_my_half)
    for found in ranks.run(2, record_my_half):
        same(found, one)
        assert torch.equal(found["resid_out_1"], one["resid_out_1"])


def test_blocks_on_one_model_may_nest():
    model, inputs = build("llama"), padded(TEXTS)
    with dc.record(model, ["resid_out", "avg_attn_pattern"], index=range(4)) as outer, torch.no_grad():
        with dc.record(model, ["resid_out", dc.Site("mlp_out", reduce="mean")]) as inner:
            model(**inputs)
        outer.next(index=range(4, 8))
        model(**inputs)
    assert len(outer["resid_out_1"]) == 2 * NUM_TOKENS and len(inner["resid_out_1"]) == NUM_TOKENS
    assert int(outer.count("avg_attn_pattern_L0H0")[0]) == 8 and int(inner.count("mlp_out_0")) == NUM_TOKENS
    assert num_hooks(model) == 0


def test_a_recording_is_a_cache_that_can_be_copied_and_pickled():
    import copy
    import pickle

    with dc.record(model := Stack(), {"x": "blocks.0"}, index=[1, 0]) as rec:
        model(torch.arange(6.0).view(2, 3))
        rec.next(index=[3, 2])
        model(torch.arange(6.0).view(2, 3))
    for twin in (copy.copy(rec), copy.deepcopy(rec), pickle.loads(pickle.dumps(rec))):
        assert isinstance(twin, dc.ActivationCache) and torch.equal(twin["x"], rec["x"])
        assert twin.rows("x")["sample"].tolist() == [0, 1, 2, 3]
