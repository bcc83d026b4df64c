"""What is recorded while a model generates is what a forward pass over the finished texts shows."""

from __future__ import annotations

import pytest
import torch
from tiny import build, padded, texts

import distcache as dc
from distcache.entries import Slab
from distcache.staged import Staged
from distcache.strategies import Columns, Value

transformers = pytest.importorskip("transformers")

PROMPTS = texts((5, 2, 4))
NEW = 6


def model_that_ends(name="llama", **options):
    """A tiny model, and ids that end a text: of its greedy continuations one, so that texts end at different times."""
    model = build(name, **options)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    free = generate(model, PROMPTS)
    end = int(free[0][len(PROMPTS[0]) + 2])
    model.generation_config.eos_token_id = end
    return model, end


def batch_of(prompts):
    return {name: value for name, value in padded(prompts, "left").items() if name != "position_ids"}


def generate(model, prompts, **options):
    """The finished texts without padding: each prompt, and what came after it."""
    batch = batch_of(prompts)
    found = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
    size = batch["input_ids"].shape[1]
    return [torch.cat([prompt, row[size:]]) for prompt, row in zip(prompts, found, strict=True)]


def shown_by_hand(model, path, text, ends):
    """What a hook by hand sees of one unpadded text: of every token that was fed in generating it, before its end."""
    prompt_and_new = text[:-1]  # the last token is never fed
    new = prompt_and_new.tolist()
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(prompt_and_new[None])
    handle.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return out[0], new


def expected(model, path, prompts, finished, end, phase):
    """(rows, sample, position, token id, step) in the order of samples and positions."""
    rows, columns = [], []
    for b, (prompt, text) in enumerate(zip(prompts, finished, strict=True)):
        x, ids = shown_by_hand(model, path, text, end)
        over = False
        for position, token in enumerate(ids):
            is_new = position >= len(prompt)
            over = over or (is_new and token == end)
            if over or ((phase == "prompt") == is_new and phase != "all"):
                continue
            rows.append(x[position])
            columns.append((b, position, token, max(0, position - len(prompt) + 1)))
    return torch.stack(rows), torch.tensor(columns).T


# How a model remembers; without a cache each pass is fed whole texts again.
MEMORIES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("phase", ["all", "prompt", "new"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])  # Gemma 3 sees no farther than 4 tokens in some layers
def test_rows_are_those_of_a_forward_pass_over_the_finished_texts(name, phase, memory):
    model, end = model_that_ends(name)
    path = "transformer.h.1" if name == "gpt2" else "model.layers.1"
    with dc.record(model, ["resid_out"], index=[7, 3, 5], phase=phase) as local:
        finished = generate(model, PROMPTS, **MEMORIES[memory])
    assert end in finished[0][len(PROMPTS[0]) : -1].tolist()  # one ends while others go on
    rows, (sample, position, token, step) = expected(model, path, PROMPTS, finished, end, phase)
    found = local.rows("resid_out_1")
    place = torch.tensor([7, 3, 5])[sample]
    order = torch.argsort(place * 100 + position)
    assert found["sample"].tolist() == place[order].tolist()
    assert found["position"].tolist() == position[order].tolist()
    assert found["step"].tolist() == step[order].tolist()
    assert found["token_id"].tolist() == token[order].tolist()
    torch.testing.assert_close(local["resid_out_1"], rows[order], rtol=1e-4, atol=1e-4)


def test_the_oracle_would_see_what_is_fed_after_the_end():
    model, _ = model_that_ends()
    with dc.record(model, ["resid_out"]) as local:
        finished = generate(model, PROMPTS)
    rows, _ = expected(model, "model.layers.1", PROMPTS, finished, end=-1, phase="all")
    assert len(rows) > len(local["resid_out_1"])


