"""AveragePattern: the exact mean of attention patterns over sequences of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.strategies.base import SUM, Field, Fieldwise, State
from distcache.strategies.positions import Align, Positions, as_stretch, counts_at, num_positions, positions


@dataclass(frozen=True, slots=True)
class AveragePattern(Fieldwise):
    """Mean attention pattern, of a head [S, S] or of several [H, S, S]: row q is averaged over the `count[q]` sequences
    that have a query q.

    State: `total` [(H,) S, S], the sum of patterns aligned at the first token, or at the last, which then lies at
    index 0; `count` [(H,) S, 1], int64, and where only some positions are asked for `keys` [(H,) 1, S], int64, how many
    sequences have a key. Counting per pair instead would let an encoder's rows sum to 2. They grow to the longest
    sequence, in steps of 128.

    Results are as large as the longest sequence, positions ascending; weights are of whole rows, whichever keys are
    asked for.

    Args:
        size: the longest sequence, fixed, so that the room's bytes are known before the first pass; longer ones raise.
        accumulate: dtype of totals between batches, float64 unless said otherwise.
        align: where positions count from: 0, 1, … from each sequence's first token, or with "end" …, −2, −1 to its
            last, so that row −1 is that of all last tokens.
        queries, keys: only these rows and columns: a slice or a range of positions (kept as its three numbers); None
            for all.
    """

    dim: int | Literal["auto"] = "auto"
    size: int | None = None
    accumulate: torch.dtype | None = None
    align: Align = "start"
    queries: Positions = None
    keys: Positions = None

    fields = (Field("total", SUM), Field("count", SUM), Field("keys", SUM))
    ragged = True

    def __post_init__(self) -> None:
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"AveragePattern has size=1 or more, the longest sequence's, got {self.size!r}.")
        for name in ("queries", "keys"):
            stretch = as_stretch(getattr(self, name), self.align, name)
            object.__setattr__(self, name, None if stretch is None else tuple(stretch))

    @property
    def is_whole(self) -> bool:
        """Whether all positions are asked for, so that there are as many keys as queries."""
        return self.queries is None and self.keys is None

    @property
    def groupable(self) -> bool:  # type: ignore[override]
        """Whether its states have one size, whatever comes."""
        return None not in self.limits("total", 2)

    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        """value_n [n, (H,) S, S]: n whole patterns of one length."""
        if weight_n is not None:
            raise TypeError("AveragePattern takes no weights.")
        if value_n.dim() < 3 or value_n.shape[-1] != value_n.shape[-2]:
            raise ValueError(f"AveragePattern expects square patterns, [S, S] each, got {tuple(value_n.shape[1:])}.")
        length = value_n.shape[-1]
        rows, columns = positions(self.queries, length, self.align), positions(self.keys, length, self.align)
        if self.align == "end":
            rows, columns = rows[::-1], columns[::-1]
        total = value_n.to(torch.promote_types(value_n.dtype, torch.float32)).sum(0)
        if not self.is_whole or self.align == "end":
            total = total[..., [q % length for q in rows], :][..., [k % length for k in columns]]
        counts = self.counted([length] * len(value_n), length, total.device)
        counts = {name: count.expand(*total.shape[:-2], *count.shape) for name, count in counts.items()}
        return {"total": total.to(self.accumulate or torch.float64), **counts}

    def counted(self, lengths: Sequence[int], longest: int, device: torch.device) -> State:
        """How many sequences of these lengths have each query, `count` [Q, 1], and key, `keys` [1, K], of those that
        sequences of at most `longest` tokens can have.
        """
        found = {}
        for name, which, dim in (("count", self.queries, 1), ("keys", self.keys, 0)):
            if name == "count" or not self.is_whole:
                wanted = positions(which, longest, self.align)
                found[name] = counts_at(lengths, wanted, self.align).to(device).unsqueeze(dim)
        return found

    def accumulators(self, state: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        # A tap brings float32 sums of one pass; they are added to float64.
        return {name: torch.int64 for name in state} | {"total": self.accumulate or torch.float64}

    def ragged_dims(self, field: str, ndim: int) -> tuple[bool, ...]:
        return (*[False] * (ndim - 2), field != "keys", field != "count")

    def limits(self, field: str, ndim: int) -> tuple[int | None, ...]:
        room = []
        for which in (self.queries, self.keys):
            stretch = as_stretch(which, self.align)
            numbers = [num_positions(stretch, self.align)]
            numbers += [] if self.size is None else [len(positions(stretch, self.size, self.align))]
            room.append(min((n for n in numbers if n is not None), default=None))
        return (*[None] * (ndim - 2), *room)

    def counts(self, state: State) -> Tensor:
        count = state["count"][..., : _extent(state["count"][..., 0]), :]
        return count if self.align == "start" else count.flip(-2)

    def finalize(self, state: State) -> Any:
        total, count = state["total"], state["count"]
        q = _extent(count[..., 0])
        k = q if "keys" not in state else _extent(state["keys"][..., 0, :])
        mean = total[..., :q, :k] / count[..., :q, :]
        return mean if self.align == "start" else mean.flip(-2, -1)


def _extent(count_p: Tensor) -> int:
    """How many positions [..., P] some sequence has."""
    seen = count_p.flatten(0, -2).amax(0).nonzero() if count_p.dim() > 1 else count_p.nonzero()
    return int(seen[-1]) + 1 if len(seen) else 0
