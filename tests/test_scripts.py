"""The scripts that people write on their first day, each in few lines, and what plain torch makes of the same texts.

Every script runs on 1, 2 and 3 ranks that see different numbers of texts. Its oracle runs the model on one unpadded
text after the other, with hooks by hand, and is shown a mistake that it must tell.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import build, padded, texts
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

import distcache as dc
from distcache.dealing import share

transformers = pytest.importorskip("transformers")

TEXTS = [text.tolist() for text in texts((6, 3, 1, 5, 9, 2, 7, 4, 8))]
LABELS = [0, 1, 1, 0, 1, 0, 0, 0, 1]
LABELLED = [{"input_ids": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
WITH_IDS = [{"input_ids": text, "token_id": text} for text in TEXTS]
SIZE = 4  # texts of a batch: two ranks see 5 and 4 of the nine, three ranks 4, 4 and 1
PAIRS = [text.tolist() for text in texts((4, 6, 3, 1, 7, 5, 2, 2, 8, 3))]  # a text and its opposite, five times
PAIR_BATCHES = [PAIRS[:6], PAIRS[6:8], PAIRS[8:]]
PROMPTS = [text.tolist() for text in texts((5, 2, 4))]
PROMPT_BATCHES = [PROMPTS[:2], PROMPTS[2:]]  # a third rank has nothing to generate
POSITIONS = 10  # the longest text has 9
NEW = 6
TOP = 3


def batch_of(token_ids, side="right"):
    """What a tokenizer makes of texts: ids and a mask."""
    batch = padded([torch.tensor(ids) for ids in token_ids], side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


# -- the scripts -------------------------------------------------------------------------------------------------


def steering_vectors(model, prompts, cache):
    """From the mean of one label's prompts to that of the other's, at the last token: [layers, hidden]."""
    site = dc.Site("resid_out", tokens="last", reduce=dc.Grouped(dc.Mean(), 2, by="label"))
    dc.collect(model, prompts, site, batch_size=SIZE, columns=["label"], cache=cache, progress=False)
    mean = cache["resid_out", :]  # [layers, labels, hidden]
    return {"means": mean, "steering": mean[:, 1] - mean[:, 0], "count": cache.count("resid_out_1")}


def autoencoder_tokens(model, texts_and_ids, cache):
    """Every token's activation, with its id and where it stood, in shuffled batches."""
    site = dc.Site("resid_out", layers=[1])
    dc.collect(model, texts_and_ids, site, batch_size=SIZE, columns=["token_id"], cache=cache, progress=False)
    x, rows = cache["resid_out_1"], cache.rows("resid_out_1")
    for batch in torch.randperm(len(x)).split(8):
        yield x[batch], rows["token_id"][batch], rows["sample"][batch], rows["position"][batch]


def position_means(model, texts, cache):
    """The mean of each position: [layers, positions, hidden]."""
    site = dc.Site("resid_out", reduce=dc.Grouped(dc.Mean(), POSITIONS, by="position"))
    dc.collect(model, texts, site, batch_size=SIZE, cache=cache, progress=False)
    return {"means": cache["resid_out", :], "count": cache.count("resid_out_1")}


def whitened_difference(model, prompts, cache):
    """From one label's mean to the other's where all tokens have a covariance of 1: [hidden]."""
    reduce = {"cov": dc.Covariance(), "mean": dc.Grouped(dc.Mean(), 2, by="label")}
    site = dc.Site("resid_out", layers=[1], reduce=reduce)
    dc.collect(model, prompts, site, batch_size=SIZE, columns=["label"], cache=cache, progress=False)
    variance, axes = torch.linalg.eigh(cache["resid_out_1_cov"]["covariance"])
    mean = cache["resid_out_1_mean"]
    return (axes * variance.rsqrt()) @ axes.T @ (mean[1] - mean[0])


def calibration_ranges(model, texts, cache):
    """The least and the largest input of every Linear, by feature."""
    site = dc.Site(type=nn.Linear, io="input", key="in_{path}", reduce={"min": dc.Min(), "max": dc.Max()})
    dc.collect(model, texts, site, batch_size=SIZE, cache=cache, progress=False)
    return dict(cache.items())


