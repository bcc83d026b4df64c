"""The passes of one generation as one attention over all of its tokens.

A pass that goes on with texts has few queries and many keys, most of which earlier passes had too. What is kept of
it is what is new: its queries, their keys, and what was said of these queries' scores.

Legend of names: b samples, h query heads, g key heads, q queries, k keys, s all tokens, d head dim.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from distcache.attention.taps import AttentionCall, check_square, lets_through
from distcache.errors import SiteError


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One pass. Tokens have the numbers start, start + 1, …; the first key that it was given has the number `first`.

    `mask` and `bias` broadcast to [B, H, q, k], k the keys from `first` up to the last new token; without a mask each
    query sees every token up to itself. `padding`: [B, q] of the new tokens, where the model's mask has two dims.
    """

    start: int
    first: int
    query_bhqd: Tensor
    key_bgqd: Tensor
    mask: Tensor | None
    bias: Tensor | None
    padding: Tensor | None

    @property
    def stop(self) -> int:
        return self.start + self.query_bhqd.shape[2]


class Steps:
    """What the passes of one generation show of one attention module.

    Keeps copies, because caches are written to later: of each pass its queries and their keys, and the rows of its mask
    and bias, one copy for all layers that were given the same tensor. Keys are those of the pass that made them, so
    caches that change them afterwards, such as quantized ones, must not be used.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._like: AttentionCall | None = None  # the first call, of whose tensors nothing is kept
        self._strayed: Tensor | None = None  # bool, whether a mask let keys through that are of no token

    @property
    def num_tokens(self) -> int:
        """How many tokens a text of the batch has so far, padding included."""
        return self._steps[-1].stop if self._steps else 0

    @torch.no_grad()
    def add(self, call: AttentionCall) -> None:
        """The next pass, in order: the prompt's square call, then calls of new queries, as taps give them with `steps`.

        Where the new keys lie is told by how many there are. Of n tokens so far and q new ones, at least n + q keys are
        a cache that has a place for each token (it grows, or has empty places at its end, which a mask bars); fewer are
        one that has dropped the first, and new ones are the last. A square call of more than n tokens is one without a
        cache, of the whole texts again: what was kept of earlier passes is dropped.

        `SiteError` for other samples, heads or scores than before, and for what a whole call couldn't say. Not a
        collective.
        """
        where = f"attention of {type(call.module).__name__}"
        num_samples, num_heads, num_new, head_dim = call.query_bhqd.shape
        num_given = call.key_bhkd.shape[2]
        if num_new == num_given > self.num_tokens:
            self._steps, self._like, self._strayed = [], None, None
        if self._like is None:
            check_square(where, num_new, num_given)
            nothing = call.query_bhqd.new_empty(num_samples, num_heads, 0, head_dim)
            self._like = dataclasses.replace(
                call, query_bhqd=nothing, key_bhkd=nothing, mask=None, position_bias=None, is_causal=True
            )
        elif _facts(call) != _facts(self._like):
            raise SiteError(
                f"{where}: expected passes over the same texts to have (samples, heads, head dim, scaling, softcap, "
                f"window) {_facts(self._like)}, got {_facts(call)}. Record each batch's generation from its prompt on."
            )

        start = self.num_tokens
        end = min(num_given, start + num_new)  # of the keys that are given, where those of tokens end
        first = start + num_new - end
        mask = call.mask if call.mask is not None and call.mask.dim() == 4 else None
        two_dims = call.mask if mask is None else None
        if mask is None and end < num_given and two_dims is None:
            raise SiteError(
                f"{where}: got {num_given} keys, of which {num_given - end} are of no token that was recorded, and no "
                f"mask that bars them. Record a generation from its prompt on, without what was in its cache before."
            )
        if mask is not None and mask.shape[-1] > end:
            strays = lets_through(mask[..., end:])  # to be asked once: here a GPU would be waited for in every pass
            self._strayed = strays if self._strayed is None else self._strayed | strays
        sees_all = mask is None and not call.is_causal and num_new > 1
        lacks_some = mask is None and first > 0 and not _covers(call.sliding_window, end - num_new)
        if (sees_all and call.sliding_window is not None) or ((sees_all or lacks_some) and two_dims is not None):
            raise SiteError(
                f"{where}: expected queries that see each token up to themselves, of the padding mask or the window "
                f"that they have, got is_causal={call.is_causal} and {num_given} keys for {start + num_new} tokens. "
                f"Load the model with attn_implementation='sdpa'."
            )
        if sees_all:
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=call.query_bhqd.device)
        elif lacks_some:
            mask = _causal(num_new, end, call.sliding_window, call.query_bhqd.device)
        self._steps.append(
            _Step(
                start=start,
                first=first,
                query_bhqd=_copy(call.query_bhqd),
                key_bgqd=_copy(call.key_bhkd[:, :, end - num_new : end]),
                mask=None if mask is None else shared_copy(mask, end),
                bias=None if call.position_bias is None else shared_copy(call.position_bias, end),
                padding=None if two_dims is None else _new_columns(two_dims, start, num_new),
            )
        )

    @torch.no_grad()
    def whole(self) -> AttentionCall:
        """One square call over all tokens, whose pattern has the row that each pass computed, with later keys barred.

        Its tensors are new, [B, H, S, D] and [B, G, S, D]; its mask is bool or additive, [B or 1, H or 1, S, S], as
        those of the passes were; or [B, S], padding; or None, where nothing but causality bars. `SiteError` for masks
        of two kinds, and for passes that have attended to a cache's empty places.
        """
        assert self._like is not None, "whole() of a generation that has shown nothing"
        where = f"attention of {type(self._like.module).__name__}"
        if self._strayed is not None and bool(self._strayed):
            raise SiteError(
                f"{where}: its masks let queries see places of the cache that no token had been written to, so weights "
                f"that no whole text has (transformers' flex attention does so with static caches). Generate with "
                f"another cache, or load the model with attn_implementation='sdpa'."
            )
        steps = self._steps
        query_bhsd = torch.cat([step.query_bhqd for step in steps], 2)
        key_bgsd = torch.cat([step.key_bgqd for step in steps], 2)
        mask: Tensor | None = None
        padded, masked = any(step.padding is not None for step in steps), any(step.mask is not None for step in steps)
        if padded and masked:
            raise SiteError(
                f"{where}: got masks of two dims in some passes and of four in others. Generate by one "
                f"attn_implementation from beginning to end."
            )
        if padded:
            mask = torch.cat([self._padding(step) for step in steps], 1)
        elif masked:
            mask = self._mask()
        return dataclasses.replace(
            self._like, query_bhqd=query_bhsd, key_bhkd=key_bgsd, mask=mask, position_bias=self._bias()
        )

    def _padding(self, step: _Step) -> Tensor:
        """[B, q], of a pass without padding in sight too."""
        if step.padding is not None:
            return step.padding
        b, _, q, _ = step.query_bhqd.shape
        return torch.ones(b, q, dtype=torch.bool, device=step.query_bhqd.device)

    def _mask(self) -> Tensor:
        assert self._like is not None
        masks = [step.mask for step in self._steps if step.mask is not None]
        dtype = next((mask.dtype for mask in masks if mask.is_floating_point()), torch.bool)
        barred = torch.finfo(dtype).min if dtype.is_floating_point else False
        whole = self._square(masks, dtype, barred)
        for step in self._steps:
            rows = step.mask
            if rows is None:
                rows = _causal(step.stop - step.start, step.stop, self._like.sliding_window, whole.device)
            if dtype.is_floating_point and rows.dtype == torch.bool:
                rows = torch.zeros(rows.shape, dtype=dtype, device=rows.device).masked_fill_(~rows, barred)
            whole[:, :, step.start : step.stop, step.first : step.stop] = rows
        return whole

    def _bias(self) -> Tensor | None:
        biases = [step.bias for step in self._steps if step.bias is not None]
        if not biases:
            return None
        whole = self._square(biases, biases[0].dtype, 0.0)
        for step in self._steps:
            if step.bias is not None:
                whole[:, :, step.start : step.stop, step.first : step.stop] = step.bias
        return whole

    def _square(self, parts: list[Tensor], dtype: torch.dtype, value: float | bool) -> Tensor:
        """[B or 1, H or 1, S, S] for these rows."""
        b, h = (max(part.shape[dim] for part in parts) for dim in (0, 1))
        shape = (b, h, self.num_tokens, self.num_tokens)
        return torch.full(shape, value, dtype=dtype, device=parts[0].device)


def _facts(call: AttentionCall) -> tuple[float | None, ...]:
    """What all passes over the same texts have alike."""
    num_samples, num_heads, _, head_dim = call.query_bhqd.shape
    return (num_samples, num_heads, head_dim, call.scaling, call.softcap, call.sliding_window)


def _covers(window: int | None, num_before: int) -> bool:
    """Whether a query whose keys are those of `num_before` tokens before it, and its own, has all of its window."""
    return window is not None and num_before >= window - 1


def _causal(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [1, 1, q, k] of the last queries of as many tokens as there are keys: each sees those up to itself."""
    rows = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_queries)
    return (rows if window is None else rows.triu_(num_keys - num_queries - window + 1))[None, None]


def _new_columns(mask_bk: Tensor, start: int, num_new: int) -> Tensor:
    """Of a mask over tokens, or over those that a cache still has, what it says of the new ones: bool [B, q]."""
    end = min(mask_bk.shape[1], start + num_new)
    return mask_bk[:, end - num_new : end] != 0


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


# By the tensor that a model has made for a pass, for as long as it lives: (which version of it, its copy).
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def shared_copy(x: Tensor, num_keys: int | None = None) -> Tensor:
    """The first keys' columns, or all, of a mask or a bias: of one tensor, unchanged, one copy, to be read only."""
    part = x[..., :num_keys]
    if x.dim() == 4:  # what is expanded over samples is one and the same for all of them
        part = part[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in part.stride())]
    version = None if x.is_inference() else x._version
    found: tuple[int | None, Tensor] | None = _copies.get(x)
    is_same = found is not None and found[0] == version and found[1].shape == part.shape
    if found is not None and is_same and (version is not None or torch.equal(found[1], part)):
        return found[1]  # inference tensors have no version: they don't tell whether they were written to
    copy = _copy(part)
    _copies[x] = (version, copy)
    return copy
