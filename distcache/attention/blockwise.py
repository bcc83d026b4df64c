"""Sums of attention patterns, a block of queries at a time.

A pattern is S × S for every head; for a batch of them there is no room. So rows are computed in blocks,
added to the sum, and dropped: at most [samples, heads, block, S] scores exist at once, and the samples are
as few as keep that within a fixed number of scores. `reference.py` says what must come out.

Legend of names: b samples taken together, h query heads, g key heads, q queries of a block, k keys of a
block, l a sample's valid tokens, d head dim, s aligned positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from distcache.attention.taps import AttentionCall
from distcache.errors import SiteError

# How many scores of several samples may exist at once; one sample alone may need more. On a CPU they should
# stay in the cache; a GPU wants work enough to fill it (2**26 float32 are 256 MiB, and the softmax's as many).
_SCORES_CPU = 2**20
_SCORES_GPU = 2**26


def pattern_sum(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    size: int,
    *,
    block: int = 128,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """The sum over samples of each sample's pattern, padding removed, realigned to index 0.

    `spans[b]` is the range (start, stop) of sample b's valid tokens; an empty one adds nothing. Queries and
    keys outside are dropped before the softmax. `heads` are the query heads wanted, by default all.

    Returns float32 [heads, size, size] on the call's device, a normal tensor also under inference_mode.
    Scores are float32, or float64 for float64 inputs; never less, also under autocast. The same inputs give
    the same bits. SiteError if spans do not fit the call or `size`. Not a collective.
    """
    _check(call, spans, size)
    call = _pick(call, heads)
    q_bhqd = call.query_bhqd
    with _plain_arithmetic(q_bhqd.device):
        total_hss = torch.zeros(q_bhqd.shape[1], size, size, dtype=torch.float32, device=q_bhqd.device)
        for samples, (start, stop) in _runs(spans):
            for part in _parts(samples, q_bhqd.shape[1] * min(block, stop - start) * (stop - start), q_bhqd):
                for rows, keys, probs_bhqk in _blocks(call, part, start, stop, block):
                    summed_hqk = probs_bhqk[0] if len(probs_bhqk) == 1 else probs_bhqk.sum(0)
                    total_hss[:, rows, keys] += summed_hqk
        return total_hss


def pattern(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    b: int,
    *,
    block: int = 128,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Sample b's pattern within its span, float32 [heads, L, L] with L = stop − start; else as `pattern_sum`."""
    start, stop = spans[b]
    _check(call, spans, stop - start)
    call = _pick(call, heads)
    q_bhqd = call.query_bhqd
    with _plain_arithmetic(q_bhqd.device):
        length = stop - start
        pattern_hll = torch.zeros(q_bhqd.shape[1], length, length, dtype=torch.float32, device=q_bhqd.device)
        for rows, keys, probs_bhqk in _blocks(call, slice(b, b + 1), start, stop, block):
            pattern_hll[:, rows, keys] = probs_bhqk[0]
        return pattern_hll


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


def _check(call: AttentionCall, spans: Sequence[tuple[int, int]], size: int) -> None:
    num_samples, num_heads, num_queries, _ = call.query_bhqd.shape
    where = f"attention of {type(call.module).__name__}"
    if call.key_bhkd.shape[2] != num_queries or num_heads % call.key_bhkd.shape[1]:
        raise SiteError(
            f"{where}: expected as many keys as queries, and query heads a multiple of key heads; got queries "
            f"{tuple(call.query_bhqd.shape)} and keys {tuple(call.key_bhkd.shape)} as [batch, heads, tokens, dim]."
        )
    if len(spans) != num_samples:
        raise SiteError(
            f"{where}: expected a span of valid tokens for each of {num_samples} samples, got {len(spans)}. "
            f"The mask given to record() must be the one of this batch."
        )
    for b, (start, stop) in enumerate(spans):
        if not 0 <= start <= stop <= num_queries:
            raise SiteError(
                f"{where}: expected a span within its {num_queries} tokens, got {(start, stop)} for sample {b}. "
                f"The mask given to record() must be the one of this batch."
            )
    longest = max((stop - start for start, stop in spans), default=0)
    if longest > size:
        raise SiteError(
            f"{where}: expected at most {size} valid tokens a sample, got {longest}. Use a larger size."
        )


