"""The loop: every sample is dealt to one rank, once, and N ranks collect what one process would have."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

import distcache as dc
from distcache.collect import pad_and_stack
from distcache.dealing import share

transformers = pytest.importorskip("transformers")

NUM_SAMPLES = 11
NUMBERED = TensorDataset(torch.arange(NUM_SAMPLES) * 10)
TEXTS = [
    torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (9, 4, 12, 1, 7, 7, 3, 12, 5, 2, 10)
]
SITES = [
    dc.Site("resid_out", tokens="last"),
    dc.Site("resid_out", reduce=dc.Mean(), key="mean_{layer}"),
    dc.Site("mlp_out", reduce={"var": dc.Moments(), "max": dc.Max()}),
    dc.Site("head_values", tokens="mean"),
    dc.Site("attn_in", tokens=[0, -1], layers=[1]),
    "avg_attn_pattern",
]


def tiny_llama():
    """A Llama with grouped heads and random weights, the same in every process."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def collect_on_ranks(rank, world_size, folder):
    cache = dc.collect(tiny_llama(), TEXTS, SITES, batch_size=2, progress=False)
    cache.save(f"{folder}/{world_size}")
    # Replicas are the same to the last bit, order of keys included.
    return {key: value if isinstance(value := cache[key], dict) else {"": value} for key in cache}


@pytest.fixture(scope="module")
def by_world_size(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return folder, {n: ranks.run(n, collect_on_ranks, str(folder)) for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_key_of_every_saved_cache_is_what_one_rank_collects(by_world_size, world_size):
    folder, _ = by_world_size
    one, many = dc.load(folder / "1"), dc.load(folder / str(world_size))
    assert list(one) == list(many)
    kept = 0
    for key in one:
        if key.startswith(("resid_out", "head_values", "attn_in")):
            kept += 1
            assert torch.equal(one[key], many[key]), key
            assert all(torch.equal(a, many.rows(key)[name]) for name, a in one.rows(key).items())
            continue
        left, right = one[key], many[key]
        for a, b in zip(*(x.values() if isinstance(x, dict) else [x] for x in (left, right)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(float(a.double().abs().mean()), 1e-30))
        assert torch.equal(one.count(key), many.count(key))
    assert kept == 2 + 4 + 1


def test_every_rank_holds_the_same_bits_in_the_same_order(by_world_size):
    for replicas in by_world_size[1].values():
        for other in replicas[1:]:
            assert list(other) == list(replicas[0])
            for key, parts in other.items():
                assert all(torch.equal(part, replicas[0][key][name]) for name, part in parts.items()), key


def test_one_rank_collects_what_plain_torch_computes_text_by_text(by_world_size):
    cache = dc.load(by_world_size[0] / "1")
    model = tiny_llama()
    states = []
    with torch.no_grad():
        for text in TEXTS:
            out = model(torch.tensor([text]), output_hidden_states=True)
            states.append(out.hidden_states[1][0])  # what the first block gives
    last = torch.stack([x_sd[-1] for x_sd in states])
    torch.testing.assert_close(cache["resid_out_0"], last, rtol=0, atol=2e-6)
    mean = torch.cat(states).double().mean(0).float()
    torch.testing.assert_close(cache["mean_0"], mean, rtol=0, atol=2e-6)
    assert int(cache.count("mean_0")) == sum(map(len, TEXTS))
    assert cache.rows("attn_in_1")["sample"].tolist() == [i for i, t in enumerate(TEXTS) for _ in range(min(2, len(t)))]
    # The oracle fails on a mean of means.
    of_means = torch.stack([x_sd.mean(0) for x_sd in states]).mean(0)
    assert (of_means - cache["mean_0"]).abs().max() > 1e-3


def test_averaged_patterns_are_eager_attention_averaged_by_hand(by_world_size):
    cache = dc.load(by_world_size[0] / "4")
    model = tiny_llama()
    model.set_attn_implementation("eager")
    size = max(map(len, TEXTS))
    total, count = torch.zeros(4, size, size, dtype=torch.float64), torch.zeros(size)
    for text in TEXTS:
        n = len(text)
        with torch.no_grad():
            total[:, :n, :n] += model(torch.tensor([text]), output_attentions=True).attentions[1][0].double()
        count[:n] += 1
    torch.testing.assert_close(cache["avg_attn_pattern", 1], (total / count[:, None]).float(), rtol=0, atol=2e-6)


# -- dealing ---------------------------------------------------------------------------------------------------


def deal(loader, world_size):
    """index -> sample, of all ranks together; fails where a sample is dealt twice."""
    dealt = {}
    for rank in range(world_size):
        for index, batch in share(loader, rank, world_size)[1]:
            for i, sample in zip(index.tolist(), batch[0] if isinstance(batch, list) else batch, strict=True):
                assert i not in dealt
                dealt[i] = sample.item()
    return dealt


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(NUMBERED, batch_size=3),
        DataLoader(NUMBERED, batch_size=3, shuffle=True),
        DataLoader(NUMBERED, batch_sampler=[[5, 1, 0], [2, 3], [4, 6, 7, 8, 9, 10]]),
        list((torch.arange(NUM_SAMPLES) * 10).split(4)),
    ],
    ids=["in order", "shuffled", "own batches", "a list of batches"],
)
def test_every_sample_is_dealt_once_with_its_number(loader, world_size):
    assert deal(loader, world_size) == {i: 10 * i for i in range(NUM_SAMPLES)}


def test_a_rank_reads_its_own_samples_only():
    read = []

    class Noting(TensorDataset):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    list(share(DataLoader(Noting(torch.arange(8)), batch_size=2), 1, 2)[1])
    assert read == [2, 3, 6, 7]


def test_loaders_that_deal_by_themselves_or_have_no_numbers_are_refused():
    data = TensorDataset(torch.arange(8))
    with pytest.raises(ValueError, match="DistributedSampler deals samples itself"):
        share(DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, 0)), 0, 2)
    with pytest.raises(TypeError, match="sized iterable of batches, got generator"):
        share((x for x in [data]), 0, 2)

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="map-style"):
        share(DataLoader(Endless(), batch_size=2), 0, 2)


