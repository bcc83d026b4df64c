"""Histogram: how many values fall into each of equal bins, and how many into none."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distcache.strategies.base import SUM, Field, Fieldwise, Groups, State, Value


@dataclass(frozen=True, slots=True)
class Histogram(Fieldwise):
    """Counts of values in `bins` equal bins from `low` to `high`, all elements of a sample together.

    Reads as a dict of int64 `counts` [bins], `below`, `above`, `nan`, so that every value is counted somewhere, and
    `edges` [bins + 1]. Bins are torch.histogram's: `edges[i] <= x < edges[i + 1]`, and the last one has its right edge
    too; edges are float32, as torch.linspace gives them there, float64 for float64 values and integers.

    State: `binned` [bins + 3], int64, for what is below, the bins, above, NaN; `count`.

    Args:
        bins, low, high: ValueError unless there is a bin and `low < high` are numbers.
        per_element: a histogram for each element of a sample: `counts` […, bins], `below` […].
        dim: `"auto"`: the rows of a recorded value, while a value set by hand is one sample; or the dim of the samples.
    """

    bins: int
    low: float
    high: float
    per_element: bool = False
    dim: int | Literal["auto"] = "auto"

    groupable = True
    fields = (Field("binned", SUM), Field("count", SUM))
    ragged = False
    size = None
    accumulate = None

    def __post_init__(self) -> None:
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or self.bins < 1:
            raise ValueError(f"Histogram counts in bins=1 or more of them, got {self.bins!r}.")
        for name in ("low", "high"):  # as floats, so that 0 and 0.0 are one strategy on every rank
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, float(value))
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"Histogram's {name} is a number, got {value!r}.") from None
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Histogram goes from low to a larger high, got low={self.low}, high={self.high}.")
        self._check_width(torch.float64)

    def _check_width(self, dtype: torch.dtype) -> None:
        """ValueError for bins so narrow that values of this dtype can't be told apart in them."""
        least = 16 * torch.finfo(dtype).eps * max(abs(self.low), abs(self.high))
        if (self.high - self.low) / self.bins < least:
            raise ValueError(
                f"Histogram({self.bins}, {self.low}, {self.high}) has bins narrower than {least:.1e}, too narrow for "
                f"{dtype}: take fewer, or a range nearer to 0."
            )

    def split_dim(self, field: str, ndim: int, dim: int) -> int | None:
        if not self.per_element:
            raise ValueError(
                "a histogram of all elements in one isn't made of pieces that lie side by side: per_element=True."
            )
        return dim - 1 if field == "binned" else None

    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        x_nm = self._flat(value_n, weight_n)
        count = torch.tensor(len(x_nm), device=x_nm.device)
        if not self.per_element:
            return {"binned": self._binned(x_nm.reshape(-1, 1))[0], "count": count}
        return {"binned": self._binned(x_nm).view(*value_n.shape[1:], self.bins + 3), "count": count}

    def lift_groups(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups) -> State:
        x_nm = self._flat(value_n, weight_n)
        each = x_nm.shape[1] if self.per_element else 1  # histograms of a group
        column_nm = groups.of_n.unsqueeze(1) * each + torch.arange(each, device=x_nm.device)
        binned = self._binned(x_nm, column_nm, groups.num * each)
        shape = value_n.shape[1:] if self.per_element else ()
        return {"binned": binned.view(groups.num, *shape, self.bins + 3), "count": groups.count()}

    @staticmethod
    def _flat(value_n: Tensor, weight_n: Tensor | None) -> Tensor:
        """The m elements of each sample, [n, m]."""
        if weight_n is not None:
            raise TypeError("Histogram counts values and takes no weights.")
        return value_n.flatten(1) if value_n.dim() > 1 else value_n.unsqueeze(1)

    def take_slab(self, value: Value) -> State:
        value_nk, _ = self.samples(value)
        count = torch.full((value_nk.shape[1],), len(value_nk), device=value_nk.device)
        if self.per_element:
            return {"binned": self.lift(value_nk)["binned"], "count": count}
        by_key = value_nk.movedim(1, 0).flatten(1)  # [K, values]
        return {"binned": self._binned(by_key.T), "count": count}

    def _binned(self, x_nm: Tensor, column_nm: Tensor | None = None, num_columns: int | None = None) -> Tensor:
        """[num_columns, bins + 3]: the counts in each column, of x_nm itself or of those that `column_nm` names."""
        if column_nm is None or num_columns is None:
            num_columns = x_nm.shape[1]
            column_nm = torch.arange(num_columns, device=x_nm.device)
        exact = torch.float32 if x_nm.is_floating_point() and x_nm.dtype != torch.float64 else torch.float64
        self._check_width(exact)
        x_nm = x_nm.to(exact)
        edges = _padded_edges(self.bins, self.low, self.high, exact, x_nm.device)
        # An estimate of the place, then a look at the edges on both sides of it: 10 ms, where torch.bucketize took 54
        # ([4096, 576] on a CPU). 0 is below, bins + 1 from `high` on; bins of 16 ulp leave it no more than one off.
        scale = self.bins / (self.high - self.low)
        place_nm = (x_nm - self.low).mul_(scale).add_(1).clamp_(0, self.bins + 1).nan_to_num_(0).to(torch.int32)
        left_nm, right_nm = (edges.index_select(0, (place_nm + side).flatten()).view_as(x_nm) for side in (0, 1))
        place_nm += (x_nm >= right_nm).to(torch.int32)
        place_nm -= (x_nm < left_nm).to(torch.int32)
        place_nm = place_nm.masked_fill_(x_nm == edges[-2], self.bins).masked_fill_(x_nm.isnan(), self.bins + 2)
        width = self.bins + 3
        flat = place_nm.long().add_(column_nm * width).flatten()
        binned = torch.zeros(num_columns * width, dtype=torch.int64, device=x_nm.device)
        # Not bincount: on a GPU it would wait, to look for the largest.
        binned.scatter_add_(0, flat, torch.ones((), dtype=torch.int64, device=x_nm.device).expand(len(flat)))
        return binned.view(num_columns, width)

    def finalize(self, state: State) -> dict[str, Tensor]:
        binned = state["binned"]
        edges = torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64, device=binned.device)
        return {
            "counts": binned[..., 1:-2],
            "below": binned[..., 0],
            "above": binned[..., -2],
            "nan": binned[..., -1],
            "edges": edges,
        }


@functools.lru_cache(maxsize=64)
def _padded_edges(bins: int, low: float, high: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf, the edges of bins, NaN, which no value reaches; made on the CPU, so that they are alike on all devices."""
    with torch.inference_mode(False):
        ends = torch.tensor([-math.inf, math.nan], dtype=dtype)
        return torch.cat([ends[:1], torch.linspace(low, high, bins + 1, dtype=dtype), ends[1:]]).to(device)
