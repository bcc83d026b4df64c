"""The attention pattern in plain torch: the specification that kernels are tested against.

float64, everything at once, no blocks, so that each line can be compared with the formula.

Legend of names: b batch, h query heads, q queries, k keys, d head dim, s aligned positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcache.attention.taps import AttentionCall


@torch.no_grad()
def pattern(call: AttentionCall) -> Tensor:
    """Softmax probabilities [B, H, Q, K], float64, padding included. A row that may see no key is zeros."""
    return _softmax(_scores(call), call.sinks)


@torch.no_grad()
def pattern_sum(call: AttentionCall, spans: Sequence[tuple[int, int]], size: int) -> Tensor:
    """The sum over samples of each sample's pattern within its span, [H, size, size], float64.

    `spans[b]` is the range (start, stop) of sample b's valid tokens, both as queries and as keys; it is
    realigned to index 0. Nothing outside takes part, not even in the softmax's denominator.
    """
    scores_bhqk = _scores(call)
    total_hss = scores_bhqk.new_zeros(scores_bhqk.shape[1], size, size)
    for scores_hqk, (start, stop) in zip(scores_bhqk, spans, strict=True):
        length = stop - start
        valid_hqk = scores_hqk[:, start:stop, start:stop]
        total_hss[:, :length, :length] += _softmax(valid_hqk[None], call.sinks)[0]
    return total_hss


def _scores(call: AttentionCall) -> Tensor:
    """[B, H, Q, K], float64; −inf where a query may not attend."""
    q_bhqd, k_bhkd = call.query_bhqd.double(), call.key_bhkd.double()
    k_bhkd = k_bhkd.repeat_interleave(q_bhqd.shape[1] // k_bhkd.shape[1], dim=1)
    scores_bhqk = q_bhqd @ k_bhkd.mT * call.scaling
    if call.softcap is not None:
        scores_bhqk = torch.tanh(scores_bhqk / call.softcap) * call.softcap
    if call.position_bias is not None:
        scores_bhqk = scores_bhqk + call.position_bias.double()

    mask = call.mask
    if mask is not None and mask.dim() == 4:
        if mask.dtype == torch.bool:
            return scores_bhqk.masked_fill(~mask, -torch.inf)
        # Models write "may not attend" as the lowest number of the mask's dtype; here it is −inf, so that
        # a row of nothing else is known as such.
        barred = mask <= torch.finfo(mask.dtype).min
        return (scores_bhqk + mask.double()).masked_fill(barred, -torch.inf)

    q_q1 = torch.arange(q_bhqd.shape[2], device=q_bhqd.device)[:, None]
    k_1k = torch.arange(k_bhkd.shape[2], device=q_bhqd.device)[None, :]
    if call.is_causal and q_bhqd.shape[2] > 1:
        scores_bhqk = scores_bhqk.masked_fill(k_1k > q_q1, -torch.inf)
    if call.sliding_window is not None:
        scores_bhqk = scores_bhqk.masked_fill((q_q1 - k_1k).abs() >= call.sliding_window, -torch.inf)
    if mask is not None:
        scores_bhqk = scores_bhqk.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return scores_bhqk


def _softmax(scores_bhqk: Tensor, sinks: Tensor | None) -> Tensor:
    if scores_bhqk.shape[-1] == 0:
        return scores_bhqk
    barred_bhq1 = (scores_bhqk == -torch.inf).all(-1, keepdim=True)
    if sinks is not None:
        b, h, q, _ = scores_bhqk.shape
        sinks_bhq1 = sinks.to(scores_bhqk).view(1, h, 1, 1).expand(b, h, q, 1)
        probs_bhqk = torch.cat([scores_bhqk, sinks_bhq1], -1).softmax(-1)[..., :-1]
    else:
        probs_bhqk = scores_bhqk.softmax(-1)
    return probs_bhqk.masked_fill(barred_bhq1, 0.0)
