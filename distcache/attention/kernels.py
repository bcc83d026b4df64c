"""Sums of attention patterns on a GPU, in Triton: scores and probabilities never leave its registers.

Two kernels. The first gives each row's log-sum-exp; where somebody has that already it isn't run. The second has a
program for each tile of queries × keys of each head. The program computes its tile's probabilities sample by sample,
`exp2(score − lse)`, and writes their sum once: no atomics, so the same inputs give the same bits, and what it takes is
the [H, S, S] sum and a float a row. `reference.py` says what must come out.

Samples are realigned to index 0 in here. A sample's queries and keys move by the same start, so causality and windows,
which are differences, bar the same cells of a tile in every sample: tiles that they bar wholly are never computed, and
the others lose what they bar once, after the last sample. Samples come longest first, and a tile stops before the first
that is too short for it: a loop without conditions, whose loads a compiler can bring forward.

Legend of names: b batch, h query heads, q queries of a tile, k keys of a tile, d head dim, s aligned positions. Scores
are of base 2, that is, times log2(e).
"""

from __future__ import annotations

import bisect
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distcache.attention.blockwise import _plain_arithmetic, check
from distcache.attention.taps import AttentionCall

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256  # beyond, tiles that fit into shared memory are too small to be worth it
_LOG2E = tl.constexpr(math.log2(math.e))


def can_serve(call: AttentionCall) -> bool:
    """Whether `pattern_sum` computes this call; what it can't, `blockwise.pattern_sum` can.

    It can't: float64 (Q and K, masks or biases), head dims above 256, Q and K of two dtypes, tensors on two devices.
    """
    q_bhqd, k_bhkd, mask, bias = call.query_bhqd, call.key_bhkd, call.mask, call.position_bias
    shape = (*q_bhqd.shape[:3], k_bhkd.shape[2])
    return (
        q_bhqd.dtype in _DTYPES
        and k_bhkd.dtype == q_bhqd.dtype
        and 1 <= q_bhqd.shape[3] <= _LARGEST_HEAD_DIM
        and all(x is None or x.device == q_bhqd.device for x in (k_bhkd, mask, bias, call.sinks))
        and (mask is None or mask.dim() == 2 or (mask.dtype in (torch.bool, *_DTYPES) and _fits(mask, shape)))
        and (bias is None or (bias.dtype in _DTYPES and _fits(bias, shape)))
    )


