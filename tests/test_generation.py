"""What is recorded while a model generates is what a forward pass over the finished texts shows."""

from __future__ import annotations

import pytest
import torch
from tiny import build, padded, texts

import distcache as dc

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


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("phase", ["all", "prompt", "new"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_are_those_of_a_forward_pass_over_the_finished_texts(name, phase, implementation):
    model, end = model_that_ends(name)
    path = "model.layers.1" if name == "llama" else "transformer.h.1"
    with dc.record(model, ["resid_out"], index=[7, 3, 5], phase=phase) as local:
        finished = generate(model, PROMPTS, cache_implementation=implementation)
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


def test_averaged_attention_of_the_prompt_is_that_of_a_forward_pass_over_prompts():
    model, _ = model_that_ends()
    for implementation in ("dynamic", "static"):
        with dc.record(model, ["avg_attn_pattern"], phase="prompt") as local:
            generate(model, PROMPTS, cache_implementation=implementation)
        with dc.record(model, ["avg_attn_pattern"]) as plain, torch.no_grad():
            model(**padded(PROMPTS, "left"))
        for key in plain:
            torch.testing.assert_close(local[key], plain[key], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2 isn't supported"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 isn't supported"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens isn't supported"),
    ],
    ids=["beams", "sequences", "drafts"],
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
    refused = pytest.raises(dc.SiteError, match="patterns of tokens that are generated one by one")
    with dc.record(model, ["avg_attn_pattern"]), refused:
        generate(model, PROMPTS)


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


def test_the_model_generates_what_it_would_have_generated_and_is_left_as_it_was():
    model, _ = model_that_ends()
    before = generate(model, PROMPTS)
    with dc.record(model, ["resid_out"]):
        during = generate(model, PROMPTS)
    assert all(map(torch.equal, before, during))
    assert "generate" not in vars(model) and "forward" not in vars(model)