def test_reductions_count_every_token_of_a_generation_once():
    model, end = model_that_ends()
    site = dc.Site("resid_out", reduce={"mean": dc.Mean(), "moments": dc.Moments(), "max": dc.Max()})
    with dc.record(model, [site], index=[0, 1, 2]) as local:
        finished = generate(model, PROMPTS)
    rows, _ = expected(model, "model.layers.1", PROMPTS, finished, end, "all")
    torch.testing.assert_close(local["resid_out_1_mean"], rows.double().mean(0).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(local["resid_out_1_max"], rows.amax(0), rtol=1e-4, atol=1e-4)
    moments = local["resid_out_1_moments"]
    assert int(moments["count"]) == len(rows)
    torch.testing.assert_close(moments["variance"], rows.double().var(0).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("memory", ["dynamic", "no cache"])
@pytest.mark.parametrize(("by", "size"), [("position", 12), ("step", 8), ("token_id", 64), ("sample", 3), ("label", 2)])
def test_groups_of_a_generation_are_those_of_its_rows(by, size, memory):
    """Whichever cells a pass brings: others, fewer, or those of the pass before."""
    model, end = model_that_ends()
    mean = dc.Grouped(dc.Mean(), size, by=by)
    sites = [dc.Site("resid_out", reduce=mean), dc.Site("head_keys", reduce={"": "cat", "mean": mean})]
    label = torch.tensor([0, 1, 0])
    with dc.record(model, sites, index=[0, 1, 2], label=label) as local:
        finished = generate(model, PROMPTS, **MEMORIES[memory])
    rows, (sample, position, token, step) = expected(model, "model.layers.1", PROMPTS, finished, end, "all")
    cells = {"position": position, "step": step, "token_id": token, "sample": sample, "label": label[sample]}[by]

    def means(rows):
        return torch.stack([rows[cells == cell].double().mean(0) for cell in range(size)]).float()

    assert local.count("resid_out_1").flatten().tolist() == [int((cells == cell).sum()) for cell in range(size)]
    torch.testing.assert_close(local["resid_out_1"], means(rows), rtol=1e-4, atol=1e-4, equal_nan=True)
    keys = local["head_keys_L1H1"]
    torch.testing.assert_close(local["head_keys_L1H1_mean"], means(keys), rtol=1e-4, atol=1e-4, equal_nan=True)
    if by != "sample":  # cells of other rows are told apart
        other = means(rows.roll(1, 0))
        assert not torch.allclose(local["resid_out_1"], other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_top_of_a_generation_is_that_of_its_rows():
    model, end = model_that_ends()
    with dc.record(model, [dc.Site("resid_out", reduce=dc.TopK(3))], index=[0, 1, 2]) as local:
        finished = generate(model, PROMPTS)
    rows, (sample, position, *_) = expected(model, "model.layers.1", PROMPTS, finished, end, "all")
    top = rows.topk(3, 0)
    found = local["resid_out_1"]
    torch.testing.assert_close(found["values"], top.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["sample"], sample[top.indices])
    assert torch.equal(found["position"], position[top.indices])


def test_a_module_that_flattens_its_tokens_shows_new_ones_as_what_they_are():
    """[B · 1, D] could be one row a sample, without a step, of texts that have ended too."""
    model, end = model_that_ends("mixtral")
    flat = dc.Site("model.layers.{layer}.mlp.gate", key="flat_{layer}")
    named = dc.Site("model.layers.{layer}.mlp.gate", key="named_{layer}", layout="ND")
    with dc.record(model, [flat, named], phase="new") as local:
        finished = generate(model, PROMPTS)
    assert end in finished[0][len(PROMPTS[0]) : -1].tolist()
    assert torch.equal(local["flat_1"], local["named_1"])
    found, wanted = local.rows("flat_1"), local.rows("named_1")
    assert {name: column.tolist() for name, column in found.items()} == {n: c.tolist() for n, c in wanted.items()}
    assert int(found["position"].min()) >= 2 and "step" in found


class AtLength(transformers.StoppingCriteria):
    """Ends one text at a length; no end is fed for it, only padding for as long as others go on."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([False, input_ids.shape[1] >= 7, False])


def test_padding_that_is_fed_after_a_text_was_ended_by_other_means_counts_nowhere():
    model, _ = model_that_ends()
    model.generation_config.eos_token_id = 1  # never comes
    criteria = transformers.StoppingCriteriaList([AtLength()])
    with dc.record(model, ["resid_out"], index=[0, 1, 2]) as local:
        finished = generate(model, PROMPTS, stopping_criteria=criteria)
    assert finished[1].tolist()[4:] == [0] * (NEW - 2)
    texts_ = [finished[0], finished[1][:5], finished[2]]  # the last token of each is not fed, or padding
    rows, (sample, position, *_) = expected(model, "model.layers.1", PROMPTS, texts_, -1, "all")
    assert local.rows("resid_out_1")["sample"].tolist() == sample.tolist()
    assert local.rows("resid_out_1")["position"].tolist() == position.tolist()
    torch.testing.assert_close(local["resid_out_1"], rows, rtol=1e-4, atol=1e-4)


def test_texts_have_no_end_where_the_call_says_that_there_is_none():
    model, end = model_that_ends()
    with dc.record(model, ["resid_out"], index=[0, 1, 2]) as local:
        finished = generate(model, PROMPTS, eos_token_id=None)
    assert end in finished[0][len(PROMPTS[0]) :].tolist()
    rows, _ = expected(model, "model.layers.1", PROMPTS, finished, -1, "all")
    torch.testing.assert_close(local["resid_out_1"], rows, rtol=1e-4, atol=1e-4)


def test_texts_end_as_the_models_own_configuration_says_where_the_given_one_is_silent():
    model, _ = model_that_ends()
    with dc.record(model, ["resid_out"], index=[0, 1, 2]) as local:
        generate(model, PROMPTS)
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False)
    with dc.record(model, ["resid_out"], index=[0, 1, 2]) as given:
        model.generate(**batch_of(PROMPTS), generation_config=config)
    assert config.eos_token_id is None and torch.equal(given["resid_out_1"], local["resid_out_1"])


def test_embeddings_have_no_ids_and_a_mask_is_not_taken_for_them():
    model, _ = model_that_ends()
    batch = batch_of(PROMPTS)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    given = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"], "max_new_tokens": 3}
    with dc.record(model, ["resid_out"], phase="new") as new:
        ids = model.generate(**given, do_sample=False)
    assert set(new.rows("resid_out_1")["token_id"].tolist()) <= set(ids[:, :2].flatten().tolist())
    with dc.record(model, ["resid_out"]) as local:
        model.generate(**given, do_sample=False)
    assert "token_id" not in local.rows("resid_out_1")
    by_token = dc.Site("resid_out", reduce=dc.Grouped(dc.Mean(), 64, by="token_id"))
    refused = pytest.raises(dc.SiteError, match="goes by the column 'token_id', and these rows have the columns")
    with dc.record(model, [by_token]), torch.no_grad(), refused:
        model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])


def generate_my_share(rank, world_size, shares):
    torch.set_num_threads(1)
    model, _ = model_that_ends()
    reduce = {"": "cat", "mean": "mean", "moments": "moments", "step": dc.Grouped(dc.Sum(), 8, by="step")}
    cache = dc.DistributedCache(timeout_s=20)
    with cache.deferred_mode(), dc.record(model, [dc.Site("resid_out", reduce=reduce)], cache) as rec:
        for share in shares[rank]:
            rec.next(index=share)
            generate(model, [PROMPTS[i] for i in share])
    return {key: cache[key] for key in cache}, cache.rows("resid_out_1"), cache.count("resid_out_1_step")


def test_ranks_that_generate_say_what_one_rank_says(ranks):
    ((one, one_rows, one_count),) = ranks.run(1, generate_my_share, [[[0, 1, 2]]])
    for found, rows, count in ranks.run(3, generate_my_share, [[[2], [0]], [], [[1]]]):
        assert {name: column.tolist() for name, column in rows.items()} == {n: c.tolist() for n, c in one_rows.items()}
        assert torch.equal(count, one_count)
        for key, value in one.items():
            for name in value if isinstance(value, dict) else [None]:
                x, y = (found[key], value) if name is None else (found[key][name], value[name])
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # other padding, other last bits of the model


def test_a_sample_that_is_generated_twice_counts_twice_only_by_mistake_and_raises():
    model, _ = model_that_ends()
    with dc.record(model, [dc.Site("resid_out", reduce="mean")], index=[0, 1, 2]) as rec:
        generate(model, PROMPTS)
        rec.next(index=[2, 3, 4])
        with pytest.raises(dc.DuplicateSamples):
            generate(model, PROMPTS)


def test_a_generation_that_raised_half_way_and_is_repeated_counts_once():
    model, _ = model_that_ends()

    def stumbling(input_ids, scores):
        if input_ids.shape[1] == 8 and not stumbled:
            stumbled.append(True)
            raise MemoryError("not enough")
        return scores

    stumbled = []
    processors = transformers.LogitsProcessorList([stumbling])
    with dc.record(model, [dc.Site("resid_out", reduce="mean")], index=[0, 1, 2]) as local:
        with pytest.raises(MemoryError):
            generate(model, PROMPTS, logits_processor=processors)
        assert len(local) == 0
        generate(model, PROMPTS, logits_processor=processors)
    with dc.record(model, [dc.Site("resid_out", reduce="mean")], index=[0, 1, 2]) as once:
        generate(model, PROMPTS)
    assert torch.equal(local["resid_out_1"], once["resid_out_1"])
    assert torch.equal(local.count("resid_out_1"), once.count("resid_out_1"))


def test_texts_of_other_batches_end_alike():
    """What a text counts for does not depend on how long others of its batch go on."""
    model, _ = model_that_ends()
    with dc.record(model, ["resid_out"], index=[0, 1, 2]) as together:
        generate(model, PROMPTS)
    alone = dc.ActivationCache()
    for i, prompt in enumerate(PROMPTS):
        with dc.record(model, ["resid_out"], into=alone, index=[i]):
            generate(model, [prompt])
    assert together.rows("resid_out_1")["position"].tolist() == alone.rows("resid_out_1")["position"].tolist()
    torch.testing.assert_close(together["resid_out_1"], alone["resid_out_1"], rtol=1e-4, atol=1e-4)


def test_a_decoding_loop_of_ones_own_goes_on_with_its_texts():
    model, end = model_that_ends()
    finished = generate(model, PROMPTS)
    batch = batch_of(PROMPTS)
    with dc.record(model, ["resid_out"], index=[0, 1, 2], phase="new") as local, torch.no_grad():
        cache, mask, ids = None, batch["attention_mask"], batch["input_ids"]
        for _ in range(NEW):
            position = mask.cumsum(1)[:, -ids.shape[1] :] - 1
            out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, position_ids=position.clamp(0))
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    rows, (sample, position, token, step) = expected(model, "model.layers.1", PROMPTS, finished, end, "new")
    found = local.rows("resid_out_1")
    # Beyond its end a text of a loop of one's own may go on with other tokens; they count nowhere.
    assert found["sample"].tolist() == sample.tolist() and found["position"].tolist() == position.tolist()
    assert found["token_id"].tolist() == token.tolist() and found["step"].tolist() == step.tolist()
    torch.testing.assert_close(local["resid_out_1"], rows, rtol=1e-4, atol=1e-4)


def loop(model, *, crop=None, masks=lambda mask: mask, **given):
    """A decoding loop of one's own; `crop`: drops a token of the cache; `masks`: what later passes are shown."""
    batch = batch_of(PROMPTS)
    with dc.record(model, ["resid_out"], phase="new", **given) as local, torch.no_grad():
        mask, ids = batch["attention_mask"], batch["input_ids"]
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        if crop:
            cache.crop(crop)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        model(ids[:, -1:], attention_mask=masks(mask), past_key_values=cache)
    return local


def test_a_loop_of_ones_own_must_go_on_with_what_was_recorded():
    model, _ = model_that_ends()
    with pytest.raises(dc.SiteError, match=r"feeds 1 more of each text's tokens and has 4 in its cache, where 5 were"):
        loop(model, crop=-1)
    with pytest.raises(dc.SiteError, match=r"the mask \(3, 1\) doesn't fit the 6 tokens that each text has so far"):
        loop(model, masks=lambda mask: mask[:, -1:])
    with pytest.raises(dc.SiteError, match=r"column 'word' is per token, \(3, 5\), and has no entries for tokens"):
        loop(model, word=batch_of(PROMPTS)["input_ids"])
    one_of_three = torch.tensor([[1], [0], [1]])
    local = loop(model, masks=lambda mask: torch.cat([mask[:, :-1], one_of_three], 1), label=torch.tensor([4, 5, 6]))
    assert local.rows("resid_out_1")["label"].tolist() == [4, 6]


def test_averaged_attention_of_the_prompt_is_that_of_a_forward_pass_over_prompts():
    model, _ = model_that_ends()
    for implementation in ("dynamic", "static"):
        with dc.record(model, ["avg_attn_pattern"], phase="prompt") as local:
            generate(model, PROMPTS, cache_implementation=implementation)
        with dc.record(model, ["avg_attn_pattern"]) as plain, torch.no_grad():
            model(**padded(PROMPTS, "left"))
        for key in plain:
            torch.testing.assert_close(local[key], plain[key], rtol=1e-5, atol=1e-5, equal_nan=True)


def averages_by_hand(name, model, prompts, finished, end):
    """(per layer [heads, S, S], texts that have each query [S]) of eager attention over each text alone, up to what
    was fed for it.
    """
    eager = build(name)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    fed = [text[:-1] for text in finished]  # the last token is never fed
    over = [next((i for i in range(len(p), len(t)) if t[i] == end), len(t)) for p, t in zip(prompts, fed, strict=True)]
    fed = [text[:stop] for text, stop in zip(fed, over, strict=True)]
    size = max(map(len, fed))
    total, count = 0, torch.zeros(size)
    for text in fed:
        with torch.no_grad():
            patterns = eager(text[None], output_attentions=True).attentions
        room = (0, size - len(text), 0, size - len(text))
        total = total + torch.stack([torch.nn.functional.pad(p[0].double(), room) for p in patterns])
        count[: len(text)] += 1
    return total / count[:, None], count.double()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
def test_averaged_attention_of_a_generation_is_that_of_the_finished_texts(name, memory):
    model, end = model_that_ends(name)
    with dc.record(model, ["avg_attn_pattern", dc.Site("attn_stats", stats=("first",))], index=[7, 3, 5]) as local:
        finished = generate(model, PROMPTS, **MEMORIES[memory])
    expected, count_s = averages_by_hand(name, model, PROMPTS, finished, end)
    for layer, average_hss in enumerate(expected):
        torch.testing.assert_close(local["avg_attn_pattern", layer].double(), average_hss, rtol=0, atol=2e-6)
        first_h = (average_hss[..., 0] * count_s).sum(-1) / count_s.sum()
        torch.testing.assert_close(local[f"attn_stats_first_{layer}"].double(), first_h, rtol=0, atol=2e-6)
    unended, _ = averages_by_hand(name, model, PROMPTS, finished, end=-1)  # what is fed for a text after its end
    assert unended.shape != expected.shape or (unended - expected).abs().max() > 1e-3


def test_a_named_site_and_a_path_that_reach_one_module_keep_their_passes_apart():
    model, end = model_that_ends("gpt_neox")
    by_path = dc.Site("gpt_neox.layers.{layer}.attention", reduce=dc.AveragePattern(), key="path_{layer}")
    with dc.record(model, ["avg_attn_pattern", by_path]) as local:
        finished = generate(model, PROMPTS)
    expected, _ = averages_by_hand("gpt_neox", model, PROMPTS, finished, end)
    for site in ("avg_attn_pattern", "path"):
        torch.testing.assert_close(local[site, :].double(), expected, rtol=0, atol=2e-6)


def test_patterns_of_generations_that_can_not_be_known_are_refused():
    model, _ = model_that_ends()
    with dc.record(model, ["avg_attn_pattern"], phase="new"), pytest.raises(dc.SiteError, match="are of whole texts"):
        generate(model, PROMPTS)
    with dc.record(model, ["avg_attn_pattern"]), torch.no_grad():
        cache = transformers.DynamicCache()
        model(**padded(PROMPTS, "left"), past_key_values=cache, use_cache=True)
        with pytest.raises(dc.SiteError, match="in a loop of your own phase="):
            model(input_ids=torch.full((3, 1), 5), past_key_values=cache, use_cache=True)
    with dc.record(model, ["avg_attn_pattern"]), pytest.raises(dc.SiteError, match="with a quantized cache"):
        generate(model, PROMPTS, cache_implementation="quantized")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2 isn't supported"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 isn't supported"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens isn't supported"),
        ({"assistant_early_exit": 1}, "assistant_early_exit isn't supported"),
        ({"guidance_scale": 1.5}, "guidance_scale isn't supported"),  # texts without their prompts, beside
        ({"generation_config": transformers.GenerationConfig(num_beams=3)}, "num_beams=3 isn't supported"),
    ],
    ids=["beams", "sequences", "drafts", "drafts of its own", "guided", "beams by configuration"],
)
def test_what_gives_rows_several_times_is_refused(options, words):
    model, _ = model_that_ends()
    with dc.record(model, ["resid_out"]) as local, pytest.raises(dc.SiteError, match=words):
        model.generate(**batch_of(PROMPTS), max_new_tokens=2, **options)
    assert len(local) == 0


