"""The sum of attention patterns by whatever is fastest where the call's tensors are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from distcache.attention import blockwise
from distcache.attention.positions import Align, Positions, positions
from distcache.attention.taps import AttentionCall


def pattern_sum(
    call: AttentionCall,
    spans: Sequence[tuple[int, int]],
    size: int,
    *,
    heads: Sequence[int] | None = None,
    queries: Positions = None,
    keys: Positions = None,
    align: Align = "start",
) -> Tensor:
    """`blockwise.pattern_sum`; on a GPU a Triton kernel's, where there is Triton and the kernel can serve.

    It can't where only some queries or keys are asked for, or they count from texts' ends. Float32, on the call's
    device; the same inputs give the same bits. Errors as in `blockwise`. Not a collective.
    """
    device = call.query_bhqd.device
    kernels = _kernels() if device.type == "cuda" else None
    every = positions(queries, size, align) == positions(keys, size, align, "keys") == range(size)
    if kernels is not None and every and kernels.usable(device) and kernels.can_serve(call):
        total_hss: Tensor = kernels.pattern_sum(call, spans, size, heads=heads)
        return total_hss
    return blockwise.pattern_sum(call, spans, size, heads=heads, queries=queries, keys=keys, align=align)


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of kernels, or None where Triton isn't installed: plain torch does the same."""
    try:
        from distcache.attention import kernels
    except ImportError:
        return None
    return kernels
