"""From what a module shows to the rows that count, and to their states.

Legend of names: b samples, s tokens, n rows, k keys of one slab (the heads of a layer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from distcache.entries import Slab
from distcache.errors import SiteError
from distcache.midst import Offload
from distcache.sites import Site, Target
from distcache.strategies import Columns, Fieldwise, Value
from distcache.tokens import Batch, Selector


def first_tensor(shown: Any, where: str) -> Tensor:
    """The first tensor with dims of what a module was given or returned (a loss comes first, and has none)."""
    items: Iterable[Any] = (shown,)
    if isinstance(shown, Mapping):
        items = shown.values()
    elif isinstance(shown, (tuple, list)):
        items = shown
    for item in items:
        if isinstance(item, Tensor) and item.dim():
            return item
    raise SiteError(
        f"site {where}: expected a tensor with dims, or a tuple or dict of them, got {type(shown).__name__}."
    )


def rows_of(target: Target, selector: Selector, batch: Batch, x: Tensor) -> tuple[Tensor, Columns]:
    """The rows of a module's value that a site means, [n, …] or, with heads, [n, k, …], and what is known of them."""
    x_n, columns = _selected(target, selector, batch, x if target.part is None else target.part.of(x))
    if target.site.transform is not None:
        x_n = _transformed(target, x_n, columns)
    if target.per_head:
        if x_n.dim() < 2 or x_n.shape[-1] % len(target.keys):
            raise SiteError(
                f"site {target.where}: expected {len(target.keys)} heads side by side in the last dim, got rows of "
                f"{tuple(x_n.shape[1:])}."
            )
        x_n = x_n.unflatten(-1, (len(target.keys), -1))
    return x_n, columns


def _selected(target: Target, selector: Selector, batch: Batch, x: Tensor) -> tuple[Tensor, Columns]:
    layout, one_new = target.layout or target.site.layout, batch.before_b is not None and batch.num_tokens == 1
    if layout == "SBD" and x.dim() > 2:
        x = x.transpose(0, 1)
    elif layout == "ND" and batch.num_tokens is not None:
        x = batch.unpacked(x, target.where)
    elif one_new and x.dim() == 2:  # [B, D] of one token each is of these tokens
        x = x.unsqueeze(1)
    if batch.num_tokens is None and x.dim() > 2 and len(x) == batch.num_samples:
        if layout or (batch.patches and x.dim() == 3):
            batch = batch.with_tokens(x.shape[1], target.where)
        elif selector != "all" or batch.valid_bs is not None:
            raise SiteError(
                f"site {target.where}: the model's input has no tokens, so which dim of a value {tuple(x.shape)} they "
                "lie along isn't known: name it, Site(…, layout='BSD'), or 'SBD' for tokens first."
            )
    leading = (batch.num_samples, batch.num_tokens)
    if batch.num_tokens is not None and x.dim() > 2 and tuple(x.shape[:2]) == leading:
        selection = batch.select(selector)
        return selection.rows(x), selection.columns
    one_each = x.dim() == 2 or (x.dim() > 0 and batch.num_tokens is None)
    if one_each and len(x) == batch.num_samples and batch.before_b is None:
        return x, batch.per_sample
    of_tokens = "" if batch.num_tokens is None else f"a value [B, S, …] = {leading}, or "
    raise SiteError(
        f"site {target.where}: expected {of_tokens}one row a sample, [{batch.num_samples}, …], got {tuple(x.shape)}. "
        "Hook a module that keeps samples (and tokens) apart, or name its order: Site(…, layout='SBD'), or 'ND' for "
        "rows of tokens."
    )


def _transformed(target: Target, x_n: Tensor, columns: Columns) -> Tensor:
    """What the site's transform makes of its rows."""
    assert target.site.transform is not None
    num_rows, version = len(x_n), None if x_n.is_inference() else x_n._version
    y_n = target.site.transform(x_n, columns)
    if version is not None and x_n._version != version:
        raise SiteError(
            f"site {target.where}: transform wrote to its rows, which may be the model's own: make new ones."
        )
    if not isinstance(y_n, Tensor) or y_n.dim() == 0 or len(y_n) != num_rows:
        got = tuple(y_n.shape) if isinstance(y_n, Tensor) else type(y_n).__name__
        raise SiteError(f"site {target.where}: transform must keep its {num_rows} rows, got {got}.")
    return y_n


def reduced(target: Target, keys: tuple[str, ...], strategy: Fieldwise, value: Value) -> Slab:
    """The states of a site's rows, value.data [n, …] or, with heads, [n, k, …]."""
    try:
        if target.per_head:
            state = strategy.take_slab(value)
        else:
            state = {name: tensor.unsqueeze(0) for name, tensor in strategy.take(value).items()}
    except (TypeError, ValueError) as error:
        raise SiteError(f"site {target.where}: {error}") from error
    return Slab(keys, strategy, state, strategy.result_dtype(value.data.dtype))


def own(x_n: Tensor, shown: Tensor, site: Site, offload: Offload) -> Tensor:
    """Rows that the model won't write to: converted, moved or copied, at most once."""
    device = x_n.device if site.device is None else torch.device(site.device)
    kept = x_n.to(site.dtype or x_n.dtype)
    if x_n.is_cuda and device.type == "cpu":
        if _shares(kept, shown):
            kept = kept.clone()  # on the GPU, in the stream that will write to it
        return offload.copy(kept)
    kept = kept.to(device)
    return kept.clone(memory_format=torch.contiguous_format) if _shares(kept, shown) else kept


def _shares(x: Tensor, shown: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == shown.untyped_storage().data_ptr()