def test_sites_that_mean_nothing_of_single_tokens_are_refused():
    model, _ = model_that_ends()
    refused = pytest.raises(dc.SiteError, match=r"tokens='last' of texts that are being generated isn't known")
    with dc.record(model, [dc.Site("resid_out", tokens="last")]), refused:
        generate(model, PROMPTS)
    with dc.record(model, [dc.Site("resid_out", tokens="last")], phase="prompt") as local:
        generate(model, PROMPTS)
    assert local.rows("resid_out_1")["position"].tolist() == [len(prompt) - 1 for prompt in PROMPTS]


def test_a_phase_that_never_came_is_an_error():
    model, _ = model_that_ends()
    never = pytest.raises(dc.SiteError, match="nothing was generated in the block")
    with never, dc.record(model, ["resid_out"], phase="new"), torch.no_grad():
        model(**batch_of(PROMPTS))
    unknown = pytest.raises(dc.SiteError, match="phase is 'prompt', 'new' or 'all', got 'old'")
    with unknown, dc.record(model, ["resid_out"], phase="old"):
        pass


def test_a_pass_that_goes_on_with_unknown_texts_is_refused():
    model, _ = model_that_ends()
    with torch.no_grad():
        out = model(**batch_of(PROMPTS), use_cache=True)
        refused = pytest.raises(dc.SiteError, match="whose beginning wasn't recorded")
        with dc.record(model, ["resid_out"]), refused:
            model(torch.ones(3, 1, dtype=torch.long), past_key_values=out.past_key_values)


