"""Each part of a model that has texts of its own has their length and their mask, and never another's."""

from __future__ import annotations

import pytest
import torch
from tiny import build, padded, texts
from torch import nn

import distcache as dc

transformers = pytest.importorskip("transformers")

SOURCES, TARGETS = texts((6, 3, 1, 5)), texts((2, 6, 4, 2))  # both are as long at most: a mask fits either by chance


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


def pairs(given=("attention_mask", "decoder_attention_mask")):
    source, target = padded(SOURCES), padded(TARGETS)
    batch = {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": target["attention_mask"],
    }
    return {name: value for name, value in batch.items() if name.endswith("ids") or name in given}


def shown(model, path, **batch):
    """What a hook by hand on one module sees."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    (out,) = seen
    return out[0] if isinstance(out, tuple) else out


# -- encoder-decoders ------------------------------------------------------------------------------------------

SITES = {"enc_{layer}": "encoder.block.{layer}", "dec_{layer}": "decoder.block.{layer}"}


def test_an_encoders_rows_are_its_sources_tokens_and_a_decoders_its_targets():
    model, batch = t5(), pairs()
    with dc.record(model, SITES) as local, torch.no_grad():
        model(**batch)
    for key, path, wanted in (("enc_1", "encoder.block.1", SOURCES), ("dec_1", "decoder.block.1", TARGETS)):
        x_bsd = shown(model, path, **batch)
        rows = torch.cat([x_bsd[b, : len(text)] for b, text in enumerate(wanted)])
        assert torch.equal(local[key], rows)
        assert local.rows(key)["sample"].tolist() == [b for b, text in enumerate(wanted) for _ in text]
        wrong = SOURCES if wanted is TARGETS else TARGETS  # the other's mask would have fitted
        assert max(map(len, wrong)) == x_bsd.shape[1] and len(rows) != sum(map(len, wrong))


def test_a_decoder_without_a_mask_takes_all_of_its_tokens_and_refuses_padding():
    model, batch = t5(), pairs(given=("attention_mask",))
    with (
        dc.record(model, SITES),
        torch.no_grad(),
        pytest.raises(dc.SiteError, match="padded with token 0, and no mask says so"),
    ):
        model(**batch)
    batch["decoder_input_ids"] = torch.cat([torch.zeros(4, 1).long(), batch["decoder_input_ids"][:, :1]], 1)
    with dc.record(model, SITES) as local, torch.no_grad():  # a decoder starts with the padding's id
        model(**batch)
    assert len(local["dec_1"]) == 8 and len(local["enc_1"]) == sum(map(len, SOURCES))


def test_a_mask_that_could_be_either_ones_must_say_whose_it_is():
    model, batch = t5(), pairs(given=())
    source, target = padded(SOURCES)["attention_mask"], padded(TARGETS)["attention_mask"]
    with dc.record(model, SITES, mask=source), pytest.raises(dc.SiteError, match="would fit either by chance"):
        model(**batch)
    with dc.record(model, SITES, mask={"encoder": source, "decoder": target}) as local, torch.no_grad():
        model(**batch)
    assert (len(local["enc_0"]), len(local["dec_0"])) == (sum(map(len, SOURCES)), sum(map(len, TARGETS)))
    with (
        pytest.raises(dc.SiteError, match=r"mask has entries for \['middle'\], where the model has"),
        dc.record(model, SITES, mask={"middle": source}),
    ):
        pass


def test_columns_of_an_encoder_decoder_are_per_sample():
    model, batch = t5(), pairs()
    with dc.record(model, SITES, label=torch.tensor([3, 4, 5, 6])) as local, torch.no_grad():
        model(**batch)
    assert local.rows("dec_0")["label"].tolist() == [3] * 2 + [4] * 6 + [5] * 4 + [6] * 2
    with (
        dc.record(model, SITES, token=batch["input_ids"]),
        pytest.raises(dc.SiteError, match=r"in an encoder-decoder, .* expected one entry per sample"),
    ):
        model(**batch)


def test_a_head_after_the_decoder_has_the_decoders_tokens():
    model, batch = t5(), pairs()
    with dc.record(model, {"logits": "lm_head"}) as local, torch.no_grad():
        logits = model(**batch).logits
    rows = torch.cat([logits[b, : len(text)] for b, text in enumerate(TARGETS)])
    assert torch.equal(local["logits"], rows)


def test_nobody_hears_of_a_mask_that_no_site_needs():
    model, batch = t5(), pairs(given=("attention_mask",))
    with dc.record(model, {"enc": SITES["enc_{layer}"].format(layer=1)}) as local, torch.no_grad():
        model(**batch)  # the decoder's padding would be refused
    assert len(local["enc"]) == sum(map(len, SOURCES))


class Wrapping(nn.Module):
    """An encoder-decoder in a module of one's own, which has its own first tensor and mask."""

    def __init__(self):
        super().__init__()
        self.core = t5()

    def forward(self, input_ids, attention_mask, **decoder):
        return self.core(input_ids=input_ids, attention_mask=attention_mask, **decoder).logits


