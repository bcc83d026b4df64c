"""TopK: the largest or smallest values of each element, and the samples and positions that they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distcache.strategies.base import MAX, MIN, SUM, Field, Fieldwise, Gathered, State, Value, is_indexed

NOBODY = torch.iinfo(torch.int64).max  # the sample of a place that nothing has taken yet; comes after every other


@dataclass(frozen=True, slots=True)
class TopK(Gathered):
    """The k largest values of every element, best first, with the sample and position of each.

    Of equal values the lowest sample wins, then the lowest position, so that the result is the same in every bit
    however samples were dealt. NaN wins over every number, as in `Max` and `Min`. Reads as a dict of `values`,
    `sample` and `position`, [k, …] each; where fewer than k samples were seen, the places left over have sample and
    position −1 and NaN for a value (of integers, the smallest int64). Values are float32 unless float64 went in;
    integers are int64.

    Samples are named by their index, so values must come with one: TypeError where they don't.

    State: `values`, `sample`, `position`, [k, …]; `count`. It grows with k and not with samples.

    Args:
        largest: False for the k smallest.
        dim: `"auto"`: the rows of a recorded value, while a value set by hand is one sample; or the dim of the samples.
    """

    k: int
    largest: bool = True
    dim: int | Literal["auto"] = "auto"

    fields = (Field("values", MAX), Field("sample", MIN), Field("position", MIN), Field("count", SUM))
    ragged = False
    size = None
    accumulate = None
    needs_index = True

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK keeps k=1 or more values, got {self.k!r}.")

    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        raise TypeError("TopK needs to know which samples these are: use take().")

    def take(self, value: Value) -> State:
        value_n, weight_n = self.samples(value)
        if weight_n is not None:
            raise TypeError("TopK takes no weights: a weight doesn't change which values are the largest.")
        columns = value.columns
        if columns is None or not is_indexed(columns):
            raise TypeError(
                "TopK names the samples of its values, so they need an index: dc.record(model, sites, index=index), or "
                "for values of your own cache.cat(local, index=index) or cache.add(key, value, index=index)."
            )
        if len(columns) != len(value_n):
            raise ValueError(
                f"TopK expects one index per sample, got {len(columns)} for {len(value_n)} samples {value_n.shape[1:]}."
            )
        if not value_n.is_floating_point():
            value_n = value_n.to(torch.int64)
        elif value_n.dtype != torch.float64:
            value_n = value_n.float()
        sample_n, position_n = (columns.by_name[name].to(value_n.device) for name in ("sample", "position"))
        count = torch.tensor(len(value_n), device=value_n.device)
        return {**self._best_of_rows(value_n, sample_n, position_n), "count": count}

    def _best_of_rows(self, value_n: Tensor, sample_n: Tensor, position_n: Tensor) -> State:
        n, shape = len(value_n), value_n.shape[1:]
        chosen = value_n.new_full((self.k, *shape), MAX.identity(value_n.dtype))
        sample, position = (sample_n.new_full((self.k, *shape), NOBODY) for _ in range(2))
        k = min(self.k, n)
        if k and value_n.numel():
            # Not a stable sort of everything: 150 ms, where this took 17 ([4096, 576] on a CPU, k = 10).
            merit_n = _merit(value_n, self.largest)
            order = torch.sort(position_n, stable=True).indices
            order = order[torch.sort(sample_n[order], stable=True).indices]
            before_n = torch.empty_like(order)
            before_n[order] = torch.arange(n, device=order.device)  # how many rows come before, where values tie
            before_n = before_n.to(torch.int32).view(-1, *[1] * len(shape))
            least = torch.topk(merit_n, k, dim=0).values[-1]
            # All that are better than the k-th best, then those that equal it by their order.
            points_n = (2 * n - before_n).expand(value_n.shape) - n * (merit_n == least).to(torch.int32)
            rows = torch.topk(points_n.masked_fill(merit_n < least, 0), k, dim=0).indices
            sample[:k], position[:k] = sample_n[rows], position_n[rows]
            chosen[:k] = value_n.gather(0, rows)
        return self._best({"values": chosen, "sample": sample, "position": position}, 0)

    def take_slab(self, value: Value) -> State:
        state = self.take(value)
        count = state.pop("count").expand(value.data.shape[1])
        return {**{name: tensor.movedim(1, 0) for name, tensor in state.items()}, "count": count}

    def fold_(self, into: State, other: State) -> None:
        dim = into["count"].dim()  # that of the k places, behind the keys
        names = ("values", "sample", "position")
        best = self._best({name: torch.cat([into[name], other[name]], dim) for name in names}, dim)
        for name in names:
            into[name].copy_(best[name])
        into["count"].add_(other["count"])

    def _best(self, state: State, dim: int) -> State:
        """The k best of all places along `dim`, best first, in order of sample and position where they tie."""
        sample = state["sample"]
        merit = _merit(state["values"], self.largest)
        merit = merit.masked_fill(sample == NOBODY, torch.iinfo(merit.dtype).min)
        order = torch.sort(state["position"], dim=dim, stable=True).indices
        order = order.gather(dim, torch.sort(sample.gather(dim, order), dim=dim, stable=True).indices)
        by_merit = torch.sort(merit.gather(dim, order), dim=dim, descending=True, stable=True).indices
        order = order.gather(dim, by_merit.narrow(dim, 0, self.k))
        return {name: tensor.gather(dim, order) for name, tensor in state.items()}

    def finalize(self, state: State) -> dict[str, Tensor]:
        nobody = state["sample"] == NOBODY
        values = state["values"]
        if values.is_floating_point():
            values = values.masked_fill(nobody, float("nan"))
        return {
            "values": values,
            "sample": state["sample"].masked_fill(nobody, -1),
            "position": state["position"].masked_fill(nobody, -1),
        }

    def result_dtype(self, given: torch.dtype) -> torch.dtype:
        return torch.int64 if not given.is_floating_point else Fieldwise.result_dtype(self, given)


def _merit(values: Tensor, largest: bool) -> Tensor:
    """Integers that are the larger the better a value is: NaN above all, -0.0 with 0.0."""
    if not values.is_floating_point():
        return values if largest else ~values
    bits = (values + 0.0).view(torch.int32 if values.element_size() == 4 else torch.int64)
    merit = bits ^ ((bits >> (8 * values.element_size() - 1)) & torch.iinfo(bits.dtype).max)
    return (merit if largest else ~merit).masked_fill(values.isnan(), torch.iinfo(bits.dtype).max)