def test_a_batch_sampler_over_a_plain_sampler_keeps_its_batches():
    batches = BatchSampler(SequentialSampler(range(5)), 2, drop_last=True)
    data = TensorDataset(torch.arange(5))
    found = [index.tolist() for index, _ in share(DataLoader(data, batch_sampler=batches), 0, 1)[1]]
    assert found == [[0, 1], [2, 3]]


def share_other_orders(rank, world_size):
    cache = dc.DistributedCache(timeout_s=20)
    order = [[0, 1], [2, 3]] if rank == 0 else [[3, 2], [1, 0]]
    with cache.deferred_mode():
        for index, (batch,) in cache.share(DataLoader(NUMBERED, batch_sampler=order)):
            local = dc.ActivationCache()
            local["x"] = batch
            cache.cat(local, index=index)


def test_loaders_of_another_order_on_another_rank_are_found_at_the_merge(ranks):
    for outcome in ranks.outcomes(2, share_other_orders):
        assert outcome.error.startswith("SchemaMismatch: cache.share() was given loaders of another order")


# -- batches ---------------------------------------------------------------------------------------------------


def test_token_ids_are_padded_and_get_a_mask():
    batch = pad_and_stack([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_fields_beside_the_ids_are_stacked_and_a_given_mask_is_kept():
    samples = [{"input_ids": torch.tensor([1, 2]), "attention_mask": [0, 1], "score": 0.5},
               {"input_ids": torch.tensor([3]), "attention_mask": [1], "score": 1.5}]  # fmt: skip
    batch = pad_and_stack(samples)
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 0]]
    assert batch["score"].tolist() == [0.5, 1.5]


def test_columns_stand_beside_rows_and_are_not_given_to_the_model():
    data = [{"input_ids": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    cache = dc.collect(
        tiny_llama(), data, dc.Site("resid_out", tokens="last"), batch_size=4, columns=["label"], progress=False
    )
    assert cache.rows("resid_out_1")["label"].tolist() == [i % 3 for i in range(NUM_SAMPLES)]
    with pytest.raises(TypeError, match="column 'name'"):
        dc.collect(tiny_llama(), [{"input_ids": [1], "name": "x"}], "resid_out", batch_size=1, columns=["name"])


def test_what_collect_can_not_use_is_named():
    with pytest.raises(TypeError, match=r"cache\.share\(loader\)"):
        dc.collect(tiny_llama(), iter(TEXTS), "resid_out", batch_size=1)
    with pytest.raises(ValueError, match="batch_size is at least 1, got 0"):
        dc.collect(tiny_llama(), TEXTS, "resid_out", batch_size=0)


def test_rows_that_will_not_fit_are_refused_after_the_first_batch(monkeypatch, caplog):
    passes = []

    def forward(model, batch):
        passes.append(len(batch["input_ids"]))
        return model(**batch)

    def run(free):
        monkeypatch.setattr(sys.modules[dc.collect.__module__], "available_bytes", lambda device: free)
        site = dc.Site("resid_out", tokens="last")
        return dc.collect(tiny_llama(), TEXTS, site, batch_size=2, forward=forward, progress=False)

    need = 2 * NUM_SAMPLES * 2 * 32 * 4  # the delta and the content, of 2 layers of 32 floats
    with pytest.raises(dc.TooLarge, match=rf"11 samples will need about {need / 1000:.1f} kB .*Keep fewer tokens"):
        run(need // 2 - 1)
    assert passes == [2]
    assert len(run(need - 1)) == 2 and "will need about" in caplog.text
    caplog.clear()
    run(need)
    assert not caplog.text


def test_progress_counts_the_samples_of_all_ranks(ranks):
    shown = ranks.run(2, collect_with_progress)
    assert re.search(rf"distcache: {NUM_SAMPLES} of {NUM_SAMPLES} samples", shown[0])
    assert shown[1] == ""


def collect_with_progress(rank, world_size):
    import contextlib

    with contextlib.redirect_stderr(io.StringIO()) as stream:
        dc.collect(tiny_llama(), TEXTS, dc.Site("resid_out", tokens="last"), batch_size=2)
    return stream.getvalue()