def test_an_encoder_decoder_within_a_model_has_two_streams_too():
    model, batch = Wrapping(), pairs()
    paths = {"enc": "core.encoder.block.1", "dec": "core.decoder.block.1", "logits": "core.lm_head"}
    with dc.record(model, paths) as local, torch.no_grad():
        model(**batch)
    for key, wanted in (("enc", SOURCES), ("dec", TARGETS), ("logits", TARGETS)):
        x_bsd = shown(model, paths[key], **batch)
        rows = torch.cat([x_bsd[b, : len(text)] for b, text in enumerate(wanted)])
        assert torch.equal(local[key], rows)
    by_source = shown(model, paths["dec"], **batch)[batch["attention_mask"].bool()]
    assert len(by_source) != len(local["dec"])  # the model's own mask fits the decoder's rows, by chance


def test_an_encoder_that_runs_again_in_a_later_pass_counts_once():
    model, batch = t5(), pairs()
    mask = dict(attention_mask=batch["attention_mask"])
    sites = {"enc": "encoder.block.1", "mean": dc.Site("encoder.block.1", reduce="mean"), "dec": "decoder.block.1"}
    with dc.record(model, sites, index=range(4)) as local, torch.no_grad():
        first = model(input_ids=batch["input_ids"], decoder_input_ids=torch.full((4, 1), 3), **mask, use_cache=True)
        cache = first.past_key_values
        model(input_ids=batch["input_ids"], decoder_input_ids=torch.full((4, 1), 4), past_key_values=cache, **mask)
    assert len(local["enc"]) == int(local.count("mean")) == sum(map(len, SOURCES))
    assert local.rows("dec")["position"].tolist() == [0, 1] * 4


@pytest.mark.parametrize("use_cache", [True, False], ids=["with a cache", "without a cache"])
def test_an_encoder_decoder_generates_into_its_decoders_rows(use_cache):
    model = t5()
    source = padded(SOURCES)
    options = dict(max_new_tokens=4, use_cache=use_cache)
    with dc.record(model, SITES, index=range(4)) as local:
        found = model.generate(source["input_ids"], attention_mask=source["attention_mask"], **options)
    fed = found[:, :-1]
    with dc.record(model, SITES, index=range(4)) as whole, torch.no_grad():
        model(
            source["input_ids"], source["attention_mask"], decoder_input_ids=fed,
            decoder_attention_mask=(fed != 1).long(),  # ends count nowhere
        )  # fmt: skip
    torch.testing.assert_close(local["enc_1"], whole["enc_1"])
    valid = torch.cat([(row[1:] == 1).cumsum(0) == 0 for row in fed])
    assert len(local["dec_1"]) == 4 + int(valid.sum())
    torch.testing.assert_close(local["dec_1"], whole["dec_1"], rtol=1e-4, atol=1e-4)