def top_examples(model, texts, cache):
    """By neuron, the tokens at which it's most active, and the texts up to there."""
    dc.collect(model, texts, dc.Site("mlp_act", reduce=dc.TopK(TOP)), batch_size=SIZE, cache=cache, progress=False)
    best = cache["mlp_act_1"]  # values, sample and position: [k, neurons]
    shown = [
        [texts[sample][: position + 1] for sample, position in zip(samples, positions, strict=True)]
        for samples, positions in zip(best["sample"].T.tolist(), best["position"].T.tolist(), strict=True)
    ]
    return {"values": best["values"].T, "texts": shown}


def contrastive_pairs(model, batches, cache):
    """The difference of every pair of prompts at their last tokens: [layers, pairs, hidden]."""
    with cache.deferred_mode(), torch.no_grad():
        for index, batch in cache.share([batch_of(texts) for texts in batches]):
            with dc.record(model, dc.Site("resid_out", tokens="last")) as local:
                model(**batch)
            for key, x in local.items():
                cache.add(key, x[0::2] - x[1::2], index=index[0::2] // 2)
    return cache["resid_out", :]


def two_models(models, texts, cache):
    """How alike two models' texts lie, layer by layer: linear CKA, and the mean squared difference."""
    for name, model in models.items():
        site = dc.Site("resid_out", tokens="mean", key=f"{name}_{{layer}}")
        dc.collect(model, texts, site, batch_size=SIZE, cache=cache, progress=False)
    x, y = cache["base", :], cache["tuned", :]  # [layers, texts, hidden]
    xc, yc = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)

    def overlap(a, b):
        return (a.mT @ b).square().sum((1, 2))

    cka = overlap(xc, yc) / (overlap(xc, xc) * overlap(yc, yc)).sqrt()
    return {"cka": cka, "mse": (x - y).square().mean((1, 2))}


def while_generating(model, batches, cache):
    """Activations at the tokens that a model has generated: their mean by step, and all of them by text."""
    reduce = {"": dc.Cat(), "mean": dc.Grouped(dc.Mean(), NEW, by="step")}
    site = dc.Site("resid_out", layers=[1], reduce=reduce)
    with cache.deferred_mode(), dc.record(model, site, into=cache, phase="new") as rec:
        for index, batch in cache.share([batch_of(texts, side="left") for texts in batches]):
            rec.next(index=index)
            model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    count = cache.count("resid_out_1_mean")
    return {
        "rows": cache["resid_out_1"], **cache.rows("resid_out_1"), "mean": cache["resid_out_1_mean"], "count": count
    }  # fmt: skip


def logit_lens(model, texts, cache):
    """What each layer would say next: [layers, texts, vocabulary]."""
    dc.collect(model, texts, dc.Site("resid_out", tokens="last"), batch_size=SIZE, cache=cache, progress=False)
    return dc.unembed(model)(cache["resid_out", :])


# -- what plain torch says -----------------------------------------------------------------------------------------


def seen(model, path, token_ids, side="output", padding=0):
    """What a hook by hand is shown of each text alone: [[tokens, …], …]; `padding`: tokens that are counted with it."""
    module, shown = model.get_submodule(path), []

    def hook(_, args, output=None):
        value = args[0] if output is None else output
        shown.append((value[0] if isinstance(value, tuple) else value)[0])

    handle = module.register_forward_pre_hook(hook) if side == "input" else module.register_forward_hook(hook)
    with torch.no_grad():
        for ids in token_ids:
            mask = torch.tensor([[1] * len(ids) + [0] * padding])
            model(torch.tensor([ids + [0] * padding]), attention_mask=mask)
    handle.remove()
    return shown


def layers_of(model):
    return [f"model.layers.{n}" for n in range(model.config.num_hidden_layers)]


def class_means(x_nd, label_n, size=2):
    return torch.stack([x_nd[torch.as_tensor(label_n) == label].mean(0) for label in range(size)])


