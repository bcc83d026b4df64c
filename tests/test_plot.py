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
        ValueError,
        match=r"no heads of 'pattern' .* pattern_L0H0, … or pattern_0, …; there are sites 'avg_attn_pattern', 'resid",
    ):
        plot.attention_overview(cache, "pattern")
    with pytest.raises(ValueError, match="there are sites none"):
        plot.attention_overview({"resid_out": 1})
    with pytest.raises(ValueError, match=r"no layer 3, head 1 of .*: there are layers 0..2, 5 with heads 0..1\."):
        plot.attention_head(cache, 3, 1)
    with pytest.raises(ValueError, match="layer 0, head 1 of 'avg_attn_pattern' has 4 queries, got 5 labels"):
        plot.attention_head(cache, 0, 1, list("abcde"))
    with pytest.raises(ValueError, match="has 4 queries, got 0 labels"):
        plot.attention_head(cache, 0, 1, [])
    cache["last_L0H0"] = torch.ones(1, 4) / 4
    with pytest.raises(ValueError, match=r"has 1 queries, got 4 labels\. Give the queries' own, queries="):
        plot.attention_head(cache, 0, 0, list("abcd"), site="last")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("avg_attn_pattern_L0H0", torch.ones(2), r"a tensor \[Q, K\], got \(2,\)"),
        ("avg_attn_pattern_L0H0", torch.ones(0, 0), r"a tensor \[Q, K\], got \(0, 0\)"),
        ("avg_attn_pattern_L0H0", "words", "a tensor, got str"),
        ("avg_attn_pattern_0", torch.ones(2, 3), r"a tensor \[H, Q, K\], got \(2, 3\)"),
    ],
    ids=["flat", "empty", "words", "a layer's"],
)
def test_what_is_no_pattern_is_named(key, value, expected):
    with pytest.raises(ValueError, match=f"'{key}' isn't of heads: expected {expected}"):
        plot.attention_overview({key: value})


# -- parts of patterns, and all heads of a layer in one ----------------------------------------------------


def test_a_layers_heads_in_one_key_are_drawn_as_if_each_had_its_own():
    apart = patterns((0, 2), range(3), 5)
    together = {
        f"mine_{layer}": torch.stack([apart[f"avg_attn_pattern_L{layer}H{h}"] for h in range(3)]) for layer in (0, 2)
    }
    one, other = plot.attention_overview(apart), plot.attention_overview(together, "mine")
    assert np.array_equal(shown(one), shown(other), equal_nan=True)
    assert labels(other.axes[0].yaxis) == ["0", "2"] and labels(other.axes[0].xaxis) == ["0", "1", "2"]
    head = plot.attention_head(together, 2, 1, site="mine")
    assert np.array_equal(shown(head), apart["avg_attn_pattern_L2H1"])
    with pytest.raises(ValueError, match=r"no layer 2, head 3 of 'mine': there are layers 0, 2 with heads 0\.\.2\."):
        plot.attention_head(together, 2, 3, site="mine")


def test_a_range_of_queries_has_labels_of_its_own():
    last = torch.rand(2, 5)
    figure = plot.attention_head({"last_L0H0": last}, 0, 0, list("abcd"), ["x", "$y"], site="last")
    assert np.array_equal(shown(figure), last[:, :4])
    assert labels(figure.axes[0].xaxis) == list("abcd") and labels(figure.axes[0].yaxis) == ["x", "$y"]
    assert "the first 2 of 2 queries, 4 of 5 keys" in figure.axes[0].get_title()
    overview = plot.attention_overview({"last_L0H0": last, "last_L1H0": last[:1]}, "last", max_tokens=4)
    picture, [top, bottom] = shown(overview), overview.axes[0].get_yticks()
    assert np.array_equal(picture[int(top - 0.5) : int(top + 1.5)], last[:, :4])
    assert np.array_equal(picture[int(bottom - 0.5)], last[0, :4]) and np.isnan(picture[int(bottom + 0.5)]).all()


# -- statistics --------------------------------------------------------------------------------------------


def statistics(layers, num_heads, **shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"attn_stats_{name}_{layer}": torch.rand(num_heads, *shape, generator=generator)
        for name, shape in shapes.items()
        for layer in layers
    }


def panels(figure) -> dict[str, tuple[np.ndarray, object]]:
    """(numbers, axes) by title, of axes that have one."""
    found = {}
    for axes in figure.axes:
        title = axes.get_title("left") or axes.get_title()
        if title:
            found[title] = np.ma.filled(axes.images[0].get_array().astype(np.float32), np.nan), axes
    return found


