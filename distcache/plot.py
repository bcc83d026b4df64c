"""Pictures of what a cache holds: averaged attention, of all heads at a glance and of one in full.

Figures are matplotlib's own objects, made without pyplot: no display, no global state. `figure.savefig(path)` writes
one, and a notebook shows it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200
_HEAD_KEY = re.compile(r"(?P<site>.+)_L(?P<layer>\d+)H(?P<head>\d+)")


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
        cache: holds patterns [S, S] (query, key) as `{site}_L{layer}H{head}`; other heads are left blank.
        path: where to write the picture, in the format that its ending says.
        max_tokens: thumbnails show the first tokens alone; the title says so.

    Raises:
        ValueError: the cache has no heads of the site, or a value is no pattern; it says what there is.
        ImportError: without matplotlib.
    """
    keys = _heads(cache, site)
    layers, heads = (sorted({place[i] for place in keys}) for i in (0, 1))
    patterns = {place: _pattern(cache, key) for place, key in keys.items()}
    num_tokens = max(len(pattern) for pattern in patterns.values())
    shown = min(num_tokens, max_tokens)
    # One picture of all thumbnails: hundreds of axes would take matplotlib a minute. Whole pixels for each token.
    scale = max(1, round(min(400, 4000 / max(len(layers), len(heads))) / shown))
    gap = max(1, round(8 / scale))
    step = shown + gap
    mosaic = np.full((len(layers) * step - gap, len(heads) * step - gap), np.nan, dtype=np.float32)
    for (layer, head), pattern in patterns.items():
        cut = pattern[:shown, :shown]
        row, column = layers.index(layer) * step, heads.index(head) * step
        mosaic[row : row + len(cut), column : column + len(cut)] = cut
    title = f"{site}: {len(layers)} layers × {len(heads)} heads"
    if shown < num_tokens:
        title += f"\nthe first {shown} of {num_tokens} tokens"
    figure, axes = _drawn(mosaic, scale, title)
    centre = (shown - 1) / 2
    axes.set_xticks([i * step + centre for i in range(len(heads))], [str(head) for head in heads])
    axes.set_yticks([i * step + centre for i in range(len(layers))], [str(layer) for layer in layers])
    axes.set_xlabel("head (in a thumbnail: key tokens →)")
    axes.set_ylabel("layer (in a thumbnail: ← query tokens)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return _written(figure, path)


def attention_head(
    cache: Readable,
    layer: int,
    head: int,
    tokens: Sequence[str] | None = None,
    *,
    site: str = "avg_attn_pattern",
    path: str | PathLike[str] | None = None,
) -> Figure:
    """One head's pattern [S, S] in full, on the colour scale of `attention_overview`.

    `tokens`: a label for each position; of fewer than S, that many positions are shown. ValueError if there is no
    such head, or if there are more labels than positions. ImportError without matplotlib.
    """
    keys = _heads(cache, site)
    if (layer, head) not in keys:
        raise ValueError(
            f"no layer {layer}, head {head} of {site!r}: there are layers {_ranges({place[0] for place in keys})} with "
            f"heads {_ranges({place[1] for place in keys})}."
        )
    pattern = _pattern(cache, keys[layer, head])
    num_tokens = len(pattern)
    if tokens is not None:
        if not 0 < len(tokens) <= num_tokens:
            raise ValueError(f"{keys[layer, head]!r} has {num_tokens} positions, got {len(tokens)} labels.")
        pattern = pattern[: len(tokens), : len(tokens)]
    title = f"{site}: layer {layer}, head {head}"
    if len(pattern) < num_tokens:
        title += f"\nthe first {len(pattern)} of {num_tokens} tokens"
    scale = max(1 if tokens is None else 28, round(1200 / len(pattern)))  # 28 pixels hold a line of text
    figure, axes = _drawn(pattern, scale, title, label_length=max(map(len, tokens or ["000"])))
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    if tokens is not None:
        places = range(len(tokens))
        axes.set_xticks(places, tokens, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(places, tokens, fontsize=8, parse_math=False)
        axes.tick_params(length=0)
    return _written(figure, path)


def _heads(cache: Readable, site: str) -> dict[tuple[int, int], str]:
    """The site's keys by (layer, head)."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for key in cache:
        match = _HEAD_KEY.fullmatch(key)
        if match:
            found.setdefault(match["site"], {})[int(match["layer"]), int(match["head"])] = key
    if site not in found:
        there = ", ".join(map(repr, found)) or "none"
        raise ValueError(f"no heads of {site!r} in the cache: expected keys {site}_L0H0, …; sites with heads: {there}.")
    return found[site]


def _pattern(cache: Readable, key: str) -> np.ndarray:
    """A head's pattern as float32 [S, S]."""
    value = cache[key]
    value = value.value() if hasattr(value, "info") and not isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != value.shape[1] or not len(value):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key!r} is no attention pattern: expected a tensor [S, S], got {got}.")
    return value.detach().to("cpu", torch.float32).numpy()


def _drawn(image: np.ndarray, scale: int, title: str, label_length: int = 3) -> tuple[Figure, Axes]:
    """A figure of an image, `scale` pixels for each element, and its colour bar; margins and labels lie outside."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots are drawn with matplotlib: pip install 'distcache[plot]'.") from error
    height, width = (n * scale / DPI for n in image.shape)
    labels = 0.08 * label_length
    left, right, top, bottom = 0.5 + labels, 1.1, 0.7, 0.5 + labels  # inches
    size = (left + width + right, bottom + height + top)
    figure = Figure(figsize=size, dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    shown = axes.imshow(image, norm=PowerNorm(0.25, 0, 1), cmap="magma", interpolation="nearest", aspect="equal")
    axes.set_title(title, fontsize=11)
    bar_height = min(height, 4)
    bar_left, bar_bottom = left + width + 0.15, bottom + height - bar_height
    place = (bar_left / size[0], bar_bottom / size[1], 0.15 / size[0], bar_height / size[1])
    bar = figure.colorbar(shown, cax=figure.add_axes(place))
    bar.set_ticks([0, 0.001, 0.01, 0.1, 0.5, 1], labels=["0", "0.001", "0.01", "0.1", "0.5", "1"])
    bar.set_label("attention weight, averaged (fourth-root colours)", fontsize=9)
    return figure, axes


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