class Translator(nn.Module):
    """torch's own encoder and decoder, with their own keywords for padding."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=batch_first)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_torchs_own_transformer_has_two_streams_too(batch_first):
    model = Translator(batch_first).core.eval()
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randn(4, 6, 16, generator=generator) for _ in range(2))
    masks = {f"{name}_key_padding_mask": padded(found)["attention_mask"] == 0
             for name, found in (("src", SOURCES), ("tgt", TARGETS))}  # fmt: skip
    x, y = (source, target) if batch_first else (source.transpose(0, 1), target.transpose(0, 1))
    layout = None if batch_first else "SBD"
    sites = {"enc": dc.Site("encoder.layers.1", layout=layout), "dec": dc.Site("decoder.layers.1", layout=layout)}
    with dc.record(model, sites) as local, torch.no_grad():
        model(x, y, **masks)
    for key, wanted in (("enc", SOURCES), ("dec", TARGETS)):
        assert local.rows(key)["sample"].tolist() == [b for b, text in enumerate(wanted) for _ in text]


# -- torch's encoder by itself: fused paths, other orders ------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_a_plain_encoder_layer_is_seen_though_torch_would_compute_it_in_one_go(batch_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    padding = padded(SOURCES)["attention_mask"] == 0
    x = x if batch_first else x.transpose(0, 1)
    site = dc.Site("layers.{layer}.linear2", key="mlp_{layer}", layout=None if batch_first else "SBD")
    fast = torch.backends.mha.get_fastpath_enabled()
    with dc.record(model, [site]) as local, torch.no_grad():
        model(x, src_key_padding_mask=padding)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    seen = []
    model.layers[0].linear2.register_forward_hook(lambda m, a, out: seen.append(out))
    model.train()(x, src_key_padding_mask=padding)  # without dropout the same, and never in one go
    out = seen[0] if batch_first else seen[0].transpose(0, 1)
    rows = torch.cat([out[b, : len(text)] for b, text in enumerate(SOURCES)])
    torch.testing.assert_close(local["mlp_0"], rows)


class Orders(nn.Module):
    """Shows what it was given in several orders."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.swapped, self.flat, self.packed = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        self.swapped(x.transpose(0, 1))
        self.flat(x.flatten(0, 1))
        self.packed(x[attention_mask.bool()])
        return x


def test_rows_are_the_same_in_whatever_order_a_module_has_them():
    model, batch = Orders(), padded(SOURCES)
    del batch["position_ids"]
    sites = {
        "plain": "embed",
        "swapped": dc.Site("swapped", layout="SBD"),
        "flat": dc.Site("flat", layout="ND"),
        "packed": dc.Site("packed", layout="ND"),
    }
    with dc.record(model, sites) as local:
        model(**batch)
    assert all(torch.equal(local[key], local["plain"]) for key in sites)
    with dc.record(model, {"swapped": "swapped"}), pytest.raises(dc.SiteError, match=r"name its order: .*layout='SBD'"):
        model(**batch)
    with (
        dc.record(model, {"flat": dc.Site("embed", layout="ND")}),
        pytest.raises(dc.SiteError, match=r'layout="ND" expects one row for each of the 24 tokens, or .* 15 valid'),
    ):
        model(**batch)
    with pytest.raises(dc.SiteError, match="layout is 'BSD', 'SBD' or 'ND', got 'DSB'"):
        dc.Site("embed", layout="DSB")


# -- pictures --------------------------------------------------------------------------------------------------


def vit():
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                                    image_size=8, patch_size=4)  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTModel(config).eval()


def test_a_vision_towers_patches_are_tokens_and_have_no_mask():
    model, pictures = vit(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    (path,) = [name for name, m in model.named_modules() if name.endswith(".1") and type(m).__name__ == "ViTLayer"]
    sites = {"all": path, "first": dc.Site(path, tokens=0), "mean": dc.Site(path, tokens="mean")}
    with dc.record(model, sites) as local, torch.no_grad():
        model(pixel_values=pictures)
    x_bsd = shown(model, path, pixel_values=pictures)
    assert (
        torch.equal(local["all"], x_bsd.flatten(0, 1)) and local.rows("all")["position"].tolist() == [0, 1, 2, 3, 4] * 3
    )
    assert torch.equal(local["first"], x_bsd[:, 0])
    torch.testing.assert_close(local["mean"], x_bsd.mean(1))


def clip():
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, eos_token_id=2),
        vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                           image_size=8, patch_size=4),
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.CLIPModel(config).eval()


