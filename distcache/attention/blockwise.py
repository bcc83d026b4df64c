"""Sums of attention patterns, a block of queries at a time.

A pattern is S × S for every head; for a batch of them there is no room. So rows are computed in blocks, added to the
sum, and dropped. Scores and probabilities of a block lie in memory that is taken once a call: to touch fresh pages for
each block took as long as all that is computed there. On a CPU a block stays in the cache: some queries of the heads
that share some keys, in some samples. `reference.py` says what must come out.

Legend of names: b samples taken together, h query heads, g key heads, q queries, k keys, l a sample's valid
tokens, d head dim, n matrices.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distcache.attention.taps import AttentionCall
from distcache.errors import SiteError
from distcache.strategies.positions import Align, Positions, between, mirrored, places, positions, within

# How many scores may exist at once; the least block, of one sample and one key head, may need more. On a CPU a thread's
# share of them and of their probabilities should stay in its cache; a GPU wants work enough to fill it (2**26 are
# 256 MiB, twice that with the probabilities).
_SCORES_CPU = 2**19
_SCORES_GPU = 2**26
_ROWS_CPU, _ROWS_GPU, _LEAST_ROWS = 64, 128, 32  # of a block, unless it's said: fewer queries make poor products


def pattern_sum(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    size: int,
    *,
    block: int | None = None,
    heads: Sequence[int] | None = None,
    queries: Positions = None,
    keys: Positions = None,
    align: Align = "start",
    into_hqk: Tensor | None = None,
) -> Tensor:
    """The sum over samples of each sample's pattern, padding removed, realigned at the first token or the last.

    `spans[b]` is the range (start, stop) of sample b's valid tokens; an empty one adds nothing. Queries and
    keys outside are dropped before the softmax. `heads` are the query heads wanted, by default all. `queries` and
    `keys` are the positions wanted, as of `positions.positions`; weights are of the whole row in any case, and
    `positions.counts_at` says how many samples are in each. `block`: the most queries at a time.

    Returns [heads, queries, keys], by default [heads, size, size]; index 0 is the first of the positions, with
    align="end" the last. It is `into_hqk`, to which the sum was added, float32 or float64, of any strides, on the
    call's device; or a new float32 tensor, a normal one also under inference_mode. Scores are float32, or float64
    for float64 inputs; never less, also under autocast. The same inputs give the same bits. SiteError if spans do not
    fit the call or `size`, or positions `align`. Not a collective.
    """
    check(call, spans, size, heads)
    device = call.query_bhqd.device
    num_heads = call.query_bhqd.shape[1] if heads is None else len(heads)
    all_rows, all_keys = positions(queries, size, align, "queries"), positions(keys, size, align, "keys")
    with _plain_arithmetic(device):
        total_hqk = into_hqk
        if total_hqk is None:
            total_hqk = torch.zeros(num_heads, len(all_rows), len(all_keys), dtype=torch.float32, device=device)
        scratch = Scratch(call, block, heads)
        for samples, (start, stop) in _runs(spans):
            rows, to_rows = within(all_rows, stop - start, align)
            kept, to_keys = within(all_keys, stop - start, align)
            for b in scratch.parts(samples, len(rows), stop - start):
                for part in _cut_blocks(call, b, start, stop, scratch, heads, rows, kept):
                    summed_hqk = part.probs_bhqk[0]
                    for more_hqk in part.probs_bhqk[1:]:
                        summed_hqk += more_hqk
                    at, at_keys = _inside(to_rows, part.rows), _inside(to_keys, part.keys)
                    if align == "end":
                        at, at_keys = mirrored(at, len(all_rows)), mirrored(at_keys, len(all_keys))
                        summed_hqk = summed_hqk.flip(-2, -1)
                    total_hqk[part.heads, at, at_keys] += scratch.as_(total_hqk.dtype, summed_hqk)
        return total_hqk


def pattern(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    b: int,
    *,
    block: int | None = None,
    heads: Sequence[int] | None = None,
    queries: Positions = None,
    keys: Positions = None,
    align: Align = "start",
) -> Tensor:
    """Sample b's pattern within its span, float32 [heads, L, L], L = stop − start; else as `pattern_sum`.

    `queries` and `keys`: of those positions that the text has, ascending, however they are counted.
    """
    device, num_tokens = call.query_bhqd.device, call.query_bhqd.shape[2]
    check(call, spans, num_tokens, heads)
    start, stop = spans[b]
    num_heads = call.query_bhqd.shape[1] if heads is None else len(heads)
    rows = places(queries, stop - start, align, "queries")
    kept = places(keys, stop - start, align, "keys")
    with _plain_arithmetic(device):
        pattern_hqk = torch.zeros(num_heads, len(rows), len(kept), dtype=torch.float32, device=device)
        for part in _cut_blocks(call, slice(b, b + 1), start, stop, Scratch(call, block, heads), heads, rows, kept):
            pattern_hqk[part.heads, part.rows, part.keys] = part.probs_bhqk[0]
        return pattern_hqk


def scratch_bytes(
    num_samples: int,
    num_heads: int,
    num_tokens: int,
    head_dim: int,
    device: torch.device,
    *,
    block: int | None = None,
    num_queries: int | None = None,
    itemsize: int = 4,
    summed: bool = False,
) -> int:
    """The most that is held beside results while a layer's blocks are made, in bytes, mask and model apart.

    `num_tokens`: of the longest sample; `num_queries`: how many of them are asked for, all if None; `itemsize`: 8 for
    float64 inputs, 4 for all others; `summed`: whether blocks are added to sums of float64.
    """
    num_rows = num_tokens if num_queries is None else num_queries
    _, _, rows = _Sizes.of(1, 1, 1, num_rows, num_tokens, device, block)
    scores = min(num_samples * rows * num_heads * num_tokens, max(_limit(device), rows * num_heads * num_tokens))
    together = min(num_samples, max(1, _limit(device) // max(1, rows * num_tokens)))
    # Scores, their probabilities, and what may be made of these; Q of a block and K of texts, converted and picked.
    converted = 8 * scores if summed and itemsize < 8 else 0
    return (3 * scores + 2 * together * num_heads * (rows + num_tokens) * head_dim) * itemsize + converted


@functools.lru_cache(maxsize=256)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64, made once and never written to: bringing numbers to a GPU waits for all that is computed there."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=256)
def _above(num_rows: int, step: int, device: torch.device) -> Tensor:
    """Of each step-th row of a square, bool, what lies above the diagonal, up to the last row's. Made once."""
    row_q1 = torch.arange(num_rows, device=device)[:, None] * step
    return torch.arange((num_rows - 1) * step + 1, device=device) > row_q1


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        # A sum made under inference_mode could not be added to outside of it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # Autocast would take the scores back to bf16.
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_whole_products(device))
        yield


