"""The attention pattern in plain torch: the specification that kernels are tested against.

float64, everything at once, no blocks, so that each line can be compared with the formula.

Legend of names: b batch, h query heads, q queries, k keys, d head dim, s aligned positions, l a text's tokens,
c classes, parts or bins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from distcache.attention.taps import AttentionCall


@torch.no_grad()
def pattern(call: AttentionCall) -> Tensor:
    """Softmax probabilities [B, H, Q, K], float64, padding included. A row that may see no key is zeros."""
    return _softmax(_scores(call), call.sinks)


@torch.no_grad()
def text_pattern(call: AttentionCall, b: int, span: tuple[int, int]) -> Tensor:
    """Sample b's pattern within its span (start, stop), [H, L, L], float64, realigned to index 0.

    Nothing outside takes part, not even in the softmax's denominator.
    """
    valid = slice(*span)
    return _softmax(_scores(call)[b, :, valid, valid][None], call.sinks)[0]


@torch.no_grad()
def pattern_sum(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    size: int,
    *,
    queries: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    align: str = "start",
) -> Tensor:
    """The sum over samples of each sample's pattern within its span, [H, queries, keys], float64.

    `spans[b]` is the range (start, stop) of sample b's valid tokens, both as queries and as keys. `queries` and `keys`
    are positions: 0 is a text's first token, or with align="end" −1 its last; by default all of `size` of them. What a
    text hasn't got adds nothing.
    """
    every = range(size) if align == "start" else range(-size, 0)
    queries, keys = every if queries is None else queries, every if keys is None else keys
    total_hqk = call.query_bhqd.new_zeros(call.query_bhqd.shape[1], len(queries), len(keys), dtype=torch.float64)
    for b, (start, stop) in enumerate(spans):
        shift = 0 if align == "start" else stop - start
        rows, columns = (
            [(i, position + shift) for i, position in enumerate(wanted) if 0 <= position + shift < stop - start]
            for wanted in (queries, keys)
        )
        if rows and columns:
            (i, q), (j, k) = (torch.tensor(pairs).unbind(1) for pairs in (rows, columns))
            total_hqk[:, i[:, None], j] += text_pattern(call, b, (start, stop))[:, q[:, None], k]
    return total_hqk


@torch.no_grad()
def statistics(
    pattern_hll: Tensor,
    *,
    queries: Sequence[int] | None = None,
    token_id_l: Tensor | None = None,
    class_l: Tensor | None = None,
    num_classes: int = 0,
    edges: Sequence[int] = (0, 1, 2, 4, 8),
    parts: int = 3,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics of one text's pattern, by name: (total [H, …], how many queries or pairs it is of, […]), float64.

    `queries`: the positions that are asked for, all by default. Of a batch the value is Σ total / Σ count.

        entropy    −Σ_k p·ln p of each query
        first      p of key 0
        previous   p of key q − 1, of each query but q = 0
        self       p of key q
        duplicate  Σ p of the keys k < q with the query's token id, of each query that has any
        induction  Σ p of the keys k + 1 of these, of each query that has any
        distance   p of each pair with edges[c] ≤ q − k < edges[c + 1]
        pooled     Σ_k p · (the share of token k that lies in part c'), of each query by its share in part c
        class      Σ p of the keys of class c', of each query of class c
    """
    p_hqk = pattern_hll.double()
    length = p_hqk.shape[-1]
    q_l1, k_1l = torch.arange(length)[:, None], torch.arange(length)[None, :]
    asked_l = torch.ones(length, dtype=torch.float64)
    if queries is not None:
        asked_l = torch.isin(torch.arange(length), torch.tensor(list(queries))).double()

    def of_rows(value_hl: Tensor, counts_l: Tensor) -> tuple[Tensor, Tensor]:
        counting_l = asked_l * counts_l
        return (value_hl * counting_l).sum(-1), counting_l.sum()

    def of_keys(wanted_ll: Tensor, counts_l: Tensor) -> tuple[Tensor, Tensor]:
        return of_rows((p_hqk * wanted_ll).sum(-1), counts_l)

    def of_cells(query_cl: Tensor, key_cl: Tensor) -> tuple[Tensor, Tensor]:
        query_cl = query_cl * asked_l
        return torch.einsum("cq,hqk,dk->hcd", query_cl, p_hqk, key_cl), query_cl.sum(-1)[:, None]

    everywhere_l = torch.ones(length)
    found = {
        "entropy": of_rows(-torch.xlogy(p_hqk, p_hqk).sum(-1), everywhere_l),
        "first": of_keys(k_1l == 0, everywhere_l),
        "previous": of_keys(q_l1 - k_1l == 1, q_l1[:, 0] >= 1),
        "self": of_keys(q_l1 == k_1l, everywhere_l),
    }
    if token_id_l is not None:
        same_ll = (token_id_l[:, None] == token_id_l[None, :]) & (k_1l < q_l1)
        after_ll = torch.zeros_like(same_ll)
        after_ll[:, 1:] = same_ll[:, :-1]
        found["duplicate"] = of_keys(same_ll, same_ll.any(-1))
        found["induction"] = of_keys(after_ll, same_ll.any(-1))

    bins_cll = torch.stack([(a <= q_l1 - k_1l) & (q_l1 - k_1l < b) for a, b in itertools.pairwise(edges)]).double()
    pairs_cll = bins_cll * asked_l[:, None]
    found["distance"] = torch.einsum("cqk,hqk->hc", pairs_cll, p_hqk), pairs_cll.sum((1, 2))

    token_1l, part_c1 = torch.arange(length).double(), torch.arange(parts).double()[:, None] * length / parts
    share_cl = (torch.minimum(token_1l + 1, part_c1 + length / parts) - torch.maximum(token_1l, part_c1)).clamp_min(0)
    found["pooled"] = of_cells(share_cl, share_cl)
    if class_l is not None:
        is_cl = (class_l == torch.arange(num_classes)[:, None]).double()
        found["class"] = of_cells(is_cl, is_cl)
    return found


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