def test_a_picture_of_channels_has_no_tokens():
    """[B, C, H, W], of which dim 1 isn't patches."""
    model, pictures = vit(), torch.randn(3, 3, 8, 8)
    path = "embeddings.patch_embeddings.projection"
    with dc.record(model, {"x": path}) as local, torch.no_grad():
        model(pixel_values=pictures)
    assert torch.equal(local["x"], shown(model, path, pixel_values=pictures))
    refused = pytest.raises(dc.SiteError, match=r"which dim of a value \(3, 16, 2, 2\) they lie along isn't known")
    with dc.record(model, {"x": dc.Site(path, tokens="mean")}), torch.no_grad(), refused:
        model(pixel_values=pictures)


def test_patches_that_are_padding_count_nowhere():
    config = transformers.Siglip2VisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, patch_size=2,
                                              num_attention_heads=2, num_patches=16, num_channels=3)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(config).eval()
    mask = torch.tensor([[1] * 4 + [0] * 5, [1] * 9])
    batch = dict(pixel_values=torch.randn(2, 9, 12), spatial_shapes=torch.tensor([[2, 2], [3, 3]]))
    (path,) = [name for name, _ in model.named_modules() if name.endswith("layers.1")]
    with dc.record(model, {"own": path}) as local, torch.no_grad():
        model(**batch, pixel_attention_mask=mask)
    x_bsd = shown(model, path, **batch, pixel_attention_mask=mask)
    assert torch.equal(local["own"], x_bsd[mask.bool()])
    given = vit()
    some = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    (path,) = [name for name, m in given.named_modules() if name.endswith(".1") and type(m).__name__ == "ViTLayer"]
    pictures = torch.randn(2, 3, 8, 8)
    with dc.record(given, {"x": path}, mask=some) as local, torch.no_grad():
        given(pixel_values=pictures)
    assert torch.equal(local["x"], shown(given, path, pixel_values=pictures)[some.bool()])
    refused = pytest.raises(dc.SiteError, match=r"have 5 tokens a sample, and the mask \(2, 4\) is of something else")
    with dc.record(given, {"x": path}, mask=some[:, :4]), torch.no_grad(), refused:
        given(pixel_values=pictures)


def test_the_encoder_of_pictures_has_patches_for_tokens():
    words = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, eos_token_id=2)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit().config, words)
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(config=config).eval()
    (layer,) = [name for name, m in model.named_modules() if name.endswith(".1") and type(m).__name__ == "ViTLayer"]
    target = padded(TARGETS)
    batch = dict(pixel_values=torch.randn(4, 3, 8, 8), decoder_input_ids=target["input_ids"])
    batch["decoder_attention_mask"] = target["attention_mask"]
    sites = {"all": layer, "first": dc.Site(layer, tokens=0), "dec": "decoder.transformer.h.1"}
    with dc.record(model, sites) as local, torch.no_grad():
        model(**batch)
    x_bsd = shown(model, layer, **batch)
    assert torch.equal(local["all"], x_bsd.flatten(0, 1)) and torch.equal(local["first"], x_bsd[:, 0])
    assert len(local["dec"]) == sum(map(len, TARGETS))


def test_a_texts_mask_is_not_a_vision_towers_though_it_fits():
    model = clip()
    short = texts((5, 3, 1))  # as many tokens as a picture has patches
    batch = {name: x for name, x in padded(short).items() if name != "position_ids"}
    batch["pixel_values"] = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    paths = {"text": "text_model.encoder.layers.1", "vision": "vision_model.encoder.layers.1"}
    assert shown(model, paths["vision"], **batch).shape[:2] == (3, 5) == batch["attention_mask"].shape
    with dc.record(model, paths) as local, torch.no_grad():
        model(**batch)
    assert len(local["text"]) == 9
    assert torch.equal(local["vision"], shown(model, paths["vision"], **batch).flatten(0, 1))


