"""Sums of attention patterns, a block of queries at a time.

A pattern is S × S for every head; for a batch of them there is no room. So rows are computed in blocks,
added to the sum, and dropped: at most [samples, heads, block, S] scores exist at once, and the samples are
as few as keep that within a fixed number of scores. `reference.py` says what must come out.

Legend of names: b samples taken together, h query heads, g key heads, q queries, k keys, l a sample's valid
tokens, d head dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from distcache.attention.positions import Align, Positions, between, positions, positions_of_text, within
from distcache.attention.taps import AttentionCall
from distcache.errors import SiteError

# How many scores of several samples may exist at once; one sample alone may need more. On a CPU they should
# stay in the cache; a GPU wants work enough to fill it (2**26 are 256 MiB, twice that with the softmax).
_SCORES_CPU = 2**20
_SCORES_GPU = 2**26


def pattern_sum(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    size: int,
    *,
    block: int = 128,
    heads: Sequence[int] | None = None,
    queries: Positions = None,
    keys: Positions = None,
    align: Align = "start",
) -> Tensor:
    """The sum over samples of each sample's pattern, padding removed, realigned at the first token or the last.

    `spans[b]` is the range (start, stop) of sample b's valid tokens; an empty one adds nothing. Queries and
    keys outside are dropped before the softmax. `heads` are the query heads wanted, by default all. `queries` and
    `keys` are the positions wanted, as of `positions.positions`; weights are of the whole row in any case, and
    `positions.query_counts` says how many samples are in each.

    Returns float32 [heads, queries, keys] on the call's device, by default [heads, size, size], a normal tensor also
    under inference_mode. Scores are float32, or float64 for float64 inputs; never less, also under autocast. The same
    inputs give the same bits. SiteError if spans do not fit the call or `size`, or positions `align`. Not a collective.
    """
    _check(call, spans, size, heads)
    device = call.query_bhqd.device
    num_heads = call.query_bhqd.shape[1] if heads is None else len(heads)
    all_rows, all_keys = positions(queries, size, align, "queries"), positions(keys, size, align, "keys")
    with _plain_arithmetic(device):
        total_hqk = torch.zeros(num_heads, len(all_rows), len(all_keys), dtype=torch.float32, device=device)
        for samples, (start, stop) in _runs(spans):
            rows, to_rows = within(all_rows, stop - start, align)
            kept, to_keys = within(all_keys, stop - start, align)
            for part in _parts(samples, num_heads * min(block, len(rows)) * (stop - start), device):
                for at, at_keys, probs_bhqk in _cut_blocks(call, part, start, stop, block, heads, rows, kept):
                    summed_hqk = probs_bhqk[0] if len(probs_bhqk) == 1 else probs_bhqk.sum(0)
                    total_hqk[:, _inside(to_rows, at), _inside(to_keys, at_keys)] += summed_hqk
                    del probs_bhqk, summed_hqk  # before the next block is made beside it
        return total_hqk


def pattern(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    b: int,
    *,
    block: int = 128,
    heads: Sequence[int] | None = None,
    queries: Positions = None,
    keys: Positions = None,
) -> Tensor:
    """Sample b's pattern within its span, float32 [heads, L, L], L = stop − start; else as `pattern_sum`.

    `queries` and `keys`: of those positions that the text has, as of `positions.positions_of_text`.
    """
    device, num_tokens = call.query_bhqd.device, call.query_bhqd.shape[2]
    _check(call, spans, num_tokens, heads)
    start, stop = spans[b]
    num_heads = call.query_bhqd.shape[1] if heads is None else len(heads)
    rows = positions_of_text(queries, stop - start, "queries")
    kept = positions_of_text(keys, stop - start, "keys")
    with _plain_arithmetic(device):
        pattern_hqk = torch.zeros(num_heads, len(rows), len(kept), dtype=torch.float32, device=device)
        for at, at_keys, probs_bhqk in _cut_blocks(call, slice(b, b + 1), start, stop, block, heads, rows, kept):
            pattern_hqk[:, at, at_keys] = probs_bhqk[0]
            del probs_bhqk
        return pattern_hqk


def sum_bytes(
    num_heads: int, size: int, *, queries: Positions = None, keys: Positions = None, align: Align = "start"
) -> int:
    """What `pattern_sum` returns, in bytes: of each layer until the pass that made it returns."""
    return num_heads * len(positions(queries, size, align)) * len(positions(keys, size, align, "keys")) * 4


def scratch_bytes(
    num_samples: int,
    num_heads: int,
    num_tokens: int,
    head_dim: int,
    device: torch.device,
    *,
    block: int = 128,
    num_queries: int | None = None,
    itemsize: int = 4,
) -> int:
    """The most that is held beside results while a layer's blocks are made, in bytes, mask and model apart.

    `num_tokens`: of the longest sample; `num_queries`: how many of them are asked for, all if None; `itemsize`: 8 for
    float64 inputs, 4 for all others.
    """
    rows = min(block, num_tokens if num_queries is None else num_queries)
    together = min(num_samples, _samples_together(num_heads * rows * num_tokens, device))
    scores = num_heads * rows * num_tokens
    # Scores with their softmax, or that with what is made of it; Q of a block and K of a text, converted and picked.
    return together * (2 * scores + 2 * num_heads * (rows + num_tokens) * head_dim) * itemsize


@functools.lru_cache(maxsize=256)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64, made once and never written to: bringing numbers to a GPU waits for all that is computed there."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        # A sum made under inference_mode could not be added to outside of it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # Autocast would take the scores back to bf16.
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _check(call: AttentionCall, spans: Sequence[tuple[int, int]], size: int, heads: Sequence[int] | None) -> None:
    num_samples, num_heads, num_tokens, _ = call.query_bhqd.shape
    where = f"attention of {type(call.module).__name__}"
    if call.key_bhkd.shape[2] != num_tokens or num_heads % call.key_bhkd.shape[1]:
        raise SiteError(
            f"{where}: expected as many keys as queries, and query heads a multiple of key heads; got "
            f"queries {tuple(call.query_bhqd.shape)}, keys {tuple(call.key_bhkd.shape)} as [B, H, S, D]. "
            f"Cached decoding and cross-attention are not supported yet."
        )
    if len(spans) != num_samples:
        raise SiteError(
            f"{where}: expected a span of valid tokens for each of {num_samples} samples, got {len(spans)}. "
            f"The mask given to record() must be the one of this batch."
        )
    for b, (start, stop) in enumerate(spans):
        if not 0 <= start <= stop <= num_tokens:
            raise SiteError(
                f"{where}: expected a span within {num_tokens} tokens, got {(start, stop)} for sample {b}. "
                f"The mask given to record() must be the one of this batch."
            )
        if stop - start > size:
            raise SiteError(
                f"{where}: expected at most {size} valid tokens, got {stop - start} for sample {b}. "
                f"Use a larger size, or shorter texts."
            )
    if heads is not None and not all(0 <= head < num_heads for head in heads):
        raise SiteError(f"{where}: expected heads within 0..{num_heads - 1}, got {list(heads)}.")


def _runs(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[range, tuple[int, int]]]:
    """Neighbouring samples of one span, to be computed together; empty spans left out."""
    for (start, stop), run in itertools.groupby(range(len(spans)), key=lambda b: tuple(spans[b])):
        samples = list(run)
        if start < stop:
            yield range(samples[0], samples[-1] + 1), (start, stop)


def _parts(samples: range, scores_per_sample: int, device: torch.device) -> Iterator[slice]:
    step = _samples_together(scores_per_sample, device)
    for first in range(samples.start, samples.stop, step):
        yield slice(first, min(first + step, samples.stop))


def _inside(outer: slice, inner: slice) -> slice:
    """The slice that x[outer][inner] takes of x."""
    return slice(outer.start + inner.start, outer.start + inner.stop)


def _samples_together(scores_per_sample: int, device: torch.device) -> int:
    limit = _SCORES_CPU if device.type == "cpu" else _SCORES_GPU
    return max(1, limit // max(1, scores_per_sample))


def _cut_blocks(
    call: AttentionCall,
    samples: slice,
    start: int,
    stop: int,
    block: int,
    heads: Sequence[int] | None,
    rows: range,
    kept: range,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """`_blocks` cut to the keys `kept`: (which of `rows`, which of `kept`, their probabilities [b, h, q, k])."""
    if not kept:
        return
    for at, keys, probs_bhqk in _blocks(call, samples, start, stop, block, heads, rows):
        at_keys = between(kept, keys.start, keys.stop)
        seen = kept[at_keys]
        yield at, at_keys, probs_bhqk[..., seen.start - keys.start : seen.stop - keys.start : seen.step]
        del probs_bhqk


def _blocks(
    call: AttentionCall,
    samples: slice,
    start: int,
    stop: int,
    block: int,
    heads: Sequence[int] | None,
    rows: range,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(at, keys, probabilities [b, h, q, k] of queries rows[at]) of these samples, whose valid tokens are start..stop.

    Rows and keys count from `start`. Keys left out have probability zero.
    """
    dtype = torch.float64 if call.query_bhqd.dtype == torch.float64 else torch.float32
    picked: Tensor | slice = slice(None)
    k_bgld = call.key_bhkd[samples, :, start:stop]
    if heads is not None:
        picked = on_device(tuple(heads), k_bgld.device)
        k_bgld = k_bgld[:, picked // (call.query_bhqd.shape[1] // k_bgld.shape[1])]  # one key head for each
    k_bgld = k_bgld.to(dtype)
    for i in range(0, len(rows), block):
        at = slice(i, min(i + block, len(rows)))
        part = rows[at]
        tokens = slice(start + part[0], start + part[-1] + 1, part.step)
        first, last = _key_range(call, samples, tokens.start, tokens.stop, start, stop)
        q_bhqd = call.query_bhqd[samples, :, tokens][:, picked].to(dtype) * call.scaling
        b, h, q, d = q_bhqd.shape
        # Heads that share keys lie side by side, so a group is one matrix and keys are never repeated.
        q_bgqd = q_bhqd.reshape(b, k_bgld.shape[1], -1, d) if h else q_bhqd
        # Neither scores nor probabilities have a name here, where they would outlive their use.
        yield (
            at,
            slice(first - start, last - start),
            _softmax(
                call,
                (q_bgqd @ k_bgld[:, :, first - start : last - start].mT).view(b, h, q, last - first),
                samples,
                tokens,
                first,
                picked,
            ),
        )


def _key_range(call: AttentionCall, samples: slice, top: int, bottom: int, start: int, stop: int) -> tuple[int, int]:
    """The keys that queries top..bottom may see at all."""
    first, last = start, stop
    if call.mask is None or call.mask.dim() == 2:
        if call.is_causal:
            last = bottom
        if call.sliding_window is not None:
            first = max(first, top - call.sliding_window + 1)
            last = min(last, bottom + call.sliding_window - 1)
    elif call.is_causal and bottom < stop and call.mask.device.type == "cpu":
        # A causal model's mask mostly, but not always, bars what comes later (a prefix may be seen whole).
        # To look costs a pass over one head's mask; on a GPU it would cost a wait, so there we compute all.
        later = _cut(call.mask, samples, slice(None), slice(top, bottom), slice(bottom, stop))
        if bool(_barred(later).all()):
            last = bottom
    return first, last


def _softmax(
    call: AttentionCall, scores_bhqk: Tensor, samples: slice, rows: slice, first: int, picked: Tensor | slice
) -> Tensor:
    """Probabilities from Q · K of queries `rows` and keys from `first`; overwrites the scores."""
    k = scores_bhqk.shape[-1]
    keys = slice(first, first + k)
    if call.softcap is not None:
        scores_bhqk.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.position_bias is not None:
        scores_bhqk += _cut(call.position_bias, samples, picked, rows, keys)

    barred: Tensor | None = None  # broadcastable to the scores; only where a row may see no key at all
    mask = call.mask
    if mask is not None and mask.dim() == 4:
        part = _cut(mask, samples, picked, rows, keys)
        barred = _barred(part)
        if part.dtype == torch.bool:
            scores_bhqk.masked_fill_(barred, -torch.inf)
        else:
            scores_bhqk += part
    else:
        q_q1 = torch.arange(rows.start, rows.stop, rows.step, device=scores_bhqk.device)[:, None]
        k_1k = torch.arange(first, first + k, device=scores_bhqk.device)[None, :]
        if call.sliding_window is not None or mask is not None:
            barred_qk = (k_1k > q_q1) & call.is_causal
            if call.sliding_window is not None:
                barred_qk |= (q_q1 - k_1k).abs() >= call.sliding_window
            barred = barred_qk[None, None]
            if mask is not None:
                barred = barred | (mask[samples, None, None, keys] == 0)
            scores_bhqk.masked_fill_(barred, -torch.inf)
        elif call.is_causal:
            # Only the square on the diagonal has anything to bar.
            later = slice(rows.start - first, None)
            scores_bhqk[..., later].masked_fill_(k_1k[:, later] > q_q1, -torch.inf)

    probs_bhqk = torch.softmax(scores_bhqk, -1)
    if call.sinks is not None:
        # With a sink's logit c: exp(x) / (Σ exp + exp(c)) = softmax(x) · sigmoid(logsumexp − c).
        lse_bhq1 = scores_bhqk.logsumexp(-1, keepdim=True)
        probs_bhqk *= torch.sigmoid(lse_bhq1 - call.sinks[picked].to(scores_bhqk.dtype).view(1, -1, 1, 1))
    if barred is not None:
        blind = barred.all(-1, keepdim=True)
        if blind.device.type != "cpu" or bool(blind.any()):
            probs_bhqk.masked_fill_(blind, 0.0)
    return probs_bhqk


def _cut(x: Tensor, samples: slice, heads: Tensor | slice, rows: slice, keys: slice) -> Tensor:
    """A block of something that broadcasts to [B, H, Q, K]."""
    everything = slice(None)
    part = x[
        everything if x.shape[0] == 1 else samples,
        :,
        everything if x.shape[2] == 1 else rows,
        everything if x.shape[3] == 1 else keys,
    ]
    return part if x.shape[1] == 1 else part[:, heads]


def _barred(mask: Tensor) -> Tensor:
    """True where this part of a four-dim mask forbids to attend."""
    # Models write "may not attend" as the lowest number of the mask's dtype.
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