def test_a_generation_that_goes_on_with_unknown_texts_is_refused():
    model, _ = model_that_ends()
    ids = torch.stack(texts((5, 5)))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
    refused = pytest.raises(dc.SiteError, match="given a cache with tokens in it, of texts whose beginning wasn't")
    with dc.record(model, ["resid_out"]) as local, refused:
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    assert len(local) == 0


def begin_anew(model, input_ids, **kwargs):
    """Decodes the same text from its beginning a second time, as a fallback does."""
    for _ in range(2):
        model(input_ids, past_key_values=transformers.DynamicCache(config=model.config), use_cache=True)
    return input_ids


@pytest.mark.parametrize("length", [1, 3])
def test_a_generation_that_begins_anew_is_refused(length):
    """Of one token, too, which might be what goes on."""
    model, _ = model_that_ends()
    ids = PROMPTS[0][None, :length]
    refused = pytest.raises(dc.SiteError, match=rf"has 0 in its cache, where {length} were recorded")
    with dc.record(model, ["resid_out"]) as local, refused:
        model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=begin_anew)
    assert len(local) == 0


def test_blocks_that_overlap_leave_the_models_own_methods():
    model, _ = model_that_ends()
    own = model.generate
    model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    mine = model.generate
    first, second = dc.record(model, ["resid_out"]), dc.record(model, ["resid_out"])
    first.__enter__()
    local = second.__enter__()
    first.__exit__(None, None, None)
    generate(model, PROMPTS)
    assert "step" in local.rows("resid_out_1")  # the second block still knows that it was a generation
    second.__exit__(None, None, None)
    assert model.generate is mine