def test_a_tower_that_runs_on_other_samples_is_refused():
    model = clip()
    batch = {name: x for name, x in padded(texts((5, 3, 1))).items() if name != "position_ids"}
    batch["pixel_values"] = torch.randn(2, 3, 8, 8)
    with (
        dc.record(model, {"vision": "vision_model.encoder.layers.1"}),
        torch.no_grad(),
        pytest.raises(dc.SiteError, match="runs on 2 samples, where the batch has 3"),
    ):
        model(**batch)
    with dc.record(model, {"text": "text_model.encoder.layers.1"}) as local, torch.no_grad():
        model(**batch)  # which need not concern a text's sites
    assert len(local["text"]) == 9


def blip():
    """A model that calls pictures its main input, and is shown texts as well."""
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                  patch_size=4)  # fmt: skip
    reader = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30,
                  encoder_hidden_size=16)  # fmt: skip
    words = transformers.OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, pad_token_id=0,
                                   num_attention_heads=2, max_position_embeddings=64,
                                   word_embed_proj_dim=16)  # fmt: skip
    config = transformers.Blip2Config(vision_config=vision, qformer_config=reader, text_config=words.to_dict(),
                                      num_query_tokens=4, image_token_index=5)  # fmt: skip
    torch.manual_seed(0)
    return transformers.Blip2ForConditionalGeneration(config).eval()


def test_texts_have_their_mask_in_a_model_whose_main_input_is_a_picture():
    model = blip()
    assert model.main_input_name == "pixel_values"
    ids = torch.tensor([[1, 5, 5, 5, 5, 7, 8, 9], [1, 5, 5, 5, 5, 7, 0, 0]])
    batch = dict(pixel_values=torch.randn(2, 3, 8, 8), input_ids=ids, attention_mask=(ids != 0).long())
    paths = {"text": "language_model.model.decoder.layers.1", "picture": "vision_model.encoder.layers.1"}
    with dc.record(model, paths, word=ids) as local, torch.no_grad():
        model(**batch)
    assert torch.equal(local["text"], shown(model, paths["text"], **batch)[ids != 0])
    assert local.rows("text")["word"].tolist() == ids[ids != 0].tolist()
    assert torch.equal(local["picture"], shown(model, paths["picture"], **batch).flatten(0, 1))


# -- sounds ----------------------------------------------------------------------------------------------------


def whisper():
    width = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                 encoder_ffn_dim=24, decoder_ffn_dim=24)  # fmt: skip
    config = transformers.WhisperConfig(vocab_size=64, num_mel_bins=8, max_source_positions=20, max_target_positions=16,
                                        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                                        suppress_tokens=None, begin_suppress_tokens=None, **width)  # fmt: skip
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_an_encoder_of_sounds_has_tokens_where_a_site_says_along_which_dim():
    model, sounds = whisper(), torch.randn(3, 8, 40)  # [B, pitches, time]: no tokens of the encoder's
    batch = dict(input_features=sounds, decoder_input_ids=torch.tensor([[1, 5, 6]] * 3))
    path, site = "model.encoder.layers.1", dc.Site("model.encoder.layers.1", layout="BSD")
    sites = {"enc": site, "dec": "model.decoder.layers.1"}
    with dc.record(model, sites) as local, torch.no_grad():
        model(**batch)
    x_bsd = shown(model, path, **batch)
    assert x_bsd.shape == (3, 20, 16) and torch.equal(local["enc"], x_bsd.flatten(0, 1)) and len(local["dec"]) == 9
    with dc.record(model, sites, mask={"encoder": torch.arange(20).expand(3, 20) < 5}) as local, torch.no_grad():
        model(**batch)
    assert torch.equal(local["enc"], x_bsd[:, :5].flatten(0, 1))
    with (
        dc.record(model, {"enc": dc.Site(path, tokens="mean")}),
        torch.no_grad(),
        pytest.raises(dc.SiteError, match=r"which dim of a value \(3, 20, 16\) they lie along isn't known: name it"),
    ):
        model(**batch)