def _fits(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.dim() == len(shape) and all(n in (1, full) for n, full in zip(x.shape, shape, strict=True))


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether these kernels should run on this device: an NVIDIA GPU from Ampere on, where Triton can launch.

    If it can't, a warning says why, once: it needs more than its own package, such as a C compiler, which slim
    container images lack.
    """
    # Older ones' tensor cores are left idle: seen in what is compiled for them.
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.cuda.device(device):
            _nothing[(1,)](torch.zeros(1, device=device), (1, 16), enable_fp_fusion=True)
    except Exception as error:  # whatever a compiler, a linker or a driver says
        warnings.warn(
            f"Triton is installed but can't launch a kernel on {device} ({type(error).__name__}: {error}), so "
            f"attention patterns are summed in plain torch, which is slower.",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes at a time, queries × keys of one head, and its share of the machine."""

    queries: int  # powers of two from 16 on
    keys: int
    num_warps: int
    num_stages: int  # Q and K of this many samples are in use or on their way

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of each kernel. That multiplying and adding are one step is to be said from Triton 3.9 on."""
        blocks = dict(BLOCK_Q=self.queries, BLOCK_K=self.keys)
        return dict(**blocks, num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)


# Queries, keys, warps; the best first. Scores and sum stay in registers: of a tile of 128 × 128 each takes 64 of the
# 255 that a thread of 8 warps may have. Half a tile reads half again as much of Q and K for the same scores.
_TILES = ((128, 128, 8), (128, 64, 8), (64, 64, 4), (64, 32, 4), (32, 32, 4))
_MOST_STAGES = 3


def tile_for(head_dim: int, element_bytes: int, shared_bytes: int, *, is_plain: bool = True) -> Tile:
    """The best tile whose Q and K fit twice into a multiprocessor's shared memory: in use, and on their way.

    `is_plain`: scaling, causality and a window are all that makes weights of products. A mask or a bias takes
    registers, too, and passes through shared memory as float32.
    """
    # Tensor cores round float32, and what doesn't holds its operands in registers.
    tiles = _TILES[2:] if element_bytes == 4 else _TILES if is_plain else _TILES[1:]
    for queries, keys, num_warps in tiles:
        stage_bytes = (queries + keys) * _block_d(head_dim, element_bytes) * element_bytes
        num_stages = (shared_bytes - (0 if is_plain else queries * keys * 4)) // stage_bytes
        if num_stages >= 2:
            return Tile(queries, keys, num_warps, min(num_stages, _MOST_STAGES))
    return Tile(16, 16, 4, 1)


def _block_d(head_dim: int, element_bytes: int) -> int:
    """How much of a row is multiplied at a time: all of it if it goes to tensor cores."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    return min(padded, 32) if element_bytes == 4 else padded


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    if device.type == "cpu":  # under the interpreter, which has no such limit
        return 2**18
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def pattern_sum(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    size: int,
    *,
    heads: Sequence[int] | None = None,
    lse_bhq: Tensor | None = None,
    into_hss: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The sum over samples of each sample's pattern, padding removed, realigned to index 0; as in `blockwise`.

    `lse_bhq`: float32 [B, H, Q] of any strides, for each query the natural logarithm of the sum of exp over the keys of
    its span that it sees and the sink, if that is known. `into_hss`: float32 or float64 [heads, size, size] of any
    strides, which the sum is added to and which is returned; by default a new float32 tensor. `tile`: by default what
    suits the head dim and the device.

    Scores are float32, never TF32. Nobody waits for the device. `call` is one that `can_serve`. SiteError if spans do
    not fit the call or `size`. Not a collective.
    """
    check(call, spans, size, heads)
    assert can_serve(call)
    q_bhqd, device = call.query_bhqd, call.query_bhqd.device
    picked = list(range(q_bhqd.shape[1]) if heads is None else heads)
    is_plain = call.softcap is None and call.position_bias is None and (call.mask is None or call.mask.dim() == 2)
    tile = tile or tile_for(q_bhqd.shape[3], q_bhqd.element_size(), _shared_bytes(device), is_plain=is_plain)
    # Triton launches on the current device, on whichever the tensors are.
    with _plain_arithmetic(device), torch.cuda.device(device if device.type == "cuda" else -1):
        out_hss = into_hss
        if out_hss is None:
            out_hss = torch.empty(len(picked), size, size, dtype=torch.float32, device=device)
        assert out_hss.dtype in (torch.float32, torch.float64) and out_hss.shape == (len(picked), size, size)
        if out_hss.numel() == 0 or all(start == stop for start, stop in spans):
            return out_hss if into_hss is not None else out_hss.zero_()
        q_tiles, k_tiles = triton.cdiv(size, tile.queries), triton.cdiv(size, tile.keys)
        samples = _samples(spans, size, picked, tile, device)
        common = dict(**samples, **_scoring(call, samples, q_tiles, tile), **tile.options)
        if lse_bhq is None:
            lse_bhq = torch.empty(len(q_bhqd), len(picked), q_bhqd.shape[2], dtype=torch.float32, device=device)
            sinks = None if call.sinks is None else call.sinks.float()
            _row_lse[(q_tiles * len(picked) * samples["num_samples"],)](
                lse_bhq, lse_bhq.stride(), sinks, len(picked), q_tiles, **common
            )
        elif heads is not None:
            # Not by a list of numbers, which a GPU would be waited for to get.
            lse_bhq = torch.stack([lse_bhq[:, head] for head in picked], 1)
        _sum[(q_tiles * k_tiles, len(picked))](
            out_hss, out_hss.stride(), lse_bhq, lse_bhq.stride(), size, ADD=into_hss is not None, **common
        )
        return out_hss


def _samples(
    spans: Sequence[tuple[int, int]], size: int, heads: Sequence[int], tile: Tile, device: torch.device
) -> dict[str, Any]:
    """Arguments of the kernels: which samples, of which lengths, which heads."""
    found = sorted(((stop - start, start, b) for b, (start, stop) in enumerate(spans) if start < stop), reverse=True)
    step = min(tile.queries, tile.keys)
    lengths = [length for length, _, _ in found]
    longer = [len(found) - bisect.bisect_right(lengths[::-1], place) for place in range(0, size, step)]
    numbers = torch.tensor(
        [*(b for _, _, b in found), *(start for _, start, _ in found), *lengths, *longer, *heads],
        dtype=torch.int32,
        pin_memory=device.type == "cuda",  # from other memory a copy waits for the device
    )
    return dict(numbers=numbers.to(device, non_blocking=True), num_samples=len(found), num_steps=len(longer))


def _scoring(call: AttentionCall, samples: dict[str, Any], q_tiles: int, tile: Tile) -> dict[str, Any]:
    """Arguments of the kernels: Q, K and all that makes scores of them."""
    q_bhqd, k_bhkd, mask, bias, softcap = (
        call.query_bhqd, call.key_bhkd, call.mask, call.position_bias, call.softcap,
    )  # fmt: skip
    shape, log2e = (*q_bhqd.shape[:3], k_bhkd.shape[2]), math.log2(math.e)
    is_causal, window, lowest, ahead = call.is_causal, call.sliding_window, 0.0, None
    if mask is not None and mask.dim() == 2:
        mask = (mask != 0)[:, None, None, :]
    elif mask is not None:
        is_causal, window = False, None  # such a mask says it all
        lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0.0
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask  # Triton's pointers are of whole bytes
        if call.is_causal and not is_causal:
            # Mostly, but not always, it bars what comes later. To look costs a fraction of what it saves.
            ahead, mask_heads = torch.zeros(1, dtype=torch.int32, device=mask.device), mask.shape[1]
            _looks_ahead[(q_tiles * samples["num_samples"], mask_heads)](
                ahead, mask, mask.expand(shape).stride(), lowest, q_tiles, **samples, **tile.options
            )
        mask = mask.expand(shape)  # strides of 0 where it broadcasts
    bias = None if bias is None else bias.expand(shape)
    return dict(
        q=q_bhqd,
        q_strides=q_bhqd.stride(),
        k=k_bhkd,
        k_strides=k_bhkd.stride(),
        group=q_bhqd.shape[1] // k_bhkd.shape[1],
        scale=call.scaling * log2e if softcap is None else call.scaling / softcap,
        cap=None if softcap is None else softcap * log2e,
        window=window,
        mask=mask,
        mask_strides=(0, 0, 0, 0) if mask is None else mask.stride(),
        lowest=lowest,
        bias=bias,
        bias_strides=(0, 0, 0, 0) if bias is None else bias.stride(),
        ahead=ahead,
        CAUSAL=is_causal,
        MASK_ROWS=mask is not None and mask.stride(2) != 0,
        BIAS_ROWS=bias is not None and bias.stride(2) != 0,
        HEAD_DIM=q_bhqd.shape[3],
        BLOCK_D=_block_d(q_bhqd.shape[3], q_bhqd.element_size()),
    )


# -- on the device -----------------------------------------------------------------------------------------
#
# `numbers` holds one after the other, int32: by sample, longest first, its number, its start and its length; by step of
# the smaller side of a tile, how many samples are longer; the heads.


@triton.jit
def _nothing(x, strides):
    tl.store(x, 0.0)


_INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.runtime.JITFunction))


@triton.jit
def _rows(x, d0, stride_row, stride_d, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] of Q or K from d0 on, zeros beyond what there is."""
    row = tl.arange(0, ROWS)[:, None]
    d = d0 + tl.arange(0, BLOCK_D)[None, :]
    there = row < num_rows
    if HEAD_DIM % BLOCK_D != 0:
        there = there & (d < HEAD_DIM)
    return tl.load(x + row * stride_row + d * stride_d, mask=there, other=0.0)


@triton.jit
def _dot(q_qd, k_kd, sum_qk):
    if _INTERPRETED:  # whose product of bfloat16 is that of their bits as integers
        q_qd = q_qd.to(tl.float32)
        k_kd = k_kd.to(tl.float32)
    return tl.dot(q_qd, tl.trans(k_kd), sum_qk, input_precision="ieee")


@triton.jit
def _products(
    q, q_qd, q_strides, k, k_strides, num_q, num_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Q · K [BLOCK_Q, BLOCK_K] of rows that begin at `q` and `k`; `q_qd` is the first block of the former's."""
    k_kd = _rows(k, 0, k_strides[2], k_strides[3], num_k, BLOCK_K, HEAD_DIM, BLOCK_D)
    products_qk = _dot(q_qd, k_kd, tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
    if HEAD_DIM > BLOCK_D:
        for d0 in range(BLOCK_D, HEAD_DIM, BLOCK_D):
            q_qd = _rows(q, d0, q_strides[2], q_strides[3], num_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
            k_kd = _rows(k, d0, k_strides[2], k_strides[3], num_k, BLOCK_K, HEAD_DIM, BLOCK_D)
            products_qk = _dot(q_qd, k_kd, products_qk)
    return products_qk


@triton.jit
def _cut(
    x, strides, b, head, top, left, num_q, num_k, HAS_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A tile of a mask or a bias, of one row where it has no rows of its own; zeros beyond what there is."""
    x += b * strides[0] + head * strides[1] + left * strides[3]
    k = tl.arange(0, BLOCK_K)[None, :]
    there = k < num_k
    where = k * strides[3]
    if HAS_ROWS:
        q = tl.arange(0, BLOCK_Q)[:, None]
        x += top * strides[2]
        there = there & (q < num_q)
        where += q * strides[2]
    return tl.load(x + where, mask=there, other=0)


@triton.jit
def _tanh(x):
    e = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    far = (1.0 - e) / (1.0 + e)
    # 1 − e loses the digits of a small x. There the series is exact to 1e-8 of it.
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _scores(
    products_qk, b, head, top, left, num_q, num_k,
    scale, cap, mask, mask_strides, lowest, bias, bias_strides,
    MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q, BLOCK_K], −inf where the mask bars; what `CAUSAL` and `window` bar, or lies beyond, is left in."""
    scores_qk = products_qk * scale
    if cap is not None:
        scores_qk = _tanh(scores_qk) * cap
    if bias is not None:
        part = _cut(bias, bias_strides, b, head, top, left, num_q, num_k, BIAS_ROWS, BLOCK_Q, BLOCK_K)
        scores_qk += part.to(tl.float32) * _LOG2E
    if mask is not None:
        part = _cut(mask, mask_strides, b, head, top, left, num_q, num_k, MASK_ROWS, BLOCK_Q, BLOCK_K)
        if mask.dtype.element_ty == tl.uint8:
            scores_qk = tl.where(part != 0, scores_qk, float("-inf"))
        else:
            part = part.to(tl.float32)
            scores_qk = tl.where(part <= lowest, float("-inf"), scores_qk + part * _LOG2E)
    return scores_qk


@triton.jit
def _sees(q0, k0, window, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_Q, BLOCK_K]: what causality and the window let queries from q0 see of keys from k0."""
    behind = (q0 + tl.arange(0, BLOCK_Q))[:, None] - (k0 + tl.arange(0, BLOCK_K))[None, :]
    seen = tl.full([BLOCK_Q, BLOCK_K], 1, tl.int1)
    if CAUSAL:
        seen = seen & (behind >= 0)
    if window is not None:
        seen = seen & (tl.abs(behind) < window)
    return seen


@triton.jit(do_not_specialize=["num_samples", "num_steps", "q_tiles"])
def _looks_ahead(
    ahead, mask, mask_strides, lowest, q_tiles, numbers, num_samples, num_steps,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Set `ahead` if any query of a sample may see a key of it that comes later."""
    q0 = tl.program_id(0) % q_tiles * BLOCK_Q
    sample = tl.program_id(0) // q_tiles
    b = tl.load(numbers + sample).to(tl.int64)
    start = tl.load(numbers + num_samples + sample).to(tl.int64)
    length = tl.load(numbers + 2 * num_samples + sample)
    q = (q0 + tl.arange(0, BLOCK_Q))[:, None]
    found = 0
    if q0 < length:
        for k0 in range(q0 // BLOCK_K * BLOCK_K, length, BLOCK_K):
            part = _cut(mask, mask_strides, b, tl.program_id(1).to(tl.int64), start + q0, start + k0,
                        length - q0, length - k0, True, BLOCK_Q, BLOCK_K)  # fmt: skip
            k = (k0 + tl.arange(0, BLOCK_K))[None, :]
            later = (k > q) & (q < length) & (k < length)
            # The lowest number of uint8, which stands for bool, is its False.
            later = later & (part.to(tl.float32) > lowest)
            found = tl.maximum(found, tl.max(tl.max(later.to(tl.int32), 1), 0))
    if found > 0:
        tl.store(ahead, 1)  # whoever comes, writes the same


@triton.jit(do_not_specialize=["num_samples", "num_steps", "num_heads", "q_tiles"])
def _row_lse(
    lse, lse_strides, sinks, num_heads, q_tiles, numbers, num_samples, num_steps,
    q, q_strides, k, k_strides, group, scale, cap, window, mask, mask_strides, lowest, bias, bias_strides, ahead,
    CAUSAL: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The natural logarithm of the sum of exp over the keys that a query sees, and the sink; −inf if it sees none.

    A program has a tile of queries of one head and sample. Neighbours read the same keys.
    """
    q0 = tl.program_id(0) % q_tiles * BLOCK_Q
    h = tl.program_id(0) // q_tiles % num_heads
    sample = tl.program_id(0) // q_tiles // num_heads
    b = tl.load(numbers + sample).to(tl.int64)
    start = tl.load(numbers + num_samples + sample).to(tl.int64)
    length = tl.load(numbers + 2 * num_samples + sample)
    head = tl.load(numbers + 3 * num_samples + num_steps + h).to(tl.int64)
    if q0 < length:
        first = 0
        last = length
        if CAUSAL:
            last = tl.minimum(last, q0 + BLOCK_Q)
        if ahead is not None:
            last = tl.where(tl.load(ahead) == 0, tl.minimum(last, q0 + BLOCK_Q), last)
        if window is not None:
            first = tl.maximum(0, q0 - window + 1) // BLOCK_K * BLOCK_K
            last = tl.minimum(last, q0 + BLOCK_Q - 1 + window)
        q += b * q_strides[0] + head * q_strides[1] + (start + q0) * q_strides[2]
        k += b * k_strides[0] + head // group * k_strides[1]
        q_qd = _rows(q, 0, q_strides[2], q_strides[3], length - q0, BLOCK_Q, HEAD_DIM, BLOCK_D)
        top_q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        sum_q = tl.zeros([BLOCK_Q], tl.float32)
        for k0 in range(first, last, BLOCK_K):
            products_qk = _products(q, q_qd, q_strides, k + (start + k0) * k_strides[2], k_strides,
                                    length - q0, length - k0, BLOCK_Q, BLOCK_K, HEAD_DIM, BLOCK_D)  # fmt: skip
            scores_qk = _scores(products_qk, b, head, start + q0, start + k0, length - q0, length - k0,
                                scale, cap, mask, mask_strides, lowest, bias, bias_strides,
                                MASK_ROWS, BIAS_ROWS, BLOCK_Q, BLOCK_K)  # fmt: skip
            seen = (k0 + tl.arange(0, BLOCK_K) < length)[None, :] & _sees(q0, k0, window, CAUSAL, BLOCK_Q, BLOCK_K)
            scores_qk = tl.where(seen, scores_qk, float("-inf"))
            new_q = tl.maximum(top_q, tl.max(scores_qk, 1))
            # −inf − −inf isn't a number: a row that has seen nothing yet counts from 0.
            from_q = tl.where(new_q == float("-inf"), 0.0, new_q)
            sum_q = sum_q * tl.exp2(top_q - from_q) + tl.sum(tl.exp2(scores_qk - from_q[:, None]), 1)
            top_q = new_q
        if sinks is not None:
            sink = tl.load(sinks + head) * _LOG2E
            new_q = tl.maximum(top_q, sink)
            with_sink_q = sum_q * tl.exp2(top_q - new_q) + tl.exp2(sink - new_q)
            # A row that sees no key has no weight that a sink could take.
            sum_q = tl.where(top_q == float("-inf"), 0.0, with_sink_q)
            top_q = new_q
        lse += b * lse_strides[0] + h * lse_strides[1] + (start + q0) * lse_strides[2]
        i = tl.arange(0, BLOCK_Q)
        tl.store(lse + i * lse_strides[2], (top_q + tl.log2(sum_q)) / _LOG2E, mask=i < length - q0)


@triton.jit(do_not_specialize=["num_samples", "num_steps"])
def _sum(
    out, out_strides, lse, lse_strides, size, numbers, num_samples, num_steps,
    q, q_strides, k, k_strides, group, scale, cap, window, mask, mask_strides, lowest, bias, bias_strides, ahead,
    ADD: tl.constexpr, CAUSAL: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over samples of exp2(score − lse). A program has a tile of one head, which nobody else writes to."""
    k_tiles = tl.cdiv(size, BLOCK_K)
    q0 = tl.program_id(0) // k_tiles * BLOCK_Q
    k0 = tl.program_id(0) % k_tiles * BLOCK_K
    h = tl.program_id(1)
    step: tl.constexpr = BLOCK_Q if BLOCK_Q < BLOCK_K else BLOCK_K
    long_enough = tl.load(numbers + 3 * num_samples + tl.maximum(q0, k0) // step)
    head = tl.load(numbers + 3 * num_samples + num_steps + h).to(tl.int64)
    is_later = k0 >= q0 + BLOCK_Q
    if CAUSAL:
        long_enough = tl.where(is_later, 0, long_enough)
    if ahead is not None:
        long_enough = tl.where(is_later & (tl.load(ahead) == 0), 0, long_enough)
    if window is not None:
        nearest = tl.maximum(k0 - (q0 + BLOCK_Q - 1), q0 - (k0 + BLOCK_K - 1))
        long_enough = tl.where(nearest >= window, 0, long_enough)

    i = tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_K)
    q += head * q_strides[1]
    k += head // group * k_strides[1]
    lse += h * lse_strides[1]
    sum_qk = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for sample in range(0, long_enough):
        b = tl.load(numbers + sample).to(tl.int64)
        start = tl.load(numbers + num_samples + sample).to(tl.int64)
        length = tl.load(numbers + 2 * num_samples + sample)
        q_b = q + b * q_strides[0] + (start + q0) * q_strides[2]
        k_b = k + b * k_strides[0] + (start + k0) * k_strides[2]
        q_qd = _rows(q_b, 0, q_strides[2], q_strides[3], length - q0, BLOCK_Q, HEAD_DIM, BLOCK_D)
        products_qk = _products(q_b, q_qd, q_strides, k_b, k_strides, length - q0, length - k0,
                                BLOCK_Q, BLOCK_K, HEAD_DIM, BLOCK_D)  # fmt: skip
        # +inf makes zeros of rows beyond the sample, and of those that see no key, whose own is −inf.
        lse_q = tl.load(lse + b * lse_strides[0] + (start + q0) * lse_strides[2] + i * lse_strides[2],
                        mask=i < length - q0, other=float("inf"))  # fmt: skip
        lse_q = tl.where(lse_q == float("-inf"), float("inf"), lse_q * _LOG2E)
        scores_qk = _scores(products_qk, b, head, start + q0, start + k0, length - q0, length - k0,
                            scale, cap, mask, mask_strides, lowest, bias, bias_strides,
                            MASK_ROWS, BIAS_ROWS, BLOCK_Q, BLOCK_K)  # fmt: skip
        sum_qk += tl.where((j < length - k0)[None, :], tl.exp2(scores_qk - lse_q[:, None]), 0.0)

    sum_qk = tl.where(_sees(q0, k0, window, CAUSAL, BLOCK_Q, BLOCK_K), sum_qk, 0.0)
    out += h.to(tl.int64) * out_strides[0] + q0.to(tl.int64) * out_strides[1] + k0.to(tl.int64) * out_strides[2]
    out += i[:, None] * out_strides[1] + j[None, :] * out_strides[2]
    inside = (i < size - q0)[:, None] & (j < size - k0)[None, :]
    if ADD:
        tl.store(out, tl.load(out, mask=inside, other=0.0) + sum_qk, mask=inside)
    else:
        tl.store(out, sum_qk, mask=inside)
