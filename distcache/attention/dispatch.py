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
    kernels = _usable(call.query_bhqd.device)
    if kernels is not None and _every(queries, keys, size, align) and kernels.can_serve(call):
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
    queries: Positions = None,
    keys: Positions = None,
    align: Align = "start",
    itemsize: int = 4,
) -> int:
    """The most that `pattern_sum` holds beside its result, in bytes: as `blockwise.scratch_bytes`, of kernels less."""
    if itemsize == 4 and _every(queries, keys, num_tokens, align) and _usable(device) is not None:
        return num_samples * num_heads * num_tokens * 4  # a float a row
    num_queries = len(positions(queries, num_tokens, align))
    of_batch = (num_samples, num_heads, num_tokens, head_dim, device)
    return blockwise.scratch_bytes(*of_batch, num_queries=num_queries, itemsize=itemsize, summed=True)


def _every(queries: Positions, keys: Positions, size: int, align: Align) -> bool:
    """Whether all positions are asked for, counted from texts' first tokens."""
    return positions(queries, size, align) == positions(keys, size, align, "keys") == range(size)


def _usable(device: torch.device) -> ModuleType | None:
    """The module of kernels where they should run, else None."""
    kernels = _kernels() if device.type == "cuda" else None
    return kernels if kernels is not None and kernels.usable(device) else None


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of kernels, or None where Triton isn't installed: plain torch does the same."""
    try:
        from distcache.attention import kernels
    except ImportError:
        return None
    return kernels
