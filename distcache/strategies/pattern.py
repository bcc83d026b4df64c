"""AveragePattern: the exact mean of attention patterns over sequences of different lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distcache.strategies.base import SUM, Field, Fieldwise, State


@dataclass(frozen=True, slots=True)
class AveragePattern(Fieldwise):
    """Mean attention pattern, of a head [S, S] or of several [H, S, S]: row q is averaged over the `count[q]` sequences
    that have a query q.

    State: `total` [(H,) S, S], the sum of patterns aligned at position 0; `count` [(H,) S, 1], int64. Counting per
    pair instead would let an encoder's rows sum to 2. Both grow to the longest sequence, in steps of 128.

    Args:
        size: the room for S, fixed, so that its bytes are known before the first pass; longer sequences raise.
            Results are as large as the longest sequence in any case.
        accumulate: dtype of totals between batches, float64 unless said otherwise.
    """

    dim: int | Literal["auto"] = "auto"
    size: int | tuple[int, ...] | None = None
    accumulate: torch.dtype | None = None

    fields = (Field("total", SUM), Field("count", SUM))
    ragged = True

    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        """value_n [n, (H,) S, S]: n patterns of one length."""
        if weight_n is not None:
            raise TypeError("AveragePattern takes no weights.")
        if value_n.dim() < 3 or value_n.shape[-1] != value_n.shape[-2]:
            raise ValueError(f"AveragePattern expects square patterns, [S, S] each, got {tuple(value_n.shape[1:])}.")
        total = value_n.to(torch.promote_types(value_n.dtype, torch.float32)).sum(0)
        count = torch.full((*total.shape[:-1], 1), len(value_n), dtype=torch.int64, device=total.device)
        return {"total": total.to(self.accumulate or torch.float64), "count": count}

    def accumulators(self, state: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        # A tap brings float32 sums of one pass; they are added to float64.
        return {"total": self.accumulate or torch.float64, "count": torch.int64}

    def ragged_dims(self, field: str, ndim: int) -> tuple[bool, ...]:
        return (*[False] * (ndim - 2), True, field == "total")

    def finalize(self, state: State) -> Tensor:
        count = state["count"]
        seen = count.flatten(0, -3).amax(0).nonzero() if count.dim() > 2 else count.nonzero()
        s = int(seen[:, 0].max()) + 1 if len(seen) else 0
        return state["total"][..., :s, :s] / count[..., :s, :]
