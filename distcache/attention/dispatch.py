"""The sum of attention patterns by whatever is fastest where the call's tensors are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from distcache.attention import blockwise
from distcache.attention.taps import AttentionCall
from distcache.strategies.positions import Align, Positions, positions


def pattern_sum(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    size: int,
    *,
    heads: Sequence[int] | None = None,
    queries: Positions = None,
    keys: Positions = None,
    align: Align = "start",
    into_hqk: Tensor | None = None,
) -> Tensor:
    """`blockwise.pattern_sum`; on a GPU a Triton kernel's, where there is Triton and the kernel can serve.

    It can't where only some queries or keys are asked for, or they count from texts' ends. The same inputs give the
    same bits. Errors as in `blockwise`. Not a collective.
    """
    device = call.query_bhqd.device
    kernels = _kernels() if device.type == "cuda" else None
    every = positions(queries, size, align) == positions(keys, size, align, "keys") == range(size)
    if kernels is not None and every and kernels.usable(device) and kernels.can_serve(call):
        total_hss: Tensor = kernels.pattern_sum(call, spans, size, heads=heads, into_hss=into_hqk)
        return total_hss
    return blockwise.pattern_sum(
        call, spans, size, heads=heads, queries=queries, keys=keys, align=align, into_hqk=into_hqk
    )


def sum_scratch_bytes(
    num_samples: int,
    num_heads: int,
    num_tokens: int,
    head_dim: int,
    device: torch.device,
    *,
    num_queries: int | None = None,
) -> int:
    """The most that `pattern_sum` holds beside its result, in bytes: as `blockwise.scratch_bytes`, of kernels less."""
    kernels = _kernels() if device.type == "cuda" else None
    if kernels is not None and num_queries in (None, num_tokens) and kernels.usable(device):
        return num_samples * num_heads * num_tokens * 4  # a float a row
    return blockwise.scratch_bytes(num_samples, num_heads, num_tokens, head_dim, device, num_queries=num_queries)


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of kernels, or None where Triton isn't installed: plain torch does the same."""
    try:
        from distcache.attention import kernels
    except ImportError:
        return None
    return kernels