def steering_by_hand(model, labels=LABELS):
    last = [torch.stack([x_sd[-1] for x_sd in seen(model, path, TEXTS)]) for path in layers_of(model)]
    means = torch.stack([class_means(x_nd, labels) for x_nd in last])
    count = torch.tensor([labels.count(label) for label in range(2)])
    return {"means": means, "steering": means[:, 1] - means[:, 0], "count": count}


def autoencoder_by_hand(model, first_position=0):
    """Rows, token ids, samples and positions, in order."""
    where = [(i, s) for i, text in enumerate(TEXTS) for s in range(len(text))]
    sample, position = torch.tensor(where).T
    ids = torch.tensor([token for text in TEXTS for token in text])
    return [torch.cat(seen(model, "model.layers.1", TEXTS)), ids, sample, position + first_position]


def positions_by_hand(model, split=None):
    """`split`: how many texts each rank sees, whose means are then averaged, as they must not be."""
    means, count = [], torch.zeros(POSITIONS, dtype=torch.int64)
    for path in layers_of(model):
        padded_nsd = nn.utils.rnn.pad_sequence(seen(model, path, TEXTS), batch_first=True, padding_value=torch.nan)
        of_ranks = torch.stack([part.nanmean(0) for part in padded_nsd.split(split or len(TEXTS))])
        means.append(nn.functional.pad(of_ranks.nanmean(0), (0, 0, 0, 1), value=torch.nan))
    for text in TEXTS:
        count[: len(text)] += 1
    return {"means": torch.stack(means), "count": count}


def whitened_by_hand(model, padding=0):
    states = seen(model, "model.layers.1", TEXTS, padding=padding)
    x_nd = torch.cat(states)
    label_n = [label for label, x_sd in zip(LABELS, states, strict=True) for _ in x_sd]
    means = class_means(x_nd, label_n)
    variance, axes = torch.linalg.eigh(torch.cov(x_nd.T))
    return axes @ torch.diag(1 / variance.sqrt()) @ axes.T @ (means[1] - means[0])


def ranges_by_hand(model, padding=0):
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            x_nd = torch.cat(seen(model, path, TEXTS, "input", padding))
            found |= {f"in_{path}_min": x_nd.amin(0), f"in_{path}_max": x_nd.amax(0)}
    return found


def top_by_hand(model, late=0):
    """`late`: by how many tokens positions are off."""
    x_nd = torch.cat(seen(model, "model.layers.1.mlp.down_proj", TEXTS, "input"))
    up_to = [text[: s + 1 + late] for text in TEXTS for s in range(len(text))]
    values, rows = x_nd.T.topk(TOP)
    return {"values": values, "texts": [[up_to[row] for row in best] for best in rows.tolist()]}


def pairs_by_hand(model, other=1):
    """`other`: how far from a text its opposite stands."""
    last = [torch.stack([x_sd[-1] for x_sd in seen(model, path, PAIRS)]) for path in layers_of(model)]
    return torch.stack([x_nd[0::2] - x_nd.roll(-other, 0)[0::2] for x_nd in last])


def two_models_by_hand(models, center=True):
    cka, mse = [], []
    for path in layers_of(models["base"]):
        x, y = (torch.stack([x_sd.mean(0) for x_sd in seen(model, path, TEXTS)]) for model in models.values())
        mse.append(nn.functional.mse_loss(x, y))
        k, l = x @ x.T, y @ y.T  # of texts with texts, where the script has features with features
        if center:
            h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
            k, l = h @ k @ h, h @ l @ h
        cka.append((k * l).sum() / (k.norm() * l.norm()))
    return {"cka": torch.stack(cka), "mse": torch.stack(mse)}