def test_a_mask_of_a_sounds_samples_is_not_one_of_its_frames():
    config = transformers.Wav2Vec2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Wav2Vec2Model(config).eval()
    batch = dict(
        input_values=torch.randn(2, 400), attention_mask=(torch.arange(400) < torch.tensor([[200], [400]])).long()
    )
    path = "encoder.layers.1"
    for layout, words in ((None, "along isn't known"), ("BSD", r"have 39 tokens a sample, and the mask \(2, 400\)")):
        site = dc.Site(path, layout=layout)
        with dc.record(model, {"x": site}), torch.no_grad(), pytest.raises(dc.SiteError, match=words):
            model(**batch)
    frames = torch.arange(39) < torch.tensor([[19], [39]])
    with dc.record(model, {"x": dc.Site(path, layout="BSD")}, mask=frames) as local, torch.no_grad():
        model(**batch)
    assert torch.equal(local["x"], shown(model, path, **batch)[frames])


# -- masks -----------------------------------------------------------------------------------------------------


class Reversed(nn.Module):
    """A model whose keyword says which tokens are padding, among other arguments."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)

    def forward(self, ids, scale, key_padding_mask=None):
        return self.embed(ids) * scale


@pytest.mark.parametrize("as_bias", [False, True], ids=["bool", "added to scores"])
@pytest.mark.parametrize("how", ["by name", "by position"])
def test_a_keyword_that_says_what_is_padding_is_understood(how, as_bias):
    model, batch = Reversed(), padded(SOURCES)
    padding = batch["attention_mask"] == 0
    padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf")) if as_bias else padding
    with dc.record(model, {"x": "embed"}) as local:
        if how == "by name":
            model(batch["input_ids"], 2.0, key_padding_mask=padding)
        else:
            model(batch["input_ids"], 2.0, padding)
    assert local.rows("x")["sample"].tolist() == [0] * 6 + [1] * 3 + [2] + [3] * 5


def test_a_mask_may_be_a_function_of_the_calls_arguments():
    model, batch = Reversed(), padded(SOURCES)
    with dc.record(model, {"x": "embed"}, mask=lambda given: given["ids"] != 0) as local:
        model(batch["input_ids"], 2.0)
        model(batch["input_ids"][:2], 2.0)  # and serves any number of passes
    assert len(local["x"]) == 15 + 9


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_that_no_mask_tells_of_is_refused(side):
    model, batch = build("llama"), padded(SOURCES, side)
    with dc.record(model, ["resid_out"]) as local, pytest.raises(dc.SiteError, match="and no mask says so"):
        model(batch["input_ids"])
    with dc.record(model, ["resid_out"], mask=torch.ones(4, 6)) as local, torch.no_grad():
        model(batch["input_ids"])  # meant so
    assert len(local["resid_out_0"]) == 24


def test_one_end_of_a_text_is_not_padding_but_two_are():
    model = build("llama")
    model.config.pad_token_id = model.config.eos_token_id = 2
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 3, 4]])
    with dc.record(model, ["resid_out"]) as local, torch.no_grad():
        model(ids)
    assert len(local["resid_out_0"]) == 8
    ids[0, 2] = 2
    with dc.record(model, ["resid_out"]), torch.no_grad(), pytest.raises(dc.SiteError, match="no mask says so"):
        model(ids)


# -- sites by class, passes that stop --------------------------------------------------------------------------


def test_a_class_means_every_module_of_it():
    model, batch = build("llama"), padded(SOURCES)
    site = dc.Site(type=nn.Linear, io="input", key="in_{path}", reduce={"min": dc.Min(), "max": dc.Max()})
    with dc.record(model, [site]) as local, torch.no_grad():
        model(**batch)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(local) == {f"in_{name}_{which}" for name in linears for which in ("min", "max")}
    seen = []
    linears["model.layers.1.mlp.down_proj"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    rows = seen[0][batch["attention_mask"].bool()]
    assert torch.equal(local["in_model.layers.1.mlp.down_proj_max"], rows.amax(0))
    assert torch.equal(local["in_model.layers.1.mlp.down_proj_min"], rows.amin(0))


def test_a_class_may_be_looked_for_below_a_path_and_must_be_there():
    model, batch = build("llama"), padded(SOURCES)
    with dc.record(model, [dc.Site("model.layers.0.mlp", type=nn.Linear)]) as local, torch.no_grad():
        model(**batch)
    assert sorted(local) == [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    for site, words in (
        (dc.Site(type=nn.Conv2d), "site of type Conv2d: there is none in the model, where modules are "),
        (dc.Site("model.nowhere", type=nn.Linear), "no module of the model has the path 'model.nowhere', below which"),
        (dc.Site(type=nn.Linear, key="x"), r"must have \{path\}"),
    ):
        with pytest.raises(dc.SiteError, match=words), dc.record(model, [site]):
            pass
    with pytest.raises(dc.SiteError, match="a site needs a name, a module's path, or type="):
        dc.Site()


def test_a_pass_ends_after_the_last_site():
    model, batch = build("llama"), padded(SOURCES)
    ran = []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    with dc.record(model, [dc.Site("resid_out", layers=[0]), "embed"], stop=True) as local, torch.no_grad():
        assert model(**batch) is None
    assert ran == [] and "forward" not in vars(model)
    with dc.record(model, [dc.Site("resid_out", layers=[0]), "embed"]) as whole, torch.no_grad():
        model(**batch)
    assert ran == [1] and all(torch.equal(local[key], whole[key]) for key in whole)


class PeftModel(nn.Module):
    """Stands for PEFT's, whose own methods may call what it wraps; known by its name."""

    __module__, __qualname__ = "peft.peft_model", "PeftModel"

    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs).logits


