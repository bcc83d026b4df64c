"""What a figure shows: the cache's own numbers, under labels that say whose they are."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import distcache as dc
from distcache import plot


def patterns(layers, heads, num_tokens: int) -> dc.ActivationCache:
    """Causal patterns, another one for each head."""
    cache = dc.ActivationCache()
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for head in heads:
            scores = torch.randn(num_tokens, num_tokens, generator=generator)
            future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
            cache[f"avg_attn_pattern_L{layer}H{head}"] = scores.masked_fill(future, float("-inf")).softmax(-1)
    return cache


def shown(figure) -> np.ndarray:
    """The numbers of the only picture, NaN where nothing is drawn."""
    [image] = figure.axes[0].images
    return np.ma.filled(image.get_array().astype(np.float32), np.nan)


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize(("num_layers", "num_heads", "num_tokens"), [(2, 4, 5), (30, 9, 80)])
def test_thumbnails_are_the_patterns_in_rows_of_layers_and_columns_of_heads(num_layers, num_heads, num_tokens):
    cache = patterns(range(num_layers), range(num_heads), num_tokens)
    figure = plot.attention_overview(cache)
    axes, picture, cut = figure.axes[0], shown(figure), min(num_tokens, 64)
    assert labels(axes.xaxis) == [str(head) for head in range(num_heads)]
    assert labels(axes.yaxis) == [str(layer) for layer in range(num_layers)]
    others = picture.copy()
    for layer, y in enumerate(axes.get_yticks()):
        for head, x in enumerate(axes.get_xticks()):
            rows, columns = (slice(int(at - (cut - 1) / 2), int(at + (cut - 1) / 2) + 1) for at in (y, x))
            pattern = cache[f"avg_attn_pattern_L{layer}H{head}"][:cut, :cut]
            assert np.array_equal(picture[rows, columns], pattern)
            assert not np.array_equal(picture[rows, columns], pattern.T)  # queries go down, not to the right
            others[rows, columns] = np.nan
    assert np.isnan(others).all()
    title = axes.get_title()
    assert title.startswith(f"avg_attn_pattern: {num_layers} layers × {num_heads} heads")
    assert ("the first 64 of 80 tokens" in title) == (num_tokens == 80)


def test_all_heads_share_one_scale_that_the_colour_bar_names():
    figure = plot.attention_overview(patterns(range(2), range(2), 4))
    [image] = figure.axes[0].images
    assert (image.norm.vmin, image.norm.vmax) == (0, 1)
    assert image.norm(0.01) > 0.3  # a hundredth of the attention is well above black
    assert "fourth-root" in figure.axes[1].get_ylabel()
    assert {"0", "0.01", "1"} <= set(labels(figure.axes[1].yaxis))


def test_heads_that_are_not_there_stay_blank_and_numbers_are_the_caches():
    cache = patterns((3, 11), (0, 2), 4)
    del cache["avg_attn_pattern_L11H0"]
    figure = plot.attention_overview(cache, max_tokens=3)
    assert labels(figure.axes[0].yaxis) == ["3", "11"] and labels(figure.axes[0].xaxis) == ["0", "2"]
    picture = shown(figure)
    assert np.isnan(picture[-3:, :3]).all() and not np.isnan(picture[-3:, -3:]).any()
    assert "the first 3 of 4 tokens" in figure.axes[0].get_title()


def test_averages_of_the_cluster_are_drawn_like_any_other():
    cache = dc.DistributedCache()
    cache.register_aggregation("avg_attn_pattern", "average_pattern")
    for num_tokens in (2, 3):
        cache.cat(patterns(range(1), range(1), num_tokens))
    figure = plot.attention_overview(cache)
    assert np.array_equal(shown(figure), cache["avg_attn_pattern_L0H0"]) and shown(figure).shape == (3, 3)


def test_one_head_is_drawn_in_full_or_as_far_as_there_are_labels():
    cache = patterns(range(2), range(3), 70)
    pattern = cache["avg_attn_pattern_L1H2"]
    whole = plot.attention_head(cache, 1, 2)
    assert np.array_equal(shown(whole), pattern)
    assert whole.axes[0].get_title() == "avg_attn_pattern: layer 1, head 2"
    tokens = ["<s>", "a $5", "$ b", "c"]  # two dollars are no formula
    some = plot.attention_head(cache, 1, 2, tokens)
    assert np.array_equal(shown(some), pattern[:4, :4])
    assert labels(some.axes[0].xaxis) == labels(some.axes[0].yaxis) == tokens
    assert "the first 4 of 70 tokens" in some.axes[0].get_title()
    assert (some.axes[0].get_xlabel(), some.axes[0].get_ylabel()) == ("key", "query")


def test_a_figure_is_written_where_it_is_asked_for(tmp_path):
    cache = patterns(range(2), range(2), 4)
    plot.attention_overview(cache, path=tmp_path / "all.png")
    plot.attention_head(cache, 0, 1, ["a", "$b", "c$", "d"], path=str(tmp_path / "one.png"))
    for name in ("all.png", "one.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000
    plot.attention_overview(cache, path=tmp_path / "all.svg")
    assert "<svg" in (tmp_path / "all.svg").read_text()


def test_what_is_not_there_is_answered_with_what_is():
    cache = patterns((0, 1, 2, 5), range(2), 4)
    cache["resid_out_0"] = torch.ones(2, 2)
    with pytest.raises(
        ValueError, match=r"no heads of 'pattern' .* pattern_L0H0, …; sites with heads: 'avg_attn_pattern'"
    ):
        plot.attention_overview(cache, "pattern")
    with pytest.raises(ValueError, match="sites with heads: none"):
        plot.attention_overview({"resid_out_0": 1})
    with pytest.raises(ValueError, match=r"no layer 3, head 1 of .*: there are layers 0..2, 5 with heads 0..1\."):
        plot.attention_head(cache, 3, 1)
    with pytest.raises(ValueError, match="has 4 positions, got 5 labels"):
        plot.attention_head(cache, 0, 1, list("abcde"))
    with pytest.raises(ValueError, match="has 4 positions, got 0 labels"):
        plot.attention_head(cache, 0, 1, [])


@pytest.mark.parametrize(
    "value", [torch.ones(2, 3), torch.ones(2), torch.ones(0, 0), "words"], ids=["oblong", "flat", "empty", "words"]
)
def test_what_is_no_pattern_is_named(value):
    with pytest.raises(
        ValueError, match=r"'avg_attn_pattern_L0H0' is no attention pattern: expected a tensor \[S, S\]"
    ):
        plot.attention_overview({"avg_attn_pattern_L0H0": value})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'distcache\[plot\]'"):
        plot.attention_overview(patterns(range(1), range(1), 2))


def test_drawing_needs_no_display_and_leaves_no_global_figure():
    script = (
        "import sys, torch; from distcache import plot; assert 'matplotlib' not in sys.modules;"
        "plot.attention_overview({'avg_attn_pattern_L0H0': torch.eye(2)});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"MPLBACKEND": "tkagg"}, timeout=60)
