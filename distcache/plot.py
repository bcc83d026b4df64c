"""Pictures of what a cache holds: averaged attention, of all heads at a glance and of one in full; its statistics.

Figures are matplotlib's own objects, made without pyplot: no display, no global state. `figure.savefig(path)` writes
one, and a notebook shows it as it is.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

DPI = 200
_BAR = 1.9  # the least height of a colour bar in inches, for its numbers
# `site_L3H5` of one head, `site_3` of all heads of a layer.
_KEY = re.compile(r"(?P<site>.+)_(?:L(?P<of>\d+)H(?P<head>\d+)|(?P<layer>\d+))")


class Readable(Protocol):
    """A cache, a distributed cache, or a dict."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, key: str, /) -> Any: ...


def attention_overview(
    cache: Readable,
    site: str = "avg_attn_pattern",
    path: str | PathLike[str] | None = None,
    *,
    max_tokens: int = 64,
) -> Figure:
    """Every head's pattern as a thumbnail: layers from top to bottom, heads from left to right.

    All share one colour scale, of the fourth root of the weight: the first token takes most of the attention,
    and on a linear scale nothing else would be seen.

    Args:
        cache: holds patterns [Q, K] (query, key) as `{site}_L{layer}H{head}`, or [H, Q, K] as `{site}_{layer}`; other
            heads are left blank.
        site: also that of maps among statistics, "attn_stats_pooled" or "attn_stats_class".
        path: where to write the picture, in the format that its ending says.
        max_tokens: thumbnails show the first tokens alone; the title says so.

    Raises:
        ValueError: the cache has no heads of the site, or a value is no pattern; it says what there is.
        ImportError: without matplotlib.
    """
    patterns = {
        (layer, head): pattern
        for layer, keys in _keys(cache, site).items()
        for head, pattern in _of_heads(cache, keys, 2).items()
    }
    layers, heads = (sorted({place[i] for place in patterns}) for i in (0, 1))
    num_queries, num_keys = (max(pattern.shape[i] for pattern in patterns.values()) for i in (0, 1))
    rows, columns = min(num_queries, max_tokens), min(num_keys, max_tokens)
    # One picture of all thumbnails: hundreds of axes would take matplotlib a minute. Whole pixels for each token.
    scale = max(1, round(min(400, 4000 / max(len(layers), len(heads))) / max(rows, columns)))
    gap = max(1, round(8 / scale))
    down, right = rows + gap, columns + gap
    mosaic = np.full((len(layers) * down - gap, len(heads) * right - gap), np.nan, dtype=np.float32)
    for (layer, head), pattern in patterns.items():
        cut = pattern[:rows, :columns]
        row, column = layers.index(layer) * down, heads.index(head) * right
        mosaic[row : row + cut.shape[0], column : column + cut.shape[1]] = cut
    title = f"{site}: {len(layers)} layers × {len(heads)} heads"
    title += _cut_off((rows, columns), (num_queries, num_keys))
    figure, axes = _drawn(mosaic, scale, title)
    axes.set_xticks([i * right + (columns - 1) / 2 for i in range(len(heads))], [str(head) for head in heads])
    axes.set_yticks([i * down + (rows - 1) / 2 for i in range(len(layers))], [str(layer) for layer in layers])
    axes.set_xlabel("head\n(in a thumbnail: keys →)")
    axes.set_ylabel("layer\n(in a thumbnail: ← queries)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return _written(figure, path)


def attention_head(
    cache: Readable,
    layer: int,
    head: int,
    tokens: Sequence[str] | None = None,
    queries: Sequence[str] | None = None,
    *,
    site: str = "avg_attn_pattern",
    path: str | PathLike[str] | None = None,
) -> Figure:
    """One head's pattern [Q, K] in full, on the colour scale of `attention_overview`.

    `tokens`: a label for each position; of fewer than there are, that many are shown. `queries`: the queries' labels,
    where these aren't the keys' (a range of queries). ValueError if there is no such head, or if there are more labels
    than positions. ImportError without matplotlib.
    """
    by_layer = _keys(cache, site)
    patterns = _of_heads(cache, by_layer.get(layer, {}), 2)
    if head not in patterns:
        heads = {head for keys in by_layer.values() for head in _of_heads(cache, keys, 2)}
        raise ValueError(
            f"no layer {layer}, head {head} of {site!r}: there are layers {_ranges(set(by_layer))} with heads "
            f"{_ranges(heads)}."
        )
    pattern = patterns[head]
    labels = (tokens if queries is None else queries, tokens)
    for side, labelled, positions in zip(("queries", "keys"), labels, pattern.shape, strict=True):
        if labelled is not None and not 0 < len(labelled) <= positions:
            raise ValueError(
                f"layer {layer}, head {head} of {site!r} has {positions} {side}, got {len(labelled)} labels. Give the "
                "queries' own, queries=[…], where they aren't the keys'."
            )
    rows, columns = (
        n if labelled is None else len(labelled) for n, labelled in zip(pattern.shape, labels, strict=True)
    )
    title = f"{site}: layer {layer}, head {head}" + _cut_off((rows, columns), pattern.shape)
    scale = max(1 if tokens is None and queries is None else 28, round(1200 / max(rows, columns)))  # 28: a line of text
    longest = [max(map(len, labelled or ["000"])) for labelled in labels]
    figure, axes = _drawn(pattern[:rows, :columns], scale, title, longest)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    if labels[0] is not None:
        axes.set_yticks(range(rows), labels[0], fontsize=8, parse_math=False)
        axes.tick_params("y", length=0)
    if labels[1] is not None:
        axes.set_xticks(range(columns), labels[1], rotation=90, fontsize=8, parse_math=False)
        axes.tick_params("x", length=0)
    return _written(figure, path)


def attention_statistics(
    cache: Readable,
    names: Sequence[str] | None = None,
    *,
    site: str = "attn_stats",
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Statistics by layer (from top to bottom) and head: a panel for each, on a scale of its own, from 0.

    Args:
        cache: holds them as `{site}_{name}_{layer}`, [H].
        names: which statistics; all that are one number a head if None.
        path: where to write the picture, in the format that its ending says.

    Raises:
        ValueError: the cache has no such statistic, or one of another shape; it says what there is.
        ImportError: without matplotlib.
    """
    there = [found[len(site) + 1 :] for found in _sites(cache) if found.startswith(f"{site}_")]
    if names is None:
        names = [name for name in there if _first_value(cache, f"{site}_{name}").dim() == 1]
    missing = [name for name in names if name not in there]
    if missing or not names:
        raise ValueError(
            f"no statistics {missing or 'of one number a head'} in the cache: expected keys {site}_entropy_0, …, [H]; "
            f"there are {', '.join(map(repr, there)) or 'none'}."
        )
    grids = {name: _by_layer(cache, f"{site}_{name}") for name in names}
    num_layers, num_heads = (max(grid.shape[i] for _, grid in grids.values()) for i in (0, 1))
    cell = min(0.3, max(0.09, 3.6 / num_heads), max(0.09, 5 / num_layers))  # inches
    size = (max(num_heads * cell, 1.3), max(num_layers * cell, 0.8))
    figure, places = _panels(len(grids), size, 3, (0.6, 0.85, 0.6, 0.5))
    for place, (name, (layers, grid)) in zip(places, grids.items(), strict=True):
        axes = _axes(figure, place)
        some = not np.isnan(grid).all()
        most = float(np.nanmax(grid)) if some else 1.0
        shown = axes.imshow(grid, cmap="magma", vmin=0, vmax=most or 1.0, interpolation="nearest", aspect="auto")
        axes.set_title(name, fontsize=11, loc="left", pad=16, parse_math=False)
        if some:
            row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
            said = f"most: layer {layers[row]}, head {column} ({most:.2f})\n"
            axes.text(0, 1, said, fontsize=8, transform=axes.transAxes, va="center")
        _number(axes, ("layer", size[1], layers), ("head", size[0], range(grid.shape[1])))
        bar = figure.colorbar(shown, cax=_axes(figure, (place[0] + place[2] + 0.1, place[1], 0.12, place[3])))
        bar.ax.tick_params(labelsize=8)
        bar.set_label("nats" if name == "entropy" else "mean attention", fontsize=8)
    return _written(figure, path)


def attention_distances(
    cache: Readable,
    edges: Sequence[int] | None = None,
    *,
    site: str = "attn_stats_distance",
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Attention by distance: a panel for each layer, its heads from top to bottom, bins of distances from left to
    right, all on the colour scale of `attention_overview`. Bins that no text is long enough for are left out.

    `edges`: those of the statistic, `Distance(edges)`; the bins' numbers are shown where they aren't known. ValueError
    if the cache has no such keys `{site}_{layer}`, [H, bins], or if there aren't as many edges as bins, and one more.
    ImportError without matplotlib.
    """
    by_layer = {layer: _of_heads(cache, keys, 1) for layer, keys in sorted(_keys(cache, site).items())}
    num_bins = max(len(row) for heads in by_layer.values() for row in heads.values())
    if edges is not None and len(edges) != num_bins + 1:
        raise ValueError(f"{site!r} has {num_bins} bins, so {num_bins + 1} edges; got {len(edges)}.")
    labels = [str(i) for i in range(num_bins)]
    if edges is not None:
        labels = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in itertools.pairwise(edges)]
    images = {layer: np.stack([heads[head] for head in sorted(heads)]) for layer, heads in by_layer.items()}
    reached = [i for i in range(num_bins) if any(not np.isnan(image[:, i]).all() for image in images.values())]
    labels = [labels[i] for i in reached] or ["none"]
    num_heads = max(map(len, images.values()))
    wide, tall = min(0.25, max(0.02, 2.2 / len(labels))), min(0.15, max(0.03, 1.6 / num_heads))
    size = (max(len(labels) * wide, 1.2), max(num_heads * tall, 0.6))
    bottom = 0.4 + 0.06 * max(map(len, labels))
    across = min(len(images), max(3, round((len(images) * size[1] / size[0]) ** 0.5)))
    figure, places = _panels(len(images), size, across, (0.5, 0.1, 0.4, bottom), beside=1.1)
    for place, (layer, image) in zip(places, images.items(), strict=True):
        axes = _axes(figure, place)
        shown = axes.imshow(image[:, reached], norm=_norm(), cmap="magma", interpolation="nearest", aspect="auto")
        axes.set_title(f"layer {layer}", fontsize=9)
        bins = "bin of distances" if edges is None else "query − key"
        _number(axes, ("head", size[1], sorted(by_layer[layer])), (bins, size[0], labels))
        axes.tick_params("x", rotation=90)
    _colour_bar(figure, shown, places[min(across, len(places)) - 1])
    return _written(figure, path)


# -- what the cache holds --------------------------------------------------------------------------------------


def _sites(cache: Readable) -> dict[str, dict[int, dict[int | None, str]]]:
    """Keys by site, layer and head; None for all heads of a layer."""
    found: dict[str, dict[int, dict[int | None, str]]] = {}
    for key in cache:
        match = _KEY.fullmatch(key)
        if match:
            layer, head = match["of"] or match["layer"], match["head"]
            of_layer = found.setdefault(match["site"], {}).setdefault(int(layer), {})
            of_layer[None if head is None else int(head)] = key
    return found


def _keys(cache: Readable, site: str) -> dict[int, dict[int | None, str]]:
    """The site's keys by layer and head."""
    found = _sites(cache)
    if site not in found:
        there = ", ".join(map(repr, found)) or "none"
        raise ValueError(
            f"no heads of {site!r} in the cache: expected keys {site}_L0H0, … or {site}_0, …; there are sites {there}."
        )
    return found[site]


def _first_value(cache: Readable, site: str) -> Tensor:
    keys = next(iter(_keys(cache, site).values()))
    return _tensor(cache, next(iter(keys.values())))


def _of_heads(cache: Readable, keys: dict[int | None, str], num_dims: int) -> dict[int, np.ndarray]:
    """What a layer's keys hold of each head, float32 of so many dims."""
    found: dict[int, np.ndarray] = {}
    for head, key in keys.items():
        value = _tensor(cache, key)
        if value.dim() != num_dims + (head is None) or not value.numel():
            shape = ", ".join((["H"] if head is None else []) + [[], ["bins"], ["Q", "K"]][num_dims])
            raise ValueError(f"{key!r} isn't of heads: expected a tensor [{shape}], got {tuple(value.shape)}.")
        array = value.detach().to("cpu", torch.float32).numpy()
        found.update(enumerate(array) if head is None else {head: array}.items())
    return found


def _by_layer(cache: Readable, site: str) -> tuple[list[int], np.ndarray]:
    """(the layers, a number for each of their heads [L, H]); NaN where there is no such head."""
    by_layer = {layer: _of_heads(cache, keys, 0) for layer, keys in sorted(_keys(cache, site).items())}
    grid = np.full((len(by_layer), 1 + max(max(heads) for heads in by_layer.values())), np.nan, dtype=np.float32)
    for row, heads in enumerate(by_layer.values()):
        for head, number in heads.items():
            grid[row, head] = number
    return list(by_layer), grid


def _tensor(cache: Readable, key: str) -> Tensor:
    value = cache[key]
    value = value.value() if hasattr(value, "info") and not isinstance(value, Tensor) else value
    if not isinstance(value, Tensor):
        raise ValueError(f"{key!r} isn't of heads: expected a tensor, got {type(value).__name__}.")
    return value


# -- drawing ---------------------------------------------------------------------------------------------------


def _drawn(image: np.ndarray, scale: int, title: str, label_lengths: Sequence[int] = (3, 3)) -> tuple[Figure, Axes]:
    """A figure of an image, `scale` pixels for each element, and its colour bar; margins and labels lie outside."""
    height, width = (n * scale / DPI for n in image.shape)
    left, right, top, bottom = 0.6 + 0.08 * label_lengths[0], 1.2, 0.7, 0.5 + 0.08 * label_lengths[1]  # inches
    bottom = max(bottom, _BAR - height + 0.2)
    figure = _figure((left + width + right, bottom + height + top))
    place = (left, bottom, width, height)
    axes = _axes(figure, place)
    shown = axes.imshow(image, norm=_norm(), cmap="magma", interpolation="nearest", aspect="equal")
    axes.set_title(title, fontsize=11, parse_math=False)
    _colour_bar(figure, shown, place)
    return figure, axes


def _panels(
    num: int,
    size: tuple[float, float],
    across: int,
    margins: tuple[float, float, float, float],
    beside: float = 0,
) -> tuple[Figure, list[tuple[float, float, float, float]]]:
    """A figure with room for panels of this size, so many across, and their places; all in inches. `margins`: left,
    right, top and bottom of each; `beside`: to the right of all.
    """
    left, right, top, bottom = margins
    across = min(num, across)
    down = -(-num // across)
    step = (left + size[0] + right, top + size[1] + bottom)
    figure = _figure((across * step[0] + beside, max(down * step[1], (_BAR + 0.6) if beside else 0)))
    height = figure.get_size_inches()[1]
    return figure, [
        (i % across * step[0] + left, height - i // across * step[1] - top - size[1], *size) for i in range(num)
    ]


def _figure(size: tuple[float, float]) -> Figure:
    """An empty figure of this size in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots are drawn with matplotlib: pip install 'distcache[plot]'.") from error
    figure = Figure(figsize=size, dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Axes at left, bottom, width and height in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))


def _norm() -> Normalize:
    """The fourth root of the weight."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.25, 0, 1)


def _colour_bar(figure: Figure, shown: Any, place: tuple[float, float, float, float]) -> None:
    """The colours of attention weights, to the right of the axes at this place, from their top down."""
    left, bottom, width, height = place
    bar_height = min(max(height, _BAR), 4)
    bar = figure.colorbar(
        shown, cax=_axes(figure, (left + width + 0.15, bottom + height - bar_height, 0.15, bar_height))
    )
    bar.set_ticks([0, 0.001, 0.01, 0.1, 0.5, 1], labels=["0", "0.001", "0.01", "0.1", "0.5", "1"])
    bar.set_label("attention weight, averaged\n(fourth-root colours)", fontsize=9)


def _number(axes: Axes, *sides: tuple[str, float, Sequence[Any]]) -> None:
    """Number rows and columns, as many as there is room for: what they are, their room in inches, their numbers."""
    for side, (what, room, numbers) in zip((axes.yaxis, axes.xaxis), sides, strict=True):
        spaced = _spaced(len(numbers), room / len(numbers), 0.14 if side is axes.yaxis else 0.2)
        side.set_ticks(spaced, [str(numbers[i]) for i in spaced])
        side.set_label_text(what, fontsize=9)
    axes.tick_params(length=0, labelsize=8)


def _spaced(num: int, cell: float, text: float) -> list[int]:
    """Which of so many cells have room for a text of this size, in inches."""
    return list(range(0, num, max(1, math.ceil(text / cell))))


def _cut_off(shown: tuple[int, int], there: tuple[int, ...]) -> str:
    """A title's second line, where not all is shown."""
    if tuple(shown) == tuple(there):
        return ""
    if shown[0] == shown[1] and there[0] == there[1]:
        return f"\nthe first {shown[0]} of {there[0]} tokens"
    return f"\nthe first {shown[0]} of {there[0]} queries, {shown[1]} of {there[1]} keys"


def _written(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure


def _ranges(numbers: set[int]) -> str:
    """`0, 2..5` for messages."""
    words: list[list[int]] = []
    for n in sorted(numbers):
        if words and words[-1][1] == n - 1:
            words[-1][1] = n
        else:
            words.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in words)