def test_a_pass_ends_in_whatever_wraps_the_model_and_in_the_model_itself():
    model, batch = PeftModel(build("llama")), padded(SOURCES)
    with dc.record(model, ["embed"], stop=True) as local, torch.no_grad():
        assert model(**batch) is None and model.base_model(**batch) is None
    assert len(local["embed"]) == 2 * 15
    assert "forward" not in vars(model) and "forward" not in vars(model.base_model)


@pytest.mark.parametrize("io", ["input", "output"])
def test_a_pass_may_end_at_the_models_own_ends(io):
    model, x = Reversed(), torch.tensor([[5, 6]])
    ran = []
    model.embed.register_forward_hook(lambda *_: ran.append(1))
    site = dc.Site("", io=io)
    with dc.record(model, {"x": site}, stop=True) as local, torch.no_grad():
        for _ in range(2):
            out = model(torch.ones(1, 2, 3), x) if io == "input" else model(x, 1.0)
            assert (out is None) == (io == "input")  # of its output nothing is left to leave out
    assert len(ran) == (0 if io == "input" else 2) and len(local["x"]) == 4


def test_a_block_within_one_that_stops_hears_why_nothing_came():
    model, batch = build("llama"), padded(SOURCES)
    refused = pytest.raises(dc.SiteError, match="another block's stop=True ended the pass")
    with dc.record(model, ["embed"], stop=True), dc.record(model, ["resid_out"]), torch.no_grad(), refused:
        model(**batch)
    assert "forward" not in vars(model)


def test_a_pass_isnt_stopped_where_that_could_go_wrong():
    model, batch = build("llama"), padded(SOURCES)
    with (
        pytest.raises(dc.SiteError, match=r"needs to know which site is the last: .* is optional"),
        dc.record(model, [dc.Site("resid_out", optional=True)], stop=True),
    ):
        pass
    with dc.record(model, ["embed"], stop=True), pytest.raises(dc.SiteError, match="generating needs what they give"):
        model.generate(batch["input_ids"], max_new_tokens=2)

    class FSDPModule:
        """Stands for torch's: wrapping really takes a process group."""

    model.__class__ = type("FSDPLlama", (FSDPModule, type(model)), {})
    with (
        pytest.raises(dc.SiteError, match=r"stop=True would leave ranks out of step: .*FSDPModule"),
        dc.record(model, ["embed"], stop=True),
    ):
        pass