def _pick(call: AttentionCall, heads: Sequence[int] | None) -> AttentionCall:
    """The call of some heads alone, in the order given; key heads are repeated where they serve several."""
    if heads is None:
        return call
    num_heads, num_key_heads = call.query_bhqd.shape[1], call.key_bhkd.shape[1]
    if not all(0 <= head < num_heads for head in heads):
        raise SiteError(
            f"attention of {type(call.module).__name__}: expected heads in 0..{num_heads - 1}, got {list(heads)}."
        )
    group = num_heads // num_key_heads
    with _plain_arithmetic(call.query_bhqd.device):
        index = torch.tensor(list(heads), dtype=torch.long, device=call.query_bhqd.device)

        def of_heads(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.dim() != 4 or x.shape[1] == 1 else x[:, index]

        return replace(
            call,
            query_bhqd=call.query_bhqd[:, index],
            key_bhkd=call.key_bhkd[:, index // group],
            mask=of_heads(call.mask),
            position_bias=of_heads(call.position_bias),
            sinks=None if call.sinks is None else call.sinks[index],
        )


def _runs(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[range, tuple[int, int]]]:
    """Neighbouring samples of one span, to be computed together; empty spans left out."""
    for (start, stop), run in itertools.groupby(range(len(spans)), key=lambda b: tuple(spans[b])):
        samples = list(run)
        if start < stop:
            yield range(samples[0], samples[-1] + 1), (start, stop)


def _parts(samples: range, scores_per_sample: int, like: Tensor) -> Iterator[slice]:
    limit = _SCORES_CPU if like.device.type == "cpu" else _SCORES_GPU
    step = max(1, limit // scores_per_sample)
    for first in range(samples.start, samples.stop, step):
        yield slice(first, min(first + step, samples.stop))


def _blocks(
    call: AttentionCall, samples: slice, start: int, stop: int, block: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, keys, probabilities [b, h, q, k]) of these samples, whose valid tokens are start..stop.

    Rows and keys count from `start`. Keys left out have probability zero.
    """
    dtype = torch.float64 if call.query_bhqd.dtype == torch.float64 else torch.float32
    k_bgld = call.key_bhkd[samples, :, start:stop].to(dtype)
    b, g, _, d = k_bgld.shape
    h = call.query_bhqd.shape[1]
    for top in range(start, stop, block):
        bottom = min(top + block, stop)
        first, last = _key_range(call, samples, top, bottom, start, stop)
        q_bhqd = call.query_bhqd[samples, :, top:bottom].to(dtype) * call.scaling
        # Heads that share keys lie side by side, so a group is one matrix and keys are never repeated.
        q_bgqd = q_bhqd.reshape(b, g, -1, d)
        scores_bgqk = q_bgqd @ k_bgld[:, :, first - start : last - start].mT
        probs_bhqk = _softmax(call, scores_bgqk.view(b, h, bottom - top, -1), samples, top, first)
        yield slice(top - start, bottom - start), slice(first - start, last - start), probs_bhqk


def _key_range(
    call: AttentionCall, samples: slice, top: int, bottom: int, start: int, stop: int
) -> tuple[int, int]:
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
        later = _cut(call.mask, samples, slice(top, bottom), slice(bottom, stop))
        if bool(_barred(later).all()):
            last = bottom
    return first, last


def _softmax(call: AttentionCall, scores_bhqk: Tensor, samples: slice, top: int, first: int) -> Tensor:
    """Probabilities from Q · K of queries from `top` and keys from `first`; overwrites the scores."""
    _, _, q, k = scores_bhqk.shape
    rows, keys = slice(top, top + q), slice(first, first + k)
    if call.softcap is not None:
        scores_bhqk.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.position_bias is not None:
        scores_bhqk += _cut(call.position_bias, samples, rows, keys)

    barred: Tensor | None = None  # broadcastable to the scores; only where a row may see no key at all
    mask = call.mask
    if mask is not None and mask.dim() == 4:
        part = _cut(mask, samples, rows, keys)
        barred = _barred(part)
        if part.dtype == torch.bool:
            scores_bhqk.masked_fill_(barred, -torch.inf)
        else:
            scores_bhqk += part
    else:
        q_q1 = torch.arange(top, top + q, device=scores_bhqk.device)[:, None]
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
            scores_bhqk[..., top - first :].masked_fill_(k_1k[:, top - first :] > q_q1, -torch.inf)

    probs_bhqk = torch.softmax(scores_bhqk, -1)
    if call.sinks is not None:
        # With a sink's logit c: exp(x) / (Σ exp + exp(c)) = softmax(x) · sigmoid(logsumexp − c).
        lse_bhq1 = scores_bhqk.logsumexp(-1, keepdim=True)
        probs_bhqk *= torch.sigmoid(lse_bhq1 - call.sinks.to(scores_bhqk.dtype).view(1, -1, 1, 1))
    if barred is not None:
        blind = barred.all(-1, keepdim=True)
        if blind.device.type != "cpu" or bool(blind.any()):
            probs_bhqk.masked_fill_(blind, 0.0)
    return probs_bhqk


def _cut(x: Tensor, samples: slice, rows: slice, keys: slice) -> Tensor:
    """A block of something that broadcasts to [B, H, Q, K]."""
    everything = slice(None)
    return x[
        everything if x.shape[0] == 1 else samples,
        :,
        everything if x.shape[2] == 1 else rows,
        everything if x.shape[3] == 1 else keys,
    ]


def _barred(mask: Tensor) -> Tensor:
    """True where this part of a four-dim mask forbids to attend."""
    # Models write "may not attend" as the lowest number of the mask's dtype.
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