def test_the_model_generates_what_it_would_have_generated_and_is_left_as_it_was():
    model, _ = model_that_ends()
    before = generate(model, PROMPTS)
    with dc.record(model, ["resid_out"]):
        during = generate(model, PROMPTS)
    assert all(map(torch.equal, before, during))
    assert "generate" not in vars(model) and "forward" not in vars(model)


def test_states_of_other_cells_are_joined_a_few_times_each_and_not_with_every_pass(monkeypatch):
    strategy, staged, num_passes = dc.Grouped(dc.Mean(), 64, by="step"), Staged(), 64
    combine, joined = type(strategy).combine, []
    monkeypatch.setattr(
        type(strategy), "combine", lambda self, a, b: joined.append(len(b["cells"])) or combine(self, a, b)
    )
    x = torch.randn(num_passes, 2, 3)
    for step in range(num_passes):
        columns = Columns({"sample": torch.arange(2), "position": torch.zeros(2), "step": torch.full((2,), step)})
        state = strategy.take(Value(x[step], rows=True, columns=columns))
        staged.fold(Slab(("k",), strategy, {name: t.unsqueeze(0) for name, t in state.items()}, torch.float32))
    assert len(staged.slabs) == 1 and sum(joined) == num_passes * 6 / 2  # log2(64) levels, not 64 · 64 / 2
    cache = dc.ActivationCache()
    cache._take_pass(staged.slabs, staged.in_order(), ["k"], 2, None, raw=True)
    torch.testing.assert_close(cache["k"], x.mean(1))
    assert cache.count("k").tolist() == [2] * num_passes
