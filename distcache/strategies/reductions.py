"""Sum, Mean, Moments, Max and Min: reductions over samples whose state doesn't grow with their number.

Shapes: n samples, … the shape of one sample. Accumulators are float64 (int64 for integers, `accumulate=` for
another dtype); within a batch floats are summed in float32, pairwise, as torch does: 1e-7 relative.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distcache.strategies.base import MAX, MIN, SUM, Field, Fieldwise, Groups, State, Value, corner, wide


def _exact(value_n: Tensor) -> Tensor:
    """Floats in a dtype whose sums over a batch are good to 1e-7; integers as int64."""
    if value_n.dtype.is_floating_point:
        return value_n if value_n.dtype == torch.float64 else value_n.float()
    return value_n.to(torch.int64)


def _shaped_weight(weight_n: Tensor, value_n: Tensor) -> Tensor:
    """One weight per sample as [n, 1, …]; one per element as it is."""
    if weight_n.shape == value_n.shape:
        return weight_n
    return wide(weight_n, value_n)


def _sum(x_n: Tensor, groups: Groups | None, dtype: torch.dtype | None = None) -> Tensor:
    """Σ x over all samples, […], or over those of each group, [num, …], in float64 or int64 if not said otherwise."""
    if groups is None:
        return x_n.sum(0, dtype=dtype)
    return groups.sum(x_n, dtype or (torch.float64 if x_n.is_floating_point() else torch.int64))


@dataclass(frozen=True, slots=True)
class _Reducing(Fieldwise):
    """What the reductions share: their parameters, counting, and cutting ragged results to their extent.

    Args:
        dim: `"auto"`: the rows of a recorded value, while a value set by hand is one sample; or the dim of the
            samples.
        ragged: values of different sizes are aligned at index 0 and counted per element; a tuple names the dims of
            one sample that may differ. Elements that no sample reached read NaN (of a sum: 0).
        size: the fixed extent of every ragged dim, of results too; larger values raise. Without it results are as
            large as the largest sample.
        accumulate: dtype of totals between batches, float64 unless said otherwise. float32 halves the memory
            and drifts: a million additions of 0.1 are 1% off.
    """

    dim: int | Literal["auto"] = "auto"
    ragged: bool | tuple[int, ...] = False
    size: int | tuple[int, ...] | None = None
    accumulate: torch.dtype | None = None

    groupable = True

    @abc.abstractmethod
    def _lift(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups | None) -> State:
        """The state of all samples, or those of groups of them, side by side."""

    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        return self._lift(value_n, weight_n, None)

    def lift_groups(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups) -> State:
        return self._lift(value_n, weight_n, groups)

    def lift_groups_slab(self, value_nk: Tensor, groups: Groups) -> State:
        state, k = self.lift_groups(value_nk, None, groups), value_nk.shape[1]
        return {n: t.movedim(1, 0) if t.dim() > 1 else t.expand(k, groups.num) for n, t in state.items()}

    def take_slab(self, value: Value) -> State:
        # Element by element, so that all keys are one operation; only what has no dims yet is repeated.
        state = self.take(value)
        num_keys = value.data.shape[1]
        return {name: tensor if tensor.dim() else tensor.expand(num_keys) for name, tensor in state.items()}

    def _accumulator(self, value_n: Tensor) -> torch.dtype:
        if self.accumulate is not None:
            return self.accumulate
        return torch.float64 if value_n.dtype.is_floating_point else torch.int64

    def _count(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups | None) -> Tensor:
        """Samples behind each element: [] where all count alike, else the shape of one sample; [num, …] of groups."""
        if weight_n is not None and weight_n.shape == value_n.shape and value_n.dim() > 1:
            return _sum(weight_n != 0, groups)
        if groups is not None:
            return groups.count() if weight_n is None else groups.sum(weight_n != 0, torch.int64)
        shape = value_n.shape[1:] if self.ragged else ()
        if weight_n is not None:
            return (weight_n != 0).sum().expand(shape).clone()
        return torch.full(shape, len(value_n), dtype=torch.int64, device=value_n.device)

    def _cut(self, result: Tensor, state: State) -> Tensor:
        """A ragged result without the room that no sample reached; of `size`, where that is fixed."""
        count = state["count"]
        if not self.ragged or count.shape != result.shape:
            return result
        extent = list(count.shape)
        for dim, grows in enumerate(self.ragged_dims("count", count.dim())):
            if grows and self.size is None:
                reached = count.movedim(dim, 0).flatten(1).any(1).nonzero() if count.dim() > 1 else count.nonzero()
                extent[dim] = int(reached.max()) + 1 if len(reached) else 0
        return result[corner(extent)]


@dataclass(frozen=True, slots=True)
class Sum(_Reducing):
    """Sum over samples, element by element.

    State: `total`, the shape of one sample; `count`. A `Weighted` value enters as value × weight. The sum of
    integers is an int64, which wraps as torch's does; of floats, or of integers with weights, a float32 unless
    float64 went in.
    """

    fields = (Field("total", SUM), Field("count", SUM))

    def _lift(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups | None) -> State:
        x = _exact(value_n)
        if weight_n is not None:
            x = x.double() * _shaped_weight(weight_n, value_n)
        return {"total": _sum(x, groups).to(self._accumulator(x)), "count": self._count(value_n, weight_n, groups)}

    def finalize(self, state: State) -> Tensor:
        return self._cut(state["total"], state)

    def result_dtype(self, given: torch.dtype) -> torch.dtype:
        if not given.is_floating_point and self.accumulate is None:
            return torch.int64
        return Fieldwise.result_dtype(self, given)


@dataclass(frozen=True, slots=True)
class Mean(_Reducing):
    """Mean over samples, element by element: Σ w·x / Σ w, with w = 1 where no weight was given.

    State: `total`; `count`; for `Weighted` values `weight`, float64. Never a mean of means: totals and counts
    are what combines. Without samples the mean is NaN.
    """

    fields = (Field("total", SUM), Field("count", SUM), Field("weight", SUM))

    def _lift(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups | None) -> State:
        x, count = _exact(value_n), self._count(value_n, weight_n, groups)
        if weight_n is None:
            # Integers in float64, where a batch of large ones can't wrap.
            dtype = None if x.is_floating_point() else torch.float64
            return {"total": _sum(x, groups, dtype).to(self.accumulate or torch.float64), "count": count}
        weight = _shaped_weight(weight_n, value_n)
        total = _sum(x.double() * weight, groups)
        per_element = self.ragged or weight_n.shape == value_n.shape
        summed = _sum(weight.expand(value_n.shape) if per_element else weight_n, groups)
        return {"total": total.to(self.accumulate or torch.float64), "count": count, "weight": summed}

    def finalize(self, state: State) -> Tensor:
        mass = wide(state.get("weight", state["count"]), state["total"])
        return self._cut(state["total"] / mass, state)  # 0 / 0 is NaN


@dataclass(frozen=True, slots=True)
class Moments(_Reducing):
    """Count, mean, variance and standard deviation over samples, element by element.

    State: `total`, `count`, `m2` = Σ (x − mean)², centred on this state's own mean, `weight` for `Weighted`
    values. Two states combine as in Chan, Golub, LeVeque 1979; sums of squares, which cancel, are never made.
    Across ranks totals are reduced first, then each `m2`, re-centred on the mean of all.

    `correction`: the variance is m2 / (count − correction), as in torch.var; 0 divides by the count.
    """

    correction: int = 1

    fields = (Field("total", SUM), Field("count", SUM), Field("weight", SUM), Field("m2", SUM, round=1))

    def _lift(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups | None) -> State:
        x = _exact(value_n)
        x = x if x.is_floating_point() else x.double()
        weight = None if weight_n is None else _shaped_weight(weight_n, value_n)
        n: Tensor | int = len(x) if groups is None else wide(groups.count(), x).double()
        if weight is not None:
            n, x = _sum(weight.expand(x.shape), groups), x.double()
        # A provisional centre c in the input's precision, then the exact correction of it (the two-pass
        # algorithm, corrected): m2 = Σ(x−c)² − (Σ(x−c))²/n.
        divisor = n.clamp_min(torch.finfo(n.dtype).tiny) if isinstance(n, Tensor) else max(n, 1)
        centre = (_sum(x if weight is None else x * weight, groups) / divisor).to(x.dtype)
        off = x - (centre if groups is None else groups.spread(centre))
        first = _sum(off if weight is None else off * weight, groups).double()
        second = _sum(off * off if weight is None else off * off * weight, groups).double()
        acc = self.accumulate or torch.float64
        state = {
            "total": (centre.double() * n + first).to(acc),
            "count": self._count(value_n, weight_n, groups),
            "m2": (second - first * first / divisor).clamp_min(0).to(acc),
        }
        if weight_n is not None:
            per_element = self.ragged or weight_n.shape == value_n.shape
            assert weight is not None
            state["weight"] = _sum(weight.expand(x.shape) if per_element else weight_n, groups)
        return state

    def fold_(self, into: State, other: State) -> None:
        mine = {name: held[corner(other[name].shape)] for name, held in into.items()}
        n_a, n_b = _mass(mine), _mass(other)
        apart = _mean(other["total"], n_b) - _mean(mine["total"], n_a)
        # n_a·n_b/(n_a + n_b) is 0 where either saw nothing.
        mine["m2"].add_(other["m2"] + apart * apart * (n_a * n_b / (n_a + n_b).clamp_min(1e-300)))
        for name in into:
            if name != "m2":
                mine[name].add_(other[name])

    def recentre_(self, local: State, merged: State) -> None:
        n = _mass(local)
        off = _mean(local["total"], n) - _mean(merged["total"], _mass(merged))
        local["m2"].addcmul_(n * off, off)

    def finalize(self, state: State) -> dict[str, Tensor]:
        n = _mass(state)
        variance = self._cut(state["m2"] / (n - self.correction).clamp_min(0), state)
        mean = self._cut(state["total"] / n, state)
        count = self._cut(state["count"], state)
        return {"count": count, "mean": mean, "variance": variance, "std": variance.sqrt()}


def _mass(state: State) -> Tensor:
    """Σ w, or the count, as float64, so that it broadcasts to `total`."""
    return wide(state.get("weight", state["count"]).double(), state["total"])


def _mean(total: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > 0, total / mass, 0.0)


@dataclass(frozen=True, slots=True)
class _Extreme(_Reducing):
    """The largest or smallest value over samples. NaN wins over every number, on every rank and in every order.

    Without samples: NaN, of integers the reduction's identity.
    """

    _reduction = SUM

    def _lift(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups | None) -> State:
        if weight_n is not None:
            raise TypeError(f"{type(self).__name__} takes no weights: a weight doesn't change which value is largest.")
        x = _exact(value_n)
        reduction = self._reduction
        if groups is not None:
            best = groups.extreme(x, reduction)
        elif len(x):
            best = x.amax(0) if reduction is MAX else x.amin(0)
        else:
            best = x.new_full(x.shape[1:], reduction.identity(x.dtype))
        return {"extreme": best, "count": self._count(value_n, None, groups)}

    def finalize(self, state: State) -> Tensor:
        extreme, count = state["extreme"], state["count"]
        if extreme.is_floating_point():
            extreme = extreme.masked_fill(wide(count, extreme) == 0, float("nan"))
        return self._cut(extreme, state)

    def result_dtype(self, given: torch.dtype) -> torch.dtype:
        return given if not given.is_floating_point else Fieldwise.result_dtype(self, given)


@dataclass(frozen=True, slots=True)
class Max(_Extreme):
    """The largest value over samples, element by element. State: `extreme`, `count`. Integers keep their dtype."""

    _reduction = MAX
    fields = (Field("extreme", MAX), Field("count", SUM))


@dataclass(frozen=True, slots=True)
class Min(_Extreme):
    """The smallest value over samples, element by element. State: `extreme`, `count`. Integers keep their dtype."""

    _reduction = MIN
    fields = (Field("extreme", MIN), Field("count", SUM))