def generated_by_hand(model, after_the_end=False):
    """`after_the_end`: what is fed for a text that has ended counts, as it must not."""
    end = model.generation_config.eos_token_id
    rows, columns = [], []
    for i, prompt in enumerate(PROMPTS):
        batch = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        text = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0].tolist()
        new = text[len(prompt) : -1]  # the last is never fed
        if after_the_end:
            new = (text[len(prompt) :] + [0] * NEW)[: NEW - 1]
        elif end in new:
            new = new[: new.index(end)]
        (x_sd,) = seen(model, "model.layers.1", [prompt + new])
        rows.append(x_sd[len(prompt) :])
        columns.extend((i, len(prompt) + n, n + 1, token) for n, token in enumerate(new))
    x_nd = torch.cat(rows)
    sample, position, step, token_id = torch.tensor(columns).T
    count = torch.stack([(step == n).sum() for n in range(NEW)])
    return {
        "rows": x_nd, "sample": sample, "position": position, "step": step, "token_id": token_id,
        "mean": class_means(x_nd, step, NEW), "count": count,
    }  # fmt: skip


def lens_by_hand(model, norm=True):
    with torch.no_grad():
        last = torch.stack([torch.stack([x[-1] for x in seen(model, path, TEXTS)]) for path in layers_of(model)])
        return model.lm_head(model.model.norm(last) if norm else last)


# -- all of them, on ranks -------------------------------------------------------------------------------------------


def llama():
    """float64, in which padding changes nothing that a tolerance of 1e-9 would see."""
    return build("llama", dtype=torch.float64)