@pytest.mark.parametrize(("layers", "num_heads"), [((0, 1, 5), 2), (tuple(range(40)), 64)], ids=["few", "many"])
def test_a_panel_has_a_statistic_of_each_head_with_layers_from_top_to_bottom(layers, num_heads):
    cache = statistics(layers, num_heads, entropy=(), induction=(), pooled=(4, 4), distance=(3,))
    figure = plot.attention_statistics(cache)
    assert list(panels(figure)) == ["entropy", "induction"]  # what is one number a head
    for name, (picture, axes) in panels(figure).items():
        expected = torch.stack([cache[f"attn_stats_{name}_{layer}"] for layer in layers])
        assert np.array_equal(picture, expected)
        assert axes.images[0].norm.vmin == 0 and axes.images[0].norm.vmax == expected.max()
        for axis, numbers in ((axes.yaxis, layers), (axes.xaxis, range(num_heads))):
            assert labels(axis) == [str(numbers[int(at)]) for at in axis.get_ticklocs()]
        row, column = divmod(int(expected.argmax()), num_heads)
        assert axes.texts[0].get_text().startswith(f"most: layer {layers[row]}, head {column} ({expected.max():.2f})")
    units = {axes.get_ylabel() for axes in figure.axes} - {"layer"}
    assert units == {"nats", "mean attention"}


def test_statistics_are_drawn_that_were_asked_for_of_heads_apart_and_without_numbers_too():
    cache = statistics((0, 1), 2, first=(), previous=())
    cache["attn_stats_first_1"][1] = torch.nan
    cache |= {"attn_stats_mine_L0H1": torch.tensor(0.5), "attn_stats_never_0": torch.full((2,), torch.nan)}
    found = panels(plot.attention_statistics(cache, ["mine", "first", "never"]))
    assert list(found) == ["mine", "first", "never"]
    assert np.array_equal(found["mine"][0], [[np.nan, 0.5]], equal_nan=True)
    assert np.isnan(found["first"][0][1, 1]) and np.isnan(found["never"][0]).all() and not found["never"][1].texts


def test_statistics_that_are_not_there_are_answered_with_those_that_are():
    cache = statistics((0,), 2, entropy=(), pooled=(3, 3)) | {"resid_out_0": torch.ones(2)}
    with pytest.raises(ValueError, match=r"no statistics \['induction'\] .* there are 'entropy', 'pooled'\."):
        plot.attention_statistics(cache, ["induction", "entropy"])
    with pytest.raises(ValueError, match=r"no statistics of one number a head in the cache: .* there are none"):
        plot.attention_statistics({"resid_out_0": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'attn_stats_pooled_0' isn't of heads: expected a tensor \[H\], got"):
        plot.attention_statistics(cache, ["pooled"])


def test_attention_by_distance_has_a_panel_a_layer_and_leaves_out_what_no_text_reaches():
    cache = statistics((0, 3), 2, distance=(4,))
    for layer in (0, 3):
        cache[f"attn_stats_distance_{layer}"][:, 3] = torch.nan
    found = panels(plot.attention_distances(cache, (0, 1, 2, 4, 8)))
    assert list(found) == ["layer 0", "layer 3"]
    for layer in (0, 3):
        picture, axes = found[f"layer {layer}"]
        assert np.array_equal(picture, cache[f"attn_stats_distance_{layer}"][:, :3])
        assert labels(axes.xaxis) == ["0", "1", "2 to 3"] and labels(axes.yaxis) == ["0", "1"]
    assert labels(panels(plot.attention_distances(cache))["layer 0"][1].xaxis) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="has 4 bins, so 5 edges; got 2"):
        plot.attention_distances(cache, (0, 1))
    with pytest.raises(ValueError, match=r"expected a tensor \[H, bins\], got \(2,\)"):
        plot.attention_distances({"attn_stats_distance_0": torch.ones(2)})


def test_maps_among_the_statistics_are_drawn_as_patterns_are(tmp_path):
    cache = statistics((0, 1), 3, **{"class": (4, 4)})
    head = plot.attention_head(cache, 1, 2, ["noun", "verb", "name", "."], site="attn_stats_class")
    assert np.array_equal(shown(head), cache["attn_stats_class_1"][2])
    plot.attention_overview(cache, "attn_stats_class", path=tmp_path / "all.png")
    plot.attention_statistics(statistics((0,), 1, first=()), path=tmp_path / "one.png")
    plot.attention_distances(statistics((0,), 1, distance=(2,)), path=tmp_path / "two.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


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