_whole_lock = threading.Lock()
_whole_blocks: dict[str, tuple[int, Any]] = {}  # by the device's type: how many are open, what was before the first


@contextmanager
def _whole_products(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever `torch.set_float32_matmul_precision` says: TF32 errs by 1e-3.

    That is the whole process's: of blocks that overlap in several threads the last puts back what the first has found.
    """
    matmul: Any = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    name, whole = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    with _whole_lock:
        num_open, before = _whole_blocks.get(device.type, (0, getattr(matmul, name, whole)))
        _whole_blocks[device.type] = (num_open + 1, before)
        if before != whole:
            setattr(matmul, name, whole)
    try:
        yield
    finally:
        with _whole_lock:
            num_open, before = _whole_blocks.pop(device.type)
            if num_open > 1:
                _whole_blocks[device.type] = (num_open - 1, before)
            elif before != whole:
                setattr(matmul, name, before)


def check(call: AttentionCall, spans: Sequence[tuple[int, int]], size: int, heads: Sequence[int] | None) -> None:
    num_samples, num_heads, num_tokens, _ = call.query_bhqd.shape
    where = f"attention of {type(call.module).__name__}"
    if call.key_bhkd.shape[2] != num_tokens or num_heads % call.key_bhkd.shape[1]:
        raise SiteError(
            f"{where}: expected as many keys as queries, and query heads a multiple of key heads; got "
            f"queries {tuple(call.query_bhqd.shape)}, keys {tuple(call.key_bhkd.shape)} as [B, H, S, D]. "
            f"Cross-attention has no such patterns; passes that go on with a cache are put together by Steps."
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


def _inside(outer: slice, inner: slice) -> slice:
    """The slice that x[outer][inner] takes of x."""
    return slice(outer.start + inner.start, outer.start + inner.stop)


class _Sizes(NamedTuple):
    """How many samples, key heads (with the query heads that share them) and queries are taken together."""

    samples: int
    groups: int
    rows: int

    @classmethod
    def of(
        cls,
        num_samples: int,
        num_groups: int,
        heads_per_group: int,
        num_rows: int,
        length: int,
        device: torch.device,
        block: int | None,
    ) -> _Sizes:
        limit, row = _limit(device), max(1, heads_per_group * length)
        most = _ROWS_CPU if device.type == "cpu" else _ROWS_GPU
        rows = max(1, min(num_rows, block or min(most, max(_LEAST_ROWS, limit // row))))
        # Samples first: they are added up in the cache, and what their sum is added to isn't in it.
        samples = max(1, min(num_samples, limit // (rows * row)))
        return cls(samples, max(1, min(num_groups, limit // (samples * rows * row))), rows)


def _limit(device: torch.device) -> int:
    return _SCORES_CPU * torch.get_num_threads() if device.type == "cpu" else _SCORES_GPU


_room = threading.local()  # a CPU's, a few MiB, from one call to the next


class Scratch:
    """Memory for a block's scores and for its probabilities, and how large blocks are."""

    def __init__(self, call: AttentionCall, block: int | None, heads: Sequence[int] | None) -> None:
        self._block, self._like = block, call.query_bhqd
        self.num_groups, num_heads = call.key_bhkd.shape[1], call.query_bhqd.shape[1]
        if heads is not None:  # each of them has keys of its own
            self.num_groups = num_heads = len(heads)
        self.shared = num_heads // max(1, self.num_groups)  # query heads that share a key head lie side by side
        self.dtype = torch.float64 if call.query_bhqd.dtype == torch.float64 else torch.float32
        self._room = vars(_room).setdefault("by_name", {}) if call.query_bhqd.device.type == "cpu" else {}

    def sizes(self, num_samples: int, num_rows: int, length: int) -> _Sizes:
        return _Sizes.of(num_samples, self.num_groups, self.shared, num_rows, length, self._like.device, self._block)

    def parts(self, samples: range, num_rows: int, length: int) -> Iterator[slice]:
        """The samples of one span, as many as are taken together at a time."""
        step = self.sizes(len(samples), num_rows, length).samples
        for first in range(samples.start, samples.stop, step):
            yield slice(first, min(first + step, samples.stop))

    def two(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Room for scores and for probabilities of this shape, good until it is asked for again."""
        return self._empty("scores", self.dtype, shape), self._empty("probs", self.dtype, shape)

    def as_(self, dtype: torch.dtype, x: Tensor) -> Tensor:
        """`x` in another dtype, good until it is asked for again."""
        return x if x.dtype == dtype else self._empty("converted", dtype, x.shape).copy_(x)

    def _empty(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        numel, held = math.prod(shape), self._room.get((name, dtype))
        if held is None or len(held) < numel:
            held = self._room[name, dtype] = None  # before there is more
            held = self._room[name, dtype] = self._like.new_empty(numel, dtype=dtype)
        return held[:numel].view(*shape)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Probabilities [b, h, q, k] of a block: of which of the heads asked for, of the rows and of the keys.

    They may be written to, and are good until the next block is made.
    """

    probs_bhqk: Tensor
    heads: slice
    rows: slice
    keys: slice


def _cut_blocks(
    call: AttentionCall,
    samples: slice,
    start: int,
    stop: int,
    scratch: Scratch,
    heads: Sequence[int] | None,
    rows: range,
    kept: range,
) -> Iterator[Part]:
    """`blocks` cut to the keys `kept`: `Part.keys` says which of them."""
    if not kept:
        return
    for part in blocks(call, samples, start, stop, scratch, heads, rows):
        first, at_keys = part.keys.start, between(kept, part.keys.start, part.keys.stop)
        seen = kept[at_keys]
        cut_bhqk = part.probs_bhqk[..., seen.start - first : seen.stop - first : seen.step]
        yield Part(cut_bhqk, part.heads, part.rows, at_keys)


def blocks(
    call: AttentionCall,
    samples: slice,
    start: int,
    stop: int,
    scratch: Scratch,
    heads: Sequence[int] | None,
    rows: range,
) -> Iterator[Part]:
    """Probabilities of queries `rows` of these samples, whose valid tokens are start..stop; all heads of some queries
    come one after the other.

    Rows and keys count from `start`. Keys left out have probability zero.
    """
    num_heads, k_bgld = call.query_bhqd.shape[1], call.key_bhkd[samples, :, start:stop]
    picked = tuple(range(num_heads) if heads is None else heads)
    if heads is not None:  # one key head for each
        k_bgld = k_bgld[:, on_device(picked, k_bgld.device) // (num_heads // k_bgld.shape[1])]
    num_samples, num_groups, length, head_dim = k_bgld.shape
    if not num_groups:
        return
    k_bgld, shared = k_bgld.to(scratch.dtype).contiguous(), scratch.shared
    sizes = scratch.sizes(num_samples, len(rows), length)
    scratch.two(num_samples, sizes.groups * shared, sizes.rows, length)  # for all blocks: causal ones grow
    for i in range(0, len(rows), sizes.rows):
        at = slice(i, min(i + sizes.rows, len(rows)))
        part = rows[at]
        tokens = slice(start + part[0], start + part[-1] + 1, part.step)
        first, last = _key_range(call, samples, tokens.start, tokens.stop, start, stop)
        for g in range(0, num_groups, sizes.groups):
            groups = slice(g, min(g + sizes.groups, num_groups))
            at_heads = slice(g * shared, groups.stop * shared)
            some = at_heads if heads is None else on_device(picked[at_heads], k_bgld.device)
            q_bhqd = call.query_bhqd[samples, :, tokens][:, some].to(scratch.dtype)
            b, h, q, _ = q_bhqd.shape
            n, k = b * (groups.stop - g), last - first
            scores_bhqk, probs_bhqk = scratch.two(b, h, q, k)
            scores_nqk = scores_bhqk.view(n, shared * q, k)  # a group is one matrix, so that keys are never repeated
            q_nqd = q_bhqd.reshape(n, shared * q, head_dim)
            k_nkd = k_bgld[:, groups, first - start : last - start].flatten(0, 1)
            torch.baddbmm(scores_nqk, q_nqd, k_nkd.mT, beta=0, alpha=call.scaling, out=scores_nqk)
            _softmax(call, scores_bhqk, probs_bhqk, samples, tokens, first, some)
            yield Part(probs_bhqk, at_heads, at, slice(first - start, last - start))


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
    call: AttentionCall,
    scores_bhqk: Tensor,
    probs_bhqk: Tensor,
    samples: slice,
    rows: slice,
    first: int,
    picked: Tensor | slice,
) -> None:
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
        if call.sliding_window is not None or mask is not None:
            q_q1 = torch.arange(rows.start, rows.stop, rows.step, device=scores_bhqk.device)[:, None]
            k_1k = torch.arange(first, first + k, device=scores_bhqk.device)[None, :]
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
            barred_qk = _above(scores_bhqk.shape[2], rows.step or 1, scores_bhqk.device)
            scores_bhqk[..., later].masked_fill_(barred_qk, -torch.inf)

    torch.ops.aten._softmax.out(scores_bhqk, -1, False, out=probs_bhqk)
    if call.sinks is not None:
        # With a sink's logit c: exp(x) / (Σ exp + exp(c)) = softmax(x) · sigmoid(logsumexp − c).
        lse_bhq1 = scores_bhqk.logsumexp(-1, keepdim=True)
        probs_bhqk *= torch.sigmoid(lse_bhq1 - call.sinks[picked].to(scores_bhqk.dtype).view(1, -1, 1, 1))
    if barred is not None:
        blind = barred.all(-1, keepdim=True)
        if blind.device.type != "cpu" or bool(blind.any()):
            probs_bhqk.masked_fill_(blind, 0.0)


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