def llama_that_ends():
    """A model for which one of the texts that it goes on with ends before the others."""
    model = llama()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    batch = batch_of(PROMPTS, "left")
    first = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0, batch["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = int(first[2])
    return model


def two_llamas():
    """A model, and one that has been trained on a little."""
    base = llama()
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return {"base": base, "tuned": tuned}


# script -> (what makes its model, its data, its oracle, a mistake that the oracle must tell)
SCRIPTS = {
    steering_vectors: (llama, LABELLED, steering_by_hand, dict(labels=[*LABELS[1:], LABELS[0]])),
    position_means: (llama, TEXTS, positions_by_hand, dict(split=(5, 4))),
    whitened_difference: (llama, LABELLED, whitened_by_hand, dict(padding=1)),
    calibration_ranges: (llama, TEXTS, ranges_by_hand, dict(padding=1)),
    top_examples: (llama, TEXTS, top_by_hand, dict(late=1)),
    contrastive_pairs: (llama, PAIR_BATCHES, pairs_by_hand, dict(other=3)),
    two_models: (two_llamas, TEXTS, two_models_by_hand, dict(center=False)),
    while_generating: (llama_that_ends, PROMPT_BATCHES, generated_by_hand, dict(after_the_end=True)),
    logit_lens: (llama, TEXTS, lens_by_hand, dict(norm=False)),
}


def run_all(rank, world_size):
    """What every script returns on this rank, and the autoencoder's, whose rows lie in shards."""
    found = {}
    for script, (build_model, data, _, _) in SCRIPTS.items():
        with torch.no_grad():
            found[script.__name__] = script(build_model(), data, dc.DistributedCache(timeout_s=30))
    sharded = dc.DistributedCache(dst="shard", timeout_s=30)
    found["autoencoder_tokens"] = list(autoencoder_tokens(llama(), WITH_IDS, sharded))
    return found


@pytest.fixture(scope="module")
def by_world_size(ranks):
    return {n: ranks.run(n, run_all) for n in (1, 2, 3)}


def agrees(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_says_what_plain_torch_says_on_every_rank(by_world_size, script, world_size):
    build_model, _, oracle, mistake = SCRIPTS[script]
    expected = oracle(build_model())
    for found in by_world_size[world_size]:
        agrees(found[script.__name__], expected)
    with pytest.raises(AssertionError):
        agrees(by_world_size[world_size][0][script.__name__], oracle(build_model(), **mistake))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_train_on_every_token_once_shuffled_with_its_id(by_world_size, world_size):
    of_ranks = [found["autoencoder_tokens"] for found in by_world_size[world_size]]
    assert all(len(x) == 8 for batches in of_ranks for x, *_ in batches[:-1])
    found = [torch.cat(parts) for parts in zip(*(batch for batches in of_ranks for batch in batches), strict=True)]
    order = (found[2] * 100 + found[3]).argsort()
    assert not torch.equal(order, torch.arange(len(order)))
    expected = autoencoder_by_hand(llama())
    agrees([column[order] for column in found], expected)
    # The oracle tells positions that count from 1, and a token's id beside its neighbour's activation.
    with pytest.raises(AssertionError):
        agrees([column[order] for column in found], autoencoder_by_hand(llama(), first_position=1))
    with pytest.raises(AssertionError):
        agrees([found[0][order].roll(1, 0), *(column[order] for column in found[1:])], expected)


def test_one_text_ends_before_the_others_so_that_generating_goes_on_without_it():
    model = llama_that_ends()
    steps = generated_by_hand(model)["sample"].bincount(minlength=len(PROMPTS)).tolist()
    assert min(steps) < max(steps) == NEW - 1


# -- loops of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_sampler_is_dealt_as_the_numbers_of_its_samples(world_size):
    batches = BatchSampler(SequentialSampler(TEXTS), 4, drop_last=False)
    one_by_one = SequentialSampler(TEXTS)
    dealt, numbers = [], []
    for rank in range(world_size):
        for index, batch in share(batches, rank, world_size)[1]:
            assert index.tolist() == batch
            dealt.extend(batch)
        for index, number in share(one_by_one, rank, world_size)[1]:
            assert index.tolist() == [number]
            numbers.append(number)
    assert sorted(dealt) == sorted(numbers) == list(range(len(TEXTS)))
    for dealing in (DistributedSampler(TEXTS, 2, 0), BatchSampler(DistributedSampler(TEXTS, 2, 0), 2, False)):
        with pytest.raises(ValueError, match="DistributedSampler deals samples itself"):
            share(dealing, 0, 2)
    with pytest.raises(TypeError, match="share deals batches, got int among them"):
        list(share(range(3), 0, 1)[1])


def share_by_rank(rank, world_size):
    """A sampler that deals samples itself, as that of another library may."""

    class OfRank(SequentialSampler):
        def __iter__(self):
            return iter(range(rank, len(TEXTS), world_size))

    cache = dc.DistributedCache(timeout_s=20)
    with cache.deferred_mode():
        for index, batch in cache.share(DataLoader(TEXTS, 2, sampler=OfRank(TEXTS), collate_fn=batch_of)):
            cache.add("ids", batch["input_ids"][:, :1], index=index)
    return cache["ids"]


def test_a_sampler_that_deals_by_itself_is_found_at_the_merge(ranks):
    for outcome in ranks.outcomes(2, share_by_rank):
        assert outcome.error.startswith("SchemaMismatch: cache.share() was given loaders of another order")
    assert ranks.run(1, share_by_rank)[0][:, 0].tolist() == [text[0] for text in TEXTS]


def test_a_value_of_ones_own_takes_a_label_as_it_takes_an_index():
    cache = dc.ActivationCache()
    cache.register_aggregation("mean", dc.Grouped(dc.Mean(), 2, by="label"))
    for i, label in enumerate(LABELS):
        cache.add("mean", torch.full((3,), float(i)), index=i, label=label)
        cache.add("row", torch.full((1, 3), float(i)), index=i, label=label)
    expected = class_means(torch.arange(9.0)[:, None].expand(9, 3), LABELS)
    agrees(cache["mean"], expected)
    assert cache.rows("row")["label"].tolist() == LABELS
    with pytest.raises(TypeError, match=r"column 'label' of 'row': expected a number per sample, got 'good'"):
        cache.add("row", torch.zeros(1, 3), index=9, label="good")


@pytest.mark.parametrize("data", [TEXTS, WITH_IDS], ids=["texts alone", "another field"])
def test_a_column_that_samples_lack_is_named(data):
    with pytest.raises(TypeError, match=r"column 'label': expected samples that are mappings with that field, got "):
        dc.collect(llama(), data, "resid_out", batch_size=SIZE, columns=["label"], progress=False)
